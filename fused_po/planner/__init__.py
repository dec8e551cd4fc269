"""`python -m fused_po plan`: what the head and the loss of a training step will cost on each rank, before it runs."""

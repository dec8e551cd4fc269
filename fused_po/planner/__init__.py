"""`python -m fused_po plan`: estimate the cost of the LM head and the loss of a training step on each rank."""

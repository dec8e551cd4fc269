"""A module for each library whose trainers can run on fused_po's log-probs. Nothing of it is imported before."""

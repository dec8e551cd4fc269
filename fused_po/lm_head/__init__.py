"""The LM head: log-probs, exact KL and losses from hidden states, computed in tiles of logits."""

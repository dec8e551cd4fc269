"""The LM head: log-probs, exact KL and losses from hidden states, a tile of logits at a time."""

"""One module for each library whose models or trainers run on our log-probs; none is imported before it is named."""

"""A module for each library whose trainers can run on fused_po. Nothing of it is imported before it is used."""

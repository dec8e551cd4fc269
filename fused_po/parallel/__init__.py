"""Heads and logits whose vocabulary is sharded over the ranks of a process group."""

from fused_po.parallel.vocab import VocabParallel

__all__ = ["VocabParallel"]

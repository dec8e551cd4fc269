"""The zoo's table: one row for each loss and setting, one file for each family of losses."""

from . import divergence, pairwise, policy, reward, unpaired
from .row import F64, Row, backward, tensors, with_gradients

TABLE: list[Row] = [*pairwise.ROWS, *divergence.ROWS, *reward.ROWS, *unpaired.ROWS, *policy.ROWS]

__all__ = ["F64", "TABLE", "Row", "backward", "tensors", "with_gradients"]

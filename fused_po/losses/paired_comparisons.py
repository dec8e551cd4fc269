"""Player strengths from a table of wins: maximum likelihood of the Bradley-Terry model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_po import checks

MAX_STEPS = 200


class BradleyTerryFit(NamedTuple):
    """The result of `bradley_terry_mle`, float64.

    strengths: [n], relative to the first player, whose strength is 1.
    standard_errors: [n], of log(strength / strength of the first player); the first is 0.
    win_probability: [n, n], the probability that the row's player beats the column's, s_i / (s_i + s_j).
    """

    strengths: Tensor
    standard_errors: Tensor
    win_probability: Tensor


def bradley_terry_mle(wins: Tensor, *, names: Optional[Sequence[str]] = None) -> BradleyTerryFit:
    """Maximum likelihood strengths pi for a table of wins, where P(i beats j) = pi_i / (pi_i + pi_j).

    Bradley and Terry 1952, Biometrika 39. Hunter 2004, Annals of Statistics 32: the condition for a finite maximum
    (assumption 1) and the iteration for the first steps; Newton steps follow. The standard errors are those of the
    log-strengths relative to the first player: square roots of the diagonal of the inverse Fisher information without
    the first row and column. To first order, the standard error of a strength is the strength times that value.
    The function iterates until it converges and reads values on the host, so it is for evaluation, not for a training
    step.

    Args:
        wins: [n, n], how often the row's player beat the column's: >= 0, fractions too (a draw is half a win for each),
            0 on the diagonal.
        names: n names of the players, for error messages. None: their indices.

    Raises:
        ValueError: the table is not square, holds negative numbers or NaN, or has no finite maximum. A finite maximum
            exists if and only if, for every split of the players into two groups, each group has won against the other.
    """
    table = _checked(wins)
    n = len(table)
    names = range(n) if names is None else names
    labels = [*map(str, names if isinstance(names, str) else checks.as_tuple("names", names, "names"))]
    if len(labels) != n:
        raise ValueError(f"names: got length {len(labels)}, expected {n}, one for each row of wins")
    _refuse_no_maximum(table, labels)
    scores = _maximize(table)
    reduced = _information(table, scores)[1:, 1:]
    errors = torch.zeros_like(scores)
    errors[1:] = torch.linalg.inv(reduced).diagonal().sqrt()
    return BradleyTerryFit(scores.exp(), errors, torch.sigmoid(scores[:, None] - scores[None]))


def _checked(wins: Tensor) -> Tensor:
    table = checks.tensor("wins", wins).detach()
    checks.refuse_without_values("wins", table)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table):
        raise ValueError(f"wins: got shape {tuple(table.shape)}, expected [n, n] with n >= 1")
    if table.is_complex():
        raise TypeError(f"wins: got dtype {table.dtype}, expected real numbers")
    table = table.double()
    bad = ~table.isfinite() | (table < 0)
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"wins: got {table[at].item()} at {at}, allowed are finite numbers >= 0")
    if bool(table.diagonal().any()):
        raise ValueError(
            f"wins: got {table.diagonal().tolist()} on the diagonal, expected zeros: no player plays itself"
        )
    return table


def _reach(edges: Tensor) -> Tensor:
    """[n, n] booleans: whether a path leads from the row to the column."""
    reach = edges | torch.eye(len(edges), dtype=torch.bool, device=edges.device)
    for _ in range(len(edges).bit_length()):  # each round doubles the lengths of the paths
        reach = (reach.double() @ reach.double()) > 0
    return reach


def _refuse_no_maximum(table: Tensor, labels: list[str]) -> None:
    """Raise, naming the players, unless every player has beaten every other one, directly or through others."""
    beaten = _reach(table > 0)
    if bool(beaten.all()):
        return

    def players(selected: Tensor) -> str:
        return ", ".join(label for label, is_selected in zip(labels, selected.tolist()) if is_selected)

    fix = "add games between them, leave players out, or add a small number such as 0.5 to both counts of pairs"
    met = _reach((table + table.T) > 0)
    if not bool(met.all()):
        raise ValueError(
            f"wins: {players(met[0])} never played {players(~met[0])}, so their strengths cannot be compared; {fix}"
        )
    group = beaten[:, int(beaten.sum(0).argmin())]  # players that beat the least beaten one: no other player beat them
    problem = f"{players(group)} never lost to {players(~group)}"
    if 2 * int(group.sum()) > len(labels):
        problem = f"{players(~group)} never beat {players(group)}"
    raise ValueError(f"wins: {problem}, so no finite strengths maximize the likelihood; {fix}")


def _maximize(table: Tensor) -> Tensor:
    """[n] log-strengths, the first 0: a few of Hunter's steps, then Newton steps, halved where they overshoot."""
    games, won = table + table.T, table.sum(1)
    scores = torch.zeros_like(won)
    if len(table) == 1:
        return scores
    for _ in range(10):
        strengths = scores.exp()
        scores = (won / (games / (strengths[:, None] + strengths[None])).sum(1)).log()
        scores = scores - scores[0]
    value = _log_likelihood(table, scores)
    for _ in range(MAX_STEPS):
        gradient = won - (games * torch.sigmoid(scores[:, None] - scores[None])).sum(1)
        step = torch.zeros_like(scores)
        step[1:] = torch.linalg.solve(_information(table, scores)[1:, 1:], gradient[1:])
        largest = step.abs().max()
        if largest <= 1e-13 * (1 + scores.abs().max()):
            return scores + step
        scale = 1.0
        while scale > 1e-4 and _log_likelihood(table, scores + scale * step) < value:
            scale /= 2
        if scale <= 1e-4:  # no smaller step improves the likelihood: rounding limits it
            return scores
        scores = scores + scale * step
        value = _log_likelihood(table, scores)
    raise ValueError(
        f"wins: no convergence in {MAX_STEPS} steps (last step {largest.item():.1e}), since some players win almost "
        "always; leave them out, or add a small number such as 0.5 to both counts of pairs"
    )


def _log_likelihood(table: Tensor, scores: Tensor) -> Tensor:
    return (table * logsigmoid(scores[:, None] - scores[None])).sum()


def _information(table: Tensor, scores: Tensor) -> Tensor:
    """[n, n] Fisher information of the log-strengths: a weighted graph Laplacian."""
    p = torch.sigmoid(scores[:, None] - scores[None])
    weights = (table + table.T) * p * p.T  # 1 - p is p.T
    return weights.sum(1).diag() - weights

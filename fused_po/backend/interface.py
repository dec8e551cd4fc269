"""The interface of a backend: its functions, the order of their results, and the rows of its buffers.

A backend is a module with functions of `Backend`: `fused_po.reference`, which is plain PyTorch and has all of them, or
a folder `kernels/<name>/`. Shapes: logits are [O, I, V] with contiguous columns and any strides of O and I; N = O * I
rows; labels are [N]. Statistics are fp32 (float64 for float64 logits).

z = outer * tanh(inner * logits), or outer * logits where inner is None, are the logits that go into the softmax.

`tests/kernels/test_backend_interface.py` holds every backend's signatures, and the numbers of its rows, to this file.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, Optional, Protocol, Union

import torch
from torch import Tensor

DIFFERENTIABLE = ("logps", "entropy", "lse")


class Outputs(NamedTuple):
    """Which statistics of a row are requested."""

    logps: bool = False
    entropy: bool = False
    lse: bool = False
    mean_logits: bool = False
    is_top1: bool = False
    log_sum_sq_probs: bool = False

    @property
    def auxiliary(self) -> tuple[bool, bool, bool]:
        """Those without a gradient: the rows of RowStats.aux."""
        return self[len(DIFFERENTIABLE) :]

    @property
    def differentiable(self) -> tuple[bool, bool, bool]:
        """Those with a gradient: the first fields of RowStats."""
        return self[: len(DIFFERENTIABLE)]

    @property
    def bits(self) -> int:
        """As a backend takes them: the i-th bit stands for the i-th field."""
        return BITS[self]

    @staticmethod
    def of(bits: int) -> Outputs:
        """The inverse of `bits`."""
        return OUTPUTS[bits]


OUTPUTS = [Outputs(*flags[::-1]) for flags in itertools.product((False, True), repeat=len(Outputs._fields))]
BITS = {outputs: bits for bits, outputs in enumerate(OUTPUTS)}
LOGPS, LOGPS_AND_ENTROPY = Outputs(logps=True).bits, Outputs(logps=True, entropy=True).bits


class Scaling(NamedTuple):
    """The scaling from raw logits to the logits of the softmax."""

    outer: float = 1.0
    inner: Optional[float] = None


class Grads(NamedTuple):
    """Incoming gradients of logps, entropy and lse, each [N] or None."""

    logps: Optional[Tensor] = None
    entropy: Optional[Tensor] = None
    lse: Optional[Tensor] = None

    @property
    def absent(self) -> bool:
        """Whether there is none at all; a backend's `gradient` then forms the basis."""
        return self.logps is None and self.entropy is None and self.lse is None

    @property
    def only_logps(self) -> bool:
        """Whether a row's gradient in the logits is a multiple of its basis."""
        return self.entropy is None and self.lse is None

    def requested(self, outputs: Outputs) -> Grads:
        """The gradients of the requested outputs; those of other outputs become None."""
        return Grads(
            self.logps if outputs.logps else None,
            self.entropy if outputs.entropy else None,
            self.lse if outputs.lse else None,
        )

    def contiguous(self) -> Grads:
        """The same, contiguous."""
        return Grads(*[None if g is None else g.contiguous() for g in self])


class RowStats(NamedTuple):
    """The statistics of N rows, in the order in which a backend returns them. Those not requested have no elements."""

    logps: Tensor  # [N]
    entropy: Tensor  # [N]
    lse: Tensor  # [N]
    aux: Tensor  # [AuxRow.COUNT, N], if one of them is asked for
    saved: Tensor  # [SavedRow.COUNT, N], what a backward needs


class AuxRow:
    """Rows of `aux`: mean of z, whether the label is the argmax, log of the sum of squared probabilities.

    The order is that of the fields of Outputs. A new output goes to the end of both.
    """

    MEAN_LOGITS, IS_TOP1, LOG_SUM_SQ_PROBS = range(3)
    COUNT = 3


class SavedRow:
    """Rows of `saved`: the largest z, the log of the sum of exponentials above it, and the label's log-prob.

    NORM is +inf for a row that is ignored. Only the backend itself reads SHIFT and NORM: Triton's are base 2.
    """

    SHIFT, NORM, LOGP = range(3)
    COUNT = 3


class DPORow:
    """Rows of `tokens` [DPORow.COUNT, N] of the DPO functions: those of SavedRow, and the reference's log-prob."""

    SHIFT, NORM, LOGP, REF_LOGP = range(4)
    COUNT = 4


class PairRow:
    """Rows of `pairs` [PairRow.COUNT, B] of the DPO functions; SLOPE is d loss / d log-prob of the chosen answer."""

    SLOPE, CHOSEN_REWARD, REJECTED_REWARD, MARGIN, ACCURACY, KL_SUM, TOKENS = range(7)
    COUNT = 7


class KLRow:
    """Rows of `tokens` [KLRow.COUNT, N] of the exact KL: results first, then what the gradient needs."""

    KL, LOGP, REF_LOGP, ENTROPY, SHIFT, NORM, REF_SHIFT, REF_NORM, CENTER = range(9)
    COUNT = 9


class PolicyRow:
    """Rows of `tokens` [PolicyRow.COUNT, N] of the policy losses.

    SLOPE is weight * d loss / d log-prob. CLIPPED is -1 (below the range), 0 or 1 (above).
    """

    SHIFT, NORM, LOGP, ENTROPY, LOSS, KL, RATIO, CLIPPED, SLOPE = range(9)
    COUNT = 9


class Form(NamedTuple):
    """The policy loss of a token: that of `kind`, plus kl_coef KL, minus entropy_coef H.

    With the advantage A and rho = pi / pi_old:

        clip      -min(rho A, clip(rho, low, high) A), and where A < 0 at most -bound A
        weight    -stop_gradient(clip(rho, low, high)) A log pi
        gate      -(4 / tau) sigmoid(tau (rho - 1)) A, tau = low where A > 0, else high
    """

    kind: str
    low: float
    high: float
    bound: float = float("inf")
    kl: Optional[str] = None  # "k2" or "k3"
    kl_coef: float = 0.0
    kl_times_ratio: bool = True
    entropy_coef: float = 0.0


class TokenInputs(NamedTuple):
    """The inputs of the policy losses per token, each [N], in the dtype of the statistics; 0 where masked."""

    advantages: Tensor
    weights: Tensor  # of the tokens' losses in the batch's
    old_logps: Optional[Tensor] = None  # None: rho is 1, and has its gradient
    ref_logps: Optional[Tensor] = None


class Divergence(NamedTuple):
    """The divergence of policy and reference, and the scaling of the logits of each."""

    scaling: Scaling
    ref_scaling: Scaling
    direction: str  # "reverse", "forward" or "js"
    js_weight: float
    with_labels: bool  # log-probs of the labels and the entropy come too

    @property
    def arguments(self) -> tuple[Scaling, Scaling, Direction, bool]:
        """As a backend takes them."""
        direction = self.js_weight if self.direction == "js" else self.direction
        return self.scaling, self.ref_scaling, direction, self.with_labels


Direction = Union[str, float]  # "reverse", "forward", or the weight of the generalised Jensen-Shannon divergence


def stats_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of statistics of tensors of these dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class Backend(Protocol):
    """A backend's functions. Each runs on the device of its first tensor.

    A function writes only into arguments named `out`, `basis` or `grad`: see STRIDED in choose.py. A backend may lack
    functions; it names them in OTHERS, and asking for one raises an error that says which backend has it.
    """

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> Optional[str]:
        """Why tensors of this device and dtype cannot be served, or None if they can."""

    def statistics(
        self, logits: Tensor, labels: Tensor, outer: float, inner: Optional[float], ignore_index: int, outputs: int
    ) -> RowStats:
        """Log-prob, entropy, lse and the other statistics of rows of logits."""

    def score(
        self,
        logits: Tensor,
        labels: Tensor,
        outer: float,
        inner: Optional[float],
        ignore_index: int,
        outputs: int,
        basis: Optional[Tensor],
    ) -> RowStats:
        """`statistics`, and into basis [O, I, V], which may be the logits, the gradient of the label's log-prob."""

    def gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        saved: Tensor,
        entropy: Tensor,
        g_logps: Optional[Tensor],
        g_entropy: Optional[Tensor],
        g_lse: Optional[Tensor],
        outer: float,
        inner: Optional[float],
        out: Tensor,
        first_col: int = 0,
    ) -> None:
        """The gradient in the logits from those of the statistics, in place too; with none of them, the basis."""

    def from_basis(
        self,
        basis: Tensor,
        labels: Tensor,
        saved: Tensor,
        logps: Tensor,
        entropy: Tensor,
        g_logps: Optional[Tensor],
        g_entropy: Optional[Tensor],
        g_lse: Optional[Tensor],
        outer: float,
        out: Tensor,
        first_col: int = 0,
    ) -> None:
        """The same from a kept basis [N, V], without the logits and without a softcap."""

    def merge_scores(self, parts: Tensor, owner: Tensor, n_cols: int, outputs: int) -> RowStats:
        """The statistics of whole rows from those of their parts, each a rank's share of the vocabulary."""

    def pair_statistics(
        self,
        logits: Tensor,
        ref_logits: Optional[Tensor],
        labels: Tensor,
        outer: float,
        inner: Optional[float],
        ignore_index: int,
    ) -> Tensor:
        """Log-probs under policy and reference, and what the backward needs: tokens [DPORow.COUNT, N]."""

    def dpo(
        self,
        tokens: Tensor,
        labels: Tensor,
        ref_sums: Optional[Tensor],
        beta: float,
        label_smoothing: float,
        kl: Optional[str],
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses [B], sequence log-probs [2B], pairs [PairRow.COUNT, B], KL per token [2B * T]."""

    def dpo_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        tokens: Tensor,
        pairs: Tensor,
        weights: Tensor,
        g_loss: Optional[Tensor],
        g_losses: Optional[Tensor],
        g_sequences: Optional[Tensor],
        kl: Optional[str],
        outer: float,
        inner: Optional[float],
        out: Tensor,
    ) -> None:
        """The gradient of any of those outputs in the logits, in place too."""

    def kl(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        labels: Tensor,
        scaling: Scaling,
        ref_scaling: Scaling,
        direction: Direction,
        with_labels: bool,
    ) -> Tensor:
        """The exact KL of policy and reference, with log-probs and entropy: tokens [KLRow.COUNT, N]."""

    def kl_gradient(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        labels: Tensor,
        tokens: Tensor,
        grads: Tensor,
        scaling: Scaling,
        ref_scaling: Scaling,
        direction: Direction,
        with_labels: bool,
        out: Tensor,
    ) -> None:
        """Its gradient in the policy's logits, in place too, or over the reference's."""

    def merge_kl(self, parts: Tensor, owner: Tensor, direction: Direction) -> Tensor:
        """The tokens of whole rows from those of their parts, without the KL and the center of the mixture."""

    def mixture(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        tokens: Tensor,
        scaling: Scaling,
        ref_scaling: Scaling,
        weight: float,
    ) -> Tensor:
        """A part's share [2, N] of the two divergences from the mixture."""

    def policy(
        self,
        logits: Tensor,
        labels: Tensor,
        given: TokenInputs,
        form: Form,
        outer: float,
        ignore_index: int,
        overwrite: bool,
    ) -> Tensor:
        """Losses of tokens, KL, slopes: tokens [PolicyRow.COUNT, N]; overwrite puts the gradient over the logits."""

    def scale(self, grad: Tensor, factor: Tensor) -> None:
        """Multiply such a gradient by a number on the device, in place; nothing is read if it is 1."""

    def gae(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Optional[Tensor],
        last_values: Optional[Tensor],
        gamma: float,
        lam: float,
    ) -> tuple[Tensor, Tensor]:
        """Generalized advantages and returns [B, T]."""

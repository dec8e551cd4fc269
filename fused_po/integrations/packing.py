"""Check on the model itself that sequences packed into one row do not affect each other.

Each sequence is run alone and packed. The hidden states may differ by as much as rounding every layer's output changes
them. Where autograd can run, there is also an exact check: no hidden state of a sequence may have a gradient with
respect to the embeddings of another sequence.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Optional

import torch
from torch import Tensor, nn

from fused_po.integrations import probe

LENGTHS = (3, 24, 1, 9, 5, 14)  # shorter and longer than convolution kernels
ROUNDINGS = 4  # the allowed difference, in multiples of the measured effect of rounding
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
WINDOWS = ("window", "chunk", "local")  # parts of the config names of attention windows; used only to choose lengths
Run = Callable[[Tensor, Optional[Tensor]], Tensor]  # ids [R, L], positions [R, L] or None -> hidden states [R, L, H]

PASSED = "_fused_po_packed_rows"  # a model's attribute with the row length for which the check passed; copies keep it


def check_kept_apart(model: nn.Module, run: Run, row_length: int, rows: int = 1) -> None:
    """Check a model before its first packed row, and again before the first row longer than another of its windows.

    Args:
        model: a transformers model, without PEFT. run: computes its hidden states with the call that training makes.
        row_length: tokens of the longest row to come. rows: 1, or 2 if training packs more than one row.

    Raises:
        ValueError: sequences of one row affect each other. The caller adds what to do about it.
    """
    if row_length <= vars(model).get(PASSED, -1):
        return
    config = model.config.get_text_config()
    windows = [
        value
        for name, value in config.to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool) and any(part in name for part in WINDOWS)
    ]
    reach = max((value for value in windows if value < row_length), default=0)
    limits = [value for value in (getattr(config, name, None) for name in POSITIONS) if isinstance(value, int)]
    limit = min([value for value in limits if value > 0], default=sys.maxsize)
    lengths = [min(n if n < max(LENGTHS) else max(n, reach + 9), limit) for n in LENGTHS]
    lengths += [limit] * (row_length > limit)  # a row may be longer than any sequence
    with probe.evaluating(model), _generators_kept(model):
        why = _why_mixed(model, run, lengths, rows)
    if why is not None:
        attention = getattr(config, "_attn_implementation", None)
        raise ValueError(
            f"model: {type(model).__name__} with attn_implementation={attention!r} does not separate the sequences in "
            f"one row by position_ids; {why}"
        )
    setattr(model, PASSED, min((value for value in (*windows, limit) if value >= row_length), default=sys.maxsize))


@contextlib.contextmanager
def _generators_kept(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _why_mixed(model: nn.Module, run: Run, lengths: list[int], rows: int) -> Optional[str]:
    """How packed sequences differ from single ones, or None if they do not."""
    device = model.get_input_embeddings().weight.device
    device = device if device.type != "meta" else model.device
    pool = torch.tensor(probe.plain_ids(model, model.get_input_embeddings().weight.shape[0]))
    draw = torch.Generator().manual_seed(0)
    sequences = [pool[torch.randint(len(pool), (n,), generator=draw)].to(device) for n in lengths]
    # a second row has another order, without the first sequence, and is padded
    orders = [list(range(len(lengths))), list(range(len(lengths)))[:0:-1]][:rows]
    ids, positions, places = _packed(sequences, orders)
    try:
        packed = run(ids, positions)
        alone = [run(one[None], None)[0] for one in sequences]
        # the effect of rounding each layer's output, measured twice
        noise = max(_distance(_rounded(model, run, ids, positions, draw), packed) for _ in range(2))
        difference = max(_distance(packed[row, part], alone[i]) for i, row, part in places)
        if not difference <= ROUNDINGS * noise:
            return f"hidden states differ by {difference:.1e} of their norm, of which rounding explains {noise:.1e}"
        if _can_differentiate(model) and _sees_others(model, run, ids, positions, places):
            return "hidden states have gradients with respect to the embeddings of other sequences"
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        return f"its forward fails on packed rows: {type(error).__name__}: {error}"
    return None


def _packed(sequences: list[Tensor], orders: list[list[int]]) -> tuple[Tensor, Tensor, list[tuple[int, int, slice]]]:
    """(ids [R, L], positions [R, L], [(sequence, row, slice of the row), ...]). Padding is a token at position 0."""
    rows, counts, places = [], [], []
    for row, order in enumerate(orders):
        ends = torch.tensor([len(sequences[i]) for i in order]).cumsum(0).tolist()
        places += [(i, row, slice(end - len(sequences[i]), end)) for i, end in zip(order, ends)]
        rows.append(torch.cat([sequences[i] for i in order]))
        counts.append(torch.cat([torch.arange(len(sequences[i]), device=rows[0].device) for i in order]))
    fill = torch.nn.utils.rnn.pad_sequence
    filler = int(sequences[0][0])
    return fill(rows, batch_first=True, padding_value=filler), fill(counts, batch_first=True), places


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of a token's hidden states, relative to their norm."""
    ours, theirs = ours.double(), theirs.double()
    tiny = torch.finfo(torch.float64).tiny
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=tiny)).max())


def _rounded(model: nn.Module, run: Run, ids: Tensor, positions: Tensor, draw: torch.Generator) -> Tensor:
    """`run` with each layer's output changed by up to one rounding of its dtype, or of float32 if that is coarser."""

    def change(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        eps = max(torch.finfo(value.dtype).eps, torch.finfo(torch.float32).eps)
        noise = torch.rand(min(value.numel(), 65537), generator=draw).to(value.device)  # repeated for longer outputs
        noise = noise.repeat(-(-value.numel() // max(1, noise.numel())))[: value.numel()].view(value.shape)
        return (value.double() * (1 + eps * (2 * noise.double() - 1))).to(value.dtype)

    def hook(module: nn.Module, args: tuple, out: object) -> object:
        return type(out)(map(change, out)) if type(out) in (tuple, list) else change(out)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(hook) for module in leaves]
    try:
        return run(ids, positions)
    finally:
        for handle in hooks:
            handle.remove()


def _can_differentiate(model: nn.Module) -> bool:
    """Whether no weight is sharded: engines that shard weights free them in their own backward."""
    from torch.distributed.fsdp import FSDPModule

    fsdp = (isinstance(m, FSDPModule) or type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    local = (type(p.data) is Tensor and not hasattr(p, "ds_id") and p.device.type != "meta" for p in model.parameters())
    return all(local) and not any(fsdp)


def _sees_others(model: nn.Module, run: Run, ids: Tensor, positions: Tensor, places: list) -> bool:
    """Whether hidden states of even sequences have gradients in embeddings of odd ones, or the reverse."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[-1].clone()

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        with torch.enable_grad():
            hidden = run(ids, positions)
            for parity in (0, 1):
                mask = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
                for number, (_, row, part) in enumerate(places):
                    mask[row, part] = number % 2 == parity
                selected = hidden[mask.to(hidden.device)].float()
                weights = torch.linspace(0.5, 1.5, selected.numel(), device=selected.device).view_as(selected)
                total = (selected * weights).sum()
                (grad,) = torch.autograd.grad(total, seen[:1], retain_graph=True, allow_unused=True)
                if grad is not None and bool((grad[~mask.to(grad.device)] != 0).any()):
                    return True
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # some kernels have no backward in eval mode; then only the first check applies
        return False
    finally:
        handle.remove()
    return False

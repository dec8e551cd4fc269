"""Hidden states, log-probs and rewards of a batch.

The hidden states are the inputs of the LM head in the model's own forward; `fused_po` computes log-probs from them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fused_po
from fused_po.integrations import lm_head, packing, probe

from . import dataset
from .errors import fail

MASKED = ("sdpa", "eager", "flex_attention")  # these keep packed sequences apart by an attention mask
FLASH = ("flash_attention_2", "flash_attention_3")  # these by cu_seqlens, which transformers derives from the positions


class States(NamedTuple):
    """The result of a forward pass."""

    hidden: Tensor  # [B, T, H]: the input of the LM head; for a reward model the input of its head `score`
    router_loss: Tensor  # 0-dim: the load-balancing loss that the model adds, with its coefficient; 0 if there is none


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Inside, the model is in evaluation mode."""
    was = model.training
    model.eval()
    yield
    model.train(was)


def autocast(args):
    """Autocast to bf16 with --bf16, otherwise nothing."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def has_head(model) -> bool:
    """True for a causal LM, False for a reward model."""
    return model.get_output_embeddings() is not None


def run(model, **inputs: Tensor) -> States:
    """One forward pass up to the LM head, which is not applied; `inputs` are the arguments of the model's forward."""
    if has_head(model):
        hidden, added = lm_head.head_input(model, **inputs)
    else:
        hidden, added = model.get_decoder()(**inputs, use_cache=False).last_hidden_state, None
    return States(hidden, torch.zeros((), device=hidden.device) if added is None else added)


def pack(lengths: list[int], room: int) -> list[list[int]]:
    """Pack sequences into rows of at most `room` tokens: longest first, each into the first row with enough space.

    Returns the sequences' indices, row by row.
    """
    rows, left = [], []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((i for i, free in enumerate(left) if free >= lengths[number]), None)
        if at is None:
            at = len(rows)
            rows.append([])
            left.append(room)
        rows[at].append(number)
        left[at] -= lengths[number]
    return rows


def packed_places(mask: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Where each token of the packed rows comes from.

    Args:
        mask: [B, T], True on tokens. room: largest length of a packed row.

    Returns:
        (places, positions), each [R, L]: the token's index in mask.flatten(), -1 at the end of shorter rows; and its
        position in its own sequence.
    """
    tokens = [row.nonzero().squeeze(-1) + i * mask.shape[1] for i, row in enumerate(mask)]
    rows = [[tokens[i] for i in row] for row in pack([len(t) for t in tokens], room)]
    pad = torch.nn.utils.rnn.pad_sequence
    places = pad([torch.cat(row) for row in rows], batch_first=True, padding_value=-1)
    counts = [torch.cat([torch.arange(len(t), device=mask.device) for t in row]) for row in rows]
    return places, pad(counts, batch_first=True)


def why_mixed(model, args, row_length: int = 0) -> str | None:
    """Why the model would mix sequences that are packed into rows of this length; None if it keeps them apart."""
    attention = model.config._attn_implementation
    if attention not in MASKED + FLASH:
        return f"not with attention {attention!r}, which mixes packed sequences"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def hidden_of(ids: Tensor, positions: Tensor | None) -> Tensor:
        more = {} if positions is None else {"position_ids": positions}
        return run(base, input_ids=ids, **more).hidden

    try:
        with autocast(args):
            packing.check_kept_apart(base, hidden_of, row_length, rows=1 if attention in FLASH else 2)
    except ValueError as error:
        return str(error).removeprefix("model: ")
    return None


def forward(model, batch: dict[str, Tensor], args) -> States:
    """The states of a batch of `dataset.stack`.

    With --padding-free the sequences are concatenated into rows without padding, and positions restart at 0 in each
    sequence. transformers keeps them apart by a block-diagonal mask or by cu_seqlens (flash-attention), which
    `why_mixed` tests. The result is scattered back to [B, T, H], with zeros on padding.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if not args.padding_free:
        with autocast(args):
            return run(model, input_ids=ids, attention_mask=batch["attention_mask"])
    # With a mask, attention costs the square of a row's length: several short rows. With flash-attention it costs the
    # sum of the sequences' squares: one row. A router's loss is a mean over all tokens of the rows, so there must be
    # no padding among them: one row too.
    flash = model.config._attn_implementation in FLASH
    one_row = flash or (has_head(model) and lm_head.adds_loss(model))
    places, positions = packed_places(mask, mask.numel() if one_row else max(mask.shape[1], 256))
    if mixed := why_mixed(model, args, places.shape[1]):
        fail(f"--padding-free: {mixed}; leave it out")
    with autocast(args):
        hidden, router_loss = run(model, input_ids=ids.flatten()[places.clamp(min=0)], position_ids=positions)
    there = places >= 0
    out = hidden.new_zeros(mask.numel(), hidden.shape[-1]).index_put((places[there],), hidden[there])
    return States(out.view(*mask.shape, -1), router_loss)


def hidden_states(model, batch: dict[str, Tensor], args) -> Tensor:
    """The hidden states [B, T, H] of `forward`."""
    return forward(model, batch, args).hidden


def head(model) -> dict:
    """The arguments of `linear_logps` for the model's LM head: weight, bias, logit_scale, softcap.

    `fused_po.integrations.lm_head` measures them once per model.
    """
    try:
        return lm_head.lm_head(model)._asdict()
    except TypeError as error:
        fail(f"--model: {str(error).removeprefix('model: ')}")


def token_stats(
    model, batch: dict[str, Tensor], args, outputs: tuple[str, ...] = ("logps",), states: States | None = None
) -> fused_po.TokenStats:
    """Log-probs and the other `outputs` [B, T] of a batch's labels, at the position that predicts each label.

    `fused_po.shift_labels(batch["labels"]) != dataset.IGNORE` is the mask of the scored positions.

    Args:
        states: of `forward`, if it has already run.
    """
    hidden = (states or forward(model, batch, args)).hidden
    labels = fused_po.shift_labels(batch["labels"])
    with autocast(args):
        return fused_po.linear_logps(hidden, labels=labels, outputs=outputs, **head(model))


def answer_logps(model, batch: dict[str, Tensor], args, average: bool = False) -> Tensor:
    """Log-probs [B] of the answers: sums over their tokens, or means with average=True."""
    mask = fused_po.shift_labels(batch["labels"]) != dataset.IGNORE
    return fused_po.sequence_logps(token_stats(model, batch, args).logps, mask, average=average)


def scores(model, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Rewards [B]: the reward model's linear head `score` at the last token of each sequence."""
    steps = torch.arange(hidden.shape[1], device=hidden.device)
    last = (batch["attention_mask"] * steps).argmax(1)
    ends = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return model.score(ends.to(model.score.weight.dtype)).squeeze(-1)


def rewards(model, batch: dict[str, Tensor], args) -> Tensor:
    """Rewards [B] of prompts with their answers, end-of-sequence token included.

    Args:
        model: a transformers ...ForSequenceClassification with one label, such as reward.py saves:
            `models.load("AutoModelForSequenceClassification", "runs/reward/model", args, num_labels=1)`.
    """
    return scores(model, hidden_states(model, batch, args), batch)


def check_scores(model, flag: str):
    """Return the reward model; end the program if its own forward computes other rewards than `scores`."""
    ids = probe.text_ids(model, model.get_input_embeddings().weight.shape[0])
    with torch.no_grad(), evaluating(model):
        theirs = model(input_ids=ids).logits.flatten()
        try:
            ours = scores(model, run(model, input_ids=ids).hidden, {"attention_mask": torch.ones_like(ids)})
        except (AttributeError, TypeError):
            ours = theirs + math.nan
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5):
        fail(
            f"{flag}: {type(model).__name__} does more to its hidden states than one linear layer `score`; "
            "give a model whose reward is that layer's output"
        )
    return model


def decoder_head(model) -> dict:
    """The arguments of `head` for hidden states of the decoder, which is what a reward model has.

    Ends the program if the model changes those hidden states before its LM head by more than a factor.
    """
    ids, found = probe.text_ids(model, model.get_input_embeddings().weight.shape[0]), head(model)
    with torch.no_grad(), evaluating(model):
        given = run(model, input_ids=ids).hidden
        try:
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        except (AttributeError, TypeError):
            states = torch.full_like(given, math.nan)
    factor = float((given * states).sum() / states.square().sum()) if given.shape == states.shape else math.nan
    if not torch.allclose(given, factor * states, rtol=1e-3, atol=1e-5) or (
        abs(factor - 1) > 1e-5 and found["bias"] is not None
    ):
        fail(f"--lm-coef: {type(model).__name__} changes its hidden states before its LM head; give --lm-coef 0")
    return found | {"logit_scale": found["logit_scale"] * (factor if abs(factor - 1) > 1e-5 else 1.0)}

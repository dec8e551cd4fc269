"""DPO without padding: a batch's sequences run end to end, in one row, through policy and reference.

TRL's trainer keeps its batches, its loss and its metrics. For the two methods in which it calls its models, their
forward takes the padded batch, runs the tokens alone, and hands each token's statistics back in the batch's shape.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_po.integrations import packing
from fused_po.integrations.trl.experimental import swapped_forward
from fused_po.integrations.trl.patching import import_trl, require_patch
from fused_po.ops.logps import shift_labels

trl = import_trl()

INSTEAD = "train it with trl.DPOTrainer, which pads"
TAKEN = ("input_ids", "attention_mask", "labels")


class PaddingFreeDPOTrainer(trl.DPOTrainer):
    """TRL's DPOTrainer, its models run on [1, tokens] in the place of [2B, T]. Takes what that takes.

    `patch()` comes first. Positions begin anew with each sequence, and there is no attention mask: transformers keeps
    the sequences apart by a block-diagonal mask, or by cu_seqlens in flash-attention. A mask costs the square of the
    row, so long sequences want flash-attention. Data whose logits are asked for (`compute_metrics`) are run a second
    time, with padding, for these logits, as TRL does.

    Raises:
        RuntimeError: `patch()` was not called.
        ValueError: a model that does not keep such sequences apart (measured before its first batch: a few
            sequences alone and packed), an encoder-decoder, one with images or sound, prompt learning,
            `pad_to_multiple_of`, context or sequence parallelism, or a batch of a `data_collator` that has more than
            TRL's tensors. Each says what to do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_patch("PaddingFreeDPOTrainer")
        self._forwards: dict[int, tuple[Callable, Callable]] = {}  # of each model: its forward, and ours around it
        given = inspect.signature(trl.DPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        check_arguments(given.get("args"))
        super().__init__(*args, **kwargs)
        with self._without_padding():  # the models' configurations are looked at before the first step
            pass

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with self._without_padding():
            return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        with self._without_padding():
            return super()._compute_loss(model, inputs, return_outputs)

    @contextlib.contextmanager
    def _without_padding(self) -> Iterator[None]:
        """Policy and reference with our forward. Between the steps they have TRL's: nothing is left to copy or save."""
        require_patch("PaddingFreeDPOTrainer")
        with contextlib.ExitStack() as undo:
            for model in (self.model, self.ref_model):
                if model is not None:
                    base = base_of(self.accelerator.unwrap_model(model, keep_torch_compile=False))
                    forward = base.forward
                    # made anew where accelerate has wrapped it meanwhile; else the same, or torch.compile begins anew
                    if self._forwards.get(id(base), (None,))[0] != forward:
                        self._forwards[id(base)] = forward, end_to_end(base, forward)
                    undo.enter_context(swapped_forward(base, self._forwards[id(base)][1]))
            yield


def check_arguments(args: Optional[Any]) -> None:
    """ValueError for what a DPOConfig asks and rows without padding cannot give."""
    if args is None:
        return
    if args.pad_to_multiple_of is not None:
        raise ValueError(
            f"pad_to_multiple_of: got {args.pad_to_multiple_of}, but nothing is padded; leave it None, or {INSTEAD}"
        )
    for name in ("cp_size", "sp_size"):
        size = getattr(args.parallelism_config, name, None)
        if size is not None and size > 1:
            raise ValueError(f"{name}: got {size}, which cuts the padded batch; have it 1, or {INSTEAD}")


def base_of(model: nn.Module) -> nn.Module:
    """The model that TRL's head is on, without PEFT, if it can be served by its configuration."""
    from accelerate.utils import is_peft_model

    if is_peft_model(model):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "peft_config: prompt learning adds tokens to every row, and the sequences are one row; take LoRA, or "
                f"{INSTEAD}"
            )
        model = model.get_base_model()
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"model: got {name}, an encoder-decoder, expected a causal LM; {INSTEAD}")
    if config.get_text_config() is not config:
        raise ValueError(f"model: got {name}, which takes more than text, expected a causal LM of text; {INSTEAD}")
    return model


def end_to_end(base: nn.Module, forward: Callable) -> Callable:
    """`forward` of a model with TRL's fused head, which takes a padded batch and runs it without padding."""

    def packed(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **kwargs)
        ids, mask, labels = (kwargs.pop(name) for name in TAKEN)
        check_kept_apart(base, mask.numel())
        others = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        if others:
            raise ValueError(
                f"data_collator: its batches have {', '.join(others)} beside {', '.join(TAKEN)}; {INSTEAD}"
            )
        there = mask.bool()
        out = forward(
            input_ids=ids[there][None],
            position_ids=(there.cumsum(-1) - 1)[there][None],
            shift_labels=shift_labels(labels)[there][None],  # of a sequence's last token: ignored, never the next's
            fused_lm_head=True,
            **kwargs,
        )

        def spread(value: Tensor) -> Tensor:
            """[1, tokens] to [2B, T - 1], as TRL's head gives them for `labels`."""
            return value.new_zeros(there.shape).masked_scatter(there, value)[:, :-1]

        fields = {name: spread(value) if value.ndim == 2 else value for name, value in out.items()}
        return type(out)(**fields)

    return packed


@torch.compiler.disable
def check_kept_apart(base: nn.Module, row_length: int) -> None:
    """ValueError if a sequence's hidden states depend on the others in the row, or its positions on its place in it."""

    def run(ids: Tensor, positions: Optional[Tensor]) -> Tensor:
        given = {} if positions is None else {"position_ids": positions}
        return base.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state

    try:
        packing.check_kept_apart(base, run, row_length)
    except ValueError as error:
        raise ValueError(
            f"{error}; load an attention model with 'sdpa', 'eager', 'flex_attention' or 'flash_attention_2', or "
            f"{INSTEAD}"
        ) from None

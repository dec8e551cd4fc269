"""DPO without padding: the sequences of a batch are packed into one row for policy and reference.

TRL's trainer keeps its batches, its loss and its metrics. In the two methods that call the models, their forward is
replaced: it takes the padded batch, runs only the tokens, and returns the statistics in the shape of the batch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_po import checks
from fused_po.integrations import packing
from fused_po.integrations.trl.experimental import swapped_forward
from fused_po.integrations.trl.patching import import_trl, require_patch
from fused_po.ops.logps import shift_labels

trl = import_trl()

INSTEAD = "train with trl.DPOTrainer, which pads"
TAKEN = ("input_ids", "attention_mask", "labels")


class PaddingFreeDPOTrainer(trl.DPOTrainer):
    """TRL's DPOTrainer with models that run on [1, tokens] instead of [2B, T]. It takes the arguments of DPOTrainer.

    Call `patch()` first. Positions restart at each sequence, and there is no attention mask: transformers separates the
    sequences by a block-diagonal mask, or by cu_seqlens with flash-attention. The mask is quadratic in the row length,
    so use flash-attention for long sequences. If logits are needed (`compute_metrics`), the batch runs a second
    time with padding, as in TRL.

    Raises:
        RuntimeError: `patch()` was not called.
        ValueError: the model does not separate such sequences (checked before the first batch, with a few sequences
            alone and packed), or it is an encoder-decoder or takes images or audio; or prompt learning,
            `pad_to_multiple_of`, context or sequence parallelism is used; or the `data_collator` returns more than
            TRL's tensors. The error says what to do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_patch("PaddingFreeDPOTrainer")
        self._forwards: dict[int, tuple[Callable, Callable]] = {}  # id of a model -> (its forward, our wrapper of it)
        arguments = inspect.signature(trl.DPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        check_arguments(arguments.get("args"))
        super().__init__(*args, **kwargs)
        with self._without_padding():  # raises for unsupported models before the first step
            pass

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with self._without_padding():
            return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        with self._without_padding():
            return super()._compute_loss(model, inputs, return_outputs)

    @contextlib.contextmanager
    def _without_padding(self) -> Iterator[None]:
        """Use our forward for policy and reference. Outside the block they have TRL's, so copying and saving work."""
        require_patch("PaddingFreeDPOTrainer")
        with contextlib.ExitStack() as undo:
            for model in (self.model, self.ref_model):
                if model is not None:
                    base = base_of(self.accelerator.unwrap_model(model, keep_torch_compile=False))
                    forward = base.forward
                    # a new wrapper only if accelerate has wrapped the forward since: torch.compile recompiles for it
                    if self._forwards.get(id(base), (None,))[0] != forward:
                        self._forwards[id(base)] = forward, end_to_end(base, forward)
                    undo.enter_context(swapped_forward(base, self._forwards[id(base)][1]))
            yield


def check_arguments(args: Optional[Any]) -> None:
    """Raise ValueError for options of a DPOConfig that do not work without padding."""
    if args is None:
        return
    if args.pad_to_multiple_of is not None:
        raise ValueError(
            f"pad_to_multiple_of: got {args.pad_to_multiple_of}, but there is no padding; leave it None, or {INSTEAD}"
        )
    for name in ("cp_size", "sp_size"):
        size = getattr(args.parallelism_config, name, None)
        if size is not None and size > 1:
            raise ValueError(f"{name}: got {size}, which shards the padded batch; set it to 1, or {INSTEAD}")


def base_of(model: nn.Module) -> nn.Module:
    """The model without PEFT's wrapper. Raises ValueError if its config shows that it is not supported."""
    from accelerate.utils import is_peft_model

    if is_peft_model(model):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "peft_config: prompt learning adds tokens to every row, but the sequences share one row; use LoRA, or "
                f"{INSTEAD}"
            )
        model = model.get_base_model()
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"model: got {name}, an encoder-decoder, expected a causal LM; {INSTEAD}")
    if config.get_text_config() is not config:
        raise ValueError(f"model: got {name}, a multimodal model, expected a text-only causal LM; {INSTEAD}")
    return model


def end_to_end(base: nn.Module, forward: Callable) -> Callable:
    """Wrap the `forward` of a model with TRL's fused head, so that it takes a padded batch and runs without padding."""

    def packed(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **kwargs)
        ids, mask, labels = (kwargs.pop(name) for name in TAKEN)
        check_kept_apart(base, mask.numel())
        others = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        if others:
            raise ValueError(
                f"data_collator: its batches have {', '.join(others)}, expected only {', '.join(TAKEN)}; {INSTEAD}"
            )
        is_token = mask.bool()
        out = forward(
            input_ids=ids[is_token][None],
            position_ids=(is_token.cumsum(-1) - 1)[is_token][None],
            shift_labels=shift_labels(labels)[is_token][None],  # ignored at the last token of each sequence
            fused_lm_head=True,
            **kwargs,
        )

        def unpack(value: Tensor) -> Tensor:
            """[1, tokens] to [2B, T - 1], the shape that TRL's head returns for `labels`."""
            return value.new_zeros(is_token.shape).masked_scatter(is_token, value)[:, :-1]

        fields = {name: unpack(value) if value.ndim == 2 else value for name, value in out.items()}
        return type(out)(**fields)

    return packed


@torch.compiler.disable
def check_kept_apart(base: nn.Module, row_length: int) -> None:
    """Raise ValueError if the hidden states of a sequence depend on other sequences in the row, or on its offset."""

    def run(ids: Tensor, positions: Optional[Tensor]) -> Tensor:
        position_ids = checks.not_none(position_ids=positions)
        return base.base_model(input_ids=ids, use_cache=False, **position_ids).last_hidden_state

    try:
        packing.check_kept_apart(base, run, row_length)
    except ValueError as error:
        raise ValueError(
            f"{error}; load the model with attn_implementation 'sdpa', 'eager', 'flex_attention' or "
            f"'flash_attention_2', or {INSTEAD}"
        ) from None

"""Trainers whose loss code reads `model(...).logits`: log-probs are computed inside the model's forward instead.

The trainer's method that calls the model keeps its code, but gets a ScoringModel. That runs TRL's fused head in the
model's forward (inside wrappers such as DDP, FSDP and autocast), and returns ScoredLogits as logits.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from fused_po.integrations import probe
from fused_po.integrations.heads import changes_of, hook_name
from fused_po.integrations.probe import Processing
from fused_po.integrations.trl.scored_logits import ScoredLogits
from fused_po.integrations.trl.scoring import IGNORE, REQUEST, Request, why_stock
from fused_po.ops.logps import shift_labels


class Call(NamedTuple):
    """One call of a trainer's method, and the batch that it passes to the model."""

    trainer: Any
    arguments: dict[str, Any]
    input_ids: Tensor  # [B, T]
    attention_mask: Tensor


class Helper(NamedTuple):
    """The trainer's method that calls the model, and what it computes from the logits besides log-probs."""

    method: str
    labels: Callable[[Call], Tensor]  # [B, T]: tokens whose log-probs the method uses, -100 elsewhere; not shifted
    outputs: tuple[str, ...]


def completions_of_pairs(call: Call) -> Tensor:
    """The chosen and rejected completions, stacked as in CPO and ORPO."""
    stacked = call.trainer.concatenated_inputs(call.arguments["batch"], device=call.input_ids.device)
    return stacked["concatenated_labels"]


def chosen_in_whole(call: Call) -> Tensor:
    """The same with the chosen prompts: ORPO's NLL is over prompt and completion."""
    labels = completions_of_pairs(call)
    chosen = torch.arange(len(labels), device=labels.device) < len(call.arguments["batch"]["chosen_labels"])
    return torch.where(chosen[:, None] & (call.attention_mask == 1), call.input_ids, labels)


def masked_completions(call: Call) -> Tensor:
    return call.input_ids.masked_fill(call.arguments["inputs"]["completion_mask"] == 0, IGNORE)


def last_tokens(call: Call) -> Tensor:
    """The completions at the end of each row, with padding, which OnlineDPO's KL and entropy metrics include."""
    keep = call.arguments["completion_ids"].shape[1]
    place = torch.arange(call.input_ids.shape[1], device=call.input_ids.device)
    return call.input_ids.masked_fill(place < len(place) - keep, IGNORE)


def last_unmasked_tokens(call: Call) -> Tensor:
    """The completions at the end of each row, without padding."""
    place = torch.arange(call.input_ids.shape[1], device=call.input_ids.device)
    scored = (place >= len(place) - call.arguments["logits_to_keep"]) & (call.attention_mask == 1)
    return call.input_ids.masked_fill(~scored, IGNORE)


HELPERS = {
    "A2POTrainer": Helper("_get_sequence_logps", last_unmasked_tokens, ()),
    "CPOTrainer": Helper("concatenated_forward", completions_of_pairs, ("mean_logits",)),
    "ORPOTrainer": Helper("concatenated_forward", chosen_in_whole, ("mean_logits",)),
    "OnlineDPOTrainer": Helper("_forward", last_tokens, ()),
    "TPOTrainer": Helper("_compute_loss", masked_completions, ("entropy", "mean_logits", "is_top1")),
}


def score_in_helper(cls: type, helper: Helper, add_fused_lm_head: Callable) -> Callable:
    """The method of `cls`, called with a ScoringModel. If that is not possible, it warns and uses TRL's logits."""
    stock = vars(cls).get(helper.method)
    if stock is None:
        raise RuntimeError(f"trl: {cls.__module__}.{cls.__name__} has no {helper.method}, which patch() replaces")
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def method(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        model, arguments = call.arguments["model"], call.arguments
        base, reason = scoring_base(self, model)
        if reason is None and not arguments.get("return_outputs"):
            scoring = ScoringModel(self, model, base, helper, dict(arguments), add_fused_lm_head)
            reason = scoring.why_not_its_head()
        if reason is not None:
            warnings.warn(f"fused_po: {cls.__name__} uses TRL's own logits: {reason}", stacklevel=2)
        if reason is not None or arguments.get("return_outputs"):  # outputs include logits
            return stock(self, *args, **kwargs)
        call.arguments["model"] = scoring
        return stock(*call.args, **call.kwargs)

    return method


def scoring_base(trainer: Any, model: nn.Module) -> tuple[Optional[nn.Module], Optional[str]]:
    """(the model that has the head, None), or (None, why log-probs cannot be computed without logits)."""
    from accelerate.utils import is_peft_model

    if getattr(trainer, "is_encoder_decoder", False):
        return None, "the model is an encoder-decoder"
    base = trainer.accelerator.unwrap_model(model)
    if is_peft_model(base):
        if base.active_peft_config.is_prompt_learning:
            return None, "prompt learning adds tokens that the trainer does not see"
        base = base.get_base_model()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return None, f"its LM head is {type(head).__name__}, not a plain nn.Linear"
    changes = changes_of(head, called=False)
    if changes:
        name = hook_name(changes[0])
        return None, f"{name} is a hook on its LM head or on all modules, or replaces the forward of the head"
    reason = why_stock(head.weight)
    return (base, None) if reason is None else (None, reason)


class Measured(NamedTuple):
    """What was measured about one model's head."""

    processing: Processing
    reason: Optional[str]  # why log-probs cannot be computed without logits
    settings: dict  # the settings that may affect the logits, at the time of the measurement


class ScoringModel:
    """A wrapper whose call computes the log-probs that a trainer's method needs. Attributes are those of the model."""

    def __init__(
        self, trainer: Any, model: nn.Module, base: nn.Module, helper: Helper, arguments: dict, add_fused_lm_head
    ) -> None:
        self._trainer, self._model, self._base, self._helper = trainer, model, base, helper
        self._arguments, self._add_fused_lm_head = arguments, add_fused_lm_head
        self._heads = vars(trainer).setdefault("_fused_po_heads", {})  # id of a model -> Measured

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> types.SimpleNamespace:
        """The model's output for input_ids [B, T], with ScoredLogits [B, T, V]."""
        ids = args[0] if args else kwargs["input_ids"]
        call = Call(self._trainer, self._arguments, ids, kwargs["attention_mask"])
        labels = shift_labels(self._helper.labels(call))
        kwargs.pop("logits_to_keep", None)  # the method slices the logits itself, for models without this argument
        request = Request(labels, self._helper.outputs, self._heads[id(self._base)].processing)
        out = self._score(self._model, request, *args, **kwargs)
        rows = {name: getattr(out, name) for name in ("log_probs", "entropy", "mean_logits", "is_top1")}
        n_vocab = self._base.get_output_embeddings().weight.shape[0]
        return types.SimpleNamespace(
            logits=ScoredLogits(n_vocab, {"labels": labels.to(out.log_probs.device), **rows}), aux_loss=out.aux_loss
        )

    def _score(self, model: nn.Module, request: Request, *args: Any, **kwargs: Any) -> Any:
        """The output of TRL's fused head. All rows reach it, as if labeled; the request selects those to score."""
        token = REQUEST.set(request)
        try:
            with self._fused_forward(), self._trainer.accelerator.autocast():
                return model(*args, shift_labels=torch.zeros_like(request.labels), fused_lm_head=True, **kwargs)
        finally:
            REQUEST.reset(token)

    def why_not_its_head(self) -> Optional[str]:
        """Why log-probs from hidden states and head differ from those of the model's logits, or None. Measured once."""
        measured = self._heads.get(id(self._base))
        if measured is None or measured.settings != probe.settings(self._base, measured.processing):
            measured = self._heads[id(self._base)] = self._measure()
        return measured.reason

    def _measure(self) -> Measured:
        base, model = self._base, getattr(self._model, "_orig_mod", self._model)  # do not compile for four tokens
        head, none = base.get_output_embeddings(), Processing(1.0, None)

        def result(processing: Processing, reason: Optional[str]) -> Measured:
            return Measured(processing, reason, probe.settings(base, processing))

        def forward(**inputs: Any) -> Any:
            with self._trainer.accelerator.autocast():
                return model(**inputs, use_cache=False)

        with probe.evaluating(model):
            try:
                processing, ids, plain, allowed = probe.measure(base, head, len(head.weight), forward)
            except TypeError as error:
                return result(none, str(error))
            labels = shift_labels(ids)
            scored = self._score(model, Request(labels, ("log_probs",), processing), input_ids=ids).log_probs
        difference = (scored[0, :-1].to(plain.device) - plain).abs().max()
        if difference <= allowed:
            return result(processing, None)
        name = type(base).__name__
        reason = f"log-probs from {name}'s hidden states and head differ by {difference:.3g} from those of its logits"
        return result(none, reason)

    def _fused_forward(self) -> contextlib.AbstractContextManager:
        """Put TRL's fused head on the model for this call only, so that copying and saving the model work."""
        base, forwards = self._base, vars(self._trainer).setdefault("_fused_po_forwards", {})
        if id(base) not in forwards:  # one object per model: torch.compile would recompile for a new one
            with swapped_forward(base, base.forward):
                self._add_fused_lm_head(base)
                forwards[id(base)] = base.forward
        return swapped_forward(base, forwards[id(base)])


@contextlib.contextmanager
def swapped_forward(model: nn.Module, forward: Callable) -> Iterator[None]:
    """Set `model.forward = forward` inside the block, then restore the previous one (the instance's or the class's)."""
    before = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before

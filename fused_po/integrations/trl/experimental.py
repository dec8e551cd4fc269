"""Trainers whose loss code takes `model(...).logits`: their tokens are scored inside the model's forward instead.

The method of the trainer in which the model is called keeps its code. The model that is handed to it runs TRL's fused
head (and so inside whatever wraps the forward: DDP, FSDP, autocast), and its output has ScoredLogits for logits.
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
from fused_po.integrations.heads import called, changes_of
from fused_po.integrations.probe import Processing
from fused_po.integrations.trl.scored_logits import ScoredLogits
from fused_po.integrations.trl.scoring import IGNORE, REQUEST, Request, why_stock
from fused_po.ops.logps import shift_labels


class Call(NamedTuple):
    """One call of a trainer's method, and the batch it hands to the model."""

    trainer: Any
    arguments: dict[str, Any]
    input_ids: Tensor  # [B, T]
    attention_mask: Tensor


class Helper(NamedTuple):
    """How a trainer uses its model: in which method, and what it wants of the logits besides log-probs."""

    method: str
    labels: Callable[[Call], Tensor]  # [B, T]: the tokens whose log-probs the method takes, -100 elsewhere; not shifted
    outputs: tuple[str, ...]


def completions_of_pairs(call: Call) -> Tensor:
    """The completions of chosen and rejected, as CPO and ORPO stack them."""
    stacked = call.trainer.concatenated_inputs(call.arguments["batch"], device=call.input_ids.device)
    return stacked["concatenated_labels"]


def chosen_in_whole(call: Call) -> Tensor:
    """The same with the chosen prompts: ORPO's likelihood term is over prompt and completion."""
    labels = completions_of_pairs(call)
    chosen = torch.arange(len(labels), device=labels.device) < len(call.arguments["batch"]["chosen_labels"])
    return torch.where(chosen[:, None] & (call.attention_mask == 1), call.input_ids, labels)


def masked_completions(call: Call) -> Tensor:
    return call.input_ids.masked_fill(call.arguments["inputs"]["completion_mask"] == 0, IGNORE)


def last_tokens(call: Call) -> Tensor:
    """The completions that end every row, with their padding: OnlineDPO's KL and entropy metrics count it."""
    keep = call.arguments["completion_ids"].shape[1]
    place = torch.arange(call.input_ids.shape[1], device=call.input_ids.device)
    return call.input_ids.masked_fill(place < len(place) - keep, IGNORE)


def last_unmasked_tokens(call: Call) -> Tensor:
    """The completions that end every row, without their padding."""
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
    """The method of `cls` with a model that scores; TRL's own, with a warning, where that cannot be."""
    stock = vars(cls).get(helper.method)
    if stock is None:
        raise RuntimeError(f"{cls.__module__}.{cls.__name__} has no {helper.method}, which fused_po would change")
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
            warnings.warn(f"fused_po: {cls.__name__} keeps TRL's own logits: {reason}", stacklevel=2)
        if reason is not None or arguments.get("return_outputs"):  # a caller who wants outputs wants logits
            return stock(self, *args, **kwargs)
        call.arguments["model"] = scoring
        return stock(*call.args, **call.kwargs)

    return method


def scoring_base(trainer: Any, model: nn.Module) -> tuple[Optional[nn.Module], Optional[str]]:
    """(the model that has the head, None), or (None, why its tokens cannot be scored without logits)."""
    from accelerate.utils import is_peft_model

    if getattr(trainer, "is_encoder_decoder", False):
        return None, "the model is an encoder-decoder"
    base = trainer.accelerator.unwrap_model(model)
    if is_peft_model(base):
        if base.active_peft_config.is_prompt_learning:
            return None, "prompt learning adds tokens that the trainer does not know of"
        base = base.get_base_model()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return None, f"its LM head is {type(head).__name__}, not a plain Linear (an adapter or a quantised one, say)"
    changes = changes_of(head, called=False)
    if changes:
        return None, f"{called(changes[0])} is put on its LM head, or on all modules, or replaces its forward"
    reason = why_stock(head.weight)
    return (base, None) if reason is None else (None, reason)


class Measured(NamedTuple):
    """What was found of one model's head."""

    processing: Processing
    reason: Optional[str]  # why it cannot be scored without logits
    settings: dict  # of the config, as they were


class ScoringModel:
    """A model that scores the labels a trainer's method will ask for; all but the call is the model's own."""

    def __init__(
        self, trainer: Any, model: nn.Module, base: nn.Module, helper: Helper, arguments: dict, add_fused_lm_head
    ) -> None:
        self._trainer, self._model, self._base, self._helper = trainer, model, base, helper
        self._arguments, self._add_fused_lm_head = arguments, add_fused_lm_head
        self._heads = vars(trainer).setdefault("_fused_po_heads", {})  # by model: Measured

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> types.SimpleNamespace:
        """The model's output for input_ids [B, T], with ScoredLogits [B, T, V]."""
        ids = args[0] if args else kwargs["input_ids"]
        call = Call(self._trainer, self._arguments, ids, kwargs["attention_mask"])
        labels = shift_labels(self._helper.labels(call))
        kwargs.pop("logits_to_keep", None)  # the method cuts off the others itself, where a model does not know it
        request = Request(labels, self._helper.outputs, self._heads[id(self._base)].processing)
        out = self._score(self._model, request, *args, **kwargs)
        rows = {name: getattr(out, name) for name in ("log_probs", "entropy", "mean_logits", "is_top1")}
        n_vocab = self._base.get_output_embeddings().weight.shape[0]
        return types.SimpleNamespace(
            logits=ScoredLogits(n_vocab, {"labels": labels.to(out.log_probs.device), **rows}), aux_loss=out.aux_loss
        )

    def _score(self, model: nn.Module, request: Request, *args: Any, **kwargs: Any) -> Any:
        """The output of TRL's fused head. Every row reaches it, as "labelled"; the request says which are scored."""
        token = REQUEST.set(request)
        try:
            with self._fused_forward(), self._trainer.accelerator.autocast():
                return model(*args, shift_labels=torch.zeros_like(request.labels), fused_lm_head=True, **kwargs)
        finally:
            REQUEST.reset(token)

    def why_not_its_head(self) -> Optional[str]:
        """Why log-probs of hidden states and head are not those of the model's logits, or None. Measured once."""
        found = self._heads.get(id(self._base))
        if found is None or found.settings != probe.settings(self._base, found.processing):
            found = self._heads[id(self._base)] = self._measure()
        return found.reason

    def _measure(self) -> Measured:
        base, model = self._base, getattr(self._model, "_orig_mod", self._model)  # not compiled for four tokens
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
        off = (scored[0, :-1].to(plain.device) - plain).abs().max()
        if off <= allowed:
            return result(processing, None)
        name = type(base).__name__
        return result(none, f"log-probs of {name}'s hidden states and head are off by {off:.3g} from its logits'")

    def _fused_forward(self) -> contextlib.AbstractContextManager:
        """TRL's fused head on the model, for this call: nothing is left on it for others to copy or save."""
        base, made = self._base, vars(self._trainer).setdefault("_fused_po_forwards", {})
        if id(base) not in made:  # the same object each time, or torch.compile would begin anew
            with swapped_forward(base, base.forward):
                self._add_fused_lm_head(base)
                made[id(base)] = base.forward
        return swapped_forward(base, made[id(base)])


@contextlib.contextmanager
def swapped_forward(model: nn.Module, forward: Callable) -> Iterator[None]:
    """`model.forward = forward` inside the block; afterwards as before, be that its own or its class's."""
    before = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before

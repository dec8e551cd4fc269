"""transformers and PEFT: `model(..., labels=labels, fused=True)` computes the loss from hidden states, without logits.

The model's own forward runs, including everything before its head and its router losses. A fused call changes two
things: the head gets 0 rows (so the logits are [B, 0, V], and later operations on them cost nothing), and
`model.loss_function`, which the forward calls, computes the loss from the hidden states that the head would have got.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_po import checks
from fused_po.integrations import probe
from fused_po.integrations.fused_call import Call, State, running
from fused_po.integrations.heads import changes_of, is_sharded, read_head
from fused_po.integrations.lazy_logits import LazyLogits
from fused_po.integrations.probe import Processing
from fused_po.ops.outputs import TokenStats
from fused_po.schedule import Schedule

STATE = "_fused_po"  # the attribute of a fused model that holds its State


class _FusedForward:
    """The forward of a fused model. It has the signature of the class's forward, which Trainer and generate() read."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.__wrapped__ = types.MethodType(type(model).forward, model)
        self.__doc__ = type(model).forward.__doc__
        # As a decorator it would import the compiler together with this module. transformers' models import it anyway.
        self.logits_of = torch.compiler.disable(State.logits_of)

    def __reduce__(self) -> tuple:
        """Copies of the model create a new one: its class may be local, or its forward decorated."""
        return _FusedForward, (self.model,)

    def __call__(
        self,
        *args: Any,
        fused: Optional[bool] = None,
        labels: Optional[Tensor] = None,
        shift_labels: Optional[Tensor] = None,
        num_items_in_batch: Any = None,
        outputs: Optional[tuple] = None,
        temperature: Optional[float] = None,
        **kwargs: Any,
    ) -> Any:
        state = getattr(self.model, STATE)
        labels_or_shifted = shift_labels if labels is None else labels
        implied = fused is None and state.always and labels_or_shifted is not None
        if not (fused or implied):
            for name, value in (("outputs", outputs), ("temperature", temperature)):
                if value is not None:
                    raise ValueError(
                        f"{name}: got {value!r}, used only with fused=True; pass that too, or leave it out"
                    )
            kwargs |= checks.not_none(labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
            return _run(self.model, state, None, *args, **kwargs)
        if labels_or_shifted is None:
            raise ValueError("labels: got None, but fused=True needs them; pass labels [B, T], or shift_labels")
        if kwargs.get("return_dict") is False:
            raise ValueError("return_dict: got False, but a fused forward returns a ModelOutput; leave it out")
        names = ("logps",) if outputs is None else tuple(dict.fromkeys(("logps", *outputs)))
        head = self.model.get_output_embeddings()
        state.attach(head)
        full_logits = state.needs_full_logits(self.model, head)
        call = Call(names, 1.0 if temperature is None else temperature, shift_labels, num_items_in_batch, full_logits)
        result = _run(self.model, state, call, *args, **kwargs, labels=labels_or_shifted)
        evaluates = implied and not torch.is_grad_enabled()
        return _with_stats(result, state, call, self.logits_of if evaluates else None)


def _run(model: nn.Module, state: State, call: Optional[Call], *args: Any, **kwargs: Any) -> Any:
    """Run the model's own forward as part of this call (None: a plain forward), which may be nested in other calls."""
    before = running.calls
    running.calls = (*before, (state, call))
    try:
        return _stock_forward(model, state, *args, **kwargs)
    finally:
        running.calls = before


def _stock_forward(model: nn.Module, state: State, *args: Any, **kwargs: Any) -> Any:
    own = state.forward
    return type(model).forward(model, *args, **kwargs) if own is None else own(*args, **kwargs)


def _with_stats(result: Any, state: State, call: Call, logits_of: Optional[Callable]) -> Any:
    """The model's output with token_stats and without the empty logits.

    logits_of: for evaluation, a function that returns lazy logits. Then token_stats is only an attribute and not a
        field, so that Trainer finds the fields of a plain forward.
    """
    if call.stats is None:
        raise TypeError(
            "fused: this model's forward did not call the `loss_function` that fuse_lm_head set; if it was replaced "
            "later, call fuse_lm_head(model) again, otherwise use fused=False"
        )
    if not isinstance(result, dict):
        raise TypeError(f"fused: the model returned {type(result).__name__}; set config.return_dict to True")
    fields = {name: value for name, value in result.items() if name != "logits"}
    kind = output_class(type(result))
    # with a head sharded by tensor parallelism, no rank has whole rows of logits
    if logits_of is not None and (is_sharded(state.head) or not hasattr(call.logits, "device_mesh")):
        return kind(**fields, logits=logits_of(state, call))
    return kind(**fields, token_stats=call.stats)


class _WithTokenStats:
    """A mixin for the output of fused calls: it sets token_stats from lazy logits, and supports pickling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.get("logits"), LazyLogits):
            object.__setattr__(self, "token_stats", self["logits"].token_stats)

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self).__mro__[2], dict(self))


def _rebuild(base: type, fields: dict) -> Any:
    return output_class(base)(**fields)


_CLASSES: dict[type, type] = {}


def output_class(base: type) -> type:
    """The ModelOutput class `base` with the field token_stats added; one class per base."""
    if base not in _CLASSES:
        extra = [("token_stats", Optional[TokenStats], None)]
        made = dataclasses.make_dataclass("Fused" + base.__name__, extra, bases=(_WithTokenStats, base))
        made.__module__ = __name__
        made.__doc__ = f"{base.__name__} with token_stats, a fused_po.TokenStats shaped like the labels; no logits."
        _CLASSES[base] = made
    return _CLASSES[base]


def fuse_lm_head(
    model: nn.Module,
    *,
    always: bool = False,
    logit_scale: Optional[float] = None,
    softcap: Optional[float] = None,
    backend: Optional[str] = None,
    schedule: Optional[Schedule] = None,
) -> nn.Module:
    """Enable `model(input_ids, labels=labels, fused=True)`, which computes loss and log-probs without logits.

    A fused call returns the model's ModelOutput. `loss` is the mean over scored tokens (labels are shifted, a router
    loss is added as usual). `token_stats` is a TokenStats [B, T]; position t belongs to the label at t + 1. `logits` is
    None. With a trainable head, rows of V numbers are kept for the backward within a memory budget; pass
    schedule=Schedule(logits_budget=0) to keep none. A fused call takes these additional arguments:

        num_items_in_batch: divide the sum by this instead, as transformers.Trainer does.
        shift_labels: [B, T] labels that are already aligned.
        outputs: fields of TokenStats to compute besides "logps". temperature: > 0, divides the logits, in the loss too.

    Other calls are unchanged. The model is modified in place; PEFT adapters may be added before or after. The scale and
    softcap of its logits are measured, and the result is checked, by two forwards over four tokens. Fused calls take
    later changes into account: forward pre-hooks and parametrizations on the head, and a new head. If a forward or
    backward hook changes the logits, or the config has another scale or softcap now, the call warns and computes the
    logits. Call fuse_lm_head again to measure the model again.

    Args:
        model: a transformers causal LM or vision-language model, alone or in a PeftModel. Wrap it in DDP, FSDP,
            DeepSpeed or torch.compile afterwards; `parallelize_module` may come before. Its head must be an nn.Linear,
            alone or with LoRA or modules_to_save.
        always: fuse every call with labels unless it has fused=False. Trainer needs this.
        logit_scale, softcap: those of the model's logits, if the model cannot run yet (meta device). Then nothing is
            measured or checked.
        backend, schedule: see `linear_logps`.

    Returns:
        The same model. `unfuse_lm_head` restores it.

    Raises:
        TypeError: the model or its head is not supported, or it changes its logits or its loss in another way.
    """
    base = _base(model)
    if STATE in vars(base):
        unfuse_lm_head(base)
    checks.flags(always=always)
    state = State(always, backend, Schedule.of(schedule))
    _install(base, state)
    try:
        _set_processing(base, state, logit_scale, softcap)
    except BaseException:
        unfuse_lm_head(base)
        raise
    return model


def _set_processing(model: nn.Module, state: State, logit_scale: Optional[float], softcap: Optional[float]) -> None:
    """Measure the scale and softcap of the model's logits, or take those that were passed."""
    if logit_scale is None or not is_sharded(state.head):
        like = next(state.head.parameters(), torch.empty(0))
        parts = read_head(state.head, like.new_empty(0, getattr(state.head, "in_features", 0)))
    if logit_scale is None:
        checks.only_with("softcap", softcap, None, False, "logit_scale")
        _measure(model, state, len(parts.weight))
    else:
        checks.scaling(1.0, logit_scale, softcap)
        state.processing = Processing(logit_scale, softcap)
    state.settings = probe.settings(model, state.processing)


def unfuse_lm_head(model: nn.Module) -> nn.Module:
    """Undo `fuse_lm_head`."""
    base = _base(model)
    state = vars(base).get(STATE)
    if state is None:
        raise ValueError("model: it is not fused; call fuse_lm_head(model) first")
    if not isinstance(vars(base).get("forward"), _FusedForward):
        raise ValueError("model: its forward was replaced after fuse_lm_head; restore that one first")
    state.detach()
    if state.forward is None:
        del base.forward
    else:
        base.forward = state.forward
    if state.own_loss:
        base.loss_function = state.loss
    else:
        del base._loss_function
    del base._replicate_for_data_parallel
    delattr(base, STATE)
    return model


def _refuse_replica() -> nn.Module:
    """Replaces the method with which nn.DataParallel copies a module: a copy would run the forward of the original."""
    raise TypeError(
        "model: nn.DataParallel cannot copy a fused model; start one process per GPU (torchrun or accelerate launch), "
        "make one GPU visible (CUDA_VISIBLE_DEVICES=0), or call unfuse_lm_head(model)"
    )


def _base(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's or torch.compile's wrapper."""
    from transformers import PreTrainedModel

    inner = getattr(model, "_orig_mod", model)
    if type(inner).__module__.startswith("peft."):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a transformers model, not wrapped in DDP or FSDP")
    return inner


def _install(model: nn.Module, state: State) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise TypeError(f"model: {type(model).__name__} has no lm_head; expected a causal LM")
    state.loss, state.own_loss = model.loss_function, "_loss_function" in vars(model)
    if state.loss is not ForCausalLMLoss:
        name = getattr(state.loss, "__name__", type(state.loss).__name__)
        raise TypeError(f"model: its loss_function is {name}, expected ForCausalLMLoss, the only one that can be fused")
    state.forward = vars(model).get("forward")
    state.attach(head)
    setattr(model, STATE, state)
    model._replicate_for_data_parallel = _refuse_replica
    model.forward = _FusedForward(model)
    model.loss_function = state.score


def _measure(model: nn.Module, state: State, n_cols: int) -> None:
    """Measure the scale and softcap of the model's logits, and check a fused call against a plain one."""
    with probe.evaluating(model):
        stock = partial(_stock_forward, model, state)
        state.known = tuple(changes_of(state.head, measured=True))
        state.processing, ids, plain, allowed = probe.measure(model, state.head, n_cols, stock)
        try:
            fused = model(input_ids=ids, labels=ids, fused=True).token_stats.logps[0, :-1].to(plain.device)
        except (ValueError, RuntimeError, IndexError) as error:
            raise TypeError(
                f"model: {type(model).__name__} cannot run without logits ({error}) and cannot be fused; it computes "
                "its loss without `loss_function`, or uses its logits for something else"
            ) from error
    if not (fused - plain).abs().max() <= allowed:
        raise TypeError(
            f"model: the log-probs of a fused call are {fused.tolist()}, but {type(model).__name__}'s logits give "
            f"{plain.tolist()}; its head does not compute hidden @ weight.T + bias and cannot be fused"
        )

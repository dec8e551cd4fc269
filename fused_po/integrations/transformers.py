"""transformers and PEFT: `model(..., labels=labels, fused=True)` scores the labels from hidden states.

The model's own forward runs, whatever it does before its head or with its router losses. Only two things in it change
during a fused call: the head gets no rows (so its logits are [B, 0, V], and what is done to them costs nothing), and
`model.loss_function`, which the forward calls, scores the hidden states that were on their way to the head.
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
    """The forward of a fused model, with the signature of its class's, which the Trainer and generate() read."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.__wrapped__ = types.MethodType(type(model).forward, model)
        self.__doc__ = type(model).forward.__doc__
        # not as a decorator, which would import the compiler with this module; transformers' models have
        self.logits_of = torch.compiler.disable(State.logits_of)

    def __reduce__(self) -> tuple:
        """Made again for a copy of the model: its class may be local, or its forward decorated."""
        return _FusedForward, (self.model,)

    def __call__(
        self, *args: Any, fused: Optional[bool] = None, labels: Optional[Tensor] = None,
        shift_labels: Optional[Tensor] = None, num_items_in_batch: Any = None, outputs: Optional[tuple] = None,
        temperature: Optional[float] = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        state = getattr(self.model, STATE)
        some_labels = shift_labels if labels is None else labels
        implied = fused is None and state.always and some_labels is not None
        if not (fused or implied):
            for name, value in (("outputs", outputs), ("temperature", temperature)):
                if value is not None:
                    raise ValueError(f"{name}: got {value!r} in a forward that is not fused; pass fused=True")
            given = dict(labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return _run(self.model, state, None, *args, **kwargs)
        if some_labels is None:
            raise ValueError("labels: got none, which fused=True scores; pass labels [B, T], or shift_labels")
        if kwargs.get("return_dict") is False:
            raise ValueError("return_dict: got False, but a fused forward returns a ModelOutput")
        names = ("logps",) if outputs is None else tuple(dict.fromkeys(("logps", *outputs)))
        head = self.model.get_output_embeddings()
        state.attach(head)
        whole = state.is_whole(self.model, head)
        call = Call(names, 1.0 if temperature is None else temperature, shift_labels, num_items_in_batch, whole)
        result = _run(self.model, state, call, *args, **kwargs, labels=some_labels)
        evaluates = implied and not torch.is_grad_enabled()
        return _with_stats(result, state, call, self.logits_of if evaluates else None)


def _run(model: nn.Module, state: State, call: Optional[Call], *args: Any, **kwargs: Any) -> Any:
    """The model's own forward in this call, or plain; whatever call this thread is in already."""
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

    logits_of: in an evaluation, gives logits that are computed when they are read. Then token_stats is an attribute
        alone, so that Trainer finds the fields of a plain forward.
    """
    if call.stats is None:
        raise TypeError(
            "fused: this model's forward did not call the `loss_function` that fuse_lm_head gave it; if the model has "
            "another since, call fuse_lm_head(model) again, else use fused=False"
        )
    if not isinstance(result, dict):
        raise TypeError(f"fused: the model returned {type(result).__name__}; set config.return_dict to True")
    fields = {name: value for name, value in result.items() if name != "logits"}
    kind = output_class(type(result))
    # a head cut by tensor parallelism has no logits on one rank
    if logits_of is not None and (is_sharded(state.head) or not hasattr(call.logits, "device_mesh")):
        return kind(**fields, logits=logits_of(state, call))
    return kind(**fields, token_stats=call.stats)


class _WithTokenStats:
    """What a fused call's output has more than the model's own: it can be pickled, and finds its token_stats."""

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
    """A ModelOutput class with the field token_stats added, the same one each time."""
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
    """Let a transformers model score labels without logits: `model(input_ids, labels=labels, fused=True)`.

    Such a call returns the model's ModelOutput with `loss`, the mean over scored tokens (labels are shifted here; the
    router loss of a mixture of experts is added as ever), and `token_stats`, a TokenStats [B, T] whose position t is
    about the label of t + 1; `logits` is None. It takes beside the model's own arguments

        num_items_in_batch: divide the sum by this instead, as transformers.Trainer asks.
        shift_labels: [B, T] labels that are aligned already.
        outputs: names of TokenStats' fields beside "logps". temperature: > 0, divides the logits; the loss's too.

    Every other call is as before. The model is changed in place, PEFT's adapters may come before or after. What it does
    to its logits (a scale, a softcap) is measured, and the result checked, by two forwards over four tokens. What
    changes its logits later is honoured: a forward pre-hook or parametrization on the head, a new head. A call warns
    and makes its logits after all where a forward or backward hook works on them, or a scale or softcap of the config
    is another one now. Calling fuse_lm_head again measures the model again.

    Args:
        model: a transformers causal LM or vision-language model, alone or in a PeftModel; wrap it in DDP, FSDP,
            DeepSpeed or torch.compile afterwards; `parallelize_module` may come before. Its head: an nn.Linear, LoRA on
            one, or modules_to_save.
        always: fuse every call with labels that does not say fused=False: what Trainer needs.
        logit_scale, softcap: what the model does to its logits, where it cannot run yet (meta device); nothing is
            measured or checked then.
        backend, schedule: see `linear_logps`.

    Returns:
        The same model. `unfuse_lm_head` takes it all back.

    Raises:
        TypeError: no such model or head, or one that does something else to its logits or its loss.
    """
    base = _base(model)
    if STATE in vars(base):
        unfuse_lm_head(base)
    checks.flags(always=always)
    state = State(always, backend, Schedule.of(schedule))
    _install(base, state)
    try:
        if logit_scale is None or not is_sharded(state.head):
            like = next(state.head.parameters(), torch.empty(0))
            parts = read_head(state.head, like.new_empty(0, getattr(state.head, "in_features", 0)))
        if logit_scale is None:
            checks.only_with("softcap", softcap, None, False, "logit_scale")
            _measure(base, state, len(parts.weight))
        else:
            checks.scaling(1.0, logit_scale, softcap)
            state.processing = Processing(logit_scale, softcap)
        state.settings = probe.settings(base, state.processing)
    except BaseException:
        unfuse_lm_head(base)
        raise
    return model


def unfuse_lm_head(model: nn.Module) -> nn.Module:
    """Make the model what it was before `fuse_lm_head`."""
    base = _base(model)
    state = vars(base).get(STATE)
    if state is None:
        raise ValueError("model: is not fused; fuse_lm_head(model) comes first")
    if not isinstance(vars(base).get("forward"), _FusedForward):
        raise ValueError("model: its forward was wrapped again since fuse_lm_head; take that back first")
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
    """Replaces the method that nn.DataParallel calls to copy a module: a copy would run the original's forward."""
    raise TypeError(
        "model: nn.DataParallel cannot copy a fused model to its GPUs; start one process a GPU (torchrun or accelerate "
        "launch), make one GPU visible (CUDA_VISIBLE_DEVICES=0), or call unfuse_lm_head(model)"
    )


def _base(model: nn.Module) -> nn.Module:
    """The transformers model in PEFT's or torch.compile's wrapper."""
    from transformers import PreTrainedModel

    inner = getattr(model, "_orig_mod", model)
    if type(inner).__module__.startswith("peft."):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a transformers model, before DDP or FSDP wrap it")
    return inner


def _install(model: nn.Module, state: State) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise TypeError(f"model: {type(model).__name__} has no lm_head; expected a causal LM")
    state.loss, state.own_loss = model.loss_function, "_loss_function" in vars(model)
    if state.loss is not ForCausalLMLoss:
        name = getattr(state.loss, "__name__", type(state.loss).__name__)
        raise TypeError(f"model: its loss_function is {name}, expected ForCausalLMLoss, which fused=True computes")
    state.forward = vars(model).get("forward")
    state.attach(head)
    setattr(model, STATE, state)
    model._replicate_for_data_parallel = _refuse_replica
    model.forward = _FusedForward(model)
    model.loss_function = state.score


def _measure(model: nn.Module, state: State, n_cols: int) -> None:
    """Find what the model does to its logits, and check a fused call against the plain one."""
    with probe.evaluating(model):
        stock = partial(_stock_forward, model, state)
        state.known = tuple(changes_of(state.head, measured=True))
        state.processing, ids, plain, allowed = probe.measure(model, state.head, n_cols, stock)
        try:
            fused = model(input_ids=ids, labels=ids, fused=True).token_stats.logps[0, :-1].to(plain.device)
        except (ValueError, RuntimeError, IndexError) as error:
            raise TypeError(
                f"model: {type(model).__name__} cannot run without logits ({error}); it computes its loss without "
                "`loss_function`, or reads its logits otherwise, and cannot be fused"
            ) from error
    if not (fused - plain).abs().max() <= allowed:
        raise TypeError(
            f"model: the log-probs of a fused call are {fused.tolist()}, those of {type(model).__name__}'s logits "
            f"{plain.tolist()}; its head is not hidden @ weight.T + bias, and cannot be fused"
        )

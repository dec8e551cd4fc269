"""transformers and PEFT: `model(..., labels=labels, fused=True)` scores the labels from hidden states.

The model's own forward runs, whatever it does before its head or with its router losses. Only two things in it change
during a fused call: the head gets no rows (so its logits are [B, 0, V], and what is done to them costs nothing), and
`model.loss_function`, which the forward calls, scores the hidden states that were on their way to the head.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_po import checks
from fused_po.integrations import probe
from fused_po.integrations.heads import call_as, is_sharded, read_head
from fused_po.integrations.probe import Processing
from fused_po.ops.linear_logps import linear_logps
from fused_po.ops.logps import TokenStats, shift_labels
from fused_po.schedule import Schedule

STATE = "_fused_po"  # the attribute of a fused model that holds its _State


class _Call:
    """One fused forward on its way through the model."""

    def __init__(self, outputs: tuple[str, ...], temperature: float, shifted: Optional[Tensor], count: Any) -> None:
        self.outputs, self.temperature = outputs, temperature
        self.shifted, self.count = shifted, count  # labels that are aligned already, num_items_in_batch
        self.hidden: Optional[Tensor] = None  # [B, T, H], what the head was called with
        self.scoring = False
        self.stats: Optional[TokenStats] = None


class _State:
    """What the parts that fuse_lm_head puts into one model share. It holds no reference to the model."""

    def __init__(self, always: bool, backend: Optional[str], schedule: Optional[Schedule]) -> None:
        self.always, self.how = always, {"backend": backend, "schedule": schedule}
        self.processing: Optional[Processing] = None
        self.call: Optional[_Call] = None
        self.head: Optional[nn.Module] = None
        self.hook: Any = None
        self.forward: Optional[Callable] = None  # the instance's own before, None for the class's
        self.patched: Optional[Callable] = None  # and the one that took its place
        self.loss: Optional[Callable] = None
        self.own_loss = False

    def attach(self, head: nn.Module) -> None:
        """Watch this head: PEFT puts another in the first one's place."""
        if self.head is not head:
            self.detach()
            self.head, self.hook = head, head.register_forward_pre_hook(self.divert, with_kwargs=True)

    def detach(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.head = self.hook = None

    def divert(self, head: nn.Module, args: tuple, kwargs: dict) -> Optional[tuple[tuple, dict]]:
        """The hook on the head: keep the hidden states, and give the head none of their rows; a DTensor head one."""
        if self.call is None or self.call.scoring:
            return None
        if self.call.hidden is not None:
            raise TypeError("fused: this model calls its lm_head more than once in a forward; call it with fused=False")
        if kwargs or len(args) != 1:
            raise TypeError(f"fused: lm_head was called with {sorted(kwargs)} beside hidden states; use fused=False")
        self.call.hidden = args[0]
        rows = int(any(hasattr(p, "device_mesh") for p in head.parameters()))  # DTensors cannot reshape no rows
        return (args[0][..., :rows, :],), kwargs

    def score(self, logits: Tensor, labels: Tensor, vocab_size: Optional[int] = None, **kwargs: Any) -> Tensor:
        """In `loss_function`'s place: the same mean over scored tokens, from the hidden states of this call."""
        call = self.call
        if call is None:
            return self.loss(logits, labels, vocab_size, **kwargs)
        hidden, ignore_index = call.hidden, kwargs.get("ignore_index", -100)
        if call.shifted is not None:
            labels = call.shifted
        labels = labels.to(hidden.device)
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}, one a position the "
                "head sees; logits_to_keep is not for fused calls"
            )
        aligned = labels if call.shifted is not None else shift_labels(labels, ignore_index)

        def stats_of(hidden: Tensor) -> TokenStats:
            weight, bias, low_rank = read_head(self.head, hidden)
            return linear_logps(
                hidden, weight, aligned, bias, temperature=call.temperature, ignore_index=ignore_index,
                outputs=call.outputs, low_rank=low_rank, **self.processing._asdict(), **self.how,
            )  # fmt: skip

        call.scoring = True
        call.stats = call_as(self.head, stats_of, hidden)
        count = call.count if call.count is not None else (aligned != ignore_index).sum().clamp(min=1)
        return -call.stats.logps.sum() / (count.to(hidden.device) if isinstance(count, Tensor) else count)


def _patched(stock: Callable) -> Callable:
    """A forward with the signature of `stock`, which the Trainer and generate() read."""

    @wraps(stock)
    def forward(
        self: nn.Module, *args: Any, fused: Optional[bool] = None, labels: Optional[Tensor] = None,
        shift_labels: Optional[Tensor] = None, num_items_in_batch: Any = None, outputs: Optional[tuple] = None,
        temperature: Optional[float] = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        state = getattr(self, STATE)
        some_labels = shift_labels if labels is None else labels
        if fused is None:
            fused = state.always and some_labels is not None
        if not fused:
            for name, value in (("outputs", outputs), ("temperature", temperature)):
                if value is not None:
                    raise ValueError(f"{name}: got {value!r} in a forward that is not fused; pass fused=True")
            given = dict(labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return _stock_forward(self, state, *args, **kwargs)
        if some_labels is None:
            raise ValueError("labels: got none, which fused=True scores; pass labels [B, T], or shift_labels")
        if kwargs.get("return_dict") is False:
            raise ValueError("return_dict: got False, but a fused forward returns a ModelOutput")
        names = ("logps",) if outputs is None else tuple(dict.fromkeys(("logps", *outputs)))
        call = _Call(names, 1.0 if temperature is None else temperature, shift_labels, num_items_in_batch)
        head = self.get_output_embeddings()
        if state.head is not head:
            state.attach(head)
        state.call = call
        try:
            result = _stock_forward(self, state, *args, **kwargs, labels=some_labels)
        finally:
            state.call = None
        return _with_stats(result, call)

    return forward


def _stock_forward(model: nn.Module, state: _State, *args: Any, **kwargs: Any) -> Any:
    own = state.forward
    return type(model).forward(model, *args, **kwargs) if own is None else own(*args, **kwargs)


def _with_stats(result: Any, call: _Call) -> Any:
    """The model's output with token_stats and without the empty logits."""
    if call.stats is None:
        raise TypeError("fused: this model's forward calls no `loss_function` on its lm_head's logits; use fused=False")
    if not isinstance(result, dict):
        raise TypeError(f"fused: the model returned {type(result).__name__}; set config.return_dict to True")
    fields = {name: value for name, value in result.items() if name != "logits"}
    return output_class(type(result))(**fields, token_stats=call.stats)


_CLASSES: dict[type, type] = {}


def output_class(base: type) -> type:
    """A ModelOutput class with the field token_stats added, the same one each time."""
    if base not in _CLASSES:
        extra = [("token_stats", Optional[TokenStats], None)]
        made = dataclasses.make_dataclass("Fused" + base.__name__, extra, bases=(base,))
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
    to its logits (a scale, a softcap) is measured, and the result checked, by two forwards over four tokens.

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
    state = _State(always, backend, Schedule.of(schedule))
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
    if getattr(vars(base).get("forward"), "__func__", None) is not state.patched:
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
    delattr(base, STATE)
    return model


def _base(model: nn.Module) -> nn.Module:
    """The transformers model in PEFT's or torch.compile's wrapper."""
    from transformers import PreTrainedModel

    inner = getattr(model, "_orig_mod", model)
    if type(inner).__module__.startswith("peft."):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a transformers model, before DDP or FSDP wrap it")
    return inner


def _install(model: nn.Module, state: _State) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise TypeError(f"model: {type(model).__name__} has no lm_head; expected a causal LM")
    state.loss, state.own_loss = model.loss_function, "_loss_function" in vars(model)
    if state.loss is not ForCausalLMLoss:
        name = getattr(state.loss, "__name__", type(state.loss).__name__)
        raise TypeError(f"model: its loss_function is {name}, expected ForCausalLMLoss, which fused=True computes")
    state.forward, state.patched = vars(model).get("forward"), _patched(type(model).forward)
    state.attach(head)
    setattr(model, STATE, state)
    model.forward = types.MethodType(state.patched, model)
    model.loss_function = state.score


def _measure(model: nn.Module, state: _State, n_cols: int) -> None:
    """Find what the model does to its logits, and check a fused call against the plain one."""
    with probe.evaluating(model):
        stock = partial(_stock_forward, model, state)
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

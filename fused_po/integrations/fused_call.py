"""The state of a fused model and of one fused forward: the hook on the LM head, and the loss function."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_po.integrations import probe
from fused_po.integrations.heads import call_as, changes_of, hook_name, read_head
from fused_po.integrations.lazy_logits import LazyLogits
from fused_po.integrations.probe import Processing
from fused_po.lm_head.logps import linear_logps
from fused_po.ops.logps import logps_from_logits, shift_labels
from fused_po.ops.outputs import TokenStats
from fused_po.schedule import Schedule


class Call:
    """One fused forward."""

    def __init__(
        self, outputs: tuple[str, ...], temperature: float, shifted: Optional[Tensor], count: Any, full_logits: bool
    ) -> None:
        self.outputs, self.temperature = outputs, temperature
        self.shifted, self.count = shifted, count  # labels that are already aligned, num_items_in_batch
        self.full_logits = full_logits  # whether the head computes all logits, because something else changes them
        self.hidden: Optional[Tensor] = None  # [B, T, H], the input of the head
        self.scoring = False
        self.stats: Optional[TokenStats] = None
        self.logits: Optional[Tensor] = None  # [..., V], without rows unless full_logits


class Running(threading.local):
    """The forwards this thread is in, innermost last: (state of the model, its fused call, or None for a plain one)."""

    calls: tuple[tuple[State, Optional[Call]], ...] = ()


running = Running()
lock = threading.Lock()  # held while a model's hooks are changed


def warn_full_logits(reason: str, *values: Any) -> bool:
    """Warn that this call computes all logits, and return True."""
    if not torch.compiler.is_compiling():
        reason = reason.format(*(hook_name(value) if callable(value) else value for value in values))
        warnings.warn(f"fused: this call computes all its logits, since {reason}; see fuse_lm_head", stacklevel=4)
    return True


class State:
    """The state that the parts of one fused model share. It holds no reference to the model."""

    def __init__(self, always: bool, backend: Optional[str], schedule: Optional[Schedule]) -> None:
        self.always, self.backend, self.schedule = always, backend, schedule
        self.processing: Optional[Processing] = None
        self.known: tuple[Callable, ...] = ()  # the hooks on the head when it was measured
        self.settings: dict[tuple[int, str], Any] = {}  # the settings that may affect the logits, at that time
        self.head: Optional[nn.Module] = None
        self.hook: Any = None
        self.hook_id: Optional[int] = None  # the key of the hook among the head's hooks
        self.forward: Optional[Callable] = None  # the forward set on the instance before, None for the class's
        self.loss: Optional[Callable] = None
        self.own_loss = False

    @property
    def call(self) -> Optional[Call]:
        """This thread's current fused call of this model, or None."""
        for state, call in reversed(running.calls):
            if state is self:
                return call
        return None

    def attach(self, head: nn.Module) -> None:
        """Register the hook on this head, after its other pre-hooks. PEFT may replace the head of a model."""
        hooks = head._forward_pre_hooks
        if self.head is head and list(hooks)[-1:] == [self.hook_id]:
            return
        if self.head is head and self.hook_id in hooks:
            hooks.move_to_end(self.hook_id)
            return
        with lock:
            if self.head is not head or self.hook_id not in hooks:
                self.detach()
                self.head, self.hook = head, head.register_forward_pre_hook(self.divert, with_kwargs=True)
                self.hook_id = self.hook.id

    def detach(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.head = self.hook = None

    def divert(self, head: nn.Module, args: tuple, kwargs: dict) -> Optional[tuple[tuple, dict]]:
        """The hook on the head: keep the hidden states, and pass the head 0 of their rows (1 if it is a DTensor)."""
        call = self.call
        if call is None or call.scoring:
            return None
        if call.hidden is not None:
            raise TypeError("fused: this model calls its lm_head more than once in a forward; call it with fused=False")
        if kwargs or len(args) != 1:
            raise TypeError(
                f"fused: lm_head was called with {sorted(kwargs)} in addition to hidden states; use fused=False"
            )
        call.hidden = args[0]
        if call.full_logits:
            return None
        rows = int(any(hasattr(p, "device_mesh") for p in head.parameters()))  # DTensors cannot be reshaped with 0 rows
        return (args[0][..., :rows, :],), kwargs

    def score(self, logits: Tensor, labels: Tensor, vocab_size: Optional[int] = None, **kwargs: Any) -> Tensor:
        """Replaces `loss_function`: the same mean over scored tokens, from the hidden states of this call."""
        call = self.call
        if call is None:
            return self.loss(logits, labels, vocab_size, **kwargs)
        hidden, ignore_index = call.hidden, kwargs.get("ignore_index", -100)
        if hidden is None:
            raise TypeError("fused: this forward did not call lm_head before its loss; call it with fused=False")
        if call.shifted is not None:
            labels = call.shifted
        labels = labels.to(hidden.device)
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}, one label per input "
                "position of the head; do not use logits_to_keep in fused calls"
            )
        aligned = labels if call.shifted is not None else shift_labels(labels, ignore_index)

        def stats_of(hidden: Tensor) -> TokenStats:
            weight, bias, low_rank = read_head(self.head, hidden)
            scaling = self.processing._asdict()
            return linear_logps(
                hidden, weight, aligned, bias, low_rank=low_rank, schedule=self.schedule, **how, **scaling
            )

        how = dict(temperature=call.temperature, ignore_index=ignore_index, outputs=call.outputs, backend=self.backend)
        call.scoring, call.logits = True, logits
        if call.full_logits:
            call.stats = logps_from_logits(logits, aligned, **how)
        else:
            call.stats = call_as(self.head, stats_of, hidden)
        count = (aligned != ignore_index).sum() if call.count is None else call.count
        if isinstance(count, Tensor):
            count = count.to(hidden.device)
            return -call.stats.logps.sum() / torch.where(count == 0, 1, count)
        return -call.stats.logps.sum() / (1 if count == 0 else count)

    def needs_full_logits(self, model: nn.Module, head: nn.Module) -> bool:
        """Whether something now changes the logits that was not there when they were measured. Warns if so."""
        for hook in changes_of(head):
            if hook not in self.known:
                reason = "{} is a hook on lm_head or on all modules, or replaces the forward of lm_head"
                return warn_full_logits(reason, hook)
        for (place, name), value in self.settings.items():
            now = getattr(probe.places(model)[place], name, None)
            if now != value:
                reason = "{} is {}, but was {} when fuse_lm_head measured the model"
                return warn_full_logits(reason, name, now, value)
        return False

    def logits_of(self, call: Call) -> LazyLogits:
        """The logits of the plain forward, for evaluation; computed if something reads them."""
        head, hidden, processing, logits = self.head, call.hidden, self.processing, call.logits

        def make() -> Tensor:
            if call.full_logits:
                return logits
            raw = call_as(head, partial(type(head).forward, head), hidden)
            return processing.apply(raw).to(logits.dtype)

        return LazyLogits.of(make, (*hidden.shape[:-1], logits.shape[-1]), logits.dtype, logits.device, call.stats)

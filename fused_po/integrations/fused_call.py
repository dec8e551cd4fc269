"""A fused forward on its way through a model: what the hook on the head keeps, and what the loss makes of it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fused_po.integrations import probe
from fused_po.integrations.heads import call_as, called, changes_of, read_head
from fused_po.integrations.lazy_logits import LazyLogits
from fused_po.integrations.probe import Processing
from fused_po.lm_head.logps import linear_logps
from fused_po.ops.logps import logps_from_logits, shift_labels
from fused_po.ops.outputs import TokenStats
from fused_po.schedule import Schedule


class Call:
    """One fused forward on its way through the model."""

    def __init__(
        self, outputs: tuple[str, ...], temperature: float, shifted: Optional[Tensor], count: Any, whole: bool
    ) -> None:
        self.outputs, self.temperature = outputs, temperature
        self.shifted, self.count = shifted, count  # labels that are aligned already, num_items_in_batch
        self.whole = whole  # whether the head makes its logits, since something else works on them
        self.hidden: Optional[Tensor] = None  # [B, T, H], what the head was called with
        self.scoring = False
        self.stats: Optional[TokenStats] = None
        self.logits: Optional[Tensor] = None  # [..., V], without rows unless whole


class Running(threading.local):
    """The forwards that this thread is in: (state of the model, its fused call or None for a plain one), inner last."""

    calls: tuple[tuple[State, Optional[Call]], ...] = ()


running = Running()
lock = threading.Lock()  # for changes of a model's hooks


def warned(why: str, *values: Any) -> bool:
    """True, said in a warning."""
    if not torch.compiler.is_compiling():
        why = why.format(*(called(value) if callable(value) else value for value in values))
        warnings.warn(f"fused: this call makes all its logits, since {why}; see fuse_lm_head", stacklevel=4)
    return True


class State:
    """What the parts that fuse_lm_head puts into one model share. It holds no reference to the model."""

    def __init__(self, always: bool, backend: Optional[str], schedule: Optional[Schedule]) -> None:
        self.always, self.backend, self.schedule = always, backend, schedule
        self.processing: Optional[Processing] = None
        self.known: tuple[Callable, ...] = ()  # hooks that were on the head when it was measured
        self.settings: dict[tuple[int, str], Any] = {}  # and what the model's logits may depend on
        self.head: Optional[nn.Module] = None
        self.hook: Any = None
        self.place: Optional[int] = None  # of the hook among the head's
        self.forward: Optional[Callable] = None  # the instance's own before, None for the class's
        self.loss: Optional[Callable] = None
        self.own_loss = False

    @property
    def call(self) -> Optional[Call]:
        """The fused call of this model that this thread is in."""
        for state, call in reversed(running.calls):
            if state is self:
                return call
        return None

    def attach(self, head: nn.Module) -> None:
        """Watch this head (PEFT replaces the first one), and what its other pre-hooks make of the hidden states."""
        hooks = head._forward_pre_hooks
        if self.head is head and list(hooks)[-1:] == [self.place]:
            return
        if self.head is head and self.place in hooks:
            hooks.move_to_end(self.place)
            return
        with lock:
            if self.head is not head or self.place not in hooks:
                self.detach()
                self.head, self.hook = head, head.register_forward_pre_hook(self.divert, with_kwargs=True)
                self.place = self.hook.id

    def detach(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.head = self.hook = None

    def divert(self, head: nn.Module, args: tuple, kwargs: dict) -> Optional[tuple[tuple, dict]]:
        """The hook on the head: keep the hidden states, and give the head none of their rows; a DTensor head one."""
        call = self.call
        if call is None or call.scoring:
            return None
        if call.hidden is not None:
            raise TypeError("fused: this model calls its lm_head more than once in a forward; call it with fused=False")
        if kwargs or len(args) != 1:
            raise TypeError(f"fused: lm_head was called with {sorted(kwargs)} beside hidden states; use fused=False")
        call.hidden = args[0]
        if call.whole:
            return None
        rows = int(any(hasattr(p, "device_mesh") for p in head.parameters()))  # DTensors cannot reshape no rows
        return (args[0][..., :rows, :],), kwargs

    def score(self, logits: Tensor, labels: Tensor, vocab_size: Optional[int] = None, **kwargs: Any) -> Tensor:
        """In `loss_function`'s place: the same mean over scored tokens, from the hidden states of this call."""
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
                f"labels: got shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}, one a position the "
                "head sees; logits_to_keep is not for fused calls"
            )
        aligned = labels if call.shifted is not None else shift_labels(labels, ignore_index)

        def stats_of(hidden: Tensor) -> TokenStats:
            weight, bias, low_rank = read_head(self.head, hidden)
            return linear_logps(
                hidden, weight, aligned, bias, low_rank=low_rank, **how, **self.processing._asdict(),
                schedule=self.schedule,
            )  # fmt: skip

        how = dict(temperature=call.temperature, ignore_index=ignore_index, outputs=call.outputs, backend=self.backend)
        call.scoring, call.logits = True, logits
        call.stats = logps_from_logits(logits, aligned, **how) if call.whole else call_as(self.head, stats_of, hidden)
        count = (aligned != ignore_index).sum() if call.count is None else call.count
        if isinstance(count, Tensor):
            count = count.to(hidden.device)
            return -call.stats.logps.sum() / torch.where(count == 0, 1, count)
        return -call.stats.logps.sum() / (1 if count == 0 else count)

    def is_whole(self, model: nn.Module, head: nn.Module) -> bool:
        """Whether something else works on the logits than what was measured. Then it warns; not while compiling."""
        for hook in changes_of(head):
            if hook not in self.known:
                return warned("{} is put on lm_head, or on all modules, or replaces its forward", hook)
        for (place, name), value in self.settings.items():
            now = getattr(probe.places(model)[place], name, None)
            if now != value:
                return warned("{} is {}, and was {} when fuse_lm_head measured the model", name, now, value)
        return False

    def logits_of(self, call: Call) -> LazyLogits:
        """The logits that the plain forward has, for an evaluation: computed if something reads them."""
        head, hidden, processing, logits = self.head, call.hidden, self.processing, call.logits

        def make() -> Tensor:
            if call.whole:
                return logits
            raw = call_as(head, partial(type(head).forward, head), hidden)
            return processing.apply(raw).to(logits.dtype)

        return LazyLogits.of(make, (*hidden.shape[:-1], logits.shape[-1]), logits.dtype, logits.device, call.stats)

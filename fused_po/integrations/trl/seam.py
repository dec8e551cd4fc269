"""Puts our scoring in TRL's places, and takes it out again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Optional

import torch

from fused_po.backend.choose import NAMES, resolve
from fused_po.integrations.swap import Swap
from fused_po.integrations.trl.experimental import HELPERS, score_in_helper
from fused_po.integrations.trl.scoring import Scoring
from fused_po.schedule import Schedule

FIRST, BEYOND = "1.15", "1.17"  # the versions the tests have seen
ASK = f"`pip install 'trl>={FIRST},<{BEYOND}'`"
NEEDED = ("_ChunkedLogProbFunction", "_supports_trl_loss_kernel", "add_fused_lm_head")


log = logging.getLogger("fused_po.integrations.trl")


class _Installed(Swap):
    """The names that were changed, and the scoring that stands there now."""

    scoring: Optional[Scoring] = None


_installed: Optional[_Installed] = None


def patch(schedule: Optional[Schedule] = None, *, any_version: bool = False) -> None:
    """Let TRL's trainers score tokens with fused_po, in this process, until `unpatch`.

    Trainers, models and modules that exist already are served too. Called again, it changes the schedule and nothing
    else. It swaps names in TRL's modules: call it while no trainer is at work in another thread. One line of the logger
    "fused_po.integrations.trl", of level INFO, says what is in force.

    Args:
        schedule: how to compute, see `Schedule`; None for the defaults.
        any_version: try a version of TRL that was never tested, if it has the places that are changed.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL is of a version that was never tested, or lacks a place that is changed. Nothing is changed.
    """
    _patch(Schedule.of(schedule), any_version)
    log.info("%s", _in_force())


def _patch(schedule: Schedule, any_version: bool) -> None:
    global _installed
    if _installed is not None:
        _installed.scoring.schedule = schedule
        return
    utils, base_trainer = _places(any_version)
    installed = _Installed()
    try:
        _install(installed, utils, base_trainer, schedule)
    except BaseException:
        installed.undo()
        raise
    _installed = installed


def is_patched() -> bool:
    """Whether `patch` is in force in this process."""
    return _installed is not None


def _in_force() -> str:
    """What `patch` does now, in one line. The GPU is not asked: its context would be opened before a trainer's."""
    backends = f"{resolve(None, torch.device('cpu'), torch.float32)} on CPU"
    if torch.cuda.is_available():
        backends += f", {NAMES[0]} on GPU where it runs"
    without = ", ".join(sorted(HELPERS))
    return (
        f"fused_po scores tokens in TRL {import_trl().__version__}: {_installed.scoring.schedule}; on {backends}; "
        f"trainers: all with TRL's fused head (DPO, KTO, SFT, GRPO, RLOO, ...), and without logits {without}"
    )


def unpatch() -> None:
    """Give TRL back what it had; without a `patch` before, do nothing."""
    global _installed
    if _installed is not None:
        installed, _installed = _installed, None
        installed.undo()


@contextlib.contextmanager
def patched(schedule: Optional[Schedule] = None, *, any_version: bool = False) -> Iterator[None]:
    """`patch` inside the block; afterwards as before, whether that was patched or not. Takes what `patch` takes."""
    before = None if _installed is None else _installed.scoring.schedule
    patch(schedule, any_version=any_version)
    try:
        yield
    finally:
        if before is None:
            unpatch()
        else:
            _patch(before, any_version)


def require_patch(who: str) -> None:
    """RuntimeError unless `patch` is in force."""
    if not is_patched():
        raise RuntimeError(
            f"{who} scores tokens with fused_po: call fused_po.integrations.trl.patch() before, or build it and train "
            "inside `with patched():`"
        )


def import_trl() -> ModuleType:
    """TRL's package, or an error that says which version to install."""
    try:
        import trl
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ModuleNotFoundError(f"fused_po.integrations.trl needs TRL: {ASK}", name="trl") from None
    return trl


def _places(any_version: bool) -> tuple[Any, type]:
    """(trl.trainer.utils, the class under all trainers), once the version and the places to change are known."""
    trl = import_trl()
    from packaging.version import Version
    from trl.trainer import base_trainer, utils

    version = Version(trl.__version__)
    if not any_version and not Version(FIRST) <= version < Version(BEYOND):
        raise RuntimeError(
            f"trl: got version {version}, tested are {FIRST} and later, before {BEYOND}. {ASK}, or a newer fused_po; "
            "or patch(any_version=True), and compare a run with and without it"
        )
    missing = [f"trl.trainer.utils.{name}" for name in NEEDED if not hasattr(utils, name)]
    if not hasattr(base_trainer, "_BaseTrainer"):
        missing.append("trl.trainer.base_trainer._BaseTrainer")
    if missing:
        raise RuntimeError(f"trl {version} has no {', '.join(missing)}, which patch() would change. {ASK}")
    return utils, base_trainer._BaseTrainer


def _install(installed: _Installed, utils: Any, base_trainer: type, schedule: Schedule) -> None:
    scoring = installed.scoring = Scoring(utils, schedule)
    installed.put(utils, "_ChunkedLogProbFunction", scoring)
    installed.put(utils, "_fused_logprob_entropy", scoring.from_logits)
    installed.put(utils, "_supports_trl_loss_kernel", scoring.serves_logits)
    # TRL 1.16 asks these on the way to the three above: whether to leave ignored tokens out, whether Triton is there.
    instead = {"_use_triton": scoring.compacts, "is_triton_available": lambda: True}
    for name in instead.keys() & vars(utils).keys():
        installed.put(utils, name, instead[name])

    def serve(cls: type) -> None:
        helper = HELPERS.get(cls.__name__)
        if helper is not None and cls.__module__.startswith("trl."):
            installed.put(cls, helper.method, score_in_helper(cls, helper, utils.add_fused_lm_head))

    def serve_later(cls: type, **kwargs: Any) -> None:
        super(base_trainer, cls).__init_subclass__(**kwargs)
        serve(cls)

    for cls in _subclasses(base_trainer):
        serve(cls)
    installed.put(base_trainer, "__init_subclass__", classmethod(serve_later))


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)

"""`patch` and `unpatch`: replace TRL's computation of log-probs, and restore it."""

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

FIRST, BEYOND = "1.15", "1.17"  # tested: from FIRST to before BEYOND
INSTALL = f"`pip install 'trl>={FIRST},<{BEYOND}'`"
NEEDED = ("_ChunkedLogProbFunction", "_supports_trl_loss_kernel", "add_fused_lm_head")


log = logging.getLogger("fused_po.integrations.trl")


class _Installed(Swap):
    """The replaced names, and the scoring that replaces them."""

    scoring: Optional[Scoring] = None


_installed: Optional[_Installed] = None


def patch(schedule: Optional[Schedule] = None, *, any_version: bool = False) -> None:
    """Make TRL's trainers compute log-probs with fused_po, in this process, until `unpatch`.

    It also affects trainers, models and modules that exist already. A second call only changes the schedule. patch
    replaces names in TRL's modules, so do not call it while a trainer runs in another thread. It logs one line with the
    logger "fused_po.integrations.trl" at level INFO.

    Args:
        schedule: see `Schedule`; None for the defaults. Schedule(logits_budget=0) saves memory with a trainable head.
        any_version: allow a version of TRL that is not tested, if it has all names that are replaced.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: the version of TRL is not tested, or it does not have a name to replace. Nothing is replaced then.
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
    """Whether TRL is patched in this process."""
    return _installed is not None


def _in_force() -> str:
    """The log line of `patch`. It does not query the GPU, which would create a CUDA context before the trainer does."""
    backends = f"{resolve(None, torch.device('cpu'), torch.float32)} on CPU"
    if torch.cuda.is_available():
        backends += f", {NAMES[0]} on GPU if supported"
    without_logits = ", ".join(sorted(HELPERS))
    return (
        f"fused_po computes log-probs in TRL {import_trl().__version__}: {_installed.scoring.schedule}; {backends}; "
        f"trainers: all with TRL's fused head (DPO, KTO, SFT, GRPO, RLOO, ...), and without logits {without_logits}"
    )


def unpatch() -> None:
    """Restore TRL. Does nothing if it is not patched."""
    global _installed
    if _installed is not None:
        installed, _installed = _installed, None
        installed.undo()


@contextlib.contextmanager
def patched(schedule: Optional[Schedule] = None, *, any_version: bool = False) -> Iterator[None]:
    """`patch` inside the block; afterwards restore the previous state, patched or not. Arguments as for `patch`."""
    before = None if _installed is None else _installed.scoring.schedule
    patch(schedule, any_version=any_version)
    try:
        yield
    finally:
        if before is None:
            unpatch()
        else:
            _patch(before, any_version)


def require_patch(name: str) -> None:
    """Raise RuntimeError unless TRL is patched. name: the class that needs it."""
    if not is_patched():
        raise RuntimeError(
            f"{name}: TRL is not patched; call fused_po.integrations.trl.patch() first, or create and train it inside "
            "`with patched():`"
        )


def import_trl() -> ModuleType:
    """Import TRL. If it is not installed, the error says which version to install."""
    try:
        import trl
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ModuleNotFoundError(f"fused_po.integrations.trl needs TRL: {INSTALL}", name="trl") from None
    return trl


def _places(any_version: bool) -> tuple[Any, type]:
    """(trl.trainer.utils, the base class of all trainers), after checking TRL's version and the names to replace."""
    trl = import_trl()
    from packaging.version import Version
    from trl.trainer import base_trainer, utils

    version = Version(trl.__version__)
    if not any_version and not Version(FIRST) <= version < Version(BEYOND):
        raise RuntimeError(
            f"trl: got version {version}, tested are {FIRST} to before {BEYOND}; {INSTALL}, or a newer fused_po, or "
            "call patch(any_version=True) and compare a run with and without it"
        )
    missing = [f"trl.trainer.utils.{name}" for name in NEEDED if not hasattr(utils, name)]
    if not hasattr(base_trainer, "_BaseTrainer"):
        missing.append("trl.trainer.base_trainer._BaseTrainer")
    if missing:
        raise RuntimeError(f"trl: version {version} has no {', '.join(missing)}, which patch() replaces; {INSTALL}")
    return utils, base_trainer._BaseTrainer


def _install(installed: _Installed, utils: Any, base_trainer: type, schedule: Schedule) -> None:
    scoring = installed.scoring = Scoring(utils, schedule)
    installed.put(utils, "_ChunkedLogProbFunction", scoring)
    installed.put(utils, "_fused_logprob_entropy", scoring.from_logits)
    installed.put(utils, "_supports_trl_loss_kernel", scoring.serves_logits)
    # TRL 1.16 calls these before the three above: whether to leave out ignored tokens, and whether Triton is available.
    replacements = {"_use_triton": scoring.compacts, "is_triton_available": lambda: True}
    for name in replacements.keys() & vars(utils).keys():
        installed.put(utils, name, replacements[name])

    def patch_trainer(cls: type) -> None:
        helper = HELPERS.get(cls.__name__)
        if helper is not None and cls.__module__.startswith("trl."):
            installed.put(cls, helper.method, score_in_helper(cls, helper, utils.add_fused_lm_head))

    def patch_later(cls: type, **kwargs: Any) -> None:
        """Patches trainers that are imported after `patch`."""
        super(base_trainer, cls).__init_subclass__(**kwargs)
        patch_trainer(cls)

    for cls in _subclasses(base_trainer):
        patch_trainer(cls)
    installed.put(base_trainer, "__init_subclass__", classmethod(patch_later))


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)

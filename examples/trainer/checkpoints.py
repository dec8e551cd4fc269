"""Checkpoints by torch.distributed.checkpoint: each rank writes its part, and any number of ranks can read them.

They contain no code: tensors are in safetensors files, everything else is in state.json, with the name and shape of a
tensor where the state has a tensor.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import parallel, run_files
from .errors import fail

KEYS = {"model", "optimizer", "parts", "rng"}


def state_of(learner, parts: dict) -> dict:
    """What a checkpoint contains; parameters have the names of the model without its wrappers."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    model, optimizer = get_state_dict(learner.model, learner.optimizer, options=options)
    frozen = {name for name, p in learner.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    again = {name for names in parallel.tied(learner.model) for name in names[1:]}  # tied: saved under the first name
    model = {name: value for name, value in model.items() if name not in frozen | again}
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    state = {name: part.state_dict() for name, part in parts.items()}
    return {"model": model, "optimizer": optimizer, "parts": state, "rng": {"cpu": torch.get_rng_state()} | cuda}


def without_tensors(value, tensors: dict[str, Tensor], name: str = "", storages: set[int] | None = None):
    """Replace each tensor in a nested state by {"tensor": name, "shape": shape}, which JSON can hold.

    safetensors accepts neither non-contiguous tensors nor two tensors that share memory; such tensors are copied.

    Args:
        tensors: receives the tensors by name; 0-dim ones as [1].
        name: prefix of the names. storages: addresses of the memory seen so far.
    """
    storages = set() if storages is None else storages
    if isinstance(value, Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        storage = local.untyped_storage().data_ptr()
        shared = bool(storage) and storage in storages
        storages.add(storage)
        one = value if value.ndim else value.view(1)
        copied = shared or not local.is_contiguous()
        tensors[name] = one.clone(memory_format=torch.contiguous_format) if copied else one
        return {"tensor": name, "shape": list(value.shape)}
    if isinstance(value, dict):
        return {str(key): without_tensors(part, tensors, f"{name}/{key}", storages) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_tensors(part, tensors, f"{name}/{i}", storages) for i, part in enumerate(value)]
    return value


def with_tensors(value, tensors: dict[str, Tensor]):
    """The inverse of `without_tensors`."""
    if isinstance(value, dict) and value.keys() == {"tensor", "shape"}:
        tensor = tensors[value["tensor"]]
        return tensor if value["shape"] else tensor.view(())
    if isinstance(value, dict):
        return {key: with_tensors(part, tensors) for key, part in value.items()}
    return [with_tensors(part, tensors) for part in value] if isinstance(value, list) else value


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Suppresses the warning that a checkpoint is written or read by a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is .* single process")
        yield


def save(path: Path, learner, parts: dict) -> None:
    """Save a checkpoint into a folder, which exists only once it is complete.

    Args:
        learner: its model and optimizer. parts: other objects with a state_dict, by name.
    """
    import torch.distributed.checkpoint as checkpoint

    tensors: dict[str, Tensor] = {}
    rest = without_tensors(state_of(learner, parts), tensors)

    def write(folder: Path | None) -> None:
        where = parallel.agreed(lambda: folder)
        writer = checkpoint.HuggingFaceStorageWriter(str(where), save_distributed=True)
        try:
            with alone():
                checkpoint.save(tensors, storage_writer=writer)
        except checkpoint.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        if parallel.first():
            (where / "state.json").write_text(json.dumps(rest))

    run_files.write_whole(path, write) if parallel.first() else write(None)
    parallel.wait()


def shapes(state: dict) -> dict[str, list[int]]:
    """The shapes of the model's tensors by name."""
    return {name: part["shape"] for name, part in state["model"].items()}


def load(path: Path, learner, parts: dict) -> None:
    """Load what `save` wrote, on any number of ranks; end the program if it is damaged or from another run."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    tensors: dict[str, Tensor] = {}
    here = without_tensors(state_of(learner, parts), tensors)
    misfit = f"--resume: {path} does not fit this run"
    try:
        rest = json.loads((path / "state.json").read_text())
        if not isinstance(rest, dict) or KEYS - rest.keys():
            fail(f"--resume: {path} was not written by these scripts; delete it")
        if shapes(rest) != shapes(here):
            fail(f"{misfit} (it has other parameters than the model); delete it")
        with alone():
            checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(path)))
    except (Exception, checkpoint.CheckpointException) as error:  # torch raises many types for damaged files
        fail(
            f"--resume: {path} is damaged or not a checkpoint ({type(error).__name__}); delete it to resume from the "
            "checkpoint before it"
        )
    try:
        state = with_tensors(rest, tensors)
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        states = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
        set_state_dict(learner.model, learner.optimizer, **states)
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"{misfit} ({error}); delete it")
    torch.set_rng_state(state["rng"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"])

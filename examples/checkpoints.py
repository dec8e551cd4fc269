"""A run's checkpoints, by torch.distributed.checkpoint: each rank writes its part, any number of ranks reads them.

Nothing in them is code that could run: tensors lie in safetensors files, the rest in state.json, where a tensor's name
and shape stand in its place.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import common
import parallel
import torch
from torch import Tensor

HOLDS = {"model", "optimizer", "parts", "rng"}


def state_of(learner, parts: dict) -> dict:
    """What a checkpoint holds, by the names of the model without its wrappers."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    model, optimizer = get_state_dict(learner.model, learner.optimizer, options=options)
    frozen = {name for name, p in learner.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    again = {name for names in parallel.tied(learner.model) for name in names[1:]}  # a tied tensor has its first name
    model = {name: value for name, value in model.items() if name not in frozen | again}
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    state = {name: part.state_dict() for name, part in parts.items()}
    return {"model": model, "optimizer": optimizer, "parts": state, "rng": {"cpu": torch.get_rng_state()} | cuda}


def without_tensors(value, tensors: dict[str, Tensor], name: str = "", storages: set[int] | None = None):
    """`value` as JSON has it, its tensors moved to `tensors`, by their place; scalars as views of one element.

    safetensors takes no tensor with gaps, and no piece of memory twice: such tensors are copied. storages: those met.
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
    """The inverse."""
    if isinstance(value, dict) and value.keys() == {"tensor", "shape"}:
        tensor = tensors[value["tensor"]]
        return tensor if value["shape"] else tensor.view(())
    if isinstance(value, dict):
        return {key: with_tensors(part, tensors) for key, part in value.items()}
    return [with_tensors(part, tensors) for part in value] if isinstance(value, list) else value


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Without the warning that a checkpoint is that of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is .* single process")
        yield


def save(path: Path, learner, parts: dict) -> None:
    """The learner, whatever else has a state_dict, torch's generators, into a folder that is whole or not there."""
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

    common.write_whole(path, write) if parallel.first() else write(None)
    parallel.wait()


def shapes(state: dict) -> dict[str, list[int]]:
    """The shape of each of the model's tensors."""
    return {name: part["shape"] for name, part in state["model"].items()}


def load(path: Path, learner, parts: dict) -> None:
    """Puts back what `save` wrote, on any number of ranks; ends the program where it is damaged or another run's."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    tensors: dict[str, Tensor] = {}
    here = without_tensors(state_of(learner, parts), tensors)
    misfit = f"--resume: {path} does not fit this run"
    try:
        rest = json.loads((path / "state.json").read_text())
        if not isinstance(rest, dict) or HOLDS - rest.keys():
            common.fail(f"--resume: {path} is none of these scripts'; delete it")
        if shapes(rest) != shapes(here):
            common.fail(f"{misfit} (it holds other parameters than the model); delete it")
        with alone():
            checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(path)))
    except (Exception, checkpoint.CheckpointException) as error:  # whatever a cut or foreign file makes torch raise
        common.fail(
            f"--resume: {path} is damaged or no checkpoint ({type(error).__name__}); delete it, and the one before "
            "is taken"
        )
    try:
        state = with_tensors(rest, tensors)
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        how = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
        set_state_dict(learner.model, learner.optimizer, **how)
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        common.fail(f"{misfit} ({error}); delete it")
    torch.set_rng_state(state["rng"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"])

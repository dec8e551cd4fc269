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
    every = learner.model.named_parameters(remove_duplicate=False)  # torch leaves out the first name of a tied one
    frozen = {name for name, p in every if not p.requires_grad}
    model = {name: value for name, value in model.items() if name not in frozen}
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    state = {name: part.state_dict() for name, part in parts.items()}
    return {"model": model, "optimizer": optimizer, "parts": state, "rng": {"cpu": torch.get_rng_state()} | cuda}


def memory_of(tensor: Tensor) -> tuple:
    """(its storage, where it lies in it) of what a tensor has on this rank."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    storage = local.untyped_storage().data_ptr()
    return storage, (local.data_ptr(), local.dtype, local.shape, local.stride(), tensor.shape)


def without_tensors(value, tensors: dict[str, Tensor], name: str = "", held: dict | None = None):
    """`value` as JSON has it, its tensors moved to `tensors`, by their place; scalars as views of one element.

    safetensors holds each piece of memory once: a tensor that is tied to another one goes by the name of the first;
    one that shares memory otherwise, or has gaps, is copied. held: what memory has been met, by `memory_of`.
    """
    held = {} if held is None else held
    if isinstance(value, Tensor):
        storage, place = memory_of(value)
        shape = list(value.shape)
        if storage and (storage, place) in held:
            return {"tensor": held[storage, place], "shape": shape}
        alone = not storage or storage not in held
        held |= {storage: name, (storage, place): name}
        one = value if value.ndim else value.view(1)
        tensors[name] = one if alone and one.is_contiguous() else one.clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "shape": shape}
    if isinstance(value, dict):
        return {str(key): without_tensors(part, tensors, f"{name}/{key}", held) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_tensors(part, tensors, f"{name}/{i}", held) for i, part in enumerate(value)]
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

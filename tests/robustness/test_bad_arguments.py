"""Every argument of every public function, replaced by wrong values: a ValueError or TypeError names an argument."""

import ast
import re
import warnings

import public_calls
import pytest
import torch
from repository import ROOT

TARGETS = list(public_calls.every_target())
THING = object()
WRONG = {  # wrong values for every argument; some are valid for some arguments
    "a thing": THING,
    "None": None,
    "a string": "?",
    "an int": 3,
    "a negative int": -1,
    "NaN": float("nan"),
    "a float": 2.5,
    "a list": [1.0],
    "a tuple": (1,),
    "a dict": {},
    "True": True,
    "complex": torch.zeros(4, 6, dtype=torch.complex64),
    "bool": torch.zeros(4, 6, dtype=torch.bool),
    "int64": torch.zeros(4, 6, dtype=torch.int64),
    "float64": torch.zeros(4, 6, dtype=torch.float64),
    "float16": torch.zeros(4, 6, dtype=torch.float16),
    "shape": torch.zeros(7, 1, 2, 3),
    "0-dim": torch.zeros(()),
    "int64, shape": torch.zeros(7, 1, 2, 3, dtype=torch.int64),
    "empty": torch.zeros(0),
    "meta": torch.zeros(4, 6, device="meta"),
}
# Arguments that the call does not read, as documented; and counts, where a missing count and one given without it are
# the same error.
NOT_READ = (
    {("FusedLinearKTOLoss.forward", name) for name in ("ref_input", "ref_weight", "ref_bias")}
    | {("FusedLinearGRPOLoss.forward", name) for name in ("ref_input", "ref_weight", "ref_bias")}
    | {
        ("PolicyLoss.forward", "rollout_log_probs"),
    }
)
HEADS = {"weight", "lin_weight", "ref_weight"}  # [V, H] for any number of answers


def rows(change):
    """A change that is applied to every tensor with dimensions."""
    return lambda t: change(t) if t.ndim else t


def to(dtype):
    return lambda t: t.to(dtype) if t.is_floating_point() else t


CHANGES = {  # changes applied to all tensors of a call, which still fit together
    "its first element": rows(lambda t: t[0]),
    "one dimension more": lambda t: t[None],
    "flat": torch.flatten,
    "transposed": lambda t: t.mT if t.ndim > 1 else t,
    "one row": rows(lambda t: t[:1]),
    "an odd number of rows": rows(lambda t: t[:3]),
    "no rows": rows(lambda t: t[:0]),
    "no columns": rows(lambda t: t[..., :0]),
    "meta": lambda t: t.to("meta"),
    "fp16": to(torch.float16),
    "bf16": to(torch.bfloat16),
    "fp64": to(torch.float64),
}
COUNTS = {"num_tokens", "num_sequences", "batch_num_tokens", "global_batch_size"}


def named(message: str, names: list[str]) -> bool:
    return any(re.search(rf"\b{re.escape(name)}\b", message) for name in names)


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_every_argument(target):
    target.call(**target.good)
    for argument in target.arguments:
        for what, value in WRONG.items():
            call = f"{target.name}({argument}={what})"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    target.call(**target.good | {argument: value})
            except (TypeError, ValueError) as error:
                wanted = target.arguments if value is not THING or argument in COUNTS else [argument]
                assert named(str(error), wanted), f"{call} names no argument: {error}"
            except Exception as error:
                pytest.fail(f"{call}: {type(error).__name__}: {error}")
            else:
                unread = (target.name.split()[0], argument) in NOT_READ or argument in COUNTS
                assert value is not THING or unread, f"{call} is taken"


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_all_tensors_at_once(target):
    """The tensors are changed together and still fit. Each call returns no NaN, or an error that names an argument."""
    for what, change in CHANGES.items():
        for heads_too in (True, False):
            changed = {
                name: change(value) if isinstance(value, torch.Tensor) and (heads_too or name not in HEADS) else value
                for name, value in target.good.items()
            }
            call = f"{target.name}({what}{'' if heads_too else ', heads as they are'})"
            try:
                result = target.call(**changed)
            except (TypeError, ValueError) as error:
                assert named(str(error), target.arguments), f"{call} names no argument: {error}"
            except Exception as error:
                pytest.fail(f"{call}: {type(error).__name__}: {error}")
            else:
                assert not any(
                    value.isnan().any() for value in public_calls.tensors_in(result) if value.device.type != "meta"
                ), call


def test_everything_public_is_tested():
    probed = {target.name.split(".")[0].split()[0] for target in TARGETS}
    for space in (public_calls.fused_po, public_calls.losses, public_calls.modules):
        values = {name: getattr(space, name) for name in space.__all__}
        results = {name for name, v in values.items() if isinstance(v, type) and issubclass(v, tuple)}
        assert {name for name, value in values.items() if callable(value)} - results <= probed
    assert len(TARGETS) > 110


def test_no_argument_is_checked_by_assert():
    """python -O removes asserts, and their messages do not help users."""
    folders = ("fused_po", "kernels", "examples", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).glob("**/*.py")]
    assert len(files) > 60
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) and not path.name.startswith("test_")
    ]
    assert found == []

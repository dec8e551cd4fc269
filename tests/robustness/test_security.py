"""Files are never executed: no pickle is loaded, no shell gets a string, and malicious files have no effect."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import example_runs
import pytest
import torch
from example_runs import ROOT, run, script

FILES = [
    path
    for folder in ("fused_po", "kernels", "examples", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
]
FILES.append(ROOT / "setup.py")
# Modules that execute what they read, or that start shells. safetensors, json and yaml's safe_load do neither.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty", "commands"}
CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "os.spawnl",
    "os.spawnv",
    "subprocess.getoutput",
    "torch.hub.load",
    "subprocess.getstatusoutput",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pandas.read_pickle",
    "asyncio.create_subprocess_shell",
}
RUNS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}


def dotted(node: ast.expr) -> str:
    """The dotted name a.b.c of an expression, or "" if it is not a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def names_of(tree: ast.Module) -> dict[str, str]:
    """The names that a file imports: {"load": "torch.load", "np": "numpy"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def option(call: ast.Call, name: str) -> object:
    """The constant value of a keyword argument, or None."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def fault(call: ast.Call, name: str) -> str | None:
    """The fault of a call of this name, or None."""
    if name in CALLS:
        return "runs or unpickles what it is given"
    if name == "torch.load" and option(call, "weights_only") is not True:
        return "torch.load without weights_only=True"
    if name == "numpy.load" and option(call, "allow_pickle"):
        return "numpy.load with allow_pickle"
    if option(call, "trust_remote_code"):
        return "runs code of a model's folder"
    if name in RUNS:
        shell = next((k for k in call.keywords if k.arg == "shell"), None)
        words = call.args[0] if call.args else None
        if shell is not None or isinstance(words, (ast.JoinedStr, ast.Constant, ast.BinOp)):
            return "a shell, or a command that is a string"
    if name.endswith(".from_pretrained") and "transformers" in name and option(call, "trust_remote_code") is not False:
        return "from_pretrained may ask to run code"
    return None


def faults(source: str) -> list[str]:
    tree = ast.parse(source)
    names, found = names_of(tree), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: imports {m}" for m in modules if m.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            first, _, rest = dotted(node.func).partition(".")
            wrong = fault(node, names.get(first, first) + ("." + rest if rest else ""))
            found += [f"line {node.lineno}: {wrong}"] if wrong else []
    return found


def test_sources():
    assert len(FILES) > 80
    assert {
        path.relative_to(ROOT): found for path in FILES if (found := faults(path.read_text(encoding="utf-8")))
    } == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x')",
        "from torch import load; load('x', weights_only=False)",
        "import torch as t; t.load('x', weights_only=flag)",
        "import pickle",
        "from cloudpickle import loads",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import os; os.system('ls ' + x)",
        "from os import popen; popen(x)",
        "import subprocess; subprocess.run(x, shell=True)",
        "import subprocess as s; s.Popen(f'ls {x}')",
        "from subprocess import check_output; check_output('ls')",
        "import yaml; yaml.load(x, yaml.Loader)",
        "eval(x)",
        "load(path, trust_remote_code=True)",
    ],
)
def test_the_source_check_finds_faults(source):
    assert len(faults(source)) == 1


# Files that would run a command if something opened them carelessly.


class Attack:
    """Unpickling it creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def ran(tmp_path):
    """The folder that an attack creates, after a check that the attack works."""
    path = tmp_path / "ran"
    torch.save(Attack(path), tmp_path / "attack.pt")
    torch.load(tmp_path / "attack.pt", weights_only=False)
    assert path.is_dir()
    path.rmdir()
    yield path
    assert not path.exists(), "code in a file was executed"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(flags, folder) of a short run with a cache of reference log-probs."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*example_runs.small_data(folder, train=8, test=4), "--sft-steps", "0", "--batch-size", "4", "--steps", "1"]
    words += ["--precompute-ref", "--ref-cache", str(folder / "cache")]
    run("dpo", words, folder / "run")
    return words, folder


def test_a_checkpoint(trained, ran, tmp_path):
    """Pickles under every file name that torch.distributed.checkpoint uses are not loaded."""
    words, folder = trained
    for name in ("shard-00001-model-00001-of-00001.safetensors", "state.json", ".metadata", "__0_0.distcp"):
        output = tmp_path / name
        shutil.copytree(folder / "run", output)
        path = output / "checkpoint-00000001"
        assert (path / name).exists() == (name[0] == "s")
        (path / name).write_bytes(pickle.dumps(Attack(ran)))
        if name[0] == "s":
            with pytest.raises(SystemExit, match=r"--resume: .*checkpoint-00000001 is damaged or not a checkpoint"):
                run("dpo", words, output, "--resume")
        else:
            run("dpo", words, output, "--resume")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def others(path: Path) -> None:
    """A checkpoint of a model with other shapes."""
    state = json.loads(path.read_text())
    for tensor in state["model"].values():
        tensor["shape"] = [1]
    path.write_text(json.dumps(state))


def without_model(path: Path) -> None:
    state = json.loads(path.read_text())
    del state["model"]
    path.write_text(json.dumps(state))


SHARD, STATE = (f"checkpoint-00000001/{n}" for n in ("shard-00001-model-00001-of-00001.safetensors", "state.json"))
DAMAGE = [
    (SHARD, cut, r"checkpoint-00000001 is damaged or not a checkpoint"),
    (SHARD, lambda path: path.write_bytes(b""), "is damaged or not a checkpoint"),
    (SHARD, lambda path: path.unlink(), "is damaged or not a checkpoint"),
    (STATE, cut, r"is damaged or not a checkpoint \(JSONDecodeError\); delete it"),
    (STATE, lambda path: path.unlink(), r"is damaged or not a checkpoint \(FileNotFoundError\)"),
    (STATE, lambda path: path.write_text("[1]"), "was not written by these scripts"),
    (STATE, without_model, "was not written by these scripts"),
    (STATE, others, r"does not fit this run \(it has other parameters than the model\)"),
    (
        "arguments.json",
        lambda path: path.unlink(),
        r"arguments.json cannot be read .*; start a new run in another folder",
    ),
    ("arguments.json", cut, "arguments.json cannot be read"),
    ("arguments.json", lambda path: path.write_text("[]"), "was started with other arguments"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGE)
def test_a_damaged_run_is_a_message(name, damage, message, trained, tmp_path):
    words, folder = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    damage(tmp_path / "run" / name)
    with pytest.raises(SystemExit, match=f"error: --resume: .*{message}"):
        run("dpo", [*words, "--steps", "1"], tmp_path / "run", "--resume")


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", "\xff\xfe", '{"step": "1", "stage": "DPO"}'])
def test_metrics_that_are_none_are_skipped(text, trained, tmp_path):
    words, folder = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    good = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_bytes((good + text + "\n").encode("latin-1"))
    run("dpo", words, tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == good


def test_a_cache_of_log_probs(trained, ran, tmp_path):
    """A pickle under the cache's name, another cache's content, and a changed cache with an old key are not used."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    words, folder = trained
    (path,) = (folder / "cache").glob("*.safetensors")
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        key, tensors = file.metadata()["key"], load_file(path)
    assert key.startswith(path.stem) and len(key) == 64
    try:
        torch.save(Attack(ran), path)
        with pytest.raises(SystemExit, match=r"--ref-cache: .* cannot be read"):
            run("dpo", words, tmp_path / "a")
        for wrong_key, wrong in (
            ("0" * 64, tensors),
            (key, {name: value[1:] for name, value in tensors.items()}),
            (key, {name: value * float("nan") for name, value in tensors.items()}),
        ):
            save_file({name: value.contiguous() for name, value in wrong.items()}, path, metadata={"key": wrong_key})
            with pytest.raises(SystemExit, match=r"--ref-cache: .* does not match its name; delete it"):
                run("dpo", words, tmp_path / f"run-{wrong_key[:4]}-{len(list(tmp_path.iterdir()))}")
    finally:
        path.write_bytes(whole)
    run("dpo", words, tmp_path / "good")


def test_a_model_s_folder(trained, ran, tmp_path):
    """Pickled weights and a module that the config names are not executed."""
    words, folder = trained
    pickled, coded = tmp_path / "pickled", tmp_path / "coded"
    for copy in (pickled, coded):
        shutil.copytree(folder / "run" / "model", copy)
    (pickled / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Attack(ran)}, pickled / "pytorch_model.bin")
    (coded / "own.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Config: pass\n")
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Config"}}
    (coded / "config.json").write_text(json.dumps(config))
    for copy, why in ((pickled, "weights_only"), (coded, "trust_remote_code|custom code")):
        with pytest.raises(SystemExit, match=rf"(?s)--model: .* cannot be loaded .*({why})"):
            run("dpo", [*words, "--model", str(copy)], tmp_path / f"run-{copy.name}")


def test_flags_and_rows(trained, ran, tmp_path):
    """YAML constructors, and shell commands in data sets, folder names and flags of stages, are not executed."""
    words, _ = trained
    (tmp_path / "run.yaml").write_text(f"steps: !!python/object/apply:os.mkdir [{json.dumps(str(ran))}]")
    with pytest.raises(SystemExit, match=r"--config: .* cannot be read"):
        script("dpo").parse(["--config", str(tmp_path / "run.yaml")])
    said = f"$(mkdir {ran}) `mkdir {ran}`; mkdir {ran}"
    row = {"prompt": said, "chosen": said, "rejected": f"__import__('os').mkdir({str(ran)!r})"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 4)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(rows.read_text())
    given = ["--dataset", str(rows), "--test-dataset", str(held_out), "--ref-cache", str(tmp_path / "cache")]
    run("dpo", [*words, *given], tmp_path / "x; mkdir ran")

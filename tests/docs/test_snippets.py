"""README.md and docs/: code runs as written, commands parse, links work, and figures match the committed results."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers")
from page_snippets import PAGES, ROOT, Block, blocks, commands, given, headings, links, name_of, read  # noqa: E402
from tiny_models import MODELS, batch, causal_lm  # noqa: E402

import fused_po  # noqa: E402
from fused_po.__main__ import main, parse  # noqa: E402

NOT_RUN = {"docs/integrations.md": 2}  # page: how many of its blocks have a marker
README = [block for block in blocks(PAGES[0]) if block.language == "python"]
PYTHON = {name_of(page): [b for b in blocks(page) if b.language == "python"] for page in PAGES}
NAMES = ("Llama", "Gemma2", "Granite", "Cohere")

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def run(block: Block, names: dict) -> None:
    """Run a block with these names; an error gives the block's place."""
    exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)


# Inputs for the trainers of the pages.


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(90))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **special)


def pairs():
    import datasets

    rows = [{"prompt": f"w{i} w1 w2", "chosen": f" w{i} w{i + 1}", "rejected": f" w{i + 2} w3 w4"} for i in range(40)]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def trainer_parts(tmp_path, monkeypatch):
    """TRL as the pages use it, with a tiny model and data set under every name, in a writable folder."""
    trl = pytest.importorskip("trl")
    import datasets

    from fused_po.integrations.trl import unpatch

    causal_lm("Llama").save_pretrained(tmp_path / "model")  # TRL loads the reference from there
    load = partial(transformers.LlamaForCausalLM.from_pretrained, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pairs())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: load())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: word_tokenizer())
    args = trl.DPOConfig("out", max_steps=1, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True)
    yield {"trl": trl, "model": load(), "args": args, "data": pairs(), "tokenizer": word_tokenizer()}
    unpatch()


# Code.


@pytest.mark.parametrize("page", [page for page, found in PYTHON.items() if found])
def test_every_block_runs_in_the_order_of_its_page(page, trainer_parts, seed):
    names = given() | trainer_parts | {"__name__": "__main__"}
    for block in PYTHON[page]:
        compile(block.code, page, "exec")
        if block.why is None:
            run(block, names)


def test_the_blocks_that_do_not_run_are_counted():
    """A block that cannot run here has a marker with the reason. Change NOT_RUN only with a good one."""
    found = {page: sum(block.why is not None for block in some) for page, some in PYTHON.items()}
    assert {page: count for page, count in found.items() if count} == NOT_RUN


def test_trl_logs_what_the_readme_shows(trainer_parts, caplog):
    shown = next(block.code for block in blocks(PAGES[0]) if block.language == "text").strip()
    with caplog.at_level("INFO", "fused_po.integrations.trl"):
        run(next(block for block in README if "DPOTrainer" in block.code), {})
    logged = [f"{r.levelname}:{r.name}:{r.getMessage()}" for r in caplog.records if r.name.startswith("fused_po")]
    pattern = re.escape(shown).replace(re.escape("=None, ...); reference on CPU"), r"=None.*?\); .*?")
    assert len(logged) == 1 and re.fullmatch(pattern, logged[0]), f"README.md shows {shown!r}, it logs {logged}"


@pytest.fixture(params=NAMES)
def problem(request) -> dict:
    """The variables that the README's loops expect, in float64; some models scale or cap their logits."""
    input_ids, labels = batch(3, rows=4)
    return {
        "policy": causal_lm(request.param, 0).double(),
        "reference": causal_lm(request.param, 1).double().requires_grad_(False),
        "input_ids": input_ids, "labels": labels, "mask": torch.ones_like(input_ids), "name": request.param,
        "fused_po": fused_po, "torch": torch,
    }  # fmt: skip


def plain(names: dict, model: str) -> torch.Tensor:
    """Log-probs [2B, T - 1] of the labels from the model's own logits; 0 at ignored tokens."""
    logits = names[model](names["input_ids"], attention_mask=names["mask"]).logits[:, :-1]
    labels = names["labels"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(labels == -100, 0, logps)


def check(names: dict, wanted: torch.Tensor, code: str) -> None:
    """The variable `loss` of the code and its gradients equal those of `wanted`."""
    parameters = [*names["policy"].parameters()]
    gradients = torch.autograd.grad(wanted, parameters)
    exec(code, names)
    torch.testing.assert_close(names["loss"].detach(), wanted.detach(), rtol=1e-9, atol=1e-12)
    for parameter, gradient in zip(parameters, gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-10)


def test_the_loop_with_a_fused_model(problem):
    ratios = plain(problem, "policy") - plain(problem, "reference").detach()
    chosen, rejected = ratios.sum(-1).chunk(2)
    wanted = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    check(problem, wanted, next(block.code for block in README if "fuse_lm_head(" in block.code))


def with_scaling(code: str, name: str) -> str:
    """The code with this model's softcap and scale in place of Llama's."""
    scale, softcap = MODELS[name][1]
    for shown, own in (("logit_scale=1.0,", f"logit_scale={scale},"), ("softcap=None,", f"softcap={softcap},")):
        assert shown in code
        code = code.replace(shown, own)
    return code


def test_hidden_states_and_a_head(problem):
    wanted = -plain(problem, "policy").sum() / (problem["labels"][:, 1:] != -100).sum()
    code = next(block.code for block in README if "linear_logps(" in block.code)
    check(problem, wanted, with_scaling(code, problem["name"]))


def test_the_whole_dpo_loss(problem):
    """The block of docs/api.md."""
    ratios = plain(problem, "policy") - plain(problem, "reference").detach()
    chosen, rejected = ratios.sum(-1).chunk(2)
    k3 = (torch.exp(-ratios) - 1 + ratios).sum() / (problem["labels"][:, 1:] != -100).sum()
    wanted = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean() + 0.01 * k3
    code = next(block.code for block in PYTHON["docs/api.md"] if "linear_dpo(" in block.code)
    check(problem, wanted, with_scaling(code, problem["name"]) + "\nloss = out.loss")


# Commands.


def test_the_makefile_has_every_target_and_variable():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    found = [words[1:] for page in PAGES for words in commands(page) if words[0] == "make"]
    assert len(found) > 5
    for words in found:
        for word in words:
            variable, given, _ = word.partition("=")
            assert f"$({variable})" in makefile if given else word in targets, f"make {' '.join(words)}: {word}"


OURS = [words[3:] for page in PAGES for words in commands(page) if words[1:3] == ["-m", "fused_po"]]
OURS = [words for words in OURS if words != ["plan"]]  # the command's name in a sentence


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_python_m_fused_po(words, tmp_path, monkeypatch, capsys):
    """Every command is parsed; info and the plans that need no network run. test_selfcheck.py runs selfcheck."""
    parse(words)
    model = words[words.index("--model") + 1] if "--model" in words else ""
    if words[0] == "selfcheck" or (model and not model.endswith(".json")):
        return
    (tmp_path / "path" / "to").mkdir(parents=True)
    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=64, num_hidden_layers=1)
    (tmp_path / "path" / "to" / "config.json").write_text(config.to_json_string())
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0 and capsys.readouterr().out


PARSE = """
import argparse, json, os, runpy, sys
script, *lines = json.load(sys.stdin)
real = argparse.ArgumentParser.parse_known_args
def stop(self, *arguments, **options):
    _, rest = real(self, *arguments, **options)
    self.error(f"not known: {rest}") if rest else self.exit()
argparse.ArgumentParser.parse_known_args = stop
sys.path.insert(0, os.path.dirname(script))
for words in lines:
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{script} {' '.join(words)}: ended with {end.code}")
"""


def shown_scripts() -> dict[str, list[list[str]]]:
    """The scripts in the pages' commands, each with the arguments of every command that has some."""
    found: dict[str, list[list[str]]] = {}
    for page in PAGES:
        for words in commands(page):
            at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if at is not None and words[0] != "pytest":
                found.setdefault(words[at], [])
                if words[at + 1 :]:
                    found[words[at]].append(words[at + 1 :])
    return found


@pytest.mark.parametrize("script, lines", shown_scripts().items(), ids=shown_scripts())
def test_a_script_takes_the_arguments_that_are_shown(script, lines, tmp_path):
    assert (ROOT / script).is_file()
    if lines:
        given = json.dumps([str(ROOT / script), *lines])
        (tmp_path / "run.yaml").write_text("steps: 500\n")
        done = subprocess.run([sys.executable, "-c", PARSE], input=given, text=True, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr


@each_page
def test_files_in_commands_and_links_exist(page):
    for path, heading in links(page):
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)} links to {path}"
        assert not heading or heading in headings(target), f"{name_of(page)} links to {path}#{heading}"
    for words in commands(page):
        if words[0] in ("accelerate", "pytest"):
            for word in words[1:]:
                path = word.partition("::")[0]
                if path.endswith((".yaml", ".py")) or (path in ("benchmarks", "tests")):
                    assert (ROOT / path).exists(), f"{name_of(page)}: {' '.join(words)}"


@each_page
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:tests|benchmarks|docs|examples|fused_po|kernels)/[\w./*]*)`", read(page))
    assert not [path for path in named if not [*ROOT.glob(path)]]


@each_page
def test_functions_that_are_named_exist(page):
    for name in re.findall(r"\bfused_po\.([a-z_]+)\(", read(page)):
        assert hasattr(fused_po, name), name
    for name in re.findall(r"\bfused_po\.losses\.([a-z_]+)\(", read(page)):
        assert hasattr(fused_po.losses, name), name


# Statements of the pages.


def test_the_index_names_every_page():
    index = ROOT / "docs" / "index.md"
    named = {path for path, _ in links(index)}
    assert {page.name for page in PAGES[1:]} - {"index.md"} <= named


def fixed_parts(message: str) -> list[str]:
    """The parts of a message on the page, between the … marks, that must be in the code verbatim."""
    parts = [part.strip(" ,;:()'.") for part in message.split("…")]
    return [re.sub(r"^\w+: ", "", part) for part in parts if len(part) > 3]


def test_the_messages_of_the_troubleshooting_page_are_in_the_code():
    page = ROOT / "docs" / "troubleshooting.md"
    shown = re.findall(r"^\| `([^`]+)`(?: \(warning\))? \|", read(page), re.M)
    trees = [ast.parse(read(path)) for path in (ROOT / "fused_po").rglob("*.py")]
    said = [
        node.value for tree in trees for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]  # fmt: skip
    assert len(shown) > 30
    for message in shown:
        for part in fixed_parts(message):
            assert any(part in text for text in said), f"no string of fused_po has {part!r}, of {message!r}"


def test_the_readme_is_short():
    """500 to 700 words, without code, tables, badges and pictures."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->|^\|.*?$|!\[.*?\]\(.*?\)|\]\(.*?\)", "", read(PAGES[0]), flags=re.M | re.S)
    assert 500 <= len(re.findall(r"\w[\w'.,-]*", text)) <= 700


RESULTS = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "head.json").read_text(encoding="utf-8"))
INFOS = [benchmark["extra_info"] for benchmark in RESULTS["benchmarks"]]
OURS_FP32 = "fused_po (fp32 tiles, the default)"


def cells(page: str, name: str, table: int = 0) -> list[str]:
    """The cells of the row with this first cell, in the n-th table that has such a row."""
    rows = re.findall(rf"^\| {re.escape(name)} \|(.+)\|$", read(ROOT / page), re.M)
    return [cell.strip() for cell in rows[table].replace("*", "").split("|")]


def test_precision_matches_the_committed_results():
    found = next(info["precision"] for info in INFOS if "precision" in info)
    names = {"fused_po": "fused_po, fp32 tiles", "eager": "eager", "TRL 1.16": "TRL", "Liger 0.8.5": "Liger"}
    for name, key in names.items():
        for page, own, table, chances in (
            ("README.md", name, 0, ("0.1", "0.9")),
            ("docs/performance.md", OURS_FP32 if name == "fused_po" else name, -1, ("0.1", "0.9", "0.9999")),
        ):
            expected = [float(f"{found[key][p][kind]:.1e}") for kind in (0, 1) for p in chances]
            assert [float(cell) for cell in cells(page, own, table)] == expected, (page, name)


def test_times_and_peaks_match_the_committed_results():
    wide = {info["case"]["head"]: info["providers"] for info in INFOS if info.get("case", {}).get("tokens") == 2048}
    for name in ("fused_po", "torch.compile", "eager", "F.linear_cross_entropy", "TRL"):
        expected = []
        for head in ("trainable", "frozen"):
            report, both = wide[head][name], "forward+backward"
            seconds, over = report["seconds"][both], report["times the bare GEMMs"][both]
            expected += [f"{seconds:.2f} s", f"{over:.2f}", f"{report['peak bytes'] / 1e6:.0f} MB"]
        assert cells("docs/performance.md", "TRL 1.16" if name == "TRL" else name) == expected
    readme = " ".join(read(PAGES[0]).split())
    for name, text in (("fused_po", "**{}**;"), ("eager", "eager PyTorch takes {},"), ("TRL", "TRL 1.16 takes {} (")):
        seconds = wide["trainable"][name]["seconds"]["forward+backward"]
        assert text.format(f"{seconds:.2f} s") in readme, name

"""Inputs of the examples (data in TRL's formats, flags, YAML), and failures while they run."""

import copy
import errno
import importlib.util
import json
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import example_runs
import pytest
import torch
import torch.distributed.checkpoint as checkpoint
import trl_source
from example_runs import EXAMPLES, metrics, run, script

from trainer import (  # isort: skip
    comparisons,
    dataset,
    formats,
    models,
    optimization,
    parallel,
    run_files,
    sampling,
    scoring,
    setup,
    training_run,
)

SCRIPTS = ("sft", "reward", "dpo", "kto")
OWN = {"reward": ("--sft-steps", "1")}  # needs a trained model to start from
ASK, SAY, ERR = ([{"role": r, "content": c}] for r, c in (("user", "1 or 2?"), ("assistant", "2"), ("assistant", "1")))
TEXTS = {"prompt": "1 or 2?", "chosen": "It is 2.", "rejected": "It is 1."}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return [*example_runs.small_data(tmp_path_factory.mktemp("data")), "--sft-steps", "0", "--batch-size", "4"]


@pytest.fixture(scope="module")
def tokenizer():
    made = models.train_tokenizer(["1 or 2?", "It is 2.", "It is 1.", "user assistant"])
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    return made


def trl_data():
    """TRL's data_utils.py, without the rest of TRL."""
    spec = importlib.util.spec_from_file_location("trl_data_utils", trl_source.trainer("data_utils.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder, *rows) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


MADE = [  # wanted format, row, resulting rows
    ("preference", TEXTS, [TEXTS]),
    ("preference", {"chosen": "1 or 2? It is 2.", "rejected": "1 or 2? It is 1."},
     [{"prompt": "1 or 2? It is", "chosen": " 2.", "rejected": " 1."}]),
    ("preference", {"chosen": ASK + SAY, "rejected": ASK + ERR}, [{"prompt": ASK, "chosen": SAY, "rejected": ERR}]),
    ("preference", {"prompt": ASK, "chosen": SAY, "rejected": ERR}, [{"prompt": ASK, "chosen": SAY, "rejected": ERR}]),
    ("unpaired", {"prompt": "a", "completion": "b", "label": False},
     [{"prompt": "a", "completion": "b", "label": False}]),
    ("unpaired", TEXTS, [{"prompt": "1 or 2?", "completion": "It is 2.", "label": True},
                         {"prompt": "1 or 2?", "completion": "It is 1.", "label": False}]),
    ("completion", {"prompt": "a", "completion": "b"}, [{"prompt": "a", "completion": "b"}]),
    ("completion", {"prompt": "a", "completion": "b", "label": False}, []),
    ("completion", {"messages": ASK + SAY}, [{"prompt": [], "completion": ASK + SAY}]),
    ("completion", {"text": "a b"}, [{"prompt": "", "completion": "a b"}]),
    ("prompt", {"prompt": ASK, "answer": 2}, [{"prompt": ASK, "answer": 2}]),
]  # fmt: skip


@pytest.mark.parametrize("want, row, made", MADE)
def test_formats(want, row, made):
    got = formats.rows_of(row, want, "row 0")
    assert [{key: new[key] for key in old} for new, old in zip(got, made)] == made and len(got) == len(made)


def test_implicit_prompts_match_trl(seed):
    """Prompts are split off as in TRL, but at word boundaries: TRL splits "two" and "twenty" after the tw."""
    for row in (
        {"chosen": ASK + SAY, "rejected": ASK + ERR},
        {"chosen": ASK + SAY + ASK + SAY, "rejected": ASK + SAY + ASK + ERR},
        {"chosen": "1 or 2? It is 2.", "rejected": "1 or 2? It is 1."},
    ):
        assert formats.shared_prompt(row) == trl_data().extract_prompt(row)
    row = {"chosen": "so it is two", "rejected": "so it is twenty"}
    assert formats.shared_prompt(row) == {"prompt": "so it is", "chosen": " two", "rejected": " twenty"}


@pytest.mark.parametrize("generation", ["assistant", "assistant 1"])
def test_conversations_match_trl(generation, tokenizer):
    """Prompt and answer together equal TRL's tokens, and are split where TRL splits them.

    With the second template only the rejected answer continues the start of an answer that the template writes.
    """
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = chat.chat_template.replace("'assistant'", repr(generation))
    row = {"prompt": ASK, "chosen": SAY, "rejected": ERR}
    (got,) = dataset.encode([row], chat, 40, 60)
    texts = trl_data().apply_chat_template(row, chat)
    # TRL splits texts, ours splits tokens
    prompt = chat(texts["prompt"].rstrip(), add_special_tokens=False)["input_ids"]
    assert got["prompt_ids"] == prompt and len(prompt) > 4
    for field in ("chosen", "rejected"):
        whole = chat(texts["prompt"] + texts[field], add_special_tokens=False)["input_ids"]
        assert got["prompt_ids"] + got[f"{field}_ids"] == whole


def test_conversations_and_texts_train(tokenizer, tmp_path):
    """Every token of the messages except the first is scored, and batches of them have a loss."""
    rows = formats.rows_of({"messages": ASK + SAY}, "completion", "") + formats.rows_of(
        {"text": "It is 2."}, "completion", ""
    )
    chat, text = dataset.encode(rows, tokenizer, 40, 60)
    assert chat["prompt_ids"] == [] and text["prompt_ids"] == [tokenizer.bos_token_id]
    batch = dataset.stack([chat, text], ("completion",), tokenizer.pad_token_id, "cpu")
    scored = scoring.fused_po.shift_labels(batch["labels"]) != dataset.IGNORE
    assert dataset.scored_tokens([chat, text], ("completion",)) == scored.sum()


def test_a_folder_of_files(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([TEXTS, TEXTS])
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "split")
    assert (
        len(dataset.read(str(tmp_path / "plain"), "train")) == len(dataset.read(str(tmp_path / "split"), "test")) == 2
    )
    with pytest.raises(SystemExit, match="no data set of that name, or no split 'train' in it"):
        dataset.read(str(tmp_path / "split"), "train")


WRONG = [  # wanted format, row, error
    (
        "preference",
        {"prompt": "a", "completion": "b"},
        r"line 1: field 'chosen' is missing; expected chosen, rejected \(preference\); it has 'prompt', 'completion'",
    ),
    ("unpaired", {"prompt": "a", "completion": "b"}, r"field 'label' is missing; expected prompt, completion, label"),
    ("unpaired", {"prompt": "a", "completion": "b", "label": "yes"}, "field 'label' is str, expected true or false"),
    ("completion", {"prompt": "a"}, r"messages \(conversation\) or text \(language modeling\); it has 'prompt'"),
    ("prompt", {"question": "a"}, r"field 'prompt' is missing; .* it has 'question'"),
    ("prompt", {}, "it has no fields"),
    ("preference", {"prompt": ASK, "chosen": "b", "rejected": "c"}, "partly texts and partly lists of messages"),
    ("preference", {"chosen": [], "rejected": ASK}, "field 'chosen' has None, expected messages"),
    ("preference", {"chosen": "b", "rejected": "c"}, "field 'prompt' is empty once"),
    ("completion", {"messages": [{"role": "user"}]}, "expected messages with the strings role and content"),
]


@pytest.mark.parametrize("want, row, message", WRONG)
def test_wrong_formats(want, row, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        dataset.read(written(tmp_path, row), "train", want)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_names_the_format_it_wants(name, words, tmp_path):
    bad = written(tmp_path, {"question": "a", "answer": "b"})
    with pytest.raises(SystemExit, match=r"rows.jsonl, line 1: field .* is missing; expected .*'question', 'answer'"):
        run(name, [*words, *OWN.get(name, ()), "--dataset", bad], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_evaluation_data(name, words, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match=r"none.jsonl: the test set holds no rows; expected one JSON object"):
        run(name, [*words, *OWN.get(name, ()), "--test-dataset", str(tmp_path / "none.jsonl")], tmp_path / "run")


@pytest.mark.parametrize("name", SCRIPTS)
def test_prompts_over_the_limit(name, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no row is left: all prompts are longer than --max-prompt-length 3 tokens"):
        run(name, [*words, *OWN.get(name, ()), "--max-prompt-length", "3"], tmp_path / "run")
    assert "60 of 60 rows left out" in capsys.readouterr().err or name == "kto"


def test_conversations_without_a_template():
    plain = models.train_tokenizer(["1 or 2?"])
    with pytest.raises(SystemExit, match="has conversations, but the tokenizer has no chat template"):
        dataset.encode([{"prompt": ASK, "chosen": SAY, "rejected": ERR}], plain, 40, 60)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(name).parse(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and f"examples/{name}.py" in said
    blocks = said[said.index("options:") :].split("\n  -")[1:]
    assert len(blocks) > 25
    for block in blocks:
        assert len(" ".join(block.split("\n")).split("  ", 1)[1].strip()) > 5, block


def test_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nlr: 1e-4\nsft-steps: 5\nlora: true\nbeta: 1\n")
    args = script("dpo").parse(["--config", str(path), "--steps", "9"])
    assert (args.steps, args.lr, args.sft_steps, args.lora, args.beta) == (9, 1e-4, 5, True, 1.0)
    for text, message in (
        ("stesp: 7", "has 'stesp', which is not a flag; allowed are .*steps"),
        ("steps: many", "has steps: 'many', expected int"),
        ("lora: 3", "has lora: 3, expected true or false"),
        ("steps: true", "has steps: True, expected a value"),
        ("- 3", "holds a list, expected lines such as"),
        ("a: [", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match=f"--config: .*{message}"):
            script("dpo").parse(["--config", str(path)])
    with pytest.raises(SystemExit, match="cannot be read"):
        script("dpo").parse(["--config", str(tmp_path / "none.yaml")])
    path.write_text("pairs: all")
    with pytest.raises(SystemExit, match="has pairs: 'all', allowed are sampled, given"):
        script("reward").parse(["--config", str(path)])


def test_adapter_and_event_flags(words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="--lora requires peft: pip install peft"):
        run("dpo", [*words, "--lora"], tmp_path / "a")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="--tensorboard requires TensorBoard: pip install tensorboard"):
        run("dpo", [*words, "--tensorboard"], tmp_path / "b")


def test_a_full_disk(words, tmp_path, monkeypatch, capsys):
    """The disk is full at the second checkpoint: the first is complete, no partial file is left, the run resumes."""
    write, folder = checkpoint.HuggingFaceStorageWriter.write_data, tmp_path / "run"

    def full(self, *args):
        if "checkpoint-00000004" in str(self.path):
            (Path(self.path) / "half").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args)

    short = [*words, "--steps", "6", "--checkpoint-every", "2"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(checkpoint.HuggingFaceStorageWriter, "write_data", full)
        run("dpo", short, folder)
    message = str(stopped.value)
    assert "No space left on device; free some space. The last checkpoint is complete:" in message
    assert f"--resume --output {folder} continues from step 2" in message
    assert [path.name for path in folder.iterdir() if "checkpoint" in path.name] == ["checkpoint-00000002"]
    run("dpo", short, folder, "--resume")
    assert [row["step"] for row in metrics(folder)] == list(range(6))


@pytest.mark.parametrize("writer", ["torch", "safetensors", "python"])
def test_the_file_size_limit(writer, tmp_path):
    """A real file size limit is reached inside a file: every writer raises an OSError, and no file is left."""
    from safetensors.torch import save_file

    tensors, limits = {"x": torch.zeros(10**6)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    writers = {
        "torch": lambda path: torch.save(tensors, path),
        "safetensors": lambda path: save_file(tensors, path),
        "python": lambda path: path.write_bytes(bytes(10**6)),
    }
    path = tmp_path / "state"
    path.write_text("the last one")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            run_files.write_whole(path, writers[writer])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno in training_run.DISK_FULL
    assert path.read_text() == "the last one" and list(tmp_path.iterdir()) == [path]


def test_missing_models(words, tmp_path):
    with pytest.raises(SystemExit, match=r"--model: .*/none' cannot be loaded"):
        run("dpo", [*words, "--model", str(tmp_path / "none")], tmp_path / "run")
    run("sft", [*words, "--steps", "1"], tmp_path / "sft")
    made = tmp_path / "sft" / "model"
    for path in made.glob("*token*"):
        path.unlink()
    with pytest.raises(SystemExit, match=r"--model: the tokenizer of .* cannot be loaded"):
        run("dpo", [*words, "--model", str(made)], tmp_path / "again")


def test_a_loss_that_is_not_finite(words, tmp_path, monkeypatch):
    """The run stops before the weights change."""
    dpo = script("dpo")
    honest, calls = dpo.dpo_loss, []

    def poisoned(*args):
        loss, report = honest(*args)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 3 else 1), report

    monkeypatch.setattr(dpo, "dpo_loss", poisoned)
    with pytest.raises(SystemExit, match="loss nan, gradient norm nan: the weights were not changed"):
        run("dpo", [*words, "--steps", "5", "--checkpoint-every", "1"], tmp_path / "run")
    assert run_files.checkpoints(tmp_path / "run")[-1] == 2
    assert all(value.isfinite().all() for value in example_runs.weights(tmp_path / "run").values())


def test_ctrl_c(tmp_path):
    """A real SIGINT gives exit code 130, a message instead of a traceback, and a checkpoint to resume from."""
    words = [*example_runs.small_data(tmp_path), "--sft-steps", "0", "--batch-size", "2", "--checkpoint-every", "1"]
    folder = tmp_path / "run"
    command = [sys.executable, str(EXAMPLES / "dpo.py"), *words, "--steps", "100000", "--output", str(folder)]
    how = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore SIGINT
    with subprocess.Popen(command, **how) as process:
        while process.poll() is None and not run_files.checkpoints(folder):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in said
    step = run_files.checkpoints(folder)[-1]
    assert f"stopped. The last checkpoint is complete: --resume --output {folder} continues from step {step}" in said


def test_events_for_tensorboard(words, tmp_path, monkeypatch):
    """TensorBoard gets the losses of metrics.jsonl; a resumed run removes events after its checkpoint."""
    seen, purged = {}, []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "run"
            purged.append(purge_step)

        def add_scalar(self, name, value, step):
            seen[name, step] = value

        def close(self):
            purged.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    more = [*words, "--steps", "3", "--checkpoint-every", "2", "--tensorboard"]
    run("dpo", more, tmp_path / "run")
    for row in metrics(tmp_path / "run"):
        assert seen["DPO/loss", row["step"]] == row["loss"]
    assert len({step for name, step in seen if name == "DPO/loss"}) == 3
    run_files.remove(run_files.checkpoint(tmp_path / "run", 3))
    run("dpo", more, tmp_path / "run", "--resume")
    assert purged == [None, "closed", 2, "closed"]


def test_pairs_follow_the_checking_program(words):
    """The same seed gives the same pairs. Chosen answers are right, rejected ones wrong. The generator is unchanged."""
    args = script("reward").parse([*words, *OWN["reward"]])
    texts = setup.load_rows(args, "preference")
    model, tokenizer, rows, _ = setup.start(args, texts)
    learner = optimization.learner(parallel.Engine(args, model), 3e-3, 60)
    sft = script("sft")
    for number in range(60):
        drawn = [{**row, "completion_ids": row["chosen_ids"]} for row in dataset.batch_at(rows, number, 16, 0)]
        tokens = dataset.scored_tokens(drawn, sft.FIELDS)
        optimization.take_step(learner, drawn, lambda p, n=tokens: sft.sft_loss(model, tokenizer, p, n, args), args)
    before = torch.get_rng_state()
    how = dict(samples=4, longest=16, seed=3)
    pairs = sampling.sampled_pairs(model, tokenizer, rows, args, **how)
    assert torch.equal(before, torch.get_rng_state())
    assert pairs == sampling.sampled_pairs(model, tokenizer, rows, args, **how)
    assert pairs != sampling.sampled_pairs(model, tokenizer, rows, args, **how | {"seed": 4})
    assert len(pairs) > 20
    for row in pairs:
        assert comparisons.is_correct(row["prompt"], row["chosen"])
        assert not comparisons.is_correct(row["prompt"], row["rejected"])
    with pytest.raises(SystemExit, match="no pair: of 1 prompts none got both a right and a wrong answer"):
        sampling.sampled_pairs(model, tokenizer, [{**rows[0], "prompt": "no question"}], args, **how)


def test_calibration_of_known_margins():
    """4 pairs at +-log 3: three right ones match P = 3/4, an error of 0; four right ones give an error of 1/4."""
    reward = script("reward")
    third = torch.tensor([3.0, 3.0, 3.0, 1 / 3]).log()
    p, share, count = reward.calibration(third)
    assert p.tolist() == pytest.approx([0.25, 0.75]) and share.tolist() == pytest.approx([0.25, 0.75])
    assert count.tolist() == [4, 4]
    assert reward.measures(third)["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert reward.measures(third.abs())["calibration_error"] == pytest.approx(0.25)
    assert reward.measures(third)["accuracy"] == 0.75

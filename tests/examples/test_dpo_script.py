"""examples/dpo.py: data, bad inputs, checkpoints, and its complete default run (slow)."""

import json
import os
import signal
import subprocess
import sys
import time

import example_runs
import pytest
import torch
from example_runs import EXAMPLES

from trainer import checkpoints, comparisons, dataset, models, run_files  # isort: skip
import dpo  # isort: skip

TINY = ["--sft-steps", "3", "--steps", "4", "--batch-size", "4", "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """(train, test): a few rows of the shipped data sets, so that evaluation is fast."""
    folder = tmp_path_factory.mktemp("data")
    paths = []
    for source, count in ((comparisons.TRAIN, 60), (comparisons.TEST, 10)):
        paths.append(folder / source.name)
        paths[-1].write_text("\n".join(source.read_text().splitlines()[:count]))
    return paths


def arguments(small_data, output, *more):
    paths = ["--dataset", str(small_data[0]), "--test-dataset", str(small_data[1])]
    return dpo.parse([*TINY, *paths, "--output", str(output), "--device", "cpu", *more])


def test_shipped_data(tmp_path):
    rows = {
        path: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (comparisons.TRAIN, comparisons.TEST)
    }
    assert len(rows[comparisons.TRAIN]) >= 2000 and len(rows[comparisons.TEST]) >= 300
    for row in (row for part in rows.values() for row in part):
        assert comparisons.is_correct(row["prompt"], row["chosen"])
        assert not comparisons.is_correct(row["prompt"], row["rejected"])
    numbers = [
        {frozenset(filter(str.isdigit, row["prompt"].replace("?", " ").replace(".", " ").split())) for row in part}
        for part in rows.values()
    ]
    assert not numbers[0] & numbers[1]
    comparisons.write(tmp_path)
    for path in rows:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_checking_program_rejects_wrong_answers():
    ask = "Which is larger, 3 or 40?"
    assert comparisons.is_correct(ask, " It is the second one. ")
    for answer in ("", "It is the first one.", "It is the second one. It is the first one.", "second"):
        assert not comparisons.is_correct(ask, answer)


BAD_FILES = [
    ("", "holds no rows"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": ', "line 2: not JSON"),
    (
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": "a", "chosen": "b"}',
        "line 3: field 'rejected' is missing",
    ),
    ('{"prompt": "a", "chosen": 1, "rejected": "c"}', "line 1: field 'chosen' is int, expected a string"),
    ('{"prompt": "a", "chosen": " ", "rejected": "c"}', "line 1: field 'chosen' is empty"),
    ('["a"]', "line 1: expected an object"),
]


@pytest.mark.parametrize("text, message", BAD_FILES)
def test_bad_data_file(text, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        dataset.read(str(path), "train")


def test_unreadable_data_file(tmp_path):
    with pytest.raises(SystemExit, match=r"none.jsonl: cannot be read"):
        dataset.read(str(tmp_path / "none.jsonl"), "train")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit, match=r"latin.jsonl: cannot be read"):
        dataset.read(str(tmp_path / "latin.jsonl"), "train")


BAD_ARGUMENTS = [
    (["--steps", "0"], "--steps: got 0"),
    (["--beta", "-1"], "--beta: got -1.0"),
    (["--lr", "nan"], "--lr: got nan"),
    (["--max-length", "5"], "--max-length: got 5"),
    (["--dataset", "my.jsonl"], "--test-dataset: missing"),
]


@pytest.mark.parametrize("words, message", BAD_ARGUMENTS)
def test_bad_arguments(words, message):
    with pytest.raises(SystemExit, match=message):
        dpo.parse(words)


def test_prompts_longer_than_the_limit_are_counted(capsys):
    rows = dataset.read(str(comparisons.TEST), "test")[:5]
    rows[1] = {**rows[1], "prompt": "1 " * 50}
    tokenizer = models.train_tokenizer(text for row in rows for text in row.values())
    kept = dataset.encode(rows, tokenizer, 30, 34)
    said = capsys.readouterr().err
    assert len(kept) == 4
    assert "1 of 5 rows left out: prompt longer than --max-prompt-length 30 tokens" in said
    with pytest.raises(SystemExit, match="no row is left"):
        dataset.encode(rows, tokenizer, 2, 34)


def test_answers_round_trip_through_the_tokenizer():
    rows = dataset.read(str(comparisons.TEST), "test")[:20]
    tokenizer = models.train_tokenizer(text for row in rows for text in row.values())
    for row in dataset.encode(rows, tokenizer, 100, 200):
        whole = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"], skip_special_tokens=True)
        assert whole == row["prompt"] + row["chosen"]


def test_batches_depend_only_on_the_step_and_cover_an_epoch():
    rows = [{"n": i} for i in range(10)]
    seen = [row["n"] for step in range(5) for row in dataset.batch_at(rows, step, 4, seed=7)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_resume_is_bit_for_bit(small_data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted = dpo.train(arguments(small_data, whole))
    for stop in (2, 5):  # once in the supervised stage and once in DPO

        def interrupt(path, learner, parts, stop=stop, save=checkpoints.save):
            save(path, learner, parts)
            if path.name >= run_files.checkpoint(path.parent, stop).name:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoints, "save", interrupt)
            dpo.train(arguments(small_data, broken, *(["--resume"] if stop > 2 else [])))
    shares = dpo.train(arguments(small_data, broken, "--resume"))
    assert shares == uninterrupted
    states = [example_runs.weights(folder) for folder in (whole, broken)]
    assert run_files.checkpoints(whole) == run_files.checkpoints(broken) == [6, 7]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    metrics = [run_files.read_metrics(folder / "metrics.jsonl") for folder in (whole, broken)]
    assert metrics[0] == metrics[1] and [row["step"] for row in metrics[0]] == list(range(7))
    for name in ("model/model.safetensors", "model/tokenizer.json", "curves.png", "arguments.json"):
        assert (whole / name).stat().st_size > 100
    with pytest.raises(SystemExit, match=r"already holds a run"):
        dpo.train(arguments(small_data, whole))
    with pytest.raises(SystemExit, match=r"started with other arguments .beta: 0.1 then, 0.5 now"):
        dpo.train(arguments(small_data, whole, "--resume", "--beta", "0.5"))
    with pytest.raises(SystemExit, match=r"no checkpoint to resume from"):
        dpo.train(arguments(small_data, tmp_path / "none", "--resume"))
    again = arguments(small_data, tmp_path / "again", "--model", str(whole / "model"), "--sft-steps", "0")
    assert set(dpo.train(again)) == {"before", "after"}


def test_a_killed_run_leaves_complete_checkpoints(small_data, tmp_path):
    paths = ["--dataset", str(small_data[0]), "--test-dataset", str(small_data[1]), "--output", str(tmp_path / "run")]
    words = [*paths, "--sft-steps", "500", "--steps", "500", "--checkpoint-every", "1", "--batch-size", "2"]
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "dpo.py", *words, "--device", "cpu"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while len(run_files.checkpoints(tmp_path / "run")) < 2 and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = run_files.checkpoints(tmp_path / "run")
    assert found
    for step in found:
        assert all(value.isfinite().all() for value in example_runs.weights(tmp_path / "run", step).values())


@pytest.mark.slow
def test_the_default_run_learns(tmp_path):
    begin = time.time()
    shares = dpo.train(dpo.parse(["--output", str(tmp_path / "run")]))
    assert shares["before"]["preference"] <= 0.7
    assert shares["after"]["preference"] > 0.9
    assert shares["after"]["greedy"] >= shares["before"]["greedy"]
    assert time.time() - begin < 240


def test_a_custom_loss(capsys):
    """The script checks value and gradients against plain PyTorch; the loss falls to a hundredth."""
    import add_a_loss

    add_a_loss.main()
    printed = capsys.readouterr().out.splitlines()
    first, last = (float(printed[i].split()[-1]) for i in (1, -1))
    assert len(printed) == 6 and last < 0.01 * first

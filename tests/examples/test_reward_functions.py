"""Reward functions are called as in TRL's GRPO: columns, messages, async functions, None, logs."""

import json
import math
import textwrap
import types

import example_runs
import pytest
import torch
from example_runs import metrics, run, script

from trainer import dataset, formats, models, reward_sources, rollouts  # isort: skip

ASK = [{"role": "user", "content": "2 + 2 = ?"}]
# Columns with names that the examples use internally, or that TRL's recipes have.
OWN = {
    "answer": "4", "solution": [4], "answer_text": "four", "answer_ids": [9], "prompt_ids": "p", "chosen_ids": None,
    "source_ids": "a1", "label": 0.5, "labels": [1], "reward": -1, "ended": "no", "logged": "x", "old_logps": 1,
    "ref_logps": 2, "advantage": 3, "entropy": 4, "generation_ids": 5, "columns": {"a": 1}, "messages": [], "text": "t",
    "chosen": 7, "chosen_ref": 1.5, "where": None, "tools": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """(model, tokenizer with a template, args)."""
    tokenizer = models.train_tokenizer(["2 + 2 = 4 5 ?", "user assistant"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ' ' + m.content }}{% endfor %}assistant"
    import transformers

    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **shape, **ends)).eval()
    args = script("grpo").parse(["--device", "cpu", "--missing-eos-penalty", "0", "--max-completion-length", "4"])
    return model, tokenizer, args


def function(folder, source: str, name: str = "score") -> str:
    """FILE.py:NAME for a new file with this source."""
    path = folder / "rewards.py"
    path.write_text("seen = []\n" + textwrap.dedent(source))
    return f"{path}:{name}"


def encoded(rows, tokenizer) -> list[dict]:
    return dataset.encode([new for row in rows for new in formats.rows_of(row, "prompt", "row")], tokenizer, 60, 90)


SEES = """
def score(prompts, completions, **how):
    seen.append(dict(how, prompts=prompts, completions=completions))
    open(__file__ + ".json", "w").write(__import__("json").dumps(seen, default=str))
    return [float(len(c)) for c in completions]
"""


def called_with(spec: str) -> list[dict]:
    return json.loads(open(spec.rpartition(":")[0] + ".json").read())


@pytest.mark.parametrize("flat", [True, False])
def test_columns_reach_a_function_untouched(flat, small, tmp_path):
    """Columns of any name, also in rows that were not read from a file."""
    model, tokenizer, args = small
    data = [{"prompt": "2 + 2 = ?", **OWN}, {"prompt": "2 + 2 = 5", **OWN, "answer": "no"}]
    own = {k: v for k, v in OWN.items() if not (flat and k in ("prompt_ids", "generation_ids"))}
    if flat:
        rows = [
            {"prompt": r["prompt"], **own, "answer": r["answer"], "prompt_ids": tokenizer(r["prompt"])["input_ids"]}
            for r in data
        ]
    else:
        rows = encoded(data, tokenizer)
    spec, views = function(tmp_path, SEES), []
    judge = reward_sources.checked(reward_sources.by_function(spec), "rewards")
    answered = rollouts.rollout(model, tokenizer, rows, args, lambda rows: views.extend(rows) or judge(rows), samples=2)
    (given,) = called_with(spec)
    assert {name: given[name] for name in own} == {
        name: [value] * 4 if name != "answer" else ["4", "4", "no", "no"] for name, value in own.items()
    }
    assert [view["answer"] for view in views] == ["4", "4", "no", "no"]
    assert given["completion_ids"] == [row["answer_ids"] for row in answered]
    assert given["completions"] == [tokenizer.decode(row["answer_ids"], skip_special_tokens=True) for row in answered]
    assert [row["reward"] for row in answered] == [len(text) for text in given["completions"]]
    assert not {"prompt", "completion"} & given.keys()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2 = ?", "answer": "4"},
        {"prompt": ASK, "answer": "4", "chat_template_kwargs": {"a": 1}},
        {"prompt": "2 + 2 = ?", "chosen": " 4", "rejected": " 5", "completion": "x", "completion_ids": [1]},
        {"prompt": "2 + 2 = ?", "completion": "4", "label": True, "source": "b"},
    ],
)
def test_the_call_equals_trls(row, small, tmp_path, monkeypatch):
    """The arguments have the names and values that TRL's trainer passes for these rows and answers."""
    trl = pytest.importorskip("trl", reason="needs TRL: pip install -e '.[test]'")
    from trl.trainer import grpo_trainer

    model, tokenizer, args = small
    calls = []
    spec = function(tmp_path, SEES)
    judge = reward_sources.by_function(spec)
    answered = rollouts.rollout(model, tokenizer, encoded([row, row], tokenizer), args, judge)
    (given,) = called_with(spec)

    def score(**how):
        calls.append(how)
        return [0.0] * len(how["prompts"])

    own = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu", is_main_process=False), reward_funcs=[score], environments=None
    )
    own.reward_processing_classes, own.reward_func_names, own.state = [None], ["score"], "state"
    own._log_completion_extra = own._log_metric = print
    monkeypatch.setattr(grpo_trainer, "gather", lambda values: values)
    monkeypatch.setattr(grpo_trainer, "profiling_context", lambda *_: torch.no_grad())
    texts = tokenizer.batch_decode([a["answer_ids"] for a in answered], skip_special_tokens=True)
    chats = [[{"role": "assistant", "content": text}] for text in texts] if isinstance(row["prompt"], list) else texts
    ids = [a["answer_ids"] for a in answered]
    trl.GRPOTrainer._calculate_rewards(own, [row, row], [row["prompt"]] * 2, chats, ids)
    objects = ("trainer_state", "log_extra", "log_metric")
    assert given.keys() == calls[0].keys() and set(objects) < given.keys()
    for name in given.keys() - set(objects):
        assert given[name] == calls[0][name], name


def judged(spec: str, count: int = 2, **own) -> list[float]:
    rows = [
        {"prompt": "a", "answer_text": "b", "answer_ids": [n], formats.COLUMNS: {"prompt": "a", **own}}
        for n in range(count)
    ]
    return reward_sources.checked(reward_sources.by_function(spec), "--reward-function x")(rows)


RETURNS = {
    "a tuple": "return (1, 2)",
    "numpy": "import numpy; return numpy.array([1, 2], dtype='float32')",
    "a tensor": "import torch; return torch.tensor([1, 2])",
    "tensors": "import torch; return [torch.tensor(1.0), torch.tensor([2])]",
    "a generator": "return (n + 1 for n in range(2))",
    "no **how": "return [1, 2]",
}


@pytest.mark.parametrize("name", RETURNS)
def test_rewards_of_every_kind(name, tmp_path):
    how = "" if name == "no **how" else ", **how"
    assert judged(function(tmp_path, f"def score(prompts, completions{how}): {RETURNS[name]}")) == [1.0, 2.0]


@pytest.mark.parametrize(
    "source, name",
    [
        ("async def score(completion_ids, **how): return [float(ids[0]) + 1 for ids in completion_ids]", "score"),
        ("class Score:\n    async def __call__(self, prompts, **how): return [1, 2]\nscore = Score()", "score"),
        ("import functools\nasync def f(n, prompts, **how): return [n, 2]\nscore = functools.partial(f, 1)", "score"),
        ("def score(**how):\n    async def later(): return [1, 2]\n    return later()", "score"),
    ],
)
def test_functions_that_are_async(source, name, tmp_path):
    assert judged(function(tmp_path, source, name)) == [1.0, 2.0]


def test_async_functions_share_one_event_loop(tmp_path):
    """A client that a function keeps belongs to the event loop of the first call."""
    source = """
        import asyncio
        async def score(prompts, **how):
            seen.append(asyncio.get_running_loop())
            await asyncio.sleep(0)
            return [float(len(set(map(id, seen))))] * len(prompts)
    """
    judge = reward_sources.by_function(function(tmp_path, source))
    rows = [{"prompt": "a", "answer_text": "b", "answer_ids": [1], formats.COLUMNS: {}}]
    assert [judge(rows), judge(rows)] == [[1.0], [1.0]]


WRONG = [
    ("async def score(**how): raise ValueError('late')", {}, r"raised ValueError: late \(line 2\)"),
    ("def score(**how): return 1.0", {}, "returned float, expected a list of 2 numbers"),
    ("def score(**how): return 'ab'", {}, "returned str, expected a list of 2 numbers"),
    ("def score(**how): return None", {}, "returned NoneType, expected a list"),
    ("def score(**how): return [1.0, float('inf')]", {}, "returned inf for 'b' to 'a'; expected a finite number"),
    ("def score(**how): return [None, float('nan')]", {}, "returned nan for 'b' to 'a'"),
    ("def score(**how): return [1, [2]]", {}, r"returned \[2\] for 'b' to 'a'"),
    ("def score(prompts, completions): return [1, 2]", {"level": 1}, "unexpected keyword argument 'level'"),
    ("def score(**how): return [1, 2]", {"prompts": 1}, "has a column 'prompts', also the name of an argument"),
    ("def score(**how): return [1, 2]", {"log_metric": 1}, "has a column 'log_metric'"),
]


@pytest.mark.parametrize("source, own, message", WRONG)
def test_bad_functions(source, own, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        judged(function(tmp_path, source), **own)


def test_columns_missing_in_some_rows(tmp_path):
    spec = function(tmp_path, SEES)
    rows = [
        {"prompt": "a", "answer_text": "b", "answer_ids": [1], formats.COLUMNS: own} for own in ({"x": 1}, {"y": 2})
    ]
    reward_sources.by_function(spec)(rows)
    (given,) = called_with(spec)
    assert (given["x"], given["y"]) == ([1, None], [None, 2])


def test_answers_without_a_reward_have_no_gradient():
    """As in TRL's GRPO, None is left out of the group's mean and deviation, and has an advantage of 0."""
    assert reward_sources.checked(lambda rows: [None, 1], "x")([{}, {}])[1] == 1
    nan = math.nan
    rewards = [1.0, nan, 3.0, 5.0, nan, nan, nan, nan, 2.0, nan, nan, nan]
    rows = [{"reward": reward, "answer_ids": [1], "prompt_ids": [0], "ended": True} for reward in rewards]
    args = script("grpo").parse(["--device", "cpu"])
    for scale in ("group", "batch", "none"):
        args.scale_rewards = scale
        got = torch.tensor([row["advantage"] for row in script("grpo").with_advantages(rows, args)])
        values = torch.tensor(rewards).view(-1, 4)
        centred = values - values.nanmean(1, keepdim=True)
        known = values[~values.isnan()]
        std = {"group": torch.tensor([2.0, 1, 1])[:, None], "batch": known.std() + 0 * values[:, :1], "none": 1 - 1e-4}[
            scale
        ]
        torch.testing.assert_close(got.view(-1, 4), (centred / (std + 1e-4)).nan_to_num(0), rtol=1e-5, atol=1e-5)
    found = rollouts.sampling_metrics(rows)
    assert found["reward"] == pytest.approx(11 / 4) and found["reward_std"] == pytest.approx(known.std(unbiased=False))
    assert [script("grpo").differ(rows[i : i + 4]) for i in (0, 4, 8)] == [True, False, False]
    assert len(script("online_dpo").pairs_of(rows)) == 1  # 3 and 5
    assert [row["reward"] for row in rollouts.rewarded(rows)] == [1.0, 3.0, 5.0, 2.0]
    with pytest.raises(SystemExit, match="--reward-function: returned None for all 4 answers of a step"):
        rollouts.rewarded(rows[4:8])


@pytest.mark.parametrize(
    "name", ["grpo", pytest.param("ppo", marks=pytest.mark.slow), pytest.param("online_dpo", marks=pytest.mark.slow)]
)
def test_a_run_with_logs_state_and_none(name, tmp_path):
    """A function's logs are in metrics.jsonl; it gets the trainer's state; some of its rewards are None."""
    spec = function(
        tmp_path,
        """
        def score(prompts, completions, answer, trainer_state, log_metric, log_extra, **how):
            log_metric("seen", trainer_state.global_step)
            log_metric("seen", trainer_state.max_steps)
            log_extra("answers", answer)
            assert set(answer) <= {"yes", "no"} and "answer_text" not in how
            return [None if n % 3 == 1 else float(n) for n in range(len(prompts))]
    """,
    )
    words = example_runs.small_data(tmp_path, train=20, test=2)
    for path in (words[1], words[3]):
        rows = [json.loads(line) for line in open(path)]  # noqa: SIM115
        with open(path, "w") as file:
            file.writelines(json.dumps(row | {"answer": "yes" if n % 2 else "no"}) + "\n" for n, row in enumerate(rows))
    more = ["--reward-function", spec, "--steps", "2", "--batch-size", "4", "--sft-steps", "2", "--eval-every", "0"]
    run(name, [*words, *more, "--max-completion-length", "3"], tmp_path / "run")
    rows = metrics(tmp_path / "run")[2:]
    assert [row["seen"] for row in rows] == [(0 + 2) / 2, (1 + 2) / 2]
    assert all(math.isfinite(row["reward" if name != "ppo" else "objective/scores"]) for row in rows)

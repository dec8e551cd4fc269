"""Columns beside the texts of a row (the user's own, margins, settings), and rows that cannot be used."""

import copy
import json
from pathlib import Path

import example_runs
import pytest
from example_runs import run
from trl_rows import ASK, CHAT, PAIR, TOKENIZERS, TOOLS, chat_version, ours

from trainer import dataset, formats  # isort: skip


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return chat_version(TOKENIZERS[request.param]())


@pytest.mark.parametrize(
    "own",
    [
        {"chosen": 3},
        {"chosen": "b"},
        {"chosen": None, "rejected": None},
        {"chosen": ["x", "y"], "rejected": ["z"]},
        {"completion": 7},
        {"completion": None},
        {"label": "good"},
        {"messages": 1},
        {"text": 0.5},
        {"columns": "x"},
        {"chosen": ASK, "rejected": [[]]},
    ],
)
@pytest.mark.parametrize("prompt", ["1 or 2?", ASK])
def test_columns_of_a_prompt_only_set_are_the_users_own(own, prompt, tokenizer):
    """Columns of any name are passed on and not tokenized."""
    (row,) = ours([{"prompt": prompt, **own}], "prompt", tokenizer)
    assert row[formats.COLUMNS] == {"prompt": prompt, **own}
    assert {key for key in row if isinstance(key, str)} == {"prompt", "prompt_ids"}


def test_columns_named_like_internal_ones(tokenizer):
    """Encoded rows hold such columns only under COLUMNS, in all formats."""
    names = (
        "prompt_ids",
        "chosen_ids",
        "completion_ids",
        "chosen_ref",
        "other_ids",
        "generation_ids",
        "reward",
        "label",
    )
    own = dict.fromkeys(names, "mine")
    bare = lambda row: {name: value for name, value in row.items() if isinstance(name, str)}  # noqa: E731
    rows = [(want, PAIR) for want in formats.TAKEN] + [("prompt", {"prompt": "a"})]
    for want, row in rows:
        for plain, given in zip(ours([row], want, tokenizer), ours([row | own], want, tokenizer), strict=True):
            assert bare(plain) == bare(given) and given[formats.COLUMNS]["chosen_ref"] == "mine"


WRONG = [  # wanted format, row, error
    ("preference", {**PAIR, "images": ["x.png"]}, "field 'images' holds images, but the examples train on text only"),
    ("prompt", {"prompt": "a", "image": {"bytes": b"x"}}, "field 'image' holds images"),
    ("completion", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
    ("preference", {**CHAT, "chosen": [{"role": "assistant", "content": [{"type": "text"}]}]}, "part of type 'text'"),
    ("completion", {"text": "a", "input_ids": [1]}, "holds tokens, but the examples tokenize texts themselves; remove"),
    ("completion", {"prompt": "a", "completion": "b", "labels": [1]}, "field 'labels' holds tokens"),
    ("preference", {**CHAT, "tools": "weather"}, "field 'tools' is a string that is not JSON"),
    ("preference", {**CHAT, "tools": {"name": "x"}}, "field 'tools' is dict, expected a list or its JSON"),
    ("prompt", {"prompt": ASK, "tools": ["x"]}, "field 'tools' has 'x', expected tools as JSON schemas"),
    ("unpaired", {**CHAT, "chat_template_kwargs": [1]}, "field 'chat_template_kwargs' is list, expected a dict"),
    ("completion", {"messages": ASK, "chat_template_kwargs": {"tokenize": False}}, "has tokenize, which"),
    ("unpaired", {"prompt": "a", "completion": "b", "label": 2}, "field 'label' is int, expected true or false"),
    ("unpaired", {"prompt": "a", "completion": "b", "label": None}, "field 'label' is null, expected true or false"),
    ("unpaired", {"completion": "b", "label": True}, "field 'prompt' is missing; expected prompt, completion, label"),
    ("preference", {**PAIR, "chosen": None}, "field 'chosen' is null, expected a string or a list of messages"),
    ("preference", {"prompt": ASK, "chosen": "a", "rejected": "b"}, "partly texts and partly lists of messages"),
    ("preference", {"messages": ASK}, "expected chosen, rejected"),
    ("preference", {"prompt": "a", "completion": "b", "label": True}, "expected chosen, rejected"),
    ("unpaired", {"messages": ASK}, "expected prompt, completion, label"),
    ("unpaired", {"text": "a"}, "expected prompt, completion, label"),
    ("prompt", {"messages": ASK}, "expected prompt"),
    ("completion", {"conversations": ["a"]}, "it has 'conversations'"),
    ("completion", {"conversations": [{"from": "user"}]}, "field 'messages' has .* expected messages"),
]


@pytest.mark.parametrize("want, row, message", WRONG)
def test_unusable_rows_are_errors(want, row, message):
    with pytest.raises(SystemExit, match=f"rows.jsonl, line 3: .*{message}"):
        formats.rows_of(row, want, "rows.jsonl, line 3")


def test_empty_image_columns_are_allowed():
    for value in (None, [], ""):
        assert formats.rows_of({**PAIR, "images": value, "tools": value}, "preference", "")


def test_template_settings_of_plain_texts_warn(tokenizer, capsys):
    plain = ours([PAIR], "preference", tokenizer)[0]
    given = ours([{**PAIR, "tools": TOOLS}, PAIR], "preference", tokenizer)[0]
    assert plain["prompt_ids"] == given["prompt_ids"]
    assert (
        "1 of 2 rows have the field 'tools', which only a chat template uses; it has no effect on rows of text"
        in capsys.readouterr().err
    )


def test_template_errors(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SystemExit, match=r"chat template cannot write .*1 or 2.*TemplateError: roles must alternate"):
        ours([CHAT], "preference", strict)
    strict.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(SystemExit, match="the chat template adds no tokens for field 'chosen' after the prompt"):
        ours([CHAT], "preference", strict)


def test_margins_enter_the_reward_loss(tokenizer):
    """The column `margin`, as in TRL's reward trainer, is part of the loss; other values are errors."""
    import torch

    from fused_po import losses

    rows = ours([{**PAIR, "margin": 0.5}, {**PAIR, "margin": 2}], "preference", tokenizer)
    assert dataset.margins(rows, "cpu").tolist() == [0.5, 2.0]
    assert dataset.margins(ours([PAIR], "preference", tokenizer), "cpu") is None
    for margin in ("much", None, float("nan"), True):
        with pytest.raises(SystemExit, match=r"field 'margin' is .*, expected a finite number in every row or in none"):
            dataset.margins([rows[0], *ours([{**PAIR, "margin": margin}], "preference", tokenizer)], "cpu")
    a, b = torch.randn(2), torch.randn(2)
    given = losses.bradley_terry(a, b, margin=dataset.margins(rows, "cpu"))
    torch.testing.assert_close(given, -torch.nn.functional.logsigmoid(a - b - torch.tensor([0.5, 2.0])))


@pytest.mark.slow
def test_a_column_margin_changes_the_reward_models_loss(tmp_path):
    words = example_runs.small_data(tmp_path)
    found = []
    for name, margin in (("plain", None), ("zero", 0), ("wide", 3.0)):
        path = tmp_path / f"{name}.jsonl"
        rows = [json.loads(line) for line in Path(words[1]).read_text().splitlines()][:16]
        path.write_text(
            "".join(json.dumps(row | ({} if margin is None else {"margin": margin})) + "\n" for row in rows)
        )
        more = ["--dataset", str(path), "--sft-steps", "1", "--steps", "1", "--batch-size", "4", "--lm-coef", "0"]
        run("reward", [*words, *more], tmp_path / name)
        found.append(example_runs.metrics(tmp_path / name)[-1]["loss"])
    assert found[0] == found[1] < found[2] - 2

"""Rows in TRL's formats become the tokens that TRL 1.16's own trainers make of them, or an error."""

import copy
import json
import types
from pathlib import Path

import datasets
import pipeline
import pytest
from pipeline import run, script
from transformers import PreTrainedTokenizerFast

from trainer import dataset, formats, models, sampling, tokenization  # isort: skip

trl = pytest.importorskip("trl", reason="needs TRL: pip install -e '.[test]'")
datasets.disable_progress_bars()
ASK, SAY, ERR = ([{"role": r, "content": c}] for r, c in (("user", "1 or 2?"), ("assistant", "2"), ("assistant", "1")))
SYSTEM = [{"role": "system", "content": "It is"}]
PAIR = {"prompt": "1 or 2?", "chosen": " It is 2.", "rejected": " It is 1."}
CHAT = {"prompt": ASK, "chosen": SAY, "rejected": ERR}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weather"}}]}
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ 'tools ' + tools[0].function.name + ' ' }}{% endif %}"
    "{% if thinking %}{{ 'thinking ' }}{% endif %}{% for m in messages %}{{ m['role'] + ' ' }}"
    "{% if m.tool_calls %}{{ 'call ' + m.tool_calls[0].function.name }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ ' ' + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
TEXTS = ["1 or 2?", " It is 2.", " It is 1.", "user assistant system tools thinking weather call", "ab ab ab abc"]


def bytes_tokenizer(add_eos: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's or Qwen's: nothing before a text, words that merge over the boundary of prompt and answer."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds

    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<|end|>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()
    how = dict(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, **how))
    if add_eos:
        made.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", bos_token="<|end|>", pad_token="<pad>")


def chat_version(tokenizer):
    """The tokenizer with a template; a BOS is written by those that put one before a text."""
    tokenizer.chat_template = (
        TEMPLATE if tokenization.put_before(tokenizer) else TEMPLATE.removeprefix("{{ bos_token }}")
    )
    return tokenizer


MADE = {
    "llama": lambda: models.train_tokenizer(TEXTS),
    "gpt2": bytes_tokenizer,
}


@pytest.fixture(scope="module", params=MADE)
def tokenizer(request):
    return chat_version(MADE[request.param]())


def ours(rows, want, tokenizer, length=200) -> list[dict]:
    made = [new for row in rows for new in formats.rows_of(row, want, "row")]
    return dataset.encode(made, tokenizer, length - 1, length)


def theirs(trainer, rows, tokenizer, **more) -> list[dict]:
    """What a trainer of TRL's makes of the rows before it trains."""
    own = types.SimpleNamespace(_tokenizer=tokenizer, completion_only_loss=True, chat_template=None, calculate_KL=False)
    own.desirable_weight = own.undesirable_weight = 1.0
    args = types.SimpleNamespace(dataset_num_proc=None, max_length=200, truncation_mode="keep_start")
    args.dataset_text_field, args.assistant_only_loss, args.shuffle_dataset = "text", False, False
    if trainer is trl.SFTTrainer:
        more = dict(packing=False, formatting_func=None)
    made = trainer._prepare_dataset(own, datasets.Dataset.from_list(rows), tokenizer, args, dataset_name="test", **more)
    return list(made)


PREFERENCE = {
    "texts": [PAIR, {**PAIR, "prompt": "1 or 2? It is"}],
    "no space": [{"prompt": "1 or 2?", "chosen": "It is 2.", "rejected": "1"}],
    "merging": [{"prompt": "ab a", "chosen": "b abc", "rejected": "bc"}],
    "implicit texts": [{"chosen": "1 or 2? It is 2.", "rejected": "1 or 2? It is 1."}],
    "ended": [{"prompt": "1 or 2?", "chosen": " 2.{eos}", "rejected": " 1.{eos}"}],
    "chats": [CHAT, {**CHAT, "prompt": SYSTEM + ASK + SAY + ASK}],
    "implicit chats": [{"chosen": ASK + SAY, "rejected": ASK + ERR}],
    "tools": [{**CHAT, "tools": TOOLS, "chat_template_kwargs": {"thinking": True}}],
    "tools as JSON": [{**CHAT, "tools": json.dumps(TOOLS)}],
    "calls": [{"prompt": ASK, "chosen": [CALL], "rejected": ERR, "tools": TOOLS}],
    "no tools": [{**CHAT, "tools": []}],
}


def with_eos(rows, tokenizer) -> list[dict]:
    """{eos} in texts is the tokenizer's."""
    fill = lambda value: value.replace("{eos}", tokenizer.eos_token) if isinstance(value, str) else value  # noqa: E731
    return [{name: fill(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_rows_are_dpos_and_rewards(name, tokenizer):
    rows = with_eos(PREFERENCE[name], tokenizer)
    got = ours(rows, "preference", tokenizer)
    for row, want in zip(got, theirs(trl.DPOTrainer, copy.deepcopy(rows), tokenizer), strict=True):
        assert {key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} == {
            key: want[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")
        }
    for row, want in zip(got, theirs(trl.RewardTrainer, copy.deepcopy(rows), tokenizer), strict=True):
        for field in ("chosen_ids", "rejected_ids"):
            assert row["prompt_ids"] + row[field] == want[field]


SFT = {
    "text": [{"text": "1 or 2? It is 2."}, {"text": "It is 1.{eos}"}],
    "prompt and completion": [{"prompt": "1 or 2?", "completion": " It is 2."}, {"prompt": "ab a", "completion": "bc"}],
    "chats": [{"prompt": ASK, "completion": SAY}, {"prompt": SYSTEM + ASK, "completion": SAY + ASK + SAY}],
    "messages": [{"messages": SYSTEM + ASK + SAY}, {"messages": ASK + SAY}],
    "from and value": [{"conversations": [{"from": "user", "value": "1"}, {"from": "assistant", "value": "2"}]}],
    "tools": [{"messages": ASK + [CALL], "tools": TOOLS, "chat_template_kwargs": {"thinking": True}}],
    "completion with tools": [{"prompt": ASK, "completion": SAY, "tools": TOOLS}],
}


@pytest.mark.parametrize("name", SFT)
def test_completions_are_sfts(name, tokenizer):
    """Token by token; a loss over all of a text leaves out its first token, which nothing predicts."""
    rows = with_eos(SFT[name], tokenizer)
    got = ours(rows, "completion", tokenizer)
    for row, want in zip(got, theirs(trl.SFTTrainer, copy.deepcopy(rows), tokenizer), strict=True):
        batch = dataset.stack([row], ("completion",), tokenizer.pad_token_id, "cpu")
        assert batch["input_ids"][0].tolist() == want["input_ids"]
        assert batch["labels"][0, 1:].tolist() == want["labels"][1:]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "1 or 2?", "completion": " It is 2.", "label": True}],
        [{"prompt": ASK, "completion": SAY, "label": False, "tools": TOOLS}],
        [PAIR],
        [{**CHAT, "chat_template_kwargs": {"thinking": True}}],
        [{"chosen": ASK + SAY, "rejected": ASK + ERR, "tools": TOOLS}],
    ],
)
def test_unpaired_rows_are_ktos(rows, tokenizer):
    got = ours(rows, "unpaired", tokenizer)
    wanted = theirs(trl.KTOTrainer, copy.deepcopy(rows), tokenizer)
    keys = ("prompt_ids", "completion_ids", "label")
    assert [[row[key] for key in keys] for row in got] == [[row[key] for key in keys] for row in wanted]


@pytest.mark.parametrize(
    "rows", [[{"prompt": "1 or 2?"}, {"prompt": "ab a"}], [{"prompt": ASK}, {"prompt": SYSTEM + ASK}]]
)
def test_prompts_are_grpos(rows, tokenizer):
    own = types.SimpleNamespace(processing_class=tokenizer, tools=None, chat_template=None, chat_template_kwargs={})
    own._is_vlm, own.environment_factories = False, None
    wanted, _, _ = trl.GRPOTrainer._tokenize_prompts(own, [row["prompt"] for row in rows])
    assert [row["prompt_ids"] for row in ours(rows, "prompt", tokenizer)] == [list(ids) for ids in wanted]


def test_nothing_is_put_twice_around_a_text_that_is_templated():
    """One BOS, one EOS: whatever of them the row, the template or the tokenizer writes."""
    for made, bos, eos in ((models.train_tokenizer(TEXTS), "<s>", "</s>"), (bytes_tokenizer(), "", "<|end|>"),
                           (bytes_tokenizer(add_eos=True), "", "<|end|>")):  # fmt: skip
        begin, end = made.bos_token_id, made.eos_token_id
        plain = ours([PAIR], "preference", made)[0]
        for start, stop in ((bos, eos), (bos, ""), ("", eos), (bos, f"{eos}\n"), (f"\n{bos}", f" {eos}")):
            row = {"prompt": start + PAIR["prompt"], **{f: PAIR[f] + stop for f in ("chosen", "rejected")}}
            (got,) = ours([row], "preference", made)
            whole = got["prompt_ids"] + got["chosen_ids"]
            assert whole.count(end) == 1 and (not bos or whole.count(begin) == 1), (start, stop)
            if start + stop in (bos + eos, bos, eos):
                assert [got[key] for key in ("prompt_ids", "chosen_ids")] == [
                    plain[key] for key in ("prompt_ids", "chosen_ids")
                ]
            (text,) = ours([{"text": row["prompt"] + row["chosen"]}], "completion", made)
            assert text["prompt_ids"] + text["completion_ids"] == whole
            (alone,) = ours([{"prompt": row["prompt"]}], "prompt", made)
            assert end not in alone["prompt_ids"][1:] and (not bos or alone["prompt_ids"].count(begin) == 1)
        chat = chat_version(made)
        for row in ours([CHAT], "preference", chat):  # the template's own
            assert (row["prompt_ids"] + row["chosen_ids"]).count(begin) == 1 + 2 * (begin == end) - (not bos)


def test_a_prompt_that_is_no_prefix(capsys):
    """Answers are drawn to the whole prompt; training leaves out its end, and that is said."""
    merging = bytes_tokenizer()
    row = {"prompt": "ab a", "chosen": "b abc", "rejected": "bc"}
    (got,) = ours([row], "prompt", merging)
    said = capsys.readouterr().err
    assert got["generation_ids"] == merging("ab a")["input_ids"] != got["prompt_ids"]
    assert merging.decode(got["prompt_ids"] + got["chosen_ids"]) == "ab ab abc<|end|>"
    assert "in 1 of 1 rows the prompt alone has other tokens than before an answer: its end, such as ' a', is" in said
    (got,) = ours([{**row, "chosen": " b", "rejected": " c"}], "prompt", merging)
    assert "generation_ids" not in got and not capsys.readouterr().err


def test_answers_are_drawn_to_the_whole_prompt(capsys):
    import transformers

    merging = bytes_tokenizer()
    merging.padding_side = "left"
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(merging), **shape))
    (row,) = ours([{"prompt": "ab a", "chosen": "b abc", "rejected": "bc"}], "prompt", merging)
    args = script("dpo").parse(["--device", "cpu"])
    (answered,) = sampling.sample(model, merging, [row], args, 3)
    assert answered["prompt_ids"] == row["generation_ids"]


def trl_row(row: dict) -> dict:
    from trl.data_utils import maybe_extract_prompt

    return maybe_extract_prompt(row)


FEEDBACK = {
    "prompt": "1 or 2?", "chosen": ASK + SAY, "rejected": ASK + ERR, "messages": ASK + SAY, "score": 8.0
}  # fmt: skip


@pytest.mark.parametrize("row", [
    FEEDBACK,
    {**FEEDBACK, "chosen": ASK + SAY + ASK + SAY, "rejected": ASK + SAY + ASK + ERR},
    {**FEEDBACK, "chosen": SYSTEM + ASK + SAY, "rejected": SYSTEM + ASK + ERR},
    {**FEEDBACK, "rejected": ASK + SAY},  # the same answers, as some rows of UltraFeedback have
    CHAT,
    PAIR,
])  # fmt: skip
def test_prompts_beside_conversations_are_trls(row):
    fields = ("prompt", "chosen", "rejected")
    wanted = {field: trl_row(copy.deepcopy(row))[field] for field in fields}
    for want in ("preference", "prompt"):
        (got,) = formats.rows_of(row, want, "row 0")
        assert {field: got[field] for field in fields} == wanted
    unpaired = formats.rows_of(row, "unpaired", "row 0")
    assert [r["completion"] for r in unpaired] == [wanted["chosen"], wanted["rejected"]]
    if row is not FEEDBACK and "messages" in row:
        return
    (first,) = formats.rows_of({k: v for k, v in row.items() if k != "messages"}, "completion", "row 0")
    assert (first["prompt"], first["completion"]) == (wanted["prompt"], wanted["chosen"])


@pytest.mark.parametrize("own", [
    {"chosen": 3}, {"chosen": "b"}, {"chosen": None, "rejected": None}, {"chosen": ["x", "y"], "rejected": ["z"]},
    {"completion": 7}, {"completion": None}, {"label": "good"}, {"messages": 1}, {"text": 0.5}, {"columns": "x"},
    {"chosen": ASK, "rejected": [[]]},
])  # fmt: skip
@pytest.mark.parametrize("prompt", ["1 or 2?", ASK])
def test_columns_of_a_prompt_only_set_are_the_users_own(own, prompt, tokenizer):
    """Whatever their names; they are not tokenized."""
    (row,) = ours([{"prompt": prompt, **own}], "prompt", tokenizer)
    assert row[formats.COLUMNS] == {"prompt": prompt, **own}
    assert {key for key in row if isinstance(key, str)} == {"prompt", "prompt_ids"}


def test_columns_that_are_called_as_the_examples_own(tokenizer):
    """Encoded rows have nothing of them but under COLUMNS, for all formats."""
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


WRONG = [  # what is wanted, the row, what is said
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
]  # fmt: skip


@pytest.mark.parametrize("want, row, message", WRONG)
def test_what_cannot_be_used_is_an_error(want, row, message):
    with pytest.raises(SystemExit, match=f"rows.jsonl, line 3: .*{message}"):
        formats.rows_of(row, want, "rows.jsonl, line 3")


def test_what_is_empty_is_no_image():
    for value in (None, [], ""):
        assert formats.rows_of({**PAIR, "images": value, "tools": value}, "preference", "")


def test_settings_of_texts_have_no_effect_and_that_is_said(tokenizer, capsys):
    plain = ours([PAIR], "preference", tokenizer)[0]
    given = ours([{**PAIR, "tools": TOOLS}, PAIR], "preference", tokenizer)[0]
    assert plain["prompt_ids"] == given["prompt_ids"]
    assert (
        "1 of 2 rows have the field 'tools', which only a chat template uses; it has no effect on rows of text"
        in capsys.readouterr().err
    )


def test_what_a_template_refuses(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SystemExit, match=r"chat template cannot write .*1 or 2.*TemplateError: roles must alternate"):
        ours([CHAT], "preference", strict)
    strict.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(SystemExit, match="the chat template adds no tokens for field 'chosen' after the prompt"):
        ours([CHAT], "preference", strict)


def test_parts_of_a_message_are_one_text(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "1 or "}, {"type": "text", "text": "2?"}]}]
    (got,), (plain,) = (ours([{**CHAT, "prompt": prompt}], "preference", tokenizer) for prompt in (parts, ASK))
    assert got["prompt_ids"] == plain["prompt_ids"] and got["prompt"] == parts


def test_what_datasets_fills_in_is_left_out(tokenizer):
    """Rows of different messages come back with nulls from `datasets`; the template sees them as they were written."""
    rows = [
        {"messages": ASK + [CALL], "tools": TOOLS, "chat_template_kwargs": {}},
        {"messages": ASK + SAY, "tools": None, "chat_template_kwargs": {"thinking": True}},
    ]
    filled = list(datasets.Dataset.from_list(copy.deepcopy(rows)))
    assert filled != rows
    wanted = [row["completion_ids"] for row in ours(rows, "completion", tokenizer)]
    assert [row["completion_ids"] for row in ours(filled, "completion", tokenizer)] == wanted


def test_margins_of_pairs_are_rewards(tokenizer):
    """The column of TRL's reward trainer, in the loss; with other columns of that name the run ends."""
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
    words = pipeline.small_data(tmp_path)
    found = []
    for name, margin in (("plain", None), ("zero", 0), ("wide", 3.0)):
        path = tmp_path / f"{name}.jsonl"
        rows = [json.loads(line) for line in Path(words[1]).read_text().splitlines()][:16]
        path.write_text(
            "".join(json.dumps(row | ({} if margin is None else {"margin": margin})) + "\n" for row in rows)
        )
        more = ["--dataset", str(path), "--sft-steps", "1", "--steps", "1", "--batch-size", "4", "--lm-coef", "0"]
        run("reward", [*words, *more], tmp_path / name)
        found.append(pipeline.metrics(tmp_path / name)[-1]["loss"])
    assert found[0] == found[1] < found[2] - 2


def test_the_space_behind_a_prompt_is_kept_in_sampled_pairs():
    """Texts are joined and tokenized again: the answer must be the one that was sampled."""
    for made in (models.train_tokenizer(TEXTS), bytes_tokenizer()):
        (row,) = ours([PAIR], "preference", made)
        text = made.decode(row["chosen_ids"], skip_special_tokens=True)
        sampled = {
            "prompt": PAIR["prompt"],
            "prompt_ids": row["prompt_ids"],
            "answer_ids": row["chosen_ids"],
            "answer_text": text,
        }
        assert sampling.as_answer(made, sampled) == PAIR["chosen"]
    said = sampling.as_answer(made, {**sampled, "prompt": ASK})
    assert said == [{"role": "assistant", "content": text}]

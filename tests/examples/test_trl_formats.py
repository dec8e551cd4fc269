"""Rows in TRL's formats become the tokens that TRL 1.16's own trainers make of them."""

import copy
import json
import types

import datasets
import pytest
from example_runs import script
from trl_rows import (
    ASK,
    CALL,
    CHAT,
    ERR,
    PAIR,
    SAY,
    SYSTEM,
    TEXTS,
    TOKENIZERS,
    TOOLS,
    bytes_tokenizer,
    chat_version,
    ours,
)

from trainer import dataset, formats, models, sampling  # isort: skip

trl = pytest.importorskip("trl", reason="needs TRL: pip install -e '.[test]'")
datasets.disable_progress_bars()


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return chat_version(TOKENIZERS[request.param]())


def theirs(trainer, rows, tokenizer, **more) -> list[dict]:
    """The rows as prepared by a TRL trainer before training."""
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
    """Replace {eos} in texts by the tokenizer's EOS token."""
    fill = lambda value: value.replace("{eos}", tokenizer.eos_token) if isinstance(value, str) else value  # noqa: E731
    return [{name: fill(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_rows_match_dpo_and_reward_trainers(name, tokenizer):
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
def test_completions_match_the_sft_trainer(name, tokenizer):
    """Tokens and labels match. A loss over a whole text leaves out its first token, which nothing predicts."""
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
def test_unpaired_rows_match_the_kto_trainer(rows, tokenizer):
    got = ours(rows, "unpaired", tokenizer)
    wanted = theirs(trl.KTOTrainer, copy.deepcopy(rows), tokenizer)
    keys = ("prompt_ids", "completion_ids", "label")
    assert [[row[key] for key in keys] for row in got] == [[row[key] for key in keys] for row in wanted]


@pytest.mark.parametrize(
    "rows", [[{"prompt": "1 or 2?"}, {"prompt": "ab a"}], [{"prompt": ASK}, {"prompt": SYSTEM + ASK}]]
)
def test_prompts_match_the_grpo_trainer(rows, tokenizer):
    own = types.SimpleNamespace(processing_class=tokenizer, tools=None, chat_template=None, chat_template_kwargs={})
    own._is_vlm, own.environment_factories = False, None
    wanted, _, _ = trl.GRPOTrainer._tokenize_prompts(own, [row["prompt"] for row in rows])
    assert [row["prompt_ids"] for row in ours(rows, "prompt", tokenizer)] == [list(ids) for ids in wanted]


def test_templated_texts_have_one_bos_and_one_eos():
    """One BOS and one EOS, whether the row, the template or the tokenizer writes them."""
    for made, bos, eos in (
        (models.train_tokenizer(TEXTS), "<s>", "</s>"),
        (bytes_tokenizer(), "", "<|end|>"),
        (bytes_tokenizer(add_eos=True), "", "<|end|>"),
    ):
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
        for row in ours([CHAT], "preference", chat):  # written by the template
            assert (row["prompt_ids"] + row["chosen_ids"]).count(begin) == 1 + 2 * (begin == end) - (not bos)


def test_a_prompt_that_is_not_a_prefix(capsys):
    """Answers are sampled for the whole prompt; training leaves out the end of the prompt and prints a note."""
    merging = bytes_tokenizer()
    row = {"prompt": "ab a", "chosen": "b abc", "rejected": "bc"}
    (got,) = ours([row], "prompt", merging)
    said = capsys.readouterr().err
    assert got["generation_ids"] == merging("ab a")["input_ids"] != got["prompt_ids"]
    assert merging.decode(got["prompt_ids"] + got["chosen_ids"]) == "ab ab abc<|end|>"
    assert "in 1 of 1 rows the prompt alone has other tokens than before an answer: its end, such as ' a', is" in said
    (got,) = ours([{**row, "chosen": " b", "rejected": " c"}], "prompt", merging)
    assert "generation_ids" not in got and not capsys.readouterr().err


def test_answers_are_sampled_for_the_whole_prompt(capsys):
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


FEEDBACK = {"prompt": "1 or 2?", "chosen": ASK + SAY, "rejected": ASK + ERR, "messages": ASK + SAY, "score": 8.0}


@pytest.mark.parametrize(
    "row",
    [
        FEEDBACK,
        {**FEEDBACK, "chosen": ASK + SAY + ASK + SAY, "rejected": ASK + SAY + ASK + ERR},
        {**FEEDBACK, "chosen": SYSTEM + ASK + SAY, "rejected": SYSTEM + ASK + ERR},
        {**FEEDBACK, "rejected": ASK + SAY},  # equal answers, as in some rows of UltraFeedback
        CHAT,
        PAIR,
    ],
)
def test_prompts_beside_conversations_match_trl(row):
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


def test_parts_of_a_message_are_one_text(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "1 or "}, {"type": "text", "text": "2?"}]}]
    (got,), (plain,) = (ours([{**CHAT, "prompt": prompt}], "preference", tokenizer) for prompt in (parts, ASK))
    assert got["prompt_ids"] == plain["prompt_ids"] and got["prompt"] == parts


def test_nulls_from_datasets_are_removed(tokenizer):
    """`datasets` fills rows of different messages with nulls; the template gets the rows as they were written."""
    rows = [
        {"messages": ASK + [CALL], "tools": TOOLS, "chat_template_kwargs": {}},
        {"messages": ASK + SAY, "tools": None, "chat_template_kwargs": {"thinking": True}},
    ]
    filled = list(datasets.Dataset.from_list(copy.deepcopy(rows)))
    assert filled != rows
    wanted = [row["completion_ids"] for row in ours(rows, "completion", tokenizer)]
    assert [row["completion_ids"] for row in ours(filled, "completion", tokenizer)] == wanted


def test_the_space_after_a_prompt_is_kept_in_sampled_pairs():
    """Texts are joined and tokenized again, and the answer must be the sampled one."""
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

"""Data sets as files, folders and splits: all formats give the same rows; errors name the file and the line."""

import bz2
import gzip
import json
import lzma
import sys

import example_runs
import pytest
from example_runs import run, script

from trainer import dataset, formats, models, row_files, tokenization  # isort: skip

ROWS = [
    {"prompt": "1 or 2?", "chosen": " 2", "rejected": " 1"},
    {"prompt": "é or ü?", "chosen": " ü 😀", "rejected": " NA"},
    {"prompt": "007", "chosen": " None", "rejected": " null"},
]
MESSAGES = [{"role": "user", "content": "1 or 2?"}, {"role": "assistant", "content": "2"}]


def read(path, want="preference", **how):
    """The rows, with the fields of ROWS."""
    rows = dataset.read(str(path), "train", want, **how)
    return [
        {name: row[name] for name in ("prompt", "chosen", "rejected", "completion", "label") if name in row}
        for row in rows
    ]


def lines(rows=ROWS, **how) -> bytes:
    return "".join(json.dumps(row, **how) + "\n" for row in rows).encode()


BYTES = {  # file name: content; each holds ROWS
    "rows.jsonl": lines(),
    "raw.jsonl": lines(ensure_ascii=False),
    "rows.ndjson": lines(),
    "rows.unknown": lines(),
    "windows.jsonl": b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n"),
    "joined.jsonl": b"\xef\xbb\xbf" + lines(ROWS[:1]) + b"\xef\xbb\xbf" + lines(ROWS[1:]),
    "no_end.jsonl": lines()[:-1],
    "rows.json": lines(),
    "array.json": b"\n " + json.dumps(ROWS, indent=2).encode() + b"\n",
    "marked.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "rows.jsonl.gz": gzip.compress(lines()),
    "array.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "ROWS.JSONL.XZ": lzma.compress(lines()),
}


@pytest.mark.parametrize("name", BYTES)
def test_json_in_every_form(name, tmp_path):
    (tmp_path / name).write_bytes(BYTES[name])
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u001c", "\ufeff"])
def test_only_newlines_end_a_line(letter, raw, tmp_path):
    """JSON requires escapes only for its own control characters; others may be in a string without ending a line."""
    row = {"prompt": f"a{letter}b", "chosen": f" {letter}c", "rejected": f" d{letter}"}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([row, *ROWS], ensure_ascii=not raw))
    assert read(path) == [row, *ROWS]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz", "rows.parquet", "rows.arrow"])
def test_tables(name, tmp_path):
    """Text stays text: NA, None and null are not missing values, and 007 is not a number."""
    datasets = pytest.importorskip("datasets")
    table, path = datasets.Dataset.from_list(ROWS), tmp_path / name
    if ".parquet" in name:
        table.to_parquet(path)
    elif ".arrow" in name:
        table.save_to_disk(tmp_path / "saved")
        path.write_bytes((tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes())
    else:
        sep = "\t" if "tsv" in name else ","
        text = "\r\n".join([sep.join(ROWS[0]), *(sep.join(row.values()) for row in ROWS)]).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else b"\xef\xbb\xbf" + text)
    assert read(path) == ROWS
    path.write_bytes(b"\x00\x01")
    with pytest.raises(SystemExit, match=f"{name}"):
        read(path)


def test_tables_of_other_formats(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.txt").write_text("1 or 2?\nIt is 2.\n")
    assert read(tmp_path / "rows.txt", "completion") == [
        {"prompt": "", "completion": t} for t in ("1 or 2?", "It is 2.")
    ]
    (tmp_path / "thumbs.csv").write_text("prompt,completion,label,n\n1 or 2?,2,true,7\n1 or 2?,1,False,\n")
    rows = dataset.read(str(tmp_path / "thumbs.csv"), "train", "unpaired")
    assert [(row["label"], row["completion"]) for row in rows] == [(True, "2"), (False, "1")]
    (tmp_path / "numbers.csv").write_text("prompt,completion,label\n1 or 2?,2,1\n1 or 2?,1,0\n")
    assert [row["label"] is True for row in read(tmp_path / "numbers.csv", "unpaired")] == [True, False]
    chats = [{"messages": MESSAGES}, {"messages": [MESSAGES[0], MESSAGES[1] | {"name": "x"}]}]
    datasets.Dataset.from_list(chats).to_parquet(tmp_path / "chats.parquet")
    (first, second) = read(tmp_path / "chats.parquet", "completion")
    assert [formats.text_of(row["completion"]) for row in (first, second)] == ["2", "2"]


def test_a_table_that_was_rewritten(tmp_path):
    """The second read gives the rows of the new file, despite the cache of `datasets`."""
    pytest.importorskip("datasets")
    path = tmp_path / "rows.csv"
    for text in ("first", "other"):
        path.write_text(f"prompt,chosen,rejected\n{text},a,b\n")
        assert read(path)[0]["prompt"] == text


HALF = '{"prompt": "a", "chosen": "\\ud83d", "rejected": "c"}'
WRONG = {  # file: (content, error)
    "empty.jsonl": (b"", "empty.jsonl: the train set holds no rows; expected one JSON object per line with chosen"),
    "mark.jsonl": (b"\xef\xbb\xbf\r\n\r\n", "mark.jsonl: the train set holds no rows"),
    "none.json": (b"[]", "none.json: the train set holds no rows"),
    "none.csv": (b"prompt,chosen,rejected\n", "none.csv: the train set holds no rows; expected rows with chosen"),
    "half.jsonl": (lines(ROWS) + HALF.encode(), r"half.jsonl, line 4: field 'chosen' has the lone surrogate \\ud83d"),
    "low.json": (b'[{"prompt": "a", "tools": ["\\udc00x"]}]', r"low.json, row 1: field 'tools' has the lone surrogate"),
    "latin.jsonl": (lines(ROWS) + b'{"prompt": "\xe9"}', r"cannot be read \(line 4 is not UTF-8: .*; save it"),
    "wide.jsonl": (lines().decode().encode("utf-16"), r"wide.jsonl: cannot be read \(line 1 is not UTF-8"),
    "cut.jsonl": (lines()[:-3], "cut.jsonl, line 3: not JSON"),
    "array.json": (b'[{"prompt": "a"},\n{"prompt" "b"}]', r"array.json: not JSON \(.*line 2 column 11"),
    "nested.json": (b'{\n"data": []\n}', "nested.json, line 1: not JSON .*; expected an array, or one object per line"),
    "scalar.json": (b"[1]", "scalar.json, row 1: expected an object with the fields chosen"),
    "twice.jsonl": (b'{"prompt": "a", "prompt": "b"}', "line 1: not JSON .the name 'prompt' occurs twice in an object"),
    "null.jsonl": (b'\n{"prompt": null, "chosen": "a", "rejected": "b"}', "line 2: field 'prompt' is null, expected"),
    "turn.jsonl": (b'{"chosen": [null], "rejected": [{"role": "user"}]}', "line 1: field 'chosen' has None"),
    "deep.jsonl": (b"[" * 100000, "deep.jsonl, line 1: not JSON"),
    "cut.jsonl.gz": (gzip.compress(lines())[:-9], "cut.jsonl.gz: cannot be read"),
    "plain.jsonl.gz": (lines(), "plain.jsonl.gz: cannot be read .*gzip"),
    "rows.jsonl.zst": (b"\x28\xb5", r"rows.jsonl.zst: cannot be read \(compressed as .zst\); decompress it, or"),
    "plain.jsonl.xz": (lines(), "plain.jsonl.xz: cannot be read"),
    "hole.csv": (b"prompt,chosen,rejected\na,,c\n", "hole.csv, row 1: field 'chosen' is null"),
    "fields.csv": (b"question,answer\na,b\n", "row 1: field 'chosen' is missing; .* it has 'question'"),
    "bad.parquet": (b"PAR1", "bad.parquet: cannot be read as parquet"),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_files(name, tmp_path):
    holds, message = WRONG[name]
    (tmp_path / name).write_bytes(holds)
    with pytest.raises(SystemExit, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.csv", "none.parquet", "none.jsonl.gz"])
def test_missing_files(name, tmp_path):
    with pytest.raises(SystemExit, match=rf"{name}: cannot be read .*; --dataset takes a file \(.jsonl, .json, .csv"):
        read(tmp_path / name)


def test_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert read(tmp_path / "rows.json") == ROWS
    for name in ("rows.csv", "rows.parquet", "some/hub-id"):
        with pytest.raises(SystemExit, match="reading others requires `pip install datasets`"):
            read(tmp_path / name if "." in name else name)


def test_folders_of_files_and_their_splits(tmp_path):
    pytest.importorskip("datasets")
    for split, rows in (("train", ROWS[:2]), ("test", ROWS[2:])):
        (tmp_path / f"{split}.jsonl").write_bytes(lines(rows))
    args = script("dpo").parse(["--dataset", str(tmp_path), "--device", "cpu"])
    train, test = dataset.read_both(args, "preference")
    assert [row["prompt"] for row in train + test] == [row["prompt"] for row in ROWS]
    args = script("dpo").parse(
        ["--dataset", f"{tmp_path}:test", "--test-dataset", f"{tmp_path}:train", "--device", "cpu"]
    )
    assert (args.dataset, args.split, args.test_split) == (str(tmp_path), "test", "train")
    assert tuple(map(len, dataset.read_both(args, "preference"))) == (1, 2)
    with pytest.raises(
        SystemExit, match=r"no split 'dev' in it .*--split, --test-split and --dataset-config select others"
    ):
        dataset.read_both(
            script("dpo").parse(["--dataset", str(tmp_path), "--split", "dev", "--device", "cpu"]), "prompt"
        )


@pytest.mark.parametrize(
    "source, split, found",
    [
        ("org/name", None, ("org/name", None)),
        ("org/name:dev", None, ("org/name", "dev")),
        ("org/name:train[:10%]", None, ("org/name", "train[:10%]")),
        ("org/name", "dev", ("org/name", "dev")),
        (r"C:\data\rows", None, (r"C:\data\rows", None)),
        ("hf://data/x", None, ("hf://data/x", None)),
    ],
)
def test_names_with_a_split(source, split, found):
    assert row_files.source_and_split(source, split, "--split") == found


def test_incompatible_options(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\n")
    for words, message in (
        (
            ["--dataset", "org/name:dev", "--split", "dev"],
            "--split: got 'dev', but 'org/name:dev' already names a split",
        ),
        (["--dataset", str(path)], "--test-dataset: missing; .* or give --test-share 0.1"),
        (["--dataset", str(path), "--test-dataset", str(path)], "--test-dataset: missing"),
        (["--dataset", str(path), "--test-share", "1"], "--test-share: got 1.0, expected a number between 0 and 1"),
        (["--dataset", str(path), "--test-share", "nan"], "--test-share: got nan, expected"),
        (["--test-dataset", str(path), "--test-share", "0.5"], "--test-share: given together with --test-dataset"),
        (["--test-split", "dev", "--test-share", "0.5"], "--test-share: given together with"),
        (["--dataset", str(path), "--split", "dev"], "--split: got 'dev', but .* is a file, which has no splits"),
        (["--test-split", "dev"], "--test-split: got 'dev', but .* is a file"),
        (["--dataset", "org/name:test"], "--test-split: got 'test', which is the training split"),
    ):
        with pytest.raises(SystemExit, match=message):
            script("dpo").parse([*words, "--device", "cpu"])


def test_a_share_of_the_prompts_is_held_out(tmp_path):
    """The split is the same for the same seed. No prompt is in both parts; answers to one prompt stay together."""
    rows = [{"prompt": f"{n % 20}?", "chosen": f" {n}", "rejected": " no"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    words = ["--dataset", str(tmp_path / "rows.jsonl"), "--test-share", "0.25", "--device", "cpu"]
    for want in ("preference", "unpaired", "prompt", "completion"):
        train, test = dataset.read_both(script("dpo").parse(words), want)
        assert len(test) == len(train) / 3 and not {r["prompt"] for r in train} & {r["prompt"] for r in test}
        assert (train, test) == dataset.read_both(script("dpo").parse(words), want)
    other = dataset.read_both(script("dpo").parse([*words, "--seed", "1"]), "completion")
    assert other[1] != test
    for share, count in ((1e-9, 1), (1 - 1e-9, 19)):
        assert len({row["prompt"] for row in dataset.held_out(rows, share, 0)[1]}) == count
    with pytest.raises(SystemExit, match="--test-share: the data set has 1 prompt; expected 2 or more"):
        dataset.held_out(rows[::20], 0.5, 0)
    texts = [{"prompt": "", "completion": f"{n}"} for n in range(4)]
    assert tuple(map(len, dataset.held_out(texts, 0.5, 0))) == (2, 2)


def test_rows_labelled_false_are_counted(tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b", "label": bool(n % 3)} for n in range(6)]
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    assert len(read(tmp_path / "rows.jsonl", "completion")) == 4
    assert "rows.jsonl: 2 of 6 rows left out because their label is false" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto", "grpo", "ppo", "online_dpo"])
def test_a_missing_model_is_reported_first(name, tmp_path):
    """The missing model is reported before the missing data sets."""
    words = [
        "--model",
        str(tmp_path / "nope"),
        "--dataset",
        "none.jsonl",
        "--test-dataset",
        "none.jsonl.gz",
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit, match=r"--model: .*nope' cannot be loaded"):
        run(name, words, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["grpo", "ppo", "online_dpo"])
def test_a_missing_reward_is_reported_first(name, tmp_path):
    words = ["--dataset", "none.jsonl", "--test-dataset", "none.jsonl.gz", "--device", "cpu"]
    for flag, value, message in (
        ("--reward-model", "none", "none contains no model"),
        ("--reward-function", "none.py:f", "expected FILE.py:NAME"),
        ("--reward-function", f"{__file__}", "expected FILE.py:NAME"),
        ("--reward-function", f"{tmp_path}:f", "expected FILE.py:NAME"),
    ):
        with pytest.raises(SystemExit, match=f"{flag}: .*{message}"):
            script(name).parse([*words, flag, value])


def tiny(kind: str, vocab: int, positions: int):
    """A tiny model of this kind."""
    import transformers

    models.quiet()
    if kind == "opt":
        shape = dict(hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1, word_embed_proj_dim=8)
        return transformers.OPTForCausalLM(
            transformers.OPTConfig(vocab_size=vocab, max_position_embeddings=positions, **shape)
        )
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=vocab, n_positions=positions, n_embd=8, n_layer=1, n_head=1)
        )
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = transformers.LlamaConfig(vocab_size=vocab, max_position_embeddings=positions, **shape)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def encoded():
    """(tokenizer, rows, tokens of the longest)."""
    rows = dataset.read(str(example_runs.comparisons.TEST), "test")[:20]
    tokenizer = models.train_tokenizer(formats.texts_of(rows))
    rows = dataset.encode(rows, tokenizer, 100, 200)
    return tokenizer, rows, max(len(row["prompt_ids"] + row["chosen_ids"]) for row in rows)


@pytest.mark.parametrize("kind, learned", [("opt", True), ("gpt2", True), ("llama", False)])
def test_sequences_past_learned_positions(kind, learned, encoded):
    tokenizer, rows, longest = encoded
    parse = script("dpo").parse
    fits, short = (tiny(kind, len(tokenizer), longest - less) for less in (0, 1))
    tokenization.check_fits(fits, tokenizer, rows, parse(["--device", "cpu"]))
    batch = dataset.stack(rows, ("chosen",), tokenizer.pad_token_id, "cpu")
    fits(batch["input_ids"], attention_mask=batch["attention_mask"])
    if not learned:
        return tokenization.check_fits(short, tokenizer, rows, parse(["--device", "cpu"]))
    found = (
        f"learned positions for {longest - 1} tokens, the rows have up to {longest}; give --max-length {longest - 1}"
    )
    with pytest.raises(SystemExit, match=f"--max-length: the model has {found}"):
        tokenization.check_fits(short, tokenizer, rows, parse(["--device", "cpu"]))
    others = [{**rows[0], "other_ids": [1] * longest}]  # KTO's mismatched answers
    with pytest.raises(SystemExit, match=f"up to {longest + len(rows[0]['prompt_ids'])}"):
        tokenization.check_fits(fits, tokenizer, others, parse(["--device", "cpu"]))
    args = parse(["--device", "cpu"])
    args.max_completion_length = 50  # lengths of answers to be sampled
    with pytest.raises(SystemExit, match=f"give --max-length {longest} and shorter answers or prompts"):
        tokenization.check_fits(fits, tokenizer, rows, args)


def test_tokens_beyond_the_embedding(encoded):
    tokenizer, rows, _ = encoded
    args = script("dpo").parse(["--device", "cpu"])
    top = max(token for row in rows for token in row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"])
    with pytest.raises(
        SystemExit, match=rf"--model: the tokenizer's token '.*' has id {top}, but the model has {top} tokens"
    ):
        tokenization.check_fits(tiny("llama", top, 64), tokenizer, rows, args)
    tokenization.check_fits(tiny("llama", top + 1, 64), tokenizer, rows, args)
    added = models.train_tokenizer(["a"])
    added.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(
        SystemExit, match=r"--model: the tokenizer's pad_token '<new>' has id \d+, but the model has \d+ tokens"
    ):
        tokenization.check_fits(tiny("llama", len(added) - 1, 64), added, [], args)


def test_a_script_reports_it_at_the_start(tmp_path):
    """A script given a saved GPT-2 with 16 positions prints a message without a traceback, before any step."""
    tokenizer = models.train_tokenizer(
        formats.texts_of(dataset.read(str(example_runs.comparisons.TRAIN), "train")[:60])
    )
    models.save(tmp_path / "gpt2", tiny("gpt2", len(tokenizer), 16), tokenizer)
    words = [*example_runs.small_data(tmp_path), "--model", str(tmp_path / "gpt2"), "--steps", "1"]
    for name in ("dpo", "sft", "kto"):
        with pytest.raises(SystemExit, match="--max-length: the model has learned positions for 16 tokens"):
            run(name, words, tmp_path / name)

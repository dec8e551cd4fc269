"""Rows of a data set as they stand in a file, a folder or on the Hub, each with its place for error messages.

JSON is read here, line by line; .csv, .tsv, .txt, .parquet, .arrow, folders and the Hub go through `datasets`.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import fail

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = (".zst", ".zip", ".lz4", ".br", ".7z", ".tar", ".tgz")
JSON = (".jsonl", ".json", ".ndjson")
TABLES = {".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}  # datasets' builders
TEXTS = ("prompt", "chosen", "rejected", "completion", "text")  # columns that a CSV file holds as text, "007" too
TAKES = "--dataset takes a file (.jsonl, .json, .csv, .parquet, ...), a folder or a Hub id"


def ending(path: Path) -> str:
    """The suffix that names the format: .jsonl of rows.jsonl and of rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_file(source: str) -> bool:
    """Whether a source is, or would be, a single file of rows, which has no splits."""
    path = Path(source)
    return path.is_file() or (not path.is_dir() and ending(path) in (*JSON, *TABLES, *PACKED))


def parted(source: str, split: str | None, flag: str) -> tuple[str, str | None]:
    """(source, split) of "name:split"; a path that exists is taken as it is."""
    match = re.fullmatch(r"(.+[^:/\\]):(\w[\w.+-]*(?:\[[^\]]*\])?)", source)
    if match is None or Path(source).exists():
        return source, split
    if split is not None:
        fail(f"{flag}: got {split!r}, but the name {source!r} has a split already; give one of the two")
    return match[1], match[2]


def text_of_file(path: Path) -> str:
    """The whole text of a file in UTF-8, with or without a byte order mark, compressed or not."""
    if path.suffix.lower() in PACKED:
        fail(f"{path}: cannot be read (packed as {path.suffix}); unpack it, or pack it as .gz, .bz2 or .xz")
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        fail(f"{path}: cannot be read ({error}); {TAKES}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fail(f"{path}: cannot be read (line {line} is not UTF-8: {error.reason}); save it as UTF-8")


def once(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON, none of whose names stands twice: json.loads would take the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!a} stands twice in an object")
    return found


def check_surrogates(row: object, where: str) -> None:
    """Refuses half of a surrogate pair, such as \\ud83d alone: no tokenizer takes it."""
    for name, value in row.items() if isinstance(row, dict) else ():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            fail(f"{where}: field {name!a} has the lone surrogate {half}, which is no character; write the whole pair")


def checked(rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """The rows, once `check_surrogates` has seen each."""
    for where, row in rows:
        check_surrogates(row, where)
        yield where, row


def parse(text: str, where: str, expected: str = "") -> object:
    """A value of JSON, or an error that says where it is wrong."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        fail(f"{where}: not JSON ({error}){expected}")


def from_json(path: Path) -> Iterator[tuple[str, object]]:
    """One value a line, or of a .json file the items of one array.

    Only "\\n" ends a line: U+2028, U+2029 and U+0085 may stand inside a string.
    """
    text = text_of_file(path)
    if ending(path) == ".json" and text.lstrip().startswith("["):
        for number, row in enumerate(parse(text, str(path)), 1):
            yield f"{path}, row {number}", row
        return
    expected = "; expected an array, or one object a line" if ending(path) == ".json" else ""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\r\ufeff")  # a mark stands inside where files with marks were joined
        if line:
            yield f"{path}, line {number}", parse(line, f"{path}, line {number}", expected)


def library(source: str):
    """The package `datasets`."""
    try:
        import datasets
    except ImportError:
        fail(f"{source}: neither a .jsonl nor a .json file, and reading others takes `pip install datasets`")
    return datasets


def from_table(path: Path) -> Iterator[tuple[str, object]]:
    """Rows of a file that `datasets` reads; without its cache, which may hold an older file of that name."""
    datasets, kind, how = library(str(path)), TABLES[ending(path)], {}
    if not path.is_file():
        fail(f"{path}: cannot be read (no such file); {TAKES}")
    if kind == "csv":  # an empty cell is null; the words NA and None are text
        how = dict(sep="\t" if ending(path) == ".tsv" else ",", keep_default_na=False, na_values=[""])
        how["converters"] = dict.fromkeys(TEXTS, str)
    try:
        rows = list(datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **how))
    except Exception as error:  # whatever pandas or pyarrow may raise
        fail(f"{path}: cannot be read as {kind} ({type(error).__name__}: {str(error)[:300]}); {TAKES}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def from_hub(source: str, split: str, config: str | None) -> Iterator[tuple[str, object]]:
    """Rows of a split of a folder, or of a data set on the Hub."""
    datasets, path = library(source), Path(source)
    try:
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            data = datasets.load_from_disk(source)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source, config, split=split)
    except Exception as error:  # whatever a hub, a network or a cache may raise
        ways = "--split, --test-split and --dataset-config name others; --test-share holds rows out for testing"
        fail(f"{source}: no data set of that name, or no split {split!r} in it ({error}); {ways}")
    for number, row in enumerate(data):
        yield f"{source}, split {split}, row {number}", row


def rows(source: str, split: str, config: str | None = None) -> Iterable[tuple[str, object]]:
    """(place, row) of a file, or of a split of a folder or a Hub id."""
    path = Path(source)
    if not is_file(source):
        return from_hub(source, split, config)
    return from_table(path) if ending(path) in TABLES else checked(from_json(path))

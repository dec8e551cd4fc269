"""Reads the rows of a data set from a file, a folder or the Hub, each with its location for error messages.

JSON is read here, line by line; .csv, .tsv, .txt, .parquet, .arrow, folders and the Hub are read by `datasets`.
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

from .errors import fail

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
OTHER_ARCHIVES = (".zst", ".zip", ".lz4", ".br", ".7z", ".tar", ".tgz")
JSON = (".jsonl", ".json", ".ndjson")
TABLES = {".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}  # datasets' builders
TEXTS = ("prompt", "chosen", "rejected", "completion", "text")  # columns of a CSV file read as text, even "007"
TAKES = "--dataset takes a file (.jsonl, .json, .csv, .parquet, ...), a folder or a Hub id"


def ending(path: Path) -> str:
    """The suffix that names the format: .jsonl for rows.jsonl and for rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_file(source: str) -> bool:
    """Whether a source is a single file, or by its suffix would be one. Files have no splits."""
    path = Path(source)
    return path.is_file() or (not path.is_dir() and ending(path) in (*JSON, *TABLES, *OTHER_ARCHIVES))


def source_and_split(source: str, split: str | None, flag: str) -> tuple[str, str | None]:
    """Split "name:split" into (source, split). An existing path is never split."""
    match = re.fullmatch(r"(.+[^:/\\]):(\w[\w.+-]*(?:\[[^\]]*\])?)", source)
    if match is None or Path(source).exists():
        return source, split
    if split is not None:
        fail(f"{flag}: got {split!r}, but {source!r} already names a split; give one of them")
    return match[1], match[2]


def text_of_file(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, compressed or not."""
    if path.suffix.lower() in OTHER_ARCHIVES:
        fail(f"{path}: cannot be read (compressed as {path.suffix}); decompress it, or use .gz, .bz2 or .xz")
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


def unique_names(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as dict; an error if a name occurs twice, of which json.loads would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!a} occurs twice in an object")
    return found


def check_surrogates(row: object, where: str) -> None:
    """End the program on half of a surrogate pair, such as \\ud83d alone: tokenizers do not accept it."""
    for name, value in row.items() if isinstance(row, dict) else ():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            fail(f"{where}: field {name!a} has the lone surrogate {half}, not a character; write the whole pair")


def checked(rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Yield the rows after `check_surrogates`."""
    for where, row in rows:
        check_surrogates(row, where)
        yield where, row


def parse(text: str, where: str, expected: str = "") -> object:
    """Parse a JSON value; an error says where it is invalid."""
    try:
        return json.loads(text, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        fail(f"{where}: not JSON ({error}){expected}")


def from_json(path: Path) -> Iterator[tuple[str, object]]:
    """Yield one value per line, or for a .json file with one array its items.

    Only "\\n" ends a line: U+2028, U+2029 and U+0085 may occur inside a string.
    """
    text = text_of_file(path)
    if ending(path) == ".json" and text.lstrip().startswith("["):
        for number, row in enumerate(parse(text, str(path)), 1):
            yield f"{path}, row {number}", row
        return
    expected = "; expected an array, or one object per line" if ending(path) == ".json" else ""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\r\ufeff")  # concatenated files may have byte order marks inside
        if line:
            yield f"{path}, line {number}", parse(line, f"{path}, line {number}", expected)


def import_datasets(source: str):
    """Import the package `datasets`."""
    try:
        import datasets
    except ImportError:
        fail(f"{source}: not a .jsonl or .json file, and reading others requires `pip install datasets`")
    return datasets


def from_table(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of a file that `datasets` reads, by streaming: its cache may hold an older file of that name."""
    datasets, kind, options = import_datasets(str(path)), TABLES[ending(path)], {}
    if not path.is_file():
        fail(f"{path}: cannot be read (no such file); {TAKES}")
    if kind == "csv":  # an empty cell is null; "NA" and "None" are text
        options = dict(sep="\t" if ending(path) == ".tsv" else ",", keep_default_na=False, na_values=[""])
        options["converters"] = dict.fromkeys(TEXTS, str)
    try:
        rows = list(datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **options))
    except Exception as error:  # pandas and pyarrow raise many types
        fail(f"{path}: cannot be read as {kind} ({type(error).__name__}: {str(error)[:300]}); {TAKES}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def from_hub(source: str, split: str, config: str | None) -> Iterator[tuple[str, object]]:
    """Yield the rows of one split of a folder or of a data set on the Hub."""
    datasets, path = import_datasets(source), Path(source)
    try:
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            data = datasets.load_from_disk(source)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source, config, split=split)
    except Exception as error:  # the Hub, the network and the cache raise many types
        ways = "--split, --test-split and --dataset-config select others; --test-share holds out rows for testing"
        fail(f"{source}: no data set of that name, or no split {split!r} in it ({error}); {ways}")
    for number, row in enumerate(data):
        yield f"{source}, split {split}, row {number}", row


def rows(source: str, split: str, config: str | None = None) -> Iterable[tuple[str, object]]:
    """(location, row) for each row of a file, or of one split of a folder or Hub id."""
    path = Path(source)
    if not is_file(source):
        return from_hub(source, split, config)
    return from_table(path) if ending(path) in TABLES else checked(from_json(path))

"""TRL's data set formats: checks the fields of a row and converts it into the rows that the scripts use."""

from __future__ import annotations

import json

from .errors import fail

FORMATS = {  # TRL's names and the fields that identify a format; in a preference row the prompt is optional
    "preference": ("chosen", "rejected"),
    "unpaired preference": ("prompt", "completion", "label"),
    "prompt-completion": ("prompt", "completion"),
    "conversation": ("messages",),
    "language modeling": ("text",),
    "prompt-only": ("prompt",),
}
TAKEN = {  # the formats from which each kind of row can be made
    "preference": ("preference",),
    "unpaired": ("unpaired preference", "preference"),
    "completion": ("unpaired preference", "prompt-completion", "preference", "conversation", "language modeling"),
    "prompt": ("prompt-only", "preference"),
}
ANSWERS = ("chosen", "rejected", "completion")
FIELDS = ("prompt", *ANSWERS, "messages", "text")
COLUMNS = ("columns",)  # a row's key for the user's own columns; not a string, so no column can have this name
IMAGES = ("image", "images")
TOKENIZED = ("input_ids", "labels", "completion_mask", "assistant_masks")  # TRL's SFTTrainer would train on these
RESERVED = ("tokenize", "add_generation_prompt", "return_dict", "tools", "conversation", "return_tensors")


def shared(first, second) -> int:
    """Length of the common prefix of two texts, lists of messages or lists of tokens."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def is_chat(value: object) -> bool:
    """Whether a field is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def shared_prompt(row: dict) -> dict:
    """A preference row with a prompt. If it has none, the common beginning of both answers (words, or messages) is it.

    Some data sets have both a prompt as text and conversations that begin with it; the conversations are then used.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row and not (isinstance(row["prompt"], str) and is_chat(chosen) and is_chat(rejected)):
        return row
    same = min(shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)  # each answer keeps at least one item
    if isinstance(chosen, str):  # end at a whole word
        same = max(0, chosen.rfind(" ", 0, same))
    return {**row, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def check_message(message: object, field: str, where: str) -> None:
    """Check that a message has a role and a content: a text, a list of text parts, or tool calls without content."""
    good = isinstance(message, dict) and isinstance(message.get("role"), str)
    content = message.get("content") if good else None
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            fail(f"{where}: field {field!r} has a part of type {kind!r}, but the examples train on text only")
    if not good or not (isinstance(content, (str, list)) or (content is None and message.get("tool_calls"))):
        fail(f"{where}: field {field!r} has {message!r}, expected messages with the strings role and content")


def check_field(row: dict, field: str, where: str) -> None:
    """Check that a field is a text or a list of messages and not empty; that a label is true or false."""
    value = row[field]
    kind = "null" if value is None else type(value).__name__
    if field == "label":
        if not isinstance(value, bool) and not (isinstance(value, int) and value in (0, 1)):
            fail(f"{where}: field 'label' is {kind}, expected true or false")
    elif isinstance(value, list):
        for message in value or [None]:
            check_message(message, field, where)
    elif not isinstance(value, str):
        fail(f"{where}: field {field!r} is {kind}, expected a string or a list of messages")
    elif not value.strip():
        fail(f"{where}: field {field!r} is empty")


def template_settings(row: dict, where: str) -> dict:
    """Chat template arguments in a row's fields `tools` and `chat_template_kwargs` (or their JSON), as in TRL."""
    found = {}
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                fail(f"{where}: field {name!r} is a string that is not JSON ({error})")
        if value is not None and not isinstance(value, kind):
            fail(f"{where}: field {name!r} is {type(value).__name__}, expected a {kind.__name__} or its JSON")
        found[name] = value
    for tool in found["tools"] or ():
        if not isinstance(tool, dict):
            fail(f"{where}: field 'tools' has {tool!r}, expected tools as JSON schemas")
    options = found["chat_template_kwargs"] or {}
    if names := [name for name in RESERVED if name in options]:
        fail(f"{where}: field 'chat_template_kwargs' has {', '.join(names)}, which the examples set themselves")
    tools = {"tools": found["tools"]} if found["tools"] else {}  # some templates also write an empty list
    return {name: value for name, value in options.items() if value is not None} | tools


def check_ignored(row: dict, want: str, where: str) -> None:
    """End the program on columns that TRL uses and the examples do not."""
    for name in IMAGES:
        if row.get(name) not in (None, [], ""):
            fail(f"{where}: field {name!r} holds images, but the examples train on text only; remove the column")
    for name in TOKENIZED if want == "completion" else ():
        if row.get(name) is not None:
            fail(f"{where}: field {name!r} holds tokens, but the examples tokenize texts themselves; remove the column")


def with_messages(row: dict) -> dict:
    """Convert `conversations` with from and value into `messages`, as TRL's SFTTrainer does."""
    turns = row.get("conversations")
    if "messages" in row or not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return row
    names = {"from": "role", "value": "content"}
    return {**row, "messages": [{names.get(name, name): value for name, value in turn.items()} for turn in turns]}


def asked(row: dict, where: str) -> dict:
    """A row to draw answers for: its prompt, and the answers if it is a valid preference row.

    All other columns are kept, whatever their names, and passed to a reward function.
    """
    kept = {name: value for name, value in row.items() if name not in FIELDS and name != "label"} | {COLUMNS: row}
    answers = [row.get("chosen"), row.get("rejected")]
    texts = all(isinstance(answer, str) and answer.strip() for answer in answers)
    if texts or all(map(is_chat, answers)):
        pair = shared_prompt(row)
        prompt = pair["prompt"]
        if pair["chosen"] and prompt and (isinstance(prompt, str) if texts else is_chat(prompt)):
            return kept | {name: pair[name] for name in ("prompt", "chosen", "rejected")}
    if "prompt" not in row:
        fail(f"{where}: field 'prompt' is empty once the prompt is what chosen and rejected begin with")
    return kept | {"prompt": row["prompt"]}


def rows_of(row: object, want: str, where: str) -> list[dict]:
    """Convert one row of a data set into rows of the kind `want`, a key of TAKEN. where: its location, for errors."""
    formats = {name: FORMATS[name] for name in TAKEN[want]}
    if not isinstance(row, dict):
        fail(f"{where}: expected an object with the fields {wanted(want)}, got {type(row).__name__}")
    row = with_messages(row) if want == "completion" else row
    found = next((name for name, fields in formats.items() if all(field in row for field in fields)), None)
    if found is None:
        first = next(iter(formats.values()))
        missing = next(field for field in first if field not in row)
        has = f"it has {', '.join(map(repr, row)) or 'no fields'}"
        fail(f"{where}: field {missing!r} is missing; expected {wanted(want)}; {has}")
    check_ignored(row, want, where)
    fields = [*formats[found], *(["prompt"] if "prompt" in row and found == "preference" else [])]
    for field in fields:
        check_field(row, field, where)
    whole = row
    row = shared_prompt(row) if found == "preference" else row
    if len({type(row[field]) for field in fields if field != "label"}) > 1:
        fail(f"{where}: {', '.join(fields)} are partly texts and partly lists of messages; expected one of the two")
    row = asked(whole, where) if want == "prompt" else row
    if any(isinstance(row.get(field), list) for field in (*fields, "prompt")):
        template_settings(row, where)
    if found == "preference":
        for field in ("prompt", "chosen", "rejected"):
            if not row[field]:
                fail(f"{where}: field {field!r} is empty once the prompt is what chosen and rejected begin with")
    return [row] if want in ("preference", "prompt") else answers_of(row, found, want)


def answers_of(row: dict, found: str, want: str) -> list[dict]:
    """Convert a row of the format `found` into rows with one answer each, `completion`. Other columns are kept."""
    rest = {name: value for name, value in row.items() if name not in FIELDS}
    if found == "preference":
        pair = [rest | {"prompt": row["prompt"], "completion": row[f], "label": f == "chosen"} for f in FORMATS[found]]
        return pair if want == "unpaired" else pair[:1]
    if found in ("conversation", "language modeling"):  # every token is a label
        whole = row[FORMATS[found][0]]
        return [rest | {"prompt": whole[:0], "completion": whole}]
    if found == "unpaired preference":
        row = {**row, "label": bool(row["label"])}
    return [row] if want != "completion" or row.get("label") is not False else []


def wanted(want: str) -> str:
    """The formats from which rows of this kind can be made, for error messages."""
    return " or ".join(f"{', '.join(FORMATS[name])} ({name})" for name in TAKEN[want])


def plain(message: dict) -> dict:
    """A message as chat templates expect it: its text as one string, without the nulls that `datasets` adds."""
    message = {name: value for name, value in message.items() if value is not None or name == "content"}
    if isinstance(message.get("content"), list):
        message["content"] = "".join(part["text"] for part in message["content"])
    return message


def said(message: dict) -> str:
    """The text of a message."""
    return plain(message).get("content") or ""


def text_of(content: str | list[dict]) -> str:
    """A text itself; of a list of messages the text of the last one."""
    return content if isinstance(content, str) else said(content[-1])


def texts_of(rows: list[dict]) -> list[str]:
    """All texts of the rows, to train a tokenizer on."""
    parts = [row[field] for row in rows for field in ("prompt", "chosen", "rejected", "completion") if field in row]
    return [text for part in parts for text in ([part] if isinstance(part, str) else map(said, part))]

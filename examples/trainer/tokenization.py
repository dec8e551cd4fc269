"""Token ids of rows, as in TRL 1.16: prompt and answer are tokenized together, then split.

A text starts with the tokens that the tokenizer itself adds (a BOS token, or nothing) and ends with one EOS token.
Neither is added again if the text already has it, for example from a chat template. Messages are formatted by the
chat template.
"""

from __future__ import annotations

import sys

from .errors import fail
from .formats import ANSWERS, COLUMNS, plain, shared, template_settings

SETTINGS = ("tools", "chat_template_kwargs")


def template_ids(tokenizer, messages: list[dict], settings: dict, **options) -> list[int]:
    """Token ids of messages, formatted by the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        fail("--dataset has conversations, but the tokenizer has no chat template; use the model's chat version")
    messages = [plain(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **settings, **options)
    except Exception as error:  # templates raise many types
        reason = f"{type(error).__name__}: {error}"
        fail(f"--dataset: the model's chat template cannot write {messages!r:.300} ({reason})")


def put_before(tokenizer) -> list[int]:
    """The token ids that the tokenizer adds before a text."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in starts if whole[i : i + len(bare)] == bare), 0)]


def of_text(text: str, tokenizer, before: list[int]) -> list[int]:
    """Token ids of a text. `before` is not added if the text already begins with a BOS token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token
    has_own = ids[:1] == before[:1] or (bos is not None and text.lstrip().startswith(bos))
    return ids if has_own else before + ids


def ended(text: str, tokenizer) -> str:
    """Append the EOS token, unless the text already ends with it, apart from white space."""
    return text if text.rstrip().endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def of_row(row: dict, fields: list[str], tokenizer, before: list[int]) -> tuple[list[int], dict[str, list[int]]]:
    """(ids of the prompt alone, ids of prompt and answer together by field)."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        whole = {field: of_text(prompt + ended(row[field], tokenizer), tokenizer, before) for field in fields}
        return of_text(prompt, tokenizer, before), whole
    options = template_settings(row, "--dataset")
    alone = template_ids(tokenizer, prompt, options, add_generation_prompt=True) if prompt else []
    return alone, {field: template_ids(tokenizer, prompt + row[field], options) for field in fields}


def check_answers(row: dict, answers: dict[str, list[int]]) -> None:
    """End the program if an answer has no tokens after the prompt."""
    for field, ids in answers.items():
        if not ids:
            fail(
                f"--dataset: the chat template adds no tokens for field {field!r} after the prompt: {row[field]!r:.300}"
            )


def encoded(row: dict, tokenizer, before: list[int]) -> dict:
    """prompt_ids, and for each answer <field>_ids.

    An answer starts where the tokens of prompt and answer first differ from those of the prompt alone. That can be
    before the end of the prompt: a template may end a prompt differently before an answer, and tokens may merge across
    the boundary. Then `generation_ids` is the whole prompt, for which answers are drawn.
    """
    fields = [field for field in ANSWERS if field in row]
    alone, whole = of_row(row, fields, tokenizer, before)
    common = min((shared(alone, ids) for ids in whole.values()), default=len(alone))
    answers = {field: ids[common:] for field, ids in whole.items()}
    check_answers(row, answers)
    apart = {"generation_ids": alone} if common < len(alone) else {}
    return {"prompt_ids": alone[:common], **{f"{field}_ids": ids for field, ids in answers.items()}, **apart}


def note(rows: list[dict], tokenizer) -> None:
    """Report on stderr in how many encoded rows a field has no effect, or the end of the prompt is not trained on."""
    unread = [name for row in rows if isinstance(row["prompt"], str) for name in SETTINGS if row[COLUMNS].get(name)]
    for name in dict.fromkeys(unread):
        rest = "which only a chat template uses; it has no effect on rows of text"
        print(f"{unread.count(name)} of {len(rows)} rows have the field {name!r}, {rest}", file=sys.stderr)
    apart = [row for row in rows if "generation_ids" in row]
    if apart:
        end = tokenizer.decode(apart[0]["generation_ids"][len(apart[0]["prompt_ids"]) :])
        where = f"in {len(apart)} of {len(rows)} rows the prompt alone has other tokens than before an answer"
        print(f"{where}: its end, such as {end!r}, is left out in training, as in TRL", file=sys.stderr)


def check_fits(model, tokenizer, rows: list[dict], args, flag: str = "--model") -> None:
    """End the program if token ids exceed the embedding, or sequences exceed the learned positions.

    Args:
        rows: of `dataset.encode`. flag: the flag that named the model, for error messages.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    size = min(table.weight.shape[0] for table in tables if table is not None)
    for name in ("pad", "eos"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number >= size:
            token = f"{name}_token {getattr(tokenizer, f'{name}_token')!r} has id {number}"
            fail(f"{flag}: the tokenizer's {token}, but the model has {size} tokens; resize its embedding")
    names = [name for name in (rows[0] if rows else ()) if isinstance(name, str) and name.endswith("_ids")]
    top = max((number for row in rows for name in names for number in row.get(name, ())), default=0)
    if top >= size:
        token = f"{tokenizer.convert_ids_to_tokens(top)!r} has id {top}"
        fail(f"{flag}: the tokenizer's token {token}, but the model has {size} tokens; use the model's own tokenizer")
    limit = learned_positions(model)
    answers = [name for name in names if name not in ("prompt_ids", "generation_ids")]
    longest = max(
        (len(row["prompt_ids"]) + max(len(row[name]) for name in answers) for row in rows if answers), default=0
    )
    drawn = 0 if getattr(args, "pairs", None) == "given" else getattr(args, "max_completion_length", 0)
    prompts = max((len(row.get("generation_ids", row["prompt_ids"])) for row in rows), default=0)
    if limit is not None and max(longest, prompts + drawn) > limit:
        found = (
            f"the model has learned positions for {limit} tokens, the rows have up to {max(longest, prompts + drawn)}"
        )
        fail(f"--max-length: {found}; give --max-length {limit}" + " and shorter answers or prompts" * bool(drawn))


def learned_positions(model) -> int | None:
    """The number of learned position embeddings; None if positions are computed (rotary, ALiBi)."""
    import torch

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not model.get_input_embeddings()]
    learned = limit is not None and any(limit <= table.num_embeddings <= limit + 8 for table in tables)
    return limit if learned else None

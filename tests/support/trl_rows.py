"""Rows in TRL's formats, tokenizers of several kinds, and the tokens that the examples make of rows."""

import example_runs  # noqa: F401  (puts examples/ on the path)
from transformers import PreTrainedTokenizerFast

from trainer import dataset, formats, models, tokenization  # isort: skip

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
    """Like GPT-2's or Qwen's: no BOS token, and tokens that merge across the boundary of prompt and answer."""
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
    """The tokenizer with a chat template, which writes a BOS token if the tokenizer puts one before a text."""
    tokenizer.chat_template = (
        TEMPLATE if tokenization.put_before(tokenizer) else TEMPLATE.removeprefix("{{ bos_token }}")
    )
    return tokenizer


TOKENIZERS = {
    "llama": lambda: models.train_tokenizer(TEXTS),
    "gpt2": bytes_tokenizer,
}


def ours(rows, want, tokenizer, length=200) -> list[dict]:
    made = [new for row in rows for new in formats.rows_of(row, want, "row")]
    return dataset.encode(made, tokenizer, length - 1, length)

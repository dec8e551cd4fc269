"""TRL's DPOTrainer with fused_po's log-probs, in one process or in several started by `accelerate launch`.

    python examples/trl_dpo.py --max_steps 20
    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 8 examples/trl_dpo.py --model ...

examples/accelerate/ has configurations for DDP, FSDP2 and DeepSpeed's ZeRO-2 and ZeRO-3. All flags of TRL's DPOConfig
are accepted (--per_device_train_batch_size, --beta, --save_strategy, --resume_from_checkpoint, ...). Without --model a
tiny Llama is built, with a tokenizer trained on the pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import torch
import transformers
import trl
from trainer import comparisons, dataset, formats, models

from fused_po.integrations.trl import patch

DEFAULTS = dict(output_dir="runs/trl_dpo", max_length=128, logging_steps=1, save_strategy="no", report_to="none")


def tiny(rows: list[dict], folder: Path) -> Path:
    """Write a Llama of 0.7 million parameters and a tokenizer trained on the rows into a folder, unless it exists."""
    if not folder.is_dir():
        tokenizer = models.train_tokenizer(formats.texts_of(rows))
        shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4)
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        transformers.set_seed(0)
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), **shape, **ends)
        models.save(folder, transformers.LlamaForCausalLM(config), tokenizer)
    return folder


def main(argv: list[str] | None = None) -> trl.DPOTrainer:
    """Train; returns the trainer."""
    parser = transformers.HfArgumentParser(trl.DPOConfig, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="Hub id or folder of a causal LM")
    parser.add_argument(
        "--dataset", default=str(comparisons.TRAIN), help="preference pairs: a file, a folder or a Hub id"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float64"), help="dtype of the weights"
    )
    parser.add_argument("--stock", action="store_true", help="use TRL's own log-probs, for comparison")
    parser.set_defaults(**DEFAULTS)
    config, args = parser.parse_args_into_dataclasses(argv)
    rows = dataset.read(args.dataset, "train")
    with config.main_process_first():
        path = args.model or str(tiny(rows, Path(config.output_dir) / "start"))
    config.model_init_kwargs = {"dtype": getattr(torch, args.dtype)}
    if not args.stock:
        patch()
    columns = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
    pairs = datasets.Dataset.from_list([{key: row[key] for key in columns if key in row} for row in rows])
    trainer = trl.DPOTrainer(path, args=config, train_dataset=pairs, processing_class=models.load_tokenizer(path))
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    return trainer


if __name__ == "__main__":
    main()

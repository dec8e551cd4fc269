"""Direct preference optimisation, start to end: supervised training of a small model, then DPO against it.

    python examples/dpo.py                    # a tiny Llama on the shipped data, minutes on a CPU
    python examples/dpo.py --model Qwen/Qwen3-0.6B --dataset data.jsonl --test-dataset test.jsonl --sft-steps 0

Rows have the strings prompt, chosen, rejected. The loss is `fused_po.linear_dpo` on the hidden states: no logits exist.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import common
import comparisons
import torch
from tqdm import tqdm

import fused_po


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hub id or path of a causal LM; default: a tiny Llama built here")
    add("--dataset", default=str(comparisons.TRAIN), help=".jsonl file, datasets folder or Hub id")
    add("--test-dataset", help="the held-out pairs; default: the shipped ones, or split 'test' of --dataset")
    add("--output", help="folder for the run; default: runs/dpo, or the next free runs/dpo-N")
    add("--resume", action="store_true", help="continue the run in --output (default runs/dpo), bit for bit")
    add("--sft-steps", type=int, default=100, help="supervised steps that make the reference; 0: the model as it is")
    add("--steps", type=int, default=800, help="DPO steps")
    add("--batch-size", type=int, default=32, help="pairs a step")
    add("--sft-lr", type=float, default=1e-3)
    add("--lr", type=float, default=1e-3)
    add("--beta", type=float, default=0.1)
    add(
        "--kl-coef",
        type=float,
        default=0.1,
        help="weight of the k3 estimate of the KL; without it a tiny model unlearns to speak",
    )
    add("--max-prompt-length", type=int, default=512, help="tokens; pairs with longer prompts are left out")
    add("--max-length", type=int, default=1024, help="tokens of prompt and answer; longer answers are cut")
    add("--checkpoint-every", type=int, default=200, help="steps")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "lr", "sft_lr", "beta", "checkpoint_every", "max_prompt_length"):
        if not getattr(args, name) > 0:
            common.fail(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected a number above 0")
    if args.max_length <= args.max_prompt_length:
        common.fail(f"--max-length: got {args.max_length}, expected more than --max-prompt-length")
    if args.test_dataset is None:
        args.test_dataset = str(comparisons.TEST) if args.dataset == str(comparisons.TRAIN) else args.dataset
    if args.test_dataset == args.dataset and args.dataset.endswith(".jsonl"):
        common.fail("--test-dataset: missing; pairs to measure on must not be those to train on")
    return args


def build(args, texts: list[str]):
    """(model, tokenizer): the ones of --model, or a tiny Llama with a tokenizer trained on the texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if args.model:
        try:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            common.fail(f"--model: {args.model!r} cannot be loaded ({error})")
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
        return model.to(args.device), tokenizer
    tokenizer = common.train_tokenizer(texts)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=args.max_length, **shape, **ends)
    return LlamaForCausalLM(config).to(args.device), tokenizer


def hidden_states(model, batch) -> torch.Tensor:
    """[B, T, H], what the LM head would be given."""
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model.get_decoder()(**inputs, use_cache=False).last_hidden_state


def sft_loss(model, batch) -> tuple[torch.Tensor, dict]:
    """Mean negative log-likelihood of the answers' tokens."""
    labels = fused_po.shift_labels(batch["labels"])
    device = labels.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logps = fused_po.linear_logps(hidden_states(model, batch), model.lm_head.weight, labels).logps
    loss = -logps.sum() / (labels != common.IGNORE).sum()
    return loss, {"loss": loss}


def dpo_loss(model, reference, batch, beta: float, kl_coef: float) -> tuple[torch.Tensor, dict]:
    """The DPO loss of a stacked batch, and what to report under TRL's names."""
    with torch.no_grad():
        ref_hidden = hidden_states(reference, batch)
    labels = fused_po.shift_labels(batch["labels"])
    device = labels.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        out = fused_po.linear_dpo(
            hidden_states(model, batch), model.lm_head.weight, labels, ref_hidden, reference.lm_head.weight,
            beta=beta, kl="k3", kl_coef=kl_coef,
        )  # fmt: skip
    report = {
        "loss": out.loss,
        "rewards/chosen": out.chosen_rewards.mean(),
        "rewards/rejected": out.rejected_rewards.mean(),
        "rewards/margins": out.margins.mean(),
        "rewards/accuracies": out.accuracy.mean(),
        "logps/chosen": out.chosen_logps.mean(),
        "logps/rejected": out.rejected_logps.mean(),
        "kl": out.kl,
    }
    return out.loss, report


@torch.no_grad()
def evaluate(model, rows, tokenizer, device: str) -> dict[str, float]:
    """Share of held-out pairs with the chosen answer more probable per token, and of correct greedy answers."""
    model.eval()
    preferred, correct, checkable = 0.0, 0, 0
    for begin in range(0, len(rows), 100):
        part = rows[begin : begin + 100]
        batch = common.stack(part, ("chosen", "rejected"), tokenizer.pad_token_id, device)
        labels = fused_po.shift_labels(batch["labels"])
        hidden = hidden_states(model, batch)
        logps = fused_po.linear_logps(hidden, model.lm_head.weight.to(hidden.dtype), labels).logps
        chosen, rejected = fused_po.sequence_logps(logps, labels != common.IGNORE, average=True).chunk(2)
        preferred += (chosen > rejected).sum().item()
        if not any(comparisons.is_correct(row["prompt"], row["chosen"]) for row in part):
            continue  # not a kind of question that the checking program knows
        prompts = tokenizer.pad({"input_ids": [row["prompt_ids"] for row in part]}, return_tensors="pt").to(device)
        longest = max(len(row["chosen_ids"]) for row in part)
        prompts = {name: prompts[name] for name in ("input_ids", "attention_mask")}
        out = model.generate(**prompts, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(comparisons.is_correct(row["prompt"], answer) for row, answer in zip(part, answers))
        checkable += len(part)
    model.train()
    return {"preference": preferred / len(rows), "greedy": correct / checkable if checkable else math.nan}


def start(model, lr: float, steps: int):
    """(optimizer, schedule): warm-up over a tenth of the steps, then down a cosine to a tenth of lr."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def output_folder(args) -> Path:
    """Where the run lives; an old one is continued or left alone, never mixed with a new one."""
    if args.resume or args.output:
        folder = Path(args.output or "runs/dpo")
        if not args.resume and (folder / "arguments.json").exists():
            common.fail(
                f"--output: {folder} holds a run already; --resume continues it, another folder leaves it alone"
            )
        return folder
    names = (Path(f"runs/dpo-{n}" if n > 1 else "runs/dpo") for n in range(1, 10**6))
    return next(folder for folder in names if not folder.exists())


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns what `evaluate` gave before and after DPO."""
    output = output_folder(args)
    raw = common.read_pairs(args.dataset, "train"), common.read_pairs(args.test_dataset, "test")
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "output", "device", "checkpoint_every")}
    state = None
    if args.resume:
        state = common.load_checkpoint(output, args.device)
        if (old := json.loads((output / "arguments.json").read_text())) != settings:
            changed = ", ".join(
                f"{k}: {old.get(k)} then, {settings[k]} now" for k in settings if settings[k] != old.get(k)
            )
            common.fail(f"--resume: the run in {output} was started with other arguments ({changed})")
    torch.manual_seed(args.seed)
    model, tokenizer = build(args, [text for row in raw[0] for text in row.values()])
    pairs, held_out = (common.encode(rows, tokenizer, args.max_prompt_length, args.max_length) for rows in raw)
    output.mkdir(parents=True, exist_ok=True)
    common.write_whole(output / "arguments.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
    step, shares, reference = 0, {}, None
    optimizer, schedule = start(model, args.sft_lr, max(1, args.sft_steps))
    if state is not None:
        step, shares = state["step"], state["shares"]
        model.load_state_dict(state["model"])
        if step > args.sft_steps:
            reference = copy.deepcopy(model).requires_grad_(False)
            reference.load_state_dict(state["reference"])
            optimizer, schedule = start(model, args.lr, args.steps)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"].cpu())
    history = [row for row in common.read_metrics(output / "metrics.jsonl") if row["step"] < step]
    lines = "".join(json.dumps(row) + "\n" for row in history)
    common.write_whole(output / "metrics.jsonl", lambda path: path.write_text(lines))

    total = args.sft_steps + args.steps
    with (
        open(output / "metrics.jsonl", "a") as log,
        tqdm(total=total, initial=step, disable=not sys.stderr.isatty()) as bar,
    ):
        while step < total:
            if step == args.sft_steps:
                reference = copy.deepcopy(model).requires_grad_(False).eval()
                optimizer, schedule = start(model, args.lr, args.steps)
                shares["before"] = evaluate(model, held_out, tokenizer, args.device)
            stage = "SFT" if reference is None else "DPO"
            rows = common.batch_at(pairs, step, args.batch_size, args.seed)
            fields = ("chosen",) if reference is None else ("chosen", "rejected")
            batch = common.stack(rows, fields, tokenizer.pad_token_id, args.device)
            if reference is None:
                loss, report = sft_loss(model, batch)
            else:
                loss, report = dpo_loss(model, reference, batch, args.beta, args.kl_coef)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            row = {"step": step, "stage": stage, "learning_rate": schedule.get_last_lr()[0]}
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            row |= {name: value.item() for name, value in report.items()}
            history.append(row)
            log.write(json.dumps(row) + "\n")
            shown = {name.split("/")[-1]: f"{row[name]:.3f}" for name in PANELS if name in row}
            bar.set_postfix(stage=stage, **shown)
            bar.update()
            step += 1
            if step % args.checkpoint_every == 0 or step == total:
                log.flush()
                state = {"step": step, "shares": shares, "rng": torch.get_rng_state(), "model": model.state_dict()}
                state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                state["reference"] = {} if reference is None else reference.state_dict()
                common.save_checkpoint(output, step, state)
    shares["after"] = evaluate(model, held_out, tokenizer, args.device)
    common.write_whole(output / "model", lambda path: [part.save_pretrained(path) for part in (model, tokenizer)])
    common.plot_metrics(history, PANELS, output / "curves.png", "Supervised training, then DPO")
    print(f"\n{'held-out share of':44}{'reference':>10}{'after DPO':>11}")
    for name, label in SHARES.items():
        print(f"{label:44}{shares['before'][name]:>10.3f}{shares['after'][name]:>11.3f}")
    print(f"\nmodel, metrics.jsonl and curves.png are in {output}")
    return shares


PANELS = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "reward accuracy", "kl": "KL (k3)"}
SHARES = {"preference": "pairs with log p(chosen) > log p(rejected)", "greedy": "greedy answers that are correct"}

if __name__ == "__main__":
    train(parse())

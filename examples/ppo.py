"""PPO: answers of the policy, a reward each, a value of every token, several epochs of clipped updates.

    python examples/ppo.py                    # a tiny Llama on the shipped data, minutes on a CPU
    python examples/ppo.py --kl-in loss --kl-estimator full
    python examples/ppo.py --model runs/reward/sft --reward-model runs/reward/model --lr 1e-3 --dataset ...
    torchrun --nproc-per-node=2 examples/ppo.py --parallel fsdp               # or ddp, tp: see parallel.py

Rows have a prompt. A step is a rollout, one answer to a prompt, with its updates: --num-ppo-epochs times
--num-mini-batches of --batch-size answers. Rewards come from the checking program, a function or a reward model;
r_t = r - beta k1 (Ziegler et al. 2019), or the KL stands in the loss. Log-probs of policy and reference are recomputed
at the precision of training by `fused_po.linear_logps`; `fused_po.gae` makes advantages of rewards and values.
"""

from __future__ import annotations

from functools import partial

import dataset
import loop
import models
import parallel
import rollouts
import torch
from torch import Tensor

import fused_po
from fused_po import losses

PANELS = {
    "objective/scores": "reward of the samples",
    "objective/kl": "KL to the reference, nats an answer",
    "loss/value_avg": "value loss",
    "eval_correct": "held-out greedy answers that are correct",
}


def parse(argv: list[str] | None = None):
    how = dict(warm_up=150, steps=80, batch_size=128, rates=(3e-6, 3e-5), eval_every=10, checkpoint_every=20)
    parser = loop.parser("ppo", __doc__, **how)
    add, flag = parser.add_argument, loop.argparse.BooleanOptionalAction
    add("--num-mini-batches", type=int, default=2, help="updates an epoch, each on --batch-size answers of the rollout")
    add("--num-ppo-epochs", type=int, default=1, help="times that a rollout is gone through")
    add("--kl-in", default="reward", choices=("reward", "loss"), help="where the KL to the reference stands")
    names = "k1 in the reward; k2 (the default), k3 or the exact KL (full) in the loss"
    add("--kl-estimator", choices=("k1", "k2", "k3", "full"), help=names)
    add("--kl-coef", type=float, default=0.08, help="weight of the KL, at first if it is adaptive")
    add("--kl-target", type=float, help="nats an answer that the weight is steered to; without it the weight is fixed")
    add("--kl-horizon", type=float, default=10000, help="answers in which the weight follows the target")
    stop = "a rollout's updates end after one that found the policy further than this from its start, nats a token"
    add("--max-update-kl", type=float, default=0.1, help=stop)
    add("--cliprange", type=float, default=0.2, help="the ratio is clipped to 1 +- this")
    add("--cliprange-value", type=float, default=0.2, help="values are clipped to +- this about the old ones")
    add("--vf-coef", type=float, default=0.1, help="weight of the value loss")
    add("--gamma", type=float, default=1.0, help="discount of rewards")
    add("--lam", type=float, default=1.0, help="lambda of GAE: 0 trusts the values, 1 the rewards")
    add("--whiten-rewards", action=flag, default=False, help="divide rewards by their standard deviation")
    parallel.add_flags(parser)
    positive = ("num_mini_batches", "num_ppo_epochs", "kl_horizon", "max_update_kl", "cliprange", "cliprange_value")
    args = rollouts.parse(parser, argv, (*positive, "timeout"), natural=("kl_coef", "vf_coef"))
    args.kl_estimator = args.kl_estimator or ("k1" if args.kl_in == "reward" else "k2")
    if (args.kl_in == "reward") != (args.kl_estimator == "k1"):
        where = f"--kl-estimator: got {args.kl_estimator} with --kl-in {args.kl_in}"
        loop.common.fail(f"{where}; k1 belongs into the reward, k2, k3 and full into the loss")
    if args.kl_target is not None and not (args.kl_target > 0 and args.kl_coef > 0):
        loop.common.fail(f"--kl-target: got {args.kl_target} with --kl-coef {args.kl_coef}; both must be above 0")
    return args


class ActorCritic(torch.nn.Module):
    """The policy, and the value of each token: a linear head on the policy's hidden states, 0 at first."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        weight = policy.get_output_embeddings().weight
        self.value = torch.nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)

    def values(self, hidden: Tensor) -> Tensor:
        """[B, T], at the precision of the head under autocast, too."""
        return self.value(hidden.to(self.value.weight.dtype)).squeeze(-1)


class Coefficient:
    """The KL's weight, fixed or steered to --kl-target; part of a checkpoint."""

    def __init__(self, args):
        fixed, adaptive = losses.FixedKLController, losses.AdaptiveKLController
        steered = args.kl_target is not None
        self.by = adaptive(args.kl_coef, args.kl_target, args.kl_horizon) if steered else fixed(args.kl_coef)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.by.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.by.value = state["value"]


def scored(engine: parallel.Engine, rows: list[dict], tokenizer, args) -> list[dict]:
    """The rows with old_logps, entropy, old_values and ref_logps of their answers' tokens, before the updates."""

    def values_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = models.hidden_states(engine.policy, batch, args)
        stats = rollouts.logps_of(engine.policy, hidden, batch, args, ("logps", "entropy"))
        return {"old_logps": stats.logps, "entropy": stats.entropy, "old_values": engine.module.values(hidden)}

    rows = rollouts.annotated(engine, rows, tokenizer, args, values_of)
    return rollouts.with_ref_logps(engine, rows, tokenizer, args)


def with_advantages(rows: list[dict], tokenizer, args, kl_coef: float) -> list[dict]:
    """The rows with advantages, white over the rollout, and returns of their answers' tokens."""
    _, mask = rollouts.stack(rows, tokenizer, args)
    old, ref, values = (rollouts.stacked(rows, name, mask) for name in ("old_logps", "ref_logps", "old_values"))
    rewards = rollouts.column(rows, "reward").to(values)
    if args.whiten_rewards:
        rewards = losses.whiten(rewards, shift_mean=False)
    beta = kl_coef if args.kl_in == "reward" else 0.0
    rewards = losses.kl_in_reward(rewards, old, ref, mask, beta=beta)
    advantages, returns = fused_po.gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
    return rollouts.split({"advantages": losses.whiten(advantages, mask), "returns": returns}, mask, rows)


def kl_term(logps: Tensor, old: Tensor, ref: Tensor, args) -> Tensor:
    """[B, T]: k2 or k3 with the KL's gradient, for answers of the policy before the updates, too."""
    return losses.kl_loss(logps, ref, args.kl_estimator, old_logps=old, straight_through=args.kl_estimator == "k2")


def ppo_loss(actor: ActorCritic, frozen, tokenizer, rows: list[dict], args, kl_coef: float, tokens: int):
    """(loss, metrics) of rows that are part of an update over so many tokens: shares of its means."""
    batch, mask = rollouts.stack(rows, tokenizer, args)
    names = ("old_logps", "ref_logps", "old_values", "advantages", "returns")
    old, ref, old_values, advantages, returns = (rollouts.stacked(rows, name, mask) for name in names)
    hidden, router_loss = models.forward(actor.policy, batch, args)
    if args.kl_estimator == "full":
        stats = rollouts.exact_kl(actor.policy, frozen, hidden, batch, args)
        logps, kl = stats.logps, stats.kl
    else:
        logps = rollouts.logps_of(actor.policy, hidden, batch, args).logps
        kl = kl_term(logps, old, ref, args) if args.kl_in == "loss" else torch.zeros_like(logps)
    policy = losses.ppo_clip(logps, old, advantages, mask, epsilon=args.cliprange)
    value = losses.value_loss(actor.values(hidden), old_values, returns, mask, clip_eps=args.cliprange_value)
    parts = {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "loss/kl_avg": kl,
        "loss/router_avg": router_loss.expand_as(mask),
        "policy/approxkl_avg": losses.kl_estimate(old, logps.detach(), "k3"),
        "policy/clipfrac_avg": ((logps - old).exp().sub(1).abs() > args.cliprange).to(policy.dtype),
    }
    means = {name: fused_po.aggregate(part, mask, num_tokens=tokens) for name, part in parts.items()}
    loss = means["loss/policy_avg"] + args.vf_coef * means["loss/value_avg"] + kl_coef * means["loss/kl_avg"]
    return loss + means["loss/router_avg"], means


def updates(learner, tokenizer, rows: list[dict], args, kl_coef: float) -> dict[str, float]:
    """The updates on a rollout; means of their metrics, and their number."""
    made: list[dict[str, float]] = []
    epochs = (torch.randperm(len(rows)).split(args.batch_size) for _ in range(args.num_ppo_epochs))
    for places in (some for epoch in epochs for some in epoch):
        part = [rows[i] for i in places.tolist()]
        how = dict(args=args, kl_coef=kl_coef, tokens=dataset.scored_tokens(part, rollouts.FIELDS))
        loss_of = partial(ppo_loss, learner.model, learner.engine.frozen, tokenizer, **how)
        made.append(loop.update(learner, part, loss_of, args))
        if made[-1]["policy/approxkl_avg"] > args.max_update_kl:
            break
    return {name: sum(one[name] for one in made) / len(made) for name in made[0]} | {"val/updates": len(made)}


def train_steps(run: loop.Run, engine, tokenizer, prompts: list[dict], args, judge, evaluate) -> None:
    """--steps rollouts with their updates."""
    learner = loop.learner(engine, args.lr, args.steps * args.num_ppo_epochs * args.num_mini_batches)
    coefficient = Coefficient(args)

    def one_step(number: int) -> dict[str, float]:
        asked = dataset.batch_at(prompts, number, args.batch_size * args.num_mini_batches, args.seed)
        with engine.gathered():
            rows = rollouts.rewarded(rollouts.rollout(engine.policy, tokenizer, asked, args, judge))
        rows = scored(engine, rows, tokenizer, args)
        sampled, beta = rollouts.sampling_metrics(rows), coefficient.by.value
        kl = sum((row["old_logps"] - row["ref_logps"]).sum().item() for row in rows) / len(rows)
        metrics = {"objective/scores": sampled.pop("reward"), "objective/kl": kl, "kl_coef": beta, **sampled}
        metrics["objective/rlhf_reward"] = metrics["objective/scores"] - beta * kl
        metrics["objective/entropy"] = rollouts.mean_of(rows, "entropy")
        rows = with_advantages(rows, tokenizer, args, beta)
        metrics |= updates(learner, tokenizer, rows, args, beta)
        coefficient.by.update(kl, len(rows))
        return metrics

    run.train("PPO", learner, args.steps, one_step, evaluate, {"kl_coef": coefficient})


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns what `rollouts.measure` gave before and after."""
    return rollouts.train(args, PANELS, "PPO", train_steps, ActorCritic)


if __name__ == "__main__":
    loop.main(train, parse())

"""PPO: sampled answers, a reward for each, a value for each token, and several epochs of clipped updates.

    python examples/ppo.py                    # a tiny Llama on the shipped data, minutes on a CPU
    python examples/ppo.py --kl-in loss --kl-estimator full
    python examples/ppo.py --model runs/reward/sft --reward-model runs/reward/model --lr 1e-3 --dataset ...
    torchrun --nproc-per-node=2 examples/ppo.py --parallel fsdp               # or ddp, tp

Rows have a prompt. A step is a rollout with one answer per prompt, and its updates: --num-ppo-epochs times
--num-mini-batches of --batch-size answers. Rewards come from the checking program, a function or a reward model. The
KL to the reference is in the reward, r_t = r - beta k1 (Ziegler et al. 2019), or in the loss. Log-probs of policy and
reference come from `fused_po.linear_logps` at training precision; `fused_po.gae` computes advantages.
"""

from __future__ import annotations

from functools import partial

import sft
import torch
from torch import Tensor
from trainer import dataset, flags, optimization, parallel, rollouts, scoring
from trainer.errors import fail
from trainer.training_run import Run, main

import fused_po
from fused_po import losses

PANELS = {
    "objective/scores": "reward of sampled answers",
    "objective/kl": "KL to the reference, nats per answer",
    "loss/value_avg": "value loss",
    "eval_correct": "held-out greedy answers that are correct",
}


def parse(argv: list[str] | None = None):
    defaults = dict(warm_up=150, steps=80, batch_size=128, rates=(3e-6, 3e-5), eval_every=10, checkpoint_every=20)
    parser = flags.parser("ppo", __doc__, **defaults)
    add = parser.add_argument
    add("--num-mini-batches", type=int, default=2, help="updates per epoch, each on --batch-size answers of a rollout")
    add("--num-ppo-epochs", type=int, default=1, help="passes over the answers of a rollout")
    add("--kl-in", default="reward", choices=("reward", "loss"), help="where the KL to the reference is added")
    text = "k1 in the reward; in the loss k2, k3 or the exact KL (full). Default: k1 or k2"
    add("--kl-estimator", choices=("k1", "k2", "k3", "full"), help=text)
    add("--kl-coef", type=float, default=0.08, help="weight of the KL; with --kl-target the initial weight")
    add("--kl-target", type=float, help="adapt the weight to this KL, in nats per answer. Default: a fixed weight")
    add("--kl-horizon", type=float, default=10000, help="answers over which the weight adapts to --kl-target")
    text = "stop a rollout's updates once the policy is this far from its start, in nats per token"
    add("--max-update-kl", type=float, default=0.1, help=text)
    add("--cliprange", type=float, default=0.2, help="the ratio is clipped to 1 +- this")
    add("--cliprange-value", type=float, default=0.2, help="values are clipped to the old values +- this")
    add("--vf-coef", type=float, default=0.1, help="weight of the value loss")
    add("--gamma", type=float, default=1.0, help="discount factor of rewards")
    add("--lam", type=float, default=1.0, help="lambda of GAE, from 0 (rely on the values) to 1 (on the rewards)")
    text = "divide rewards by their standard deviation"
    add("--whiten-rewards", action=flags.SWITCH, default=False, help=text)
    parallel.add_flags(parser)
    positive = ("num_mini_batches", "num_ppo_epochs", "kl_horizon", "max_update_kl", "cliprange", "cliprange_value")
    args = rollouts.parse(parser, argv, (*positive, "timeout"), natural=("kl_coef", "vf_coef"))
    args.kl_estimator = args.kl_estimator or ("k1" if args.kl_in == "reward" else "k2")
    if (args.kl_in == "reward") != (args.kl_estimator == "k1"):
        got = f"--kl-estimator: got {args.kl_estimator} with --kl-in {args.kl_in}"
        fail(f"{got}; k1 is for the reward, k2, k3 and full are for the loss")
    if args.kl_target is not None and not (args.kl_target > 0 and args.kl_coef > 0):
        fail(f"--kl-target: got {args.kl_target} with --kl-coef {args.kl_coef}; both must be above 0")
    return args


class ActorCritic(torch.nn.Module):
    """The policy and a value head: a linear layer on the policy's hidden states, initialized to 0."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        weight = policy.get_output_embeddings().weight
        self.value = torch.nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)

    def values(self, hidden: Tensor) -> Tensor:
        """Values [B, T], in the dtype of the value head, also under autocast."""
        return self.value(hidden.to(self.value.weight.dtype)).squeeze(-1)


class Coefficient:
    """The weight of the KL, fixed or adapted to --kl-target; it is saved in checkpoints."""

    def __init__(self, args):
        fixed, adaptive = losses.FixedKLController, losses.AdaptiveKLController
        adapts = args.kl_target is not None
        self.controller = adaptive(args.kl_coef, args.kl_target, args.kl_horizon) if adapts else fixed(args.kl_coef)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.controller.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.controller.value = state["value"]


def scored(engine: parallel.Engine, rows: list[dict], tokenizer, args) -> list[dict]:
    """Add old_logps, entropy, old_values and ref_logps of the answers' tokens to the rows, before the updates."""

    def values_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = scoring.hidden_states(engine.policy, batch, args)
        stats = rollouts.logps_of(engine.policy, hidden, batch, args, ("logps", "entropy"))
        return {"old_logps": stats.logps, "entropy": stats.entropy, "old_values": engine.module.values(hidden)}

    rows = rollouts.annotated(engine, rows, tokenizer, args, values_of)
    return rollouts.with_ref_logps(engine, rows, tokenizer, args)


def with_advantages(rows: list[dict], tokenizer, args, kl_coef: float) -> list[dict]:
    """Add advantages, whitened over the rollout, and returns of the answers' tokens to the rows."""
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
    """k2 or k3 [B, T] with the gradient of the KL, also for answers drawn from the policy before the updates."""
    return losses.kl_loss(logps, ref, args.kl_estimator, old_logps=old, straight_through=args.kl_estimator == "k2")


def ppo_loss(actor: ActorCritic, frozen, tokenizer, rows: list[dict], args, kl_coef: float, tokens: int):
    """(loss, metrics) of a part of an update's answers, divided by the tokens of the whole update: see `take_step`."""
    batch, mask = rollouts.stack(rows, tokenizer, args)
    names = ("old_logps", "ref_logps", "old_values", "advantages", "returns")
    old, ref, old_values, advantages, returns = (rollouts.stacked(rows, name, mask) for name in names)
    hidden, router_loss = scoring.forward(actor.policy, batch, args)
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
    """The updates on a rollout; returns the means of their metrics, and their number."""
    made: list[dict[str, float]] = []
    epochs = (torch.randperm(len(rows)).split(args.batch_size) for _ in range(args.num_ppo_epochs))
    for places in (some for epoch in epochs for some in epoch):
        part = [rows[i] for i in places.tolist()]
        options = dict(args=args, kl_coef=kl_coef, tokens=dataset.scored_tokens(part, rollouts.FIELDS))
        loss_of = partial(ppo_loss, learner.model, learner.engine.frozen, tokenizer, **options)
        made.append(optimization.take_step(learner, part, loss_of, args))
        if made[-1]["policy/approxkl_avg"] > args.max_update_kl:
            break
    return {name: sum(one[name] for one in made) / len(made) for name in made[0]} | {"val/updates": len(made)}


def train_steps(run: Run, engine, tokenizer, prompts: list[dict], args, judge, evaluate) -> None:
    """--steps rollouts with their updates."""
    learner = optimization.learner(engine, args.lr, args.steps * args.num_ppo_epochs * args.num_mini_batches)
    coefficient = Coefficient(args)
    for step, metrics in run.steps("PPO", learner, args.steps, evaluate, {"kl_coef": coefficient}):
        asked = dataset.batch_at(prompts, step, args.batch_size * args.num_mini_batches, args.seed)
        with engine.gathered():
            rows = rollouts.rewarded(rollouts.rollout(engine.policy, tokenizer, asked, args, judge))
        rows = scored(engine, rows, tokenizer, args)
        sampled, beta = rollouts.sampling_metrics(rows), coefficient.controller.value
        kl = sum((row["old_logps"] - row["ref_logps"]).sum().item() for row in rows) / len(rows)
        metrics |= {"objective/scores": sampled.pop("reward"), "objective/kl": kl, "kl_coef": beta, **sampled}
        metrics["objective/rlhf_reward"] = metrics["objective/scores"] - beta * kl
        metrics["objective/entropy"] = rollouts.mean_of(rows, "entropy")
        rows = with_advantages(rows, tokenizer, args, beta)
        metrics |= updates(learner, tokenizer, rows, args, beta)
        coefficient.controller.update(kl, len(rows))


def train(args) -> dict[str, dict[str, float]]:
    """The whole run; returns the results of `rollouts.measure` before and after."""
    return rollouts.train(args, PANELS, "PPO", train_steps, sft.warm_up, ActorCritic)


if __name__ == "__main__":
    main(train, parse())

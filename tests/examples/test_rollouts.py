"""The sampling examples: masks, log-probs, advantages, losses, KL and rewards against independent code."""

import itertools
import json
import math

import eager_ops
import example_runs
import pytest
import torch
from example_runs import metrics, run, script, weights

import fused_po
from fused_po import losses

from trainer import dataset, models, parallel, plots, reward_sources, rollouts, setup  # isort: skip

ppo, grpo = script("ppo"), script("grpo")
TOYS = example_runs.SUPPORT / "toy_rewards.py"
LETTERS = ("--reward-function", f"{TOYS}:letters")
ALONE = ("--sft-steps", "0", "--max-completion-length", "6", *LETTERS)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return example_runs.small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: plots.pyplot().close(figure))


def prepared(name, words, *more):
    """(args, model in float64, reference with other weights or None, tokenizer, rows of answers)."""
    args = script(name).parse([*words, *ALONE, *more])
    model, tokenizer, prompts, _ = setup.start(args, setup.load_rows(args, "prompt"))
    model = model.double()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)[tokenizer.eos_token_id].add_(0.05)  # more confident, so that some answers end
    frozen = models.freeze(model, args)
    model = models.adapt(model, args).double()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
    judge = reward_sources.judge_from(args, tokenizer, prompts)
    rows = rollouts.rollout(model, tokenizer, prompts[:6], args, judge, samples=2)
    return args, model, frozen, tokenizer, rows


def by_hand(model, row, args):
    """Log-probs [n, V] at the positions of one answer, from a forward of that answer alone without padding."""
    prompt, answer = row["prompt_ids"], row["answer_ids"]
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return (logits / args.temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", ["1.0", "0.7"])
def test_rollouts_hold_samples_and_their_log_probs(words, temperature, seed):
    args, model, frozen, tokenizer, rows = prepared(
        "grpo", words, "--temperature", temperature, "--micro-batch-size", "5"
    )
    assert len(rows) == 12 and [r["prompt_ids"] for r in rows[::2]] == [r["prompt_ids"] for r in rows[1::2]]
    assert len({tuple(row["answer_ids"]) for row in rows}) > 6  # sampled, not decoded greedily
    for row in rows:
        ids, end = row["answer_ids"], tokenizer.eos_token_id
        assert end not in ids[:-1] and row["ended"] == (ids[-1] == end) and 1 <= len(ids) <= 6
        assert row["ended"] or len(ids) == 6
        assert row["answer_text"] == tokenizer.decode(ids, skip_special_tokens=True)
        toy = sum(ord(letter) % 7 for letter in row["answer_text"]) / (1 + 7 * len(row["answer_text"]))
        assert row["reward"] == pytest.approx(toy - (0 if row["ended"] else 1))
    engine = parallel.Engine(args, model, frozen)
    rows = rollouts.with_old_logps(engine, rows, tokenizer, args)
    rows = rollouts.with_ref_logps(engine, rows, tokenizer, args)
    for row in rows:
        at = torch.tensor(row["answer_ids"])[:, None]
        for name, of in (("old_logps", model), ("ref_logps", frozen)):
            torch.testing.assert_close(row[name], by_hand(of, row, args).gather(1, at)[:, 0], rtol=1e-9, atol=1e-9)
        logs = by_hand(model, row, args)
        torch.testing.assert_close(row["entropy"], -(logs.exp() * logs).sum(1), rtol=1e-9, atol=1e-9)
    assert any(not torch.allclose(row["old_logps"], row["ref_logps"]) for row in rows)


def test_a_seed_repeats_a_rollout_and_keeps_the_generator(words):
    args, model, _, tokenizer, rows = prepared("grpo", words)
    judge, state = reward_sources.by_program, torch.get_rng_state()
    first, again, other = (rollouts.rollout(model, tokenizer, rows, args, judge, seed=n) for n in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first == again and first != other


@pytest.mark.parametrize("lora", [False, True])
def test_the_generation_config_of_a_model(words, lora):
    """The EOS tokens of its generation config end answers. Its penalties are ignored: they would change the policy."""
    args, model, _, tokenizer, rows = prepared("grpo", words, *(["--lora"] * lora))
    how = dict(args=args, judge=reward_sources.by_program, seed=1)
    plain = rollouts.rollout(model, tokenizer, rows, **how)
    config = model.get_base_model().generation_config if lora else model.generation_config
    config.repetition_penalty, config.top_k, config.min_p = 50.0, 1, 0.9
    assert rollouts.rollout(model, tokenizer, rows, **how) == plain
    assert config.repetition_penalty == 50.0
    common = next(ids[1] for ids in (row["answer_ids"] for row in plain) if len(ids) > 2)
    config.eos_token_id = [tokenizer.eos_token_id, common]
    for row, before in zip(rollouts.rollout(model, tokenizer, rows, **how), plain):
        assert not {*config.eos_token_id} & {*row["answer_ids"][:-1]}
        assert row["ended"] == (row["answer_ids"][-1] in config.eos_token_id)
        if common in before["answer_ids"]:
            assert row["ended"]


def test_token_values_round_trip_through_rows(words, seed):
    args, _, _, tokenizer, rows = prepared("grpo", words)
    _, mask = rollouts.stack(rows, tokenizer, args)
    assert mask.sum(1).tolist() == [len(row["answer_ids"]) for row in rows]
    values = torch.randn(mask.shape)
    rows = rollouts.split({"x": values}, mask, rows)
    assert torch.equal(rollouts.stacked(rows, "x", mask), torch.where(mask, values, 0))
    for i, row in enumerate(rows):
        first = len(row["prompt_ids"]) - 1
        assert torch.equal(row["x"], values[i, first : first + len(row["answer_ids"])])


@pytest.mark.parametrize("more", [(), ("--kl-in", "loss", "--lam", "0.9", "--gamma", "0.8")])
def test_ppos_advantages_against_a_loop_over_tokens(words, more, seed):
    args, model, frozen, tokenizer, rows = prepared("ppo", words, *more)
    actor = ppo.ActorCritic(model)
    torch.nn.init.normal_(actor.value.weight)
    rows = ppo.scored(parallel.Engine(args, actor, frozen), rows, tokenizer, args)
    beta = 0.3 if args.kl_in == "reward" else 0.0
    found = ppo.with_advantages(rows, tokenizer, args, kl_coef=0.3)
    wanted = []
    for row, got in zip(rows, found):
        k1, values = (row["old_logps"] - row["ref_logps"]).tolist(), row["old_values"].tolist()
        rewards = [-beta * k for k in k1]
        rewards[-1] += row["reward"]
        advantage, advantages = 0.0, []
        for t in reversed(range(len(rewards))):
            after = values[t + 1] if t + 1 < len(values) else 0.0
            advantage = rewards[t] + args.gamma * after - values[t] + args.gamma * args.lam * advantage
            advantages.insert(0, advantage)
        returns = torch.tensor([a + v for a, v in zip(advantages, values)], dtype=torch.float64)
        torch.testing.assert_close(got["returns"], returns, rtol=1e-9, atol=1e-9)
        wanted += advantages
    white = torch.tensor(wanted, dtype=torch.float64)
    white = (white - white.mean()) / (white.var() + 1e-8).sqrt()
    torch.testing.assert_close(torch.cat([row["advantages"] for row in found]), white, rtol=1e-9, atol=1e-9)


def ppo_by_hand(actor, frozen, rows, args, kl_coef):
    """PPO's loss of a whole update, one answer at a time, from full logits."""
    policy_loss, value_loss, kl_loss, tokens = 0.0, 0.0, 0.0, 0
    for row in rows:
        logs, at = by_hand(actor.policy, row, args), torch.tensor(row["answer_ids"])[:, None]
        logps, a = logs.gather(1, at)[:, 0], row["advantages"]
        ratio = (logps - row["old_logps"]).exp()
        policy_loss = policy_loss - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        hidden = actor.policy.model(input_ids=ids).last_hidden_state[0, len(row["prompt_ids"]) - 1 : -1]
        value, old = actor.value(hidden)[:, 0], row["old_values"]
        near = old + (value - old).clamp(-0.2, 0.2)
        value_loss = value_loss + torch.maximum((value - row["returns"]) ** 2, (near - row["returns"]) ** 2).sum() / 2
        with torch.no_grad():
            ref = by_hand(frozen, row, args)
        r = logps - ref.gather(1, at)[:, 0]
        kl_loss = (
            kl_loss
            + {
                "k1": lambda: 0 * r,  # noqa: B023
                "k2": lambda: ratio.detach() * r**2 / 2,  # noqa: B023
                "k3": lambda: ratio * ((-r).exp() - 1 + r),  # noqa: B023
                "full": lambda: (logs.exp() * (logs - ref)).sum(1),  # noqa: B023
            }[args.kl_estimator]().sum()
        )
        tokens += len(row["answer_ids"])
    return (policy_loss + args.vf_coef * value_loss + kl_coef * kl_loss) / tokens


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_ppos_loss_in_parts_equals_the_loss_by_hand(words, estimator, seed):
    where = ("--kl-in", "reward" if estimator == "k1" else "loss", "--kl-estimator", estimator)
    args, model, frozen, tokenizer, rows = prepared("ppo", words, *where)
    actor = ppo.ActorCritic(model)
    torch.nn.init.normal_(actor.value.weight, std=0.1)
    rows = ppo.scored(parallel.Engine(args, actor, frozen), rows, tokenizer, args)
    rows = ppo.with_advantages(rows, tokenizer, args, 0.3)
    with torch.no_grad():  # the policy has changed since sampling
        for parameter in actor.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    tokens = dataset.scored_tokens(rows, rollouts.FIELDS)
    grads = []
    for loss in (
        sum(ppo.ppo_loss(actor, frozen, tokenizer, rows[i : i + 5], args, 0.3, tokens)[0] for i in (0, 5, 10)),
        ppo_by_hand(actor, frozen, rows, args, 0.3),
    ):
        grads.append([loss.detach(), *torch.autograd.grad(loss, list(actor.parameters()))])
    for ours, theirs in zip(*grads):  # transformers' RMSNorm computes in fp32 in a float64 model too
        assert (ours - theirs).norm() <= 8 * torch.finfo(torch.float32).eps * theirs.norm()


@pytest.mark.parametrize("loss_type", sorted(losses.GRPO_MODES))
def test_grpos_losses_in_parts_equal_the_whole_update(words, loss_type, seed):
    """Losses and gradients for every mode of aggregation, in parts of 5, 5 and 2 answers."""
    args, model, frozen, tokenizer, rows = prepared("grpo", words, "--loss-type", loss_type, "--num-generations", "2")
    engine = parallel.Engine(args, model, frozen)
    rows = rollouts.with_old_logps(engine, grpo.with_advantages(rows, args), tokenizer, args)
    rows = rollouts.with_ref_logps(engine, rows, tokenizer, args)
    tokens, grads = dataset.scored_tokens(rows, rollouts.FIELDS), []
    for size in (12, 5):
        parts = [rows[i : i + size] for i in range(0, 12, size)]
        loss = sum(grpo.grpo_loss(model, tokenizer, part, args, tokens, 12)[0] for part in parts)
        grads.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for whole, part in zip(*grads):
        torch.testing.assert_close(part, whole, rtol=1e-8, atol=1e-10)
    assert any(grad.abs().max() > 1e-3 for grad in grads[0])


def test_groups_with_equal_rewards_are_replaced(words):
    args, model, _, tokenizer, rows = prepared("grpo", words, "--batch-size", "8", "--num-generations", "2")
    asked = []

    def judge(rows):  # in the first rollout only the second prompt's answers get different rewards
        asked.append(len(rows))
        return [float(len(asked) > 1 or i == 2) * (i % 2 == 0) for i in range(len(rows))]

    args.missing_eos_penalty = 0.0
    chosen, drawn = grpo.drawn_groups(model, tokenizer, rows, args, judge, 0)
    assert asked == [8, 8] and len(drawn) == 16 and len(chosen) == 8
    assert [row["reward"] for row in chosen] == [1.0, 0.0] * 4
    _, drawn = grpo.drawn_groups(model, tokenizer, rows, args, lambda rows: [0.0] * len(rows), 0)
    assert len(drawn) == 8 * args.max_draws  # then the groups that exist


def test_online_pairs_have_different_rewards(words):
    rows = [{"prompt_ids": [1, i // 2], "answer_ids": [5, i], "reward": r} for i, r in enumerate([0, 1, 1, 1, 2, 0.5])]
    assert script("online_dpo").pairs_of(rows) == [
        {"prompt_ids": [1, 0], "chosen_ids": [5, 1], "rejected_ids": [5, 0]},
        {"prompt_ids": [1, 2], "chosen_ids": [5, 4], "rejected_ids": [5, 5]},
    ]


@pytest.mark.parametrize("lora", [False, True])
def test_the_measured_kl_is_the_sum_over_the_vocabulary(words, lora, seed):
    args, model, frozen, tokenizer, rows = prepared("ppo", words, *(["--lora"] * lora))
    assert (frozen is None) == lora
    found = rollouts.measure(model, frozen, tokenizer, rows, args, reward_sources.judge_from(args, tokenizer, rows))
    answered = rollouts.rollout(model, tokenizer, rows, args, reward_sources.by_program, seed=args.seed)
    nats = 0.0
    for row in answered:
        with torch.no_grad():
            logs = by_hand(model, row, args)
        with models.reference(model, frozen) as scorer:
            nats += (logs.exp() * (logs - by_hand(scorer, row, args))).sum().item()
    assert found["kl"] == pytest.approx(nats / len(rows), rel=1e-8) and found["kl"] > 1e-3


def test_the_exact_kl_in_the_loss_equals_plain_pytorch(words, tmp_path, monkeypatch):
    """Three steps of PPO with --kl-estimator full, with and without the fused ops."""
    more = ("--kl-in", "loss", "--kl-estimator", "full", "--kl-coef", "1", "--steps", "3", "--batch-size", "4")
    build = models.build
    monkeypatch.setattr(models, "build", lambda *args: (lambda m, t: (m.double(), t))(*build(*args)))
    run("ppo", [*words, *ALONE, *more], tmp_path / "fused")
    eager_ops.install(monkeypatch)

    def linear_kl(hidden, weight, ref_hidden, ref_weight, labels, *, bias, ref_bias, **how):
        logs = eager_ops.log_probs(hidden, weight, bias, **how)
        refs = eager_ops.log_probs(ref_hidden, ref_weight, ref_bias, **how).detach()
        logps = eager_ops.linear_logps(hidden, weight, labels, bias, **how).logps
        return fused_po.KLStats((logs.exp() * (logs - refs)).sum(-1).where(labels >= 0, 0), logps, None, None)

    monkeypatch.setattr(fused_po, "linear_kl", linear_kl)
    run("ppo", [*words, *ALONE, *more], tmp_path / "plain")
    ours, theirs = weights(tmp_path / "fused"), weights(tmp_path / "plain")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-9)
    assert metrics(tmp_path / "fused")[-1]["loss/kl_avg"] > 0


def test_updates_stop_at_the_kl_limit(words, tmp_path):
    more = ("--steps", "2", "--batch-size", "4", "--num-ppo-epochs", "4", "--lr", "0.1")
    run("ppo", [*words, *ALONE, *more], tmp_path / "run")
    counts = [row["val/updates"] for row in metrics(tmp_path / "run")]
    assert min(counts) < 8
    run("ppo", [*words, *ALONE, *more, "--max-update-kl", "1e9"], tmp_path / "on")
    assert [row["val/updates"] for row in metrics(tmp_path / "on")] == [8, 8]


def test_the_kl_coefficient_follows_its_target(words, tmp_path):
    more = ("--steps", "3", "--batch-size", "4", "--kl-target", "1e-9", "--kl-horizon", "16", "--lr", "0.01")
    run("ppo", [*words, *ALONE, *more], tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert rows[0]["objective/kl"] == 0 and rows[0]["kl_coef"] == 0.08
    for row, after in itertools.pairwise(rows):
        error = max(-0.2, min(0.2, row["objective/kl"] / 1e-9 - 1))
        assert after["kl_coef"] == pytest.approx(row["kl_coef"] * (1 + error * 8 / 16), rel=1e-9)


BROKEN = {
    "raising": r"raised ZeroDivisionError: division by zero \(line 11\)",
    "undefined": r"returned nan for '.*' to '.*'; expected a finite number",
    "short": r"returned \d+ rewards, expected a list of \d+ numbers, one per answer",
    "words": r"returned 'good' for '.*' to '.*'; expected a finite number",
    "missing": r"cannot be loaded \(AttributeError: .*missing",
}


@pytest.mark.parametrize("name", BROKEN)
def test_rewards_that_are_none(name, words, tmp_path):
    given = (*ALONE[:-1], f"{TOYS}:{name}")
    with pytest.raises(SystemExit, match=f"--reward-function:? .*{BROKEN[name]}"):
        run("grpo", [*words, *given, "--steps", "2", "--batch-size", "4"], tmp_path / "run")


@pytest.mark.parametrize("name", ["ppo", "grpo", "online_dpo"])
def test_a_reward_that_fails_during_a_run_keeps_the_last_checkpoint(name, words, tmp_path, capsys):
    path = tmp_path / "reward.py"
    good = TOYS.read_text()
    path.write_text(
        good.replace("return [sum", "assert len(calls) != 4; calls.append(1); return [sum") + "\ncalls = []"
    )
    given = (*ALONE[:-1], f"{path}:letters", "--steps", "4", "--batch-size", "4", "--checkpoint-every", "1")
    given = [*words, *given, "--eval-every", "0"]
    with pytest.raises(SystemExit, match="raised AssertionError"):
        run(name, given, tmp_path / "run")  # the first call is the evaluation, the fifth the fourth step
    assert f"--resume --output {tmp_path / 'run'} continues from step 3" in capsys.readouterr().err
    path.write_text(good)
    resumed = run(name, given, tmp_path / "run", "--resume")
    assert resumed == run(name, given, tmp_path / "whole")
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_reward_model_as_the_reward(words, tmp_path):
    """Rewards are the scalar head's output for prompt and answer; a model with another tokenizer is refused."""
    given = ["--sft-steps", "2", "--steps", "2", "--batch-size", "4", "--pairs", "given", "--eval-every", "0"]
    run("reward", [*words, *given], tmp_path / "reward")
    folder = tmp_path / "reward" / "model"
    args, _, _, tokenizer, rows = prepared("grpo", words)
    judge = reward_sources.by_model(str(folder), tokenizer, args)
    model = models.load("AutoModelForSequenceClassification", folder, args, num_labels=1)
    for row, reward in zip(rows, judge(rows)):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row["prompt_ids"] + row["answer_ids"]])).logits[0, 0]
        assert reward == pytest.approx(alone.item(), rel=1e-4, abs=1e-5)
    with pytest.raises(SystemExit, match=r"--reward-model: .* contains no model"):
        reward_sources.by_model(str(tmp_path), tokenizer, args)
    tokenizer.add_tokens(["another"])
    with pytest.raises(SystemExit, match=r"--reward-model: .* has a different tokenizer"):
        reward_sources.by_model(str(folder), tokenizer, args)


WRONG = [
    ("ppo", ("--kl-estimator", "k2"), r"--kl-estimator: got k2 with --kl-in reward; k1 is for the reward"),
    ("ppo", ("--kl-in", "loss", "--kl-estimator", "k1"), r"--kl-estimator: got k1 with --kl-in loss"),
    ("ppo", ("--kl-target", "1", "--kl-coef", "0"), r"--kl-target: got 1.0 with --kl-coef 0.0; both"),
    ("ppo", ("--reward-model", "x"), r"--reward-function: given together with --reward-model"),
    ("ppo", ("--max-completion-length", "600"), r"--max-length: got 1024, less than .* 512 \+ 600 tokens"),
    ("grpo", ("--num-generations", "3"), r"--num-generations: got 3, expected 2 or more and a divisor of .* 256"),
    ("online_dpo", ("--missing-eos-penalty", "-1"), r"--missing-eos-penalty: got -1.0, expected 0 or more"),
]


@pytest.mark.parametrize("name, given, message", WRONG)
def test_incompatible_flags(name, given, message, words):
    with pytest.raises(SystemExit, match=message):
        script(name).parse([*words, *LETTERS, *given])


def test_rows_with_only_prompts(tmp_path, words):
    """Rows with only prompts work with a given model.

    There is nothing to imitate, and the checking program refuses them.
    """
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}.", "number": n}) + "\n" for n in range(8)))
    given = ["--dataset", str(path), "--test-dataset", str(tmp_path / "test.jsonl"), "--device", "cpu"]
    (tmp_path / "test.jsonl").write_text(path.read_text())
    with pytest.raises(SystemExit, match=r"--sft-steps: the data set has prompts without answers"):
        run("grpo", given, tmp_path / "sft")
    with pytest.raises(
        SystemExit, match=r"the checking program cannot judge answers to 'Say 0.'; give --reward-model or"
    ):
        run("grpo", [*given, "--sft-steps", "0"], tmp_path / "unknown")
    rewards = tmp_path / "numbers.py"
    rewards.write_text("def score(prompts, completions, number): return [n / 10 for n in number]")
    given += ["--sft-steps", "0", "--reward-function", f"{rewards}:score", "--missing-eos-penalty", "0"]
    shares = run("online_dpo", [*given, "--steps", "1", "--batch-size", "8"], tmp_path / "run")
    assert math.isnan(shares["after"]["correct"]) and shares["after"]["reward"] == pytest.approx(0.35)
    assert metrics(tmp_path / "run")[0]["pairs"] == 0  # both answers to a prompt get the same reward

"""examples/dpo.py and ppo.py on several processes: DDP, FSDP2, TP and FSDP2 x TP train as one process does."""

import os
import re
import shutil
import signal
import time

import example_runs
import pytest
import torch
import transformers
from example_runs import metrics, script, weights
from rank_pool import GROUP_TIMEOUT, Ranks

from trainer import (  # isort: skip
    checkpoints,
    dataset,
    formats,
    models,
    parallel,
    plots,
    rollouts,
    run_files,
    sampling,
    setup,
)

STEPS = 10
SHORT = ("--steps", f"{STEPS}", "--batch-size", "7", "--sft-steps", "0")  # 7: not divisible by the number of ranks
PPO = ("--num-mini-batches", "1", "--num-ppo-epochs", "2", "--max-update-kl", "9")
PPO += ("--reward-function", f"{example_runs.SUPPORT / 'toy_rewards.py'}:letters")
ENGINES = {
    "ddp": ("--parallel", "ddp"),
    "ddp in parts": ("--parallel", "ddp", "--micro-batch-size", "2"),
    "fsdp": ("--parallel", "fsdp"),
    "fsdp in parts": ("--parallel", "fsdp", "--micro-batch-size", "3"),
    "tp": ("--parallel", "tp"),
}
OF_FOUR = {
    "fsdp": ("--parallel", "fsdp", "--micro-batch-size", "1"),
    "tp": ("--parallel", "tp"),
    "fsdp x tp": ("--parallel", "fsdp", "--tp", "2"),
}


@pytest.fixture(scope="module")
def two():
    """Two processes, started once."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags for small data and a start model with a vocabulary of 167 tokens, which neither 2 nor 4 divides."""
    folder = tmp_path_factory.mktemp("distributed")
    data = example_runs.small_data(folder, uneven=True)
    args = script("dpo").parse(data)
    tokenizer = models.train_tokenizer(formats.texts_of(dataset.read(args.dataset, "train")), vocab_size=167)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape)
    assert len(tokenizer) == 167
    models.save(folder / "model", transformers.LlamaForCausalLM(config), tokenizer)
    return [*data, "--model", str(folder / "model"), "--lr", "1e-3", "--sft-lr", "1e-3"]


def sample_from_data(model, tokenizer, rows, args, longest, **how):
    """Replaces sampling: answers from the data, every third one rejected, so that rewards differ."""
    answers = [row["rejected_ids" if sum(row["prompt_ids"]) % 3 == 0 else "chosen_ids"][:longest] for row in rows]
    return [{**row, "answer_ids": ids, "answer_text": tokenizer.decode(ids)} for row, ids in zip(rows, answers)]


def trained_parameters(model) -> list:
    """(name, parameter) of the parameters that require grad; empty without a model."""
    return [] if model is None else [(key, p) for key, p in model.named_parameters() if p.requires_grad]


def trained(name: str, words: list[str], output: str, *more: str) -> tuple[dict, dict]:
    """A run in float64: (full gradients of its first step by name, what it measured)."""
    with pytest.MonkeyPatch.context() as patch:
        load, clip, first = models.load, parallel.clip_grad_norm, {}

        def engine(args, module, *rest, made=parallel.Engine):
            first["model"] = module
            return made(args, module, *rest)

        def recorded(parameters, limit):
            for key, p in trained_parameters(first.pop("model", None)):
                first[key] = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
            return clip(parameters, limit)

        patch.setattr(models, "load", lambda *a, **how: load(*a, **how).double())
        patch.setattr(parallel, "Engine", engine)
        patch.setattr(parallel, "clip_grad_norm", recorded)
        patch.setattr(plots, "save_picture", lambda figure, path: plots.pyplot().close(figure))
        if name == "ppo":
            patch.setattr(sampling, "sample", sample_from_data)
        args = script(name).parse([*words, *SHORT, *(PPO if name == "ppo" else ()), "--output", output, *more])
        return script(name).train(args), first


def same_training(name, words, folder, engine, ranks) -> None:
    """Gradients, losses and weights of all ranks equal those of one process, up to 1e7 roundings of float64."""
    shares, gradients = trained(name, words, str(folder / "one"))
    found = ranks.run(trained, name, words, str(folder / "many"), *engine)
    close = dict(rtol=1e-9, atol=1e-9)
    assert "lm_head.weight" in " ".join(gradients)
    for theirs, grads in found:
        for when, measured in shares.items():
            assert theirs[when] == pytest.approx(measured, rel=1e-6, nan_ok=True)
        assert grads.keys() == gradients.keys()
        for key, grad in grads.items():
            assert torch.equal(grad, found[0][1][key]), f"{key}: the ranks' gradients differ"
            torch.testing.assert_close(grad, gradients[key], **close, msg=lambda text, key=key: f"{key}: {text}")
            assert grad.any(), f"{key} has no gradient"
    many, one = metrics(folder / "many"), metrics(folder / "one")
    assert len(many) == len(one) == STEPS
    for ours, theirs in zip(many, one):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    ours, theirs = weights(folder / "many"), weights(folder / "one")
    start = weights_of_start(words)
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], **close, msg=lambda text, key=key: f"{key}: {text}")
        assert (weight - start.get(key, 0)).abs().max() > 1e-4, f"{key} did not learn"
    saved = models.load("AutoModelForCausalLM", folder / "many" / "model", script("dpo").parse(words)).state_dict()
    for key, weight in saved.items():
        trained_key = key if key in ours else f"policy.{key}"
        torch.testing.assert_close(weight.double(), ours[trained_key], rtol=1e-6, atol=1e-6)


def weights_of_start(words) -> dict[str, torch.Tensor]:
    args = script("dpo").parse(words)
    state = models.load("AutoModelForCausalLM", args.model, args).double().state_dict()
    return state | {f"policy.{key}": value for key, value in state.items()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_two_processes_train_as_one(name, engine, words, tmp_path, two):
    same_training(name, words, tmp_path, ENGINES[engine], two)


@pytest.mark.parametrize("engine", [pytest.param("fsdp", marks=pytest.mark.slow), "tp", "fsdp x tp"])
@pytest.mark.parametrize("name", ["dpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_four_processes_train_as_one(name, engine, words, tmp_path, four):
    same_training(name, words, tmp_path, OF_FOUR[engine], four)


MORE = {
    "adapters": (("--lora",), ("--parallel", "fsdp")),
    "no padding, recomputed activations": (("--padding-free", "--gradient-checkpointing"), ("--parallel", "fsdp")),
    "a cached reference": (("--precompute-ref",), ("--parallel", "ddp")),
    "supervised steps before": (("--sft-steps", "3"), ("--parallel", "tp")),
}


@pytest.mark.parametrize("case", MORE)
def test_memory_saving_options_work_on_ranks(case, words, tmp_path, two):
    """Losses, gradient norms and the saved model of a short run equal those of one process."""
    flags, engine = MORE[case]
    for name, more in (("one", ()), ("many", engine)):
        cache = ("--ref-cache", str(tmp_path / f"cache_{name}")) if "--precompute-ref" in flags else ()
        how = (trained, "dpo", words, str(tmp_path / name), *flags, *cache, "--steps", "3", *more)
        two.run(*how) if more else trained(*how[1:])
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    assert len(one) == len(many) == (6 if "--sft-steps" in flags else 3)
    for ours, theirs in zip(many, one):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
    args = script("dpo").parse(words)
    one, many = (
        models.load("AutoModelForCausalLM", tmp_path / name / "model", args).state_dict() for name in ("one", "many")
    )
    start = models.load("AutoModelForCausalLM", args.model, args).state_dict()
    for key, weight in one.items():
        torch.testing.assert_close(many[key], weight, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert any((weight - start[key]).abs().max() > 1e-4 for key, weight in one.items())


@pytest.mark.parametrize(
    "size, flags, message",
    [
        (2, (), "--parallel: missing; torchrun started 2 processes, which divide the work by ddp, fsdp, tp"),
        (0, ("--parallel", "ddp"), "--parallel: got ddp in a single process; start several: torchrun"),
        (4, ("--parallel", "tp", "--tp", "2"), "--tp: got 2 with --parallel tp on 4 ranks; --parallel fsdp --tp 2"),
        (4, ("--parallel", "fsdp", "--tp", "3"), "--tp: got 3 with --parallel fsdp on 4 ranks; it must divide them"),
        (4, ("--parallel", "ddp", "--tp", "2"), "--tp: got 2 with --parallel ddp on 4 ranks"),
        (2, ("--parallel", "tp", "--lora"), "--lora: not with --tp 2, which splits the layers"),
        (2, ("--parallel", "fsdp", "--precompute-ref"), "--precompute-ref: not with --parallel fsdp"),
        (2, ("--parallel", "ddp", "--timeout", "0"), "--timeout: got 0.0, expected a number above 0"),
    ],
)
def test_flags_that_do_not_fit_the_processes(size, flags, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, str(size)) if size else monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")):
        script("dpo").parse(list(flags))


def test_a_single_process_script_refuses_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="torchrun started 2 processes, but this script runs in one"):
        script("kto").parse([])


def sharding_error(words: list[str], output: str) -> str:
    """The error for a model whose number of attention heads is not divisible by the number of ranks."""
    args = script("dpo").parse([*words, "--parallel", "tp", "--output", output])
    shape = dict(hidden_size=30, intermediate_size=48, num_hidden_layers=1, num_attention_heads=3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **shape))
    with pytest.raises(SystemExit) as stopped:
        parallel.Engine(args, model)
    return str(stopped.value)


def test_a_model_that_cannot_be_sharded(words, tmp_path, two):
    for said in two.run(sharding_error, words, str(tmp_path)):
        assert said == "error: --tp: 2 does not divide the model's num_attention_heads, 3; use --parallel fsdp"


def loaded_weights(words: list[str], output: str, *more: str) -> dict[str, torch.Tensor]:
    """The weights right after a resumed run has read its checkpoint."""
    found, load = {}, checkpoints.load

    def recorded(path, learner, parts):
        load(path, learner, parts)
        for key, p in learner.model.named_parameters():
            found[key] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "load", recorded)
        trained("dpo", words, output, "--checkpoint-every", "5", "--resume", *more)
    return found


def test_two_ranks_or_one_resume_from_four(words, tmp_path, four, two):
    """FSDP2 x TP saves after 5 of 10 steps. Two ranks with FSDP2, two with TP, and one process load the same bits."""
    every = ("--checkpoint-every", "5")
    four.run(trained, "dpo", words, str(tmp_path / "four"), *every, *OF_FOUR["fsdp x tp"])
    parts = [path.name for path in run_files.checkpoint(tmp_path / "four", 5).iterdir()]
    assert {f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in range(1, 5)} | {"state.json"} == set(parts)
    run_files.remove(run_files.checkpoint(tmp_path / "four", 10))
    saved, wanted = weights(tmp_path / "four"), metrics(tmp_path / "four")[5:]
    for name, engine in (("fsdp", ENGINES["fsdp"]), ("tp", ENGINES["tp"]), ("one", ())):
        shutil.copytree(tmp_path / "four", tmp_path / name)
        there = (words, str(tmp_path / name), *engine)
        for found in two.run(loaded_weights, *there) if engine else [loaded_weights(*there)]:
            assert found.keys() == saved.keys()
            for key, weight in found.items():
                assert torch.equal(weight, saved[key]), f"{name}, {key}"
        went_on = metrics(tmp_path / name)[5:]
        assert [row["step"] for row in went_on] == list(range(5, STEPS))
        for ours, theirs in zip(went_on, wanted):
            assert ours.pop("loss") == pytest.approx(theirs["loss"], rel=1e-9)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-9)


def sampled(words: list[str], output: str) -> tuple[list, torch.Tensor]:
    """(8 answers to the same prompt, the state of torch's generator)."""
    ppo = script("ppo")
    args = ppo.parse([*words, "--parallel", "ddp", "--output", output, "--max-completion-length", "6"])
    model, tokenizer, prompts, _ = setup.start(args, setup.load_rows(args, "prompt"))
    torch.manual_seed(3)
    rows = rollouts.rollout(model, tokenizer, prompts[:1] * 8, args, lambda rows: [0.0] * len(rows))
    return [row["answer_ids"] for row in rows], torch.get_rng_state()


def test_each_rank_samples_its_own_answers(words, tmp_path, two):
    (first, state), (second, other) = two.run(sampled, words, str(tmp_path))
    assert len(first) == 8 and first == second
    assert first[:4] != first[4:]  # the ranks drew different answers
    assert torch.equal(state, other)


def run_with_different_ranks(words: list[str], output: str, how: str) -> str:
    """The error on this rank when the ranks have different models or different flags."""
    other = parallel.dist.get_rank() == 1
    more = ["--beta", "0.3"] if how == "settings" and other else []
    args = script("dpo").parse([*words, *SHORT, "--parallel", "fsdp", "--output", output, *more])
    model, _ = models.build(args, [])
    if how == "weights" and other:
        model.resize_token_embeddings(160)
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        if how == "settings":
            parallel.equal("settings", vars(args))
        parallel.Engine(args, model)
    assert time.monotonic() - started < GROUP_TIMEOUT
    return str(stopped.value)


@pytest.mark.parametrize("how", ["settings", "weights"])
def test_ranks_that_differ_raise_at_once(how, words, tmp_path, two):
    said = two.run(run_with_different_ranks, words, str(tmp_path), how)
    found = "beta: 0.3, 0.1 on rank 0" if how == "settings" else r"\(\(160, 32\), 'torch.float32'\), \(\(167, 32\)"
    for message in said:
        assert message.startswith(f"error: the ranks' {how} differ; rank 1 has ")
        assert re.search(found, message), message


def run_until_killed(words: list[str], output: str, engine: str) -> None:
    """A run whose rank 1 is killed in the third step."""
    clip, calls = parallel.clip_grad_norm, []

    def counted(*how):
        calls.append(1)
        if len(calls) == 3 and parallel.dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(*how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "clip_grad_norm", counted)
        trained("dpo", words, output, *ENGINES[engine])


def test_a_rank_that_dies_ends_the_others(words, tmp_path):
    """The other rank raises within the timeout of a collective; the last checkpoint is complete."""
    ranks = Ranks(2)
    try:
        ranks.run(parallel.size)  # the processes have started
        started = time.monotonic()
        (_, left), (_, dead) = ranks.answers(run_until_killed, words, str(tmp_path / "run"), "fsdp")
        assert time.monotonic() - started < GROUP_TIMEOUT + 10  # and two steps have run before
    finally:
        ranks.close()
    assert dead.what == "the process is dead"
    assert left is not None and left.what != "no answer in time", left
    assert "Error" in left.what

"""Training by the examples: fused and plain, in micro-batches, packed, cached, with adapters, killed and resumed."""

import copy
import json

import eager_ops
import example_runs
import pytest
import torch
from counting import flops
from example_runs import metrics, run, script, weights
from numerics import assert_error, assert_with_runs, nudge

import fused_po

from trainer import dataset, models, plots, reference_logps, scoring, setup  # isort: skip

LETTERS = ("--reward-function", f"{example_runs.SUPPORT / 'toy_rewards.py'}:letters")
STEPS = {
    "sft": ("--eval-every", "0"),
    "dpo": (),
    "kto": ("--eval-every", "0"),
    "reward": ("--eval-every", "0"),
    "ppo": ("--eval-every", "0", *LETTERS),
    "grpo": ("--eval-every", "0", "--num-iterations", "2", *LETTERS),
    "online_dpo": ("--eval-every", "0", *LETTERS),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags for small data and a model after a few supervised steps."""
    folder = tmp_path_factory.mktemp("pipeline")
    data = example_runs.small_data(folder, uneven=True)
    run("sft", data, folder / "sft", "--steps", "12", "--batch-size", "8")
    return [*data, "--model", str(folder / "sft" / "model"), "--lr", "1e-3"]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Skip plotting, which takes longer than these runs; test_dpo_script.py and the slow tests plot."""
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: plots.pyplot().close(figure))


def change_models(patch, change) -> None:
    """Make the scripts call change(model) on every model they build or load."""
    for name in ("build", "load"):
        original = getattr(models, name)

        def changed(*args, original=original, **how):
            made = original(*args, **how)
            change(made[0] if isinstance(made, tuple) else made)
            return made

        patch.setattr(models, name, changed)


@pytest.fixture
def double(monkeypatch):
    """Convert models to float64."""
    change_models(monkeypatch, lambda model: model.double())


def trained(name, words, output, *more):
    """(weights as one vector, losses) of a short run, in float64."""
    run(name, words, output, *STEPS[name], *more)
    flat = torch.cat([value.double().flatten() for value in weights(output).values()])
    return flat, torch.tensor([row["loss"] for row in metrics(output)], dtype=torch.float64)


def mostly_slow(names, quick: tuple[str, ...]) -> list:
    """The names as test parameters; all except the quick ones are slow."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", mostly_slow(STEPS, ("sft", "dpo", "ppo", "grpo")))
def test_twenty_fused_steps_equal_plain_ones(name, words, tmp_path, monkeypatch):
    """The RMS errors of weights and losses are within `assert_error`'s bound from plain PyTorch in fp32."""
    short = ("--steps", "20", "--batch-size", "4", "--lr", "1e-4")
    fused = trained(name, words, tmp_path / "fused", *short)
    eager_ops.install(monkeypatch)

    def plain(where: str, change):
        with pytest.MonkeyPatch.context() as patch:
            change_models(patch, change)
            return trained(name, words, tmp_path / where, *short)

    exact = plain("exact", lambda model: model.double())
    rms = [truth.square().mean().sqrt().item() for truth in exact]
    assert len(exact[1]) == 20 and all(rms)

    def check(runs: list) -> None:
        for i, what in enumerate(("weights", "losses")):
            ours, *theirs = ((run[i] - exact[i]).square().mean().sqrt().item() for run in (fused, *runs))
            assert_error(what, ours, theirs, torch.finfo(torch.float32).eps * rms[i])

    assert_with_runs(lambda seed: plain(f"plain {seed}", lambda model: nudge(seed, model)), check)


@pytest.mark.parametrize("name", STEPS)
def test_one_batch_of_eight_equals_four_of_two(name, words, tmp_path, double):
    """In float64, where only rounding may differ: 1e-9 is 1e7 roundings."""
    short = ("--steps", "3", "--batch-size", "8")
    whole = trained(name, words, tmp_path / "whole", *short)
    parts = trained(name, words, tmp_path / "parts", *short, "--micro-batch-size", "2")
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts")):
        assert a.pop("stage") == b.pop("stage") and a == pytest.approx(b, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward"])
def test_packed_rows_train_like_padded_ones(name, words, tmp_path, double):
    short = ("--steps", "3", "--batch-size", "8")
    flags = ("--no-padding-free", "--padding-free")
    padded, packed = (trained(name, words, tmp_path / flag, *short, flag) for flag in flags)
    for a, b in zip(padded, packed):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_hidden_states_equal_padded_ones(attention, words, double, monkeypatch, seed):
    """In float64, including the softmax of eager attention, which transformers computes in fp32."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    args = script("dpo").parse(words)
    model, tokenizer = models.build(args, [])
    model.set_attn_implementation(attention)
    lengths = torch.randint(1, 120, (9,)).tolist()
    rows = [{"prompt_ids": [1], "answer_ids": torch.randint(4, 60, (n,)).tolist()} for n in lengths]
    batch = dataset.stack(rows, ("answer",), tokenizer.pad_token_id, "cpu")
    args.padding_free = False
    padded = scoring.hidden_states(model, batch, args)
    args.padding_free = True
    packed = scoring.hidden_states(model, batch, args)
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(packed[mask], padded[mask], rtol=1e-10, atol=1e-10)
    assert (packed[~mask] == 0).all()


def test_packing_keeps_every_row_whole(seed):
    lengths = torch.randint(1, 65, (50,)).tolist()
    rows = scoring.pack(lengths, 64)
    assert sorted(number for row in rows for number in row) == list(range(50))
    assert max(sum(lengths[number] for number in row) for row in rows) <= 64
    # the bound of first fit decreasing
    assert len(rows) <= 11 / 9 * sum(lengths) / 64 + 2
    with pytest.raises(SystemExit, match=r"--padding-free: not with attention 'paged"):
        model = type("Model", (), {"get_output_embeddings": lambda self: None})()
        model.config = type("Config", (), {"_attn_implementation": "paged"})
        args = type("Args", (), dict(padding_free=True, bf16=False, device="cpu"))
        scoring.hidden_states(model, dict(input_ids=torch.ones(1, 1), attention_mask=torch.ones(1, 1)), args)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_cached_reference_equals_the_live_one(name, words, tmp_path, double, monkeypatch):
    short = ("--steps", "3", "--batch-size", "8")
    cache = ("--precompute-ref", "--ref-cache", str(tmp_path / "cache"))
    live = trained(name, words, tmp_path / "live", *short)
    cached = trained(name, words, tmp_path / "cached", *short, *cache)
    for a, b in zip(live, cached):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    monkeypatch.setattr(reference_logps, "score", None)  # a second run reads the cache of the first
    again = trained(name, words, tmp_path / "again", *short, *cache)
    assert torch.equal(again[0], cached[0])
    (path,) = (tmp_path / "cache").iterdir()
    other = path.with_name("other")
    path.rename(other)
    with pytest.raises(TypeError):  # score is None: without the cache file the reference is scored again
        run(name, words, tmp_path / "more", *short, *cache)
    path.write_bytes(other.read_bytes()[:-8])
    with pytest.raises(SystemExit, match=r"--ref-cache: .* cannot be read .*; delete it"):
        run(name, words, tmp_path / "cut", *short, *cache)
    from safetensors.torch import load, save

    path.write_bytes(save(load(other.read_bytes()), metadata={"key": "of another model"}))
    with pytest.raises(SystemExit, match=r"--ref-cache: .* does not match its name"):
        run(name, words, tmp_path / "wrong", *short, *cache)


def test_the_cache_key_depends_on_weights_and_rows(words):
    args = script("dpo").parse(words)
    texts = setup.load_rows(args, "preference")
    model, _, rows, _ = setup.start(args, texts)
    key = reference_logps.key_of(model, rows, ("chosen",), args)
    assert key == reference_logps.key_of(copy.deepcopy(model), rows, ("chosen",), args)
    assert key != reference_logps.key_of(model, rows[1:], ("chosen",), args)
    assert key != reference_logps.key_of(model, rows, ("rejected",), args)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert key != reference_logps.key_of(model, rows, ("chosen",), args)


def step_flops(words, folder, monkeypatch, *more) -> tuple[float, int]:
    """(FLOPs of the policy's head in one DPO step, in GEMMs of N x H x V, and N)."""
    dpo = script("dpo")
    args = dpo.parse([*words, *more, "--precompute-ref", "--ref-cache", str(folder)])
    model, tokenizer, rows, _ = setup.start(args, setup.load_rows(args, "preference"))
    frozen = models.freeze(model, args)
    model = models.adapt(model, args)
    rows = reference_logps.scored(model, frozen, rows[:4], dpo.FIELDS, tokenizer, args)
    batch = dataset.stack(rows, dpo.FIELDS, tokenizer.pad_token_id, args.device)
    ref = reference_logps.logps_of(model, frozen, rows, dpo.FIELDS, batch, args)
    counts = len(rows), dataset.scored_tokens(rows, dpo.FIELDS)

    def step():
        dpo.dpo_loss(model, batch, ref, args, counts)[0].backward()

    def without_head(hidden, **how):
        pair = hidden.new_zeros(len(rows))
        return fused_po.DPOOutput(hidden.sum(), *[pair] * 8, pair)

    whole = flops(step)
    with monkeypatch.context() as patch:
        patch.setattr(fused_po, "linear_dpo", without_head)
        rest = flops(step)
    v, h = scoring.head(model)["weight"].shape
    return (whole - rest) / (2 * counts[1] * h * v), counts[1]


def test_adapters_use_the_frozen_head_path(words, tmp_path, monkeypatch):
    assert step_flops(words, tmp_path, monkeypatch, "--lora")[0] == 2
    assert step_flops(words, tmp_path, monkeypatch)[0] == 3


@pytest.mark.parametrize("name", STEPS)
def test_adapters_train_and_are_merged(name, words, tmp_path):
    """The saved model has merged weights and equals the trained one; the reference is the model without adapters."""
    run(name, words, tmp_path / "run", *STEPS[name], "--lora", "--steps", "4", "--batch-size", "8")
    state = weights(tmp_path / "run")
    assert state and all("lora_" in key or "score" in key or "value." in key for key in state)
    assert any(value.abs().max() > 0 for key, value in state.items() if "lora_B" in key)
    kind = "AutoModelForSequenceClassification" if name == "reward" else "AutoModelForCausalLM"
    args = script(name).parse(words)
    before, after = (models.load(kind, path, args) for path in (args.model, tmp_path / "run" / "model"))
    layer = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before.state_dict()[layer], after.state_dict()[layer])
    for key in (key for key in before.state_dict() if "norm" in key or "embed" in key):
        assert torch.equal(before.state_dict()[key], after.state_dict()[key])


def test_the_reference_is_the_model_without_adapters(words):
    args = script("dpo").parse([*words, "--lora"])
    model, tokenizer, rows, _ = setup.start(args, setup.load_rows(args, "preference"))
    batch = dataset.stack(rows[:3], ("chosen",), tokenizer.pad_token_id, "cpu")
    before = scoring.answer_logps(model, batch, args)
    assert models.freeze(model, args) is None
    model = models.adapt(model, args)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(scoring.answer_logps(model, batch, args), before)
    with models.reference(model, None) as scorer:
        assert torch.equal(scoring.answer_logps(scorer, batch, args), before)


@pytest.mark.parametrize("flag", ["--gradient-checkpointing", "--bf16"])
def test_memory_saving_options_train(flag, words, tmp_path):
    short = ("--steps", "3", "--batch-size", "8")
    plain, saving = (trained("dpo", words, tmp_path / str(more), *short, *more) for more in ((), (flag,)))
    if flag == "--bf16":  # a rounding of about 2^-8 exists, and is not exceeded
        assert not torch.equal(plain[1], saving[1])
        torch.testing.assert_close(plain[1], saving[1], rtol=2**-5, atol=0)
    else:
        assert torch.equal(plain[0], saving[0])


STAGES = {  # flags, and the processes to kill: in which optimizer step, and how they are started
    "sft": (("--steps", "5", "--eval-every", "2"), [(4, ())]),
    "dpo": (("--sft-steps", "3", "--steps", "4"), [(2, ()), (4, ("--resume",))]),
    "kto": (("--sft-steps", "3", "--steps", "4", "--eval-every", "2"), [(6, ())]),
    "reward": (("--sft-steps", "3", "--steps", "4", "--pairs", "given", "--lora"), [(6, ())]),
    "ppo": (("--sft-steps", "3", "--steps", "3", "--kl-target", "1", *LETTERS), [(4, ()), (3, ("--resume",))]),
    "grpo": (("--sft-steps", "3", "--steps", "3", "--num-iterations", "2", "--lora", *LETTERS), [(6, ())]),
    "online_dpo": (("--sft-steps", "3", "--steps", "3", "--eval-every", "2", *LETTERS), [(5, ())]),
}


@pytest.mark.parametrize("name", mostly_slow(STAGES, ("dpo", "ppo")))
def test_killed_during_a_step_and_resumed(name, tmp_path):
    """Weights, metrics and measurements are bitwise those of an uninterrupted run."""
    more, kills = STAGES[name]
    words = [*example_runs.small_data(tmp_path), *more, "--batch-size", "4", "--checkpoint-every", "1"]
    whole = run(name, words, tmp_path / "whole")
    for at, more in kills:
        example_runs.killed(name, [*words, *more], tmp_path / "broken", at)
    resumed = run(name, words, tmp_path / "broken", "--resume")
    assert resumed == whole
    ours, theirs = weights(tmp_path / "broken"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    assert json.loads((tmp_path / "broken" / "arguments.json").read_text())["script"] == name

"""The scripts of examples/ with other models: packing, heads, dropout, router losses, learning rates, pictures."""

import argparse
import json
import math
import pathlib
import shutil

import example_runs
import pytest
import torch
import transformers
from example_runs import metrics, run, script
from tiny_models import LLAMA, ROUTER, causal_lm

from trainer import dataset, dropout, formats, models, plots, scoring  # isort: skip

LETTERS = ("--reward-function", f"{example_runs.SUPPORT / 'toy_rewards.py'}:letters")
SHORT = ["--steps", "1", "--batch-size", "4", "--eval-every", "0", "--lr", "1e-3"]
SHORT += ["--max-prompt-length", "48", "--max-length", "96"]
ROWS = [{"prompt_ids": [1, 5, 6], "completion_ids": [8, 9, 10, 2]}, {"prompt_ids": [1, 20], "completion_ids": [21, 2]}]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: plots.pyplot().close(figure))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """words(config): flags for small data and short runs, with a model of this configuration."""
    folder = tmp_path_factory.mktemp("models")
    data = example_runs.small_data(folder, train=16, test=2, uneven=True)
    tokenizer = models.train_tokenizer(formats.texts_of(dataset.read(data[1], "train")), vocab_size=167)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    def made(kind: str, **config) -> list[str]:
        config = getattr(transformers, f"{kind}Config")(**config | ends | dict(vocab_size=len(tokenizer)))
        torch.manual_seed(0)
        models.save(folder / kind, transformers.AutoModelForCausalLM.from_config(config), tokenizer)
        return [*data, "--model", str(folder / kind), *SHORT]

    return made


def arguments(**how):
    return argparse.Namespace(**dict(padding_free=False, device="cpu", bf16=False) | how)


GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
LFM2 = {**LLAMA, "layer_types": ["conv", "full_attention"], "max_position_embeddings": 128}


# Packing.


def test_sft_pads_for_a_model_that_mixes_sequences(words, tmp_path, capsys):
    flags = words("Lfm2", **LFM2)
    run("sft", flags, tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("sequences are padded, not packed: Lfm2ForCausalLM with attn_implementation='sdpa' does not") == 1
    run("sft", flags, tmp_path / "padded", "--no-padding-free")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "padded")
    for name in ("sft", "dpo"):
        mixed = "--padding-free: Lfm2ForCausalLM .* does not separate the sequences in one row by position_ids; "
        with pytest.raises(SystemExit, match=f"{mixed}.*leave it out"):
            run(name, flags, tmp_path / f"{name}-packed", "--padding-free")
    batch = dataset.stack(ROWS, ("completion",), 0, "cpu")
    with pytest.raises(SystemExit, match=r"--padding-free: Lfm2ForCausalLM"):  # a model that `build` did not create
        model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**LFM2))
        scoring.hidden_states(model, batch, arguments(padding_free=True))


# Heads.


def test_rewards_and_regularisers_of_other_heads(tmp_path):
    """A factor before the head is included, a layer before the head is refused; rewards equal the model's own."""
    assert scoring.decoder_head(causal_lm("Granite"))["logit_scale"] == 1 / 8
    config = transformers.ModernBertDecoderConfig(**LLAMA, local_attention=8)
    decoder = transformers.ModernBertDecoderForCausalLM(config).eval()
    with pytest.raises(SystemExit, match=r"--lm-coef: ModernBertDecoderForCausalLM changes .*; give --lm-coef 0"):
        scoring.decoder_head(decoder)
    config.num_labels = 1
    for kind in (transformers.ModernBertDecoderForSequenceClassification,):
        with pytest.raises(
            SystemExit, match=r"--model: .* does more to its hidden states than one linear layer `score`"
        ):
            scoring.check_scores(kind(config).eval(), "--model")
    llama = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA, num_labels=1))
    assert scoring.check_scores(llama, "--model") is llama


# Dropout.


DROPOUT = {
    "GPT2": GPT2,  # modules
    "OPT": dict(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.2,
        attention_dropout=0.2,
        layerdrop=0.3,
    ),
    "Falcon": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.2, attention_dropout=0.2
    ),  # read from the configuration in the forward
    "Llama": LLAMA | dict(attention_dropout=0.3),  # passed to the attention function
    "Bloom": dict(hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.2, attention_dropout=0.2),
    "Mixtral": LLAMA | dict(num_local_experts=4, router_jitter_noise=0.3),
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_every_kind_of_dropout_is_off(kind, tmp_path):
    """In training the model computes what it computes in evaluation; the saved model has its original dropout rates."""
    config = getattr(transformers, f"{kind}Config")(**DROPOUT[kind] | dict(vocab_size=97))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = config.to_dict()
    ids = torch.randint(3, 90, (4, 16))
    run_it = lambda ids: scoring.run(model, input_ids=ids).hidden  # noqa: E731
    drawn = [run_it(ids) for _ in range(4)]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])  # check that the model has dropout
    state = torch.get_rng_state()
    dropout.switch_off(model, run_it)
    assert torch.equal(state, torch.get_rng_state())
    trained = model.train() and run_it(ids)
    torch.testing.assert_close(trained, model.eval() and run_it(ids), rtol=1e-5, atol=1e-6)
    with dropout.as_loaded(model):
        assert config.to_dict() == before
    tokenizer = models.train_tokenizer(["a b"])
    models.save(tmp_path / "model", model, tokenizer)
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert all(saved[key] == value for key, value in before.items() if "drop" in key)


def test_adapters_dropout_and_noise_of_another_kind():
    from peft import LoraConfig, get_peft_model

    model = causal_lm("Llama")
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False))
    dropout.switch_off(wrapped, lambda ids: scoring.run(wrapped, input_ids=ids).hidden)
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda hidden: inner(hidden + 0.1 * torch.randn_like(hidden))
    with pytest.raises(SystemExit, match=r"--model: .* draws random numbers in training .*; give --keep-dropout"):
        dropout.switch_off(model, lambda ids: scoring.run(model, input_ids=ids).hidden)


AT_FIRST = {  # metrics of the first step that are 0 when policy and reference are equal
    "dpo": ("rewards/margins", "kl"),
    "kto": ("rewards/chosen", "kl", "z0"),
    "ppo": ("objective/kl", "policy/approxkl_avg"),
    "grpo": ("kl",),
    "online_dpo": ("rewards/margins", "kl"),
}


@pytest.mark.parametrize("name", AT_FIRST)
def test_policy_and_reference_are_equal_at_the_start(name, words, tmp_path):
    flags = [*words("GPT2", **GPT2), *(LETTERS if name in ("ppo", "grpo", "online_dpo") else ())]
    flags += ["--num-mini-batches", "1"] if name == "ppo" else []  # in a second update the policy has changed
    run(name, flags, tmp_path / "off")
    (row,) = metrics(tmp_path / "off")
    for key in AT_FIRST[name]:
        assert abs(row[key]) < 1e-5, key
    if name == "dpo":
        run(name, flags, tmp_path / "on", "--keep-dropout")
        assert metrics(tmp_path / "on")[0]["kl"] > 1e-4


# Router losses.


def with_router(words):
    shape = {**LLAMA, **ROUTER, "num_local_experts": 4, "max_position_embeddings": 128}
    return words("Mixtral", **shape)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sft_equals_the_models_own_loss(packed, words):
    """The model's own loss with its labels; packed rows are not padded, since padding would count as text."""
    args = script("sft").parse([*with_router(words), "--padding-free" if packed else "--no-padding-free"])
    model, tokenizer = models.build(args, [])
    rows = [{"prompt_ids": [1] + [7] * (n // 2), "completion_ids": list(range(20, 20 + n))} for n in (3, 90, 41, 60)]
    tokens = dataset.scored_tokens(rows, ("completion",))
    ours, _ = script("sft").sft_loss(model, tokenizer, rows, tokens, args)
    theirs = model(**dataset.stack(rows, ("completion",), tokenizer.pad_token_id, "cpu"))
    assert theirs.aux_loss > 1 and ours.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    weight = model.model.layers[0].mlp.gate.weight
    grads = (torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs.loss))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["dpo", "kto", "ppo", "grpo", "online_dpo"])
def test_the_router_learns_in_every_script(name, words, tmp_path, monkeypatch):
    """The loss grows by the coefficient times the model's own router loss, a share for each part of the batch."""
    flags = [*with_router(words), *(LETTERS if name in ("ppo", "grpo", "online_dpo") else ())]
    flags += ["--num-mini-batches", "1"] if name == "ppo" else []
    run(name, [*flags, "--micro-batch-size", "2"], tmp_path / "with")
    seen, forward = [], scoring.forward

    def without(*given):
        states = forward(*given)
        if torch.is_grad_enabled():
            seen.append(states.router_loss.item())
        return states._replace(router_loss=torch.zeros(()))

    monkeypatch.setattr(scoring, "forward", without)
    run(name, [*flags, "--micro-batch-size", "2"], tmp_path / "without")
    (ours,), (theirs,) = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    assert min(seen) - 1e-5 <= ours["loss"] - theirs["loss"] <= max(seen) + 1e-5 and min(seen) > 0.4


# Rates and pictures.


def test_learning_rates():
    """A user's model has TRL's rates, adapters ten times those, the tiny Llama its own; a given rate overrides all."""
    trl_rates = dict(sft=2e-5, reward=1e-5, dpo=1e-6, kto=1e-6, ppo=3e-6, grpo=1e-6, online_dpo=5e-7)
    for name, rate in trl_rates.items():
        parse = script(name).parse
        assert parse([]).lr == parse([]).sft_lr == 1e-3
        assert parse(["--model", "m"]).lr == rate and parse(["--model", "m", "--lora"]).lr == pytest.approx(10 * rate)
        assert parse(["--model", "m", "--lr", "0.1"]).lr == 0.1
        assert parse(["--model", "m", "--sft-steps", "3"]).sft_lr == 2e-5


def test_pictures(tmp_path, monkeypatch):
    """No panel is empty, and an earlier stage does not flatten the last stage's curve."""
    drawn = []
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: drawn.append(figure))
    rows = [{"step": i, "stage": "SFT", "loss": 5.0 - i / 25} for i in range(100)]
    rows += [{"step": 100 + i, "stage": "DPO", "loss": 0.7 - i / 1000, "eval_correct": math.nan} for i in range(100)]
    panels = {"loss": "loss", "eval_correct": "correct", "entropy": "entropy"}
    plots.plot_metrics(rows, panels, tmp_path / "x.png", "title")
    (figure,) = drawn
    with_data = [axis for axis in figure.axes if axis.has_data()]
    shown = [axis for axis in figure.axes if axis.axison]
    assert shown == with_data and {axis.get_title() for axis in shown} == {"loss", ""}
    for axis in with_data:
        for line in axis.get_lines():
            low, high = axis.get_ylim()
            values = list(line.get_ydata())
            assert max(values) - min(values) > 0.8 * (high - low)
    plots.pyplot().close(figure)


def test_sft_plots_its_measurements(words, tmp_path):
    sft = script("sft")
    run("sft", words("Llama", **LLAMA | dict(max_position_embeddings=128)), tmp_path, "--eval-every", "1")
    (row,) = metrics(tmp_path)
    assert set(sft.PANELS) <= set(row)


# Saving.


def test_a_model_that_cannot_be_saved_is_refused_at_the_start(words, tmp_path):
    """transformers keeps the quantization_config of a GGUF file, and then refuses to save the model."""
    flags = words("Llama", **LLAMA | dict(max_position_embeddings=128))
    at = flags.index("--model") + 1
    config = pathlib.Path(shutil.copytree(flags[at], tmp_path / "model"), "config.json")
    flags[at] = str(config.parent)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    with pytest.raises(SystemExit, match=r"--model: .* is quantized .* and transformers cannot save it after training"):
        run("sft", flags, tmp_path / "run")

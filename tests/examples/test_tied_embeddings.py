"""Tied embeddings in every script of examples/: train, checkpoint, resume bitwise, save, reload."""

import copy
import importlib.util
import json

import example_runs
import pytest
import torch
import transformers
from example_runs import metrics, run, script, weights
from rank_pool import Ranks

from trainer import (  # isort: skip
    checkpoints,
    dataset,
    formats,
    models,
    optimization,
    parallel,
    plots,
    run_files,
    sampling,
)

LETTERS = ("--reward-function", f"{example_runs.SUPPORT / 'toy_rewards.py'}:letters")
SAMPLING = dict.fromkeys(("ppo", "grpo", "online_dpo"), (*LETTERS, "--max-completion-length", "4"))
SCRIPTS = {"sft": (), "reward": ("--pairs", "given"), "dpo": (), "kto": (), **SAMPLING}
LORA = ("sft", "ppo")  # others with --lora, and other models, are slow tests
GROUPED = dict(head_dim=8, num_key_value_heads=2)
KINDS = {"Qwen3": GROUPED, "Gemma": GROUPED, "GPT2": dict(n_positions=128)}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: plots.pyplot().close(figure))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """words(kind): flags for small data, short runs and a model with a tied head."""
    folder = tmp_path_factory.mktemp("tied")
    data = example_runs.small_data(folder, train=16, test=2, uneven=True)
    tokenizer = models.train_tokenizer(formats.texts_of(dataset.read(data[1], "train")), vocab_size=167)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    def made(kind: str) -> list[str]:
        shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        shape |= dict(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.2, **ends)
        config = getattr(transformers, f"{kind}Config")(**shape | KINDS[kind])
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        models.save(folder / kind, model, tokenizer)
        short = "--steps 3 --batch-size 4 --lr 1e-3 --checkpoint-every 2 --eval-every 0 --max-prompt-length 48"
        return [*data, "--model", str(folder / kind), *short.split(), "--max-length", "96"]

    return made


def cases():
    for kind in KINDS:
        for name in SCRIPTS:
            for lora in (False, True):
                ordinary = kind == "Qwen3" and (not lora or name in LORA)
                marks = () if ordinary else pytest.mark.slow
                yield pytest.param(kind, name, lora, id=f"{kind}-{name}" + "-lora" * lora, marks=marks)


@pytest.mark.parametrize("kind, name, lora", list(cases()))
def test_a_tied_model_from_training_to_reloading(kind, name, lora, words, tmp_path):
    flags = [*words(kind), *SCRIPTS[name], *["--lora"] * lora]
    whole = run(name, flags, tmp_path)
    trained, rows = weights(tmp_path), metrics(tmp_path)
    run_files.remove(run_files.checkpoint(tmp_path, 3))
    run_files.remove(tmp_path / "model")
    assert repr(run(name, flags, tmp_path, "--resume")) == repr(whole) and metrics(tmp_path) == rows
    again = weights(tmp_path)
    assert again.keys() == trained.keys() and all(torch.equal(again[key], trained[key]) for key in again)
    assert not any("lm_head" in key for key in trained)  # stored once, under its first name
    assert all("lora_" in key or "score" in key or key.startswith("value") for key in trained) or not lora
    auto = transformers.AutoModelForSequenceClassification if name == "reward" else transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "model")
    state = loaded.state_dict()
    found = [key.removeprefix("policy.") for key in trained if key.removeprefix("policy.") in state]
    assert lora or len(found) + 2 * (name == "ppo") == len(trained)  # and the two tensors of the value head
    for key, value in trained.items():
        if key.removeprefix("policy.") in state:
            assert torch.equal(state[key.removeprefix("policy.")], value), key
    if name != "reward":
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.slow
def test_the_pipeline_of_a_tied_model(words, tmp_path, monkeypatch):
    """All four stages from a tied model; a stopped stage resumes from its checkpoint."""
    found = importlib.util.spec_from_file_location("whole_pipeline", example_runs.EXAMPLES / "pipeline.py")
    whole = importlib.util.module_from_spec(found)
    found.loader.exec_module(whole)
    given = lambda model, tokenizer, rows, *args, **how: [  # noqa: E731
        {name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows
    ]
    monkeypatch.setattr(sampling, "sampled_pairs", given)  # after two steps the model answers nothing right
    flags, lengths = words("Qwen3"), "--max-prompt-length 48 --max-length 96 --steps 2 --batch-size 4 --lr 1e-3"
    all_of = [*flags[: flags.index("--steps")], "--output", str(tmp_path / "run")]
    all_of += [f"--{stage}-flags={lengths} --eval-every 1 --checkpoint-every 1" for stage in whole.FLAGS]
    whole.train(whole.parse(all_of))
    dpo = tmp_path / "run" / "dpo"
    trained, rows = weights(dpo), metrics(dpo)
    run_files.remove(dpo / "model")
    run_files.remove(run_files.checkpoint(dpo, 2))
    whole.train(whole.parse([*all_of, "--resume"]))
    assert metrics(dpo) == rows and all(torch.equal(value, trained[key]) for key, value in weights(dpo).items())
    for stage in ("sft", "ppo", "dpo"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / stage / "model")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_frozen_reference_stays_tied(words):
    args = script("dpo").parse(words("Qwen3"))
    model, _ = models.build(args, [])
    frozen = models.freeze(model, args)
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight
    assert frozen.lm_head.weight is not model.lm_head.weight


class Shared(torch.nn.Module):
    """All ways to share memory: a tied parameter and buffer, views of one storage, with gaps."""

    def __init__(self):
        super().__init__()
        self.one = self.other = torch.nn.Parameter(torch.randn(4, 6))
        both = torch.randn(5, 6)
        self.top, self.bottom = torch.nn.Parameter(both[:2]), torch.nn.Parameter(both[2:])
        self.gaps = torch.nn.Parameter(torch.randn(6, 4).T)
        counts = torch.arange(3.0)
        self.register_buffer("counts", counts)
        self.register_buffer("tally", counts)
        self.register_buffer("empty", torch.empty(0, 3))


def learner_of(module):
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    return optimization.Learner(None, module, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))


def stepped(learner, times: int) -> None:
    """Optimizer steps with a different gradient per parameter, so that a misplaced moment is noticed."""
    for step in range(times):
        for number, p in enumerate(learner.model.parameters()):
            if p.requires_grad:
                p.grad = torch.linspace(-1, 2 + number, p.numel()).view(p.shape) * (step + 1)
        learner.optimizer.step()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen in part"])
def test_shared_memory_and_the_state_of_the_optimizer(frozen, tmp_path):
    torch.manual_seed(3)
    one = learner_of(Shared().requires_grad_(True))
    if frozen:
        one.model.one.requires_grad_(False)
        one = learner_of(one.model)
    other = learner_of(copy.deepcopy(one.model))
    stepped(one, 2)
    checkpoints.save(tmp_path / "checkpoint", one, {})
    names = json.loads((tmp_path / "checkpoint" / "state.json").read_text())["model"]
    assert ("one" in names) != frozen and not {"other", "tally"} & names.keys()
    checkpoints.load(tmp_path / "checkpoint", other, {})
    assert other.model.one is other.model.other
    for learner in (one, other):
        stepped(learner, 2)
    for (name, a), (_, b) in zip(one.model.state_dict().items(), other.model.state_dict().items()):
        assert torch.equal(a, b), name


def trained_on_ranks(words: list[str], output: str, *more: str) -> tuple[list[float], bool]:
    """(losses of a run in float64, whether the head and the embedding are still one tensor)."""
    with pytest.MonkeyPatch.context() as patch:
        load, seen = models.load, {}

        def engine(args, module, *rest, made=parallel.Engine):
            seen["model"] = module
            return made(args, module, *rest)

        patch.setattr(models, "load", lambda *a, **how: load(*a, **how).double())
        patch.setattr(parallel, "Engine", engine)
        patch.setattr(plots, "save_picture", lambda figure, path: plots.pyplot().close(figure))
        dpo = script("dpo")
        dpo.train(dpo.parse([*words, "--output", output, *more]))
        model = seen["model"]
        return [
            row["loss"] for row in metrics(example_runs.Path(output))
        ], model.lm_head.weight is model.model.embed_tokens.weight


ENGINES = [pytest.param(e, marks=() if e == "fsdp" else pytest.mark.slow) for e in ("ddp", "fsdp", "tp")]


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tied_model_on_two_processes(engine, words, tmp_path, two):
    """Losses, weights and the saved model equal those of one process, which can load the two ranks' checkpoint."""
    flags = words("Qwen3")
    alone, _ = trained_on_ranks(flags, str(tmp_path / "one"))
    for losses, tied in two.run(trained_on_ranks, flags, str(tmp_path / "two"), "--parallel", engine):
        assert losses == pytest.approx(alone, rel=1e-9) and tied
    run_files.remove(run_files.checkpoint(tmp_path / "two", 3))
    run_files.remove(tmp_path / "two" / "model")
    assert trained_on_ranks(flags, str(tmp_path / "two"), "--resume")[0] == pytest.approx(alone, rel=1e-9)
    run_files.remove(tmp_path / "two" / "model")
    run_files.remove(run_files.checkpoint(tmp_path / "two", 3))
    for losses, tied in two.run(trained_on_ranks, flags, str(tmp_path / "two"), "--parallel", engine, "--resume"):
        assert losses == pytest.approx(alone, rel=1e-9) and tied
    one, many = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "two")
    )
    assert many.lm_head.weight is many.model.embed_tokens.weight
    for (name, a), b in zip(one.state_dict().items(), many.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    files = {path.name for path in (tmp_path / "two" / "model").iterdir()}
    sizes = [(tmp_path / name / "model" / "model.safetensors").stat().st_size for name in ("one", "two")]
    assert "model.safetensors" in files and sizes[0] == sizes[1]  # the head is stored once

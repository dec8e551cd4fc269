"""`python -m fused_po plan`: its output, and its errors for bad flags."""

import importlib.util
import json
import time

import pytest
import torch
from repository import ROOT

from fused_po import __main__ as command
from fused_po.planner import communication, devices, report
from fused_po.planner.command import chosen_head, chosen_work, human, size
from fused_po.planner.cost import ours

DOCS = ROOT / "docs"
HEAD = ("--vocab", "32000", "--hidden", "2048")
QWEN = ("--vocab", "151936", "--hidden", "4096")
LLAMA = ("--vocab", "128256", "--hidden", "16384")
BATCH = ("--tokens", "2048", "--pairs", "8", "--scored", "0.5")


def run(capsys, *words) -> tuple[int, str, str]:
    status = command.main(["plan", *words])
    return status, *capsys.readouterr()


def found(capsys, *words) -> tuple[int, dict]:
    status, out, _ = run(capsys, *words, "--json")
    return status, json.loads(out)


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


def test_schedules_and_contenders(capsys):
    """GEMMs over the scored tokens, including those of DPO's reference; half of the tokens are prompt."""
    status, plan = found(capsys, *QWEN, *BATCH)
    schedules, beside = by_name(plan["schedules"]), by_name(plan["beside"])
    kept = plan["kept tokens"] / plan["work"]["scored"]
    assert status == 0 and plan["fits"] and 0 < kept < 1
    assert [row["GEMMs"] for row in schedules.values()] == [2, 3, 4, 5, 4, 6]
    gemms = {name: row["GEMMs"] for name, row in beside.items()}
    assert gemms == pytest.approx({"fused_po": 5 - kept, "eager PyTorch": 8, "TRL 1.16": 5, "Liger 0.8.5": 8})
    budget = plan["work"]["budget"]
    assert budget == plan["device"]["memory"] // 32 and plan["peak"]["bytes"]["kept: basis"] <= budget
    assert beside["fused_po"]["seconds"] < beside["TRL 1.16"]["seconds"] < beside["Liger 0.8.5"]["seconds"]
    status, frozen = found(capsys, *QWEN, *BATCH, "--head", "frozen", "--loss", "logps")
    assert by_name(frozen["beside"])["fused_po"]["GEMMs"] == 2
    assert by_name(frozen["beside"])["TRL 1.16"]["GEMMs"] == 3


def test_the_suggested_budget_keeps_everything(capsys):
    plan = found(capsys, *QWEN, *BATCH)[1]
    (said,) = [line for line in plan["advice"] if line.startswith("--budget")]
    after = found(capsys, *QWEN, *BATCH, "--budget", said.split()[1])[1]
    assert after["kept tokens"] == after["work"]["scored"] and after["advice"] == []
    ms = 1e3 * (plan["beside"][0]["seconds"] - after["beside"][0]["seconds"])
    assert f"{ms:.3g} ms per step" in said


def test_a_plan_that_does_not_fit_suggests_one_that_does(capsys):
    batch = ("--tokens", "8192", "--pairs", "4", "--free", "24GiB")
    status, plan = found(capsys, *LLAMA, *batch)
    assert status == 1 and not plan["fits"] and plan["advice"][0].startswith("does not fit: ")
    (tp,) = [line.split()[1] for line in plan["advice"] if line.startswith("--tp")]
    assert found(capsys, *LLAMA, *batch, "--tp", tp)[0] == 0
    assert found(capsys, *LLAMA, *batch, "--tp", str(int(tp) // 2))[0] == 1
    status, plan = found(capsys, *QWEN, "--tokens", "2048", "--pairs", "8", "--budget", "9GiB", "--free", "12GiB")
    (budget,) = [line.split()[1] for line in plan["advice"] if line.startswith("--budget")]
    assert status == 1
    assert found(capsys, *QWEN, "--tokens", "2048", "--pairs", "8", "--budget", budget, "--free", "12GiB")[0] == 0


def test_tiles_too_small_for_a_large_vocabulary(capsys):
    """Two sides of 256,000 logits: 174 rows per tile, so products wait for the head; a larger tile is suggested."""
    words = ("--vocab", "256000", "--hidden", "2304", "--tokens", "4096", "--pairs", "4", "--loss", "dpo-kl")
    plan = found(capsys, *words)[1]
    (said,) = [line for line in plan["advice"] if "--tile" in line]
    steps = by_name(plan["steps"])
    assert plan["tile rows"] == 174 and steps["scores"]["seconds"] > 1.5 * steps["head's gradient"]["seconds"]
    after = found(capsys, *words, "--tile", said.split("--tile ")[1].split()[0])[1]
    ms = 1e3 * (plan["beside"][0]["seconds"] - after["beside"][0]["seconds"])
    assert f"{ms:.3g} ms per step" in said and ms > 10
    assert not [line for line in after["advice"] if "--tile" in line]


def test_thousands_of_ranks(capsys):
    """A 405B model's head over 8 x 256 ranks: memory and FLOPs per rank, and the bytes it sends."""
    plan = found(capsys, *LLAMA, "--tokens", "4096", "--tp", "8", "--dp", "256", "--dp-mode", "fsdp")[1]
    assert plan["ranks"] == 2048 and plan["rows of the head on a rank"] == 16032
    alone = found(capsys, *LLAMA, "--tokens", "4096", "--budget", "80GB", "--device", "h200")[1]
    flops = [sum(s["flops"] for s in p["steps"]) for p in (plan, alone)]
    assert flops[1] == 8 * flops[0]
    steps = by_name(plan["steps"])
    head = 16032 * 16384 * 2
    assert steps["head gathered"]["sent"] == steps["head's gradient summed and scattered"]["sent"] == 255 * head // 256
    assert steps["hidden's gradient summed"]["sent"] == 2 * 7 * 8192 * 16384 * 4 // 8
    assert steps["hidden's gradient summed"]["hidden_by"] == "head's gradient"
    modes = {}
    for mode in ("ddp", "zero3"):
        some = found(capsys, *LLAMA, "--tokens", "4096", "--tp", "8", "--dp", "256", "--dp-mode", mode)[1]
        modes[mode] = sum(s["sent"] for s in some["steps"] if s["kind"] == "dp")
    assert modes == {"ddp": 2 * 255 * head // 256, "zero3": 3 * 255 * head // 256}


def test_uneven_vocabularies_count_the_largest_shard(capsys):
    plan = found(capsys, "--vocab", "50257", "--hidden", "768", "--tokens", "512", "--tp", "4")[1]
    assert plan["rows of the head on a rank"] == 12565


def test_text(capsys):
    status, out, err = run(capsys, *QWEN, *BATCH, "--tp", "2", "--dp", "4")
    assert status == 0 and err == ""
    for line in ("runs: linear_logps", "memory on one rank", "  kept: basis", "schedules of fused_po", "eager PyTorch"):
        assert line in out, line
    assert "989.4 TFLOP/s bf16" in out and "NVIDIA H100 data sheet" in out and "\nfits" in out
    assert "during head's gradient" in out and "during the model's backward" in out


def test_measured_here(capsys, monkeypatch):
    """--measure times this machine, and the plan's times follow from its rate and bandwidth."""
    monkeypatch.setattr(devices, "best_seconds", lambda run, on_gpu, times=5: (run(), 0.5)[1])
    words = ("--vocab", "512", "--hidden", "32", "--tokens", "64", "--loss", "logps", "--dtype", "fp32", "--measure")
    status, plan = found(capsys, *words)
    rate, step = plan["device"]["flops"]["fp32"], by_name(plan["steps"])["scores"]
    assert status == 0 and plan["device"]["source"].startswith("measured now: GEMM [64, 32] x [32, 512]")
    assert rate == 2 * 64 * 32 * 512 / 0.5
    assert step["seconds"] == pytest.approx(max(step["flops"] / rate, step["moved"] / plan["device"]["bandwidth"]))


def test_times_add_up():
    args = command.parse(["plan", *QWEN, *BATCH, "--tp", "8", "--dp", "2"])
    head = chosen_head(args)
    device = devices.STATED["h100"]
    work = chosen_work(args, head, device)
    times = report.times_of(ours(work), work, device)
    steps = dict(zip((s.name for s in ours(work).steps), times.steps))
    apart = [n for n in steps if n.endswith("gathered") or n.startswith("hidden's gradient summed") or " summed" in n]
    shown = steps["reference's statistics gathered"]
    shown += max(0, steps["hidden's gradient summed"] - steps["head's gradient"])
    shown += max(0, steps["statistics gathered"] - steps["scores"])
    assert times.total == pytest.approx(sum(t for n, t in steps.items() if n not in apart) + shown)
    alone = work._replace(dp=1)
    # overlapped by the rest of the model's backward
    assert report.times_of(ours(alone), alone, device).total == times.total


def test_rings():
    """Each of p ranks forwards p - 1 parts; across nodes at the speed of the network."""
    assert communication.all_gather_bytes(rows=10, tile_rows=4, fields=3, ranks=4) == 3 * 4 * 3 * (10 + 3)
    assert communication.scatter_bytes(1000, 4) == 750 and communication.all_reduce_bytes(1000, 4) == 1500
    assert communication.scatter_bytes(1000, 1) == 0
    h100 = devices.STATED["h100"]
    near, far = (devices.collective_seconds(h100, 10**9, 8, stride, 1, 1) for stride in (1, 8))
    assert near == pytest.approx(1e9 / 450e9 + 8.4e-6 + 7 * 3.4e-6)
    assert far == pytest.approx(1e9 / 50e9 + 8.4e-6 + 7 * 14e-6)


def test_the_tables_of_the_docs_are_current():
    """docs/scaling.md has the planner's current tables: python docs/make_scaling_tables.py."""
    spec = importlib.util.spec_from_file_location("make_scaling_tables", DOCS / "make_scaling_tables.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert make.written(page) == page
    assert make.written(page.replace("GiB |", "MiB |")) == page


@pytest.mark.parametrize("text, value", [("0", 0), ("512MiB", 2**29), ("2 gib", 2**31), ("1.5GB", 1500000000)])
def test_sizes(text, value):
    assert size(text) == value


def test_readable_sizes():
    assert [human(v) for v in (0, 1023, 1024, 1000 * 2**20, 2**31, 3 * 2**40)] == [
        "0B",
        "1023B",
        "1KiB",
        "1000MiB",
        "2GiB",
        "3TiB",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        ((*HEAD,), "the following arguments are required: --tokens"),
        ((*HEAD, "--tokens", "0"), "argument --tokens: got '0', allowed are integers above 0"),
        ((*HEAD, "--tokens", "8", "--pairs", "x"), "argument --pairs: got 'x', allowed are integers above 0"),
        ((*HEAD, "--tokens", "8", "--budget", "much"), "argument --budget: got 'much', allowed are bytes such as 0, "),
        ((*HEAD, "--tokens", "8", "--budget", "-1"), "--budget"),
        ((*HEAD, "--tokens", "8", "--scored", "1.5"), "argument --scored: got '1.5', allowed are shares above 0"),
        ((*HEAD, "--tokens", "8", "--pairs", "2", "--sequences", "3"), "not allowed with argument --pairs"),
        ((*HEAD, "--tokens", "8", "--device", "tpu"), "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_bad_flags(words, message, capsys):
    with pytest.raises(SystemExit):
        command.main(["plan", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "--model: missing; expected --model, or --vocab and --hidden"),
        (("--vocab", "100"), "--hidden: missing"),
        (("--hidden", "100"), "--vocab: missing"),
        (("--model", "x", *HEAD), "--model: not allowed with --vocab or --hidden"),
        (("--model", "./nowhere"), "--model: got './nowhere', but there is no file"),
        ((*HEAD, "--budget", "1TiB"), "--budget: got 1TiB, allowed are 0 to 74.5GiB, all of H100 SXM"),
        ((*HEAD, "--tile", "0"), "--tile: got 0, allowed are bytes above 0"),
        ((*HEAD, "--tp", "40000"), "--tp: got 40000, allowed are 1 to 32000, the rows of the head"),
        ((*HEAD, "--sequences", "3"), "--sequences: not allowed with --loss dpo, a pair loss"),
        ((*HEAD, "--entropy"), "--entropy: used only with --loss logps, got --loss dpo"),
    ],
)
def test_bad_combinations(words, message, capsys):
    status, out, err = run(capsys, *words, "--tokens", "64")
    assert status == 2 and out == "" and err.startswith(f"error: {message}")


def test_every_device_is_stated_in_full():
    for name, device in devices.STATED.items():
        assert device.flops.keys() == {"bf16", "fp32"} and device.source, name
        assert 0 < device.network <= device.link < device.bandwidth < device.flops["fp32"] <= device.flops["bf16"]


def test_a_plan_is_quick_and_allocates_nothing_large(capsys):
    begin = time.process_time()
    found(capsys, "--vocab", "10000000", "--hidden", "100000", "--tokens", "1000000", "--pairs", "1000", "--tp", "4096")
    assert time.process_time() - begin < 5
    assert not torch.cuda.is_initialized()

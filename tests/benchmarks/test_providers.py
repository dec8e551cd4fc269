"""The benchmark's peers: broken ones are reported without stopping the others, and results are adapted correctly."""

import subprocess
import sys
import zipfile
from types import SimpleNamespace

import cases
import counting
import kl_providers
import measure
import peer_wheels
import peers
import providers
import pytest
import torch
from repository import ROOT
from torch.nn import functional as F

NAMED = {q.name: q for q in providers.PROVIDERS}
KL_NAMED = {q.name: q for q in kl_providers.KL_PROVIDERS}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(name, peer, {path: source}) puts a package on sys.path and registers a peer of that name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, peer, files):
        for path, source in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
        monkeypatch.setitem(peers.PEERS, name, peer)

    yield install
    for module in set(sys.modules) - before:
        if module.partition(".")[0].startswith("some_"):
            del sys.modules[module]
    peers.imported.cache_clear()


BROKEN = {
    "absent": ({}, "some-peer is not installed"),
    "raises": ({"some_peer/__init__.py": "raise RuntimeError('no such card\\nmore')"}, "RuntimeError: no such card"),
    "needs more": ({"some_peer/__init__.py": "import some_thing"}, "ModuleNotFoundError: No module named 'some_thing'"),
    "moved": ({"some_peer/__init__.py": ""}, "ModuleNotFoundError: No module named 'some_peer.kernels'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_peer_that_does_not_import_is_explained_in_one_line(install, kind):
    files, words = BROKEN[kind]
    install("some", peers.Peer("some-peer", "some_peer.kernels"), files)
    reason = peers.absent("some")
    assert reason == (words if kind == "absent" else f"some-peer cannot be imported: {words}")
    assert peers.version("some-peer") == (None if kind == "absent" else "unknown")
    with pytest.raises((RuntimeError, ModuleNotFoundError)):
        peers.code("some")


@pytest.mark.parametrize(
    "message, line",
    [
        ("no such card\nmore", "RuntimeError: no such card"),
        ("the compiler raised:\nno such type\nmore", "RuntimeError: the compiler raised: no such type"),
        ("", "RuntimeError"),
    ],
)
def test_an_error_is_reported_in_one_line(message, line):
    assert peers.first_line(RuntimeError(message)) == line


def test_a_peer_that_does_not_import_does_not_stop_the_others(install):
    install("some", peers.Peer("some-peer", "some_peer"), {"some_peer.py": "raise OSError('libsome.so is missing')"})
    broken = providers.Provider("broken", lambda p: peers.code("some").loss(p), peer="some")
    _, reports, able = measure.prepare(cases.suite("tiny")[0], "cpu", [broken, NAMED["fused_po"]])
    assert [q.name for q in able] == ["fused_po"]
    assert reports["broken"] == {"not run": "some-peer cannot be imported: OSError: libsome.so is missing"}


def test_a_bare_package_is_imported_without_its_init(install):
    files = {"some_peer/__init__.py": "raise ImportError('needs a cluster')", "some_peer/sub/__init__.py": "1 / 0"}
    files |= {"some_peer/sub/kernels.py": "from some_peer.sizes import WIDTH", "some_peer/sizes.py": "WIDTH = 3"}
    install("some", peers.Peer("some-peer", "some_peer.sub.kernels", bare=("some_peer", "some_peer.sub")), files)
    assert peers.absent("some") is None
    assert peers.code("some").WIDTH == 3
    install("none", peers.Peer("no-peer", "some_other.kernels", bare=("some_other",)), {})
    assert peers.absent("none") == "no-peer is not installed"


def test_stand_ins_replace_missing_modules_only_during_the_import(install):
    source = (
        "import some_absent\nfrom some_absent import Table\nimport some_there\ndef f(t: Table): return some_there.X\n"
    )
    files = {"some_peer.py": source, "some_there.py": "X = 5"}
    install("some", peers.Peer("some-peer", "some_peer", stand_ins=("some_absent", "some_there")), files)
    assert peers.absent("some") is None
    assert peers.code("some").f(None) == 5
    assert "some_absent" not in sys.modules and "some_there" in sys.modules


def test_imports_in_a_peers_first_call_find_the_stand_ins(install):
    files = {"some_peer/__init__.py": "", "some_peer/head.py": "def f(): from some_peer.utils import X; return X"}
    files |= {"some_peer/utils.py": "import some_absent\nX = 5"}
    peer = peers.Peer("some-peer", "some_peer.head", stand_ins=("some_absent",), later=("some_peer.utils",))
    install("some", peer, files)
    assert peers.code("some").f() == 5


def test_every_peer_has_a_release_and_every_release_a_peer():
    packages = {peer.package for peer in peers.PEERS.values()}
    assert packages == peer_wheels.RELEASES.keys()
    assert packages <= providers.versions().keys()
    assert peer_wheels.NOT_CARRIED.keys() < packages
    for q in (*providers.PROVIDERS, *kl_providers.KL_PROVIDERS):
        assert q.peer is None or q.peer in peers.PEERS


def nll(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=cases.IGNORE, reduction="none")


def scalar(hidden, weight, labels):
    return nll(hidden, weight, labels).sum() / (labels != cases.IGNORE).sum()


class Liger:
    """Liger's functions in plain PyTorch, with its signatures."""

    class LigerFusedLinearScaledCrossEntropyFunction:
        @staticmethod
        def apply(_input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1):
            assert temperature == 1 and ignore_index == cases.IGNORE and target.dtype == torch.int64
            return nll(_input, weight, target)

    class LigerFusedLinearCrossEntropyFunction:
        @staticmethod
        def apply(_input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction):
            assert bias is ce_weight is None and lse_square_scale == label_smoothing == 0
            assert ignore_index == cases.IGNORE
            return (nll if reduction == "none" else scalar)(_input, weight, target), None, None, None


def unsloth_logprobs(hidden, weight, targets, *, bias=None, mask=None, temperature=1.0):
    assert mask.dtype == torch.bool
    return -nll(hidden, weight, targets.clamp(min=0)) * mask


def unsloth_ce(hidden, weight, bias, targets, *, divisor, scaling=None, ignore_index=-100):
    return nll(hidden, weight, targets).sum() / divisor


def unsloth_jsd(student, weight, teacher, teacher_weight, *, labels=None, ignore_index=-100, beta=0.5):
    direction = {0: "forward", 1: "reverse"}.get(beta, "js")
    kl = kl_providers.eager_kl(student, weight, teacher, teacher_weight, labels, direction)
    return kl.sum() / (labels != ignore_index).sum()


def verl_ce(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    """Every label must be a row of the head, since there is no ignore_index. All tensors must be contiguous."""
    assert isinstance(temperature, float) and reduction == "none"
    assert hidden.is_contiguous() and weight.is_contiguous() and labels.is_contiguous() and labels.min() >= 0
    return -nll(hidden, weight, labels), torch.full(labels.shape, float("nan"))


def cce(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"):
    assert reduction == "none" and not shift and e.shape[:-1] == targets.shape and ignore_index == cases.IGNORE
    return nll(e, c, targets)


def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None):
    assert chunk_size % 128 == 0 and reduction == "mean" and ignore_index == cases.IGNORE
    return scalar(x, weight, target)


FAKES = {
    "liger": Liger,
    "unsloth": SimpleNamespace(
        fused_linear_logprobs=unsloth_logprobs, fused_linear_cross_entropy=unsloth_ce, fused_linear_jsd=unsloth_jsd
    ),
    "verl": SimpleNamespace(linear_cross_entropy=verl_ce),
    "cce": SimpleNamespace(linear_cross_entropy=cce),
    "quack": SimpleNamespace(chunked_linear_cross_entropy=quack),
}
SCALARS = {"Liger, cross entropy", "unsloth, cross entropy", "quack"}


@pytest.mark.parametrize("name", [q.name for q in providers.PROVIDERS if q.peer in FAKES])
@pytest.mark.parametrize("task", ["logps", "dpo"])
def test_results_of_peers_are_adapted_to_the_task(monkeypatch, name, task):
    """Stand-ins in plain PyTorch with the peers' signatures; half of each sequence is a prompt, labelled IGNORE."""
    if task == "dpo" and name in SCALARS:
        assert NAMED[name].refuses(cases.Case(96, 500, 32, task="dpo"), "cuda") == "it has no dpo loss"
        return
    monkeypatch.setattr(peers, "code", FAKES.get)
    p = cases.problem(cases.Case(96, 500, 32, prompt=0.5, task=task, reference="live"), "cpu")
    truth = cases.exact(p)
    errors, _ = measure.errors_of(NAMED[name], p, truth)
    assert measure.wrong(errors, measure.plain_errors(p, truth), torch.finfo(torch.float32).eps) is None, errors
    assert (errors.value_max is None) == (name in SCALARS - {"Liger, cross entropy"})


@pytest.mark.parametrize("direction", ["reverse", "forward", "js"])
def test_unsloths_divergence_matches_the_case(monkeypatch, direction):
    monkeypatch.setattr(peers, "code", FAKES.get)
    case = cases.Case(96, 500, 32, prompt=0.5, task="kl", reference="live", direction=direction)
    p = cases.problem(case, "cpu")
    truth = cases.exact(p)
    errors, _ = measure.errors_of(KL_NAMED["unsloth"], p, truth)
    assert measure.wrong(errors, measure.plain_errors(p, truth), torch.finfo(torch.float32).eps) is None, errors


REFUSED = [
    ("cut-cross-entropy", cases.Case(8, 16, 8, "bf16"), "cpu", "cut-cross-entropy needs a GPU"),
    ("cut-cross-entropy", cases.Case(8, 16, 8, "fp32"), "cuda", "its backward takes only bf16 and fp16"),
    ("verl", cases.Case(8, 16, 128), "cpu", "verl needs a GPU"),
    ("verl", cases.Case(8, 16, 96), "cuda", "it takes multiples of 128 for the hidden size, not 96"),
    ("quack", cases.Case(8, 16, 8), "cpu", "quack needs a GPU"),
    ("quack", cases.Case(8, 20, 8), "cuda", "it takes multiples of 8, not 20"),
    ("Liger", cases.Case(8, 16, 8, task="dpo"), "cuda", "its DPO does not take cached reference log-probs"),
    ("Liger", cases.Case(8, 16, 8), "cuda", "its chunked losses are for sequences"),
    ("Liger, cross entropy", cases.Case(8, 16, 8), "cpu", "it needs a GPU"),
]


@pytest.mark.parametrize("name, case, device, reason", REFUSED, ids=[f"{r[0]}-{i}" for i, r in enumerate(REFUSED)])
def test_unsupported_cases_of_a_peer_are_refused_with_the_reason(name, case, device, reason):
    assert NAMED[name].refuses(case, device) == reason


@pytest.mark.parametrize(
    "capability, dtype, words",
    [
        ((9, 0), "fp32", "its kernel for compute capability 9.0 takes only bf16"),
        (
            (9, 0),
            "bf16",
            "its kernel for compute capability 9.0 needs nvidia-cutlass-dsl: ImportError: no cutlass here",
        ),
        ((8, 0), "fp32", None),
    ],
)
def test_ligers_scaled_cross_entropy_on_a_gpu(monkeypatch, capability, dtype, words):
    def no_cutlass(name):
        raise ImportError("no cutlass here")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
    monkeypatch.setattr(peers.importlib, "import_module", no_cutlass)
    assert peers.liger_scaled_refuses(cases.Case(8, 16, 8, dtype), "cuda") == words
    assert peers.liger_scaled_refuses(cases.Case(8, 16, 8, dtype), "cpu") is None


def test_figures_that_cannot_be_counted_are_left_out(monkeypatch):
    p = cases.problem(cases.suite("tiny")[0], "cpu")
    truth = cases.exact(p)
    plain = measure.plain_errors(p, truth)
    monkeypatch.setattr(measure.counting, "peak_bytes", lambda call, device: 0)
    for uncounted, device in ((True, "cuda"), (True, "cpu"), (False, "cuda")):
        q = NAMED["eager"]._replace(uncounted=uncounted)
        report = measure.examine(q, p, truth, plain, device)
        assert ("GEMMs" in report) == (not uncounted or device == "cpu")


@torch.library.custom_op("fused_po_tests::projected", mutates_args=())
def projected(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("shape, flops", [((5, 7), 2 * 3 * 5 * 7), ((5,), 2 * 3 * 5)])
def test_a_product_inside_a_custom_op_is_counted_once(inside, shape, flops):
    a, b = torch.ones(3, 5), torch.ones(shape)
    with counting.FlopCounter() as count:
        projected(a, b) if inside else torch.mm(a, b.view(5, -1))
    assert count.flops == flops


def wheel(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{name}.py", text)


def test_wheels_are_unpacked_without_pip(tmp_path, capsys):
    wheels, target = tmp_path / "wheels", tmp_path / "peers"
    wheels.mkdir()
    wheel(wheels / "some_peer-1.0-py3-none-any.whl", some_peer="X = 1")
    wheel(wheels / "other-2.0-py3-none-any.whl", other="Y = 2")
    peer_wheels.unpack(target, wheels)
    assert (target / "some_peer.py").read_text() == "X = 1" and (target / "other.py").read_text() == "Y = 2"
    peer_wheels.check(wheels)
    assert "of 64" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["two releases", "none", "cut short", "too large", "not a folder"])
def test_unusable_wheels_are_refused(tmp_path, capsys, monkeypatch, kind):
    wheel(tmp_path / "some_peer-1.0-py3-none-any.whl", some_peer="X = 1" * 500)
    target, act = tmp_path / "peers", peer_wheels.unpack
    if kind == "two releases":
        wheel(tmp_path / "Some.Peer-1.1-py3-none-any.whl", some_peer="X = 2")
        words = ["some_peer-1.0-py3", "Some.Peer-1.1-py3", "delete one of them"]
    elif kind == "none":
        (tmp_path / "some_peer-1.0-py3-none-any.whl").unlink()
        words = ["holds no wheels", "make peer-wheels"]
    elif kind == "cut short":
        (tmp_path / "other-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04")
        words = ["other-1.0-py3-none-any.whl could not be extracted"]
    elif kind == "not a folder":
        target.write_text("")
        words = ["some_peer-1.0-py3-none-any.whl could not be extracted"]
    else:
        wheel(tmp_path / "large-1.0-py3-none-any.whl", large="X = 1" * 1000)
        monkeypatch.setattr(peer_wheels, "LIMIT", 3000)
        words, act = (
            ["over", "the largest is large-1.0-py3-none-any.whl"],
            lambda target, folder: peer_wheels.check(folder),
        )
    before = sorted(tmp_path.glob("*.whl"))
    with pytest.raises(SystemExit) as end:
        act(target, tmp_path)
    said = capsys.readouterr().err
    assert end.value.code == 1 and len(said.splitlines()) == 1
    assert all(word in said for word in words), said
    assert sorted(tmp_path.glob("*.whl")) == before


def test_a_download_that_fails_names_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peer_wheels.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    with pytest.raises(SystemExit) as end:
        peer_wheels.fetch(tmp_path)
    assert end.value.code == 1 and "could not download" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["cpo", "simpo", "orpo"])
def test_pairs_without_a_reference_match_the_pure_losses(task):
    """The definition behind the exact values of the cases equals fused_po's losses."""
    p = cases.problem(cases.Case(96, 500, 32, task=task, prompt=0.5), "cpu")
    assert p.case.name.startswith(f"{task}-N96") and p.ref_logps is p.ref_hidden is None
    values = NAMED["eager"].values(p).view(p.labels.shape)
    torch.testing.assert_close(NAMED["fused_po"].loss(p), cases.loss_of(p, values), rtol=1e-5, atol=1e-6)
    truth = cases.exact(p)
    errors, _ = measure.errors_of(NAMED["fused_po"], p, truth)
    assert measure.wrong(errors, measure.plain_errors(p, truth), torch.finfo(torch.float32).eps) is None, errors
    assert NAMED["Liger"].refuses(p.case, "cuda") is None


def test_git_ignores_the_wheels():
    assert "wheels/" in (ROOT / ".gitignore").read_text().splitlines()
    assert peer_wheels.FOLDER == ROOT / "wheels" / "peers"

"""Every bad call names the argument, what came and what is allowed."""

import pytest
import torch

import fused_po
from fused_po import Schedule, modules

LOGITS, HIDDEN, WEIGHT = torch.randn(4, 3, 9), torch.randn(4, 3, 5), torch.randn(9, 5)
LABELS = torch.zeros(4, 3, dtype=torch.long)
REF = torch.zeros(4, 3)


def logits(x=LOGITS, y=LABELS, **how):
    return fused_po.logps_from_logits(x, y, **how)


def linear(h=HIDDEN, w=WEIGHT, y=LABELS, *more, **how):
    return fused_po.linear_logps(h, w, y, *more, **how)


def dpo(x=LOGITS, y=LABELS, *refs, **how):
    return fused_po.dpo_from_logits(x, y, *(refs or (None, REF)), **how)


def linear_dpo(h=HIDDEN, w=WEIGHT, y=LABELS, **how):
    return fused_po.linear_dpo(h, w, y, **({"ref_logps": REF} | how))


def sequences(logps=REF, *more, **how):
    return fused_po.sequence_logps(logps, *more, **how)


BAD = [
    # what is called, the error, what its message must contain
    (lambda: logits([1.0]), TypeError, "logits: got list, expected a torch.Tensor"),
    (lambda: logits(LOGITS.int()), TypeError, "logits: got dtype torch.int32, allowed are float64, float32"),
    (lambda: logits(torch.randn(())), ValueError, r"logits: got shape \(\), expected \[..., V\]"),
    (lambda: logits(torch.randn(4, 3, 0)), ValueError, "logits: got shape .* with V >= 1"),
    (lambda: logits(y=LABELS[:3]), ValueError, r"labels: got shape \(3, 3\), expected \(4, 3\)"),
    (lambda: logits(y=LABELS.float()), TypeError, "labels: got dtype torch.float32, expected an integer"),
    (lambda: logits(y=None), TypeError, "labels: got NoneType"),
    (lambda: logits(y=LABELS.to("meta")), ValueError, "labels: is on meta, expected cpu"),
    (lambda: logits(y=LABELS + 9), ValueError, "labels: got 9 at flat position 0, allowed are 0 to 8, or ignore_index"),
    (lambda: logits(y=LABELS - 1), ValueError, "labels: got -1 at flat position 0"),
    (lambda: logits(y=LABELS - 100, ignore_index=-1), ValueError, "labels: got -100"),
    (lambda: logits(temperature=0.0), ValueError, "temperature: got 0.0, allowed are finite numbers > 0"),
    (lambda: logits(temperature=-1.0), ValueError, "temperature: got -1.0"),
    (lambda: logits(temperature=float("nan")), ValueError, "temperature: got nan"),
    (lambda: logits(temperature="hot"), TypeError, "temperature: got str, expected a number"),
    (lambda: logits(logit_scale=0.0), ValueError, "logit_scale: got 0.0"),
    (lambda: logits(softcap=-30.0), ValueError, "softcap: got -30.0"),
    (lambda: logits(softcap=float("inf")), ValueError, "softcap: got inf"),
    (lambda: logits(outputs=("logp",)), ValueError, "outputs: got 'logp', allowed are 'logps', 'entropy'"),
    (lambda: logits(outputs="logps"), TypeError, r"outputs: got the string 'logps', expected a tuple .*\('logps',\)"),
    (lambda: logits(outputs=()), ValueError, "outputs: got none"),
    (
        lambda: logits(backend="tritn"),
        ValueError,
        "backend: got 'tritn', allowed are 'triton', 'cuda', 'reference', or None",
    ),
    (
        lambda: logits(LOGITS.double(), backend="triton"),
        ValueError,
        "backend: 'triton' cannot serve dtype torch.float64",
    ),
    (lambda: linear(HIDDEN.long()), TypeError, "hidden: got dtype torch.int64"),
    (lambda: linear(w=WEIGHT.T), ValueError, r"weight: got shape \(5, 9\), expected \[V, H\]"),
    (lambda: linear(w=WEIGHT[:0]), ValueError, "weight: got shape .* with V >= 1"),
    (lambda: linear(w=WEIGHT.double()), TypeError, "weight: got dtype torch.float64, expected torch.float32"),
    (lambda: linear(w=WEIGHT.to("meta")), ValueError, "weight: is on meta"),
    (lambda: linear(y=LABELS.flatten()), ValueError, r"labels: got shape \(12,\), expected \(4, 3\)"),
    (lambda: linear(y=LABELS + 9), ValueError, "labels: got 9 at flat position 0"),
    (lambda: linear(HIDDEN, WEIGHT, LABELS, torch.zeros(8)), ValueError, r"bias: got shape \(8,\), expected \(9,\)"),
    (lambda: linear(HIDDEN, WEIGHT, LABELS, torch.zeros(9).int()), TypeError, "bias: got dtype torch.int32"),
    (lambda: linear(schedule=Schedule(logits_dtype=torch.float16)), ValueError, "logits_dtype: got torch.float16"),
    (lambda: Schedule(logits_dtype=torch.int8), ValueError, "logits_dtype: got torch.int8, allowed are"),
    (lambda: Schedule(tile_bytes=0), ValueError, "tile_bytes: got 0, allowed are ints >= 1"),
    (lambda: Schedule(tile_bytes=1e6), TypeError, "tile_bytes: got float, expected an int"),
    (lambda: dpo(LOGITS[:3], LABELS[:3]), ValueError, r"logits: got shape \(3, 3, 9\), expected \[2B, T, V\]"),
    (lambda: dpo(LOGITS[0], LABELS[0]), ValueError, r"logits: got shape \(3, 9\), expected \[2B, T, V\]"),
    (lambda: dpo(y=LABELS[:2]), ValueError, "labels: got shape"),
    (lambda: dpo(LOGITS, LABELS, None, None), ValueError, "expected exactly one of them"),
    (lambda: dpo(LOGITS, LABELS, LOGITS, REF), ValueError, "expected exactly one of them"),
    (lambda: dpo(LOGITS, LABELS, LOGITS[..., :8]), ValueError, "ref_logits: got shape"),
    (lambda: dpo(LOGITS, LABELS, None, REF[:, :2]), ValueError, r"ref_logps: got shape \(4, 2\)"),
    (lambda: dpo(LOGITS, LABELS, None, REF.int()), TypeError, "ref_logps: got dtype"),
    (lambda: dpo(beta=0.0), ValueError, "beta: got 0.0, allowed are finite numbers > 0"),
    (lambda: dpo(label_smoothing=0.5), ValueError, "label_smoothing: got 0.5, allowed are 0 <= label_smoothing < 0.5"),
    (lambda: dpo(kl="k4"), ValueError, "kl: got 'k4', allowed are None, 'k1', 'k2', 'k3', 'full'"),
    (lambda: dpo(kl_coef=0.1), ValueError, "kl_coef: got 0.1 without an estimator"),
    (lambda: dpo(kl="k1", kl_coef=-1.0), ValueError, "kl_coef: got -1.0"),
    (lambda: dpo(LOGITS, LABELS, None, REF.sum(1), kl="k1"), ValueError, "kl: got 'k1' with ref_logps summed"),
    (lambda: linear_dpo(HIDDEN[:3], y=LABELS[:3]), ValueError, r"hidden: got shape \(3, 3, 5\), expected \[2B, T, H\]"),
    (lambda: linear_dpo(ref_logps=None), ValueError, "ref_hidden, ref_weight, ref_logps: expected"),
    (lambda: linear_dpo(ref_logps=None, ref_hidden=HIDDEN), ValueError, "ref_hidden, ref_weight, ref_logps: expected"),
    (lambda: linear_dpo(ref_bias=torch.zeros(9)), ValueError, "ref_bias: given without ref_hidden"),
    (
        lambda: linear_dpo(ref_logps=None, ref_hidden=HIDDEN, ref_weight=WEIGHT[:8]),
        ValueError,
        "ref_weight: got shape .* the policy's vocabulary",
    ),
    (lambda: sequences(REF, REF[:2]), ValueError, "mask: got shape"),
    (lambda: sequences(REF[0]), ValueError, r"logps: got shape \(3,\), expected \[B, T\] without cu_seqlens"),
    (lambda: sequences(REF[0], cu_seqlens=LABELS), ValueError, "cu_seqlens: got shape"),
    (lambda: modules.DPOLoss(beta=-1), ValueError, "beta: got -1"),
    (lambda: modules.FusedLinearDPOLoss(loss_type="ipo"), ValueError, "loss_type: got 'ipo', allowed are 'sigmoid'"),
    (lambda: modules.FusedLinearDPOLoss()(WEIGHT, HIDDEN, LABELS), ValueError, "ref_input, ref_weight: got None"),
    (lambda: modules.FusedLinearDPOLoss(chunk_size=2), TypeError, "chunk_size"),
    (
        lambda: modules.FusedLinearDPOLoss(use_ref_model=False)(WEIGHT, HIDDEN[:3], LABELS[:3]),
        ValueError,
        "_input: got 3 sequences, expected an even number",
    ),
    (lambda: fused_po.shift_labels([1, 2]), TypeError, "labels: got list"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[f"{i}-{row[2][:30]}" for i, row in enumerate(BAD)])
def test_bad_call(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_good_calls_of_the_same_shapes():
    for call in (logits, linear, dpo, linear_dpo, sequences):
        call()


def test_backends_says_why():
    said = fused_po.backends("cpu", torch.float32)
    assert said["reference"] == "yes, chosen by backend=None"
    assert said["triton"].startswith(("no: ", "yes, by name"))
    assert fused_po.backends("cpu", torch.float64)["triton"].startswith("no: dtype torch.float64")


def test_labels_are_checked_on_a_gpu_when_asked_for(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: on a CPU labels are always checked, see the table above")
    monkeypatch.setenv("FUSED_PO_DEBUG", "1")
    with pytest.raises(ValueError, match="labels: got 9"):
        logits(LOGITS.cuda(), LABELS.cuda() + 9)

"""The charts of the benchmarks: every provider has its own style, the same in every panel and chart."""

import itertools

import cases
import kl_providers
import looks
import providers
import pytest
import report
from evidence import heads
from matplotlib import pyplot


def every_provider() -> set[str]:
    """The providers of the benchmarks and of `make gpu-evidence`."""
    found = {q.name for q in (*providers.PROVIDERS, *kl_providers.KL_PROVIDERS)} | {"bare GEMMs"}
    return found | {q.name for case, who in cases.evidence("tiny") for q in heads.chosen(case, who)}


def test_no_two_providers_look_the_same():
    assert looks.LOOKS.keys() == every_provider()
    drawn = [*looks.LOOKS.values(), looks.UNKNOWN]
    for one, other in itertools.combinations(drawn, 2):
        assert one[:3] != other[:3], (one, other)
    assert [name for name, look in looks.LOOKS.items() if look.color == looks.OURS] == ["fused_po"]
    assert looks.LOOKS["fused_po"].linewidth > max(x.linewidth for x in drawn if x.color != looks.OURS)


def recorded(names: list[str], **case) -> dict:
    """A benchmark's record of one case, where each provider is slightly slower than the one before."""
    about = {"tokens": 8, "vocabulary": 9, "width": 8, "dtype": "fp32", "prompt": 0.0, "task": "logps"} | case
    reports = {
        name: {"seconds": {report.MODE: i + about["tokens"] / 8}, "peak bytes": 1e6 * (i + 1)}
        for i, name in enumerate(names)
    }
    return {"case": about, "providers": reports}


@pytest.mark.parametrize("what", ["time", "memory"])
def test_a_provider_has_the_same_style_in_every_chart(what, tmp_path):
    names = sorted(looks.LOOKS)
    for order in (names, names[::-1], names[3:9], ["unheard of", *names]):
        found = [recorded(order, tokens=tokens) for tokens in (8, 16, 24)]
        found += [recorded(order[1:], vocabulary=v) for v in (18, 27)]
        figure = report.chart(found, what)
        lines = [line for plot in figure.axes for line in plot.get_lines()]
        pyplot.close(figure)
        assert len(figure.axes) == 2 and {line.get_label() for line in lines} == set(order)
        for line in lines:
            expected = looks.LOOKS.get(line.get_label(), looks.UNKNOWN)
            style = line.get_color(), line.get_marker(), line.get_linestyle()
            assert style == expected[:3], line.get_label()
    assert report.draw(found, what, tmp_path / "chart.png") and not report.draw(found[:1], what, tmp_path / "none.png")

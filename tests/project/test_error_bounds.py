"""The error bounds of `numerics`: a problem slightly beyond its bound is drawn again; a real fault still fails."""

import pytest
import torch
from numerics import DRAWS, Beyond, assert_below, assert_close, decide


@pytest.mark.parametrize("beyond, fails", [(0, False), (DRAWS // 2 - 1, False), (DRAWS // 2, True), (DRAWS - 1, True)])
def test_most_draws_decide(beyond, fails):
    """The first draw and `beyond` others exceed the bound."""
    first, seeds = Beyond("first"), []

    def run(seed: int) -> None:
        seeds.append(seed)
        if len(seeds) <= beyond:
            raise Beyond("another")

    if fails:
        with pytest.raises(Beyond, match="first"):
            decide(first, run, 7)
    else:
        with pytest.warns(UserWarning, match=f"in {beyond + 1} of {DRAWS} draws"):
            decide(first, run, 7)
    assert seeds == [8, 9, 10, 11]


def test_other_failures_are_not_drawn_again():
    assert_below(1.0, 1.0, "")
    with pytest.raises(Beyond):
        assert_below(2.0, 1.0, "")
    for far in (2.1, torch.nan):
        with pytest.raises(AssertionError) as raised:
            assert_below(far, 1.0, "")
        assert not isinstance(raised.value, Beyond)

    def run(seed: int) -> None:
        raise ValueError("not a bound")

    with pytest.raises(ValueError, match="not a bound"):
        decide(Beyond("first"), run, 0)


CALLS: list[tuple[int, int]] = []


@pytest.mark.filterwarnings("ignore:beyond its bound in 1 of")
def test_a_test_runs_again_with_other_seeds(seed):
    CALLS.append((seed, torch.randint(2**31, ()).item()))
    if len(CALLS) == 1:
        raise Beyond("the first draw")


def test_it_ran_with_every_draws_seed():
    seeds = [seed for seed, _ in CALLS]
    assert seeds == list(range(seeds[0], seeds[0] + DRAWS))
    assert len({number for _, number in CALLS}) == DRAWS


@pytest.mark.xfail(raises=AssertionError, strict=True, reason="every draw is wrong by a thousandth")
def test_an_error_of_a_thousandth_fails_in_every_draw(seed):
    exact = torch.randn(100, dtype=torch.float64)
    assert_close("factor", (exact * 1.001).float(), exact, [(exact.float() * (1 + 1e-7), exact)])

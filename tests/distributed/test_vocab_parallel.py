"""The vocabulary split over 2 and 4 processes: the tests of the unsplit ops, and the collectives between ranks."""

import itertools
import time

import pytest
import sharded_ops
import torch
import vocab_parallel_cases as cases
from numerics import BACKENDS, Scaling
from rank_pool import Ranks

CAP = Scaling(temperature=1.3, logit_scale=0.5, softcap=5.0)


@pytest.fixture(scope="module")
def groups():
    """Process groups by size. They start on first use, and again after a failure."""
    made: dict[int, Ranks] = {}

    def get(n_ranks: int) -> Ranks:
        if n_ranks not in made or not all(p.is_alive() for p in made[n_ranks].processes):
            made[n_ranks] = Ranks(n_ranks)
        return made[n_ranks]

    yield get
    for ranks in made.values():
        ranks.close()


def both(module, name, **options):
    """One case for each backend."""
    return [(module, name, options | {"backend": backend}) for backend in BACKENDS]


LOGITS = [
    *both("ops/test_logps", "test_logits_scaling_and_ignored", scaling=CAP, ignored="some", dtype=torch.bfloat16),
    *both(
        "ops/test_logps", "test_logits_scaling_and_ignored", scaling=Scaling(0.7), ignored="all", dtype=torch.float32
    ),
    *both("ops/test_logps", "test_minus_infinity_is_a_masked_vocabulary", dtype=torch.float32, v=33),
    *both("ops/test_logps", "test_minus_infinity_is_a_masked_vocabulary", dtype=torch.bfloat16, v=1003),
    *both("ops/test_logps", "test_confident_rows_keep_their_gradient"),
    *both("ops/test_logps", "test_is_top1_is_argmax_with_ties", v=20),
    *both("ops/test_logps", "test_broken_rows_stay_alone"),
    *both("ops/test_logps", "test_each_output_alone", outputs=("entropy",)),
]
PLAIN, BF16, FP32 = Scaling(), torch.bfloat16, torch.float32
STATS, BOTH = ("logps", "entropy", "lse"), (True, True)
TRAINED = {"use": (1, 1, 1), "frozen": False}
FROZEN = {"use": (1, 1, 0), "frozen": True}
LINEAR = [
    *both("ops/test_logps", "test_linear_scaling_bias_and_tiles", scaling=PLAIN, ignored="some", dtype=FP32),
    *both("ops/test_logps", "test_linear_scaling_bias_and_tiles", scaling=CAP, ignored="some", dtype=BF16),
    *both("ops/test_logps", "test_linear_scaling_bias_and_tiles", scaling=CAP, ignored="all", dtype=FP32),
]
REVERSE, FORWARD, JS = ("reverse", 0.5), ("forward", 0.5), ("js", 0.3)
KL = [
    *both("ops/test_kl", "test_values_and_gradients", how=REVERSE, dtype=BF16, v=1000),
    *both("ops/test_kl", "test_values_and_gradients", how=FORWARD, dtype=FP32, v=127),
    *both("ops/test_kl", "test_values_and_gradients", how=JS, dtype=FP32, v=127),
    *(
        (("lm_head/test_linear_kl", "test_linear_in_float64", {"how": REVERSE, "share": s, **TRAINED}))
        for s in (0.0, 0.4, 1.0)
    ),
    *(
        (("lm_head/test_linear_kl", "test_linear_in_float64", {"how": h, "share": 1.0, **FROZEN}))
        for h in (FORWARD, JS)
    ),
    *both(
        "lm_head/test_linear_kl",
        "test_linear_errs_no_more_than_plain_pytorch",
        how=JS,
        dtype=BF16,
        share=1.0,
        frozen=False,
    ),
    *both("lm_head/test_linear_kl", "test_equal_heads_give_exactly_zero", how=REVERSE),
    ("lm_head/test_linear_kl", "test_dropping_rows_does_not_change_results", {"share": 0.4, "frozen": False}),
]
SCHEDULES = [
    *both(
        "lm_head/test_schedules",
        "test_budgets_give_equal_gradients_and_runs_are_bitwise_equal",
        outputs=STATS,
        needs=BOTH,
    ),
    *both("lm_head/test_schedules", "test_statistics_are_bitwise_equal_whatever_is_kept", dtype=BF16),
    *both(
        "lm_head/test_schedules", "test_gradients_of_every_budget_against_float64", dtype=BF16, share=0.5, scaling=PLAIN
    ),
    *both(
        "lm_head/test_schedules", "test_gradients_of_every_budget_against_float64", dtype=FP32, share=0.0, scaling=CAP
    ),
    ("lm_head/test_schedules", "test_a_given_number_of_scored_tokens", {"bound": 24}),
    *both("lm_head/test_low_rank", "test_the_log_probs_do_not_depend_on_what_is_kept"),
    *both("ops/test_kl", "test_forbidden_tokens"),
    *both("ops/test_kl", "test_nan_stays_in_its_row"),
]
CASES = LOGITS + LINEAR + KL + SCHEDULES


SLOW_INTERPRETED = ("confident", "bitwise", "do_not_depend")


def grid():
    """(case, ranks, sizes). The longest interpreted cases and most cases of four ranks are slow tests."""
    for case, n_ranks, how in itertools.product(CASES, (2, 4), ("chunk", "uneven", "empty")):
        interpreted = case[2].get("backend") == "triton"
        long = interpreted and any(word in case[1] for word in SLOW_INTERPRETED)
        name = "-".join([case[1].removeprefix("test_"), *map(str, case[2].values()), str(n_ranks), how])
        marks = [pytest.mark.slow] if long or (n_ranks == 4 and (how != "uneven" or interpreted)) else []
        yield pytest.param(case, n_ranks, how, id=name, marks=marks)


@pytest.mark.parametrize("case, n_ranks, how", list(grid()))
def test_equals_the_unsplit_op(groups, case, n_ranks, how, seed):
    module, name, options = case
    groups(n_ranks).run(sharded_ops.run, how, seed, module, name, options)


@pytest.mark.parametrize("n_ranks", (2, 4))
@pytest.mark.parametrize("outputs", (("logps",), ("logps", "entropy", "lse", "is_top1")), ids=("logps", "more"))
@pytest.mark.parametrize("tile_rows, tiles", ((100, 1), (20, 1), (7, 3)))
def test_one_all_gather_per_tile(groups, n_ranks, outputs, tile_rows, tiles):
    """Forward: one all_gather per tile, of shift, norm, log-prob and the other outputs of each row, plus a header."""
    fields = 3 + sum(name in ("entropy", "is_top1") for name in outputs)
    rows = [20] if tiles == 1 else [7, 7, 6]
    for kept, frozen in ((0, False), (20, False), (8, False), (0, True)):
        for forward, backward in groups(n_ranks).run(cases.collectives, tile_rows, kept, frozen, outputs, 20):
            names = {name for name, _ in forward}
            assert len(names) == 1 and names.pop().startswith("all") and len(forward) == tiles, forward
            assert [size for _, size in forward] == [n_ranks * fields * (n + 1) for n in rows]
            assert all(name.startswith("allreduce") for name, _ in backward), backward
            assert sum(size for _, size in backward) == 20 * cases.H, backward


def test_collectives_overlap_products(groups):
    """A tile's all_gather overlaps the next tile's projection; hidden's all_reduce overlaps the head's gradient."""
    for forward, backward in groups(2).run(cases.overlap):
        assert forward == ["mm", "send", "mm", "send", "received", "mm", "send", "received", "received"]
        assert backward == ["mm", "send", "mm"]


@pytest.mark.parametrize("n_ranks", (2, 4))
@pytest.mark.parametrize("rows, bias", ((100, False), (3, True)), ids=("one tile", "many tiles, bias"))
def test_a_frozen_head(groups, n_ranks, rows, bias):
    groups(n_ranks).run(cases.frozen, rows, bias)


@pytest.mark.parametrize("direction, times", (("reverse", 1), ("forward", 1), ("js", 2)))
def test_the_kl_gathers_once_or_twice(groups, direction, times):
    for said in groups(2).run(cases.divergence, direction):
        assert len(said) == times, said
        assert said[0][1] == 2 * 8 * 21


@pytest.mark.parametrize("n_ranks", (2, 4))
@pytest.mark.parametrize("v, bias", ((96, False), (97, True), (3, True)))
def test_a_head_sharded_by_parallelize_module(groups, n_ranks, v, bias):
    groups(n_ranks).run(cases.parallelized, v, bias)


@pytest.mark.parametrize("n_ranks", (2, 4))
@pytest.mark.parametrize("as_dtensors", (False, True), ids=("tensors", "dtensors"))
def test_sequence_parallel(groups, n_ranks, as_dtensors):
    groups(n_ranks).run(cases.sequence_parallel, as_dtensors)


def test_verl_with_tensor_parallelism(groups):
    groups(2).run(cases.verl)


def test_chunked_loss_and_dpo(groups):
    groups(2).run(cases.chunked)


def test_compiled(groups):
    groups(2).run(cases.compiled)


REFUSED = [
    "ValueError: weight: got a DTensor with placements (Shard(dim=1),), allowed are Shard(0)",
    "TypeError: weight: got a plain tensor with a DTensor; pass all as DTensors, or none",
    "ValueError: process_group: got a group with weight as a DTensor",
    "ValueError: weight: got 96 entries of the vocabulary, expected",
    "ValueError: sizes: got (1,), expected the rows of each of the group's 2 ranks",
    "TypeError: group: got str, expected a torch.distributed.ProcessGroup",
    "TypeError: process_group: got str, expected a torch.distributed.ProcessGroup or a VocabParallel",
    "ValueError: labels: got 9900 at flat position 0, allowed are 0 to 191",
    "ValueError: process_group: sequence_dim and partial_grad are only for hidden states",
    "ValueError: sequence_dim: got 5, allowed are -1 to 0",
    "ValueError: ref_weight: its ranks have the whole vocabulary, expected (48, 48) rows, as weight",
]


def test_bad_input(groups):
    for said in groups(2).run(cases.refused):
        for got, expected in zip(said, REFUSED, strict=True):
            assert got.startswith(expected), got


def test_ranks_with_different_labels_raise(groups):
    for _, error in groups(2).answers(cases.other_labels):
        assert error.what.startswith("ValueError: process_group: its ranks got different labels")


@pytest.mark.parametrize("case", ("other_shapes", "one_dies"))
def test_no_rank_waits_forever(case):
    """If ranks disagree on shapes or a rank dies, the others raise within the group's timeout instead of hanging."""
    timeout = 10
    ranks = Ranks(2, timeout)
    begin = time.monotonic()
    answers = ranks.answers(getattr(cases, case))
    took = time.monotonic() - begin
    ranks.close()
    assert took < timeout + 60  # includes the start of the processes
    if case == "one_dies":
        assert answers[0][1] is None and answers[0][0] <= timeout + 5
        assert answers[1][1].what == "the process is dead"
    else:
        assert all(error is not None for _, error in answers), answers

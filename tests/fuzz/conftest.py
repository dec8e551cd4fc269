"""Print the seed, before the tests and for each test that fails."""

import fuzzing
import pytest


def pytest_report_header():
    return f"fuzzing: {fuzzing.CASES} cases, FUSED_PO_SEED={fuzzing.SEED} repeats them"


@pytest.fixture(autouse=True)
def report_seed(request):
    request.node.user_properties.append(("seed", fuzzing.SEED))

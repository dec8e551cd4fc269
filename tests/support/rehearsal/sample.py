"""A pytest plugin: run the first case of each test function and every n-th after it (FUSED_PO_REHEARSAL_EVERY)."""

from __future__ import annotations

import collections
import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = int(os.environ.get("FUSED_PO_REHEARSAL_EVERY", "1"))
    seen: collections.Counter[str] = collections.Counter()
    kept, left = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        (left if seen[function] % every else kept).append(item)
        seen[function] += 1
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept

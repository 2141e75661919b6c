"""Two pools, for what goes from one to the other; both are sound at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdzram.engine.pool import Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool() as made:
        yield made
        made.check()


@pytest.fixture
def other() -> Iterator[Pool]:
    with Pool() as made:
        yield made
        made.check()

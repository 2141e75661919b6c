"""What tests of threads share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdzram.engine.disk import OFFLOAD_SIZE, offload_from
from nbdzram.engine.publish import pause_at_publish


@pytest.fixture
def small_requests_meet_too() -> Iterator[None]:
    """However small, they give the interpreter lock away; what a test pauses goes on after it."""
    offload_from(0)
    yield
    offload_from(OFFLOAD_SIZE)
    pause_at_publish(False)

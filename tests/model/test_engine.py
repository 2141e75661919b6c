"""Whatever is done to the engine, in whatever order, it holds what a plain dictionary holds."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbdzram.engine.arena import allocations_left, fail_allocation
from nbdzram.errors import ArenaError, UserError
from tests.model.engine import DISK_SIZE, Pair, random_step
from tests.unit.engine.blocks import BLOCK

CHOICES = st.integers(0, 99)
ALIGNED = st.integers(0, DISK_SIZE // BLOCK - 1).map(lambda block: block * BLOCK)
OFFSETS = ALIGNED | ALIGNED | st.integers(0, DISK_SIZE - 1)
LENGTHS = st.sampled_from((1, 512, BLOCK, 2 * BLOCK, 3 * BLOCK + 5)) | st.integers(1, 40000)
TASKS = st.sampled_from(("fold", "fold dry", "compact", "recompress", "check"))


@pytest.fixture(autouse=True)
def no_failures() -> Iterator[None]:
    yield
    fail_allocation(-1)


class Engine(RuleBasedStateMachine):
    """Every rule is a step of Pair; the invariants are checked after each."""

    @initialize(
        limit=st.sampled_from((0, 0, 1 << 20, 200 << 10)), inline=st.booleans(), mask=st.sampled_from((-1, -1, 15, 0))
    )
    def begin(self, limit: int, inline: bool, mask: int) -> None:
        self.pair = Pair(mem_limit=limit, inline_dedup=inline, mask=mask)
        self.pair.create()

    @rule(choice=CHOICES, offset=OFFSETS, length=LENGTHS, kind=st.integers(0, 6), number=st.integers(0, 60))
    def write(self, choice: int, offset: int, length: int, kind: int, number: int) -> None:
        self.pair.write(choice, offset, length, kind, number)

    @rule(choice=CHOICES, offset=OFFSETS, length=LENGTHS)
    def read(self, choice: int, offset: int, length: int) -> None:
        self.pair.read(choice, offset, length)

    @rule(choice=CHOICES, offset=OFFSETS, length=LENGTHS | st.just(DISK_SIZE))
    def trim(self, choice: int, offset: int, length: int) -> None:
        self.pair.trim(choice, offset, length)

    @rule(choice=CHOICES, offset=OFFSETS, length=LENGTHS | st.just(DISK_SIZE), no_hole=st.booleans())
    def zero(self, choice: int, offset: int, length: int, no_hole: bool) -> None:
        self.pair.zero(choice, offset, length, no_hole=no_hole)

    @rule()
    def create(self) -> None:
        self.pair.create()

    @rule(choice=CHOICES)
    def clone(self, choice: int) -> None:
        self.pair.clone(choice)

    @rule(choice=CHOICES)
    def delete(self, choice: int) -> None:
        self.pair.delete(choice)

    @rule(name=TASKS)
    def begin_task(self, name: str) -> None:
        self.pair.begin(name)

    @rule(name=TASKS, budget=st.integers(1, 500))
    def step_task(self, name: str, budget: int) -> None:
        self.pair.step(name, budget)

    @rule()
    def fold_to_the_end(self) -> None:
        self.pair.finish_fold()

    @rule()
    def tick(self) -> None:
        self.pair.tick(1)

    @invariant()
    def holds(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.compare()


TestEngine = Engine.TestCase
TestEngine.settings = settings(
    max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def long_run(path: Path | None, seed: int, steps: int, check_every: int) -> None:
    choose = random.Random(seed)
    pair = Pair(
        str(path) if path else None,
        mem_limit=choose.choice((0, 0, 600 << 10)),
        inline_dedup=choose.random() < 0.3,
        mask=choose.choice((-1, -1, -1, 31)),
    )
    pair.create()
    for step in range(steps):
        try:
            random_step(pair, choose)
        except UserError:  # a failing allocation: no new export then
            fail_allocation(-1)
        if step % check_every == 0:
            pair.check()
    fail_allocation(-1)
    pair.compare()
    pair.finish_fold()
    pair.compare()
    pair.check()


@pytest.mark.parametrize("seed", range(4))
def test_a_seeded_run_in_memory_agrees_with_the_model(seed: int) -> None:
    long_run(None, seed, steps=2500, check_every=25)


@pytest.mark.parametrize("seed", range(100, 103))
def test_a_seeded_run_with_reopenings_agrees_with_the_model(seed: int, tmp_path: Path) -> None:
    long_run(tmp_path / "arena", seed, steps=2500, check_every=25)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1010))
def test_a_million_steps_agree_with_the_model(seed: int, tmp_path: Path) -> None:
    long_run(tmp_path / "arena" if seed % 2 else None, seed, steps=100_000, check_every=50)


def test_a_failure_at_every_single_allocation_loses_nothing(tmp_path: Path) -> None:
    """The same small story again and again, each time with the next allocation refused, until none is left."""
    failures = 0
    for countdown in range(10_000):
        path = tmp_path / f"arena {countdown}"
        fail_allocation(countdown)
        try:
            pair = Pair(str(path))
            pair.create()
        except (ArenaError, UserError):
            failures += 1
            fail_allocation(-1)
            continue
        for block in range(0, 24, 2):
            pair.write(0, block * BLOCK, 2 * BLOCK, block, block)
        pair.write(0, 600 * BLOCK, BLOCK, 1, 1)
        with contextlib.suppress(UserError):
            pair.clone(0)
        pair.write(0, 5 * BLOCK + 7, 100, 4, 5)
        pair.zero(0, BLOCK * 3 + 1, BLOCK * 4, no_hole=True)
        pair.begin("recompress")
        pair.step("recompress", 100)
        pair.begin("compact")
        pair.step("compact", 1000)
        pair.finish_fold()
        pair.check()
        pair.compare()
        exhausted = _left()
        pair.reopen()
        pair.check()
        pair.compare()
        pair.pool.close()
        path.unlink()
        if exhausted:
            break
        failures += 1
    assert failures > 20


def _left() -> bool:
    """Whether the countdown was not used up; it is switched off."""
    left = allocations_left() >= 0
    fail_allocation(-1)
    return left

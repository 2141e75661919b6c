"""The fuzzed properties, driven in two ways: by hypothesis, which knows the protocol's grammar, and by atheris, which
knows the code's branches. `make fuzz` runs the latter for hours."""

from __future__ import annotations

import importlib.util
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import seeds
from tests.fuzz.arenas import EDIT, forge
from tests.fuzz.targets import EXPORT_SIZE, haggle, transmit
from tests.wire import name_and_infos, name_and_queries, option, request

RUNS = {"haggle": 4000, "transmit": 3000, "forge": 150}  # some thirty seconds together
LONG_RUNS = int(os.environ.get("FUZZ_RUNS", "100000"))  # some ten minutes; `make fuzz` asks for millions, and hours
SLOWER = {"forge": 25}  # than the others
ROOT = Path(__file__).resolve().parents[2]

search = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.fixture(autouse=True, scope="module")
def no_log() -> Iterator[None]:
    """Thousands of clients that do everything wrong would fill pytest's memory of the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


names = st.sampled_from([b"disk", b"", b"nobody", "\N{SNOWMAN}".encode(), b"\xff", b"a\0b", b"x" * 4097])
queries = st.sampled_from([b"base:", b"base:allocation", b"nbdzram:fold", b"nbdzram:", b"qemu:x", b"nocolon", b"\xff:"])
options = st.one_of(
    st.builds(option, st.sampled_from([2, 3, 5, 8, 11]), st.sampled_from([b"", b"x"])),
    st.builds(option, st.integers(0, 2**32 - 1), st.binary(max_size=40)),
    st.builds(
        lambda number, name, infos: option(number, name_and_infos(name, *infos)),
        st.sampled_from([6, 7]),
        names,
        st.lists(st.integers(0, 5), max_size=4),
    ),
    st.builds(
        lambda number, name, asked: option(number, name_and_queries(name, *asked)),
        st.sampled_from([9, 10]),
        names,
        st.lists(queries, max_size=4),
    ),
    st.builds(option, st.just(1), names),
    st.binary(max_size=30),
)
offsets = st.one_of(
    st.sampled_from([0, 0, 1, 4096, 12345]), st.integers(0, EXPORT_SIZE + 100), st.integers(0, 2**64 - 1)
)
lengths = st.one_of(st.sampled_from([0, 1, 512, 4096, 4097, 8192, 65536, 65537, 300_000]), st.integers(0, 20_000))


@st.composite
def wire_requests(draw: st.DrawFn, style: int) -> bytes:
    wide = style == 2
    command = draw(st.one_of(st.sampled_from([0, 1]), st.integers(0, 8), st.sampled_from([255, 65535])))
    flags = draw(st.one_of(st.just(0), st.sampled_from([1, 4, 8, 2, 18]), st.integers(0, 65535)))
    if wide and command == 1 and draw(st.integers(0, 9)):
        flags |= 32
    carries = command == 1 or (wide and bool(flags & 32))
    if wide and command == 7 and carries:
        ids = draw(st.lists(st.integers(0, 3), max_size=3))
        payload = struct.pack(f">Q{len(ids)}I", draw(lengths), *ids)
        return request(command, draw(offsets), len(payload), flags=flags, extended=True) + payload
    length = draw(lengths)
    header = request(command, draw(offsets), length, flags=flags, cookie=draw(st.integers(0, 2**64 - 1)), extended=wide)
    return header + (draw(st.sampled_from([b"\0", b"x"])) * length if carries else b"")


@search
@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 3), st.lists(options, max_size=6))
def test_a_handshake_answers_the_same_wherever_it_is_cut(
    policy: int, split: int, flags: int, said: list[bytes]
) -> None:
    haggle(bytes([policy, split]) + struct.pack(">I", flags) + b"".join(said))


@search
@given(st.data(), st.integers(0, 255), st.integers(0, 255))
def test_a_session_answers_what_the_model_does_wherever_it_is_cut(
    data: st.DataObject, circumstances: int, split: int
) -> None:
    said = data.draw(st.lists(wire_requests(circumstances % 3), max_size=8))
    cut = data.draw(st.integers(0, 40))
    whole = b"".join(said)
    transmit(bytes([circumstances, split]) + whole[: len(whole) - cut])


@search
@given(
    st.lists(
        st.builds(
            EDIT.pack,
            st.integers(0, 7),
            st.integers(0, 255),
            st.integers(0, 2**16 - 1),
            st.one_of(st.integers(0, 600), st.integers(0, 2**64 - 1)),
        ),
        max_size=4,
    )
)
def test_an_arena_whose_writer_knows_every_check_is_refused_or_lived_with(edits: list[bytes]) -> None:
    forge(b"".join(edits))


def test_every_seed_holds() -> None:
    for said in seeds.HANDSHAKES.values():
        haggle(said)
    for said in seeds.TRANSMISSIONS.values():
        transmit(said)
    for edits in seeds.FORGERIES.values():
        forge(edits)


def test_the_committed_corpus_is_what_the_seeds_say() -> None:
    """Nobody edits the files by hand: python -m tests.fuzz.seeds writes them."""
    for target, made in seeds.CORPORA.items():
        found = {path.name: path.read_bytes() for path in (seeds.CORPUS / target).iterdir()}
        assert {name: found.get(name) for name in made} == made


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        *RUNS.items(),
        *(pytest.param(target, LONG_RUNS // SLOWER.get(target, 1), marks=pytest.mark.slow) for target in RUNS),
    ],
)
def test_a_coverage_guided_search_finds_nothing(target: str, runs: int, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has wheels for Linux on x86-64 only")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    process = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", target, corpus, seeds.CORPUS / target, f"-runs={runs}", "-timeout=60"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    assert f"Done {runs} runs" in process.stderr

"""The rules of the layout, held by walking every import and cimport of the package.

    cli -> {server, control, metrics} -> rates -> status -> {sessions, stream} -> {nbd, engine} -> {settings, values}
        -> config -> {bounds, units, errors, machine, receive, residence, slices}

Packages of one level do not import each other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbdzram

ROOT = Path(nbdzram.__file__).parent
LEVELS = (
    ("bounds", "errors", "units", "machine", "receive", "residence", "slices"),
    ("config",),
    ("values",),
    ("settings",),
    ("engine",),
    ("nbd",),
    ("stream",),
    ("sessions",),
    ("status",),
    ("rates",),
    ("server", "control", "metrics"),
    ("cli",),
    ("__main__",),
)
"""From the bottom up: a package imports what stands above it here, and itself. engine and nbd are kept apart below."""

APART = {
    ("engine", "nbd"),
    ("nbd", "engine"),
    ("engine", "settings"),
    ("nbd", "settings"),
    ("server", "settings"),
    ("sessions", "settings"),
    ("stream", "nbd"),
    ("stream", "settings"),
    ("sessions", "stream"),
    ("nbd", "stream"),
}
RESERVED = {
    "asyncio": {
        "server",
        "control.audit",
        "control.server",
        "metrics.http",
        "metrics.answers",
        "cli.images",
        "cli.loading",
        "cli.processes",
        "cli.serve",
    },
    "uvloop": {"cli.serve"},
    "ssl": {"server.certificate"},  # TLS itself is libssl's, without the interpreter lock
    "_ssl": {"sessions.openssl"},
    "click": {"cli"},
    "rich": {"cli"},
    "prometheus_client": {"metrics.process"},  # hot families are written directly: metrics/exposition.py says why
    "h11": {"metrics.requests"},
    "socket": {
        "server",
        "control",
        "stream.pipe",
        "metrics.http",
        "metrics.requests",
        "cli.serve",
        "cli.diagnosis",
        "cli.supervisor",
        "cli.takeover",
        "cli.attach",
        "cli.greeting",
        "cli.keep",
        "cli.netlink",
    },
    "subprocess": {"cli"},
}
LONGEST_FILE = 600
WIDEST_LINE = 120  # as pyproject.toml has it
SOURCES = sorted(path for pattern in ("*.py", "*.pyx", "*.pxd", "*.pyi") for path in ROOT.rglob(pattern))
_CIMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import\b|c?import\s+([\w.]+))", re.MULTILINE)


def module_of(path: Path) -> str:
    """errors.py -> errors, engine/pool.pyx -> engine.pool"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix in {".pyx", ".pxd"}:
        for match in _CIMPORT.finditer(text):
            yield match[1] or match[2]
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def level_of(top: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if top in names)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_arrows_run_one_way(path: Path) -> None:
    module = module_of(path)
    top = module.split(".")[0]
    for target in imports(path):
        if not target.startswith("nbdzram."):
            continue
        to = target.split(".")[1]
        assert to == top or level_of(to) < level_of(top), f"{module} must not import {target}"
        assert (top, to) not in APART, f"{module} must not import {target}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_what_is_reserved_is_used_only_where_it_belongs(path: Path) -> None:
    module = module_of(path)
    for target in imports(path):
        allowed = RESERVED.get(target.split(".")[0])
        if allowed is None:
            continue
        inside = any(module == place or module.startswith(f"{place}.") for place in allowed)
        assert inside, f"{module} must not import {target}; only {', '.join(sorted(allowed)) or 'tests'} may"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_file_outgrows_its_readers(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{module_of(path)} has {lines} lines; cut it where one idea ends, at {LONGEST_FILE}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix != ".py"], ids=module_of)
def test_no_line_is_wider_than_a_page(path: Path) -> None:
    """Of Python the linter says so already; of Cython nobody else does."""
    lines = path.read_text(encoding="utf-8").splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > WIDEST_LINE]
    assert not wide, f"{module_of(path)}: lines {wide} are wider than {WIDEST_LINE} columns"


def test_the_walk_sees_the_whole_package() -> None:
    tops = {module_of(path).split(".")[0] for path in SOURCES} - {"__init__"}
    assert tops == {name for names in LEVELS for name in names}
    compiled = ROOT / "engine" / "pool.pyx"
    assert "nbdzram.engine.store" in set(imports(compiled))

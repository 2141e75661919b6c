"""The rules of the layout, held by walking every import and cimport of the package.

    cli -> {server, control, metrics} -> rates -> status -> {sessions, stream} -> {nbd, engine}
        -> {settings, values, listening} -> config -> {bounds, errors, machine, precedence, ready, receive, residence,
                                                       slices, thresholds, units, unread}

Packages of one level do not import each other, and no file knows one that knows it: neither by an import that waits for
its call, nor for types alone, nor by a class that is declared before it is there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nbdzram

ROOT = Path(nbdzram.__file__).parent
LEVELS = (
    (
        "bounds",
        "errors",
        "units",
        "machine",
        "precedence",
        "ready",
        "receive",
        "residence",
        "slices",
        "thresholds",
        "unread",
    ),
    ("config",),
    ("listening", "values"),
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
        "cli.going_on",
        "cli.images",
        "cli.loading",
        "cli.processes",
        "cli.serve",
        "cli.stops",
    },
    "uvloop": {"cli.serve"},
    "ssl": {"server.certificate"},  # TLS itself is libssl's, without the interpreter lock
    "_ssl": {"sessions.openssl"},
    "click": {"cli"},
    "rich": {"cli"},
    "prometheus_client": {"metrics.process"},  # hot families are written directly: metrics/exposition.py says why
    "h11": {"metrics.requests"},
    "socket": {
        "unread",
        "listening",
        "server",
        "control",
        "stream.pipe",
        "metrics.http",
        "metrics.requests",
        "cli.serve",
        "cli.supervisor",
        "cli.takeover",
        "cli.attach",
        "cli.greeting",
        "cli.keep",
        "cli.netlink",
        "cli.onlookers",
    },
    "subprocess": {"cli"},
}
LONGEST_FILE = 600
WIDEST_LINE = 120  # as pyproject.toml has it
SOURCES = sorted(path for pattern in ("*.py", "*.pyx", "*.pxd", "*.pyi") for path in ROOT.rglob(pattern))
_FORWARD = re.compile(
    r"^[ \t]*(?:ctypedef\s+|cdef\s+)?(?:public\s+)?class\s+\w+(?:\([\w, .]*\))?[ \t]*(?:#.*)?$", re.MULTILINE
)
_NAMES = re.compile(r"^from\s+[\w.]+\s+c?import\s+(\([^)]*\)|[^\n]+)", re.MULTILINE)
_QUOTED = re.compile(r'(cdef extern from [^\n]*\n\s*)?"""(?:.|\n)*?"""')
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


def named_by(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, also where it names them as `from package import module`."""
    text = path.read_text(encoding="utf-8")
    for target in imports(path):
        yield target
        if (ROOT.parent / target.replace(".", "/")).is_dir():
            for names in re.findall(rf"from {re.escape(target)} c?import (\([^)]*\)|[^\n]*)", text):
                yield from (f"{target}.{name}" for name in re.findall(r"\w+", names))


def arrows(paths: Iterable[Path]) -> dict[str, set[str]]:
    """Which modules each module imports. A stub says what a compiled module's callers see, and imports nothing."""
    found: dict[str, set[str]] = {}
    for path in paths:
        if path.suffix != ".pyi":
            module = f"nbdzram.{module_of(path)}".removesuffix(".__init__")
            found.setdefault(module, set()).update(set(named_by(path)) - {module})
    return found


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """One way round, from a module to itself; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


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


def unused(text: str) -> list[str]:
    """Names that a file of Cython imports and uses nowhere else; words of comments and docstrings are no use, those of
    C that stands in it are."""
    text = _QUOTED.sub(lambda block: block[0] if block[1] else "", re.sub(r"#[^\n]*", "", text))
    names = [
        part.split(" as ")[-1].strip()
        for listed in _NAMES.findall(text)
        for part in listed.strip("()").replace("\n", " ").split(",")
        if part.strip()
    ]
    rest = _NAMES.sub("", text)
    return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", rest)]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix in {".pyx", ".pxd"}], ids=module_of)
def test_no_name_is_imported_that_nobody_uses(path: Path) -> None:
    """Of Python the linter says so already; of Cython nobody else does."""
    left = unused(path.read_text(encoding="utf-8"))
    assert left == [], f"{module_of(path)} imports {', '.join(left)} and does not use it"


def test_no_file_knows_one_that_knows_it() -> None:
    assert circle(arrows(SOURCES)) == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix in {".pyx", ".pxd"}], ids=module_of)
def test_no_class_is_declared_before_it_is_there(path: Path) -> None:
    """`cdef class Disk` without a colon: how two files of Cython would know each other."""
    text = path.read_text(encoding="utf-8")
    assert _FORWARD.findall(text) == [], f"{module_of(path)} declares a class that another file defines"


def test_a_circle_is_seen_however_it_is_closed(tmp_path: Path) -> None:
    """By a look at each way in which the package once had one."""
    assert sorted(set(circle({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}}))) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
    late = tmp_path / "late.pyx"
    late.write_text("cdef class Late:\n    def make(self):\n        from nbdzram.engine.disk import Disk\n")
    assert "nbdzram.engine.disk" in set(named_by(late))
    typed = tmp_path / "typed.py"
    typed.write_text("if TYPE_CHECKING:\n    from nbdzram.server import hosting\n")
    assert "nbdzram.server.hosting" in set(named_by(typed))
    for forward in ("cdef class Disk\n", "    cdef class Disk  # later\n", "cdef class Disk(Blocks)\n"):
        assert _FORWARD.search(f"\n{forward}cdef int x\n")
    for whole in ("cdef class Disk:\n", "cdef class Disk(Blocks):\n", "# a cdef class\n"):
        assert not _FORWARD.search(f"\n{whole}    cdef int x\n")


def test_a_name_that_nobody_uses_is_seen() -> None:
    text = '''"""Of a word."""
from libc.stdint cimport (
    uint8_t,  # word
    uint32_t,
)
from nbdzram.engine.disk import Disk as Word
cdef extern from * nogil:
    """
    static uint8_t one;  /* told */
    """
cdef uint32_t two
'''
    assert unused(text) == ["Word"]
    assert unused(text + "Word()") == []


def test_the_walk_sees_the_whole_package() -> None:
    tops = {module_of(path).split(".")[0] for path in SOURCES} - {"__init__"}
    assert tops == {name for names in LEVELS for name in names}
    compiled = ROOT / "engine" / "pool.pyx"
    assert "nbdzram.engine.store" in set(imports(compiled))

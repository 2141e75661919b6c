"""Every limit, default and number of a format, of all files, in one list: who reads a change sees each that it changes.

python -m tests.unit.test_limits        writes it anew, after a change that is meant
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "nbdzram"
LIMITS = Path(__file__).with_name("limits.txt")
OF_ENUMS = re.compile(r"^    ([A-Z][A-Z0-9_]*)(?: = ([^#\n]+?))?(?:  #.*)?$", re.MULTILINE)
LITERAL = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Tuple, ast.operator, ast.unaryop, ast.Load, ast.Name)


def is_literal(value: ast.expr) -> bool:
    """Of numbers, texts that are words, and other such names; what people are told is held elsewhere."""
    return all(
        isinstance(part, LITERAL) and not (isinstance(part, ast.Constant) and len(str(part.value)) > 40)
        for part in ast.walk(value)
    )


def of_python(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Module | ast.ClassDef):
            continue
        within = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for one in node.body:
            if isinstance(one, ast.Assign | ast.AnnAssign) and one.value is not None and is_literal(one.value):
                targets = one.targets if isinstance(one, ast.Assign) else [one.target]
                names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
                yield f"{within}{', '.join(names)} = {ast.unparse(one.value)}"


def of_compiled(path: Path) -> Iterator[str]:
    """Members of enumerations: one that has no value has that of the one before and one."""
    for block in re.split(r"^(?=\S)", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if re.match(r"cdef enum|cpdef enum", block):
            for name, value in OF_ENUMS.findall(block):
                yield f"{name} = {value.strip() or 'the next'}"


def lines() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in {".py", ".pyx", ".pxd"}:
            found = list(of_python(path) if path.suffix == ".py" else of_compiled(path))
            if found:
                yield f"-- {path.relative_to(PACKAGE)}"
                yield from found


def test_no_limit_is_another_one_than_it_was() -> None:
    assert list(lines()) == LIMITS.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    LIMITS.write_text("\n".join(lines()) + "\n", encoding="utf-8")

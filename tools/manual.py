"""The manual pages, from the same code as docs/reference: nbdzram(1), one for each command, nbdzram.toml(5).

Written in man(7)'s macros, which man-db and mandoc both read. `python -m tools.manual [DIRECTORY]` writes them, by
default to docs/man: the Makefile does so with each build, and `make install` and `make wheel` take them from there.
They are not kept under version control, since nobody reads a change of them.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from nbdzram.cli import serve
from nbdzram.cli.main import COMMANDS, front
from nbdzram.settings import KEYS
from tools.figures import default_of, section_of

DIRECTORY = Path("docs/man")
EXIT_CODES = (
    ("0", "done"),
    ("1", "failed"),
    ("2", "wrong use or configuration"),
    ("3", "no server answers"),
    ("4", "no such export or pool"),
)
FILES = (
    ("/etc/nbdzram/nbdzram.toml", "the service's configuration, see nbdzram.toml(5)"),
    ("/run/nbdzram/nbdzram.sock", "the control socket of the service"),
    ("$XDG_RUNTIME_DIR/nbdzram/nbdzram.sock", "that of a user's own server"),
)
ENVIRONMENT = (
    ("NBDZRAM_CONTROL", "the control socket, for every command"),
    ("NBDZRAM_CONFIG", "the configuration, for serve and doctor"),
    ("NBDZRAM_*", "any key of the configuration, see nbdzram.toml(5)"),
    ("NO_COLOR", "no colours, if it is there and not empty"),
)


def pages() -> dict[str, str]:
    """Every page by the name of its file."""
    made = {"nbdzram.1": _front_page(), "nbdzram.toml.5": _configuration_page()}
    made |= {f"nbdzram-{name}.1": _command_page(name, says) for name, says in COMMANDS.items()}
    return {name: "\n".join(lines) + "\n" for name, lines in made.items()}


def _front_page() -> Iterator[str]:
    yield from _head("nbdzram", 1, "network block devices that live compressed and deduplicated in RAM")
    yield from _synopsis("nbdzram", ["COMMAND", "[OPTIONS]", "[ARGUMENTS]"])
    yield ".SH DESCRIPTION"
    yield from _paragraphs(front.help or "")
    yield ".SH COMMANDS"
    yield from _terms((f"nbdzram-{name}(1)", says) for name, says in COMMANDS.items())
    yield from _examples(front.epilog or "")
    yield ".SH EXIT STATUS"
    yield from _terms(EXIT_CODES)
    yield ".SH ENVIRONMENT"
    yield from _terms(ENVIRONMENT)
    yield ".SH FILES"
    yield from _terms(FILES)
    yield from _see_also("nbdzram.toml(5)", "nbd-client(8)", "nbd(4)", "zramctl(8)")


def _command_page(name: str, says: str) -> Iterator[str]:
    command = importlib.import_module(f"nbdzram.cli.{name}").command
    yield from _head(f"nbdzram-{name}", 1, says[0].lower() + says[1:].rstrip("."))
    if isinstance(command, click.Group):
        context = click.Context(command)
        yield from _synopsis(f"nbdzram {name}", command.collect_usage_pieces(context))
        yield ".SH DESCRIPTION"
        yield from _paragraphs(command.help or "")
        yield ".SH OPTIONS"
        yield from _options(command)
        yield from _examples(command.epilog or "")
        for part in command.list_commands(context):
            child = command.get_command(context, part)
            assert child is not None
            yield f".SH {name.upper()} {part.upper()}"
            yield from _usage(f"nbdzram {name} {part}", child)
            yield from _paragraphs(child.help or "")
            yield from _options(child)
            yield from _examples(child.epilog or "", ".SS Example")
    else:
        context = click.Context(command)
        yield from _synopsis(f"nbdzram {name}", command.collect_usage_pieces(context))
        yield ".SH DESCRIPTION"
        yield from _paragraphs(command.help or "")
        yield ".SH OPTIONS"
        yield from _options(command)
        yield from _examples(command.epilog or "")
    yield from _see_also("nbdzram(1)", *(["nbdzram.toml(5)"] if name in {"serve", "doctor"} else []))


def _configuration_page() -> Iterator[str]:
    yield from _head("nbdzram.toml", 5, "configuration of nbdzram serve")
    yield ".SH DESCRIPTION"
    yield from _paragraphs(
        "A TOML file, named by -c or NBDZRAM_CONFIG. The *.toml files of the directory conf.d beside it are read after "
        "it, in the order of their names. A flag wins over the environment, the environment over the files, the files "
        "over the defaults.\n\n"
        "nbdzram serve -c FILE --check-config reads everything, says what it means, warns of what would lose disks, "
        "and ends. A list given in a variable is separated by white space."
    )
    flags = {path: f"--{flag.replace('_', '-')}" for flag, path in serve.FLAGS.items()}
    for section in dict.fromkeys(section_of(key) for key in KEYS):
        yield f".SH {_escape(section)}"
        for key in (key for key in KEYS if section_of(key) == section):
            path = tuple("default" if word == "*" else word for word in key.path)
            flag = flags.get(key.path, flags.get(path))
            told = [f"Default: {default_of(key).strip('`')}."]
            told += [f"Variable: {key.variable}."] if key.variable else []
            told += [f"Flag: {flag}."] if flag else []
            yield from _terms([(key.path[-1], f"{key.says}. {' '.join(told)}")])
    yield from _see_also("nbdzram(1)", "nbdzram-serve(1)")


def _head(name: str, section: int, says: str) -> Iterator[str]:
    """No date and no version: a page changes when what it says does."""
    yield '.\\" Written by `python -m tools.manual` from the code; change it there.'
    yield f'.TH {name.upper()} {section} "" nbdzram "nbdzram manual"'
    yield ".SH NAME"
    yield f"{_escape(name)} \\- {_escape(says)}"


def _synopsis(name: str, pieces: Iterable[str]) -> Iterator[str]:
    yield ".SH SYNOPSIS"
    yield f".B {_escape(name)}"
    yield _escape(" ".join(pieces))


def _usage(name: str, command: click.Command) -> Iterator[str]:
    yield f".B {_escape(name)}"
    yield _escape(" ".join(command.collect_usage_pieces(click.Context(command))))
    yield ".PP"


def _options(command: click.Command) -> Iterator[str]:
    context = click.Context(command)
    records = (p.get_help_record(context) for p in command.get_params(context) if isinstance(p, click.Option))
    yield from _terms((names, re.sub(r"\s+", " ", says)) for names, says in filter(None, records))


def _terms(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, says in pairs:
        yield ".TP"
        yield f".B {_escape(term)}"
        yield _escape(says)


def _paragraphs(text: str) -> Iterator[str]:
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text).replace("\b\n", ""))
    for number, paragraph in enumerate(paragraphs):
        if number:
            yield ".PP"
        yield _escape(" ".join(paragraph.split()))


def _examples(epilog: str, heading: str = ".SH EXAMPLES") -> Iterator[str]:
    lines = epilog.replace("\b\n", "").split("\n\n")[0].splitlines()
    lines = [re.sub(r"^\s*Examples?:\s*", "", line).strip() for line in lines]
    if any(lines):
        yield heading
        yield ".EX"
        yield from (_escape(line) for line in lines if line)
        yield ".EE"


def _see_also(*pages: str) -> Iterator[str]:
    yield ".SH SEE ALSO"
    for number, page in enumerate(pages, start=1):
        name, section = page.removesuffix(")").split("(")
        yield f".BR {_escape(name)} ({section}){',' if number < len(pages) else ''}"


def _escape(text: str) -> str:
    """So that nothing of it is a request of roff's; a hyphen stays one that can be pasted."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def main() -> None:
    """Write the pages, and remove those of commands that are gone."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.[15]"):
        old.unlink()
    for name, content in pages().items():
        (directory / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()

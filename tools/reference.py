"""Write docs/reference from the code: the command line, configuration, metrics, and the control protocol.

    python -m tools.reference           write the pages
    python -m tools.reference --check   fail if a page is not what would be written

Nothing is described here that the code does not describe itself; a test keeps the pages current.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from nbdzram import status
from nbdzram.bounds import Bounds
from nbdzram.cli import serve, stat
from nbdzram.cli.main import COMMANDS
from nbdzram.cli.objects import SCHEMA
from nbdzram.control.messages import Code
from nbdzram.control.methods import Changes, Operations, Parameter, method_table
from nbdzram.engine import stats
from nbdzram.metrics import answers, families
from nbdzram.metrics.process import ProcessMetrics
from nbdzram.settings import KEYS
from tools.figures import default_of, section_of

PAGES = Path(__file__).resolve().parent.parent / "docs" / "reference"
ALERTS = PAGES.parent.parent / "deploy" / "prometheus" / "rules" / "alerts.yml"
NOTE = "<!-- Written by `python -m tools.reference` from the code; change it there. -->"

EXAMPLE = """\
listen = ["0.0.0.0:10809", "unix:/run/nbdzram/nbd.sock,mode=0660,owner=root:disk"]
metrics = "127.0.0.1:9809"
state_dir = "/var/lib/nbdzram"

[pools.default]
mem_limit = "50%"

[exports.root]
size = "20G"
description = "the machines' image"
read_only = true

[exports.scratch]
size = "100G"
allow_addresses = ["10.0.0.0/8"]

[maintenance]
fold = "auto"
recompress = "1h"

[tls]
mode = "require"
certificate = "/etc/nbdzram/cert.pem"
key = "/etc/nbdzram/key.pem"
"""


def cli_page() -> Iterator[str]:
    """Every command: usage, what it does, options, examples."""
    yield "# Command line"
    yield NOTE
    yield (
        "Exit codes: 0 done, 1 failed, 2 usage, 3 server unreachable, 4 no such export or pool. Sizes are read as "
        "zramctl reads them: K and KiB are 1024 bytes, KB is 1000. `--json` prints for programs."
    )
    yield table(("command", "what it does"), ((f"[`nbdzram {n}`](#nbdzram-{n})", says) for n, says in COMMANDS.items()))
    for name in COMMANDS:
        yield from _command(f"nbdzram {name}", importlib.import_module(f"nbdzram.cli.{name}").command, depth=2)


def configuration_page() -> Iterator[str]:
    """Every key, its variable, its flag and its default."""
    yield "# Configuration"
    yield NOTE
    yield (
        "`nbdzram serve -c FILE` reads a TOML file, then the `*.toml` files of `conf.d` beside it in the order of "
        "their names. A flag wins over the environment, the environment over the files, the files over the defaults. "
        "`nbdzram serve -c FILE --check-config` reads everything, says what it means, and ends. A list given in a "
        "variable is separated by white space. A time is a number of seconds, or has a letter behind it: 90, 30s, 10m, "
        "2h, 7d."
    )
    yield f"```toml\n{EXAMPLE}```"
    flags = {path: f"`--{flag.replace('_', '-')}`" for flag, path in serve.FLAGS.items()}
    flags |= {("listen",): "`-i`, `-p`, `-U`, `--vsock`", ("exports", "*", "size"): "`-e NAME=SIZE`"}
    for section in dict.fromkeys(section_of(key) for key in KEYS):
        yield f"## {section}"
        yield table(
            ("key", "what it is", "default", "variable", "flag"),
            (
                (
                    f"`{key.path[-1]}`",
                    key.says,
                    default_of(key),
                    f"`{key.variable}`" if key.variable else "",
                    flags.get(key.path, flags.get(tuple("default" if p == "*" else p for p in key.path), "")),
                )
                for key in KEYS
                if section_of(key) == section
            ),
        )


def metrics_page() -> Iterator[str]:
    """Every family."""
    yield "# Metrics"
    yield NOTE
    yield (
        "Published at `/metrics` of the metrics address in Prometheus' text format. Names follow the kernel's zram "
        "where it has the figure (Documentation/admin-guide/blockdev/zram). Labels are pools, exports and fixed words; "
        "never a client's address."
    )
    groups = (
        ("The kernel's mm_stat, a pool", families.MM_STAT),
        ("Pools", families.POOL),
        ("Exports", families.EXPORT),
        ("Server", families.SERVER),
    )
    for title, group in groups:
        yield f"## {title}"
        yield table(
            ("name", "type", "labels", "what it is"),
            ((f"`{f.name}`", f.kind, ", ".join(f.samples.labels), f.says) for f in group),
        )
    yield "## Process"
    yield table(
        ("name", "type", "what it is"),
        ((f"`{name}`", kind, says) for name, kind, says in ProcessMetrics().families()),
    )
    yield "## Other addresses of the same server"
    routes = re.findall(r"^ +GET (\S+) +(.+)$", inspect.getdoc(answers) or "", re.MULTILINE)
    yield table(("path", "what it is"), ((f"`{path}`", says) for path, says in routes))


def control_page() -> Iterator[str]:
    """Every method and record of the control socket."""
    yield "# Control protocol"
    yield NOTE
    yield (
        "A unix socket of mode 0600; one JSON-RPC 2.0 object a line, UTF-8. Requests of one connection are answered in "
        "order. Before its answer a `run` may send notifications `progress` with the `id` of the request, `run` (a "
        "RunStatus) and `waits_for` (the RunStatus of the one under way, or null). A refusal has the code "
        "-32000 and in `data` the `kind` of error and the `exit_code` that the command line ends with."
    )
    yield '```console\n$ echo \'{"jsonrpc":"2.0","method":"status","id":1}\' | nc -U -q1 /run/nbdzram/nbdzram.sock\n```'
    yield "## Methods"
    for name, method in method_table(_nobody(), _nobody()).items():
        operation = getattr(Operations, _operation_of(name), None) or getattr(Changes, _operation_of(name))
        yield f"### `{name}`"
        yield (inspect.getdoc(operation) or "").split("\n")[0]
        if method.parameters:
            rows = (
                (f"`{p}`", _linked(parameter.kind.__name__), _parameter_default(parameter))
                for p, parameter in method.parameters.items()
            )
            yield table(("parameter", "type", "default"), rows)
        yield f"Result: {_linked(str(inspect.signature(operation).return_annotation))}."
    yield "## Errors"
    yield table(("code", "name"), ((str(code.value), code.name.lower().replace("_", " ")) for code in Code))
    yield "## Records"
    for record in _records():
        yield f"### {record.__name__}"
        yield (inspect.getdoc(record) or "").split("\n\n")[0].replace("\n", " ")
        yield table(("field", "type", "what it is"), _fields(record))


def json_page() -> Iterator[str]:
    """What --json prints."""
    yield "# JSON"
    yield NOTE
    yield (
        f"Every command that prints JSON does so in schema **{SCHEMA}**; `nbdzram version --json` says which, "
        "and `stat` and `top` say it in their objects. Under one number keys may come; a key that goes, or whose type "
        "or meaning changes, takes the next number. Sizes are bytes, times seconds, moments seconds since the epoch; "
        "null is what is not known or does not apply. `saved` means the same everywhere: "
        "`orig_data_size - mem_used_total - metadata`."
    )
    yield table(("command", "prints"), iter(JSON_COMMANDS))
    yield "## `stat --json`"
    yield table(("key", "what it is"), iter(JSON_OF_STAT))


JSON_COMMANDS = (
    ("`nbdzram stat --json`", "the object below; with EXPORT or --pool only those"),
    ("`nbdzram stat --json -o LIST`", "`schema` and `rows`: the columns as keys, in lower case, `-` as `_`"),
    ("`nbdzram stat --json --watch SECONDS`", "either of them again and again, one line each"),
    ("`nbdzram top --json`", "a line at each look: `rates` a second, `pools` with their `queue`, `exports`"),
    ("`nbdzram exports --json`, `exports list`, `ls`", "a list of [ExportStatus](control.md#exportstatus)"),
    (
        "`nbdzram exports add --json`, `exports change`, `exports resize`, `exports rollback`, `clone`, `snapshot`",
        "an [ExportStatus](control.md#exportstatus); of `snapshot --all` a list",
    ),
    ("`nbdzram exports reset --json`", "an [ExportStatus](control.md#exportstatus); of several a list"),
    ("`nbdzram exports rename --json`", "an [ExportRenaming](control.md#exportrenaming)"),
    (
        "`nbdzram exports remove --json`, `rm`, `pools remove`",
        "`removed`: the name; of several a list of such objects",
    ),
    (
        "`nbdzram exports remove --json`, `exports reset`, `exports resize`, `exports rollback`, with `--dry-run`",
        "a list of [ExportLoss](control.md#exportloss), of one as well",
    ),
    ("`nbdzram pools --json`, `pools list`", "a list of [PoolStatus](control.md#poolstatus)"),
    (
        "`nbdzram pools add --json`, `pools limit`, `pools dedup`, `pools verify`, `pools tell-sharing`",
        "a [PoolStatus](control.md#poolstatus)",
    ),
    ("`nbdzram clients --json`, `clients list`", "a list of [ClientStatus](control.md#clientstatus)"),
    ("`nbdzram clients disconnect --json`", "a list of objects with `disconnected`: the number"),
    (
        "`nbdzram fold --json`, `compact`, `recompress`, `check`",
        "a list of [RunReport](control.md#runreport), one a pool",
    ),
    (
        "`nbdzram check --salvage FILE --json`",
        (
            "`exports`: names; `blocks`, `stream_bytes`; `lost`: `export`, `first`, `count`; `lost_exports`: how many; "
            "`lost_pools`: each with the reason; `notes`"
        ),
    ),
    ("`nbdzram runs --json`, `runs list`", "a list of [RunStatus](control.md#runstatus)"),
    (
        "`nbdzram runs cancel --json`, `runs pause`, `runs resume`",
        "a list of [RunStatus](control.md#runstatus), of one as well",
    ),
    ("`nbdzram reload --json`", "a [ReloadReport](control.md#reloadreport)"),
    ("`nbdzram send --json`", "a [SendReport](control.md#sendreport), on standard error"),
    ("`nbdzram receive --json`", "a [ReceiveReport](control.md#receivereport)"),
    ("`nbdzram streams --json`, `streams list`", "a list of [StreamStatus](control.md#streamstatus)"),
    ("`nbdzram streams abandon --json`", "a list of objects with `abandoned`: the name"),
    ("`nbdzram doctor --json`", "a list of findings: `level` (ok, warn, fail), `subject`, `says`, `remedy`"),
    (
        "`nbdzram estimate --json`",
        (
            "`files`: `path`, `size_bytes`; `hole_bytes`, `sample`; in blocks `blocks`, `same_filled`, `objects`, "
            "`distinct_objects`; `needs` of `lz4` and of `zstd`, in bytes: `compressed`, `distinct`, `memory`, "
            "`memory_folded`"
        ),
    ),
    ("`nbdzram health --json`", "`schema`, `ready`, `version`, `pid`"),
    ("`nbdzram version --json`", "`schema`, `version`, `server_version` (null where none answers)"),
)
JSON_OF_STAT = (
    ("`schema`", "the number of this shape"),
    ("`version`, `pid`, `uptime_seconds`, `uris`, `connections`", "of [ServerStatus](control.md#serverstatus)"),
    ("`pools`", "`name`, `path`, `dedup`, every field of [PoolStats](control.md#poolstats), and `saved`"),
    ("`exports`", "every field of [ExportStatus](control.md#exportstatus), `usage` and `operations` as below"),
    ("`exports[].usage`", "[DiskUsage](control.md#diskusage), or null where it is not known yet"),
    (
        "`exports[].operations`",
        (
            "by name: `requests`, `bytes`, `errors` by cause, `median_seconds` and `p99_seconds` since the server "
            "started; the histograms are in `/metrics`"
        ),
    ),
)


JSON_WORDS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "None": "null"}


def alerts_page() -> Iterator[str]:
    """Every alert of deploy/prometheus, with its runbook."""
    import yaml  # noqa: PLC0415 - of the extra `deploy`; the other pages do without

    yield "# Alerts"
    yield NOTE.replace("the code", "`deploy/prometheus/rules/alerts.yml`")
    yield "What each alert means, and what to do. `critical`: clients lose writes or disks; `warning` can wait."
    for rule in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]:
        told = {name: _without_templates(text) for name, text in rule["annotations"].items()}
        waits = f" for {rule['for']}" if "for" in rule else ""
        yield f"## {rule['alert']}"
        yield f"{rule['labels']['severity']}{waits}, while:"
        yield f"```text\n{rule['expr'].strip()}\n```"
        yield told["description"]
        yield told["runbook"]


def _without_templates(text: str) -> str:
    """An annotation's text with `{{ $labels.pool }}` as POOL, and a value as its number in words."""
    text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: match[1].upper(), text.strip())
    return re.sub(r"\{\{ \$value[^}]*\}\}", "N", text)


PAGE_MAKERS: dict[str, Callable[[], Iterator[str]]] = {
    "cli.md": cli_page,
    "configuration.md": configuration_page,
    "metrics.md": metrics_page,
    "control.md": control_page,
    "json.md": json_page,
    "alerts.md": alerts_page,
}


def pages() -> dict[Path, str]:
    """Each page's path and content."""
    return {PAGES / name: "\n\n".join(part for part in make() if part) + "\n" for name, make in PAGE_MAKERS.items()}


def table(headings: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _command(name: str, command: click.Command, *, depth: int) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    yield f"{'#' * depth} {name}"
    yield f"```text\n{' '.join([name, *command.collect_usage_pieces(context)])}\n```"
    yield inspect.cleandoc(command.help or "")
    if isinstance(command, click.Group):
        for part in command.list_commands(context):
            child = command.get_command(context, part)
            assert child is not None
            yield from _command(f"{name} {part}", child, depth=depth + 1)
        return
    options = [p.get_help_record(context) for p in command.get_params(context) if isinstance(p, click.Option)]
    rows = ((f"`{names}`", re.sub(r"\s+", " ", says)) for names, says in filter(None, options) if "--help" not in names)
    yield table(("option", "what it does"), rows)
    if name == "nbdzram stat":
        yield "Columns for `--output`, with zramctl's names where it has them:"
        yield table(("column", "what it is"), ((f"`{column.heading}`", column.says) for column in stat.COLUMNS))
    examples = re.sub(r"^\s*Examples?:\s*", "", (command.epilog or "").replace("\b\n", ""))
    yield "```console\n" + "\n".join(f"$ {line.strip()}" for line in examples.splitlines() if line.strip()) + "\n```"


def _nobody() -> Any:
    """Stands where a server would: the table of methods names operations, the tool never calls one."""
    return object.__new__(type("Nobody", (), {}))


def _operation_of(method: str) -> str:
    noun, _, verb = method.partition(".")
    return f"{verb}_{noun.removesuffix('s')}" if verb else noun


def _parameter_default(parameter: Parameter) -> str:
    if parameter.default is ...:
        return "required"
    if parameter.default is None:
        return "none"
    return f"`{str(parameter.default).lower()}`" if parameter.default != "" else "empty"


def _records() -> list[type]:
    kinds = [getattr(status, name) for names in status.PLACES.values() for name in names.split()]
    found: set[type] = {Bounds, stats.PoolStats, stats.DiskUsage}
    found |= {kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    parts = {
        status.RunOptions,
        status.ExportFigures,
        status.PoolFigures,
    }  # of others, or asked
    return sorted(found - parts, key=lambda kind: kind.__name__)


def _fields(record: type) -> Iterator[tuple[str, ...]]:
    """Name, type, and the comment behind the field."""
    wholes = [kind for kind in reversed(record.__mro__) if dataclasses.is_dataclass(kind)]
    for line in "".join(map(inspect.getsource, wholes)).splitlines():
        match = re.fullmatch(r"    (\w+): ([^=#]+?)(?: = [^#]+)?(?:  # (.+))?", line)
        if match:
            yield f"`{match[1]}`", _linked(match[2]), match[3] or ""


def _linked(kind: str) -> str:
    """A type in JSON's words, our records linked."""
    plain = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", kind.strip("'").replace("nbdzram.status.", ""))
    while "dict[" in plain:
        plain = re.sub(r"dict\[str, (.+)\]", r"object of \1", plain, count=1)
    for python, json in JSON_WORDS.items():
        plain = re.sub(rf"\b{python}\b", json, plain)
    plain = plain.replace(" | ", " or ")
    return re.sub(r"\b([A-Z]\w+)\b", lambda m: f"[{m[1]}](#{m[1].lower()})", plain)


def main() -> int:
    """Write, or with --check compare. The exit code."""
    stale = 0
    for path, content in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == content:
            continue
        stale += 1
        if "--check" in sys.argv:
            sys.stderr.write(f"{path} is not current; run: python -m tools.reference\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

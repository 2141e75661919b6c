"""`nbdzram doctor`: what would keep a server from running well here, each with its remedy."""

from __future__ import annotations

import os
import shutil
import textwrap
from pathlib import Path

import click

from nbdzram.cli.common import ANY_PATH, control_option, json_option, print_json
from nbdzram.cli.diagnosis import CHECKS, Finding, Level, Patient, running_server
from nbdzram.cli.vitals import VITALS
from nbdzram.config import ServerConfig
from nbdzram.settings import load

COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}
SUBJECT_WIDTH = 14
WIDEST = 100


@click.command(
    "doctor",
    epilog="\b\nExamples:\n  nbdzram doctor\n  nbdzram doctor -c /etc/nbdzram/nbdzram.toml --json",
)
@click.option(
    "-c",
    "--config",
    metavar="FILE",
    type=ANY_PATH,
    help="Look at this configuration, which `serve` would be given, and not at the server that runs.",
)
@json_option
@control_option
@click.pass_context
def command(context: click.Context, *, config: Path | None, as_json: bool, control: Path | None) -> None:
    """Look for what would keep a server from running well on this machine.

    Of a server that runs it looks at what that has: pools, state, unit, threads, descriptors, addresses, certificates.
    With -c, or when none runs, at what a configuration asks for and this machine has. It changes nothing. The exit code
    is 1 if something fails; warnings do not count.
    """
    server, unreachable = running_server(control)
    if server is not None and config is None:
        patient, checks = Patient(ServerConfig(), server), VITALS
    else:
        source = str(config) if config else os.environ.get("NBDZRAM_CONFIG") or None
        patient, checks = Patient(load(config, os.environ, {}), server, source=source, unreachable=unreachable), CHECKS
    found = [finding for check in checks for finding in check(patient)]
    if as_json:
        print_json(found)
    else:
        for finding in found:
            _tell(finding)
    context.exit(1 if any(finding.level is Level.FAIL for finding in found) else 0)


def _tell(finding: Finding) -> None:
    mark = click.style(f"{finding.level:5}", fg=COLOURS[finding.level], bold=finding.level is not Level.OK)
    indent = " " * (6 + SUBJECT_WIDTH + 1)
    told = _wrap(finding.says, indent) + (_wrap(f"remedy: {finding.remedy}", indent) if finding.remedy else [])
    click.echo(f"{mark} {finding.subject:{SUBJECT_WIDTH}} {f'{chr(10)}{indent}'.join(told)}")


def _wrap(text: str, indent: str) -> list[str]:
    """As wide as the terminal, and 100 columns at most; in a pipe those 100."""
    width = min(shutil.get_terminal_size((WIDEST, 1)).columns, WIDEST) - len(indent)
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)

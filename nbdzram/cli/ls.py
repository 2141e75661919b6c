"""`nbdzram ls`: `nbdzram exports list` in fewer letters."""

from __future__ import annotations

from nbdzram.cli import exports
from nbdzram.cli.common import in_other_words

command = in_other_words(exports.list_, "ls", epilog="Example: nbdzram ls")

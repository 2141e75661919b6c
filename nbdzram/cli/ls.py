"""`nbdzram ls`: `nbdzram exports list` in fewer letters."""

from __future__ import annotations

from nbdzram.cli.common import in_other_words
from nbdzram.cli.listing import list_

command = in_other_words(list_, "ls", epilog="Example: nbdzram ls")

"""Which terminals can be drawn on."""

from __future__ import annotations

import os
from typing import TextIO

DUMB = {"dumb", "unknown"}
"""Emacs' shell, consoles of CI: nothing can be drawn over, and what moves a cursor or colours is garbage there."""


def is_dumb() -> bool:
    """Whether this process's terminal says so of itself."""
    return os.environ.get("TERM", "").lower() in DUMB


def may_draw_on(stream: TextIO) -> bool:
    """Whether what stands there can be written over."""
    return stream.isatty() and not is_dumb()

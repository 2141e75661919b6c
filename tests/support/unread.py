"""What the system keeps for peers that do not read."""

from __future__ import annotations

from pathlib import Path


def unread_bytes(port: int) -> int:
    """Of all TCP peers of a local port, closed sockets among them: resident in nobody's memory (proc(5), tcp)."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(int(row[4].split(":")[0], 16) for row in rows if int(row[1].split(":")[1], 16) == port)

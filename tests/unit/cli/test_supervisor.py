"""What systemd is told, where there is hardly a descriptor left to tell it with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT_DESCRIPTORS = """
import resource
from nbdzram.cli.supervisor import notify_supervisor, wait_for_supervisor
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
notify_supervisor("READY=1")
wait_for_supervisor()
print("goes on")
"""


def test_want_of_descriptors_ends_nobody_who_has_something_to_tell(tmp_path: Path) -> None:
    """Who took over from another server has its clients by then, and the other has left."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS],
        env={"NOTIFY_SOCKET": str(tmp_path / "notify")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr.count("Too many open files")) == ("goes on\n", 2), done.stderr

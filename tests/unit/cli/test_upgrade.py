"""A server of another version is taken over from, and who does goes on in the background, whatever becomes of the
command that began it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nbdzram.cli import upgrade
from tests.unit.cli.told import ANSWERS, serving
from tests.unit.records import SERVER

IN_THE_BACKGROUND = """
import os, sys
from nbdzram.cli.upgrade import go_to_background

told, tells = map(int, sys.argv[1:])
serves = go_to_background(os.pidfd_open(os.getppid()))
os.write(tells, b"starts ")
os.read(told, 1)
serves()
os.write(tells, b"serves")
"""


def test_who_serves_goes_on_where_nobody_waits_for_the_command_any_more() -> None:
    """An impatient operator ended it, or a time-out of systemd's; and the other server has left by then."""
    (told, tell), (hears, tells) = os.pipe(), os.pipe()
    command = [sys.executable, "-c", IN_THE_BACKGROUND, str(told), str(tells)]
    with os.fdopen(hears, "rb", buffering=0) as heard:
        with subprocess.Popen(command, pass_fds=(told, tells)) as foreground:
            os.close(tells)
            assert heard.read(7) == b"starts "
            foreground.kill()
        os.write(tell, b"x")
        assert heard.read(7) == b"serves"
    os.close(tell)
    os.close(told)


@pytest.mark.parametrize(("ends", "code"), [("serves()", 0), ("sys.exit()", 1)])
def test_the_command_ends_with_what_became_of_who_was_to_serve(ends: str, code: int) -> None:
    script = f"""
import os, subprocess, sys
from nbdzram.cli.upgrade import go_to_background

old = subprocess.Popen(["true"])
serves = go_to_background(os.pidfd_open(old.pid))
{ends}
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False, capture_output=True)
    said = done.stderr.decode()
    assert (1 if "click.exceptions.Exit: 1" in said else 0) == code, said


def test_a_server_of_this_version_reads_its_configuration_and_another_is_named_and_known_by_its_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as (control, recorder):
        monkeypatch.setattr(upgrade, "__version__", SERVER.version)
        assert upgrade.reload_if_current(control) is None
        assert capsys.readouterr().out == "".join(f"{line}\n" for line in ANSWERS["reload"].lines())
        assert "reload()" in recorder.asked
        recorder.asked.clear()
        monkeypatch.setattr(upgrade, "__version__", "99.9")
        old = upgrade.reload_if_current(control)
        assert capsys.readouterr().out == f"version {SERVER.version} serves; version 99.9 takes over\n"
        assert recorder.asked == ["status()"]
        assert old is not None
        with open(f"/proc/self/fdinfo/{old}") as info:  # noqa: PTH123 - a descriptor
            assert f"Pid:\t{os.getpid()}\n" in info.read()
        os.close(old)

"""What a person gets wrong on the command line: one sentence and an exit code, never a traceback."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.interop

SECONDS = 60


def nbdzram(*words: str, directory: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", "nbdzram", *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=directory,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(directory)},
        check=False,
    )


def expect_refusal(process: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    printed = process.stdout + process.stderr
    assert process.returncode == code, printed
    assert "Traceback" not in printed
    for word in words:
        assert word in process.stderr, printed


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-e", "disk"], "disk"),
        (["-e", "disk=12Q"], "12Q"),
        (["-e", "disk=0"], "disk"),
        (["-e", "disk=1G", "-p", "70000"], "70000"),
        (["-e", "disk=1G", "--mem-limit", "lots"], "lots"),
        (["-e", "disk=1G", "-e", "disk=2G"], "disk"),
        (["-c", "no/such/file.toml"], "no/such/file.toml"),
    ],
)
def test_a_wrong_value_is_named_and_the_exit_code_is_2(tmp_path: Path, words: list[str], named: str) -> None:
    """The message shows the value that was wrong."""
    common = ["--control", str(tmp_path / "control.sock")]
    expect_refusal(nbdzram("serve", *words, *common, directory=tmp_path), 2, named)


def test_a_port_in_use_is_named_and_the_exit_code_is_1(tmp_path: Path) -> None:
    """An address that the machine refuses is named with its port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        common = ["-e", "disk=1M", "--metrics", "off", "--control", str(tmp_path / "control.sock")]
        expect_refusal(nbdzram("serve", "-p", port, *common, directory=tmp_path), 1, port)


def test_an_address_of_another_machine_is_named_and_the_exit_code_is_1(tmp_path: Path) -> None:
    """198.51.100.1 is set aside for documentation (RFC 5737): no interface here has it."""
    common = ["-e", "disk=1M", "--metrics", "off", "--control", str(tmp_path / "control.sock")]
    process = nbdzram("serve", "-i", "198.51.100.1", "-p", "0", *common, directory=tmp_path)
    expect_refusal(process, 1, "198.51.100.1")


def test_a_unix_socket_that_cannot_be_made_is_named_and_the_exit_code_is_1(tmp_path: Path) -> None:
    """The directory of the socket does not exist."""
    path = str(tmp_path / "missing" / "nbd.sock")
    common = ["-e", "disk=1M", "--metrics", "off", "--control", str(tmp_path / "control.sock")]
    process = nbdzram("serve", "-U", path, "-p", "0", *common, directory=tmp_path)
    expect_refusal(process, 1, path)


def test_a_metrics_address_that_does_not_resolve_is_named_and_the_exit_code_is_1(tmp_path: Path) -> None:
    """.invalid never resolves (RFC 6761)."""
    common = ["-e", "disk=1M", "-p", "0", "--control", str(tmp_path / "control.sock")]
    process = nbdzram("serve", "--metrics", "nowhere.invalid:9809", *common, directory=tmp_path)
    expect_refusal(process, 1, "nowhere.invalid")


@pytest.mark.parametrize("command", ["stat", "fold", "compact"])
def test_a_server_that_is_not_there_is_named_and_the_exit_code_is_3(tmp_path: Path, command: str) -> None:
    """Every client command says where it looked."""
    control = str(tmp_path / "nobody.sock")
    expect_refusal(nbdzram(command, "--control", control, directory=tmp_path), 3, control)

"""What a person types wrong, or a machine does not have: one sentence and the right exit code, never a traceback."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.cli import attach
from nbdzram.cli.greeting import dialler
from nbdzram.cli.hints import Address
from nbdzram.cli.images import Image, copy
from nbdzram.errors import UserError
from tests.support.nbd_client import Client
from tests.support.reach import let_others_pass
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment, make_certificate, run

Start = Callable[..., Server]


@pytest.mark.parametrize(
    ("arguments", "code", "clue"),
    [
        (["serve", "-e", "disk"], 2, "-e: 'disk' is not NAME=SIZE, such as disk=1G"),
        (["serve", "-e", "disk=1X"], 2, "unknown suffix 'X'"),
        (["serve", "-e", "disk=1G", "--mem-limit", "lots"], 2, "--mem-limit: pools.default.mem_limit: 'lots' is not"),
        (["serve", "-e", "disk=1G", "-i", "not an address"], 2, "'not an address:10809' is not an address"),
        (["serve", "-e", "disk=1G", "-p", "70000"], 2, "70000 is not in the range"),
        (["serve", "-e", "disk=1G", "--fold-interval", "sometimes"], 2, "off, auto, or an interval"),
        (["serve", "-c", "/nonexistent.toml"], 2, "cannot read the configuration file /nonexistent.toml"),
        (["serve", "--tls", "require"], 2, "needs tls.certificate and tls.key"),
        (["serve", "-U", "/nonexistent/x", "--metrics", "off", "--control", "CONTROL"], 1, "/nonexistent/x"),
        (["serve", "-i", "192.0.2.1", "--metrics", "off", "--control", "CONTROL"], 1, "192.0.2.1"),
        (["serve", "-p", "0", "--metrics", "192.0.2.1:1", "--control", "CONTROL"], 1, "--metrics off"),
        (["serve", "-p", "0", "--metrics", "off", "--control", "/nonexistent/x"], 1, "--control PATH"),
        (["serve", "--takeover", "--metrics", "off", "--control", "/nonexistent/x"], 1, "--control PATH"),
        (["serve", "-e", "disk=1G", "--mem-limit", "0.3K"], 2, "'0.3K' is less than what is counted"),
        (["serve", "-e", "disk=1G,quota=0.3K"], 2, "'0.3K' is less than what is counted"),
        (["serve", "-e", "disk=1G,snapshots=999999999.9d"], 2, "'999999999.9d' is longer than a century"),
        (["serve", "--scrub-interval", "999999999d"], 2, "'999999999d' is longer than a century"),
        (["top", "--once", "--interval", "nan"], 2, "'nan' is not a time from 0.1 to 3600 seconds"),
        (["stat", "--watch", "nan"], 2, "'nan' is not a time from 0.1 to 3600 seconds"),
        (["serve", "-p", "0", "--metrics", "off", "--control", "CONTROL", "--state-dir", "/proc/x"], 1, "/proc/x"),
        (["exports", "add", "a", "1000"], 2, "multiple of 512"),
        (["exports", "add", "a", "3P"], 2, "'3P' is not the size of a disk: a multiple of 512 bytes, at most 2P"),
        (["serve", "-e", b"\xff=1M"], 2, "-e: '\\udcff' is not an export's name: 1 to 255 bytes of printable UTF-8"),
        (["serve", "-e", f"{'x' * 256}=1M"], 2, "255 bytes of printable UTF-8"),
        (["serve", "-U", b"/x\xff"], 2, "-U: listen: the socket path '/x\\udcff' is not UTF-8 text"),
        (
            ["serve", "-U", "/x\ny"],
            2,
            "-U: listen: the socket path '/x\\ny' has characters that do not print; choose one",
        ),
        (["serve", "-U", "/x,mode=9", "--vsock", "1"], 2, "-U, --vsock: listen: 'mode=9' is not allowed behind"),
        (
            ["serve", "-U", "CONTROL,owner=nobody-here", "--control", "CONTROL.c", "--metrics", "off"],
            1,
            "owner= takes a user and a group",
        ),
        (["estimate", "/dev/zero"], 1, "/dev/zero is a character device; name a disk image"),
        (["stat", "--mm-stat", "--json"], 2, "--json and --mm-stat print different things; give one of them"),
        (["stat", "-o", "NOTHING"], 2, "unknown column 'NOTHING'; there are NAME"),
        (["fold", "--cpu", "0"], 2, "0 is not in the range"),
        (["recompress", "--level", "23"], 2, "23 is not in the range"),
        (["pools", "limit", "default", "200%"], 2, "a percentage lies above 0 and at most 100"),
        (["pools", "add", "fast", "--dedup", "often"], 2, "'often' is not one of"),
        (["estimat"], 2, "Did you mean 'estimate'?"),
        (["rename", "disk", "other"], 2, "No such command 'rename'. Did you mean 'exports rename'?"),
        (["nothing"], 2, "No such command 'nothing'"),
        (["exports", "delete", "disk"], 2, "No such command 'delete'. Did you mean 'remove'?"),
        (["pools", "ls"], 2, "No such command 'ls'. Did you mean 'list'?"),
        (["runs", "stop", "4"], 2, "No such command 'stop'. Did you mean 'cancel'?"),
        (["clients", "kill", "4"], 2, "No such command 'kill'. Did you mean 'disconnect'?"),
        (["exports", "lst"], 2, "No such command 'lst'. Did you mean 'list'?"),
        (["streams", "xyz"], 2, "No such command 'xyz'. There are abandon, list."),
        (["help"], 2, "No such command 'help'. `nbdzram --help` lists the commands"),
        (["scrub"], 2, "No such command 'scrub'. `nbdzram check` looks at every block now"),
        (["serve", "-e", "disk", "1G"], 2, "Got unexpected extra argument (1G). A disk is told by -e NAME=SIZE."),
        (["fold", "default"], 2, "Got unexpected extra argument (default). A pool is told by --pool NAME."),
        (
            ["pools", "add", "fast", "1G"],
            2,
            "Got unexpected extra argument (1G). Its limit is told by --mem-limit SIZE.",
        ),
        (["clients", "list", "disk"], 2, "Got unexpected extra argument (disk). An export is told by --export NAME."),
        (["doctor", "a.toml"], 2, "Got unexpected extra argument (a.toml). A configuration is told by -c FILE."),
        (["ls", "disk"], 2, "Got unexpected extra argument (disk). `nbdzram stat NAME` shows one export."),
        (["detach", "/dev/nbd0"], 2, "No such command 'detach'. `nbd-client -d /dev/nbdN` detaches"),
        (["runs", "cancel", "fold"], 2, "'fold' is not a valid number of a run; `nbdzram runs` shows them"),
        (["clients", "disconnect", "me"], 2, "'me' is not a valid number of a client; `nbdzram clients` shows them"),
        (["recompress", "--level", "high"], 2, "'high' is not a valid whole number"),
        (["stat", "--watch", "often"], 2, "'often' is not a time from 0.1 to 3600 seconds, such as 90, 10m or 2h"),
        (["stat", "--watch", "2h"], 2, "'2h' is not a time from 0.1 to 3600 seconds"),
        (["recompress", "--idle", "1w"], 2, "'1w' is not a time from 0 to 1000000000 seconds, such as 90, 10m or 2h"),
        (["recompress", "--idle", "0.5"], 2, "'0.5' is no whole number of seconds"),
        (["recompress", "--idle", "-1"], 2, "'-1' is not a time from 0 to"),
        (["attach", "disk", "/dev/nbd0", "--persist", "--dead-timeout", "0"], 2, "'0' is not a time from 1 to"),
        (["serve", "-p", "nbd"], 2, "'nbd' is not a valid port"),
        (["serve", "-i", "127.0.0.1", "-i", "127.0.0.1"], 2, "127.0.0.1:10809 stands there twice"),
        (["send", "--all", "disk"], 2, "--all is every export: name none beside it"),
    ],
)
def test_a_mistake_is_one_sentence_never_a_traceback(
    tmp_path: Path, arguments: list[str | bytes], code: int, clue: str
) -> None:
    words = (os.fsdecode(word) for word in arguments)
    done = run(*(word.replace("CONTROL", str(tmp_path / "control.sock")) for word in words))
    assert done.code == code, done.err
    assert clue in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("line", "usage"),
    [
        ("snapshot --all", "snapshot [OPTIONS] [EXPORT NAME]"),
        ("stat --control", "stat [OPTIONS] [EXPORT]..."),
        ("exports change disk --quota", "exports change [OPTIONS] NAME"),
        ("exports --json=yes", "exports [OPTIONS] [COMMAND] [ARGS]..."),
        ("serve -e", "serve [OPTIONS]"),
        ("--control", "[OPTIONS] COMMAND [ARGS]..."),
    ],
)
def test_an_option_without_its_value_is_told_with_how_the_command_is_used(line: str, usage: str) -> None:
    """As every other wrong use is."""
    done = run(*line.split())
    command = usage.partition(" [")[0] if usage[0] != "[" else ""
    help_line = f"Try '{' '.join(filter(None, ['nbdzram', command, '--help']))}' for help."
    first, second, *_, last = done.err.splitlines()
    assert (done.code, first, second) == (2, f"Usage: nbdzram {usage}", help_line)
    assert last.startswith("Error: Option '-")


@pytest.mark.parametrize("allowed", [8, 12, 16, 20, 31, 32, 40, 48])
def test_too_few_descriptors_to_start_with_are_one_sentence(tmp_path: Path, allowed: int) -> None:
    """Wherever the last one is asked for: the loop, a pool, a thread, an address."""
    words = ["serve", "-e", "disk=1M", "-U", f"{tmp_path}/n", "--control", f"{tmp_path}/c", "--metrics", "off"]
    words += ["--threads", "16", *(word for number in range(4) for word in ("--pool", f"p{number}"))]
    code = (
        "import resource, sys; from nbdzram.__main__ import main; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({allowed}, {allowed})); sys.argv[1:] = {words!r}; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("nbdzram: cannot ")
    assert "Too many open files" in done.stderr
    assert "Traceback" not in done.stderr
    assert "never awaited" not in done.stderr


@pytest.mark.parametrize("which", ["nbd", "metrics"])
def test_a_port_in_use_is_one_sentence(tmp_path: Path, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        addresses = (
            ["-p", port, "--metrics", "off"] if which == "nbd" else ["-p", "0", "--metrics", f"127.0.0.1:{port}"]
        )
        kept = tmp_path / "kept"
        done = run("serve", "-e", "disk=1M", "--control", str(tmp_path / "c"), "--checkpoint", str(kept), *addresses)
    assert done.code == 1
    assert done.err.count(port) == 1
    assert "Address already in use; choose another" in done.err
    assert not list(kept.glob("*.stream")), "each start that fails would have an older checkpoint go"
    assert "Traceback" not in done.err


def test_check_config_says_what_it_means_and_ends(tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text(
        'listen = ["unix:/run/x.sock"]\n[pools.fast]\nmem_limit = "1G"\n[exports.disk]\nsize = "2G"\npool = "fast"\n'
    )
    done = run("serve", "-c", str(file), "--check-config")
    assert done.code == 0
    assert "pool     fast (1G, dedup fold)" in done.out
    assert "export   disk (2G in pool fast)" in done.out
    assert "listen   unix:/run/x.sock" in done.out
    assert "  default  " not in done.out
    assert "  default  disk\n" in run("serve", "-c", str(file), "--check-config", "--default-export", "disk").out
    assert (
        "x, which is not declared here" in run("serve", "-c", str(file), "--check-config", "--default-export", "x").out
    )
    file.write_text('[tls]\nmode = "require"\ncertificate = "/nonexistent.pem"\nkey = "/nonexistent.pem"\n')
    done = run("serve", "-c", str(file), "--check-config")
    assert (done.code, "TLS file /nonexistent.pem cannot be read" in done.err) == (2, True)
    file.write_text("nonsense = 1\n")
    done = run("serve", "-c", str(file), "--check-config")
    assert (done.code, f"{file} line 1: unknown key 'nonsense'" in done.err) == (2, True)


def configured(place: Path, text: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The check of a configuration, by a process in `place`."""
    file = place.parent / "odd.toml"
    file.write_text(text, encoding="utf-8")
    return subprocess.run(
        ["sh", "-c", 'cd "$0" && shift && rm -rf "$0" && exec "$@"', place, "-", *NBDZRAM, *words, "-c", file],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=clean_environment() | environment,
    )


@pytest.mark.parametrize(
    ("text", "environment", "clue"),
    [
        ('state_dir = "here"', {}, "'here' begins in the directory that this process was started in, which is gone"),
        ('listen = ["unix:here"]', {}, "'here' begins in the directory that this process was started in"),
        ('pidfile = "~/\u0142"', {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "no file's name"),
        ('control = "/\u0142"', {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "no file's name"),
    ],
    ids=["a directory that is gone", "a socket there", "a locale without the letter", "of the control socket"],
)
def test_a_path_that_leads_nowhere_from_here_is_one_sentence(
    tmp_path: Path, text: str, environment: dict[str, str], clue: str
) -> None:
    (tmp_path / "gone").mkdir()
    done = configured(tmp_path / "gone", text, "serve", "--check-config", **environment)
    assert (done.returncode, clue in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_a_state_directory_that_is_a_link_to_itself_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    words = ("-e", "disk=1M", "-U", f"{tmp_path}/n", "--control", f"{tmp_path}/c", "--metrics", "off")
    done = run("serve", *words, "--state-dir", str(tmp_path / "loop"))
    assert (done.code, "cannot use the state directory" in done.err, "Traceback" in done.err) == (1, True, False)


@pytest.mark.parametrize("uri", ["nbd://a%00b", "nbd://a%1b%5b31mb", "nbd://a%7fb"])
def test_a_host_that_is_no_text_comes_into_no_line(uri: str) -> None:
    """What stands in nbdtab, or is pasted into a shell, is what was read."""
    for words in ((), ("--nbdtab",)):
        done = run("attach", "disk", "--uri", uri, *words)
        assert (done.code, done.out) == (2, "")
        assert "a host is a name or an address" in done.err


def test_a_host_whose_name_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    """Python has an error of its own for a label that is too long, or lacks letters."""
    long = f"{'a' * 64}.example"
    with pytest.raises(UserError, match="cannot be looked up: "):
        dialler(Address.of(f"nbd://{long}"), "disk")
    file = tmp_path / "odd.toml"
    file.write_text(f'listen = ["{long}:1"]\nmetrics = "{long}:2"')
    done = run("doctor", "-c", str(file), "--control", str(tmp_path / "c"), "--json")
    assert (done.code, done.out.count(f"cannot listen on {long}"), done.err) == (1, 2, "")


def test_programs_of_others_that_do_not_start_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qemu-img", "nbd-client"):
        (tmp_path / name).write_bytes(b"\x7fELF")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "image").write_bytes(bytes(4096))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = run("serve", "--check-config", "-e", f"disk=@{tmp_path}/image")
    assert (done.code, f"{tmp_path}/qemu-img cannot be run: Exec format error" in done.err) == (2, True), done.err
    copying = copy(Image(tmp_path / "image", "raw", 4096), "nbd://x", print, asyncio.Event())
    with pytest.raises(UserError, match="qemu-img cannot be run: Exec format error"):
        asyncio.run(copying)
    with pytest.raises(UserError, match=r"cannot attach: .*nbd-client cannot be run: Exec format error"):
        attach._call([str(tmp_path / "nbd-client")], "attach")


def test_names_that_would_garble_a_list_are_refused_at_run_time(start: Start) -> None:
    server = start("-e", "disk=1M")
    for name in ("a\x1b[31m", "a\nb", "", "x" * 256, os.fsdecode(b"\xff")):
        for command in (("exports", "add", name, "1M"), ("clone", "disk", name)):
            done = server.run(*command)
            assert (done.code, "255 bytes of printable UTF-8" in done.err) == (2, True), done.err
    server.run("exports", "add", "x" * 255, "1M", "--description", "two\nlines")
    assert len(server.run("exports", "list").out.splitlines()) == 3


def test_where_one_of_several_is_not_there_nothing_is_done(start: Start) -> None:
    server = start("-e", "one=1M", "-e", "two=1M")
    server.run("pools", "add", "spare")
    for words in (
        ("exports", "remove", "--yes", "one", "none"),
        ("exports", "remove", "--force", "one", "none"),
        ("exports", "reset", "--yes", "one", "none"),
        ("pools", "remove", "spare", "none"),
    ):
        done = server.run(*words)
        assert (done.code, done.out) == (4, ""), words
        assert "'none'; there are: " in done.err
    assert [line.split()[0] for line in server.run("ls").out.splitlines()] == ["NAME", "one", "two"]
    assert "spare" in server.run("pools").out
    assert server.run("rm", "one", "one", "two").out.splitlines() == ["removed one", "removed two"]


def test_nobody_is_asked_about_going_back_to_what_is_no_snapshot(start: Start) -> None:
    server = start("-e", "disk=1M", "-e", "other=1M")
    with Client(server.socket, "disk") as client:
        client.write(0, b"content".ljust(4096))
    for snapshot, code, clue in (("none", 4, "there is no export 'none'"), ("other", 1, "'other' is no snapshot")):
        for more in ([], ["--dry-run"], ["--yes"]):
            done = server.run("exports", "rollback", "disk", snapshot, *more)
            assert (done.code, clue in done.err, "destroys" in done.err + done.out) == (code, True, False), done


def test_a_configuration_that_cannot_be_reloaded_is_code_2(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text('[exports.disk]\nsize = "1M"\n')
    server = start("-c", str(file))
    file.write_text('[exports.disk]\nsise = "1M"\n')
    done = server.run("reload")
    assert (done.code, "unknown key 'exports.disk.sise'; did you mean 'size'?" in done.err) == (2, True)
    file.unlink()
    file.symlink_to(os.devnull)  # as a pipe, whose reader would wait, it says nothing any more
    done = server.run("reload")
    assert (done.code, f"{file} is no regular file, so it is not read again" in done.err) == (2, True), done


def test_whoever_waits_for_a_server_that_hangs_is_told_so(start: Start) -> None:
    """`health` gives up; others go on waiting, as what they asked for may come."""
    server = start("-e", "disk=1M")
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        with subprocess.Popen(
            [*NBDZRAM, "ls", "--control", str(server.control)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        ) as waiting:
            given_up = server.run("health")
            assert waiting.stderr is not None
            told = waiting.stderr.readline()
            os.kill(server.process.pid, signal.SIGCONT)
            printed, _ = waiting.communicate(timeout=60)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert (given_up.code, "has not answered for 5 s: it is stopped" in given_up.err) == (3, True)
    assert told.endswith("has not answered for 5 s; Ctrl-C ends the wait\n")
    assert (waiting.returncode, "disk" in printed) == (0, True)


def test_columns_stand_below_one_another_behind_wide_letters(start: Start) -> None:
    lines = start("-e", "ディスク=1M", "-e", "e\u0301=1M").run("exports", "list").out.splitlines()
    before = [line[: line.index("default" if number else "POOL")] for number, line in enumerate(lines)]
    assert [len(before[0]), len(before[1]) + 4, len(before[2]) - 1] == [len("ディスク ") + 4] * 3


def test_the_socket_of_another_user_is_told_apart_from_a_dead_server(start: Start, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    server = start("-e", "disk=1M")
    code = f"""
import os
from pathlib import Path
from nbdzram.control.client import ControlClient
from nbdzram.control.paths import socket_for_client
from nbdzram.errors import ServerUnreachable
os.setuid(65534)  # may not even read the modules above
for find in (
    lambda: ControlClient(Path({str(server.control)!r})),
    lambda: socket_for_client({{"XDG_RUNTIME_DIR": {str(tmp_path)!r}}}),  # looks into nbdzram/ there
):
    try:
        find()
    except ServerUnreachable as error:
        print(error)
"""
    (tmp_path / "nbdzram").mkdir(mode=0o700)
    let_others_pass(server.control.parent)
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for path in (server.control, tmp_path / "nbdzram" / "nbdzram.sock"):
        assert f"the control socket {path} may not be opened by user 65534; be the user that runs the server" in told


def test_removals_have_json_too(start: Start) -> None:
    server = start("-e", "disk=1M")
    server.run("pools", "add", "fast")
    assert json.loads(server.run("exports", "remove", "disk", "--json").out) == {"removed": "disk"}
    assert json.loads(server.run("pools", "remove", "fast", "--json").out) == {"removed": "fast"}


def test_a_key_of_another_certificate_is_said_in_words(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_certificate(tmp_path / name, name)
    certificate, key = tmp_path / "one" / "cert.pem", tmp_path / "two" / "key.pem"
    tls = ("serve", "--check-config", "--tls", "on", "--tls-certificate", str(certificate), "--tls-key")
    done = run(*tls, str(key))
    assert (done.code, "the key is not that of the certificate; name" in done.err) == (2, True)
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(other)], check=True, capture_output=True)
    done = run(*tls, str(other))
    assert (done.code, "the key is of another kind than that of the certificate; name" in done.err) == (2, True)
    done = run(*tls, str(certificate))
    assert (done.code, "_ssl.c" in done.err, "both PEM" in done.err) == (2, False, True)
    assert run(*tls, str(tmp_path / "one" / "key.pem")).code == 0


def test_keys_that_cannot_be_used_are_refused_wherever_they_are_looked_at(start: Start, tmp_path: Path) -> None:
    """By a start, by a look at the configuration, by doctor, and by a reload, which keeps the keys that there were."""
    keys, file = tmp_path / "keys.psk", tmp_path / "nbdzram.toml"
    keys.write_text(f"vm1:{'ab' * 16}\n")
    keys.chmod(0o600)
    file.write_text(f'[exports.disk]\nsize = "1M"\n[tls]\nmode = "require"\npsk_file = "{keys}"\n')
    assert f"ok TLS {keys} holds keys" in " ".join(run("doctor", "-c", str(file)).out.split())
    server = start("-c", str(file))
    keys.write_text("# vm1 is gone\n")
    for looks, code in ((("serve", "--metrics", "off"), 2), (("serve", "--check-config"), 2), (("doctor",), 1)):
        done = run(*looks, "-c", str(file))
        told = " ".join((done.out + done.err).split())
        assert (done.code, f"TLS keys {keys} hold none" in told) == (code, True), looks
    done = server.run("reload")
    assert (done.code, f"TLS keys {keys} hold none" in done.err) == (2, True)
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("keeping the old ones: TLS keys")
    keys.unlink()
    os.mkfifo(keys)
    assert f"TLS file {keys} is no regular file" in " ".join(run("doctor", "-c", str(file)).out.split())


def test_a_private_key_that_others_may_read_is_said_wherever_it_is_looked_at(start: Start, tmp_path: Path) -> None:
    """And a server goes on with it: an update must not stop one whose key a pod's secret holds."""
    make_certificate(tmp_path, "localhost")
    key, file = tmp_path / "key.pem", tmp_path / "nbdzram.toml"
    file.write_text(
        f'[exports.disk]\nsize = "1M"\n[tls]\nmode = "on"\nkey = "{key}"\ncertificate = "{tmp_path}/cert.pem"\n'
    )
    told = f"TLS key file {key} has mode 0644: others may read or write it"
    looks = (("serve", "--check-config"), ("doctor",))
    key.chmod(0o640)
    for look in looks:
        assert "others may" not in run(*look, "-c", str(file)).out
    key.chmod(0o644)
    check, doctor = (" ".join(run(*look, "-c", str(file)).out.split()) for look in looks)
    assert f"warning {told}; chmod o= {key}" in check
    assert f"warn TLS {told} remedy: chmod o= {key}" in doctor
    start("-c", str(file)).wait_for_log(f"WARNING nbdzram.server: {told}; chmod o= {key}")


AUTHORITY = """
[ca]
default_ca = own
[own]
new_certs_dir = .
database = index
serial = serial
default_md = sha256
policy = any
[any]
commonName = supplied
"""


@pytest.mark.parametrize(
    ("begins", "ends", "says"),
    [
        ("20200101000000Z", "20210101000000Z", "expired on 2021-01-01, clients refuse it; renew it"),
        ("22000101000000Z", "22010101000000Z", "is valid from 2200-01-01 on, clients refuse it; check this machine's"),
    ],
)
def test_a_certificate_out_of_its_dates_is_said_by_check_config_and_in_the_log(
    start: Start, tmp_path: Path, begins: str, ends: str, says: str
) -> None:
    make_certificate(tmp_path, "localhost")
    (tmp_path / "config").write_text(AUTHORITY)
    (tmp_path / "index").touch()
    (tmp_path / "serial").write_text("01")
    sign = [
        "ca",
        "-batch",
        "-notext",
        "-config",
        "config",
        "-keyfile",
        "key.pem",
        "-startdate",
        begins,
        "-enddate",
        ends,
    ]
    for words in (
        ["req", "-new", "-key", "key.pem", "-subj", "/CN=localhost", "-out", "asked"],
        [*sign, "-selfsign", "-in", "asked", "-out", "dated.pem"],
    ):
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)
    dated = tmp_path / "dated.pem"
    tls = ("--tls", "on", "--tls-key", str(tmp_path / "key.pem"), "--tls-certificate")
    done = run("serve", *tls, str(dated), "--check-config")
    assert (done.code, f"  warning  TLS file {dated} {says}" in done.out, done.err) == (0, True, "")
    start("-e", "disk=1M", *tls, str(dated)).wait_for_log(f"WARNING nbdzram.server: TLS file {dated} {says}")
    assert "warning  TLS" not in run("serve", *tls, str(tmp_path / "cert.pem"), "--check-config").out


@pytest.mark.parametrize("home", ["~nosuchuser-of-ours", "~nosuchuser-of-ours/x"])
def test_the_home_of_nobody_is_one_sentence_wherever_a_path_is_taken(tmp_path: Path, home: str) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text(f'state_dir = "{home}"\n')
    for words in (
        ("serve", "--control", home),
        ("serve", "--state-dir", home),
        ("serve", "-U", home),
        ("serve", "--tls", "on", "--tls-certificate", home, "--tls-key", home),
        ("serve", "-c", str(file), "--check-config"),
        ("serve", "-c", home),
        ("doctor", "-c", str(file)),
        ("doctor", "-c", home),
        ("doctor", "--control", home),
        ("stat", "--control", home),
        ("attach", "disk", "--uri", "nbds://192.0.2.1", "--tls-certificates", home),
        ("estimate", home),
    ):
        done = run(*words)
        assert "Traceback" not in done.err, words
        assert home in done.err, words
        assert done.code == (1 if words[0] == "estimate" else 2), words


@pytest.mark.parametrize(("variable", "words"), [("CONTROL", ("stat",)), ("CONFIG", ("serve", "--check-config"))])
def test_a_path_of_the_environment_reads_as_one_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("tests.unit.cli.conftest.clean_environment", lambda: dict(os.environ))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(f"NBDZRAM_{variable}", "~/of-ours")
    assert str(tmp_path / "of-ours") in run(*words).err
    monkeypatch.setenv(f"NBDZRAM_{variable}", "~nosuchuser-of-ours/x")
    done = run(*words)
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert f"NBDZRAM_{variable}: '~nosuchuser-of-ours/x'" in done.err

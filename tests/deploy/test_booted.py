"""The units under systemd as the first process: what a stop, a restart, a crash and a change do to disks and clients.

Slow lane: a bare Debian 12 boots in systemd-nspawn, with the package installed. Root.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.deploy.grafana import DEPLOY
from tests.support.machine import boot, layer_over, require_base, run_in

pytestmark = pytest.mark.slow

BASE = ("systemd", "systemd-sysv", "dbus", "python3", "libnbd-bin", "procps")
INSTALL_SECONDS = 300

# Functions for the scripts that run inside. `say NAME COMMAND...` prints NAME=OUTPUT of one line; a client that was
# told to `attach` stays, and reads again where it is to `answer`; `version` makes another one of what is installed.
WORDS = r"""
say() { local name=$1; shift; echo "$name=$("$@" 2>&1 | tr '\n' ' ' | sed 's/ $//')"; }
state() { systemctl is-active nbdzram.service nbdzram.socket; }
pid() { systemctl show --property MainPID --value nbdzram.service; }
size() { nbdinfo --size nbd://127.0.0.1:10809/disk 2>&1 | grep -o 'refused\|^[0-9]*$'; }
fill() { head -c 1048576 /dev/urandom >/root/content; nbdcopy /root/content nbd://127.0.0.1:10809/disk; }
kept() { nbdcopy nbd://127.0.0.1:10809/disk /root/found; cmp -n 1048576 /root/content /root/found && echo kept; }
another() { local now; now=$(pid); [ "$now" != 0 ] && [ "$now" != "$1" ] && systemctl is-active --quiet nbdzram; }
until_active() { until another "$1"; do sleep 0.1; done; }
attach() {
    coproc PYTHONPATH=/root python3 -c "
import sys
from tests.support.nbd_client import Client
with Client(('127.0.0.1', 10809), 'disk') as client:
    before = client.read(0, 4096)
    print('attached', flush=True)
    for line in sys.stdin:
        print('same' if client.read(0, 4096) == before else 'another', flush=True)
"
    exec 6<&"${COPROC[0]}" 7>&"${COPROC[1]}" # bash closes its own in a subshell
    read -r -t 60 line <&6
}
until_asked() { until journalctl --unit nbdzram --no-pager | tail -20 | grep -q 'takes over'; do :; done; }
answer() { local line; echo >&7; read -r -t 60 line <&6; echo "$line"; }
version() { sed -i "s/^__version__ = .*/__version__ = \"$1\"/" /usr/lib/nbdzram/nbdzram/__init__.py; }
"""
CLIENT = ("tests/__init__.py", "tests/wire.py", "tests/support/nbd_client.py")

STORY = """
systemctl enable --now nbdzram; say enabled state
say serves size
say filled fill
systemctl reload nbdzram; say reloaded state
systemctl restart nbdzram.socket; say socket_restart_fails echo $?
say content_after_socket kept
systemctl restart nbdzram; say restarted state
say after_restart kept
was=$(pid); kill -9 "$was"; until_active "$was"; say after_crash kept
systemctl stop nbdzram; say stopped state
say refused size
say still_stopped state
systemctl start nbdzram; say started state
say empty_after_stop kept
for turn in 1 2 3 4 5 6 7; do was=$(pid); kill -9 "$was"; until_active "$was"; done
say after_crashes state
say serves_after_crashes size
mkdir -p /etc/systemd/system/nbdzram.socket.d
printf '[Socket]\\nListenStream=192.0.2.9:10809\\n' >/etc/systemd/system/nbdzram.socket.d/more.conf
systemctl daemon-reload; systemctl stop nbdzram; systemctl start nbdzram; say address_to_come state
say listens_there grep -c ' 090200C0:2A39' /proc/net/tcp
"""

UPGRADE = """
systemctl enable --now nbdzram
say filled fill
attach
was=$(pid); say reload_of_the_same systemctl reload nbdzram
[ "$(pid)" = "$was" ] && echo same_process=yes
say client_after_reload answer
version 99.0; say upgraded systemctl reload nbdzram
[ "$(pid)" != "$was" ] && echo another_process=yes
say upgraded_state state
say client_after_upgrade answer
say upgraded_version nbdzram --version
say after_upgrade kept

was=$(pid)
for broken in 'service.py raise SystemExit("broken")' 'listener.py NbdServer.start = None'; do
    file=/usr/lib/nbdzram/nbdzram/server/${broken%% *}
    version 99.1; echo "${broken#* }" >>$file
    systemctl reload nbdzram; say "broken_upgrade_${broken%%.*}" echo $?
    [ "$(pid)" = "$was" ] && echo "old_one_stays_${broken%%.*}"=yes
    say "state_after_${broken%%.*}" state
    say "client_after_${broken%%.*}" answer
    sed -i '$d' $file
done
systemctl restart nbdzram; say after_restart kept
was=$(pid); kill -9 "$was"; until_active "$was"; say after_crash kept
nbdzram serve --config /etc/nbdzram/nbdzram.toml --control /run/nbdzram/nbdzram.sock --takeover
say from_outside echo $?
say stays state
"""

# Of each two one kills the old process while the new one starts, asks or takes, and one the new one.
KILLS = """
systemctl enable --now nbdzram
say filled fill
for turn in 1 2 3 4 5 6; do
    was=$(pid); version "99.$turn"
    systemctl reload nbdzram >/dev/null 2>&1 & reload=$!
    until successor=$(pgrep -f -- --upgrade | tail -1); [ -n "$successor" ]; do :; done
    if [ $((turn % 2)) = 0 ]; then until_asked; kill -9 "$was"; else kill -9 "$(pgrep -f -- --upgrade | tail -1)"; fi
    wait $reload
    until [ "$(pid)" != 0 ] && systemctl is-active --quiet nbdzram; do sleep 0.1; done
    [ "$(pid)" = "$was" ] && echo "stays_$turn=yes" || echo "stays_$turn=no"
    say "kept_$turn" kept
done
say left pgrep -c -f -- '--upgrade|nbdzram serve'
"""

STATE = """
install -m 644 /usr/share/doc/nbdzram/examples/var-lib-nbdzram.mount /etc/systemd/system/
sed -i 's/^Options=size=60%/Options=size=64M/' /etc/systemd/system/var-lib-nbdzram.mount
sed -i 's/^#state_dir = .*/state_dir = "\\/var\\/lib\\/nbdzram"/; s/^mem_limit = .*/mem_limit = "32M"/' \\
    /etc/nbdzram/nbdzram.toml
systemctl daemon-reload
systemctl enable --now var-lib-nbdzram.mount
systemctl enable --now nbdzram; say enabled state
say on_tmpfs stat --file-system --format %T /var/lib/nbdzram
say filled fill
systemctl restart nbdzram; say after_restart kept
systemctl stop nbdzram; systemctl start nbdzram; say after_stop kept
was=$(pid); kill -9 "$was"; until_active "$was"; say after_crash kept
attach
was=$(pid); version 99.0; systemctl reload nbdzram; say reloaded echo $?
[ "$(pid)" != "$was" ] && echo another_process=yes
say client_after_reload answer
say after_reload kept
say upgraded dpkg --install /nbdzram.deb
say after_upgrade kept
rm /etc/nbdzram/nbdzram.toml; chgrp root /etc/nbdzram/conf.d
dpkg --install /nbdzram.deb >/dev/null 2>&1; say without_conffile echo $?
say group_is_the_administrators stat --format %G /etc/nbdzram/conf.d
"""

# The disk of the checkpoints is a pipe that takes a MiB in two seconds; a step may take fifteen, and all of it is more.
SLOW_STOP = """
sed -i 's/^STEP_SECONDS = .*/STEP_SECONDS = 15.0/; s/^STEP_SECONDS_A_GIB = .*/STEP_SECONDS_A_GIB = 0.0/' \\
    /usr/lib/nbdzram/nbdzram/cli/going_on.py
mkdir -p /etc/systemd/system/nbdzram.service.d
printf '[Service]\\nTimeoutStopSec=15s\\n' >/etc/systemd/system/nbdzram.service.d/stop.conf
kept=/var/lib/nbdzram/kept
printf '[limits]\\ndrain_seconds = 1\\n[checkpoint]\\ndirectory = "%s"\\ninterval_seconds = "1h"\\n' $kept \\
    >/etc/nbdzram/conf.d/kept.toml
systemctl daemon-reload
systemctl enable --now nbdzram; say enabled state
head -c 33554432 /dev/urandom >/root/content; say filled nbdcopy /root/content nbd://127.0.0.1:10809/disk
mkfifo -m 666 $kept/00000001-full.new
(while [ "$(head -c 1048576 | wc -c)" -gt 0 ]; do sleep 2; done) <$kept/00000001-full.new &
began=$(date +%s); systemctl stop nbdzram
[ $(($(date +%s) - began)) -gt 30 ] && echo longer_than_two_steps=yes
say result systemctl show --property Result --value nbdzram
"""


def _told(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line.split(" ")[0])


def _run(package: Path, directory: Path, story: str, files: Sequence[str] = ()) -> dict[str, str]:
    """`files` of this repository are below /root there."""
    base = require_base("bookworm", *BASE)
    with layer_over(base, directory / "layer") as root:
        shutil.copy(package, root / "nbdzram.deb")
        for name in files:
            (root / "root" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(DEPLOY.parent / name, root / "root" / name)
        installed = run_in(root, ["dpkg", "--install", "/nbdzram.deb"], seconds=INSTALL_SECONDS)
        assert installed.returncode == 0, installed.stderr
        text = boot(root, WORDS + story + "journalctl --unit nbdzram --unit nbdzram.socket --no-pager\n")
        print(text)  # all of it, beside the assertion that fails
        return _told(text)


def test_a_server_that_was_stopped_stays_stopped_and_a_socket_never_restarts_it(package: Path, tmp_path: Path) -> None:
    told = _run(package, tmp_path, STORY)
    assert told["enabled"] == told["reloaded"] == told["restarted"] == told["started"] == "active active", told
    assert told["serves"] == told["serves_after_crashes"] == str(1 << 30), told
    assert told["filled"] == "", told
    assert told["socket_restart_fails"] == "1", told
    assert told["content_after_socket"] == "kept", told
    assert told["after_restart"] == told["after_crash"] == "kept", told
    assert told["empty_after_stop"] != "kept", told
    assert told["stopped"] == told["still_stopped"] == "inactive inactive", told
    assert told["refused"] == "refused", told
    assert told["after_crashes"] == told["address_to_come"] == "active active", told
    assert told["listens_there"] == "1", told


def test_a_reload_to_another_version_keeps_disks_in_memory_and_clients(package: Path, tmp_path: Path) -> None:
    """What a package upgrade and `systemctl reload` do. A version that cannot serve leaves the old one serving."""
    told = _run(package, tmp_path, UPGRADE, CLIENT)
    assert told["filled"] == told["reload_of_the_same"] == told["upgraded"] == "", told
    assert told["same_process"] == told["another_process"] == "yes", told
    assert told["client_after_reload"] == told["client_after_upgrade"] == "same", told
    assert told["upgraded_state"] == told["stays"] == "active active", told
    for where in ("service", "listener"):  # before it has asked, and when it has taken everything
        assert told[f"broken_upgrade_{where}"] == "1", told
        assert told[f"old_one_stays_{where}"] == "yes", told
        assert told[f"state_after_{where}"] == "active active", told
        assert told[f"client_after_{where}"] == "same", told
    assert told["from_outside"] == "1", told
    for what in ("upgrade", "restart", "crash"):
        assert told[f"after_{what}"] == "kept", told


def test_disks_in_memory_outlive_whoever_is_killed_in_a_reload(package: Path, tmp_path: Path) -> None:
    """systemd starts the unit again where its main process is killed; else the old one serves on."""
    told = _run(package, tmp_path, KILLS)
    assert told["filled"] == "", told
    for turn in range(1, 7):
        assert told[f"kept_{turn}"] == "kept", told
        assert told[f"stays_{turn}"] == ("no" if turn % 2 == 0 else "yes"), told
    assert told["left"] == "1", told


def test_disks_in_a_tmpfs_of_their_own_outlive_the_server(package: Path, tmp_path: Path) -> None:
    assert (DEPLOY / "systemd" / "var-lib-nbdzram.mount").exists()
    told = _run(package, tmp_path, STATE, CLIENT)
    assert told["enabled"] == "active active", told
    assert told["on_tmpfs"] == "tmpfs", told
    assert told["filled"] == "", told
    assert (told["reloaded"], told["another_process"], told["client_after_reload"]) == ("0", "yes", "same"), told
    for what in ("restart", "stop", "crash", "reload", "upgrade"):
        assert told[f"after_{what}"] == "kept", told
    assert told["without_conffile"] == "0", told
    assert told["group_is_the_administrators"] == "root", told


def test_a_stop_whose_last_checkpoint_goes_on_is_not_cut(package: Path, tmp_path: Path) -> None:
    """systemd knows seconds alone; what was written since the checkpoint before was lost."""
    told = _run(package, tmp_path, SLOW_STOP)
    assert told["enabled"] == "active active", told
    assert told["filled"] == "", told
    assert told["longer_than_two_steps"] == "yes", told
    assert told["result"] == "success", told

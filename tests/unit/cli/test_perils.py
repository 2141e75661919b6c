"""What will lose disks is said while nothing is lost yet: by serve, --check-config and doctor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdzram.cli import diagnosis
from nbdzram.cli.announce import description
from nbdzram.cli.diagnosis import Level, Patient
from nbdzram.cli.perils import environment_perils, idle_perils, memory_perils, perils, state_perils
from nbdzram.config import CheckpointConfig, ExportConfig, PoolConfig, ServerConfig, TlsConfig, TlsMode
from nbdzram.machine import Machine, Share
from tests.unit.cli.conftest import Server, run

MIB = 1 << 20
QUIET = ServerConfig(tcp=(), metrics=None)


class Caged(Machine):
    """A machine whose cgroup allows 512 MiB."""

    def memory(self) -> Share:
        return Share(512 * MIB, Path("/cage"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"image": Path("/images/vm1")}, "loaded from /images/vm1"),
        ({"private": True}, "private"),
        ({"quota": MIB}, "quota 1M"),
        ({"iops": 5}, "5 requests/s"),
        ({"bandwidth": 3 * MIB}, "3M/s"),
        ({"snapshots_seconds": 3600.0, "snapshots_keep": 9}, "a snapshot every 1 h 0 min, 9 kept"),
        ({"allow_addresses": ("10.0.0.0/8", "fd00::/8")}, "for 10.0.0.0/8 fd00::/8"),
        ({"allow_certificates": ("vm1", "vm2")}, "for vm1 vm2"),
    ],
)
def test_check_config_says_what_each_disk_is_declared_to_be(given: dict[str, Any], told: str) -> None:
    export = ExportConfig(name="disk", size_bytes=1 << 30, **given)
    (line,) = (line for line in description(replace(QUIET, exports=(export,))) if "disk (" in line)
    assert line == f"  export   disk (1G in pool default), {told}"


def test_check_config_says_where_a_checkpoint_is_all_that_stays(tmp_path: Path) -> None:
    done = run("serve", "-e", "disk=1G,private,quota=1M", "--checkpoint", str(tmp_path), "--check-config")
    assert "  export   disk (1G in pool default), private, quota 1M\n" in done.out
    assert f"  state    none, but a checkpoint in {tmp_path} every 1 min 0 s\n" in done.out


@pytest.mark.parametrize(("limit", "in_peril"), [(0, True), (256 * MIB, False), (384 * MIB, False), (500 * MIB, True)])
def test_pools_that_outgrow_their_cgroup_are_a_peril(limit: int, in_peril: bool) -> None:
    found = list(memory_perils(replace(QUIET, pools=(PoolConfig(mem_limit=limit),)), Caged()))
    assert bool(found) == in_peril
    for peril in found:
        assert "/cage" in peril.says
        assert "512M" in peril.says
        assert "--mem-limit" in peril.remedy


def test_the_limits_of_all_pools_count_together() -> None:
    pools = tuple(PoolConfig(name=name, mem_limit=256 * MIB) for name in ("default", "fast"))
    assert list(memory_perils(replace(QUIET, pools=pools), Caged()))


def test_without_a_cgroup_nothing_is_killed_for_a_limit(tmp_path: Path) -> None:
    assert not list(memory_perils(QUIET, Machine(tmp_path)))


class Small(Machine):
    """A machine without cgroups that has 512 MiB and two processors."""

    def memory(self) -> Share:
        return Share(512 * MIB)

    def processors(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            replace(QUIET, pools=(PoolConfig(mem_limit=300 * MIB), PoolConfig(name="b", mem_limit=300 * MIB))),
            "take 600M",
        ),
        (replace(QUIET, threads=3), "3 threads are to serve clients, and 2 processors may be used"),
        (replace(QUIET, pools=(PoolConfig(mem_limit=512 * MIB),), threads=2), None),
        (QUIET, None),
    ],
)
def test_more_than_the_machine_has_is_a_peril(config: ServerConfig, says: str | None) -> None:
    """Nobody but doctor said so."""
    found = [peril.says for peril in perils(config, Small(), environment={})]
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


def test_what_the_machine_has_not_is_told_by_doctor_once() -> None:
    over = Patient(replace(QUIET, pools=(PoolConfig(mem_limit=1 << 50),)), None)
    told = [finding for look in (diagnosis.memory, diagnosis.survival) for finding in look(over)]
    assert len([finding for finding in told if "the pools may take" in finding.says]) == 1


@pytest.mark.parametrize(
    ("place", "clue"),
    [
        ("/dev/shm/nbdzram", "RemoveIPC"),
        ("/run/user/1000/disks", "logs out"),
        ("/var/run/nbdzram/state", "runtime directory"),
        ("/tmp/disks", "PrivateTmp"),
        ("/var/tmp/disks", "PrivateTmp"),
    ],
)
def test_a_state_directory_that_others_clean_is_a_peril(place: str, clue: str) -> None:
    (peril,) = state_perils(replace(QUIET, state_dir=Path(place)))
    assert clue in peril.says
    assert place in peril.says
    (first, *_) = diagnosis.survival(Patient(replace(QUIET, state_dir=Path(place)), None))
    assert (first.level, first.says) == (Level.WARN, peril.says)


@pytest.mark.parametrize("place", [None, Path("/var/lib/nbdzram"), Path("/srv/disks")])
def test_a_state_directory_of_its_own_is_none(place: Path | None) -> None:
    assert not list(state_perils(replace(QUIET, state_dir=place)))


def test_a_link_into_shared_memory_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "state"
    link.symlink_to("/dev/shm")
    assert any("RemoveIPC" in peril.says for peril in state_perils(replace(QUIET, state_dir=link / "disks")))


KEY = Path("/etc/nbdzram/key.pem")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (replace(QUIET, tls=TlsConfig(key=KEY)), "clients are served in plain text"),
        (replace(QUIET, tls=TlsConfig(psk_file=KEY)), "clients are served in plain text"),
        (replace(QUIET, checkpoint=CheckpointConfig(interval_seconds=10)), "no directory: none are taken"),
        (replace(QUIET, checkpoint=CheckpointConfig(keep=9)), "no directory: none are taken"),
        (replace(QUIET, pools=(PoolConfig(mem_limit=8),)), "the pool 'default' has a limit of 8 bytes, too few"),
        (replace(QUIET, default_export="dsik"), "the default export is 'dsik', and no export has that name"),
    ],
)
def test_what_is_set_and_does_nothing_is_said(config: ServerConfig, says: str) -> None:
    (peril,) = idle_perils(config)
    assert says in peril.says
    assert peril in list(perils(config, environment={}))


@pytest.mark.parametrize(
    "config",
    [
        QUIET,
        replace(QUIET, tls=TlsConfig(mode=TlsMode.ON, key=KEY, certificate=KEY)),
        replace(QUIET, checkpoint=CheckpointConfig(directory=Path("/var/lib/x"), keep=9)),
        replace(QUIET, pools=(PoolConfig(mem_limit=MIB),)),
        replace(QUIET, exports=(ExportConfig(name="disk", size_bytes=MIB),), default_export="disk"),
        replace(QUIET, state_dir=Path("/var/lib/x"), default_export="kept"),
        replace(QUIET, checkpoint=CheckpointConfig(directory=Path("/var/lib/x")), default_export="kept"),
    ],
)
def test_what_does_something_is_no_peril(config: ServerConfig) -> None:
    assert list(idle_perils(config)) == []


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("NBDZRAM_MEM_LIMT", "NBDZRAM_MEM_LIMIT"),
        ("NBDZRAM_STATEDIR", "NBDZRAM_STATE_DIR"),
        ("NBDZRAM_TLS", "NBDZRAM_TLS_MODE"),
        ("NBDZRAM_FOLD", "NBDZRAM_MAINTENANCE_FOLD"),
        ("NBDZRAM_EXPORT", "NBDZRAM_EXPORTS"),
        ("NBDZRAM_MEM_LIMIT", None),
        ("NBDZRAM_PORT", None),
        ("NBDZRAM_PORT_10809_TCP_ADDR", None),
        ("NBDZRAM_SERVICE_HOST", None),
        ("NBDZRAM_TEST_KVM", None),
        ("OTHER_MEM_LIMT", None),
    ],
)
def test_a_variable_that_is_nearly_one_of_ours_is_said(variable: str, meant: str | None) -> None:
    """Those that Kubernetes sets for a service named nbdzram are not ours."""
    found = [peril.remedy for peril in environment_perils({variable: "1"})]
    assert found == ([f"did you mean {meant}?"] if meant else [])


def test_a_default_export_that_is_nearly_one_of_those_declared_is_told_which() -> None:
    done = run("serve", "-e", "disk=1M", "--default-export", "dsik", "--check-config")
    assert (done.code, done.err) == (0, "")
    assert "  default  dsik, which is not declared here" in done.out
    assert "'dsik', and no export has that name: clients that name none are refused; did you mean 'disk'?\n" in done.out


def test_check_config_prints_perils_and_serve_logs_them(start: Callable[..., Server]) -> None:
    place = f"/dev/shm/nbdzram-test-peril-{os.getpid()}"
    done = run("serve", "-e", "disk=1M", "--state-dir", place, "--check-config")
    assert (done.code, done.err) == (0, "")
    assert f"  warning  the state directory {place} lies below /dev/shm" in done.out
    directory = Path(place)
    try:
        server = start("-e", "disk=1M", "--state-dir", place, "--default-export", "dsik")
        server.wait_for_log(f"WARNING nbdzram.server: the state directory {place} lies below /dev/shm")
        server.wait_for_log("WARNING nbdzram.server: the default export is 'dsik', and no export has that name")
        server.stop()
    finally:
        for file in directory.glob("*"):
            file.unlink()
        directory.rmdir()

"""What an export and a pool are set to outlives whatever it should, each setting for itself, the second one's too."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdzram.config import CheckpointConfig, Durability, ExportConfig, PoolConfig, ServerConfig, UnixAddress
from nbdzram.server.service import Service
from tests.support.loop_client import WireClient
from tests.unit.server.lasting import MIB, NEVER, asked

RULES: dict[str, Any] = {
    "read_only": False,
    "description": "the second",
    "allow_addresses": ["10.2.0.0/16"],
    "allow_certificates": ["vm2"],
    "quota_bytes": 3 * MIB,
    "iops": 500,
    "iops_burst": 700,
    "bandwidth_bytes": 11 * MIB,
    "bandwidth_burst_bytes": 13 * MIB,
}
OTHERWISE: dict[str, Any] = {
    "read_only": True,
    "description": "otherwise",
    "allow_addresses": ["10.3.0.0/16"],
    "allow_certificates": ["vm3"],
    "quota_bytes": 2 * MIB,
    "iops": 501,
    "iops_burst": 701,
    "bandwidth_bytes": 17 * MIB,
    "bandwidth_burst_bytes": 19 * MIB,
}
POOL: dict[str, Any] = {"mem_limit": 37 * MIB, "dedup": "fold", "verify": False, "tell_sharing": True}
POOL_OTHERWISE: dict[str, Any] = {"mem_limit": 41 * MIB, "dedup": "inline", "verify": True, "tell_sharing": False}
Told = dict[str, dict[str, Any]]


def told(service: Service) -> Told:
    """What the server says that each export and each pool is, without what it counts."""
    status = service.status()
    found: Told = {}
    for export in status.exports:
        bounds = {field.name: getattr(export.bounds, field.name) for field in fields(export.bounds)}
        names = ("pool", "size_bytes", "read_only", "description", "admits", "private", "stored_bytes")
        lists = {name: list(getattr(export, name)) for name in ("allow_addresses", "allow_certificates")}
        found[export.name] = {name: getattr(export, name) for name in names} | lists | bounds
    for pool in status.pools:
        found[f"pool {pool.name}"] = {
            "mem_limit": pool.stats.mem_limit,
            "dedup": pool.dedup,
            "verify": pool.verify,
            "tell_sharing": pool.tells_sharing,
        }
    return found


def config_of(directory: Path, kind: str) -> ServerConfig:
    config = ServerConfig(exports=(ExportConfig(name="disk", size_bytes=4 * MIB),), tcp=(), unix=())
    if kind == "state directory":
        return replace(config, state_dir=directory / "state")
    if kind == "journal":
        pools = (PoolConfig(durability=Durability.FLUSH),)
        return replace(config, pools=pools, checkpoint=CheckpointConfig(directory=directory, interval_seconds=NEVER))
    return replace(config, unix=(UnixAddress(path=directory / "nbd.sock"),))


async def begin(service: Service) -> None:
    await service.start(listen=False)
    await service.listen()


async def furnish(service: Service) -> None:
    """Two pools, with three exports that differ in everything."""
    await asked(service, "pools.add", name="fast", **POOL)
    await asked(service, "exports.add", name="second", size_bytes=6 * MIB, pool="fast", **RULES)
    await asked(service, "exports.add", name="third", size_bytes=7 * MIB, private=True, iops=9, description="third")
    for number, name in enumerate(("disk", "second", "third"), start=1):
        service._exports.get(name).disk.write(0, bytes([number]) * 4096 * number)


async def again(service: Service, config: ServerConfig, kind: str) -> Service:
    """Whoever goes on after this one, which has ended."""
    if kind != "takeover":
        await service.stop()
        return Service(config)
    service._nbd.prepare_to_hand_over()
    return Service(config, handed=await service.hand_over())


@pytest.mark.parametrize("kind", ["state directory", "journal", "takeover"])
def test_every_setting_outlives_each_way_of_going_on(tmp_path: Path, kind: str) -> None:
    """Those that were made with an export or a pool, and those that were changed since, one by one."""

    async def story() -> None:
        config = config_of(tmp_path, kind)
        service = Service(config)
        await begin(service)
        await furnish(service)
        made = told(service)
        assert {name: made["second"][name] for name in RULES} == RULES
        assert made["pool fast"] == POOL
        service = await again(service, config, kind)
        await begin(service)
        assert told(service) == made
        expected = made
        for method, name, change in changes():
            await asked(service, method, name=name, **change)
            expected = {**expected, key(method, name): {**expected[key(method, name)], **change}}
            assert told(service) == expected
        service = await again(service, config, kind)
        await begin(service)
        goes_on = told(service)
        await service.stop()
        assert goes_on == expected

    uvloop.run(story())


def changes() -> list[tuple[str, str, dict[str, Any]]]:
    one_by_one = [("exports.change", "second", {name: value}) for name, value in OTHERWISE.items()]
    of_pools = [("pools.change", "fast", {name: value}) for name, value in POOL_OTHERWISE.items()]
    return [*one_by_one, *of_pools, ("pools.change", "default", {"mem_limit": 53 * MIB})]


def key(method: str, name: str) -> str:
    return f"pool {name}" if method.startswith("pools.") else name


ACTS: dict[str, tuple[list[tuple[str, dict[str, Any]]], dict[str, dict[str, Any] | None]]] = {
    "rename": ([("exports.rename", {"name": "second", "new_name": "fourth"})], {"second": None, "fourth": {}}),
    "resize": ([("exports.resize", {"name": "second", "size_bytes": 8 * MIB})], {"second": {"size_bytes": 8 * MIB}}),
    "shrink": (
        [("exports.resize", {"name": "second", "size_bytes": 4096, "yes": True})],
        {"second": {"size_bytes": 4096, "stored_bytes": 4096}},
    ),
    "reset": ([("exports.reset", {"name": "second"})], {"second": {"stored_bytes": 0}}),
    "remove": ([("exports.remove", {"name": "second"})], {"second": None}),
    "clone": (
        [("exports.copy", {"source": "second", "name": "fourth"})],
        {"fourth": {"description": "clone of second"}},
    ),
    "snapshot": (
        [("exports.copy", {"source": "second", "name": "fourth", "read_only": True})],
        {"fourth": {"read_only": True, "description": "snapshot of second"}},
    ),
    "rollback": (
        [
            ("exports.copy", {"source": "second", "name": "fourth", "read_only": True}),
            ("exports.resize", {"name": "second", "size_bytes": 8 * MIB}),
            ("exports.change", {"name": "second", "iops": 41}),
            ("exports.rollback", {"name": "second", "snapshot": "fourth"}),
        ],
        {"second": {"iops": 41}, "fourth": {"read_only": True, "description": "snapshot of second"}},
    ),
}
"""What is asked, and what is otherwise then: of an export that is new, from what `second` was."""


@pytest.mark.parametrize("kind", ["state directory", "journal", "takeover"])
@pytest.mark.parametrize("act", ACTS)
def test_an_act_changes_what_it_should_and_nothing_else(tmp_path: Path, act: str, kind: str) -> None:
    async def story() -> None:
        config = config_of(tmp_path, kind)
        service = Service(config)
        await begin(service)
        await furnish(service)
        expected = told(service)
        origin = expected["second"]
        for method, given in ACTS[act][0]:
            await asked(service, method, **given)
        for name, change in ACTS[act][1].items():
            if change is None:
                del expected[name]
            else:
                expected[name] = {**expected.get(name, origin), **change}
        assert told(service) == expected
        service = await again(service, config, kind)
        await begin(service)
        goes_on = told(service)
        await service.stop()
        assert goes_on == expected

    uvloop.run(story())


def test_what_is_told_of_a_client_is_its_own_and_goes_on_behind_a_takeover(tmp_path: Path) -> None:
    """Two of them, on two exports, with as many requests as nobody else."""

    async def story() -> None:
        path = tmp_path / "nbd.sock"
        exports = (
            ExportConfig(name="disk", size_bytes=MIB),
            ExportConfig(name="fixed", size_bytes=MIB, read_only=True),
        )
        config = ServerConfig(exports=exports, tcp=(), unix=(UnixAddress(path=path),))
        service = Service(config)
        await begin(service)
        began = time.time()
        ours = [await (await WireClient.connect(str(path))).go(name) for name in (b"disk", b"fixed")]
        for client, count in zip(ours, (3, 5), strict=True):
            for _ in range(count):
                await client.read(0, 512)
        before = service.clients()
        ended = time.time()
        service = await again(service, config, "takeover")
        await begin(service)
        after = service.clients()
        await service.disconnect_client(2)
        left = service.clients()
        await service.stop()
        for client in ours:
            await client.close()
        assert [(one.number, one.export, one.read_only, one.requests, one.in_flight) for one in before] == [
            (1, "disk", False, 3, 0),
            (2, "fixed", True, 5, 0),
        ]
        assert all(began <= one.since <= ended for one in before)
        of_each = attrgetter("number", "peer", "export", "read_only", "since")
        assert [of_each(one) for one in after] == [of_each(one) for one in before]
        assert [one.number for one in left] == [1]

    uvloop.run(story())

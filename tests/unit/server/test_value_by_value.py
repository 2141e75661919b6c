"""What was changed at run time holds until that very value is declared otherwise, at a start and at a reload alike: a
search against a model that keeps a word for each value."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nbdzram.config import Dedup, ExportConfig, PoolConfig, ServerConfig, UnixAddress
from nbdzram.server.service import Service
from tests.unit.server.house import UNCHANGED, tell

MIB = 1 << 20
STEPS, SEEDS = 80, 2

# The first of each is the default.
RULES: dict[str, tuple[Any, ...]] = {
    "description": ("", "golden"),
    "read_only": (False, True),
    "allow_addresses": ((), ("10.0.0.0/8",), ("10.1.0.0/16",)),
    "allow_certificates": ((), ("alice",), ("bob",)),
}
BOUNDS: dict[str, tuple[Any, ...]] = {
    "quota": (0, MIB, 2 * MIB),
    "iops": (0, 100, 200),
    "bandwidth": (0, MIB, 2 * MIB),
}
POOL: dict[str, tuple[Any, ...]] = {
    "mem_limit": (0, 32 * MIB, 64 * MIB),
    "dedup": (Dedup.FOLD, Dedup.INLINE),
    "verify": (True, False),
    "tell_sharing": (False, True),
}
VALUES = {**RULES, **BOUNDS, **POOL}
AS_ASKED_FOR = {"quota": "quota_bytes", "iops": "iops", "bandwidth": "bandwidth_bytes"}


class Server:
    """A service with a file that can be written, read again, and started from."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = {key: values[0] for key, values in VALUES.items()}
        self.service: Service

    def config(self) -> ServerConfig:
        rules = {key: self.file[key] for key in (*RULES, *BOUNDS)}
        return ServerConfig(
            exports=(ExportConfig(name="disk", size_bytes=MIB, **rules),),
            pools=(PoolConfig(**{key: self.file[key] for key in POOL}),),
            tcp=(),
            unix=(UnixAddress(path=self.directory / "socket"),),
            state_dir=self.directory / "state",
        )

    async def start(self) -> None:
        self.service = Service(self.config(), reread=self.config)
        await self.service.start()

    async def say(self, key: str, value: Any) -> None:
        if key in POOL:
            said = {"mem_limit": None, "dedup": None, key: value}
            await self.service.changes.change_pool("default", **said)
        elif key in BOUNDS:
            await self.service.changes.change_export("disk", **UNCHANGED, bounds={AS_ASKED_FOR[key]: value})
        else:
            await self.service.changes.change_export("disk", **{**UNCHANGED, key: value})

    def found(self) -> dict[str, Any]:
        export, pool = self.service._exports.get("disk"), self.service._pools["default"].pool
        access, bounds = export.access, export.bounds
        return {
            "description": export.description,
            "read_only": export.read_only,
            "allow_addresses": access.addresses,
            "allow_certificates": access.certificates,
            **{key: getattr(bounds, name) for key, name in AS_ASKED_FOR.items()},
            "mem_limit": pool.mem_limit,
            "dedup": Dedup.INLINE if pool.inline_dedup else Dedup.FOLD,
            "verify": pool.verify,
            "tell_sharing": pool.tells_sharing,
        }


@pytest.mark.parametrize("seed", range(SEEDS))
def test_each_value_holds_until_it_is_declared_otherwise_itself(tmp_path: Path, seed: int) -> None:
    dice, server = random.Random(seed), Server(tmp_path)

    async def story() -> None:
        await server.start()
        try:
            await play()
        finally:
            await server.service.stop()

    async def play() -> None:
        known = dict(server.file)  # what is declared, as the server read it last
        holds = dict(server.file)
        told: list[object] = []
        key = ""
        for _ in range(STEPS):
            act = dice.choice(["say", "say", "write", "write", "reload", "restart"])
            key = dice.choice([key or "verify"] * len(VALUES) + list(VALUES))  # so that much happens to one
            value = dice.choice((*VALUES[key], holds[key]))
            told.append((act, key, value) if act in {"say", "write"} else act)
            if act == "say":
                await server.say(key, value)
                holds[key] = value
            elif act == "write":
                server.file[key] = value
            else:
                holds |= {one: server.file[one] for one in VALUES if server.file[one] != known[one]}
                known = dict(server.file)
                if act == "reload":
                    await server.service.reload()
                else:
                    await server.service.stop()
                    await server.start()
            assert server.found() == holds, told

    tell(story())

"""What a reload makes of each difference between two configurations, beside what was said at run time: reloads.txt.

python -m tests.unit.server.test_reloads        writes it anew, after a change that is meant
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from nbdzram.config import Limits, ServerConfig
from nbdzram.errors import UserError
from nbdzram.server.service import Service
from nbdzram.settings import load
from nbdzram.status import fields
from tests.unit.server.lasting import asked

RELOADS = Path(__file__).with_name("reloads.txt")
PLAIN = "exports.disk = {size = '8M', description = 'first'}\nexports.other = {size = '4M'}\n"
RULED = (
    "exports.disk = {size = '8M', read_only = true, allow_addresses = ['10.0.0.0/8'], allow_certificates = ['a'], "
    "quota = '4M', iops = 5, iops_burst = 9, bandwidth = '1M', bandwidth_burst = '2M', snapshots = '1h', "
    "snapshots_keep = 3, description = 'second'}\nexports.other = {size = '4M'}\n"
)
POOLS = (
    f"{PLAIN}exports.fast = {{size = '1M', pool = 'fast'}}\npools.fast = {{mem_limit = '64M'}}\npools.default = {{}}\n"
)
INLINE = "exports.disk = {size = '8M'}\nexports.other = {size = '4M'}\npools.default = {dedup = 'inline'}\n"
PRIVATE = "exports.disk = {size = '8M', private = true}\n"
TLS = "tls = {mode = 'on', psk_file = '/nowhere'}\n"
RULES: Mapping[str, Any] = {"read_only": True, "description": "said", "allow_addresses": ["::1"], "iops": 3}


@dataclass(frozen=True)
class Story:
    title: str
    first: str
    then: str
    said: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # at run time, before the reload


def changed(name: str, **given: Any) -> tuple[str, Mapping[str, Any]]:
    return "exports.change", {"name": name, **given}


def stories() -> Iterator[Story]:
    yield Story("nothing", PLAIN, PLAIN)
    yield Story("every rule", PLAIN, RULED)
    yield Story("no rule any more", RULED, PLAIN.replace("first", "second"))
    yield Story("every rule, where others were said", PLAIN, RULED, (changed("disk", **RULES),))
    for key, value in (
        *(("description", "'new'"), ("read_only", "true"), ("allow_addresses", "['10.0.0.0/8']")),
        *(
            ("allow_certificates", "['b']"),
            ("quota", "'2M'"),
            ("iops", "7"),
            ("iops_burst", "8"),
            ("bandwidth", "'3M'"),
        ),
        *(("bandwidth_burst", "'5M'"), ("snapshots", "'2h'"), ("snapshots_keep", "7"), ("private", "true")),
        *(("size", "'9M'"), ("size", "'8388096'"), ("size", "'4M'"), ("pool", "'nowhere'"), ("image", "'/nowhere'")),
    ):
        entry = f"{key} = {value}"
        size = "" if key == "size" else "size = '8M', "
        then = PLAIN.replace("size = '8M', description = 'first'", f"{size}{entry}")
        yield Story(f"disk: {entry}", PLAIN, then)
        if key not in {"pool", "image", "private"}:
            yield Story(f"disk: {entry}, where rules were said", PLAIN, then, (changed("disk", **RULES),))
    yield Story("a disk that was grown", PLAIN, RULED, (("exports.resize", {"name": "disk", "size_bytes": 16 << 20}),))
    resized = (("exports.resize", {"name": "disk", "size_bytes": 16 << 20}),)
    yield Story("as large as it was grown", PLAIN, PLAIN.replace("8M", "16M"), resized)
    yield Story("larger than it was grown", PLAIN, PLAIN.replace("8M", "17M"), resized)
    yield Story("smaller than it was grown", PLAIN, PLAIN.replace("8M", "12M"), resized)
    removed = (("exports.remove", {"name": "disk"}),)
    yield Story("a removed one, as declared", PLAIN, PLAIN, removed)
    yield Story("a removed one, declared otherwise", PLAIN, RULED, removed)
    yield Story("one that is declared no more", PLAIN, "exports.other = {size = '4M'}\n")
    yield Story("a removed one, declared no more", PLAIN, "exports.other = {size = '4M'}\n", removed)
    renamed = (("exports.rename", {"name": "disk", "new_name": "new"}),)
    yield Story("a renamed one, declared no more", PLAIN, "exports.other = {size = '4M'}\n", renamed)
    yield Story("a new one", PLAIN, PLAIN + "exports.new = {size = '1M', read_only = true, iops = 3}\n")
    yield Story("a new one, with an image", PLAIN, PLAIN + "exports.new = {image = '/etc/hostname'}\n")
    added = (("exports.add", {"name": "new", "size_bytes": 1 << 20, "description": "added"}),)
    yield Story("one that was added", PLAIN, PLAIN + "exports.new = {size = '2M', iops = 3}\n", added)
    yield Story("private no more", PRIVATE, "exports.disk = {size = '8M'}\n")
    yield Story("private still", PRIVATE, PRIVATE.replace("true", "true, iops = 4"))
    yield Story("private now", "exports.disk = {size = '8M'}\n", PRIVATE)
    yield from of_pools()
    yield from of_the_server()


def of_pools() -> Iterator[Story]:
    for entry in ("mem_limit = '32M'", "mem_limit = '0'", "dedup = 'inline'", "verify = false", "tell_sharing = true"):
        then = POOLS.replace("mem_limit = '64M'", entry)
        yield Story(f"pool fast: {entry}", POOLS, then)
        said = (("pools.change", {"name": "fast", "mem_limit": 48 << 20, "verify": False}),)
        yield Story(f"pool fast: {entry}, where others were said", POOLS, then, said)
    yield Story("a limit that is none", POOLS, POOLS.replace("64M", "7T"))
    yield Story("a limit that is little", POOLS, POOLS.replace("64M", "64K"))
    yield Story("a pool that is declared no more", POOLS, PLAIN)
    yield Story("a new pool, and an export in it", PLAIN, POOLS)
    yield Story("an export in another pool", POOLS, POOLS.replace("pool = 'fast'", "pool = 'default'"))
    yield Story("durable", POOLS, POOLS.replace("64M'", "64M', durability = 'flush'") + "checkpoint.directory = '/n'\n")
    for rule in ("allow_addresses = ['10.0.0.0/8']", "allow_certificates = ['a']", "private = true"):
        disk = f"size = '8M', {rule}"
        yield Story(f"inline, one with {rule}", INLINE, INLINE.replace("size = '8M'", disk))
        both = INLINE.replace("size = '8M'", disk).replace("size = '4M'", f"size = '4M', {rule}")
        yield Story(f"inline, both with {rule}", INLINE, both)
        yield Story(
            f"inline, tells, one with {rule}",
            INLINE,
            INLINE.replace("size = '8M'", disk).replace("'inline'", "'inline', tell_sharing = true"),
        )
        yield Story(
            f"inline no more, one with {rule}",
            INLINE,
            INLINE.replace("size = '8M'", disk).replace("'inline'", "'fold'"),
        )
    both_said = (changed("disk", allow_addresses=["::1"]), changed("other", allow_addresses=["::1"]))
    yield Story("inline now, where all admit the same", INLINE.replace("inline", "fold"), INLINE, both_said)
    yield Story("inline now, where they do not", INLINE.replace("inline", "fold"), INLINE, both_said[:1])
    fold = INLINE.replace("inline", "fold")
    yield Story("a new one, to an inline pool", INLINE, INLINE + "exports.new = {size = '1M'}\n")
    yield Story(
        "another one, to an inline pool", INLINE, INLINE + "exports.new = {size = '1M', allow_certificates = ['a']}\n"
    )
    yield Story(
        "a private one, to an inline pool",
        INLINE,
        INLINE + "exports.new = {size = '1M', private = true, allow_addresses = ['::1']}\n",
    )
    yield Story("folding again", INLINE, fold)


def of_the_server() -> Iterator[Story]:
    for entry in (
        *(
            "limits.connections = 7",
            "limits.handshake_seconds = 7",
            "limits.total_bytes = '64M'",
            "limits.keep_free = 'off'",
        ),
        *(
            "limits.payload_bytes = '1M'",
            "limits.drain_seconds = 1",
            "maintenance.fold = '1h'",
            "maintenance.cpu_percent = 7",
        ),
        *("default_export = 'other'", "default_export = 'dsik'", "default_export = 'vm1'"),
        *("list_exports = false", "threads = 3", "log_level = 'debug'", "swap = true"),
        *(
            "listen = ['127.0.0.1:1']",
            "listen = ['unix:/a', 'vsock:3']",
            "metrics = '127.0.0.1:1'",
            "pidfile = '/nowhere'",
        ),
        *("checkpoint.directory = '/nowhere'", "state_dir = '/nowhere'", "checkpoint.keep = 7", TLS.strip()),
    ):
        yield Story(entry, PLAIN, f"{entry}\n{PLAIN}")
    yield Story("limits as they were", f"limits.connections = 7\nlimits.total_bytes = '64M'\n{PLAIN}", PLAIN)
    yield Story("no configuration that can be read", PLAIN, "exports.disk = 3\n")


def now(service: Service) -> Iterator[str]:
    """What exports and pools are."""
    for export in service._exports:
        kind = f"{', private' * export.disk.private}{', read-only' * export.read_only}"
        rules = {name: value for name, value in {**fields(export.access), **fields(export.bounds)}.items() if value}
        yield f"  {export.name} in {export.pool_name}: {export.disk.size_bytes}{kind} {export.description!r} {rules}"
    for name, pool in ((name, one.pool) for name, one in service._pools.items()):
        kind = f"{', inline' * pool.inline_dedup}{', tells' * pool.tells_sharing}{', unverified' * (not pool.verify)}"
        yield f"  pool {name}: {pool.mem_limit}{kind}"


async def told(story: Story, file: Path) -> list[str]:
    """What a reload answers, and what there is then if anything is otherwise."""

    def reread() -> ServerConfig:
        return load(file, {}, {})

    await asyncio.to_thread(file.write_text, story.first)
    service = Service(dataclasses.replace(reread(), tcp=(), unix=(), vsock=()), reread)
    await service.start(listen=False)
    try:
        for method, given in story.said:
            await asked(service, method, **given)
        before = list(now(service))
        await asyncio.to_thread(file.write_text, story.then)
        try:
            report = await asked(service, "reload")
        except UserError as error:
            answer = [f"{type(error).__name__}: {error}".replace(str(file), "FILE")]
        else:
            answer = list(report.lines())
            again = await asked(service, "reload")
            assert again.changed == (), "what is declared was made, and is not made again"
            assert again.restart == report.restart
        after = [line for line in now(service) if line not in before]
        limits = service.config.limits, service._exports.default_name
        return [f"-- {story.title}", *answer, *after, *([] if limits == USUAL else [f"  {limits}"])]
    finally:
        await service.stop()


USUAL = Limits(), None


async def lines() -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "nbdzram.toml"
        return [line for story in stories() for line in await told(story, file)]


def test_each_reload_makes_and_tells_what_it_did() -> None:
    assert uvloop.run(lines()) == RELOADS.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    RELOADS.write_text("\n".join(uvloop.run(lines())) + "\n", encoding="utf-8")

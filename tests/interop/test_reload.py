"""A configuration that is read again while clients are served: what is right is done, what is wrong changes nothing."""

from __future__ import annotations

import errno
import json
import signal
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdzram.control.client import ControlClient
from tests.support.nbd_client import Client, RequestFailed
from tests.support.pki import Pki
from tests.support.server import Nbdzram
from tests.support.takeover import beating_on

pytestmark = pytest.mark.interop

GOOD = """
[exports.kept]
size = "8M"
[exports.disk]
size = "8M"
description = "first"
"""

WRONG = {
    "no TOML": ("[exports.disk", "is not valid TOML"),
    "an unknown key": (GOOD + "read_onyl = true\n", "did you mean 'read_only'?"),
    "an unknown section": (GOOD + "[export.other]\nsize = '1M'\n", "unknown key"),
    "a size that is none": (GOOD + "[exports.other]\nsize = 'lots'\n", "is not a size"),
    "no size": (GOOD + "[exports.other]\nread_only = true\n", "has no size"),
    "an odd size": (GOOD + "[exports.other]\nsize = 1000\n", "is not the size of a disk"),
    "a disk that shrinks": (GOOD.replace('"8M"\ndes', '"4M"\ndes'), "has 8M, but is declared with 4M"),
    "a disk in another pool": (GOOD + 'pool = "fast"\n[pools.fast]\n', "lies in the pool 'default', but is declared"),
    "a disk that was not private": (GOOD + "private = true\n", "is declared private, but was made without"),
    "a pool that is not there": (GOOD + 'pool = "fast"\n', "asks for the pool 'fast'"),
    "a pool's wrong name": (GOOD + '[pools."a/b"]\n', "is not a pool's name"),
    "a wrong limit of a pool": (GOOD + "[pools.default]\nmem_limit = '150%'\n", "percentage"),
    "a wrong dedup": (GOOD + "[pools.default]\ndedup = 'never'\n", "is not allowed"),
    "a wrong network": (GOOD + 'allow_addresses = ["10.0.0/8"]\n', "is not a network"),
    "a wrong boolean": (GOOD + 'read_only = "perhaps"\n', "neither true nor false"),
    "a wrong limit": (GOOD + "[limits]\nconnections = 0\n", "is not a whole number"),
    "a wrong time": (GOOD + "[limits]\nhandshake_seconds = 'soon'\n", "is not a number of seconds"),
    "a wrong interval": (GOOD + "[maintenance]\nfold = 'often'\n", "off, auto, or an interval"),
    "a wrong percentage": (GOOD + "[maintenance]\ncpu_percent = 101\n", "is not a whole number"),
    "a wrong level": ('log_level = "loud"\n' + GOOD, "is not allowed"),
    "TLS without files": (GOOD + '[tls]\nmode = "on"\n', "needs tls.certificate"),
    "TLS with files that are not there": (
        GOOD + '[tls]\nmode = "on"\ncertificate = "/nowhere/a.pem"\nkey = "/nowhere/b.pem"\n',
        "No such file",
    ),
    "an image, which only a start loads": (
        GOOD + "[exports.other]\nimage = '/etc/passwd'\n",
        "which only a start does",
    ),
    "a key that is there twice": (GOOD + 'size = "8M"\n', "is not valid TOML"),
    "a name that is too long": (GOOD + f"[exports.{'x' * 256}]\nsize = '1M'\n", "is not an export's name"),
    "a name of two lines": (GOOD + '[exports."a\\nb"]\nsize = "1M"\n', "is not an export's name"),
    "a wrong size to keep free": (GOOD + "[limits]\nkeep_free = 'much'\n", "limits.keep_free: 'much' is not a size"),
    "a wrong interval of checkpoints": (GOOD + "[checkpoint]\ninterval_seconds = 'often'\n", "is not an interval"),
    "no checkpoints to keep": (GOOD + "[checkpoint]\nkeep = 0\n", "checkpoint.keep: 0 is not a whole number"),
    "a wrong durability": (GOOD + "[pools.default]\ndurability = 'forever'\n", "is one of checkpoint, flush"),
    "a wrong quota": (GOOD + "quota = 'half'\n", "exports.disk.quota: 'half' is not a size"),
    "a wrong rate": (GOOD + "iops = -1\n", "exports.disk.iops: -1 is not a whole number"),
    "a wrong bandwidth": (GOOD + "bandwidth = 'fast'\n", "exports.disk.bandwidth: 'fast' is not a size"),
    "a wrong schedule": (GOOD + "snapshots = 'sometimes'\n", "exports.disk.snapshots: 'sometimes' is not allowed"),
    "a value where a table is to be": ("exports = 5\n", "'exports' holds tables"),
    "a certificate's name that is none": (GOOD + "allow_certificates = [7]\n", "7 is not text"),
    "a description that is none": (GOOD.replace('"first"', "7"), "is not text"),
}


DECLARED = ("size_bytes", "pool", "read_only", "description", "allow_addresses", "allow_certificates")


class Configured(Nbdzram):
    """A server with a configuration file."""

    def write(self, text: str) -> None:
        (self.directory / "nbdzram.toml").write_text(text)

    def exports(self) -> dict[str, Any]:
        """What of them is declared, by name."""
        told = json.loads(self.command_line("exports", "list", "--json").stdout)
        return {found["name"]: {key: found[key] for key in DECLARED} for found in told}


@contextmanager
def configured(directory: Path, text: str = GOOD, *arguments: str) -> Iterator[Configured]:
    (directory / "nbdzram.toml").write_text(text)
    with Configured(directory, {}, arguments=("-c", str(directory / "nbdzram.toml"), *arguments)) as server:
        yield server


def test_no_mistake_in_the_file_stops_or_changes_a_serving_server(tmp_path: Path) -> None:
    """Each also with a good change beside it, which is not made either; while a client writes and reads on and on."""
    with configured(tmp_path) as server, server.client() as client, beating_on(server, 1 << 20) as beater:
        client.write(0, b"x" * 4096)
        before = server.exports()
        for what, (text, told) in WRONG.items():
            server.write(text.replace("[exports.kept]", '[exports.kept]\ndescription = "changed"', 1))
            refused = server.command_line("reload", check=False)
            assert refused.returncode in {1, 2}, what
            assert told in refused.stderr, (what, refused.stderr)
            assert len(refused.stderr.splitlines()) == 1, what
            assert server.exports() == before, what
            assert client.read(0, 4096) == b"x" * 4096
            beater.beat()
        (tmp_path / "nbdzram.toml").write_bytes(b"# \xff\n" + GOOD.replace("first", "changed").encode())
        assert "is not UTF-8 text" in server.command_line("reload", check=False).stderr
        assert server.exports() == before
        (tmp_path / "nbdzram.toml").unlink()
        assert "cannot read the configuration file" in server.command_line("reload", check=False).stderr
        server.write(GOOD)
        assert server.command_line("reload").stdout == "nothing is declared otherwise than before\n"


def test_exports_pools_access_and_limits_change_while_clients_are_served(tmp_path: Path) -> None:
    with configured(tmp_path) as server, server.client() as client:
        client.write(0, b"x" * 4096)
        server.write(
            "default_export = 'new'\n"
            + GOOD.replace('"8M"\ndes', '"16M"\ndes').replace("first", "second")
            + "allow_addresses = ['10.0.0.0/8']\n[exports.new]\nsize = '1M'\npool = 'fast'\nread_only = true\n"
            + "[pools.fast]\nmem_limit = '3M'\n[pools.default]\nmem_limit = '64M'\n"
            + "[limits]\nconnections = 7\ntotal_bytes = '64M'\n[maintenance]\nfold = '1h'\n"
        )
        assert server.command_line("reload").stdout.splitlines() == [
            "pool fast added",
            "pool default changed (mem_limit)",
            "export disk changed (description, allow_addresses)",
            "export new added",
            "export disk grown to 16M",
            "maintenance changed",
            "default_export changed",
            "limits.connections changed",
            "limits.total_bytes takes effect at the next start",
        ]
        found = server.exports()
        assert (found["disk"]["size_bytes"], found["disk"]["description"]) == (16 << 20, "second")
        assert found["disk"]["allow_addresses"] == ["10.0.0.0/8"]
        assert (found["new"]["read_only"], found["new"]["pool"]) == (True, "fast")
        assert {pool["name"]: pool["mem_limit"] for pool in server.stat()["pools"]} == {
            "default": 64 << 20,
            "fast": 3 << 20,
        }
        assert client.read(0, 4096) == b"x" * 4096
        with server.client("") as default:
            assert default.read(0, 4096) == bytes(4096)
        told = ["nothing is declared otherwise than before", "limits.total_bytes takes effect at the next start"]
        assert server.command_line("reload").stdout.splitlines() == told


POOLS = """
[exports.kept]
size = "8M"
[exports.disk]
size = "8M"
pool = "fast"
[pools.default]
[pools.fast]
"""

WRONG_POOLS = {
    "a limit over the addresses of a pool, behind a right one": (
        POOLS.replace("[pools.default]", "[pools.default]\nmem_limit = '32M'") + "mem_limit = '7T'\n",
        "the pool 'fast': mem_limit 7696581394432 is over",
    ),
    "folding inline between what will be strangers": (
        POOLS.replace("[pools.default]", "[pools.default]\ndedup = 'inline'")
        + "[exports.stranger]\nsize = '1M'\nallow_addresses = ['10.0.0.0/8']\n",
        "the pool 'default' folds inline, and its exports would admit different clients",
    ),
    "a new pool for strangers that folds inline": (
        POOLS
        + "[pools.new]\ndedup = 'inline'\n"
        + "[exports.one]\nsize = '1M'\npool = 'new'\nallow_addresses = ['10.0.0.0/8']\n"
        + "[exports.other]\nsize = '1M'\npool = 'new'\n",
        "the pool 'new' folds inline",
    ),
}


def pools_of(server: Configured) -> dict[str, Any]:
    told = json.loads(server.command_line("pools", "list", "--json").stdout)
    return {pool["name"]: (pool["stats"]["mem_limit"], pool["dedup"]) for pool in told}


@pytest.mark.parametrize("mistake", WRONG_POOLS)
def test_a_mistake_in_a_later_pool_changes_no_earlier_one(tmp_path: Path, mistake: str) -> None:
    text, told = WRONG_POOLS[mistake]
    with configured(tmp_path, POOLS) as server:
        exports, pools = server.exports(), pools_of(server)
        server.write(text.replace("[exports.kept]", '[exports.kept]\ndescription = "changed"', 1))
        refused = server.command_line("reload", check=False)
        assert told in refused.stderr
        assert server.exports() == exports
        assert pools_of(server) == pools


def test_what_fails_as_it_is_made_undoes_what_was_made_before(tmp_path: Path) -> None:
    """A pool whose file is none is found to be that as it is opened: the pool before it goes again."""
    state = tmp_path / "state"
    with configured(tmp_path, GOOD, "--state-dir", str(state)) as server:
        exports, pools = server.exports(), pools_of(server)
        (state / "broken.pool").write_bytes(b"no arena".ljust(65536))
        server.write(GOOD.replace("first", "second") + "[pools.added]\n[pools.broken]\n")
        refused = server.command_line("reload", check=False)
        assert "pool broken added: " in refused.stderr
        assert refused.stderr.endswith("; changed is nothing\n")
        assert server.exports() == exports
        assert pools_of(server) == pools
        assert not (state / "added.pool").exists()
        (state / "broken.pool").unlink()
        assert server.command_line("reload").stdout.splitlines() == [
            "pool added added",
            "pool broken added",
            "export disk changed (description)",
        ]


def test_all_rules_of_a_pool_that_folds_inline_change_at_once(tmp_path: Path) -> None:
    """In between its exports admit different clients, one after another: what counts is what is declared."""
    inline = GOOD + "[pools.default]\ndedup = 'inline'\n"
    with configured(tmp_path, inline) as server:
        server.write(inline.replace('size = "8M"', "size = '8M'\nallow_addresses = ['127.0.0.0/8']"))
        assert server.command_line("reload").stdout.splitlines() == [
            "export kept changed (allow_addresses)",
            "export disk changed (allow_addresses)",
        ]
        assert pools_of(server)["default"] == (0, "inline")
        assert {export["allow_addresses"][0] for export in server.exports().values()} == {"127.0.0.0/8"}


def test_rules_that_tell_tenants_of_each_other_are_refused_before_anything_changes(tmp_path: Path) -> None:
    """An export of a pool that folds inline is to admit others than its neighbour; the file says more before it."""
    inline = GOOD + "[pools.default]\ndedup = 'inline'\n"
    with configured(tmp_path, inline) as server:
        before = server.exports()
        wrong = inline.replace('"8M"\n', "'8M'\nallow_addresses = ['127.0.0.0/8']\n", 1)
        server.write(wrong + "[exports.new]\nsize = '1M'\n[pools.fast]\n")
        refused = server.command_line("reload", check=False)
        assert refused.returncode != 0
        assert "inline" in refused.stderr
        assert server.exports() == before
        assert set(pools_of(server)) == {"default"}


def test_what_is_declared_no_more_stays_and_what_needs_a_restart_is_named(tmp_path: Path) -> None:
    with configured(tmp_path) as server:
        disk = "[exports.disk]\nsize = '8M'\ndescription = 'first'\n"
        server.write(f"log_level = 'debug'\nmetrics = '127.0.0.1:1'\n{disk}")
        answer = json.loads(server.command_line("reload", "--json").stdout)
        assert answer == {"changed": [], "kept": ["export kept"], "restart": ["log_level"]}  # a flag says `metrics`
        assert set(server.exports()) == {"kept", "disk"}
        assert server.command_line("exports", "remove", "kept", "--yes").returncode == 0


def test_durability_is_not_said_to_be_changed_where_no_flush_waits_for_the_disk(tmp_path: Path) -> None:
    """Each time, as it is not until the next start; of a pool that comes beside others, too."""
    (tmp_path / "disk").mkdir()
    checkpoint = f'[checkpoint]\ndirectory = "{tmp_path / "disk"}"\n'
    with configured(tmp_path, GOOD + checkpoint) as server:
        durable = "".join(f'[pools.{name}]\ndurability = "flush"\n' for name in ("default", "fast"))
        for changed in (["pool fast added"], []):
            server.write(GOOD + checkpoint + durable)
            answer = json.loads(server.command_line("reload", "--json").stdout)
            assert answer["changed"] == changed
            assert answer["restart"] == ["pools.default.durability", "pools.fast.durability"]
        with ControlClient(server.control) as control:
            assert control.status().journal is None


def test_tls_that_is_declared_no_more_stays_until_the_next_start(tmp_path: Path) -> None:
    """It was an error that was told when all other changes had been made."""
    pki = Pki(tmp_path)
    certificate, key = pki.issue("localhost", file="server", alternatives="DNS:localhost")
    tls = f'[tls]\nmode = "on"\ncertificate = "{certificate}"\nkey = "{key}"\n'
    with configured(tmp_path, GOOD + tls) as server:
        server.write(GOOD + "[exports.other]\nsize = '1M'\n")
        told = server.command_line("reload").stdout
        assert told.splitlines()[0] == "export other added"
        assert "tls.mode takes effect at the next start" in told
        with Client(server.unix_path, "other", tls=pki.client_context()) as client:
            assert client.read(0, 4096) == bytes(4096)
        again, new_key = pki.issue("localhost", file="again", alternatives="DNS:localhost")
        server.write(GOOD + tls.replace(str(certificate), str(again)).replace(str(key), str(new_key)))
        told = server.command_line("reload").stdout
        assert "tls.certificate changed" in told
        assert "tls.mode" not in told
        with Client(server.unix_path, "disk", tls=pki.client_context()) as client:
            assert isinstance(client.socket, ssl.SSLSocket)
            assert client.socket.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(again.read_text())


def test_all_that_a_pool_is_declared_with_counts(tmp_path: Path) -> None:
    sharing = "tell_sharing = true\n"
    with configured(tmp_path) as server:
        server.write(GOOD + "[pools.default]\nverify = false\n" + sharing + "[pools.fast]\n" + sharing)
        answer = json.loads(server.command_line("reload", "--json").stdout)
        assert answer["changed"] == ["pool fast added", "pool default changed (verify, tell_sharing)"]
        assert answer["restart"] == []
        pools = json.loads(server.command_line("pools", "list", "--json").stdout)
        found = {pool["name"]: pool["tells_sharing"] for pool in pools}
        assert found == {"default": True, "fast": True}
        assert [pool["verify"] for pool in pools if pool["name"] == "default"] == [False]
        server.write(GOOD + "[pools.fast]\n" + sharing)
        assert server.command_line("reload").stdout == "pool default changed (verify, tell_sharing)\n"
        pools = json.loads(server.command_line("pools", "list", "--json").stdout)
        assert [(pool["verify"], pool["tells_sharing"]) for pool in pools if pool["name"] == "default"] == [
            (True, False)
        ]


def test_what_a_start_put_up_with_is_no_reason_to_refuse_a_reload_of_something_else(tmp_path: Path) -> None:
    """A declaration that a disk does not meet is told by the start; a reload that does not touch it says no more."""
    kept = ("--state-dir", str(tmp_path / "state"))
    with configured(tmp_path, GOOD, *kept):
        pass
    private = GOOD.replace('"8M"\ndes', '"8M"\nprivate = true\ndes')
    with configured(tmp_path, private, *kept) as server:
        assert "is declared private, but was made without" in server.log_path.read_text()
        server.write(private + "[exports.new]\nsize = '1M'\n")
        assert server.command_line("reload").stdout == "export new added\n"


def test_of_a_pool_that_is_declared_otherwise_only_that_changes(tmp_path: Path) -> None:
    """What clients may find out was said at run time, and that it folds inline: a limit takes neither back."""
    told = "[pools.default]\ntell_sharing = true\nmem_limit = '64M'\n"
    with configured(tmp_path, GOOD + told) as server:
        server.command_line("pools", "tell-sharing", "default", "off")
        server.command_line("pools", "dedup", "default", "inline")
        server.write(GOOD + told.replace("64M", "32M"))
        assert server.command_line("reload").stdout == "pool default changed (mem_limit)\n"
        (pool,) = json.loads(server.command_line("pools", "list", "--json").stdout)
        assert (pool["stats"]["mem_limit"], pool["dedup"], pool["tells_sharing"]) == (32 << 20, "inline", False)
        server.write(GOOD + told.replace("64M", "32M") + "verify = false\n")
        assert server.command_line("reload").stdout == "pool default changed (verify)\n"
        server.write(GOOD + told.replace("64M", "32M").replace("true", "false"))
        assert server.command_line("reload").stdout == "pool default changed (verify)\n"
        server.command_line("pools", "limit", "default", "16M")
        server.write(GOOD + told.replace("64M", "16M").replace("true", "false"))
        assert server.command_line("reload").stdout == "nothing is declared otherwise than before\n"


def test_what_was_changed_at_run_time_stays_where_the_file_did_not_change(tmp_path: Path) -> None:
    with configured(tmp_path) as server:
        server.command_line("exports", "change", "disk", "--description", "by hand")
        server.write(GOOD + "[exports.new]\nsize = '1M'\n")
        assert server.command_line("reload").stdout == "export new added\n"
        assert server.exports()["disk"]["description"] == "by hand"
        server.write(GOOD.replace("first", "by file"))
        server.command_line("reload")
        assert server.exports()["disk"]["description"] == "by file"


def test_of_an_export_that_is_declared_otherwise_only_that_changes(tmp_path: Path) -> None:
    """Who may attach, a size and a removal were said at run time: another description or schedule takes none back."""
    with configured(tmp_path) as server:
        server.command_line("exports", "change", "disk", "--allow-address", "192.0.2.7", "--quota", "2M")
        server.command_line("exports", "resize", "disk", "16M")
        server.command_line("exports", "remove", "kept")
        server.write(GOOD.replace("first", "second").replace("[exports.kept]", "[exports.kept]\nread_only = true"))
        assert server.command_line("reload").stdout == "export disk changed (description)\n"
        disk = server.exports()["disk"]
        assert disk["allow_addresses"] == ["192.0.2.7/32"], "a reload let everybody in"
        assert (disk["description"], disk["size_bytes"]) == ("second", 16 << 20)
        assert "kept" not in server.exports(), "a removed export came back, empty"
        server.write(GOOD.replace("first", 'second"\nallow_addresses = ["192.0.2.0/24"]\nsnapshots = "1h'))
        assert "export disk changed (allow_addresses)\n" in server.command_line("reload").stdout
        assert server.exports()["disk"]["allow_addresses"] == ["192.0.2.0/24"]


def test_an_export_that_is_declared_private_no_more_is_said_to_stay_so(tmp_path: Path) -> None:
    private = GOOD.replace('"8M"\ndes', '"8M"\nprivate = true\ndes')
    with configured(tmp_path, private) as server:
        server.write(GOOD)
        assert server.command_line("reload").stdout == "export disk stays private, as it was made\n"
        server.write(private)
        assert server.command_line("reload").stdout == "nothing is declared otherwise than before\n"


def test_a_reload_is_remembered_as_the_declaration_that_it_is(tmp_path: Path) -> None:
    state = ("--state-dir", str(tmp_path / "state"))
    grown = GOOD.replace('"8M"\ndes', '"16M"\ndes')
    with configured(tmp_path, GOOD, *state) as server:
        server.write(grown)
        server.command_line("reload")
    with configured(tmp_path, grown, *state) as server:
        assert server.exports()["disk"]["size_bytes"] == 16 << 20
        server.write(grown.replace("first", "second"))
        server.command_line("reload")
    with configured(tmp_path, grown, *state) as server:  # as it was before the reload
        assert server.exports()["disk"]["description"] == "first", "a reload was taken for a change at run time"


def test_hangup_reloads_and_the_log_says_what_came_of_it(tmp_path: Path) -> None:
    with configured(tmp_path) as server:

        def told(what: str) -> Callable[[], bool]:
            return lambda: what in server.log

        server.write(GOOD + "[exports.new]\nsize = '1M'\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(told("the configuration was reloaded: export new added"), 30)
        server.write("[exports.disk")
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(told("the configuration was not reloaded: "), 30)
        assert set(server.exports()) == {"kept", "disk", "new"}


def test_snapshots_by_the_clock_are_said_to_be_others_than_they_were(tmp_path: Path) -> None:
    with configured(tmp_path) as server:
        server.write(GOOD + 'snapshots = "1h"\n')
        assert server.command_line("reload").stdout == "exports.disk.snapshots changed\n"
        server.write(GOOD + 'snapshots = "1h"\nsnapshots_keep = 3\niops = 9\n')
        changed = server.command_line("reload").stdout.splitlines()
        assert changed == ["export disk changed (iops)", "exports.disk.snapshots_keep changed"]
        assert server.command_line("reload").stdout == "nothing is declared otherwise than before\n"


def test_bounds_of_an_export_are_read_again(tmp_path: Path) -> None:
    """They hold at once, for who is attached; a declaration that says less takes them away."""
    with configured(tmp_path) as server, server.client() as client:
        client.write(0, b"x" * 8192)
        server.write(GOOD + 'quota = "8K"\niops = 1000\n')
        assert server.command_line("reload").stdout == "export disk changed (quota, iops)\n"
        with pytest.raises(RequestFailed, match=f"{errno.ENOSPC}"):
            client.write(8192, b"x" * 4096)
        (told,) = [export for export in server.stat()["exports"] if export["name"] == "disk"]
        assert (told["bounds"]["quota_bytes"], told["bounds"]["iops"]) == (8192, 1000)
        server.write(GOOD)
        assert server.command_line("reload").stdout == "export disk changed (quota, iops)\n"
        client.write(8192, b"x" * 4096)

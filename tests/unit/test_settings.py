"""One precedence, and errors that name file, line, key, value and what is allowed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from nbdzram import values
from nbdzram.bounds import UNBOUND, Bounds
from nbdzram.config import (
    Dedup,
    Durability,
    Limits,
    PoolConfig,
    ServerConfig,
    TcpAddress,
    TlsConfig,
    TlsMode,
    Trigger,
    UnixAddress,
    VsockAddress,
)
from nbdzram.errors import ConfigError
from nbdzram.server import reload
from nbdzram.settings import (
    KEYS,
    MAX_FILE_BYTES,
    Given,
    export_layer,
    export_layers,
    load,
    pool_layers,
    read_toml,
    require_files,
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_nothing_said_means_the_defaults() -> None:
    assert load(None, {}, {}) == ServerConfig()


def test_a_file_says_everything(tmp_path: Path) -> None:
    file = write(
        tmp_path / "nbdzram.toml",
        """
        listen = ["[::1]:10810", "unix:/run/nbd.sock,mode=0660,owner=root:kvm", "vsock:7"]
        metrics = "off"
        state_dir = "/var/lib/nbdzram"
        list_exports = false
        [limits]
        connections = 16
        payload_bytes = "32M"
        [maintenance]
        fold = "auto"
        compact = "10m"
        [pools.fast]
        [pools.default]
        mem_limit = "1G"
        dedup = "inline"
        [exports.disk]
        size = "10G"
        pool = "fast"
        [exports."second disk"]
        size = 512
        read_only = true
        allow_addresses = ["10.0.0.0/8", "::1"]
        """,
    )
    config = load(file, {}, {})
    assert config.tcp == (TcpAddress(host="::1", port=10810),)
    assert config.unix == (UnixAddress(path=Path("/run/nbd.sock"), mode=0o660, owner="root:kvm"),)
    assert config.vsock == (VsockAddress(port=7),)
    assert config.metrics is None
    assert (config.limits.connections, config.limits.payload_bytes) == (16, 32 << 20)
    assert config.maintenance.fold is Trigger.AUTO
    assert (config.maintenance.compact, config.maintenance.compact_interval_seconds) == (Trigger.INTERVAL, 600)
    assert {pool.name: (pool.mem_limit, pool.dedup) for pool in config.pools} == {
        "fast": (0, Dedup.FOLD),
        "default": (1 << 30, Dedup.INLINE),
    }
    disk, second = config.exports
    assert (disk.name, disk.size_bytes, disk.pool) == ("disk", 10 << 30, "fast")
    assert (second.name, second.read_only) == ("second disk", True)
    assert second.allow_addresses == ("10.0.0.0/8", "::1/128")


def test_flag_beats_environment_beats_conf_d_beats_file(tmp_path: Path) -> None:
    file = write(tmp_path / "nbdzram.toml", 'metrics = ":1"\nstate_dir = "/a"\ncontrol = "/a"\nlog_level = "debug"\n')
    write(tmp_path / "conf.d" / "10.toml", 'metrics = ":2"\nstate_dir = "/b"\ncontrol = "/b"\n')
    environment = {"NBDZRAM_METRICS": ":3", "NBDZRAM_STATE_DIR": "/c", "NBDZRAM_CONFIG": str(file)}
    config = load(None, environment, {("metrics",): Given("127.0.0.1:4", "--metrics")})
    assert config.metrics == TcpAddress(port=4)
    assert config.state_dir == Path("/c")
    assert config.control == Path("/b")
    assert config.log_level == "debug"


def test_the_files_of_conf_d_are_read_in_the_order_of_their_names_and_only_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order the file system keeps: an access rule may stand in the last one."""
    write(tmp_path / "nbdzram.toml", 'log_level = "error"\n')
    for number in (30, 10, 20):
        write(tmp_path / "conf.d" / f"{number}.toml", f'metrics = ":{number}"\n')
    write(tmp_path / "conf.d" / "40.toml.dpkg-old", 'metrics = ":40"\n')
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(real(self), reverse=True)))
    config = load(tmp_path / "nbdzram.toml", {}, {})
    assert config.metrics is not None
    assert config.metrics.port == 30


@pytest.mark.parametrize(
    ("key", "value", "clue"),
    [
        ("description", '"' + "d" * 4097 + '"', "4097 bytes"),
        ("description", '"a\\u0000b"', "without NUL"),
        ("allow_certificates", '[""]', "is not a certificate's name"),
        ("allow_addresses", '["10.0.0.1/8"]', "host bits"),
        ("allow_addresses", '["fe80::1%eth0"]', "names an interface behind %"),
    ],
)
def test_values_of_an_export_are_held_to_what_control_is_held_to(
    tmp_path: Path, key: str, value: str, clue: str
) -> None:
    write(tmp_path / "n.toml", f'[exports.disk]\nsize = "1M"\n{key} = {value}\n')
    with pytest.raises(ConfigError, match=clue):
        load(tmp_path / "n.toml", {}, {})


def test_a_limit_beyond_what_can_be_counted_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "n.toml", f"[pools.default]\nmem_limit = {1 << 62}\n")
    assert load(tmp_path / "n.toml", {}, {}).pools[0].mem_limit == 1 << 62
    write(tmp_path / "n.toml", f"[pools.default]\nmem_limit = {10**30}\n")
    with pytest.raises(ConfigError, match="mem_limit"):
        load(tmp_path / "n.toml", {}, {})


def test_every_time_may_have_a_letter_behind_it(tmp_path: Path) -> None:
    given = '[limits]\nhandshake_seconds = "1.5m"\n[maintenance]\nrecompress_age_seconds = "7d"\nscrub = "2h"\n'
    config = load(write(tmp_path / "n.toml", given), {"NBDZRAM_LIMITS_DRAIN_SECONDS": "1m"}, {})
    assert (config.limits.handshake_seconds, config.limits.drain_seconds) == (90, 60)
    assert (config.maintenance.recompress_age_seconds, config.maintenance.scrub_seconds) == (7 * 86400, 7200)


def test_a_unix_socket_admits_its_owner_alone_unless_told_otherwise() -> None:
    assert values.unix_address("/run/x").mode == 0o600
    assert values.unix_address("/run/x,mode=0660").mode == 0o660


def test_exports_of_several_sources_are_laid_together(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", '[exports.disk]\nsize = "1G"\ndescription = "kept"\n')
    config = load(file, {"NBDZRAM_EXPORTS": "swap=2G,ro"}, export_layer("disk=4G", "-e"))
    assert [(e.name, e.size_bytes, e.read_only, e.description) for e in config.exports] == [
        ("disk", 4 << 30, False, "kept"),
        ("swap", 2 << 30, True, ""),
    ]


def test_variables_that_kubernetes_sets_for_a_service_of_our_name_are_left_alone() -> None:
    environment = {"NBDZRAM_PORT": "tcp://10.0.0.1:10809", "NBDZRAM_SERVICE_HOST": "10.0.0.1"}
    assert load(None, environment, {}) == ServerConfig()


@pytest.mark.parametrize(
    ("text", "clue"),
    [
        ("metrics = 5", "line 1: metrics: 5 is not text"),
        ('\n\nmets = "off"', "line 3: unknown key 'mets'; did you mean 'metrics'"),
        ("limts = 1", "line 1: unknown key 'limts'; did you mean 'limits'"),
        ('\n\nmetrcs = "off"', "line 3: unknown key 'metrcs'; did you mean 'metrics'"),
        ("[limits]\n# a comment\nconnections = 0", "line 3: limits.connections: 0 is not a whole number from 1 to"),
        ("[limits]\nconnections = true", "limits.connections: True is not a whole number"),
        ("limits.connections = 'x'", "line 1: limits.connections: 'x' is not"),
        ("[limits]\nconections = 1", "line 2: unknown key 'limits.conections'; did you mean 'connections'"),
        ('[exports.disk]\nsize = "1X"', "line 2: exports.disk.size: '1X' has the unknown suffix 'X'"),
        ('[exports.disk]\nsize = "1000"', "multiple of 512"),
        ("[exports.disk]\nread_only = true", "line 2: export 'disk' has no size"),
        ("[exports.disk]", "line 1: export 'disk' has no size"),
        (
            'control = "/run/a"\nlisten = ["unix:/run/a"]',
            "line 2: listen: unix:/run/a is where the control socket is; name",
        ),
        (
            'listen = ["127.0.0.1:9809"]',
            "line 1: listen: 127.0.0.1:9809 is where metrics are served; name another place",
        ),
        (
            f"[exports.{'x' * 234}]\nsize = 512\nsnapshots = 9",
            "line 3: snapshots: snapshots of 'xxxxxxxxxxxxxxxxxxxx...'",
        ),
        ('exports.disk = {size = "1X"}', "line 1: exports.disk.size"),
        ('[[exports]]\nname = "disk"', "'exports' holds tables: write \\[exports.NAME\\]"),
        ('[exports.d]\nsize = "1G"\npool = "p"', "line 3: export 'd' asks for the pool 'p'; the pools are default"),
        ('[exports.d]\nsize = "1G"\npool = "p"', "the pools are default; add \\[pools.p\\] for one more"),
        ('[pools."../x"]\nmem_limit = "1G"', "'../x' is not a pool's name"),
        ('[pools."../x"]', "line 1: '../x' is not a pool's name"),
        ('[exports.""]', "line 1: '' is not an export's name"),
        ('[pools.default]\nmem_limit = "200%"', "a percentage lies above 0"),
        ('[pools.default]\ndedup = "always"', "'always' is not allowed; it is one of fold, inline"),
        ('[maintenance]\nfold = "sometimes"', "it is off, auto, or an interval"),
        ("[maintenance]\nfold = [1]", "it is off, auto, or an interval"),
        ('[maintenance]\nscrub = "0"', "'0' is not allowed; it is off, or an interval"),
        ('[maintenance]\nrecompress_age_seconds = "20y"', "a number of seconds from 0 to 1000000000, or a time"),
        ('[maintenance]\nrecompress_age_seconds = "0.5"', "'0.5' is no whole number of seconds"),
        ('[limits]\ndrain_seconds = "2h"', "'2h' is not a number of seconds from 0 to 3600, or a time such as 10m"),
        ("[limits]\ndrain_seconds = nan", "nan is not a number of seconds"),
        ("metrics = []", "is not text"),
        ('[tls]\nmode = "require"', "line 2: tls.mode = require needs tls.certificate"),
        ('listen = ["unix:/x,mod=1"]', "'mod=1' is not allowed behind a socket's path"),
        ('listen = ["unix:/x,owner=a\\u0000"]', "is not allowed behind a socket's path"),
        ('listen = ["1.2.3.4:99999"]', "a port is at most 65535"),
        ('listen = ["localhost\\u0000:1"]', "is not an address such as"),
        ('metrics = "[::1\\u0000]:1"', "is not an address such as"),
        ("listen = 3", "3 is not a list"),
        ('[expots.d]\nsize = "1G"', "line 2: unknown key 'expots.d.size'; did you mean 'exports'"),
        ('[exports."a\\u001b"]\nsize = "1G"', "255 bytes of printable UTF-8"),
        ("x = \ny = 1", "is not valid TOML: Invalid value \\(at line 1, column 5\\)"),
        ("[limits]\nconnections = " + "9" * 5000, "is not valid TOML: Exceeds the limit"),
        ("x = " + "[" * 5000, "nested without end; a key here has 3 names"),
        (".".join(["x"] * 5000) + " = 1", "nested without end|unknown key 'x.x.x.x'"),
        ("exports.a.b.c.d = 1", "unknown key 'exports.a.b.c'"),
    ],
)
def test_a_wrong_key_is_named_with_file_line_value_and_what_is_allowed(tmp_path: Path, text: str, clue: str) -> None:
    file = write(tmp_path / "nbdzram.toml", text)
    with pytest.raises(ConfigError, match=clue) as caught:
        load(file, {}, {})
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 2


def test_two_places_that_may_have_any_port_are_two(tmp_path: Path) -> None:
    file = write(tmp_path / "nbdzram.toml", 'listen = ["127.0.0.1:0"]\nmetrics = "127.0.0.1:0"\n')
    config = load(file, {}, {})
    assert (config.metrics, [config.metrics]) == (config.tcp[0], list(config.tcp))


def test_an_error_from_the_environment_or_a_flag_names_it() -> None:
    with pytest.raises(ConfigError, match=r"^NBDZRAM_MEM_LIMIT: pools.default.mem_limit: 'lots' is not a size"):
        load(None, {"NBDZRAM_MEM_LIMIT": "lots"}, {})
    with pytest.raises(ConfigError, match=r"^--metrics: metrics: "):
        load(None, {}, {("metrics",): Given("a b", "--metrics")})


@pytest.mark.parametrize("text", ["disk", "=1G", "disk=", "disk=1G,rw"])
def test_a_wrong_export_flag_says_how_it_is_written(text: str) -> None:
    with pytest.raises(ConfigError, match=r"NAME=SIZE|'ro', 'private', 'pool=...'"):
        export_layer(text, "-e")


def test_the_path_of_a_socket_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve -U nbd.sock` told clients, `attach`, and who took over later, a path that led to it from one directory."""
    monkeypatch.chdir(tmp_path)
    assert load(None, {"NBDZRAM_LISTEN": "unix:nbd.sock,mode=0660"}, {}).unix[0].path == tmp_path / "nbd.sock"
    deep = tmp_path / ("d" * 107)
    deep.mkdir()
    monkeypatch.chdir(deep)
    with pytest.raises(ConfigError, match="is longer than the system's 107 bytes"):
        load(None, {"NBDZRAM_LISTEN": "unix:nbd.sock"}, {})
    with pytest.raises(ConfigError, match=r"control: the socket path .* is longer than the system's 107 bytes"):
        load(None, {"NBDZRAM_CONTROL": f"/{'c' * 107}"}, {})  # no start would say it first: a restart looks here before


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*gone.toml: No such file"):
        load(tmp_path / "gone.toml", {}, {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load(tmp_path / "binary", {}, {})


def test_what_is_longer_than_its_size_says_is_refused_before_it_is_all_read(tmp_path: Path) -> None:
    """A device without end, or a pipe: whoever writes it here is left with what was not read."""
    named = tmp_path / "c.toml"
    os.mkfifo(named)

    def write() -> None:
        with named.open("wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
            for _ in range(64):
                pipe.write(bytes(MAX_FILE_BYTES // 8))
                written.append(1)

    written: list[int] = []
    writing = threading.Thread(target=write)
    writing.start()
    with pytest.raises(ConfigError, match="is larger than"):
        read_toml(named)
    writing.join()
    assert len(written) < 32


def test_what_can_be_read_once_is_not_read_again(tmp_path: Path) -> None:
    """A pipe that nobody writes any more kept a reload waiting, and the server from its end."""
    named = tmp_path / "c.toml"
    require_files(None, {})
    require_files(named, {})  # that it is not there is said by whoever reads it
    named.touch()
    require_files(named, {})
    (tmp_path / "conf.d").mkdir()
    os.mkfifo(tmp_path / "conf.d" / "more.toml")
    for file, environment in ((None, {"NBDZRAM_CONFIG": str(named)}), (named, {})):
        with pytest.raises(ConfigError, match=r"more\.toml is no regular file, so it is not read again"):
            require_files(file, environment)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "nbdzram.toml").write_text('metrics = "off"\n', encoding="utf-8-sig")
    assert load(tmp_path / "nbdzram.toml", {}, {}).metrics is None


def test_a_conf_d_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "conf.d").symlink_to("conf.d")  # an error to root too, whom modes do not stop
    with pytest.raises(ConfigError, match=r"cannot read the directory .*conf.d: Too many levels of symbolic links"):
        load(write(tmp_path / "nbdzram.toml", ""), {}, {})


def test_every_key_has_words_and_no_two_share_a_variable() -> None:
    variables = [key.variable for key in KEYS if key.variable is not None]
    assert len(variables) == len(set(variables))
    assert all(key.says for key in KEYS)


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("k=v=1G", "k=v", {}),
        ("k=v=w=1G,ro", "k=v=w", {"read_only": True}),
        ("k=v=1G,ro,pool=fast", "k=v", {"read_only": True, "pool": "fast"}),
        ("a,b=1G", "a,b", {}),
        ("a,b=c=1G,pool=fast", "a,b=c", {"pool": "fast"}),
        ("disk=1G,pool=fast", "disk", {"pool": "fast"}),
    ],
)
def test_a_name_with_an_equals_sign_is_declared_by_the_last_one(text: str, name: str, options: dict[str, Any]) -> None:
    layer = export_layer(text, "-e")
    assert {path[1] for path in layer} == {name}
    assert {path[2]: given.value for path, given in layer.items()} == {"size": "1G", **options}


def test_an_unknown_option_behind_a_size_is_never_taken_for_a_name() -> None:
    with pytest.raises(ConfigError, match="'poool=4096' is not allowed behind a size"):
        export_layer("disk=1G,poool=4096", "-e")


def test_the_name_of_a_table_without_keys_is_looked_at_too(tmp_path: Path) -> None:
    """It becomes a file's name in the state directory."""
    file = tmp_path / "nbdzram.toml"
    file.write_text('[pools."a/b"]\n')
    with pytest.raises(ConfigError, match=r"line 1: 'a/b' is not a pool's name"):
        load(file, {}, {})


def test_flags_alone_say_pools_and_what_exports_are() -> None:
    layer = pool_layers(["fast=4G,inline", "plain", "trusted,tell-sharing,unverified"], "--pool")
    layer |= export_layers(
        ["a=1G,private,pool=fast", "b=@dir/x=1.qcow2,ro,size=2G,snapshots=2h,snapshots_keep=3", "c=@y.raw"], "-e"
    )
    config = load(None, {}, layer)
    pools = {pool.name: pool for pool in config.pools}
    assert (pools["fast"].mem_limit, pools["fast"].dedup) == (4 << 30, "inline")
    assert pools["plain"] == PoolConfig(name="plain")
    assert (pools["trusted"].tell_sharing, pools["trusted"].verify) == (True, False)
    first, second, third = config.exports
    assert (first.private, first.pool) == (True, "fast")
    assert (second.image, second.read_only, second.size_bytes) == (Path("dir/x=1.qcow2"), True, 2 << 30)
    assert (second.snapshots_seconds, second.snapshots_keep, first.snapshots_seconds) == (7200, 3, 0)
    assert (third.image, third.size_bytes) == (Path("y.raw"), 0)
    assert load(None, {"NBDZRAM_POOLS": "fast=4G,inline plain"}, {}).pools[:2] == config.pools[:2]


def test_what_bounds_an_export_is_said_in_a_file_and_behind_a_size(tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text(
        '[exports.disk]\nsize = "1G"\nquota = "512M"\niops = 500\niops_burst = 900\nbandwidth = "50M"\n'
        'bandwidth_burst = 209715200\n[exports.free]\nsize = "1G"\nquota = "off"\niops = 0\n'
    )
    wanted = Bounds(
        quota_bytes=512 << 20, iops=500, iops_burst=900, bandwidth_bytes=50 << 20, bandwidth_burst_bytes=200 << 20
    )
    assert [export.bounds for export in load(file, {}, {}).exports] == [wanted, UNBOUND]
    flag = "disk=1G,quota=512M,iops=500,iops_burst=900,bandwidth=50M,bandwidth_burst=200M"
    assert load(None, {}, export_layers([flag], "-e")).exports[0].bounds == wanted


@pytest.mark.parametrize(
    ("pools", "exports", "complaint"),
    [
        (["fast", "fast=1G"], [], "--pool: pool 'fast' is given twice"),
        (["fast=1G,big"], [], "--pool: 'big' is not allowed behind a pool; 'inline', 'unverified', 'tell-sharing' are"),
        (["fast="], [], "--pool: 'fast=' is not NAME or NAME=LIMIT"),
        (["a/b"], [], "--pool: 'a/b' is not a pool's name"),
        (
            [],
            ["a=1G,size=2G"],
            "-e: 'size=2G' is not allowed behind a size; 'ro', 'private', 'pool=...',",
        ),
        ([], ["a=@x", "a=1G"], "-e: export 'a' is given twice"),
        ([], ["a=1G,snapshots=auto"], "exports.a.snapshots: 'auto' is not allowed; it is off, or an interval"),
        ([], ["a=1G,snapshots=1h,snapshots_keep=0"], "exports.a.snapshots_keep: 0 is not a whole number"),
        ([], ["a=1G,quota=100"], "exports.a.quota: '100' is neither off nor a size from 4096 bytes to 2P"),
        ([], ["a=1G,iops=many"], "exports.a.iops: 'many' is not a whole number from 0 to 1000000000"),
        ([], ["a=1G,bandwidth=2T"], "exports.a.bandwidth: '2T' is neither off nor a size from 4096 bytes to 1T"),
        ([], ["a=1G,pool=fast"], "asks for the pool 'fast'; the pools are default; add --pool fast for one more"),
    ],
)
def test_a_wrong_pool_or_export_on_the_command_line_is_told(
    pools: list[str], exports: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(None, {}, pool_layers(pools, "--pool") | export_layers(exports, "-e"))
    assert complaint in str(refused.value)


def test_what_needs_a_restart_is_named_by_its_key() -> None:
    """`tcp` stands in no file; `listen` does."""
    before, after = ServerConfig(), ServerConfig(tcp=(), unix=(), metrics=None)
    assert list(reload.needs_restart(before, after)) == ["listen", "metrics"]
    fields = {field.name for field in dataclasses.fields(ServerConfig)} - reload.APPLIED
    assert {reload.KEYS.get(name, name) for name in fields} <= {key.path[0] for key in KEYS}


def test_what_needs_a_restart_is_not_what_a_server_runs_by() -> None:
    """Who takes over asks it where its disks lie; and it is what goes on where a takeover fails."""
    old = ServerConfig(state_dir=Path("/old"), limits=Limits(total_bytes=7 << 20))
    new = ServerConfig(
        state_dir=Path("/new"),
        threads=3,
        list_exports=False,
        limits=Limits(total_bytes=8 << 20, connections=5),
        tls=TlsConfig(mode=TlsMode.ON, certificate=Path("/c"), key=Path("/k")),
        pools=(
            PoolConfig(durability=Durability.FLUSH, verify=False),
            PoolConfig(name="b", durability=Durability.FLUSH),
        ),
    )
    told = ["threads", "state_dir", "limits.total_bytes", "tls.mode"]
    told += ["pools.default.durability", "pools.b.durability"]
    assert list(reload.needs_restart(old, new)) == told
    goes_on = reload.without_restart(old, new)
    assert goes_on == dataclasses.replace(
        old,
        list_exports=False,
        limits=Limits(total_bytes=7 << 20, connections=5),
        pools=(PoolConfig(verify=False), PoolConfig(name="b")),
    )
    assert list(reload.needs_restart(goes_on, new)) == told
    both = dataclasses.replace(new, tls=TlsConfig(mode=TlsMode.REQUIRE, psk_file=Path("/p")))
    assert reload.without_restart(new, both).tls == TlsConfig(mode=TlsMode.ON, psk_file=Path("/p"))
    assert reload.without_restart(new, old).tls == new.tls

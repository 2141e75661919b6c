"""TLS contexts from files, renewed when the files change."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from nbdzram.config import TlsConfig, TlsMode
from nbdzram.errors import ConfigError, PassPhraseWanted, TlsError, TlsUnavailable
from nbdzram.server.certificate import validity
from nbdzram.sessions.tls_context import TlsContext

log = logging.getLogger("nbdzram.server")

PSK_LEAST_BYTES = 16
"""128 bits: a shorter key is guessed offline from one recorded handshake (section 9.1 of RFC 4279)."""

PSK_MOST_BYTES = 256
"""OpenSSL 1.1.1 takes no longer ones (its PSK_MAX_PSK_LEN)."""

OTHERS = stat.S_IROTH | stat.S_IWOTH
"""Who reads a file of keys is any of its clients, or the server itself where it is the certificate's, and who writes it
exchanges them. Its group may be the server's."""

SETTLED_SECONDS = 1.0
"""A file that changed less long ago may change once more within one tick of the clock that stamps it."""

_PLAINER = {
    "key values mismatch": "the key is not that of the certificate",
    "no certificate assigned": "the key is of another kind than that of the certificate",
    "no start line": "not PEM, or the two exchanged",
    "unsupported": "the key is none that OpenSSL can read",
}
"""OpenSSL's words that say less than is known."""

_Stamp = tuple[tuple[int, int, int, int], ...]


class TlsFiles:
    """The server's certificate and key, the authority that clients' certificates must come from, pre-shared keys.

    Raises ConfigError when made with files that cannot be used; later a bad renewal keeps the old context, and is
    tried and told once, however many connect meanwhile.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._tried: _Stamp = ()  # the files' stamp at the last try that counts
        self._complaint = ""  # why the files as they are now cannot be used, as it was told
        self._context: TlsContext | None = None
        self.expires_at: float | None = None
        """When the certificate in use ends, in seconds since the epoch; None without one."""
        if config.mode is not TlsMode.OFF:
            self._tried = self._read_stamp()
            self._load()

    def context(self) -> TlsContext:
        """For one connection. Files that were replaced on disk count from the next connection on."""
        assert self._context is not None
        self.renew()
        return self._context

    def renew(self, *, unchanged_too: bool = False) -> None:
        """Read the files again if they changed, or if asked to; what cannot be used changes nothing."""
        if self._context is None:
            return
        if unchanged_too:
            self._tried, self._complaint = (), ""
        stamp: _Stamp = ()
        settled = False
        try:
            stamp = self._read_stamp()
            if stamp == self._tried:
                return
            self._tried, settled = (), _settled(stamp)
            self._load()
        except ConfigError as error:
            if settled and not isinstance(error.__context__, OSError):
                self._tried = stamp  # else the system refuses to read them, and may not the next time
            if str(error) != self._complaint:
                log.warning("TLS files changed but cannot be used, keeping the old ones: %s", error)
            self._complaint = str(error)
        else:
            self._tried, self._complaint = stamp, ""
            log.info("TLS files reloaded: %s", ", ".join(map(str, _paths(self._config))))

    @property
    def usable(self) -> bool:
        """Whether the files on disk are those in use, as far as the last look tells."""
        return not self._complaint

    def _load(self) -> None:
        """All of it is looked at before any of it counts. Raises ConfigError."""
        context, doubtful, expires_at = make_context(self._config), list(doubts(self._config)), None
        if self._config.certificate is not None:
            with contextlib.suppress(OSError, ValueError):  # OpenSSL could read it: a form that ours does not know
                expires_at = validity(self._config.certificate)[1].timestamp()
        self._context, self.expires_at = context, expires_at
        for sentence in doubtful:
            log.warning("%s", sentence)

    def _read_stamp(self) -> _Stamp:
        return tuple(
            (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size)
            for status in map(_stat, _paths(self._config))
        )


def _paths(config: TlsConfig) -> list[Path]:
    return [path for path in (config.certificate, config.key, config.client_ca, config.psk_file) if path is not None]


def _settled(stamp: _Stamp) -> bool:
    age_seconds = time.time() - max(changed for _, changed, _, _ in stamp) / 1e9
    return not 0 <= age_seconds < SETTLED_SECONDS


def check_files(config: TlsConfig) -> Iterator[str]:
    """Use them as a server would, and say what it would warn of. Raises ConfigError."""
    for path in _paths(config):
        _stat(path)
    make_context(config)
    yield from doubts(config)


def doubts(config: TlsConfig) -> Iterator[str]:
    """What is to be warned of where files can be used."""
    yield from exposed(config)
    yield from out_of_date(config)


def exposed(config: TlsConfig) -> Iterator[str]:
    """A private key that is no secret. A server starts with it all the same: the files of a pod's secret are so."""
    if config.key is not None and (mode := _stat(config.key).st_mode) & OTHERS:
        yield _exposed(config.key, mode)


def out_of_date(config: TlsConfig) -> Iterator[str]:
    """What is wrong with the dates of files that can be used otherwise; the other side refuses each handshake."""
    now = datetime.now(UTC)
    for path, refuses in ((config.certificate, "clients refuse it"), (config.client_ca, "no client is admitted")):
        if path is None:
            continue
        try:
            first, last = validity(path)
        except (OSError, ValueError):  # a form that OpenSSL could read, and ours does not know
            continue
        if now > last:
            yield f"TLS file {path} expired on {last:%Y-%m-%d}, {refuses}; renew it, a running server takes it up"
        elif now < first:
            yield f"TLS file {path} is valid from {first:%Y-%m-%d} on, {refuses}; check this machine's clock"


def make_context(config: TlsConfig) -> TlsContext:
    """TLS 1.2 or newer (section "TLS versions"). Raises ConfigError."""
    if config.psk_file is None and (config.certificate is None or config.key is None):
        raise ConfigError(f"TLS mode {config.mode} needs a certificate and a key, or a file of pre-shared keys")
    try:
        context = TlsContext()
    except TlsUnavailable as error:
        raise ConfigError(str(error)) from None
    except TlsError as error:
        raise ConfigError(f"TLS: OpenSSL cannot be used as this system configures it: {error}") from None
    if config.certificate is not None and config.key is not None:
        _load_certificate(context, config.certificate, config.key)
    if config.client_ca is not None:
        _require_certificates(context, config.client_ca)
    if config.psk_file is not None:
        context.use_keys(read_keys(config.psk_file))
    return context


def _load_certificate(context: TlsContext, certificate: Path, key: Path) -> None:
    try:
        for path in (certificate, key):
            path.open("rb").close()  # the system's words for what it does not let us read are better than OpenSSL's
        context.use_certificate(os.fsencode(certificate), os.fsencode(key))
    except PassPhraseWanted:
        raise ConfigError(
            f"TLS key {key} is encrypted, and a server has nobody to ask for its pass phrase; "
            f"store it without one, for this user's eyes only: openssl pkey -in {key} -out NEW_KEY"
        ) from None
    except (OSError, TlsError) as error:
        raise ConfigError(
            f"TLS certificate {certificate} with key {key} cannot be used: {_reason(error)}; "
            "name a certificate chain and the private key that it was made for, both PEM"
        ) from None


def _require_certificates(context: TlsContext, authority: Path) -> None:
    try:
        authority.open("rb").close()
        context.require_certificates(os.fsencode(authority))
    except (OSError, TlsError) as error:
        raise ConfigError(
            f"TLS client authority {authority} cannot be used: {_reason(error)}; "
            "name the certificate of the authority that signs clients, PEM"
        ) from None


def read_keys(file: Path) -> dict[str, bytes]:
    """Identity -> key, from lines NAME:HEXKEY as psktool writes them; `#` begins a comment. Raises ConfigError.

    Never a key too few: a file without one, or with two for a name, is as wrong as a line that is none.
    """
    try:
        mode = file.stat().st_mode
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # some editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"TLS keys {file} cannot be read: {error}; name a text file with lines NAME:HEXKEY") from None
    if mode & OTHERS:
        raise ConfigError(_exposed(file, mode))
    found: dict[str, tuple[int, bytes]] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        name, _, digits = line.rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not name or "\0" in name or not PSK_LEAST_BYTES <= len(key) <= PSK_MOST_BYTES:
            raise ConfigError(
                f"TLS keys {file} line {number}: not NAME:HEXKEY with a key of {PSK_LEAST_BYTES} to {PSK_MOST_BYTES}"
                f" bytes, which are twice as many digits; `psktool -u NAME -p {file}` adds one"
            )
        if name in found:
            raise ConfigError(
                f"TLS keys {file} line {number}: '{name}' has a key in line {found[name][0]} already; "
                "a name has one key: remove the line that clients do not use"
            )
        found[name] = number, key
    if not found:
        raise ConfigError(
            f"TLS keys {file} hold none, and need one at least: no client could attach; "
            f"`psktool -u NAME -p {file}` adds one"
        )
    return {name: key for name, (_, key) in found.items()}


def _exposed(file: Path, mode: int) -> str:
    return f"TLS key file {file} has mode {stat.S_IMODE(mode):04o}: others may read or write it; chmod o= {file}"


def _reason(error: OSError | TlsError) -> str:
    """OpenSSL's words where they say something, ours where they do not."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return _PLAINER.get(str(error), str(error))


def _stat(path: Path) -> os.stat_result:
    """Of a file, which is read to its end at once: a pipe or a terminal may let whoever reads it wait for ever."""
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(
            f"TLS file {path} cannot be read: {error.strerror}; name a PEM file that this user may read"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"TLS file {path} is no regular file; put what is to be read into one, and name that")
    return found

"""TLS contexts from files, renewed when the files change."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import ssl
import time
from pathlib import Path
from typing import Any

from nbdzram.config import TlsConfig, TlsMode
from nbdzram.errors import ConfigError
from nbdzram.server.certificate import validity

log = logging.getLogger("nbdzram.server")

PSK_LEAST_BYTES = 16
"""128 bits: a shorter key is guessed offline from one recorded handshake (section 9.1 of RFC 4279)."""

SETTLED_SECONDS = 1.0
"""A file that changed less long ago may change once more within one tick of the clock that stamps it."""

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
        self._context: ssl.SSLContext | None = None
        self.expires_at: float | None = None
        """When the certificate in use ends, in seconds since the epoch; None without one."""
        if config.mode is not TlsMode.OFF:
            self._tried = self._read_stamp()
            self._load()

    def context(self) -> ssl.SSLContext:
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
        try:
            stamp = self._read_stamp()
            if stamp == self._tried:
                return
            if _settled(stamp):
                self._tried = stamp
            self._load()
        except ConfigError as error:
            if str(error) != self._complaint:
                log.warning("TLS files changed but cannot be used, keeping the old ones: %s", error)
            self._complaint = str(error)
        else:
            self._tried, self._complaint = stamp, ""
            log.info("TLS files reloaded: %s", ", ".join(map(str, self._paths())))

    @property
    def usable(self) -> bool:
        """Whether the files on disk are those in use, as far as the last look tells."""
        return not self._complaint

    def _load(self) -> None:
        self._context = make_context(self._config)
        self.expires_at = None
        if self._config.certificate is not None:
            with contextlib.suppress(OSError, ValueError):  # OpenSSL could read it: a form that ours does not know
                self.expires_at = validity(self._config.certificate)[1].timestamp()

    def _paths(self) -> list[Path]:
        config = self._config
        return [
            path for path in (config.certificate, config.key, config.client_ca, config.psk_file) if path is not None
        ]

    def _read_stamp(self) -> _Stamp:
        return tuple(
            (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size)
            for status in map(_stat, self._paths())
        )


def _settled(stamp: _Stamp) -> bool:
    age_seconds = time.time() - max(changed for _, changed, _, _ in stamp) / 1e9
    return not 0 <= age_seconds < SETTLED_SECONDS


def make_context(config: TlsConfig) -> ssl.SSLContext:
    """TLS 1.2 or newer (section "TLS versions"). Raises ConfigError."""
    if config.psk_file is None and (config.certificate is None or config.key is None):
        raise ConfigError(f"TLS mode {config.mode} needs a certificate and a key, or a file of pre-shared keys")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # a client could make us compute handshakes for ever
    context.num_tickets = 0  # no NBD client resumes a session; a ticket would only be one more thing to send
    if config.certificate is not None and config.key is not None:
        _load_certificate(context, config.certificate, config.key)
    if config.client_ca is not None:
        _require_certificates(context, config.client_ca)
    if config.psk_file is not None:
        _load_keys(context, config.psk_file)
    return context


class _PassPhraseWantedError(Exception):
    """OpenSSL would ask somebody."""


def _load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    def nobody() -> str:
        raise _PassPhraseWantedError

    try:
        context.load_cert_chain(certificate, key, password=nobody)  # without, OpenSSL asks the terminal, and waits
    except _PassPhraseWantedError:
        raise ConfigError(
            f"TLS key {key} is encrypted, and a server has nobody to ask for its pass phrase; "
            f"store it without one, for this user's eyes only: openssl pkey -in {key} -out NEW_KEY"
        ) from None
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"TLS certificate {certificate} with key {key} cannot be used: {_reason(error)}; "
            "name a certificate chain and the private key that it was made for, both PEM"
        ) from None


def _require_certificates(context: ssl.SSLContext, authority: Path) -> None:
    try:
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"TLS client authority {authority} cannot be used: {_reason(error)}; "
            "name the certificate of the authority that signs clients, PEM"
        ) from None
    context.verify_mode = ssl.CERT_REQUIRED


def _load_keys(context: ssl.SSLContext, file: Path) -> None:
    """Pre-shared keys, where Python's ssl has them."""
    install = getattr(context, "set_psk_server_callback", None)
    if install is None:
        raise ConfigError(
            f"TLS keys in {file}: pre-shared keys need Python 3.13 or newer, this is {platform.python_version()};"
            " use a certificate and a key, or a newer Python"
        )
    keys = read_keys(file)
    # Unknown identities get an empty key, which OpenSSL refuses.
    install(lambda identity: keys.get(identity or "", b""))
    context.set_ciphers("DEFAULT:ECDHE+PSK:DHE+PSK:PSK")  # what TLS 1.2 needs; TLS 1.3 has its own


def read_keys(file: Path) -> dict[str, bytes]:
    """Identity -> key, from lines NAME:HEXKEY as psktool writes them; `#` begins a comment. Raises ConfigError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"TLS keys {file} cannot be read: {error}; name a text file with lines NAME:HEXKEY") from None
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not name or len(key) < PSK_LEAST_BYTES:
            raise ConfigError(
                f"TLS keys {file} line {number}: not NAME:HEXKEY with a key of at least {PSK_LEAST_BYTES} bytes"
            )
        keys[name] = key
    return keys


def certificate_names(tls: ssl.SSLObject) -> frozenset[str]:
    """Common name and DNS names of the peer's verified certificate; empty without one."""
    certificate: dict[str, Any] = tls.getpeercert() or {}
    names = {value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"}
    for relative in certificate.get("subject", ()):
        names.update(value for kind, value in relative if kind == "commonName")
    return frozenset(names)


def _reason(error: OSError) -> str:
    """OpenSSL's words where they say something, ours where they do not."""
    if not isinstance(error, ssl.SSLError):
        return error.strerror or str(error)
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not that of the certificate"
    return (error.reason or "not PEM, or the two exchanged").replace("_", " ").lower()


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ConfigError(
            f"TLS file {path} cannot be read: {error.strerror}; name a PEM file that this user may read"
        ) from None

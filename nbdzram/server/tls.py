"""TLS contexts from files, renewed when the files change."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import Any

from nbdzram.config import TlsConfig, TlsMode
from nbdzram.errors import ConfigError

log = logging.getLogger("nbdzram.server")

_Stamp = tuple[tuple[int, int], ...]


class TlsFiles:
    """The server's certificate and key, and the authority that clients' certificates must come from.

    Raises ConfigError when made with files that cannot be used; later a bad renewal keeps the old context.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._stamp: _Stamp = ()
        self._context: ssl.SSLContext | None = None
        if config.mode is not TlsMode.OFF:
            self._stamp = self._read_stamp()
            self._context = make_context(config)

    def context(self) -> ssl.SSLContext:
        """For one connection. Certificates that were replaced on disk count from the next connection on."""
        assert self._context is not None
        try:
            stamp = self._read_stamp()
            if stamp != self._stamp:
                self._context = make_context(self._config)
                self._stamp = stamp
                log.info("TLS certificates reloaded from %s", self._config.certificate)
        except (ConfigError, OSError) as error:
            log.warning("TLS certificates changed but cannot be used, keeping the old ones: %s", error)
        return self._context

    def _read_stamp(self) -> _Stamp:
        stamps = []
        for path in (
            self._config.certificate,
            self._config.key,
            self._config.client_ca,
            self._config.psk_file,
        ):
            if path is not None:
                status = _stat(path)
                stamps.append((status.st_mtime_ns, status.st_ino))
        return tuple(stamps)


def make_context(config: TlsConfig) -> ssl.SSLContext:
    """TLS 1.2 or newer (section "TLS versions"). Raises ConfigError."""
    if config.certificate is None or config.key is None:
        raise ConfigError(f"TLS mode {config.mode} needs a certificate and a key: give both, or mode off")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.certificate, config.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"TLS certificate {config.certificate} with key {config.key} cannot be used: {error}"
        ) from None
    if config.client_ca is not None:
        try:
            context.load_verify_locations(config.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"TLS client authority {config.client_ca} cannot be used: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def certificate_names(tls: ssl.SSLObject) -> frozenset[str]:
    """Common name and DNS names of the peer's verified certificate; empty without one."""
    certificate: dict[str, Any] = tls.getpeercert() or {}
    names = {value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"}
    for relative in certificate.get("subject", ()):
        names.update(value for kind, value in relative if kind == "commonName")
    return frozenset(names)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ConfigError(f"TLS file {path} cannot be read: {error.strerror}") from None

"""Certificates for a test, made by openssl: an authority, a server, clients, and a stranger's authority."""

from __future__ import annotations

import ssl
from pathlib import Path

from tests.support.programs import require_program, run

DAYS = "2"  # no test outlives its certificates


class Pki:
    """A directory with PEM files, named as GnuTLS, libnbd and QEMU look for them in a directory of a client."""

    def __init__(self, directory: Path, *, authority: str = "nbdzram tests") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = directory / "ca-cert.pem"
        self._openssl = require_program("openssl", package="openssl")
        # Python 3.13 and newer trust no authority that does not say so (section 4.2.1.3 of RFC 5280).
        may_sign = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        self._request(self.authority, directory / "ca-key.pem", authority, *may_sign)

    def issue(self, name: str, *, file: str, alternatives: str = "") -> tuple[Path, Path]:
        """A certificate for `name` and 127.0.0.1, and its key: `file`-cert.pem and `file`-key.pem.

        `alternatives`: other names in place of those, as openssl takes them for subjectAltName.
        """
        certificate, key = self.directory / f"{file}-cert.pem", self.directory / f"{file}-key.pem"
        self._request(
            certificate,
            key,
            name,
            *("-addext", f"subjectAltName={alternatives or f'DNS:{name},IP:127.0.0.1,IP:::1'}"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-CA", str(self.authority), "-CAkey", str(self.directory / "ca-key.pem")),
        )
        return certificate, key

    def client_directory(self, directory: Path, name: str | None) -> Path:
        """What `tls-certificates=` of libnbd and `dir=` of QEMU point to; without `name` there is no certificate."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "ca-cert.pem").write_bytes(self.authority.read_bytes())
        if name is not None:
            for source, target in zip(self.issue(name, file=name), ("client-cert.pem", "client-key.pem"), strict=True):
                (directory / target).write_bytes(source.read_bytes())
        for file in directory.iterdir():
            file.chmod(0o644)  # fio looks for them as another user
        return directory

    def client_context(self, name: str | None = None) -> ssl.SSLContext:
        """For Python's own client; trusts this authority."""
        context = ssl.create_default_context(cafile=str(self.authority))
        if name is not None:
            context.load_cert_chain(*self.issue(name, file=name))
        return context

    def _request(self, certificate: Path, key: Path, name: str, *options: str) -> None:
        command = [self._openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        run([*command, "-days", DAYS, "-subj", f"/CN={name}", "-keyout", key, "-out", certificate, *options])

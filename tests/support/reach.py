"""One server reached over TCP, a unix socket and TLS: how each client of others is told."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.pki import Pki
from tests.support.server import Nbdzram

TRANSPORTS = ("tcp", "unix", "tls")
NOBODY = 65534


@dataclass(frozen=True, slots=True)
class Reach:
    """How a client reaches one server."""

    server: Nbdzram
    transport: str
    client_files: Path  # ca-cert.pem, client-cert.pem, client-key.pem

    def uri(self, export: str = "disk") -> str:
        """For libnbd's programs."""
        if self.transport == "tls":
            return f"nbds://127.0.0.1:{self.server.port}/{export}?tls-certificates={self.client_files}"
        return self.server.uri(export) if self.transport == "unix" else self.server.tcp_uri(export)

    def nbdkit(self, export: str = "disk") -> list[str]:
        """For nbdkit's nbd plugin, which takes certificates only as a parameter of its own."""
        if self.transport != "tls":
            return [f"uri={self.uri(export)}"]
        return [f"uri={self.uri(export).partition('?')[0]}", f"tls-certificates={self.client_files}"]

    def qemu(self, export: str = "disk", *, driver: str = "raw") -> tuple[list[str], str]:
        """For qemu-img and qemu-io: options (give them --image-opts), and the image."""
        options: list[str] = []
        image = f"driver={driver},file.driver=nbd,file.export={export},"
        if self.transport == "unix":
            return options, image + f"file.server.type=unix,file.server.path={self.server.unix_path}"
        image += f"file.server.type=inet,file.server.host=127.0.0.1,file.server.port={self.server.port}"
        if self.transport == "tls":
            options = ["--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={self.client_files}"]
            image += ",file.tls-creds=tls0"
        return options, image


def tls_arguments(pki: Pki, *, mode: str, client_ca: bool = True) -> tuple[str, ...]:
    certificate, key = pki.issue("localhost", file="server")
    given = ("--tls", mode, "--tls-certificate", str(certificate), "--tls-key", str(key))
    return (*given, "--tls-client-ca", str(pki.authority)) if client_ca else given


@dataclass(frozen=True, slots=True)
class TrustingUser:
    """For programs that give libnbd a URI and no more (fio): it then looks for certificates in its user's home.

    For root libnbd looks in /etc only, so a test that runs as root runs them as nobody.
    """

    home: Path
    user: int | None = field(default_factory=lambda: NOBODY if os.geteuid() == 0 else None)

    def environment(self) -> dict[str, str]:
        return os.environ | {"HOME": str(self.home)}


def let_others_pass(directory: Path) -> None:
    """To what lies in it, through all above it: pytest's directories are their owner's alone. What is everybody's, such
    as /tmp, stays as it is."""
    for above in (directory, *directory.parents[:-2]):
        above.chmod(above.stat().st_mode | 0o011)


@contextmanager
def trusting_user(client_files: Path) -> Iterator[TrustingUser]:
    """A home directory that nobody may read, with the files of a TLS client."""
    with tempfile.TemporaryDirectory(prefix="nbdzram-home-") as directory:
        home = Path(directory)
        home.chmod(0o755)
        shutil.copytree(client_files, home / ".pki" / "libnbd")
        user = TrustingUser(home)
        if user.user is not None:
            for path in (home, *home.rglob("*")):
                os.chown(path, user.user, -1)
        yield user

"""Every way that a newcomer is told to attach is one that works: for each address, and what is asked for over TLS."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdzram.cli.hints import how_to_attach
from nbdzram.config import TlsConfig

PLAIN = TlsConfig()
TRUSTED = TlsConfig(certificate=Path("cert.pem"))
MUTUAL = TlsConfig(certificate=Path("cert.pem"), client_ca=Path("ca.pem"))
SHARED = TlsConfig(psk_file=Path("keys.psk"))
SOCKET = "///?socket=/run/nbd.sock"
MODPROBE = "     # as root, after: modprobe nbd"
NEAR = "file.server.type=unix,file.server.path=/run/nbd.sock"
FAR = "file.server.type=inet,file.server.host=192.0.2.1,file.server.port=10809"
TRUSTS = "-cacertfile DIR/ca-cert.pem"
SHOWS = f"{TRUSTS} -certfile DIR/client-cert.pem -keyfile DIR/client-key.pem"


def qemu_img(credentials: str, server: str) -> str:
    image = f"driver=raw,file.driver=nbd,file.export=disk,{server},file.tls-creds=tls0"
    return f"qemu-img info --object tls-creds-{credentials} --image-opts {image}"


@pytest.mark.parametrize(
    ("uri", "tls", "told"),
    [
        *[
            (
                f"nbd+unix:{SOCKET}",
                tls,
                [
                    f"nbd-client -unix /run/nbd.sock /dev/nbd0 -name disk{MODPROBE}",
                    "nbdinfo 'nbd+unix:///disk?socket=/run/nbd.sock'",
                    "qemu-img info 'nbd+unix:///disk?socket=/run/nbd.sock'",
                ],
            )
            for tls in (PLAIN, TRUSTED, MUTUAL, SHARED)  # where TLS is on, and this address without
        ],
        (
            "nbd://192.0.2.1",
            MUTUAL,
            [
                f"nbd-client 192.0.2.1 10809 /dev/nbd0 -name disk{MODPROBE}",
                "nbdinfo nbd://192.0.2.1:10809/disk",
                "qemu-img info nbd://192.0.2.1:10809/disk",
            ],
        ),
        ("nbd+vsock://2", PLAIN, ["nbdinfo nbd+vsock://2:10809/disk", "qemu-img info nbd+vsock://2:10809/disk"]),
        (
            f"nbds+unix:{SOCKET}",
            TRUSTED,
            [
                f"nbd-client -unix /run/nbd.sock /dev/nbd0 -name disk {TRUSTS}{MODPROBE}",
                "nbdinfo 'nbds+unix:///disk?socket=/run/nbd.sock&tls-certificates=DIR'",
                qemu_img("x509,id=tls0,endpoint=client,dir=DIR", NEAR),
                "where DIR is a directory with ca-cert.pem",
            ],
        ),
        (
            "nbds://192.0.2.1",
            MUTUAL,
            [
                f"nbd-client 192.0.2.1 10809 /dev/nbd0 -name disk {SHOWS}{MODPROBE}",
                "nbdinfo 'nbds://192.0.2.1:10809/disk?tls-certificates=DIR'",
                qemu_img("x509,id=tls0,endpoint=client,dir=DIR", FAR),
                "where DIR is a directory with ca-cert.pem, client-cert.pem, client-key.pem",
            ],
        ),
        (
            "nbds://192.0.2.1",
            SHARED,
            [
                "nbdinfo 'nbds://NAME@192.0.2.1:10809/disk?tls-psk-file=DIR/keys.psk'",
                qemu_img("psk,id=tls0,endpoint=client,dir=DIR,username=NAME", FAR),
                "where DIR is a directory with keys.psk",
            ],
        ),
    ],
)
def test_each_program_is_told_what_it_needs_for_this_address(uri: str, tls: TlsConfig, told: list[str]) -> None:
    assert list(how_to_attach(uri, "disk", tls)) == told


def test_who_swaps_to_a_server_is_told_how_to_attach_for_that() -> None:
    """Swap that is attached without it locks the machine up (docs/howto/swap.md)."""
    kernels, *others = how_to_attach("nbd://192.0.2.1", "disk", TlsConfig(), swap=True)
    assert kernels.startswith("nbd-client 192.0.2.1 10809 /dev/nbd0 -name disk -swap ")
    assert not any("swap" in line for line in others)

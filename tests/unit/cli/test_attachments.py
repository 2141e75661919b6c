"""What each address of a server reads as, and each line that is told of it: attachments.txt has all of them.

python -m tests.unit.cli.test_attachments        writes it anew, after a change that is meant
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from nbdzram.cli.attach import _device
from nbdzram.cli.hints import Address, Attachment, Credentials, how_to_attach, qemu_img, tellable
from nbdzram.config import TlsConfig
from nbdzram.errors import UserError

ATTACHMENTS = Path(__file__).with_name("attachments.txt")
URIS = (
    *(
        "nbd://",
        "nbd:///disk",
        "nbd://192.0.2.10",
        "nbd://192.0.2.10:18097/a",
        "nbds://there.example",
        "nbd+tcp://there",
    ),
    *(
        "nbd://[::1]",
        "nbd://[fe80::1%25eth0]:7",
        "NBD://There",
        "nbd+unix:///?socket=/run/nbd.sock",
        "nbds+vsock://2:9",
    ),
    *("nbds+unix:///?socket=/run/a%20b,c", "nbd+vsock://2", "nbd+unix://there/?a=b&socket=/s&socket=/t"),
)
WRONG = (
    *("", "192.0.2.10", "http://a", "nbd+udp://a", "nbdx://a", "nbd://a:0", "nbd://a:65536", "nbd://a:b", "nbd://[::1"),
    *(
        "nbd+unix:///",
        "nbd+unix:///?socket=",
        "nbd://a?socket=/s",
        "nbd+unix:///?socket=/a%0a",
        "nbd+unix:///?socket=/%ff",
    ),
    *(
        "nbd://-d",
        "nbd://%2dd",
        "nbd://a%20b",
        "nbd://a%2fb",
        "nbd://a%0ab",
        "nbd://a\nb",
        "nbd://\x7f",
        "nbd+vsock:///?socket=/s",
    ),
)
EXPORTS = ("disk", "a/b c,d")
DEVICES = ("/dev/nbd0", "nbd15", "/dev/nbd10000", "/dev/nbd00", "/dev/nbd0p1", "nbd", "sda", "/dev/nbd9999", "dev/nbd0")
DIRECTORY = "/tls of,ours"
CREDENTIALS = (Credentials(), Credentials(DIRECTORY, own=True), Credentials(DIRECTORY, own=True, user="me"))
SERVERS = (
    TlsConfig(),
    TlsConfig(certificate=Path("cert.pem")),
    TlsConfig(certificate=Path("cert.pem"), client_ca=Path("ca.pem")),
    TlsConfig(psk_file=Path("keys.psk")),
)


def tried(line: Attachment) -> str:
    try:
        return line.nbdtab_line()
    except UserError as error:
        return f"refused: {error}"


def of_an_address(uri: str) -> Iterator[str]:
    address = Address.of(uri)
    yield f"{address}{' kernel' * address.kernel_can_attach}{' TLS' * address.over_tls}"
    yield "  " + " ".join(address.uri(export) for export in EXPORTS)
    for credentials in CREDENTIALS if address.over_tls else CREDENTIALS[:1]:
        yield f"  {address.uri('disk', credentials)}"
        yield f"  {shlex.join(qemu_img(address, EXPORTS[1], credentials))}"
        for attachment in (
            Attachment(address, "disk", credentials=credentials),
            Attachment(address, EXPORTS[1], "/dev/nbd7", connections=4, swap=True, credentials=credentials),
            Attachment(address, "e", "/dev/nbd3", connections=2, credentials=credentials),
        ):
            yield f"  {shlex.join(attachment.command())}"
            yield f"  {tried(attachment)}"
    for tls in SERVERS:
        yield from (f"    {line}" for line in how_to_attach(uri, "disk", tls))


def lines() -> Iterator[str]:
    for uri in URIS:
        yield f"-- {uri}"
        yield from of_an_address(uri)
    yield "-- wrong ones"
    for uri in WRONG:
        try:
            yield f"{uri!r}: {Address.of(uri)}"
        except UserError as error:
            told, cause, _ = str(error).partition("10809: ")  # behind it stand the words of Python's library
            yield f"{uri!r}: refused: {told}{cause}"
    yield f"tellable: {tellable(['nbd://a:0', *URIS[2:4], 'nbd+unix:///', *URIS[-1:]])}"
    yield "-- fields of nbdtab"
    for field in ("a", "#a", "a#", "a b", "a,b", "a=b", "", "ü"):
        yield f"{field!r}: {tried(Attachment(Address.of('nbd://a'), field))}"
    yield "-- devices"
    for device in DEVICES:
        try:
            yield f"{device}: {_device(device)}"
        except UserError as error:
            yield f"{device}: refused: {error}"


def test_each_line_is_told_as_it_was() -> None:
    assert list(lines()) == ATTACHMENTS.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    ATTACHMENTS.write_text("\n".join(lines()) + "\n", encoding="utf-8")

"""When a certificate is valid is read from its DER, of any version and of both kinds of time."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nbdzram.server.certificate import validity

SEQUENCE, VERSION, INTEGER, UTC_TIME, GENERALIZED_TIME = 0x30, 0xA0, 0x02, 0x17, 0x18
Time = tuple[int, bytes]


def der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 0x80 else bytes([0x82, *size.to_bytes(2)])
    return bytes([tag]) + length + content


def certificate(first: Time, last: Time, *, version: int | None = 3) -> bytes:
    """As far as somebody reads it who looks for its dates."""
    fields = der(VERSION, der(INTEGER, bytes([version - 1]))) if version is not None else b""
    fields += der(INTEGER, b"\1") + der(SEQUENCE, b"algorithm") + der(SEQUENCE, b"issuer" * 40)
    fields += der(SEQUENCE, der(*first) + der(*last)) + der(SEQUENCE, b"subject and key" * 20)
    return der(SEQUENCE, der(SEQUENCE, fields) + der(SEQUENCE, b"signature"))


@pytest.mark.parametrize("version", [None, 3], ids=["version 1, which is not written", "version 3"])
@pytest.mark.parametrize(
    ("first", "last", "dates"),
    [
        ((UTC_TIME, b"260101000000Z"), (UTC_TIME, b"491231235959Z"), ((2026, 1, 1), (2049, 12, 31, 23, 59, 59))),
        ((UTC_TIME, b"500101000000Z"), (UTC_TIME, b"991231235959Z"), ((1950, 1, 1), (1999, 12, 31, 23, 59, 59))),
        ((UTC_TIME, b"000229120000Z"), (GENERALIZED_TIME, b"20500101000000Z"), ((2000, 2, 29, 12), (2050, 1, 1))),
    ],
)
def test_a_certificate_says_when_it_begins_and_ends(
    tmp_path: Path, first: Time, last: Time, dates: tuple[tuple[int, ...], ...], version: int | None
) -> None:
    path = tmp_path / "cert.pem"
    path.write_text("a line before it\n" + ssl.DER_cert_to_PEM_cert(certificate(first, last, version=version)))
    assert validity(path) == tuple(datetime(*date, tzinfo=UTC) for date in dates)  # type: ignore[misc, arg-type]


OTHERWISE: dict[str, tuple[bytes, str]] = {
    "cut off": (certificate(FIRST := (UTC_TIME, b"260101000000Z"), FIRST)[:20], "it ends early"),
    "a byte": (b"\x30", "it ends early"),
    "another time": (certificate(FIRST, (INTEGER, b"1")), "its validity is no date"),
    "no date": (certificate((UTC_TIME, b"never"), FIRST), "does not match format"),
    "another place": (certificate(FIRST, FIRST).replace(der(SEQUENCE, b"algorithm"), b"", 1), "RFC 5280|ends early"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_is_no_certificate_is_told_as_that(tmp_path: Path, what: str) -> None:
    content, words = OTHERWISE[what]
    path = tmp_path / "cert.pem"
    path.write_text(ssl.DER_cert_to_PEM_cert(content))
    with pytest.raises(ValueError, match=words):
        validity(path)


@pytest.mark.parametrize(
    "text", ["", "-----BEGIN CERTIFICATE-----\n", "-----END CERTIFICATE-----\n-----BEGIN CERTIFICATE-----"]
)
def test_a_file_without_a_certificate_is_told_as_that(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cert.pem"
    path.write_text(text)
    with pytest.raises(ValueError, match="it holds no PEM certificate"):
        validity(path)

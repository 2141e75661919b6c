"""When an X.509 certificate is valid: just enough of DER to find two dates.

Python's ssl module tells the dates of a peer's certificate after a handshake, but not those of a file. The structure is
that of RFC 5280, section 4.1: Certificate { TBSCertificate { [0] version, serial, algorithm, issuer, validity, ... } }.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

_SEQUENCE, _EXPLICIT_VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def validity(path: Path) -> tuple[datetime, datetime]:
    """The first certificate's notBefore and notAfter. Raises OSError, and ValueError for what is no certificate."""
    text = path.read_text(encoding="ascii", errors="replace")
    start, end = text.find(_BEGIN), text.find(_END)
    if not 0 <= start < end:
        raise ValueError("it holds no PEM certificate")
    der = ssl.PEM_cert_to_DER_cert(text[start : end + len(_END)])
    _, certificate, _ = _element(der)
    _, fields, _ = _element(certificate)
    tag, _, rest = _element(fields)
    skipped = 3 if tag == _EXPLICIT_VERSION else 2  # serial, algorithm, issuer; without a version the serial is gone
    for _ in range(skipped):
        _, _, rest = _element(rest)
    tag, dates, _ = _element(rest)
    if tag != _SEQUENCE:
        raise ValueError("its validity is not where RFC 5280 has it")
    first_tag, first, more = _element(dates)
    last_tag, last, _ = _element(more)
    return _time(first_tag, first), _time(last_tag, last)


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """Tag, content, and what follows. Raises ValueError."""
    if len(der) < 2:
        raise ValueError("it ends early")
    length, start = der[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[2:start], "big")
    if start + length > len(der):
        raise ValueError("it ends early")
    return der[0], der[start : start + length], der[start + length :]


def _time(tag: int, content: bytes) -> datetime:
    """UTCTime has two digits of the year: below 50 they mean 20xx (RFC 5280, section 4.1.2.5.1)."""
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        text = ("20" if text[:2] < "50" else "19") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("its validity is no date")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)

"""The status page, and the policy that lets a browser run it and nothing else.

Names of exports come from operators and clients may read the page in a browser that also holds other secrets, so the
policy names the page's own style and script by their hashes: markup that slipped in would not run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


def load_page() -> tuple[bytes, str]:
    """The page, and its Content-Security-Policy (W3C CSP level 3, section 2.3.1 for the hashes)."""
    page = resources.files("nbdzram.metrics").joinpath("page.html").read_bytes()
    hashes: dict[bytes, str] = {}
    for kind, content in _INLINE.findall(page):
        assert kind not in hashes, "the page has one style and one script"
        hashes[kind] = base64.b64encode(hashlib.sha256(content).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes[b'style']}'; script-src 'sha256-{hashes[b'script']}'; "
        "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return page, policy

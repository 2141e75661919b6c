"""How a key's section and default are written, in the reference and in the manual alike."""

from __future__ import annotations

from typing import Any

from nbdzram import config as configuration
from nbdzram.settings import BOUNDED_BY, Key


def section_of(key: Key) -> str:
    """The table of the file that it stands in."""
    names = {"pools": "[pools.NAME]", "exports": "[exports.NAME]"}
    return "Top level" if len(key.path) == 1 else names.get(key.path[0], f"[{key.path[0]}]")


def default_of(key: Key) -> str:
    """As one would write it."""
    if key.path == ("listen",):
        return f"`{configuration.TcpAddress().host}:{configuration.DEFAULT_PORT}`"
    if key.path == ("exports", "*", "size"):
        return "required, or an image"
    if key.path == ("limits", "keep_free"):  # "none" would say that nothing is kept
        return "`auto`"
    if key.path in {("exports", "*", "snapshots"), ("maintenance", "scrub")} or key.path[-1] in BOUNDED_BY:
        return "`off`"
    owners: dict[str, Any] = {
        "tls": configuration.TlsConfig(),
        "limits": configuration.Limits(),
        "maintenance": configuration.MaintenanceConfig(),
        "checkpoint": configuration.CheckpointConfig(),
        "pools": configuration.PoolConfig(),
        "exports": configuration.ExportConfig(name="NAME", size_bytes=512),
    }
    owner = owners[key.path[0]] if len(key.path) > 1 else configuration.ServerConfig()
    text = _written(getattr(owner, key.path[-1]), is_size=key.path[-1].endswith("_bytes"))
    return f"`{text}`" if text else "none"


def _written(value: Any, *, is_size: bool) -> str:
    if isinstance(value, configuration.TcpAddress):
        return f"{value.host}:{value.port}"
    if is_size:
        return f"{value >> 20}M"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) if value not in {None, ()} else ""

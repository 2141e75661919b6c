from collections.abc import Mapping

class TlsContext:
    """What TLS connections have in common. Those that began with it keep it alive."""

    certified: bool
    """Clients must show a certificate."""

    def __init__(self) -> None:
        """Raises TlsUnavailable, and TlsError for a configuration of the system's OpenSSL that cannot be used."""
    def use_certificate(self, certificate: bytes, key: bytes) -> None:
        """Paths of PEM files: a chain, and its private key. Raises TlsError, PassPhraseWanted among them."""
    def require_certificates(self, authority: bytes) -> None:
        """Path of a PEM file with those who sign clients. Raises TlsError."""
    def use_keys(self, keys: Mapping[str, bytes]) -> None:
        """Pre-shared keys by identity. Raises TlsError."""

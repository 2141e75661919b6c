"""OpenSSL itself, for what Python's ssl cannot be asked for: a client that updates its keys as often as it likes, or
that has a pre-shared one."""

from __future__ import annotations

import ctypes
import ctypes.util
import socket

WANT_READ = 2  # SSL_ERROR_WANT_READ
SET_MAX_PROTO_VERSION = 124  # SSL_CTRL_SET_MAX_PROTO_VERSION
TLS_1_2, TLS_1_3 = 0x303, 0x304
_PSK = ctypes.CFUNCTYPE(
    *(ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
)
PENDING_LIMIT = 1 << 20


def _load() -> ctypes.CDLL:
    name = ctypes.util.find_library("ssl")
    assert name, "libssl is missing; try: apt-get install libssl3"
    library = ctypes.CDLL(name)
    for function in ("TLS_client_method", "SSL_CTX_new", "SSL_new", "BIO_s_mem", "BIO_new"):
        getattr(library, function).restype = ctypes.c_void_p
    return library


class OpenSslClient:
    """TLS as a client on a blocking socket, without looking at the server's certificate.

    Raises ConnectionError when the server does not let it in.
    """

    def __init__(
        self, connected: socket.socket, *, psk: tuple[str, bytes] | None = None, newest: int = TLS_1_3
    ) -> None:
        self.socket = connected
        self._library = library = _load()
        self._context = ctypes.c_void_p(library.SSL_CTX_new(ctypes.c_void_p(library.TLS_client_method())))
        library.SSL_CTX_ctrl(self._context, SET_MAX_PROTO_VERSION, ctypes.c_long(newest), None)
        if psk is not None:
            self._identify = _identify(*psk)  # OpenSSL keeps no reference
            library.SSL_CTX_set_psk_client_callback(self._context, self._identify)
            assert library.SSL_CTX_set_cipher_list(self._context, b"ALL:PSK") == 1
        self._tls = ctypes.c_void_p(library.SSL_new(self._context))
        memory = ctypes.c_void_p(library.BIO_s_mem())
        self._incoming, self._outgoing = (ctypes.c_void_p(library.BIO_new(memory)) for _ in range(2))
        library.SSL_set_bio(self._tls, self._incoming, self._outgoing)
        library.SSL_set_connect_state(self._tls)
        while (result := library.SSL_do_handshake(self._tls)) != 1:
            if library.SSL_get_error(self._tls, result) != WANT_READ:
                raise ConnectionAbortedError("OpenSSL does not go on")
            self._send()
            self._receive()
        self._send()

    def encrypt(self, plain: bytes) -> bytes:
        """One record, or more for more than 16 KiB."""
        assert self._library.SSL_write(self._tls, plain, len(plain)) == len(plain)
        return self._ciphertext()

    def key_update(self) -> bytes:
        """The record that tells of new keys (section 4.6.3 of RFC 8446)."""
        assert self._library.SSL_key_update(self._tls, 0) == 1
        assert self._library.SSL_do_handshake(self._tls) == 1
        return self._ciphertext()

    def renegotiate(self) -> bytes:
        """The record that asks for another handshake, of TLS 1.2 (section 7.4.1 of RFC 5246)."""
        assert self._library.SSL_renegotiate(self._tls) == 1
        assert self._library.SSL_do_handshake(self._tls) != 1
        return self._ciphertext()

    def read(self, size: int) -> bytes:
        """Exactly `size` plain bytes."""
        plain = b""
        buffer = ctypes.create_string_buffer(size)
        while len(plain) < size:
            result = self._library.SSL_read(self._tls, buffer, size - len(plain))
            if result > 0:
                plain += buffer.raw[:result]
            else:
                self._receive()
        return plain

    def _ciphertext(self) -> bytes:
        buffer = ctypes.create_string_buffer(PENDING_LIMIT)
        size = self._library.BIO_read(self._outgoing, buffer, PENDING_LIMIT)
        return buffer.raw[: max(size, 0)]

    def _send(self) -> None:
        if ciphertext := self._ciphertext():  # the server may have closed behind its last flight
            self.socket.sendall(ciphertext)

    def _receive(self) -> None:
        ciphertext = self.socket.recv(1 << 16)
        if not ciphertext:
            raise ConnectionResetError("the server hung up")
        self._library.BIO_write(self._incoming, ciphertext, len(ciphertext))


def _identify(name: str, key: bytes) -> object:
    def answer(_tls: int, _hint: bytes, identity: int, _most: int, target: int, _most_key: int) -> int:
        ctypes.memmove(identity, name.encode() + b"\0", len(name.encode()) + 1)
        ctypes.memmove(target, key, len(key))
        return len(key)

    return _PSK(answer)

"""What TLS connections have in common: versions, ciphers, the server's certificate, whom clients' certificates are of,
pre-shared keys.

Made anew from files, never changed once a connection uses it: OpenSSL counts who holds an SSL_CTX, so connections that
began with an old one keep it, whatever thread they are served by. The event loop's thread only; the key ring alone is
read in handshakes, without the interpreter lock.
"""

from libc.stdlib cimport bsearch, free, malloc
from libc.string cimport memcpy, strcmp

from nbdzram.sessions.openssl cimport (
    GEN_DNS, NID_COMMON_NAME, NID_SUBJECT_ALT_NAME, SSL_CTRL_MODE, SSL_CTRL_SET_MIN_PROTO_VERSION,
    SSL_CTRL_SET_SESS_CACHE_MODE, SSL_FILETYPE_PEM, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, SSL_MODE_ENABLE_PARTIAL_WRITE,
    SSL_MODE_RELEASE_BUFFERS, SSL_OP_CIPHER_SERVER_PREFERENCE, SSL_OP_NO_COMPRESSION, SSL_OP_NO_RENEGOTIATION,
    SSL_OP_NO_TICKET, SSL_SESS_CACHE_OFF, SSL_VERIFY_FAIL_IF_NO_PEER_CERT, SSL_VERIFY_PEER, TLS1_2_VERSION, openssl,
)

from nbdzram.errors import PassPhraseWanted, TlsError
from nbdzram.sessions.openssl import load

cdef extern from "Python.h":
    const char* PyBytes_AS_STRING(object)

# A client could make us compute handshakes for ever; compression tells what is compressed (CRIME, RFC 7457).
cdef enum:
    OPTIONS = SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_NO_TICKET
    MODES = SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER

# Of TLS 1.2: keys that are forgotten afterwards, no SHA-1. TLS 1.3 has its own, all of them good.
CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:ECDHE+AES:DHE+AES:!aNULL:!eNULL:!SHA1:!AESCCM"
CIPHERS_WITH_KEYS = b"DEFAULT:ECDHE+PSK:DHE+PSK:PSK"

# Of TLS 1.3, which every client has to know: ten rounds a block in place of fourteen, on both sides.
PREFERRED_SUITE = b"TLS_AES_128_GCM_SHA256"


cdef class TlsContext:
    """See the module's docstring."""

    def __cinit__(self):
        load()
        openssl.ERR_clear_error()
        self.context = openssl.SSL_CTX_new(openssl.TLS_server_method())
        if self.context == NULL:
            raise TlsError(reason_of(NULL))

    def __init__(self):
        openssl.SSL_CTX_ctrl(self.context, SSL_CTRL_SET_MIN_PROTO_VERSION, TLS1_2_VERSION, NULL)
        openssl.SSL_CTX_set_options(self.context, OPTIONS)
        openssl.SSL_CTX_ctrl(self.context, SSL_CTRL_MODE, MODES, NULL)
        # No NBD client resumes a session: a ticket would be one more thing to send, a cache one more to hold.
        openssl.SSL_CTX_set_num_tickets(self.context, 0)
        openssl.SSL_CTX_ctrl(self.context, SSL_CTRL_SET_SESS_CACHE_MODE, SSL_SESS_CACHE_OFF, NULL)
        self._offer(CIPHERS)
        self._prefer(PREFERRED_SUITE)

    def __dealloc__(self):
        if self.context != NULL:
            openssl.SSL_CTX_free(self.context)
        free(self.ring.keys)

    def use_certificate(self, bytes certificate not None, bytes key not None):
        """See tls_context.pyi."""
        cdef bint asked = False
        openssl.ERR_clear_error()
        openssl.SSL_CTX_set_default_passwd_cb(self.context, _nobody)  # without, OpenSSL asks the terminal, and waits
        openssl.SSL_CTX_set_default_passwd_cb_userdata(self.context, &asked)
        try:
            if (
                openssl.SSL_CTX_use_certificate_chain_file(self.context, certificate) != 1
                or openssl.SSL_CTX_use_PrivateKey_file(self.context, key, SSL_FILETYPE_PEM) != 1
                or openssl.SSL_CTX_check_private_key(self.context) != 1
            ):
                raise PassPhraseWanted if asked else TlsError(reason_of(NULL))
        finally:
            openssl.SSL_CTX_set_default_passwd_cb_userdata(self.context, NULL)

    def require_certificates(self, bytes authority not None):
        """See tls_context.pyi."""
        openssl.ERR_clear_error()
        if openssl.SSL_CTX_load_verify_locations(self.context, authority, NULL) != 1:
            raise TlsError(reason_of(NULL))
        openssl.SSL_CTX_set_verify(self.context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL)
        self.certified = True

    def use_keys(self, keys):
        """See tls_context.pyi."""
        cdef size_t number
        assert self.ring.keys == NULL
        self.kept = sorted((identity.encode(), key) for identity, key in keys.items())
        self.ring.keys = <Key*>malloc(max(len(self.kept), 1) * sizeof(Key))
        if self.ring.keys == NULL:
            raise MemoryError("no memory for the pre-shared keys")
        for number, (identity, key) in enumerate(self.kept):
            self.ring.keys[number] = Key(PyBytes_AS_STRING(identity), PyBytes_AS_STRING(key), len(key))
        self.ring.count = len(self.kept)
        openssl.SSL_CTX_set_ex_data(self.context, 0, &self.ring)
        openssl.SSL_CTX_set_psk_server_callback(self.context, _key_of)
        self._offer(CIPHERS_WITH_KEYS)

    def _offer(self, bytes ciphers):
        openssl.ERR_clear_error()
        if openssl.SSL_CTX_set_cipher_list(self.context, ciphers) != 1:
            raise TlsError(reason_of(NULL))

    def _prefer(self, bytes suite):
        """Put a suite of TLS 1.3 before the others, if it is among those that the system's configuration leaves."""
        cdef void* ciphers = openssl.SSL_CTX_get_ciphers(self.context)
        cdef int at
        names = [openssl.SSL_CIPHER_get_name(openssl.OPENSSL_sk_value(ciphers, at))
                 for at in range(openssl.OPENSSL_sk_num(ciphers))]
        suites = [name for name in names if name.startswith(b"TLS_")]  # those of TLS 1.2 begin otherwise
        if suite in suites:
            suites.remove(suite)
            openssl.SSL_CTX_set_ciphersuites(self.context, b":".join([suite, *suites]))


cdef int _nobody(char* target, int size, int writing, void* asked) noexcept nogil:
    """OpenSSL asks for a pass phrase: there is none."""
    if asked != NULL:
        (<bint*>asked)[0] = True
    return -1


cdef unsigned int _key_of(void* tls, const char* identity, unsigned char* key, unsigned int most) noexcept nogil:
    """A client says who it is. 0: unknown, which OpenSSL refuses."""
    cdef KeyRing* ring = <KeyRing*>openssl.SSL_CTX_get_ex_data(openssl.SSL_get_SSL_CTX(tls), 0)
    cdef Key wanted = Key(identity, NULL, 0)
    cdef Key* found
    if ring == NULL or identity == NULL:
        return 0
    found = <Key*>bsearch(&wanted, ring.keys, ring.count, sizeof(Key), _by_identity)
    if found == NULL or found.size > most:
        return 0
    memcpy(key, found.bytes, found.size)
    return found.size


cdef int _by_identity(const void* one, const void* other) noexcept nogil:
    return strcmp((<const Key*>one).identity, (<const Key*>other).identity)


cdef object reason_of(void* tls):
    """What OpenSSL says went wrong first, and led to the rest; of a certificate, what about it.

    It is forgotten then: whoever uses OpenSSL next on this thread, as Python itself, would take it for its own failure.
    """
    cdef const char* words = openssl.ERR_reason_error_string(openssl.ERR_peek_error())
    cdef long verdict = openssl.SSL_get_verify_result(tls) if tls != NULL else 0
    reason = words.decode() if words != NULL else "OpenSSL does not say why"
    openssl.ERR_clear_error()
    if verdict:
        reason += f" ({(<bytes>openssl.X509_verify_cert_error_string(verdict)).decode()})"
    return reason


cdef object names_of(void* tls):
    """Common names and DNS names of the certificate that the peer has shown, verified."""
    cdef void* certificate = openssl.SSL_get1_peer_certificate(tls)
    if certificate == NULL:
        return frozenset()
    try:
        return frozenset([*_common_names(openssl.X509_get_subject_name(certificate)), *_dns_names(certificate)])
    finally:
        openssl.X509_free(certificate)


cdef list _common_names(void* subject):
    cdef int at = -1
    found = []
    while True:
        at = openssl.X509_NAME_get_index_by_NID(subject, NID_COMMON_NAME, at)
        if at < 0:
            return found
        _add(found, openssl.X509_NAME_ENTRY_get_data(openssl.X509_NAME_get_entry(subject, at)))


cdef list _dns_names(void* certificate):
    cdef void* names = openssl.X509_get_ext_d2i(certificate, NID_SUBJECT_ALT_NAME, NULL, NULL)
    cdef void* value
    cdef int at, kind
    found = []
    if names == NULL:
        return found
    for at in range(openssl.OPENSSL_sk_num(names)):
        value = openssl.GENERAL_NAME_get0_value(openssl.OPENSSL_sk_value(names, at), &kind)
        if kind == GEN_DNS:
            _add(found, value)
    openssl.GENERAL_NAMES_free(names)
    return found


cdef int _add(list found, const void* asn1) except -1:
    """A name of any of ASN.1's kinds of strings, with its length: a NUL in it ends nothing. What is no text is no
    name."""
    cdef unsigned char* text = NULL
    cdef int size = openssl.ASN1_STRING_to_UTF8(&text, asn1)
    if size < 0:
        return 0
    try:
        found.append((<char*>text)[:size].decode())
    except UnicodeDecodeError:
        pass
    finally:
        openssl.CRYPTO_free(text, "", 0)
    return 0

"""libssl's functions, found once, in the library that Python's own `_ssl` uses: a process has one OpenSSL.

dlsym on the extension module looks through what it depends on, so libssl and libcrypto need no names, no headers and no
linker here. A Python whose `_ssl` is part of the interpreter may hide them; then the system's library is asked, which
shares nothing with Python's. What ssl.h and bio.h have as macros stands in openssl.pxd by its number; those are stable
from 1.1.1 on.
"""

import os

from nbdzram.errors import TlsUnavailable

cdef extern from "dlfcn.h" nogil:
    void* dlopen(const char*, int)
    void* dlsym(void*, const char*)
    int RTLD_NOW, RTLD_LOCAL

SYSTEM_LIBRARIES = ("libssl.so.3", "libssl.so.1.1")

cdef bint loaded = False


def load():
    """See openssl.pyi."""
    global loaded
    if loaded:
        return
    missing = "libssl"
    for name in _libraries():
        library = dlopen(NULL, RTLD_NOW) if name is None else dlopen(name, RTLD_NOW | RTLD_LOCAL)
        if library != NULL:
            missing = _find_all(library)
            if not missing:
                loaded = True
                return
    raise TlsUnavailable(
        f"TLS needs OpenSSL 1.1.1 or newer: {missing} is neither in what this Python's ssl module uses nor in"
        f" {' or '.join(SYSTEM_LIBRARIES)}; install it (libssl3), or serve without TLS"
    )


def _libraries():
    """Names for dlopen; None is the program itself. Where Python has no ssl, the system's may still be there."""
    try:
        import _ssl  # most servers have no TLS
    except ImportError:
        pass
    else:
        file = getattr(_ssl, "__file__", None)
        yield file and os.fsencode(file)
    for name in SYSTEM_LIBRARIES:
        yield name.encode()


cdef object _find_all(void* library):
    """Fill `openssl`. The name of the first function that is not there; empty: all are."""
    cdef list missing = []
    _find(library, <void**>&openssl.TLS_server_method, missing, b"TLS_server_method")
    _find(library, <void**>&openssl.SSL_CTX_new, missing, b"SSL_CTX_new")
    _find(library, <void**>&openssl.SSL_CTX_free, missing, b"SSL_CTX_free")
    _find(library, <void**>&openssl.SSL_CTX_ctrl, missing, b"SSL_CTX_ctrl")
    _find(library, <void**>&openssl.SSL_CTX_set_options, missing, b"SSL_CTX_set_options")
    _find(library, <void**>&openssl.SSL_CTX_set_num_tickets, missing, b"SSL_CTX_set_num_tickets")
    _find(library, <void**>&openssl.SSL_CTX_set_cipher_list, missing, b"SSL_CTX_set_cipher_list")
    _find(library, <void**>&openssl.SSL_CTX_set_ciphersuites, missing, b"SSL_CTX_set_ciphersuites")
    _find(library, <void**>&openssl.SSL_CTX_get_ciphers, missing, b"SSL_CTX_get_ciphers")
    _find(library, <void**>&openssl.SSL_CIPHER_get_name, missing, b"SSL_CIPHER_get_name")
    _find(library, <void**>&openssl.SSL_CTX_set_default_passwd_cb, missing, b"SSL_CTX_set_default_passwd_cb")
    _find(library, <void**>&openssl.SSL_CTX_set_default_passwd_cb_userdata, missing,
          b"SSL_CTX_set_default_passwd_cb_userdata")
    _find(library, <void**>&openssl.SSL_CTX_use_certificate_chain_file, missing, b"SSL_CTX_use_certificate_chain_file")
    _find(library, <void**>&openssl.SSL_CTX_use_PrivateKey_file, missing, b"SSL_CTX_use_PrivateKey_file")
    _find(library, <void**>&openssl.SSL_CTX_check_private_key, missing, b"SSL_CTX_check_private_key")
    _find(library, <void**>&openssl.SSL_CTX_load_verify_locations, missing, b"SSL_CTX_load_verify_locations")
    _find(library, <void**>&openssl.SSL_CTX_set_verify, missing, b"SSL_CTX_set_verify")
    _find(library, <void**>&openssl.SSL_CTX_set_psk_server_callback, missing, b"SSL_CTX_set_psk_server_callback")
    _find(library, <void**>&openssl.SSL_CTX_set_ex_data, missing, b"SSL_CTX_set_ex_data")
    _find(library, <void**>&openssl.SSL_CTX_get_ex_data, missing, b"SSL_CTX_get_ex_data")
    _find(library, <void**>&openssl.SSL_new, missing, b"SSL_new")
    _find(library, <void**>&openssl.SSL_free, missing, b"SSL_free")
    _find(library, <void**>&openssl.SSL_set_bio, missing, b"SSL_set_bio")
    _find(library, <void**>&openssl.SSL_set_accept_state, missing, b"SSL_set_accept_state")
    _find(library, <void**>&openssl.SSL_do_handshake, missing, b"SSL_do_handshake")
    _find(library, <void**>&openssl.SSL_read, missing, b"SSL_read")
    _find(library, <void**>&openssl.SSL_write, missing, b"SSL_write")
    _find(library, <void**>&openssl.SSL_pending, missing, b"SSL_pending")
    _find(library, <void**>&openssl.SSL_shutdown, missing, b"SSL_shutdown")
    _find(library, <void**>&openssl.SSL_get_error, missing, b"SSL_get_error")
    _find(library, <void**>&openssl.SSL_get_SSL_CTX, missing, b"SSL_get_SSL_CTX")
    _find(library, <void**>&openssl.SSL_get1_peer_certificate, missing, b"SSL_get1_peer_certificate",
          b"SSL_get_peer_certificate")  # the other name: 1.1.1
    _find(library, <void**>&openssl.SSL_get_verify_result, missing, b"SSL_get_verify_result")
    _find(library, <void**>&openssl.BIO_meth_new, missing, b"BIO_meth_new")
    _find(library, <void**>&openssl.BIO_meth_set_write, missing, b"BIO_meth_set_write")
    _find(library, <void**>&openssl.BIO_meth_set_read, missing, b"BIO_meth_set_read")
    _find(library, <void**>&openssl.BIO_meth_set_ctrl, missing, b"BIO_meth_set_ctrl")
    _find(library, <void**>&openssl.BIO_new, missing, b"BIO_new")
    _find(library, <void**>&openssl.BIO_set_data, missing, b"BIO_set_data")
    _find(library, <void**>&openssl.BIO_get_data, missing, b"BIO_get_data")
    _find(library, <void**>&openssl.BIO_set_init, missing, b"BIO_set_init")
    _find(library, <void**>&openssl.BIO_set_flags, missing, b"BIO_set_flags")
    _find(library, <void**>&openssl.BIO_clear_flags, missing, b"BIO_clear_flags")
    _find(library, <void**>&openssl.ERR_clear_error, missing, b"ERR_clear_error")
    _find(library, <void**>&openssl.ERR_peek_error, missing, b"ERR_peek_error")
    _find(library, <void**>&openssl.ERR_reason_error_string, missing, b"ERR_reason_error_string")
    _find(library, <void**>&openssl.X509_verify_cert_error_string, missing, b"X509_verify_cert_error_string")
    _find(library, <void**>&openssl.X509_free, missing, b"X509_free")
    _find(library, <void**>&openssl.X509_get_subject_name, missing, b"X509_get_subject_name")
    _find(library, <void**>&openssl.X509_NAME_get_index_by_NID, missing, b"X509_NAME_get_index_by_NID")
    _find(library, <void**>&openssl.X509_NAME_get_entry, missing, b"X509_NAME_get_entry")
    _find(library, <void**>&openssl.X509_NAME_ENTRY_get_data, missing, b"X509_NAME_ENTRY_get_data")
    _find(library, <void**>&openssl.X509_get_ext_d2i, missing, b"X509_get_ext_d2i")
    _find(library, <void**>&openssl.OPENSSL_sk_num, missing, b"OPENSSL_sk_num")
    _find(library, <void**>&openssl.OPENSSL_sk_value, missing, b"OPENSSL_sk_value")
    _find(library, <void**>&openssl.GENERAL_NAME_get0_value, missing, b"GENERAL_NAME_get0_value")
    _find(library, <void**>&openssl.GENERAL_NAMES_free, missing, b"GENERAL_NAMES_free")
    _find(library, <void**>&openssl.ASN1_STRING_to_UTF8, missing, b"ASN1_STRING_to_UTF8")
    _find(library, <void**>&openssl.CRYPTO_free, missing, b"CRYPTO_free")
    return missing[0] if missing else ""


cdef int _find(void* library, void** function, list missing, bytes name, bytes older_name=None) except -1:
    function[0] = dlsym(library, name)
    if function[0] == NULL and older_name is not None:
        function[0] = dlsym(library, older_name)
    if function[0] == NULL:
        missing.append(name.decode())
    return 0

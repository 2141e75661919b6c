# libssl's functions, as many as are used, in the versions 1.1.1 to 3.5: found at run time, and called without the
# interpreter lock. Pointers to OpenSSL's own structures are void*.

from libc.stdint cimport uint64_t

ctypedef int (*bio_write_fn)(void* bio, const char* source, int size) noexcept nogil
ctypedef int (*bio_read_fn)(void* bio, char* target, int size) noexcept nogil
ctypedef long (*bio_ctrl_fn)(void* bio, int command, long number, void* pointer) noexcept nogil
ctypedef int (*pass_phrase_fn)(char* target, int size, int writing, void* user) noexcept nogil
ctypedef unsigned int (*psk_fn)(void* tls, const char* identity, unsigned char* key, unsigned int most) noexcept nogil

cdef struct OpenSsl:
    # A context: what connections have in common.
    void* (*TLS_server_method)() noexcept nogil
    void* (*SSL_CTX_new)(const void*) noexcept nogil
    void (*SSL_CTX_free)(void*) noexcept nogil
    long (*SSL_CTX_ctrl)(void*, int, long, void*) noexcept nogil
    uint64_t (*SSL_CTX_set_options)(void*, uint64_t) noexcept nogil
    int (*SSL_CTX_set_num_tickets)(void*, size_t) noexcept nogil
    int (*SSL_CTX_set_cipher_list)(void*, const char*) noexcept nogil
    int (*SSL_CTX_set_ciphersuites)(void*, const char*) noexcept nogil
    void* (*SSL_CTX_get_ciphers)(const void*) noexcept nogil
    const char* (*SSL_CIPHER_get_name)(const void*) noexcept nogil
    void (*SSL_CTX_set_default_passwd_cb)(void*, pass_phrase_fn) noexcept nogil
    void (*SSL_CTX_set_default_passwd_cb_userdata)(void*, void*) noexcept nogil
    int (*SSL_CTX_use_certificate_chain_file)(void*, const char*) noexcept nogil
    int (*SSL_CTX_use_PrivateKey_file)(void*, const char*, int) noexcept nogil
    int (*SSL_CTX_check_private_key)(const void*) noexcept nogil
    int (*SSL_CTX_load_verify_locations)(void*, const char*, const char*) noexcept nogil
    void (*SSL_CTX_set_verify)(void*, int, void*) noexcept nogil
    void (*SSL_CTX_set_psk_server_callback)(void*, psk_fn) noexcept nogil
    int (*SSL_CTX_set_ex_data)(void*, int, void*) noexcept nogil
    void* (*SSL_CTX_get_ex_data)(const void*, int) noexcept nogil
    # A connection.
    void* (*SSL_new)(void*) noexcept nogil
    void (*SSL_free)(void*) noexcept nogil
    void (*SSL_set_bio)(void*, void*, void*) noexcept nogil
    void (*SSL_set_accept_state)(void*) noexcept nogil
    int (*SSL_do_handshake)(void*) noexcept nogil
    int (*SSL_read)(void*, void*, int) noexcept nogil
    int (*SSL_write)(void*, const void*, int) noexcept nogil
    int (*SSL_pending)(const void*) noexcept nogil
    int (*SSL_shutdown)(void*) noexcept nogil
    int (*SSL_get_error)(const void*, int) noexcept nogil
    void* (*SSL_get_SSL_CTX)(const void*) noexcept nogil
    void* (*SSL_get1_peer_certificate)(const void*) noexcept nogil
    long (*SSL_get_verify_result)(const void*) noexcept nogil
    # The way to a peer, which is ours.
    void* (*BIO_meth_new)(int, const char*) noexcept nogil
    int (*BIO_meth_set_write)(void*, bio_write_fn) noexcept nogil
    int (*BIO_meth_set_read)(void*, bio_read_fn) noexcept nogil
    int (*BIO_meth_set_ctrl)(void*, bio_ctrl_fn) noexcept nogil
    void* (*BIO_new)(const void*) noexcept nogil
    void (*BIO_set_data)(void*, void*) noexcept nogil
    void* (*BIO_get_data)(void*) noexcept nogil
    void (*BIO_set_init)(void*, int) noexcept nogil
    void (*BIO_set_flags)(void*, int) noexcept nogil
    void (*BIO_clear_flags)(void*, int) noexcept nogil
    # What went wrong: a queue for each thread.
    void (*ERR_clear_error)() noexcept nogil
    unsigned long (*ERR_peek_error)() noexcept nogil
    const char* (*ERR_reason_error_string)(unsigned long) noexcept nogil
    const char* (*X509_verify_cert_error_string)(long) noexcept nogil
    # Whom a certificate names.
    void (*X509_free)(void*) noexcept nogil
    void* (*X509_get_subject_name)(const void*) noexcept nogil
    int (*X509_NAME_get_index_by_NID)(const void*, int, int) noexcept nogil
    void* (*X509_NAME_get_entry)(const void*, int) noexcept nogil
    void* (*X509_NAME_ENTRY_get_data)(const void*) noexcept nogil
    void* (*X509_get_ext_d2i)(const void*, int, int*, int*) noexcept nogil
    int (*OPENSSL_sk_num)(const void*) noexcept nogil
    void* (*OPENSSL_sk_value)(const void*, int) noexcept nogil
    void* (*GENERAL_NAME_get0_value)(const void*, int*) noexcept nogil
    void (*GENERAL_NAMES_free)(void*) noexcept nogil
    int (*ASN1_STRING_to_UTF8)(unsigned char**, const void*) noexcept nogil
    void (*CRYPTO_free)(void*, const char*, int) noexcept nogil

cdef OpenSsl openssl             # every one of them, once `load` was called

cdef enum:  # of SSL_get_error
    SSL_ERROR_SSL = 1
    SSL_ERROR_WANT_READ = 2
    SSL_ERROR_WANT_WRITE = 3
    SSL_ERROR_SYSCALL = 5
    SSL_ERROR_ZERO_RETURN = 6

cdef enum:  # what ssl.h and bio.h have as macros
    SSL_FILETYPE_PEM = 1
    SSL_VERIFY_PEER = 1
    SSL_VERIFY_FAIL_IF_NO_PEER_CERT = 2
    SSL_CTRL_MODE = 33
    SSL_CTRL_SET_SESS_CACHE_MODE = 44
    SSL_CTRL_SET_MIN_PROTO_VERSION = 123
    SSL_SESS_CACHE_OFF = 0
    SSL_MODE_ENABLE_PARTIAL_WRITE = 0x1
    SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER = 0x2
    SSL_MODE_RELEASE_BUFFERS = 0x10
    SSL_OP_NO_TICKET = 0x4000
    SSL_OP_NO_COMPRESSION = 0x20000
    SSL_OP_CIPHER_SERVER_PREFERENCE = 0x400000
    SSL_OP_NO_RENEGOTIATION = 0x40000000
    TLS1_2_VERSION = 0x0303
    BIO_TYPE_SOURCE_SINK = 0x400
    BIO_FLAGS_READ = 0x1
    BIO_FLAGS_WRITE = 0x2
    BIO_FLAGS_SHOULD_RETRY = 0x8
    BIO_FLAGS_ALL_RETRY = 0xF
    BIO_CTRL_FLUSH = 11
    NID_COMMON_NAME = 13
    NID_SUBJECT_ALT_NAME = 85
    GEN_DNS = 2

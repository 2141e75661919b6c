cdef struct Key:
    # A pre-shared one.
    const char* identity
    const char* bytes
    size_t size

cdef struct KeyRing:
    Key* keys                # by identity, in the order of strcmp
    size_t count

cdef class TlsContext:
    cdef void* context           # SSL_CTX: each connection holds it too
    cdef KeyRing ring
    cdef list kept               # the bytes that `ring` points to
    cdef readonly bint certified # who gets in has a certificate that an authority of ours signed

cdef object reason_of(void* tls)
cdef object names_of(void* tls)

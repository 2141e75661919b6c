"""A small Linux machine that uses an export as a real kernel does: Debian's cloud kernel under QEMU."""

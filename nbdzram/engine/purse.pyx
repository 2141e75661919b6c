"""What all pools of a server together may take (purse.pxd)."""

from nbdzram.engine.page cimport PAGE_SIZE


cdef class Purse:
    """See purse.pyi."""

    @property
    def used(self):
        return purse_look(&self.sum.used) * PAGE_SIZE

    @property
    def ceiling(self):
        return purse_look(&self.sum.ceiling) * PAGE_SIZE

    @ceiling.setter
    def ceiling(self, most: int):
        purse_set(&self.sum.ceiling, 0 if most == 0 else max(most // PAGE_SIZE, 1))

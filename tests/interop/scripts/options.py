"""Option mode: what can be asked before an export is chosen, in libnbd's words."""

import sys

import nbd

handle = nbd.NBD()
handle.set_uri_allow_local_file(True)  # the certificates that a URI may name
handle.set_opt_mode(True)
handle.add_meta_context("base:allocation")
handle.connect_uri(sys.argv[1])
assert handle.get_protocol() == "newstyle-fixed"
assert handle.get_structured_replies_negotiated()

found = []
assert handle.opt_list(lambda name, _description: found.append(name) or 0) == 1
assert found == ["disk"], found

contexts = []
assert handle.opt_list_meta_context(lambda name: contexts.append(name) or 0) == 1
assert contexts == ["base:allocation"], contexts

handle.set_export_name("nope")
refused = None
try:
    handle.opt_info()
except nbd.Error as error:
    refused = error.errno
assert refused == "ENOENT", refused

handle.set_export_name("disk")
handle.opt_info()
size = handle.get_size()
assert size % 4096 == 0
assert handle.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert handle.get_block_size(nbd.SIZE_MINIMUM) == 1
assert handle.get_block_size(nbd.SIZE_MAXIMUM) >= 32 << 20
handle.opt_go()
assert handle.get_size() == size
assert handle.can_multi_conn()
assert handle.can_meta_context("base:allocation")
handle.pwrite(b"x" * 4096, 8192)
entries = []
handle.block_status(16384, 0, lambda _context, _offset, extents, _error: entries.extend(extents) or 0)
assert entries[:6] == [8192, 3, 4096, 0, 4096, 3], entries
handle.shutdown()

handle = nbd.NBD()
handle.set_uri_allow_local_file(True)  # the certificates that a URI may name
handle.set_opt_mode(True)
handle.connect_uri(sys.argv[1])
handle.opt_abort()
print("PASS")

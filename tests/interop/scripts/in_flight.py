"""256 requests in flight on one connection: every reply answers its own request, in whatever order they come."""

import random
import sys

import nbd

BLOCK = 4096
IN_FLIGHT = 256

handle = nbd.NBD()
handle.set_uri_allow_local_file(True)  # the certificates that a URI may name
handle.connect_uri(sys.argv[1])
source = random.Random(7)
content = [source.randbytes(BLOCK // 2) + bytes(BLOCK // 2) for _ in range(IN_FLIGHT)]

for write in [True, False]:
    order = list(range(IN_FLIGHT))
    source.shuffle(order)
    buffers = {}
    cookies = []
    for block in order:
        buffer = nbd.Buffer.from_bytearray(bytearray(content[block] if write else BLOCK))
        buffers[block] = buffer
        start = handle.aio_pwrite if write else handle.aio_pread
        cookies.append(start(buffer, block * BLOCK))
    assert handle.aio_in_flight() > 0
    while cookies:
        handle.poll(-1)
        cookies = [cookie for cookie in cookies if not handle.aio_command_completed(cookie)]
    if not write:
        for block in order:
            assert buffers[block].to_bytearray() == content[block], f"block {block} came back wrong"

handle.shutdown()
print("PASS")

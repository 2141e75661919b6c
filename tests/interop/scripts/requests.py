"""Each kind of request through libnbd, with odd offsets and lengths, against a plain bytearray."""

import random
import sys

import nbd

SIZE = 4 << 20
STEPS = 400

handle = nbd.NBD()
handle.set_uri_allow_local_file(True)  # the certificates that a URI may name
handle.connect_uri(sys.argv[1])
seed = random.SystemRandom().randrange(2**32)
source = random.Random(seed)
model = bytearray(SIZE)

for step in range(STEPS):
    offset = source.randrange(SIZE)
    length = source.randrange(1, min(SIZE - offset, source.choice([10, 5000, 200_000])) + 1)
    action = source.choice(["write", "write", "zero", "zero-no-hole", "trim", "fua", "flush", "read"])
    where = f"seed {seed}, step {step}: {action} of {length} at {offset}"
    if action in {"write", "fua"}:
        payload = source.choice([source.randbytes(length), source.randbytes(8) * (length // 8 + 1)])[:length]
        handle.pwrite(payload, offset, nbd.CMD_FLAG_FUA if action == "fua" else 0)
        model[offset : offset + length] = payload
    elif action.startswith("zero"):
        handle.zero(length, offset, nbd.CMD_FLAG_NO_HOLE if action == "zero-no-hole" else 0)
        model[offset : offset + length] = bytes(length)
    elif action == "trim":
        handle.trim(length, offset)
        # What a trimmed range reads is the server's choice, so the model learns it; it must read as the old or zero.
        after = handle.pread(length, offset)
        before = model[offset : offset + length]
        assert all(new in {old, 0} for new, old in zip(after, before, strict=True)), where
        model[offset : offset + length] = after
    elif action == "flush":
        handle.flush()
    else:
        assert handle.pread(length, offset) == model[offset : offset + length], where
assert handle.pread(SIZE, 0) == model, f"seed {seed}: the end"

handle.shutdown()
print("PASS")

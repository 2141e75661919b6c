"""Power cuts: what a server writes is recorded as it leaves the process, and cut anywhere."""

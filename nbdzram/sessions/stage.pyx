"""How a session ends, and why: two enumerations that C and Python share (stage.pxd).

    OPEN ──> DRAINING ──> CLOSING ──> LOST ──> GONE      any stage may be left out, but for LOST before GONE
       └───> HALTED ────────┘
"""

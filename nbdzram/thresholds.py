"""From where on something is called trouble, by `top`, doctor, the status page and the alerts alike.

What is not Python has the numbers once more: tests/unit/metrics/test_thresholds.py holds those of the page and of
deploy/prometheus against these.
"""

from __future__ import annotations

NEAR_LIMIT = 0.9  # of mem_limit, of a quota
OVER_LIMIT = 1.005  # limits can be set below what is stored; a little is rounding
FULL_LEFT = 0.005  # of mem_limit: a pool that has no more left is full
FULL_LEAST_SHARE = 0.8  # below it KEPT_BYTES are much of a small pool
KEPT_BYTES = 192 << 10
"""A full pool has so much left at most: 64 KiB are kept for making room, and figures for strangers are rounded."""

CROWDED = 0.9  # of limits.connections
ROOM_LEAST = 0.05  # of the state directory's file system
CERTIFICATE_DAYS = 14
LATE_INTERVALS, LATE_SECONDS = 5, 60  # age of the newest checkpoint: so many intervals, and so long

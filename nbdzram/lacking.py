"""What the system says of an address that this machine does not have, or of a whole family.

IPv6 is often compiled in and not configured, or not there at all, while /etc/hosts calls ::1 localhost: of a name's
addresses those that are lacking are passed over, as long as one is left.
"""

from __future__ import annotations

import errno

NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT})
LACKING = frozenset({errno.EADDRNOTAVAIL}) | NO_FAMILY

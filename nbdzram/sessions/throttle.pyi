class Throttle:
    """How much the clients of one export may ask for a second. Any thread."""

    def limit(self, requests: tuple[int, int], traffic: tuple[int, int], seconds: int = 1) -> None:
        """(a second, at once) of requests, and of bytes; nothing a second: no limit; at once 0: a second's worth.

        From now on; whoever waits under the limits that there were is to be told (Plane.go_on). `seconds`: of a span
        in the place of a second, for tests, which let time pass as they like.
        """

UNFRAGMENTED_LIMIT: int
"""The largest READ with DF, bytes."""

LOGGED_ERRORS: int
"""Of one session; who errs more often is summed up when it leaves."""

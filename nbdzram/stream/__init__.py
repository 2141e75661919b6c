"""Exports as a sequence of checksummed records: what `send` writes and `receive` reads."""

"""The NBD server: listeners, connections and exports on asyncio, with a compiled hot path."""

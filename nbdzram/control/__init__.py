"""Talking to a running server: JSON-RPC 2.0 over a unix socket."""

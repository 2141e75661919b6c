"""The transmission phase: attached clients, served by threads that never take the interpreter lock."""

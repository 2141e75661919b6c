"""Tests of deploy/: what it says is read, checked by its own tools, and where they run here, run."""

"""Programs for whoever works on nbdzram; not part of the package."""

"""A network block device server whose disks live compressed and deduplicated in RAM."""

__version__ = "0.1.0"

"""Scans on disk, stored once and cut at random: arrays, the entries of a cache or store, its index, its building."""

from medformer.data.store.arrays import (
    MAX_OPEN,
    Scaled,
    compresses,
    cut,
    open_array,
    random_crop,
    suffix,
    write_array,
)

__all__ = ["MAX_OPEN", "Scaled", "compresses", "cut", "open_array", "random_crop", "suffix", "write_array"]

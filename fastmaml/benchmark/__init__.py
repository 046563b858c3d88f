"""The parts of `fastmaml bench`: problems, peers in plain torch, the exact answer, interleaved timing, peak memory.

The repository's bench/ folder builds on this package and adds other libraries.
"""

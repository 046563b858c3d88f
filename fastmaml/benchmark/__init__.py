"""What `fastmaml bench` measures with: problems, peers in plain torch, the exact answer, interleaved timing, peak memory.

The repository's bench/ folder builds on it and adds the other libraries.
"""

"""Training runs: configuration, trainer, checkpoints, metrics and evaluation.

Knows nothing of the command line.
"""

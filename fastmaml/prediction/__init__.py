"""Predicts time and memory of a run before it runs: `fastmaml plan`."""

"""The problem as plain data: parameters, rates, examples, losses and inner loops, with their checks.

Knows no backend, no engine and no algorithm.
"""

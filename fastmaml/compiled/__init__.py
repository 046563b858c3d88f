"""The only Python that touches fastmaml._C: loading it, calling its operators, asking it about schedules.

Knows no learner.
"""

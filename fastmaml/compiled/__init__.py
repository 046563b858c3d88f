"""The only Python that uses fastmaml._C: loads it, calls its operators, asks it about schedules.

Knows no learner.
"""

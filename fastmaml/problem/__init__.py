"""What is asked, as plain data: parameters, rates, examples, losses, inner loops and the checks of them.

Knows no backend, no engine and no algorithm.
"""

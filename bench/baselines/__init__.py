"""Other implementations of the same meta-gradient, one file each, and ours in the same form.

Each file has NAME, `version()` (raises Missing where it cannot be had) and `prepare(problem) -> call`; the call computes
one meta-gradient the way the library's users do and returns (mean query loss, gradient of each parameter).
"""

from __future__ import annotations


class Missing(Exception):
    """Why an implementation cannot run here or cannot run a case, in one sentence."""

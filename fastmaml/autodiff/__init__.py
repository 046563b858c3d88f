"""The adjoint sweep in Python over torch.func: runs any network, and is the yardstick of the compiled kernels.

Knows nothing of fastmaml._C.
"""

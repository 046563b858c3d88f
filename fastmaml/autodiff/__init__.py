"""The adjoint sweep in Python over torch.func. It runs any network; the compiled kernels are tested against it.

Knows nothing of fastmaml._C.
"""

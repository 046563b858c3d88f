"""Analyses CUDA kernels without a GPU, and tries them one by one. See README.md."""

"""CUDA kernels judged without a GPU, and tried one by one: see README.md."""

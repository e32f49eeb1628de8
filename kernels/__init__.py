"""The Triton kernels, installed as ``sam_fast.kernels``. The modules import triton, this package does not."""

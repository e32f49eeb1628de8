"""The Triton kernels, installed as ``sam_fast.kernels``. The GPU backends that use them are not in this version."""

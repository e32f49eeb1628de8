"""The Triton kernels, installed as ``sam_fast.kernels``. Importing this package does not import triton; its modules do."""

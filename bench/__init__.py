"""Benchmarks, of sam_fast against others: README.md in this folder."""

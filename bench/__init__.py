"""Benchmarks against the reference implementation.

Run them with ``pytest bench --benchmark-only``; see README.md in this folder.
"""

"""Which way of saving SAM's second pass keeps its accuracy: the experiment, run by ``python -m bench.quality``; docs/quality.md is its report."""

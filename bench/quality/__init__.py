"""The experiment: which ways to save SAM's second pass keep its accuracy. docs/quality.md is its report."""

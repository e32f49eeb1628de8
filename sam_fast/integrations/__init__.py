"""SAM in frameworks that own the training loop. Each module imports its framework; the package itself needs none."""

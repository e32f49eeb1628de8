"""Is SAM worth its time? ``python -m examples.fashion_mnist`` trains a small network with and without it."""

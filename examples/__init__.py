"""A package so that ``python -m examples.fashion_mnist`` finds this folder and no other of its name."""

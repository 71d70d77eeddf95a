"""The visit to a machine with a GPU: ``python -m benchmarks.gpu``."""

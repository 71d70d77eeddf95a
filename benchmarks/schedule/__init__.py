"""The schedule model, a discrete-event simulation of one launch: ``python -m benchmarks.schedule``."""

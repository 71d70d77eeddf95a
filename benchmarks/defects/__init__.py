"""Which check finds which planted defect: ``python -m benchmarks.defects``."""

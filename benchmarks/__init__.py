"""Benchmarks of a checkout: pytest-benchmark cases, the schedule model, and the results they wrote.

The harness itself is :mod:`fastlora.bench`, which an installed wheel has as well (``fastlora bench``).
"""

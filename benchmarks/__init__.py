"""Benchmarks of a checkout: commands, each a module or a package here, and the results that they wrote.

The harness itself is :mod:`fastlora.bench`, which an installed wheel has as well (``fastlora bench``).
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

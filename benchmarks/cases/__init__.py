"""The cases of fastlora.bench under pytest-benchmark: ``pytest -c benchmarks/cases/pytest.ini benchmarks/cases``."""

"""Benchmarks: `python -m bench.NAME`, or `python bench/NAME.py` from the root of the checkout."""

"""Benchmarks of fxckpt against its peers: `python bench/compare.py --help`."""

"""Parts of benchmarks/networks.py."""

"""Parts of benchmarks/tangent.py."""

"""What `benchmarks/faults.py` does to trainings, one module a kind of fault."""

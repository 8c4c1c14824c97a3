"""Parts of benchmarks/gpu.py. Each has `run(record, tiny)`; on a machine without CUDA they run on the CPU with `tiny`."""

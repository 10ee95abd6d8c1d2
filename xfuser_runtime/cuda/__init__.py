"""What only GPUs reach: captured calls, shared memory, work beside what travels, larger operations.

Nothing here is imported on a machine without CUDA, so proofs made on CPU do not depend on it. The
tests marked `gpu` and `benchmarks.exchange` hold it to what the rest computes.
"""

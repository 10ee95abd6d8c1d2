"""What only GPUs reach: memory that ranks share, and work beside what travels.

Nothing here is imported on a machine without CUDA, so proofs made on CPU do not depend on it; the
tests marked `cuda` and `benchmarks.exchange` hold it to what the rest computes.
"""

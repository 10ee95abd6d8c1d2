"""What only GPUs reach: memory that ranks share, and work beside what travels.

Nothing here is imported on a machine without CUDA, so proofs made on CPU do not depend on it. The
tests marked `gpu` and `benchmarks.exchange` hold it to what the rest computes.
"""

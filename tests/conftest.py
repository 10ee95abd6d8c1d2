"""Settings of the whole suite."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", ".pytest_cache/hypothesis")

import torch  # noqa: E402

# Ranks are forked from this process; a thread pool would not survive the fork, and ranks share cores.
torch.set_num_threads(1)

"""Same seed, same machine: same weights, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deterministic(*, threads: int, device: str) -> Iterator[None]:
    """Compute with ``threads`` CPU threads and reproducible kernels; put everything back afterwards.

    An operation that has no reproducible kernel on the device warns instead of failing: an unusual model is
    trained all the same. Random generators are also put back, so seeding inside does not leak.
    """
    if device == "cuda":
        # Read by cuBLAS when its first handle is made; without it matrix products may differ between runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    saved_threads = torch.get_num_threads()
    saved_mode = torch.are_deterministic_algorithms_enabled()
    saved_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    debugging: Any = (
        torch.utils.deterministic
    )  # its one attribute is declared where type checkers do not look
    saved_fill = debugging.fill_uninitialized_memory
    saved_cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    debugging.fill_uninitialized_memory = False  # an aid that costs a pass over all fresh memory
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(saved_threads)
        torch.use_deterministic_algorithms(saved_mode, warn_only=saved_warn_only)
        debugging.fill_uninitialized_memory = saved_fill
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = saved_cudnn


def seed_everything(seed: int, epoch: int) -> None:
    """Seed torch's generators (dropout, stochastic depth) for one epoch, on all devices.

    Each epoch has its own stream, so that a run resumed at an epoch sees the same numbers as one that was not
    interrupted.
    """
    digest = hashlib.sha256(f"training/{seed}/{epoch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

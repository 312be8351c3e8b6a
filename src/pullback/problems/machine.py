"""What the times were measured on, and how torch is set for measuring."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def machine(threads: int) -> dict[str, str | int]:
    """Names the machine, for the record beside the times.

    Args:
        threads: Threads that torch was allowed.

    Returns:
        The processor, the cores this process may use, threads, and the versions of Python, torch and the
        platform.
    """
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": threads,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
    }


@contextmanager
def measuring(threads: int) -> Iterator[None]:
    """Sets torch for measuring and puts everything back afterwards.

    Denormal numbers are flushed to zero: nearly converged float32 models run into them and then take up to
    ten times as long per step. The setting is undone because numpy warns about it. The global random state is
    kept as it was.

    Args:
        threads: Threads that torch may use.

    Yields:
        Nothing.
    """
    threads_before, flushed_before = torch.get_num_threads(), _flushes_denormals()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads_before)
        torch.set_flush_denormal(flushed_before)


def _flushes_denormals() -> bool:
    return torch.full((1,), 1e-310, dtype=torch.float64).mul(1.0).item() == 0.0


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # Not Linux.
    return platform.processor() or platform.machine()

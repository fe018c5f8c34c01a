"""Peak memory."""

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


def peak_megabytes(device: torch.device) -> float:
    """Peak memory so far, in MB: of the process, or on a GPU of what torch has allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a process starts with that of the one that started it.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    # macOS counts bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak(device: torch.device) -> None:
    """Restart the peak from the memory in use, without what loading needed for a moment; on a CPU, on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

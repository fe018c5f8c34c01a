"""Memory and kernels that the process keeps from one image to the next, and their limit."""

import ctypes
import os
from pathlib import Path

# Of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# oneDNN keeps 1024 kernels by default; an image pyramid has some sixty convolutions on each of its levels, each of a size of its own.
_CONVOLUTIONS = 8192
# In bytes, more than any packaged or published model needs for an image of 480x640 pixels.
_LIMIT = 3 << 29

# Where Linux says how many pages of the process are in memory.
_PAGES = Path("/proc/self/statm")


class _KeptMemory:
    """Freed memory that stays with the process, up to a limit."""

    def __init__(self):
        self.limit = None
        self.floor = 0

    def start(self, limit: int) -> None:
        self.limit, self.floor = limit, _resident()

    def bound(self) -> None:
        # Memory in use grows, too, by what the user holds and by oneDNN's kernels; it is what is left after all free memory is returned.
        if self.limit is not None and _resident() > self.floor + self.limit:
            ctypes.CDLL(None).malloc_trim(0)
            self.floor = _resident()


_kept = _KeptMemory()


def keep_between_images(limit: int = _LIMIT) -> bool:
    """Let the process keep freed memory and oneDNN's kernels from now on. It has to be called before the first convolution.

    Every image allocates and frees tensors of many megabytes. By default, glibc returns each of them to the system, which then takes time
    to provide the same memory again, zeroed; and oneDNN generates a convolution's code again when it has evicted the kernel of that size
    (docs/performance.md). The environment variable ONEDNN_PRIMITIVE_CACHE_CAPACITY is respected where it is set.

    Args:
        limit: bytes of freed memory that the process may keep, enforced by `bound_kept_memory`; default: 1.5 GiB.

    Returns:
        whether the C library can keep memory. Where it cannot, memory is handled as before.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_CONVOLUTIONS))
    # Windows has no library of the process itself.
    library = ctypes.CDLL(None) if os.name == "posix" else None
    # Without malloc_trim, the memory that images of many sizes leave behind would grow without a limit.
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim") and _PAGES.exists()):
        return False
    _kept.start(limit)
    return all(library.mallopt(*setting) for setting in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))


def bound_kept_memory() -> None:
    """Return freed memory to the system if it exceeds the limit of `keep_between_images`; predictors call this after their images.

    Images of many sizes leave free blocks of many sizes, few of which fit the next image.
    """
    _kept.bound()


def _resident() -> int:
    """Bytes of the process that are in memory."""
    return int(_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

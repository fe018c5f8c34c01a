"""Keeps freed memory and kernels of oneDNN from one image to the next, up to a limit."""

import ctypes
import os
from pathlib import Path

# Of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Number of kernels that oneDNN keeps; its default is 1024. An image pyramid runs about sixty convolutions on every level, each with its own
# kernel per size of images.
_CONVOLUTIONS = 8192
# In bytes, more than any packaged or published model needs for an image of 480x640 pixels.
_LIMIT = 3 << 29

# The file in which Linux reports the number of pages of the process that are in memory.
_PAGES = Path("/proc/self/statm")


class _KeptMemory:
    """Freed memory that stays with the process, up to a limit."""

    def __init__(self):
        self.limit = None
        self.floor = 0

    def start(self, limit: int) -> None:
        self.limit, self.floor = limit, _resident()

    def bound(self) -> None:
        # Memory in use also grows by objects of the user and by kernels of oneDNN; it is measured after all free memory is returned.
        if self.limit is not None and _resident() > self.floor + self.limit:
            ctypes.CDLL(None).malloc_trim(0)
            self.floor = _resident()


_kept = _KeptMemory()


def keep_between_images(limit: int = _LIMIT) -> bool:
    """Makes the process keep freed memory and kernels of oneDNN from now on. It has to be called before the first convolution.

    Every image allocates and frees tensors of many megabytes. By default, glibc returns each of them to the system, which then takes time
    to provide zeroed memory for the next image. oneDNN generates the code of a convolution again if it has evicted the kernel of that size
    (docs/performance.md). If the environment variable ONEDNN_PRIMITIVE_CACHE_CAPACITY is set, its value is kept.

    Args:
        limit: number of bytes of freed memory that the process may keep, enforced by `bound_kept_memory`; default: 1.5 GiB.

    Returns:
        Whether the C library can keep freed memory. If it cannot, memory is handled as before.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_CONVOLUTIONS))
    # Windows does not offer the C library of the process itself.
    library = ctypes.CDLL(None) if os.name == "posix" else None
    # Without malloc_trim, the memory that images of many sizes leave behind would grow without a limit.
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim") and _PAGES.exists()):
        return False
    _kept.start(limit)
    return all(library.mallopt(*setting) for setting in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))


def bound_kept_memory() -> None:
    """Returns freed memory to the system if it exceeds the limit of `keep_between_images`. Predictors call this after every batch.

    Images of many sizes leave free blocks of many sizes, few of which fit the next image.
    """
    _kept.bound()


def _resident() -> int:
    """The number of bytes of the process that are in memory."""
    return int(_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

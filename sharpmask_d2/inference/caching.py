"""What the process keeps for its next image, and how much of it."""

import ctypes
import os
from pathlib import Path

# Of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Of different sizes; oneDNN keeps 1024 of its own accord, and an image pyramid has some sixty convolutions on each of its levels.
_CONVOLUTIONS = 8192
# More than any packaged or published model takes for an image of 480x640 pixels, in bytes.
_MOST_KEPT = 3 << 29

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
        # What is in use grows, too, by what the user holds and by oneDNN's kernels: it is found out by giving back all else.
        if self.limit is not None and _resident() > self.floor + self.limit:
            ctypes.CDLL(None).malloc_trim(0)
            self.floor = _resident()


_kept = _KeptMemory()


def keep_between_images(most: int = _MOST_KEPT) -> bool:
    """Let the process keep freed memory and oneDNN's kernels, from now on; to be called before the first convolution.

    An image takes and frees tensors of many megabytes. Left alone, glibc hands each back to the system, which takes time to give out the
    same memory anew and empty; and oneDNN writes a convolution's code again when it has forgotten the size (docs/performance.md). The
    environment variable ONEDNN_PRIMITIVE_CACHE_CAPACITY stays as it is where it is set.

    Args:
        most: bytes of freed memory that are kept, as `bound_kept_memory` sees to it.

    Returns:
        whether the C library knows how to keep memory; where it does not, it goes on as before.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_CONVOLUTIONS))
    # Windows has no library of the process itself.
    library = ctypes.CDLL(None) if os.name == "posix" else None
    # Without malloc_trim, what images of many sizes leave behind would grow without end.
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim") and _PAGES.exists()):
        return False
    _kept.start(most)
    return all(library.mallopt(*setting) for setting in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))


def bound_kept_memory() -> None:
    """Give freed memory back to the system where it is more than `keep_between_images` may keep; predictors call this after their images.

    Images of many sizes leave gaps of many sizes, few of which the next image fills.
    """
    _kept.bound()


def _resident() -> int:
    """Bytes of the process that are in memory."""
    return int(_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

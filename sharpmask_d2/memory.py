"""Memory that the process keeps for its next image."""

import ctypes

# Of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, for the whole process and from now on.

    An image takes and frees tensors of many megabytes. Left alone, glibc hands each back to the system, which takes time to give out the
    same memory anew and empty: a fifth of an image's time and most of its variation (docs/performance.md).

    Returns:
        whether the C library knows how; where it does not, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt) and all(mallopt(*setting) for setting in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))

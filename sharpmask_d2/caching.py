"""What the process keeps for its next image."""

import ctypes
import os

# Of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Of different sizes; oneDNN keeps 1024 of its own accord, and an image pyramid has some sixty convolutions on each of its levels.
_CONVOLUTIONS = 8192


def keep_between_images() -> bool:
    """Let the process keep freed memory and oneDNN's kernels, from now on; to be called before the first convolution.

    An image takes and frees tensors of many megabytes. Left alone, glibc hands each back to the system, which takes time to give out the
    same memory anew and empty; and oneDNN writes a convolution's code again when it has forgotten the size (docs/performance.md). The
    environment variable ONEDNN_PRIMITIVE_CACHE_CAPACITY stays as it is where it is set.

    Returns:
        whether the C library knows how to keep memory; where it does not, it goes on as before.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_CONVOLUTIONS))
    # Windows has no library of the process itself.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return bool(mallopt) and all(mallopt(*setting) for setting in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))

"""Memory that one step frees stays with the process for the next one.

glibc gives the top of its heap back to the kernel when more than twice the largest block that was freed lies there. A
step frees all that its backward pass needed, and the next one asks for it again: thousands of pages of zeros a step.
The peak is the same.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 1 << 30  # bytes at the top of the heap that are kept
_LARGEST = 32 << 20  # of a block of the heap, the most that glibc allows; larger ones are the kernel's at once


def keep_freed_memory() -> bool:
    """Tell the C library, for the whole process; False where it is none that can be told (not glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))

"""One heap for all threads of the process, which gives back what it has free.

Each of a run's tasks has a thread of its own, and glibc gives threads heaps of their own, up to
eight for every core. What one block's statistics leave free in one heap no later block can use from
another, so that memory grew with the number of blocks while live tensors did not.

Nor does glibc return to the system what is free below the top of a heap, where what little is kept
of every block lies between what was freed: behind the gradients of SmolLM2's layers 1.6 of the
2.3 GB that a run held were free.
"""

import ctypes
import os

ARENA_MAX = -8  # glibc's name for the setting, M_ARENA_MAX
BY_USER = "MALLOC_ARENA_MAX"


def share_one_heap() -> None:
    """Lets threads that are started from now on use one heap; nothing where there is no glibc.

    The user's own ``MALLOC_ARENA_MAX`` stays.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and BY_USER not in os.environ:
        mallopt(ARENA_MAX, 1)


def give_back() -> None:
    """Returns to the system what the heap has free; nothing where there is no glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

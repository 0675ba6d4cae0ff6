"""How many cores one thread's computations use."""

from __future__ import annotations

import threading

import torch


def limit_threads(num_threads: int) -> None:
    """Makes the calling thread's operators use ``num_threads`` cores, and leaves other threads' as they are.

    The number that torch sets holds for the calling thread and for threads that compute for the first time later; for
    those a passing thread puts it back.
    """
    before = torch.get_num_threads()
    if num_threads == before:
        return
    torch.set_num_threads(num_threads)
    restorer = threading.Thread(target=torch.set_num_threads, args=(before,))
    restorer.start()
    restorer.join()

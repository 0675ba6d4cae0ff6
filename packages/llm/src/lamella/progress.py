"""Progress bars that leave nothing behind: no thread, no semaphore."""

from __future__ import annotations

import threading

from tqdm import tqdm


class Bar(tqdm):
    """A tqdm bar that starts no monitor thread, which would outlive every LLM, and locks within this process only."""

    monitor_interval = 0
    _lock = threading.RLock()

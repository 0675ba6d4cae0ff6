"""A worker: ``python -m lamella_executor.worker FD [PARENT_PID]``.

FD is the inherited socket that leads to rank 0. Started by a launcher, never by hand.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys


def main() -> int:
    """Runs the worker; returns the exit code of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is rank 0's to answer
    faulthandler.enable()  # a fault's stack goes to stderr, whose end rank 0 shows
    try:
        connection = socket.socket(fileno=int(sys.argv[1]))
        parent_pid = int(sys.argv[2]) if len(sys.argv) > 2 else os.getppid()
    except (IndexError, ValueError, OSError):
        sys.stderr.write(f"{__doc__}\n")
        return 2
    connection.set_inheritable(False)
    from lamella_executor.worker.channel import Channel
    from lamella_executor.worker.entry import run_worker

    return run_worker(Channel(connection), parent_pid)


if __name__ == "__main__":
    sys.exit(main())

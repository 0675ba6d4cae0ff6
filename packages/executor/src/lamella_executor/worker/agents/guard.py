"""Becomes the command it is given, with the kernel's promise to end it when its agent ends, however that happens.

Run as a file by an isolated interpreter (``python -I -S guard.py AGENT_PID COMMAND...``): it must import nothing of
Lamella, and an agent must not run Python between fork and exec, since the MPI library has threads. The promise
(PR_SET_PDEATHSIG, see prctl(2)) is tied to the thread that starts this process: the agent's main one.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
COMMAND_NOT_FOUND = 127
COMMAND_NOT_EXECUTABLE = 126


def become(command: list[str], environment: dict[str, str]) -> int:
    """Replaces this process by ``command``; returns an exit code, as shells choose it, only where that fails."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and the command would inherit that
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        sys.stderr.write(f"lamella-launch: cannot run {command[0]!r}: {error.strerror}\n")
        return COMMAND_NOT_FOUND if isinstance(error, FileNotFoundError) else COMMAND_NOT_EXECUTABLE


def main(agent_pid: int, command: list[str]) -> int:
    """Becomes ``command``, which the kernel kills when the agent has ended; returns an exit code only on failure."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != agent_pid:
        return 1
    return become(command, dict(os.environ))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))

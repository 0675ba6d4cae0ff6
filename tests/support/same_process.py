"""Runs a script and, in the same process, the Python scripts that it starts: what they import is imported once.

python same_process.py SCRIPT ARGUMENTS
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from typing import Any

_run = subprocess.run


def run_script(path: str, *arguments: str) -> None:
    """Runs it as the main module.

    Raises:
        SystemExit: it ended with an error.
    """
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def run(command: Any, *args: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, but for ``[sys.executable, script, ...]`` here and now."""
    if command[0] != sys.executable:
        return _run(command, *args, **options)
    run_script(*command[1:])
    return subprocess.CompletedProcess(command, 0)


if __name__ == "__main__":
    subprocess.run = run  # type: ignore[assignment]
    run_script(*sys.argv[1:])

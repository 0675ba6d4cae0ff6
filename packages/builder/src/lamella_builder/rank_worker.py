"""The process that builds one rank for `RankPool`: ``python -m lamella_builder.rank_worker``.

It reads its task, one line of JSON, from standard input and ends when that closes. It tells of its progress in lines of
JSON on what was its standard output: ``{"step": ...}`` when a step begins, then ``{"spec": ..., "entry": ...}`` or
``{"error": class, "message": ...}``. What else is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from lamella_core.errors import LamellaError


def main() -> None:
    """Builds the rank; exits with 0 once the result or an error has been told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption ends the parent, which ends this process
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _tell(out, _build(task, out))
    except LamellaError as error:
        _tell(out, {"error": type(error).__name__, "message": str(error)})
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent tells it with the rank
        traceback.print_exc()
        _tell(out, {"error": None, "message": f"{type(error).__name__}: {error}"})


def _build(task: dict[str, Any], out: TextIO) -> dict[str, Any]:
    from lamella_builder.rank_source import RankSource
    from lamella_builder.steps import StepClock
    from lamella_core.engine import EngineSpec
    from lamella_core.engine.writer import write_rank

    source, rank = RankSource.from_dict(task["source"]), task["rank"]
    if source.build_config.device == "cuda":
        import torch

        torch.cuda.set_device(task["device_index"])
    like = None if task["like"] is None else EngineSpec.from_dict(task["like"])
    told: set[str] = set()

    def progress(step: str, done: int, total: int) -> None:
        if step not in told:
            told.add(step)
            _tell(out, {"step": step})

    clock = StepClock(progress)
    engine = source.engine(rank, clock, like=like)
    with clock.step("write engine"):
        entry = write_rank(Path(task["directory"]), rank, engine.weights(rank))
    return {"spec": {**engine.spec.to_dict(), "step_seconds": clock.seconds}, "entry": entry}


def _tell(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _end_with_parent() -> None:
    """Waits for the end of standard input: the parent closed it, or is gone."""
    while sys.stdin.readline():
        continue
    os._exit(1)


if __name__ == "__main__":
    main()

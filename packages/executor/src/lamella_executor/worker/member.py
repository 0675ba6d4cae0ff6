"""Member: what rank 0 knows of one worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from lamella_executor.worker.messages import Failed
from lamella_executor.worker.process import WorkerProcess


@dataclass
class Member:
    """One worker as the watcher sees it; times are those of `time.monotonic`."""

    process: WorkerProcess
    heard_s: float  # when it last said something
    moved_s: float  # when its step number last changed
    greeted: bool = False
    phase: str = ""
    step: int = 0
    place: str = ""
    ready: list[str] = field(default_factory=list)  # phases it has finished and nobody has waited for yet
    failed: Failed | None = None
    broken: str | None = None  # what came over its channel instead of messages
    end: str | None = None  # how its process ended
    symptom_s: float | None = None  # when the first sign of its failure was seen
    symptom_phase: str = ""

    @property
    def rank(self) -> int:
        return self.process.rank

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.process.describe()})"

    def find_end(self) -> str | None:
        """Asks how the process ended, if it has."""
        if self.end is None:
            self.end = self.process.poll()
        return self.end

    @property
    def was_killed(self) -> bool:
        """Whether a signal from outside or a fault ended it, not itself: SIGABRT often only echoes another's end."""
        return self.failed is None and self.end is not None and "signal" in self.end and "SIGABRT" not in self.end

"""Member: what rank 0 knows of one worker, and how its end is put into words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lamella_core import __version__
from lamella_core.errors import WorkerError
from lamella_executor.worker.messages import Failed, Hello
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

    def see_symptom(self, phase: str) -> None:
        if self.symptom_s is None:
            self.symptom_s = time.monotonic()
            self.symptom_phase = phase

    def greet(self, hello: Hello) -> None:
        self.greeted = True
        self.ready.append("hello")
        if hello.version != __version__:
            text = f"it runs Lamella {hello.version}, rank 0 runs {__version__}; install one version for all ranks"
            self.failed = Failed(phase="launch", error="VersionMismatch", message=text, traceback="")
            self.see_symptom("launch")

    def find_end(self) -> str | None:
        """Asks how the process ended, if it has."""
        if self.end is None:
            self.end = self.process.poll()
        return self.end

    @property
    def was_killed(self) -> bool:
        """Whether a signal from outside or a fault ended it, not itself: SIGABRT often only echoes another's end."""
        return self.failed is None and self.end is not None and "signal" in self.end and "SIGABRT" not in self.end


def find_culprit(struck: Sequence[Member]) -> Member:
    """Returns whose failure caused the others': ranks that lose a peer in a collective fail too, a moment later."""
    return min(struck, key=lambda member: (not member.was_killed, member.symptom_s))


def describe_death(culprit: Member, struck: Sequence[Member]) -> WorkerError:
    """Puts into words how a worker died or failed, and who failed with it."""
    failed = culprit.failed
    if failed is not None:
        text = f"{culprit.name} failed in phase {failed.phase}: {failed.error}: {failed.message}"
        detail = failed.traceback
    else:
        how = culprit.end or culprit.broken or "closed its connection to rank 0, though its process lives"
        text = f"{culprit.name} {how} in phase {culprit.symptom_phase}, after {culprit.step} steps"
        if "SIGKILL" in how:
            text += "; if nobody killed it, its machine ran out of memory (see dmesg)"
        words = culprit.process.last_words()
        detail = f"The last it wrote:\n{words}" if words else ""
    others = [_brief(member) for member in struck if member is not culprit]
    parts = [text, detail.rstrip(), f"After it: {'; '.join(others)}" if others else ""]
    return WorkerError("\n".join(part for part in parts if part))


def _brief(member: Member) -> str:
    if member.failed is not None:
        return f"rank {member.rank}: {member.failed.error}: {member.failed.message.splitlines()[0][:200]}"
    return f"rank {member.rank} {member.end or 'lost its connection'}"


def describe_silence(member: Member, phase: str, silent_s: float, limit_s: float) -> WorkerError:
    """Puts into words that a worker no longer sends heartbeats."""
    state = member.process.state() or "why is not known"
    where = f", last seen at {member.place}" if member.place else ""
    return WorkerError(
        f"{member.name} has been silent for {silent_s:.1f} s in phase {phase}, after {member.step} steps{where}: "
        f"{state}; if it was only slow, raise worker_timeout_s (silence is fatal after {limit_s:g} s)"
    )


def describe_stall(late: Sequence[Member], step: int, limit_s: float, phase: str) -> WorkerError:
    """Puts into words that workers live but do not finish the step that rank 0 waits for."""
    where = "; ".join(f"{member.name} after {member.step} steps, at {member.place or 'unknown'}" for member in late)
    return WorkerError(
        f"rank 0 has waited {limit_s:g} s in phase {phase} for step {step}, which is stuck: {where}; if steps may take "
        "that long, raise worker_timeout_s"
    )

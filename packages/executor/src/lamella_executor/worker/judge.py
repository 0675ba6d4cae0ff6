"""Judge: decides from what workers say, and do not say, whether one has failed, which one, and puts it into words."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lamella_core import __version__
from lamella_core.errors import WorkerError
from lamella_executor.worker.channel import ChannelError
from lamella_executor.worker.member import Member
from lamella_executor.worker.messages import Failed, Heartbeat, Hello, Log, Ready

START_TIMEOUT_S = 60.0  # until a worker's first word: a Python interpreter starts, perhaps from a slow network disk
SETTLE_S = 0.3  # from the first sign of a failure to the verdict: what one death causes elsewhere must not hide it
SETTLE_UNKNOWN_S = 1.5  # the same while it is not known how a process ended


class Judge:
    """Used by the watcher thread alone, except for ``phase`` and ``expected``. Times are those of `time.monotonic`.

    Attributes:
        members: the workers.
        phase: what the engine is at, for messages; set by any thread.
        expected: the step that rank 0 waits for, and since when; set by any thread.
    """

    def __init__(self, members: Sequence[Member] = (), *, timeout_s: float, stall_timeout_s: float) -> None:
        self.members = members
        self.phase = "launch"
        self.expected: tuple[int, float] | None = None
        self._timeout_s = timeout_s
        self._stall_timeout_s = stall_timeout_s

    def hear(self, member: Member, message: object, now: float) -> None:
        """Takes note of what a worker says.

        Raises:
            ChannelError: no worker says that.
        """
        member.heard_s = now
        if isinstance(message, Heartbeat):
            if message.step != member.step:
                member.moved_s = now
            member.phase, member.step, member.place = message.phase, message.step, message.place
        elif isinstance(message, Hello):
            self._greet(member, message, now)
        elif isinstance(message, Ready):
            member.ready.append(message.phase)
        elif isinstance(message, Failed):
            member.failed = message
            self.suspect(member, now)
        elif isinstance(message, Log):
            logging.getLogger(f"{__package__}.rank{member.rank}").log(message.level, "%s", message.text)
        else:
            raise ChannelError(f"sent a {type(message).__name__}, which no worker sends")

    def _greet(self, member: Member, hello: Hello, now: float) -> None:
        member.greeted = True
        member.ready.append("hello")
        if hello.version != __version__:
            text = f"it runs Lamella {hello.version}, rank 0 runs {__version__}; install one version for all ranks"
            self.hear(member, Failed(phase="launch", error="VersionMismatch", message=text, traceback=""), now)

    def suspect(self, member: Member, now: float) -> None:
        """Takes note of a first sign that a worker has failed: it ended, said so, or closed its channel."""
        if member.symptom_s is None:
            member.symptom_s = now
            member.symptom_phase = self.phase

    def forgive(self, gap_s: float) -> None:
        """Discounts a time in which nobody listened."""
        for member in self.members:
            member.heard_s += gap_s
            member.moved_s += gap_s

    @property
    def is_settling(self) -> bool:
        """Whether a failure has shown and the verdict is still open."""
        return any(member.symptom_s is not None for member in self.members)

    def verdict(self, now: float) -> WorkerError | None:
        """Returns what has failed; None while nothing has, or what caused it may still show."""
        signs = [(member.symptom_s, member) for member in self.members if member.symptom_s is not None]
        if not signs:
            return self._find_silence(now) or self._find_stall(now)
        struck = [member for _, member in signs]
        is_clear = all(member.failed or member.end or member.broken for member in struck)
        settle_s = SETTLE_S if is_clear else SETTLE_UNKNOWN_S
        all_struck = is_clear and len(struck) == len(self.members)
        if not all_struck and now < min(seen_s for seen_s, _ in signs) + settle_s:
            return None
        return _describe_death(_find_culprit(struck), struck)

    def _find_silence(self, now: float) -> WorkerError | None:
        for member in self.members:
            limit_s = self._timeout_s if member.greeted else max(self._timeout_s, START_TIMEOUT_S)
            if now - member.heard_s > limit_s:
                return _describe_silence(member, self.phase, now - member.heard_s, limit_s)
        return None

    def _find_stall(self, now: float) -> WorkerError | None:
        expected = self.expected
        if expected is None:
            return None
        step, since = expected
        behind = [member for member in self.members if member.step < step]
        late = [member for member in behind if now - max(member.moved_s, since) > self._stall_timeout_s]
        if not late or len(late) < len(behind):  # who still moves is waited for
            return None
        last = min(member.step for member in late)
        return _describe_stall([m for m in late if m.step == last], step, self._stall_timeout_s, self.phase)


def _find_culprit(struck: Sequence[Member]) -> Member:
    """Returns whose failure caused the others': ranks that lose a peer in a collective fail too, a moment later."""
    return min(struck, key=lambda member: (not member.was_killed, member.symptom_s))


def _describe_death(culprit: Member, struck: Sequence[Member]) -> WorkerError:
    """Puts into words how a worker died or failed, and who failed with it."""
    failed = culprit.failed
    if failed is not None:
        text = f"{culprit.name} failed in phase {failed.phase}: {failed.error}: {failed.message}"
        detail = failed.traceback
    else:
        how = culprit.end or culprit.broken or "closed its channel, though its process lives,"
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
        first_line = member.failed.message.partition("\n")[0][:200]
        return f"rank {member.rank}: {member.failed.error}: {first_line}"
    return f"rank {member.rank} {member.end or 'closed its channel'}"


def _describe_silence(member: Member, phase: str, silent_s: float, limit_s: float) -> WorkerError:
    """Puts into words that a worker no longer sends heartbeats."""
    state = member.process.state() or "why is not known"
    where = f", last seen at {member.place}" if member.place else ""
    return WorkerError(
        f"{member.name} has been silent for {silent_s:.1f} s in phase {phase}, after {member.step} steps{where}: "
        f"{state}; if it was only slow, raise worker_timeout_s (silence is fatal after {limit_s:g} s)"
    )


def _describe_stall(late: Sequence[Member], step: int, limit_s: float, phase: str) -> WorkerError:
    """Puts into words that workers live but do not finish the step that rank 0 waits for."""
    where = "; ".join(f"{member.name} after {member.step} steps, at {member.place or 'unknown'}" for member in late)
    return WorkerError(
        f"rank 0 has waited {limit_s:g} s in phase {phase} for step {step}, which is stuck: {where}; if steps may take "
        "that long, raise worker_timeout_s"
    )

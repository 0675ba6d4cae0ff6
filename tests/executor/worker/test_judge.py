"""Judge: which worker failed, from what all of them said and when; no process and no clock needed."""

from __future__ import annotations

import logging

import pytest
from tests.support.worker_crews import make_setup

from lamella_core import __version__
from lamella_executor.worker.channel import ChannelError
from lamella_executor.worker.judge import SETTLE_S, SETTLE_UNKNOWN_S, START_TIMEOUT_S, Judge
from lamella_executor.worker.member import Member
from lamella_executor.worker.messages import Failed, Heartbeat, Hello, Log, Ready

KILLED = "was killed by signal 9 (SIGKILL)"
ABORTED = "was killed by signal 6 (SIGABRT)"
LOST_PEER = Failed("decode", "RuntimeError", "Connection closed by peer\nmore", "Traceback")


class StillProcess:
    """A process about which is known what a test says."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.words = ""

    def describe(self) -> str:
        return f"pid {100 + self.rank}"

    def state(self) -> str | None:
        return "it is stopped (SIGSTOP?)"

    def last_words(self) -> str:
        return self.words


@pytest.fixture
def judge() -> Judge:
    """Over ranks 1 to 3, all of which said hello at time 0."""
    members = [Member(StillProcess(rank), 0.0, 0.0) for rank in (1, 2, 3)]
    judge = Judge(members, timeout_s=2.0, stall_timeout_s=4.0)
    for member in members:
        judge.hear(member, Hello(1, __version__), 0.0)
    judge.phase = "decode"
    return judge


def end(judge: Judge, rank: int, how: str, now: float) -> None:
    judge.members[rank - 1].end = how
    judge.suspect(judge.members[rank - 1], now)


def beat(judge: Judge, now: float, **steps: int) -> None:
    for name, step in steps.items():
        judge.hear(judge.members[int(name[-1]) - 1], Heartbeat("decode", step, "runner.py:7 in run"), now)


def test_nothing_is_wrong_while_all_are_heard(judge) -> None:
    for tick in range(20):
        beat(judge, float(tick), rank1=0, rank2=0, rank3=0)
        assert judge.verdict(tick + 1.9) is None


def test_who_was_killed_is_named_though_another_complained_first(judge) -> None:
    judge.hear(judge.members[0], LOST_PEER, 1.0)
    end(judge, 3, ABORTED, 1.01)
    end(judge, 2, KILLED, 1.02)
    text = str(judge.verdict(1.02))  # all have spoken: no more to wait for
    assert text.startswith(f"rank 2 (pid 102) {KILLED} in phase decode")
    assert text.endswith("After it: rank 1: RuntimeError: Connection closed by peer; rank 3 " + ABORTED)


def test_the_first_of_several_failures_is_the_cause(judge) -> None:
    judge.hear(judge.members[1], Failed("load", "CheckpointError", "no such file", "Traceback: here"), 1.0)
    judge.hear(judge.members[0], LOST_PEER, 1.1)
    end(judge, 3, ABORTED, 1.1)
    text = str(judge.verdict(1.1))
    assert text.startswith("rank 2 (pid 102) failed in phase load: CheckpointError: no such file\nTraceback: here\n")


def test_the_verdict_waits_for_what_a_first_sign_may_hide(judge) -> None:
    judge.hear(judge.members[0], LOST_PEER, 1.0)
    assert judge.is_settling
    assert judge.verdict(1.0 + SETTLE_S - 0.01) is None
    assert "rank 1" in str(judge.verdict(1.0 + SETTLE_S))


def test_the_verdict_waits_longer_for_how_a_process_ended(judge) -> None:
    judge.suspect(judge.members[0], 1.0)  # its channel was closed
    judge.phase = "prefill"  # what rank 0 went on to does not matter
    assert judge.verdict(1.0 + SETTLE_UNKNOWN_S - 0.01) is None
    text = str(judge.verdict(1.0 + SETTLE_UNKNOWN_S))
    assert text.startswith("rank 1 (pid 101) closed its channel, though its process lives, in phase decode")
    end(judge, 1, "exited with code 0", 1.2)
    assert judge.verdict(1.0 + SETTLE_S) is not None


def test_the_last_words_of_who_said_nothing_are_told(judge) -> None:
    judge.members[0].process.words = "terminate called after throwing"
    end(judge, 1, ABORTED, 1.0)
    assert str(judge.verdict(2.0)).endswith("after 0 steps\nThe last it wrote:\nterminate called after throwing")


def test_the_silent_one_is_named_with_its_state(judge) -> None:
    beat(judge, 1.0, rank1=5, rank2=5, rank3=5)
    beat(judge, 2.0, rank1=5, rank3=5)
    assert judge.verdict(3.0) is None
    text = str(judge.verdict(3.1))
    assert text.startswith("rank 2 (pid 102) has been silent for 2.1 s in phase decode, after 5 steps")
    assert "runner.py:7 in run: it is stopped (SIGSTOP?)" in text
    assert "raise worker_timeout_s (silence is fatal after 2 s)" in text


def test_a_time_in_which_nobody_listened_is_no_silence(judge) -> None:
    judge.expected = (1, 0.0)
    judge.forgive(100.0)
    assert judge.verdict(101.9) is None
    assert "silent" in str(judge.verdict(102.1))


def test_the_first_word_may_take_longer() -> None:
    judge = Judge([Member(StillProcess(1), 0.0, 0.0)], timeout_s=2.0, stall_timeout_s=2.0)
    assert judge.verdict(START_TIMEOUT_S - 1) is None
    assert "silent for 61.0 s in phase launch" in str(judge.verdict(START_TIMEOUT_S + 1))


class TestStalls:
    def test_who_stays_behind_is_named_with_its_place(self, judge) -> None:
        judge.expected = (5, 10.0)
        beat(judge, 13.9, rank1=5, rank2=4, rank3=5)
        judge.members[1].moved_s = 9.0
        assert judge.verdict(14.0) is None
        text = str(judge.verdict(14.1))
        assert "rank 2 (pid 102) after 4 steps, at runner.py:7 in run" in text
        assert "rank 0 has waited 4 s in phase decode for step 5" in text
        assert "rank 1" not in text

    def test_of_several_the_last_is_the_cause(self, judge) -> None:
        judge.expected = (5, 10.0)
        beat(judge, 11.0, rank1=4, rank2=3, rank3=4)
        beat(judge, 15.0, rank1=4, rank2=3, rank3=4)
        text = str(judge.verdict(15.1))
        assert "rank 2" in text
        assert "rank 1 " not in text

    def test_steps_that_go_on_are_waited_for(self, judge) -> None:
        judge.expected = (30, 0.0)
        for step in range(1, 29):
            beat(judge, float(step), rank1=30, rank2=step, rank3=0)
            assert judge.verdict(float(step)) is None

    def test_an_idle_worker_is_not_stalled(self, judge) -> None:
        judge.expected = (5, 10.0)
        beat(judge, 50.0, rank1=5, rank2=5, rank3=5)
        assert judge.verdict(51.0) is None
        judge.expected = None
        beat(judge, 90.0, rank1=4, rank2=4, rank3=4)
        assert judge.verdict(91.0) is None


def test_another_version_is_refused(judge) -> None:
    judge.hear(judge.members[0], Hello(1, "0.0.7"), 1.0)
    assert "it runs Lamella 0.0.7, rank 0 runs" in str(judge.verdict(2.0))


def test_a_message_that_only_rank_0_sends_is_refused(judge) -> None:
    with pytest.raises(ChannelError, match="Setup"):
        judge.hear(judge.members[0], make_setup(2), 1.0)


def test_ready_counts_for_each_time_it_is_said(judge) -> None:
    for _ in range(2):
        judge.hear(judge.members[0], Ready("load"), 1.0)
    assert judge.members[0].ready == ["hello", "load", "load"]


def test_a_workers_log_record_is_this_processs(judge, caplog) -> None:
    judge.hear(judge.members[1], Log(logging.ERROR, "disk full: 100 %s"), 1.0)
    assert caplog.record_tuples == [("lamella_executor.worker.rank2", logging.ERROR, "disk full: 100 %s")]

"""A loop without a model: each step gives every request one more token. For tests of the executor's boundary."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lamella_executor.admission import EngineLimits
from lamella_executor.executor import GenerationExecutor
from lamella_executor.mailbox import Submit
from lamella_executor.request import CompletionOutput, RequestStatus, RequestUpdate

LIMITS = EngineLimits(vocab_size=100, max_seq_len=64, max_batch_size=4, max_num_tokens=32, eos_token_ids=(2,))


class EchoLoop:
    """Generates 10, 11, 12, ...; ``gate`` (open by default) makes it wait before each step."""

    needs_host = False

    def __init__(self, break_at: int | None = None) -> None:
        self.active: dict[int, tuple[Submit, list[int]]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.num_steps = 0
        self.break_at = break_at

    @property
    def has_work(self) -> bool:
        return bool(self.active)

    def submit(self, command: Submit) -> None:
        self.active[command.request.request_id] = (command, [])

    def abort(self, request_id: int) -> None:
        entry = self.active.pop(request_id, None)
        if entry:
            command, tokens = entry
            output = CompletionOutput(0, token_ids=tokens, finish_reason="cancelled")
            command.result.publish(RequestUpdate(RequestStatus.CANCELLED, outputs=[output]))

    def step(self) -> None:
        self.gate.wait(10)
        self.num_steps += 1
        if self.num_steps == self.break_at:
            raise ArithmeticError("the loop is broken")
        for request_id, (command, tokens) in list(self.active.items()):
            if not tokens:
                command.result.publish(RequestUpdate(RequestStatus.RUNNING))
            tokens.append(10 + len(tokens))
            is_last = len(tokens) == command.request.max_tokens
            if is_last or command.result.streaming:
                output = CompletionOutput(
                    0, "".join(f"{t} " for t in tokens), list(tokens), finish_reason="length" if is_last else None
                )
                status = RequestStatus.FINISHED if is_last else RequestStatus.RUNNING
                command.result.publish(RequestUpdate(status, outputs=[output]))
            if is_last:
                del self.active[request_id]

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        for command, _ in self.active.values():
            command.fail(make_error())
        self.active.clear()

    def abandon(self, make_error: Callable[[], Exception]) -> None:
        left, self.active = self.active, {}
        for command, _ in left.values():
            command.fail(make_error())


def echo_executor(loop: EchoLoop | None = None) -> GenerationExecutor:
    return GenerationExecutor(loop or EchoLoop(), LIMITS)

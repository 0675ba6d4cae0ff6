"""ScoringExecutor: an engine of a model that scores texts, served from a background thread; no tokenizer needed."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from lamella_core.errors import ConfigError, RequestError
from lamella_core.models.registry import get_model_class
from lamella_executor.admission import EngineLimits, check_token_ids
from lamella_executor.assemble import engine_limits, load_engine
from lamella_executor.engine_thread import STOP_TIMEOUT_S, EngineThread
from lamella_executor.mailbox import Mailbox
from lamella_executor.scoring.loop import ScoreRequest, ScoringLoop

if TYPE_CHECKING:
    from lamella_core.engine import Engine


def is_scoring(engine: Engine) -> bool:
    """Whether an engine's model scores texts, which `ScoringExecutor` serves, rather than generates."""
    config = engine.spec.model
    return get_model_class(config.architecture, config.model_type).task == "score"


class ScoringExecutor:
    """Scores texts in batches of whole texts. Every method may be called from any thread.

    Use it as a context manager, call `shutdown`, or drop it: its thread ends after the step that runs, and texts that
    wait fail with EngineDeadError.
    """

    def __init__(self, loop: ScoringLoop, limits: EngineLimits, num_types: int, scores_tokens: bool) -> None:
        """Starts the thread; users call `create`.

        Args:
            loop: the executor takes it over.
            limits: checked before a text is accepted.
            num_types: parts that a text can have.
            scores_tokens: whether scores are those of tokens rather than of the text.
        """
        self._limits, self._num_types, self._scores_tokens = limits, num_types, scores_tokens
        self._mailbox = Mailbox()
        self._thread = EngineThread(loop, self._mailbox)
        self._finalizer = weakref.finalize(self, self._thread.request_stop)
        self._finalizer.atexit = False  # EngineThread has its own, which waits

    @classmethod
    def create(
        cls,
        engine: Engine | str | Path,
        *,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
    ) -> ScoringExecutor:
        """Loads an engine and starts serving.

        Args:
            engine: an `Engine`, or the directory of a saved one, for one rank.
            max_batch_size: lowers the engine's own limit of texts per step.
            max_num_tokens: lowers the engine's own limit of tokens per step.

        Raises:
            CheckpointError: the directory is no engine, or is damaged.
            ConfigError: the model generates text, or options contradict the engine.
        """
        engine = load_engine(engine)
        engine.check_processes(1)
        if not is_scoring(engine):
            raise ConfigError(
                f"{engine.spec.model.architecture} generates text and has no scores; use GenerationExecutor"
            )
        limits = engine_limits(engine, max_batch_size, max_num_tokens)
        model = engine.model()
        model.set_max_seq_len(limits.max_seq_len)
        if engine.device == "cuda":
            import torch

            from lamella_executor.runner.cuda.start import move_weights  # imports what a CPU has no use for

            move_weights(model, torch.device("cuda"))
        loop = ScoringLoop(model, max_batch_size=limits.max_batch_size, max_num_tokens=limits.max_num_tokens)
        return cls(loop, limits, getattr(model.config, "type_vocab_size", 1), model.pooling == "tokens")

    @property
    def limits(self) -> EngineLimits:
        """What bounds each text."""
        return self._limits

    @property
    def scores_tokens(self) -> bool:
        """Whether `score` returns the scores of tokens rather than of the text."""
        return self._scores_tokens

    @property
    def is_alive(self) -> bool:
        """Whether texts are accepted."""
        return not self._mailbox.is_closed

    def score(
        self,
        token_ids: SequenceOf[int],
        *,
        token_types: SequenceOf[int] | None = None,
        rows: SequenceOf[int] | None = None,
    ) -> Future[Tensor]:
        """Submits one text and returns at once.

        Args:
            token_ids: the text, special tokens included; at least one.
            token_types: which part of the text each token is in (a pair's second sentence: 1); None: all in the first.
            rows: of a model that scores tokens, which of them; None: all.

        Returns:
            The future of the scores as they leave the output layer, float32 on the host: [labels], or [rows, labels].
            It fails with StepError if the step does, and with EngineDeadError if the executor stops.

        Raises:
            RequestError: the text cannot be scored here; the message names the field, the value and what is allowed.
            EngineDeadError: the executor was shut down or its engine died.
        """
        if not self.is_alive:
            raise self._mailbox.dead_error()
        ids = check_token_ids("token_ids", token_ids, self._limits.vocab_size)
        if not 1 <= len(ids) <= self._limits.max_seq_len:
            raise RequestError(
                f"the text has {len(ids)} tokens; this engine takes 1 to {self._limits.max_seq_len}. Shorten it, or "
                "build the engine with a larger max_seq_len if the model allows"
            )
        types = None if token_types is None else _below("token_types", token_types, self._num_types)
        if types is not None and len(types) != len(ids):
            raise RequestError(f"token_types has {len(types)} entries for {len(ids)} tokens; give one for each")
        if rows is not None and not self._scores_tokens:
            raise RequestError("rows is for models that score tokens; this one scores whole texts, leave it out")
        wanted = None if rows is None else _below("rows", rows, len(ids))
        request = ScoreRequest(ids, types, wanted)
        self._mailbox.put(request)
        return request.future

    def shutdown(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Stops the engine and waits at most ``timeout`` seconds for its thread. Idempotent."""
        self._finalizer.detach()
        self._thread.stop(timeout)

    def __enter__(self) -> ScoringExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _below(name: str, values: SequenceOf[int], size: int) -> list[int]:
    """Returns integers of 0 .. size - 1 as a new list."""
    try:
        out = [operator.index(value) for value in values]
    except TypeError as error:
        raise RequestError(f"{name} must be a list of integers ({error})") from None
    if out and not (0 <= min(out) and max(out) < size):
        raise RequestError(f"{name} holds {min(out)} .. {max(out)}; allowed are 0 .. {size - 1}")
    return out

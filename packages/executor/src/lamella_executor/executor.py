"""GenerationExecutor: an engine that serves token-id requests from a background thread; no tokenizer needed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, overload

from lamella_core.checks import check_integer, check_number
from lamella_core.errors import ConfigError, RequestError
from lamella_executor.admission import EngineLimits, make_request
from lamella_executor.config import KvCacheConfig, SchedulerConfig
from lamella_executor.engine_thread import STOP_TIMEOUT_S, EngineThread, Loop
from lamella_executor.mailbox import Mailbox, Submit
from lamella_executor.result import GenerationResult
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.sequence import RequestState, TextDecoder
from lamella_executor.stats import IterationStats, StatsBuffer

if TYPE_CHECKING:
    from lamella_core.engine import Engine
    from lamella_executor.worker.recipe import EngineRecipe

PromptIds = SequenceOf[int]


class GenerationExecutor:
    """Serves requests by in-flight batching. Every method may be called from any thread.

    Use it as a context manager, call `shutdown`, or drop it: in each case its thread ends after the step that runs, and
    requests that are not done fail with EngineDeadError. It also ends when the interpreter exits. A forked child has no
    engine: there every call that needs one raises EngineDeadError.
    """

    def __init__(
        self,
        loop: Loop,
        limits: EngineLimits,
        *,
        stats: StatsBuffer | None = None,
        check_fits: Callable[[RequestState], None] | None = None,
        close: Callable[[], None] | None = None,
        connect: Callable[[Callable[[BaseException], None]], None] | None = None,
    ) -> None:
        """Starts the thread around a loop made elsewhere; users call `create`.

        Args:
            loop: the executor takes it over; only its thread may touch it afterwards.
            limits: checked before a request is accepted.
            stats: the buffer that the loop fills.
            check_fits: raises RequestError for a request whose KV cache can never fit; called on submitting threads.
            close: called once by the engine's thread when it ends; gives back a device's memory.
            connect: called with a function that ends the executor from outside of the loop, for a given cause.
        """
        self._limits = limits
        self._stats = stats or StatsBuffer()
        self._check_fits = check_fits
        self._ids = itertools.count(1)
        self._mailbox = Mailbox()
        self._thread = EngineThread(loop, self._mailbox, close)
        if connect is not None:
            connect(self._thread.die)
        self._finalizer = weakref.finalize(self, self._thread.request_stop)
        self._finalizer.atexit = False  # EngineThread has its own, which waits

    @classmethod
    def create(
        cls,
        engine: Engine | EngineRecipe | str | Path,
        kv_cache_config: KvCacheConfig | None = None,
        scheduler_config: SchedulerConfig | None = None,
        *,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        stats_capacity: int = 1000,
        attn_backend: str = "auto",
        worker_timeout_s: float = 30.0,
    ) -> GenerationExecutor:
        """Loads an engine, allocates its KV cache and starts serving.

        An engine for several ranks starts a process for each but rank 0, which runs here (see docs/distributed.md).

        Args:
            engine: an `Engine`, the directory of a saved one, or an `EngineRecipe` that each rank gets its shard from.
            kv_cache_config: size and behaviour of the KV cache; see `lamella_executor.memory` for the default size.
            scheduler_config: admission policy.
            max_batch_size: lowers the engine's own limit.
            max_num_tokens: lowers the engine's own limit of tokens per step.
            stats_capacity: iterations that `get_stats` remembers.
            attn_backend: on a GPU: "triton", "flashinfer" (``pip install 'lamella[cuda]'``), "torch" (slow), or "auto".
            worker_timeout_s: seconds after which another rank that gives no sign of life counts as dead.

        Raises:
            CheckpointError: the directory is no engine, or is damaged.
            ConfigError: options contradict the engine, or it is for more ranks than there are GPUs.
            WorkerError: another rank's process failed while it started.
            OutOfMemoryError: weights or KV cache do not fit in memory, or the cache is too small for one token.
        """
        _check_configs(kv_cache_config, scheduler_config)
        check_integer("stats_capacity", stats_capacity, 0)
        check_number("worker_timeout_s", worker_timeout_s, positive=True)
        from lamella_executor.assemble import assemble  # imports torch; keeps `import lamella_executor` light

        parts = assemble(
            engine,
            kv_cache_config or KvCacheConfig(),
            scheduler_config or SchedulerConfig(),
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            stats_capacity=stats_capacity,
            attn_backend=attn_backend,
            worker_timeout_s=worker_timeout_s,
        )
        return cls(
            parts.loop,
            parts.limits,
            stats=parts.stats,
            check_fits=parts.check_fits,
            close=parts.close,
            connect=parts.connect,
        )

    @property
    def limits(self) -> EngineLimits:
        """What bounds each request."""
        return self._limits

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted."""
        return not self._mailbox.is_closed

    @overload
    def generate(
        self, prompt_token_ids: PromptIds, sampling_params: SamplingParams | None = None
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompt_token_ids: SequenceOf[PromptIds],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompt_token_ids: PromptIds | SequenceOf[PromptIds],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Generates for one prompt or a list of prompts and waits; results keep the order.

        Args:
            prompt_token_ids: token ids, or a list of them; one in, one out.
            sampling_params: one for all prompts, or one per prompt.

        Raises:
            RequestError: a prompt or its parameters are invalid (nothing runs then), or a request failed.
            EngineDeadError: the engine stopped.
        """
        if not _is_batch(prompt_token_ids):
            if isinstance(sampling_params, list | tuple):
                raise RequestError("sampling_params is a list for a single prompt; pass one SamplingParams")
            return self._run([self.prepare(prompt_token_ids, sampling_params)])[0]  # type: ignore[arg-type]
        all_params = _per_prompt(sampling_params, len(prompt_token_ids))
        return self._run([self.prepare(p, s) for p, s in zip(prompt_token_ids, all_params)])  # type: ignore[arg-type]

    def generate_async(
        self,
        prompt_token_ids: PromptIds,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        *,
        decoder: TextDecoder | None = None,
        bad_words_ids: Iterable[PromptIds] = (),
    ) -> GenerationResult:
        """Submits one request and returns at once, or in a moment where the engine is just launching a step on a GPU.

        Args:
            prompt_token_ids: at least one token id.
            sampling_params: default: ``SamplingParams()``, greedy.
            streaming: publish outputs after every step rather than at the end only.
            decoder: makes the outputs' text; needed for stop strings. The request owns it from now on.
            bad_words_ids: token sequences that must not be generated, the tokenized ``sampling_params.bad``.

        Raises:
            RequestError: the request is invalid; names the field, its value, what is allowed and the remedy.
            EngineDeadError: the executor was shut down or its engine died.
        """
        command = self.prepare(
            prompt_token_ids, sampling_params, streaming=streaming, decoder=decoder, bad_words_ids=bad_words_ids
        )
        self._thread.give_way()  # before: a Ctrl-C meanwhile leaves no request that nobody knows
        return self.submit([command])[0]

    def prepare(
        self,
        prompt_token_ids: PromptIds,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        decoder: TextDecoder | None = None,
        bad_words_ids: Iterable[PromptIds] = (),
    ) -> Submit:
        """Checks a request completely, for `submit`. Arguments and errors are those of `generate_async`."""
        if not self.is_alive:
            raise self._mailbox.dead_error()
        request = make_request(
            next(self._ids),
            prompt_token_ids,
            sampling_params if sampling_params is not None else SamplingParams(),
            self._limits,
            decoder=decoder,
            bad_words_ids=bad_words_ids,
        )
        if self._check_fits is not None:
            self._check_fits(request)
        prompt = list(request.sequences[0].token_ids)
        result = GenerationResult(request.request_id, prompt, request.params, self._mailbox, streaming=streaming)
        return Submit(request, result)

    def submit(self, commands: SequenceOf[Submit]) -> list[GenerationResult]:
        """Submits prepared requests in order, each at most once; the engine knows all of them from its next step on.

        Raises:
            EngineDeadError: the executor was shut down or its engine died. This and Ctrl-C abort those that were sent.
        """
        try:
            for command in commands:
                self._mailbox.put(command)
        except BaseException:
            for command in commands:
                command.result.abort()
            raise
        return [command.result for command in commands]

    def abort(self, request_id: int) -> None:
        """Cancels a request; unknown and finished ids are ignored."""
        self._mailbox.abort(request_id)

    def get_stats(self) -> list[IterationStats]:
        """Returns the most recent iterations, oldest first."""
        return self._stats.snapshot()

    def shutdown(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Stops the engine and waits at most ``timeout`` seconds for its thread. Idempotent.

        Requests that are not done fail with EngineDeadError.
        """
        self._finalizer.detach()
        self._thread.stop(timeout)

    def __enter__(self) -> GenerationExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _run(self, commands: list[Submit]) -> list[GenerationResult]:
        """Submits requests and waits for all; whatever ends the wait early, Ctrl-C included, aborts the others."""
        try:
            return [result.result() for result in self.submit(commands)]
        except BaseException:
            for command in commands:
                command.result.abort()
            raise


def _check_configs(kv_cache_config: object, scheduler_config: object) -> None:
    for name, value, kind in (
        ("kv_cache_config", kv_cache_config, KvCacheConfig),
        ("scheduler_config", scheduler_config, SchedulerConfig),
    ):
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} is a {type(value).__name__}; pass a {kind.__name__}")


def _is_batch(prompts: object) -> bool:
    """Whether the first element is itself a list, tuple, array or tensor; text is not."""
    try:
        first = prompts[0]  # type: ignore[index]
        return not isinstance(first, str | bytes) and len(first) >= 0
    except (TypeError, IndexError, KeyError):
        return False


def _per_prompt(
    params: SamplingParams | SequenceOf[SamplingParams] | None, count: int
) -> SequenceOf[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple):
        raise RequestError(f"sampling_params is a {type(params).__name__}; pass a SamplingParams or a list of them")
    if len(params) != count:
        raise RequestError(
            f"sampling_params has {len(params)} entries for {count} prompts; pass one, or one per prompt"
        )
    return params

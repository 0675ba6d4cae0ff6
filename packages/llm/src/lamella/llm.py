"""LLM: a model, its tokenizer and an executor behind one name. It has an executor; it never is one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, overload

from lamella.args import LlmArgs
from lamella.loading import open_engine, save_engine
from lamella.outputs import RequestOutput, raise_failed, wait_all
from lamella.prompts import PromptInput, is_single, one_params, params_for, prepare
from lamella.scoring import EncodingOutput, Scorer
from lamella.submission import submit, submit_batch
from lamella.tokenizer import TokenizerBase
from lamella.tokenizer_loading import load_tokenizer
from lamella_core.engine import Engine
from lamella_core.errors import RequestError
from lamella_executor import GenerationExecutor, SamplingParams
from lamella_executor.scoring.executor import ScoringExecutor, is_scoring

if TYPE_CHECKING:
    from lamella_executor.stats import IterationStats

STATS_POLL_S = 0.05


class LLM:
    """Generates text with a model. Every method may be called from any thread.

    Use it as a context manager, call `shutdown`, or drop it: its thread ends in each case.
    """

    def __init__(  # noqa: PLR0913 - the field's own signature
        self,
        model: str | Path | Engine,
        tokenizer: str | Path | TokenizerBase | Any | None = None,
        *,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads the model, builds an engine in memory if it is not one yet, and starts serving.

        Args:
            model: hub id, Hugging Face directory, Lamella checkpoint, engine directory, or an `Engine`.
            tokenizer: default: the model's own. A directory, a hub id, or any object with ``encode`` and ``decode``.
            tokenizer_mode: "auto", or "slow" for the Python implementation of `transformers`.
            skip_tokenizer_init: no tokenizer: prompts are token ids and outputs have no text.
            trust_remote_code: accepted for callers of other libraries; a repository's code is never run.
            tensor_parallel_size: ranks that share each layer; the processes of all but the first are started here.
                Default: 1, or what the checkpoint or engine was made for.
            dtype: of weights and activations; "auto" is what the directory says.
            revision: of a hub id.
            tokenizer_revision: of the tokenizer's hub id; default: ``revision``.
            **kwargs: the remaining fields of `LlmArgs`.

        Raises:
            ConfigError: a bad or unknown argument, or one that contradicts the engine.
            CheckpointError: the directory is missing, damaged or of no known kind.
            UnsupportedModelError: the architecture is not supported; lists those that are.
            OutOfMemoryError: weights and KV cache do not fit.
            WorkerError: the process of another rank failed while it started.
        """
        self.args = LlmArgs.create(
            model=model, tokenizer=tokenizer, tokenizer_mode=tokenizer_mode, skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code, tensor_parallel_size=tensor_parallel_size, dtype=dtype,
            revision=revision, tokenizer_revision=tokenizer_revision, **kwargs,
        )  # fmt: skip
        args = self.args
        self._opened, model_dir = open_engine(args)
        self._tokenizer: TokenizerBase | None = None
        if not args.skip_tokenizer_init:
            self._tokenizer = load_tokenizer(
                args.tokenizer,
                model_dir=model_dir,
                mode=args.tokenizer_mode,
                revision=args.tokenizer_revision or args.revision,
            )
        self._generator: GenerationExecutor | None = None
        self._scorer: Scorer | None = None
        if isinstance(self._opened, Engine) and is_scoring(self._opened):
            scoring = ScoringExecutor.create(
                self._opened, max_batch_size=args.max_batch_size, max_num_tokens=args.max_num_tokens
            )
            self._scorer = Scorer(scoring, self._tokenizer, self._engine.spec.model)
        else:
            self._generator = self._start_generator(args)

    def _start_generator(self, args: LlmArgs) -> GenerationExecutor:
        return GenerationExecutor.create(
            self._opened,
            args.kv_cache_config,
            args.resolved_scheduler_config(),
            max_batch_size=args.max_batch_size,
            max_num_tokens=args.max_num_tokens,
            stats_capacity=args.max_stats_len,
            attn_backend=args.attn_backend,
            worker_timeout_s=args.worker_timeout_s,
        )

    @property
    def _engine(self) -> Engine:
        return self._opened if isinstance(self._opened, Engine) else self._opened.engine

    @property
    def _executor(self) -> GenerationExecutor:
        """What generates.

        Raises:
            RequestError: the model scores texts.
        """
        if self._generator is None:
            raise RequestError(
                f"{self._engine.spec.model.architecture} scores texts and generates none; use LLM.encode"
            )
        return self._generator

    @property
    def tokenizer(self) -> TokenizerBase | None:
        return self._tokenizer

    @property
    def engine(self) -> Engine:
        """What runs: weights, limits and kernel choices; of several ranks, what this process runs, which is rank 0."""
        return self._engine

    @overload
    def generate(
        self,
        inputs: str | dict[str, Any] | list[int],
        sampling_params: SamplingParams | None = ...,
        use_tqdm: bool = ...,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        inputs: list[str] | list[dict[str, Any]] | list[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = ...,
        use_tqdm: bool = ...,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        inputs: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> RequestOutput | list[RequestOutput]:
        """Generates for one prompt or a list of prompts and waits; one in, one out; a list keeps its order.

        A prompt is text, a list of token ids, or a dict with ``prompt`` and/or ``prompt_token_ids``. Text prompts get
        text; token-id prompts get token ids and ``text == ''``. Ctrl-C aborts these requests and raises at once.

        Args:
            inputs: prompt or prompts.
            sampling_params: one for all, or one per prompt; default: greedy, 32 tokens.
            use_tqdm: show a progress bar for lists, on a terminal.

        Raises:
            RequestError: a prompt or its parameters are invalid; nothing of the batch runs. Or the single request
                failed while it ran.
            BatchError: some requests of a list failed while they ran. It is raised when the others have finished, and
                its ``outputs`` hold all of them.
            EngineDeadError: the engine stopped.
        """
        single = is_single(inputs)
        if single:
            outputs = [self.generate_async(inputs, one_params(sampling_params))]  # type: ignore[arg-type]
        else:
            prompts = list(inputs)
            params = params_for(sampling_params, len(prompts))
            outputs = submit_batch(self._executor, prompts, params, self._tokenizer)
        try:
            wait_all(outputs, show_progress=use_tqdm and not single)
        except BaseException:
            for output in outputs:
                output.abort()
            raise
        if single:
            return outputs[0].result()
        raise_failed(outputs)
        return outputs

    def generate_async(
        self, inputs: PromptInput, sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> RequestOutput:
        """Submits one prompt and returns at once.

        The returned object is awaitable (``await out``), a future (``out.result(timeout)``), an iterator and an async
        iterator, from any thread and any event loop. With ``streaming`` it yields after every step.

        Raises:
            RequestError: the prompt or its parameters are invalid.
            EngineDeadError: the LLM was shut down or its engine died.
        """
        if not is_single(inputs):
            raise RequestError("generate_async takes one prompt; call it once per prompt, or use generate for a list")
        return submit(self._executor, prepare(inputs, one_params(sampling_params), self._tokenizer), streaming)

    @overload
    def encode(
        self, inputs: str | dict[str, Any] | list[int] | tuple[str, str], *, use_tqdm: bool = ...,
        step_token: str | int | None = ...,
    ) -> EncodingOutput: ...  # fmt: skip

    @overload
    def encode(
        self, inputs: list[str] | list[dict[str, Any]] | list[list[int]] | list[tuple[str, str]], *,
        use_tqdm: bool = ..., step_token: str | int | None = ...,
    ) -> list[EncodingOutput]: ...  # fmt: skip

    def encode(
        self, inputs: Any, *, use_tqdm: bool = True, step_token: str | int | None = None
    ) -> EncodingOutput | list[EncodingOutput]:
        """Scores one text or a list of texts with a classifier or reward model; one in, one out.

        Args:
            inputs: text, a pair of texts (a tuple), a list of token ids, or a dict with ``prompt`` (and ``text_pair``)
                or ``prompt_token_ids`` (and ``token_type_ids``); or a list of these.
            use_tqdm: show a progress bar for lists, on a terminal.
            step_token: of a process-reward model: what ends a step, text or its id; default "<extra_0>". Without it and
                without a tokenizer every token is scored.

        Raises:
            RequestError: an input is invalid, and nothing runs; or the model generates text and has no scores; or the
                step that computed one failed.
            EngineDeadError: the LLM was shut down or its engine died.
        """
        if self._scorer is None:
            raise RequestError(
                f"{self._engine.spec.model.architecture} generates text and has no scores; encode needs a classifier "
                "or reward model, such as LlamaForSequenceClassification"
            )
        single = is_single(inputs) or isinstance(inputs, tuple)
        outputs = self._scorer.encode_all([inputs] if single else list(inputs), step_token, use_tqdm and not single)
        return outputs[0] if single else outputs

    def save(self, engine_dir: str | Path) -> None:
        """Writes the engine and its tokenizer; ``LLM(engine_dir)`` opens it without building.

        Of several ranks it writes all, and reads those that other processes run again, one after another.

        Raises:
            OSError: the directory cannot be written.
        """
        save_engine(self._opened, self._tokenizer, Path(engine_dir))

    def get_stats(self) -> list[IterationStats]:
        """Returns the most recent iterations of the engine, oldest first."""
        return self._executor.get_stats()

    async def get_stats_async(self) -> AsyncIterator[IterationStats]:
        """Yields each iteration of the engine from now on, as it happens, until the LLM is shut down."""
        seen = max((s.iteration for s in self.get_stats()), default=-1)
        while self._executor.is_alive:
            for stats in self.get_stats():
                if stats.iteration > seen:
                    seen = stats.iteration
                    yield stats
            await asyncio.sleep(STATS_POLL_S)

    def shutdown(self) -> None:
        """Stops the engine; requests that are not done fail with EngineDeadError. Idempotent."""
        for part in (self._generator, self._scorer):
            if part is not None:
                part.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __getstate__(self) -> NoReturn:
        raise TypeError("an LLM cannot be pickled: it owns a running engine; save(dir) it and open it elsewhere")

"""Prepared prompts into the executor: one, or a whole batch or nothing of it."""

from __future__ import annotations

from typing import Any

from lamella.outputs import RequestOutput
from lamella.prompts import PreparedPrompt, prepare
from lamella.tokenizer import TokenizerBase
from lamella_core.errors import RequestError
from lamella_executor import GenerationExecutor, SamplingParams


def submit(executor: GenerationExecutor, request: PreparedPrompt, streaming: bool = False) -> RequestOutput:
    """Submits one request.

    Raises:
        RequestError: the engine's limits rule it out.
    """
    result = executor.generate_async(
        request.token_ids, request.params, streaming, decoder=request.decoder, bad_words_ids=request.bad_words_ids
    )
    return RequestOutput(result, request.text)


def submit_batch(
    executor: GenerationExecutor, prompts: list[Any], params: list[SamplingParams], tokenizer: TokenizerBase | None
) -> list[RequestOutput]:
    """Submits every prompt in order, or none if one is invalid: all are checked before the first is submitted.

    Raises:
        RequestError: names the prompt by its position.
        EngineDeadError: the executor was shut down or its engine died.
    """
    commands, texts = [], []
    for index, (prompt, one) in enumerate(zip(prompts, params)):
        try:
            request = prepare(prompt, one, tokenizer)
            command = executor.prepare(
                request.token_ids, one, decoder=request.decoder, bad_words_ids=request.bad_words_ids
            )
        except RequestError as error:
            raise type(error)(f"prompt {index}: {error}") from error
        commands.append(command)
        texts.append(request.text)
    return [RequestOutput(result, text) for result, text in zip(executor.submit(commands), texts)]

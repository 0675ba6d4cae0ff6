"""Prepared prompts into the executor: one, or a whole batch or nothing of it."""

from __future__ import annotations

from typing import Any

from lamella.outputs import RequestOutput
from lamella.prompts import PreparedPrompt, prepare
from lamella.tokenizer import TokenizerBase
from lamella_core.errors import RequestError
from lamella_executor import GenerationExecutor, SamplingParams
from lamella_executor.admission import make_request


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
    """
    outputs: list[RequestOutput] = []
    prepared: list[PreparedPrompt] = []
    try:
        for prompt, one in zip(prompts, params):
            request = prepare(prompt, one, tokenizer)
            make_request(
                0, request.token_ids, one, executor.limits, decoder=request.decoder, bad_words_ids=request.bad_words_ids
            )
            prepared.append(request)
        for request in prepared:
            outputs.append(submit(executor, request))
    except BaseException as error:
        for output in outputs:
            output.abort()
        if not isinstance(error, RequestError):
            raise
        index = len(prepared) if len(prepared) < len(prompts) else len(outputs)
        raise type(error)(f"prompt {index}: {error}") from error
    return outputs

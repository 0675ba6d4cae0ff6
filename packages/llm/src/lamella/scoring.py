"""`LLM.encode`: scores of texts by classifiers and reward models."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamella.progress import Bar
from lamella.tokenizer import TokenizerBase, check_text
from lamella_core.config import ModelConfig
from lamella_core.errors import RequestError
from lamella_executor.scoring.executor import ScoringExecutor

STEP_TOKEN = "<extra_0>"
_KEYS = ("prompt", "text_pair", "prompt_token_ids", "token_type_ids")


@dataclass(frozen=True)
class EncodingOutput:
    """Scores of one text, or of each step of it.

    Attributes:
        prompt: the text; None for token ids.
        prompt_token_ids: as the model read it.
        logits: what the output layer says, [labels] float32; [steps, labels] of a process-reward model.
        scores: probabilities of the labels, of the same shape: softmax of the logits, or sigmoid where several labels
            can hold at once. Of a reward model or a regression, the logits themselves.
        labels: names of the last dimension.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    logits: Tensor
    scores: Tensor
    labels: tuple[str, ...]

    @property
    def label(self) -> str:
        """The label of the highest score.

        Raises:
            RequestError: the scores are those of steps; each has a label of its own.
        """
        if self.scores.dim() > 1:
            raise RequestError("a process-reward model scores steps, not the text; read scores[step]")
        return self.labels[int(self.scores.argmax())]


class Scorer:
    """A scoring executor with a tokenizer."""

    def __init__(self, executor: ScoringExecutor, tokenizer: TokenizerBase | None, config: ModelConfig) -> None:
        self._executor = executor
        self._tokenizer = tokenizer
        self._labels: tuple[str, ...] = config.labels  # type: ignore[attr-defined]
        self._problem_type: str = config.problem_type  # type: ignore[attr-defined]

    @property
    def is_alive(self) -> bool:
        return self._executor.is_alive

    def encode_all(
        self, inputs: Sequence[Any], step_token: str | int | None, show_progress: bool
    ) -> list[EncodingOutput]:
        """Scores the texts, all of which are checked first; see `lamella.LLM.encode`."""
        step = self._step_id(step_token)
        texts = [_Text.of(given, self._tokenizer) for given in inputs]
        futures = [self._submit(text, step) for text in texts]
        try:
            for future in Bar(futures, desc="Processed texts", disable=None if show_progress else True):
                future.exception()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [self._output(text, future.result()) for text, future in zip(texts, futures)]

    def shutdown(self) -> None:
        self._executor.shutdown()

    def _submit(self, text: _Text, step: int | None) -> Future[Tensor]:
        rows = None
        if self._executor.scores_tokens and step is not None:
            rows = [place for place, token in enumerate(text.token_ids) if token == step]
            if not rows:
                raise RequestError(
                    f"the text has no token {step}, which ends its steps; put {STEP_TOKEN!r} after each step, or "
                    "name another step_token"
                )
        return self._executor.score(text.token_ids, token_types=text.token_types, rows=rows)

    def _step_id(self, step_token: str | int | None) -> int | None:
        """Returns the id of the token that ends a step; None if all tokens are scored."""
        if not self._executor.scores_tokens:
            if step_token is not None:
                raise RequestError(f"step_token is {step_token!r}, but this model scores whole texts; leave it out")
            return None
        if isinstance(step_token, int) and not isinstance(step_token, bool):
            return step_token
        if self._tokenizer is None:
            if step_token is not None:
                raise RequestError(f"step_token is {step_token!r}, but this LLM has no tokenizer; give its id")
            return None
        text = STEP_TOKEN if step_token is None else check_text(step_token, "step_token")
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise RequestError(f"step_token {text!r} is {len(ids)} tokens; it must be one")
        return ids[0]

    def _output(self, text: _Text, logits: Tensor) -> EncodingOutput:
        scores = logits
        if self._problem_type == "single_label_classification":
            scores = torch.softmax(logits, dim=-1)
        elif self._problem_type == "multi_label_classification":
            scores = torch.sigmoid(logits)
        return EncodingOutput(text.prompt, text.token_ids, logits, scores, self._labels)


@dataclass(frozen=True)
class _Text:
    """One input as the executor takes it."""

    prompt: str | None
    token_ids: list[int]
    token_types: list[int] | None

    @classmethod
    def of(cls, given: Any, tokenizer: TokenizerBase | None) -> _Text:
        """Reads text, a pair of texts, token ids or a dict of `_KEYS`."""
        fields = given if isinstance(given, dict) else _as_fields(given)
        unknown = set(fields) - set(_KEYS)
        if unknown or not fields:
            raise RequestError(f"an input dict has the keys {list(fields)}; known: {', '.join(_KEYS)}")
        prompt, ids, types = fields.get("prompt"), fields.get("prompt_token_ids"), fields.get("token_type_ids")
        if ids is not None:
            return cls(prompt, list(ids), None if types is None else list(types))
        check_text(prompt)
        if tokenizer is None:
            raise RequestError("the input is text, but this LLM has no tokenizer; pass token ids, or a tokenizer=")
        if fields.get("text_pair") is None:
            return cls(prompt, tokenizer.encode(str(prompt)), None if types is None else list(types))
        pair = check_text(fields["text_pair"], "text_pair")
        return cls(prompt, *tokenizer.encode_pair(str(prompt), pair))


def _as_fields(given: Any) -> dict[str, Any]:
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(text, str) for text in given):
        return {"prompt": given[0], "text_pair": given[1]}
    if isinstance(given, str | bytes):
        return {"prompt": given}
    return {"prompt_token_ids": given.tolist() if hasattr(given, "tolist") else given}

"""``lamella check`` of a model that scores texts: the scores of a few texts here and by an oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lamella.cli.oracles import Check, OwnModel, Unavailable, check_dtype, from_pretrained
from lamella.cli.whole_text import whole_logits
from lamella.llm import LLM
from lamella_core.auto import AutoModelForCausalLM
from lamella_core.errors import ConfigError
from lamella_core.hf_config import read_hf_config

TEXTS = ("What a fine day!", "The food was cold and the waiter rude.", "2 + 2 = 4, so 4 - 2 = 2.", "a b c")


class ScoreOracle(Protocol):
    """Scores texts in another way than an `LLM`."""

    @property
    def note(self) -> str:
        """What the comparison with it shows, and what it does not."""
        ...

    @property
    def checks(self) -> Sequence[Check]:
        """What was found out by loading it."""
        ...

    def scores(self, ids: list[int], step: int | None) -> Tensor:
        """Returns [labels] float32 of a text; with ``step`` [steps, labels], at every such token."""
        ...


class _TransformersScores:
    checks: Sequence[Check] = ()

    def __init__(self, model: Any) -> None:
        self._model = model
        self.note = f"compared with transformers' {type(model).__name__}"

    def scores(self, ids: list[int], step: int | None) -> Tensor:
        return self._model(torch.tensor([ids]), torch.ones(1, len(ids))).logits[0].float()


class _OwnScores:
    def __init__(self, own: OwnModel) -> None:
        self._model, self.note, self.checks = own.model, own.note, own.checks

    def scores(self, ids: list[int], step: int | None) -> Tensor:
        rows, padding = whole_logits(self._model, ids), self._model.config.pad_token_id
        if step is not None:
            return rows[torch.tensor(ids) == step]
        if self._model.pooling == "first":
            return rows[0]
        return rows[max((place for place, token in enumerate(ids) if token != padding), default=0)]


def run_score_check(hf_dir: Path, *, text: str | None, dtype: str, tolerance: float, device: str) -> bool:
    """Runs both implementations, prints the largest difference and returns whether it is within ``tolerance``.

    Of a model that scores steps, every token that is the last one of a text ends a step.
    """
    err, texts = Console(stderr=True, highlight=False), [text] if text else list(TEXTS)
    scores_steps = AutoModelForCausalLM.get_model_class(hf_dir).pooling == "tokens"
    with err.status("loading both implementations"):
        oracle = _load(hf_dir, dtype)
        llm = LLM(hf_dir, dtype=dtype, device=device)
    with llm, err.status("comparing"), torch.inference_mode():
        pairs = [_both(llm, oracle, text, scores_steps) for text in texts]
        error = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
        largest = max(float(theirs.abs().max()) for _, theirs in pairs)
        labels = torch.cat([(ours.argmax(-1) == theirs.argmax(-1)).view(-1) for ours, theirs in pairs])
        architecture, name = llm.engine.spec.model.architecture, llm.engine.spec.model.dtype
    bound = tolerance * max(1.0, largest)
    checks = [
        *oracle.checks,
        ("largest error of a score", f"{error:.2e} (allowed {bound:.2e})", error <= bound),
        ("labels equal", f"{int(labels.sum())} of {len(labels)}", bool(labels.all())),
    ]
    table = Table("check", "measured", "")
    for what, value, passed in checks:
        table.add_row(what, value, "[green]ok[/green]" if passed else "[red]FAILED[/red]")
    out = Console(highlight=False)
    out.print(f"{hf_dir}: {architecture}, {name}", markup=False, soft_wrap=True)
    out.print(table)
    out.print(oracle.note, markup=False, soft_wrap=True)
    return all(passed for _, _, passed in checks)


def _both(llm: LLM, oracle: ScoreOracle, text: str, scores_steps: bool) -> tuple[Tensor, Tensor]:
    """Returns the scores of a text here and by the oracle."""
    if llm.tokenizer is None:
        raise ConfigError("check needs the model's tokenizer")
    ids = llm.tokenizer.encode(text)
    if not ids:
        raise ConfigError(f"the model's tokenizer turns {text!r} into no token; check needs one that knows text")
    step = ids[-1] if scores_steps else None
    return llm.encode(ids, step_token=step, use_tqdm=False).logits, oracle.scores(ids, step)


def _load(hf_dir: Path, dtype: str) -> ScoreOracle:
    from transformers import AutoModelForSequenceClassification

    check_dtype(dtype)
    try:
        model = from_pretrained(AutoModelForSequenceClassification, hf_dir, dtype, read_hf_config(hf_dir).architecture)
    except Unavailable as error:
        return _OwnScores(OwnModel.load(hf_dir, str(error)))
    return _TransformersScores(model)

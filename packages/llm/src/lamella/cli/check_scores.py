"""``lamella check`` of a model that scores texts: the scores of a few texts here and in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lamella.llm import LLM
from lamella_core.config import DTYPES
from lamella_core.errors import ConfigError

TEXTS = ("What a fine day!", "The food was cold and the waiter rude.", "2 + 2 = 4, so 4 - 2 = 2.", "a b c")


def run_score_check(hf_dir: Path, *, text: str | None, dtype: str, tolerance: float, device: str) -> bool:
    """Runs both implementations, prints the largest difference and returns whether it is within ``tolerance``.

    Raises:
        ConfigError: transformers has no class for the model.
    """
    err, texts = Console(stderr=True, highlight=False), [text] if text else list(TEXTS)
    with err.status("loading both implementations"):
        reference = _load(hf_dir, dtype)
        llm = LLM(hf_dir, dtype=dtype, device=device)
    with llm, err.status("comparing"), torch.inference_mode():
        ours = [llm.encode(text, use_tqdm=False) for text in texts]
        theirs = [
            reference(torch.tensor([out.prompt_token_ids]), torch.ones(1, len(out.prompt_token_ids))).logits[0].float()
            for out in ours
        ]
        error = max(float((out.logits - logits).abs().max()) for out, logits in zip(ours, theirs))
        largest = max(float(logits.abs().max()) for logits in theirs)
        labels = sum(int(out.logits.argmax()) == int(logits.argmax()) for out, logits in zip(ours, theirs))
        architecture, name = llm.engine.spec.model.architecture, llm.engine.spec.model.dtype
    bound = tolerance * max(1.0, largest)
    checks = [
        ("largest error of a score", f"{error:.2e} (allowed {bound:.2e})", error <= bound),
        ("labels equal", f"{labels} of {len(texts)}", labels == len(texts)),
    ]
    table = Table("check", "measured", "")
    for what, value, passed in checks:
        table.add_row(what, value, "[green]ok[/green]" if passed else "[red]FAILED[/red]")
    out = Console(highlight=False)
    out.print(f"{hf_dir}: {architecture}, {name}", markup=False, soft_wrap=True)
    out.print(table)
    return all(passed for _, _, passed in checks)


def _load(hf_dir: Path, dtype: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    torch_dtype = "auto" if dtype == "auto" else DTYPES[dtype]
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            str(hf_dir), dtype=torch_dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {hf_dir}, so there is nothing to compare with: {error}") from error
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:5])
        raise ConfigError(f"transformers has no class for the head of {hf_dir} ({names}): nothing to compare with")
    return model.eval()

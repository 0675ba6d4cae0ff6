"""``lamella check``: does this model give the same numbers here as in transformers?

Three comparisons over a few prompts and one text: the logits at every generated position (both sides fed the same
tokens), the greedy tokens, and the perplexity of the text. Quantized models are compared with a computation in full
precision, of weights that are widened where they are float8; then the perplexity decides. What transformers cannot
compute is compared with Lamella's own plain computation, and the output says so: see `lamella.cli.oracles`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lamella.cli.check_scores import run_score_check
from lamella.cli.oracles import Check, Oracle, load_oracle
from lamella.llm import LLM
from lamella.tokenizer import TokenizerBase
from lamella_core.auto import AutoConfig, AutoModelForCausalLM
from lamella_core.checkpoint.formats import detect_format
from lamella_core.errors import ConfigError
from lamella_core.quantization.config import QuantConfig
from lamella_executor import SamplingParams

PROMPTS = ("Once upon a time", "The capital of France is", "def add(a, b):", "1, 2, 3,")
TEXT = (
    "The old lighthouse stood at the end of the pier. Every evening, when the sun went down, the keeper climbed the "
    "stairs and lit the lamp. The ships far out at sea saw the light and knew where the rocks were. One night a storm "
    "came. The wind broke a window and the rain put out the flame. The keeper ran up with dry matches, but they would "
    "not burn. So he took the brass bell from its hook and rang it until the morning came and the storm was over. When "
    "the captain of the last ship came ashore, he brought the keeper a loaf of bread, a jar of honey and his thanks."
)
PERPLEXITY_TOLERANCE = 1e-3  # relative
QUANTIZED_PERPLEXITY_TOLERANCE = 0.03
_WINDOW = 512  # tokens of text scored at once


@dataclass
class Report:
    """What was measured. ``tolerance`` is relative to the largest logit, ``found`` what loading the oracle showed."""

    tolerance: float
    oracle: str = "transformers"  # its name
    found: Sequence[Check] = ()
    is_quantized: bool = False
    logit_error: float = 0.0
    largest_logit: float = 0.0
    tokens_equal: int = 0
    tokens_total: int = 0
    perplexity: float = math.nan
    reference_perplexity: float = math.nan
    differences: list[str] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        relative = abs(self.perplexity / self.reference_perplexity - 1)
        perplexity = f"{self.perplexity:.4f}, {self.oracle} {self.reference_perplexity:.4f}"
        tokens = f"{self.tokens_equal} of {self.tokens_total}"
        if self.is_quantized:
            return [
                *self.found,
                ("largest error of a logit", f"{self.logit_error:.2e}, of {self.largest_logit:.2e}", None),
                ("greedy tokens equal", tokens, None),
                ("perplexity", perplexity, relative <= QUANTIZED_PERPLEXITY_TOLERANCE),
            ]
        bound = self.tolerance * max(1.0, self.largest_logit)
        return [
            *self.found,
            ("largest error of a logit", f"{self.logit_error:.2e} (allowed {bound:.2e})", self.logit_error <= bound),
            ("greedy tokens equal", tokens, not self.differences),
            ("perplexity", perplexity, relative <= PERPLEXITY_TOLERANCE),
        ]

    @property
    def passed(self) -> bool:
        return all(ok is not False for _, _, ok in self.checks)


class _Capture:
    """A logits processor that keeps what it sees: [vocab] per generated position."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def __call__(
        self,
        req_id: int,
        logits: torch.Tensor,
        token_ids: list[list[int]],
        stream_ptr: int | None,
        client_id: int | None,
    ) -> None:
        self.logits.append(logits[0, 0].clone())  # of [1, num_sequences, vocab]


def run_check(
    hf_dir: Path,
    *,
    text: str | None,
    max_tokens: int,
    dtype: str,
    tolerance: float,
    device: str = "auto",
    quant_config: QuantConfig | None = None,
    **sizes: Any,
) -> bool:
    """Runs both implementations, prints the report and returns whether all checks passed.

    ``sizes`` are arguments of `LLM` that spread the model over ranks.
    """
    if detect_format(hf_dir) != "hugging_face":
        raise ConfigError(f"{hf_dir} is not a Hugging Face directory; check compares with such a directory")
    if AutoModelForCausalLM.get_model_class(hf_dir).task == "score":
        return run_score_check(hf_dir, text=text, dtype=dtype, tolerance=tolerance, device=device)
    err = Console(stderr=True, highlight=False)
    with err.status("loading both implementations"):
        sizes = _short_enough(hf_dir, sizes)
        oracle = load_oracle(hf_dir, dtype, sizes.get("max_seq_len"))
        llm = LLM(hf_dir, dtype=dtype, device=device, quant_config=quant_config, **sizes)
    with llm, err.status("comparing"):
        report = compare(llm, oracle, text or TEXT, max_tokens, tolerance)
    out = Console(highlight=False)
    table = Table("check", "measured", "")
    for name, value, ok in report.checks:
        table.add_row(name, value, {True: "[green]ok[/green]", False: "[red]FAILED[/red]", None: "-"}[ok])
    model = llm.engine.spec.model
    kinds = [algo.value for algo in (model.quantization.quant_algo, model.quantization.kv_cache_quant_algo) if algo]
    ranks = [f"{model.mapping.world_size} ranks"] if model.mapping.world_size > 1 else []
    described = ", ".join([model.architecture, model.dtype, *kinds, *ranks])
    out.print(f"{hf_dir}: {described}", markup=False, soft_wrap=True)
    out.print(table)
    out.print(oracle.note, markup=False, soft_wrap=True)
    for line in report.differences:
        out.print(line, markup=False, soft_wrap=True)
    return report.passed


def _short_enough(hf_dir: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns ``sizes``, with rope type "longrope" a ``max_seq_len`` that keeps to the factors of short sequences.

    transformers chooses the factors by the length of each text, and those of a check are short; an `LLM` by the longest
    to come.
    """
    rope = AutoConfig.from_hugging_face(hf_dir).rope
    if rope is None or rope.rope_type != "longrope":
        return sizes
    return {"max_seq_len": int(rope.scaling["original_max_position_embeddings"]), **sizes}


@torch.inference_mode()
def compare(llm: LLM, oracle: Oracle, text: str, max_tokens: int, tolerance: float) -> Report:
    """Returns the comparison of an LLM with an oracle of the same weights."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise ConfigError("check needs the model's tokenizer")
    is_quantized = llm.engine.spec.model.quantization.is_quantized
    report = Report(tolerance, oracle.name, oracle.checks, is_quantized)
    for prompt in PROMPTS:
        _compare_prompt(llm, oracle, prompt, tokenizer, max_tokens, report)
    limit = min(_WINDOW, int(llm.engine.spec.build.max_seq_len or _WINDOW) - 1)
    ids = tokenizer.encode(text)
    windows = [ids[i : i + limit] for i in range(0, len(ids), limit)]
    windows = [w for w in windows if len(w) > 1]
    scored = sum(len(w) - 1 for w in windows)
    if not scored:
        raise ConfigError("the text for the perplexity has fewer than two tokens")
    report.perplexity = math.exp(-sum(_our_logprob(llm, w) for w in windows) / scored)
    report.reference_perplexity = math.exp(-sum(_reference_logprob(oracle, w) for w in windows) / scored)
    return report


def _compare_prompt(
    llm: LLM, oracle: Oracle, prompt: str, tokenizer: TokenizerBase, max_tokens: int, report: Report
) -> None:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ConfigError(f"the model's tokenizer turns {prompt!r} into no token; check needs one that knows text")
    capture = _Capture()
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logits_processor=capture)
    ours = llm.generate(ids, params).outputs[0].token_ids
    logits = oracle.logits(ids + ours, len(ids))[len(ids) - 1 : -1]  # [len(ours), vocab]
    captured = torch.stack(capture.logits[: len(ours)]).float()
    report.logit_error = max(report.logit_error, float((captured - logits).abs().max()))
    report.largest_logit = max(report.largest_logit, float(logits.abs().max()))
    theirs = logits.argmax(-1).tolist()
    equal = sum(a == b for a, b in zip(ours, theirs))
    report.tokens_equal += equal
    report.tokens_total += len(ours)
    if equal < len(ours):
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
        report.differences.append(
            f"{prompt!r}: token {at} is {ours[at]} here and {theirs[at]} in {oracle.name.removeprefix('Lamella in ')}"
        )


def _our_logprob(llm: LLM, ids: list[int]) -> float:
    """Returns the summed log-probability of ids[1:]."""
    output = llm.generate(ids, SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True))
    entries = output.prompt_logprobs or []
    return sum(entry[token].logprob for token, entry in zip(ids[1:], entries[1:]) if entry is not None)


def _reference_logprob(oracle: Oracle, ids: list[int]) -> float:
    logits = oracle.logits(ids, len(ids))[:-1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum())

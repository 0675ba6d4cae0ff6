"""Sampling: from logits to the next tokens of every request, and when a request ends.

The engine loop uses `Sampler.sample`, `StopChecker.append`, `select_outputs` and `prompt_logprobs`; streaming also
`streamable_length` and `streamable_tokens`.
"""

from lamella_executor.sampler.logprobs import needs_logprobs, prompt_logprobs
from lamella_executor.sampler.outputs import select_outputs
from lamella_executor.sampler.sampler import Sampler
from lamella_executor.sampler.stop import StopChecker, streamable_length, streamable_tokens
from lamella_executor.sampler.types import NewToken, SampleResult, SampleRow

__all__ = [
    "NewToken",
    "SampleResult",
    "SampleRow",
    "Sampler",
    "StopChecker",
    "needs_logprobs",
    "prompt_logprobs",
    "select_outputs",
    "streamable_length",
    "streamable_tokens",
]

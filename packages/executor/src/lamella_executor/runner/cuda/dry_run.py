"""Steps of the largest sizes over made-up requests: to measure what they take, and to compile what they use."""

from __future__ import annotations

from lamella_executor.runner.cuda.state import RunnerLimits
from lamella_executor.sampling_params import SamplingParams
from lamella_executor.scheduler.plan import ScheduledSequence, StepPlan
from lamella_executor.sequence import RequestState, Sequence

_SHORT = 8  # tokens
_PROMPTS = (512, 2048)  # tokens: lengths that attention has different kernels for
_CHUNK = 128  # tokens


def dry_plans(limits: RunnerLimits, tokens_per_block: int, scratch_block: int) -> list[StepPlan]:
    """Returns plans that need no KV block: what they write goes to the scratch block.

    The largest step, with rows that decode and logits for the host; a short prompt, sampled greedily and not; prompts
    of other lengths; a short and a long chunk that are not the first of their prompts.
    """
    host, greedy = SamplingParams(logprobs=0), SamplingParams()
    random = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=1)
    short = [min(_SHORT, limits.max_seq_len, limits.max_num_tokens)]
    steps = ((_largest(limits), host), (short, random), (short, greedy))
    plans = [
        StepPlan([_item(length, params, tokens_per_block, scratch_block) for length in lengths])
        for lengths, params in steps
    ]
    longest = min(limits.max_seq_len, limits.max_num_tokens)
    prompts = [(0, length) for length in _PROMPTS if length <= longest]
    if longest >= 2 * _SHORT:
        prompts.append((longest - min(_CHUNK, longest // 2), longest))
    if _PROMPTS[0] <= limits.max_num_tokens and _SHORT + _PROMPTS[0] <= limits.max_seq_len:
        prompts.append((_SHORT, _SHORT + _PROMPTS[0]))
    plans += [StepPlan([_item(end, greedy, tokens_per_block, scratch_block, start)]) for start, end in prompts]
    return plans


def _largest(limits: RunnerLimits) -> list[int]:
    """Returns the items' lengths of a step with as many tokens and as many sequences as there may be."""
    longest = min(limits.max_seq_len, limits.max_num_tokens)
    num_prompts = -(-limits.max_num_tokens // longest)
    singles = [1] * max(0, limits.max_sequences - num_prompts)
    left = limits.max_num_tokens - len(singles)
    prompts = []
    while left > 0:
        prompts.append(min(left, longest))
        left -= prompts[-1]
    return (singles + prompts)[: limits.max_sequences]


def _item(
    length: int, params: SamplingParams, tokens_per_block: int, scratch_block: int, start: int = 0
) -> ScheduledSequence:
    blocks = [scratch_block] * -(-length // tokens_per_block)
    sequence = Sequence(0, [0] * length, length, blocks=blocks)
    request = RequestState(0, params, seed=0, end_id=None, max_tokens=1, sequences=[sequence], arrival_s=0.0)
    return ScheduledSequence(request, sequence, start, length - start, 1)

"""choose_mapping: every way to spread a model over N ranks, what each costs, and the fastest that fits."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lamella_builder.auto_parallel.cost import Estimate, Workload, estimate
from lamella_builder.auto_parallel.facts import DeviceFacts
from lamella_builder.auto_parallel.shapes import shard_shape
from lamella_builder.steps.memory import activation_bytes, base_bytes, format_bytes
from lamella_core.config import ModelConfig
from lamella_core.engine.build_config import BuildConfig
from lamella_core.errors import ConfigError, OutOfMemoryError
from lamella_core.mapping import Mapping

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One way to spread the model.

    Attributes:
        mapping: from rank 0.
        estimate: None if the model cannot be split that way.
        refusal: why it cannot be taken; None if it can.
        lacks_bytes: on the fullest rank, if it is refused for its memory.
    """

    mapping: Mapping
    estimate: Estimate | None = None
    refusal: str | None = None
    lacks_bytes: int = 0


@dataclass(frozen=True)
class Choice:
    """The mapping, and all candidates, the fastest first."""

    mapping: Mapping
    candidates: tuple[Candidate, ...]
    heading: str
    has_experts: bool

    def explain(self) -> str:
        """Returns a table of the candidates with the reason for each, one line a candidate."""
        best = self.candidates[0].estimate
        lines = [self.heading, _row("tp", "pp", "experts", "weights", "requests", "ms/token", "tokens/s", "")]
        for candidate in self.candidates:
            mapping, found = candidate.mapping, candidate.estimate
            experts = f"{mapping.moe_tp_size} x {mapping.moe_ep_size}" if self.has_experts else "-"
            row = [mapping.tp_size, mapping.pp_size, experts]
            row.append("" if found is None else format_bytes(found.weight_bytes))
            if found is None or best is None or candidate.refusal is not None:
                lines.append(_row(*row, "", "", "", candidate.refusal))
                continue
            row += [f"{found.num_requests:.0f}", f"{1e3 * found.token_s:.2f}", f"{found.tokens_per_s:.0f}"]
            lines.append(_row(*row, "chosen" if found is best else _why(found, best)))
        return "\n".join(lines)


def choose_mapping(
    config: ModelConfig, build: BuildConfig, world_size: int, facts: DeviceFacts, *, workload: Workload | None = None
) -> Choice:
    """Returns the split over exactly ``world_size`` ranks that generates most tokens per second, and logs why.

    Args:
        config: the model, of one rank.
        build: limits; they need not be resolved.
        world_size: ranks.
        facts: of a rank's device and links.
        workload: default: `Workload.of` the limits.

    Raises:
        OutOfMemoryError: the model fits in no split; the message holds the numbers of the one that comes nearest.
        ConfigError: no split of that many ranks suits the model.
    """
    if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 1:
        raise ConfigError(f"world_size is {world_size!r}; auto_parallel needs an integer of at least 1")
    workload = workload or Workload.of(config, build)
    base = config.with_mapping(Mapping())
    has_experts = any(layer.num_experts for layer in shard_shape(base, Mapping()).layers)
    mappings = [
        Mapping(
            world_size=world_size, tp_size=tp, pp_size=world_size // tp, moe_ep_size=ep,
            gpus_per_node=facts.gpus_per_node,
        )
        for tp in _divisors(world_size)
        for ep in (_divisors(tp) if has_experts else [1])
    ]  # fmt: skip
    found = sorted((_candidate(base, build, mapping, facts, workload) for mapping in mappings), key=_order)
    if found[0].refusal is not None:
        raise _nothing_left(base, world_size, found, facts)
    heading = (
        f"auto_parallel: {config.architecture}, {config.dtype}, on {world_size} ranks ({facts.describe()}), for "
        f"{workload.num_requests} requests of {workload.isl} + {workload.osl} tokens"
    )
    choice = Choice(found[0].mapping, tuple(found), heading, has_experts)
    logger.info("%s", choice.explain())
    return choice


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _candidate(
    base: ModelConfig, build: BuildConfig, mapping: Mapping, facts: DeviceFacts, workload: Workload
) -> Candidate:
    try:
        config = base.with_mapping(mapping)
        tensor_ranks = Mapping(world_size=mapping.tp_size, tp_size=mapping.tp_size, moe_ep_size=mapping.moe_ep_size)
        mapping.pp_layers(config.num_hidden_layers)
        shard = shard_shape(base, tensor_ranks)
    except ConfigError as error:
        return Candidate(mapping, refusal=str(error))
    free = facts.memory_bytes - base_bytes(facts.device) - activation_bytes(config, build)
    found = estimate(shard, mapping, workload, facts, free)
    lacks = found.weight_bytes + found.request_bytes - free
    if lacks <= 0:
        return Candidate(mapping, found)
    refusal = (
        f"weights {format_bytes(found.weight_bytes)} and one request's keys and values "
        f"{format_bytes(found.request_bytes)} exceed the {format_bytes(max(0, round(free)))} that a step leaves"
    )
    return Candidate(mapping, found, refusal, lacks_bytes=round(lacks))


def _order(candidate: Candidate) -> tuple[bool, float, int]:
    """Sorts what can be taken first, by tokens per second; of equals the one whose stages are fewer."""
    if candidate.estimate is None:
        return True, float("inf"), candidate.mapping.pp_size
    if candidate.refusal is not None:
        return True, float(candidate.lacks_bytes), candidate.mapping.pp_size
    return False, -candidate.estimate.tokens_per_s, candidate.mapping.pp_size


def _nothing_left(
    config: ModelConfig, world_size: int, found: list[Candidate], facts: DeviceFacts
) -> OutOfMemoryError | ConfigError:
    nearest = found[0]
    if nearest.estimate is None:
        refusals = "; ".join(f"{_named(candidate.mapping)}: {candidate.refusal}" for candidate in found)
        return ConfigError(
            f"auto_parallel: no split of {config.architecture} over {world_size} ranks works ({refusals}); choose "
            "another world_size"
        )
    return OutOfMemoryError(
        f"auto_parallel: {config.architecture} in {config.dtype} fits in no split over {world_size} ranks of "
        f"{format_bytes(round(facts.memory_bytes))} each. The nearest, {_named(nearest.mapping)}: {nearest.refusal}, "
        f"by {format_bytes(nearest.lacks_bytes)} on each rank. Raise world_size, choose float8 weights or a smaller "
        "dtype, or lower max_seq_len, max_num_tokens or max_batch_size"
    )


def _named(mapping: Mapping) -> str:
    experts = f" (experts {mapping.moe_tp_size} x {mapping.moe_ep_size})" if mapping.moe_ep_size > 1 else ""
    return f"tp_size {mapping.tp_size} x pp_size {mapping.pp_size}{experts}"


def _why(found: Estimate, best: Estimate) -> str:
    """Returns what makes a candidate slower than the best: the largest of the parts that differ."""
    share = found.tokens_per_s / best.tokens_per_s
    parts = {
        "messages between ranks": found.link_s - best.link_s,
        "reading weights and caches": (found.token_s - found.link_s) - (best.token_s - best.link_s),
    }
    per_request = {name: seconds / best.num_requests for name, seconds in parts.items()}
    per_request["prompts"] = found.prompt_s - best.prompt_s
    per_request["fewer requests at once"] = found.token_s * (1 / found.num_requests - 1 / best.num_requests)
    name = max(per_request, key=lambda key: per_request[key])
    return f"{share:.0%} of the chosen speed: {name}"


def _row(*columns: object) -> str:
    widths = (3, 3, 8, 11, 9, 9, 10)
    *cells, reason = columns
    return "  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True)) + f"  {reason}"

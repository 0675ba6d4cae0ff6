"""DeviceOps: the small kernels around a model's forward pass, through triton or through PyTorch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lamella_core.layers.rotary import Rotation
from lamella_executor.attention.paged_cuda import torch_rope_and_cache, triton_rope_and_cache
from lamella_executor.runner.base import NAN_LOGITS, NEGATIVE_INFINITE_LOGITS, POSITIVE_INFINITE_LOGITS
from lamella_executor.runner.cuda.batch import StepInputs
from lamella_executor.runner.cuda.slots import RECORD_INTS
from lamella_executor.runner.cuda.state import DeviceState
from lamella_executor.sampler.filters import best_token, filter_logits
from lamella_executor.sampler.random import uniform
from lamella_executor.sampling_params import SamplingParams


class DeviceOps(Protocol):
    """What runs on the device beside the model."""

    @property
    def is_capturable(self) -> bool:
        """Whether all of it can be recorded in CUDA graphs."""
        ...

    def update(self, state: DeviceState, records: Tensor, places: Tensor, blocks: Tensor) -> None:
        """Brings block tables and sampling parameters up to date; see `lamella_executor.runner.cuda.slots.Updates`."""
        ...

    def prepare(self, state: DeviceState, inputs: StepInputs) -> None:
        """Makes ``state.input_ids``, ``positions`` and ``kv_slots`` of the step's rows."""
        ...

    def rope_and_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        rotation: Rotation | None,
        caches: tuple[Tensor, Tensor],
        slots: Tensor,
        kv_scales: Tensor | None,
        rotate_keys: bool = False,
    ) -> None:
        """See `lamella_executor.attention.paged_cuda.RopeAndCache`."""
        ...

    def sample(self, state: DeviceState, logits: Tensor, inputs: StepInputs, *, is_greedy: bool) -> None:
        """Writes the token drawn from each row of ``logits`` [R, vocab_size] to the outbox, or a negative code.

        Args:
            state: has the sampling parameters.
            logits: in the model's dtype, of the rows sampled on the device.
            inputs: says which slots the rows belong to.
            is_greedy: all rows are.
        """
        ...


class TorchOps:
    """`DeviceOps` through PyTorch: for devices without triton, and for tests on a CPU."""

    is_capturable = False  # samples on the host
    rope_and_cache = staticmethod(torch_rope_and_cache)

    def update(self, state: DeviceState, records: Tensor, places: Tensor, blocks: Tensor) -> None:
        state.block_tables.view(-1)[places.long()] = blocks
        rows = records.view(-1, RECORD_INTS)
        slots = rows[:, 0].long()
        parameters = state.parameters
        parameters.top_k[slots] = rows[:, 1]
        words = rows[:, 2:].contiguous().view(torch.int64)  # [records, 5]
        for column, real in enumerate((parameters.temperature, parameters.top_p, parameters.min_p)):
            real[slots] = words[:, column].contiguous().view(torch.float64)
        parameters.seed_low[slots] = words[:, 3]
        parameters.seed_high[slots] = words[:, 4]

    def prepare(self, state: DeviceState, inputs: StepInputs) -> None:
        count, size = inputs.tokens.shape[0], state.tokens_per_block
        tokens, positions = inputs.tokens.long(), inputs.positions.long()
        pending = state.outbox.tokens[(-1 - tokens).clamp_min(0)].clamp_min(0)
        state.input_ids[:count] = torch.where(tokens < 0, pending, tokens)
        state.positions[:count] = positions
        blocks = state.block_tables[inputs.token_slots.long(), positions // size].long()
        state.kv_slots[:count] = blocks * size + positions % size

    def sample(self, state: DeviceState, logits: Tensor, inputs: StepInputs, *, is_greedy: bool) -> None:
        slots, generated = inputs.sampled_slots.tolist(), inputs.generated.tolist()
        rows = zip(slots, generated, logits.to("cpu", torch.float32))
        tokens = [_draw(state, slot, position, row) for slot, position, row in rows]
        state.outbox.tokens[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32)


def _draw(state: DeviceState, slot: int, position: int, scores: Tensor) -> int:
    """Samples one row [vocab_size] float32 as the host's sampler does."""
    best = float(scores.max())
    if best != best:
        return NAN_LOGITS
    if best in (float("inf"), float("-inf")):
        return POSITIVE_INFINITE_LOGITS if best > 0 else NEGATIVE_INFINITE_LOGITS
    temperature, top_k, top_p, min_p, low, high = (values[slot].item() for values in state.parameters)
    if temperature == 0.0:
        return best_token(scores)
    params = SamplingParams(temperature=float(temperature), top_k=int(top_k), top_p=float(top_p), min_p=float(min_p))
    mask = (1 << 64) - 1
    seed = (int(low) & mask) | (int(high) & mask) << 64
    return filter_logits(scores, params).draw(uniform(seed, 0, position))


class TritonOps:
    """`DeviceOps` in one kernel each."""

    is_capturable = True
    rope_and_cache = staticmethod(triton_rope_and_cache)

    def update(self, state: DeviceState, records: Tensor, places: Tensor, blocks: Tensor) -> None:
        from lamella_core.kernels.triton.batch import apply_updates

        apply_updates(records.view(-1, RECORD_INTS), places, blocks, state.block_tables, state.parameters)

    def prepare(self, state: DeviceState, inputs: StepInputs) -> None:
        from lamella_core.kernels.triton.batch import prepare_step

        outputs = (state.input_ids, state.positions, state.kv_slots)
        prepare_step(
            inputs.tokens, inputs.token_slots, inputs.positions, state.outbox.tokens, state.block_tables,
            state.tokens_per_block, outputs,
        )  # fmt: skip

    def sample(self, state: DeviceState, logits: Tensor, inputs: StepInputs, *, is_greedy: bool) -> None:
        from lamella_core.kernels.triton.sampling import SamplingRows, sample

        rows = SamplingRows(*state.parameters, slots=inputs.sampled_slots, positions=inputs.generated)
        out = state.outbox.tokens[: logits.shape[0]]
        sample(logits, out, vocab_size=logits.shape[1], rows=rows, greedy=is_greedy)

"""CudaRunner: one model on one device. Steps are enqueued and computed while the host goes on.

Everything happens on the current stream, in order of the launches: the next step's input overwrites this step's only
after it was read, and whoever works on a step's logits on the same stream sees them complete. Host memory is written
again only after its transfer is complete (`lamella_executor.runner.cuda.transfer`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella_core.context import AttentionSpec, Communicator, RecurrentStep, SingleRank, StateSpec
from lamella_core.errors import OutOfMemoryError
from lamella_core.models.base import CausalLM
from lamella_core.prefix import PrefixTokens
from lamella_executor.attention.backend import AttentionBackend
from lamella_executor.attention.paged_cpu import LayerWindow
from lamella_executor.attention.paged_cuda import CudaStepContext, DeviceKvCache
from lamella_executor.runner.base import LaunchedStep
from lamella_executor.runner.cuda.batch import StepInputs, is_decode_only, pack_decode, pack_mixed, reserve_decode
from lamella_executor.runner.cuda.graphs import DecodeGraphs, capture_sizes, why_not_capturable
from lamella_executor.runner.cuda.ops import DeviceOps
from lamella_executor.runner.cuda.slots import Slot, SlotTable, Updates
from lamella_executor.runner.cuda.stage import OnlyStage, Stage
from lamella_executor.runner.cuda.state import DeviceState, RunnerLimits
from lamella_executor.runner.cuda.transfer import SampledTokens
from lamella_executor.scheduler.plan import StepPlan

logger = logging.getLogger(__name__)

_MIB = 1 << 20


@dataclass(frozen=True)
class DeviceParts:
    """How a runner's device computes what surrounds the matrix products."""

    attention: AttentionBackend
    ops: DeviceOps
    device: torch.device


class OutputContext:
    """The `ForwardContext` of the output layer, which attends to nothing."""

    def __init__(self, tp: Communicator) -> None:
        self.tp = tp

    @property
    def prefixes(self) -> PrefixTokens:
        raise RuntimeError("the output layer knows no positions")

    def attend(self, *args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("the output layer does not attend")

    def kv_place(self, spec: AttentionSpec, kv_scales: Tensor | None) -> None:
        raise RuntimeError("the output layer does not attend")

    def recurrent(self, spec: StateSpec) -> RecurrentStep:
        raise RuntimeError("the output layer has no states")


class CudaStep:
    """A `lamella_executor.runner.base.LaunchedStep`."""

    def __init__(self, tokens: SampledTokens, rows: list[int] | None, logits: Tensor | None) -> None:
        self._tokens = tokens
        self._rows = rows  # of the tokens, those that the device was asked to sample; None: all
        self._logits = logits

    @property
    def logits(self) -> Tensor | None:
        """[plan.num_logits, vocab_size] float32, or None; see `LaunchedStep.logits`."""
        return self._logits

    def collect(self) -> list[int]:
        """Waits until the step is done and returns its sampled tokens; see `LaunchedStep.collect`."""
        tokens = self._tokens.wait()
        return tokens if self._rows is None else [tokens[row] for row in self._rows]


class CudaRunner:
    """A `lamella_executor.runner.base.LaunchingRunner`; also a `Runner`, which waits for each step.

    Args:
        model: one rank's model, weights and tables on the device.
        cache: keys and values; the runner takes it over.
        windows: by layer index, see `layer_windows`.
        limits: the largest step.
        parts: the device, and what computes on it. With device "cpu" (tests) nothing is captured.
        tp: tensor-parallel group; default: this process alone.
        stage: of a pipeline, that the model is; default: it is whole.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: DeviceKvCache,
        windows: dict[int, LayerWindow],
        limits: RunnerLimits,
        parts: DeviceParts,
        tp: Communicator | None = None,
        stage: Stage | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._windows = windows
        self._limits = limits
        self._parts = parts
        self._tp = tp or SingleRank()
        self._stage = stage or OnlyStage()
        self._state = DeviceState(limits, cache.tokens_per_block, cache.scratch_block, parts.device)
        max_blocks = limits.max_blocks(cache.tokens_per_block)
        self._slots = SlotTable(limits.num_slots, max_blocks, cache.tokens_per_block, cache.scratch_block)
        self._scratch_state = cache.states.scratch_slot if cache.states is not None else None
        self._has_prefixes = model.config.prefix_rule is not None
        self._graphs = DecodeGraphs()
        self._outputs = OutputContext(self._tp)

    # steps

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Enqueues a step; see `LaunchingRunner.launch`.

        Raises:
            OutOfMemoryError: the device has not enough memory for the step.
        """
        return self._stage.finish(plan, self._launch(plan, keep_logits=False))

    def run(self, plan: StepPlan) -> Tensor:
        """Computes a step and returns its logits [plan.num_logits, vocab_size] float32 on the host; see `Runner.run`.

        The plan holds no pending tokens, and the model is whole.
        """
        logits = self._launch(plan, keep_logits=True).logits
        return torch.empty(0, self._model.config.vocab_size) if logits is None else logits.cpu()

    @torch.inference_mode()
    def _launch(self, plan: StepPlan, *, keep_logits: bool) -> CudaStep:
        updates = Updates()
        try:
            slots = self._slots.place(plan.items, updates)
            return self._enqueue(plan, slots, updates, keep_logits)
        except torch.OutOfMemoryError as error:
            self._slots.undo()
            raise self._out_of_memory(plan, error) from error
        except BaseException:
            self._slots.undo()
            raise

    def _enqueue(self, plan: StepPlan, slots: list[Slot], updates: Updates, keep_logits: bool) -> CudaStep:
        state, items = self._state, plan.items
        is_decode = is_decode_only(items)
        captured = self._graphs.find(len(items)) if is_decode else None
        state.inbox.begin()
        if is_decode:
            size = len(items) if captured is None else captured.size
            inputs = pack_decode(
                state.inbox,
                state.block_tables,
                items,
                slots,
                size,
                self._scratch_state,
                has_prefixes=self._has_prefixes,
            )
        else:
            inputs = pack_mixed(
                state.inbox, state.block_tables, items, slots, self._scratch_state, has_prefixes=self._has_prefixes
            )
        self._send(plan, updates)
        self._stage.begin(plan)
        if captured is None:
            hidden = self.forward(inputs)
        else:
            captured.forward.replay()
            hidden = captured.hidden
        if not self._stage.is_last:
            self._stage.hand_over(hidden[: plan.num_tokens])
            return CudaStep(state.outbox.fetch(0), [], None)
        if keep_logits:
            return CudaStep(state.outbox.fetch(0), [], self._logits(hidden, inputs)[: plan.num_logits].float())
        for_host = [not slot.is_device_sampled and item.num_logits > 0 for item, slot in zip(items, slots)]
        is_greedy = all([slot.is_greedy for slot in slots])
        logits: Tensor | None = None
        rows: list[int] | None = None
        if any(for_host):
            computed = self._logits(hidden, inputs)
            self._draw(computed, inputs, is_greedy=is_greedy)
            logits = computed[: plan.num_logits].float()
            rows = [row for row, is_host in enumerate(for_host) if not is_host] if is_decode else None
        elif captured is not None:
            captured.sample[is_greedy].replay()
        else:
            self.sample(hidden, inputs, is_greedy=is_greedy)
        self._stage.report(plan, state.outbox.tokens, logits)
        return CudaStep(state.outbox.fetch(len(items) if is_decode else inputs.num_sampled), rows, logits)

    def _send(self, plan: StepPlan, updates: Updates) -> None:
        """Sends the packed step, then applies what else it needs before its forward pass."""
        inbox, device = self._state.inbox, self._parts.device
        sections = (updates.records, updates.places, updates.blocks)
        if inbox.fits(*map(len, sections)):
            records, places, blocks = (inbox.put(section) for section in sections)
        else:
            records, places, blocks = (torch.tensor(section, dtype=torch.int32).to(device) for section in sections)
        inbox.send()
        if updates:
            self._parts.ops.update(self._state, records, places, blocks)
        if plan.block_copies:
            self._cache.copy_blocks(*self._ends(plan.block_copies))
        if plan.state_copies and self._cache.states is not None:
            self._cache.states.copy(*self._ends(plan.state_copies))

    def _ends(self, copies: list[tuple[int, int]]) -> list[Tensor]:
        """Returns the sources and the destinations of copies, [n] int64 each, on the device."""
        ends = [torch.tensor(side, dtype=torch.int64) for side in zip(*copies)]
        if self._parts.device.type != "cuda":
            return ends
        return [end.pin_memory().to(self._parts.device, non_blocking=True) for end in ends]

    def _logits(self, hidden: Tensor, inputs: StepInputs) -> Tensor:
        """Returns logits [L, vocab_size] in the model's dtype from hidden states [L, H]."""
        return self._model.compute_logits(hidden, self._outputs, dtype=hidden.dtype)

    def _draw(self, logits: Tensor, inputs: StepInputs, *, is_greedy: bool) -> None:
        """Samples those of the rows [L, vocab_size] that the device samples."""
        if not inputs.num_sampled:
            return
        if inputs.sampled_rows is not None:
            logits = logits.index_select(0, inputs.sampled_rows)
        self._parts.ops.sample(self._state, logits, inputs, is_greedy=is_greedy)

    def _out_of_memory(self, plan: StepPlan, error: Exception) -> OutOfMemoryError:
        used, what = "", f"a step of {plan.num_tokens} tokens and {plan.num_logits} rows of logits"
        if self._parts.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            used = f"{free / _MIB:.0f} of {total / _MIB:.0f} MiB are free on the device, "
            torch.cuda.empty_cache()  # what the failed step left behind, in pieces the next one may not fit into
        return OutOfMemoryError(
            f"{what} found no memory ({error}); {used}{self._cache.num_bytes / _MIB:.0f} MiB are KV cache. Lower "
            "KvCacheConfig.free_gpu_memory_fraction, max_num_tokens or max_batch_size"
        )

    # the halves of a decoding step, as `DecodeStep` wants them

    def inputs(self, size: int) -> StepInputs:
        """Returns the inputs of a captured step of ``size`` rows and sends padding there."""
        state = self._state
        return reserve_decode(
            state.inbox, state.block_tables, size, self._limits.max_seq_len, self._scratch_state,
            has_prefixes=self._has_prefixes,
        )  # fmt: skip

    @property
    def is_sampling(self) -> bool:
        """Whether logits and sampling are this rank's."""
        return self._stage.is_last

    def forward(self, inputs: StepInputs) -> Tensor:
        """Enqueues a forward pass; returns hidden states [L, H] of the rows whose logits are wanted.

        On a pipeline stage before the last those of all rows, [T, H].
        """
        state, parts, stage = self._state, self._parts, self._stage
        parts.ops.prepare(state, inputs)
        step = inputs.attention
        count = step.num_tokens
        ctx = CudaStepContext(
            self._cache, state.kv_slots[:count], step, parts.attention.begin(step), parts.ops.rope_and_cache,
            self._windows, self._tp, inputs.states, _wide(inputs.prefixes),
        )  # fmt: skip
        rows = inputs.logit_rows if stage.is_last else None
        return self._model(
            state.input_ids[:count], state.positions[:count], ctx, hidden=stage.hidden(count), rows=rows
        )  # fmt: skip

    def sample(self, hidden: Tensor, inputs: StepInputs, *, is_greedy: bool) -> None:
        """Enqueues logits and sampling of hidden states [L, H]; the tokens go to the outbox."""
        if inputs.num_logits:
            self._draw(self._logits(hidden, inputs), inputs, is_greedy=is_greedy)

    # life

    @torch.inference_mode()
    def capture(self, max_rows: int, agree_min: Callable[[int], int] | None = None) -> None:
        """Records decoding steps of up to ``max_rows`` as CUDA graphs, or says in the log why they run without.

        Args:
            max_rows: rows of the largest.
            agree_min: returns the least of all ranks' values; None: there is one rank. Recorded steps are padded, so
                either all ranks have them or none.

        Raises:
            OutOfMemoryError: the graphs do not fit.
            RuntimeError: recording failed on one of several ranks.
        """
        reason = self._why_not_captured()
        if agree_min is not None and not agree_min(int(reason is None)):
            reason = reason or "another rank cannot record them"
        if reason is None:
            try:
                self._graphs.capture(self, capture_sizes(max_rows))
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(
                    f"recording decoding steps of up to {max_rows} sequences found no memory "
                    f"({error}); lower KvCacheConfig.free_gpu_memory_fraction or max_batch_size"
                ) from error
            except RuntimeError as error:
                if agree_min is not None:
                    raise  # the others are in the same recording
                reason = f"recording failed: {error}"
        if reason is not None:
            logger.warning("decoding steps run without CUDA graphs: %s", reason)

    def _why_not_captured(self) -> str | None:
        parts = self._parts
        if parts.device.type != "cuda":
            return f"the device is {parts.device.type}"
        if not parts.attention.is_capturable:
            return f"attention through {parts.attention.name} cannot be recorded"
        if not parts.ops.is_capturable:
            return "sampling without triton cannot be recorded"
        return why_not_capturable(self._model)

    @property
    def cache_bytes(self) -> int:
        return self._cache.num_bytes

    @property
    def num_graph_sizes(self) -> int:
        """Batch sizes of which decoding steps are recorded."""
        return len(self._graphs)

    def close(self) -> None:
        """Waits for what was launched and gives the device's memory back; the runner cannot be used afterwards."""
        is_cuda = self._parts.device.type == "cuda"
        self._stage.close()
        try:
            if is_cuda:
                torch.cuda.current_stream().synchronize()
            self._graphs.clear()
            del self._model, self._cache, self._state, self._stage
            if is_cuda:
                torch.cuda.empty_cache()
        except RuntimeError as error:  # a kernel broke the device's context; its memory goes with the process
            logger.warning("the device's memory could not be given back: %s", error)


def _wide(prefixes: PrefixTokens | None) -> PrefixTokens | None:
    """Returns what models take: int64."""
    return None if prefixes is None else PrefixTokens(prefixes.lengths.long(), prefixes.mask_places.long())

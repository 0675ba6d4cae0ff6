"""FlashInfer as an `AttentionBackend`: XQA for decoding, FlashAttention for prompts, another backend for the rest.

FlashInfer is optional (``pip install 'lamella[cuda]'``) and is imported when a `FlashInferAttention` is made.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from lamella_core.errors import ConfigError
from lamella_executor.attention.backend import AttentionBackend, AttentionStep, LayerCall, StepAttention
from lamella_executor.attention.flashinfer_decode import HostScales, XqaDecode
from lamella_executor.attention.flashinfer_prefill import KERNELS, PagedPrefill, StepPlans

logger = logging.getLogger(__name__)

INSTALL = "pip install 'lamella[cuda]'"
LONG_PROMPT = 512  # tokens


def why_no_flashinfer() -> str | None:
    """Returns why FlashInfer cannot be used in this environment; None if it can be imported."""
    if find_spec("flashinfer") is None:
        return f"flashinfer is not installed: {INSTALL}"
    try:
        importlib.import_module("flashinfer")
    except Exception as error:  # noqa: BLE001 - it checks versions, compilers and caches when imported
        return f"flashinfer cannot be imported ({type(error).__name__}: {error}): {INSTALL}"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


class FlashInferAttention:
    """An `AttentionBackend`; owns FlashInfer's workspaces on the device.

    Calls that FlashInfer does not serve go to ``fallback``; which, and why, is logged once. Over a float8 cache
    decoding computes in float8 (queries are rounded to it as well), prompts in the queries' dtype.

    Args:
        fallback: serves the rest.
        device: of the caches.
        decode: whether FlashInfer serves decoding.
        prefill: whether FlashInfer serves prompts.
        prefill_kernel: "fa2", "fa3" (Hopper only) or "auto".
        least_prompt: mean length of a step's prompts from which on FlashInfer serves them; `LONG_PROMPT` is where it is
            ahead of our kernels. Above 0 it also leaves float8 caches, float8 results and what
            `StepAttention.leads_prefill` says to the fallback.

    Raises:
        ConfigError: FlashInfer is missing or broken, or the kernel's name is unknown.
    """

    name = "flashinfer"

    def __init__(
        self,
        fallback: AttentionBackend,
        device: torch.device | str = "cuda",
        *,
        decode: bool = True,
        prefill: bool = True,
        prefill_kernel: str = "auto",
        least_prompt: int = 0,
    ) -> None:
        if prefill_kernel not in KERNELS:
            raise ConfigError(f"prefill_kernel is {prefill_kernel!r}; allowed: {', '.join(KERNELS)}")
        reason = why_no_flashinfer()
        if reason is not None:
            raise ConfigError(f"attention by FlashInfer was asked for, but {reason}, or choose another backend")
        device = torch.device(device)
        capability = _capability(device)
        scales = HostScales()
        self.fallback = fallback
        self.least_prompt = least_prompt
        self.decoder = XqaDecode(device, capability, scales) if decode else None
        self.prefiller = PagedPrefill(device, capability, scales, prefill_kernel) if prefill else None
        self._reasons: dict[tuple[int, str], str | None] = {}  # by layer and phase; None: FlashInfer serves it
        version = getattr(importlib.import_module("flashinfer"), "__version__", "of unknown version")
        logger.info(
            "attention: FlashInfer %s for decoding: %s, for prompts: %s; what it does not serve goes to %s",
            version, "XQA" if decode else "no", prefill_kernel if prefill else "no", fallback.name,
        )  # fmt: skip

    @property
    def is_capturable(self) -> bool:
        """As the fallback is: it may be asked for any layer."""
        return self.fallback.is_capturable

    @property
    def workspace_bytes(self) -> int:
        """Memory on the device that this backend holds from its start."""
        return sum(part.workspace_bytes for part in (self.decoder, self.prefiller) if part is not None)

    def begin(self, step: AttentionStep) -> FlashInferStep:
        return FlashInferStep(self, step)

    def serves(self, phase: str, part: XqaDecode | PagedPrefill | None, q: Tensor, layer: LayerCall) -> bool:
        """Whether FlashInfer serves a layer in a phase ("decode" or "prefill"), by what is the same in every step."""
        if part is None:
            return False
        key = (layer.spec.layer_idx, phase)
        if key not in self._reasons:
            reason = part.why_not(q, layer)
            if reason is not None and reason not in self._reasons.values():
                logger.info("FlashInfer does not serve %s with %s: %s does", phase, reason, self.fallback.name)
            self._reasons[key] = reason
        return self._reasons[key] is None


class FlashInferStep:
    """Attention of one step."""

    def __init__(self, backend: FlashInferAttention, step: AttentionStep) -> None:
        # both halves of a mixed step must return one dtype, and FlashInfer's prompt kernels return no float8
        self._is_mixed = 0 < step.num_decode < step.num_tokens and backend.least_prompt == 0
        self._is_left = _mean_prompt(step) < backend.least_prompt or step.prefix_lens is not None  # to the fallback
        self._backend = backend
        self._step = step
        self._plans = StepPlans()
        self._tables: dict[bool, Tensor] = {}  # by whether the layer has a window: [D_, W] int32
        self._fallback: StepAttention | None = None

    def decode(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        layer = self._agreed(layer)
        decoder = self._backend.decoder
        if decoder is not None and self._backend.serves("decode", decoder, q, layer):
            out_dtype = decoder.out_dtype(self._step, q, layer)
            if decoder.serves(self._step, q, layer, out_dtype):
                return decoder.run(self._step, self._rows(layer), q, layer, out_dtype)
        return self._other().decode(q, layer, _fitting(out, q, layer))

    def prefill(self, q: Tensor, layer: LayerCall, out: Tensor | None = None) -> Tensor:
        layer = self._agreed(layer)
        prefiller, out = self._backend.prefiller, _fitting(out, q, layer)
        is_left = self._is_left or (self._backend.least_prompt > 0 and self._has_faster(q, layer))
        if prefiller is not None and not is_left and self._backend.serves("prefill", prefiller, q, layer):
            result = prefiller.run(self._step, self._plans, q, layer, out)
            if result is not None:
                return result
        return self._other().prefill(q, layer, out)

    def _agreed(self, layer: LayerCall) -> LayerCall:
        return replace(layer, out_scale=None) if self._is_mixed and layer.out_scale is not None else layer

    def leads_prefill(self, q: Tensor, layer: LayerCall) -> bool:
        return self._other().leads_prefill(q, layer)

    def _has_faster(self, q: Tensor, layer: LayerCall) -> bool:
        """Whether the fallback is ahead of FlashInfer's prompt kernels: over float8, and where it says so."""
        has_float8 = layer.k_cache.dtype.itemsize == 1 or layer.out_scale is not None
        return has_float8 or self._other().leads_prefill(q, layer)

    def _rows(self, layer: LayerCall) -> Tensor:
        """Returns the block tables of the decoding sequences, gathered once per step: [D_, W] int32 without gaps."""
        has_window = layer.window.length > 0
        if has_window not in self._tables:
            step, page_size = self._step, layer.k_cache.shape[2]
            width = min(step.block_tables.shape[1], -(-step.max_context_len // page_size))
            tables = step.block_tables[:, :width].index_select(0, step.table_rows[: step.num_decode])
            # blocks behind a window are gone from the table; the kernel may load what it masks
            self._tables[has_window] = tables.clamp_(min=0) if has_window else tables
        return self._tables[has_window]

    def _other(self) -> StepAttention:
        if self._fallback is None:
            self._fallback = self._backend.fallback.begin(self._step)
        return self._fallback


def _mean_prompt(step: AttentionStep) -> float:
    """Mean number of tokens that the step's prompts compute; 0 without prompts."""
    count = 0 if step.host is None else len(step.host.query) - step.num_decode
    return (step.num_tokens - step.num_decode) / count if count else 0.0


def _fitting(out: Tensor | None, q: Tensor, layer: LayerCall) -> Tensor | None:
    """Returns ``out`` unless it was made for the float8 result that is not asked for any more."""
    return None if out is not None and layer.out_scale is None and out.dtype != q.dtype else out

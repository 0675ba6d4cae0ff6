"""FP8 checkpoints in ModelOpt's Hugging Face form, made from tiny models, and what float32 arithmetic makes of them.

Nothing here uses Lamella: `simulated_logits` is the oracle for what it reads from such a directory.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
EXPERT_INPUT_SCALE = 0.05  # of what hooks do not see
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # computed in one product


def round8(x: Tensor, scale: Tensor | float) -> Tensor:
    """Returns float8 values of x / scale, saturated."""
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8)


def fake8(x: Tensor, scale: Tensor | float) -> Tensor:
    """Returns what float8 with this scale keeps of x."""
    return round8(x, scale).float() * scale


def write_modelopt(
    source: Path,
    target: Path,
    prompts: Sequence[Sequence[int]],
    *,
    exclude: Sequence[str] = ("lm_head",),
    kv_cache: bool = True,
    per_channel: bool = False,
    quant_config: dict[str, Any] | None = None,
) -> Path:
    """Quantizes the linears of a Hugging Face directory, scales calibrated over ``prompts``; returns ``target``.

    Args:
        source: directory with one model.safetensors.
        target: directory to write.
        prompts: token ids.
        exclude: names of modules, or beginnings of names, that stay as they are.
        kv_cache: whether k_scale and v_scale are written, and announced.
        per_channel: one weight scale per output feature and no input scales.
        quant_config: written as ``quantization_config`` into config.json; None: hf_quant_config.json is written.
    """
    largest = _calibrate(source, prompts)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not _is_linear(name, weight) or any(module == e or module.startswith(f"{e}.") for e in exclude):
            tensors[name] = weight
            continue
        magnitudes = weight.float().abs()
        scale = (magnitudes.amax(dim=1) if per_channel else magnitudes.max()) / LARGEST
        tensors[name] = round8(weight, scale[:, None] if per_channel else scale)
        tensors[f"{module}.weight_scale"] = scale
        if not per_channel:
            tensors[f"{module}.input_scale"] = (
                largest.get(f"{module}.in", torch.tensor(LARGEST * EXPERT_INPUT_SCALE)) / LARGEST
            )
        for key in "kv":
            if kv_cache and module.endswith(f"{key}_proj"):
                tensors[f"{module}.{key}_scale"] = largest[f"{module}.out"] / LARGEST
    shutil.copytree(source, target, dirs_exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    algo = "FP8_PER_CHANNEL_PER_TOKEN" if per_channel else "FP8"
    quantization = {
        "quant_algo": algo,
        "kv_cache_quant_algo": "FP8" if kv_cache else None,
        "exclude_modules": list(exclude),
    }
    if quant_config is None:
        content = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": quantization}
        (target / "hf_quant_config.json").write_text(json.dumps(content))
    else:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "quantization_config": quant_config}))
    return target


def edit_tensors(directory: Path, **changes: Tensor | None) -> None:
    """Replaces and adds tensors of a directory, "__" in a keyword standing for "."; None removes one."""
    tensors = load_file(directory / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.clone()
    save_file(tensors, directory / "model.safetensors")


@torch.no_grad()
def simulated_logits(source: Path, quantized: Path, prompt: Sequence[int], *, dynamic: bool = False) -> Tensor:
    """Returns float32 logits [T, vocab] of transformers' model with every quantized value rounded as it is computed.

    Args:
        source: the float32 directory that ``quantized`` was made from.
        quantized: what `write_modelopt` wrote.
        prompt: token ids.
        dynamic: inputs are rounded with a scale of their own per token.
    """
    model = _load(source)
    tensors = load_file(quantized / "model.safetensors")
    for module, linear in _linears(model):
        if f"{module}.weight_scale" in tensors:
            scale = None if dynamic else _shared(tensors, module, "input_scale")
            linear.weight.copy_(_effective_weight(tensors, module))
            linear.register_forward_pre_hook(_rounds_input(scale))
    scales = [
        [tensors.get(f"model.layers.{i}.self_attn.{key}_proj.{key}_scale") for key in "kv"]
        for i in range(model.config.num_hidden_layers)
    ]
    cache = _RoundingCache(scales) if scales[0][0] is not None else None
    return model(torch.tensor([list(prompt)]), past_key_values=cache, use_cache=cache is not None).logits[0]


def _effective_weight(tensors: dict[str, Tensor], module: str) -> Tensor:
    """Returns the weight that a product with the fused projection's one scale uses."""
    weight, scale = tensors[f"{module}.weight"].float(), tensors[f"{module}.weight_scale"]
    if scale.dim():
        return weight * scale[:, None]
    shared = _shared(tensors, module, "weight_scale")
    return fake8(weight * scale, shared)


def _shared(tensors: dict[str, Tensor], module: str, leaf: str) -> Tensor:
    """Returns the largest scale of the projections that are computed together with ``module``."""
    parent, _, own = module.rpartition(".")
    together = next((names for names in FUSED if own in names), (own,))
    return torch.stack([tensors[f"{parent}.{name}.{leaf}"] for name in together]).max()


def _rounds_input(scale: Tensor | None) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        own = x.abs().amax(-1, keepdim=True).clamp_min(1e-10) / LARGEST if scale is None else scale
        return (fake8(x, own), *args[1:])

    return hook


class _RoundingCache(transformers.DynamicCache):
    """A KV cache that rounds what it is given."""

    def __init__(self, scales: list[list[Tensor | None]]) -> None:
        super().__init__()
        self._scales = scales

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k_scale, v_scale = self._scales[layer]
        return super().update(fake8(key, k_scale), fake8(value, v_scale), layer, *args, **kwargs)


@torch.no_grad()
def _calibrate(source: Path, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Returns the largest magnitude at the input ("name.in") and output ("name.out") of every linear."""
    model = _load(source)
    largest: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            for key, tensor in ((f"{name}.in", args[0]), (f"{name}.out", out)):
                largest[key] = torch.maximum(largest[key], tensor.abs().max())

        return hook

    for name, linear in _linears(model):
        linear.register_forward_hook(watch(name))
    for prompt in prompts:
        model(torch.tensor([list(prompt)]))
    return dict(largest)


def _load(source: Path) -> Any:
    with _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def _linears(model: Any) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def _is_linear(name: str, weight: Tensor) -> bool:
    others = ("embed_tokens", "gate.weight", "norm")
    return weight.dim() == 2 and name.endswith(".weight") and not any(other in name for other in others)

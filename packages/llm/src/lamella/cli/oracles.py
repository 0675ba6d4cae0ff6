"""What ``lamella check`` compares with: transformers where it can compute the model, else Lamella's own float32.

No code of a model's repository runs, so that transformers can compute only what it has a class for. Lamella's own
computation takes each text whole and alone, without a cache, batches, chunks or quantization, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lamella.cli.whole_text import whole_logits
from lamella_core.auto import AutoConfig, AutoModelForCausalLM
from lamella_core.checkpoint.block_scales import open_source
from lamella_core.checkpoint.loader import load_weights
from lamella_core.checkpoint.mxfp4 import PACKED, Mxfp4Source
from lamella_core.checkpoint.planner import Planner
from lamella_core.checkpoint.rules import is_runtime_scale, scale_name, weight_of_scale
from lamella_core.checkpoint.source import WeightSource
from lamella_core.config import DTYPES, resolve_dtype
from lamella_core.errors import ConfigError
from lamella_core.hf_config import read_hf_config
from lamella_core.models.base import CausalLM
from lamella_core.quantization.hugging_face import loadable

Check = tuple[str, str, bool | None]  # name, measured value, passed; None: nothing is asked of it

_EAGER_IS_WRONG = ("falcon",)  # model types; transformers' eager attention adds ALiBi twice there
_MOST_NAMES = 5  # of tensors, in a message
_LONGEST_REASON = 200  # characters


class Unavailable(Exception):
    """transformers cannot compute the model; the message says why."""


class Oracle(Protocol):
    """Computes texts in another way than an `LLM` that serves."""

    @property
    def name(self) -> str:
        """For tables and messages."""
        ...

    @property
    def note(self) -> str:
        """What the comparison with it shows, and what it does not."""
        ...

    @property
    def checks(self) -> Sequence[Check]:
        """What was found out by loading it."""
        ...

    def logits(self, ids: list[int], num_prompt: int) -> Tensor:
        """Returns [len(ids), vocab_size] float32 for a text that begins with a prompt of ``num_prompt`` tokens."""
        ...


class TransformersOracle:
    """The class that transformers has for the model."""

    name = "transformers"
    checks: Sequence[Check] = ()

    def __init__(self, model: Any) -> None:
        self._model = model
        self.note = f"compared with transformers' {type(model).__name__}"

    def logits(self, ids: list[int], num_prompt: int) -> Tensor:
        """See `Oracle.logits`."""
        return self._model(torch.tensor([ids])).logits[0].float()


@dataclass(frozen=True)
class OwnModel:
    """Lamella's model in float32 on the CPU, and what its checkpoint says.

    Attributes:
        model: not quantized; weights that are, as the numbers that they stand for.
        note: see `Oracle.note`.
        checks: which tensors were read; those that are missing, unknown or of another shape are errors.
    """

    model: CausalLM
    note: str
    checks: Sequence[Check]
    name: str = "Lamella in float32"

    @classmethod
    def load(cls, hf_dir: Path, reason: str, max_seq_len: int | None = None) -> OwnModel:
        """Loads a directory; ``reason`` says why transformers does not do.

        Raises:
            CheckpointError: tensors are missing, unexpected or of the wrong shape; names all of them.
        """
        model_class, hf = AutoModelForCausalLM.get_model_class(hf_dir), read_hf_config(hf_dir)
        config = hf.resolve(model_class.config_class, dtype="float32")
        config = replace(config, quantization=replace(config.quantization, exclude_modules=("*",)))
        model = model_class.empty(loadable(config))
        source = open_source(hf_dir)
        check = _tensor_check(model, source)
        load_weights(model, source)
        if max_seq_len is not None:
            model.set_max_seq_len(max_seq_len)
        note = (
            f"{reason}; compared with Lamella's own float32 computation, which shows errors of serving, rounding and "
            "quantization but not of the model definition (shown by tests/conformance against independent references)"
        )
        return cls(model, note, (check,))

    def logits(self, ids: list[int], num_prompt: int) -> Tensor:
        """See `Oracle.logits`."""
        return whole_logits(self.model, ids, num_prompt)


def load_oracle(hf_dir: Path, dtype: str, max_seq_len: int | None = None) -> Oracle:
    """Returns the best oracle of a model that generates.

    Args:
        hf_dir: Hugging Face directory.
        dtype: of transformers' computation.
        max_seq_len: the longest sequence that position encodings are made for, where the model's own is not meant.

    Raises:
        CheckpointError: the weights do not fit config.json.
        ConfigError: no such dtype, or values of config.json that are not supported.
    """
    check_dtype(dtype)
    config = AutoConfig.from_hugging_face(hf_dir)
    source = open_source(hf_dir)
    try:
        if config.quantization.is_quantized or type(source) is not WeightSource:
            return TransformersOracle(_load_widened(hf_dir, dtype, source))
        return TransformersOracle(_load_plain(hf_dir, dtype, config.model_type, config.architecture))
    except Unavailable as error:
        return OwnModel.load(hf_dir, str(error), max_seq_len)


def check_dtype(dtype: str) -> None:
    """Checks the name of a dtype.

    Raises:
        ConfigError: there is none of that name.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")


def from_pretrained(auto_class: Any, hf_dir: Path, dtype: str, architecture: str, **options: Any) -> Any:
    """Returns a model of transformers, all of whose weights are in the directory.

    Raises:
        Unavailable: it has no class for the model, or cannot load it.
    """
    torch_dtype = "auto" if dtype == "auto" else DTYPES[dtype]
    try:
        model, report = auto_class.from_pretrained(
            str(hf_dir), dtype=torch_dtype, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # its checks of a configuration raise anything
        raise Unavailable(_reason(architecture, error)) from error
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:_MOST_NAMES])
        raise Unavailable(
            f"transformers takes this {architecture} for a {type(model).__name__}, whose weights are others ({names})"
        )
    return model.eval()


def _reason(architecture: str, error: Exception) -> str:
    import transformers

    if not hasattr(transformers, architecture):
        return f"transformers has no class for {architecture}"
    text = " ".join(str(error).split()) or type(error).__name__
    short = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    return f"transformers cannot load this {architecture} ({short})"


def _load_plain(hf_dir: Path, dtype: str, model_type: str, architecture: str) -> Any:
    """Returns transformers' model of a directory; of the class that config.json names if it cannot choose one."""
    import transformers

    options = {"attn_implementation": "sdpa" if model_type in _EAGER_IS_WRONG else "eager"}
    try:
        return from_pretrained(transformers.AutoModelForCausalLM, hf_dir, dtype, architecture, **options)
    except Unavailable:
        named = getattr(transformers, architecture, None)
        if named is None:
            raise
        return from_pretrained(named, hf_dir, dtype, architecture, **options)


def _load_widened(hf_dir: Path, dtype: str, source: WeightSource) -> Any:
    """Returns transformers' model of a directory of narrow weights, each as the numbers that it stands for."""
    import transformers

    architecture = read_hf_config(hf_dir).architecture
    model_class = getattr(transformers, architecture, None)
    try:
        config = transformers.AutoConfig.from_pretrained(str(hf_dir), trust_remote_code=False)
    except Exception as error:  # its checks of a configuration raise anything
        raise Unavailable(_reason(architecture, error)) from error
    if model_class is None:
        raise Unavailable(f"transformers has no class for {architecture}")
    config.__dict__.pop("quantization_config", None)
    torch_dtype = DTYPES[resolve_dtype(dtype, str(config.dtype or "float32"))]
    model = model_class.from_pretrained(
        None, config=config, state_dict=_widened(source, torch_dtype), dtype=torch_dtype, attn_implementation="eager"
    )
    return model.eval()


def _widened(source: WeightSource, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the tensors of a source as the numbers that they stand for, as transformers' model names them."""
    tensors: dict[str, Tensor] = {}
    names = set(source.names())
    for name in names:
        if weight_of_scale(name) in names or is_runtime_scale(name):
            continue
        tensor = source.read(name)
        if tensor.dtype == torch.float8_e4m3fn:
            scale = source.read(scale_name(name, "weight_scale")).float()
            scale = scale.view(-1, *[1] * (tensor.dim() - 1)) if scale.numel() > 1 else scale.view(())
            tensor = tensor.float() * scale
        key = name
        if isinstance(source, Mxfp4Source) and name.endswith(PACKED):
            key, tensor = name.removesuffix(PACKED), tensor.mT.contiguous()  # experts [E, out, in] become [E, in, out]
        tensors[key] = tensor.to(dtype)
    return tensors


def _tensor_check(model: CausalLM, source: WeightSource) -> Check:
    """Returns how many tensors of a source fill the model, and the names of the others; see `Planner.plan`."""
    plan = Planner(model, source).plan(dict(model.named_parameters()))  # type: ignore[arg-type]
    used = {fill.source for fills in plan.values() for fill in fills}
    names = source.names()
    unread = sorted(n for n in names if n not in used and weight_of_scale(n) not in used and not is_runtime_scale(n))
    read = f"{len(names) - len(unread)} of {len(names)} read, of the shapes of config.json"
    if not unread:
        return "tensors of the checkpoint", read, True
    more = f" and {len(unread) - _MOST_NAMES} more" if len(unread) > _MOST_NAMES else ""
    return "tensors of the checkpoint", f"{read}; not needed: {', '.join(unread[:_MOST_NAMES])}{more}", True

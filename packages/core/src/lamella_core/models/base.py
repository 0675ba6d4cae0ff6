"""CausalLM: what every decoder has in common, from construction and loading to the forward pass of one rank.

A model's parameters are made without memory and then filled: by a checkpoint (`from_hugging_face`, `from_checkpoint`),
an engine, or with dummy values (``Model(config)``). A rank builds only its stage's layers and its tensor shard.

Shape legend: T tokens of this step (packed, no padding), H hidden size, R rows whose logits are wanted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from lamella_core import placement
from lamella_core.checkpoint.loader import load_weights
from lamella_core.checkpoint.native import load_checkpoint, save_checkpoint
from lamella_core.checkpoint.rules import WeightRule
from lamella_core.config import ModelConfig
from lamella_core.context import AttentionSpec, ForwardContext, StateSpec
from lamella_core.device import resolve_device
from lamella_core.errors import ConfigError
from lamella_core.hf_config import read_hf_config
from lamella_core.hub import resolve_model_dir
from lamella_core.kernels.matmul import planning_for
from lamella_core.layers.attention import Attention
from lamella_core.layers.decoder import share_sums
from lamella_core.layers.embedding import LMHead, VocabMatrix, VocabParallelEmbedding
from lamella_core.layers.latent_attention import LatentAttention
from lamella_core.layers.mixer import RecurrentMixer
from lamella_core.layers.norm import Norm
from lamella_core.layers.rotary import RotaryEmbedding, Rotation
from lamella_core.mapping import Mapping
from lamella_core.models._dummy import fill_dummy
from lamella_core.quantization.config import QuantConfig
from lamella_core.quantization.hugging_face import loadable

L = TypeVar("L", bound="CausalLM")


class _DummyByDefault(type):
    """Makes ``Model(config)`` a model with dummy weights; `CausalLM.empty` makes one without memory."""

    def __call__(cls, config: ModelConfig) -> Any:
        model = super().__call__(config)
        fill_dummy(model)
        return model

    def _construct(cls, config: ModelConfig) -> Any:
        return super().__call__(config)


class CausalLM(nn.Module, metaclass=_DummyByDefault):
    """A decoder-only language model on one rank.

    Subclasses set ``config_class`` and ``WEIGHTS`` and build their layers in `make_layer` and `make_norm`. Parameter
    names count layers over the whole model, whatever the pipeline stage.
    """

    config_class: ClassVar[type[ModelConfig]]
    architectures: ClassVar[tuple[str, ...]] = ()  # set by `register`
    WEIGHTS: ClassVar[Sequence[WeightRule]]
    SOURCE_PREFIX: ClassVar[str] = "model."  # that source names may lack (saved from the bare decoder)
    OUTER_PREFIX: ClassVar[str] = ""  # of source names where the decoder is a part of a larger model
    IGNORED: ClassVar[Sequence[str]] = ()  # name patterns of source tensors that hold no weights
    task: ClassVar[str] = "generate"  # or "score": the output layer's rows are scores, and no text is generated
    pooling: ClassVar[str] = "last"  # of a model that scores: the "first" or "last" token is read, or all "tokens"
    is_causal: ClassVar[bool] = True  # False: every token sees the whole text

    has_states: ClassVar[bool] = False  # True: some layers keep a state per sequence, see `state_specs`

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} is made from a {self.config_class.__name__}, not a {type(config).__name__}; "
                "AutoConfig.from_hugging_face returns the right one for a model's directory"
            )
        self.config = config
        mapping = config.mapping
        rope = config.rope
        self.rotary = RotaryEmbedding(rope, config.max_position_embeddings, config.local_rope) if rope else None
        self.embed_tokens = VocabParallelEmbedding(config) if mapping.is_first_pp_rank else None
        self.layers = nn.ModuleDict(
            {str(index): self.make_layer(index) for index in mapping.pp_layers(config.num_hidden_layers)}
        )
        if mapping.tp_size > 1:
            share_sums(self.layers.values())
        self.norm = self.make_norm() if mapping.is_last_pp_rank else None
        tied = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = self.make_head(tied) if mapping.is_last_pp_rank else None

    def make_layer(self, index: int) -> nn.Module:
        """Returns layer ``index``: called with (hidden, residual, rotation, ctx), returns (hidden, residual)."""
        raise NotImplementedError

    def make_norm(self) -> Norm | None:
        """Returns the norm before the output layer, if there is one."""
        raise NotImplementedError

    def make_head(self, tied: VocabMatrix | None) -> nn.Module:
        """Returns the output layer, which may share the embedding's weight: (hidden [R, H], ctx, dtype) -> [R, ...]."""
        return LMHead(self.config, tied, self.config.lm_head_bias)

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Returns the first layer's input [T, H]. Runs on the first pipeline stage only."""
        if self.embed_tokens is None:
            raise ConfigError("this pipeline stage has no embedding: pass the previous stage's result as `hidden`")
        return self.embed_tokens(input_ids, ctx)

    def forward(
        self,
        input_ids: torch.Tensor,  # [T] int64
        positions: torch.Tensor,  # [T] int64, each token's place in its request
        ctx: ForwardContext,
        hidden: torch.Tensor | None = None,  # [T, H], the previous pipeline stage's result
        rows: torch.Tensor | None = None,  # [R] int64: tokens whose results are wanted; last stage only; None: all
    ) -> torch.Tensor:
        """Returns hidden states: [T, H], the next stage's input; on the last stage [R, H], what `compute_logits` takes.

        The last layer computes no more than ``rows`` once it has attended.
        """
        if hidden is None:
            hidden = self.embed(input_ids, positions, ctx)
        return self.run_layers(hidden, self.rotary(positions) if self.rotary is not None else None, ctx, rows)

    def run_layers(
        self, hidden: torch.Tensor, rotation: Rotation | None, ctx: ForwardContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns what `forward` returns, from the first layer's input [T, H] and the tokens' rotations."""
        residual: torch.Tensor | None = None
        *others, last = self.layers.values()
        for layer in others:
            hidden, residual = layer(hidden, residual, rotation, ctx)
        if rows is not None and getattr(last, "selects_rows", False):
            hidden, residual = last(hidden, residual, rotation, ctx, rows)
        else:
            hidden, residual = last(hidden, residual, rotation, ctx)
            if rows is not None:
                hidden = hidden.index_select(0, rows)
                residual = residual.index_select(0, rows) if residual is not None else None
        if self.norm is not None and hidden.shape[0]:
            return self.norm(hidden, residual)[0]
        return hidden if residual is None else hidden + residual

    def compute_logits(
        self, hidden: torch.Tensor, ctx: ForwardContext, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Returns logits [R, vocab_size] of rows [R, H] of the last stage's hidden states, on every tp rank.

        With the model's own ``dtype`` they are what the output layer computes, without a wider copy.
        """
        if self.lm_head is None:
            raise ConfigError("this pipeline stage has no output layer: only the last stage computes logits")
        return self.lm_head(hidden, ctx, dtype)

    def attention_specs(self) -> list[AttentionSpec]:
        """Returns one spec per attention layer of this rank, in layer order: what KV caches are sized from."""
        return [module.spec for module in self.modules() if isinstance(module, (Attention, LatentAttention))]

    def state_specs(self) -> list[StateSpec]:
        """Returns one spec per layer of this rank that keeps a state per sequence, in layer order."""
        return [module.state_spec for module in self.modules() if isinstance(module, RecurrentMixer)]

    def set_max_seq_len(self, max_seq_len: int) -> None:
        """Tells position encodings the longest sequence to come, so that tables are made now and not while serving.

        Changes results only with rope_type "longrope": see `RotaryEmbedding.set_max_seq_len`.
        """
        if self.rotary is not None:
            self.rotary.set_max_seq_len(max_seq_len)

    def num_parameters(self) -> int:
        """Returns how many numbers this rank's weights are, tied ones once, padding included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def weight_bytes(self) -> int:
        """Returns the bytes of this rank's weights as they are stored."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    def finish_loading(self) -> None:
        """Called once when the weights of a Hugging Face directory have been read: a model may change its own then."""

    def ignored_sources(self) -> Sequence[str]:
        """Returns name patterns of source tensors that may be left unread."""
        return self.IGNORED

    def weight_rules(self, source_names: Collection[str]) -> list[WeightRule]:
        """Returns `WEIGHTS` adapted to this rank and to a source that holds tensors of these names.

        Sources saved from the bare decoder lack `SOURCE_PREFIX`, those of a larger model have `OUTER_PREFIX` before all
        names, or after `SOURCE_PREFIX`.
        With tied embeddings either tensor may be stored; the embedding is preferred, also for the copy that the output
        layer of a later pipeline stage needs.
        """
        prefix, outer = self.SOURCE_PREFIX, self.OUTER_PREFIX
        spellings = ((prefix, prefix + outer), ("", outer)) if outer else ()
        plain, there = next(  # how names begin: in the rules, in the source
            (pair for pair in spellings if any(name.startswith(pair[1]) for name in source_names)), ("", "")
        )
        source_names = [plain + name.removeprefix(there) for name in source_names if name.startswith(there)]
        rules = list(self.WEIGHTS)
        if prefix and not any(name.startswith(prefix) for name in source_names):
            rules = [dataclasses.replace(rule, source=rule.source.removeprefix(prefix)) for rule in rules]
        if self.config.tie_word_embeddings:
            ends = ("embed_tokens.weight", "lm_head.weight")
            sources = [rule for end in ends for rule in rules if rule.target == end]
            tied = [dataclasses.replace(source, target=end) for source in sources for end in ends]
            rules = [*tied, *(rule for rule in rules if rule.target not in ends)]
        return [
            dataclasses.replace(rule, source=there + rule.source.removeprefix(plain))
            if rule.source.startswith(plain)
            else rule
            for rule in rules
        ]

    @property
    def device(self) -> str:
        """Where the weights are: "cpu" or "cuda"; "meta" if they have no memory."""
        return next(self.parameters()).device.type

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What torch's ``to``, ``cuda`` and the like do; kernels of another device are replaced by default ones."""
        result = super()._apply(fn, recurse)
        placement.replan(self)
        return result

    @classmethod
    def empty(cls: type[L], config: ModelConfig, device: str = "cpu") -> L:
        """Returns the model with parameters that have shape, dtype and shard but no memory (meta device).

        Its kernels are those for ``device``, where the parameters will be.
        """
        with planning_for(device):
            return cls._construct(config)

    @classmethod
    def dummy(cls: type[L], config: ModelConfig, device: str = "cpu") -> L:
        """Returns the model with dummy weights, as ``Model(config)`` does, made on "cpu" or "cuda"."""
        model = cls.empty(config, device)
        placement.check_room(model, device)
        fill_dummy(model, device)
        return model

    @classmethod
    def from_hugging_face(
        cls: type[L],
        dir_or_id: str | os.PathLike[str],
        dtype: str | torch.dtype = "auto",
        mapping: Mapping | None = None,
        quant_config: QuantConfig | None = None,
        load_format: str = "auto",
        device: str = "cpu",
        **overrides: Any,
    ) -> L:
        """Returns this rank's model with the weights of a Hugging Face directory or hub id.

        Args:
            dir_or_id: local directory, or a hub id that is downloaded.
            dtype: of the weights; "auto" takes what config.json says.
            mapping: which shard this rank holds; by default everything.
            quant_config: how to quantize; by default as the weights are. Weights that are not quantized yet are as they
                are read; those that are may not contradict it.
            load_format: "auto" reads the weights, "dummy" makes random ones from config.json alone.
            device: "cpu", "cuda", or "auto" for the GPU if this machine has one; weights are read straight onto it.
            overrides: fields of the configuration to replace.

        Raises:
            ConfigError: an unknown override or load format, a config.json that contradicts itself, or no such device.
            CheckpointError: files are missing, damaged or do not fit the model.
            OutOfMemoryError: the GPU has no room for the weights.
            UnsupportedModelError: the directory holds another architecture than this class implements.
        """
        device = resolve_device(device)
        if load_format not in ("auto", "dummy"):
            raise ConfigError(f"load_format is {load_format!r}; allowed: 'auto', 'dummy'")
        directory = resolve_model_dir(dir_or_id, weights=load_format == "auto")
        hf = read_hf_config(directory, overrides)
        hf.require_architecture(cls.architectures, cls.__name__)
        config = hf.resolve(cls.config_class, dtype=dtype, mapping=mapping, quantization=quant_config)
        if load_format == "dummy":
            return cls.dummy(config, device)
        model = cls.empty(loadable(config), device)
        placement.check_room(model, device)
        load_weights(model, directory, device=device)
        return model

    @classmethod
    def from_checkpoint(cls: type[L], directory: str | os.PathLike[str], rank: int = 0, device: str = "cpu") -> L:
        """Returns the model of a Lamella checkpoint directory as ``rank`` holds it, on ``device``.

        Raises:
            CheckpointError: files are missing, damaged or do not fit the model.
            ConfigError: no such device.
        """
        return load_checkpoint(cls, Path(directory), rank, resolve_device(device))

    def save_checkpoint(self, directory: str | os.PathLike[str]) -> None:
        """Writes this rank's weights and the configuration as a Lamella checkpoint directory."""
        save_checkpoint(self, Path(directory))

"""From the ``model`` argument of `LLM` to an engine in memory, and from there back to a directory."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lamella.args import LlmArgs
from lamella.progress import shown_progress
from lamella.ranks import RankRecipe, check_ranks, engine_recipe, source_recipe
from lamella.tokenizer import TokenizerBase
from lamella_builder.job import checkpoint_config
from lamella_builder.rank_source import RankSource
from lamella_builder.steps import StepClock
from lamella_core.checkpoint.formats import ENGINE_FILE, detect_format, read_json_object
from lamella_core.config import ModelConfig, resolve_dtype
from lamella_core.device import resolve_device
from lamella_core.engine import Engine, EngineSpec, EngineWriter
from lamella_core.errors import ConfigError, EngineFormatError
from lamella_core.hub import resolve_model_dir
from lamella_core.mapping import Mapping
from lamella_core.quantization.config import QuantConfig

logger = logging.getLogger(__name__)


def open_engine(args: LlmArgs) -> tuple[Engine | RankRecipe, Path | None]:
    """Opens or builds the engine that ``args.model`` names; of one of several ranks, says how each rank does so.

    Returns:
        The engine or recipe, and the directory to look for a tokenizer in (None: there is none).

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError, OutOfMemoryError: see `LLM`.
    """
    if isinstance(args.model, Engine):
        _check_built(args.model.spec, args)
        return engine_recipe(args.model) or args.model, args.model.tokenizer_dir
    directory = resolve_model_dir(args.model, args.revision, weights=args.load_format != "dummy")
    kind = detect_format(directory)
    if kind == "engine":
        _check_built(_read_spec(directory), args)
        opened = engine_recipe(directory) or Engine.load(directory)
        return opened, opened.tokenizer_dir or directory
    source, config = _source(args, directory, kind)
    if config.mapping.world_size > 1:
        check_ranks(config, source.build_config.device)
        return source_recipe(source, shows_progress=args.enable_tqdm), directory
    with shown_progress(args.enable_tqdm) as progress:
        return source.engine(0, StepClock(progress)), directory


def _source(args: LlmArgs, directory: Path, kind: str) -> tuple[RankSource, ModelConfig]:
    """Returns where a model's ranks come from, and its configuration seen from rank 0."""
    build_config = args.resolved_build_config()
    build_config = replace(build_config, device=resolve_device(build_config.device))
    sizes = args.sizes()
    if kind == "checkpoint":
        config = checkpoint_config(directory, sizes, None)
        _check_same(args, config.dtype, config.quantization, "checkpoint")
        return RankSource(directory, kind, build_config, config.mapping), config

    def source(mapping: Mapping) -> RankSource:
        quant_config = args.resolved_quant_config()
        return RankSource(directory, kind, build_config, mapping, args.dtype, quant_config, args.load_format)

    num_gpus = torch.cuda.device_count() if build_config.device == "cuda" else None
    if sizes.auto_parallel and sizes.world_size is None and num_gpus:
        sizes = replace(sizes, world_size=num_gpus)
    config, _ = sizes.resolve(lambda mapping: source(mapping).config(), build_config, num_local=num_gpus)
    return source(config.mapping), config


def _read_spec(directory: Path) -> EngineSpec:
    """Returns what an engine directory says of itself; no weight is read."""
    path = directory / ENGINE_FILE
    return EngineSpec.from_dict(read_json_object(path, EngineFormatError), path)


def _check_built(spec: EngineSpec, args: LlmArgs) -> None:
    """Refuses options that only another build can grant.

    Raises:
        ConfigError: see above.
    """
    mapping, sizes = spec.model.mapping, args.sizes()
    asked = f"--tp_size {sizes.tp_size or 1} --pp_size {sizes.pp_size or 1}"
    if sizes.auto_parallel:
        asked = f"--auto_parallel --world_size {sizes.world_size}"
    sizes.check_same(mapping, "the engine", f"build it again: lamella-build {asked}")
    _check_same(args, spec.model.dtype, spec.model.quantization, "engine")
    built = spec.build
    if args.device not in ("auto", built.device):
        raise ConfigError(
            f"device is {args.device!r}, but the engine was built for {built.device!r}; leave it out, or build again "
            f"from the model: lamella-build --device {args.device}"
        )
    for name in ("max_seq_len", "max_input_len", "max_beam_width"):
        wanted = getattr(args, name)
        if wanted is not None and wanted != getattr(built, name):
            raise ConfigError(
                f"{name} is {wanted}, but the engine was built with {getattr(built, name)}; leave it out, or build "
                "again from the model"
            )
    for name in ("max_batch_size", "max_num_tokens"):
        wanted = getattr(args, name)
        if wanted is not None and wanted > getattr(built, name):
            raise ConfigError(
                f"{name} is {wanted}; the engine was built for at most {getattr(built, name)}: build again"
            )
    if args.build_config is not None:
        raise ConfigError(
            "build_config has no effect on an engine that is built; leave it out, or build from the model"
        )


def _check_same(args: LlmArgs, dtype: str, quantization: QuantConfig, what: str) -> None:
    if args.load_format == "dummy":
        raise ConfigError(f"load_format 'dummy' needs a Hugging Face directory; this {what} has its own weights")
    if args.dtype != "auto" and resolve_dtype(args.dtype) != dtype:
        raise ConfigError(f"dtype is {args.dtype}, but the {what} holds {dtype}; leave it at 'auto', or convert again")
    asked = args.resolved_quant_config() or QuantConfig()
    field = quantization.contradiction(asked, is_final=True)
    if field is not None:
        raise ConfigError(
            f"quant_config differs from the {what}'s own: {field} is {getattr(asked, field)!r} and there "
            f"{getattr(quantization, field)!r}; leave it out, or convert again"
        )


def save_engine(engine: Engine | RankRecipe, tokenizer: TokenizerBase | None, directory: Path) -> None:
    """Writes an engine directory, atomically, with the tokenizer that is in use (None: the model's own)."""
    with TemporaryDirectory() as scratch:
        files = engine.tokenizer_dir if tokenizer is None else tokenizer.directory
        if tokenizer is not None and files is None:
            files = Path(scratch) if tokenizer.save(Path(scratch)) else None
            if files is None:
                logger.warning(
                    "%s cannot be saved; pass tokenizer= when %s is opened", type(tokenizer).__name__, directory
                )
        with EngineWriter(directory, tokenizer_dir=files) as writer:
            if isinstance(engine, RankRecipe):
                engine.write_ranks(writer)
                return
            for rank in engine.ranks:
                writer.add_rank(rank, engine.spec, engine.weights(rank))

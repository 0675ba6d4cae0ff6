"""From the ``model`` argument of `LLM` to an engine in memory, and from there back to a directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lamella.args import LlmArgs
from lamella.tokenizer import TokenizerBase
from lamella_builder import build
from lamella_core.auto import AutoModelForCausalLM
from lamella_core.checkpoint.formats import detect_format
from lamella_core.config import resolve_dtype
from lamella_core.device import resolve_device
from lamella_core.engine import Engine, EngineWriter
from lamella_core.errors import ConfigError
from lamella_core.hub import resolve_model_dir
from lamella_core.quantization.config import QuantConfig

logger = logging.getLogger(__name__)


def open_engine(args: LlmArgs) -> tuple[Engine, Path | None]:
    """Opens or builds the engine that ``args.model`` names.

    Returns:
        The engine, and the directory to look for a tokenizer in (None: there is none).

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError: see `LLM`.
    """
    if isinstance(args.model, Engine):
        return _checked(args.model, args), args.model.tokenizer_dir
    directory = resolve_model_dir(args.model, args.revision, weights=args.load_format != "dummy")
    kind = detect_format(directory)
    if kind == "engine":
        engine = _checked(Engine.load(directory), args)
        return engine, engine.tokenizer_dir or directory
    build_config = args.resolved_build_config()
    device = resolve_device(build_config.device)
    if kind == "checkpoint":
        model = AutoModelForCausalLM.from_checkpoint(directory, device=device)
        _check_same(args, model.config.dtype, model.config.quantization, "checkpoint")
    else:
        model = AutoModelForCausalLM.from_hugging_face(
            directory, dtype=args.dtype, quant_config=args.resolved_quant_config(), load_format=args.load_format,
            device=device,
        )  # fmt: skip
    with _progress(args.enable_tqdm) as progress:
        return build(model, build_config, progress=progress, tokenizer_dir=directory), directory


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yields a callback that draws one bar per build step, or None."""
    if not shown:
        yield None
        return
    from lamella.progress import Bar

    bar = Bar(desc="build", unit="unit")

    def update(step: str, done: int, total: int) -> None:
        bar.set_description(step, refresh=False)
        bar.n, bar.total = done, total
        bar.refresh()

    try:
        yield update
    finally:
        bar.close()


def _checked(engine: Engine, args: LlmArgs) -> Engine:
    """Returns the engine if it is what ``args`` ask for.

    Raises:
        ConfigError: an option that only another build can grant.
    """
    _check_same(args, engine.spec.model.dtype, engine.spec.model.quantization, "engine")
    built = engine.spec.build
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
    return engine


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


def save_engine(engine: Engine, tokenizer: TokenizerBase | None, directory: Path) -> None:
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
            for rank in engine.ranks:
                writer.add_rank(rank, engine.spec, engine.weights(rank))

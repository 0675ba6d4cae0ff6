"""Engine: a model built for its limits, in memory or mapped from disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lamella_core import device as devices
from lamella_core.checkpoint.formats import ENGINE_FILE, rank_file, read_json_object
from lamella_core.checkpoint.layout import PLAIN_LAYOUT, matmul_weights
from lamella_core.checkpoint.safetensors_file import SafetensorsFile
from lamella_core.engine.build_config import BuildConfig
from lamella_core.engine.checksum import tensor_checksum
from lamella_core.engine.spec import EngineSpec, check_content, check_schema
from lamella_core.engine.writer import EngineWriter, has_tokenizer
from lamella_core.errors import CheckpointError, ConfigError, EngineFormatError
from lamella_core.kernels.matmul import MatmulPlan, cpu_fingerprint, default_plan
from lamella_core.layers.parameter import set_parameter
from lamella_core.models.registry import get_model_class
from lamella_core.placement import place

if TYPE_CHECKING:
    from lamella_core.models.base import CausalLM

logger = logging.getLogger(__name__)

# Parts of the fingerprints that say which kernels run and how fast; the thread count and versions do not.
_CPU_KEYS = ("machine", "model", "flags", "native")
_GPU_KEYS = ("name", "capability")


class Engine:
    """What `build` returns and `load` reads. Immutable; holds the weights of one or several ranks.

    Attributes:
        spec: configuration, limits, plans and timings.
        tokenizer_dir: directory with the tokenizer's files, when known.
        directory: where the engine was loaded from; None for one that was just built.
    """

    def __init__(
        self,
        spec: EngineSpec,
        weights: Mapping[int, Mapping[str, torch.Tensor]],
        *,
        tokenizer_dir: Path | str | None = None,
        directory: Path | None = None,
    ) -> None:
        self.spec = spec
        self.tokenizer_dir = Path(tokenizer_dir) if tokenizer_dir is not None else None
        self.directory = directory
        self._weights = dict(weights)

    @classmethod
    def from_model(
        cls, model: CausalLM, build: BuildConfig | None = None, *, tokenizer_dir: Path | str | None = None, **spec: Any
    ) -> Engine:
        """Returns an engine that shares a model's memory and has its plans; nothing is timed or moved.

        Args:
            model: one rank's model.
            build: limits; resolved here.
            tokenizer_dir: directory with the tokenizer's files.
            spec: further fields of `EngineSpec`.

        Raises:
            ConfigError: limits that the model rules out, or another device than the model's.
        """
        config, build = model.config, build or BuildConfig()
        if build.device not in ("auto", model.device):
            raise ConfigError(
                f"the model is on {model.device!r}, an engine for {build.device!r} has its weights there: use "
                "lamella_builder.build, which moves them, or lamella_core.placement.place"
            )
        engine_spec = EngineSpec(
            model=config,
            build=replace(build, device=model.device).resolved(config),
            plans={held.name: held.plan.to_dict() for held in matmul_weights(model)},
            cpu=_fingerprint("cpu") if model.device == "cpu" else {},
            gpu=_fingerprint("cuda") if model.device == "cuda" else {},
            **spec,
        )
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return cls(engine_spec, {config.mapping.rank: weights}, tokenizer_dir=tokenizer_dir)

    @property
    def device(self) -> str:
        """Where it runs: "cpu" or "cuda"."""
        return self.spec.build.device

    @property
    def world_size(self) -> int:
        """Number of ranks that the engine was built for."""
        return self.spec.model.mapping.world_size

    @property
    def ranks(self) -> list[int]:
        """Ranks whose weights this object holds."""
        return sorted(self._weights)

    def weights(self, rank: int = 0) -> Mapping[str, torch.Tensor]:
        """Returns a rank's parameters by name, each in the layout of its plan.

        Those of a loaded engine for a GPU are in the mapped file until `model` puts them on the GPU.

        Raises:
            EngineFormatError: the rank's weights are not in this object.
        """
        if rank not in self._weights:
            raise EngineFormatError(
                f"rank {rank} is not held: this engine object has ranks {self.ranks} of {self.world_size}; load it "
                f"with Engine.load(directory, rank={rank})"
            )
        return self._weights[rank]

    def weight_bytes(self, rank: int = 0) -> int:
        """Returns the bytes of a rank's weights."""
        return sum(tensor.nbytes for tensor in self.weights(rank).values())

    def save(self, directory: Path | str) -> None:
        """Writes ``engine.json``, one weight file per rank and the tokenizer's files; atomically (see `EngineWriter`).

        Raises:
            EngineFormatError: the directory holds other files, or not all ranks are in this object.
            CheckpointError: it cannot be written.
        """
        with EngineWriter(directory, tokenizer_dir=self.tokenizer_dir) as writer:
            for rank in self.ranks:
                writer.add_rank(rank, self.spec, self._weights[rank])

    @classmethod
    def load(cls, directory: Path | str, rank: int = 0, *, verify: bool = True) -> Engine:
        """Maps a rank's weights; nothing is copied or converted.

        Args:
            directory: what `save` wrote.
            rank: whose weights to map.
            verify: compare engine.json and every tensor with their checksums, which reads all weights once.

        Raises:
            EngineFormatError: not an engine, of a newer schema, a file missing, truncated or damaged; the message names
                the file and the remedy.
            ConfigError: the engine was built for a GPU, and this machine has none that can run models.
        """
        directory = Path(directory)
        path = directory / ENGINE_FILE
        if not path.is_file():
            raise EngineFormatError(f"{directory} is no engine: it has no {ENGINE_FILE}; build one with lamella-build")
        data = read_json_object(path, EngineFormatError)
        check_schema(data, path)
        spec = EngineSpec.from_dict(data, path, rank)
        _require_device(spec.build.device, f"{directory}")
        weights = _open_weights(directory / rank_file(rank), data.get("files"), verify)
        if verify:  # last: an error that names the damaged field says more
            check_content(data, path)
        tokenizer_dir = directory if has_tokenizer(directory) else None
        return cls(spec, {rank: weights}, tokenizer_dir=tokenizer_dir, directory=directory)

    from_dir = load

    def check_machine(self) -> str | None:
        """Returns what to tell the user when this machine is not the one that chose the kernels, else None."""
        is_gpu = self.device == "cuda"
        recorded = self.spec.gpu if is_gpu else self.spec.cpu
        here = _fingerprint(self.device)
        changed = [key for key in (_GPU_KEYS if is_gpu else _CPU_KEYS) if recorded.get(key) != here.get(key)]
        if not changed:
            return None
        details = "; ".join(f"{key}: built with {recorded.get(key)!r}, here {here.get(key)!r}" for key in changed)
        another = "on another GPU" if is_gpu else "on another CPU"
        what = "with another set of native kernels" if changed == ["native"] else another
        return f"the engine's kernels were chosen {what} ({details}); default kernels run. Build it again here"

    def check_processes(self, num_processes: int) -> None:
        """Refuses to run on another number of processes than there are ranks.

        Raises:
            ConfigError: see above.
        """
        if num_processes != self.world_size:
            mapping = self.spec.model.mapping
            raise ConfigError(
                f"the engine was built for {self.world_size} ranks (tp_size {mapping.tp_size} x pp_size "
                f"{mapping.pp_size}) and needs as many processes; there is {num_processes}. Build it with --tp_size 1 "
                "--pp_size 1 to run it in one process"
            )

    def model(self, rank: int = 0) -> CausalLM:
        """Returns the rank's model, ready to run: parameters share the engine's memory, each linear has its plan.

        An engine for a GPU has its weights there from the first call on. On another CPU or GPU than the recorded one
        (`check_machine`) every weight gets the default plan for the layout it has.

        Raises:
            ConfigError: the engine was built for a GPU, and this machine has none that can run models.
            EngineFormatError: the weights do not fit the configuration.
            OutOfMemoryError: the GPU has no room for the weights.
        """
        _require_device(self.device, self._where(rank))
        config = self.spec.model.with_mapping(self.spec.model.mapping.with_rank(rank))
        model = get_model_class(config.architecture, config.model_type).empty(config, self.device)
        weights = self.weights(rank)
        parameters = dict(model.named_parameters())
        if parameters.keys() != weights.keys():
            odd = sorted(parameters.keys() ^ weights.keys())
            raise EngineFormatError(
                f"{self._where(rank)} does not fit {config.architecture}: {', '.join(odd)}; build it again"
            )
        plans = self._attach_plans(model)
        for name, parameter in parameters.items():
            tensor, plan = weights[name], plans.get(name)
            fits = tensor.dtype == parameter.dtype and tensor.numel() >= parameter.numel()
            if not fits or (tensor.shape != parameter.shape and (plan is None or plan.layout == PLAIN_LAYOUT)):
                raise EngineFormatError(
                    f"{self._where(rank)}: {name} is {tensor.dtype} {list(tensor.shape)}, the configuration needs "
                    f"{parameter.dtype} {list(parameter.shape)}; build it again"
                )
            set_parameter(model, name, tensor)
        place(model, self.device)
        self._weights[rank] = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return model

    def _where(self, rank: int) -> str:
        return str(self.directory / rank_file(rank)) if self.directory else "the engine"

    def _attach_plans(self, model: CausalLM) -> dict[str, MatmulPlan]:
        is_same, plans, replaced = self.check_machine() is None, {}, 0
        for held in matmul_weights(model):
            stored = self.spec.plans.get(held.name)
            if stored is None:
                raise EngineFormatError(f"{self.directory or 'the engine'}: no plan for {held.name}; build it again")
            plans[held.name] = _usable_plan(stored, held.module.weight.dtype, held.n, held.k, self.device, is_same)
            held.module.plan = plans[held.name]
            replaced += is_same and plans[held.name].to_dict() != dict(stored)
        if replaced:
            logger.warning(
                "the recorded kernels of %d weights cannot run here (another version of a library?), the default ones "
                "do; build the engine again here", replaced,
            )  # fmt: skip
        return plans


def _fingerprint(device: str) -> dict[str, Any]:
    """Returns what says on what machine an engine for "cpu" or "cuda" is built."""
    return devices.gpu_fingerprint() if device == "cuda" else cpu_fingerprint()


def _require_device(device: str, what: str) -> None:
    """Refuses to open what this machine cannot run.

    Raises:
        ConfigError: see above.
    """
    reason = devices.why_no_cuda() if device == "cuda" else None
    if reason is not None:
        raise ConfigError(
            f"{what} was built for a GPU, but {reason}; build it for the CPU: `lamella-build --device cpu`, or "
            "BuildConfig(device='cpu') with lamella_builder.build"
        )


def _usable_plan(
    stored: Mapping[str, Any], dtype: torch.dtype, n: int, k: int, device: str, is_same: bool
) -> MatmulPlan:
    if is_same:
        try:
            plan = MatmulPlan.from_dict(stored)
            if plan.device == device and plan.available(dtype, n, k):
                return plan
        except ConfigError as error:
            logger.warning("a recorded kernel is unknown here, the default is used: %s", error)
    try:
        strict = dtype == torch.float32
        return default_plan(dtype, n, k, batch_invariant=strict, layout=stored.get("layout"), device=device)
    except ConfigError as error:
        raise EngineFormatError(f"no kernel here reads the engine's weights: {error}; build it again") from error


def _open_weights(path: Path, files: object, verify: bool) -> dict[str, torch.Tensor]:
    entry = files.get(path.name) if isinstance(files, dict) else None
    try:
        num_bytes, checksums = int(entry["bytes"]), dict(entry["checksums"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineFormatError(f"{path.parent / ENGINE_FILE} does not describe {path.name}; build it again") from error
    if not path.is_file():
        raise EngineFormatError(f"{path} is missing; copy the whole engine directory again, or build it again")
    if path.stat().st_size != num_bytes:
        raise EngineFormatError(
            f"{path} has {path.stat().st_size} bytes instead of {num_bytes}: the copy is incomplete or the file is "
            "another engine's; copy the engine directory again"
        )
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        raise EngineFormatError(str(error)) from error
    if file.tensors.keys() != checksums.keys():
        odd = ", ".join(sorted(file.tensors.keys() ^ checksums.keys())[:5])
        raise EngineFormatError(f"{path} and {ENGINE_FILE} disagree about {odd}; copy the engine directory again")
    file.prefetch()
    weights = {name: file.tensor(name) for name in file.tensors}
    damaged = [name for name, tensor in weights.items() if verify and tensor_checksum(tensor) != checksums[name]]
    if damaged:
        raise EngineFormatError(
            f"{path} is damaged: wrong checksum of {', '.join(damaged)}; copy the engine directory or build it again"
        )
    return weights

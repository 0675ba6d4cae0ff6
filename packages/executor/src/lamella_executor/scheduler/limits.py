"""RequestLimits: refuses what could never run, at submission, with the numbers and the knob."""

from __future__ import annotations

from dataclasses import dataclass

from lamella_core.errors import RequestError
from lamella_executor.scheduler.capacity import CapacityModel
from lamella_executor.sequence import RequestState


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may ask of a scheduler with these sizes."""

    max_batch_size: int
    max_num_tokens: int
    max_beam_width: int
    is_chunked: bool  # prompts may be split over steps

    def check(self, request: RequestState, capacity: CapacityModel) -> None:
        """Passes a request that will run once it is alone.

        Raises:
            RequestError: it never could.
        """
        num_prompt, width = request.num_prompt_tokens, request.width
        if request.params.use_beam_search and width > self.max_beam_width:
            raise RequestError(
                f"the beam width is {width}, this engine allows {self.max_beam_width}; build it with a larger "
                "BuildConfig.max_beam_width"
            )
        if request.slots > self.max_batch_size:
            raise RequestError(
                f"the request has {request.slots} sequences (best_of or n), the engine runs {self.max_batch_size} at "
                "once; ask for fewer or build it with a larger BuildConfig.max_batch_size"
            )
        if width > self.max_num_tokens:
            raise RequestError(
                f"the request has {width} sequences and a step {self.max_num_tokens} tokens; ask for fewer or build "
                "the engine with a larger BuildConfig.max_num_tokens"
            )
        if not self.is_chunked and num_prompt > self.max_num_tokens:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, a step {self.max_num_tokens}; set "
                "SchedulerConfig.enable_chunked_prefill or build the engine with a larger BuildConfig.max_num_tokens"
            )
        num_prefix = request.sequences[0].num_prefix_tokens
        if num_prefix > self.max_num_tokens:
            raise RequestError(
                f"the prompt has {num_prefix} tokens that see each other, which this model computes in one step of at "
                f"most {self.max_num_tokens}; shorten it or build the engine with a larger BuildConfig.max_num_tokens"
            )
        kv, num_blocks = capacity.kv, capacity.worst_case(request)
        if num_blocks > kv.num_blocks:
            raise RequestError(
                f"the request needs up to {num_blocks} KV cache blocks ({num_prompt} prompt tokens, max_tokens "
                f"{request.max_tokens}, {width} sequences), the cache has {kv.num_blocks} of {kv.tokens_per_block} "
                "tokens; lower max_tokens, or raise what bounds the cache in KvCacheConfig: max_tokens, on a CPU "
                "host_memory_bytes, on a GPU free_gpu_memory_fraction, max_gpu_total_bytes or gpu_memory_utilization"
            )

"""Host time per generated token: scheduler, loop and results around a runner that computes nothing.

    python benchmarks/host_overhead.py [--requests 1024 2048] [--waves 2] [--isl 128] [--osl 128] [--policy ...]

Plain greedy requests, not streamed, without text. Reported per generated token: the engine's thread (schedule, launch
bookkeeping, update; prompts, admissions and ends included) without the time spent in the fake runner, and the same of
the steps that only decode. Submission (the caller's thread) is reported apart.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine

from lamella_executor import CapacitySchedulerPolicy, GenerationResult, SamplingParams
from lamella_executor.admission import EngineLimits, make_request
from lamella_executor.kv_cache import KvCacheManager
from lamella_executor.loop import EngineLoop
from lamella_executor.mailbox import Mailbox, Submit
from lamella_executor.sampler import Sampler
from lamella_executor.scheduler.plan import StepPlan
from lamella_executor.scheduler.scheduler import Scheduler
from lamella_executor.stats import StatsBuffer

VOCAB = 32
TOKEN = 7


class Step:
    """A launched step whose tokens are all the same."""

    logits = None

    def __init__(self, num_tokens: int) -> None:
        self._tokens = [TOKEN] * num_tokens

    def collect(self) -> list[int]:
        return self._tokens


class Runner:
    """Computes nothing; ``seconds`` is the time spent here."""

    def __init__(self) -> None:
        self.seconds = 0.0
        logits = torch.zeros(1, VOCAB)
        logits[0, TOKEN] = 1.0
        self._row = logits

    def run(self, plan: StepPlan) -> torch.Tensor:
        started = time.thread_time()
        logits = self._row.expand(plan.num_logits, VOCAB).clone()
        self.seconds += time.thread_time() - started
        return logits


class LaunchingRunner(Runner):
    """Samples on the "device"."""

    def launch(self, plan: StepPlan) -> Step:
        started = time.thread_time()
        step = Step(sum([item.is_sampled for item in plan.items]))
        self.seconds += time.thread_time() - started
        return step


def measure(options: argparse.Namespace, num_running: int, profile: cProfile.Profile | None) -> dict[str, float]:
    """Runs ``waves`` times ``num_running`` requests; returns microseconds per token."""
    size, total = options.tokens_per_block, options.isl + options.osl
    needed = num_running * -(-total // size)
    kv = KvCacheManager(int(needed * options.cache) + 1, size, enable_block_reuse=options.reuse)
    scheduler = Scheduler(
        kv, max_batch_size=num_running, max_num_tokens=8192, policy=CapacitySchedulerPolicy(options.policy)
    )
    runner = Runner() if options.mode == "synchronous" else LaunchingRunner()
    loop = EngineLoop(runner, scheduler, kv, Sampler(VOCAB), StatsBuffer())
    limits = EngineLimits(VOCAB, total, num_running, 8192)
    params = SamplingParams(max_tokens=options.osl, ignore_eos=True)
    generator = torch.Generator().manual_seed(1)
    num_requests = num_running * options.waves
    prompts = torch.randint(0, VOCAB, (num_requests, options.isl), generator=generator).tolist()
    mailbox = Mailbox()
    started = time.thread_time()
    results = []
    for number, prompt in enumerate(prompts):
        request = make_request(number, prompt, params, limits)
        results.append(GenerationResult(number, prompt, params, mailbox))
        loop.submit(Submit(request, results[-1]))
    submitted = time.thread_time() - started
    decode_s = decode_tokens = 0.0
    started = time.thread_time()
    if profile is not None:
        profile.enable()
    while loop.has_work:
        before, outside = time.thread_time(), runner.seconds
        waiting = len(scheduler.waiting)
        loop.step()
        running = len(scheduler.running)
        if waiting == len(scheduler.waiting) and running == num_running:
            decode_s += time.thread_time() - before - (runner.seconds - outside)
            decode_tokens += running
    if profile is not None:
        profile.disable()
    spent = time.thread_time() - started - runner.seconds
    num_tokens = num_requests * options.osl
    for result in results:
        result.result(0)  # raises what it failed with
    if any(result.outputs[0].token_ids != [TOKEN] * options.osl for result in results):
        raise RuntimeError("a request has the wrong tokens")
    return {
        "us/token": spent / num_tokens * 1e6,
        "decode only": decode_s / max(decode_tokens, 1) * 1e6,
        "submit us/request": submitted / num_requests * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 1024, 2048], help="side by side")
    parser.add_argument("--waves", type=int, default=2, help="times that many requests in total")
    parser.add_argument("--isl", type=int, default=128)
    parser.add_argument("--osl", type=int, default=128)
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--cache", type=float, default=1.0, help="blocks, as a fraction of what all running need")
    parser.add_argument("--reuse", action="store_true", help="keep blocks for later requests")
    parser.add_argument("--mode", choices=["overlapped", "synchronous"], default="overlapped")
    parser.add_argument("--policy", default="GUARANTEED_NO_EVICT", choices=[p.value for p in CapacitySchedulerPolicy])
    parser.add_argument("--profile", action="store_true", help="print where the time of the last size goes")
    options = parser.parse_args()
    print(f"{machine.describe()}; {options.mode}, {options.policy}, {options.isl} in, {options.osl} out")
    for number, num_running in enumerate(options.requests):
        is_last = number == len(options.requests) - 1
        profile = cProfile.Profile() if options.profile and is_last else None
        figures = measure(options, num_running, profile)
        print(f"{num_running:5d} side by side: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(22)


if __name__ == "__main__":
    main()

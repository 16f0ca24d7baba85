"""Times of callables against each other: one run, the same data, turn by turn.

A contender is a sequence of stages (forward, then backward), each called with what the one before
returned. On a GPU every stage is timed by events, with the L2 cache full of other data and after
enough queued work that the host's launches are hidden. Elsewhere the host's clock serves.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Stage = Callable[[Any], Any]
# Runs the stages once, after so many seconds of other work where that can hide the launches; gives
# the seconds of each, and the host's seconds for all.
Timer = Callable[[Sequence[Stage], float], tuple[list[float], float]]
UNSAVED = "samples"  # of each round: for this run's tables, quartiles do in the files

FLUSH_BYTES = 2**28  # several times the largest L2 cache in nanochat/hardware.py
WARM_SECONDS = 0.2  # clocks rise from idle within it
MIN_ROUNDS, MAX_ROUNDS = 7, 200
QUEUE_FACTOR = 1.5  # queued work over the host's own time for a contender
CYCLES_PER_SECOND = 2e9  # about every GPU's boost clock: only the length of a wait hangs on it
MAX_QUEUE_SECONDS = 0.02  # a contender that waits for the GPU would ask for ever more


def host_timer(stages: Sequence[Stage], queue_seconds: float) -> tuple[list[float], float]:
    """Times on the host's clock. There are no launches to hide: queue_seconds does not matter."""
    seconds, value = [], None
    for stage in stages:
        begin = time.perf_counter()
        value = stage(value)
        seconds.append(time.perf_counter() - begin)
    return seconds, sum(seconds)


class CUDATimer:
    """Times between two events around each stage."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        num_bytes = max(FLUSH_BYTES, 4 * properties.L2_cache_size)
        self.device = device
        self.other_data = torch.randn(num_bytes // 4, device=device)

    def __call__(self, stages: Sequence[Stage], queue_seconds: float) -> tuple[list[float], float]:
        """Queue a wait of queue_seconds, then per stage: flush, event, stage, event."""
        if queue_seconds > 0:
            torch.cuda._sleep(int(queue_seconds * CYCLES_PER_SECOND))
        pairs, value = [], None
        begin = time.perf_counter()
        for stage in stages:
            # read, not zeroed: lines left dirty would be written back on the contender's time
            self.other_data.sum()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            value = stage(value)
            stop.record()
            pairs.append((start, stop))
        host_seconds = time.perf_counter() - begin
        del value
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(stop) / 1e3 for start, stop in pairs], host_seconds


def timer_for(device: torch.device) -> Timer:
    """Events on a CUDA device, the host's clock elsewhere."""
    return CUDATimer(device) if device.type == "cuda" else host_timer


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of a turn: nobody always runs first, or always after the same neighbour."""
    shift = turn % max(1, len(names))
    return [*names[shift:], *names[:shift]]


def interleave(
    contenders: Mapping[str, Sequence[Stage]], timer: Timer, seconds: float
) -> dict[str, list[list[float]]]:
    """Seconds by contender, stage and round: `seconds` in all, within MIN_ROUNDS and MAX_ROUNDS."""
    names = list(contenders)
    queue = dict.fromkeys(names, 0.0)
    samples: dict[str, list[list[float]]] = {name: [[] for _ in contenders[name]] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin, turns, turn_seconds = time.perf_counter(), 0, 0.0
        while turns < 2 or time.perf_counter() - begin < WARM_SECONDS:
            before = time.perf_counter()
            for name in names:
                _, host_seconds = timer(contenders[name], 0.0)
                queue[name] = min(QUEUE_FACTOR * host_seconds, MAX_QUEUE_SECONDS)
            turns, turn_seconds = turns + 1, time.perf_counter() - before
        rounds = int(seconds / max(turn_seconds, 1e-9))
        for turn in range(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)):
            for name in rotated(names, turn):
                measured, _ = timer(contenders[name], queue[name])
                for stage_samples, value in zip(samples[name], measured, strict=True):
                    stage_samples.append(value)
    finally:
        if collecting:
            gc.enable()
    return samples


def summarise(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of two rounds or more, as a row has them."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "seconds": median,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "rounds": len(seconds),
        UNSAVED: list(seconds),
    }


def peak_memory(stages: Sequence[Stage], device: torch.device) -> int | None:
    """Most bytes allocated on the GPU above what was there before; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, value = torch.cuda.memory_allocated(device), None
    for stage in stages:
        value = stage(value)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free(device: torch.device) -> None:
    """Give back memory that nothing refers to any more, tracebacks' tensors included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

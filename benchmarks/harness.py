"""How every benchmark times, measures memory, and reports. Needs torch and this package.

Times are compared within one process: the variants run in turn, in an order that changes every round, and the median
over rounds is given. Machines are shared, so a ratio between two variants is the result; an absolute time is not.

Clocks:
    cpu   process CPU time on one thread: what else the machine does hardly shows (the default without a GPU).
    wall  wall-clock time on all threads, without samples during which other processes took more than 5% of the cores.
    cuda  CUDA events.

Memory is the peak of what torch's allocator held above what it held before: on a CPU from the profiler's record (exact,
the same in every run), on CUDA from the allocator's statistics.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from moesaic.allocator import keep_freed_memory
from moesaic.checkout import git
from moesaic.errors import CannotWrite, reason
from moesaic.files import append

from . import SMOKE

__all__ = [
    "Measurement",
    "Options",
    "Progress",
    "bf16_obstacle",
    "bf16_over_fp32",
    "count",
    "device_of",
    "dtypes_to_time",
    "gigabytes",
    "held_memory",
    "parse_options",
    "peak_memory",
    "print_table",
    "quantiles",
    "time_in_turn",
]

Clock = Literal["cpu", "wall", "cuda"]
PATIENCE = 0.5
"""Seconds."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HOPELESS = 4.0
"""A CPU whose bf16 matmul takes this many times as long as one in fp32 emulates it: minutes to say nothing."""


@dataclasses.dataclass
class Measurement:
    """One measurement, one line of JSON. Ratios are to the limit (the dense twin, or what `ratio_to` names)."""

    benchmark: str
    variant: str
    shape: dict[str, Any]
    dtype: str
    what: str  # "forward", "forward+backward", "step", "decode", ...
    seconds: list[float] | None = None
    """Quantiles 0.2, 0.5, 0.8; None if it was not timed."""
    ratio: float | None = None
    ratio_to: str = "dense"
    peak_bytes: int | None = None
    activation_bytes: int | None = None
    """Of a forward pass: peak_bytes. With a backward: what is held between the two, the output included."""
    flops: float | None = None
    """Active, of one call."""
    note: str = ""
    """Why there is no number, or what is special about it."""
    device: str = ""
    clock: str = ""
    threads: int = 0
    keeps_freed_memory: bool = False
    """Whether the C allocator was told to, see `moesaic.allocator`."""
    torch: str = torch.__version__
    commit: str = ""


@dataclasses.dataclass(frozen=True)
class Options:
    """What all benchmarks take from the command line."""

    smoke: bool
    device: torch.device
    clock: Clock
    threads: int
    rounds: int
    output: Path | None
    keeps_freed_memory: bool = False


_below_titles: list[str] = []
"""What every table of this process says below its title."""


def parse_options(description: str, arguments: Sequence[str] | None = None, *extra: Any) -> tuple[Options, Any]:
    """The common options, and the namespace with those that `extra` (pairs of flags and keywords) added."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and one round: does it run at all?")
    parser.add_argument("--device", type=device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=["cpu", "wall", "cuda"], help="default: cpu, or cuda on a GPU")
    parser.add_argument("--threads", type=int, help="default: 1 under --clock cpu, else torch's choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep-freed-memory", action="store_true", help="the allocator hint of moesaic train")
    parser.add_argument("--output", type=Path, help="append JSON lines to this file")
    for flags, keywords in extra:
        parser.add_argument(*flags, **keywords)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # type: ignore[method-assign]
    given = parser.parse_args(arguments)
    device = given.device
    clock: Clock = given.clock or ("cuda" if device.type == "cuda" else "cpu")
    if (clock == "cuda") != (device.type == "cuda"):
        parser.error(
            f"--clock {clock} does not fit --device {device.type}; must be cuda on a GPU, cpu and wall elsewhere"
        )
    if not 1 <= given.rounds <= 10**6:
        parser.error(f"--rounds {given.rounds}: must be 1 to 1,000,000")
    if given.threads is not None and not 1 <= given.threads <= 1024:
        parser.error(f"--threads {given.threads}: must be 1 to 1,024")
    threads = given.threads or (1 if clock == "cpu" else torch.get_num_threads())
    if clock == "cpu" and threads != 1:
        parser.error("--clock cpu counts the time of all threads: it needs --threads 1")
    if given.output is not None:
        try:  # before minutes of measuring
            given.output.parent.mkdir(parents=True, exist_ok=True)
            append(given.output, "")
        except OSError as error:
            parser.error(f"--output {given.output}: cannot be written ({reason(error)})")
        except CannotWrite as error:
            parser.error(f"--output {error}")
    torch.set_num_threads(threads)
    kept = device.type == "cpu" and given.keep_freed_memory and keep_freed_memory()
    rounds = 1 if given.smoke else given.rounds
    _below_titles[:] = [f"({SMOKE})"] if given.smoke else []
    return Options(given.smoke, device, clock, threads, rounds, given.output, kept), given


def device_of(name: str) -> torch.device:
    """The device of --device."""
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *["cuda"] * torch.cuda.is_available()]
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name}: must be one of {', '.join(known)}, which are here")
    return torch.device(name)


def count(text: str) -> int:
    """A number of something, of a flag."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 2**24):
        raise argparse.ArgumentTypeError(f"{text}: must be 1 to {2**24:,}")
    return int(text)


def gigabytes(text: str) -> float:
    """An amount of memory, of a flag."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number >= 0")
    return value


# ---- precision


def bf16_obstacle(options: Options) -> str | None:
    """Why nothing is timed in bf16 here, None if it is. Smoke runs always do."""
    if options.smoke or options.device.type != "cpu":
        return None
    times = bf16_over_fp32()
    return f"a bf16 matmul takes {times:.0f} times as long as one in fp32 on this CPU" if times > HOPELESS else None


@functools.cache
def bf16_over_fp32() -> float:
    """Time of a matmul in bf16 on this CPU, as a multiple of the time in fp32."""
    took = {}
    for dtype in DTYPES.values():
        a, b = torch.ones(128, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        best = math.inf
        for _ in range(4):  # the first one compiles it
            began = time.process_time()
            a @ b
            best = min(best, time.process_time() - began)
        took[dtype] = best
    return took[torch.bfloat16] / took[torch.float32]


def dtypes_to_time(options: Options) -> dict[str, torch.dtype]:
    """`DTYPES` without what `bf16_obstacle` is in the way of."""
    return {"fp32": torch.float32} if bf16_obstacle(options) else DTYPES


# ---- time


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    options: Options,
    *,
    min_seconds: float = 0.05,
    tell: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of each variant, one sample per round.

    A sample repeats the call for at least min_seconds. Before the first round every variant runs twice; one that takes
    longer than PATIENCE then, and four times as long as the fastest, is not run again.

    Args:
        tell: called after each sample, for a progress bar.
    """
    once = {}
    for name, call in calls.items():
        call()
        once[name] = _sample(call, 1, options)
    fastest = min(once.values())
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, took in once.items():
        if took > PATIENCE and took > 4 * fastest:
            samples[name].append(took)
    names = [name for name in calls if not samples[name]]
    repeats = {n: 1 if options.smoke else max(1, round(min_seconds / max(once[n], 1e-7))) for n in names}
    for i in range(options.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            for _ in range(3):  # a disturbed sample is taken again, but not for ever
                took, disturbed = _undisturbed(calls[name], repeats[name], options)
                if not disturbed:
                    break
            samples[name].append(took)
            tell()
    return samples


def _undisturbed(call: Callable[[], Any], repeats: int, options: Options) -> tuple[float, bool]:
    if options.clock != "wall":
        return _sample(call, repeats, options), False
    others, began = _others_seconds(), time.perf_counter()
    took = _sample(call, repeats, options)
    elapsed = time.perf_counter() - began
    return took, _others_seconds() - others > 0.05 * elapsed * (os.cpu_count() or 1) + 0.01


def _sample(call: Callable[[], Any], repeats: int, options: Options) -> float:
    if options.clock == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats


def _others_seconds() -> float:
    """CPU seconds that other processes have used on this machine so far; 0 where nobody says."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, soft_irq, steal = (int(field) for field in fields[:8])
    busy = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return busy - times.user - times.system


def quantiles(samples: Sequence[float]) -> list[float]:
    """0.2, 0.5 and 0.8."""
    return (
        torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    )


# ---- memory


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that the call's tensors took at their peak, above what was held before; what it returns counts too."""
    return memory(call, device)[0]


def held_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that are held as long as what the call returns is, a graph included."""
    return memory(call, device)[1]


def memory(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """(peak, held while the result lives), in bytes above what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        del result
        return torch.cuda.max_memory_allocated() - before, held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak, held


# ---- reports


class Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, max(1, total), 0
        self.began = time.perf_counter()

    def __call__(self) -> None:
        self.done += 1
        if not sys.stderr.isatty():
            return
        share = min(1.0, self.done / self.total)
        left = (time.perf_counter() - self.began) * (1 - share) / max(share, 1e-9)
        bar = "#" * round(30 * share)
        end = "\r" if share < 1 else "\n"
        print(f"{self.what:<24} [{bar:<30}] {self.done}/{self.total}  {left:4.0f} s left ", end=end, file=sys.stderr)


def finish(rows: Iterable[Measurement], options: Options) -> list[Measurement]:
    """Add to each row where it was measured, and append it to the output file.

    Where `bf16_obstacle` is in the way, that is said here and is one row more in the file.
    """
    where: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else cpu_name(),
        "clock": options.clock,
        "threads": options.threads,
        "keeps_freed_memory": options.keeps_freed_memory,
        "commit": commit(),
    }
    done, output = [], options.output
    for row in rows:
        done.append(dataclasses.replace(row, **where))
        output = _keep(done[-1], output)
    if obstacle := bf16_obstacle(options):
        print(f"\nbf16 and mixed precision not run: {obstacle}")
        _keep(Measurement(done[0].benchmark, "all", {}, "bf16", "all", note=f"not run: {obstacle}", **where), output)
    return done


def _keep(row: Measurement, output: Path | None) -> Path | None:
    """Append a row as soon as it is measured; returns where the next one goes: nowhere once it cannot be written."""
    if output is not None:
        try:
            append(output, json.dumps(dataclasses.asdict(row)) + "\n")
        except CannotWrite as error:
            print(f"warning: {error}; what follows is only shown", file=sys.stderr)
            return None
    return output


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "cpu"


def commit() -> str:
    """Short hash of the checkout, with a plus sign if files differ from it; empty for an installed package."""
    head = git("rev-parse", "--short", "HEAD")
    return "" if head is None else head + ("+" if git("status", "--porcelain", "-uno") else "")


def print_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the first is flush left."""
    cells = [list(header), *[list(line) for line in lines]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    print("\n".join(["", title, *_below_titles]))
    for i, line in enumerate(cells):
        print(
            "  ".join(
                cell.ljust(w) if j == 0 else cell.rjust(w) for j, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )
        if i == 0:
            print("  ".join("-" * w for w in widths))

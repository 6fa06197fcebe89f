"""Two processes for one check: forked, so that they have the layer as it is, whatever made it."""

import importlib
import multiprocessing
import pickle
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from moesaic.testing.adapter import NotApplicable

__all__ = ["on_ranks", "require_gloo"]


def require_gloo() -> None:
    """Raises NotApplicable if this process cannot start a gloo group of its own."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise NotApplicable("this torch has no gloo")
    if distributed.is_initialized():
        raise NotApplicable("a process group is running in this process")


def on_ranks(function: Callable[[int], Any], ranks: int, patience: float = 60.0) -> list[Any]:
    """Call function(rank) in each of so many processes of one gloo group; returns what each gave, rank 0 first.

    They are forked for each call. A pool would be no help: what a factory makes need not be picklable, so it has to be
    there before the fork.

    Raises:
        NotApplicable: there can be no forks or no gloo here, or the function raised it.
        RuntimeError: another exception of a rank, in one line, or no answer for `patience` seconds.
    """
    require_gloo()
    if "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        raise NotApplicable(f"processes cannot be forked safely on {sys.platform}")
    if torch.cuda.is_initialized():
        raise NotApplicable("this process uses CUDA, which does not survive a fork")
    importlib.import_module("torch._dynamo")  # seconds, which collectives would else take in every process
    context = multiprocessing.get_context("fork")
    processes, waiting = [], {}
    results: list[Any] = [None] * ranks
    with tempfile.TemporaryDirectory() as directory:
        meeting = (Path(directory) / "rendezvous").as_uri()
        try:
            for rank in range(ranks):
                here, there = context.Pipe()
                process = context.Process(target=_answer, args=(there, function, rank, ranks, meeting), daemon=True)
                process.start()
                there.close()
                processes.append(process)
                waiting[here] = rank
            while waiting:
                ready = wait(list(waiting), timeout=patience)
                if not ready:
                    raise RuntimeError(f"ranks {list(waiting.values())} of {ranks}: no answer in {patience:.0f} s")
                for each in ready:
                    assert isinstance(each, Connection)
                    rank = waiting.pop(each)
                    try:
                        results[rank] = pickle.loads(each.recv_bytes())
                    except EOFError:
                        raise RuntimeError(f"rank {rank} of {ranks}: the process ended") from None
                    if isinstance(results[rank], Exception):  # the others may wait for it, or have lost it
                        raise results[rank]
        finally:
            for process in processes:
                process.kill()
                process.join()
            for each in waiting:
                each.close()
    return results


def _answer(to: Connection, function: Callable[[int], Any], rank: int, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        try:
            distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
        except RuntimeError as error:
            raise NotApplicable(f"no gloo process group here: {error}") from error
        answer = function(rank)
    except NotApplicable as reason:
        answer = reason
    except Exception as error:
        answer = RuntimeError(f"rank {rank} of {ranks}: {type(error).__name__}: {error}")
    to.send_bytes(pickle.dumps(answer))

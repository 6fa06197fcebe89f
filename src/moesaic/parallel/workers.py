"""Processes that stand by to be the ranks of small jobs, for checks and tests: a job costs milliseconds."""

import importlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed

__all__ = ["Workers"]

JOBS_OF_A_PROCESS = 8
"""After so many jobs there are new processes: gloo keeps the threads of ended groups, and they use CPU time."""


class Workers:
    """Forked processes with one CPU thread each, which talk by gloo on this machine.

    They are forked when a job comes, so they have what was imported until then. A job that fails or takes too
    long ends them all: its other ranks may wait for ever. The next job has new ones.

    Args:
        count: the most ranks that a job can have.
        patience: seconds until a job has failed.
    """

    def __init__(self, count: int = 4, patience: float = 300.0) -> None:
        self.count = count
        self.patience = patience
        self._jobs = 0
        self._connections: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def run(self, function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
        """Call function(*arguments) on each rank of a process group of its own; returns what each gave, rank 0 first.

        One rank alone has no group.

        Args:
            function: of a module, so that a worker finds it by name.

        Raises:
            RuntimeError: a rank failed, with its traceback, or took too long.
        """
        if not 1 <= ranks <= self.count:
            raise ValueError(f"ranks={ranks}: must be 1 to {self.count}")
        if self._jobs % JOBS_OF_A_PROCESS == 0:
            self.close()
        if not self._processes:
            self._fork()
        self._jobs += 1
        meeting = Path(self._folder.name) / f"job-{self._jobs}"
        waiting = {self._connections[rank]: rank for rank in range(ranks)}
        for connection, rank in waiting.items():
            connection.send_bytes(pickle.dumps((function, arguments, rank, ranks, str(meeting))))
        results: list[Any] = [None] * ranks
        failures: list[str] = []
        while waiting:
            # once one has failed, the others say soon what they know, or wait for it
            ready = wait(list(waiting), timeout=5.0 if failures else self.patience)
            if not ready:
                failures.append(f"ranks {list(waiting.values())} of {ranks}: no answer")
                break
            for each in ready:
                assert isinstance(each, Connection)
                try:
                    is_good, result = pickle.loads(each.recv_bytes())
                except EOFError:
                    is_good, result = False, "the process ended"
                rank = waiting.pop(each)
                results[rank] = result
                if not is_good:
                    failures.append(f"rank {rank} of {ranks}:\n{result}")
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures))
        return results

    def _fork(self) -> None:
        # what distributed tensors need, once instead of in each process
        importlib.import_module("torch._dynamo")
        importlib.import_module("torch.distributed.fsdp")
        context = multiprocessing.get_context("fork")
        self._folder = tempfile.TemporaryDirectory(prefix="moesaic-ranks-")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which an idle torch keeps
            for _ in range(self.count):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, [*self._connections, here]), daemon=True)
                process.start()
                there.close()
                self._connections.append(here)
                self._processes.append(process)

    def close(self) -> None:
        """End the processes, for good or until the next job."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._connections = [], []


def _serve(jobs: Connection, inherited: list[Connection]) -> None:
    for connection in inherited:  # of the parent, whose end would else go unnoticed
        connection.close()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while True:
        try:
            function, arguments, rank, ranks, meeting = pickle.loads(jobs.recv_bytes())
        except EOFError:
            return
        try:
            if ranks > 1:
                distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
                distributed.barrier()  # a rank that is done at once would close connections that others still open
            try:
                result = function(*arguments)
            finally:
                if distributed.is_initialized():
                    distributed.destroy_process_group()
                    _forget_meshes()
            answer = pickle.dumps((True, result))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        jobs.send_bytes(answer)


def _forget_meshes() -> None:
    """Let torch forget what it knows of tensors on meshes: those of the next job are equal, but not their groups."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()

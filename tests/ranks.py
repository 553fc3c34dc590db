"""A warm pool of ranks: `ranks(n, fn, *args)` runs a test's function on n processes of a gloo group.

Starting torch in n processes costs seconds, so four workers live as long as the test session; the group of
the wanted size is made when the size changes (about 0.05 s). With n = 1 there is no group, as in `python -m
dist_compress`. The function is found by the path of its test file, since test files are no importable
modules.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MAX_RANKS = 4
PRELOAD = [  # what would otherwise be imported in every worker
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "sklearn.model_selection",
    "pytest",
    "dist_compress.comm",
]
GRACE_S = 1.0  # how long the other ranks of a failed call may take to tell their own story


class RankError(AssertionError):
    """A rank failed, died or hung; the text has its traceback."""


def _load(path: str, module: str, function: str) -> Callable[..., Any]:
    """The function of a test file, which is executed once a worker."""
    if getattr(sys.modules.get(module), "__file__", None) != path:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec and spec.loader
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return getattr(sys.modules[module], function)


def _clean(size: int | None) -> None:
    """Undo what a function may have left behind in the process."""
    import torch

    from dist_compress import comm

    assert size is None or comm.world_size() == size, "a test function must leave its group alone"
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("LOCAL_RANK", "DS_ACCELERATOR"):  # DeepSpeed's, which others take for torchrun's
        os.environ.pop(name, None)
    comm.calls.clear()


def _serve(rank: int, pipe: Connection, stacks: str) -> None:
    """The life of a worker: join a group when told to, run functions, answer (ok, pickled result or
    traceback)."""
    import torch.distributed as dist

    from dist_compress import comm

    size = group = None
    with open(stacks, "w") as dump:
        while True:
            try:
                task = pipe.recv_bytes()
            except EOFError:
                return
            try:
                wanted, store, timeout_s, where, args = pickle.loads(task)
                faulthandler.dump_traceback_later(max(timeout_s - 1.0, 0.5), file=dump)
                if store != group:
                    comm.shutdown(wait=False)
                    files = dist.FileStore(store, wanted) if wanted > 1 else None
                    comm.init(timeout_s, "cpu", store=files, rank=rank, world_size=wanted)
                    size, group = wanted, store
                _clean(size)
                answer = (True, _load(*where)(*pickle.loads(args)))
                faulthandler.cancel_dump_traceback_later()
                pipe.send_bytes(pickle.dumps(answer))
            except BaseException:  # also SystemExit: the test must hear of it
                pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


class RankPool:
    """Up to four workers. Any error ends them; the next call starts fresh ones."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks_")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.workers: list[tuple[Any, Connection]] = []
        self.size = 0
        self.groups = 0

    def __call__(self, n: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """[result of rank 0, ..]. `fn` is a module-level function; args and results must pickle."""
        assert 1 <= n <= MAX_RANKS and fn.__qualname__ == fn.__name__, "a module-level function, 1 to 4 ranks"
        self._start(n)
        if n != self.size:
            self.groups, self.size = self.groups + 1, n
        store = os.path.join(self.folder.name, f"store_{self.groups}")
        where = (str(Path(sys.modules[fn.__module__].__file__ or "").resolve()), fn.__module__, fn.__name__)
        task = pickle.dumps((n, store, timeout_s, where, pickle.dumps(args)))
        for _, pipe in self.workers[:n]:
            pipe.send_bytes(task)
        return self._collect(n, timeout_s)

    def _start(self, n: int) -> None:
        while len(self.workers) < n:
            rank = len(self.workers)
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(rank, theirs, self._stacks(rank)), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def _stacks(self, rank: int) -> str:
        return os.path.join(self.folder.name, f"stacks_{rank}")

    def _collect(self, n: int, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:n])}
        deadline = time.monotonic() + timeout_s
        while pipes and (ready := wait(list(pipes), max(deadline - time.monotonic(), 0.0))):
            for pipe in ready:
                rank = pipes.pop(pipe)  # type: ignore[call-overload]
                try:
                    good, answer = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    process = self.workers[rank][0]
                    process.join(1.0)
                    good, answer = False, f"died with exit code {process.exitcode}"
                (results if good else failures)[rank] = answer
                if not good:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures or pipes:
            self.close()
            stories = [f"rank {rank} of {n}: {text}" for rank, text in failures.items()]
            if not failures:
                stories = [f"rank {r} of {n} hung: {Path(self._stacks(r)).read_text()}" for r in pipes.values()]
            raise RankError("\n".join(stories))
        return [results[rank] for rank in range(n)]

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
        for process, _ in self.workers:
            process.join()
        self.workers, self.size = [], 0

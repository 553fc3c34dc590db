"""The only file that calls a collective. Without a process group (one rank) everything works and nothing is
sent.

"collective": every rank must call it, in the same order; a local condition never guards it. "local": no
communication. What must have equal bits at any number of ranks goes through `ordered_sum`: plain all-reduce
adds in an order that depends on the number of ranks.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from dist_compress import roll_call
from dist_compress.errors import UserError
from dist_compress.roll_call import here

T = TypeVar("T")

calls: Counter[str] = Counter()  # collectives by name, for tests that count them
_store: dist.Store | None = None
_objects: dist.ProcessGroup | None = None  # gloo group for objects and for waiting; None: the default group
_patient: dist.ProcessGroup | None = None  # gloo group in which the others wait for work of rank 0 alone
_alone = False  # this rank acts as if there were no others
_PATIENCE = timedelta(days=2)  # a rank that dies is noticed at once all the same: its connections close
_device = torch.device("cpu")
_set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # the name in older torch

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def init(
    timeout_s: float,
    device: str = "cpu",
    store: dist.Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> None:
    """Join the group that torchrun (or srun) describes in the environment. Collective; no group for one rank.

    `device`: "cpu" (gloo) or "cuda" (nccl, one GPU per local rank, and gloo for objects).
    `store`, `rank`, `world_size` replace the environment, for tests.
    """
    global _store, _objects, _patient, _device
    _device = torch.device("cuda", local_rank()) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(_device)
    size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    if size == 1:
        return
    rank = int(os.environ["RANK"]) if rank is None else rank
    timeout = timedelta(seconds=timeout_s)
    _store = store or _environment_store(rank, timeout)
    backend = "nccl" if device == "cuda" else "gloo"
    roll_call.start(_store, rank, size, timeout_s)
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout)
    _objects = dist.new_group(backend="gloo", timeout=timeout) if device == "cuda" else None  # type: ignore
    _patient = _patient_group(timeout)


def _environment_store(rank: int, timeout: timedelta) -> dist.Store:
    """torchrun's agent keeps one TCPStore across restarts, so keys of dead ranks are kept apart by a prefix.

    The prefix is the restart count of this node's agent, which every node agrees on as long as restarts are
    caused by failing ranks; a job that lets nodes come and go should rather end and start again (as SLURM's
    requeue does).
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    tcp = dist.TCPStore(host, port, is_master=serve, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)


def join(timeout_s: float) -> None:
    """Use the group that the user's own program has set up, if any. Collective. Its own timeout stays; `timeout_s` is
    that of the groups added here."""
    global _store, _objects, _patient, _device
    if not is_initialized() or _patient is not None:
        return
    timeout = timedelta(seconds=timeout_s)
    _store = dist.PrefixStore("dist_compress", c10d._get_default_store())
    roll_call.start(_store, rank(), world_size(), timeout_s)
    if dist.get_backend() == "nccl":
        _device = torch.device("cuda", torch.cuda.current_device())
        _objects = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]
    _patient = _patient_group(timeout)


def _patient_group(timeout: timedelta) -> Any:
    """To connect takes `timeout` at the most, like everything else; to wait in it `_PATIENCE`. Collective."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    _set_timeout(_PATIENCE, group)  # type: ignore[arg-type]
    return group


def shutdown(wait: bool = True) -> None:
    """Leave the group. Collective when `wait`, which a rank that failed must not ask for."""
    global _store, _objects, _patient
    if is_initialized():
        if wait:
            barrier()
        dist.destroy_process_group()
    roll_call.stop()
    _store = _objects = _patient = None


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized() and not _alone


@contextmanager
def alone() -> Iterator[None]:
    """Inside, rank 0 is the only rank: every function acts on what it holds. The others wait meanwhile, in `on_rank0`.
    Rank 0 only."""
    global _alone
    assert rank() == 0, "only rank 0 may act alone"
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


def local_rank() -> int:
    """Which GPU of this node is ours. Local."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """Where this rank computes. Local."""
    return _device


def object_group() -> dist.ProcessGroup | None:
    """The group for CPU objects; None: the default group, or no group at all. Local."""
    return _objects


def all_reduce(t: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """`t`, reduced in place over the ranks by "sum", "max" or "min". Collective."""
    calls["all_reduce"] += 1
    if is_initialized():
        with here("all_reduce"):
            dist.all_reduce(t, _OPS[op])
    return t


def all_gather(t: torch.Tensor) -> torch.Tensor:
    """[world_size, *t.shape]: `t` of every rank, which must have the same shape everywhere. Collective."""
    calls["all_gather"] += 1
    if not is_initialized():
        return t.clone()[None]
    out = t.new_empty(world_size(), *t.shape)
    with here("all_gather"):
        dist.all_gather(list(out.unbind(0)), t.contiguous())
    return out


def all_to_all(send: Sequence[torch.Tensor], receive: Sequence[int]) -> list[torch.Tensor]:
    """What every rank has for this one: [receive[r]] from each rank r, which has to know that much. Collective.

    `send[r]`: 1-D, for rank r; all of one dtype. Sizes may differ and be zero.
    """
    calls["all_to_all"] += 1
    if not is_initialized():
        return list(send)
    out = send[0].new_empty(sum(receive))
    with here("all_to_all"):
        dist.all_to_all_single(out, torch.cat(list(send)), list(receive), [len(part) for part in send])
    return list(out.split(list(receive)))


def broadcast(t: torch.Tensor, src: int = 0) -> torch.Tensor:
    """`t`, overwritten in place with the one of rank `src`. Collective."""
    calls["broadcast"] += 1
    if is_initialized():
        with here("broadcast"):
            dist.broadcast(t, src)
    return t


def broadcast_object(obj: T, src: int = 0, patient: bool = False) -> T:
    """What rank `src` passed, on every rank. Collective. `patient`: wait for it longer than `timeout_s`."""
    calls["broadcast_object"] += 1
    if not is_initialized():
        return obj
    box = [obj]
    with here("broadcast_object"):
        dist.broadcast_object_list(box, src, group=_patient if patient else _objects)
    return box[0]


def gather_object(obj: T) -> list[T]:
    """What every rank passed, in rank order, on every rank. Collective."""
    calls["gather_object"] += 1
    if not is_initialized():
        return [obj]
    out: list[Any] = [None] * world_size()
    with here("gather_object"):
        dist.all_gather_object(out, obj, group=_objects)
    return out


def barrier() -> None:
    """Wait for every rank. Collective."""
    calls["barrier"] += 1
    if is_initialized():
        with here("barrier"):
            dist.barrier(group=_objects)


class OrderedSum:
    """A float64 sum of micro-batch rows whose bits do not depend on the number of ranks.

    Micro-batch j is row j // N of rank j % N. Each rank owns a slice of the columns: it receives that slice
    of every row and adds them in the order j = 0, 1, ..; `total` gathers the slices. Traffic: one all-to-all
    for each `add` (as much as an all-reduce's first half) and one all-gather at the end.
    """

    def __init__(self, size: int, device: torch.device | str, initial: torch.Tensor | None = None) -> None:
        """`size`: number of columns D. `initial`: float64 [D], the same on every rank; None: zeros."""
        self.size = size
        self.width = -(-size // world_size())  # columns each rank owns; the last ones may be padding
        start = torch.zeros(self.width * world_size(), dtype=torch.float64, device=device)
        if initial is not None:
            start[:size] = initial
        self.slice = start.view(world_size(), self.width)[rank()].clone()

    def add(self, rows: torch.Tensor, num_rows: int) -> None:
        """Fold in `num_rows` micro-batches held as `rows`, float [A, D] on each rank. Collective.

        A = ceil(num_rows / N) on every rank; what lies in rows j >= num_rows is ignored.
        """
        calls["ordered_sum"] += 1
        size, count = world_size(), rows.shape[0]
        assert rows.dim() == 2 and rows.shape[1] == self.size and count == -(-num_rows // size), rows.shape
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if size == 1:
            received = rows[None]
        else:
            padded = rows.new_zeros(count, size * self.width)
            padded[:, : self.size] = rows
            sent = padded.view(count, size, self.width).transpose(0, 1).contiguous()
            received = torch.empty_like(sent)  # [rank the row came from, its row, our columns]
            with here("ordered_sum"):
                dist.all_to_all_single(received, sent)
        for micro in range(num_rows):
            self.slice += received[micro % size, micro // size]

    def total(self) -> torch.Tensor:
        """float64 [D], the same on every rank. Collective."""
        return all_gather(self.slice).flatten()[: self.size]


def ordered_sum(rows: torch.Tensor, num_rows: int, initial: torch.Tensor | None = None) -> torch.Tensor:
    """float64 [D]: sum over the micro-batches j < num_rows in their order, with equal bits at any N.
    Collective.

    `rows`: float [A, D]; row a of rank r belongs to micro-batch a * N + r, and A = ceil(num_rows / N)
    everywhere. Rows of micro-batches that do not exist may hold anything. The sum starts from `initial`,
    float64 [D], or zero.
    """
    total = OrderedSum(rows.shape[1], rows.device, initial)
    total.add(rows, num_rows)
    return total.total()


def on_rank0(fn: Callable[[], T]) -> T:
    """The result of `fn` on rank 0, on every rank; its exception, too. Collective, however long `fn` takes."""
    result: Any = None
    failure: Exception | None = None
    if rank() == 0:
        try:
            result = fn()
        except Exception as error:
            failure = error
    told = None if failure is None else (isinstance(failure, UserError), f"{failure}", type(failure).__name__)
    told, result = broadcast_object((told, result), patient=True)
    if failure is not None:
        raise failure
    if told is not None:
        raise UserError(told[1]) if told[0] else RuntimeError(f"rank 0 failed: {told[2]}: {told[1]}")
    return result


def check_equal(what: str, value: int | str, step: int) -> None:
    """Raise RuntimeError on every rank unless all of them hold the same value. Collective."""
    refuse_unequal(what, gather_object(value), step)


def refuse_unequal(what: str, values: Sequence[int | str], step: int) -> None:
    """Raise RuntimeError unless the values of all ranks, in rank order, are the same. Local."""
    if len(set(values)) > 1:
        held: dict[int | str, list[int]] = {}
        for r, v in enumerate(values):
            held.setdefault(v, []).append(r)
        said = "; ".join(f"{v!r} on rank {', '.join(map(str, ranks))}" for v, ranks in held.items())
        raise RuntimeError(f"The ranks disagree on {what} at step {step}: {said}. They no longer train one model.")


def check_order(what: str, names: Sequence[str]) -> None:
    """Raise UserError on every rank unless all of them hold the same names in the same order. Collective: one number of
    each rank, and the names only where they differ."""
    mark = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
    if len(set(gather_object(mark))) == 1:
        return
    first, *others = gather_object(list(names))
    r, other = next((r, other) for r, other in enumerate(others, 1) if other != first)
    at = next(i for i, (a, b) in enumerate(zip_longest(first, other)) if a != b)
    mine, theirs = (repr(x[at]) if at < len(x) else "nothing" for x in (first, other))
    raise UserError(
        f"The ranks do not see the same {what}: number {at} is {mine} on rank 0 and {theirs} on rank {r}. Build the "
        "model alike on every rank: no order of a set, and nothing that depends on the rank."
    )


def own_slot(value: int) -> torch.Tensor:
    """int64 [N]: zero but for `value`, taken modulo 2^64, at the place of this rank, so that a sum over the ranks has
    the values of all. Local."""
    out = torch.zeros(world_size(), dtype=torch.int64)
    out[rank()] = (value + 2**63) % 2**64 - 2**63
    return out


def sum_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The int64 tensors, each summed over the ranks, on the CPU. Collective: one for all of them."""
    flat = all_reduce(torch.cat([t.flatten().to(_device) for t in tensors])).cpu()
    return [s.view(t.shape) for s, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def sum_hook(state, bucket):  # type: ignore[no-untyped-def]
    """DDP communication hook: the sum of the gradients, where DDP's own takes their mean. Collective.

    (torch compares the annotations of a hook with its own types, so strings of them are no use here.)
    """
    calls["sum_hook"] += 1
    with here("sum_hook"):
        work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def claim(name: str) -> bool:
    """True for exactly one caller of the run, so that one rank can show an error for all. No collective."""
    if _store is None:
        return True
    try:
        return _store.add(f"claim/{name}", 1) == 1
    except RuntimeError:  # the store's host is gone: better said twice than not at all
        return True

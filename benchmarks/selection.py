"""Which half of n scores is smaller: exact radix selection beside the other ways, on several ranks.

    python benchmarks/selection.py [--sizes 1e6,1e7,1e8] [--ranks 2,4]

Every rank holds its share of the same n scores (normal, from one seed). Wall seconds of the slowest rank, the smaller
of two runs; bytes that one rank hands to collectives; `exact`: exactly n / 2 elements were chosen, and the same ones
as by a sort on one process, ties by their hash (compared by the sum of hashes of their numbers). Prints a Markdown
table.

radix      dist_compress.pruning.select
bisection  on the bit pattern of the threshold, a count and an all-reduce a step
gather     rank 0 gathers all scores, torch.kthvalue, and sends the threshold back
sort       rank 0 gathers all scores, sorts, and sends the threshold back
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dist_compress import comm
from dist_compress.hashing import splitmix64
from dist_compress.pruning.radix import score_key, tie_key
from dist_compress.pruning.select import Group, Shard, select

BLOCK = 1_000_000  # scores are drawn by blocks, so that every number of ranks sees the same ones


def draw(start: int, end: int) -> torch.Tensor:
    """Scores [start, end) of the sequence."""
    blocks = []
    for number in range(start // BLOCK, -(-end // BLOCK)):
        generator = torch.Generator().manual_seed(number)
        low = number * BLOCK
        block = torch.randn(BLOCK, generator=generator).abs_()
        blocks.append(block[max(start - low, 0) : end - low])
    return torch.cat(blocks)


def radix(scores: torch.Tensor, start: int, num: int) -> torch.Tensor:
    return select([Group("all", num // 2, ["m"], [Shard("m", start, scores)])])[0][0]


def bisection(scores: torch.Tensor, start: int, num: int) -> torch.Tensor:
    keys = score_key(scores)
    low, high = -(2**31), 2**31 - 1
    while low < high:
        middle = (low + high) // 2
        count = (keys <= middle).sum()
        dist.all_reduce(count)
        low, high = (low, middle) if int(count) >= num // 2 else (middle + 1, high)
    return keys <= low


def gathered(threshold: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def method(scores: torch.Tensor, start: int, num: int) -> torch.Tensor:
        size, rank = dist.get_world_size(), dist.get_rank()
        width = -(-num // size)
        padded = torch.nn.functional.pad(scores, (0, width - len(scores)), value=torch.inf)
        parts = [torch.empty(width) for _ in range(size)] if rank == 0 else None
        dist.gather(padded, parts, dst=0)
        limit = threshold(torch.cat(parts), num // 2) if parts is not None else torch.empty(())
        dist.broadcast(limit, src=0)
        return scores <= limit

    return method


METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "radix": radix,
    "bisection": bisection,
    "gather": gathered(lambda scores, k: scores.kthvalue(k).values),
    "sort": gathered(lambda scores, k: scores.sort().values[k - 1].clone()),
}


def worker(num: int, folder: Path) -> None:
    """One rank: each method twice. Rank 0 writes the rows."""
    comm.init(1800)
    size, rank = comm.world_size(), comm.rank()
    start, end = num * rank // size, num * (rank + 1) // size
    scores = draw(start, end)
    sent = count_bytes()
    rows = []
    for name, method in METHODS.items():
        seconds = []
        for _ in range(2):
            sent[0] = 0
            dist.barrier()
            began = time.perf_counter()
            chosen = method(scores, start, num)
            took = torch.tensor([time.perf_counter() - began])
            bytes_sent = sent[0]
            dist.all_reduce(took, dist.ReduceOp.MAX)
            seconds.append(took.item())
        picked = chosen.nonzero().flatten() + start
        total = torch.stack([torch.tensor(len(picked)), splitmix64(picked).sum()])
        dist.all_reduce(total)
        rows.append({"method": name, "seconds": min(seconds), "bytes": bytes_sent, "mark": total.tolist()})
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    comm.shutdown()


def count_bytes() -> list[int]:
    """A counter of the bytes this rank hands to torch.distributed, from now on."""
    sent = [0]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
            sent[0] += tensor.numel() * tensor.element_size()
            return function(tensor, *args, **kwargs)

        return call

    for name in ("all_reduce", "gather", "broadcast"):
        setattr(dist, name, counted(getattr(dist, name)))
    return sent


def reference(num: int) -> list[int]:
    scores = draw(0, num)
    limit = scores.sort().values[num // 2 - 1]
    below, tied = (scores < limit).nonzero().flatten(), (scores == limit).nonzero().flatten()
    tied = tied[tie_key(tied).argsort()][: num // 2 - len(below)]
    return [num // 2, int(splitmix64(below).sum() + splitmix64(tied).sum())]


def main(sizes: list[int], ranks: list[int]) -> None:
    print("| scores | ranks | method | seconds | of gather | bytes a rank | exact |\n|---|---|---|---|---|---|---|")
    for num in sizes:
        expected = reference(num)
        for size in ranks:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", __file__]
                subprocess.run(
                    [*command, "--worker", str(num), folder], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                rows = json.loads((Path(folder) / "rows.json").read_text())
            gather = next(row["seconds"] for row in rows if row["method"] == "gather")
            for row in rows:
                exact = "yes" if row["mark"] == expected else "no"
                print(
                    f"| {num:.0e} | {size} | {row['method']} | {row['seconds']:.2f} | {row['seconds'] / gather:.2f} "
                    f"| {row['bytes']:,} | {exact} |",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--sizes", default="1e6,1e7,1e8")
        parser.add_argument("--ranks", default="2,4")
        given = parser.parse_args()
        main([int(float(s)) for s in given.sizes.split(",")], [int(r) for r in given.ranks.split(",")])

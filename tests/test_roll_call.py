"""A rank that does not come: every other one ends, and one message names the collective, the rank and what it does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_compress import comm, roll_call

ROOT = Path(__file__).parents[1]
SOON = timedelta(seconds=1)  # once all have met: to come together may take longer on a busy machine


def asleep() -> None:
    call = roll_call._roll_call
    while call is not None and not call.answered:
        time.sleep(0.05)


def apart(mode: str) -> tuple[str, str]:
    """In a group of its own that gives up soon, rank 1 of three goes another way: what it did, what the rank raised."""
    size, rank, store = comm.world_size(), comm.rank(), comm._store
    comm.shutdown()
    roll_call.POLL_S, roll_call._ANSWER_S = 0.2, 1.0
    own = dist.PrefixStore(mode, store)
    if mode == "astray":  # in the group of a program of one's own
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        comm.join(60.0)
    else:
        comm.init(60.0, "cpu", store=own, rank=rank, world_size=size)
    text = ""
    try:
        comm.check_equal("what all hold", 1, step=0)
        comm._set_timeout(SOON)
        if rank == 1 and mode == "silent":  # as a process of another machine that was killed
            call = roll_call._roll_call
            assert call is not None
            call.ended.set()
            call.thread.join()
            time.sleep(3.0)
        elif rank == 1 and mode in ("asleep", "outside"):
            asleep()
        elif rank == 1 and mode == "astray":
            comm.barrier()
        elif mode == "outside":  # as a backend waits in DDP
            dist.all_reduce(torch.ones(1))
        else:
            comm.sum_together([torch.ones(1, dtype=torch.int64)])
    except RuntimeError as error:
        text = roll_call.hold(error)
        assert mode == "outside" or isinstance(error, roll_call.LostContact) and text == str(error)
    finally:
        comm.shutdown(wait=False)
        roll_call.POLL_S, roll_call._ANSWER_S = 2.0, 3.0
        comm.init(60.0, "cpu", store=dist.PrefixStore(f"{mode} over", store), rank=rank, world_size=size)
    return mode, text


def one_text(results: list[tuple[str, str]], ranks: tuple[int, ...]) -> str:
    """What these ranks raised: all the same."""
    texts = {results[r][1] for r in ranks}
    assert len(texts) == 1, results
    return texts.pop()


HEAD = (
    r"^rank [02] waited in vain in sum_together \(all_reduce\), called at test_roll_call\.py:\d+ \(collective 2 of the "
    r"run\); missing: rank 1\.\n  rank 1: "
)


def test_a_rank_that_sleeps_is_named_with_its_last_collective_and_its_stack(ranks):
    results = ranks(3, apart, "asleep")
    text = one_text(results, (0, 2))
    assert re.search(HEAD, text) and results[1][1] == "", text
    last = (
        r"in no collective of comm\.py \(its last was 1, check_equal \(gather_object\), called at test_roll_call\.py:"
    )
    assert re.search(last, text) and re.search(r"\n    test_roll_call\.py:\d+ in asleep: time\.sleep\(", text), text
    assert text.endswith("If a rank is only slow, raise backend.timeout_s (60).")


def test_a_rank_in_another_collective_is_named_with_it(ranks):
    text = one_text(ranks(3, apart, "astray"), (0, 1, 2))
    elsewhere = r"in collective 2, barrier, called at test_roll_call\.py:\d+\n"
    there = r"in collective 2, sum_together \(all_reduce\), called at test_roll_call\.py:\d+\n"
    if text.startswith("rank 1"):  # who gave up first tells it as it sees it
        assert re.search(rf"; missing: ranks 0, 2\.\n  ranks 0, 2: {there}", text), text
    else:
        assert re.search(HEAD + elsewhere, text), text


def test_a_wait_outside_of_comm_is_told_with_the_stacks(ranks):
    text = one_text(ranks(3, apart, "outside"), (0, 2))
    head = "rank [02] waited in vain in all_reduce, called at no line of dist_compress, which does not tell who is "
    assert re.match(head, text) and " in asleep: time.sleep(" in text, text


def test_a_rank_of_another_machine_that_gives_no_answer_is_named_with_its_process(ranks):
    results = ranks(3, apart, "silent")
    assert re.search(HEAD + r"no answer from process \d+ on \S+: it or its machine is gone", one_text(results, (0, 2)))


def test_nothing_is_sent_while_all_goes_well(ranks):
    assert ranks(2, mute) == [[1, 1]] * 2


@pytest.mark.parametrize(
    ("error", "sign"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]"), True),
        (RuntimeError("[gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv"), True),
        (dist.DistNetworkError("The client socket has timed out after 60000ms"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("DataLoader timed out after 5 seconds"), False),
        (dist.DistBackendError("NCCL error: unhandled cuda error"), False),
        (TimeoutError("timed out"), False),
    ],
)
def test_only_what_torch_says_of_another_rank_is_a_lost_contact(error, sign):
    assert roll_call.is_sign(error) == sign


def mute() -> list[int]:
    call = roll_call._roll_call
    assert call is not None
    store, call.store = call.store, None  # type: ignore[assignment]
    try:
        before = roll_call.here.number
        comm.all_reduce(torch.ones(1))
        assert roll_call.here.number == before + 1 and not roll_call.here.inside
        return comm.all_gather(torch.tensor([1])).flatten().tolist()
    finally:
        call.store = store


def run(stand_in: str, ranks: int, folder: Path) -> tuple[str, dict[int, int]]:
    """What the console of a run said before torchrun's report, and the exit code of each rank."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/stand_in")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "STAND_IN": stand_in}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    line += ["-m", "dist_compress", "run_dir=kept", "backend.timeout_s=60"]
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    codes = re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", done.stderr)
    return done.stderr, {int(rank): int(code) for rank, code in codes}


def test_a_run_with_a_rank_asleep_ends_with_one_message(tmp_path):
    said, codes = run("asleep", 3, tmp_path)
    assert codes == {0: 1, 1: 143, 2: 1}, said
    assert len(re.findall("error: rank [02] waited in vain in all_reduce, called at sitecustomize.py", said)) == 1
    assert "; missing: rank 1." in said and re.search(r"sitecustomize\.py:\d+ in endless: time\.sleep", said), said
    assert said.count("error:") == 1 and "it goes on from its last checkpoint" in said


def test_a_rank_killed_in_the_long_work_of_rank_0_ends_the_run_with_one_message(tmp_path):
    said, codes = run("0 killed at work", 2, tmp_path)
    assert codes[0] == -9 and codes[1] in (1, 143), said
    (message,) = re.findall("error: .*", said)
    assert re.search(r": rank 0 \(process \d+\) on \S+ is gone", message), said
    assert "on_rank0 (broadcast_object), called at sitecustomize.py" in message, said

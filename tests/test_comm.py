"""Collectives: the ordered sum's bits, agreement, and what happens when rank 0 fails."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError

from dist_compress import comm, roll_call
from dist_compress.errors import UserError

SIZES = (1, 2, 3, 4)


def adversarial(num_rows: int, size: int) -> torch.Tensor:
    """float32 [num_rows, size] whose sum depends on the order of additions, also in float64."""
    generator = torch.Generator().manual_seed(1)
    scale = 10.0 ** torch.randint(-12, 13, (num_rows, size), generator=generator)
    return torch.randn(num_rows, size, generator=generator) * scale


def mine(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The rows of this rank; garbage where there is no micro-batch."""
    size, rank = comm.world_size(), comm.rank()
    count = -(-num_rows // size)
    out = torch.full((count, rows.shape[1]), float("nan"))
    own = rows[rank:num_rows:size]
    out[: len(own)] = own
    return out


def summed(num_rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    rows = adversarial(num_rows, size)
    total = comm.ordered_sum(mine(rows, num_rows), num_rows, initial=torch.ones(size, dtype=torch.float64))
    plain = mine(rows, num_rows).nan_to_num(0.0).sum(0)
    return total, comm.all_reduce(plain), comm.calls["ordered_sum"]


@pytest.mark.parametrize(("num_rows", "size"), [(8, 1000), (7, 5), (4, 1), (5, 3)])
def test_ordered_sum_is_the_sequential_fold_at_any_number_of_ranks(ranks, num_rows, size):
    fold = torch.ones(size, dtype=torch.float64)
    for row in adversarial(num_rows, size):
        fold += row
    for n in SIZES:
        for total, _, count in ranks(n, summed, num_rows, size):
            assert torch.equal(total, fold) and count == 1


def test_plain_sum_depends_on_the_number_of_ranks(ranks):
    plain = [ranks(n, summed, 8, 1000)[0][1] for n in SIZES]
    assert not torch.equal(plain[0], plain[1]) and not torch.equal(plain[1], plain[2])


def objects() -> tuple:
    r = comm.rank()
    return (
        comm.broadcast_object({"from": r}, src=comm.world_size() - 1),
        comm.gather_object(r),
        comm.all_reduce(torch.tensor([r + 1, -r]), "max").tolist(),
        comm.all_gather(torch.tensor([r])).flatten().tolist(),
        comm.broadcast(torch.tensor([r + 5])).item(),
        comm.on_rank0(lambda: f"rank {comm.rank()}"),
        comm.claim("one"),
    )


@pytest.mark.parametrize("n", SIZES)
def test_every_rank_gets_the_same(ranks, n):
    results = ranks(n, objects)
    for result in results:
        assert result[:6] == ({"from": n - 1}, list(range(n)), [n, 0], list(range(n)), 5, "rank 0")
    assert sum(result[6] for result in results) == 1


def patience_of_groups() -> tuple[float, str]:
    """In a group of its own that gives up after 2 seconds: rank 0 works for 3, alone and within a collective."""
    size, rank, store = comm.world_size(), comm.rank(), comm._store
    comm.shutdown()
    comm.init(2.0, "cpu", store=dist.PrefixStore("impatient", store), rank=rank, world_size=size)
    found = comm.on_rank0(lambda: time.sleep(3.0) or 7.0)
    try:
        if comm.rank() == 0:
            time.sleep(3.0)
        return found, comm.broadcast_object("in time")
    except RuntimeError:
        return found, "gave up"
    finally:
        comm.shutdown(wait=False)
        comm.init(60.0, "cpu", store=dist.PrefixStore("again", store), rank=rank, world_size=size)


def test_long_work_of_rank_0_does_not_time_out_and_a_late_rank_does(ranks):
    first, second = ranks(2, patience_of_groups)
    assert first[0] == 7.0 and second == (7.0, "gave up")


def act_alone() -> tuple:
    """Everything of comm.py inside `alone`, on rank 0; the other ranks never enter a collective of the group."""

    def work() -> tuple:
        entered = roll_call.here.number
        with comm.alone():
            comm.barrier()
            comm.check_equal("what rank 0 holds", 7, step=0)
            comm.check_order("modules", ["a", "b"])
            return (
                comm.rank(),
                comm.world_size(),
                comm.all_reduce(torch.tensor([3, 4])).tolist(),
                comm.all_gather(torch.tensor([5])).tolist(),
                [part.tolist() for part in comm.all_to_all([torch.tensor([1, 2])], [2])],
                comm.broadcast(torch.tensor([6])).tolist(),
                comm.broadcast_object("o", patient=True),
                comm.gather_object("g"),
                comm.ordered_sum(torch.ones(2, 3), 2, initial=torch.ones(3, dtype=torch.float64)).tolist(),
                comm.own_slot(9).tolist(),
                comm.sum_together([torch.tensor([8])])[0].tolist(),
                comm.on_rank0(lambda: "nested"),
                roll_call.here.number - entered,  # collectives of the group
            )

    found = comm.on_rank0(work)
    try:
        if comm.rank() == 1:
            with comm.alone():
                pass
        refused = False
    except AssertionError:
        refused = True
    return found, refused, comm.world_size(), comm.gather_object(comm.rank())


def test_alone_rank_0_is_the_only_rank_and_touches_no_group(ranks):
    first, second = ranks(2, act_alone)
    local = (0, 1, [3, 4], [[5]], [[1, 2]], [6], "o", ["g"], [3.0] * 3, [9], [8], "nested", 0)
    assert first == (local, False, 2, [0, 1])
    assert second == (local, True, 2, [0, 1])


def fail_alone() -> tuple[str, list[int]]:
    def work() -> None:
        with comm.alone():
            raise ValueError("nothing to export")

    try:
        comm.on_rank0(work)
    except Exception as error:
        return str(error), comm.gather_object(comm.rank())
    raise AssertionError


def test_an_error_alone_reaches_every_rank_and_the_group_goes_on(ranks):
    for text, seen in ranks(2, fail_alone):
        assert "nothing to export" in text and seen == [0, 1]


def fail_on_rank0(user: bool) -> tuple[str, str]:
    def fail() -> None:
        raise UserError("data.root=/nowhere") if user else KeyError("lost")

    try:
        comm.on_rank0(fail)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_an_error_of_rank0_reaches_every_rank(ranks):
    assert ranks(2, fail_on_rank0, True) == [("UserError", "data.root=/nowhere")] * 2
    first, second = ranks(2, fail_on_rank0, False)
    assert first == ("KeyError", "'lost'") and second == ("RuntimeError", "rank 0 failed: KeyError: 'lost'")


def disagree(differ: bool) -> str:
    try:
        comm.check_equal("the masks of 'conv1'", 7 + (comm.rank() if differ else 0), step=3)
    except RuntimeError as error:
        return str(error)
    return ""


def test_disagreement_names_what_the_step_and_both_values_on_every_rank(ranks):
    assert ranks(2, disagree, False) == ["", ""]
    for text in ranks(2, disagree, True):
        assert "the masks of 'conv1' at step 3: 7 on rank 0; 8 on rank 1" in text


def break_down(how: str) -> int:
    if comm.rank() == 1 and how == "raise":
        raise RuntimeError("rank one is tired")
    if comm.rank() == 1 and how == "die":
        import os

        os._exit(7)
    comm.barrier()
    return comm.rank()


@pytest.mark.parametrize(("how", "words"), [("raise", "rank one is tired"), ("die", "exit code 7")])
def test_the_pool_tells_which_rank_failed_and_goes_on(ranks, how, words):
    with pytest.raises(RankError, match=f"(?s)rank 1 of 2: .*{words}"):
        ranks(2, break_down, how)
    assert ranks(2, break_down, "not at all") == [0, 1]


def test_the_pool_shows_where_a_rank_hangs(ranks):
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 hung: .*test_comm\.py.* in hang"):
        ranks(2, hang, timeout_s=2.0)
    assert ranks(2, break_down, "not at all") == [0, 1]


def hang() -> None:
    if comm.rank() == 1:
        time.sleep(30)

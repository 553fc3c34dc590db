"""Who holds what: boxes as runs, DTensors of FSDP2 against what torch itself gathers, and flat partitions."""

from __future__ import annotations

import pytest
import torch
from sharded_nets import Flat, dealt
from torch import nn

from dist_compress import comm
from dist_compress.errors import UserError
from dist_compress.layout import Layout, box_runs


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((4, 6), [(1, 3), (0, 6)]),
        ((4, 6), [(0, 4), (2, 5)]),
        ((4, 6), [(0, 4), (0, 6)]),
        ((3, 4, 5), [(1, 3), (1, 2), (0, 5)]),
        ((3, 4, 5), [(0, 2), (0, 4), (4, 5)]),
        ((5,), [(3, 5)]),
        ((5,), [(5, 5)]),
        ((), []),
    ],
)
def test_runs_of_a_box_are_its_elements_in_order(shape, box):
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    inside = numbers[tuple(slice(*side) for side in box)].flatten().tolist()
    runs = box_runs(shape, box)
    assert [n for first, length in runs for n in range(first, first + length)] == inside
    assert all(a + n < b for (a, n), (b, _) in zip(runs, runs[1:], strict=False))  # none could be joined


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))


def placed(kind: str) -> list[bool]:
    """Whether each run of each parameter is where the whole parameter has it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model, size = small(), comm.world_size()
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif kind == "columns":
        mesh = init_device_mesh("cpu", (2, size // 2))
        for i in (0, 2):
            weight = distribute_tensor(model[i].weight.detach(), mesh, [Shard(1), Replicate()])
            model[i].weight = nn.Parameter(weight)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    layout, found = Layout(model), []
    for name, value in whole.items():
        runs = layout.runs(name, comm.rank())
        flat = [value.flatten()[first : first + length] for first, length in runs]
        found += [torch.equal(torch.cat([value.new_empty(0), *flat]), layout.local(name).flatten())]
        found += [torch.equal(layout.part(name, value), layout.local(name)), layout.shape(name) == value.shape]
        layout.local(name).fill_(7.0)
        found += [bool((layout.local(name) == 7.0).all())]
    return [*found, layout.is_whole("0.weight") == (kind == "hsdp" and size == 2)]


@pytest.mark.parametrize(("kind", "sizes"), [("fsdp", (2, 3, 4)), ("hsdp", (2, 4)), ("columns", (2, 4))])
def test_a_dtensor_knows_its_place(ranks, kind, sizes):
    for size in sizes:
        assert all(all(found) for found in ranks(size, placed, kind))


def half_a_mesh() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["a"])
    try:
        Layout(model).runs("0.weight", comm.rank())
    except UserError as error:
        return str(error)
    return ""


def test_a_mesh_of_some_ranks_is_refused(ranks):
    for said in ranks(4, half_a_mesh):
        assert said.startswith("0.weight is spread over 2 of 4 ranks")


def test_flat_partitions_cover_everything_once():
    for size in (1, 2, 3, 4):
        runs = [dealt(97, 13, rank, size) for rank in range(size)]
        numbers = sorted(n for mine in runs for first, length in mine for n in range(first, first + length))
        assert numbers == list(range(97))
    model = small()
    layout = Flat(model)
    mask = torch.rand(5, 1) > 0.5
    full = mask.expand(5, 3).flatten()
    want = torch.cat([full[a : a + n] for a, n in layout.runs("0.weight", 0)])
    assert torch.equal(layout.part("0.weight", mask).expand(15) if layout.is_whole("0.weight") else want, want)

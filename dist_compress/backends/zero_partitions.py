"""Where ZeRO keeps what it steps: flat float32 tensors, of which every rank has a piece, and their gradients.

The only file that looks inside DeepSpeed's optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_compress import comm
from dist_compress.backends.zero_layout import FlatLayout, flat_runs
from dist_compress.layout import Run
from dist_compress.moments import State, is_moment


@dataclass(frozen=True)
class Flat:
    """What this rank steps as one tensor, and (parameter, first element, number of elements) in it."""

    master: torch.Tensor
    pieces: list[tuple[str, int, int]]

    def cut(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of a tensor that lies as `master` does."""
        return {name: flat[start : start + length] for name, start, length in self.pieces}


class Partitions:
    """Of stages 1 and 2: parameters lie one after the other, cut into a piece a rank; the model computes with copies.
    Everything is local but building it and `layout.publish`."""

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        """`optimizer`: that of the engine."""
        self.optimizer = optimizer
        self.flats: list[Flat] = []
        self.holdings: dict[str, list[list[Run]]] = {}
        names = {id(p): name for name, p in model.named_parameters()}
        self.collect(names)
        local = {name: p.detach() for name, p in model.named_parameters() if name not in self.holdings}
        local |= self.frozen(model)
        for flat in self.flats:
            local |= flat.cut(flat.master.detach())
        shapes = {name: self.shape(p) for name, p in model.named_parameters()}
        self.layout = FlatLayout(model, shapes, self.holdings, local, self.publish)

    def collect(self, names: dict[int, str]) -> None:
        """Find `flats` and `holdings`."""
        for i, group in enumerate(self.optimizer.bit16_groups):
            width, offset, pieces = int(self.optimizer.partition_size[i]), 0, []
            for parameter in group:
                name, num = names[id(parameter)], parameter.numel()
                self.holdings[name] = flat_runs(num, offset, width, comm.world_size())
                run = self.holdings[name][comm.rank()]
                first, length = run[0] if run else (0, 0)
                start = offset + first - comm.rank() * width if run else 0
                pieces.append((name, start, length))
                offset += num
            self.flats.append(Flat(self.optimizer.single_partition_of_fp32_groups[i], pieces))

    def frozen(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What this rank holds of partitioned parameters that are not trained."""
        return {}

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def publish(self) -> None:
        """Give the copies the values of the masters. Collective."""
        self.optimizer.update_lp_params()

    def rest(self) -> None:
        """Let go of whole parameters that the last call of the model has left behind."""

    def take_gradients(self) -> None:
        """Gradients are reduced: `layout.grad` knows them, and what is written there is stepped."""
        grads: dict[str, torch.Tensor] = {}
        for i, flat in enumerate(self.flats):
            whole = self.gradient(i)
            self.optimizer.averaged_gradients[i] = [whole]
            grads |= flat.cut(whole)
        self.layout.grads = grads

    def gradient(self, number: int) -> torch.Tensor:
        """Of what this rank steps as flat tensor `number`."""
        return torch.cat([grad.reshape(-1) for grad in self.optimizer.averaged_gradients[number]])

    def drop_gradients(self) -> None:
        """They were stepped."""
        self.layout.grads = {}

    def moments(self) -> State:
        """{parameter: {key: what this rank holds of a moment, live, or a plain value}}."""
        found: State = {}
        for flat in self.flats:
            for key, value in self.optimizer.optimizer.state.get(flat.master, {}).items():
                cut = flat.cut(value) if is_moment(value) else {}
                for name, _, _ in flat.pieces:
                    found.setdefault(name, {})[key] = cut.get(name, value)
        return found

    def load_moments(self, state: State) -> None:
        """The inverse. A flat tensor has one count of steps: the largest of its parameters."""
        for flat in self.flats:
            own = {name: state[name] for name, _, _ in flat.pieces if name in state}
            for key in dict.fromkeys(key for values in own.values() for key in values):
                values = {name: kept[key] for name, kept in own.items() if key in kept}
                if any(is_moment(value) for value in values.values()):
                    whole = torch.zeros_like(flat.master.detach())
                    for name, piece in flat.cut(whole).items():
                        if name in values:
                            piece.copy_(values[name])
                else:
                    most = max(values.values(), key=lambda value: 0 if value is None else float(value))
                    whole = most.clone() if isinstance(most, torch.Tensor) else most
                self.optimizer.optimizer.state[flat.master][key] = whole


class ParameterPartitions(Partitions):
    """Of stage 3: every parameter is cut into a piece a rank; the model computes with what is gathered of copies."""

    def collect(self, names: dict[int, str]) -> None:
        for group, master in zip(self.optimizer.fp16_groups, self.optimizer.fp32_partitioned_groups_flat, strict=True):
            offset, pieces = 0, []
            for parameter in group:
                run = self._hold(names[id(parameter)], parameter)
                pieces.append((names[id(parameter)], offset, run[0][1] if run else 0))
                offset += parameter.partition_numel()
            self.flats.append(Flat(master, pieces))

    def _hold(self, name: str, parameter: Any) -> list[Run]:
        self.holdings[name] = flat_runs(parameter.ds_numel, 0, parameter.partition_numel(), comm.world_size())
        return self.holdings[name][comm.rank()]

    def frozen(self, model: nn.Module) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in model.named_parameters():
            if name not in self.holdings:
                run = self._hold(name, parameter)
                found[name] = parameter.ds_tensor.detach()[: run[0][1] if run else 0]  # type: ignore[attr-defined]
        return found

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]

    def publish(self) -> None:
        """Local."""
        self.rest()
        copies = self.optimizer.fp16_partitioned_groups_flat  # what is gathered; maybe the masters themselves
        torch._foreach_copy_([copy.detach() for copy in copies], [flat.master.detach() for flat in self.flats])

    def rest(self) -> None:
        self.optimizer.parameter_offload.partition_all_parameters()

    def gradient(self, number: int) -> torch.Tensor:
        start = sum(flat.master.numel() for flat in self.flats[:number])
        return self.optimizer.grad_partitions_flat_buffer.narrow(0, start, self.flats[number].master.numel())

    def drop_gradients(self) -> None:
        super().drop_gradients()
        self.optimizer.grad_partitions_flat_buffer.zero_()  # a parameter that the next step does not reach has none

"""The torch.fx graph of a recording in the making: which node made a tensor, how values become arguments."""

from __future__ import annotations

import enum
import inspect
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import TensorWeakRef

from dist_compress.errors import UserError
from dist_compress.tracing.blame import users_line
from dist_compress.tracing.nest import is_closed
from dist_compress.tracing.traced_int import TracedInt

# What torch.fx writes into its code as it is.
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class GraphBuilder:
    """Tensors are known by identity. `path` is the fqn stack of the modules that are running."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph = Graph()
        self.path = [""]
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.names = {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
        self.attributes: dict[str, Any] = {}  # what get_attr and call_module nodes name
        self.known: dict[int, tuple[torch.Tensor, Node]] = {}  # holds the tensors, so that ids stay unique
        self.derived: dict[int, TensorWeakRef] = {}  # made from known ones inside what is recorded as a whole
        self.ints: list[TracedInt] = []
        self.lifted: dict[str, str] = {}
        self.opaque_outputs: list[str] = []
        self.devices: dict[torch.device, Node] = {}  # as read off a tensor: a replay asks the tensor again
        self._training: Node | None = None

    def add_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Placeholders named as in `forward`. Returns the arguments to run with, in which ints are traced."""
        values = dict(zip(_positional_names(self.model, len(args)), args, strict=True))
        defaults = {k: v for k, v in kwargs.items() if type(v) is not int and (v is None or type(v) in _PLAIN)}
        values |= {name: value for name, value in kwargs.items() if name not in defaults} | defaults
        for name, value in values.items():
            default = (value,) if name in defaults else ()  # a constant may be left out when the graph is called
            node = self.graph.create_node("placeholder", name, default)
            if type(value) is int:
                values[name] = TracedInt(value, node, self.ints)
            elif value is None or type(value) in _PLAIN:
                node.meta["recorded"] = value  # the graph does not look at it
        for name, node in zip(values, list(self.graph.nodes), strict=True):
            self.bind(values[name], node)
        return [values[name] for name in list(values)[: len(args)]], {name: values[name] for name in kwargs}

    def add(self, op: str, target: Any, args: Any = (), kwargs: Any = None, impure: bool = False) -> Node:
        """A node at the end of the graph; an impure one stays although nobody uses it."""
        node = self.graph.create_node(op, target, self.to_arg(tuple(args)), self.to_arg(dict(kwargs or {})))
        node.meta["module"] = self.path[-1]
        if impure:
            node.meta["impure"] = True
        return node

    def bind(self, value: Any, node: Node) -> None:
        """`node` computes `value`: from now on its tensors stand for this node or its items."""
        if isinstance(value, torch.Tensor):
            self.known[id(value)] = (value, node)
        elif isinstance(value, list | tuple | Mapping) and has_tensor(value):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                if has_tensor(item):
                    self.bind(item, self.graph.call_function(operator.getitem, (node, key)))

    @contextmanager
    def traced_attributes(self) -> Iterator[None]:
        """Inside, the integers of the modules whose code is recorded know the node that reads them."""
        originals: list[tuple[dict[str, Any], str, int]] = []
        for owner, module in self.model.named_modules():
            if self.is_leaf(module) or isinstance(module, GraphModule):
                continue
            for name, value in list(vars(module).items()):
                if type(value) is int and not name.startswith("_"):
                    target = f"{owner}.{name}".lstrip(".")
                    self.attributes[target] = value
                    originals.append((vars(module), name, value))
                    vars(module)[name] = TracedInt(value, self.graph.create_node("get_attr", target), self.ints)
        try:
            yield
        finally:
            for attributes, name, value in originals:
                attributes[name] = value

    def is_leaf(self, module: nn.Module) -> bool:
        """A module that is one node."""
        raise NotImplementedError

    def training_flag(self) -> Node:
        """The node that reads whether the graph module is in training mode."""
        if self._training is None:
            self.attributes["training"] = self.model.training
            self._training = self.graph.create_node("get_attr", "training")
        return self._training

    def is_known(self, tensor: torch.Tensor) -> bool:
        entry = self.known.get(id(tensor))
        return entry is not None and entry[0] is tensor

    def depends_on_inputs(self, tensor: torch.Tensor) -> bool:
        """Known, or computed from a known one."""
        return self.is_known(tensor) or self.is_derived(tensor)

    def is_derived(self, tensor: torch.Tensor) -> bool:
        reference = self.derived.get(id(tensor))
        return reference is not None and reference() is tensor

    def node_of(self, tensor: torch.Tensor) -> Node:
        """The node that made a tensor, or one that gets a parameter, a buffer or a lifted constant."""
        if self.is_known(tensor):
            return self.known[id(tensor)][1]
        name = self.names.get(id(tensor))
        if name is None and self.is_derived(tensor):
            where, line = self.path[-1] or type(self.model).__name__, users_line()
            raise UserError(
                f"concrete_trace: module {where!r} ({line}) uses a tensor of shape {list(tensor.shape)} that was "
                "computed from the inputs inside a torch.nn module or torch function without being its output, e.g. "
                "by a hook. Return it instead."
            )
        if name is None:
            # A constant with a history would drag the program that made it along.
            name = self.lift(tensor if tensor.is_leaf else tensor.detach())
        self.attributes.setdefault(name, tensor)
        node = self.graph.create_node("get_attr", name)
        self.known[id(tensor)] = (tensor, node)
        return node

    def lift(self, value: Any) -> str:
        """The name of a new attribute of the graph module that holds `value`."""
        name = f"_lifted_{len(self.lifted)}"
        self.attributes[name] = value
        self.lifted[name] = self.path[-1]
        return name

    def to_arg(self, value: Any) -> Any:
        """`value` as an argument of a node."""
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, TracedInt):
            return int(value) if value.node is None else value.node
        if type(value) is torch.device and value in self.devices:
            return self.devices[value]
        if value is None or type(value) in _PLAIN or isinstance(value, Node):
            return value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.graph.call_function(type(value), tuple(self.to_arg(v) for v in value))
        if isinstance(value, list | tuple | range):
            return (list if isinstance(value, list) else tuple)(self.to_arg(v) for v in value)
        if type(value) is dict:
            return {key: self.to_arg(v) for key, v in value.items()}
        if isinstance(value, slice):
            return slice(self.to_arg(value.start), self.to_arg(value.stop), self.to_arg(value.step))
        if isinstance(value, int | float | str) and not isinstance(value, enum.Enum):
            plain = next(t for t in (int, float, str) if isinstance(value, t))  # a subclass, such as numpy's
            return plain(value)
        return self.graph.create_node("get_attr", self.lift(value))

    def to_output(self, value: Any) -> Any:
        """What the graph returns for `value`: a dataclass, or any nest that pytree knows, rebuilt by its rules."""
        if type(value) in (list, tuple):
            return type(value)(self.to_output(v) for v in value)
        if type(value) is dict:
            return {key: self.to_output(v) for key, v in value.items()}
        leaves, spec = tree_flatten(value)
        if not spec.is_leaf():
            name = f"_output_spec_{len(self.attributes)}"
            self.attributes[name] = spec
            spec_node = self.graph.create_node("get_attr", name)
            return self.graph.call_function(tree_unflatten, ([self.to_output(v) for v in leaves], spec_node))
        if is_closed(value):
            made = {field.name: self.to_output(getattr(value, field.name)) for field in fields(value) if field.init}
            return self.graph.call_function(type(value), (), made)
        node = self.to_arg(value)
        if isinstance(node, Node) and node.op == "get_attr" and not isinstance(value, torch.Tensor):
            self.opaque_outputs.append(str(node.target))
        return node

    def finish(self, output: Any) -> GraphModule:
        """The graph module, without the nodes nobody needs. It shares the model's tensors and modules."""
        self.graph.output(self.to_output(output))
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or "impure" in node.meta)
        used = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        attributes = {name: value for name, value in self.attributes.items() if name in used}
        module = GraphModule(attributes, self.graph, type(self.model).__name__)
        persistent = self.model.state_dict(keep_vars=True)
        for name, value in attributes.items():
            owner, _, leaf = name.rpartition(".")
            if isinstance(value, torch.Tensor) and name not in persistent:
                module.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
        for submodule in module.modules():  # the shells around the model's own modules
            if id(submodule) not in self.modules:
                submodule.training = self.model.training
        module.meta["lifted"] = {name: path for name, path in self.lifted.items() if name in used}
        module.meta["opaque_outputs"] = self.opaque_outputs
        return module

    def close(self) -> None:
        """Let go of the tensors; sizes that the model kept become plain ints."""
        for traced in self.ints:
            traced.forget()
        self.known.clear()
        self.derived.clear()


def has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _positional_names(model: nn.Module, count: int) -> list[str]:
    """Names for `count` positional arguments: those of `forward`, numbered behind a `*args`."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return [*names, *(f"arg_{i}" for i in range(count))][:count]

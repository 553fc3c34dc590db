"""The same models, masks and inputs through Torch-Pruning and through dist_compress.speedup: seconds, sizes, errors.

    pip install --target tp_site torch-pruning==1.6.1 --no-deps       # or: pip install -e ".[bench]"
    python benchmarks/speedup_peers.py --site tp_site [--models resnet50 ...] [--limit 300]

Half of the channels (units) of each group, the smallest by L1. Rows of one model:
    ours                                 masks on weights and norm affines, as speedup.coupling names them
    torch-pruning, as documented         MagnitudeImportance(p=1), ratio 0.5, the classifier ignored
    torch-pruning, by hand               also the number of heads and every layer that cannot shrink given by hand, and
                                         the very units that our masks remove
Seconds are CPU seconds of one thread (process time), each row in a process of its own with a limit on them. Error is
max |difference| / max |output| in float64 on another input, against the model whose weights and norm affines are
zeroed where the tool removed them. Writes speedup_peers.md and speedup_peers.json beside this file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from dist_compress import speedup
from dist_compress.speedup import planning

HERE = Path(__file__).parent
MODELS = {  # name: (edge of the input image, what the names of the pruned groups hold)
    "resnet50": (64, ""),
    "densenet121": (64, ""),
    "mobilenet_v2": (64, ""),
    "convnext_tiny": (224, ""),
    "vit_b_16": (224, ".mlp."),
    "swin_t": (224, ".mlp."),
    "llama_tiny": (0, ".mlp."),
}
TOOLS = ("ours", "torch-pruning, as documented", "torch-pruning, by hand")
PHASES = ("capture", "coupling", "plan", "apply")


def build(name: str) -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    """(model in float32 with no weight at zero that has run once, maker of a random input as keyword arguments)."""
    model, make = _build(name)
    with torch.no_grad():
        model(**make())  # what libraries set up on first use belongs to no tool
    return model, make


def _build(name: str) -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    torch.manual_seed(0)
    if name == "llama_tiny":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, use_cache=False)  # fmt: skip
        return LlamaForCausalLM(config).eval(), lambda: {"input_ids": torch.randint(0, 128, (1, 16))}
    model = getattr(torchvision.models, name)().eval()
    for parameter in model.parameters():
        if not bool(parameter.any()):  # a head that starts at zero hides everything before it
            nn.init.normal_(parameter, std=0.02)
    edge = MODELS[name][0]
    return model, lambda: {"x": torch.randn(1, 3, edge, edge)}


def lap(seconds: dict[str, float], phase: str, work: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = work()
    seconds[phase] = seconds.get(phase, 0.0) + time.process_time() - start
    return result


def smallest_half(model: nn.Module, coupling: Any, pattern: str) -> dict[str, torch.Tensor]:
    """{parameter fqn: mask}: half of the units of each group, the smallest by L1 over their producers."""
    masks: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in coupling.groups:
        if group.blocked or pattern not in f".{group.name}." or group.num_units < 2:
            continue
        score = torch.zeros(group.num_units)
        for member in group.members:
            if member.role == "producer":
                weight = parameters[member.fqn].detach()
                others = [d for d in range(weight.dim()) if d != member.dim]
                each = weight.abs().sum(others) if others else weight.abs()
                score += each[member.index].sum(1)
        gone = score.argsort()[: group.num_units // 2]
        for member in group.members:
            if member.role != "consumer":
                shape = parameters[member.fqn].shape
                mask = masks.get(member.fqn, torch.ones(shape[member.dim], dtype=torch.bool))
                mask.flatten()[member.index[gone].flatten()] = False
                masks[member.fqn] = mask.view([-1 if d == member.dim else 1 for d in range(len(shape))])
    return masks


def ours(name: str) -> dict[str, Any]:
    model, make = build(name)
    seconds: dict[str, float] = {}
    verified = planning.verified
    planning.verified = lambda *args: lap(seconds, "verification", lambda: verified(*args))
    captured = speedup.capture(model, (), make())
    lap(seconds, "capture", lambda: captured.structure)
    coupling = lap(seconds, "coupling", lambda: speedup.coupling(captured))
    masks = lap(seconds, "plan", lambda: smallest_half(model, coupling, MODELS[name][1]))
    plan = lap(seconds, "plan", lambda: speedup.plan(captured, masks=masks))
    seconds["plan"] -= seconds["verification"]
    reference = copy.deepcopy(model)
    small = lap(seconds, "apply", lambda: speedup.apply(model, plan))
    with torch.no_grad():
        for fqn, mask in masks.items():
            reference.get_parameter(fqn).mul_(mask)
    return summary(seconds, small, reference, make)


def torch_pruning(name: str, by_hand: bool) -> dict[str, Any]:
    import torch_pruning as tp

    model, make = build(name)
    original = copy.deepcopy(model)
    settings: dict[str, Any] = {"importance": tp.importance.MagnitudeImportance(p=1)}
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    settings["ignored_layers"] = heads
    if by_hand:
        settings |= hand_given(model, make, name)
    kept = follow_slices(tp)
    seconds: dict[str, float] = {}
    inputs = make()
    inputs = inputs if name == "llama_tiny" else next(iter(inputs.values()))
    pruner = lap(seconds, "coupling", lambda: tp.pruner.BasePruner(model, inputs, pruning_ratio=0.5, **settings))
    lap(seconds, "apply", pruner.step)
    with torch.no_grad():
        for fqn, tensor in model.named_parameters():
            for dim, index in kept.get(id(tensor), (None, {}))[1].items():
                if dim == 0:  # what makes a channel or scales it; columns that read one follow
                    old = original.get_parameter(fqn)
                    gone = torch.ones(old.size(0), dtype=torch.bool).index_fill_(0, index, False)
                    old[gone] = 0
    return summary(seconds, model, original, make)


def hand_given(model: nn.Module, make: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
    """What one would find out by hand: our masks as scores, the other layers ignored, the heads of attention."""
    masks = smallest_half(model, speedup.coupling(model, (), make()), MODELS[name][1])
    names = {module: fqn for fqn, module in model.named_modules()}
    makes = {fqn for fqn in names.values() if f"{fqn}.weight" in masks}
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    ignored = [module for module, fqn in names.items() if isinstance(module, layers) and fqn not in makes]

    def scores(group: Any) -> torch.Tensor:
        fqn = names[group[0].dep.target.module]
        return masks[f"{fqn}.weight"].flatten().float()

    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {"importance": lambda group, **_: scores(group), "ignored_layers": ignored, "num_heads": heads}


def follow_slices(tp: Any) -> dict[int, tuple[torch.Tensor, dict[int, torch.Tensor]]]:
    """{id of a sliced parameter: (it, {dim: original indices that are left})}, filled while the tool runs."""
    kept: dict[int, tuple[torch.Tensor, dict[int, torch.Tensor]]] = {}
    base = tp.pruner.function.BasePruningFunc
    original = base._prune_parameter_and_grad

    def prune(self: Any, weight: torch.Tensor, keep_idxs: list[int], pruning_dim: int) -> torch.Tensor:
        new = original(self, weight, keep_idxs, pruning_dim)
        dims = dict(kept[id(weight)][1]) if id(weight) in kept else {}
        index = torch.as_tensor(keep_idxs, dtype=torch.int64)
        dims[pruning_dim] = dims[pruning_dim][index] if pruning_dim in dims else index
        kept[id(new)] = (new, dims)
        kept.setdefault(id(weight), (weight, {}))  # alive, so that its id is not used again
        return new

    base._prune_parameter_and_grad = prune
    return kept


def summary(
    seconds: dict[str, float], small: nn.Module, reference: nn.Module, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, after = (sum(p.numel() for p in m.parameters()) for m in (reference, small))
    made = {k: v.double() if v.is_floating_point() else v for k, v in make().items()}
    try:
        with torch.no_grad():
            error = speedup.verify(reference.double()(**made), small.double()(**made))
    except Exception as failure:
        error = f"does not run: {type(failure).__name__}"
    return {"seconds": seconds, "params": after / before, "error": error, "peak_mb": peak}


def in_a_process(name: str, tool: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of one model and tool, from a fresh process that may use `limit` CPU seconds."""
    command = [sys.executable, __file__, "--row", name, tool, "--site", str(arguments.site or "")]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (arguments.limit, arguments.limit))

    rows = []
    for _ in range(arguments.repeats):
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        if done.returncode != 0:
            break
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    else:
        return min(rows, key=total)
    if done.returncode < 0:
        return {"failed": f"not finished in {arguments.limit} CPU s"}
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    return {"failed": (errors or ["no message"])[-1][:100]}


def row(name: str, tool: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # no tool is charged for collecting what the imports left
    with torch.no_grad() if tool == "ours" else torch.enable_grad():
        result = ours(name) if tool == "ours" else torch_pruning(name, by_hand=tool == TOOLS[2])
    gc.unfreeze()
    print(json.dumps(result))


def total(result: dict[str, Any]) -> float:
    return sum(result.get("seconds", {}).get(phase, 0.0) for phase in PHASES) if "seconds" in result else math.nan


def table(results: dict[str, dict[str, Any]]) -> str:
    head = ["model", "tool", *(f"{p} s" for p in PHASES), "sum s", "ratio", "verification s", "params left", "error"]
    lines = [f"| {' | '.join([*head, 'peak MB'])} |", f"|{'---|' * (len(head) + 1)}"]
    for name, by_tool in results.items():
        for tool, result in by_tool.items():
            peer = total(by_tool[TOOLS[1]]) if TOOLS[1] in by_tool else math.nan
            cells = [f"{name} {MODELS[name][0] or ''}".strip(), tool]
            if "failed" in result:
                lines.append(f"| {' | '.join([*cells, result['failed']])} {'|' * 10}")
                continue
            seconds = result["seconds"]
            cells += [f"{seconds[p]:.2f}" if p in seconds else "" for p in PHASES] + [f"{total(result):.2f}"]
            cells.append(f"{total(result) / peer:.2f}" if not math.isnan(peer) else "")
            cells.append(f"{seconds['verification']:.2f}" if "verification" in seconds else "")
            error = result["error"]
            cells += [f"{result['params']:.3f}", error if isinstance(error, str) else f"{error:.0e}"]
            lines.append(f"| {' | '.join([*cells, str(round(result['peak_mb']))])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", help="folder with torch_pruning, when it is not installed")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--limit", type=int, default=300, help="CPU seconds of one model and tool")
    parser.add_argument("--repeats", type=int, default=3, help="of which the quickest counts")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.site:
        sys.path.append(arguments.site)
    if importlib.util.find_spec("torch_pruning") is None:
        parser.error("torch_pruning is missing: pip install --target tp_site torch-pruning==1.6.1 --no-deps, "
                     "then --site tp_site")  # fmt: skip
    if arguments.row:
        row(*arguments.row)
        return
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.models:
        results[name] = {}
        for tool in TOOLS:
            results[name][tool] = in_a_process(name, tool, arguments)
            print(name, tool, results[name][tool], flush=True)
    versions = {n: importlib.metadata.version(n) for n in ("torch", "torchvision", "transformers")}
    found = [d.version for d in importlib.metadata.distributions(name="torch-pruning")]
    versions |= {"torch-pruning": found[0] if found else "unknown", "python": platform.python_version()}
    command = "python benchmarks/speedup_peers.py --site tp_site"
    command += f" --limit {arguments.limit} --repeats {arguments.repeats}"
    content = {"command": command, "versions": versions, "limit": arguments.limit, "results": results}
    (HERE / "speedup_peers.json").write_text(json.dumps(content, indent=1) + "\n")
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    note = "Written by `" + command + f"`: {about}; CPU seconds of one thread, batch 1, "
    note += f"limit {arguments.limit} s, the quickest of {arguments.repeats} runs."
    explanation = (
        "ratio: to Torch-Pruning as documented. verification: the runs of the masked and the shrunk model that are a "
        "part of plan(), timed apart; plan: with scoring and masks. Torch-Pruning's coupling holds its capture, "
        "its apply holds scoring. error: against the model masked where the tool removed."
    )
    (HERE / "speedup_peers.md").write_text(f"{note}\n\n{table(results)}\n\n{explanation}\n")


if __name__ == "__main__":
    main()

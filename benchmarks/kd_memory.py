"""Peak memory and time of a distillation loss with output layers: naive, a chunk of tokens at a time, by vocabulary.

    python benchmarks/kd_memory.py [--tokens 8192] [--vocabulary 8016] [--hidden 256] [--full 128256]

From the hidden states of student and teacher to the gradients of the student's hidden states and output layer;
bfloat16, forward KL at temperature 2. `bytes`: the most that was alive at once of what the operators made (inputs and
weights not counted; the gradients of hidden states and output layer are, for they are results). `at --full`: the same
at that vocabulary, where everything that grows with the vocabulary is taken as proportional to it. Seconds: the
median of `--repeats`, turn by turn. `one of 8` is what one of eight ranks has that holds an eighth of the vocabulary;
its time leaves out two all-reduces of [2, tokens] and [3, tokens]. Liger-Kernel runs only where Triton does. Prints a
Markdown table.

naive       two whole logits, two log_softmax in float32, elementwise KL, autograd
chunked     dist_compress.distillation.head.head_loss
one of 8    dist_compress.distillation.losses.divergence on an eighth of the columns
liger       liger_kernel.transformers.LigerFusedLinearJSDLoss with beta 0 (forward KL; its own chunks)
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_compress.distillation.head import Head, head_loss
from dist_compress.distillation.losses import CHUNK_ELEMENTS, Divergence, loss_and_grad

TEMPERATURE = 2.0


class Alive(TorchDispatchMode):
    """Bytes of storages that operators made and that live still; `peak` is the most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor, old=True)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor, old=False)
        return out

    def note(self, tensor: torch.Tensor, old: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        size = 0 if old else storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def tensors(tokens: int, vocabulary: int, hidden: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"s": (tokens, hidden), "w": (vocabulary, hidden), "t": (tokens, hidden), "v": (vocabulary, hidden)}
    made = {name: torch.randn(shape, generator=g) / 8 for name, shape in shapes.items()}
    return {name: x.bfloat16().requires_grad_(name in "sw") for name, x in made.items()}


def naive(x: dict[str, torch.Tensor]) -> torch.Tensor:
    student, teacher = x["s"] @ x["w"].T, (x["t"] @ x["v"].T).detach()
    a = (student.float() / TEMPERATURE).log_softmax(1)
    b = (teacher.float() / TEMPERATURE).log_softmax(1)
    loss = TEMPERATURE**2 * (b.exp() * (b - a)).sum()
    loss.backward()
    return loss.detach()


def chunked(x: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    how = Divergence("forward", TEMPERATURE)
    loss, _ = head_loss(x["s"], Head(x["w"]), x["t"], Head(x["v"]), how, chunk_tokens=size)
    loss.backward()
    return loss.detach()


def by_vocabulary(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """One rank's columns; a reduction that stands for the others'."""
    student, teacher = x["s"] @ x["w"].T, (x["t"] @ x["v"].T).detach()

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
            loss, grad = loss_and_grad(own, teacher, Divergence("forward", TEMPERATURE), lambda t, op: t)
            ctx.save_for_backward(grad.to(own.dtype))
            return loss

        @staticmethod
        def backward(ctx: Any, up: torch.Tensor) -> torch.Tensor:
            return (ctx.saved_tensors[0] * up[:, None]).to(student.dtype)

    loss = Loss.apply(student).sum()
    loss.backward()
    return loss.detach()


def liger(x: dict[str, torch.Tensor]) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(jsd_beta=0.0, temperature=TEMPERATURE)(x["s"], x["w"], x["t"], x["v"])
    loss.backward()
    return loss.detach()


def peak(scheme: Callable[..., torch.Tensor], x: dict[str, torch.Tensor]) -> int:
    for tensor in x.values():
        tensor.grad = None
    with Alive() as alive:
        scheme(x)
    return alive.peak


def seconds(scheme: Callable[..., torch.Tensor], x: dict[str, torch.Tensor]) -> float:
    for tensor in x.values():
        tensor.grad = None
    start = time.perf_counter()
    scheme(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("vocabulary", 8016), ("hidden", 256), ("full", 128_256), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    size = max(CHUNK_ELEMENTS // args.full, 1)  # tokens of a chunk at the full vocabulary
    whole = tensors(args.tokens, args.vocabulary, args.hidden)
    eighth = tensors(args.tokens, args.vocabulary // 8, args.hidden)
    schemes: dict[str, tuple[Callable[..., torch.Tensor], dict[str, torch.Tensor]]] = {
        "naive": (naive, whole),
        f"chunked, {size} tokens": (lambda x: chunked(x, size), whole),
        "one of 8": (by_vocabulary, eighth),
    }
    try:
        import liger_kernel.transformers  # noqa: F401

        schemes["liger"] = liger, whole
    except ImportError as error:
        print(f"Liger-Kernel is not run: {error}\n")
    difference = abs(float(naive(whole)) / float(chunked(whole, size)) - 1)
    bytes_of = {name: peak(*scheme) for name, scheme in schemes.items()}
    times: dict[str, list[float]] = {name: [] for name in schemes}
    for _ in range(args.repeats):
        for name, scheme in schemes.items():
            times[name].append(seconds(*scheme))
    fixed = args.tokens * args.hidden * 2  # the gradient of the hidden states does not grow with the vocabulary
    grown = {name: (b - fixed) * args.full / args.vocabulary + fixed for name, b in bytes_of.items()}
    first = next(iter(schemes))
    print(f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}")
    print(f"naive and chunked losses differ by {difference:.1e} (relative)\n")
    print(f"| scheme | bytes | of naive | bytes at {args.full} | s | of naive |\n|---|---|---|---|---|---|")
    for name in schemes:
        median, base = statistics.median(times[name]), statistics.median(times[first])
        print(
            f"| {name} | {bytes_of[name] / 1e6:.0f} MB | {bytes_of[name] / bytes_of[first]:.3f} "
            f"| {grown[name] / 1e9:.2f} GB | {median:.2f} | {median / base:.2f} |"
        )


if __name__ == "__main__":
    main()

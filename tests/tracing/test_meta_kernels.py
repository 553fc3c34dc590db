"""Quick results on the meta device are what torch's own kernels give there."""

import pytest
import torch

from dist_compress.tracing import meta_kernels

aten = torch.ops.aten
X = torch.empty(2, 6, 4, 4, device="meta")
LAST = X.to(memory_format=torch.channels_last)
V, W = torch.empty(6, device="meta"), torch.empty(4, device="meta")
A, B, C = (torch.empty(shape, device="meta") for shape in ((3, 5), (5, 6), (5, 4)))
CALLS = [
    (aten.native_batch_norm.default, (X, V, V, V, V, False, 0.1, 1e-5)),
    (aten.native_batch_norm.default, (LAST, V, None, V, V, False, 0.1, 1e-5)),
    (aten.native_batch_norm.default, (X, V, V, V, V, True, 0.1, 1e-5)),
    (aten.native_layer_norm.default, (X, [4], W, W, 1e-5)),
    (aten.native_layer_norm.default, (X, [4, 4], None, None, 1e-5)),
    (aten.native_layer_norm.default, (X.double(), [4], W.double(), None, 1e-5)),
    (aten.native_layer_norm.default, (X.mT, [4], W, W, 1e-5)),
    (aten.addmm.default, (V, A, B)),
    (aten.addmm.default, (torch.empty(3, 6, device="meta"), A, B)),
    (aten.add.Tensor, (X, X)),
    (aten.add.Tensor, (X, LAST)),
    (aten.add.Tensor, (X, X.double())),
    (aten.add.Tensor, (X, 2.0)),
    (aten.mul.Tensor, (X.mT, X.mT)),
    (aten.mul.Tensor, (X.long(), 2.5)),
    (aten.add_.Tensor, (X, X)),
    (aten.add_.Tensor, (X, W)),
    (aten.relu.default, (LAST,)),
    (aten.gelu.default, (X.mT,)),
    (aten.gelu.default, (X[:, ::2],)),
    (aten.hardtanh_.default, (X, 0.0, 6.0)),
    (aten.hardswish.default, (X.half(),)),
    (aten.hardsigmoid.default, (X,)),
]


def described(result):
    results = result if isinstance(result, tuple) else (result,)
    return [(tuple(t.shape), t.dtype, t.stride(), t.is_meta) for t in results]


@pytest.mark.parametrize(("func", "args"), CALLS, ids=[f"{f.name()}-{i}" for i, (f, _) in enumerate(CALLS)])
def test_as_torch(func, args):
    with torch.no_grad():
        quick = meta_kernels.run(func, args, {})
        assert described(quick) == described(func(*args))
        if func._schema.name.endswith("_"):
            assert quick is args[0]


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.native_batch_norm.default, (X, W, W, W, W, False, 0.1, 1e-5)),
        (aten.native_layer_norm.default, (X, [6], V, V, 1e-5)),
        (aten.addmm.default, (W, A, B)),
        (aten.addmm.default, (V, A, A)),
        (aten.add.Tensor, (X, V)),
        (aten.add_.Tensor, (W, X)),
    ],
)
def test_what_does_not_fit_fails_as_in_torch(func, args):
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError, ValueError)):
        meta_kernels.run(func, args, {})

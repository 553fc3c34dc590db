"""Real architectures: 30 % of the units of every group masked, planned, applied; the coupling and the costs agree."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dist_compress import speedup
from dist_compress.models.resnet_cifar import ResNetCifar
from dist_compress.speedup import apply, mask_units, verify

ZOO = torchvision.models


def vgg():
    model = ZOO.vgg11_bn()
    model.classifier[0], model.classifier[3] = nn.Linear(512 * 49, 64), nn.Linear(64, 32)  # quick; same structure
    model.classifier[6] = nn.Linear(32, 10)
    return model


def vision_transformer():
    return ZOO.VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=7)


def wide_resnet():
    return ZOO.resnet.ResNet(ZOO.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=128)


# name -> (builder, MACs left at most, groups that must be free at least)
MODELS = {
    "resnet20": (lambda: ResNetCifar(3), 0.75, 9),
    "resnet56": (lambda: ResNetCifar(9), 0.75, 27),
    "resnet18": (ZOO.resnet18, 0.55, 12),
    "resnet50": (ZOO.resnet50, 0.55, 37),
    "resnext50": (ZOO.resnext50_32x4d, 0.6, 37),
    "wide_resnet50_2": (wide_resnet, 0.55, 13),
    "vgg11_bn": (vgg, 0.55, 10),
    "mobilenet_v2": (ZOO.mobilenet_v2, 0.6, 25),
    "mobilenet_v3_small": (ZOO.mobilenet_v3_small, 0.6, 27),
    "densenet121": (ZOO.densenet121, 0.55, 120),
    "squeezenet1_0": (ZOO.squeezenet1_0, 0.6, 25),
    "googlenet": (lambda: ZOO.googlenet(init_weights=False, aux_logits=False), 0.55, 57),
    "efficientnet_b0": (ZOO.efficientnet_b0, 0.6, 40),
    "regnet_y_400mf": (ZOO.regnet_y_400mf, 0.6, 53),
    "regnet_x_400mf": (ZOO.regnet_x_400mf, 0.6, 49),
    "vit": (vision_transformer, 0.95, 2),
}


def macs(model, x):
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused kernels
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x)
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2 // x.shape[0]


def predicted(coupling, kept):
    """MACs by the costs of the coupling, with `kept[group]` units."""
    total = 0.0
    for layer in coupling.layers:
        left = float(layer.macs)
        for fixed, parts in layer.factors:
            whole = fixed + sum(float(weights.sum()) for _, weights in parts)
            left *= (fixed + sum(float(weights[kept[i]].sum()) for i, weights in parts)) / whole
        total += left
    return total


def mask_some(model, coupling):
    """Masks 30 % of the units of each free group; {group index: bool [num_units], True = kept}."""
    generator = torch.Generator().manual_seed(5)
    kept = {}
    for i, group in enumerate(coupling.groups):
        kept[i] = torch.ones(group.num_units, dtype=torch.bool)
        if not group.blocked and group.num_units > 1:
            units = torch.randperm(group.num_units, generator=generator)[: max(1, int(0.3 * group.num_units))]
            mask_units(model, group, units)
            kept[i][units] = False
    return kept


@pytest.mark.parametrize("name", MODELS)
def test_masked_units_vanish_exactly(name, randomise):
    build, most_macs, num_free = MODELS[name]
    torch.manual_seed(0)
    model = randomise(build())
    if name == "vit":
        nn.init.normal_(model.heads.head.weight)
    x = torch.randn(1, 3, 64, 64)
    state = copy.deepcopy(model.state_dict())
    coupling = speedup.coupling(model, (x,))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert sum(not g.blocked for g in coupling.groups) >= num_free
    assert sum(layer.macs for layer in coupling.layers) == macs(model, x)

    kept = mask_some(model, coupling)
    plan = speedup.plan(model, (x,))
    for i, group in enumerate(coupling.groups):
        for member in group.members:
            indices = plan.keep.get(member.fqn, {}).get(member.dim)
            left = torch.isin(member.index, indices) if indices is not None else torch.ones_like(member.index).bool()
            assert torch.equal(left, kept[i][:, None].expand_as(left)), (group.name, member.fqn, member.dim)

    small = apply(copy.deepcopy(model), plan)
    assert macs(small, x) == round(predicted(coupling, kept)) <= most_macs * macs(model, x)
    for batch in (1, 3):
        new = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            assert verify(model(new), small(new)) <= 1e-5


def test_heads_of_training_mode_still_fit(randomise):
    torch.manual_seed(0)
    model = randomise(ZOO.googlenet(init_weights=False, aux_logits=True))
    x = torch.randn(1, 3, 64, 64)
    state = copy.deepcopy(model.state_dict())
    coupling = speedup.coupling(model, (x,))
    mask_some(model, coupling)
    small = apply(copy.deepcopy(model), speedup.plan(model, (x,)))
    reasons = {g.blocked for g in coupling.groups}
    assert {"is read by aux1 in training mode", "is read by aux2 in training mode"} <= reasons
    outputs = small.train()(torch.randn(4, 3, 64, 64))
    assert outputs.aux_logits1.shape == outputs.logits.shape == (4, 1000)
    assert torch.equal(model.state_dict()["conv1.bn.running_mean"], state["conv1.bn.running_mean"])


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_leaks_of_norms_are_exact(name, randomise):
    """Only weights masked: what the norms add stays in the function, as a bias or as a kept channel."""
    torch.manual_seed(0)
    model = randomise(getattr(ZOO, name)())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[torch.randperm(module.out_channels)[: module.out_channels // 2]] = 0
    x = torch.randn(1, 3, 64, 64)
    plan = speedup.plan(model, (x,))
    small = apply(copy.deepcopy(model), plan)
    with torch.no_grad():
        new = torch.randn(2, 3, 64, 64)
        assert verify(model(new), small(new)) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) < 0.95 * sum(p.numel() for p in model.parameters())
    assert plan.bias or name == "resnet18"


def test_a_plan_one_index_off_is_caught(randomise):
    torch.manual_seed(0)
    model = randomise(ResNetCifar(1))
    x = torch.randn(1, 3, 32, 32)
    coupling = speedup.coupling(model, (x,))
    mask_some(model, coupling)
    plan = speedup.plan(model, (x,))
    index = plan.keep["layer2.0.conv1.weight"][0]
    missing = next(i for i in range(32) if i not in index.tolist())
    wrong = torch.cat([index[:-1], torch.tensor([missing])])
    plan.keep["layer2.0.conv1.weight"] = plan.keep["layer2.0.conv1.weight"] | {0: wrong}
    small = apply(copy.deepcopy(model), plan)
    with torch.no_grad():
        assert verify(model(x), small(x)) > 1e-3

"""torchvision: a variant of every builder family on small inputs; the float form of the quantizable ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.ops import FrozenBatchNorm2d

from zoo_models.case import Case, Inputs

# family: variants, and the side of their images where 64 does not do
_CLASSIFIERS = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0 efficientnet_b1",
    "efficientnet_v2": "efficientnet_v2_s",
    "googlenet": "googlenet",
    "inception": "inception_v3:96",
    "mnasnet": "mnasnet0_5 mnasnet1_0",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3": "mobilenet_v3_small mobilenet_v3_large",
    "regnet_x": "regnet_x_400mf",
    "regnet_y": "regnet_y_400mf",
    "resnet": "resnet18 resnet34 resnet50",
    "resnext": "resnext50_32x4d",
    "wide_resnet": "wide_resnet50_2",
    "shufflenet_v2": "shufflenet_v2_x0_5 shufflenet_v2_x1_0",
    "squeezenet": "squeezenet1_0 squeezenet1_1",
    "swin": "swin_t",
    "swin_v2": "swin_v2_t",
    "vgg": "vgg11",
    "vgg_bn": "vgg11_bn",
}
_QUANTIZABLE = "googlenet inception_v3:96 mobilenet_v2 mobilenet_v3_large resnet18 resnet50 shufflenet_v2_x0_5"
_SEGMENTATION = "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large"
_DETECTION = (
    "fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn "
    "fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn "
    "maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssd300_vgg16 "
    "ssdlite320_mobilenet_v3_large"
)
_VIDEO = "mc3_18 r2plus1d_18 r3d_18 swin3d_t"
_MVIT = {"mvit_v1": False, "mvit_v2": True}  # of the second version


def cases() -> list[Case]:
    found = []
    for family, names in _CLASSIFIERS.items():
        found += [_case(name, family, _image, num_classes=10) for name in names.split()]
    for name in ("vit_b_16", "vit_b_32"):
        found.append(_case(name, "vision_transformer", _image, num_classes=10, image_size=64))
    maxvit = partial(
        models.MaxVit, (64, 64), 32, 4, [32, 64], [1, 1], 16, 0.0, num_classes=10
    )  # the builder fixes the windows of 224 pixels
    found.append(Case("maxvit (2 blocks)", "maxvit", maxvit, _image(64)))
    for name in _QUANTIZABLE.split():
        found.append(_case(name, f"quantizable {name.partition(':')[0]}", _image, "quantizable ", num_classes=10))
    found += [_case(name, name, _image, num_classes=5, weights_backbone=None) for name in _SEGMENTATION.split()]
    found += [_detector(name) for name in _DETECTION.split()]
    found += [_case(name, name, _clip, num_classes=10) for name in _VIDEO.split()]
    found.append(_case("s3d:224", "s3d", partial(_clip, frames=14), num_classes=10))
    for name in _MVIT:
        found.append(Case(f"{name} (3 blocks)", name, partial(_mvit, _MVIT[name]), _clip(64)))
    found += [Case(name, name, partial(models.get_model, name), _pair(128)) for name in ("raft_small", "raft_large")]
    return found


def _case(entry: str, family: str, inputs: Callable[[int], Inputs], prefix: str = "", **settings: Any) -> Case:
    name, _, size = entry.partition(":")
    builder = getattr(models.quantization, name) if prefix else partial(models.get_model, name)
    return Case(prefix + name, family, partial(_built, builder, **settings), inputs(int(size or 64)))


def _built(builder: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    return builder(weights=None, **settings)


def _detector(name: str) -> Case:
    settings: dict[str, Any] = {"num_classes": 5, "weights_backbone": None}
    if "rcnn" in name:
        settings |= {"min_size": 96, "max_size": 96, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20}
        settings |= {"rpn_pre_nms_top_n_test": 50, "box_detections_per_img": 5}
    elif "ssd" not in name:
        settings |= {"min_size": 96, "max_size": 96}
    if "rcnn" not in name:
        settings |= {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20}
    return Case(name, name, partial(_small_values, name, settings), _images(96))


def _small_values(name: str, settings: dict[str, Any]) -> nn.Module:
    """A detector whose values do not grow with each block: boxes beyond the image would show nothing."""
    model = models.get_model(name, weights=None, **settings)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.2, 0.6)
    return model


def _mvit(second: bool) -> nn.Module:
    """Blocks as in the builders, but fewer; they fix 16 frames of 224 pixels."""
    blocks = [
        MSBlockConfig(1, 48, 96, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        MSBlockConfig(2, 96, 192, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
        MSBlockConfig(4, 192, 192, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
    ]
    sizes = {"spatial_size": (64, 64), "temporal_size": 4, "stochastic_depth_prob": 0.0, "num_classes": 10}
    parts = {"residual_pool": second, "residual_with_cls_embed": not second}
    parts |= {"rel_pos_embed": second, "proj_after_attn": second}
    return MViT(block_setting=blocks, **sizes, **parts)


def _image(size: int) -> Inputs:
    return lambda batch: ((torch.randn(batch, 3, size, size),), {})


def _images(size: int) -> Inputs:
    return lambda batch: (([torch.rand(3, size, size) for _ in range(batch)],), {})


def _clip(size: int, frames: int = 4) -> Inputs:
    return lambda batch: ((torch.randn(batch, 3, frames, size, size),), {})


def _pair(size: int) -> Inputs:
    return lambda batch: ((torch.rand(batch, 3, size, size), torch.rand(batch, 3, size, size)), {"num_flow_updates": 1})

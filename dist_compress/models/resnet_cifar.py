"""ResNets for 32x32 images: He et al. 2015, "Deep Residual Learning", section 4.2.

Three stages of n blocks with 16, 32 and 64 channels; 6n + 2 layers. Shortcuts are the paper's option A: where
a stage halves the image, the identity is subsampled and padded with zero channels: no parameters.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions and an identity: [B, in_channels, H, W] -> [B, channels, H/stride, W/stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        # Plain integers, never read off a weight: they must hold when the inner channels shrink.
        self.pad_front = (channels - in_channels) // 2
        self.pad_back = channels - in_channels - self.pad_front

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 1 and self.pad_front == self.pad_back == 0:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.pad_front, self.pad_back))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNetCifar(nn.Module):
    """[B, in_channels, H, W] -> logits [B, num_classes]; made for 32x32, works at any size from 4x4."""

    def __init__(self, num_blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, num_blocks, stride=1)
        self.layer2 = self._stage(16, 32, num_blocks, stride=2)
        self.layer3 = self._stage(32, 64, num_blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
        blocks = [Block(in_channels, channels, stride)]
        blocks += [Block(channels, channels, 1) for _ in range(num_blocks - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        return self.linear(out)


def resnet20(num_classes: int = 10, **kwargs: int) -> ResNetCifar:
    """270 thousand parameters, 40.6 million MACs a 32x32 image."""
    return ResNetCifar(3, num_classes, **kwargs)


def resnet56(num_classes: int = 10, **kwargs: int) -> ResNetCifar:
    """850 thousand parameters, 125.5 million MACs a 32x32 image."""
    return ResNetCifar(9, num_classes, **kwargs)

"""Small networks with residual or plain stacks of full convolutions, wired as the published ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VGG(nn.Module):
    """VGG-BN: 3x3 convolutions with bias, batch norm, ReLU in place; a hidden linear layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs, pool in [(8, False), (16, True), (24, False), (24, True)]:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if pool else []
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(96, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def projection(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """The shortcut of a block that changes its size: 1x1 convolution and batch norm."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    """Basic block of ResNet v1: one ReLU in place serves both sites, the sum is in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class SqueezeExcite(nn.Module):
    """The gate of SENet: linear layers on pooled channels, viewed back to a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 4), nn.ReLU(inplace=True), nn.Linear(channels // 4, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        gate = self.fc(F.adaptive_avg_pool2d(x, 1).view(batch, channels)).view(batch, channels, 1, 1)
        return x * gate.expand_as(x)


class Bottleneck(nn.Module):
    """Bottleneck of ResNet v1; with ``groups`` that of ResNeXt, with ``gated`` that of SENet."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1, gated: bool = False) -> None:
        super().__init__()
        width = outputs // 2
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.gate = SqueezeExcite(outputs) if gated else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.gate(self.bn3(self.conv3(out)))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet v1 of any of the blocks above: two stages of two blocks."""

    def __init__(self, block: type[nn.Module], **options: object) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(block(8, 16, 1, **options), block(16, 16, 1, **options))
        self.layer2 = nn.Sequential(block(16, 32, 2, **options), block(32, 32, 1, **options))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class PreActivation(nn.Module):
    """Block of ResNet v2: batch norm and ReLU before each convolution; a projection reads the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


class ResNetV2(nn.Module):
    """ResNet v2: a bare convolution first, batch norm and ReLU last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        blocks = [(8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1)]
        self.blocks = nn.Sequential(*[PreActivation(*block) for block in blocks])
        self.norm = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.fc(F.avg_pool2d(x, 8).view(x.shape[0], -1))


class DenseLayer(nn.Module):
    """Bottleneck layer of DenseNet: reads everything made so far in its block."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleList):
    """Layers that each see the concatenation of all outputs before."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """DenseNet-BC: two blocks of three layers, a transition that halves channels and size by an average pool."""

    def __init__(self, growth: int = 6) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(12)
        self.block1 = DenseBlock(DenseLayer(12 + i * growth, growth) for i in range(3))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(30), nn.ReLU(inplace=True), nn.Conv2d(30, 15, 1, bias=False), nn.AvgPool2d(2, 2)
        )
        self.block2 = DenseBlock(DenseLayer(15 + i * growth, growth) for i in range(3))
        self.norm5 = nn.BatchNorm2d(33)
        self.classifier = nn.Linear(33, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm0(self.conv0(x)), inplace=True), 2)
        x = self.norm5(self.block2(self.transition(self.block1(x))))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(F.relu(x, inplace=True), (1, 1)), 1))

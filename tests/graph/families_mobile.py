"""Small networks of depthwise or grouped convolutions and gates, wired as the published ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module]


def conv_norm(
    inputs: int, outputs: int, kernel: int, activation: Activation | None, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution without bias, batch norm and, unless it is a projection, an activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([] if activation is None else [activation()]))


class Gate(nn.Module):
    """Squeeze and excitation by 1x1 convolutions on the pooled map."""

    def __init__(self, channels: int, squeezed: int, activation: Activation, gate: Activation) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = activation()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class StochasticDepth(nn.Module):
    """Drops a branch for single samples, and scales it where it is kept."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.empty([x.shape[0]] + [1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * kept.bernoulli_(1 - self.p).div_(1 - self.p)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, optional gate, linear projection; a sum where the size stays."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        activation: Activation,
        gate: Callable[[int], nn.Module] | None = None,
        drop: float = 0.0,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        width = 3 * inputs
        layers = [conv_norm(inputs, width, 1, activation)]
        layers += [conv_norm(width, width, kernel, activation, stride, groups=width)]
        layers += [] if gate is None else [gate(width)]
        self.block = nn.Sequential(*layers, conv_norm(width, outputs, 1, None))
        self.drop = StochasticDepth(drop) if drop else nn.Identity()
        self.use_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.block(x)) if self.use_shortcut else self.block(x)


class MobileNetV2(nn.Module):
    """MobileNet v2: ReLU6, linear bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(8, 8, 1), (8, 12, 2), (12, 12, 1)]
        self.features = nn.Sequential(
            conv_norm(3, 8, 3, nn.ReLU6, stride=2),
            *[InvertedResidual(*size, nn.ReLU6) for size in sizes],
            conv_norm(12, 32, 1, nn.ReLU6),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class MobileNetV3(nn.Module):
    """MobileNet v3: ReLU blocks first, Hardswish blocks later, gates by Hardsigmoid."""

    def __init__(self) -> None:
        super().__init__()

        def gate(channels: int) -> nn.Module:
            return Gate(channels, 8, nn.ReLU, nn.Hardsigmoid)

        self.features = nn.Sequential(
            conv_norm(3, 8, 3, nn.Hardswish, stride=2),
            InvertedResidual(8, 8, 1, nn.ReLU, gate),
            InvertedResidual(8, 12, 2, nn.ReLU),
            InvertedResidual(12, 12, 1, nn.Hardswish, gate, kernel=5),
            conv_norm(12, 32, 1, nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(32, 32), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class EfficientNet(nn.Module):
    """EfficientNet: SiLU everywhere, a gate in each block, stochastic depth on each sum."""

    def __init__(self) -> None:
        super().__init__()

        def gate(channels: int) -> nn.Module:
            return Gate(channels, 4, nn.SiLU, nn.Sigmoid)

        sizes = [(8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 12, 1)]
        self.features = nn.Sequential(
            conv_norm(3, 8, 3, nn.SiLU, stride=2),
            *[InvertedResidual(*size, nn.SiLU, gate, drop=0.1 * i) for i, size in enumerate(sizes)],
            conv_norm(12, 32, 1, nn.SiLU),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class RegNetBlock(nn.Module):
    """Block of RegNet-Y: grouped 3x3 convolution with the gate behind it, projection shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int = 4) -> None:
        super().__init__()
        self.proj = None
        if stride != 1 or inputs != outputs:
            self.proj = conv_norm(inputs, outputs, 1, None, stride)
        self.f = nn.Sequential(
            conv_norm(inputs, outputs, 1, nn.ReLU),
            conv_norm(outputs, outputs, 3, nn.ReLU, stride, groups=outputs // group_width),
            Gate(outputs, inputs // 4, nn.ReLU, nn.Sigmoid),
            conv_norm(outputs, outputs, 1, None),
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return self.activation(shortcut + self.f(x))


class RegNet(nn.Module):
    """RegNet-Y: a stem and two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8, 3, nn.ReLU, stride=2)
        self.trunk = nn.Sequential(RegNetBlock(8, 16, 1), RegNetBlock(16, 16, 1), RegNetBlock(16, 32, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.trunk(self.stem(x))).flatten(start_dim=1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of the groups."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleBlock(nn.Module):
    """Block of ShuffleNet v2: half of the channels pass by, or both halves are made anew at a stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.branch1 = None
        if stride > 1:
            self.branch1 = nn.Sequential(
                *conv_norm(inputs, inputs, 3, None, stride, groups=inputs), *conv_norm(inputs, half, 1, nn.ReLU)
            )
        self.branch2 = nn.Sequential(
            *conv_norm(inputs if stride > 1 else half, half, 1, nn.ReLU),
            *conv_norm(half, half, 3, None, stride, groups=half),
            *conv_norm(half, half, 1, nn.ReLU),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.branch1 is None:
            passed, x = x.chunk(2, dim=1)
        else:
            passed = self.branch1(x)
        return channel_shuffle(torch.cat((passed, self.branch2(x)), dim=1), 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNet v2: one stage, global mean by ``mean``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_norm(3, 8, 3, nn.ReLU)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage2 = nn.Sequential(ShuffleBlock(8, 24, 2), ShuffleBlock(24, 24, 1), ShuffleBlock(24, 24, 1))
        self.conv5 = conv_norm(24, 32, 1, nn.ReLU)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv5(self.stage2(self.maxpool(self.conv1(x)))).mean([2, 3]))

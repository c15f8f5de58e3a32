"""Small networks whose maps branch and join at several sizes, wired as the published ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicConv(nn.Module):
    """Convolution, batch norm and a functional ReLU, as in Inception."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if isinstance(kernel, int) else tuple(side // 2 for side in kernel)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    """Four branches of different reach, one of them an average pool, concatenated."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv(inputs, 8, 1)
        self.branch7x7 = nn.Sequential(BasicConv(inputs, 6, 1), BasicConv(6, 6, (1, 7)), BasicConv(6, 8, (7, 1)))
        self.branch3x3 = nn.Sequential(BasicConv(inputs, 6, 1), BasicConv(6, 8, 3), BasicConv(8, 8, 3))
        self.branch_pool = BasicConv(inputs, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branches = [self.branch1x1(x), self.branch7x7(x), self.branch3x3(x), self.branch_pool(pooled)]
        return torch.cat(branches, 1)


class InceptionReduction(nn.Module):
    """A convolution and a max pool at stride two, side by side."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = nn.Sequential(BasicConv(inputs, 8, 1), BasicConv(8, 16, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3x3(x), F.max_pool2d(x, kernel_size=3, stride=2, padding=1)], 1)


class Inception(nn.Module):
    """Inception: a block, a reduction, a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv(3, 16, 3, stride=2)
        self.mixed1 = InceptionBlock(16)
        self.reduction = InceptionReduction(32)
        self.mixed2 = InceptionBlock(48)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed2(self.reduction(self.mixed1(self.stem(x))))
        return self.fc(torch.flatten(self.dropout(self.avgpool(x)), 1))


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Twice convolution, batch norm, ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet2d(nn.Module):
    """U-Net: bilinear upsampling, once as a module and once to the size of the skip; skips are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = double_conv(3, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), double_conv(8, 16))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), double_conv(16, 24))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv1 = double_conv(40, 16)
        self.conv2 = double_conv(24, 8)
        self.outc = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inc(x)
        second = self.down1(first)
        x = self.conv1(torch.cat([second, self.up(self.down2(second))], dim=1))
        x = F.interpolate(x, size=first.shape[2:], mode="bilinear", align_corners=False)
        return self.outc(self.conv2(torch.cat([first, x], dim=1)))


def conv3d(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution in three dimensions, batch norm, leaky ReLU."""
    conv = nn.Conv3d(inputs, outputs, 3, stride, 1)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs), nn.LeakyReLU(0.01, inplace=True))


class UNet3d(nn.Module):
    """U-Net of volumes: strided convolutions down, transposed convolutions up, PReLU in the bottom."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = nn.Sequential(conv3d(1, 8), conv3d(8, 8))
        self.down = nn.Sequential(conv3d(8, 16, stride=2), conv3d(16, 16))
        self.bottom = nn.Sequential(nn.Conv3d(16, 16, 3, 2, 1), nn.BatchNorm3d(16), nn.PReLU())
        self.up1 = nn.ConvTranspose3d(16, 16, 2, 2)
        self.conv1 = conv3d(32, 16)
        self.up2 = nn.Sequential(nn.ConvTranspose3d(16, 8, 3, 2, 1, output_padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.conv2 = conv3d(16, 8)
        self.outc = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inc(x)
        second = self.down(first)
        x = self.conv1(torch.cat((self.up1(self.bottom(second)), second), dim=1))
        return self.outc(self.conv2(torch.cat((self.up2(x), first), dim=1)))


def transposed(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    """Transposed convolution without bias, batch norm, ReLU."""
    conv = nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(True)]


class DCGAN(nn.Module):
    """Generator of DCGAN: from a latent map of size one to an image, tanh last."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *transposed(32, 32, 4, 1, 0),
            *transposed(32, 16, 4, 2, 1),
            *transposed(16, 8, 4, 2, 1),
            nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class LinearGAN(nn.Module):
    """The same behind a linear layer, normalised as features and viewed as a map."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(32, 24 * 16, bias=False), nn.BatchNorm1d(24 * 16), nn.ReLU())
        self.main = nn.Sequential(
            *transposed(24, 16, 5, 2, 2), *transposed(16, 8, 4, 2, 1), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(self.project(x).view(-1, 24, 4, 4))


class ConvSiLU(nn.Module):
    """Convolution, batch norm with the settings usual in detectors, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class CrossStage(nn.Module):
    """Cross stage partial block: halves by split, a residual bottleneck on one, everything concatenated."""

    def __init__(self, inputs: int, outputs: int, shortcut: bool) -> None:
        super().__init__()
        self.half = outputs // 2
        self.shortcut = shortcut
        self.cv1 = ConvSiLU(inputs, outputs)
        self.m = nn.Sequential(ConvSiLU(self.half, self.half, 3), ConvSiLU(self.half, self.half, 3))
        self.cv2 = ConvSiLU(3 * self.half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).split((self.half, self.half), 1))
        made = self.m(parts[-1])
        parts.append(parts[-1] + made if self.shortcut else made)
        return self.cv2(torch.cat(parts, 1))


class PoolPyramid(nn.Module):
    """SPPF: one max pool chained three times, all four concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvSiLU(channels, channels // 2)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)
        self.cv2 = ConvSiLU(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        parts.extend(self.m(parts[-1]) for _ in range(3))
        return self.cv2(torch.cat(parts, 1))


class Detector(nn.Module):
    """YOLO-like: cross stage backbone, pool pyramid, a path up by nearest upsampling, a path down; two maps out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvSiLU(3, 8, 3, 2)
        self.stage1 = CrossStage(8, 16, shortcut=True)
        self.down1 = ConvSiLU(16, 32, 3, 2)
        self.stage2 = nn.Sequential(CrossStage(32, 32, shortcut=True), PoolPyramid(32))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.neck1 = CrossStage(48, 16, shortcut=False)
        self.down2 = ConvSiLU(16, 16, 3, 2)
        self.neck2 = CrossStage(48, 32, shortcut=False)
        self.detect = nn.ModuleList([nn.Conv2d(16, 12, 1), nn.Conv2d(32, 12, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        small = self.stage1(self.stem(x))
        large = self.stage2(self.down1(small))
        up = self.neck1(torch.cat([self.up(large), small], 1))
        down = self.neck2(torch.cat([self.down2(up), large], 1))
        return self.detect[0](up), self.detect[1](down)

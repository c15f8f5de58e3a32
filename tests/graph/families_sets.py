"""Small networks on features, sequences, points and tokens, wired as the published ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> nn.Sequential:
    """Linear layers, each with batch norm over features."""
    return nn.Sequential(
        nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.GELU(),
        nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ELU(inplace=True), nn.Linear(32, 10),
    )  # fmt: skip


class Conv1dNet(nn.Module):
    """A convolutional network of sequences: dilation, strides, pools, global maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(4, 16, 7, stride=2, padding=3), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(3, 2, 1),
            nn.Conv1d(16, 24, 3, padding="same", dilation=2), nn.BatchNorm1d(24), nn.Tanh(), nn.AvgPool1d(2),
            nn.Conv1d(24, 32, 3, groups=4), nn.BatchNorm1d(32), nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.amax(self.features(x), dim=-1))


class Transform(nn.Module):
    """T-Net of PointNet: a k x k matrix learned from all points, added to the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv1, self.conv2 = nn.Conv1d(size, 16, 1), nn.Conv1d(16, 32, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(32)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, size * size)
        self.bn3 = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 32)
        x = self.fc2(F.relu(self.bn3(self.fc1(x))))
        identity = torch.eye(self.size, dtype=x.dtype, device=x.device).view(1, -1)
        return (x + identity).view(-1, self.size, self.size)


class PointNet(nn.Module):
    """PointNet: transforms of the points and of their features, a shared MLP, maximum over points."""

    def __init__(self) -> None:
        super().__init__()
        self.input_transform = Transform(3)
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16)
        self.feature_transform = Transform(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 24, 1), nn.BatchNorm1d(24)
        self.conv3, self.bn3 = nn.Conv1d(24, 32, 1), nn.BatchNorm1d(32)
        self.fc1, self.bn4 = nn.Linear(32, 24), nn.BatchNorm1d(24)
        self.dropout = nn.Dropout(p=0.3)
        self.fc2 = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.bmm(x.transpose(2, 1), self.input_transform(x)).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.bmm(x.transpose(2, 1), self.feature_transform(x)).transpose(2, 1)
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 32)
        x = F.relu(self.bn4(self.dropout(self.fc1(x))))
        return F.log_softmax(self.fc2(x), dim=1)


class TokenLinear(nn.Sequential):
    """Linear layer on tokens with batch norm over all tokens of all samples."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.add_module("c", nn.Linear(inputs, outputs, bias=False))
        self.add_module("bn", nn.BatchNorm1d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Attention(nn.Module):
    """Attention of LeViT: normalised queries, keys and values, a learned bias per offset, Hardswish before the end."""

    def __init__(self, width: int, heads: int, key: int, side: int) -> None:
        super().__init__()
        self.heads, self.key, self.value = heads, key, 2 * key
        self.scale = key**-0.5
        self.qkv = TokenLinear(width, heads * (2 * key + self.value))
        self.proj = nn.Sequential(nn.Hardswish(), TokenLinear(heads * self.value, width))
        points = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        offsets = (points[:, None] - points[None]).abs()
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        self.register_buffer("indices", offsets[..., 0] * side + offsets[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, self.heads, -1).split([self.key, self.key, self.value], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        weights = (q @ k.transpose(-2, -1)) * self.scale + self.attention_biases[:, self.indices]
        x = (weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, self.heads * self.value)
        return self.proj(x)


class Residual(nn.Module):
    """The input plus a branch."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.m = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class LeViT(nn.Module):
    """LeViT-like: a convolutional stem, then attention and MLP on tokens with batch norm instead of layer norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
            nn.Conv2d(16, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        blocks: list[nn.Module] = []
        for _ in range(2):
            expand, reduce = TokenLinear(width, 2 * width), TokenLinear(2 * width, width)
            blocks += [Residual(Attention(width, heads=2, key=8, side=8))]
            blocks += [Residual(nn.Sequential(expand, nn.Hardswish(), reduce))]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.rules.monte_carlo import CAPTURES, check

HOW = pytest.mark.parametrize("how", CAPTURES)


def shuffle(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def overwrite(x):
    y = torch.zeros_like(x)
    y[:, 1:3] = x[:, :2]
    return y


MOVES = {
    "flatten": lambda x: x.flatten(1),
    "Flatten": nn.Flatten(2),
    "view": lambda x: x.view(x.shape[0], 2, 2, 16),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.mT,
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "squeeze": lambda x: x.unsqueeze(2).squeeze(2),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 3, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "cat": lambda x: torch.cat([x, 2 * x, x.relu()], 1),
    "cat with a constant": lambda x: torch.cat([x, torch.ones_like(x)], 1),
    "split": lambda x: x.split([1, 3], 1)[1],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "stack": lambda x: torch.stack([x, -x], 2),
    "unbind": lambda x: x.unbind(1)[2],
    "select": lambda x: x[:, 2],
    "slice": lambda x: x[..., ::2, 1:],
    "index": lambda x: x[:, [3, 0]],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "shuffle": shuffle,
    "ChannelShuffle": nn.ChannelShuffle(2),
    "PixelShuffle": nn.PixelShuffle(2),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "pad": lambda x: F.pad(x, (1, 1, 2, 0)),
    "pad by 2": lambda x: F.pad(x, (1, 1), value=2.0),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replicate": nn.ReplicationPad2d(1),
    "circular": nn.CircularPad2d(1),
    "ZeroPad2d": nn.ZeroPad2d((1, 0, 0, 1)),
    "tril": lambda x: x.tril(),
    "mask": lambda x: x.masked_fill(torch.eye(4, dtype=torch.bool), 3.0),
    "where": lambda x: torch.where(torch.eye(4, dtype=torch.bool), x, -x),
    "unfold": lambda x: F.unfold(x, 2, padding=1),
    "windows": lambda x: x.unfold(2, 2, 2),
    "relu, moved, then relu": lambda x: F.relu(x.relu().permute(0, 2, 3, 1) - 0.5),
    "reshape_as": lambda x: x.flatten(2).reshape_as(x).relu().view_as(x),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "dtype": lambda x: x.float().double(),
}


@HOW
def test_moves(how):
    cases = dict(MOVES)
    if how == "record":  # what circular padding is made of overwrites parts of a tensor
        cases.pop("circular")
    check(cases, (4, 4, 4), how=how, samples=4000, var=1e-5, mean=1e-5)


# Interpolation averages over positions, where variances differ; upsampled neighbours are not independent.
INTERPOLATIONS = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest-exact": lambda x: F.interpolate(x, size=(5, 9), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, size=(9, 7), mode="bilinear"),
    "corners": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "smaller": lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True),
    "area": lambda x: F.interpolate(x, size=(2, 2), mode="area"),
    "Upsample": nn.Upsample(scale_factor=3),
}


@HOW
def test_interpolation(how):
    check(INTERPOLATIONS, (4, 6, 6), how=how, samples=3000, var=0.05, mean=1e-5)


@HOW
def test_interpolation_of_lines_and_volumes(how):
    check({"linear": lambda x: F.interpolate(x, size=11, mode="linear")}, (4, 6), how=how, var=0.1, mean=1e-5)
    check(
        {
            "trilinear": lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
            "nearest": nn.Upsample(size=(4, 6, 5)),
        },
        (2, 3, 3, 3),
        how=how,
        samples=2000,
        var=0.05,
        mean=1e-5,
    )

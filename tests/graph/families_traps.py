"""Networks that a conversion by module type or by module name gets wrong; one trap each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_net(*layers: nn.Module, channels: int = 16, padding_mode: str = "zeros") -> nn.Sequential:
    """A convolution, the given layers, a second convolution with batch norm, a head."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, padding_mode=padding_mode),
        *layers,
        nn.Conv2d(channels, channels, 3, padding=1, padding_mode=padding_mode),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


class MyNorm(nn.BatchNorm2d):
    """A subclass with another name and another constructor."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.2)


class FusedNorm(nn.BatchNorm2d):
    """Batch norm with dropout and activation inside and a forward of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.SiLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        x = F.batch_norm(input, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


class FrozenNorm(nn.Module):
    """Batch norm of detectors: statistics, gain and bias are buffers, training changes nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + self.eps).rsqrt()
        return x * gain + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * gain)


class KeptInEval(nn.BatchNorm2d):
    """Batch norm that stays in evaluation mode while the rest trains, as in fine-tuning."""

    def train(self, mode: bool = True) -> "KeptInEval":
        del mode
        return super().train(False)


class FunctionalNorm(nn.Module):
    """A network that calls the function on buffers and parameters of its own; no batch norm module at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(16, 10, 3, padding=1)
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.register_buffer("running_mean", torch.zeros(16))
        self.register_buffer("running_var", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        statistics = (self.running_mean, self.running_var)
        x = F.batch_norm(self.conv1(x), *statistics, self.weight, self.bias, self.training, 0.1, 1e-5)
        return self.conv2(torch.relu_(x)).mean((2, 3))


class SharedNorm(nn.Module):
    """One batch norm called at three sites, whose inputs differ."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)])
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(self.norm(conv(x)))
        return self.fc(self.norm(x).amax((2, 3)))


class SharedConv(nn.Module):
    """One convolution called twice, each time with a batch norm of its own behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv(self.stem(x))))
        x = F.relu(self.norm2(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class ConvReadTwice(nn.Module):
    """A convolution read by a batch norm and, unnormalised, by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x + F.relu(self.norm1(x))
        return self.fc(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


class InPlaceReaders(nn.Module):
    """Tensors around batch norms that are changed in place, by a factor, an activation and a clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x).mul_(2.0))
        F.relu_(x)
        x = self.norm2(self.conv2(x)).clamp_(min=0)
        return self.fc(x.mean((2, 3)))


def norm_subclass() -> nn.Module:
    """A batch norm of another class."""
    return conv_net(MyNorm(16), nn.ReLU())


def fused_norm() -> nn.Module:
    """A batch norm that holds dropout and activation."""
    return conv_net(FusedNorm(16))


def frozen_norm() -> nn.Module:
    """A frozen batch norm, and an ordinary one behind the next convolution."""
    return conv_net(FrozenNorm(16), nn.ReLU())


def kept_in_eval() -> nn.Module:
    """A batch norm that normalises by running statistics in training."""
    return conv_net(KeptInEval(16), nn.ReLU())


def no_affine() -> nn.Module:
    """No gain and no bias."""
    return conv_net(nn.BatchNorm2d(16, affine=False), nn.ReLU())


def no_running_stats() -> nn.Module:
    """Batch statistics in evaluation too."""
    return conv_net(nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU())


def cumulative_average() -> nn.Module:
    """Running statistics that are plain averages over all batches."""
    return conv_net(nn.BatchNorm2d(16, momentum=None), nn.ReLU())


def circular_padding() -> nn.Module:
    """Convolutions that wrap around."""
    return conv_net(nn.BatchNorm2d(16), nn.ReLU(), padding_mode="circular")


def reflect_padding() -> nn.Module:
    """Convolutions that mirror."""
    return conv_net(nn.BatchNorm2d(16), nn.ReLU(), padding_mode="reflect")


def replicate_padding() -> nn.Module:
    """A padding layer of its own between batch norm and convolution."""
    return conv_net(nn.BatchNorm2d(16), nn.ReLU(), nn.ReplicationPad2d(1))


def norm_before_conv() -> nn.Module:
    """Batch norm straight before a convolution that pads with zeros: its shift does not reach the border."""
    return conv_net(nn.ReLU(), nn.BatchNorm2d(16))


def norm_of_input() -> nn.Module:
    """Batch norm of the data, first of all, and again behind the first convolution."""
    return nn.Sequential(nn.BatchNorm2d(3), *conv_net(nn.BatchNorm2d(16), nn.ReLU()))


def norm_of_pool() -> nn.Module:
    """Batch norm behind max and average pools."""
    return conv_net(nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(3, 2, 1), nn.BatchNorm2d(16))


def norm_of_norm() -> nn.Module:
    """Two batch norms in a row."""
    return conv_net(nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.ReLU())

"""One row for each layer class and the shapes it is tested with."""

from dataclasses import dataclass, field
from typing import Any

import torch

from normprop import nn, recipes


@dataclass(frozen=True)
class Case:
    name: str
    layer: Any
    plain: Any
    arguments: tuple[Any, ...]
    sample: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, **settings: Any) -> Any:
        return self.layer(*self.arguments, **self.options, **settings)

    def build_plain(self, **settings: Any) -> torch.nn.Module:
        return self.plain(*self.arguments, **self.options, **settings)

    def input(self, batch: int, **settings: Any) -> torch.Tensor:
        return torch.randn(batch, *self.sample, **settings)


T = torch.nn
CASES = [
    Case("linear", nn.Linear, T.Linear, (6, 4), (6,)),
    Case("linear-deep-input", nn.Linear, T.Linear, (6, 4), (3, 6)),
    Case("conv1d", nn.Conv1d, T.Conv1d, (4, 6, 3), (4, 9), {"padding": 1, "groups": 2}),
    Case("conv2d", nn.Conv2d, T.Conv2d, (3, 4, (3, 2)), (3, 6, 5), {"stride": (2, 1), "dilation": (1, 2)}),
    Case(
        "conv2d-reflect",
        nn.Conv2d,
        T.Conv2d,
        (4, 4, 3),
        (4, 5, 5),
        {"padding": 1, "padding_mode": "reflect", "groups": 4},
    ),
    Case("conv2d-same", nn.Conv2d, T.Conv2d, (2, 4, 3), (2, 4, 4), {"padding": "same"}),
    Case("conv2d-1x1-map", nn.Conv2d, T.Conv2d, (5, 4, 1), (5, 1, 1)),
    Case("conv3d", nn.Conv3d, T.Conv3d, (2, 3, 2), (2, 3, 4, 3)),
    Case(
        "transposed1d",
        nn.ConvTranspose1d,
        T.ConvTranspose1d,
        (4, 6, 3),
        (4, 5),
        {"stride": 2, "groups": 2, "output_padding": 1},
    ),
    Case("transposed2d", nn.ConvTranspose2d, T.ConvTranspose2d, (3, 4, (3, 2)), (3, 4, 4), {"stride": (2, 1)}),
    Case(
        "transposed2d-grouped",
        nn.ConvTranspose2d,
        T.ConvTranspose2d,
        (6, 4, 3),
        (6, 3, 3),
        {"groups": 2, "dilation": 2},
    ),
    Case("transposed3d", nn.ConvTranspose3d, T.ConvTranspose3d, (2, 3, 2), (2, 2, 3, 2), {"stride": 2, "padding": 1}),
]
RECIPES = {"default": recipes.DEFAULT, "paper": recipes.PAPER}

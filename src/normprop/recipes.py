"""Named settings of the NormProp layers: pass one as keyword arguments, ``nn.Conv2d(3, 8, 3, **recipes.PAPER)``."""

from typing import Literal, TypedDict


class Recipe(TypedDict):
    """Settings shared by all NormProp layers (see :class:`normprop.nn.Linear`)."""

    center: bool
    moments: Literal["fixed", "live"]
    gain: float | Literal["jacobian"]
    orthogonal: bool


PAPER: Recipe = {"center": False, "moments": "fixed", "gain": "jacobian", "orthogonal": False}
"""Arpit et al. 2016 as printed: no centring, constants of N(0, 1), gain 1 / 1.21 for ReLU, filters of any angle."""

DEFAULT: Recipe = {"center": True, "moments": "live", "gain": 1.0, "orthogonal": True}
"""Ours, and the layers' own defaults: centred filters, moments that follow gain and bias, gain 1, right angles.

Give a network of them to :func:`normprop.nn.init_by_depth_`, which sets biases and branch gains by its depth.
"""

"""Sizes and likenesses that a random layer keeps, whether deep networks go there, and over how many layers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from normprop.diagnostics.mean_field_maps import (
    Layer,
    correlation,
    correlation_slope,
    second_moment,
    second_moment_slope,
)

Stability = Literal["stable", "unstable", "semi-stable", "neutral"]
Map = Callable[[float], float]


@dataclass(frozen=True)
class FixedPoint:
    """A value that a layer's map keeps.

    Args:
        value: where.
        slope: of the map there.
        stability: "stable": values nearby come closer; "unstable": they leave; "semi-stable": one or the other, by the
            side; "neutral": every value is kept, of which this is one.

    Example:
        >>> FixedPoint(1.0, 0.5, "stable").depth_scale == depth_scale(0.5)
        True
    """

    value: float
    slope: float
    stability: Stability

    @property
    def depth_scale(self) -> float:
        """Layers over which a small deviation shrinks to 1 / e; see :func:`depth_scale`."""
        return depth_scale(self.slope)


def depth_scale(slope: float) -> float:
    """Layers over which a small deviation shrinks to 1 / e: -1 / ln|slope|.

    Args:
        slope: of a map at its fixed point.

    Returns:
        The depth; negative where deviations grow, infinite at slope 1, 0 at slope 0.

    Source:
        Schoenholz et al. 2017, Deep Information Propagation.

    Example:
        >>> round(depth_scale(0.5), 4), depth_scale(1.0)
        (1.4427, inf)
    """
    if slope == 0:
        return 0.0
    return math.inf if abs(slope) == 1 else -1.0 / math.log(abs(slope))


def fixed_points(layer: Layer, low: float = 1e-4, high: float = 1e4) -> tuple[FixedPoint, ...]:
    """All sizes that a layer keeps.

    Args:
        layer: the layer.
        low: smallest second moment looked at, beside 0.
        high: largest.

    Returns:
        Fixed points of :func:`second_moment`, in rising order.

    Example:
        >>> from normprop.diagnostics.mean_field_maps import he, normprop
        >>> [(round(point.value, 7), point.stability) for point in fixed_points(normprop("relu", 1 / 1.21))]
        [(0.3671432, 'stable')]
        >>> fixed_points(he("relu"))[0].stability
        'neutral'
    """
    grid = torch.logspace(math.log10(low), math.log10(high), 60, dtype=torch.float64).tolist()
    grid = sorted({*(q for q in grid if abs(q - 1.0) > 1e-6), 1.0})  # 1 is what layers are made for
    found = _kept(lambda q: float(second_moment(layer, q)), lambda q: second_moment_slope(layer, q), grid)
    neutral = any(point.stability == "neutral" for point in found)
    if neutral or float(second_moment(layer, 0.0)) > 1e-15:
        return found
    slope = float(second_moment(layer, 1e-9)) / 1e-9  # of the chord: what a tiny size is multiplied by
    critical = abs(slope - 1) < 1e-6
    inward = float(second_moment(layer, low)) < low if critical else slope < 1
    return FixedPoint(0.0, 1.0 if critical else slope, "stable" if inward else "unstable"), *found


def correlation_fixed_points(layer: Layer, q: float = 1.0) -> tuple[FixedPoint, ...]:
    """All correlations that a layer keeps, for inputs of a size that it keeps.

    Args:
        layer: the layer.
        q: second moment of both inputs, one of :func:`fixed_points`, above 0.

    Returns:
        Fixed points of :func:`correlation`, in rising order; the last is 1.

    Example:
        >>> from normprop.diagnostics.mean_field_maps import normprop
        >>> [(abs(round(point.value, 6)), point.stability) for point in correlation_fixed_points(normprop("relu"))]
        [(0.0, 'stable'), (1.0, 'unstable')]
    """
    grid = [-1.0, -0.8, -0.6, -0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 0.99, 0.997, 1.0]
    return _kept(lambda c: correlation(layer, c, q), lambda c: correlation_slope(layer, c, q), grid)


def _kept(function: Map, slope: Map, grid: Sequence[float]) -> tuple[FixedPoint, ...]:
    """Fixed points of a smooth map between the ends of a grid: crossings, and places where it only touches."""

    def excess(x: float) -> float:
        """f(x) - x, 0 within rounding."""
        value = function(x) - x
        return 0.0 if abs(value) <= 1e-11 * max(abs(x), 1e-3) else value

    def side(x: float) -> float:
        """Sign of the excess, 0 outside of the grid."""
        inside = grid[0] <= x <= grid[-1]
        return math.copysign(1.0, value) if inside and (value := excess(x)) else 0.0

    values = [excess(x) for x in grid]
    if not any(values):
        middle = 1.0 if grid[0] <= 1.0 <= grid[-1] else grid[len(grid) // 2]
        return (FixedPoint(middle, 1.0, "neutral"),)
    roots = [x for x, value in zip(grid, values, strict=True) if value == 0]
    for index in range(len(grid) - 1):
        if values[index] * values[index + 1] < 0:
            roots.append(_root(lambda x: function(x) - x, grid[index], grid[index + 1]))
    sizes = [abs(value) / max(abs(x), 1e-3) for x, value in zip(grid, values, strict=True)]
    for index in range(1, len(grid) - 1):
        around = slice(index - 1, index + 2)
        one_side = min(values[around]) > 0 or max(values[around]) < 0
        if one_side and sizes[index] == min(sizes[around]):  # the map may touch: there its slope is 1
            low, high = grid[index - 1], grid[index + 1]
            if (slope(low) - 1) * (slope(high) - 1) < 0:
                touch = _root(lambda x: slope(x) - 1, low, high)
                roots += [touch] if excess(touch) == 0 else []
    points = []
    for root in sorted(roots):
        steepness = slope(root)
        kind: Stability = "stable" if abs(steepness) < 1 else "unstable"
        if abs(steepness - 1) < 1e-6:
            step = 1e-2 * max(abs(root), 1e-3)
            below, above = side(root - step), side(root + step)
            kind = "stable" if below >= 0 >= above else "unstable" if below <= 0 <= above else "semi-stable"
        points.append(FixedPoint(root, steepness, kind))
    return tuple(points)


def _root(function: Map, low: float, high: float) -> float:
    """Root between two points of opposite sign: false position, halving the weight of an end that stays (Illinois)."""
    at_low, at_high = function(low), function(high)
    root = low
    for _ in range(80):
        before, root = root, (low * at_high - high * at_low) / (at_high - at_low)
        value = function(root)
        if value == 0 or abs(root - before) <= 1e-14 * abs(root):
            break
        if (value > 0) == (at_high > 0):
            high, at_high, at_low = root, value, at_low / 2
        else:
            low, at_low, at_high = root, value, at_high / 2
    return root

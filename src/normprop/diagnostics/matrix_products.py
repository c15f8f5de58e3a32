"""Matrix products: what does a product of random matrices do to most directions?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.linear_calls import LinearCall, linear_calls
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.errors import ConfigError

_BINS = 24


@dataclass(frozen=True)
class ProductSpectrum:
    """Singular values of a product of matrices; see :func:`spectrum`.

    Args:
        factors: M, number of matrices.
        squared: squared singular values over their mean, falling.
        scale: that mean; for Gaussian entries of variance 1 / N it is 1 but for chance.
        condition: largest over smallest singular value, infinite for a singular product. Above about 1e15 it is
            rounding that is measured.
    """

    factors: int
    squared: tuple[float, ...]
    scale: float
    condition: float


def fuss_catalan(factors: int, order: int) -> int:
    r"""Moment of the squared singular values of a product of M Gaussian matrices: :math:`\binom{(M+1)n}{n} / (Mn + 1)`.

    Args:
        factors: M, number of N x N matrices with entries of variance 1 / N, N large.
        order: n.

    Returns:
        The n-th moment; for M = 1 the Catalan numbers.

    Raises:
        ConfigError: if there is no factor or the order is negative.

    Example:
        >>> [fuss_catalan(1, n) for n in range(5)], fuss_catalan(2, 2)
        ([1, 1, 2, 5, 14], 3)
    """
    _require(factors)
    if order < 0:
        raise ConfigError(f"matrix products: a moment's order must not be negative, got {order}")
    return math.comb((factors + 1) * order, order) // (factors * order + 1)


def edge(factors: int) -> float:
    """Largest squared singular value of a product of M large Gaussian matrices: (M + 1)^(M + 1) / M^M.

    Args:
        factors: M.

    Returns:
        The upper end of the density.

    Raises:
        ConfigError: if there is no factor.

    Example:
        >>> edge(1), edge(2)
        (4.0, 6.75)
    """
    _require(factors)
    return (factors + 1) * (1 + 1 / factors) ** factors


def density(factors: int, points: int = 400) -> tuple[Tensor, Tensor]:
    r"""Density of the squared singular values of a product of M large Gaussian matrices (Fuss-Catalan).

    .. math:: x(p) = \frac{\sin^{M+1}((M+1)p)}{\sin p \, \sin^M(Mp)}, \qquad
        \rho(x(p)) = \frac{\sin^2 p \, \sin^{M-1}(Mp)}{\pi \sin^M((M+1)p)}, \qquad 0 < p < \frac{\pi}{M+1}

    Args:
        factors: M.
        points: number of points.

    Returns:
        x, falling from the edge to near 0, and the density there; float64. Towards 0 it grows as x^(-M / (M + 1)).

    Raises:
        ConfigError: if there is no factor.

    Source:
        The Fuss-Catalan distribution, whose moments are :func:`fuss_catalan`; for M = 1 that of Marchenko and Pastur.

    Example:
        >>> x, rho = density(1)
        >>> bool(torch.allclose(rho, (x * (4 - x)).sqrt() / (2 * torch.pi * x)))
        True
    """
    _require(factors)
    p = torch.linspace(0, math.pi / (factors + 1), points + 2, dtype=torch.float64)[1:-1]
    below, above = (factors * p).sin(), ((factors + 1) * p).sin()
    x = above ** (factors + 1) / (p.sin() * below**factors)
    return x, p.sin().square() * below ** (factors - 1) / (math.pi * above**factors)


def _require(factors: int) -> None:
    if factors < 1:
        raise ConfigError(f"matrix products: a product needs at least 1 factor, got {factors}")


def spectrum(matrices: Sequence[Tensor]) -> ProductSpectrum:
    """Singular values of a product of square matrices, the first to be applied first.

    Args:
        matrices: M matrices, (N, N).

    Returns:
        The spectrum, in units in which the mean squared singular value is 1.

    Raises:
        ConfigError: if there is no matrix, one is not square, not finite, or they differ in size.

    Example:
        >>> spectrum([torch.eye(3), 2 * torch.eye(3)]).squared
        (1.0, 1.0, 1.0)
    """
    shapes = [tuple(matrix.shape) for matrix in matrices]
    if not shapes or len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1] or not shapes[0][0]:
        raise ConfigError(f"matrix products: expected square matrices of one size, got shapes {shapes}")
    # On the CPU, where there is double precision: small singular values drown in the rounding of the large ones.
    product = torch.eye(shapes[0][0], dtype=torch.float64)
    for matrix in matrices:
        product = matrix.detach().cpu().double() @ product
    if not bool(product.isfinite().all()):
        raise ConfigError("matrix products: the product has entries that are not finite; look at the weights")
    values = torch.linalg.svdvals(product)
    scale = values.square().mean()
    squared = values.square() / scale if scale > 0 else values
    smallest = values[-1].item()
    return ProductSpectrum(
        len(shapes), tuple(squared.tolist()), scale.item(), values[0].item() / smallest if smallest else math.inf
    )


def gaussian_product(factors: int, size: int = 400, seed: int = 0) -> ProductSpectrum:
    """Singular values of a product of M Gaussian N x N matrices with entries of variance 1 / N.

    Args:
        factors: M.
        size: N.
        seed: of the entries.

    Returns:
        The spectrum.

    Raises:
        ConfigError: if there is no factor, or no row.

    Source:
        Bjorck et al. 2018, Understanding Batch Normalization (random initialisation as a product of matrices).

    Example:
        >>> gaussian_product(3, size=50).factors
        3
    """
    _require(factors)
    if size < 1:
        raise ConfigError(f"matrix products: matrices need at least 1 row, got {size}")
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(factors))
    return spectrum([matrix / math.sqrt(size) for matrix in draw])


def measure(subject: Subject) -> ProductSpectrum:
    """Measure the singular values of the product of a network's square weights: the network without its activations.

    The weights are the effective ones that linear maps are called with, normalised and scaled as the method does it,
    in the order of the calls. Linear maps that are not square, such as the first and the last, are left out.

    Args:
        subject: network and inputs; labels are not needed.

    Returns:
        The spectrum.

    Raises:
        ConfigError: if the network calls no square linear map, or several of different sizes.

    Example:
        >>> from normprop.models import create
        >>> measure(Subject("none", create("mlp", (4,), 3, "none", 0.1), torch.randn(2, 4))).factors
        3
    """

    def weights(output: Tensor, calls: list[LinearCall]) -> list[Tensor]:
        own = [call.arguments["weight"] for call in calls if call.function is F.linear]
        return [weight for weight in own if weight.shape[0] == weight.shape[1]]

    square = linear_calls(subject.model, subject.inputs, weights)
    sizes = sorted({len(weight) for weight in square})
    if len(sizes) != 1:
        raise ConfigError(
            f"{subject.name}: the product of weights needs square linear maps of one size, but there are "
            + (f"some of sizes {', '.join(map(str, sizes))}" if sizes else "none; use a network such as 'mlp'")
        )
    return spectrum(square)


def describe(results: Mapping[str, ProductSpectrum]) -> Diagnosis:
    """Put the spectra of some products side by side, with those of large Gaussian matrices.

    Args:
        results: by network, or by any name of a product.

    Returns:
        What was found.

    Example:
        >>> describe({"2 factors": gaussian_product(2, size=50)}).numbers["2 factors"]["edge"]
        6.75
    """
    densities = [_histogram(name, found) for name, found in results.items()]
    theories = []
    for factors in sorted({found.factors for found in results.values()}):
        x, rho = density(factors)
        shown = x > min((value for line in densities for value in line.x), default=1e-3) / 2
        word = "1 matrix" if factors == 1 else f"{factors} matrices"
        theories.append(Line(f"Gaussian, {word}", x[shown].tolist(), rho[shown].tolist(), style="theory"))
    ranks = [
        Line(
            name,
            [(k + 0.5) / len(found.squared) for k in range(len(found.squared))],
            [math.sqrt(value) if value > 0 else math.nan for value in found.squared],
            style="line",
        )
        for name, found in results.items()
    ]
    return Diagnosis(
        name="matrix-products",
        title="Does a product of weights stretch all directions alike?",
        look_for=(
            "The more matrices, the more values pile up near 0 while a few grow: most directions are lost, and a rate "
            "that suits the large ones is too small for all others."
        ),
        found=by_network(results, _words),
        numbers={
            name: {
                "factors": found.factors,
                "size": len(found.squared),
                "largest": found.squared[0],
                "edge": edge(found.factors),
                "median": _median(found.squared),
                "mean_before_scaling": finite(found.scale),
                "condition": finite(found.condition),
            }
            for name, found in results.items()
        },
        figures=(
            Plot(
                "Density of the squared singular values",
                "squared singular value, relative to the mean",
                "density",
                (*densities, *theories),
                x_scale="log",
                y_scale="log",
            ),
            Plot(
                "Singular values in order",
                "rank, relative to the size",
                "singular value / root mean square",
                ranks,
                y_scale="log",
                references=(Reference(1.0),),
            ),
        ),
        source=(
            "Bjorck et al. 2018, Understanding Batch Normalization (products of random matrices); dashed: the "
            "Fuss-Catalan density"
        ),
    )


def _histogram(name: str, found: ProductSpectrum) -> Line:
    """Density on bins of equal ratio, over at most 5 powers of ten."""
    values = torch.tensor(found.squared, dtype=torch.float64)
    top = math.log10(values[0].item() * (1 + 1e-9)) if values[0] > 0 else 0.0
    smallest = values[values > values[0] * 1e-5]
    bottom = min(math.log10(smallest[-1].item()) if len(smallest) else top, top - 0.1)
    edges = torch.logspace(bottom - 1e-9, top, _BINS + 1, dtype=torch.float64)
    share = torch.histogram(values, edges).hist / (len(values) * edges.diff())
    centres = (edges[1:] * edges[:-1]).sqrt()
    return Line(name, centres.tolist(), [s if s > 0 else math.nan for s in share.tolist()], style="points")


def _median(falling: Sequence[float]) -> float:
    return (falling[(len(falling) - 1) // 2] + falling[len(falling) // 2]) / 2


def _words(found: ProductSpectrum) -> str:
    """What was found of one product."""
    if not found.squared[0]:
        return "the product is 0."
    condition = f"{found.condition:.2g}" if found.condition < 1e15 else "above 1e+15"
    product = "1 matrix" if found.factors == 1 else f"{found.factors} matrices"
    return (
        f"of the product of {product} of size {len(found.squared)}, the largest squared singular value is "
        f"{found.squared[0]:.3g} times the mean (large Gaussian matrices: {edge(found.factors):.3g}), the median one "
        f"{_median(found.squared):.2g} times; the condition number is {condition}."
    )

"""Diagonal and singular values of Jacobians, from products with them alone; formed are small ones only."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normprop.diagnostics.products import Linearisation
from normprop.errors import ConfigError

_ENTRIES = 2**24  # of all samples' Jacobians, where they are formed


@dataclass(frozen=True)
class Spectrum:
    """What is known of the Jacobians of a function at some samples.

    Args:
        outputs: elements of a sample's output, m.
        inputs: elements of a sample's input, n.
        diagonal_mean: mean of the diagonal of E[J J^T], (m, m), over samples: the factor by which the squared length
            of a random gradient changes on its way back, and the mean square of a random change on its way forth.
        diagonal_error: standard error of it where only some rows were looked at, else 0.
        off_diagonal_rms: root mean square of its other elements; 0 if there are none.
        values: singular values of all samples, rising; estimated: the nodes of a quadrature of their density.
        weights: share of each, together 1.
        exact: whether all singular values were computed.
        coupled: whether a sample's output depends on other samples, as with batch statistics; then the whole batch is
            the only sample.
    """

    outputs: int
    inputs: int
    diagonal_mean: float
    diagonal_error: float
    off_diagonal_rms: float
    values: Tensor
    weights: Tensor
    exact: bool
    coupled: bool

    @property
    def mean_square(self) -> float:
        """Mean of the min(m, n) squared singular values."""
        return self.diagonal_mean * self.outputs / min(self.outputs, self.inputs)

    @property
    def largest(self) -> float:
        """Largest singular value of all samples; a lower bound where it is estimated."""
        return float(self.values[-1])


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int, tolerance: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss quadrature of the spectral density of symmetric positive matrices, one for each row of the start.

    The three-term recurrence without reorthogonalisation: eigenvalues may come twice, but the weights stay right.

    Args:
        product: takes (N, d) to the products of N matrices with N vectors.
        start: (N, d), not 0; the density is that seen from there. Random: that of the eigenvalues.
        steps: largest number of products.
        tolerance: relative residual of the largest node at which to stop.

    Returns:
        Nodes, rising, and weights, each (N, steps), and the residual of the largest node, (N,), all in float64: an
        eigenvalue lies that close to it, from a random start and with enough steps the largest. nan where a product is
        not finite.

    Source:
        Golub & Meurant, Matrices, Moments and Quadrature; Ghorbani, Krishnan & Xiao 2019 use it for Hessians.

    Example:
        >>> matrix = torch.tensor([1.0, 3.0])
        >>> nodes, weights, _ = lanczos(lambda vector: vector * matrix, torch.ones(1, 2), 2)
        >>> nodes.round(decimals=6).tolist()[0], weights.round(decimals=6).tolist()[0]
        ([1.0, 3.0], [0.5, 0.5])
    """
    start = start.double()
    vector = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    previous, beta = torch.zeros_like(vector), vector.new_zeros(len(vector), 1)
    diagonal: list[Tensor] = []
    outer: list[Tensor] = []
    for step in range(min(steps, start.shape[1])):
        image = product(vector).double()
        alpha = (image * vector).sum(1, keepdim=True)
        image = image - alpha * vector - beta * previous
        diagonal.append(alpha[:, 0])
        beta = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        if not bool(torch.isfinite(beta).all()):
            nothing = torch.full((len(start), step + 1), math.nan, dtype=start.dtype, device=start.device)
            return nothing, nothing, nothing[:, 0]
        tridiagonal = torch.diag_embed(torch.stack(diagonal, 1))
        if outer:
            sides = torch.stack(outer, 1)
            tridiagonal = tridiagonal + torch.diag_embed(sides, 1) + torch.diag_embed(sides, -1)
        nodes, vectors = torch.linalg.eigh(tridiagonal)
        residual = beta[:, 0] * vectors[:, -1, -1].abs()
        if bool((residual <= tolerance * nodes[:, -1].abs()).all()):
            break
        outer.append(beta[:, 0])
        previous, vector = vector, torch.where(beta > 0, image / beta.clamp_min(1e-300), 0.0)
    return nodes.clamp_min(0.0), vectors[:, 0].square(), residual


def spectrum(
    products: Linearisation, *, exact: int = 256, probes: int = 32, steps: int = 32, seed: int = 0
) -> Spectrum:
    """Look at Jacobians through their products; :func:`normprop.diagnostics.jacobian.jacobian` has the arguments.

    Args:
        products: of an output by one input whose axis 0 are samples.
        exact: largest min(m, n) at which all singular values are computed.
        probes: rows of E[J J^T] that are looked at where they are not.
        steps: of the quadrature.
        seed: of what is drawn.

    Returns:
        Diagonal and the rest of E[J J^T], and the singular values.

    Example:
        >>> from normprop.diagnostics.products import linearise
        >>> x = torch.ones(1, 3, requires_grad=True)
        >>> spectrum(linearise(x.sum(1), [x], "sum")).largest ** 2
        2.9999...
    """
    for name, value in (("exact", exact + 1), ("probes", probes), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"jacobian: {name} must be positive, got {value}; leave it out for the default")
    generator = torch.Generator().manual_seed(seed)
    coupled = _coupled(products, generator)
    samples = 1 if coupled else len(products.inputs[0])
    outputs, inputs = products.output.numel() // samples, products.inputs[0].numel() // samples

    def back(cotangents: Tensor) -> Tensor:
        return products.vjp(cotangents.view_as(products.output))[0].reshape(samples, inputs)

    def forth(tangents: Tensor) -> Tensor:
        return products.jvp([tangents.view_as(products.inputs[0])]).reshape(samples, outputs)

    least = min(outputs, inputs)
    small = least <= exact and samples * outputs * inputs <= _ENTRIES
    if small:
        matrices = _dense(back, forth, samples, outputs, inputs, products.output)
        mean = sum((matrix @ matrix.T for matrix in matrices), matrices.new_zeros(outputs, outputs)) / samples
        values = torch.full((samples, least), math.nan, dtype=torch.float64)
        if bool(torch.isfinite(matrices).all()):
            values = torch.linalg.svdvals(matrices)
        diagonal = mean.diagonal()
        rest = (mean.square().sum(1) - diagonal.square()).clamp_min(0.0)
        weights = torch.full_like(values, 1.0 / values.numel())
    else:
        chosen = torch.randperm(outputs, generator=generator)[:probes].tolist()
        diagonal, rest = _rows(back, forth, samples, outputs, chosen, products.output)
        starts = -(-512 // (samples * least))  # a start averages by itself over the dimensions that it has
        nodes, shares = [], []
        for _ in range(starts):
            start = torch.randn(samples, least, generator=generator, dtype=torch.float64).to(products.output.device)
            product = (lambda v: forth(back(v))) if outputs <= inputs else (lambda v: back(forth(v)))
            found = lanczos(product, start, steps)
            nodes.append(found[0].sqrt().flatten())
            shares.append(found[1].flatten() / (samples * starts))
        values, weights = torch.cat(nodes), torch.cat(shares)
    looked = len(diagonal)
    left = math.sqrt(max(0.0, 1.0 - looked / outputs) / looked)
    spread = float(diagonal.std()) if looked > 1 else math.nan
    order = values.flatten().argsort()
    return Spectrum(
        outputs,
        inputs,
        diagonal_mean=float(diagonal.mean()),
        diagonal_error=left * spread if left else 0.0,
        off_diagonal_rms=math.sqrt(float(rest.mean()) / (outputs - 1)) if outputs > 1 else 0.0,
        values=values.flatten()[order].cpu(),
        weights=weights.flatten()[order].cpu(),
        exact=small,
        coupled=coupled,
    )


def _coupled(products: Linearisation, generator: torch.Generator) -> bool:
    """Whether outputs of even samples have a derivative by odd ones, or are not one for each sample."""
    given, output = products.inputs[0], products.output
    if output.ndim == 0 or len(output) != len(given):
        return True
    cotangent = torch.randn(output.shape, generator=generator).to(output)
    cotangent[1::2] = 0.0
    return bool((products.vjp(cotangent)[0][1::2] != 0).any())


def _dense(
    back: Callable[[Tensor], Tensor],
    forth: Callable[[Tensor], Tensor],
    samples: int,
    outputs: int,
    inputs: int,
    like: Tensor,
) -> Tensor:
    """All Jacobians, (samples, outputs, inputs), by the fewer products."""
    by_rows = outputs <= inputs
    slices = []
    for index in range(min(outputs, inputs)):
        unit = like.new_zeros(samples, outputs if by_rows else inputs)
        unit[:, index] = 1.0
        slices.append((back if by_rows else forth)(unit).double())
    return torch.stack(slices, 1 if by_rows else 2)


def _rows(
    back: Callable[[Tensor], Tensor],
    forth: Callable[[Tensor], Tensor],
    samples: int,
    outputs: int,
    chosen: Sequence[int],
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Diagonal element, and sum of the squares of the others, of some rows of E[J J^T]."""
    diagonal, rest = [], []
    for index in chosen:
        unit = like.new_zeros(samples, outputs)
        unit[:, index] = 1.0
        row = forth(back(unit)).double().mean(0)
        diagonal.append(row[index])
        rest.append(row[:index].square().sum() + row[index + 1 :].square().sum())
    return torch.stack(diagonal), torch.stack(rest)

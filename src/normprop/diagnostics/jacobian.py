"""How much a layer, a block or a whole network stretches a small change: its Jacobian, by products alone.

The Jacobian J of a sample's output by its input, (outputs, inputs), is never formed but where it is small. A linear
function of a cotangent is differentiated once more for the product with a tangent, so one forward pass gives both
products: batch statistics, dropout and networks that remember what they saw are met in one and the same state.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normprop import moments as M
from normprop.diagnostics.diagnosis import Diagnosis, Subject
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.errors import ConfigError, first_line
from normprop.graph.random_state import preserved
from normprop.nn import NormPropLayer
from normprop.training.statistics import watched

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


@dataclass(frozen=True)
class Jacobians:
    """Jacobians of the layers of a network and of the whole.

    Args:
        layers: by dotted name, each of the layer's output by its own input.
        predicted: diagonal means that the theory gives, of NormProp layers.
        network: of the network's output by its input.
    """

    layers: Mapping[str, Spectrum]
    predicted: Mapping[str, float]
    network: Spectrum


@dataclass(frozen=True)
class Linearisation:
    """The products with the Jacobian of an output by some tensors of its graph.

    Args:
        output: f(x).
        inputs: x, one tensor or several.
        cotangent: u, of the output's shape.
        pulled: J^T u, one for each input, with the graph from u; ``None`` where an input has no part in the output.
    """

    output: Tensor
    inputs: tuple[Tensor, ...]
    cotangent: Tensor
    pulled: tuple[Tensor | None, ...]

    def vjp(self, cotangent: Tensor) -> tuple[Tensor, ...]:
        """J^T u, one for each input."""
        found = torch.autograd.grad(
            self.output, self.inputs, cotangent.to(self.output), retain_graph=True, allow_unused=True
        )
        return tuple(
            torch.zeros_like(at) if grad is None else grad for at, grad in zip(self.inputs, found, strict=True)
        )

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """J v, of the output's shape."""
        pairs = [
            (grad, tangent.to(grad))
            for grad, tangent in zip(self.pulled, tangents, strict=True)
            if grad is not None and grad.requires_grad
        ]
        found = None
        if pairs:
            grads, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(grads, self.cotangent, given, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(self.output) if found is None else found


def linearise(output: Tensor, inputs: Sequence[Tensor], path: str) -> Linearisation:
    """Prepare the products with the Jacobian of an output by tensors that it was computed from.

    Args:
        output: with a graph that leads back to the inputs.
        inputs: tensors of that graph, as many as wanted.
        path: what computed it, for messages.

    Returns:
        The products.

    Raises:
        ConfigError: if the output is not a floating point tensor, has no derivative, or none that can be
            differentiated once more.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> products = linearise(x.prod()[None] * x, [x], "f")
        >>> products.jvp([torch.tensor([1.0, 0.0])]), products.vjp(torch.tensor([1.0, 0.0]))
        (tensor([4., 4.]), (tensor([4., 1.]),))
    """
    if not (isinstance(output, Tensor) and output.is_floating_point()):
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"{path} returns {kind}; a Jacobian needs one floating point tensor: wrap it to return that")
    if not output.requires_grad:
        raise ConfigError(f"{path}: its output does not depend on what it is to be differentiated by; detach nothing")
    cotangent = torch.zeros_like(output, requires_grad=True)
    try:
        pulled = torch.autograd.grad(output, inputs, cotangent, create_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"{path} cannot be differentiated twice: {first_line(error)}") from error
    return Linearisation(output, tuple(inputs), cotangent, pulled)


@contextmanager
def quietly(model: nn.Module, inputs: Tensor, seed: int = 0) -> Iterator[nn.Module]:
    """A copy of a network to compute derivatives with, in the network's mode; random states are put back afterwards.

    Args:
        model: the network; it stays as it is, its buffers included.
        inputs: what it will be given, a floating point batch.
        seed: where random states start inside.

    Returns:
        The copy.

    Raises:
        ConfigError: if the inputs are empty or not floating point, or the network cannot be copied.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> with quietly(model, torch.ones(2, 1)) as same:
        ...     _ = same(torch.ones(2, 1))
        >>> model.running_mean
        tensor([0.])
    """
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim and inputs.numel()):
        kind = f"{tuple(inputs.shape)} of {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ConfigError(f"inputs: expected a floating point batch (N, ...) of at least one sample, got {kind}")
    with (
        preserved(model, inputs, seed=seed),
        torch.inference_mode(False),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),  # the fused attentions cannot be differentiated twice
    ):
        try:
            copied = copy.deepcopy(model)
        except Exception as error:
            raise ConfigError(
                f"{type(model).__name__} cannot be copied, and must stay as it is; make copy.deepcopy(model) work: "
                f"{first_line(error)}"
            ) from error
        yield copied


@dataclass(frozen=True)
class Call:
    """A call of a layer inside a forward pass.

    Args:
        name: dotted name of the layer.
        module: the layer.
        input: what it was given, a tensor of the graph.
        output: what it returned, a tensor of the graph.
    """

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


def run(model: nn.Module, inputs: Tensor) -> tuple[Call, list[Call]]:
    """Run a network that may be changed, and keep what enters and leaves its watched layers, in the order of calls.

    Args:
        model: a copy, as from :func:`quietly`.
        inputs: a batch.

    Returns:
        The call of the network, under the name "", and those of the layers from one tensor to one.

    Raises:
        ConfigError: if the network does not take the inputs.

    Example:
        >>> whole, layers = run(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.ones(4, 2))
        >>> [(call.name, tuple(call.input.shape), tuple(call.output.shape)) for call in layers]
        [('0', (4, 2), (4, 3)), ('1', (4, 3), (4, 1))]
    """
    entered: dict[nn.Module, Tensor] = {}
    calls: list[Call] = []

    def enter(module: nn.Module, args: Any) -> Any:
        entered.pop(module, None)
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            entered[module] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return entered[module].clone(), *args[1:]  # the layer may overwrite what it is given
        return None

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            given = entered.pop(module, None)
            if given is None or not isinstance(output, Tensor):
                return None
            calls.append(Call(name, module, given, output))
            return output.clone()  # and whoever comes next what it returns

        return hook

    # Known layers that are differentiated twice ask for the gradients of their own parameters on the way.
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    start = inputs.detach().clone().requires_grad_()
    with ExitStack() as stack:
        for name, layer in watched(model):
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave(name)).remove)
        try:
            output = model(start.clone())
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(
                f"{type(model).__name__} does not take inputs of shape {tuple(inputs.shape)}: {first_line(error)}"
            ) from error
    return Call("", model, start, output), calls


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


def jacobian(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    exact: int = 256,
    probes: int = 32,
    steps: int = 32,
    seed: int = 0,
) -> Spectrum:
    """Look at the Jacobians of a function at some samples.

    Small ones are computed row by row, or column by column, and decomposed. Of others, some rows of E[J J^T] drawn at
    random are computed, and the density of the singular values by Lanczos quadrature from a random start per sample.

    Args:
        function: a module, looked at in its mode and left as it is, or any function of one tensor.
        inputs: where, a batch (N, ...).
        exact: largest min(m, n) at which all singular values are computed.
        probes: rows of E[J J^T] that are looked at where they are not.
        steps: of the quadrature.
        seed: of what is drawn.

    Returns:
        Diagonal and the rest of E[J J^T], and the singular values.

    Raises:
        ConfigError: if the function cannot be differentiated twice, or does not take the inputs.

    Source:
        Arpit et al., Normalization Propagation, ICML 2016, section 3.4.

    Example:
        >>> found = jacobian(lambda x: 2.0 * x.relu(), torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        >>> found.diagonal_mean, found.values.tolist()
        (3.0, [0.0, 2.0, 2.0, 2.0])
    """
    holder = function if isinstance(function, nn.Module) else nn.Identity()
    with quietly(holder, inputs, seed) as model:
        if isinstance(function, nn.Module):
            call = run(model, inputs)[0]
        else:
            start = inputs.detach().clone().requires_grad_()
            call = Call("", holder, start, function(start.clone()))
        name = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "function")
        return spectrum(linearise(call.output, [call.input], name), exact=exact, probes=probes, steps=steps, seed=seed)


def spectrum(
    products: Linearisation, *, exact: int = 256, probes: int = 32, steps: int = 32, seed: int = 0
) -> Spectrum:
    """Look at Jacobians through their products; :func:`jacobian` has the arguments.

    Args:
        products: of an output by one input whose axis 0 are samples.
        exact: largest min(m, n) at which all singular values are computed.
        probes: rows of E[J J^T] that are looked at where they are not.
        steps: of the quadrature.
        seed: of what is drawn.

    Returns:
        As :func:`jacobian`.

    Example:
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


def predicted(layer: nn.Module) -> float | None:
    """Diagonal mean of E[J J^T] of a NormProp layer whose pre-activations are as the theory has them.

    The mean over units of gain^2 E[f'(z)^2] / c1^2 with z ~ N(bias, gain^2): pi / (pi - 1) for ReLU at gain 1.

    Args:
        layer: any module.

    Returns:
        The prediction; ``None`` for other layers, and transposed convolutions.

    Source:
        Arpit et al., Normalization Propagation, ICML 2016, section 3.4.

    Example:
        >>> from normprop.nn import Linear
        >>> round(predicted(Linear(4, 4, activation="relu")), 5), predicted(nn.Linear(4, 4))
        (1.46694, None)
    """
    if not isinstance(layer, NormPropLayer) or layer._transposed:
        return None
    with torch.no_grad():
        rule, gain = M.resolve(layer.activation), layer.gain.double()
        if rule.name == "identity":
            return float(gain.square().mean())
        bias = torch.zeros_like(gain) if layer.bias is None else layer.bias.double()
        moments = rule.moments(bias, gain.abs())
        var = moments.var if layer.moments == "live" else M.of(layer.activation).var
        return float(torch.as_tensor(gain.square() * moments.squared_derivative / var).mean())


def measure(
    subject: Subject, *, samples: int = 8, exact: int = 128, probes: int = 16, steps: int = 16, seed: int = 0
) -> Jacobians:
    """Look at the Jacobian of every watched layer, and of the whole network, in one forward pass.

    Args:
        subject: the network; only the first samples of its inputs are used.
        samples: how many.
        exact: as for :func:`jacobian`.
        probes: the same.
        steps: the same.
        seed: the same; also where random states start.

    Returns:
        The Jacobians; a layer that is called more than once counts by its first call.

    Raises:
        ConfigError: if the network cannot be differentiated twice, or does not take the inputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 2))
        >>> _ = nn.init.eye_(model[0].weight)
        >>> found = measure(Subject("eye", model, torch.zeros(4, 3)))
        >>> found.layers["0"].values.unique().tolist(), found.network.outputs
        ([1.0], 2)
    """
    kept = subject.inputs[:samples]
    settings = {"exact": exact, "probes": probes, "steps": steps, "seed": seed}
    with quietly(subject.model, kept, seed) as model:
        whole, calls = run(model, kept)
        first: dict[str, Call] = {}
        for call in calls:
            if call.output.requires_grad:
                first.setdefault(call.name, call)
        layers = {
            name: spectrum(linearise(call.output, [call.input], name), **settings) for name, call in first.items()
        }
        theory = {name: value for name, call in first.items() if (value := predicted(call.module)) is not None}
        network = spectrum(linearise(whole.output, [whole.input], type(model).__name__), **settings)
    return Jacobians(layers, theory, network)


def describe(results: Mapping[str, Jacobians]) -> Diagnosis:
    """Say how much layers stretch, and plot it by layer, with the singular values of the whole networks.

    Args:
        results: by the name of the network.

    Returns:
        The diagnosis.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = nn.init.eye_(model[0].weight)
        >>> describe({"eye": measure(Subject("eye", model, torch.zeros(4, 2)))}).found
        'eye: its 1 layer multiplies the squared length of a gradient by 1; the whole network by 1, and its largest singular value is 1.'
    """  # noqa: E501
    diagonals, spectra = [], []
    for name, found in results.items():
        place = {layer: index + 1 for index, layer in enumerate(found.layers)}
        diagonals.append(
            Line(name, [*place.values()], [layer.diagonal_mean for layer in found.layers.values()], style="both")
        )
        if found.predicted:
            heights = [*found.predicted.values()]
            diagonals.append(Line(f"{name}, theory", [place[at] for at in found.predicted], heights, style="theory"))
        share = found.network.weights.cumsum(0) - found.network.weights / 2
        spectra.append(Line(name, share.tolist(), found.network.values.tolist()))
    named = [[*found.layers] for found in results.values()]
    shared = bool(named) and all(names == named[0] for names in named)
    return Diagnosis(
        name="jacobian",
        title="How much does each layer stretch a small change?",
        look_for="A layer that keeps the size of gradients stands at 1; layers above 1 multiply up and make gradients "
        "explode with depth, layers below 1 make them vanish.",
        found=" ".join(_sentence(name, found) for name, found in results.items()),
        numbers={name: _numbers(found) for name, found in results.items()},
        figures=(
            Plot(
                "Mean diagonal of E[JJ^T]",
                "layer",
                "factor on the squared length of a gradient",
                diagonals,
                y_scale="log",
                references=(Reference(1.0, "size kept"),),
                x_ticks=[(index + 1, layer) for index, layer in enumerate(named[0])] if shared else None,
            ),
            Plot(
                "Singular values of the whole network",
                "share of the singular values that are smaller",
                "singular value",
                spectra,
                y_scale="symlog",
                references=(Reference(1.0, "length kept"),),
            ),
        ),
        source="Arpit et al., Normalization Propagation, ICML 2016, section 3.4",
    )


def finite(value: float) -> float | None:
    """The number, or ``None`` for what is not finite.

    Example:
        >>> finite(1.5), finite(math.nan)
        (1.5, None)
    """
    return float(value) if math.isfinite(value) else None


def _sentence(name: str, found: Jacobians) -> str:
    """What was found of one network."""
    values = [layer.diagonal_mean for layer in found.layers.values()]
    whole = found.network
    if not all(map(math.isfinite, [*values, whole.diagonal_mean, whole.largest])):
        bad = [layer for layer, at in found.layers.items() if not math.isfinite(at.diagonal_mean)]
        return f"{name}: the derivatives are not finite{f', first at layer {bad[0]}' if bad else ''}."
    span = ""
    if values:
        mean = math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
        layers = f"its {len(values)} layer{'s multiply' if len(values) > 1 else ' multiplies'}"
        span = f"{layers} the squared length of a gradient by {mean:.3g}"
        if len(values) > 1:
            span += f" on average ({min(values):.3g} to {max(values):.3g})"
        if found.predicted:
            theory = [*found.predicted.values()]
            low, high = f"{min(theory):.3g}", f"{max(theory):.3g}"
            span += f", where theory says {low if low == high else f'{low} to {high}'}"
        span += "; the whole network by"
    else:
        span = "the whole network multiplies the squared length of a gradient by"
    bound = "" if whole.exact else "at least "
    return f"{name}: {span} {whole.diagonal_mean:.3g}, and its largest singular value is {bound}{whole.largest:.3g}."


def _numbers(found: Jacobians) -> dict[str, Any]:
    """The numbers of one network."""

    def one(at: Spectrum) -> dict[str, Any]:
        return {
            "outputs": at.outputs,
            "inputs": at.inputs,
            "diagonal_mean": finite(at.diagonal_mean),
            "diagonal_error": finite(at.diagonal_error),
            "off_diagonal_rms": finite(at.off_diagonal_rms),
            "mean_square": finite(at.mean_square),
            "largest": finite(at.largest),
            "exact": at.exact,
            "coupled": at.coupled,
        }

    layers = {name: {**one(at), "predicted": found.predicted.get(name)} for name, at in found.layers.items()}
    return {"layers": layers, "network": one(found.network)}

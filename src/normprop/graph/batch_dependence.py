"""Whether the samples of a batch influence each other in a model, and in which of its modules."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.graph.sample_effects import Outputs, gradient_effect, state_effects
from normprop.graph.sample_runs import Runner
from normprop.graph.sample_trace import Shapes, Trace, Which
from normprop.graph.samples import exchange, splits

Kind = Literal["output", "gradient", "state"]
_KINDS: tuple[Kind, ...] = ("output", "gradient", "state")


@dataclass(frozen=True)
class ModuleDependence:
    """One way in which one module lets samples influence each other.

    Attributes:
        path: dotted path of the module, empty for the model itself.
        type: name of its class.
        kind: ``"output"``, ``"gradient"`` or ``"state"``.
        effect: largest change when other samples change, relative to the largest value of the same tensor.
    """

    path: str
    type: str
    kind: Kind
    effect: float


@dataclass(frozen=True)
class BatchDependence:
    """What :func:`batch_dependence` measured; true if anything depends on other samples.

    Attributes:
        output: whether a sample's output changes when other samples do.
        gradient: whether the gradient that a sample's output sends to its input and to the parameters changes when
            other samples do, or reaches other samples.
        state: whether a forward pass leaves in buffers or parameters what depends on the samples.
        modules: the modules responsible, in the order of the model.
        untested: paths of modules inside of these that could not be tested alone, as the samples could not be told
            apart in what they take or return; what they do counts for the module around them.
    """

    output: bool
    gradient: bool
    state: bool
    modules: tuple[ModuleDependence, ...]
    untested: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.output or self.gradient or self.state

    def __str__(self) -> str:
        """The answer in a line, then a table of the modules responsible."""
        found = [kind for kind in _KINDS if getattr(self, kind)]
        lines = [
            f"samples influence each other: {', '.join(found)}" if found else "samples do not influence each other"
        ]
        rows = [("module", "class", *_KINDS)] if found else []
        for path, name in dict.fromkeys((entry.path, entry.type) for entry in self.modules):
            effects = {entry.kind: f"{entry.effect:.1e}" for entry in self.modules if entry.path == path}
            rows.append((path or "(model)", name, *(effects.get(kind, "-") for kind in _KINDS)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if self.untested:
            lines.append(f"not testable alone: {', '.join(self.untested)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, for JSON."""
        return asdict(self)


def batch_dependence(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    *,
    kwargs: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> BatchDependence:
    """Measure whether samples of a batch influence each other in a model, and name the modules responsible.

    Nothing is concluded from the classes of modules. A copy of the model runs in its present mode, first on x, then
    with half of the samples moved towards others of the batch, for as many halves as it takes to hold each sample while
    each other changes. Random draws are the same in all runs. The model, its state, mode and gradients and the random
    state stay as they are; hooks on the model run in the copies, too.

    A module is responsible if samples meet in its own code, not in that of a module it calls. The axis of the samples
    may differ between modules, and may be folded into another: it is found by running a batch twice as large. What
    depends on others only past a threshold, such as the capacity of an expert, is found if these samples cross it.

    Args:
        model: any module that can be copied.
        x: the input, a tensor or a tuple of them, samples along axis 0; two to eight samples that all differ, of small
            size, say as much as large ones.
        kwargs: further arguments by name, the same in all runs.
        dtype: floating point type to measure in; float32 for models that run in that alone.

    Returns:
        What influences what, and where.

    Raises:
        ConfigError: for fewer than two samples or two that are the same, a model that cannot be copied or run, that
            returns NaN, or nothing with an axis of samples.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> found = batch_dependence(net, x)
        >>> found.output, found.gradient, found.state, {entry.path for entry in found.modules}
        (True, True, True, {'1'})
        >>> print(batch_dependence(net.eval(), x))
        samples do not influence each other
    """
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"batch_dependence: dtype must be torch.float64 or torch.float32, got {dtype}")
    runner = Runner(model, _checked(x), kwargs or {}, dtype)
    tolerance = torch.finfo(dtype).eps ** 0.6  # 4e-10 in float64: above rounding, below any influence worth a name
    with runner.repeatable():
        base = runner.run(runner.input)
        shapes = runner.doubled(base)
        outputs, gradient, divisions = Outputs(base, shapes.outputs, tolerance), 0.0, []
        effects: dict[tuple[str, Kind], float] = {}
        for held in splits(len(runner.input[0])):
            changed = runner.run(exchange(runner.input, held))
            masks = outputs.compare(changed, held)
            divisions.append((held, outputs.exchanged(masks)))
            gradient = max(gradient, gradient_effect(base, changed, outputs.held(masks), held))
            for path, effect in state_effects(base.model, changed.model, tolerance).items():
                effects[path, "state"] = max(effect, effects.get((path, "state"), 0.0))
        output, untested = outputs.effect()
        whole: dict[Which, float] = {"output": output, "gradient": gradient}
        found: dict[Which, bool] = {which: effect > tolerance for which, effect in whole.items()}
        state = bool(effects)
        if any(found.values()):
            trace = _trace(runner, outputs.weights, divisions, shapes.modules, tolerance)
            met = {place: effect for place, effect in trace.effects.items() if found[place[1]]}
            # Where samples met nowhere they were only moved.
            moved = [path for path in trace.moved if not any(_inside(other, path) for other in trace.moved)]
            places = met or {(path, which): whole[which] for path in moved or [""] for which in whole if found[which]}
            effects.update(places.items())
            blamed = {path for path, _ in met}
            untested += [path for path in trace.lost - blamed if any(_inside(path, place) for place in blamed)]
    modules = tuple(
        ModuleDependence(path, type(module).__name__, kind, effects[path, kind])
        for path, module in model.named_modules()
        for kind in _KINDS
        if (path, kind) in effects
    )
    return BatchDependence(found["output"], found["gradient"], state, modules, tuple(sorted(untested)))


def _trace(
    runner: Runner,
    weights: list[Tensor],
    divisions: list[tuple[Tensor, list[Tensor]]],
    shapes: Shapes,
    tolerance: float,
) -> Trace:
    """Compare what enters and leaves all modules, over all divisions."""
    whole = Trace()
    runner.run(runner.input, whole).gradients(weights)
    for held, others in divisions:
        trace = Trace(whole, held, shapes, tolerance)
        runner.run(exchange(runner.input, held), trace).gradients(others)
        whole.include(trace)
    return whole


def _inside(path: str, place: str) -> bool:
    return path != place and path.startswith(f"{place}." if place else "")


def _kinds(input: tuple[Any, ...]) -> str:
    return ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in input)) or "nothing in it"


def _checked(x: Any) -> tuple[Tensor, ...]:
    input = x if isinstance(x, tuple) else (x,)
    if not input or not all(isinstance(tensor, Tensor) for tensor in input):
        kinds = f"a tuple with {_kinds(input)}" if isinstance(x, tuple) else type(x).__name__
        raise ConfigError(
            f"batch_dependence: x must be a tensor or a tuple of tensors, got {kinds}; call a model that takes its "
            f"samples in another form from a module whose forward takes tensors"
        )
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in input}
    if len(sizes) != 1 or min(sizes) < 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in input)
        raise ConfigError(
            f"batch_dependence: x must hold the same two or more samples along axis 0 of each tensor, got {shapes}"
        )
    return input

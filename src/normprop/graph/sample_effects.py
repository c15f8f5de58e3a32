"""How much of a model's outputs, gradients and state depends on other samples, from runs in which some are held."""

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.graph.sample_runs import Run
from normprop.graph.samples import TELLS_APART, Rows, candidates, difference, growing, magnitude, share


class Outputs:
    """Compare a model's outputs over several divisions in held and changed samples.

    Args:
        base: the run with the samples as they are.
        doubled: shapes of the outputs for a batch twice as large; empty if the model takes none.
        tolerance: relative size of what counts as rounding.
    """

    def __init__(self, base: Run, doubled: list[torch.Size], tolerance: float) -> None:
        generator = torch.Generator().manual_seed(2)
        self.base = [output.detach() for output in base.outputs]
        self.tolerance = tolerance
        self.weights, self._others = (
            [torch.randn(output.shape, generator=generator).to(output) for output in self.base] for _ in range(2)
        )
        larger = [*doubled, *[None] * len(self.base)]
        self._axes = [growing(output.shape, other) for output, other in zip(self.base, larger, strict=False)]
        self._changes: list[tuple[Tensor, list[Tensor | None]]] = []

    def compare(self, changed: Run, held: Tensor) -> list[Tensor | None]:
        """Compare one run; return where in each output the held samples are, ``None`` where that cannot be told."""
        masks: list[Tensor | None] = []
        changes: list[Tensor | None] = []
        if len(changed.outputs) != len(self.base):
            raise ConfigError(
                "batch_dependence: the number of outputs depends on the values of x, so that they cannot be compared"
            )
        for base, output, axes in zip(self.base, changed.outputs, self._axes, strict=True):
            if base.shape != output.shape:
                masks.append(None)
                changes.append(None)
                continue
            change = difference(base, output)
            changes.append(change)
            beyond = change > self._limit(base)
            masks.append(self._place(change, beyond, held, axes))
        self._changes.append((held, changes))
        return masks

    def _place(self, change: Tensor, beyond: Tensor, held: Tensor, axes: tuple[int, ...] | None) -> Tensor | None:
        places = candidates(change.shape, axes, held)
        clean = [rows for rows in places if not (beyond & rows.mask(change)).any()]
        likely = [rows for rows in places if axes is not None or share(change, rows) < TELLS_APART]
        if clean or likely:
            return (clean or likely)[0].mask(change).expand_as(change)
        return None if beyond.any() else torch.ones_like(beyond)

    def held(self, masks: list[Tensor | None]) -> list[Tensor]:
        """Weights of a sum over the held samples' outputs."""
        pairs = zip(self.weights, masks, strict=True)
        return [torch.zeros_like(weight) if mask is None else weight * mask for weight, mask in pairs]

    def exchanged(self, masks: list[Tensor | None]) -> list[Tensor]:
        """Weights of a sum over all outputs, the same for the held samples in every division, others for the others."""
        triples = zip(self.weights, self._others, masks, strict=True)
        return [weight if mask is None else torch.where(mask, weight, other) for weight, other, mask in triples]

    def effect(self) -> tuple[float, list[str]]:
        """Return the largest relative change of a held sample's output, and the outputs without an axis of samples.

        Raises:
            ConfigError: if no output has one.
        """
        effects, unknown = [], []
        for index, base in enumerate(self.base):
            effect = self._effect(index, base)
            if effect is None:
                unknown.append(f"output {index} of shape {tuple(base.shape)}")
            else:
                effects.append(effect)
        if not effects:
            raise ConfigError(
                "batch_dependence: no output of the model has an axis of samples to compare, there is "
                f"{', '.join(unknown) or 'no tensor'}; return one row per sample, without taking the mean"
            )
        return max(effects), unknown

    def _effect(self, index: int, base: Tensor) -> float | None:
        """Change under the first way to share the entries among the samples in which there is none, else the first."""
        changes = [(held, change) for held, each in self._changes if (change := each[index]) is not None]
        if len(changes) < len(self._changes):
            return None
        samples = len(changes[0][0])
        scale = magnitude(base) or 1.0
        worst = []
        places = [candidates(base.shape, self._axes[index], held) for held, _ in changes]
        for rows in zip(*places, strict=True):
            pairs = zip(rows, changes, strict=True)
            worst.append(max(float((change * place.mask(change)).max()) for place, (_, change) in pairs))
        # An output that is one sample's own, in a list of them.
        for sample in range(samples):
            worst.append(max((float(change.max()) for held, change in changes if held[sample]), default=0.0))
        if min(worst) <= self._limit(base):
            return 0.0
        return worst[0] / scale if places[0] else None

    def _limit(self, base: Tensor) -> float:
        return self.tolerance * (magnitude(base) or 1.0)


def gradient_effect(base: Run, changed: Run, weights: list[Tensor], held: Tensor) -> float:
    """Change of the gradients of the held samples' outputs, and what of them reaches other samples.

    Args:
        base: the run with the samples as they are.
        changed: the run in which only the held ones are.
        weights: of the held samples' outputs; 0 for the other outputs.
        held: (samples,), bool.

    Returns:
        The largest change, relative to the largest gradient.
    """
    inputs = sum(tensor.requires_grad for tensor in base.input)
    scale, effect = 0.0, 0.0
    for index, pair in enumerate(zip(base.gradients(weights), changed.gradients(weights), strict=True)):
        given = [gradient for gradient in pair if gradient is not None]
        if not given:
            continue
        first, second = (torch.zeros_like(given[0]) if gradient is None else gradient for gradient in pair)
        change = difference(first, second)
        if index < inputs:
            mask = Rows(0, held).mask(change)
            change = torch.where(mask, change, torch.maximum(first.abs(), second.abs()))
        scale = max(scale, magnitude(first))
        effect = max(effect, float(change.max()) if change.numel() else 0.0)
    return effect / scale if scale else effect


def state_effects(base: nn.Module, changed: nn.Module, tolerance: float) -> dict[str, float]:
    """Relative change of what the modules hold after a run, by path, where it is more than rounding."""
    effects: dict[str, float] = {}
    for (path, first), (_, second) in zip(base.named_modules(), changed.named_modules(), strict=True):
        for own, other in zip(_held_by(first), _held_by(second), strict=True):
            effect = float("inf") if own.shape != other.shape else _relative(own, other)
            if effect > tolerance:
                effects[path] = max(effect, effects.get(path, 0.0))
    return effects


def _held_by(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _relative(first: Tensor, second: Tensor) -> float:
    if torch.equal(first, second):
        return 0.0
    return float(difference(first, second).max()) / (magnitude(first) or 1.0)

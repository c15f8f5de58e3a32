"""Normalisation of a network's input, the one place where NormProp looks at data."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError


class DataNorm(nn.Module):
    r"""Give the network's input mean 0 and variance 1: :math:`(x - \mu) / \sigma`.

    ``"global"`` takes both from the training set (:meth:`fit`) and never changes them, so that batch size 1 works and
    train() equals eval(). ``"batch"`` uses the statistics of each training batch and keeps running averages for
    evaluation, which regularises because a sample's input then depends on its batch. Features that never vary become 0.

    Args:
        shape: shape of the statistics: that of one sample for one mean per element, as in the paper, or with ones for
            axes to share, e.g. ``(3, 1, 1)`` for one mean per channel of an image.
        mode: ``"global"`` or ``"batch"``.
        momentum: weight of a new batch in the running averages of ``"batch"``.
        device, dtype: of the statistics.

    Shape:
        (N, \*sample) to the same, where ``shape`` broadcasts against the sample's.

    Raises:
        ConfigError: for an unknown mode, an input of another shape, a call before :meth:`fit` in mode ``"global"``, or
            a training batch with a single value per feature in mode ``"batch"``.

    Source:
        Arpit et al. 2016, section 3.5.

    Example:
        >>> norm = DataNorm((2,)).fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> norm(torch.tensor([[4.0, 5.0]]))
        tensor([[2., 0.]])
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(
        self,
        shape: Iterable[int],
        mode: Literal["global", "batch"] = "global",
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if mode not in ("global", "batch"):
            raise ConfigError(f"DataNorm: mode must be 'global' or 'batch', got {mode!r}")
        self.shape = tuple(shape)
        self.mode = mode
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(self.shape, device=device, dtype=dtype))
        self.register_buffer("var", torch.ones(self.shape, device=device, dtype=dtype))
        self.register_buffer("count", torch.zeros((), device=device, dtype=torch.long))
        # Whether there are statistics to use; mirrors ``count`` where reading a tensor would break a compiled graph.
        self._ready = mode == "batch"

    def _axes(self, input: Tensor) -> list[int]:
        """Axes of a batch over which statistics are taken."""
        sample = tuple(input.shape[1:])
        if len(sample) != len(self.shape) or any(s not in (1, n) for s, n in zip(self.shape, sample, strict=True)):
            raise ConfigError(f"DataNorm: statistics of shape {self.shape} do not fit samples of shape {sample}")
        return [0, *(i + 1 for i, (s, n) in enumerate(zip(self.shape, sample, strict=True)) if s == 1 and n != 1)]

    @torch.no_grad()
    def fit(self, data: Tensor | Iterable[Any]) -> "DataNorm":
        """Take the statistics of a training set in one pass, merging batches in float64.

        Args:
            data: a tensor (N, *sample), or an iterable of such batches or of tuples that begin with one (a loader).

        Returns:
            The module itself.

        Raises:
            ConfigError: if there is no sample or its shape does not fit.

        Source:
            Chan, Golub, LeVeque 1983 (merging of means and sums of squares).

        Example:
            >>> DataNorm((1,)).fit([torch.tensor([[0.0]]), torch.tensor([[2.0], [4.0]])]).mean
            tensor([2.])
        """
        mean = torch.zeros(self.shape, dtype=torch.float64)
        squares = torch.zeros(self.shape, dtype=torch.float64)
        count = samples = 0
        # A few thousand samples at a time keep the float64 copies small.
        for batch in data.split(4096) if isinstance(data, Tensor) else data:
            part = (batch[0] if isinstance(batch, (tuple, list)) else batch).detach().to("cpu", torch.float64)
            axes = self._axes(part)
            size = part.numel() // max(mean.numel(), 1)
            if size == 0:
                continue
            part_mean = part.mean(axes).reshape(self.shape)
            delta = part_mean - mean
            squares += (part - part_mean).square().sum(axes).reshape(self.shape) + delta.square() * (
                count * size / (count + size)
            )
            mean += delta * (size / (count + size))
            count, samples = count + size, samples + part.shape[0]
        if count == 0:
            raise ConfigError("DataNorm: there is no sample to take statistics of")
        self.mean.copy_(mean)
        self.var.copy_(squares / count)
        self.count.fill_(samples)
        self._ready = True
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch (N, *sample)."""
        axes = self._axes(input)
        if not self._ready:
            raise ConfigError("DataNorm: call fit(training data) before the first forward pass in mode 'global'")
        mean, var = self.mean, self.var
        if self.mode == "batch" and self.training and input.numel() > 0:
            size = input.numel() // mean.numel()
            if size == 1:
                raise ConfigError("DataNorm: mode 'batch' cannot train on one value per feature; use mode 'global'")
            var, mean = torch.var_mean(input.to(mean.dtype), axes, correction=0, keepdim=True)
            mean, var = mean.reshape(self.shape), var.reshape(self.shape)
            with torch.no_grad():
                self.mean.lerp_(mean.detach(), self.momentum)
                self.var.lerp_(var.detach() * (size / (size - 1)), self.momentum)
                self.count.add_(input.shape[0])
        std = torch.where(var > 0, var, 1).sqrt()
        return ((input - mean) / std).to(input.dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        count = state_dict.get(prefix + "count")
        if count is not None:
            self._ready = self.mode == "batch" or bool(count > 0)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Shape and mode."""
        return f"{self.shape}, mode={self.mode!r}"

"""An LSTM that reads an image row by row."""

from collections.abc import Sequence

from torch import Tensor, nn

from normprop import nn as np_nn
from normprop import norms
from normprop.errors import ConfigError
from normprop.norms.recurrent import LayerNormLSTM

LSTMS: dict[str, type[nn.Module]] = {
    "none": nn.LSTM,
    "layer": LayerNormLSTM,
    "recurrent-normprop": np_nn.LSTM,
}


class LastOfRows(nn.Module):
    """The last hidden state of an LSTM that reads the rows of an image from top to bottom.

    Args:
        lstm: called with (H, N, C * W).

    Shape:
        (N, C, H, W) to (N, hidden).
    """

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, input: Tensor) -> Tensor:
        """Read the image."""
        output: Tensor = self.lstm(input.permute(2, 0, 1, 3).flatten(2))[0][-1]
        return output


def lstm(
    shape: Sequence[int],
    num_classes: int,
    norm: str = "recurrent-normprop",
    width: float = 1.0,
    hidden_features: int = 128,
    num_layers: int = 1,
) -> nn.Module:
    """Build an LSTM over the rows of an image and a linear map of its last hidden state.

    Args:
        shape: shape of a sample, (C, H, W): H steps of C * W features.
        num_classes: number of outputs.
        norm: ``"none"`` (torch's LSTM), ``"layer"`` or ``"recurrent-normprop"``.
        width: multiplies the number of hidden features.
        hidden_features: features of the hidden state at width 1.
        num_layers: number of LSTM layers.

    Returns:
        A network from (N, *shape) to logits (N, num_classes).

    Raises:
        ConfigError: for a method that has no LSTM.

    Example:
        >>> import torch
        >>> lstm((1, 8, 8), 10)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if norm not in LSTMS:
        raise ConfigError(f"model 'lstm': there is no LSTM with norm {norm!r}; there are {', '.join(LSTMS)}")
    channels, _, columns = shape
    hidden = max(1, round(hidden_features * width))
    recurrent = LSTMS[norm](channels * columns, hidden, num_layers)
    return norms.finish(norm, nn.Sequential(LastOfRows(recurrent), norms.head(norm, dims=0)(hidden, num_classes)))

"""A small vision transformer.

Tokens are rows: between the modules the signal is (N T, features), with the T patches of a sample one after another,
so that a method for linear layers (``dims=0``) sees one token as one sample. Only attention, positions and the final
mean know T, which the constructor fixes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop import norms
from normprop.errors import ConfigError
from normprop.moments import Activation
from normprop.nn import NormPropLayer, Residual
from normprop.norms.plain import PlainResidual

_PATCH_SIZES = (4, 2, 1)
_FEWEST_PATCHES = 16
# Positions as small as is usual with adaptive optimisers, 0.02, are learned too slowly by plain SGD.
_POSITION_STD = 0.5
_EXPANSION = 4  # hidden features of the MLP branch for each feature of a token


class Patches(nn.Module):
    """Cut images into square patches, one row for each.

    Args:
        patch_size: height and width of a patch in pixels.

    Shape:
        (N, C, H, W) to (N T, C patch_size^2), the T patches of an image in reading order.

    Example:
        >>> Patches(2)(torch.zeros(5, 3, 4, 6)).shape
        torch.Size([30, 12])
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, input: Tensor) -> Tensor:
        """Cut the images."""
        size = self.patch_size
        batch, channels, height, width = input.shape
        cut = input.reshape(batch, channels, height // size, size, width // size, size)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)

    def extra_repr(self) -> str:
        """The size of a patch."""
        return f"patch_size={self.patch_size}"


class Position(nn.Module):
    """Add a learned vector to each token, by its place; it starts at random and does not decay.

    Args:
        tokens: T, tokens of a sample.
        features: features of a token.

    Shape:
        (N T, features) to the same.

    Source:
        Dosovitskiy et al. 2021.

    Example:
        >>> Position(16, 8)(torch.zeros(32, 8)).shape
        torch.Size([32, 8])
    """

    parameter_decay: ClassVar[Mapping[str, bool]] = {"position": False}

    def __init__(self, tokens: int, features: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(tokens, features))
        nn.init.normal_(self.position, std=_POSITION_STD)

    def forward(self, input: Tensor) -> Tensor:
        """Add the positions."""
        return (input.reshape(-1, *self.position.shape) + self.position).reshape(input.shape)


class Attention(nn.Module):
    r"""Multi-head attention among the tokens of a sample: :math:`\mathrm{softmax}(Q K^\top / \sqrt d) V`, no weights.

    Args:
        tokens: T, tokens of a sample.
        heads: number of heads; divides the features.

    Shape:
        (N T, 3 features), queries, keys and values side by side, to (N T, features); d is features / heads.

    Source:
        Vaswani et al. 2017.

    Example:
        >>> Attention(tokens=16, heads=2)(torch.randn(32, 24)).shape
        torch.Size([32, 8])
    """

    def __init__(self, tokens: int, heads: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.heads = heads

    def forward(self, input: Tensor) -> Tensor:
        """Attend to the tokens of the same sample."""
        features = input.shape[1] // 3
        parts = input.reshape(-1, self.tokens, 3, self.heads, features // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, features)

    def extra_repr(self) -> str:
        """Tokens and heads."""
        return f"tokens={self.tokens}, heads={self.heads}"


class TokenMean(nn.Module):
    """Average the tokens of each sample.

    Args:
        tokens: T, tokens of a sample.

    Shape:
        (N T, features) to (N, features).

    Example:
        >>> TokenMean(16)(torch.zeros(32, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, input: Tensor) -> Tensor:
        """Average the tokens."""
        return input.reshape(-1, self.tokens, input.shape[1]).mean(1)

    def extra_repr(self) -> str:
        """Tokens of a sample."""
        return f"tokens={self.tokens}"


def vit(
    shape: Sequence[int],
    num_classes: int,
    norm: str = "normprop",
    width: float = 1.0,
    depth: int = 4,
    features: int = 64,
    heads: int = 4,
    patch_size: int | None = None,
    activation: Activation = "gelu",
) -> nn.Module:
    r"""Build a pre-norm vision transformer: ``depth`` times x + Attention(norm(x)), x + MLP(norm(x)).

    Patches are embedded by a linear map and learned positions are added, at the start a quarter of the sum's variance
    of 1; at the end come a norm, the mean over the tokens and a linear map. How a method enters:

    - A drop-in layer (:func:`normprop.norms.create`, ``dims=0``) is the norm, on rows of one token each: layer norm and
      its relatives normalise the features of each token, batch norm takes its statistics over batch and tokens, so a
      batch of 1 has T values per feature. The linear maps are plain.
    - Any other method makes every linear map (:func:`normprop.norms.block`) and the sums
      (:func:`normprop.norms.residual`); nothing stands where the norm would.

    Each branch starts at :math:`1 / \sqrt{2 \cdot \mathrm{depth}}` of its usual size (by the gain, fixed length or
    weight of its last block): the 2 depth sums then hardly enlarge the variance, and training works without a norm.
    Methods with sums of their own, such as Fixup, size their branches themselves.

    For ``normprop`` the patches are not centred, which would hide their brightness: the data has mean 0 already. The
    average of values that attention takes has a variance between 1 / T (independent values, equal weights) and 1 (one
    token chosen, or all alike), which depends on the data; the sums predict it by the upper bound. With small branches
    that costs little: at the start the variance of the tokens cannot grow, and falls at most to
    :math:`(1 + 1 / (2 \cdot \mathrm{depth}))^{-\mathrm{depth}} > e^{-1/2}` of what it was.

    Args:
        shape: shape of an image, (C, H, W).
        num_classes: number of outputs.
        norm: name of the method (:func:`normprop.norms.names`).
        width: multiplies the features of a token; the result is rounded to a multiple of ``heads``.
        depth: number of pairs of attention and MLP.
        features: features of a token at width 1.
        heads: heads of each attention.
        patch_size: height and width of a patch; ``None`` for the largest of 4, 2 and 1 that divides the image into 16
            patches or more (1 for images of fewer pixels).
        activation: activation of the MLPs' hidden layer.

    Returns:
        A network from (N, C, H, W) to logits (N, num_classes).

    Raises:
        ConfigError: for patches that do not fill the image, sizes below 1, or a method that has no form for features
            without space.

    Source:
        Dosovitskiy et al. 2021; size of the branches at the start: Radford et al. 2019; sums of NormProp: ours.

    Example:
        >>> vit((3, 32, 32), 10, width=0.5, depth=1)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    channels, height, breadth = shape
    for name, value in {"depth": depth, "features": features, "heads": heads}.items():
        if value < 1:
            raise ConfigError(f"vit: {name} must be a whole number of at least 1, got {value!r}")
    size = _patch_size(height, breadth, patch_size)
    tokens = (height // size) * (breadth // size)
    total = heads * max(1, round(features * width / heads))
    method = norms.method(norm)
    drop_in, sized = method.layer is not None, method.residual in (PlainResidual, Residual)
    build, add = norms.block("none" if drop_in else norm, dims=0), norms.residual(norm, dims=0)

    def normaliser() -> nn.Module:
        return norms.create(norm, total, dims=0) if drop_in else nn.Identity()

    def last(inputs: int) -> nn.Module:
        return _scaled(build(inputs, total, activation=None), (2 * depth) ** -0.5 if sized else 1.0)

    def pair() -> list[nn.Module]:
        attention = [build(total, 3 * total, activation=None), Attention(tokens, heads), last(total)]
        hidden = _EXPANSION * total
        mlp = [build(total, hidden, activation=activation), last(hidden)]
        return [add(nn.Sequential(normaliser(), *branch), activation=None) for branch in (attention, mlp)]

    embedding = _scaled(build(channels * size * size, total, activation=None), (1.0 - _POSITION_STD**2) ** 0.5)
    if isinstance(embedding, NormPropLayer):
        embedding.center = False
    network = nn.Sequential(
        Patches(size),
        embedding,
        Position(tokens, total),
        *(module for _ in range(depth) for module in pair()),
        normaliser(),
        TokenMean(tokens),
        norms.head(norm, dims=0)(total, num_classes),
    )
    return norms.finish(norm, network)


def _patch_size(height: int, width: int, wanted: int | None) -> int:
    """Check the size of a patch, or choose it."""
    if wanted is None:
        fitting = (
            p for p in _PATCH_SIZES if height % p == width % p == 0 and height * width >= _FEWEST_PATCHES * p * p
        )
        return next(fitting, 1)
    if wanted < 1 or height % wanted or width % wanted:
        raise ConfigError(
            f"vit: patch_size must divide the image's height and width, {height} and {width}, got {wanted!r}"
        )
    return wanted


@torch.no_grad()
def _scaled(block: nn.Module, scale: float) -> nn.Module:
    """Scale what a block puts out at the start."""
    for module in block.modules():
        if isinstance(module, NormPropLayer):
            module.initial_gain *= scale  # known to the sum that follows
            module.reset_parameters()
            continue
        sizes: list[Any] = [getattr(module, name) for name in ("gain", "rho", "weight") if hasattr(module, name)]
        if sizes:  # a filter's length where it has one, otherwise the filter itself or the norm's own gain
            sizes[0].mul_(scale)
    return block

"""normprop: Normalization Propagation (Arpit et al., ICML 2016) and the normalisers around it, in PyTorch.

Deep networks that train without batch statistics, at any batch size down to 1.
"""

from importlib.metadata import version

from normprop import functional, graph, models, moments, nn, norms, recipes
from normprop.errors import NormPropError
from normprop.graph import analyze, batch_dependence, convert, fold, inspect

__version__ = version("normprop")
__all__ = [
    "NormPropError",
    "__version__",
    "analyze",
    "batch_dependence",
    "convert",
    "fold",
    "functional",
    "graph",
    "inspect",
    "models",
    "moments",
    "nn",
    "norms",
    "recipes",
]

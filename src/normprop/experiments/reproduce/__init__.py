"""Figures, tables and claims of the papers, measured again by name: one file for each."""

import importlib

from normprop.errors import ConfigError
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.reproduction import Reproduction

NAMES = (
    "normprop-fig1",
    "normprop-fig2",
    "normprop-fig3",
    "normprop-fig4",
    "normprop-table1",
    "normprop-speed",
    "bjorck-lr",
    "bjorck-divergence",
    "norm-matters-decay",
    "kalman-micro-batch",
    "selu-depth",
    "autoencoder-sparsity",
    "meanfield-fisher",
    "auto-lambda",
)


def reproduce(name: str, context: Context) -> Reproduction:
    """Measure a figure, a table or a claim again.

    Args:
        name: one of ``NAMES``.
        context: scale, data and storage; trials that the storage has are not run again.

    Returns:
        Ours next to what the paper prints.

    Raises:
        ConfigError: for a name that does not exist.
        DataError: if the data cannot be read.
    """
    if name not in NAMES:
        raise ConfigError(f"no reproduction {name!r}; there are {', '.join(NAMES)}")
    module = importlib.import_module(f"normprop.experiments.reproduce.{name.replace('-', '_')}")
    found: Reproduction = module.run(context)
    return found

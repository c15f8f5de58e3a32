"""Every error that normprop raises on purpose.

Each message is one line: what is wrong, where, what was expected and what to do about it. The command line prints
that line and exits with code 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class NormPropError(Exception):
    """Base of all errors raised on purpose by normprop."""


class ConfigError(NormPropError, ValueError):
    """An argument or setting that cannot work."""


class MomentError(NormPropError, ValueError):
    """A Gaussian moment that cannot be computed to the promised accuracy."""


class GraphError(NormPropError):
    """A network that cannot be captured, or an operation in it that has no rule."""


class UnknownOperatorError(GraphError):
    """An operation in a network that no rule covers."""


class ConversionError(GraphError):
    """A network, or a layer of it, that cannot be converted or folded as asked."""


class DataError(NormPropError):
    """A data file that is missing, damaged or not what its format says."""


class CheckpointError(NormPropError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class MissingExtraError(NormPropError, ImportError):
    """An optional dependency that is not installed."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where there is none.

    Example:
        >>> first_line(ValueError("bad; see below\\nbelow")), first_line(AssertionError())
        ('bad; see below', 'AssertionError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def requires(extra: str) -> Iterator[None]:
    """Turn a failing import into an error that names the extra to install.

    Args:
        extra: name of the extra in normprop's packaging that brings the dependency.

    Raises:
        MissingExtraError: if an import inside the block fails.

    Example:
        >>> with requires("cli"):
        ...     import json
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; it comes with the extra {extra!r}: pip install 'normprop[{extra}]'"
        ) from error

"""The table of all methods and their measured facts, as a page of the documentation."""

import inspect
import re
from collections.abc import Mapping, Sequence
from types import ModuleType

from normprop import norms
from normprop.norms.facts import Info, info

HEADINGS: Mapping[str, str] = {
    "dims": "dims",
    "drop_in": "drop-in",
    "depends_on_others": "mixes samples",
    "needs_batch": "needs a batch",
    "works_at_batch_1": "runs at batch 1",
    "running_state": "running state",
    "same_in_eval": "train = eval",
    "folds": "folds",
}

_HEAD = """\
# Methods

Written by `normprop methods --markdown`; every column but the first and the last is measured by that command on a small
network of the method's blocks (`normprop.norms.info(name)`).

- **dims**: 0 linear layers, 1 to 3 convolutions.
- **drop-in**: `norms.create(name, num_features, dims)` gives a layer that stands where a batch norm stood. Every method
  has `norms.block(name, dims)`.
- **mixes samples**: in training, changing one sample changes another's output.
- **needs a batch**: cannot train on a single sample of features (one value per channel).
- **runs at batch 1**: trains on a single image without error; whether it learns is another matter.
- **running state**: a forward pass in training changes buffers.
- **train = eval**: an untrained network gives the same output in both modes.
- **folds**: in evaluation the block without activation is affine in its input: a plain layer can stand for it.
"""


def cells(facts: Info) -> list[str]:
    """Write a method's facts as the texts under :data:`HEADINGS`.

    Args:
        facts: what :func:`normprop.norms.info` gave.

    Returns:
        One text per heading.

    Example:
        >>> cells(info("batch"))
        ['0-3', 'yes', 'yes', 'yes', 'yes', 'yes', 'no', 'yes']
    """
    values = [getattr(facts, name) for name in HEADINGS]
    return [_range(value) if isinstance(value, tuple) else ("no", "yes")[value] for value in values]


def usage(name: str) -> str:
    """When to use a method, from the documentation of its module.

    Args:
        name: name of the method.

    Returns:
        The paragraphs of the module's docstring that begin with "Use" or "Do not use", joined; empty for a method
        registered from elsewhere.

    Example:
        >>> usage("weight").split(".")[0]
        'Use it when batches are small and the network is shallow'
    """
    modules = {module for module in vars(norms).values() if isinstance(module, ModuleType)}
    texts = [inspect.getdoc(module) or "" for module in modules if name in getattr(module, "METHODS", {})]
    paragraphs = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    text = " ".join(part for part in paragraphs if re.match("(Use|Do not use) ", part))
    return re.sub(":[a-z]+:`", "`", text).replace("``", "`")


def markdown() -> str:
    """Write the page.

    Returns:
        Markdown with a table of all registered methods and when to use each.
    """
    names = norms.names()
    every = [info(name) for name in names]
    head = ["method", *HEADINGS.values(), "paper"]
    rows = [[f"`{facts.name}`", *cells(facts), facts.paper] for facts in every]
    parts = [_HEAD, "\n".join(_rows([head, ["---"] * len(head), *rows])) + "\n"]
    limits = [f"- `{facts.name}`: {', '.join(facts.cannot)}" for facts in every if facts.cannot]
    if limits:
        parts.append("Not kept of the contracts that all others keep:\n\n" + "\n".join(limits) + "\n")
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(usage(name), []).append(f"`{name}`")
    advice = [f"- {', '.join(group)}: {text}" for text, group in groups.items() if text]
    parts.append("## When to use which\n\n" + "\n".join(advice) + "\n")
    return "\n".join(parts)


def _rows(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def _range(dims: tuple[int, ...]) -> str:
    """0-3 for a run of numbers, else a list."""
    run = tuple(range(dims[0], dims[-1] + 1)) == dims and len(dims) > 1
    return f"{dims[0]}-{dims[-1]}" if run else ", ".join(map(str, dims))

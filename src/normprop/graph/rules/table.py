"""The rules as a table, for the documentation."""

import sys
from collections import defaultdict
from itertools import chain

from normprop.graph.rules.registry import Rule, module_rule_of, modules, operator_rule, operators


def markdown() -> str:
    """All rules of the library by the kind of operator: operators or modules, and the docstring's first line.

    Example:
        >>> print(markdown()[:20])
        ## Sums, products an
    """
    every = chain(
        ((f"`{name}`", operator_rule(name)) for name in operators()),
        ((f"`{kind.__module__}.{kind.__qualname__}`", module_rule_of(kind)) for kind in modules()),
    )
    targets: dict[tuple[str, str], list[str]] = defaultdict(list)
    for target, function in every:
        if function is not None and _ours(function):
            targets[function.__module__, function.__name__].append(target)
    lines: list[str] = []
    last = ""
    for (file, name), names in sorted(targets.items()):
        module = sys.modules[file]
        if file != last:
            title = (module.__doc__ or file).splitlines()[0].rstrip(".")
            lines += [*([""] if last else []), f"## {title}", "", "| operators and modules | rule |", "| --- | --- |"]
            last = file
        text = (getattr(module, name).__doc__ or "").splitlines()[0]
        lines.append(f"| {' '.join(names)} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _ours(function: Rule) -> bool:
    """Whether a rule is part of the library, not a user's."""
    module = sys.modules.get(function.__module__)
    return function.__module__.startswith("normprop.") and getattr(module, function.__name__, None) is function

"""Rules of moments: one file per kind of operator."""

from normprop.graph.rules import arithmetic, elementwise, linear, movement, normalisers, pooling, random
from normprop.graph.rules.registry import Call, module_rule, modules, operator_rule, operators, rule

__all__ = [
    "Call",
    "arithmetic",
    "elementwise",
    "linear",
    "module_rule",
    "modules",
    "movement",
    "normalisers",
    "operator_rule",
    "operators",
    "pooling",
    "random",
    "rule",
]

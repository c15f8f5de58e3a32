"""Moments of activations and pools of Gaussian variables: mathematics only, no modules."""

from normprop.moments import maps, pool
from normprop.moments.rule import Activation, Rule, of, resolve
from normprop.moments.value import Moments, Value

__all__ = ["Activation", "Moments", "Rule", "Value", "maps", "of", "pool", "resolve"]

"""Whole models: capture, rules of moments, plan, conversion, inspection, folding."""

from normprop.graph.batch_dependence import batch_dependence
from normprop.graph.convert import convert
from normprop.graph.fold import fold
from normprop.graph.inspect import inspect
from normprop.graph.plan import analyze
from normprop.graph.rules import rule

__all__ = ["analyze", "batch_dependence", "convert", "fold", "inspect", "rule"]

"""Whole models: capture, rules of moments, plan, conversion, inspection, folding."""

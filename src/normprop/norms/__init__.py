"""Normalisers by name: ``block(name, dims)`` builds linear map, normaliser and activation as one module."""

from functools import partial

from normprop import nn, recipes
from normprop.norms import classic, normprop, plain, weight
from normprop.norms.registry import Method, block, head, method, names, register, residual

__all__ = ["Method", "block", "head", "method", "names", "register", "residual"]

_linear_head = partial(plain.block, activation=None)

register("none", Method(plain.block, plain.linear_map, plain.PlainResidual))
for _name, _recipe in {"normprop": recipes.DEFAULT, "normprop-paper": recipes.PAPER}.items():
    register(_name, Method(partial(normprop.block, _recipe), partial(normprop.head, _recipe), nn.Residual))
for _name, _norm in {
    "batch": classic.batch_norm,
    "group": classic.group_norm,
    "layer": classic.layer_norm,
    "instance": classic.instance_norm,
}.items():
    register(_name, Method(plain.with_norm(_norm), plain.linear_map, plain.PlainResidual))
register("weight", Method(weight.block, partial(weight.block, activation=None), plain.PlainResidual))

"""Normalisers by name: ``block(name, dims)`` builds linear map, normaliser and activation as one module."""

from normprop.norms import classic, normprop, plain, weight
from normprop.norms.registry import Method, block, create, finish, head, method, names, register, residual

__all__ = ["Method", "block", "create", "finish", "head", "method", "names", "register", "residual"]

for _paper in (plain, normprop, classic, weight):
    for _name, _method in _paper.METHODS.items():
        register(_name, _method)

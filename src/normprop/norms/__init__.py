"""Normalisers by name: ``block(name, dims)`` builds linear map, normaliser and activation as one module."""

from normprop.norms import (
    batch_group,
    batch_renorm,
    batch_variants,
    bounded_weight,
    classic,
    cross_iteration,
    dynamic_tanh,
    evonorm,
    filter_response,
    fixup,
    instance_enhancement,
    kalman,
    kernel_shaping,
    lp_batch,
    normprop,
    plain,
    proxy,
    recurrent,
    regbn,
    rms,
    scaled_weight_standardization,
    selu,
    tailored,
    weight,
    weight_standardization,
)
from normprop.norms.facts import Info, info
from normprop.norms.registry import Method, block, create, finish, head, method, names, register, residual

__all__ = ["Info", "Method", "block", "create", "finish", "head", "info", "method", "names", "register", "residual"]

for _paper in (
    plain,
    normprop,
    classic,
    weight,
    kalman,
    lp_batch,
    bounded_weight,
    selu,
    rms,
    regbn,
    cross_iteration,
    instance_enhancement,
    batch_group,
    proxy,
    weight_standardization,
    scaled_weight_standardization,
    batch_renorm,
    fixup,
    tailored,
    kernel_shaping,
    dynamic_tanh,
    filter_response,
    evonorm,
    batch_variants,
    recurrent,
):
    for _name, _method in _paper.METHODS.items():
        register(_name, _method)

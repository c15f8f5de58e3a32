"""Small reference networks, written once on ``norms.block`` so that every method can be put in."""

from normprop.models.create import create
from normprop.models.mlp import mlp
from normprop.models.nin import nin
from normprop.models.resnet import resnet

__all__ = ["create", "mlp", "nin", "resnet"]

"""Small reference networks, written once on ``norms.block`` so that every method can be put in."""

from normprop.models.create import create
from normprop.models.lstm import lstm
from normprop.models.mlp import mlp
from normprop.models.nin import nin
from normprop.models.resnet import resnet, resnet18
from normprop.models.two_view import two_view
from normprop.models.unet import unet
from normprop.models.vit import vit

__all__ = ["create", "lstm", "mlp", "nin", "resnet", "resnet18", "two_view", "unet", "vit"]

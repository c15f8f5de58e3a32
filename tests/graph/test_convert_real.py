"""Published models convert, fresh and exactly: the smallest of every architecture that the libraries list."""

import torch
from torch import Tensor

import normprop
from tests.graph.families import look_trained


def tensors(output: object) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def test_a_published_model_converts(real_case):
    model, x = real_case.model, real_case.args
    plan = normprop.analyze(model, x)
    net = plan.apply()
    assert not plan.report.unknown
    assert plan.report.counts.keys() <= {"absorbed", "predicted", "kept"}
    never = [site for site in plan.report.sites if site.action == "kept"]
    assert all(site.reason == "the example input never reaches it" for site in never)
    loss = sum(output.square().mean() for output in tensors(net.train()(*(part[:1] for part in x))))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)

    look_trained(model, torch.Generator().manual_seed(0))
    plan = normprop.analyze(model, x, weights="exact")
    plan.apply()
    assert plan.report.difference < 1e-12

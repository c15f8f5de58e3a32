import pytest
import torch
from torch import nn

from normprop.graph.rules import operators, table
from normprop.graph.rules.registry import modules
from normprop.graph.signal import Signal
from normprop.moments import Moments
from tests.graph.rules.monte_carlo import compare


def test_table_names_every_rule_with_a_formula():
    text = table.markdown()
    assert all(f"`{name}`" in text for name in operators())
    assert all(kind.__qualname__ in text for kind in modules())
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(len(line.split("|")[-2].strip()) > 20 for line in rows)


@pytest.mark.parametrize("wrong", [{"mean": 0.05}, {"var": 1.05}])
def test_the_comparison_can_fail(wrong):
    value = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = {"mean": 0.0, "var": 1.0}
    assert not compare(Signal.of(**law, shape=(1, 3)), value, var=0.0, mean=0.0)
    assert compare(Signal.of(**(law | wrong), shape=(1, 3)), value, var=0.0, mean=0.0)


def test_moments_are_differentiable_and_work_in_float32():
    from normprop.graph.capture import capture
    from normprop.graph.propagate import evaluate, input_signal

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    graph = capture(model, torch.randn(2, 3, 8, 8))
    values = {0: input_signal(graph.nodes[0], Moments(0.5, 2.0))}
    for node in graph.nodes[1:]:
        values[node.index] = evaluate(node, graph.state, model.get_submodule, values)
    last = values[graph.outputs[0]]
    assert last.var.dtype == torch.float32
    (last.mean.sum() + last.var.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model[1].parameters())

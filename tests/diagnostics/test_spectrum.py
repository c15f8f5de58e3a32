import math

import torch

from normprop.diagnostics.spectrum import lanczos


def test_lanczos_matches_the_moments_of_the_density_and_its_residual_holds():
    root = torch.randn(2, 30, 30, dtype=torch.float64)
    matrix, start = root @ root.mT, torch.randn(2, 30, dtype=torch.float64)
    nodes, weights, residual = lanczos(lambda v: (matrix @ v[..., None])[..., 0], start, 6)
    unit = start / start.norm(dim=1, keepdim=True)
    power = unit
    for k in range(12):  # Gauss: exact to degree 2 * 6 - 1
        expected = (unit * power).sum(1)
        assert torch.allclose((weights * nodes**k).sum(1), expected, rtol=1e-8), k
        power = (matrix @ power[..., None])[..., 0]
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert bool(((eigenvalues - nodes[:, -1:]).abs().amin(1) <= residual).all())
    assert bool((residual > 0).all())
    nodes, _, residual = lanczos(lambda v: (matrix @ v[..., None])[..., 0], start, 200, tolerance=1e-6)
    assert nodes.shape[1] < 30
    assert torch.allclose(nodes[:, -1], eigenvalues[:, -1], rtol=1e-10)


def test_lanczos_survives_breakdown_and_refuses_what_is_not_finite():
    scale = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    nodes, weights, residual = lanczos(lambda v: v * scale, torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0]]), 3)
    assert (weights * nodes).sum(1).tolist() == [2.0, 0.0]
    assert residual.tolist() == [0.0, 0.0]
    nodes, _, residual = lanczos(lambda v: v * math.nan, torch.ones(1, 3), 3)
    assert math.isnan(float(nodes[0, -1]))
    assert math.isnan(float(residual))

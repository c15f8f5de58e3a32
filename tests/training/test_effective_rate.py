import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normprop.errors import CheckpointError, ConfigError
from normprop.training import schedules
from normprop.training.effective_rate import mimic_decay, schedule_norms
from normprop.training.filter_norms import NormRecorder, filter_norms, load_norms, save_norms

STEPS = 200


def network():
    """Two filter banks, each followed by a batch norm without gain; eps is so small that only direction counts."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4, eps=1e-300),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, bias=False),
        nn.BatchNorm2d(3, eps=1e-300),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()


def weights(model):
    return {name: p for name, p in model.named_parameters() if p.ndim == 4}


def train(model, optimizer, steps=STEPS, schedule=lambda step: 1.0):
    """Regression onto a fixed function of the input; the batches are the same in every run."""
    generator = torch.Generator().manual_seed(1)
    peak = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=generator)
        target = torch.stack([x[:, 0].mean((1, 2)), x[:, 1].amax((1, 2)), (x[:, 0] * x[:, 1]).mean((1, 2))], 1)
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr * schedule(step)
        optimizer.zero_grad()
        (model(x) - target).square().sum(1).mean().backward()
        optimizer.step()


def optimizer_of(model, lr=0.5, decay=0.0, **options):
    own = list(weights(model).values())
    rest = [p for p in model.parameters() if not any(p is q for q in own)]
    groups = [{"params": own, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, **options)


def angle(model, reference):
    """Largest 1 - cos between filters."""
    return max(
        float((1 - F.cosine_similarity(a.detach().flatten(1), b.detach().flatten(1), dim=1)).max())
        for a, b in zip(weights(model).values(), weights(reference).values(), strict=True)
    )


def recorded(schedule=lambda step: 1.0, lr=0.5, decay=0.05, **options):
    """A run with decay and its lengths."""
    model = network()
    optimizer = optimizer_of(model, lr, decay, **options)
    recorder = NormRecorder(optimizer, weights(model))
    train(model, optimizer, schedule=schedule)
    return model, recorder.norms()


def mimicked(norms, decay=0.05, lr=0.5, schedule=lambda step: 1.0, **options):
    model = network()
    optimizer = optimizer_of(model, lr, **options)
    mimic_decay(optimizer, weights(model), norms, decay)
    train(model, optimizer, schedule=schedule)
    return model


def test_recorder_notes_the_lengths_before_each_step():
    model = network()
    optimizer = optimizer_of(model)
    recorder = NormRecorder(optimizer, weights(model))
    assert recorder.norms() == {}
    expected = []
    for seed in range(3):
        expected.append(model[0].weight.detach().square().sum((1, 2, 3)).sqrt())
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(3, 2, 6, 6, dtype=torch.float64))[0, 0].backward()
        optimizer.step()
    recorder.remove()
    optimizer.step()
    assert recorder.norms()["0.weight"].shape == (3, 4)
    torch.testing.assert_close(recorder.norms()["0.weight"], torch.stack(expected))


def test_plain_sgd_has_the_directions_of_decay():
    """Without the correction the directions are far apart, with the paper's rule near, with the exact one the same."""
    decayed, norms = recorded()
    plain = network()
    train(plain, optimizer_of(plain))
    assert angle(plain, decayed) > 1e-2

    ours = mimicked(norms)
    # The paper's rule c^2 is ours with decay 0 in the denominator.
    papers = mimicked(norms, decay=0.0)
    # Rounding is amplified by the training itself, so 1e-16 does not stay that small over 200 steps.
    assert angle(ours, decayed) < 1e-10
    assert angle(papers, decayed) > 1e3 * max(angle(ours, decayed), 1e-12)
    # Not the lengths: without decay they only grow, here by the factor that decay has taken off.
    for name, weight in weights(ours).items():
        assert (filter_norms(weight) > 10 * norms[name][-1]).all()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), decayed(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", [schedules.constant, lambda step: schedules.cosine(step, STEPS, 20)])
def test_momentum_has_its_own_exact_form(schedule):
    decayed, norms = recorded(schedule, lr=0.05, decay=0.05, momentum=0.9)
    ours = mimicked(norms, 0.05, 0.05, schedule, momentum=0.9)
    assert angle(ours, decayed) < 1e-10


def test_correction_follows_the_learning_rate_of_each_step():
    schedule = lambda step: schedules.linear(step, STEPS, 20)  # noqa: E731
    decayed, norms = recorded(schedule)
    assert angle(mimicked(norms, schedule=schedule), decayed) < 1e-10
    assert angle(mimicked(norms), decayed) > 1e-4


def test_parameters_that_are_not_named_are_left_alone():
    model = network()
    optimizer = optimizer_of(model)
    norms = {"0.weight": 0.1 * filter_norms(model[0].weight).expand(STEPS, 4)}
    mimic_decay(optimizer, {"0.weight": model[0].weight}, norms, decay=0.0)
    reference = network()
    train(model, optimizer, steps=1)
    train(reference, optimizer_of(reference), steps=1)
    assert torch.equal(model[3].weight, reference[3].weight)
    assert torch.equal(model[1].bias, reference[1].bias)
    step, plain = model[0].weight - network()[0].weight, reference[0].weight - network()[0].weight
    torch.testing.assert_close(step, 100 * plain)


def test_removed_hooks_leave_the_optimiser_alone():
    model, reference = network(), network()
    optimizer = optimizer_of(model)
    norms = {name: 0.1 * filter_norms(weight).expand(STEPS, -1) for name, weight in weights(model).items()}
    for handle in (
        mimic_decay(optimizer, weights(model), norms, decay=0.0),
        schedule_norms(optimizer, weights(model), schedules.constant),
    ):
        handle.remove()
    train(model, optimizer, steps=3)
    train(reference, optimizer_of(reference), steps=3)
    assert angle(model, reference) < 1e-15


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_norm_schedule_does_what_a_learning_rate_schedule_does(momentum):
    """Held lengths and a scheduled rate, or a fixed rate and scheduled lengths: the same directions.

    The gain and bias of the batch norms follow the rate in one run and not in the other, so they are frozen.
    """

    def run(rate_schedule, norm_schedule, steps=STEPS):
        model = network()
        for p in model.parameters():
            p.requires_grad_(p.ndim == 4)
        optimizer = torch.optim.SGD(weights(model).values(), lr=0.05, momentum=momentum)
        schedule_norms(optimizer, weights(model), norm_schedule)
        train(model, optimizer, steps, rate_schedule)
        return model

    def schedule(step):
        return schedules.cosine(step, STEPS, 20)

    start = network()
    by_rate, by_norm = run(schedule, schedules.constant), run(schedules.constant, schedule)
    assert angle(by_rate, start) > 1e-2
    assert angle(run(schedules.constant, schedules.constant), by_rate) > 1e-4
    assert angle(by_norm, by_rate) < 1e-10
    half = run(schedules.constant, schedule, steps=100)
    for name, weight in weights(half).items():
        expected = filter_norms(weights(start)[name]) / schedule(100) ** 0.5
        torch.testing.assert_close(filter_norms(weight), expected)
        # After the last step the schedule is 0, and lengths stay those of the last step but for its own update.
        last = filter_norms(weights(start)[name]) / schedule(STEPS - 1) ** 0.5
        torch.testing.assert_close(filter_norms(weights(by_norm)[name]), last, rtol=1e-2, atol=0)


def test_running_averages_follow_the_lengths():
    """A network in evaluation is the same before and after its filters become ten times as long."""
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for told in (True, False):
        model = network()
        optimizer = optimizer_of(model, lr=0.05)
        followers = {"0.weight": model[1], "3.weight": model[4]} if told else None
        schedule_norms(optimizer, weights(model), lambda step: 1.0 if step < 20 else 0.01, followers=followers)
        train(model, optimizer, steps=19)
        before = model.eval()(x)
        optimizer.zero_grad()
        optimizer.step()
        torch.testing.assert_close(filter_norms(model[0].weight), 10 * filter_norms(network()[0].weight))
        assert torch.allclose(model(x), before) == told


def test_norm_schedule_can_follow_a_recorded_run():
    """With its lengths and its schedule the effective step is that of the recorded run."""

    def schedule(step):
        return schedules.halving(step, 50)

    norms = recorded(schedule)[1]
    model = network()
    optimizer = optimizer_of(model)
    schedule_norms(optimizer, weights(model), schedule, norms)
    seen = NormRecorder(optimizer, weights(model))
    train(model, optimizer)
    for name, value in seen.norms().items():
        factor = torch.tensor([schedule(step) for step in range(STEPS)], dtype=torch.float64).unsqueeze(1)
        torch.testing.assert_close(0.5 / value**2, 0.5 * factor / norms[name] ** 2)
    with pytest.raises(ConfigError, match="the record has 200 steps and this is step 200"):
        optimizer.step()


def test_files(tmp_path):
    norms = {"0.weight": torch.rand(5, 3), "3.linear.weight": torch.rand(5, 2, dtype=torch.float64)}
    path = save_norms(tmp_path / "deep" / "norms.npz", norms)
    found = load_norms(path)
    assert found.keys() == norms.keys()
    assert all(torch.equal(found[name], norms[name]) and found[name].dtype == norms[name].dtype for name in norms)
    assert list(path.parent.iterdir()) == [path]


def broken_files():
    yield "missing", lambda path: None
    yield "empty", lambda path: path.write_bytes(b"")
    yield "text", lambda path: path.write_text("norms")
    yield "pickle", lambda path: np.savez(path, a=np.array([{}], dtype=object))
    yield "cut", lambda path: (np.savez(path, a=np.ones((50, 3))), path.write_bytes(path.read_bytes()[:300]))
    yield "shape", lambda path: np.savez(path, a=np.ones(3))
    yield "words", lambda path: np.savez(path, a=np.array([["a"]]))
    yield "whole numbers", lambda path: np.savez(path, a=np.ones((2, 3), dtype=int))
    yield "not finite", lambda path: np.savez(path, a=np.array([[np.nan]]))
    yield "negative", lambda path: np.savez(path, a=-np.ones((2, 3)))
    yield "array", lambda path: path.write_bytes(_npy())


def _npy():
    file = io.BytesIO()
    np.save(file, np.ones((2, 3)))
    return file.getvalue()


@pytest.mark.parametrize(("kind", "make"), list(broken_files()), ids=[kind for kind, _ in broken_files()])
def test_broken_files_are_one_line(tmp_path, kind, make):
    path = tmp_path / "norms.npz"
    make(path)
    with pytest.raises(CheckpointError, match=r"norms\.npz: ") as caught:
        load_norms(path)
    assert "\n" not in str(caught.value)


def test_errors():
    model = network()
    optimizer = optimizer_of(model)
    own = weights(model)
    norms = {name: filter_norms(weight).expand(2, -1) for name, weight in own.items()}
    with pytest.raises(ConfigError, match="other: not updated by this optimizer"):
        NormRecorder(optimizer, {"other": nn.Parameter(torch.ones(2, 2))})
    with pytest.raises(ConfigError, match=r"recorded norms are of nothing; expected 0\.weight"):
        mimic_decay(optimizer, own, {}, 0.1)
    with pytest.raises(ConfigError, match=r"0\.weight have shape \(2, 3\); expected \(steps, 4\)"):
        mimic_decay(optimizer, own, norms | {"0.weight": torch.ones(2, 3)}, 0.1)
    with pytest.raises(ConfigError, match="not all above 0"):
        schedule_norms(optimizer, own, schedules.constant, norms | {"0.weight": torch.zeros(2, 4)})
    with pytest.raises(ConfigError, match=r"decays by 0\.1; its"):
        mimic_decay(optimizer_of(model, decay=0.1), own, norms, 0.1)
    mimic_decay(optimizer, own, norms, decay=2.5)
    with pytest.raises(ConfigError, match=r"0\.weight: rate 0\.5 times decay 2\.5 must be below .* = 1,"):
        train(model, optimizer, steps=1)
    optimizer = optimizer_of(model)
    schedule_norms(optimizer, own, lambda step: 1 - step)
    train(model, optimizer, steps=1)
    with pytest.raises(ConfigError, match="the schedule is 0 at step 1"):
        train(model, optimizer, steps=1)

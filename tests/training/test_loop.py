import copy
import math
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normprop.data import Dataset, Split
from normprop.errors import ConfigError
from normprop.models import mlp, resnet
from normprop.nn import DataNorm, NormPropLayer
from normprop.training import TrainConfig
from normprop.training.loop import fit

CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.05, accelerator="cpu")


def network(norm: str = "normprop") -> nn.Module:
    return mlp((1, 4, 4), 3, norm=norm, depth=2, hidden_features=16)


def parameters(result) -> list[torch.Tensor]:
    return [p.detach() for p in result.model.parameters()]


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(second), strict=True))


class Recorder(nn.Module):
    """Passes its input on and keeps a copy of each training batch."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.batches.append(x.detach().clone())
        return x


@pytest.mark.parametrize(
    ("optimizer", "batch_size", "momentum"), [("sgd", 2, 0.9), ("muon", 2, 0.975), ("muon", 8, 0.9)]
)
def test_momentum_not_given_suits_optimizer_and_batch_size(blobs, optimizer, batch_size, momentum):
    config = replace(CONFIG, epochs=1, optimizer=optimizer, batch_size=batch_size, lr=0.01)
    assert equal(fit(network, blobs, config), fit(network, blobs, replace(config, momentum=momentum)))


def test_learns_and_reports(blobs):
    records = []
    result = fit(network, blobs, CONFIG, callback=records.append)
    assert result.status == "complete"
    assert result.reason is None
    assert result.curve == records
    assert [record.epoch for record in records] == [0, 1, 2]
    # 60 images in batches of 8.
    assert [record.step for record in records] == [0, 8, 16]
    assert result.steps == 16
    assert records[0].train_loss is None
    assert records[2].train_loss < records[1].train_loss < math.log(3) + 0.5
    assert records[2].validation_error < 0.1 < records[0].validation_error
    assert records[2].test_error < 0.1
    # Peak 0.05 after a warm-up of round(0.1 * 16) = 2 steps; the last of 14 decaying steps is at 1 / 14.
    assert [record.lr for record in records] == pytest.approx([0.05 / 3, 0.05 * 9 / 14, 0.05 / 14])
    assert 0 == records[0].seconds < records[1].seconds < records[2].seconds == result.seconds
    assert [layer.layer for layer in records[0].layers] == ["1", "2", "3"]
    # Before training, a NormProp layer's output has about mean 0 and standard deviation 1.
    assert all(abs(layer.mean) < 0.5 and 0.5 < layer.std < 1.5 for layer in records[0].layers[:2])
    assert not result.model.training


def test_errors_are_those_of_the_returned_model(blobs):
    result = fit(network, blobs, CONFIG)
    for name, split in (("validation_error", blobs.validation), ("test_error", blobs.test)):
        wrong = result.model(split.images).argmax(1) != split.labels
        assert getattr(result.curve[-1], name) == pytest.approx(wrong.float().mean().item())


def test_same_seed_same_bits_and_other_seed_other_run(blobs):
    first, second = fit(network, blobs, CONFIG), fit(network, blobs, CONFIG)
    assert equal(first, second)
    assert [r.train_loss for r in first.curve] == [r.train_loss for r in second.curve]
    assert not equal(first, fit(network, blobs, TrainConfig(**{**vars(CONFIG), "seed": 1})))


def batches_seen(blobs, norm="normprop", **settings):
    recorder = Recorder()
    config = TrainConfig(**{**vars(CONFIG), "data_norm": "none", **settings})
    fit(lambda: nn.Sequential(recorder, nn.Dropout(0.1), network(norm)), blobs, config)
    return recorder.batches


def test_every_method_sees_the_same_batches(blobs):
    first, second = (batches_seen(blobs, norm, augment=("crop", "flip")) for norm in ("normprop", "batch"))
    assert len(first) == 16
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_epoch_takes_each_sample_once_in_a_new_order(blobs):
    batches = batches_seen(blobs)
    one, two = torch.cat(batches[:8]), torch.cat(batches[8:])
    expected = sorted(blobs.train.images.flatten(1).tolist())
    assert sorted(one.flatten(1).tolist()) == sorted(two.flatten(1).tolist()) == expected
    assert not torch.equal(one, two)


@pytest.mark.parametrize(("samples", "sizes"), [(17, [8, 9]), (18, [8, 8, 2]), (16, [8, 8]), (5, [5]), (1, [1])])
def test_no_sample_is_lost_and_none_is_alone(blobs, samples, sizes):
    recorder = Recorder()
    data = Dataset("blobs", blobs.classes, blobs.train[:samples], blobs.test, blobs.validation)
    config = TrainConfig(**{**vars(CONFIG), "epochs": 1, "data_norm": "none"})
    result = fit(lambda: nn.Sequential(recorder, network()), data, config)
    assert [len(batch) for batch in recorder.batches] == sizes
    assert result.steps == len(sizes)


def test_batch_size_one(blobs):
    config = TrainConfig(**{**vars(CONFIG), "batch_size": 1, "lr": 0.01})
    result = fit(network, blobs, config)
    assert result.steps == 120
    assert result.curve[-1].test_error < 0.1


def one_step(build, data, **settings):
    """Model before and after one update on all training images."""
    options = {"epochs": 1, "batch_size": 1000, "schedule": "constant", "data_norm": "none", "weight_decay": 0.0}
    config = TrainConfig(**{**vars(CONFIG), **options, **settings})
    torch.manual_seed(config.seed)
    return build(), fit(build, data, config).model


@pytest.mark.parametrize("norm", ["normprop", "batch"])
def test_channels_last_changes_the_layout_alone(blobs, norm):
    results = {}
    for channels_last in (False, True):
        config = TrainConfig(**{**vars(CONFIG), "precision": "64-true", "channels_last": channels_last})
        results[channels_last] = fit(lambda: resnet(8, 1, 3, norm=norm, width=0.25), blobs, config)
        kernels = [p for p in parameters(results[channels_last]) if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert kernels
        for kernel in kernels:
            assert kernel.is_contiguous() != channels_last
            assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
    for first, last in zip(*map(parameters, results.values()), strict=True):
        torch.testing.assert_close(last, first, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("clip_grad", [None, 1e6])
def test_gradients_clipped_by_unit(blobs, clip_grad):
    """Each row of the weight moves by at most lr times the clip times its length; the bias is left alone."""
    settings = {"lr": 0.3, "momentum": 0.0, "clip_grad": clip_grad}

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    before, free = one_step(build, blobs, **settings)
    _, clipped = one_step(build, blobs, clip_unit=0.1, **settings)
    weight = before[1].weight
    step = (free[1].weight - weight).detach()
    size, largest = step.norm(dim=1), 0.3 * 0.1 * weight.detach().norm(dim=1)
    assert (size > largest).any()
    expected = weight + step * (largest / size).clamp_max(1.0).unsqueeze(1)
    torch.testing.assert_close(clipped[1].weight, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(clipped[1].bias, free[1].bias, rtol=0, atol=0)


def test_one_update_against_the_textbook(blobs):
    """Label-smoothed cross entropy from its definition, clipped by hand, decay on the weights alone."""
    before, after = one_step(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
        blobs,
        lr=0.3,
        label_smoothing=0.2,
        clip_grad=0.05,
        weight_decay=0.1,
    )
    x = blobs.train.images.flatten(1).double().numpy()
    weight, bias = (p.detach().double().numpy() for p in before.parameters())
    logits = x @ weight.T + bias
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = 0.8 * np.eye(3)[blobs.train.labels.numpy()] + 0.2 / 3
    delta = (softmax - target) / len(x)
    gradients = [delta.T @ x, delta.sum(0)]
    norm = math.sqrt(sum((g**2).sum() for g in gradients))
    assert norm > 0.05
    gradients = [g * 0.05 / norm for g in gradients]
    new_weight, new_bias = after.parameters()
    np.testing.assert_allclose(new_weight.detach(), weight - 0.3 * (gradients[0] + 0.1 * weight), atol=2e-6)
    np.testing.assert_allclose(new_bias.detach(), bias - 0.3 * gradients[1], atol=2e-6)


def test_train_loss_is_the_mean_over_samples(blobs):
    """With a vanishing rate the model stays, so the running mean is its loss on the training set."""
    config = TrainConfig(**{**vars(CONFIG), "epochs": 1, "lr": 1e-12, "unit_norm": False, "label_smoothing": 0.1})
    result = fit(network, blobs, config)
    log_softmax = result.model(blobs.train.images).detach().double().log_softmax(1)
    picked = log_softmax[torch.arange(60), blobs.train.labels]
    expected = -(0.9 * picked + 0.1 * log_softmax.mean(1)).mean().item()
    assert result.curve[1].train_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("unit_norm", [True, False])
def test_unit_norm_is_a_setting(blobs, unit_norm):
    result = fit(network, blobs, TrainConfig(**{**vars(CONFIG), "unit_norm": unit_norm}))
    lengths = torch.cat([m.weight.norm(dim=1) for m in result.model.modules() if isinstance(m, NormPropLayer)])
    assert bool((lengths - 1).abs().max() < 1e-5) is unit_norm


def test_data_norm_takes_the_training_statistics_per_element(blobs):
    uint8 = Dataset(
        "bytes",
        blobs.classes,
        *(Split((s.images * 255).byte(), s.labels) for s in (blobs.train, blobs.test, blobs.validation)),
    )
    model = fit(network, uint8, CONFIG).model
    assert isinstance(model[0], DataNorm)
    scaled = uint8.train.images.double().numpy() / 255
    np.testing.assert_allclose(model[0].mean, scaled.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model[0].var, scaled.var(0), rtol=1e-4)
    assert not isinstance(fit(network, blobs, TrainConfig(**{**vars(CONFIG), "data_norm": "none"})).model[0], DataNorm)
    assert fit(network, blobs, TrainConfig(**{**vars(CONFIG), "data_norm": "batch"})).model[0].mode == "batch"


def test_augmentation_changes_the_run_and_repeats(blobs):
    config = TrainConfig(**{**vars(CONFIG), "augment": ("flip",)})
    first = fit(network, blobs, config)
    assert equal(first, fit(network, blobs, config))
    assert not equal(first, fit(network, blobs, CONFIG))


def test_bf16_mixed_trains_with_float32_weights_and_an_exact_input(blobs):
    result = fit(network, blobs, TrainConfig(**{**vars(CONFIG), "precision": "bf16-mixed", "epochs": 4}))
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert result.curve[-1].test_error < 0.1
    seen = []

    class Peek(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    fit(lambda: nn.Sequential(Peek(), network()), blobs, TrainConfig(**{**vars(CONFIG), "precision": "bf16-mixed"}))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_true_precisions(blobs, precision, dtype):
    result = fit(network, blobs, TrainConfig(**{**vars(CONFIG), "precision": precision, "epochs": 4}))
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.curve[-1].train_loss < result.curve[1].train_loss


def test_divergence_is_reported_with_its_step(blobs):
    class Breaks(nn.Module):
        """Gives NaN from its 11th training batch on."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            if self.training and torch.is_grad_enabled():
                self.calls += 1
            return x * math.nan if self.calls >= 11 else x

    records = []
    result = fit(lambda: nn.Sequential(Breaks(), network()), blobs, CONFIG, callback=records.append)
    assert (result.status, result.reason) == ("diverged", "loss was nan at step 11")
    assert [record.epoch for record in result.curve] == [record.epoch for record in records] == [0, 1]


def test_too_high_a_rate_diverges(blobs):
    config = TrainConfig(**{**vars(CONFIG), "epochs": 20, "lr": 1e4, "unit_norm": False})
    result = fit(partial(network, "none"), blobs, config)
    assert result.status == "diverged"
    assert result.reason.startswith("loss ")
    assert result.steps < 160


def test_a_last_update_that_breaks_the_weights_is_noticed(blobs):
    """The loss before the update is finite; only the outputs after it tell."""
    options = {"epochs": 1, "batch_size": 1000, "schedule": "constant", "lr": 1e38, "unit_norm": False}
    result = fit(partial(network, "none"), blobs, TrainConfig(**{**vars(CONFIG), **options}))
    assert (result.status, result.reason) == ("diverged", "outputs were not finite after step 1")
    assert len(result.curve) == 2


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_norm_on_one_sample_is_refused_before_any_training(blobs, batch_size):
    """The error is torch's own; a last batch of a single sample would not hurt."""
    records = []
    data = Dataset("blobs", blobs.classes, blobs.train[:17], blobs.test, blobs.validation)
    config = TrainConfig(**{**vars(CONFIG), "batch_size": batch_size})
    if batch_size == 1:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
            fit(partial(network, "batch"), data, config, callback=records.append)
        assert type(caught.value) is ValueError
        assert records == []
    else:
        assert fit(partial(network, "batch"), data, config).status == "complete"


def test_rehearsal_leaves_no_trace(blobs):
    """Neither in batch statistics nor in the random numbers that dropout draws."""
    states = []

    class Peek(nn.Module):
        def forward(self, x):
            if self.training and torch.is_grad_enabled():
                states.append(torch.get_rng_state())
            return x

    def build():
        model = nn.Sequential(
            nn.Flatten(), Peek(), nn.BatchNorm1d(16, momentum=None), nn.Dropout(0.5), nn.Linear(16, 3)
        )
        states.append(torch.get_rng_state())
        return model

    result = fit(build, blobs, TrainConfig(**{**vars(CONFIG), "data_norm": "none", "epochs": 1}))
    assert result.model[2].num_batches_tracked == 8
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])


def test_callers_random_numbers_are_not_disturbed(blobs):
    def draw():
        return random.random(), np.random.random(), torch.rand(()).item()

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    fit(network, blobs, CONFIG)
    assert draw() == expected


def test_a_callback_that_raises_ends_the_run(blobs):
    def stop(record):
        if record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(network, blobs, CONFIG, callback=stop)


def test_flat_features(blobs):
    flat = Dataset(
        "flat",
        blobs.classes,
        *(Split(s.images.flatten(1), s.labels) for s in (blobs.train, blobs.test, blobs.validation)),
    )
    assert fit(network, flat, CONFIG).curve[-1].test_error < 0.1
    with pytest.raises(ConfigError, match=r"^augment needs images \(C, H, W\), but samples of flat have shape \(16,\)"):
        fit(network, flat, TrainConfig(**{**vars(CONFIG), "augment": ("flip",)}))


def test_what_does_not_fit_data_or_machine(blobs):
    with pytest.raises(ConfigError, match=r"^blobs has no validation images; training needs them"):
        fit(network, Dataset("blobs", blobs.classes, blobs.train, blobs.test), CONFIG)
    with pytest.raises(ConfigError, match="resume=True needs a checkpoint"):
        fit(network, blobs, CONFIG, resume=True)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"^accelerator cuda, 1 devices, precision 32-true: "):
            fit(network, blobs, TrainConfig(accelerator="cuda"))
        with pytest.raises(ConfigError, match="precision 16-mixed needs a GPU"):
            fit(network, blobs, TrainConfig(accelerator="cpu", precision="16-mixed"))


def test_loss_equals_torch_on_a_known_model(blobs):
    """The network's logits reach the loss unscaled: epoch 1 of a frozen model gives torch's cross entropy."""
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    build = partial(copy.deepcopy, frozen)
    config = TrainConfig(**{**vars(CONFIG), "epochs": 1, "lr": 1e-12, "data_norm": "none"})
    loss = F.cross_entropy(frozen(blobs.train.images), blobs.train.labels).item()
    assert fit(build, blobs, config).curve[1].train_loss == pytest.approx(loss, rel=1e-5)

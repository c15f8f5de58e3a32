"""The choice of the best rate, on trials made by hand."""

import pytest

from normprop.experiments.results import table


def trial(lr, seed=0, validation=None, test=None, status="complete", method="m", batch_size=8, reason=None):
    return {
        "method": method,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "status": status,
        "reason": reason,
        "validation_error": validation,
        "test_error": test,
    }


def only(trials, **arguments):
    (row,) = table(trials, **arguments)
    return row


def test_rate_is_chosen_by_validation_and_test_error_is_reported():
    row = only([trial(0.1, validation=0.30, test=0.10), trial(0.2, validation=0.20, test=0.50)])
    assert row["best_lr"] == 0.2
    assert row["error_mean"] == 0.50
    assert row["seeds"] == 1
    assert row["error_std"] is None


def test_mean_and_sample_deviation_over_seeds():
    row = only([trial(0.1, seed, 0.2, error) for seed, error in enumerate((0.1, 0.2, 0.6))])
    assert row["error_mean"] == pytest.approx(0.3)
    assert row["error_std"] == pytest.approx(0.07**0.5)  # ((0.2)^2 + (0.1)^2 + (0.3)^2) / 2
    assert row["seeds"] == 3


def test_mean_over_seeds_decides_not_the_luckiest_seed():
    row = only([trial(0.1, 0, 0.01, 0.1), trial(0.1, 1, 0.90, 0.1), trial(0.2, 0, 0.40, 0.2), trial(0.2, 1, 0.40, 0.2)])
    assert row["best_lr"] == 0.2


def test_a_rate_tried_with_fewer_seeds_lost_its_chance_before():
    tuned = [trial(0.1, 0, 0.30, 0.3), trial(0.1, 1, 0.40, 0.4), trial(0.2, 0, 0.35, 0.2)]
    row = only(tuned)
    assert (row["best_lr"], row["seeds"]) == (0.1, 2)
    # A rate chosen with one seed at which another diverges is out, whatever is left.
    row = only([*tuned[:1], trial(0.1, 1, status="diverged"), tuned[2]])
    assert (row["best_lr"], row["seeds"]) == (0.2, 1)


def test_rate_with_a_diverged_seed_is_out_and_named():
    row = only(
        [trial(0.1, 0, 0.5, 0.5), trial(0.1, 1, 0.5, 0.5), trial(0.2, 0, 0.1, 0.1), trial(0.2, 1, status="diverged")]
    )
    assert row["best_lr"] == 0.1
    assert row["diverged_lrs"] == [0.2]


def test_no_rate_when_each_has_a_diverged_seed():
    row = only([trial(0.2, 0, 0.1, 0.1), trial(0.2, 1, status="diverged"), trial(0.1, 0, status="diverged")])
    assert row["best_lr"] is None
    assert row["error_mean"] is None
    assert row["diverged_lrs"] == [0.1, 0.2]
    assert row["edge"] is False


@pytest.mark.parametrize(("best", "edge"), [(0.1, True), (0.2, False), (0.4, True)])
def test_edge_of_the_grid(best, edge):
    row = only([trial(lr, validation=0.1 if lr == best else 0.2, test=0.1) for lr in (0.4, 0.1, 0.2)])
    assert row["best_lr"] == best
    assert row["edge"] is edge


def test_rate_below_a_diverged_one_is_not_at_the_edge():
    row = only([trial(0.1, 0, 0.3, 0.3), trial(0.2, 0, 0.1, 0.1), trial(0.4, 0, status="diverged")])
    assert row["best_lr"] == 0.2
    assert row["edge"] is False


def test_impossible_gives_its_reason():
    row = only([trial(0.1, status="impossible", reason="Expected more than 1 value per channel")])
    assert row["impossible"] == "Expected more than 1 value per channel"
    assert row["best_lr"] is None
    assert row["seeds"] == 0


def test_unfinished_trials_do_not_count():
    row = only([trial(0.1, 0, 0.3, 0.3), trial(0.1, 1, status="running"), trial(0.2, 0, status="waiting")])
    assert (row["best_lr"], row["error_mean"], row["seeds"]) == (0.1, 0.3, 1)


def test_rows_keep_the_order_of_methods_and_take_their_step_time():
    trials = [trial(0.1, 0, 0.1, 0.1, method=method, batch_size=size) for size in (32, 1) for method in ("z", "a")]
    times = [{"method": "a", "batch_size": 1, "ratio": 1.5}]
    rows = table(trials, times)
    assert [(row["method"], row["batch_size"]) for row in rows] == [("z", 1), ("z", 32), ("a", 1), ("a", 32)]
    assert [row["step_time"] for row in rows] == [None, None, 1.5, None]

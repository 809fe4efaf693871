"""Inputs that are numerical trouble: solved as well as float64 least squares on the samples themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg

from netdecouple.convolution import ConvGeometry
from netdecouple.families import Problem
from netdecouple.families.chain import method
from netdecouple.fitting.ridge import RIDGES, best_ridge, held_out_error
from netdecouple.moments import Moments

G = ConvGeometry(6, 5, 3, 3)
D = G.n_i * G.kh * G.kw
METHODS = ("nd-dp", "nd-pd", "sd", "cd", "cp", "sd+nd-dp", "cd+nd-dp", "cp+nd-pd")


def plain(rng: np.random.Generator, n: int = 300) -> np.ndarray:
    """Correlated patches (n, d) that are not centred."""
    return rng.standard_normal((n, D)) @ (np.eye(D) + 0.3 * rng.standard_normal((D, D))) + 1


def deficient(rng: np.random.Generator) -> np.ndarray:
    """Of rank 4."""
    return rng.standard_normal((300, 4)) @ rng.standard_normal((4, D))


def badly_scaled(rng: np.random.Generator) -> np.ndarray:
    """One channel a million times as large as the next."""
    return plain(rng) * np.repeat(10.0 ** np.array([-9, -3, 0, 3, 6]), 9)


def constant(rng: np.random.Generator) -> np.ndarray:
    """Two channels that never change, one of them far from zero."""
    x = plain(rng)
    x[:, :9], x[:, 9:18] = 7.0, 1e6
    return x


def dead(rng: np.random.Generator) -> np.ndarray:
    """Nothing but zeros."""
    return 0 * plain(rng)


def one_alive(rng: np.random.Generator) -> np.ndarray:
    """A single entry of all patches that is not always zero."""
    x = 0 * plain(rng)
    x[:, 3] = rng.standard_normal(len(x))
    return x


def far_off(rng: np.random.Generator) -> np.ndarray:
    """A mean a million times the deviation from it."""
    return plain(rng) + 1e6


SAMPLES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "plain": plain,
    "few": lambda rng: plain(rng, 12),
    "one": lambda rng: plain(rng, 1),
    "deficient": deficient,
    "badly scaled": badly_scaled,
    "constant": constant,
    "dead": dead,
    "one alive": one_alive,
    "far off": far_off,
    "huge": lambda rng: 1e30 * plain(rng),
    "denormal in float32": lambda rng: 1e-42 * plain(rng),
}
WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "weights": lambda w: w,
    "zero weights": lambda w: 0 * w,
    "a dead filter": lambda w: w * (np.arange(len(w)) > 0).reshape(-1, 1, 1, 1),
    "an unread channel": lambda w: w * (np.arange(w.shape[1]) > 0).reshape(1, -1, 1, 1),
    "huge weights": lambda w: 1e30 * w,
    "weights denormal in float32": lambda w: 1e-42 * w,
}
CASES = [(x, "weights") for x in SAMPLES] + [("plain", w) for w in WEIGHTS] + [("huge", "huge weights")]


def posed(samples: str, weights: str) -> tuple[Problem, np.ndarray, np.ndarray]:
    """The problem of a layer whose outputs are nearly what its weights make of the samples, and both."""
    rng = np.random.default_rng(0)
    x = SAMPLES[samples](rng)
    weight = WEIGHTS[weights](rng.standard_normal(G.weight_shape))
    y = x @ weight.reshape(G.n_o, D).T
    y += 0.01 * np.abs(y).mean() * rng.standard_normal(y.shape) + 0.5
    return Problem.of(G, weight, Moments.of(x[:, None], y[:, None])), x, y


@pytest.mark.parametrize(("samples", "weights"), CASES)
@pytest.mark.parametrize("ridge", [RIDGES[0], RIDGES[3], RIDGES[-1]])
def test_the_target_is_that_of_least_squares(samples: str, weights: str, ridge: float) -> None:
    """SciPy's, on the centred samples and with the same ridge, as pseudo-samples (DESIGN §4)."""
    problem, x, y = posed(samples, weights)
    regular = problem.regularized(ridge)
    pull = np.sqrt(ridge * np.square(x - x.mean(0)).sum() / D)
    rows = np.concatenate([x - x.mean(0), pull * np.eye(D)])
    wanted = np.concatenate([y - y.mean(0), pull * problem.weight[0].T])
    scale = max(np.abs(rows).max(), 1e-300), max(np.abs(wanted).max(), 1e-300)

    def objective(weight: np.ndarray) -> float:
        return float(
            np.square(rows / scale[0] @ (weight * (scale[0] / scale[1])).T - wanted / scale[1]).sum()
        )

    best = scipy.linalg.lstsq(rows / scale[0], wanted / scale[1])[0].T * (scale[1] / scale[0])
    assert objective(regular.target[0]) <= objective(best) * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize(("samples", "weights"), CASES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_solves_it(samples: str, weights: str, name: str) -> None:
    """Finite at every size, and no worse than a layer that makes nothing."""
    problem, x, y = posed(samples, weights)
    regular = problem.regularized(1e-3)
    chosen = method(name)
    trials = chosen.trials(regular, (9, 9), (0.9, 0.4, 0.1), (0.8, 0.3))
    for trial in trials:
        fitted, _ = chosen.fit(regular, trial.steps)
        numbers = [fitted.bias, *(stage.weight for stage in fitted.stages)]
        assert all(np.isfinite(part).all() for part in numbers)
        assert np.isfinite(trial.squared_error)
        made = x @ fitted.dense().reshape(G.n_o, D).T + fitted.bias
        scale = max(np.abs(y).max(), np.abs(made).max(), 1e-300)
        error, power = (np.square(v / scale).sum() for v in (made - y, y - y.mean(0)))
        assert error <= power * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize(("samples", "weights"), CASES)
@pytest.mark.parametrize("name", ["nd-dp", "nd-pd", "sd", "cd", "cp"])
def test_the_largest_size_is_the_target(samples: str, weights: str, name: str) -> None:
    """Wherever the samples can tell the two apart."""
    problem, x, _ = posed(samples, weights)
    regular = problem.regularized(1e-3)
    (family,) = method(name).families
    fitted = family.fit(regular, family.exact(G)).dense().reshape(G.n_o, D)
    centred = x - x.mean(0)
    found, wanted = centred @ fitted.T, centred @ regular.target[0].T
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max(initial=0.0) + 1e-300


@pytest.mark.parametrize(("samples", "weights"), CASES)
def test_a_ridge_is_found(samples: str, weights: str) -> None:
    """On samples held out from the same source, or on none."""
    problem, _x, _y = posed(samples, weights)
    for held_out in (problem.moments, Moments.empty(1, D, G.n_o)):
        ridge, regular = best_ridge(problem, held_out, lambda p: method("nd-dp").families[0].fit(p, 9))
        assert ridge in RIDGES
        fitted = method("nd-dp").families[0].fit(regular, 9)
        assert np.isfinite(held_out_error(problem, held_out, fitted))

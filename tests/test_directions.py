"""Methods that balance tasks say what their papers say, in closed form, by brute force or by autograd."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from multifid.training.balance import DECAY, RESTORING, STEEPEST, WINDOW, balance_of
from multifid.training.directions import CAGRAD_RADIUS, DIRECTIONS, aligned, cagrad, coefficients, config, nash, pcgrad

CONFLICT = np.array([[2.0, 0.0, 0.0, 0.5], [-1.0, 1.0, 0.3, 0.0]])


def gradients(tasks: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(tasks, 50)) * random.uniform(0.2, 4.0, (tasks, 1)) + 0.3 * random.normal(size=50)


def test_pcgrad_takes_from_each_gradient_what_points_against_the_other():
    a, b = CONFLICT
    expected = a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
    np.testing.assert_allclose(pcgrad(CONFLICT @ CONFLICT.T, "0") @ CONFLICT, expected, rtol=1e-12)
    agreeing = np.abs(CONFLICT)
    assert (pcgrad(agreeing @ agreeing.T, "0") == 1).all()


def test_cagrad_is_what_a_scan_of_the_dual_finds():
    a, b = CONFLICT
    mean, reach = (a + b) / 2, CAGRAD_RADIUS * np.linalg.norm((a + b) / 2)
    w = np.linspace(0, 1, 1_000_001)[:, None]
    points = w * a + (1 - w) * b
    lengths = np.linalg.norm(points, axis=1)
    best = (points @ mean + reach * lengths).argmin()
    found = cagrad(CONFLICT @ CONFLICT.T) @ CONFLICT / 2
    np.testing.assert_allclose(found, mean + reach / lengths[best] * points[best], atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 5, 12])
def test_cagrad_helps_the_worst_task_most_within_its_ball(tasks):
    """By the conditions of the optimum, exactly, and against random directions of the ball."""
    each = gradients(tasks)
    mean = each.mean(axis=0)
    reach = CAGRAD_RADIUS * np.linalg.norm(mean)
    found = cagrad(each @ each.T) @ each / tasks
    assert np.linalg.norm(found - mean) == pytest.approx(reach, rel=1e-10)
    w = cagrad(each @ each.T) - 1
    helped = each @ found
    assert np.ptp(helped[w > 1e-9]) <= 1e-10 * np.abs(helped).max() and helped.min() >= helped[w > 1e-9].min() - 1e-10
    random = np.random.default_rng(1).normal(size=(2_000, tasks)) @ each
    others = mean + reach * random / np.linalg.norm(random, axis=1, keepdims=True)
    assert (others @ each.T).min(axis=1).max() <= helped.min()


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_nash_solves_its_equation(tasks):
    each = gradients(tasks)
    c = nash(each @ each.T)
    np.testing.assert_allclose((each @ each.T) @ c * c, np.ones(tasks), rtol=1e-12)
    scaled = each * np.logspace(-2, 2, tasks)[:, None]  # knows no scales
    np.testing.assert_allclose(nash(scaled @ scaled.T) @ scaled, c @ each, rtol=1e-9)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_aligned_gradients_are_orthogonal_and_as_long_as_the_least_singular_value(tasks):
    each = gradients(tasks)
    u, sigma, v = np.linalg.svd(each, full_matrices=False)
    nearest = sigma.min() * u @ v
    assert np.linalg.cond(nearest) == pytest.approx(1, abs=1e-10)
    np.testing.assert_allclose(aligned(each @ each.T) @ each, nearest.sum(axis=0), atol=1e-10 * sigma.max())


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_config_has_one_cosine_with_every_gradient_and_the_length_of_their_parts(tasks):
    each = gradients(tasks)
    found = config(each @ each.T) @ each
    unit = found / np.linalg.norm(found)
    cosines = each @ unit / np.linalg.norm(each, axis=1)
    assert cosines.min() > 0 and np.ptp(cosines) <= 1e-10
    assert np.linalg.norm(found) == pytest.approx((each @ unit).sum(), rel=1e-10)


@pytest.mark.parametrize("method", DIRECTIONS)
def test_gradients_that_are_zero_nearly_alike_or_not_finite_do_no_harm(method):
    each = gradients(3)
    with_nothing = np.insert(each, 1, 0.0, axis=0)
    found = coefficients(method, with_nothing @ with_nothing.T, "0")
    np.testing.assert_allclose(found[[0, 2, 3]], coefficients(method, each @ each.T, "0"), rtol=1e-12)
    assert found[1] == 1
    assert (coefficients(method, np.full((3, 3), np.nan), "0") == 1).all()
    assert (coefficients(method, np.zeros((3, 3)), "0") == 1).all()
    alike = np.stack([each[0], each[0] * (1 + 1e-14), each[0]])
    direction = coefficients(method, alike @ alike.T, "0") @ alike
    assert direction @ each[0] / np.linalg.norm(direction) / np.linalg.norm(each[0]) == pytest.approx(1, abs=1e-6)


def balance(method: str, losses=None, norms=None, rate=0.1, every=None):
    """A method over three tasks of weights 1, 2, 3, of a trainer that says these losses, and norms of gradients."""
    tasks = [SimpleNamespace(name=name) for name in "abc"]
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    trainer = SimpleNamespace(weights=weights, tasks=tasks, losses=lambda *_: losses.pop(0))
    trainer.potential = SimpleNamespace(encoder=torch.nn.Linear(2, 2))
    out = balance_of(method, trainer, [[0, 1, 2]], rate, every, 0)
    out.gradients = SimpleNamespace(products=lambda *_: torch.diag(torch.tensor(norms, dtype=torch.float64) ** 2))
    return out


COUNTS = torch.ones(3, 4, dtype=torch.float64)
MADE = torch.tensor(True)


def step(of, losses, counts=COUNTS, moved=MADE) -> torch.Tensor:
    """One step with these losses; the weights that it had, without those of the config."""
    of.begin([], counts)
    weights = of.trainer.weights / of.base
    of.end([], counts, torch.tensor(losses, dtype=torch.float64), moved)
    return weights


def test_uncertainty_goes_down_kendalls_objective_to_the_inverse_of_the_loss():
    of = balance("uncertainty")
    losses = torch.tensor([0.5, 2.0, 1e6], dtype=torch.float64)
    step(of, losses.tolist())
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (torch.exp(-s) * losses + s).sum().backward()
    np.testing.assert_allclose(of.kept["s"], -0.1 * s.grad.clamp(min=-STEEPEST), rtol=1e-14)
    for _ in range(500):
        weights = step(of, [0.5, 2.0, 4.0])
    np.testing.assert_allclose(weights, [2.0, 0.5, 0.25], rtol=1e-6)


def test_average_is_a_softmax_of_how_losses_fell():
    of = balance("average")
    for losses in ([2.0, 1.0, 4.0], [1.0, 1.0, 4.0]):
        for k in range(WINDOW):
            weights = step(of, [losses[0] + (-1) ** k, *losses[1:]])
            assert (weights == 1).all()
    ratio = np.exp(np.array([0.5, 1.0, 1.0]) / 2)
    np.testing.assert_allclose(step(of, [1.0, 1.0, 1.0]), 3 * ratio / ratio.sum(), rtol=1e-12)


def test_gradnorm_goes_down_its_objective_as_autograd_does():
    norms, first, losses = [3.0, 1.0, 0.5], [1.0, 2.0, 4.0], [0.8, 1.9, 1.0]
    of = balance("gradnorm", norms=norms)
    weight = torch.ones(3, dtype=torch.float64)
    for now in (first, losses):
        assert torch.allclose(step(of, now), weight, rtol=1e-12)
        m = weight.clone().requires_grad_()
        size = m * torch.tensor(norms)
        mean = size.mean().detach()
        pace = torch.tensor(now, dtype=torch.float64) / torch.tensor(first)
        ((size - mean * (pace / pace.mean()) ** RESTORING).abs().sum() / mean).backward()
        weight = m.detach() - 0.1 * m.grad
        weight = weight * 3 / weight.sum()
    assert torch.allclose(of.weights(), weight, rtol=1e-12)


def test_famo_weighs_by_softmax_over_losses_and_goes_down_the_gains():
    before, after = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([0.9, 1.9, 1.0]).double()
    of = balance("famo", losses=[before, after, before])
    step(of, before.tolist())
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    z = torch.softmax(xi, 0)
    (slope,) = torch.autograd.grad(z, xi, grad_outputs=before.log() - after.log())
    np.testing.assert_allclose(of.kept["xi"], -0.1 * (slope + DECAY * xi.detach()), rtol=1e-12)
    z = torch.softmax(of.kept["xi"], 0)
    of.begin([], COUNTS)
    np.testing.assert_allclose(of.weights(), 3 * z / before / (z / before).sum(), rtol=1e-12)


@pytest.mark.parametrize("method", ["uncertainty", "average", "gradnorm", "famo"])
def test_nothing_is_learned_from_updates_that_are_skipped_or_tasks_that_are_absent(method):
    losses = [torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 1.5, 1.0]).double()] * 4
    of, other = (balance(method, list(losses), [1.0, 2.0, 3.0], every=1) for _ in range(2))
    for one in (of, other):
        step(one, [1.0, 2.0, 3.0])
    held = of.state()["tasks"]
    step(of, [torch.nan, 1.0, 2.0], moved=torch.tensor(False))
    assert of.state()["tasks"] == held
    step(other, [1.0, 0.0, 3.0], counts=COUNTS * torch.tensor([[1.0], [0.0], [1.0]]))
    assert all(np.isfinite(list(kept.values())).all() for kept in other.state()["tasks"].values())


def test_a_task_that_joins_begins_anew_and_the_others_go_on():
    of, later = balance("uncertainty"), balance("uncertainty")
    step(of, [2.0, 2.0, 2.0])
    state = of.state()
    del state["tasks"]["b"]
    later.restore(state)
    assert later.kept["s"].tolist() == [of.kept["s"][0].item(), 0.0, of.kept["s"][2].item()] and later.steps == 1

"""Directions for the encoder from the gradients of tasks that disagree, as coefficients: d = sum_t c_t g_t.

Every method here sees the gradients only through their inner products G_tu = <g_t, g_u> (tasks, tasks) float64, which
`task_gradients.py` measures on any placement. c = 1 is the plain sum, `train.balance: none`. g_t is the gradient of
w_t L_t. Tasks without a gradient in the step take no part.

    pcgrad    each g_t without what points against another task's, in random order, then summed
              (Yu et al. 2020, arXiv 2001.06782)
    cagrad    within |d - g_0| <= c |g_0| of the mean g_0, what helps the worst task most
              (Liu et al. 2021, arXiv 2110.14048)
    nash      G c = 1 / c: the bargain of Nash; knows no scales of tasks (Navon et al. 2022, arXiv 2202.01017)
    aligned   the nearest orthogonal gradients of equal length, summed (Senushkin et al. 2023, arXiv 2305.19000)
    config    the same cosine with every task's gradient, as long as their parts along it (Liu et al. 2024,
              arXiv 2408.11104)
"""

import random
from collections.abc import Callable

import numpy as np

CAGRAD_RADIUS = 0.4  # c of the paper, in its experiments with images
RANK = 1e-12  # eigenvalues below this part of the largest are zero


def pcgrad(g: np.ndarray, seed: str) -> np.ndarray:
    """seed: of the order in which the others are looked at."""
    order, total = random.Random(seed), np.zeros(len(g))
    for task in range(len(g)):
        own = np.zeros(len(g))
        own[task] = 1.0
        others = [k for k in range(len(g)) if k != task]
        order.shuffle(others)
        for other in others:
            product = own @ g[:, other]
            if product < 0:
                own[other] -= product / g[other, other]
        total += own
    return total


def cagrad(g: np.ndarray, seed: str = "") -> np.ndarray:
    """T d with d = g_0 + c |g_0| g_w / |g_w|, where w on the simplex is lowest in g_w . g_0 + c |g_0| |g_w|."""
    tasks = len(g)
    mean = np.full(tasks, 1.0 / tasks)
    linear = g @ mean
    reach = CAGRAD_RADIUS * np.sqrt(max(mean @ linear, 0.0))
    w = lowest_on_simplex(linear, g, reach)
    length = np.sqrt(max(w @ g @ w, 0.0))
    return 1.0 + (tasks * reach / length) * w if length > 0 else np.ones(tasks)


def nash(g: np.ndarray, seed: str = "") -> np.ndarray:
    """Scaled so that the coefficients of unit gradients that do not know of each other would be 1 / |g_t|."""
    c = 1.0 / np.sqrt(g.diagonal() * len(g))
    for _ in range(100):  # Newton on c G c / 2 - sum log c, which is convex
        slope = g @ c - 1.0 / c
        step = np.linalg.solve(g + np.diag(1.0 / c**2), slope)
        decrement = float(np.sqrt(max(slope @ step, 0.0)))
        c = c - step / (1.0 + decrement)  # never leaves c > 0
        if decrement < 1e-9:
            c = c - np.linalg.solve(g + np.diag(1.0 / c**2), g @ c - 1.0 / c)
            break
    return c


def aligned(g: np.ndarray, seed: str = "") -> np.ndarray:
    """sigma_min V diag(1 / sigma) V^T 1, of the singular values sigma of the gradients that are not zero."""
    values, vectors = np.linalg.eigh(g)
    kept = values > RANK * values.max()
    values, vectors = values[kept], vectors[:, kept]
    return np.sqrt(values.min()) * (vectors / np.sqrt(values)) @ vectors.sum(axis=0)


def config(g: np.ndarray, seed: str = "") -> np.ndarray:
    norms = np.sqrt(g.diagonal())
    cosines = g / np.outer(norms, norms)
    a = np.linalg.pinv(cosines, rcond=RANK, hermitian=True) @ np.ones(len(g))
    length = np.sqrt(a @ cosines @ a)  # of sum_t a_t g_t / |g_t|
    along = norms @ cosines @ a / length  # sum_t of the parts of g_t along it
    return along / length * a / norms


DIRECTIONS: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {
    "pcgrad": pcgrad,
    "cagrad": cagrad,
    "nash": nash,
    "aligned": aligned,
    "config": config,
}


def coefficients(method: str, products: np.ndarray, seed: str) -> np.ndarray:
    """c (tasks,) of a method, from the inner products of gradients; 1 where a task has none, or nothing is finite."""
    out = np.ones(len(products))
    norms = products.diagonal()
    if not np.isfinite(products).all() or not norms.max() > 0:
        return out
    there = np.flatnonzero(norms > 0)
    found = DIRECTIONS[method](products[np.ix_(there, there)] / norms.max(), seed)
    if method == "nash":  # the only one that is not the same for gradients in another unit
        found = found * len(there) / found.sum()
    if np.isfinite(found).all():
        out[there] = found
    return out


def lowest_on_simplex(linear: np.ndarray, g: np.ndarray, reach: float) -> np.ndarray:
    """w >= 0, sum w = 1, lowest in linear . w + reach sqrt(w G w): a solver's, made exact by Newton on its support.

    All ranks, and all placements, must come to the same: a solver alone is exact to the root of its tolerance.
    """
    from scipy.optimize import minimize  # a third of a second, for this alone

    def value(w: np.ndarray) -> tuple[float, np.ndarray]:
        length = np.sqrt(max(w @ g @ w, 1e-300))
        return float(linear @ w + reach * length), linear + reach * (g @ w) / length

    tasks = len(linear)
    start = np.full(tasks, 1.0 / tasks)
    sums = {"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": lambda w: np.ones(tasks)}
    found = minimize(value, start, jac=True, bounds=[(0.0, 1.0)] * tasks, constraints=[sums], method="SLSQP",
                     options={"ftol": 1e-14, "maxiter": 500})  # fmt: skip
    w = np.clip(found.x, 0.0, None)
    w /= w.sum()
    support = w > 1e-6
    exact = _newton(linear[support], g[np.ix_(support, support)], reach, w[support])
    if (exact > 0).all() and np.abs(exact - w[support]).max() < 1e-3:
        w = np.zeros(tasks)
        w[support] = exact
    return w


def _newton(linear: np.ndarray, g: np.ndarray, reach: float, w: np.ndarray) -> np.ndarray:
    """w where all slopes are equal and the sum is 1, from nearby."""
    one = np.ones(len(w))
    for _ in range(8):
        length = np.sqrt(max(w @ g @ w, 1e-300))
        pull = g @ w / length
        slope = linear + reach * pull
        level = slope @ one / len(w)
        curvature = reach / length * (g - np.outer(pull, pull))
        matrix = np.block([[curvature, -one[:, None]], [one[None], np.zeros((1, 1))]])
        step = np.linalg.lstsq(matrix, -np.append(slope - level, w.sum() - 1.0), rcond=1e-13)[0]
        w = w + step[:-1]
    return w

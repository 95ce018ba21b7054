"""Rows of `evaluation.json` as a matrix of models x datasets, with the seeds inside each cell.

Every comparison (geometric mean, ratio of two models) is made seed by seed, then averaged: the spread of a ratio is not
the ratio of spreads.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

REFERENCES = "References"  # predicts the reference energies and zero forces
BASELINE = "GFM-Baseline-All"  # one branch for all datasets
TWO_LEVEL = "GFM-MTL-All"  # one branch per dataset
UNITS = {"energy": "eV/atom", "forces": "eV/Å", "stress": "eV/Å³"}
GEOMETRIC_MEAN = "geometric mean"

Cell = dict[object, float]  # seed -> value
Row = dict[str, Any]  # model, data, split, structures, unseen_structures, atoms, energy_mae, ...; None where no label


def quantities(rows: Sequence[Row]) -> tuple[str, ...]:
    """What tables are made of: energy and forces, and stress where a model predicts it and data have it."""
    stress = any(row.get("stress_mae") is not None for row in rows if row["model"] != REFERENCES)
    return ("energy", "forces", "stress") if stress else ("energy", "forces")


def own_model(data: str) -> str:
    """The name of the model trained on that dataset alone."""
    return f"Model-{data}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number found with one or several seeds: mean and sample standard deviation (None for one seed)."""

    mean: float
    spread: float | None
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Estimate | None":
        known = list(values)
        if not known:
            return None
        return cls(fmean(known), stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True, slots=True)
class Matrix:
    """Mean absolute errors of one quantity. A dataset in which no model has a value is not a column."""

    quantity: str  # "energy" (eV/atom) or "forces" (eV/angstrom)
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]  # (model, dataset) -> seed -> value; absent where there is none

    @property
    def columns(self) -> tuple[str, ...]:
        """The datasets and, where there are several, their geometric mean."""
        return (*self.datasets, GEOMETRIC_MEAN) if len(self.datasets) > 1 else self.datasets

    def estimate(self, model: str, data: str) -> Estimate | None:
        """The cell, or over all datasets for `GEOMETRIC_MEAN`."""
        cell = self.geometric_mean(model) if data == GEOMETRIC_MEAN else self.cells.get((model, data), {})
        return Estimate.of(cell.values())

    def geometric_mean(self, model: str) -> Cell:
        """Over all datasets, seed by seed. Empty where the model lacks one: means over other sets do not compare."""
        return _geometric_means([self.cells.get((model, data), {}) for data in self.datasets])

    def ratio(self, numerators: Sequence[str], denominators: Sequence[str]) -> dict[str, Estimate | None]:
        """Error of `numerators[k]` over that of `denominators[k]` on the k-th dataset; and the geometric mean of these.

        Datasets where either has no value or the denominator is zero are None, and so is then the geometric mean.
        """
        columns = list(zip(self.datasets, numerators, denominators, strict=True))
        ratios = [_ratio(self.cells.get((a, d), {}), self.cells.get((b, d), {})) for d, a, b in columns]
        values = {data: Estimate.of(ratio.values()) for data, ratio in zip(self.datasets, ratios, strict=True)}
        return {**values, GEOMETRIC_MEAN: Estimate.of(_geometric_means(ratios).values())}

    def best(self, data: str, how_many: int = 2) -> set[str]:
        """The models with the lowest errors (ties included), if more compete than are to be named; not `References`."""
        means = {m: e.mean for m in self.models if m != REFERENCES and (e := self.estimate(m, data)) is not None}
        finite = sorted(mean for mean in means.values() if math.isfinite(mean))
        if len(means) <= how_many or not finite:
            return set()
        return {m for m, mean in means.items() if mean <= finite[:how_many][-1]}


def matrix(rows: Sequence[Row], quantity: str) -> Matrix:
    """The matrix of `<quantity>_mae`. Rows of one model and dataset are its seeds: by key `seed`, else by their order.

    Raises ValueError for rows of several splits and for a seed that occurs twice.
    """
    splits = sorted({str(row["split"]) for row in rows})
    if len(splits) > 1:
        raise ValueError(f"a table is over one split, but the rows are of {', '.join(splits)}: keep the rows of one")
    cells: dict[tuple[str, str], Cell] = {}
    met: dict[tuple[str, str], list[object]] = {}
    for row in rows:
        place = (row["model"], row["data"])
        seeds = met.setdefault(place, [])
        seed = row["seed"] if row.get("seed") is not None else len(seeds)
        if seed in seeds:
            raise ValueError(f"two rows for model {place[0]}, data {place[1]}, seed {seed}: each must occur once")
        seeds.append(seed)
        value = row.get(f"{quantity}_mae")
        if value is not None:
            cells.setdefault(place, {})[seed] = float(value)
    named = list(dict.fromkeys(row["data"] for row in rows))
    filled = {data for _, data in cells} | {row["data"] for row in rows if _left_out(row)}
    return Matrix(quantity, _models(rows, named), tuple(data for data in named if data in filled), cells)


def _left_out(row: Row) -> bool:
    """Whether a row has no value because every structure has unseen elements, or a prediction that is not finite."""
    return row.get("counted_structures") == 0 and row["structures"] > 0


def _models(rows: Sequence[Row], datasets: Sequence[str]) -> tuple[str, ...]:
    """The order of the paper: each dataset's own model, others as they come, the baseline, the two-level model."""
    order = [REFERENCES, *(own_model(d) for d in datasets)]
    names = list(dict.fromkeys(row["model"] for row in rows))
    first = [m for m in order if m in names]
    last = [m for m in (BASELINE, TWO_LEVEL) if m in names]
    return (*first, *(m for m in names if m not in first and m not in last), *last)


def _pairs(a: Cell, b: Cell) -> dict[object, tuple[float, float]]:
    """Values of the same seed; what exists once only (no seed enters the reference energies) goes with every seed."""
    if len(b) == 1:
        (only,) = b.values()
        return {seed: (x, only) for seed, x in a.items()}
    if len(a) == 1:
        (only,) = a.values()
        return {seed: (only, y) for seed, y in b.items()}
    return {seed: (x, b[seed]) for seed, x in a.items() if seed in b}


def _ratio(a: Cell, b: Cell) -> Cell:
    return {seed: x / y for seed, (x, y) in _pairs(a, b).items() if y != 0.0}


def _geometric_means(columns: Sequence[Cell]) -> Cell:
    if not columns:
        return {}
    seeds = [seed for seed in columns[0] if all(seed in column for column in columns)]
    return {seed: _geometric_mean([column[seed] for column in columns]) for seed in seeds}


def _geometric_mean(values: Sequence[float]) -> float:
    if any(v == 0.0 for v in values):
        return 0.0
    return math.exp(fmean(math.log(v) for v in values))

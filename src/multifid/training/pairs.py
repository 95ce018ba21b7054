"""The pair potentials of branches (`model/pairs.py`), fitted before the first step.

Ridge regression of aligned energies per atom on sums of pair functions per atom, standardised, and on fractions of
elements, which are held hardly at all. Residuals beyond the median count linearly. How strongly coefficients are held
is what predicts the validation split best. Forces do not enter. At most `MOST` structures of a split are read, evenly.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from multifid.config import Config
from multifid.feed.loader import Source, collate
from multifid.graphs.graph import graph_of
from multifid.model.layers import sum_over
from multifid.model.pairs import PairEnergies
from multifid.model.saved import load_description
from multifid.structures.elements import MAX_Z
from multifid.training.build import Pairs, branch_units, started

MOST = 20_000  # structures of a split
AT_ONCE = 64  # structures
HELD = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)  # strengths, by the number of structures
OF_ELEMENTS = 1e-6  # the same of energies of elements, per eV^2
REWEIGHTED = 3  # times
UNKNOWN = 0.1  # strength without any validation structure

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # pair functions (S, K M), fractions (S, 119), eV per atom (S,)


def fitted_pairs(config: Config, sources: list[Source]) -> tuple[dict[str, Pairs], list[str]]:
    """The pair potentials of branches that begin without weights of `init`, and in lines how well they predict.

    On one process. A branch of several tasks is fitted to the first of them that has energies.
    """
    out, lines, branch_of = {}, [], config.branch_of()
    begun, units = started(config, sources)[0], branch_units(config, sources)
    there = [] if config.init is None else load_description(Path(config.init))["branches"]
    for name in sorted({branch for branch in branch_of.values() if begun.get(branch, branch) not in there}):
        functions = config.model.shape(name).pairs
        tasks = [t for t in sorted(branch_of) if branch_of[t] == name]
        found = [(s, t) for t in tasks for s in sources if t in s.tasks and s.references[t].energies]
        if not functions or name in config.model.properties or not found:
            continue
        source, task = found[0]
        out[name], said = _fit(PairEnergies(functions, config.model.cutoff).double(), source, task, units[task])
        lines.append(said)
    return out, lines


def _fit(pairs: PairEnergies, source: Source, task: str, scale: float) -> tuple[Pairs, str]:
    train, held_out = (_rows(pairs, source, task, split) for split in ("train", "validation"))
    x, _, y = train
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread <= 1e-12 * max(1.0, float(np.abs(x).max()))] = np.inf  # what never differs says nothing

    def design(rows: Rows) -> np.ndarray:
        return np.concatenate([(rows[0] - mean) / spread, rows[1]], axis=1)

    a = design(train)
    pair = np.arange(a.shape[1]) < x.shape[1]
    tried = []
    for strength in HELD if len(held_out[2]) else (UNKNOWN,):
        found = _robust(a, y, np.where(pair, strength, OF_ELEMENTS))
        error = float(np.abs(design(held_out) @ found - held_out[2]).mean()) if len(held_out[2]) else 0.0
        tried.append((error, strength, found))
    error, strength, found = min(tried, key=lambda one: one[:2])
    weights = found[pair] / spread
    of_element = found[~pair] - weights @ mean
    of_element[0] = 0.0
    zero = float(np.abs(held_out[2]).mean()) if len(held_out[2]) else np.nan
    line = (
        f"pairs: {task}: {1000 * error:.4g} meV/atom on validation structures, where reference energies alone have "
        f"{1000 * zero:.4g} ({len(y):,} structures, ridge {strength:g})"
    )
    weights = weights.reshape(pairs.coefficients.shape)
    return ((weights / scale).tolist(), (of_element / scale).tolist()), line


def _robust(a: np.ndarray, y: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Ridge regression whose largest residuals count linearly, by reweighting: a few structures are eV/atom off."""
    weights = np.ones(len(y))
    for _ in range(1 + REWEIGHTED):
        weighted = a.T * weights
        found = np.linalg.solve(weighted @ a + np.diag(held * weights.sum()), weighted @ y)
        residuals = np.abs(y - a @ found)
        typical = max(float(np.median(residuals)), 1e-12 * float(np.abs(y).max()))
        weights = typical / np.maximum(residuals, typical)
    return found


def _rows(pairs: PairEnergies, source: Source, task: str, split: str) -> Rows:
    size = source.store.size(split)
    index = source.store.pick(split, np.linspace(0, max(size - 1, 0), min(size, MOST)).astype(np.int64))
    parts = list(_chunks(pairs, source, task, index))
    functions = pairs.coefficients.numel()
    nothing = (np.zeros((0, functions)), np.zeros((0, MAX_Z + 1)), np.zeros(0))
    x, c, y = (np.concatenate(columns) for columns in zip(nothing, *parts, strict=True))
    known = np.isfinite(y)
    return x[known], c[known], y[known]


@torch.no_grad()
def _chunks(pairs: PairEnergies, source: Source, task: str, index: np.ndarray) -> Iterator[Rows]:
    of_pair = torch.from_numpy(pairs.of_pair.exact)
    for first in range(0, len(index), AT_ONCE):
        batch = collate([(source, index[first : first + AT_ONCE])], pairs.cutoff)
        graph, structures = graph_of(batch), batch.structures
        owner = graph.structure.index_select(0, graph.receivers)
        functions = pairs.functions(graph).double()  # (E, K)
        kinds = of_pair[graph.numbers[graph.receivers], graph.numbers[graph.senders]]  # (E, M)
        sums = torch.stack([sum_over(f[:, None] * kinds, owner, structures) for f in functions.unbind(1)], dim=1)
        natoms, one = batch.natoms.double(), torch.ones(graph.atoms, dtype=torch.float64)
        counts = torch.zeros(structures, MAX_Z + 1, dtype=torch.float64)
        counts.index_put_((graph.structure, graph.numbers), one, accumulate=True)
        energy = batch.targets[task].energy
        yield (
            (sums.flatten(1) / natoms[:, None]).numpy(),
            (counts / natoms[:, None]).numpy(),
            (energy / natoms).numpy(),
        )

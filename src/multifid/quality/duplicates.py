"""Structures that occur more than once, within a store and across stores, whatever their order, place and turn.

A structure is told by numbers that neither the order of its atoms nor translation, rotation or reflection change,
rounded to a thousandth of an angstrom and hashed. Two structures are the same if composition, charge, multiplicity and
all these numbers are:

    molecules   radii of gyration of the whole and of each of several weights of the elements (three each)
    crystals    lengths and angles of the cell, and the moduli of the lowest structure factors with these weights

So crystals are found again in the same cell only, not in a supercell. A number near the edge of its rounding could
fall on either side, so every structure is hashed twice, with the edges of one in the middles of the other; it is
enough that one of the two hashes agrees. (Zeros and right angles, which symmetry makes, are near no edge.)

Duplicates can be set aside, so these numbers are computed alike on every processor (`structures.reproducible`).

Memory does not grow with the number of structures: hashes lie in a file, which is gone through once for every few
million of them.
"""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multifid.structures.cells import completed
from multifid.structures.elements import MAX_Z
from multifid.structures.reproducible import cos_and_sin, inverse, times
from multifid.structures.structure import Packed

STEP = 1e-3  # angstrom
AT_ONCE = 1 << 22  # hashes sorted in memory at once
MILLER = np.array([h for h in itertools.product((-1, 0, 1), repeat=3) if h > (0, 0, 0)], np.float64)
# Weights that tell elements apart: smooth, so that rounding stays rounding, and no two alike.
_Z = np.arange(MAX_Z + 1)
_WAVES = [cos_and_sin(turns)[1] for turns in (0.366 * _Z, 0.111 * _Z + 0.159)]
WEIGHTS = np.stack([np.ones(MAX_Z + 1), *(0.5 + wave * wave for wave in _WAVES)])


def fingerprints(packed: Packed) -> np.ndarray:
    """(structures, 2) uint64: two structures are taken for the same if either of their numbers agrees."""
    out = np.empty((len(packed.natoms), 2), np.uint64)
    bulk = np.asarray(packed.pbc.any(axis=1))
    for chosen, describe in ((~bulk, _molecules), (bulk, _crystals)):
        if chosen.any():
            part = packed if chosen.all() else _part(packed, chosen)
            described = describe(part) / STEP
            composition = _composition(part)
            for k in range(2):
                rounded = np.floor(described + 0.3 + 0.5 * k).astype(np.int64).view(np.uint64)
                out[chosen, k] = _hash(composition, rounded, salt=k)
    return out


def _part(packed: Packed, chosen: np.ndarray) -> Packed:
    atoms = np.repeat(chosen, packed.natoms)
    return Packed(
        packed.numbers[atoms], packed.positions[atoms], packed.natoms[chosen], packed.cell[chosen],
        packed.pbc[chosen], packed.charge[chosen], packed.spin[chosen],
    )  # fmt: skip


def _molecules(packed: Packed) -> np.ndarray:
    """(structures, numbers) angstrom: the principal radii of gyration for each weight."""
    first, natoms = packed.offsets[:-1], packed.natoms
    out = []
    for weights in WEIGHTS[:, packed.numbers]:
        share = weights / np.repeat(np.add.reduceat(weights, first), natoms)
        positions = packed.positions.astype(np.float64)
        positions -= np.repeat(np.add.reduceat(positions * share[:, None], first), natoms, axis=0)
        x, y, z = positions.T
        six = np.stack([x * x, y * y, z * z, x * y, x * z, y * z], axis=1) * share[:, None]
        xx, yy, zz, xy, xz, yz = np.add.reduceat(six, first).T
        # Invariants of the tensor in place of its eigenvalues: smooth, also where two of these meet.
        trace = xx + yy + zz
        square = xx * xx + yy * yy + zz * zz + 2 * (xy * xy + xz * xz + yz * yz)
        radius2 = x * x + y * y + z * z
        fourth = np.add.reduceat(radius2 * radius2 * share, first)
        out += [np.sqrt(trace), np.sqrt(np.sqrt(square)), np.sqrt(np.sqrt(fourth))]
    return np.stack(out, axis=1)


def _crystals(packed: Packed) -> np.ndarray:
    """(structures, numbers) angstrom: metric of the cell; structure factors, as lengths of the order of the cell."""
    first, natoms = packed.offsets[:-1], packed.natoms
    cell = completed(packed.cell, packed.pbc)
    gram = times(cell, cell.transpose(0, 2, 1)[:, None])
    a = np.sqrt(gram[:, [0, 1, 2], [0, 1, 2]])
    metric = [
        gram[:, i, j] / np.sqrt(a[:, i] * a[:, j]) for i, j in itertools.combinations_with_replacement(range(3), 2)
    ]
    size = a.mean(axis=1) / (2 * np.pi)
    fractional = times(packed.positions.astype(np.float64), np.repeat(inverse(cell), natoms, axis=0))
    phases = _phases(fractional)
    factors = []
    for weights in WEIGHTS[:, packed.numbers]:
        real, imaginary = (np.add.reduceat(part * weights, first, axis=1).T for part in phases)
        total = np.add.reduceat(weights, first)
        square = real * real + imaginary * imaginary
        factors.append(square / (total * total)[:, None] * size[:, None])
    return np.concatenate([np.stack(metric, axis=1), *factors], axis=1)


def _phases(fractional: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary parts (MILLER, atoms) of exp(2 pi i h . x), as products of those along the three axes."""
    cos, sin = cos_and_sin(np.ascontiguousarray(fractional.T))
    out = np.empty((2, len(MILLER), len(fractional)))
    for n, miller in enumerate(MILLER):
        (c, s), *more = [(cos[axis], h * sin[axis]) for axis, h in enumerate(miller) if h]
        for c2, s2 in more:
            c, s = c * c2 - s * s2, c * s2 + s * c2
        out[0, n], out[1, n] = c, s
    return out[0], out[1]


def _composition(packed: Packed) -> np.ndarray:
    """(structures,) uint64: a sum over atoms, so the order does not matter; with charge, multiplicity, periodicity."""
    total = np.add.reduceat(_mixed(packed.numbers.astype(np.uint64)), packed.offsets[:-1])
    for extra in (packed.charge, packed.spin, packed.pbc @ np.array([1, 2, 4])):
        total = _mixed(total ^ _mixed(extra.astype(np.int64).view(np.uint64)))
    return total


def _hash(start: np.ndarray, columns: np.ndarray, salt: int) -> np.ndarray:
    total = start + np.uint64(salt)
    for column in columns.T:
        total = _mixed(total ^ column)
    return total


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Same:
    """Groups of equal structures: places (rows,) end to end, ascending in each group; first row and size of each."""

    places: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def spread(self, flags: np.ndarray) -> np.ndarray:
        """(rows,) bool: whether any row of the same group is flagged."""
        return np.repeat(np.logical_or.reduceat(flags, self.starts), self.sizes) if len(flags) else flags


class Fingerprints:
    """The fingerprints of many structures, in a temporary file. As a context manager it removes the file."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="multifid-duplicates-")
        self._file = (Path(self._folder.name) / "fingerprints").open("w+b")
        self.count = 0

    def add(self, found: np.ndarray) -> None:
        """(structures, 2), of the next structures."""
        self._file.write(np.ascontiguousarray(found).tobytes())
        self.count += len(found)

    def same(self) -> Iterator[Same]:
        """Groups of structures that share a fingerprint. A pair may come twice: once for each of its two hashes."""
        self._file.flush()
        if self.count == 0:
            return
        all_of_them = np.memmap(self._file, np.uint64, "r", shape=(self.count, 2))
        buckets = -(-self.count // AT_ONCE)
        for k, bucket in itertools.product(range(2), range(buckets)):
            yield _grouped(*_bucket(all_of_them, k, bucket, buckets))

    def __enter__(self) -> "Fingerprints":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._folder.cleanup()


def _bucket(hashes: np.ndarray, k: int, bucket: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes that fall into a bucket, and where they are."""
    places, values = [], []
    for start in range(0, len(hashes), AT_ONCE):
        column = np.array(hashes[start : start + AT_ONCE, k])
        here = np.flatnonzero(column % np.uint64(buckets) == bucket)
        places.append(here + start)
        values.append(column[here])
    return np.concatenate(places), np.concatenate(values)


def _grouped(places: np.ndarray, values: np.ndarray) -> Same:
    order = np.argsort(values, kind="stable")
    sizes = np.unique(values[order], return_counts=True)[1]
    repeated = np.repeat(sizes > 1, sizes)
    sizes = sizes[sizes > 1]
    return Same(places[order][repeated], np.cumsum(sizes) - sizes, sizes)


def repeats(found: Fingerprints) -> np.ndarray:
    """(structures,) bool: those that are the same as one before them. One byte for each structure."""
    repeated = np.zeros(found.count, bool)
    for same in found.same():
        later = np.ones(len(same.places), bool)
        later[same.starts] = False
        repeated[same.places[later]] = True
    return repeated

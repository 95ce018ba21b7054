"""Any table with a structure in each row, by a mapping that says what its columns hold: see `table_mapping`.

Nothing is guessed: a column that is not named is not read, a unit that is not said is asked for. A row whose values do
not fit is a skip that names the key of the mapping; a column that is missing or of another type is an error.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip
from multifid.readers.mappings import SHIPPED, mapping_file
from multifid.readers.records import VOIGT
from multifid.readers.table_arrays import HDF5, ArrayBatch, array_batches, array_parts, holds_arrays, is_arrays
from multifid.readers.table_columns import Ragged, split_words
from multifid.readers.table_files import ENDINGS as OF_FILES
from multifid.readers.table_files import Batch, batches, columns_of, row_groups
from multifid.readers.table_mapping import MAPPINGS, LabelColumns, TableMapping, load_mapping, resolve_mapping
from multifid.readers.zarr_groups import FOLDER as FOLDER
from multifid.store.block import IMPOSSIBLE, NO_CHARGE, NO_SPIN, Block, relative_hash
from multifid.store.fields import NO_SPLIT
from multifid.structures.cells import kept_vectors, spans_volume
from multifid.structures.elements import NUMBERS, formula
from multifid.structures.reproducible import determinant
from multifid.structures.structure import SPLITS

TASKS: dict[str, LabelSet] = {}  # see `label_sets`
RELATIVE = "declared group, or formula"
ENDINGS = (*OF_FILES, *HDF5)
LOOK = 200  # records in which a mapping must find a structure to be the one that fits

SPLIT_NAMES = {**{name: i for i, name in enumerate(SPLITS)}, "val": 1, "valid": 1, "training": 0, "testing": 2}


class Options(BaseModel):
    """What a table is read by."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mapping: TableMapping | None = Field(
        None,
        description="file MAPPING.yaml, where it is not an input, or the name of a mapping that comes with the package"
        f" ({', '.join(SHIPPED)}): which columns hold what, in which units; default: the one of these that fits",
    )

    @field_validator("mapping", mode="before")
    @classmethod
    def _loaded(cls, value: Any) -> Any:
        return load_mapping(mapping_file(value)) if isinstance(value, str | Path) else value


def resolved(
    inputs: Sequence[Path | str], of_splits: dict[str, list[Path]], options: dict[str, Any]
) -> tuple[list[Path | str], dict[str, list[Path]], dict[str, Any]]:
    """As `resolve_mapping`; where no mapping is named, the one that comes with the package and fits the first file."""
    named = [Path(path) for path in [*inputs, *(p for paths in of_splits.values() for p in paths)]]
    if "mapping" not in options and not any(path.suffix.lower() in MAPPINGS for path in named):
        first = next((path for path in named if path.is_file() or is_arrays(path)), None)
        fitting = [] if first is None else fitting_mappings(first)
        if len(fitting) > 1:
            raise ValueError(f"{first}: several mappings fit, {', '.join(fitting)}: --option mapping=NAME takes one")
        options = {**options, "mapping": fitting[0]} if fitting else options
    return resolve_mapping(inputs, of_splits, options)


def fitting_mappings(path: Path) -> list[str]:
    """The names of the mappings of the package by which a file has structures."""
    return [name for name, mapping in SHIPPED.items() if _fits(path, load_mapping(mapping))]


def _fits(path: Path, mapping: TableMapping) -> bool:
    try:
        records = islice(read(path, Options(mapping=mapping), lambda far: None), LOOK)
        return any(isinstance(record, Block) for record in records)
    except ValueError:
        return False


def looks_like(path: Path) -> bool:
    """Whether a mapping that comes with the package fits."""
    return bool(fitting_mappings(path))


def label_sets(paths: Sequence[Path], options: Options) -> dict[str, LabelSet]:
    """Those of the mapping."""
    labels = options.mapping.labels if options.mapping else {}
    return {name: LabelSet(own.level_of_theory, own.energy_kind) for name, own in labels.items()}


def parts(path: Path, options: Options) -> list[Part]:
    """Row groups of parquet, structures of HDF5 and zarr; other files can only be read from their beginning."""
    return array_parts(path, options.mapping) if is_arrays(path) else row_groups(path)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the rows in blocks; part: which row groups. `source_id`: the column `id`, or the number of the row.

    ValueError names file, key and column of what is missing or of another type, and what is damaged.
    """
    if options.mapping is None:
        raise ValueError(
            f"{path}: a table needs a mapping: multifid prepare table MAPPING.yaml, or --option mapping=FILE"
        )
    if (options.mapping.natoms or options.mapping.within) and not is_arrays(path):
        raise ValueError(f"{path}: `natoms` and `within` are for HDF5 and zarr; a row of a table is one structure")
    if is_arrays(path):
        found: Iterator[Any] = array_batches(path, options.mapping, progress, part)
    else:
        found = batches(path, options.mapping.columns().values(), progress, part)
    for batch in found:
        yield from [batch] if isinstance(batch, Skip) else _Rows(path, options.mapping, batch).records()


def holds(path: Path) -> list[str]:
    """The columns."""
    return holds_arrays(path) if is_arrays(path) else columns_of(path)


class _Rows:
    """The rows of a batch on their way to a block: which are refused, and why."""

    def __init__(self, path: Path, mapping: TableMapping, batch: Batch | ArrayBatch) -> None:
        self.mapping, self.rows, self.first = mapping, batch.rows, batch.first
        self.names = batch.names if isinstance(batch, ArrayBatch) else [str(batch.first + i) for i in range(batch.rows)]
        self.reasons: list[str | None] = [None] * batch.rows
        self.found: dict[str, Ragged] = {}
        for key, name in mapping.columns().items():
            try:
                column = batch.column(name, mapping.is_text(key))
            except KeyError:
                have = ", ".join(line.partition(":")[0].partition(" = ")[0] for line in columns_of(path))
                raise ValueError(f"{path}: {key}: there is no column {name!r}; the file has {have}") from None
            except TypeError as error:
                wanted = "texts" if mapping.is_text(key) else "numbers"
                raise ValueError(f"{path}: {key}: column {name!r} holds {error}, where {wanted} are expected") from None
            self.found[key] = column
            self.refuse(column.bad, f"{key} is not made of {'texts' if mapping.is_text(key) else 'numbers'}")
        self.symbols = split_words(self.found["symbols"]) if "symbols" in self.found else None
        self.natoms = (self.symbols or self.found["numbers"]).counts
        self.sources = self._sources()

    def refuse(self, rows: np.ndarray, reason: str) -> None:
        for row in np.flatnonzero(rows):
            self.reasons[row] = self.reasons[row] or reason

    def records(self) -> Iterator[Record]:
        """Skips for what does not fit, and a block of the rest."""
        self._only()
        numbers = self._numbers()
        self._sized("positions", 3 * self.natoms, "positions of another length than the atoms", needed=True)
        pbc = self._pbc()
        charge, no_charge = self._whole("charge")
        spin, no_spin = self._whole("spin")
        split, relative = self._split(), self._relative(numbers)
        for name, own in self.mapping.labels.items():
            self._check_labels(name, own)
        kept = np.array([reason is None for reason in self.reasons], bool)
        for row in np.flatnonzero(~kept):
            yield Skip(str(self.reasons[row]), self.sources[row])
        if not kept.any():
            return
        units, atoms = self.mapping.units, np.repeat(kept, self.natoms)
        columns: dict[str, np.ndarray] = {
            "natoms": self.natoms[kept],
            "numbers": numbers[atoms],
            "positions": self.found["positions"].of(kept).reshape(-1, 3) * units.of("length"),
            "relative": relative[kept],
            "split": split[kept],
        }
        if pbc is not None:
            cells = self._rows_of("cell", 9, kept).reshape(-1, 3, 3) * units.of("length")
            columns |= {"pbc": pbc[kept], "cell": kept_vectors(np.nan_to_num(cells, nan=0.0), pbc[kept])}
        columns |= self._charges(columns, charge[kept], spin[kept], no_charge[kept], no_spin[kept])
        for name, own in self.mapping.labels.items():
            columns |= self._labels(name, own, kept, columns)
        unstated = (NO_CHARGE * no_charge + NO_SPIN * no_spin)[kept].astype(np.uint8)
        yield Block(columns, [s for s, keep in zip(self.sources, kept, strict=True) if keep], unstated)

    def _sources(self) -> list[str]:
        names = self.found["id"].text() if "id" in self.found else [None] * self.rows
        return [own if name is None else name for own, name in zip(self.names, names, strict=True)]

    def _only(self) -> None:
        """Refuse the rows that the mapping leaves out."""
        for column in self.mapping.only:
            key, wanted = f"only.{column}", self.mapping.wanted(column)
            found = self.found[key].text() if self.mapping.is_text(key) else self._rows_of(key, 1, None)[:, 0].tolist()
            self.refuse(np.array([value not in wanted for value in found], bool), f"only: {column} is another")

    def _numbers(self) -> np.ndarray:
        """(atoms of all rows,) int64; 0 for what is refused."""
        rows = np.repeat(np.arange(self.rows), self.natoms)
        self.refuse(self.natoms == 0, "no atoms")
        if self.symbols is not None:
            numbers = np.array([NUMBERS.get(word, 0) for word in self.symbols.values], np.int64)
            reason = "symbols: a word that is no element"
        else:
            values = self.found["numbers"].values
            with np.errstate(invalid="ignore"):
                good = (values == np.round(values)) & (values > 0) & (values < 256)
            numbers, reason = np.where(good, values, 0).astype(np.int64), "atomic numbers are not whole numbers"
        self.refuse(np.asarray(np.bincount(rows[numbers == 0], minlength=self.rows) > 0), reason)
        return numbers

    def _sized(self, key: str, sizes: Any, reason: str, needed: bool = False) -> None:
        counts = self.found[key].counts
        fits = np.any([counts == size for size in (sizes if isinstance(sizes, tuple) else (sizes,))], axis=0)
        self.refuse(~(fits | ((counts == 0) & (not needed))), reason)

    def _pbc(self) -> np.ndarray | None:
        """(rows, 3) bool; None where the table has no cells."""
        if self.mapping.cell is None:
            return None
        self._sized("cell", 9, "cell is not (3, 3) numbers")
        if "pbc" in self.found:
            self._sized("pbc", (1, 3), "pbc is not three flags")
            column = self.found["pbc"]
            flags = np.zeros((self.rows, 3))
            flags[column.counts == 3] = column.of(column.counts == 3).reshape(-1, 3)
            flags[column.counts == 1] = column.of(column.counts == 1)[:, None]
            self.refuse(np.asarray(~np.isin(flags, (0.0, 1.0)).all(axis=1)), "pbc is not three flags")
            pbc = flags == 1.0
        else:
            pbc = np.broadcast_to(np.array(self.mapping.pbc, bool), (self.rows, 3)).copy()
            pbc[self.found["cell"].counts == 0] = False  # a molecule among crystals
        self.refuse(pbc.any(axis=1) & (self.found["cell"].counts == 0), "periodic without a cell")
        return pbc

    def _whole(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) int64 of charge or spin, and (rows,) bool: not stated."""
        constant = getattr(self.mapping, key)
        if key not in self.found:
            return np.full(self.rows, constant or 0), np.full(self.rows, constant is None)
        self._sized(key, 1, f"{key} is not one number")
        values = self._rows_of(key, 1, None)[:, 0]
        there = ~np.isnan(values)
        rounded = np.clip(np.round(np.where(there, values, 0.0)), -IMPOSSIBLE, IMPOSSIBLE)
        with np.errstate(invalid="ignore"):
            self.refuse(there & (np.abs(values - rounded) > 1e-6), f"{key} is not a whole number")
        missing = ~there | ((rounded == 0) & (key == "spin"))
        return rounded.astype(np.int64), missing

    def _rows_of(self, key: str, width: int, kept: np.ndarray | None) -> np.ndarray:
        """(kept rows, all if None, width) float64; NaN where a row has none, or another number of values."""
        column = self.found[key]
        has = column.counts == width
        values = np.full((self.rows, width), np.nan)
        values[has] = column.of(has).reshape(-1, width)
        return values if kept is None else values[kept]

    def _charges(
        self, columns: dict[str, np.ndarray], charge: np.ndarray, spin: np.ndarray, *unstated: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What is stated, else neutral; the lowest multiplicity where only a molecule's charge is."""
        no_charge, no_spin = unstated
        natoms = columns["natoms"]
        protons = np.add.reduceat(columns["numbers"], np.cumsum(natoms) - natoms)
        periodic = columns["pbc"].any(axis=1) if "pbc" in columns else np.zeros(len(natoms), bool)
        lowest = np.where(periodic | no_charge, 1, 1 + (protons - charge) % 2)
        return {"charge": charge, "spin": np.where(no_spin, lowest, spin)}

    def _split(self) -> np.ndarray:
        if "split" not in self.found:
            return np.full(self.rows, NO_SPLIT, np.uint8)
        names = [None if name is None else name.strip().lower() for name in self.found["split"].text()]
        known: dict[str | None, int] = {None: NO_SPLIT}
        known.update(SPLIT_NAMES)
        self.refuse(np.array([name not in known for name in names], bool), "split: none of train, validation, test")
        return np.array([known.get(name, NO_SPLIT) for name in names], np.uint8)

    def _relative(self, numbers: np.ndarray) -> np.ndarray:
        """(rows,) uint64: of the group, or of the formula where there is none."""
        names = self.found["group"].text() if "group" in self.found else [None] * self.rows
        ends = np.cumsum(self.natoms).tolist()
        known: dict[bytes, int] = {}

        def of_formula(own: np.ndarray) -> int:
            key = own.tobytes()
            if key not in known:
                known[key] = relative_hash(formula(own)) if len(own) and own.all() else 0
            return known[key]

        found = [
            of_formula(numbers[end - n : end]) if name is None else relative_hash(name)
            for name, end, n in zip(names, ends, self.natoms.tolist(), strict=True)
        ]
        return np.array(found, np.uint64)

    def _check_labels(self, name: str, own: LabelColumns) -> None:
        if own.energy:
            self._sized(f"labels.{name}.energy", 1, f"labels.{name}.energy is not one number")
        if own.forces:
            self._sized(
                f"labels.{name}.forces", 3 * self.natoms, f"labels.{name}.forces of another length than the atoms"
            )
        for kind in ("stress", "virial"):
            if getattr(own, kind):
                self._sized(f"labels.{name}.{kind}", (6, 9), f"labels.{name}.{kind} has neither 6 nor 9 numbers")

    def _labels(
        self, name: str, own: LabelColumns, kept: np.ndarray, columns: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The columns of one label set, in our units."""
        units, natoms = self.mapping.units, columns["natoms"]
        energy = np.full(len(natoms), np.nan)
        if own.energy:
            energy = self._rows_of(f"labels.{name}.energy", 1, kept)[:, 0] * units.of("energy")
        found = {f"labels/{name}/energy": energy * natoms if own.energy_per_atom else energy}
        if own.forces:
            column = self.found[f"labels.{name}.forces"]
            forces = np.full((int(natoms.sum()), 3), np.nan)
            has = column.counts > 0
            forces[np.repeat(has[kept], natoms)] = column.of(has & kept).reshape(-1, 3)
            found[f"labels/{name}/forces"] = forces * (-1 if own.forces_are_gradient else 1) * units.of("force")
        kind = "stress" if own.stress else "virial" if own.virial else None
        if kind is not None:
            key = f"labels.{name}.{kind}"
            six, nine = self._rows_of(key, 6, kept), self._rows_of(key, 9, kept)
            tensor = np.where(np.isnan(six).all(axis=1)[:, None], nine, six[:, VOIGT.reshape(-1)]).reshape(-1, 3, 3)
            found[f"labels/{name}/stress"] = tensor * self._stress_factor(own, kind, columns["cell"])
        return found

    def _stress_factor(self, own: LabelColumns, kind: str, cells: np.ndarray) -> Any:
        """eV/angstrom^3, tension-positive, for one of the table."""
        if kind == "stress":
            return (-1 if own.stress_sign == "compression" else 1) * self.mapping.units.of("stress")
        with np.errstate(all="ignore"):
            volume = np.where(spans_volume(cells), np.abs(determinant(cells)), np.nan)
        return (-self.mapping.units.of("virial") / volume)[:, None, None]

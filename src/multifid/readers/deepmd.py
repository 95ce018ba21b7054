"""DeePMD-kit's npy layout, as dpdata writes it: a directory for each system, frames in sets.

    type.raw            (atoms,) the type of each atom, from 0
    type_map.raw        the element of each type
    nopbc               an empty file: the system is not periodic
    set.000/coord.npy   (frames, 3 x atoms) angstrom;  set.000/box.npy     (frames, 9) angstrom, rows are vectors
    set.000/energy.npy  (frames,) eV;                  set.000/force.npy   (frames, 3 x atoms) eV/angstrom
    set.000/virial.npy  (frames, 9) eV: minus stress x volume, xx xy xz yx yy yz zx zy zz
    set.000/real_atom_types.npy  (frames, atoms) types of each frame (the mixed layout); -1 fills up, and is no atom

https://docs.deepmodeling.com/projects/deepmd/en/stable/data/system.html. Without `type_map.raw`, or where it names
types that are no elements, the option `type_map` says what they are. dpdata writes float32 unless it is told otherwise,
total energies too: the manifest says so. A set that lacks a label has none of it. Nothing states charge or
multiplicity. Arrays are mapped into memory and read in pieces.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from multifid.readers.charges import ChargeOptions
from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip, cut
from multifid.readers.units import Factors, VirialUnitOptions
from multifid.store.block import NO_CHARGE, NO_SPIN, Block, relative_hash
from multifid.store.fields import NO_SPLIT
from multifid.structures.cells import spans_volume
from multifid.structures.elements import NUMBERS, formula
from multifid.structures.reproducible import determinant

TASK = "deepmd"
TASKS = {TASK: LabelSet("not stated in the files", "total")}
RELATIVE = "formula"
ENDINGS: tuple[str, ...] = ()
FOLDER = ("type.raw",)

PART = 1 << 20  # atoms of a part
CHUNK = 1 << 16  # atoms read at once
LARGEST = 1 << 24  # bytes of type.raw
WIDTHS = {"coord": 3, "force": 3, "box": 9, "virial": 9, "energy": 1, "real_atom_types": 1}  # numbers of an atom, or
OF_ATOMS = ("coord", "force", "real_atom_types")  # of a frame
FLOAT32 = "energies are float32 in the files: steps of 0.24 meV at -4,000 eV, 3.9 meV at -45,000"


class Options(ChargeOptions, VirialUnitOptions):
    """What the user says of a system that does not say it itself."""

    type_map: tuple[str, ...] = Field(
        (), description="the element of each type, as H,O, in place of type_map.raw, or where there is none"
    )

    @field_validator("type_map", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """On the command line a list is written with commas."""
        return tuple(re.split(r"[,\s]+", value.strip())) if isinstance(value, str) else value

    @field_validator("type_map")
    @classmethod
    def _elements(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in value if name not in NUMBERS]:
            raise ValueError(f"{unknown[0]!r} is no element")
        return value


class Set(NamedTuple):
    """A set of frames: its name and its arrays, (frames, ...), by what they are."""

    name: str
    arrays: dict[str, np.ndarray]

    @property
    def frames(self) -> int:
        return len(self.arrays["coord"])


class System(NamedTuple):
    """A system: atomic numbers of its types (0: a type that no atom may have), types of atoms, whether periodic."""

    elements: np.ndarray
    types: np.ndarray
    periodic: bool
    sets: list[Set]


def parts(path: Path, options: Options) -> list[Part]:
    """Frames in the order of the sets, about PART atoms together."""
    system = _system(path, options)
    return cut([len(system.types)] * sum(one.frames for one in system.sets), PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the frames of a system in blocks; part: which of them. `source_id`: `set.000/12`.

    ValueError names the file that is damaged, missing or of another size than the others.
    """
    system, units = _system(path, options), options.factors()
    start, stop = part or (0, sum(one.frames for one in system.sets))
    step, done, first = max(CHUNK // len(system.types), 1), 0, 0
    for one in system.sets:
        for frame in range(max(start - first, 0), min(stop - first, one.frames), step):
            rows = slice(frame, min(frame + step, stop - first, one.frames))
            yield from _records(system, one, rows, options, units)
            done += rows.stop - rows.start
            progress(done / (stop - start))
        first += one.frames


def holds(path: Path) -> list[str]:
    """The arrays of the first set."""
    for folder in _folders(path):
        return [
            f"{folder.name}/{file.name} {values.shape} {values.dtype}"
            for file in sorted(folder.glob("*.npy"))
            for values in [_mapped(file)]
        ]
    return []


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.glob("set.*") if folder.is_dir())


def _system(path: Path, options: Options) -> System:
    types = _types(path / "type.raw")
    sets = [_set(folder, len(types), not (path / "nopbc").exists()) for folder in _folders(path)]
    if not sets:
        text = (path / "coord.raw").exists()
        why = " (the text files *.raw are not read: dpdata makes deepmd/npy of them)" if text else ""
        raise ValueError(f"{path}: a system of DeePMD-kit needs a directory set.000 with coord.npy{why}")
    elements = _elements(path, options)
    mixed = ["real_atom_types" in one.arrays for one in sets]
    if any(mixed) != all(mixed):
        raise ValueError(f"{path}: some sets have real_atom_types.npy and others have none")
    if not any(mixed) and (bad := _unknown(types, elements)) is not None:
        raise ValueError(f"{path / 'type.raw'}: type {bad} is no element{_remedy(path, options, bad)}")
    return System(elements, types, not (path / "nopbc").exists(), sets)


def _types(path: Path) -> np.ndarray:
    """(atoms,) int64."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are too many for the types of the atoms of one frame")
    words = path.read_text(encoding="utf-8", errors="replace").split()
    try:
        types = np.array([int(float(word)) if "." in word else int(word) for word in words], np.int64)
    except (ValueError, OverflowError):
        raise ValueError(f"{path}: types of atoms must be whole numbers, one for each atom") from None
    if not len(types):
        raise ValueError(f"{path}: it has no atoms")
    return types


def _elements(path: Path, options: Options) -> np.ndarray:
    """(types,) int64 atomic numbers, 0 for a name that is no element."""
    names = options.type_map or _names(path / "type_map.raw")
    if not names:
        raise ValueError(f"{path}: without type_map.raw, --option type_map=H,O,... says which element each type is")
    return np.array([NUMBERS.get(name, 0) for name in names], np.int64)


def _names(path: Path) -> tuple[str, ...]:
    if not path.is_file() or path.stat().st_size > LARGEST:
        return ()
    return tuple(path.read_text(encoding="utf-8", errors="replace").split())


def _unknown(types: np.ndarray, elements: np.ndarray) -> int | None:
    """A type of an atom that is none of the elements."""
    outside = (types < 0) | (types >= len(elements))
    bad = outside | (elements[np.where(outside, 0, types)] == 0)
    return int(types[bad][0]) if bad.any() else None


def _remedy(path: Path, options: Options, bad: int) -> str:
    names = options.type_map or _names(path / "type_map.raw")
    called = f": it is called {names[bad]!r}" if 0 <= bad < len(names) else f" of the {len(names)} that are named"
    return f"{called} (--option type_map=H,O,... says which element each type is)"


def _set(folder: Path, atoms: int, periodic: bool) -> Set:
    """The arrays of a set, mapped, in shapes (frames, ...). ValueError where they do not fit together."""
    arrays = {name: _mapped(folder / f"{name}.npy") for name in WIDTHS if (folder / f"{name}.npy").is_file()}
    for name in ("coord", *(["box"] if periodic else [])):
        if name not in arrays:
            hint = " (an empty file nopbc beside type.raw says that nothing is periodic)" if name == "box" else ""
            raise ValueError(f"{folder}: {name}.npy is missing{hint}")
    frames = len(arrays["coord"]) if arrays["coord"].ndim else 0
    for name, values in arrays.items():
        width = WIDTHS[name] * (atoms if name in OF_ATOMS else 1)
        if not values.ndim or len(values) != frames or values.size != frames * width:
            raise ValueError(
                f"{folder / f'{name}.npy'} has the shape {values.shape}, where {frames} frames of {width} numbers are"
                f" expected: coord.npy has {frames} frames, type.raw {atoms} atoms"
            )
        arrays[name] = values.reshape(frames, width)
    return Set(folder.name, arrays)


def _mapped(path: Path) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.errno is not None:  # of the system: it names the file
            raise
        raise ValueError(f"{path}: truncated, damaged or no npy file: {error}") from None
    except Exception as error:  # numpy parses the header as Python literals, and raises whatever it meets
        raise ValueError(f"{path}: truncated, damaged or no npy file: {type(error).__name__}: {error}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise ValueError(f"{path}: an array of numbers is expected")
    return values


def _records(system: System, one: Set, rows: slice, options: Options, units: Factors) -> Iterator[Record]:
    """Frames of one set as a block; those of the mixed layout that have types without an element as skips."""
    sources = [f"{one.name}/{i}" for i in range(rows.start, rows.stop)]
    piece = {name: np.array(values[rows]) for name, values in one.arrays.items()}
    types = np.tile(system.types, (len(sources), 1))
    if "real_atom_types" in piece:
        types = piece["real_atom_types"].astype(np.int64)
        good = np.array([_unknown(own[own != -1], system.elements) is None for own in types])
        full = (types != -1).any(axis=1)
        for i in np.flatnonzero(~(good & full)):
            yield Skip("a type of an atom is no element" if full[i] else "no atoms", sources[i])
        sources = [source for source, kept in zip(sources, good & full, strict=True) if kept]
        types = types[good & full]
        piece = {name: values[good & full] for name, values in piece.items()}
    if sources:
        yield _block(system, types, piece, sources, options, units)


def _block(
    system: System,
    types: np.ndarray,
    piece: dict[str, np.ndarray],
    sources: list[str],
    options: Options,
    units: Factors,
) -> Block:
    """Frames (F, ...) in our units; types (F, atoms), -1 where there is no atom."""
    there = types != -1
    natoms = there.sum(axis=1)
    numbers = system.elements[types[there]]
    ends = np.cumsum(natoms)

    def of_atoms(name: str) -> np.ndarray:
        return piece[name].reshape(*types.shape, 3)[there].astype(np.float64)

    names = {own.tobytes(): relative_hash(formula(system.elements[own[own != -1]])) for own in np.unique(types, axis=0)}
    columns = {
        "natoms": natoms,
        "numbers": numbers,
        "positions": of_atoms("coord") * units.length,
        "relative": np.array([names[own.tobytes()] for own in types], np.uint64),
        "split": np.full(len(sources), NO_SPLIT, np.uint8),
        **_charges(np.add.reduceat(numbers, ends - natoms), system.periodic, options),
        f"labels/{TASK}/energy": np.full(len(sources), np.nan),
    }
    if "energy" in piece:
        columns[f"labels/{TASK}/energy"] = piece["energy"].reshape(-1).astype(np.float64) * units.energy
    if "force" in piece:
        columns[f"labels/{TASK}/forces"] = of_atoms("force") * units.force
    if system.periodic:
        cells = piece["box"].reshape(-1, 3, 3).astype(np.float64) * units.length
        columns |= {"cell": cells, "pbc": np.ones((len(sources), 3), bool)}
        if "virial" in piece:
            with np.errstate(all="ignore"):  # cells without a volume are skipped by whoever looks at values
                volume = np.where(spans_volume(cells), np.abs(determinant(cells)), np.nan)
                virial = piece["virial"].reshape(-1, 3, 3).astype(np.float64)
                columns[f"labels/{TASK}/stress"] = virial * (units.virial / volume)[:, None, None]
    unstated = NO_CHARGE * (options.charge is None) + NO_SPIN * (options.spin is None)
    coarse = "energy" in piece and piece["energy"].dtype.itemsize < 8
    told = (("precision", FLOAT32),) if coarse else ()
    return Block(columns, sources, np.full(len(sources), unstated, np.uint8), told)


def _charges(protons: np.ndarray, periodic: bool, options: Options) -> dict[str, Any]:
    """What the options state, else neutral and of the lowest multiplicity (1 in crystals)."""
    charge = options.charge or 0
    lowest = np.ones(len(protons), np.int64) if periodic else 1 + (protons - charge) % 2
    spin = lowest if options.spin is None else np.full(len(protons), options.spin)
    return {"charge": np.full(len(protons), charge), "spin": spin}

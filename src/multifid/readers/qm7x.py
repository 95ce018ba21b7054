"""QM7-X (`1000.xz ... 8000.xz`): 4.2 M equilibrium and displaced geometries of 6,950 molecules, HDF5 inside xz.

    f[idmol]["Geom-m{r}-i{s}-c{t}-{u}"]   atNUM, atXYZ, ePBE0+MBD, ePBE0, totFOR, pbe0FOR, ...   u = opt or 1..100

Hoja et al., Scientific Data 8, 43 (2021). Everything is in eV and angstrom already; neutral singlets.

The files are accepted as xz(HDF5), tar.xz and plain HDF5, told apart by content. HDF5 needs to seek, so compressed
files are unpacked, streaming, into a temporary file (TMPDIR) that is gone when the reader is done; names inside a tar
are never used as paths.

Energy and forces are one choice: `totFOR` belongs to `ePBE0+MBD` and `pbe0FOR` to `ePBE0`.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import h5py
from pydantic import BaseModel, ConfigDict, Field

from multifid.readers.contract import IsolatedAtom, LabelSet, Part, Progress, Record, Skip, cut
from multifid.readers.molecule_hdf5 import dataset, first_record, opened
from multifid.readers.records import atomic_numbers, number, structure_or_skip, vectors
from multifid.readers.unpack import HDF5_MAGIC, hdf5_files
from multifid.structures.structure import Labels, Structure

PAIRS = {"pbe0+mbd": ("qm7x", "ePBE0+MBD", "totFOR"), "pbe0": ("qm7x_pbe0", "ePBE0", "pbe0FOR")}
TASKS = {
    "qm7x": LabelSet("PBE0+MBD/tight (FHI-aims)", "total"),
    "qm7x_pbe0": LabelSet("PBE0/tight (FHI-aims)", "total"),
}
RELATIVE = "molecule"
ENDINGS = (".hdf5", ".h5", ".xz")

# eV, PBE0 free atoms published with the data; the dispersion energy of a free atom is zero, so they serve both levels
FREE_ATOMS = {
    1: -13.641404161,
    6: -1027.592489146,
    7: -1484.274819088,
    8: -2039.734879322,
    16: -10828.707468187,
    17: -12516.444619523,
}
PART = 100  # molecules of a part
CONFORMATION = re.compile(r"(Geom-m\d+-i\d+-c\d+)-(opt|d?\d+)")


class Options(BaseModel):
    """What to read of QM7-X."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: Literal["pbe0+mbd", "pbe0"] = Field(
        "pbe0+mbd", description="pbe0+mbd: ePBE0+MBD with totFOR; pbe0: ePBE0 with pbe0FOR"
    )
    duplicates: Path | None = Field(
        None,
        description="the published DupMols.dat: minima that occur twice, one per line; they and their displacements"
        " are skipped",
    )
    free_atoms: bool = Field(
        False, description="use the published free-atom energies as reference energies in place of the fitted ones"
    )


holds = first_record


def parts(path: Path, options: Options) -> list[Part]:
    """Molecules of a plain file, PART at a time; a packed one is unpacked once, by one process."""
    with path.open("rb") as file:
        if file.read(len(HDF5_MAGIC)) != HDF5_MAGIC:
            return [None]
    with opened(path) as molecules:
        return cut([1] * len(molecules), PART)


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Every geometry of the file, or why it is skipped; part: which molecules. Memory holds one geometry.

    Displacements share their molecule. `source_id` is `idmol/idconf`. ValueError if it is damaged or holds no HDF5.
    """
    duplicates = _duplicates(options.duplicates) if options.duplicates else frozenset()
    if options.free_atoms and (part is None or part[0] == 0):
        yield from (IsolatedAtom(PAIRS[options.level][0], z, energy) for z, energy in FREE_ATOMS.items())
    with tempfile.TemporaryDirectory(prefix="multifid-qm7x-") as scratch:
        for file, start, stop in hdf5_files(path, Path(scratch) / "unpacked.hdf5", progress):
            yield from _molecules(file, path, duplicates, options, _share(progress, start, stop), part)
    progress(1.0)


def _values(group: h5py.Group) -> Iterator[h5py.Group]:
    """The groups in a group; nothing in a dataset."""
    members = group.values() if isinstance(group, h5py.Group) else ()
    return (member for member in members if isinstance(member, h5py.Group))


def _share(progress: Progress, start: float, stop: float) -> Progress:
    return lambda fraction: progress(start + fraction * (stop - start))


def _molecules(
    file: Path, path: Path, duplicates: frozenset[str], options: Options, progress: Progress, part: Part
) -> Iterator[Record]:
    with opened(file, str(path)) as molecules:
        names = list(molecules)
        first, end = part or (0, len(names))
        if first == 0 and not any(
            "atNUM" in conformation for group in molecules.values() for conformation in _values(group)
        ):
            raise ValueError(f"{path}: not a QM7-X file: no molecule has a conformation with `atNUM`")
        for done, molecule in enumerate(names[first:end], start=1):
            conformations = molecules[molecule]
            if not isinstance(conformations, h5py.Group):
                yield Skip("molecule is not a group of conformations", molecule)
                continue
            for name, conformation in conformations.items():
                where = f"{molecule}/{name}"
                if name.rpartition("-")[0] in duplicates:
                    yield Skip("duplicate of another molecule", where)
                else:
                    yield structure_or_skip(where, _structure, conformation, molecule, where, options)
            progress(done / (end - first))


def _structure(group: h5py.Group, molecule: str, where: str, options: Options) -> Structure:
    task, energy, forces = PAIRS[options.level]
    numbers = atomic_numbers(dataset(group, "atNUM"))
    labels = Labels(number(dataset(group, energy), "energy"), vectors(dataset(group, forces), len(numbers), "forces"))
    positions = vectors(dataset(group, "atXYZ"), len(numbers), "positions")
    return Structure(numbers, positions, {task: labels}, relative=molecule, source_id=where, charge=0)


def _duplicates(path: Path) -> frozenset[str]:
    """The conformations listed in DupMols.dat, without their last part (`opt`): displacements are duplicates too."""
    stems = set()
    for place, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        match = CONFORMATION.fullmatch(line.strip())
        if not match:
            raise ValueError(f"{path}, line {place}: a name as Geom-m1-i1-c1-opt is expected, found {line[:60]!r}")
        stems.add(match[1])
    return frozenset(stems)

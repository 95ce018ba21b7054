"""QM9 (`dsgdb9nsd.xyz.tar.bz2`, or the files in it): 133,885 small organic molecules at their minima.

    5                                      atoms
    gdb 1  157.7118  157.70997 ...         tag, number, A B C mu alpha homo lumo gap r2 zpve U0 U H G Cv
    C  -0.0126981359  1.0858041578  ...    element, x, y, z in angstrom, Mulliken charge, one line for each atom
    1341.307  1341.3284 ...                frequencies
    C  C                                   SMILES, before and after relaxation
    InChI=1S/CH4/h1H4  InChI=...           likewise

Ramakrishnan et al., Scientific Data 1, 140022 (2014). Energies in hartree. Some numbers are written `6.8*^-6`. None of
U0, U, H and G is the energy of the surface that forces would be the slope of: U0 has the zero-point vibration in it,
and U0 - zpve is the electronic energy (`--option energy=U0` takes another). Forces are not in the files. Molecules
that relaxed into others (`uncharacterized.txt`) are left out where that list is given. Relatives have the same SMILES
after relaxation, stereochemistry left out.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip, one_part
from multifid.readers.holdings import listed
from multifid.readers.packed import opened_bytes
from multifid.readers.properties import PropertyOptions, Seeker
from multifid.readers.records import BadRecord, number, numbers_of, structure_or_skip, vectors
from multifid.readers.units import HARTREE
from multifid.structures.structure import Labels, Structure

TASK = "qm9"
TASKS = {TASK: LabelSet("B3LYP/6-31G(2df,p) (Gaussian 09)", "total")}
RELATIVE = "molecule"
ENDINGS = (".xyz.tar.bz2",)

NAMES = ("A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv")
LARGEST = 1 << 16  # bytes of a molecule
STEREO = re.compile(r"[@/\\]")
parts = one_part


class Options(PropertyOptions):
    """Which energy, and which molecules are left out."""

    energy: Literal["electronic", "U0", "U", "H", "G"] = Field(
        "electronic",
        description="electronic: U0 - zpve; U0: with it; U, H, G: at 298.15 K",
    )
    uncharacterized: Path | None = Field(
        None, description="the published uncharacterized.txt: molecules that relaxed into others, which are left out"
    )

    @field_validator("uncharacterized")
    @classmethod
    def _there(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError(f"there is no file {path}")
        return path


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the molecules of an archive or one file. `source_id`: the number of the molecule.

    ValueError if the file is damaged, or holds no molecule of this form.
    """
    left_out, seeker, found = _left_out(options), Seeker(path, options), 0
    for name, content in _molecules(path, progress):
        try:
            molecule = _molecule(content)
        except BadRecord as bad:
            yield Skip(str(bad), name)
            continue
        found += 1
        where = molecule["index"]
        if where in left_out:
            yield Skip("uncharacterized: it relaxed into another molecule", where)
        else:
            yield structure_or_skip(where, _structure, molecule, options, seeker)
    if not found:
        raise ValueError(f"{path}: not QM9: no second line is a tag, a number and {len(NAMES)} properties")
    seeker.check()
    progress(1.0)


def holds(path: Path) -> list[str]:
    """The properties of the first molecule."""
    for _, content in _molecules(path, lambda far: None):
        return listed(_molecule(content)["properties"])
    return []


def _left_out(options: Options) -> set[str]:
    """The numbers in uncharacterized.txt: the first word of each line that begins with one."""
    if options.uncharacterized is None:
        return set()
    lines = options.uncharacterized.read_text(encoding="utf-8", errors="replace").splitlines()
    return {words[0] for line in lines if (words := line.split()) and words[0].isdigit()}


def _molecules(path: Path, progress: Progress) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files in an archive, packed or not, or of the one that it is."""
    size = max(path.stat().st_size, 1)
    with opened_bytes(path, lambda place: progress(place / size)) as file:
        start = file.peek(512)
        if start[257:262] != b"ustar":
            yield path.name, file.read(LARGEST)
            return
        try:
            with tarfile.open(fileobj=file, mode="r|") as archive:
                for member in archive:
                    if member.isfile() and member.size <= LARGEST and (content := archive.extractfile(member)):
                        yield member.name, content.read()
        except tarfile.TarError as error:
            raise ValueError(f"{path}: truncated or damaged: {error}") from None


def _molecule(content: bytes) -> dict[str, Any]:
    lines = content.decode("utf-8", "replace").split("\n")
    words = lines[1].split() if len(lines) > 1 else []
    atoms = int(lines[0]) if lines[0].strip().isdigit() else 0
    if len(words) != len(NAMES) + 2 or not 0 < atoms <= len(lines) - 2:
        raise BadRecord("not a molecule of QM9")
    rows = [line.split() for line in lines[2 : atoms + 2]]
    if any(len(row) != 5 for row in rows):
        raise BadRecord("an atom without five columns")
    smiles = lines[atoms + 3].split() if len(lines) > atoms + 3 else []
    return {
        "index": words[1],
        "properties": {name: _number(word, name) for name, word in zip(NAMES, words[2:], strict=True)},
        "symbols": [row[0] for row in rows],
        "positions": np.array([[_number(word, "positions") for word in row[1:4]] for row in rows]),
        "charges": [_number(row[4], "Mulliken charge") for row in rows],
        "relative": STEREO.sub("", smiles[-1]) if smiles else f"gdb {words[1]}",
    }


def _number(word: str, what: str) -> float:
    try:
        return float(word.replace("*^", "e"))
    except ValueError:
        raise BadRecord(f"{what} is not a number") from None


def _structure(molecule: dict[str, Any], options: Options, seeker: Seeker) -> Structure:
    found, numbers = molecule["properties"], numbers_of(molecule["symbols"])
    values = {**found, "mulliken": molecule["charges"]}
    if seeker.wanted:
        labels = seeker.labels(values.get, lambda: list(values), len(numbers), f"molecule {molecule['index']}")
    else:
        energy = found["U0"] - found["zpve"] if options.energy == "electronic" else found[options.energy]
        labels = {TASK: Labels(energy=number(energy, "energy") * HARTREE)}
    return Structure(
        numbers=numbers,
        positions=vectors(molecule["positions"], len(numbers), "positions"),
        labels=labels,
        relative=molecule["relative"],
        source_id=molecule["index"],
        charge=0,
        spin=1,
    )

"""Extended XYZ: what most people bring. Frames of `natoms`, a line of key=value, and one line per atom.

Labels are under the names that people use (`label_keys`), in the units that a frame declares (`units`; eV and angstrom
where it declares none), unless options say otherwise. A value that is none costs its label, not the frame. A frame with
`config_type=IsolatedAtom` and one atom is the energy of a free atom, not a structure.

The parser is our own: ase's gives up the place of an error and accepts labels of the wrong shape.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path

from multifid.readers.contract import LabelSet, Part, Progress, Record, Skip, one_part
from multifid.readers.extxyz_frames import Frame, frames
from multifid.readers.extxyz_record import TASK, LabelReader, Options, record_of, with_properties
from multifid.readers.holdings import listed
from multifid.readers.label_keys import Name, choose, labels_in, looks_like, not_taken
from multifid.readers.packed import endings, opened_text, packing_of
from multifid.readers.properties import Seeker
from multifid.readers.records import BadRecord
from multifid.readers.units import LENGTH, Factors, declared_units, declares_unit, factor
from multifid.store.fields import MAX_ATOMS
from multifid.structures.structure import Structure

TASKS = {TASK: LabelSet("unknown", "total")}
RELATIVE = "formula"
ENDINGS = endings(".xyz", ".extxyz")
FIRST = 1000, 1 << 23  # frames and bytes of a file on which keys are chosen, at most
SIGNATURES = 1000  # sets of keys that are remembered


parts = one_part


def read(path: Path, options: Options, progress: Progress, part: Part = None) -> Iterator[Record]:
    """Stream the frames of one file. ValueError where the file is no extended XYZ or ends within a frame."""
    size, plain = max(path.stat().st_size, 1), packing_of(path) is None
    reading = _Reading(path, options)
    number = done = 0
    with opened_text(path, lambda place: progress(place / size)) as file:
        for natoms, comment, lines in frames(path, file):
            done += len(comment) + sum(map(len, lines or ()))
            where = str(number)
            if lines is None:
                yield Skip(f"more than {MAX_ATOMS} atoms", where)
            else:
                yield reading.record(natoms, comment, lines, where)
            number += 1
            if plain and number % 100 == 0:
                progress(min(done / size, 1.0))
    if number == 0:
        raise ValueError(f"{path} holds no frame")
    reading.asked.check(path)
    reading.seeker.check()
    progress(1.0)


def holds(path: Path) -> list[str]:
    """Columns and keys of the first frame, with examples; where they look like labels, the option that takes them."""
    natoms, comment, atoms = next(_first(path))
    frame = Frame(natoms, comment, atoms)
    columns = {
        f"column {name}": " ".join(atoms[0].split()[first:last]) for name, (first, last) in frame.columns.places.items()
    }
    keys = {key: text for key, text in frame.info.items() if key.lower() != "properties"}
    lines = listed({**columns, **keys})
    for text in not_taken(labels_in(frame), {}):
        key, option = text.split(" looks like ")[0], text.split(" (")[1]
        own = f"{key} = ", f"column {key} = "
        lines = [f"{line}   ({option}" if line.startswith(own) else line for line in lines]
    return [*lines, "(--option energy_key=KEY, forces_key=COLUMN, stress_key=KEY, virial_key=KEY say which are labels)"]


class _Reading:
    """Makes records of the frames of one file: which keys are labels is chosen on the first of them."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path, self.options = path, options
        self.asked, self.seeker = _Asked(options), Seeker(path, options)
        self.seen: dict[str, Name] = {}
        self.keys: dict[str, tuple[str, ...]] = {}
        self.plans: dict[tuple[str, ...], tuple[list[tuple[str, str]], bool]] = {}
        with suppress(ValueError):  # a bad file is an error where it is read
            for natoms, comment, lines in _first(path):
                with suppress(BadRecord):
                    self._see(Frame(natoms, comment, lines))
        self.keys = choose(self.seen, options.label_keys(), {})
        self.factors = lru_cache(maxsize=SIGNATURES)(self._factors)

    def record(self, natoms: int, comment: str, lines: list[str], where: str) -> Record:
        """What becomes of a frame."""
        try:
            frame = Frame(natoms, comment, lines)
            if self.seeker.wanted:
                declared = self._declared(frame.info, where) if any(map(declares_unit, frame.info)) else ()
                return with_properties(frame, self.seeker, self.factors(declared).length, where, self.options)
            told, declares = self._plan(frame)
            declared = self._declared(frame.info, where) if declares else ()
            labels = LabelReader(frame, self.keys, self.options, self.factors(declared))
            record = record_of(frame, labels, where, self.options)
        except BadRecord as bad:
            return Skip(str(bad), where)
        if isinstance(record, Structure):
            if labels.lost and not labels.found:
                return Skip(labels.lost[0], where)
            units = (("units", f"{kind} in {unit}") for kind, unit in declared)
            lost = (("dropped", reason) for reason in labels.lost)
            record.told = (*labels.told, *told, *units, *lost)
        return record

    def _plan(self, frame: Frame) -> tuple[list[tuple[str, str]], bool]:
        """What is told of a frame with these keys, and whether it declares units."""
        if (known := self.plans.get(frame.keys)) is not None:
            return known
        self.asked.look(frame)
        names = self._see(frame)
        self.keys = choose(self.seen, self.options.label_keys(), self.keys)
        told = [("not taken", text) for text in not_taken(names, self.keys)]
        plan = told, any(map(declares_unit, frame.info))
        chosen = {key for keys in self.keys.values() for key in keys}
        alike = [key for key in (*frame.info, *frame.columns.places) if looks_like(key) and key not in chosen]
        if len(self.plans) < SIGNATURES and all(key in names and names[key].fits for key in alike):
            self.plans[frame.keys] = plan  # the next frame with these keys has no other labels
        return plan

    def _see(self, frame: Frame) -> dict[str, Name]:
        names = labels_in(frame)
        for key, name in names.items():
            if len(self.seen) < SIGNATURES and (key not in self.seen or name.fits):
                self.seen[key] = name
        return names

    def _declared(self, info: dict[str, str], where: str) -> tuple[tuple[str, str], ...]:
        try:
            return tuple(sorted(declared_units(info, self.options).items()))
        except ValueError as error:
            raise ValueError(f"{self.path}, frame {where}: {error}") from None

    def _factors(self, declared: tuple[tuple[str, str], ...]) -> Factors:
        factors = self.options.factors(dict(declared))
        if (length := self.options.force_length_unit) is not None:
            factors = factors._replace(force=factors.energy / factor(length, LENGTH))
        return factors._replace(force=-factors.force) if self.options.forces_are_gradient else factors


def _first(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """The first frames of a file."""
    most, left = FIRST
    with opened_text(path, lambda place: None) as file:
        for natoms, comment, lines in islice(frames(path, file), most):
            if lines is not None:
                yield natoms, comment, lines
            left -= len(comment) + sum(map(len, lines or ()))
            if left < 0:
                return


class _Asked:
    """The keys that the options name, until a frame has them: a key that no frame has is mistyped, not missing.

    Files of isolated atoms need none, files without another column of vectors no forces, molecules no stress.
    """

    def __init__(self, options: Options) -> None:
        more = {name: (key,) for name in ("charge", "spin") if (key := getattr(options, f"{name}_key")) is not None}
        self.missing: dict[str, Sequence[str]] = {**options.label_keys(), **more}
        self.first: Frame | None = None
        self.needed = {"energy": False, "forces": False, "stress": False}

    def look(self, frame: Frame) -> None:
        if not self.missing or (frame.natoms == 1 and "isolated" in frame.info.get("config_type", "").lower()):
            return
        self.first = self.first or frame
        self.needed["energy"] = True
        self.needed["forces"] |= sum(frame.columns.width(name) == 3 for name in frame.columns.places) > 1
        self.needed["stress"] |= frame.structural("lattice") is not None
        self.missing = {
            name: keys
            for name, keys in self.missing.items()
            if not any(key in frame.info or key in frame.columns for key in keys)
        }

    def check(self, path: Path) -> None:
        like = {"virial": "stress", "charge": "energy", "spin": "energy"}
        for name, keys in self.missing.items():
            if self.first is not None and self.needed[like.get(name, name)]:
                listed = ", ".join(dict.fromkeys([*self.first.columns.places, *self.first.info]))
                raise ValueError(f"{path}: no frame has {' or '.join(keys)} ({name}_key); its first has {listed}")

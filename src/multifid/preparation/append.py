"""Files added to a store that is there: as a part behind it, so that nothing which is stored is written again.

The part is prepared like a store, in a folder of the store that its manifest does not name. What makes it part of the
store is one rename, of the new manifest.json over the old one: a process that is killed before leaves the old store,
and a folder that the next addition removes. The manifests of before are kept, so that a run opens what it began with.

    structures   in the order of the files, behind those that are there
    splits       old structures keep theirs; new ones go with their relatives (`split.appended`)
    references, scale    kept, or fitted again to all (`refit`); each earlier manifest keeps its own
    labels       of label sets and levels of theory that the store has; anything else is a ValueError

The content is that of a store of the same structures, labels and splits that was prepared at once.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from multifid import __version__
from multifid.graphs.neighbors import edges_per_atom
from multifid.preparation.parts import add_notes
from multifid.preparation.properties import survey_property
from multifid.preparation.split import fitted
from multifid.preparation.survey import CUTOFFS, MeanSquare, survey_task
from multifid.readers.contract import LabelSet
from multifid.store.fields import MANIFEST, PARTED
from multifid.store.joined import Parts
from multifid.store.manifest import manifest_bytes, manifest_file, part_folder, read_manifest
from multifid.store.part import Part
from multifid.store.passes import sampled
from multifid.store.references import References
from multifid.store.store import Store
from multifid.store.writer import to_disk
from multifid.structures.elements import SYMBOLS
from multifid.structures.properties import Property
from multifid.structures.structure import SPLITS, TRAIN

CHUNK = 4096  # structures read at once


class Prepare(Protocol):
    """Makes the part: `prepare`, with everything but these two said."""

    def __call__(self, out: Path, onto: Store) -> Store | None: ...


def append(path: Path | str, prepare: Prepare, refit: bool = False) -> Store:
    """Add what `prepare` makes to a store, and open it.

    refit: reference energies and scale are fitted to the train split of all; else they stay as they are.
    ValueError or OSError for anything that a user can correct; the store is then as it was. BlockingIOError where
    another process adds to it.
    """
    path = Path(path)
    with _alone(path):
        old = Store(path)
        _remove_leftovers(old)
        folder = part_folder(path, old.additions + 1)
        try:
            part = prepare(folder, old)
            assert part is not None
            if not refit:
                _refuse_unreferenced(old, part)
            manifest = _manifest(old, part.parts.each[0], refit)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _commit(path, old, manifest)
    return Store(path)


PATIENCE = 3.0  # seconds to wait for a store: what a killed addition had begun holds it until it sees that


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the store until the end: two additions at once would make the same part."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no store {path}: `multifid prepare` makes one")
    handle = os.open(path, os.O_RDONLY)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(handle)
                raise BlockingIOError(f"another process is adding to {path}") from error
            time.sleep(0.05)
    try:
        yield
    finally:
        os.close(handle)


def _remove_leftovers(store: Store) -> None:
    """Parts that no manifest names: of a process that was killed. What prepare resumes from stays."""
    number = store.additions + 1
    while (folder := part_folder(store.path, number)).exists():
        shutil.rmtree(folder)
        number += 1


def refuse_foreign(store: Store, label_sets: Mapping[str, LabelSet], files: Mapping[str, str]) -> None:
    """ValueError where files have other labels than the store, or are in it. files: name -> checksum."""
    stored = {file["xxh3"]: file["name"] for file in store.manifest["source"]["files"]}
    for name, checksum in files.items():
        if checksum in stored:
            raise ValueError(
                f"{name} is in {store.path} already, as {stored[checksum]}: its structures would count twice"
            )
    for name, own in label_sets.items():
        if name not in store.tasks:
            raise ValueError(
                f"{store.path} has no label set {name!r}: it has {', '.join(store.tasks)} (--task names what is added; "
                "`multifid merge` makes one store of several label sets)"
            )
        about = store.manifest["tasks"][name]
        there = about.get("property")
        for what, here, stands in (
            ("level of theory", own.level_of_theory, about["level_of_theory"]),
            ("kind of energy", own.energy_kind, about["energy_kind"]),
            ("property", own.property and own.property.kind, there and there["kind"]),
            ("classes", own.property and list(own.property.classes), there and there["classes"]),
        ):
            if here != stands and not (what == "classes" and not here):
                hint = " (--level-of-theory TEXT, if it is the same)" if what == "level of theory" else ""
                raise ValueError(f"{what} of {name!r}: {stands!r} in {store.path}, {here!r} in the files{hint}")


def _refuse_unreferenced(old: Store, part: Store) -> None:
    """Elements without a reference energy cannot be trained on with references that are kept."""
    for name, about in part.manifest["tasks"].items():
        known = {int(z) for z in old.manifest["tasks"][name]["references"]}
        trained = {int(z) for z in about["references"]} if part.size("train") else set()
        if known and (new := sorted(trained - known)):
            raise ValueError(
                f"{name!r} has no reference energy of {' '.join(SYMBOLS[z] for z in new)}: "
                "--refit fits them again, to all structures"
            )


def _manifest(old: Store, part: Part, refit: bool) -> dict[str, Any]:
    """The manifest of a store and one more part."""
    before, added = old.manifest, part.manifest
    parts = Parts([*old.parts.each, part])
    _, checksum = read_manifest(part.path)
    about_part = {
        "checksum": checksum,
        "structures": part.structures,
        "parent": old.content.key,
        "references": "refit" if refit else "kept",
    }
    body: dict[str, Any] = {
        **{key: value for key, value in before.items() if key not in ("files", "content", "checksums", "xxh3")},
        "schema": PARTED,
        "created_by": f"multifid {__version__}",
        "source": _source(before["source"], added["source"], len(parts.each) - 1),
        "structures": parts.structures,
        "atoms": old.atoms + part.atoms,
        "elements": _sums(before["elements"], added["elements"], key=int),
        "tasks": {name: _task(name, about, old, part) for name, about in before["tasks"].items()},
        "splits": _splits(old, part),
        "skipped": _sums(before["skipped"], added["skipped"]),
        "skipped_first": {**added.get("skipped_first", {}), **before.get("skipped_first", {})},
        "dropped_labels": _sums(before.get("dropped_labels", {}), added.get("dropped_labels", {})),
        "first": before.get("first", old.checksum),
        "parts": [*before.get("parts", []), about_part],
        "content_of": dict(parts.content().fields),
    }
    if assumed := _sums(before.get("assumed", {}), added.get("assumed", {})):
        body["assumed"] = assumed
    if doubts := list(dict.fromkeys([*before.get("doubts", []), *added.get("doubts", [])])):
        body["doubts"] = doubts
    notes: dict[str, dict[str, int]] = {}
    for one in (before, added):
        add_notes(notes, one.get("notes", {}))
    if notes:
        body["notes"] = notes
    if refit:
        _fit_again(body, parts)
    else:
        found = {name: _deviation(old, part, name) for name in added["tasks"]}
        about_part["deviation"] = {name: meV for name, meV in found.items() if meV is not None}
    body["edges_per_atom"] = _edges(parts, body["splits"])
    return body


def _source(before: dict[str, Any], added: dict[str, Any], number: int) -> dict[str, Any]:
    """Where all structures come from; a file that was added says in which addition, and how it was read."""
    more = {"addition": number, "format": added["format"], "options": added["options"]}
    return {**before, "files": [*before["files"], *({**file, **more} for file in added["files"])]}


def _sums(before: Mapping[str, int], added: Mapping[str, int], key: Any = str) -> dict[str, int]:
    names = sorted({*before, *added}, key=key)
    return {name: before.get(name, 0) + added.get(name, 0) for name in names}


def _trained(store: Store | Part) -> set[int]:
    """The elements that a train split has; of a part also those that are trained on in parts before it."""
    manifest = store.manifest
    unseen = set(manifest["splits"].get("unseen_elements", []))
    return {int(z) for z in manifest["elements"]} - unseen if isinstance(store, Part) or store.size("train") else set()


def _splits(old: Store, part: Part) -> dict[str, Any]:
    before, added = old.manifest["splits"], part.manifest["splits"]
    counts = {name: before[name] + added[name] for name in SPLITS}
    unseen = {*before.get("unseen_elements", []), *added.get("unseen_elements", [])} - _trained(old) - _trained(part)
    duplicates = before.get("duplicates", 0) + added.get("duplicates", 0)
    return {
        **before,
        **counts,
        "rule": f"{before['rule']}; added: {added['rule']}",
        "unseen_elements": sorted(unseen),
        **({"duplicates": duplicates} if duplicates else {}),
    }


def _task(name: str, about: dict[str, Any], old: Store, part: Part) -> dict[str, Any]:
    """What is said of a task, references and scale left as they are."""
    own = part.manifest["tasks"].get(name)
    complete = list(own["complete"]) if own else []
    if not part.size("train"):
        complete = about["complete"]
    elif old.size("train"):
        complete = [kind for kind in about["complete"] if kind in complete]
    out = {**about, "complete": complete}
    if own is None:
        return out
    out["labels"] = _sums(about["labels"], own["labels"])
    there, here = about.get("isolated", {}), own.get("isolated", {})
    if apart := [z for z in there.keys() & here.keys() if there[z] != here[z]]:
        both = f"{there[apart[0]]} and {here[apart[0]]} eV"
        raise ValueError(f"{name}: the isolated atom {SYMBOLS[int(apart[0])]} has two energies: {both}")
    if there or here:
        out["isolated"] = dict(sorted({**there, **here}.items(), key=lambda item: int(item[0])))
    if "counts" in about.get("property", {}):
        classes, counts = about["property"]["classes"], own["property"]["counts"]
        if len(counts) > len(classes):
            raise ValueError(f"{name}: class {len(counts) - 1} in the files, and {len(classes)} classes in {old.path}")
        both_counts = [n + (counts[k] if k < len(counts) else 0) for k, n in enumerate(about["property"]["counts"])]
        out["property"] = {**about["property"], "counts": both_counts}
    return out


def _fit_again(body: dict[str, Any], parts: Parts) -> None:
    """References, scale and what is complete, as `prepare` finds them of all structures."""
    fields, split, elements = parts.fields(), parts.field("split"), [int(z) for z in body["elements"]]
    for name, about in body["tasks"].items():
        if "property" in about:
            asked = Property.from_manifest(name, about["property"])
            about |= survey_property(name, asked, fields, split, elements)
        else:
            isolated = {int(z): energy for z, energy in about.get("isolated", {}).items()}
            about |= survey_task(name, fields, split, elements, isolated)
    code, _ = fitted(split)
    body["splits"].pop("fitted_on", None)
    if code != TRAIN:
        body["splits"]["fitted_on"] = SPLITS[code]


def _deviation(old: Store, part: Part, name: str) -> float | None:
    """RMS of what the references leave of the new energies, meV/atom: large where they are of another kind."""
    about, total = old.manifest["tasks"][name], MeanSquare()
    if "property" in about:
        return None
    references = References.from_manifest(about)
    for start in range(0, part.structures, CHUNK):
        packed = part.read(np.arange(start, min(start + CHUNK, part.structures)), {name: None})
        total.add(references.align(packed.labels[name].energy, packed.numbers, packed.natoms) / packed.natoms)
    return 1000 * total.rms() if total.count else None


def _edges(parts: Parts, splits: dict[str, Any]) -> dict[str, float]:
    """Mean neighbours of an atom at a few cutoffs, on the sample that the estimates of costs go by."""
    split = splits.get("fitted_on", "train")
    packed = parts.read(parts.pick(split, sampled(splits[split])), {})
    return {f"{cutoff:g}": float(edges_per_atom(packed, cutoff)) for cutoff in CUTOFFS}


def _commit(path: Path, old: Store, manifest: dict[str, Any]) -> None:
    """The part is there; say so. Everything is on the disk before the rename."""
    kept = manifest_file(path, old.additions)
    kept.parent.mkdir(exist_ok=True)
    for file, data in ((kept, (path / MANIFEST).read_bytes()), (path / MANIFEST, manifest_bytes(manifest))):
        partial = file.with_name(f".{file.name}.partial")
        partial.write_bytes(data)
        to_disk(partial)
        partial.replace(file)
        to_disk(file.parent)

"""Which keys and columns of extended XYZ are labels: families of names, one choice for a whole file, what is left over.

A *family* is what names of one calculation share: `REF_energy` and `REF_forces`, `dft_energy` and `dft_force`, or
`energy`, `forces`, `stress` without a prefix. A file with two families holds labels and somebody's predictions, or two
methods: they are never mixed. Taken are, in this order of precedence, `REF_*`, `dft_*`, and names without a prefix,
whichever has labels; families of other names (`mace_*`, `xtb_*`, ...) only by options. Another of the three completes
the first one where the two share no kind of label, as in `REF_energy` beside `forces`.

The choice is made on the first frames of a file and holds for all of it. What looks like a label and is not taken is
told, with the option that takes it.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from multifid.readers.extxyz_frames import Frame, numbers_in
from multifid.readers.records import BadRecord

FAMILIES = {"ref": "REF_", "dft": "dft_", "": ""}  # in the order of precedence, as they are called
_SAME = {"reference": "ref"}
Keys = Mapping[str, tuple[str, ...]]  # kind of label -> keys or columns
STEMS = {  # in the order of precedence within a family
    "energy": ("energy", "potential_energy", "total_energy", "free_energy", "etot", "toten"),
    "forces": ("forces", "force"),
    "stress": ("stress", "stresses", "stress_tensor"),
    "virial": ("virial", "virials", "virial_tensor"),
}
_STEM = "|".join(stem for stems in STEMS.values() for stem in stems)
_NAME = re.compile(rf"(?:(?P<family>.+?)_)??(?P<stem>{_STEM})(?:_(?P<behind>.+))?")
_ALIKE = re.compile(
    r"e|energies|e_?0|u_?0|e_?tot|e_per_atom|(?:.*_)?(?:gradients?|grad)"
)  # may be one, but must be named
_BESIDE = re.compile(  # what is said of a label, and is none
    r".*(?:weights?|sigma|units?|std|var|variance|uncertainty|errors?|rmse|mae|max|min|mean|norm|scale|shift|tol|key|name"
    r"|kinetic.*|above_hull|hull.*|mask|source|method|type|level|converged|rel)"
)


class Name(NamedTuple):
    """What a key or a column looks like."""

    kind: str
    family: str | None  # None: one that is never taken unless it is named
    rank: int  # within its family: the lowest is taken
    fits: bool = True  # its value has the size of such a label
    of_atoms: bool = False  # a column where labels of structures are looked for: never taken


def looks_like(key: str) -> Name | None:
    """What a key or a column looks like by its name alone."""
    name = re.sub(r"[-. ]", "_", key.lower()).strip("_")
    match = _NAME.fullmatch(name)
    if match is None:
        return Name("forces" if "grad" in name else "energy", None, 0) if _ALIKE.fullmatch(name) else None
    family, behind = match["family"] or "", match["behind"] or ""
    kind, rank = next((k, stems.index(match["stem"])) for k, stems in STEMS.items() if match["stem"] in stems)
    if _BESIDE.fullmatch(behind) or _BESIDE.fullmatch(family):
        return None
    if behind and (family or (behind not in FAMILIES and behind not in _SAME)):
        return Name(kind, None, rank)
    family = behind or family
    family = _SAME.get(family, family)
    return Name(kind, family if family in FAMILIES else None, rank)


def labels_in(frame: Frame) -> dict[str, Name]:
    """The keys and columns of a frame that look like labels and have a value."""
    found = {}
    for key, text in frame.info.items():
        name = looks_like(key)
        if name is not None and (fits := _fits(name.kind, text, frame.natoms)) is not None:
            found[key] = name._replace(fits=fits)
    for column in frame.columns.places:
        name = looks_like(column)
        if name is not None and name.kind == "forces":
            found[column] = name._replace(fits=frame.columns.width(column) == 3)
        elif name is not None:
            found[column] = Name(name.kind, None, 0, of_atoms=True)
    return found


def _fits(kind: str, text: str, natoms: int) -> bool | None:
    """Whether a value has the size of a label; None where there is none."""
    try:
        values = numbers_in(text)
    except BadRecord:
        return False
    if values is None or np.isnan(values).all():
        return None
    if kind == "energy":
        return values.size == 1
    return values.size == 3 * natoms and values.ndim == 2 if kind == "forces" else values.size in (6, 9)


def choose(seen: Mapping[str, Name], given: Keys, fixed: Keys) -> dict[str, tuple[str, ...]]:
    """Kind of label -> keys, of which a frame's first is taken, for the names that are seen in a file.

    given: by options. fixed: chosen before; only kinds without any are added. Of one family a virial is taken where a
    frame has no stress.
    """
    kinds = {f: {_quantity(n.kind) for n in seen.values() if n.family == f and n.fits} for f in FAMILIES}
    families = [seen[key].family for keys in fixed.values() for key in keys if key in seen]
    taken = [family for family in FAMILIES if family in families]
    for family in FAMILIES:  # the first with labels, and those that share no kind with what is taken already
        if family not in taken and kinds[family] and not any(kinds[family] & kinds[other] for other in taken):
            taken.append(family)
    found = dict(fixed)
    for kind in STEMS:
        own = [(not n.fits, taken.index(n.family), n.rank, key) for key, n in seen.items()
               if n.kind == kind and n.family in taken]  # fmt: skip
        odd = [(list(FAMILIES).index(n.family), n.rank, key) for key, n in seen.items()
               if n.kind == kind and n.family in FAMILIES and not n.fits]  # fmt: skip
        if kind not in fixed and (own or odd):
            found[kind] = (min(own)[-1] if own else min(odd)[-1],)
    if "stress" in given:
        found.pop("virial", None)
    if "virial" in given:
        found.pop("stress", None)
    return {**found, **given}


def _quantity(kind: str) -> str:
    return "stress" if kind == "virial" else kind


def not_taken(names: Mapping[str, Name], keys: Keys) -> list[str]:
    """What looks like labels and is not taken, each with the option that takes it."""
    found = []
    for key, name in names.items():
        own = keys.get(name.kind, ())
        if key in own or (name.of_atoms and own):
            continue
        if name.of_atoms:
            found.append(f"{key} looks like {_ARTICLE[name.kind]} of each atom (which no option takes)")
            continue
        option = f"--option {name.kind}_key={key}"
        if "per_atom" in key.lower():
            option += " --option energy_per_atom=true"
        elif "grad" in key.lower():
            option += " --option forces_are_gradient=true"
        elif own and name.family is not None:
            option += f"; where {own[0]} is missing: --option {name.kind}_key={own[0]},{key}"
        found.append(f"{key} looks like {_ARTICLE[name.kind]} ({option})")
    return found


_ARTICLE = {"energy": "an energy", "forces": "forces", "stress": "a stress", "virial": "a virial"}

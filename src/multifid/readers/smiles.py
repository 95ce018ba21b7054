"""What a SMILES string says without a model of valences: formal charges, and atoms that are written out.

Grammar: OpenSMILES 1.0 (opensmiles.org). Atoms outside brackets (`C`, `c`, `Cl`) are neutral and carry hydrogens that
are not written; those in brackets say all of themselves: isotope, element, hydrogens, charge and number (`[15NH3+:4]`).
"""

import re
from collections import Counter
from dataclasses import dataclass

from multifid.structures.elements import NUMBERS

_BRACKET = re.compile(r"\[(\d*)([A-Z][a-z]?|[a-z][a-z]?)(@{0,2}(?:[A-Z]{2}\d+)?)(H\d*)?(\++\d*|-+\d*)?(:\d+)?\]")
_BARE = re.compile(r"Cl|Br|[BCNOPSFI]|[bcnops]")
_REST = re.compile(r"[-=#$:/\\.()]|\d|%\d\d|%\(\d+\)")  # bonds, branches, rings, parts


@dataclass(frozen=True, slots=True)
class Smiles:
    """charge: sum of the formal charges. atoms: Z -> how many are written; all of them, if `whole`, hydrogens too."""

    charge: int
    atoms: dict[int, int]
    whole: bool

    def fits(self, numbers: list[int]) -> bool:
        """Whether these can be the atoms: all but the hydrogens that SMILES leaves out, or all."""
        there = Counter(numbers)
        if self.whole:
            return there == Counter(self.atoms)
        hydrogens = there.pop(1, 0)
        return there == Counter({z: n for z, n in self.atoms.items() if z != 1}) and self.atoms.get(1, 0) <= hydrogens


def read_smiles(text: str) -> Smiles | None:
    """None where the string (up to a blank: a name may follow) is no SMILES, or has no atom."""
    charge, atoms, whole, place = 0, Counter[int](), True, 0
    text = (text.split() or [""])[0]
    while place < len(text):
        if match := _BRACKET.match(text, place):
            number = NUMBERS.get(match[2].capitalize())
            if number is None:
                return None
            atoms[number] += 1
            atoms[1] += int((match[4] or "H0")[1:] or 1)
            charge += _charge(match[5] or "")
        elif match := _BARE.match(text, place):
            atoms[NUMBERS[match[0].capitalize()]] += 1
            whole = False
        elif not (match := _REST.match(text, place)):
            return None
        place = match.end()
    return Smiles(charge, dict(+atoms), whole) if atoms else None


def _charge(text: str) -> int:
    """Of `+`, `--`, `+2`, `-1`."""
    signs = text.rstrip("0123456789")
    size = int(text[len(signs) :]) if text != signs else len(signs)
    return -size if signs.startswith("-") else size

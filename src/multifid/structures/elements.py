"""Atomic numbers and symbols."""

from collections import Counter
from collections.abc import Collection

import numpy as np
from ase.data import chemical_symbols

SYMBOLS: tuple[str, ...] = tuple(chemical_symbols[:119])  # SYMBOLS[Z]; SYMBOLS[0] is no element
MAX_Z = 118
NUMBERS: dict[str, int] = {symbol: z for z, symbol in enumerate(SYMBOLS) if z > 0}


def no_element(given: str | int) -> str:
    """That a symbol or an atomic number is no element, in a short phrase that names it."""
    if isinstance(given, int):
        return (
            f"unknown element: atomic number {given} is not within 1..{MAX_Z}{' (a dummy atom?)' if given == 0 else ''}"
        )
    known = {"X": " (a dummy atom)", "D": " (deuterium: write H)", "T": " (tritium: write H)"}
    return f"unknown element {given[:12]!r}{known.get(given, '')}"


def formula(numbers) -> str:
    """The formula in Hill order (C, H, then alphabetical), as `C2H6O1` with every count written."""
    counts = {SYMBOLS[z]: count for z, count in Counter(np.asarray(numbers).tolist()).items()}
    first = [s for s in ("C", "H") if "C" in counts and s in counts]
    rest = sorted(s for s in counts if s not in first)
    return "".join(f"{s}{counts[s]}" for s in (*first, *rest))


NOBLE = (0, 2, 10, 18, 36, 54, 86, 118)


def place_in_table(z: int) -> tuple[int, str]:
    """Period and column of an element: groups 1-18, and one column for each lanthanide with its actinide."""
    period = next(k for k, end in enumerate(NOBLE) if z <= end)
    first, end = NOBLE[period - 1], NOBLE[period]
    if z - first <= 2 and z != 2:
        return period, str(z - first)
    group = 18 - (end - z)
    return period, str(group) if group >= 3 else f"f{z - first}"


def chemical_neighbours(z: int, known: Collection[int]) -> list[int]:
    """Those of the known elements that are most like an element: the nearest of its column, else by atomic number.

    ValueError where none is known.
    """
    if not known:
        raise ValueError(f"no element is known that {SYMBOLS[z]} could be compared with")
    period, column = place_in_table(z)
    places = {other: place_in_table(other) for other in known if other != z}
    distance = {other: abs(p - period) for other, (p, c) in places.items() if c == column}
    distance = distance or {other: abs(other - z) for other in places}
    return sorted(other for other, d in distance.items() if d == min(distance.values()))

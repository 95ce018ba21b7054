"""Atomic numbers and symbols."""

from collections import Counter

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

"""Charge and multiplicity of a record: where formats keep them, and how numbers of the same name are told apart.

The charge is in e, under one of `CHARGE`. Where none is stated, molecules may carry atomic charges whose sum is one:
what ASE calls `initial_charges`.

The multiplicity 2S + 1 is under one of `MULTIPLICITY`, or follows from a number of unpaired electrons 2S under one of
`UNPAIRED`. Under `SPIN` people keep either; OMol25, fairchem and MACE mean the multiplicity, and so do we, unless
`spin_counts` says otherwise. A mistake cannot pass: with n electrons the multiplicity has the parity of n + 1 and the
number of unpaired electrons that of n, so one taken for the other never fits (`validate` skips it). 0 is no
multiplicity and means that none is stated, as in fairchem. Molecules without any may carry magnetic moments: `magmom`,
what a calculation found, or the sum of `initial_magmoms`, with which ASE's calculators of molecules choose the spin
state. Atomic charges and moments of crystals are starting values or oxidation states and say nothing of either.

What nothing states is None (see `Structure`): never a silent 0.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from multifid.readers.records import BadRecord, array, number

CHARGE = ("charge", "total_charge", "tot_charge", "net_charge", "molecular_charge", "system_charge")
SPIN = ("spin", "total_spin")
MULTIPLICITY = ("multiplicity", "spin_multiplicity", "mult")
UNPAIRED = ("unpaired_electrons", "num_unpaired_electrons", "n_unpaired", "nunpaired", "uhf")
_PLAIN = frozenset((*MULTIPLICITY, *UNPAIRED))
ROUNDED = 0.02  # sums of atomic charges and moments are whole within this


class ChargeOptions(BaseModel):
    """What the user says of charge and multiplicity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    charge: int | None = Field(None, ge=-128, le=127, description="charge in e of structures that do not state one")
    spin: int | None = Field(None, ge=1, le=255, description="multiplicity of structures that do not state one")
    spin_counts: Literal["multiplicity", "unpaired"] = Field(
        "multiplicity", description="what `spin` and `total_spin` are: 2S+1, or the number of unpaired electrons 2S"
    )


def charge_of(stated: Mapping[str, Any], options: ChargeOptions, keys: Sequence[str] = CHARGE) -> int | None:
    """The charge that is stated under one of the keys, else the options', else None."""
    if stated.keys().isdisjoint(keys):
        return options.charge
    found = {key: value for key in keys if (value := _whole(stated.get(key), key)) is not None}
    if len(set(found.values())) > 1:
        raise BadRecord(f"{' and '.join(found)} differ")
    return next(iter(found.values()), options.charge)


def spin_of(stated: Mapping[str, Any], options: ChargeOptions, keys: Sequence[str] = SPIN) -> int | None:
    """The multiplicity that is stated, else the options', else None. keys: where it may stand as well."""
    if stated.keys().isdisjoint(_PLAIN) and stated.keys().isdisjoint(keys):
        return options.spin
    plain = {key: whole for key in (*MULTIPLICITY, *UNPAIRED) if (whole := _multiplicity(stated, key, options))}
    if len(set(plain.values())) > 1:
        raise BadRecord(f"{' and '.join(plain)} differ")
    for name, multiplicity in plain.items():
        for key in keys:  # beside it, 2S + 1, 2S or S
            value = _number(stated.get(key), key)
            if value not in (None, 0.0, multiplicity, multiplicity - 1, (multiplicity - 1) / 2):
                raise BadRecord(f"{name} and {key} differ")
        return multiplicity
    found = {key: whole for key in keys if (whole := _multiplicity(stated, key, options))}
    if len(set(found.values())) > 1:
        raise BadRecord(f"{' and '.join(found)} differ")
    return next(iter(found.values()), options.spin)


def _multiplicity(stated: Mapping[str, Any], key: str, options: ChargeOptions) -> int | None:
    value = _whole(stated.get(key), key)
    if value is None:
        return None
    if key in UNPAIRED or (key not in MULTIPLICITY and options.spin_counts == "unpaired"):
        return abs(value) + 1
    return value or None


def of_atoms(values: object) -> int | None:
    """The whole number that the charges or moments of a molecule's atoms add up to; None where they do not."""
    if values is None:
        return None
    try:
        total = float(array(values, "charges").sum())
    except BadRecord:
        return None
    return round(total) if isfinite(total) and abs(total - round(total)) < ROUNDED else None


def spin_of_moments(moment: object, initial: object, numbers: np.ndarray, charge: int | None) -> int | None:
    """The multiplicity of a molecule from its magnetic moment, found or set; None where neither fits its electrons."""
    for values in (moment, initial):
        unpaired = of_atoms(values)
        electrons = int(numbers.sum()) - (charge or 0)
        if unpaired is not None and abs(unpaired) <= electrons and (electrons - unpaired) % 2 == 0:
            return abs(unpaired) + 1
    return None


def _number(value: object, what: str) -> float | None:
    """A number; None where nothing is stated: null, NaN or an empty text."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null", "nan")):
        return None
    if isinstance(value, bool):
        raise BadRecord(f"{what} is not a whole number")
    return None if isinstance(value, float) and np.isnan(value) else number(value, what)


def _whole(value: object, what: str) -> int | None:
    result = _number(value, what)
    if result is not None and abs(result - round(result)) > 1e-6:
        raise BadRecord(f"{what} is not a whole number")
    return None if result is None else round(result)

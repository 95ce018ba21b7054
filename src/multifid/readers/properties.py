"""Properties of records: which are wanted, and raw values as labels, whatever format they stand in.

Where properties are asked for, they are the labels: energies and forces of the same records are not read.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from multifid.readers.contract import LabelSet
from multifid.readers.records import BadRecord, array
from multifid.structures.properties import FORM, MOST_CLASSES, OF_ATOMS, VECTORS, Property
from multifid.structures.structure import Labels

TRUTH = {"true": 1, "t": 1, "yes": 1, "false": 0, "f": 0, "no": 0}
NOTHING = ("", "none", "null", "nan", "na", "n/a")
SHOWN = 40  # names of what is there, in an error


class PropertyOptions(BaseModel):
    """Which properties are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    properties: tuple[str, ...] = Field(
        (), description=f"properties in place of energies and forces, separated by ';': {FORM}"
    )

    @field_validator("properties", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        texts = [text for text in value.split(";") if text.strip()] if isinstance(value, str) else list(value)
        found = [Property.parse(text) for text in texts]
        names = [one.name for one in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two properties are called {', '.join(twice)}")
        return tuple(str(one) for one in found)

    def wanted(self) -> list[Property]:
        return [Property.parse(text) for text in self.properties]


def property_sets(options: Any) -> dict[str, LabelSet]:
    """The label sets of the properties that options ask for; none of options that know no properties."""
    wanted = options.wanted() if isinstance(options, PropertyOptions) else []
    return {one.name: LabelSet("not stated", "property", one) for one in wanted}


class Seeker:
    """Takes the wanted properties of record after record, and knows which no record has had.

    names: of everything that a record has, asked for in errors only.
    """

    def __init__(self, path: Path, options: PropertyOptions) -> None:
        self.path, self.wanted = path, options.wanted()
        self.missing = {one.key: one for one in self.wanted}
        self.seen: dict[str, None] = {}

    def labels(
        self, value_of: Callable[[str], Any], names: Callable[[], Iterable[str]], natoms: int, where: str
    ) -> dict[str, Labels]:
        """The labels of a record. value_of: key -> raw value, None where there is none.

        ValueError where a class is none of those that there are; BadRecord where a value has a wrong shape.
        """
        found = {}
        for one in self.wanted:
            raw = value_of(one.key)
            if raw is not None:
                self.missing.pop(one.key, None)
                try:
                    found[one.name] = Labels(kind=one.kind, value=value(one, raw, natoms))
                except ValueError as error:
                    raise ValueError(f"{self.path}, {where}: {error}") from None
        if self.missing and len(self.seen) < SHOWN:
            self.seen |= dict.fromkeys(names())
        return found

    def check(self) -> None:
        """ValueError where a property was in no record: its key is mistyped."""
        for key, one in self.missing.items():
            there = ", ".join(list(self.seen)[:SHOWN]) or "nothing"
            raise ValueError(
                f"{self.path}: no record has {key!r}, where the property {one.name!r} should be; there are {there} "
                "(NAME=KEY:KIND reads a property from another key than its name)"
            )


def value(one: Property, raw: Any, natoms: int) -> float | np.ndarray | None:
    """A raw value as the property's label; None where it says that there is none. BadRecord where it has a wrong shape.

    ValueError where a class is outside the range of those that there are.
    """
    if one.kind == "class":
        return class_number(one, raw)
    found = array(raw, one.key)
    if one.kind in OF_ATOMS:
        shape: Sequence[int] = (natoms, 3) if one.kind in VECTORS else (natoms,)
        if found.size != np.prod(shape) or (found.ndim and len(found) != natoms):
            raise BadRecord(f"{one.key} has a wrong shape: {one.kind} is {' x '.join(map(str, ('atoms', *shape[1:])))}")
        return found.reshape(shape)
    wanted = 3 if one.kind == "vector" else 1
    if found.size != wanted:
        raise BadRecord(f"{one.key} is not {'three numbers' if wanted == 3 else 'one number'}")
    return found.reshape(3) if wanted == 3 else float(found.reshape(()))


def class_number(one: Property, raw: Any) -> float | None:
    """The number of a class, by its name, as a whole number, or as a flag. ValueError where there is no such class."""
    text = str(raw.item() if isinstance(raw, np.ndarray | np.generic) and raw.size == 1 else raw).strip()
    if text in one.classes:
        return float(one.classes.index(text))
    if text.lower() in NOTHING:
        return None
    if one.classes:
        raise ValueError(f"{one.key} = {text!r} is none of the classes {', '.join(one.classes)}")
    if text.lower() in TRUTH:
        return float(TRUTH[text.lower()])
    try:
        number = float(text)
    except ValueError:
        raise ValueError(
            f"{one.key} = {text!r} is no number of a class (0, 1, ...); names of classes are listed behind the kind, "
            f"as {one.name}:class:{text},OTHER"
        ) from None
    if number != round(number) or not 0 <= number < MOST_CLASSES:
        raise ValueError(f"{one.key} = {text} is no class: classes are the whole numbers from 0 to {MOST_CLASSES - 1}")
    return number

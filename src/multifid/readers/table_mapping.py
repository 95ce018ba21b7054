"""What a mapping of a table says (`prepare table MAPPING.yaml`): which columns hold what, in which units.

    files: [data-*.parquet]     # parquet, csv, tsv, jsonl, json; relative to this file; or a list for each split
    numbers: atomic_numbers            # or symbols: species
    positions: positions
    cell: cell                         # with pbc, where structures are periodic
    pbc: [true, true, true]            # or a column
    charge: 0                          # a number, or a column; likewise spin, the multiplicity
    group: material_id                 # structures of one group share a split; default: their formula
    split: split                       # column of published splits: train, validation (val, valid), test
    id: frame_id                       # how a structure is called; default: the number of its row
    only: {functional: PBE}            # rows that have another value there are left out
    natoms: n_atoms                    # of HDF5 and zarr whose atoms lie end to end: how many each structure has
    within: [train, val]               # of HDF5 and zarr: which groups are read; default: all
    published: matpes                  # which dataset of `multifid get` this is, for licence and citations
    units: {energy: eV, length: angstrom, stress: kbar}    # force: energy/length and virial: energy, unless said
    labels:
      pbe: {level_of_theory: PBE, energy: energy, forces: forces, stress: stress, stress_sign: compression}

A column is called by its name; fields of nested columns with dots: `structure.lattice.matrix`. In a list, a number
takes an element and any other field is taken of all: `structure.sites.species.0.element`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from multifid.readers.mappings import SHIPPED, mapping_file
from multifid.readers.units import KINDS, factor
from multifid.store.fields import TASK_NAME
from multifid.structures.structure import SPLITS

MAPPINGS = (".yaml", ".yml")
LARGEST = 1 << 20  # bytes of a mapping
STRICT = ConfigDict(extra="forbid", frozen=True)
Files = tuple[str, ...] | dict[str, tuple[str, ...]]
Value = int | float | str | bool
TEXTS = ("symbols", "group", "split", "id")  # keys of columns of texts


class Units(BaseModel):
    """Units of a table, as `multifid.readers.units` reads them."""

    model_config = STRICT

    energy: str
    length: str
    force: str | None = None
    stress: str | None = None
    virial: str | None = None

    @model_validator(mode="after")
    def _known(self) -> "Units":
        for kind, text in self:
            if text is not None:
                factor(text, KINDS[kind], f"units.{kind}:")
        return self

    def of(self, kind: str) -> float:
        """How many of our units one of these is."""
        energy, length = factor(self.energy, KINDS["energy"]), factor(self.length, KINDS["length"])
        default = {"energy": energy, "length": length, "force": energy / length, "virial": energy}
        text: str | None = getattr(self, kind)
        return default[kind] if text is None else factor(text, KINDS[kind])


class LabelColumns(BaseModel):
    """The columns of one label set."""

    model_config = STRICT

    level_of_theory: str
    energy_kind: str = "total"
    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None
    stress_sign: Literal["tension", "compression"] | None = None
    energy_per_atom: bool = False
    forces_are_gradient: bool = False

    @model_validator(mode="after")
    def _complete(self) -> "LabelColumns":
        if self.energy is None and self.forces is None:
            raise ValueError("a label set needs a column `energy` or `forces`")
        if self.stress is not None and self.virial is not None:
            raise ValueError("`stress` and `virial` say the same: name one")
        if (self.stress is not None) != (self.stress_sign is not None):
            raise ValueError(
                "`stress` and `stress_sign` go together: tension (as in ASE) or compression (positive under pressure,"
                " as in VASP); a `virial` is minus stress times volume"
            )
        return self


class TableMapping(BaseModel):
    """A whole mapping."""

    model_config = STRICT

    files: Files = ()
    numbers: str | None = None
    symbols: str | None = None
    positions: str
    cell: str | None = None
    pbc: str | bool | tuple[bool, bool, bool] | None = None
    charge: int | str | None = None
    spin: int | str | None = None
    group: str | None = None
    split: str | None = None
    id: str | None = None
    only: dict[str, Value | tuple[Value, ...]] = Field(default_factory=dict)
    natoms: str | None = None
    within: tuple[str, ...] = ()
    published: str | None = None
    units: Units
    labels: dict[str, LabelColumns] = Field(min_length=1)

    @field_validator("files", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: (own,) if isinstance(own, str) else own for name, own in value.items()}
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "TableMapping":
        if (self.numbers is None) == (self.symbols is None):
            raise ValueError("name one column of `numbers` or `symbols`")
        if self.cell is not None and self.pbc is None:
            raise ValueError("`cell` needs `pbc`: [true, true, true], or a column")
        if self.cell is None and self.pbc is not None:
            raise ValueError("`pbc` needs `cell`")
        if isinstance(self.files, dict) and (unknown := self.files.keys() - set(SPLITS[:3])):
            raise ValueError(f"`files` of {min(unknown)!r}: splits are {', '.join(SPLITS[:3])}")
        if any(len({isinstance(v, str) for v in self.wanted(column)}) != 1 for column in self.only):
            raise ValueError("`only` takes texts or numbers of a column, not both")
        for name, own in self.labels.items():
            if not TASK_NAME.fullmatch(name):
                raise ValueError(f"a label set is named by letters, digits, _ and -, not {name!r}")
            if own.stress is not None and self.units.stress is None:
                raise ValueError(f"labels.{name}.stress needs its unit: units.stress, as GPa or kbar")
            if (own.stress or own.virial) and self.cell is None:
                raise ValueError(f"labels.{name}: a stress or virial needs `cell`")
        return self

    def columns(self) -> dict[str, str]:
        """Key of the mapping -> the column that it names."""
        keys = ("numbers", "symbols", "positions", "cell", "pbc", "charge", "spin", "group", "split", "id")
        found = {key: column for key in keys if isinstance(column := getattr(self, key), str)}
        for name, own in self.labels.items():
            for kind in ("energy", "forces", "stress", "virial"):
                if (column := getattr(own, kind)) is not None:
                    found[f"labels.{name}.{kind}"] = column
        return found | {f"only.{column}": column for column in self.only}

    def wanted(self, column: str) -> tuple[Value, ...]:
        """What `only` takes of a column."""
        values = self.only[column]
        return values if isinstance(values, tuple) else (values,)

    def is_text(self, key: str) -> bool:
        """Whether a column holds texts, by its key."""
        if key.startswith("only."):
            return isinstance(self.wanted(key.removeprefix("only."))[0], str)
        return key in TEXTS


def load_mapping(path: Path) -> TableMapping:
    """A mapping from its file. ValueError names file and key."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are too many for a mapping")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a mapping of keys to columns is expected")
    try:
        return TableMapping(**{str(key): value for key, value in content.items()})
    except ValidationError as error:
        raise ValueError(f"{path}: {problems(error)}") from None


def problems(error: ValidationError) -> str:
    """What is wrong, each with its key."""
    told = []
    for one in error.errors():
        key = ".".join(
            str(part) for part in one["loc"] if not str(part).startswith(("function-", "tuple[", "constrained"))
        )
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            known = f"{', '.join(TableMapping.model_fields)}; in labels {', '.join(LabelColumns.model_fields)}"
            message = f"unknown key; known are {known}"
        told.append(f"{key}: {message}" if key else message)
    return "; ".join(dict.fromkeys(told))


def resolve_mapping(
    inputs: Sequence[Path | str], of_splits: dict[str, list[Path]], options: dict[str, Any]
) -> tuple[list[Path | str], dict[str, list[Path]], dict[str, Any]]:
    """Inputs, files of splits and options with the mapping that one of the inputs is: its files in its place.

    In the options the mapping stands as a whole, so that the manifest says how a table was read.
    """
    named = [Path(path) for path in [*inputs, *(p for paths in of_splits.values() for p in paths)]]
    mappings = [path for path in named if path.suffix.lower() in MAPPINGS]
    if isinstance(options.get("mapping"), str | Path):
        mappings.append(mapping_file(options["mapping"]))
    elif "mapping" in options and not mappings:
        return list(inputs), of_splits, options
    if len(mappings) != 1:
        raise ValueError(
            f"a table needs one mapping, MAPPING.yaml or one of {', '.join(SHIPPED)}, that says what its columns are;"
            f" given are {len(mappings)}" + (f": {', '.join(map(str, mappings))}" if mappings else "")
        )
    (path,) = mappings
    mapping = load_mapping(path)
    options = {**options, "mapping": mapping.model_dump(mode="json")}
    if path not in named:
        return list(inputs), of_splits, options
    if not mapping.files:
        raise ValueError(
            f"{path}: files: which files the mapping is for is not said (or name them, and --option mapping={path})"
        )
    own = mapping.files if isinstance(mapping.files, dict) else {"": mapping.files}
    below = {name: [path.parent / file for file in files] for name, files in own.items()}
    given: list[Path | str] = [p for p in inputs if Path(p) != path]
    divided = {name: [p for p in paths if p != path] for name, paths in of_splits.items()}
    for name, paths in of_splits.items():
        if path in paths:  # all of it is this split
            divided[name] += [file for files in below.values() for file in files]
            return given, divided, options
    given += below.pop("", [])
    for name, files in below.items():
        divided[name] = divided.get(name, []) + files
    return given, divided, options

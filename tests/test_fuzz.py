"""Any value anywhere in a record: a skip, a missing label or a sound structure; the record beside it is kept."""

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from multifid.preparation.parts import Assignment, columns_of, found_in, read_part
from multifid.readers import alexandria, aselmdb, extxyz, mptrj

NUMBERS = st.floats() | st.integers(-(10**25), 10**25) | st.sampled_from([0, -1, 119, 1e300, 1e-300, 3e38, 1e39, 1e5])
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=4) | st.sampled_from(["H", "NaN", "X", "mp-1"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


def crystal(a: float) -> dict:
    sites = [{"species": [{"element": e, "occu": 1}], "xyz": [x, x, x]} for e, x in (("Na", 0.0), ("Cl", a / 2))]
    return {"lattice": {"matrix": [[a, 0, 0], [0, a, 0], [0, 0, a]], "pbc": [True] * 3}, "sites": sites, "charge": 0}


STRESS = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
FORCES = [[0.0, 0.0, 0.1], [0.0, 0.0, -0.1]]


def of_mptrj() -> dict:
    return {
        "structure": crystal(4.2), "uncorrected_total_energy": -7.0, "force": FORCES, "stress": STRESS, "magmom": None,
    }  # fmt: skip


def of_entries() -> dict:
    return {"structure": crystal(4.2), "data": {"mat_id": "agm1", "energy_total": -7.0, "stress": STRESS}}


def of_trajectory() -> dict:
    return {"structure": crystal(4.2), "energy": -7.0, "forces": FORCES, "stress": STRESS}


def of_row() -> dict:
    return {
        "numbers": [11, 17], "positions": [[0.0, 0, 0], [2.1, 2.1, 2.1]],
        "cell": [[4.2, 0, 0], [0, 4.2, 0], [0, 0, 4.2]], "pbc": [True] * 3, "energy": -7.0, "forces": FORCES,
        "stress": [0.0] * 6, "data": {"sid": "agm1_0", "charge": 0, "spin": 1},
    }  # fmt: skip


def places(tree: Any, above: tuple = ()) -> list[tuple]:
    """The paths of all values in nested lists and dictionaries."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [above, *(place for key, value in inner for place in places(value, (*above, key)))]


def grafted(tree: Any, place: tuple, value: Any) -> Any:
    """The tree with another value at a place."""
    if not place:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[place[0]] = grafted(tree[place[0]], place[1:], value)
    return copy


@st.composite
def grafts(draw, record: dict) -> Any:
    for _ in range(draw(st.integers(1, 3))):
        record = grafted(record, draw(st.sampled_from(places(record))), draw(VALUES))
    return record


def stored(reader, path: Path) -> int:
    """How many structures a store would take of a file; what it takes is finite where it must be."""
    work = Assignment(path, path.name, None, path.parent / "out", None)
    read_part(reader, reader.Options(), work, lambda *far: None)
    found = found_in(work.out)
    for piece in found.pieces:
        if piece.contents.structures:
            columns = columns_of(piece)
            assert np.isfinite(columns["positions"]).all() and columns["numbers"].min() >= 1
            assert np.isfinite(columns.get("cell", np.zeros(1))).all()
            assert not any(np.isinf(values).any() for name, values in columns.items() if name.startswith("labels/"))
    return found.structures


def read_json(reader, content: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.json"
        path.write_text(json.dumps(content))
        return stored(reader, path)


@settings(max_examples=30, deadline=None)
@given(grafts(of_mptrj()))
def test_mptrj(record):
    assert read_json(mptrj, {"mp-1": {"bad": record, "good": of_mptrj()}}) >= 1


@settings(max_examples=30, deadline=None)
@given(grafts(of_entries()))
def test_alexandria_entries(record):
    assert read_json(alexandria, {"entries": [record, of_entries()]}) >= 1


@pytest.mark.parametrize("charge", [9.3e18, -(10**30), 128])
def test_a_charge_that_nothing_can_hold_costs_its_structure_only(charge):
    strange = of_trajectory()
    strange["structure"]["charge"] = charge
    assert read_json(alexandria, {"agm1": [{"steps": [strange, of_trajectory()]}]}) == 1


@settings(max_examples=30, deadline=None)
@given(grafts(of_trajectory()))
def test_alexandria_trajectories(record):
    assert read_json(alexandria, {"agm1": [{"steps": [record, of_trajectory()]}]}) >= 1


@settings(max_examples=30, deadline=None)
@given(grafts(of_row()))
def test_rows_of_a_database(record):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.aselmdb"
        with (
            lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 20) as database,
            database.begin(write=True) as into,
        ):
            for key, value in ((b"1", record), (b"2", of_row())):
                into.put(key, zlib.compress(json.dumps(value).encode()))
        assert stored(aselmdb, path) >= 1


WORDS = st.sampled_from(
    ["Lattice=", '"', "energy=", "nan", "inf", "1e400", "-1", "0", "9" * 30, "=", "\n", " ", "T", "pbc=", "Properties=",
     "H", "pos:R:3", "species:S:1:pos:R:-1", "forces:R:99999999", "é", "\x00", "\\", "'", "{", "]", "stress=",
     "virial=", "charge="]
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@example([(0, 1, "9" * 30)])
@given(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 8), WORDS), min_size=1, max_size=4))
def test_extended_xyz(edits):
    """Words put anywhere into the first of two frames: nothing but an error that names the file may come of it."""
    frame = '2\nProperties=species:S:1:pos:R:3:forces:R:3 Lattice="9 0 0 0 9 0 0 0 9" energy=-27.0 pbc="T T T"\n'
    frame += "H 0 0 0 0 0 0.1\nH 0 0 0.74 0 0 -0.1\n"
    text = frame
    for place, cut, word in edits:
        text = text[:place] + word + text[place + cut :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.xyz"
        path.write_text(text + frame)
        try:
            stored(extxyz, path)
        except ValueError as error:
            assert "in.xyz" in str(error)

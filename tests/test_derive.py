"""Stores from stores: what is merged is what was there, conditions select what they say, parents are known."""

from pathlib import Path

import numpy as np
import pytest

from multifid.preparation.prepare import prepare
from multifid.readers.stores import Options
from multifid.store.store import Store
from multifid.structures.structure import SPLITS
from multifid.workflows.derive import merge, subset


def rows(store: Store) -> list[tuple]:
    """Every structure with everything that is said of it."""
    found = []
    for i in range(store.structures):
        packed = store.read(np.array([i]))
        labels = {
            task: (own.energy.tobytes(), None if own.forces is None else own.forces.tobytes())
            for task, own in packed.labels.items()
            if np.isfinite(own.energy).any() or (own.forces is not None and np.isfinite(own.forces).any())
        }
        geometry = [packed.numbers, packed.positions, packed.cell, packed.pbc, packed.charge, packed.spin]
        said = (store.source_id(i), int(store.field("split")[i]), int(store.field("relative")[i]))
        found.append((*said, *(x.tobytes() for x in geometry), labels))
    return found


def test_a_merged_store_is_its_parents_and_names_them(stores, tmp_path):
    parents = [Store(stores["apple"]), Store(stores["berry"])]
    both = merge([stores["apple"], stores["berry"]], tmp_path / "both", workers=2)
    assert rows(both) == [*rows(parents[0]), *rows(parents[1])]
    assert both.tasks == ["apple", "berry"]
    assert [both.size(s) for s in SPLITS] == [sum(p.size(s) for p in parents) for s in SPLITS]
    for parent in parents:
        (task,) = parent.tasks
        for what in ("references", "scale", "level_of_theory", "labels"):
            there, here = (x.manifest["tasks"][task][what] for x in (parent, both))
            assert here == pytest.approx(there) if what in ("references", "scale") else here == there
    files = both.manifest["source"]["files"]
    assert [f["store"]["content"] for f in files] == [p.content.key for p in parents]
    assert [f["store"]["source"] for f in files] == [p.manifest["source"] for p in parents]


def test_conditions_select_what_they_say(stores, tmp_path):
    whole = Store(stores["apple"])
    packed = whole.read(np.arange(whole.structures))
    lengths = np.linalg.norm(packed.labels["apple"].forces, axis=1)
    longest = np.maximum.reduceat(lengths, packed.offsets[:-1])
    bound = float(np.median(longest))
    part = subset(stores["apple"], tmp_path / "part", [f"forces < {bound!r}", "atoms >= 2"])
    assert rows(part) == [
        r for r, f, n in zip(rows(whole), longest, packed.natoms, strict=True) if f < bound and n >= 2
    ]
    assert 0 < part.structures < whole.structures
    assert part.manifest["source"]["options"]["where"] == f"forces < {bound!r}; atoms >= 2"
    assert subset(tmp_path / "part", tmp_path / "again", ["atoms > 0"]).content.key == part.content.key
    with pytest.raises(ValueError, match="no structure can be used"):
        subset(stores["apple"], tmp_path / "none", ["elements has U"])


def test_elements(tmp_path):
    kinds = ["H", "O", "C"]
    text = "".join(
        f"2\nProperties=species:S:1:pos:R:3 energy={-k}\n{a} 0 0 0\n{b} 0 0 {1 + 0.01 * k}\n"
        for k, (a, b) in enumerate((a, b) for a in kinds for b in kinds)
    )
    (tmp_path / "in.xyz").write_text(text)
    prepare("extxyz", [tmp_path / "in.xyz"], tmp_path / "all", fractions=(1, 0, 0), trust_units=True, progress=False)
    for where, count in (("elements in H,O", 4), ("elements has C", 5), ("elements has C,O", 2), ("energy <= -3", 6)):
        out = tmp_path / where.replace(" ", "")
        assert subset(tmp_path / "all", out, [where]).structures == count


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("atoms", "is not understood: there are atoms, charge"),
        ("atoms < few", "'few' is not a number"),
        ("elements in H,Xx", "'Xx' is no element"),
        ("__import__('os') < 1", "is not understood"),
    ],
)
def test_a_condition_that_is_none_says_what_there_is(where, message):
    with pytest.raises(ValueError, match=message):
        Options(where=where)


def test_one_name_for_two_levels_of_theory_is_refused(stores, tmp_path):
    text = "".join(f"1\nProperties=species:S:1:pos:R:3 energy={-k}\nH 0 0 0\n" for k in range(12))
    (tmp_path / "in.xyz").write_text(text)
    other: Path = tmp_path / "other"
    prepare(
        "extxyz", [tmp_path / "in.xyz"], other, task="apple", level_of_theory="other", trust_units=True, progress=False
    )
    with pytest.raises(ValueError, match=r"task apple is .* they cannot be one"):
        merge([stores["apple"], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()

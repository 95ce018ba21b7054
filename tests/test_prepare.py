"""`prepare`: every record is accounted for, no test structure touches a fit, and nothing half-written is a store."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from multifid.preparation import prepare as module
from multifid.preparation.prepare import prepare
from multifid.readers.contract import IsolatedAtom, LabelSet, Skip, one_part
from multifid.store.store import Store
from multifid.structures.structure import SPLITS, Labels, Structure


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    shift: float = 0.0


def molecule(i: int) -> Structure:
    """Compositions and labels that depend on i; relatives of ten."""
    random = np.random.default_rng(i)
    n = 2 + i % 5
    numbers = random.choice([1, 6, 8], n)
    energy = float(np.array([0, -13.0, 0, 0, 0, 0, -1030.0, 0, -2040.0])[numbers].sum() + 0.1 * n * random.normal())
    labels = {"fake": Labels(energy, random.normal(0, 2, (n, 3)))}
    return Structure(numbers, random.uniform(0, 9, (n, 3)), labels, relative=str(i // 10), source_id=str(i))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A format whose records are handed over: `fake(records, name="out", **options of prepare)` makes a store."""
    source = tmp_path / "input.fake"
    source.write_text("fake")

    def run(records, name: str = "out", inputs: list | None = None, **keywords) -> Store:
        def read(path: Path, options: Options, progress, part=None) -> Iterator:
            yield from records(path) if callable(records) else records

        reader = SimpleNamespace(
            TASKS={"fake": LabelSet("a theory", "total"), "other": LabelSet("another theory", "total")},
            RELATIVE="decade",
            ENDINGS=(".fake",),
            Options=Options,
            parts=one_part,
            read=read,
        )
        monkeypatch.setattr(module, "reader", lambda format: reader)
        return prepare("fake", inputs or [source], tmp_path / name, progress=False, **keywords)

    return run


def molecules(count: int = 200) -> list[Structure]:
    return [molecule(i) for i in range(count)]


def test_relatives_share_a_split_and_the_rule_is_written_down(fake):
    store = fake(molecules())
    split = store.field("split")
    assert all(len(set(split[i : i + 10].tolist())) == 1 for i in range(0, 200, 10))
    splits = store.manifest["splits"]
    assert [splits[name] for name in SPLITS] == [160, 20, 20, 0]
    assert (splits["rule"], splits["seed"]) == ("by decade", 0)


def test_references_and_scale_are_those_of_the_train_split(fake):
    content = molecules()
    store = fake(content)
    train = store.index("train")
    counts = np.array([[(content[i].numbers == z).sum() for z in (1, 6, 8)] for i in train])
    atoms = counts.sum(axis=1)
    energies = np.array([content[i].labels["fake"].energy for i in train])
    expected = np.linalg.lstsq(counts / atoms[:, None], energies / atoms, rcond=None)[0]
    task = store.manifest["tasks"]["fake"]
    np.testing.assert_allclose([task["references"][z] for z in ("1", "6", "8")], expected, atol=1e-9)
    forces = np.concatenate([content[i].labels["fake"].forces for i in train]).astype(np.float32)
    assert task["scale"] == pytest.approx(np.sqrt(np.mean(forces.astype(float) ** 2)), rel=1e-9)
    assert task["rank"] == 3 and task["labels"] == {"energy": 200, "forces": 200, "stress": 0}
    left = energies / atoms - counts / atoms[:, None] @ expected
    assert task["residual"] == pytest.approx(1000 * np.sqrt(np.mean(left**2)), rel=1e-9)


def test_no_validation_or_test_label_touches_references_or_scale(fake):
    first = fake(molecules(), "first")
    content = molecules()
    for i in np.concatenate([first.index("validation"), first.index("test")]):
        content[i].labels["fake"] = Labels(1e5 * (i + 1.0), content[i].labels["fake"].forces * 1000)
    second = fake(content, "second")
    assert second.manifest["tasks"] == first.manifest["tasks"]
    assert (second.field("labels/fake/energy") != first.field("labels/fake/energy")).any()
    content[first.index("train")[0]].labels["fake"].energy += 1.0
    assert fake(content, "third").manifest["tasks"] != first.manifest["tasks"]


def test_without_forces_the_scale_is_that_of_the_aligned_energy_per_atom(fake):
    content = molecules()
    for structure in content:
        structure.labels["fake"].forces = None
    task = fake(content).manifest["tasks"]["fake"]
    assert task["scale"] == pytest.approx(task["residual"] / 1000, rel=1e-6)


def test_forces_alone_make_a_store_without_references(fake):
    content = molecules()
    for structure in content:
        structure.labels["fake"].energy = float("nan")
    store = fake(content)
    assert store.manifest["tasks"]["fake"]["references"] == {}
    assert np.isnan(store.read([0]).labels["fake"].energy).all()


def bad_records() -> dict[str, Structure | Skip]:
    here = np.zeros((2, 3))
    apart = np.array([[0.0, 0, 0], [0, 0, 1]])
    two = np.array([1, 8])
    energy = {"fake": Labels(-1.0)}

    def bad(numbers=two, positions=apart, labels=energy, **more):
        labels = {task: Labels(x.energy, x.forces, x.stress) for task, x in labels.items()}
        return Structure(numbers, positions, labels, "r", "bad", **more)

    cell, pbc = np.diag([4.0, 4, 4]), np.array([True, True, True])
    edge = np.array([[0.0, 2, 2], [4 - 1e-4, 2, 2]])
    return {
        "reader's reason": Skip("reader's reason", "bad"),
        "no atoms": bad(np.zeros(0, int), np.zeros((0, 3))),
        "unknown element: atomic number 0 is not within 1..118 (a dummy atom?)": bad(np.array([0, 8])),
        "positions of another length than the atoms": bad(positions=np.zeros((3, 3))),
        "positions are not finite": bad(positions=apart * np.nan),
        "two atoms closer than 0.001 angstrom": bad(positions=here),
        "no label": bad(labels={"fake": Labels()}),
        "forces of another length than the atoms": bad(labels={"fake": Labels(1.0, np.zeros((3, 3)))}),
        "stress has a wrong shape": bad(labels={"fake": Labels(1.0, None, np.zeros(6))}),
        "periodic without a cell": bad(pbc=pbc),
        "the cell has no volume": bad(cell=np.ones((3, 3)) + np.eye(3)[:1], pbc=pbc),
        "a periodic cell vector is zero or not finite": bad(cell=np.full((3, 3), np.inf), pbc=pbc),
        "charge is not within -128..127": bad(charge=200),
        "spin multiplicity is not within 1..255": bad(spin=0),
        "periodic images coincide": bad(positions=edge, cell=cell, pbc=pbc),
        "images coincide in a slab": bad(positions=edge[:, ::-1], cell=cell, pbc=np.array([False, False, True])),
    }


def test_bad_records_are_skipped_counted_and_listed(fake):
    bad = bad_records()
    store = fake([*molecules(), *bad.values()])
    skipped = dict(store.manifest["skipped"])
    assert skipped.pop("two atoms closer than 0.001 angstrom") == 3
    images = {"periodic images coincide", "images coincide in a slab", "two atoms closer than 0.001 angstrom"}
    assert skipped == dict.fromkeys(set(bad) - images, 1)
    assert store.structures == 200
    listed = list(store.skipped())
    assert len(listed) == len(bad) and {(s["file"], s["where"]) for s in listed} == {("input.fake", "bad")}


def test_atoms_that_only_touch_across_an_open_direction_are_kept(fake):
    cell, pbc = np.diag([4.0, 4, 4]), np.array([False, True, True])
    edge = np.array([[0.0, 2, 2], [4 - 1e-4, 2, 2]])
    ok = Structure(np.array([1, 8]), edge, {"fake": Labels(-1.0)}, "ok", "ok", cell=cell, pbc=pbc)
    large = Structure(np.full(100, 6), np.arange(300.0).reshape(100, 3), {"fake": Labels(-1.0)}, "l", "l")
    assert fake([*molecules(), ok, large]).structures == 202


def test_infinite_labels_become_missing_labels_and_are_counted(fake):
    content = molecules()
    content[0].labels["fake"].energy = float("inf")
    content[1].labels["fake"].forces[0, 2] = np.inf
    content[2].labels["fake"].forces[1, 0] = np.nan
    content[3].labels["fake"].forces[:] = np.nan
    content[4].labels["fake"].forces[1, 0] = 1e300
    store = fake(content)
    assert store.manifest["dropped_labels"] == {"energy is infinite": 1, "forces are infinite": 2}
    assert store.manifest["tasks"]["fake"]["labels"] == {"energy": 199, "forces": 199, "stress": 0}
    read = store.read([0, 1, 2, 3, 4])
    assert np.isnan(read.labels["fake"].energy[0])
    lost = np.isnan(read.labels["fake"].forces)
    first = read.offsets
    assert np.flatnonzero(lost.any(axis=1)).tolist() == [
        first[1], first[2] + 1, *range(first[3], first[4]), first[4] + 1,
    ]  # fmt: skip
    assert (lost.any(axis=1) == lost.all(axis=1)).all()


def test_isolated_atoms_override_and_are_no_structures(fake):
    store = fake([*molecules(), IsolatedAtom("fake", 8, -2039.5), IsolatedAtom("fake", 8, -2039.5)])
    assert store.manifest["tasks"]["fake"]["references"]["8"] == -2039.5 and store.structures == 200
    with pytest.raises(ValueError, match=r"Z=8 has two energies: -2039\.5 and -2000\.0 eV"):
        fake([IsolatedAtom("fake", 8, -2039.5), IsolatedAtom("fake", 8, -2000.0)], "two")


def test_a_task_is_named_and_described_by_the_user(fake):
    store = fake(molecules(), task="mine", level_of_theory="PBE")
    assert store.tasks == ["mine"] and store.manifest["tasks"]["mine"]["level_of_theory"] == "PBE"
    content = molecules()
    content[100].labels["other"] = Labels(1.0)
    assert fake(content, "both").tasks == ["fake", "other"]
    with pytest.raises(ValueError, match=r"several label sets \(fake, other\)"):
        fake(content, "no", task="mine")
    with pytest.raises(ValueError, match="named by letters"):
        fake(content, "no", task="a/b")


def test_an_element_only_in_test_is_set_aside(fake):
    first = fake(molecules(), "first")
    content = molecules()
    content[int(first.index("test")[3])].numbers[0] = 92
    store = fake(content, "second")
    assert store.manifest["splits"]["unused"] == 1 and store.manifest["splits"]["unseen_elements"] == [92]
    assert store.index("unused").tolist() == [first.index("test")[3]]


def test_edges_per_atom_are_counted_on_the_train_split(fake):
    line = [Structure(np.full(4, 6), np.outer(np.arange(4.0) * 2, [1, 0, 0]) + i, {"fake": Labels(-1.0)}, str(i), "")
            for i in range(30)]  # fmt: skip
    edges = fake(line).manifest["edges_per_atom"]
    assert edges["5"] == pytest.approx(10 / 4) and edges["6"] >= edges["5"] >= edges["4"]


def test_files_of_a_split_come_last_and_every_structure_knows_its_file(fake, tmp_path):
    folder = tmp_path / "deep"
    folder.mkdir()
    paths = [tmp_path / "a.fake", folder / "a.fake", tmp_path / "t.fake"]
    for path in paths:
        path.write_text(path.as_posix())
    content = {path: [molecule(100 * k + i) for i in range(30 + k)] for k, path in enumerate(paths)}
    store = fake(content.__getitem__, inputs=[paths[0], paths[2], paths[1]], files_of_split={"test": [paths[2]]})
    assert [f["name"] for f in store.manifest["source"]["files"]] == ["a.fake", "deep/a.fake", "t.fake"]
    assert [f["structures"] for f in store.manifest["source"]["files"]] == [30, 31, 32]
    assert store.index("test").tolist() == list(range(61, 93))
    names = [store.source_file(i) for i in (0, 29, 30, 60, 61, 92)]
    assert names == ["a.fake", "a.fake", "deep/a.fake", "deep/a.fake", "t.fake", "t.fake"]
    with pytest.raises(ValueError, match="is given twice"):
        fake(content.__getitem__, "no", inputs=[paths[0], paths[0]])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        fake(content.__getitem__, "no", inputs=[tmp_path / "none"])


def test_a_limit_holds_for_each_file(fake, tmp_path):
    other = tmp_path / "other.fake"
    other.write_text("o")
    store = fake(molecules(), inputs=[tmp_path / "input.fake", other], limit=40)
    assert [f["structures"] for f in store.manifest["source"]["files"]] == [40, 40]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        fake(molecules(), "no", limit=0)


def test_the_same_input_twice_gives_the_same_bytes(fake):
    records = [*molecules(), Skip("energy is NaN", "x")]
    one, two = fake(records, "one"), fake(molecules() + records[200:], "two")
    files = sorted(p.relative_to(one.path) for p in one.path.rglob("*") if p.is_file())
    assert [(one.path / f).read_bytes() for f in files] == [(two.path / f).read_bytes() for f in files]
    text = (one.path / "manifest.json").read_text()
    assert str(one.path.parent) not in text and one.path.name not in text


def test_an_error_in_the_middle_leaves_nothing(fake, tmp_path):
    def breaks(path):
        yield from molecules(50)
        raise ValueError(f"{path} ends within a frame")

    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"input\.fake ends within a frame"):
        fake(breaks)
    with pytest.raises(ValueError, match=r"input\.fake: no structure can be used"):
        fake([Skip("energy is NaN", "1")])
    with pytest.raises(ValueError, match="validation split would be empty"):
        fake(molecules(2))
    assert set(tmp_path.iterdir()) == before
    assert fake(molecules()).structures == 200
    with pytest.raises(FileExistsError, match="exists already"):
        fake(molecules())


def test_an_unknown_option_or_format_names_those_there_are(fake, tmp_path):
    with pytest.raises(ValueError, match=r"options of fake: shft.*\(there are: shift\)"):
        fake(molecules(), options={"shft": 1})
    with pytest.raises(ValueError, match=r"unknown format 'xyz': known are .*extxyz"):
        from multifid.readers import reader

        reader("xyz")


SCRIPT = """
import os, resource, signal, sys
sys.path.insert(0, {tests!r})
import numpy as np
from types import SimpleNamespace
from pathlib import Path
import test_prepare as t
from multifid.structures.structure import Labels, Structure
count, kill = {count}, {kill}
random = np.random.default_rng(0)
numbers, positions = np.full(300, 6), random.uniform(0, 90, (300, 3))
def read(path, options, progress, part=None):
    for i in range(count):
        if i == kill:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        yield Structure(numbers, positions, {{"fake": Labels(-1.0 * i, positions / 90)}}, str(i), str(i))
made = SimpleNamespace(TASKS={{"fake": t.LabelSet("x", "total")}}, RELATIVE="number", Options=t.Options, read=read)
made.parts, made.ENDINGS = t.one_part, (".fake",)
t.module.reader = lambda format: made
t.prepare("fake", [Path({source!r})], Path({out!r}), progress=False)
print(sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024)
"""


def script(tmp_path: Path, count: int, kill: int = -1) -> subprocess.CompletedProcess:
    source, out = tmp_path / "input", tmp_path / f"out{count}"
    source.write_text("x")
    code = SCRIPT.format(tests=str(Path(__file__).parent), count=count, kill=kill, source=str(source), out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_a_killed_prepare_leaves_no_store(tmp_path):
    assert script(tmp_path, 100, kill=50).returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out100.partial", ".out100.parts", "input"]
    assert script(tmp_path, 100).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input", "out100"]
    assert Store(tmp_path / "out100", verify="open").structures == 100


def test_memory_does_not_grow_with_the_number_of_structures(tmp_path):
    small, large = (float(script(tmp_path, count).stdout) for count in (3_000, 7_000))
    written = sum(p.stat().st_size for p in (tmp_path / "out7000").rglob("*") if p.is_file()) / 2**20
    assert written > 50 and large - small < 12


DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the published sample data are not beside the repository")


@real
def test_the_train_and_test_files_of_acac_are_split_as_given(tmp_path):
    acac = DATA / "organic_dft" / "acac"
    train = [acac / "train_300K.xyz", acac / "train_600K.xyz"]
    store = prepare(
        "extxyz",
        [*train, acac / "isolated_atoms.xyz"],
        tmp_path / "acac",
        task="acac",
        files_of_split={"test": sorted(acac.glob("test_*.xyz"))},
        level_of_theory="PBE-D3/def2-SVP",
        progress=False,
    )
    splits = store.manifest["splits"]
    assert splits["train"] + splits["validation"] == 1000 and splits["test"] == 650 + 650 + 45 + 15
    assert store.manifest["skipped"] == {} and store.structures == 2360
    task = store.manifest["tasks"]["acac"]
    assert task["references"] == {"1": -13.568422178253735, "6": -1026.8538996116154, "8": -2037.796869412825}
    assert task["labels"] == {"energy": 2360, "forces": 2300, "stress": 0}


@real
def test_every_ani1x_conformer_is_stored_or_skipped_with_a_reason(tmp_path):
    files = {"physicsml_tests_ani1x.h5": 96, "modelforge_ani1_n5.hdf5": 8, "ani1x_sample.h5": 808}
    store = prepare("ani1x", [DATA / "ani1x" / name for name in files], tmp_path / "all", progress=False)
    assert {f["name"]: f["structures"] for f in store.manifest["source"]["files"]} == files
    assert store.manifest["skipped"] == {}
    formulas = store.field("relative")
    split = store.field("split")
    assert all(len(set(split[formulas == f].tolist())) == 1 for f in np.unique(formulas))
    for name, count in list(files.items())[:2]:
        one = prepare("ani1x", [DATA / "ani1x" / name], tmp_path / name, progress=False)
        assert one.structures + sum(one.manifest["skipped"].values()) == count


def test_charges_that_no_source_states_are_counted_and_impossible_multiplicities_skipped(tmp_path):
    water, lone = "3\n{}\nO 0 0 0\nH 0 0 0.96\nH 0 0.93 -0.24\n", "2\n{}\nO 0 0 0\nH 0 0 0.97\n"
    stated = [water.format(f"energy=-1 charge=0 spin={spin}") for spin in (1, 3, 1, 1)]
    wrong = [water.format("energy=-1 charge=0 spin=2"), lone.format("energy=-1 charge=-1 spin=12")]
    quiet = [water.format("energy=-1"), lone.format("energy=-1"), lone.format("energy=-1 charge=0")]
    crystal = lone.format('energy=-1 Lattice="9 0 0 0 9 0 0 0 9"')
    (tmp_path / "a.xyz").write_text("".join([*stated, *wrong, *quiet, crystal]))
    store = prepare("extxyz", [tmp_path / "a.xyz"], tmp_path / "store", trust_units=True, progress=False)
    read = store.read(np.arange(store.structures))
    assert read.charge.tolist() == [0] * 8 and read.spin.tolist() == [1, 3, 1, 1, 1, 1, 2, 1]
    assert list(store.manifest["assumed"].values()) == [1, 1, 1]
    assert [reason.partition(" (")[0] for reason in store.manifest["skipped"]] == [
        "the multiplicity does not fit the number of electrons"
    ]
    assert list(store.manifest["skipped"].values()) == [2]
    options = {"charge": 0, "spin_counts": "unpaired"}
    told = prepare("extxyz", [tmp_path / "a.xyz"], tmp_path / "b", options=options, trust_units=True, progress=False)
    assert list(told.manifest["assumed"]) == ["no multiplicity stated: an odd number of electrons taken as a doublet"]


def test_a_file_of_pure_elements_is_cut_within_each_and_skips_name_the_first_record(tmp_path):
    frames = [f"1\nenergy={k % 4}\n{symbol} 0 0 0\n" for k in range(40) for symbol in ("Cu", "Al", "Xx", "Au")]
    (tmp_path / "a.xyz").write_text("".join(frames))
    store = prepare("extxyz", [tmp_path / "a.xyz"], tmp_path / "store", progress=False)
    splits = store.manifest["splits"]
    assert (splits["train"], splits["validation"], splits["test"], splits["unused"]) == (96, 12, 12, 0)
    assert splits["rule"] == "contiguous blocks of each formula" and splits["unseen_elements"] == []
    assert store.manifest["skipped"] == {"unknown element 'Xx'": 40}
    assert store.manifest["skipped_first"] == {"unknown element 'Xx'": "a.xyz: 2"}
    (tmp_path / "b.xyz").write_text("".join(frames[:4]))  # one frame of each: no block of it is left for validation
    with pytest.raises(ValueError, match=r"element that the train split lacks[\s\S]*--fractions with 0 for it"):
        prepare("extxyz", [tmp_path / "b.xyz"], tmp_path / "none", progress=False)
    (tmp_path / "c.xyz").write_text(frames[2] * 3)
    with pytest.raises(ValueError, match=r"no structure can be used\n  3: unknown element 'Xx' \(first: c.xyz: 0\)"):
        prepare("extxyz", [tmp_path / "c.xyz"], tmp_path / "none", progress=False)

"""`check`: planted mistakes are found and named, right data raise no doubt, duplicates are found under any disguise."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from rich.console import Console

from multifid.preparation.prepare import prepare
from multifid.quality.check import check_store, join, runs, take
from multifid.quality.doubts import doubt_of_crystals, doubt_of_free_atoms, doubts
from multifid.quality.duplicates import Fingerprints, fingerprints, repeats
from multifid.quality.evidence import neighbors
from multifid.quality.leakage import leaks
from multifid.quality.outliers import outliers
from multifid.quality.pair_fit import pairwise, stress_ratio
from multifid.store.store import Store
from multifid.structures.structure import Packed, PackedLabels
from multifid.workflows.check import check

DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the published sample data are not beside the repository")
HARTREE, BOHR, KCAL = 27.211386245988, 0.529177210903, 23.060547830619

# fault: (factors of positions, energies, forces, stress), what must be said of it
FAULTS = {
    "hartree taken for eV": ((1, 1 / HARTREE, 1 / HARTREE, 1), "hartree"),
    "hartree and hartree/bohr": ((1, 1 / HARTREE, BOHR / HARTREE, 1), "hartree"),
    "energies alone in hartree": ((1, 1 / HARTREE, 1, 1), "hartree"),
    "kcal/mol taken for eV": ((1, KCAL, KCAL, 1), "kcal/mol"),
    "energies alone in kcal/mol": ((1, KCAL, 1, 1), "kcal/mol"),
    "bohr taken for angstrom": ((1 / BOHR, 1, 1, 1), "bohr taken for angstrom"),
    "angstrom taken for bohr": ((BOHR, 1, 1, 1), "angstrom taken for bohr"),
    "nanometres": ((0.1, 1, 1, 1), "nanometres"),
    "gradient": ((1, 1, -1, 1), "gradient"),
    "forces in kcal/mol/angstrom": ((1, 1, KCAL, 1), "kcal/mol/angstrom"),
    "forces in hartree/angstrom": ((1, 1, 1 / HARTREE, 1), "hartree/angstrom"),
    "forces in hartree/bohr": ((1, 1, BOHR / HARTREE, 1), "hartree/bohr"),
    "forces per bohr": ((1, 1, BOHR, 1), "bohr"),
    "kbar": ((1, 1, 1, 1602.1766208), "kbar"),
    "GPa": ((1, 1, 1, 160.21766208), "GPa"),
    "stress sign": ((1, 1, 1, -1), "sign"),
    "energies per atom": ((1, None, 1, 1), "energies per atom"),
    "forces tenfold": ((1, 1, 10, 1), "no usual unit"),
    "a tenth of the forces": ((1, 1, 0.1, 1), "no usual unit"),
}
LENGTHS = {"bohr taken for angstrom", "angstrom taken for bohr", "nanometres"}
ENERGIES = {name for name, ((_, e, _, _), _) in FAULTS.items() if e != 1}
STRESS = {"kbar", "GPa", "stress sign"}
ALL = set(FAULTS)


def planted(packed: Packed, length: float, energy: float | None, force: float, stress: float) -> Packed:
    """As if a reader had made this mistake; energy None: it took energies per atom for totals."""
    labels = {
        task: PackedLabels(
            own.energy / packed.natoms if energy is None else own.energy * energy,
            None if own.forces is None else own.forces * np.float32(force),
            None if own.stress is None else own.stress * stress,
        )
        for task, own in packed.labels.items()
    }
    positions = (packed.positions * length).astype(np.float32)
    return dataclasses.replace(packed, positions=positions, cell=packed.cell * length, labels=labels)


def said(sample: Packed, level: str) -> list[str]:
    geometry = take(sample, np.unique(np.linspace(0, len(sample.natoms) - 1, 80).astype(int)))
    of_crystals = [doubt_of_crystals(task, level, sample, own.energy) for task, own in sample.labels.items()]
    return [str(doubt) for doubt in [*doubts(sample, geometry), *filter(None, of_crystals)]]


def sprung_methane(count: int = 60) -> Packed:
    """Frames of methane with springs for bonds: totals of all electrons, forces that are the gradient's opposite."""
    random = np.random.default_rng(0)
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    spring, length = 31.0, 1.09
    bonds = corners * length
    positions, energies, forces = [], [], []
    for _ in range(count):
        bonds = 0.7 * bonds + 0.3 * corners * length + random.normal(0, 0.03, (4, 3))
        r = np.linalg.norm(bonds, axis=1)
        pull = -spring * (r - length)[:, None] * bonds / r[:, None]
        energies.append(-40.2 * HARTREE * 1.004 + 0.5 * spring * ((r - length) ** 2).sum())
        positions.append(np.concatenate([[[0, 0, 0]], bonds]))
        forces.append(np.concatenate([[-pull.sum(axis=0)], pull]))
    zeros = np.zeros((count, 3, 3))
    return Packed(
        np.tile([6, 1, 1, 1, 1], count).astype(np.uint8), np.concatenate(positions).astype(np.float32),
        np.full(count, 5), zeros, np.zeros((count, 3), bool), np.zeros(count, np.int8), np.ones(count, np.uint8),
        {"methane": PackedLabels(np.array(energies), np.concatenate(forces).astype(np.float32))},
    )  # fmt: skip


def test_right_units_raise_no_doubt():
    assert said(sprung_methane(), "") == []


@pytest.mark.parametrize("fault", sorted(ALL - STRESS))
def test_a_planted_mistake_is_found_and_named(fault):
    factors, name = FAULTS[fault]
    found = said(planted(sprung_methane(), *factors), "")
    assert found and name in " ".join(found)


def shuffled_copper(count: int = 60) -> Packed:
    """Rattled copper in one cell, no frame the neighbour of another; energies, forces and stresses of EMT."""
    random = np.random.default_rng(0)
    cell, frames = bulk("Cu", cubic=True), []
    for _ in range(count):
        atoms = cell.copy()
        atoms.positions += random.normal(0, 0.08, (4, 3))
        atoms.positions += random.uniform(0, 3, 3)  # far from all others, whatever the order
        atoms.calc = EMT()
        atoms.get_potential_energy()
        frames.append(atoms)
    n = count * 4
    stress = np.array([atoms.get_stress(voigt=False) for atoms in frames])
    labels = PackedLabels(
        np.array([atoms.get_potential_energy() for atoms in frames]),
        np.concatenate([atoms.get_forces() for atoms in frames]).astype(np.float32),
        stress,
    )
    return Packed(
        np.full(n, 29, np.uint8), np.concatenate([atoms.positions for atoms in frames]).astype(np.float32),
        np.full(count, 4), np.array([atoms.cell.array for atoms in frames]), np.ones((count, 3), bool),
        np.zeros(count, np.int8), np.ones(count, np.uint8), {"copper": labels},
    )  # fmt: skip


@pytest.mark.parametrize("fault", ["GPa", "kbar", "stress sign", "forces tenfold", "energies per atom", "gradient"])
def test_a_pair_potential_fitted_to_the_forces_finds_mistakes_without_neighbouring_frames(fault):
    frames = shuffled_copper()
    assert said(frames, "") == []
    factors, name = FAULTS[fault]
    assert name in " ".join(said(planted(frames, *factors), ""))


def test_a_pair_potential_is_fitted_exactly_to_forces_that_have_one():
    random = np.random.default_rng(0)
    frames = shuffled_copper(20)
    near, fitted = neighbors(frames), frames.labels["copper"]
    # the springs of all pairs within the reach of the fit, so that its basis nearly holds them
    slope = np.exp(-(((near.relative - 1.0) / 0.2) ** 2) / 2) * np.maximum(0, 1 - (near.distance / 4.5) ** 2) ** 2
    pull = slope[:, None] * near.vector / near.distance[:, None]
    forces = np.stack([np.bincount(near.i, pull[:, a], len(frames.numbers)) for a in range(3)], 1)
    virial = np.einsum("ea,eb->eab", pull, near.vector).reshape(-1, 9)
    structure = near.i // 4
    stress = np.stack([np.bincount(structure, column, 20) for column in virial.T], 1).reshape(20, 3, 3)
    stress /= 2 * np.linalg.det(frames.cell)[:, None, None]
    fit = pairwise(frames, near, forces)
    found = stress_ratio(stress, fit)
    assert abs(found.ratio - 1) < 0.1 and found.spread < 0.4 and fit.chosen.tolist() == list(range(20))
    assert not np.isfinite(stress_ratio(random.normal(size=(20, 3, 3)), fit).ratio) and fitted.stress is not None


def test_given_energies_of_free_atoms_are_compared_with_the_totals():
    numbers, natoms = np.tile([8, 1, 1, 6, 8, 8], 30), np.tile([3, 3], 30)  # water and carbon dioxide
    free = {1: -13.6, 6: -1029.0, 8: -2042.0}
    zeros = np.zeros((60, 3, 3))
    packed = Packed(
        numbers.astype(np.uint8), np.zeros((180, 3), np.float32), natoms, zeros, np.zeros((60, 3), bool),
        np.zeros(60, np.int8), np.ones(60, np.uint8),
    )  # fmt: skip
    energy = np.tile([free[8] + 2 * free[1] - 10.1, free[6] + 2 * free[8] - 17.0], 30)
    energy += np.random.default_rng(0).normal(0, 0.2, 60)
    assert doubt_of_free_atoms("t", packed, energy, free) is None
    valence = {1: -10.7, 6: -48.8, 8: -102.6}
    for given, looks in (
        ({z: e / HARTREE for z, e in free.items()}, "hartree taken for eV"),
        ({z: e * KCAL for z, e in free.items()}, "kcal/mol taken for eV"),
        (valence, "valence electrons alone beside totals of all electrons"),
        ({1: free[1], 8: -300.0}, "another method"),
    ):
        doubt = str(doubt_of_free_atoms("t", packed, energy, given))
        assert looks in doubt and "O " in doubt
    pseudo = np.tile([valence[8] + 2 * valence[1] - 10.1, valence[6] + 2 * valence[8] - 17.0], 30)
    assert "all their electrons beside totals of valence" in str(doubt_of_free_atoms("t", packed, pseudo, free))
    assert doubt_of_free_atoms("t", packed, pseudo, valence) is None


def test_a_stress_far_from_all_others_is_an_outlier_that_prepare_reports(tmp_path):
    random, lines = np.random.default_rng(0), []
    for k in range(60):
        stress = random.normal(0, 0.01, 6) + (50.0 if k == 41 else 0.0)
        lines.append(f'1\nLattice="3 0 0 0 3 0 0 0 3" energy={random.normal(-3, 0.01)} ')
        lines.append(f'stress="{" ".join(map(str, stress))}"\nSi 0 0 0\n')
    (tmp_path / "a.xyz").write_text("".join(lines))
    store = prepare("extxyz", [tmp_path / "a.xyz"], tmp_path / "store", progress=False)
    (found,) = outliers(store)
    assert (found.kind, found.count, found.worst[0].structure) == ("stress", 1, 41)
    told = store.manifest["outliers"]["extxyz"]["stress"]
    assert told["count"] == 1 and told["worst"][0]["source"] == "a.xyz: 41" and 49 < told["worst"][0]["value"] < 51
    console = Console(record=True, width=120)
    assert check([store.path], console)
    assert "GPa" in (text := console.export_text()) and "a.xyz: 41" in text and "80" in text


def test_energies_that_do_not_belong_to_the_forces_are_found_without_totals_of_all_electrons():
    frames = sprung_methane()
    frames.labels["methane"].energy += 1000.0  # no longer near those of free atoms
    assert said(frames, "") == []
    assert "hartree" in said(planted(frames, 1, 1 / HARTREE, 1, 1), "")[0]


# published file: format, level of theory, which mistakes can be seen in it
SAMPLES = {
    "ani1x/ani1x_sample.h5": ("ani1x", {}, ALL - STRESS),
    "ani1x/physicsml_tests_ani1x.h5": ("ani1x", {}, ALL - STRESS),
    "organic_dft/acac/train_300K.xyz": ("extxyz", {}, ALL - STRESS),
    "organic_dft/ethanol_reduced_100.xyz": ("extxyz", {"energy_unit": "kcal/mol"}, ALL - STRESS),
    "omol25/data0001.aselmdb": ("aselmdb", {"dataset": "omol25"}, ALL - STRESS),
    "alexandria/alex_go_sample.json.bz2": ("alexandria", {}, ALL),
    # Single frames and relaxed crystals: no neighbouring frames, no X-H bonds to judge forces by.
    "mptrj/mptrj_sample.json": ("mptrj", {}, LENGTHS | ENERGIES | {"kbar", "GPa"}),
    "alexandria/alexandria_sample.json.bz2": ("alexandria", {}, LENGTHS | ENERGIES - {"energies per atom"}),
}


@real
@pytest.mark.parametrize("name", SAMPLES)
def test_published_samples_are_believed_and_every_mistake_that_can_be_seen_in_them_is_found(name, tmp_path):
    format, options, visible = SAMPLES[name]
    store = prepare(format, [DATA / name], tmp_path / "store", options=options, limit=300, progress=False)
    assert check_store(store).doubts == []
    level = next(iter(store.manifest["tasks"].values()))["level_of_theory"]
    sample = join([store.read(np.arange(*run)) for run in runs(store.structures)])
    sample = take(sample, np.arange(min(250, len(sample.natoms))))
    missed = {f for f in visible if FAULTS[f][1] not in " ".join(said(planted(sample, *FAULTS[f][0]), level))}
    assert missed == set()


@real
def test_prepare_refuses_doubtful_units_unless_they_are_trusted(tmp_path):
    source = DATA / "organic_dft" / "ethanol_reduced_100.xyz"
    with pytest.raises(ValueError, match=r"--trust-units[\s\S]*kcal/mol taken for eV"):
        prepare("extxyz", [source], tmp_path / "store", progress=False)
    assert list(tmp_path.iterdir()) == []
    store = prepare("extxyz", [source], tmp_path / "store", trust_units=True, progress=False)
    assert "kcal/mol taken for eV" in store.manifest["doubts"][0]
    console = Console(record=True, width=120)
    assert not check([store.path], console) and "doubtful" in console.export_text()


def disguised(packed: Packed) -> Packed:
    """Turned, reflected, shifted, and with the atoms of each structure in another order."""
    random = np.random.default_rng(3)
    turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
    order = np.concatenate([s + random.permutation(n) for s, n in zip(packed.offsets, packed.natoms, strict=False)])
    positions = ((packed.positions @ turn) + np.array([0.3, -1.0, 0.7]))[order]
    return dataclasses.replace(
        packed, numbers=packed.numbers[order], positions=positions.astype(np.float32), cell=packed.cell @ turn
    )


def mixed(count: int = 200) -> Packed:
    """Molecules and crystals, some with one composition."""
    random = np.random.default_rng(1)
    natoms = random.integers(1, 12, count)
    atoms = int(natoms.sum())
    pbc = np.repeat((np.arange(count) % 3 == 0)[:, None], 3, axis=1)
    return Packed(
        random.choice([1, 6, 8], atoms).astype(np.uint8), random.normal(0, 2, (atoms, 3)).astype(np.float32), natoms,
        np.where(pbc[:, :, None], np.eye(3) * 6 + random.normal(0, 0.3, (count, 3, 3)), 0.0), pbc,
        np.zeros(count, np.int8), np.ones(count, np.uint8),
    )  # fmt: skip


def test_a_structure_is_found_again_turned_shifted_reflected_and_reordered():
    packed = mixed()
    with Fingerprints() as found:
        found.add(fingerprints(packed))
        assert (repeats(found) == (packed.natoms == 1) & repeats(found)).all()  # single atoms are all alike
        found.add(fingerprints(disguised(packed)))
        assert repeats(found)[200:].all()


def test_another_geometry_composition_charge_or_multiplicity_is_another_structure():
    packed = take(mixed(), np.flatnonzero(mixed().natoms > 1))
    first = fingerprints(packed)
    moved = packed.positions.copy()
    moved[packed.offsets[:-1]] += np.float32(0.05)
    other = packed.numbers.copy()
    other[packed.offsets[:-1]] = 7
    for changed in (
        dataclasses.replace(packed, positions=moved),
        dataclasses.replace(packed, numbers=other),
        dataclasses.replace(packed, charge=packed.charge + np.int8(1)),
        dataclasses.replace(packed, spin=packed.spin + np.uint8(1)),
    ):
        assert not (fingerprints(changed) == first).any()


def write_frames(path: Path, frames: range, label: float = 0.0) -> Path:
    """Frames of one molecule of four atoms that differ by their number alone, however they are turned."""
    with path.open("w") as file:
        for i in frames:
            random = np.random.default_rng(i)
            turn = np.linalg.qr(np.random.default_rng(int(1000 * label) + i).normal(size=(3, 3)))[0]
            positions = np.array([[0, 0, 0], [1.0, 0, 0], [0, 1.1, 0], [0, 0, 0.9]]) + random.normal(0, 0.1, (4, 3))
            file.write(f"4\nProperties=species:S:1:pos:R:3 energy={-5.0 + label + random.normal()}\n")
            for symbol, (x, y, z) in zip("CHHH", positions @ turn, strict=True):
                file.write(f"{symbol} {x:.9f} {y:.9f} {z:.9f}\n")
    return path


def splits_of(store: Store) -> dict[str, int]:
    return {name: len(store.index(name)) for name in ("train", "validation", "test", "unused")}


def test_leakage_is_counted_within_and_across_stores_and_set_aside_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr("multifid.quality.duplicates.AT_ONCE", 64)  # several buckets
    a = write_frames(tmp_path / "a.xyz", range(100))
    b = write_frames(tmp_path / "b.xyz", range(50, 150), label=1.0)  # half of them are those of a
    again = write_frames(tmp_path / "again.xyz", range(10), label=2.0)
    one = prepare("extxyz", [a], tmp_path / "one", progress=False)  # blocks: 0..79 train, 80..89, 90..99 test
    two = prepare("extxyz", [b], tmp_path / "two", progress=False)
    found = leaks([one, two])
    assert found.repeats == [0, 0] and found.leaks == {(0, 1): 20}  # 80..99 of a are frames 30..49 of b: train
    clean = prepare("extxyz", [b], tmp_path / "clean", drop_duplicates_of=[one.path], progress=False)
    assert splits_of(clean) == {"train": 60, "validation": 10, "test": 10, "unused": 20}
    assert clean.manifest["splits"]["duplicates"] == 20 and leaks([one, clean]).leaks == {}
    files = {"files_of_split": {"test": [again]}, "progress": False}
    leaky = prepare("extxyz", [a], tmp_path / "leaky", **files)
    assert leaks([leaky]).repeats == [10] and leaks([leaky]).leaks == {(0, 0): 10}
    with pytest.raises(ValueError, match="test"):  # all of the test split is trained on
        prepare("extxyz", [a], tmp_path / "no", drop_duplicates=True, **files)


def test_structures_far_from_all_others_are_listed_with_their_source(tmp_path):
    path = write_frames(tmp_path / "a.xyz", range(100))
    lines = path.read_text().splitlines()
    lines[6 * 37 + 1] = "Properties=species:S:1:pos:R:3 energy=-500"
    path.write_text("\n".join(lines) + "\n")
    store = prepare("extxyz", [path], tmp_path / "store", progress=False)
    (found,) = outliers(store)
    assert (found.kind, found.count, found.worst[0].structure) == ("energy", 1, 37)
    console = Console(record=True, width=100)
    assert check([store.path], console)
    assert "a.xyz: 37" in console.export_text()

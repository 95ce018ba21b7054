"""ANI-1x: every conformer with every label it has, NaN masked key by key, in eV."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file

from multifid.config import parse_config
from multifid.model.encoders.egnn import EGNN
from multifid.model.potential import Potential
from multifid.preparation.prepare import prepare
from multifid.readers.ani1x import FIDELITIES, TASKS, Options, read
from multifid.readers.contract import Skip
from multifid.store.block import relative_hash
from multifid.structures.structure import Structure
from multifid.training.run import train
from records import expanded

DATA = Path(__file__).parents[2] / "shared" / "data" / "ani1x"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the published sample data are not beside the repository")
HARTREE = 27.211386245988


def records(path: Path, *fidelities: str) -> list:
    options = Options(fidelities=fidelities) if fidelities else Options()
    return list(expanded(read(path, options, lambda fraction: None)))


@real
@pytest.mark.parametrize(
    ("name", "count"), [("physicsml_tests_ani1x.h5", 96), ("modelforge_ani1_n5.hdf5", 8), ("ani1x_sample.h5", 808)]
)
def test_every_conformer_is_read_with_its_own_labels_in_ev(name, count):
    found = records(DATA / name)
    assert len(found) == count and all(isinstance(s, Structure) for s in found)
    with h5py.File(DATA / name) as file:
        for structure in found:
            group, i = structure.source_id.rsplit("/", 1)
            raw = file[group]
            assert (structure.numbers == raw["atomic_numbers"][...]).all()
            assert (structure.positions == raw["coordinates"][int(i)]).all()
            labels = structure.labels["ani1x"]
            assert labels.energy == raw["wb97x_dz.energy"][int(i)] * HARTREE
            np.testing.assert_allclose(
                labels.forces, raw["wb97x_dz.forces"][int(i)].astype(float) * HARTREE, rtol=1e-15
            )


@real
def test_missing_labels_are_masked_key_by_key():
    """In this file the triple-zeta DFT labels of 23 of 96 conformers and the CCSD(T) labels of 93 are NaN."""
    path = DATA / "physicsml_tests_ani1x.h5"
    found = records(path, "wb97x_dz", "wb97x_tz", "ccsd_t_cbs")
    assert len(found) == 96
    assert sum("wb97x_dz" in s.labels for s in found) == 96
    assert sum("wb97x_tz" in s.labels for s in found) == 96 - 23
    assert sum("ccsd_t_cbs" in s.labels for s in found) == 96 - 93
    assert all(s.labels["wb97x_tz"].forces is not None for s in found if "wb97x_tz" in s.labels)
    alone = records(path, "ccsd_t_cbs")
    assert sum(isinstance(s, Structure) for s in alone) == 3
    assert sum(s == Skip("no label", s.where) for s in alone if isinstance(s, Skip)) == 93


@real
def test_a_correlation_energy_is_added_to_its_hartree_fock_energy():
    path = DATA / "physicsml_tests_ani1x.h5"
    (first, *_) = [s for s in records(path, "mp2_tz") if isinstance(s, Structure)]
    group, i = first.source_id.rsplit("/", 1)
    with h5py.File(path) as file:
        raw = [file[group][key][int(i)] for key in ("hf_tz.energy", "mp2_tz.corr_energy")]
    assert first.labels["mp2_tz"].energy == pytest.approx(sum(raw) * HARTREE, rel=1e-14)
    assert first.labels["mp2_tz"].forces is None


@pytest.fixture
def made(tmp_path):
    """A file of one good group C1H4 (5 conformers), changed by the test before it is read."""
    path = tmp_path / "made.h5"
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        group = file.create_group("methane, whatever it is called")
        group["atomic_numbers"] = np.array([6, 1, 1, 1, 1], np.uint8)
        group["coordinates"] = random.normal(0, 1, (5, 5, 3)).astype(np.float32)
        group["wb97x_dz.energy"] = random.normal(-40, 1, 5)
        group["wb97x_dz.forces"] = random.normal(0, 1, (5, 5, 3)).astype(np.float32)
    return path


def test_relatives_are_named_by_formula_not_by_group(made):
    assert {s.relative for s in records(made)} == {str(relative_hash("C1H4"))}


def test_a_conformer_keeps_the_labels_that_it_has(made):
    with h5py.File(made, "a") as file:
        (group,) = file.values()
        group["wb97x_dz.energy"][0] = np.nan
        group["wb97x_dz.forces"][1] = np.nan
        group["wb97x_dz.energy"][2] = np.nan
        group["wb97x_dz.forces"][2] = np.nan
    found = records(made)
    assert np.isnan(found[0].labels["ani1x"].energy) and found[0].labels["ani1x"].forces is not None
    assert found[1].labels["ani1x"].forces is None
    assert isinstance(found[2], Skip) and found[2].reason == "no label"


def test_a_bad_group_costs_only_itself(made):
    with h5py.File(made, "a") as file:
        bad = file.create_group("bad")
        bad["atomic_numbers"] = np.array([6, 1], np.uint8)
        bad["coordinates"] = np.zeros((3, 2, 3), np.float32)
        bad["wb97x_dz.energy"] = np.zeros(4)
        file.create_group("empty")
    found = records(made)
    assert sum(isinstance(s, Structure) for s in found) == 5
    reasons = [s.reason for s in found if isinstance(s, Skip)]
    assert reasons.count("wb97x_dz.energy of another shape than the atoms") == 3
    assert reasons.count("group without atomic_numbers or coordinates") == 1


def test_a_file_that_is_not_ani1x_is_an_error_that_names_it(made, tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(ValueError, match=r"text\.h5: truncated, damaged or not"):
        records(tmp_path / "text.h5")
    h5py.File(tmp_path / "other.h5", "w").create_group("data")
    with pytest.raises(ValueError, match=r"other\.h5 is not an ANI-1x file"):
        records(tmp_path / "other.h5")
    with pytest.raises(ValueError, match=r"made\.h5 has no labels ccsd_t_cbs: no group has 'ccsd\(t\)_cbs\.energy'"):
        records(made, "ccsd_t_cbs")


def test_fidelities_are_checked():
    assert Options(fidelities="wb97x_dz,ccsd_t_cbs").fidelities == ("wb97x_dz", "ccsd_t_cbs")
    assert set(TASKS) == {"ani1x", *FIDELITIES}
    for bad in (["dft"], [], ["wb97x_dz", "wb97x_dz"]):
        with pytest.raises(ValidationError):
            Options(fidelities=bad)


def write_fidelities(path: Path) -> None:
    """Twelve formulas whose three fidelities differ by a shift per atom; a quarter lacks tz, most lack CCSD(T)."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for k in range(12):
            numbers = [6, 8] + [1] * (k + 1)
            rows = [[0, 0, 0], [1.4, 0, 0]] + [[1.1 * i, 1.2, 0] for i in range(k + 1)]
            group, frames = file.create_group(f"g{k}"), 6
            group["atomic_numbers"] = np.array(numbers, np.uint8)
            place = np.array(rows) + random.normal(0, 0.03, (frames, len(numbers), 3))
            group["coordinates"] = place.astype(np.float32)
            energy = -113.0 - 0.6 * (k + 1) + random.normal(0, 0.01, frames)
            forces = random.normal(0, 0.01, (frames, len(numbers), 3)).astype(np.float32)
            tz, cc = energy - 0.01 * len(numbers), energy + 0.02 * len(numbers)
            tz[0] = np.nan
            cc[:4] = np.nan
            group["wb97x_dz.energy"], group["wb97x_tz.energy"], group["ccsd(t)_cbs.energy"] = energy, tz, cc
            group["wb97x_dz.forces"], group["wb97x_tz.forces"] = (
                forces,
                np.where(np.isnan(tz)[:, None, None], np.nan, forces),
            )


def test_three_fidelities_of_one_geometry_train_three_branches_from_one_pass_of_the_encoder(tmp_path, monkeypatch):
    write_fidelities(tmp_path / "in.h5")
    tasks = ("wb97x_dz", "wb97x_tz", "ccsd_t_cbs")
    store = prepare(
        "ani1x",
        [tmp_path / "in.h5"],
        tmp_path / "store",
        options={"fidelities": tasks},
        trust_units=True,
        progress=False,
    )
    assert store.structures == 72 and tuple(store.tasks) == tasks
    counts = {task: about["labels"]["energy"] for task, about in store.manifest["tasks"].items()}
    assert counts == {"wb97x_dz": 72, "wb97x_tz": 60, "ccsd_t_cbs": 24}
    passes = []
    encode = EGNN.forward

    def counted(self, graph):
        if self.training:
            passes.append(len(graph.charge))
        return encode(self, graph)

    monkeypatch.setattr(EGNN, "forward", counted)
    config = {
        "run": str(tmp_path / "run"),
        "tasks": {task: {"store": str(store.path), "labels": task} for task in tasks},
        "model": {"cutoff": 3.0, "encoder": {"layers": 1, "hidden": 8, "vectors": 2}, "branch": {"hidden": [8]}},
        "train": {"batch": 8, "steps": 6, "epoch_steps": 6, "warmup": 1, "log_every": 6},
    }
    train(parse_config(config, "test"), Console(quiet=True))
    assert passes == [8] * 6  # one for each step, over structures that are there once for three tasks
    weights = load_file(tmp_path / "run" / "last.safetensors")
    fresh = Potential(parse_config(config, "test").model, list(tasks), {t: t for t in tasks}, 0).state_dict()
    for task in tasks:
        moved = [k for k in fresh if k.startswith(f"branches.{task}.") and not torch.equal(weights[k], fresh[k])]
        assert moved, task

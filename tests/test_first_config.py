"""`multifid init`: a config that trains as it is, fits the stores it was written for, and overwrites nothing."""

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from multifid.config import load_config
from multifid.preparation.prepare import prepare
from multifid.training.run import train
from multifid.workflows.first_config import _scalar, first_config


@pytest.fixture(scope="module")
def crystals(tmp_path_factory):
    """Dense crystals with stress; labels of a harmonic lattice, which nobody looks at."""
    folder, rng = tmp_path_factory.mktemp("crystals"), np.random.default_rng(0)
    frames = []
    for _ in range(30):
        atoms = Atoms("NiNi", positions=[[0, 0, 0], [1.2, 1.2, 1.2]], cell=[2.4] * 3, pbc=True)
        moved = rng.normal(0, 0.05, (2, 3))
        atoms.positions += moved
        energy, stress = float(2 * (moved**2).sum()) - 11.0, rng.normal(0, 0.01, 6)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=-4 * moved, stress=stress)
        frames.append(atoms)
    write(folder / "ni.xyz", frames, format="extxyz")
    prepare("extxyz", [folder / "ni.xyz"], folder / "ni", task="apple", trust_units=True, progress=False)
    return folder / "ni"


def test_a_first_config_is_what_train_reads(stores, tmp_path):
    out = tmp_path / "mine.yaml"
    written = first_config([stores["apple"], stores["berry"]], out, str(tmp_path / "run"), minutes=0.02)
    assert load_config(out) == written and out.read_text().count("#") > 15
    assert list(written.tasks) == ["apple", "berry"] and written.train.minutes == 0.02


@pytest.mark.full
def test_a_first_config_trains_as_it_is(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first_config([stores["apple"], stores["berry"]], tmp_path / "mine.yaml", minutes=0.02)
    train(load_config(tmp_path / "mine.yaml"))
    assert (tmp_path / "runs/mine/model.safetensors").exists()
    with pytest.raises(ValueError, match=r"runs/mine is there already"):
        first_config([stores["apple"]], tmp_path / "other.yaml", run="runs/mine")
    assert not (tmp_path / "other.yaml").exists()


def test_sizes_and_cutoff_follow_the_data(stores, crystals, tmp_path):
    molecules = first_config([stores["apple"]], tmp_path / "a.yaml", str(tmp_path / "a"))
    both = first_config([stores["apple"], crystals], tmp_path / "b.yaml", str(tmp_path / "b"))
    assert molecules.model.cutoff == 5.0 and molecules.objective.stress == 0
    assert both.model.cutoff == 4.0 and both.objective.stress > 0  # 145 atoms in a cubic nanometre: too many edges at 5
    assert {n: (t.store, t.labels) for n, t in both.tasks.items()} == {
        f"{stores['apple'].name}-apple": (str(stores["apple"]), "apple"),
        "ni-apple": (str(crystals), "apple"),
    }


def test_a_config_is_never_overwritten_and_a_test_set_is_refused(stores, tmp_path):
    (tmp_path / "c.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"c\.yaml is there already and is not overwritten"):
        first_config([stores["apple"]], tmp_path / "c.yaml")
    assert (tmp_path / "c.yaml").read_text() == "mine"
    with pytest.raises(ValueError, match="is given twice"):
        first_config([stores["apple"], stores["apple"]], tmp_path / "d.yaml")
    prepare("extxyz", [stores["apple"].parent / "apple.xyz"], tmp_path / "t", fractions=(0, 0, 1), progress=False)
    with pytest.raises(ValueError, match="has no train structure"):
        first_config([tmp_path / "t"], tmp_path / "d.yaml")
    assert not (tmp_path / "d.yaml").exists()


@pytest.mark.parametrize("text", ["data/ani1x", "1e3", "on", "null", "a # b", "a: b", "x'y", 'x"y', "-", "~", "ä b"])
def test_any_path_is_that_path_in_yaml(text):
    assert yaml.safe_load(f"store: {_scalar(text)}    # comment") == {"store": text}

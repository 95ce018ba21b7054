"""The same files give the same store and the same order of data on every processor and in every release."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import write_molecules
from multifid.store.content import content_of
from multifid.store.fields import CHECKSUMS, block_checksums, npy_header
from multifid.store.store import Store
from multifid.structures.reproducible import cos_and_sin, cube_root, determinant, inverse, times

pytestmark = pytest.mark.xdist_group("processors")  # their stores are made once

FITTED = (
    "references",
    "undetermined",
    "null_space",
    "rank",
    "residual",
    "scale",
)  # of a task; they may differ in their last bits
# An older processor, as its libraries would see it, with other threads, another seed of hashes and the next version.
DISPATCHED = " ".join(np.show_config(mode="dicts")["SIMD Extensions"]["found"])
OLDER = {
    "NPY_DISABLE_CPU_FEATURES": DISPATCHED,
    "OPENBLAS_CORETYPE": "Sandybridge",
    "ATEN_CPU_CAPABILITY": "default",
    "OMP_NUM_THREADS": "2",
    "PYTHONHASHSEED": "7",
}
MACHINES = {
    "this one": {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
    "an older one": OLDER,
    "another": {"OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "2"},
}
SCRIPT = """
import json, sys
from fractions import Fraction
from pathlib import Path
import numpy as np
import multifid
files, out, version, workers = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
multifid.__version__ = version
from multifid.feed.order import Order, SamplingConfig, rates
from multifid.preparation.prepare import prepare
from multifid.store.store import Store
options = dict(trust_units=True, drop_duplicates=True, workers=workers, progress=False)
stores = [prepare(f, [files / name], out / f, **options) for f, name in (("extxyz", "a.xyz"), ("mptrj", "b.json"))]
told = {s.path.name: Order(0, s.content.key, "t", s.size("train"))(0, 40).tolist() for s in stores}
sizes = {"a": 977, "b": 31_337}
told["rates"] = [str(rates(sizes, Fraction(64), SamplingConfig(exponent=x), {})) for x in (0.0, 0.3, 0.75, 1.0)]
print(json.dumps(told))
"""


def write_crystals(path: Path, count: int = 60) -> None:
    """Triclinic cells in the layout of MPtrj, fractional coordinates only, every frame twice; labels of no theory."""
    random, materials = np.random.default_rng(0), {}
    for k in range(count):
        lattice = np.diag(random.uniform(3, 5, 3)) + random.uniform(-0.4, 0.4, (3, 3))
        abc = random.uniform(0, 1, (3, 3)) * 0.2 + [[0.1, 0.1, 0.1], [0.5, 0.5, 0.1], [0.1, 0.5, 0.6]]
        # The first atom lies between two numbers of float32: the last bit of the product decides which one is stored.
        place = (abc[0] @ lattice).astype(np.float32)
        between = (place.astype(float) + np.nextafter(place, np.float32(9)).astype(float)) / 2
        lattice[2] = (between - abc[0, :2] @ lattice[:2]) / abc[0, 2]
        sites = [
            {"species": [{"element": e, "occu": 1}], "abc": x.tolist()}
            for e, x in zip(random.choice(["Si", "O", "Mg"], 3).tolist(), abc, strict=True)
        ]
        frame = {
            "structure": {"lattice": {"matrix": lattice.tolist(), "pbc": [True] * 3}, "sites": sites},
            "uncorrected_total_energy": float(random.normal(-20, 2)),
            "force": random.normal(0, 1, (3, 3)).tolist(),
            "stress": random.normal(0, 10, (3, 3)).tolist(),
        }
        materials[f"mp-{k}"] = {f"mp-{k}-0": frame, f"mp-{k}-1": frame | {"force": frame["force"][::-1]}}
    path.write_text(json.dumps(materials))


def write_virials(path: Path, count: int = 40) -> None:
    """More frames of extended XYZ: triclinic, with a virial that becomes a stress."""
    random = np.random.default_rng(1)
    with path.open("a") as file:
        for _ in range(count):
            lattice = np.diag(random.uniform(4, 6, 3)) + random.uniform(-0.7, 0.7, (3, 3))
            virial, forces = random.normal(0, 1, (3, 3)), random.normal(0, 1, (2, 3))
            say = lambda numbers: " ".join(repr(float(x)) for x in np.ravel(numbers))  # noqa: E731
            file.write(
                f'2\nLattice="{say(lattice)}" Properties=species:S:1:pos:R:3:forces:R:3 '
                f'energy={random.normal()} virial="{say(virial + virial.T)}" pbc="T T T"\n'
                f"C {say(np.zeros(3))} {say(forces[0])}\nO {say(lattice.sum(axis=0) / 2)} {say(forces[1])}\n"
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """machine -> (folder of stores, orders), of the same files."""
    files = tmp_path_factory.mktemp("files")
    write_molecules(files / "a.xyz", 60, 1.0, 0.0, seed=3)
    write_virials(files / "a.xyz")
    write_crystals(files / "b.json")
    running = {}
    for k, (machine, settings) in enumerate(MACHINES.items()):
        out = tmp_path_factory.mktemp("machine")
        command = [sys.executable, "-c", SCRIPT, str(files), str(out), f"{k}.1.0", str(1 + k % 2)]
        running[machine] = out, subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
    return {machine: (out, json.loads(child.communicate()[0])) for machine, (out, child) in running.items()}


def plain(manifest: dict) -> dict:
    """What a manifest says without what is fitted, hashed of it, or of the version."""
    dropped = {"created_by", "xxh3", "edges_per_atom"}
    out = {key: value for key, value in manifest.items() if key not in dropped}
    return out | {"tasks": {t: {k: v for k, v in a.items() if k not in FITTED} for t, a in manifest["tasks"].items()}}


@pytest.mark.parametrize("machine", list(MACHINES)[1:])
def test_every_machine_prepares_the_same_bytes_and_draws_them_in_the_same_order(prepared, machine):
    (one, order), (other, order_there) = prepared["this one"], prepared[machine]
    assert order == order_there
    for name in ("extxyz", "mptrj"):
        a, b = Store(one / name), Store(other / name)
        assert a.checksum != b.checksum and a.content == b.content and a.manifest["content"] == a.content.key
        assert plain(a.manifest) == plain(b.manifest)
        for file in a.manifest["files"]:
            assert (a.path / file).read_bytes() == (b.path / file).read_bytes(), file
        for task in a.tasks:
            mine, theirs = (s.manifest["tasks"][task] for s in (a, b))
            assert mine["scale"] == pytest.approx(theirs["scale"], rel=1e-12)
            assert list(mine["references"].values()) == pytest.approx(list(theirs["references"].values()), rel=1e-9)
    assert Store(one / "mptrj").manifest["splits"]["duplicates"] > 0


def test_content_is_told_by_the_data_and_nothing_else(prepared):
    """Another label, position or split is another content; another name of a label set is none."""
    store = Store(prepared["this one"][0] / "extxyz")
    files = store.manifest["files"]
    sums = np.load(store.path / CHECKSUMS)
    assert content_of(files, sums) == store.content
    names = [
        name for name, entry in sorted(files.items()) if name != CHECKSUMS for _ in range(-(-entry["bytes"] // 2**20))
    ]
    moved = {}
    for k, name in enumerate(names):
        other = sums.copy()
        other[k] ^= 1
        moved[name] = content_of(files, other).key
    covered = {name for name, key in moved.items() if key != store.content.key}
    assert covered == {f"{n}.npy" for n in ("numbers", "positions", "natoms", "cell", "pbc", "split")} | {
        f"labels/extxyz/{kind}.npy" for kind in ("energy", "forces", "stress")
    }
    assert len(set(moved.values())) == 1 + len(covered)
    renamed = {name.replace("labels/extxyz/", "labels/mine/"): entry for name, entry in files.items()}
    assert content_of(renamed, sums).key == store.content.key


@pytest.mark.parametrize("rows", [1, 2**20 - 128, 2**20, 3 * 2**20, 5 * 2**20 + 7])
def test_a_column_that_says_nothing_counts_as_absent(tmp_path, rows):
    """A reader may write charges of zero today and none tomorrow; one charge anywhere is another content."""
    charges, entry = np.zeros(rows, np.int8), {"bytes": 128 + rows, "dtype": "|i1", "shape": [rows]}

    def fields():
        (tmp_path / "charge.npy").write_bytes(npy_header("|i1", (rows,)) + charges.tobytes())
        sums = np.array(list(block_checksums(tmp_path / "charge.npy")), np.uint64)
        return content_of({"charge.npy": entry}, sums).fields

    assert fields() == {}
    for place in {0, rows // 2, rows - 1}:
        charges[:] = 0
        charges[place] = 1
        assert list(fields()) == ["charge"]


def test_products_are_rounded_step_by_step_as_single_numbers_are():
    random = np.random.default_rng(0)
    rows, cells = random.normal(size=(50, 3)), random.normal(size=(50, 3, 3))
    got, volumes = times(rows, cells), determinant(cells)
    for (x, y, z), m, out, volume in zip(rows.tolist(), cells.tolist(), got.tolist(), volumes.tolist(), strict=True):
        assert out == [x * m[0][k] + y * m[1][k] + z * m[2][k] for k in range(3)]
        (a, b, c), (d, e, f), (g, h, i) = m
        assert volume == a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g)
    assert np.abs(times(inverse(cells), cells[:, None]) - np.eye(3)).max() < 1e-11
    assert np.abs(volumes - np.linalg.det(cells)).max() < 1e-14
    turns, sizes = random.uniform(-9, 9, (7, 50)), 10 ** random.uniform(-9, 9, 50)
    for got, exact in zip(cos_and_sin(turns), (np.cos, np.sin), strict=True):
        assert np.abs(got - exact(2 * np.pi * (turns - np.round(turns)))).max() < 1e-15
        assert np.array_equal(got.ravel(), [cos_and_sin(np.array(t))[exact is np.sin] for t in turns.ravel()])
    assert np.abs(cube_root(sizes) / np.cbrt(sizes) - 1).max() < 1e-15

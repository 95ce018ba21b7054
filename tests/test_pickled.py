"""LMDB of pickled graphs, as OC20 and OC22 were first published: values, ends of relaxations; nothing is executed."""

import pickle
import sys
import types
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from multifid.preparation.prepare import prepare
from multifid.readers import pyg_lmdb
from multifid.readers.contract import Skip
from multifid.readers.pickled import values_of
from multifid.readers.recognise import recognise
from multifid.readers.records import BadRecord
from multifid.structures.structure import Structure


@pytest.fixture
def graphs(monkeypatch):
    """`Data` of PyTorch Geometric before its version 2 and since, without the package: only names stand in pickles."""
    for name in (
        "torch_geometric",
        "torch_geometric.data",
        "torch_geometric.data.data",
        "torch_geometric.data.storage",
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def new(module: str, name: str) -> type:
        kind = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, kind)
        return kind

    data, storage = new("torch_geometric.data.data", "Data"), new("torch_geometric.data.storage", "GlobalStorage")

    def make(layout: str, **fields):
        graph = data()
        if layout == "old":
            graph.__dict__.update(edge_index=None, **fields)
        else:
            graph._store = storage()
            graph._store._mapping, graph._store._parent = fields, graph
        return graph

    return make


def slab(**more) -> dict:
    """A frame of CO on three atoms of copper, as preprocessing of OC20 keeps it."""
    pos = torch.arange(15, dtype=torch.float32).reshape(5, 3) * 1.7
    return {
        "atomic_numbers": torch.tensor([29.0, 29.0, 29.0, 6.0, 8.0]), "pos": pos,
        "cell": torch.diag(torch.tensor([7.0, 8.0, 30.0]))[None], "natoms": 5, "tags": torch.tensor([0, 1, 1, 2, 2]),
        "sid": 1234, "fid": torch.tensor([7]), **more,
    }  # fmt: skip


def write(path: Path, rows: list[bytes]) -> Path:
    with (
        lmdb.open(str(path), subdir=False, map_size=1 << 24, lock=False) as database,
        database.begin(write=True) as txn,
    ):
        for key, row in enumerate(rows):
            txn.put(str(key).encode(), row)
        txn.put(b"length", pickle.dumps(len(rows)))
    return path


def records(path: Path, **options) -> list:
    return list(pyg_lmdb.read(path, pyg_lmdb.Options(**options), lambda far: None))


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_and_arrays_are_those_that_were_pickled(layout, protocol, graphs):
    turned = torch.arange(12.0).reshape(3, 4).T[1:]  # a view with strides and an offset
    fields = {
        "pos": turned, "half": turned.half(), "flags": torch.tensor([True, False]), "empty": torch.zeros(0, 3),
        "force": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "y": np.float64(-1.5), "sid": 3, "name": "random77",
    }  # fmt: skip
    found = values_of(pickle.dumps(graphs(layout, **fields), protocol))
    assert np.array_equal(found["pos"], turned.numpy()) and found["half"].dtype == np.float16
    assert found["flags"].tolist() == [True, False] and found["empty"].shape == (0, 3)
    assert np.array_equal(found["force"], fields["force"]) and found["y"] == -1.5 and found["name"] == "random77"


def test_frames_ends_of_relaxations_and_relatives(graphs, tmp_path):
    force = torch.ones(5, 3) * 0.25
    rows = [
        graphs("new", **slab(y=-0.75, force=force)),
        graphs("old", **slab(y=torch.tensor([-0.5]), force=force)),
        graphs("new", **slab(y_init=1.0, y_relaxed=-2.0, pos_relaxed=slab()["pos"] + 0.1)),
        graphs("old", **slab()),  # of a test split
    ]
    path = write(tmp_path / "data.0000.lmdb", [pickle.dumps(row, 4) for row in rows])
    found = records(path, dataset="oc20")
    structures = [one for one in found if isinstance(one, Structure)]
    assert [one.source_id for one in structures] == ["0", "1", "2/initial", "2/relaxed"]
    assert [one.labels["oc20"].energy for one in structures] == [-0.75, -0.5, 1.0, -2.0]
    assert (
        structures[0].labels["oc20"].forces.tolist() == [[0.25] * 3] * 5 and structures[2].labels["oc20"].forces is None
    )
    assert np.allclose(structures[3].positions - structures[2].positions, 0.1)
    assert structures[0].pbc.all() and structures[0].cell[2, 2] == 30.0
    assert {one.relative for one in structures} == {"1234"}
    assert [one for one in found if isinstance(one, Skip)] == [Skip("no energy: neither y nor y_relaxed", "3")]
    assert recognise(path) == "pyg_lmdb" and any("atomic_numbers" in line for line in pyg_lmdb.holds(path))
    store = prepare("pyg_lmdb", [path], tmp_path / "s", options={"dataset": "oc20"}, trust_units=True, progress=False)
    assert store.structures == 4 and "adsorption" in store.manifest["tasks"]["oc20"]["energy_kind"]


def test_rows_of_oc22_are_not_taken_for_oc20(graphs, tmp_path):
    path = write(tmp_path / "o.lmdb", [pickle.dumps(graphs("new", **slab(y=-300.0, force=torch.zeros(5, 3), oc22=1)))])
    assert records(path, dataset="oc22")[0].labels["oc22"].energy == -300.0
    with pytest.raises(ValueError, match=r"o\.lmdb: row 0 is of OC22"):
        records(path, dataset="oc20")


class Hostile:
    """What a pickle executes where one is loaded."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.sign}",)


def test_no_pickle_is_executed_however_it_asks(graphs, tmp_path):
    sign = tmp_path / "executed"
    call = f"(S'touch {sign}'\ntR.".encode()
    rows = [
        pickle.dumps(Hostile(sign), 4),
        pickle.dumps(graphs("new", **slab(y=Hostile(sign)))),
        b"cposix\nsystem\n" + call,
        b"cbuiltins\neval\n(V__import__('os').system('touch x')\ntR.",
        b"ctorch\nos.system\n" + call,  # below a name that is known
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"ctorch.serialization\nload\n" + call,
        b"cnumpy\nload\n" + call,
        b"\x80\x04\x82\x01.",  # the extension registry
        pickle.dumps(graphs("old", **slab(y=-1.0, force=torch.zeros(5, 3))))[:-40],
        b"",
    ]
    found = records(write(tmp_path / "h.lmdb", rows))
    assert [type(one) for one in found] == [Skip] * len(rows) and not sign.exists()
    assert sum("which is not executed" in one.reason for one in found) == 8


def test_tensors_that_claim_more_than_they_hold_are_refused():
    storage = pickle.dumps(torch.zeros(4))
    assert values_of(storage).shape == (4,)

    class Claim:
        def __init__(self, *size):
            self.size = size

        def __reduce__(self):
            tensor = torch.zeros(4).__reduce_ex__(4)
            kind, (values, offset, _, _, *rest) = tensor[0], tensor[1]
            return kind, (values, offset, self.size, (1,) * len(self.size), *rest)

    for size in ((1 << 40,), (5,), (1 << 13, 1 << 13)):
        with pytest.raises(BadRecord, match=r"damaged|implausibly large"):
            values_of(pickle.dumps(Claim(*size)))


@pytest.mark.parametrize("size", [0, 5_000, 9_000])
def test_a_cut_file_is_an_error_that_names_it(size, graphs, tmp_path):
    path = write(tmp_path / "c.lmdb", [pickle.dumps(graphs("old", **slab(y=1.0)))] * 30)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"c\.lmdb: (damaged|truncated)"):
        records(path)

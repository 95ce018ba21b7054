"""Damaged and hostile files: an error that names the file, or a counted skip; no crash, no hang, no wrong number."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest

from multifid.graphs.neighbors import neighbor_list
from multifid.preparation.prepare import prepare
from multifid.readers import packed, reader
from multifid.readers.packed import zstd
from multifid.store.store import Store

WATER = np.array([[0, 0, 0], [0, 0.76, 0.59], [0, -0.76, 0.59]])


def frames(count: int = 24, extra: str = "") -> str:
    """Distinct bent molecules as extended XYZ."""
    random = np.random.default_rng(0)
    text = ""
    for _ in range(count):
        positions = WATER + random.normal(0, 0.02, (3, 3))
        force = random.normal(0, 0.5, (3, 3))
        text += f"3\nProperties=species:S:1:pos:R:3:forces:R:3 energy={-2080 + random.normal()} {extra}\n"
        for symbol, p, f in zip("OHH", positions, force, strict=True):
            text += " ".join([symbol, *(f"{x:.8f}" for x in (*p, *f))]) + "\n"
    return text


def write_xyz(path: Path) -> None:
    path.write_text(frames())


def write_ani1x(path: Path) -> None:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for k in range(12):
            group = file.create_group(f"H2O1_{k}")
            group["atomic_numbers"] = np.array([8, 1, 1], np.uint8)
            place = WATER + random.normal(0, 0.02, (9, 3, 3))
            group.create_dataset("coordinates", data=place.astype(np.float32), chunks=(9, 3, 3), compression="gzip")
            group["wb97x_dz.energy"] = -76.4 + random.normal(0, 0.01, 9)
            group["wb97x_dz.forces"] = random.normal(0, 0.01, (9, 3, 3)).astype(np.float32)


def crystal(i: int) -> dict:
    a = 4.2 + 0.01 * i
    sites = [{"species": [{"element": e, "occu": 1}], "xyz": [x, x, x]} for e, x in (("Na", 0.0), ("Cl", a / 2))]
    return {"lattice": {"matrix": [[a, 0, 0], [0, a, 0], [0, 0, a]], "pbc": [True] * 3}, "sites": sites}


def write_mptrj(path: Path) -> None:
    materials = {
        f"mp-{m}": {
            f"mp-{m}-0-{i}": {
                "structure": crystal(i),
                "uncorrected_total_energy": -7.0 - 0.01 * i,
                "force": [[0.0, 0.0, 0.01], [0.0, 0.0, -0.01]],
                "stress": None,
            }
            for i in range(3)
        }
        for m in range(12)
    }
    path.write_text(json.dumps(materials))


def entries(count: int = 36) -> bytes:
    found = [
        {"structure": crystal(i), "data": {"mat_id": f"agm{i}", "energy_total": -7.0 - 0.01 * i}} for i in range(count)
    ]
    return json.dumps({"entries": found}).encode()


def write_alexandria(path: Path) -> None:
    path.write_bytes(bz2.compress(entries()))


def write_rows(path: Path, values: list[bytes]) -> None:
    with (
        lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 22) as database,
        database.begin(write=True) as into,
    ):
        for k, value in enumerate(values, start=1):
            into.put(str(k).encode(), value)
    Path(f"{path}-lock").unlink(missing_ok=True)


def row(i: int) -> bytes:
    place = WATER + np.random.default_rng(i).normal(0, 0.02, (3, 3))
    content = {
        "numbers": [8, 1, 1], "positions": place.tolist(), "cell": np.zeros((3, 3)).tolist(), "pbc": [False] * 3,
        "energy": -2080.0 - i, "forces": (place * 0.1).tolist(), "data": {"sid": str(i)},
    }  # fmt: skip
    return zlib.compress(json.dumps(content).encode())


def write_aselmdb(path: Path) -> None:
    write_rows(path, [row(i) for i in range(40)])


def write_qm7x(path: Path) -> None:
    plain = io.BytesIO()
    random = np.random.default_rng(0)
    with h5py.File(plain, "w") as file:
        for m in range(12):
            for c in range(2):
                group = file.create_group(f"{m}/Geom-m{m}-i1-c1-{c + 1}")
                group["atNUM"] = np.array([8, 1, 1])
                group["atXYZ"] = WATER + random.normal(0, 0.02, (3, 3))
                group["ePBE0+MBD"] = np.array([-2080.0 + random.normal()])
                group["totFOR"] = random.normal(0, 0.5, (3, 3))
    path.write_bytes(lzma.compress(plain.getvalue()))


def write_transition1x(path: Path) -> None:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for split in ("train", "val", "test"):
            for r in range(3):
                group = file.create_group(f"{split}/H2O/rxn{r}")
                group["atomic_numbers"] = np.array([8, 1, 1])
                group["positions"] = WATER + random.normal(0, 0.02, (5, 3, 3))
                group["wB97x_6-31G(d).energy"] = -2080.0 + random.normal(0, 1, 5)
                group["wB97x_6-31G(d).forces"] = random.normal(0, 0.5, (5, 3, 3))


def write_spice(path: Path) -> None:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for m in range(12):
            group = file.create_group(f"m{m}")
            group.create_dataset("smiles", data=[f"[O:1]([H:2])[H:3]{'.' * m}"], dtype=h5py.string_dtype())
            group["atomic_numbers"] = np.array([8, 1, 1], np.int16)
            group["conformations"] = ((WATER + random.normal(0, 0.02, (3, 3, 3))) / 0.529177).astype(np.float32)
            group["dft_total_energy"] = -76.4 + random.normal(0, 0.01, 3)
            group["dft_total_gradient"] = random.normal(0, 0.01, (3, 3, 3)).astype(np.float32)


FORMATS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "extxyz": ("in.xyz", write_xyz),
    "ani1x": ("in.h5", write_ani1x),
    "transition1x": ("in.hdf5", write_transition1x),
    "spice": ("in.hdf5", write_spice),
    "qm7x": ("in.xz", write_qm7x),
    "mptrj": ("in.json", write_mptrj),
    "alexandria": ("in.json.bz2", write_alexandria),
    "aselmdb": ("in.aselmdb", write_aselmdb),
}
CHECKED = {"qm7x", "alexandria"}  # xz and bz2 carry checksums of what is in them


def made(format: str, path: Path, out: Path, **more) -> Store | str:
    """The store, or the message of the error; any other exception is a failure (and a hang, by the suite's timeout)."""
    try:
        result = prepare(format, [path], out, trust_units=True, progress=False, **more)
    except (ValueError, OSError) as error:
        assert path.name in str(error) or "split" in str(error) or "test" in str(error), error
        result = str(error)
        assert not out.exists()
        assert not [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")], "half a store is left"
    return result


def content(store: Store) -> bytes:
    packed = store.read(np.arange(store.structures))
    labels = next(iter(packed.labels.values()))
    return packed.positions.tobytes() + labels.energy.tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_errors_or_skips_and_checked_ones_never_wrong(format, tmp_path):
    name, write = FORMATS[format]
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    right = content(prepare(format, [path], tmp_path / "right", trust_units=True, progress=False))
    random = np.random.default_rng(5)
    damages = [whole[:n] for n in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1)]
    for _ in range(12):
        flipped = bytearray(whole)
        flipped[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        damages.append(bytes(flipped))
    damages.append(whole[: len(whole) // 2] + random.bytes(64) + whole[len(whole) // 2 + 64 :])
    for i, damage in enumerate(damages):
        path.write_bytes(damage)
        found = made(format, path, tmp_path / f"out{i}")
        if format in CHECKED and not isinstance(found, str):
            assert content(found) == right


def test_a_store_truncated_or_with_a_flipped_bit_is_an_error_that_names_file_and_place_or_right(tmp_path):
    (tmp_path / "in.xyz").write_text(frames(200))
    store = prepare("extxyz", [tmp_path / "in.xyz"], tmp_path / "store", trust_units=True, progress=False)
    files = sorted(p for p in store.path.rglob("*") if p.is_file())
    right = content(store)
    for file in files:
        whole = file.read_bytes()
        for end in range(0, len(whole), 4096):
            file.write_bytes(whole[:end])
            with pytest.raises(ValueError, match=file.name):
                content(Store(store.path))
        file.write_bytes(whole)
    random = np.random.default_rng(0)
    sizes = np.array([f.stat().st_size for f in files])
    caught = 0
    for _ in range(1000):
        file = files[random.choice(len(files), p=sizes / sizes.sum())]
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        try:
            assert content(Store(store.path)) == right  # a field that was not read
        except ValueError as error:
            assert file.name in str(error)
            caught += 1
        file.write_bytes(whole)
    assert caught > 500


PACK = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
}


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("format", ["extxyz", "mptrj"])
def test_packed_files_are_read_whatever_they_are_called_and_damage_is_an_error_or_harmless(format, ending, tmp_path):
    name, write = FORMATS[format]
    write(tmp_path / name)
    plain, path, random = (tmp_path / name).read_bytes(), tmp_path / "other", np.random.default_rng(3)
    right = content(prepare(format, [tmp_path / name], tmp_path / "right", trust_units=True, progress=False))
    whole = PACK[ending](plain[:1000]) + PACK[ending](plain[1000:])  # streams one after the other
    path.write_bytes(whole)
    assert content(prepare(format, [path], tmp_path / "packed", trust_units=True, progress=False)) == right
    damages = [whole[: len(whole) // 2], whole[:-1], whole + b"what is no stream"]
    for place in random.integers(10, len(whole), 6):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        damages.append(bytes(flipped))
    for i, damage in enumerate(damages):
        path.write_bytes(damage)
        found = made(format, path, tmp_path / f"out{i}")
        assert "other: truncated or damaged near byte" in found if isinstance(found, str) else content(found) == right
        assert i > 2 or isinstance(found, str)


def bomb(ending: str, head: bytes, repeated: bytes) -> bytes:
    """Streams one after the other: some 20 GB out of 20 kB (gzip, which packs to no less than a thousandth: 20 MB)."""
    return PACK[ending](head) + PACK[ending](repeated * (9_000_000 // len(repeated))) * 2000


BOMBS = {"spaces": b" ", "digits": b"1", "objects": b'{"a":', "records": b"{},", "frames": b"1\nenergy=-1\nH 0 0 0\n"}
HEADS = {"alexandria": b'{"entries": [', "mptrj": b'{"mp-1": {"mp-1-0-0": ', "extxyz": b"1\nenergy=-1\nH 0 0 0\n"}
USUAL = [("bz2", "alexandria", what) for what in BOMBS] + [
    ("gz", "extxyz", "digits"), ("xz", "extxyz", "spaces"), ("xz", "mptrj", "objects"), ("zst", "extxyz", "objects"),
    ("zst", "alexandria", "records"),
]  # fmt: skip
ALL = [(ending, format, what) for ending in PACK for format in HEADS for what in BOMBS]


@pytest.mark.parametrize(
    ("ending", "format", "what"), [c if c in USUAL else pytest.param(*c, marks=pytest.mark.full) for c in ALL]
)
def test_a_bomb_is_an_error(ending, format, what, tmp_path):
    path = tmp_path / f"bomb.{ending}"
    path.write_bytes(bomb(ending, HEADS[format], BOMBS[what]))
    assert path.name in made(format, path, tmp_path / "out")


@pytest.mark.parametrize("ending", PACK)
def test_a_bomb_behind_much_that_is_honest_is_refused_as_soon(ending, tmp_path):
    path = tmp_path / f"late.{ending}"
    honest = np.random.default_rng(0).integers(32, 127, 3_000_000, np.uint8).tobytes()
    path.write_bytes(PACK[ending](honest) + bomb(ending, b"", b"{},"))
    size = 0
    with pytest.raises(ValueError, match=rf"late\.{ending}: .* more than is plausible"):
        for chunk in packed.unpacked(path, packed.packing_of(path), 1 << 18, lambda place: None):
            size += len(chunk)
    assert len(honest) <= size <= len(honest) + (4 << 20)


@pytest.mark.parametrize("format", ["alexandria", "mptrj"])
def test_json_nested_100_000_deep_is_an_error_or_a_skip(format, tmp_path):
    deep = b"[" * 100_000 + b"]" * 100_000
    path = tmp_path / "deep.json"
    if format == "alexandria":
        path.write_bytes(b'{"entries": [' + deep + b"]}")
    else:
        path.write_bytes(b'{"mp-1": {"mp-1-0-0": {"structure": ' + deep + b"}}}")
    assert "deep.json" in made(format, path, tmp_path / "out")


def claims_a_billion_conformers(file: h5py.File, keys: dict[str, str]) -> None:
    """All fill value, nothing of it in the file."""
    group = file.create_group("claims")
    group[keys["numbers"]] = np.array([8, 1, 1])
    group.create_dataset(keys["positions"], (10**9, 3, 3), np.float32, chunks=(1000, 3, 3))
    group.create_dataset(keys["energy"], (10**9,), np.float64, chunks=(1000,))


def claims_a_billion_atoms(file: h5py.File, keys: dict[str, str]) -> None:
    group = file.create_group("claims")
    group.create_dataset(keys["numbers"], (10**9,), np.uint8, chunks=(1 << 20,), fillvalue=1)
    group.create_dataset(keys["positions"], (2, 10**9, 3), np.float32, chunks=(1, 1 << 20, 3))
    group[keys["energy"]] = np.zeros(2)


def unpacks_a_thousandfold(file: h5py.File, keys: dict[str, str]) -> None:
    group = file.create_group("bomb")
    group[keys["numbers"]] = np.array([8, 1, 1])
    packed = {"chunks": True, "compression": "gzip"}
    group.create_dataset(keys["positions"], data=np.zeros((300_000, 3, 3), np.float32), **packed)
    group.create_dataset(keys["energy"], data=np.zeros(300_000), **packed)


def lies_in_another_file(file: h5py.File, keys: dict[str, str]) -> None:
    group = file.create_group("elsewhere")
    group[keys["numbers"]] = np.array([8, 1, 1])
    group.create_dataset(keys["positions"], (1, 3, 3), np.float32, external=[("/etc/passwd", 0, 36)])
    group[keys["energy"]] = np.zeros(1)


KEYS = {
    "ani1x": {"numbers": "atomic_numbers", "positions": "coordinates", "energy": "wb97x_dz.energy"},
    "spice": {"numbers": "atomic_numbers", "positions": "conformations", "energy": "dft_total_energy"},
    "transition1x": {"numbers": "atomic_numbers", "positions": "positions", "energy": "wB97x_6-31G(d).energy"},
}


@pytest.mark.parametrize(
    "add", [claims_a_billion_conformers, claims_a_billion_atoms, unpacks_a_thousandfold, lies_in_another_file]
)
@pytest.mark.parametrize("format", KEYS)
def test_hdf5_that_claims_more_than_it_holds_is_a_counted_skip_of_its_group(format, add, tmp_path):
    name, write = FORMATS[format]
    write(tmp_path / name)
    with h5py.File(tmp_path / name, "a") as file:
        add(file["train/H2O"] if format == "transition1x" else file, KEYS[format])
    right = made(format, tmp_path / name, tmp_path / "out")
    assert isinstance(right, Store)
    (reason,) = right.manifest["skipped"]
    assert reason in ("a dataset unpacks to more than is plausible", "a dataset lies in another file")
    assert right.manifest["skipped"][reason] == 1


def test_groups_that_are_links_to_other_files_are_not_followed(tmp_path):
    write_spice(tmp_path / "other.hdf5")
    write_spice(tmp_path / "in.hdf5")
    with h5py.File(tmp_path / "in.hdf5", "a") as file:
        file["link"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "/m0")
    store = made("spice", tmp_path / "in.hdf5", tmp_path / "out")
    assert isinstance(store, Store) and store.structures == 36


class Evil:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bad_values_in_a_database_are_skipped_and_no_pickle_is_executed(tmp_path):
    trace = tmp_path / "executed"
    evil = pickle.dumps(Evil(trace))
    bad = [evil, zlib.compress(evil), zlib.compress(b"[" * 100_000), zlib.compress(bytes(1 << 28)), b"", row(0)[:40]]
    write_rows(tmp_path / "in.aselmdb", bad + [row(i) for i in range(40)])
    store = made("aselmdb", tmp_path / "in.aselmdb", tmp_path / "out")
    assert isinstance(store, Store) and store.structures == 40 and sum(store.manifest["skipped"].values()) == len(bad)
    assert not trace.exists()


def test_a_database_that_ends_the_process_of_its_library_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "in.aselmdb"
    write_aselmdb(path)
    whole, messages = path.read_bytes(), []
    for page in range(len(whole) // 4096):  # the pointer to the third row of a page leads out of the file (fuzzed)
        crooked = bytearray(whole)
        crooked[page * 4096 + 21] = 0xFF
        path.write_bytes(crooked)
        messages.append(str(made("aselmdb", path, tmp_path / f"out{page}")))
    crashed = [text for text in messages if "in.aselmdb: reading it ended the process (SIG" in text]
    assert crashed and "the file is damaged" in crashed[0]


def test_hostile_frames_are_counted_skips(tmp_path):
    cell = 'Lattice="4 0 0 0 4 0 0 0 4" pbc="T T T"'
    bad = [
        ("H", "nan 0 0", "", ""),
        ("H", "inf 0 0", "", ""),
        ("H", "1e300 0 0", "", ""),
        ("X", "0 0 0", "", ""),
        ("Xx", "0 0 0", "", ""),
        ("H", "0 0 1e-5", "", "H 0 0 0"),
        ("H", "0 0 0", 'Lattice="4 0 0 8 0 0 0 0 4" pbc="T T T"', ""),
        ("H", "0 0 0", 'Lattice="nan 0 0 0 4 0 0 0 4" pbc="T T T"', ""),
        ("H", "0 0 0", 'Lattice="0 0 0 0 0 0 0 0 0" pbc="T T T"', ""),
        ("H", "0 0 3.99999", cell, "H 0 0 0"),
        ("H", "0 0 2e4", "", "H 0 0 0"),
        ("H", "0 0 0", 'Lattice="4 0 0 0 2e4 0 0 0 4" pbc="T T T"', ""),
        ("H", "0 0 0", 'Lattice="0.01 0 0 0 0.01 0 0 0 0.01" pbc="T T T"', ""),  # a billion neighbours
        ("H", "0 0 0", 'Lattice="4 0 0 4 0 1e-3 0 0 4" pbc="T T T"', ""),
        ("H", "0 0 0", "charge=1e400", ""),
        ("H", "0 0 0", "energy=inf", ""),
    ]
    text = frames()
    for symbol, place, comment, second in bad:
        energy = "" if "energy" in comment else "energy=-13"
        text += f"{1 + bool(second)}\n{comment} {energy}\n{symbol} {place}\n" + (f"{second}\n" if second else "")
    grain = "".join(f"H {0.01 * i:.2f} {0.01 * j:.2f} 0\n" for i in range(40) for j in range(40))
    text += f"1600\nenergy=-1\n{grain}0\nenergy=-1\n" + "1\nenergy=-1 Properties=Z:I:1:pos:R:3\n0 0 0 0\n"
    text += "1\nenergy=-1 Properties=Z:I:1:pos:R:3\n119 0 0 0\n"
    (tmp_path / "in.xyz").write_text(text)
    store = made("extxyz", tmp_path / "in.xyz", tmp_path / "out")
    assert isinstance(store, Store) and store.structures == 24
    assert sum(store.manifest["skipped"].values()) == len(bad) + 4


def test_odd_but_valid_cells_are_taken_and_have_the_right_neighbours(tmp_path):
    cells = {"left-handed": "4 0 0 0 0 4 0 4 0", "two angstrom": "2 0 0 0 2 0 0 0 2", "sheared": "3 0 0 9 3 0 0 9 3"}
    one = [f'1\nLattice="{c}" pbc="T T T" energy=-1 config_type=bulk\nNa 0.1 0.2 0.3\n' for c in cells.values()]
    (tmp_path / "in.xyz").write_text("".join(one) * 10 + "1\nenergy=-1\nNa 0 0 0\n")
    store = prepare("extxyz", [tmp_path / "in.xyz"], tmp_path / "out", trust_units=True, progress=False)
    assert store.structures == 31 and store.manifest["skipped"] == {}
    packed = store.read(np.arange(31))
    receivers = np.bincount(neighbor_list(packed, 5.0)[0][0], minlength=31)
    steps = np.stack(np.meshgrid(*[np.arange(-20, 21)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for s in range(31):
        images = steps @ packed.cell[s] if packed.pbc[s].any() else np.zeros((1, 3))
        assert receivers[s] == (np.linalg.norm(images, axis=1) < 5.0).sum() - 1


def test_names_with_spaces_and_unicode(tmp_path):
    folder = tmp_path / "a folder, ünïcode ☃"
    folder.mkdir()
    for format, (name, write) in FORMATS.items():
        path = folder / f"my file é {name}"
        write(path)
        store = made(format, path, folder / f"störe {format}")
        assert isinstance(store, Store) and store.source_file(0) == path.name


def test_a_mistyped_key_is_an_error_that_names_those_there_are(tmp_path):
    (tmp_path / "in.xyz").write_text(frames(extra='Lattice="9 0 0 0 9 0 0 0 9" stress="1 0 0 0 1 0 0 0 1"'))
    for key in ("forces_key", "energy_key", "stress_key", "virial_key", "charge_key"):
        with pytest.raises(ValueError, match=r"in\.xyz.*forzes.*energy"):
            prepare("extxyz", [tmp_path / "in.xyz"], tmp_path / "out", options={key: "forzes"}, progress=False)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_and_a_read_only_target_are_errors_that_leave_nothing(tmp_path):
    write_xyz(tmp_path / "in.xyz")
    with h5py.File(tmp_path / "big.h5", "w") as file:  # 8 MB twice over
        group = file.create_group("H2O1")
        group["atomic_numbers"] = np.array([8, 1, 1], np.uint8)
        group["coordinates"] = (WATER + np.random.default_rng(0).normal(0, 0.02, (100_000, 3, 3))).astype(np.float32)
        group["wb97x_dz.energy"] = np.full(100_000, -76.4)
    with small_disk(tmp_path / "disk", 8192) as disk:
        with pytest.raises(OSError, match=r"No space left"):
            prepare("ani1x", [tmp_path / "big.h5"], disk / "store", trust_units=True, progress=False)
        assert list(disk.iterdir()) == []
        assert (
            prepare("extxyz", [tmp_path / "in.xyz"], disk / "store", trust_units=True, progress=False).structures == 24
        )
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match=r"[Rr]ead-only"):
            prepare("extxyz", [tmp_path / "in.xyz"], disk / "other", trust_units=True, progress=False)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_says_what_its_first_record_holds(format, tmp_path):
    name, write = FORMATS[format]
    write(tmp_path / name)
    lines = reader(format).holds(tmp_path / name)
    assert (format == "qm7x") == (lines == [])  # packed HDF5 would have to be unpacked first
    assert any(word in line for line in lines for word in ("energy", "ePBE0")) or format == "qm7x"

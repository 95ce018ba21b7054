"""How fast ADIOS2 files are read and written, beside what the library alone does with the same bytes.

    python benchmarks/adios.py STORE FOLDER [--structures 20000] [--rounds 5]

STORE is any store with energies and forces; its structures, over and over with their atoms moved a little, become a
store and a file of so many structures in FOLDER. In turns: the reader (a process of its own, and pipes), a whole
`prepare`, and a process that reads the same variables from end to end with adios2 alone; then an export, and a process
that writes all variables of the same file, which lie ready in memory, with adios2 alone. Set OMP_NUM_THREADS=1.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from reading import alternate

from multifid.preparation.prepare import prepare
from multifid.preparation.selected import write_selected
from multifid.readers import adios
from multifid.readers.adios_process import KEYS
from multifid.readers.stores import block_of
from multifid.store.block import Block
from multifid.store.store import Store
from multifid.structures.structure import TRAIN
from multifid.workflows.export_adios import export_adios

ALONE = """
import sys, time
sys.modules["torch"] = None
import adios2, numpy as np
what, path, out, names = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4].split(",")
file = adios2.FileReader(path)
shapes = {n: [int(x) for x in v["Shape"].split(",")] for n, v in file.available_variables().items() if v["Shape"]}
wanted = [n for n in shapes if names == ["all"] or n.split("/")[1] in names]
started, total, held = time.perf_counter(), 0, {}
for name in wanted:
    values = np.asarray(file.read(name, [0] * len(shapes[name]), shapes[name])).reshape(shapes[name])
    total += values.nbytes
    if what == "write":
        held[name] = values
if what == "write":
    started = time.perf_counter()
    with adios2.Stream(out, "w") as stream:
        for name, values in held.items():
            stream.write(name, values, values.shape, [0] * values.ndim, values.shape)
print(time.perf_counter() - started, total)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--structures", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    store, path = grown(args.store, args.folder / f"store-{args.structures}", args.structures), args.folder / "made.bp"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    if not path.exists():
        export_adios(store.path, path)
    size = sum(p.stat().st_size for p in path.rglob("*"))
    _, wanted = alone("read", path, args.folder, KEYS)
    print(f"{store.structures:,} structures, {size / 1e6:.0f} MB, of which a store needs {wanted / 1e6:.0f} MB")
    library: dict[str, list[float]] = {"read": [], "write": []}

    def library_alone(what: str, keys: tuple[str, ...]) -> None:
        library[what].append(alone(what, path, args.folder, keys)[0])
        shutil.rmtree(args.folder / "alone.bp", ignore_errors=True)

    reading = alternate(
        args.rounds,
        reader=lambda: sum(len(r) for r in adios.read(path, adios.Options(time_limit=600), lambda f: None)),
        adios2=lambda: library_alone("read", KEYS),
        prepare=lambda: prepared(path, args.folder / "prepared"),
    )
    writing = alternate(
        args.rounds,
        export=lambda: exported(store.path, args.folder / "again.bp"),
        adios2=lambda: library_alone("write", ("all",)),
    )
    for name, seconds, moved in (
        ("adios2 alone, reading", library["read"], wanted),
        ("the reader, process and pipes included", reading["reader"], wanted),
        ("prepare", reading["prepare"], wanted),
        ("adios2 alone, writing", library["write"], size),
        ("export, neighbours included", writing["export"], size),
    ):
        middle = float(np.median(seconds))
        listed = " ".join(f"{s:.2f}" for s in seconds)
        print(
            f"{name:40} {moved / middle / 1e6:8.0f} MB/s {store.structures / middle:10,.0f} structures/s   ({listed} s)"
        )


def alone(what: str, path: Path, folder: Path, keys: tuple[str, ...]) -> tuple[float, int]:
    """Seconds and bytes of adios2 alone, in a process of its own whose start does not count."""
    command = [sys.executable, "-c", ALONE, what, str(path), str(folder / "alone.bp"), ",".join(keys)]
    seconds, count = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(count)


def prepared(path: Path, out: Path) -> None:
    prepare("adios", [path], out, trust_units=True, fractions=(1, 0, 0), options={"time_limit": 600}, progress=False)
    shutil.rmtree(out)


def exported(store: Path, out: Path) -> None:
    export_adios(store, out)
    shutil.rmtree(out)


def grown(source: Path, out: Path, structures: int) -> Store:
    """So many structures in one store: those of another one, over and over, moved by some hundredths of an angstrom."""
    if out.exists():
        return Store(out)
    store, random = Store(source), np.random.default_rng(0)

    def blocks() -> Iterator[Block]:
        left = structures
        while left:
            block = block_of(store, np.arange(min(store.structures, left)))
            place = block.columns["positions"]
            block.columns["positions"] = place + random.normal(0, 0.01, place.shape)
            left -= len(block)
            yield block

    split = np.full(structures, TRAIN, np.uint8)
    return write_selected(out, blocks(), split, store.manifest["tasks"], {"name": source.name}, {})


if __name__ == "__main__":
    main()

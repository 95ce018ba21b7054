"""How fast `prepare` is: structures/s and MB/s per core, two workers against one, peak memory.

    python benchmarks/prepare.py ani1x FILE...  [--copies N]  [--workers 1,2]  [--repeat 3]
    python benchmarks/prepare.py mptrj FILE...  --copies 300
    python benchmarks/prepare.py alexandria FILE.json.bz2... --copies 30
    python benchmarks/prepare.py extxyz FILE.xyz... --copies 10

The files are tiled to a large one of the same published layout (other names, other coordinates and energies for HDF5),
which is removed afterwards. Prints machine, command and figures; ratios come from pairs alternated in one run.
"""

import argparse
import bz2
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py
import numpy as np

WORKERS_AND_FILES = """
import json, sys, time
from multifid.preparation.prepare import prepare
began = time.perf_counter()
store = prepare(sys.argv[1], sys.argv[4:], sys.argv[2], workers=int(sys.argv[3]), progress=False)
print(json.dumps([time.perf_counter() - began, store.structures]))
"""


def tile_hdf5(files: list[Path], out: Path, copies: int) -> None:
    """`copies` times the conformers of every group, moved by a thousandth, in groups of the published size."""
    random = np.random.default_rng(0)
    with h5py.File(out, "w") as made:
        for path in files:
            with h5py.File(path) as file:
                for name, group in file.items():
                    wanted = ("coordinates", "wb97x_dz.energy", "wb97x_dz.forces")
                    tiled = {key: np.repeat(group[key][()], copies, axis=0) for key in wanted}
                    tiled["coordinates"] += random.normal(0, 1e-3, tiled["coordinates"].shape).astype(np.float32)
                    target = made.create_group(f"{name}-{path.stem}")
                    target["atomic_numbers"] = group["atomic_numbers"][()]
                    for key, values in tiled.items():
                        target[key] = values


def tile_json(files: list[Path], out: Path, copies: int) -> None:
    """The same materials again under other names."""
    content = {k: v for path in files for k, v in json.loads(path.read_bytes()).items()}
    bodies = [(key, json.dumps(value)) for key, value in content.items()]
    with out.open("w") as made:
        for copy in range(copies):
            for i, (key, body) in enumerate(bodies):
                made.write(f'{"," if copy or i else "{"}"{key}x{copy}": {body}')
        made.write("}")


def tile_bz2(files: list[Path], out: Path, copies: int) -> None:
    """As `tile_json`, packed."""
    plain = out.with_suffix(".plain")
    contents = [json.loads(bz2.decompress(path.read_bytes()).replace(b"NaN", b"null")) for path in files]
    plain.write_text(json.dumps({k: v for content in contents for k, v in content.items()}))
    tile_json([plain], plain.with_suffix(".tiled"), copies)
    with plain.with_suffix(".tiled").open("rb") as raw, bz2.open(out, "wb") as packed:
        shutil.copyfileobj(raw, packed)


def tile_text(files: list[Path], out: Path, copies: int) -> None:
    """The same frames again."""
    content = b"".join(path.read_bytes() for path in files)
    with out.open("wb") as made:
        for _ in range(copies):
            made.write(content)


def run(format: str, files: list[Path], workers: int, folder: Path) -> tuple[float, int, float]:
    """(seconds without start-up, structures, peak MB of all processes together) of one prepare in its own process."""
    out = folder / "store"
    command = [sys.executable, "-c", WORKERS_AND_FILES, format, str(out), str(workers), *map(str, files)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"prepare failed with exit code {process.returncode}")
    seconds, structures = json.loads(text)
    shutil.rmtree(out)
    return seconds, structures, peak[0]


def _watch(process: subprocess.Popen, peak: list[float]) -> None:
    """The largest sum of proportional set sizes of a process and its children."""
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            pids = [process.pid, *map(int, children.read_text().split())]
            rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
            sizes = [int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:")]
            peak[0] = max(peak[0], sum(sizes) / 1000)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=["ani1x", "mptrj", "alexandria", "extxyz"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--split", type=int, default=1, help="so many equal large files instead of one")
    parser.add_argument("--workers", default="1", help="as 1,2")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1] for line in info if line.startswith("model name")), "")
    print(f"{platform.machine()}{model.rstrip()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("python", *sys.argv)
    tile = {"ani1x": tile_hdf5, "mptrj": tile_json, "alexandria": tile_bz2, "extxyz": tile_text}[options.format]
    with tempfile.TemporaryDirectory(prefix="multifid-bench-") as name:
        folder = Path(name)
        ending = {"ani1x": "h5", "mptrj": "json", "alexandria": "json.bz2", "extxyz": "xyz"}[options.format]
        files = [folder / f"large{i}.{ending}" for i in range(options.split)]
        tile(options.files, files[0], options.copies)
        for other in files[1:]:
            shutil.copy(files[0], other)
        size = sum(path.stat().st_size for path in files)
        counts = [int(n) for n in options.workers.split(",")]
        found: dict[int | str, list[float]] = {n: [] for n in counts}
        for _ in range(options.repeat):
            for n in counts:
                seconds, structures, peak = run(options.format, files, n, folder)
                found[n].append(seconds)
                print(
                    f"{n} workers: {structures:,} structures, {size / 1e6:,.0f} MB in {seconds:.2f} s:"
                    f" {structures / seconds:,.0f}/s, {size / 1e6 / seconds:.1f} MB/s, peak {peak:,.0f} MB"
                )
            if options.format == "alexandria":
                began = time.perf_counter()
                subprocess.run(["bunzip2", "-c", str(files[0])], stdout=subprocess.DEVNULL, check=True)
                found.setdefault("bunzip2", []).append(time.perf_counter() - began)
                print(f"bunzip2 alone: {found['bunzip2'][-1]:.2f} s")
        first = counts[0]
        for other in [key for key in found if key != first]:
            ratios = [a / b for a, b in zip(found[first], found[other], strict=True)]
            print(
                f"time with {first} workers / {other}: {statistics.median(ratios):.2f} (median of {len(ratios)} pairs)"
            )


if __name__ == "__main__":
    main()

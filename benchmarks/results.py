"""Rows of `results.json`: what was measured, of what, on which processor with how many threads."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch


def row(
    name: str,
    value: float,
    unit: str,
    machine: str,
    *,
    edges: float | None = None,
    ratio: float | None = None,
    fraction: float | None = None,
) -> dict:
    """edges: per second. ratio: to the plain form. fraction: of the rate of a large matrix product."""
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "edges_per_second": edges,
        "ratio_to_plain": ratio,
        "fraction_of_limit": fraction,
        "machine": machine,
    }


def machine(device: torch.device, threads: int, clock: str) -> str:
    """The processor with what it can do and how much of it was used: rows of different ones stay side by side."""
    if device.type != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")
    capability = torch.backends.cpu.get_cpu_capability() + (" AMX" if torch.cpu._is_amx_tile_supported() else "")
    used = f"{threads} thread{'s' * (threads > 1)}" + clock.replace("wall", "").replace("processor", ", processor time")
    return f"{model}, {capability}, {used}, torch {torch.__version__}"


def shown(rows: Iterable[dict]) -> Iterator[dict]:
    """The rows, each printed as it comes, under the machine where that changes."""
    machine = None
    for r in rows:
        if r["machine"] != machine:
            machine = r["machine"]
            print(f"\n{machine}\n{'':58}{'':>10} {'':14}{'edges/s':>10}{'ratio':>7}{'of limit':>9}")
        edges = "" if r["edges_per_second"] is None else f"{r['edges_per_second']:,.0f}"
        ratio, part = ("" if r[k] is None else f"{r[k]:.2f}" for k in ("ratio_to_plain", "fraction_of_limit"))
        print(f"{r['name']:58}{r['value']:10.4g} {r['unit']:14}{edges:>10}{ratio:>7}{part:>9}", flush=True)
        yield r


def keep(rows: list[dict], path: Path) -> None:
    """Put rows into a file, in place of older ones of the same name and machine."""
    old = json.loads(path.read_text()) if path.exists() else []
    names = {(r["name"], r["machine"]) for r in rows}
    path.write_text(json.dumps([r for r in old if (r["name"], r["machine"]) not in names] + rows, indent=1) + "\n")

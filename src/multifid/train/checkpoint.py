"""Checkpoints: everything a run needs to go on, by name, in one directory that is whole or not there.

    RUN/checkpoints/step-000123/encoder.safetensors         weights, EMA and moments of the encoder
                                branch-<name>.safetensors   the same of each branch
                                state.json                  everything else, and size and xxh3 of the files

Tensors are named `<part>/<parameter>` with part in weight, ema, exp_avg, exp_avg_sq. No layout enters, and no pickle.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Any]
Tensors = dict[str, Tensor]


def save_checkpoint(run: Path, step: int, files: dict[str, Tensors], state: State, keep: int) -> Path:
    """Write a checkpoint and then drop the oldest ones. A kill at any moment leaves the previous ones whole."""
    folder = run / "checkpoints"
    final, part = folder / f"step-{step:06d}", folder / f".step-{step:06d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    listed = {}
    for name, tensors in files.items():
        path = part / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        _sync(path)
        listed[path.name] = {"bytes": path.stat().st_size, "xxh3": _xxh3(path)}
    text = json.dumps({**state, "step": step, "files": listed}, indent=1)
    (part / "state.json").write_text(text, encoding="utf-8")
    _sync(part / "state.json")
    _sync(part)
    if final.exists():  # the same step, written again after a resume: the same bytes
        shutil.rmtree(final)
    os.rename(part, final)
    _sync(folder)
    for old in _newest_first(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(run: Path) -> tuple[State, dict[str, Tensors], list[str]] | None:
    """The newest whole checkpoint: (state, tensors by file, what was wrong with newer ones); None if there is none."""
    complaints: list[str] = []
    for folder in _newest_first(run):
        try:
            state = _verified_state(folder)
        except ValueError as error:
            complaints.append(str(error))
            continue
        return state, {Path(n).stem: load_file(folder / n) for n in state["files"]}, complaints
    if complaints:
        raise ValueError("no checkpoint of the run is whole:\n  " + "\n  ".join(complaints))
    return None


def _verified_state(folder: Path) -> State:
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files = state["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable checkpoint state ({error})") from error
    for name, expected in files.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != expected["bytes"] or _xxh3(file) != expected["xxh3"]:
            raise ValueError(f"{file}: damaged (its size or checksum differs from what {path.name} says)")
    return state


def _newest_first(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _xxh3(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """To disk, not only to the page cache: a rename must not survive what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rng_state() -> str:
    """The state of torch's generator, as text."""
    return bytes(torch.get_rng_state().numpy()).hex()


def set_rng_state(text: str) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8))

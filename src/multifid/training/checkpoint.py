"""Checkpoints: everything a run needs to go on, by name, in one directory that is whole or not there.

    RUN/checkpoints/step-000123/encoder.safetensors         weights, EMA and moments of the encoder
                                branch-<name>.safetensors   the same of each branch
                                state.json                  everything else, and size and xxh3 of the files

Tensors are named `<part>/<parameter>` with part in weight, ema, exp_avg, exp_avg_sq. No layout enters, and no pickle.

Ranks write together, behind the training: each copies what it writes to host memory and goes on, a thread writes. All
write into one hidden directory of the shared file system; rank 0 renames it when the others have told it, through the
ranks' key-value store, that they are done. No collective is needed, so the training may be anywhere meanwhile.
"""

import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from multifid.parallel.devices import use
from multifid.parallel.groups import World, alone
from multifid.training.tensor_file import TensorFiles

State = dict[str, Any]
Tensors = dict[str, Tensor]
POLL = 0.01  # seconds between two looks into the store; blocking calls would hold it against other threads


class Saver:
    """Writes the checkpoints of a run, one at a time, in a thread."""

    def __init__(self, run: Path, world: World, keep: int) -> None:
        self.run, self.world, self.keep = run, world, keep
        self._number = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._given_up = threading.Event()

    def save(
        self,
        step: int,
        mine: dict[str, Tensors],
        names: list[str],
        state: State,
        before_commit: Callable[[Path], None] | None = None,
    ) -> None:
        """Begin to write a checkpoint: `mine` are the files of this rank, `names` those of all ranks together.

        The tensors lie in host memory, and must not be changed. before_commit: rank 0 calls it with the directory
        of all files before that becomes a checkpoint. Errors of the last save are raised here, and by `check` and
        `wait`.
        """
        self.wait()
        self._number += 1
        arguments = (self._number, step, mine, names, state, before_commit)
        self._thread = threading.Thread(target=self._in_thread, args=arguments, name="saver", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong behind the training."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until this rank's part of the last save (on rank 0: all of it) is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def give_up(self) -> None:
        """Wait no longer for other ranks: the run fails for another reason."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()

    def _in_thread(self, *arguments: Any) -> None:
        try:
            use(self.world.device)
            self._write(*arguments)
        except Exception as error:  # told by the main thread, at its next look
            self._error = error

    def _write(
        self,
        number: int,
        step: int,
        mine: dict[str, Tensors],
        names: list[str],
        state: State,
        before_commit: Callable[[Path], None] | None,
    ) -> None:
        final, key = folder_of(self.run, step), f"save/{number}"
        part = final.with_name(f".{final.name}.part")
        if self.world.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            self.world.store.set(f"{key}/open", "1")
        self._answer(f"{key}/open")
        for name, tensors in mine.items():
            path = part / f"{name}.safetensors"
            save_file(tensors, path)
            _sync(path)
            about = {"bytes": path.stat().st_size, "xxh3": _xxh3(path)}
            self.world.store.set(f"{key}/{name}", json.dumps(about))
        if not self.world.first:
            return
        listed = {f"{name}.safetensors": json.loads(self._answer(f"{key}/{name}")) for name in names}
        if before_commit is not None:
            before_commit(part)
        text = json.dumps(_written({**state, "step": step, "files": listed}), indent=1, allow_nan=False)
        (part / "state.json").write_text(text, encoding="utf-8")
        _sync(part / "state.json")
        _sync(part)
        if final.exists():  # the same step, written again after a resume: the same bits
            shutil.rmtree(final)
        os.rename(part, final)
        _sync(final.parent)
        killed = final.parent.glob(".step-*.part")  # in the midst of a checkpoint; one is written at a time
        for old in [*newest_first(self.run)[self.keep :], *killed]:
            shutil.rmtree(old, ignore_errors=True)

    def _answer(self, key: str) -> bytes:
        """What another rank wrote under a key, once it is there."""
        while not self.world.store.check([key]):
            if self._given_up.wait(POLL):
                raise InterruptedError(f"no other rank will finish this checkpoint ({key} is missing)")
        return self.world.store.get(key)


def load_checkpoint(run: Path, world: World | None = None) -> tuple[State, TensorFiles, list[str]] | None:
    """The newest whole checkpoint: (state, tensors by file, what was wrong with newer ones); None if there is none.

    Files are opened, and tensors read, when they are looked up. Every rank verifies its share of the files, and all
    take the same checkpoint. ValueError if there are checkpoints, but none is whole.
    """
    world = world or alone()
    complaints: list[str] = []
    for name in world.share([path.name for path in newest_first(run)]):
        folder = run / "checkpoints" / name
        state = world.share(_read_state(folder) if world.first else None)
        bad = [state] if isinstance(state, str) else _damaged(folder, state, world)
        if bad:
            complaints += bad
            continue
        return state, TensorFiles(folder, [Path(name).stem for name in state["files"]]), complaints
    if complaints:
        raise ValueError("no checkpoint of the run is whole:\n  " + "\n  ".join(complaints))
    return None


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def _read_state(folder: Path) -> State | str:
    """The state of a checkpoint, or what is wrong with it."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"), object_hook=_read)
        return state if isinstance(state["files"], dict) else f"{path}: `files` must be a table"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}: not a readable checkpoint state ({error})"


def _written(value: Any) -> Any:
    """A value as JSON can hold it: a number that is not finite becomes {"float": "nan"} and the like; see `_read`."""
    if isinstance(value, dict):
        return {key: _written(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_written(inner) for inner in value]
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: dict[str, Any]) -> Any:
    return float(value["float"]) if value.keys() == {"float"} else value


def _damaged(folder: Path, state: State, world: World) -> list[str]:
    """What is wrong with the files of a checkpoint, on all ranks alike."""
    names = sorted(state["files"])
    flags = torch.zeros(len(names))
    for i in range(world.rank, len(names), world.size):
        file, expected = folder / names[i], state["files"][names[i]]
        whole = file.exists() and file.stat().st_size == expected["bytes"] and _xxh3(file) == expected["xxh3"]
        flags[i] = 0.0 if whole else 1.0
    world.group.sum_(flags)
    return [
        f"{folder / name}: damaged (its size or checksum differs from what state.json says)"
        for name, flag in zip(names, flags.tolist(), strict=True)
        if flag
    ]


def newest_first(run: Path) -> list[Path]:
    """The checkpoints of a run."""
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

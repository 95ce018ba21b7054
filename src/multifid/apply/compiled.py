"""Compiled forms of models for calculators, kept on disk.

    CACHE/compiled/NAME-KEY.pt2      code for one architecture on one kind of processor; may be removed at any time
    CACHE/compiled/.NAME-KEY.lock    held by the process that compiles, where the file system has locks

Weights are no part of the code: all tasks, seeds and fine-tuned versions of one architecture share it. KEY is a hash of
everything else that decides over it: architecture, precision, processor, torch, source of this package.
Before it is used, code is held to the model on a small crystal; what does not hold is compiled anew.
"""

import contextlib
import fcntl
import inspect
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from rich.console import Console

from multifid.apply.model import Exported
from multifid.environment import cache_directory
from multifid.graphs.batch import Batch
from multifid.model import aot
from multifid.model.fixed import Fixed
from multifid.model.model_file import with_tasks
from multifid.model.output import Answer
from multifid.model.package import Package, instructions
from multifid.model.predictor import Predictor
from multifid.structures.structure import Packed


class Compiled(Exported):
    """A trained model with one task whose numbers compiled code computes; features still come from the model."""

    gives_features = True

    def __init__(self, trained: Predictor, task: str, package: Package, function: Fixed) -> None:
        held = dict(function.named_parameters()) | dict(function.named_buffers())
        weights = [held[x["name"]] for x in package.about["inputs"] if x["name"] in held]
        super().__init__(package, weights, with_tasks(trained.description, [task]))
        self.trained = trained

    def answer(
        self, packed: Packed, batch: Batch, task: str, *, stress: bool, features: bool = False
    ) -> Iterator[Answer]:
        if features:
            return self.trained.answer(packed, batch, task, stress=stress, features=True)
        return super().answer(packed, batch, task, stress=stress)


def compiled(trained: Predictor, task: str, cache: Path | None = None) -> Compiled:
    """The compiled form of a model with one task; compiled now (a minute or more) where the cache has none.

    cache: a directory; default: ~/.cache/multifid/compiled. ValueError or RuntimeError as `aot.export_package`.
    """
    folder = cache_directory() / "compiled" if cache is None else cache
    folder.mkdir(parents=True, exist_ok=True)
    place, function = folder / f"{_name(trained)}.pt2", Fixed(trained, task)
    with _locked(place):
        if place.exists():
            with contextlib.suppress(ValueError):  # damaged, or of another torch
                found = Compiled(trained, task, Package(place), function)
                if aot.holds(found.package, found.weights, function, aot.examples(trained, task, function)[1]):
                    return found
            place.unlink()
        Console(stderr=True).print(f"compiling, once for this architecture and machine: {place}", soft_wrap=True)
        aot.export_package(trained, task, place, level=instructions(), weights_as_arguments=True)
    return Compiled(trained, task, Package(place), function)


def _name(trained: Predictor) -> str:
    """The name of an encoder, and the hash of everything that decides over the code of a model, weights apart."""
    config, encoder = trained.potential.config, type(trained.potential.encoder)
    rooms = Path(aot.__file__).parent, Path(aot.__file__).parent.parent / "graphs"
    kinds = (".py", ".h", ".cpp")
    found = (p for room in rooms for p in sorted(room.rglob("*")) if p.suffix in kinds)
    sources = [*found, Path(inspect.getfile(encoder))]
    asked = [
        config.model_dump(mode="json"),
        str(trained.dtype),
        [sys.platform, platform.machine(), instructions(), torch.__version__],
        [xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in sources],
    ]
    return f"{config.encoder.name}-{xxhash.xxh3_128_hexdigest(json.dumps(asked, sort_keys=True).encode())}"


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process at a time; without locks, where the file system has none, several may do the same work."""
    with (place.parent / f".{place.stem}.lock").open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""A trained model as compiled code in one file, by torch's ahead-of-time compiler (AOTInductor).

    Fixed model -> list of operations for any sizes -> exported program -> C++ -> NAME.pt2

The code is for one kind of processor, at least: `instructions`. Its loops are of one thread, whose sums have one order
(products of matrices use all threads of the process all the same), or of as many as the process has. Before the file
gets its name the code is run on a few structures and held to the model.
"""

import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import multifid
from multifid.graphs.batch import Batch
from multifid.graphs.graph import completed
from multifid.model.fixed import Fixed, Input, Written, inputs_for, tensors_of, write_down
from multifid.model.inductor import options
from multifid.model.kernels.embedded.build import linked
from multifid.model.model_file import checksum, with_tasks
from multifid.model.package import FORMAT, INSTRUCTIONS, KEY, SCHEMA, Package, instructions
from multifid.model.pieces import batch_of
from multifid.model.predictor import Predictor
from multifid.structures.structure import Packed

FLAGS = {"baseline": ("x86-64", 1), "avx2": ("x86-64-v3", 256), "avx512": ("x86-64-v4", 512)}  # -march, bits
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the largest value, or of one where that is smaller
ENERGIES = Input("energies", "float64", ("atoms",), "eV, what each atom adds to the total; reference energies included")
FORCES = Input("forces", "float64", ("atoms", 3), "eV/angstrom")
VIRIAL = Input("virial", "float64", ("structures", 3, 3), "eV, minus dE/dstrain: stress is -virial / volume")
UNITS = {"length": "angstrom", "energy": "eV", "forces": "eV/angstrom", "virial": "eV", "charge": "e"}


def export_package(
    model: Predictor,
    task: str,
    out: Path,
    *,
    level: str | None = None,
    threaded: bool = False,
    weights_as_arguments: bool = False,
) -> dict[str, Any]:
    """Compile a model with one task into the file `out`; returns what the file says of itself.

    level: what processors must have, of `INSTRUCTIONS`; default: avx2, or what this one has where that is less.
    threaded: loops over all threads. weights_as_arguments: no weights inside, they come before the other tensors.

    ValueError for a level that this processor lacks, FileExistsError where `out` exists, RuntimeError without a
    compiler, or where the code does not compute what the model does. Nothing is left of what fails.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it or choose another name")
    level = _level(level)
    if model.device.type != "cpu":
        raise ValueError(f"compiled models run on the CPU, and this one is on {model.device}: load it without a device")
    _refuse_without_compiler()
    function = Fixed(model, task)
    batches = examples(model, task, function)
    with _quiet():
        written = write_down(function, batches[0], weights_as_arguments)
        about = _about(model, task, function, written, level, threaded)
        with tempfile.TemporaryDirectory(prefix=f".{out.stem}.", dir=out.parent) as folder:
            part = Path(folder) / "part.pt2"
            _compile(written, batches[0], about, part)
            _hold(Package(part), written, function, batches)
            os.replace(part, out)
    return about


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's compiler says about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refuse_without_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # seconds to import, for those who compile
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "compiling needs a C++ compiler that torch can use: install g++ (Debian: apt-get install g++) or clang++, "
            "or name one in the variable CXX"
        ) from error


def _level(asked: str | None) -> str:
    """What processors must have."""
    has = instructions()
    known = INSTRUCTIONS[: INSTRUCTIONS.index(has) + 1] if has in INSTRUCTIONS else (has,)
    if asked is not None and asked not in known:
        raise ValueError(
            f"instructions {asked!r}: this processor compiles and tries {', '.join(known)}; choose of these"
        )
    return asked or ("avx2" if "avx2" in known else has)


def _about(
    model: Predictor, task: str, function: Fixed, written: Written, level: str, threaded: bool
) -> dict[str, Any]:
    """What a file says of itself."""
    description = with_tasks(model.description, [task])
    weights = [
        Input(n, str(w.dtype).removeprefix("torch."), tuple(w.shape), "weight") for n, w in written.weights.items()
    ]
    inputs = [*weights, *inputs_for(function.needs)]
    outputs = [ENERGIES, FORCES, *([VIRIAL] if function.conservative else [])]
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "task": task,
        "elements": model.elements(task),
        "cutoff": model.cutoff,
        "units": UNITS,
        "forces": "conservative" if function.conservative else "direct",
        "precision": str(model.dtype).removeprefix("torch."),
        "model": checksum(function.state_dict()),
        "inputs": [x._asdict() for x in inputs],
        "outputs": [x._asdict() for x in outputs],
        "instructions": level,
        "threads": "all" if threaded else "one",
        "system": sys.platform,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "multifid": multifid.__version__,
        "description": description,
    }


def _compile(written: Written, example: Batch, about: dict[str, Any], out: Path) -> None:
    """The file of a list of operations."""
    from torch._inductor import aoti_compile_and_package  # seconds to import, for those who compile
    from torch._inductor.exc import CppCompileError
    from torch.export import Dim, export

    sizes = {name: Dim(name, min=0) for name in ("atoms", "structures", "edges", "triplets")}
    shapes = [{k: sizes[s] for k, s in enumerate(x["shape"]) if isinstance(s, str)} for x in about["inputs"]]
    names = [x["name"] for x in about["inputs"][len(written.weights) :]]
    tensors = (*written.weights.values(), *tensors_of(example, names))
    march, bits = FLAGS.get(about["instructions"], (None, None))
    threads = 1 if about["threads"] == "one" else 0
    kernels = linked(written.operations.graph, getattr(torch, about["precision"]), march, threads, out.parent)
    settings = (
        options(cuda_graphs=False)
        | kernels
        | {
            "aot_inductor.metadata": {KEY: json.dumps(about, allow_nan=False)},
            "cpp.march": march,
            "cpp.simdlen": bits,
            "cpp.threads": 1 if about["threads"] == "one" else max(os.cpu_count() or 1, 2),
            "cpp.dynamic_threads": about["threads"] == "all",
        }
    )
    try:
        with torch.no_grad():
            program = export(written.operations, tensors, dynamic_shapes=tuple(shapes), strict=False)
            aoti_compile_and_package(program, package_path=str(out), inductor_configs=settings)
    except CppCompileError as error:
        raise RuntimeError(
            f"the C++ compiler fails on the generated code ({str(error).strip().splitlines()[-1]}); name a newer g++ "
            "or clang++ in the variable CXX"
        ) from error


def _hold(package: Package, written: Written, function: Fixed, batches: Sequence[Batch]) -> None:
    """RuntimeError where compiled code differs from the function."""
    if not all(holds(package, list(written.weights.values()), function, batch) for batch in batches):
        raise RuntimeError(
            "the compiled code does not compute what the model does, and no file is written: a fault of the compiler "
            f"of torch {torch.__version__}; use the model without compiling it, or another version of torch"
        )


def holds(package: Package, weights: Sequence[Tensor], function: Fixed, batch: Batch) -> bool:
    """Whether compiled code gives what the function gives, to `TOLERANCE`; energies without references."""
    tensors = tensors_of(batch, [x.name for x in inputs_for(function.needs)])
    with torch.no_grad():
        expected = function(*tensors)
    found = package(*weights, *tensors)
    references = function.references.index_select(0, batch.numbers)
    pairs = [(found[0] - references, expected[0] - references), *zip(found[1:], expected[1:], strict=True)]
    tolerance = TOLERANCE[function.dtype]
    return all(
        a.shape == b.shape
        and (not b.numel() or bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))))
        for a, b in pairs
    )


def examples(model: Predictor, task: str, function: Fixed) -> list[Batch]:
    """Molecules and crystals of the elements of a task; one crystal; one atom; two that see no other; nothing.

    The first has numbers of atoms, edges and structures that are no width of the model (see `write_down`).
    """
    about, random = model.description["tasks"][task], np.random.default_rng(0)
    known = sorted(int(z) for z in about["references"])

    def structures(*kinds: tuple[int, float]) -> Packed:
        """Jittered grids: (atoms, spacing), negative for a periodic one."""
        natoms = np.array([n for n, _ in kinds], np.int64)
        places, cells = [np.zeros((0, 3))], np.zeros((len(kinds), 3, 3))
        for k, (n, spacing) in enumerate(kinds):
            side = int(np.ceil(n ** (1 / 3)))
            grid = np.stack(np.unravel_index(np.arange(n), (side, side, side)), axis=1) * abs(spacing)
            places.append(grid + random.normal(0, 0.05 * abs(spacing), (n, 3)))
            cells[k] = np.eye(3) * side * -spacing * (spacing < 0)
        total = int(natoms.sum())
        return Packed(
            numbers=random.choice(known, total).astype(np.uint8),
            positions=np.concatenate(places),
            natoms=natoms,
            cell=cells,
            pbc=np.asarray(cells.any(axis=2)),
            charge=np.full(len(kinds), (about.get("charges") or [0])[0], np.int8),
            spin=np.full(len(kinds), (about.get("spins") or [1])[0], np.uint8),
        )

    def batch(*kinds: tuple[int, float]) -> Batch:
        return completed(batch_of(structures(*kinds), model.cutoff, task), function.needs)

    spacing = 0.45 * model.cutoff
    widths = {size for w in (*function.parameters(), *function.buffers()) for size in w.shape} | set(range(9))
    many = [(7, spacing), (8, -spacing), (3, spacing), (1, spacing), (5, -spacing), (4, spacing), (9, spacing)]
    for more in range(100):
        first = batch(*many, *[(2, spacing)] * more)
        if not widths & set(_sizes(first)):
            break
    return [first, batch((8, -spacing)), batch((1, spacing)), batch((2, 9 * spacing)), batch()]


def _sizes(batch: Batch) -> list[int]:
    """Atoms, structures, edges, and triplets where there are some."""
    triplets = [] if batch.triplets is None else [batch.triplets.shape[1]]
    return [batch.numbers.shape[0], batch.natoms.shape[0], batch.edges.shape[1], *triplets]

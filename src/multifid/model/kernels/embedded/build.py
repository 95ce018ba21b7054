"""Compiles the operations of this folder into an object file that torch's compiler links into an exported file."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from multifid.model.kernels.embedded import egnn, painn
from multifid.model.kernels.native.build import FLAGS, SOURCES, TIME_LIMIT

NUMBERS = {torch.float32: "float", torch.float64: "double"}
OPERATIONS = {"egnn": egnn.declarations, "painn": painn.declarations}  # by the source beside this file


def linked(graph: Any, dtype: torch.dtype, march: str | None, threads: int, folder: Path) -> dict[str, Any]:
    """Settings of torch's compiler for a list of operations: object files, in `folder`, where it has such ones.

    march: what processors must have, None: what this one has. threads: 0 for all of the process.
    RuntimeError where the compiler fails.
    """
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    found = [kind for kind in OPERATIONS if any(name.startswith(f"multifid.multifid_{kind}") for name in names)]
    if not found:
        return {}
    objects = [_compiled(kind, dtype, march, threads, folder) for kind in found]
    declared = {operation: text for kind in found for operation, text in OPERATIONS[kind]().items()}
    # What is said of a library stands behind `-l`: the mathematics, which every file links, then the object files.
    return {
        "aot_inductor.custom_ops_to_c_shims": declared,
        "aot_inductor.custom_op_libs": [" ".join(["m", *(shlex.quote(str(made)) for made in objects)])],
    }


def _compiled(kind: str, dtype: torch.dtype, march: str | None, threads: int, folder: Path) -> Path:
    """The object file of a source."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # seconds to import, for those who compile

    source, made = Path(__file__).parent / f"{kind}.cpp", folder.resolve() / f"{kind}.o"  # linked from elsewhere
    command = [
        get_cpp_compiler(), *(flag for flag in FLAGS if flag != "-shared"), "-c", f"-march={march or 'native'}",
        f"-DMULTIFID_NUMBER={NUMBERS[dtype]}", f"-DMULTIFID_THREADS={threads}",
        f"-I{Path(torch.__file__).parent / 'include'}", f"-I{SOURCES}", str(source), "-o", str(made),
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.SubprocessError as error:
        told = getattr(error, "stderr", None) or str(error)
        raise RuntimeError(f"the C++ compiler fails on {source}: {told.strip().splitlines()[-1]}") from error
    return made

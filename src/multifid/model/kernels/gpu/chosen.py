"""Which edges are computed by kernels of Triton: those of float32 on a CUDA device, where they are right.

They are used by themselves where triton is installed, as it is with torch for CUDA, and where no compiler writes down
the pass (`train.compile`, exported models). `train.kernels: eager`, or `use_kernels(False)`, switches them off.

Before a function is first run by its kernels, for a device and a type of products, both forms are computed for the
edges at hand: values, gradients, gradients of gradients. The kernels may be four times as far from float64 as torch is,
in the same precision. Where they are farther off, or do not compile, a warning says so and torch computes these edges.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from multifid.graphs.edges import IN_TILES, EdgeFunction, faster_form_of, over_edges
from multifid.model.kernels.egnn import matmul_type

EDGES = 4096  # of the batch at hand, that both forms are computed for
LARGEST = 1 << 31  # numbers of atoms: kernels count them in 32 bits, those of edges in 64
TIMES_AS_WRONG = 4.0  # as torch
# Relative rounding that is no error, of numbers that torch happens to hit.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6, torch.float64: 1e-12}

_WANTED = [True]
_ASIDE: ContextVar[bool] = ContextVar("_ASIDE", default=False)  # while torch is asked for what the kernels give
_RIGHT: dict[tuple, bool] = {}  # by function, device, type and precision of products


def use_kernels(wanted: bool) -> bool:
    """Whether this process computes edges by kernels for GPUs where it can. Gives back what it did before."""
    before, _WANTED[0] = _WANTED[0], wanted
    return before


@cache
def installed() -> bool:
    """Whether triton is."""
    return importlib.util.find_spec("triton") is not None


def usable(envelope: Tensor) -> bool:
    """Whether edges with this envelope may be computed by kernels."""
    wanted = _WANTED[0] and not _ASIDE.get()
    return wanted and envelope.dtype == torch.float32 and IN_TILES.get() is None and installed()


def on_gpu(function: EdgeFunction, module: str, summed: Sequence[bool]) -> None:
    """Registers `messages` of a module beside this one, which imports triton, as a faster form of a function."""

    def run(pieces: list[slice], i: Tensor, j: Tensor, *tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        envelope = tensors[2][0]
        kind = matmul_type(envelope)
        key = (function, envelope.device, kind, torch.get_float32_matmul_precision())
        if 2 * max(x.numel() for x in (*tensors[0], *tensors[1])) >= LARGEST:
            return _by_torch(function, summed, i, j, tensors)
        if key not in _RIGHT and len(i):
            _RIGHT[key] = _is_right(function, module, summed, i, j, tensors)
        if _RIGHT.get(key):
            return importlib.import_module(f"{__package__}.{module}").messages(pieces, i, j, *tensors)
        return _by_torch(function, summed, i, j, tensors)

    faster_form_of(function, twice=True, devices=frozenset({"cuda"}), usable=usable)(run)


def _by_torch(
    function: EdgeFunction, summed: Sequence[bool], i: Tensor, j: Tensor, tensors: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    receivers, senders, (envelope, *edges), weights = tensors
    atoms, width = len((*receivers, *senders)[0]), max(x.shape[-1] for x in weights)
    token = _ASIDE.set(True)
    try:
        return over_edges(
            function, i, j, atoms, envelope, width=width, receivers=receivers, senders=senders, edges=edges,
            weights=weights, summed=summed,
        )  # fmt: skip
    finally:
        _ASIDE.reset(token)


def _is_right(
    function: EdgeFunction,
    module: str,
    summed: Sequence[bool],
    i: Tensor,
    j: Tensor,
    tensors: Sequence[Sequence[Tensor]],
) -> bool:
    """Whether the kernels give what torch gives; a warning says why not."""
    device = i.device
    try:
        messages = importlib.import_module(f"{__package__}.{module}").messages
        with torch.inference_mode(False):  # clones of what was made in inference mode have derivatives
            bad = compare(
                lambda *x: messages([slice(0, len(x[0]))], *x),
                lambda i, j, *x: _by_torch(function, summed, i, j, x),
                i[:EDGES].clone(),
                j[:EDGES].clone(),
                [tensors[0], tensors[1], [x[:EDGES] for x in tensors[2]], tensors[3]],
            )
    except Exception as error:
        bad = f"{type(error).__name__}: {str(error)[:500]}"
    if bad is not None:
        warnings.warn(
            f"kernels for the edges of {module} are not used on {device}: {bad}. "
            "Torch computes them, as with train.kernels: eager",
            stacklevel=2,
        )
    return bad is None


def compare(
    kernels: Callable, torchs: Callable, i: Tensor, j: Tensor, tensors: Sequence[Sequence[Tensor]]
) -> str | None:
    """How two forms of a function of edges differ, where that is more than rounding.

    They are called with (i, j, *tensors). Compared are values, gradients and their gradients along random numbers.
    """
    with torch.autocast(i.device.type, enabled=False):
        exact = _derivatives(torchs, i, j, tensors, torch.float64)
    ours, theirs = (_derivatives(form, i, j, tensors, None) for form in (kernels, torchs))
    rounding = ROUNDING[matmul_type(tensors[2][0])]
    for name in exact:
        wrong, usual = (_error(x[name], exact[name]) for x in (ours, theirs))
        if not wrong <= TIMES_AS_WRONG * usual + rounding:
            return f"their {name} are off by {wrong:.1e}, torch's by {usual:.1e}"
    return None


def _error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of several tensors, each relative to its norm."""
    parts = [(x.double() - y).norm() / y.norm().clamp(min=1e-300) for x, y in zip(ours, exact, strict=True)]
    return float(torch.stack(parts).norm())


def _derivatives(
    form: Callable, i: Tensor, j: Tensor, tensors: Sequence[Sequence[Tensor]], dtype: torch.dtype | None
) -> dict[str, list[Tensor]]:
    """Values, gradients, and gradients of gradients of all tensors."""
    random = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.device, x.dtype)

    # What is kept here is of no layer whose values are computed again in the backward pass.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        parts = [[x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in part] for part in tensors]
        inputs = [x for part in parts for x in part]
        values = [x for part in parts[:3] for x in part]
        outputs = form(i, j, *parts)
        slopes = [like(x) for x in outputs]
        # Squares, so that the gradient of the outputs depends on the inputs, as that of an energy does.
        energy = sum((x * y).sum() + 0.5 * x.square().mean() for x, y in zip(outputs, slopes, strict=True))
        first = torch.autograd.grad(energy, values, create_graph=True, allow_unused=True, materialize_grads=True)
        of_weights = torch.autograd.grad(energy, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        along = sum((x * like(x)).sum() for x in first) + energy
        second = torch.autograd.grad(along, inputs, allow_unused=True, materialize_grads=True)
    found = {"values": outputs, "gradients": of_weights, "second derivatives": second}
    return {name: [x.detach() for x in parts] for name, parts in found.items()}

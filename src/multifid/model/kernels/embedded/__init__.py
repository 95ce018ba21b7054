"""Kernels inside compiled code: operations of torch whose C++ is linked into exported files.

    traced:    h -> ... -> multifid::multifid_egnn -> ...         one node of the list of operations (egnn.py)
    compiled:  ... aoti_torch_cpu_multifid_egnn(...) ...          a function of egnn.cpp, in an object file (build.py)

The file needs nothing but torch to run. In Python the operations are the functions of the library that eager passes
call (`native/`), so that a list of operations can be held to the model before it is compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from multifid.model.kernels.native.build import library

# Whether a pass is written down for a compiler that links kernels.
WRITING: ContextVar[bool] = ContextVar("WRITING", default=False)


@contextmanager
def embedded() -> Iterator[None]:
    """Inside, in this thread, passes are written down with kernels, where the library has them."""
    token = WRITING.set(True)
    try:
        yield
    finally:
        WRITING.reset(token)


def wanted(x: Tensor, width: int) -> bool:
    """Whether edges of such a width, which a tensor is of, become one operation."""
    if not WRITING.get() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    made = library()
    return made is not None and width <= made.multifid_widest()

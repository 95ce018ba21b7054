"""An update by SOAP in C++ (`model/kernels/native/soap.h`): of narrow matrices torch's many calls cost most.

The same equations as `soap.py`, to rounding. A matrix is updated by itself, so its bits depend on no other.
"""

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from multifid.model.kernels.native.build import library

WIDEST = 256  # a library's products of larger matrices are as fast
WHOLE = ("many", "m", "n", "threads", "type", "before", "after")
OTHER = ("lr", "decay", "b1", "b2", "c1", "c2", "scale", "damping", "floor", "epsilon")
ARRAYS = ("sizes", "weights", "gradients", "first", "second", "left", "right", "left_basis", "right_basis")
MOMENTS = {"exp_avg": "first", "exp_avg_sq": "second"}


class Call(ctypes.Structure):
    """SOAPCall of `native/soap.h`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in WHOLE),
        *((name, ctypes.c_double) for name in OTHER),
        *((name, ctypes.c_void_p) for name in ARRAYS),
    )


def usable(members: Sequence[Tensor], gradients: Sequence[Tensor]) -> bool:
    """Whether the library updates such parameters, which are of one shape if they are matrices to be rotated."""
    first = members[0]
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.float64)
        and max(first.shape, default=1) <= WIDEST
        and all(x.dtype == first.dtype and x.is_contiguous() for x in (*members, *gradients))
        and library() is not None
    )


def update(
    members: Sequence[Tensor],
    gradients: Sequence[Tensor],
    kept: Mapping[str, Tensor],
    rotated: bool,
    numbers: Mapping[str, float],
) -> None:
    """Move parameters, and what is kept of them, along their gradients. numbers: whole and other ones of `Call`."""
    made = library()
    assert made is not None
    addresses = {
        "sizes": np.array([x.numel() for x in members]),
        "weights": np.array([x.data_ptr() for x in members]),
        "gradients": np.array([x.data_ptr() for x in gradients]),
    }
    m, n = members[0].shape if rotated else (0, 0)
    made.multifid_soap(
        ctypes.byref(
            Call(
                many=len(members),
                m=m,
                n=n,
                threads=torch.get_num_threads(),
                type=int(members[0].dtype == torch.float64),
                **numbers,
                **{name: x.ctypes.data for name, x in addresses.items()},
                **{MOMENTS.get(name, name): x.data_ptr() for name, x in kept.items()},
            )
        )
    )

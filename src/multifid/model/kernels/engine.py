"""What autograd's engine can be asked during a backward pass."""

from typing import Any

import torch


def goes_on_with(node: Any) -> bool:
    """Whether this backward pass goes on with the gradient that it hands to a node, one of a `ctx.next_functions`.

    None, for a tensor that needs no gradient: it does not.
    """
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))  # type: ignore[attr-defined]
    except RuntimeError:  # a leaf, and its gradient is what was asked for
        return True

"""Options for torch's code generator (inductor): what torch 2.13 gets wrong in the lists of `compiled.py` is avoided.

* A sum over neighbours becomes a buffer of zeros that a scatter changes in place; who reads the sum must run after the
  scatter. For a CPU, loops of compatible sizes, (48,) and (16, 3), are fused after recomputing one of the two
  (`SchedulerNode.recompute_size_and_body`), and the recomputed one then asks for the zeros alone, unless it also has
  a dependency that was added by hand: if the fused loop is moved before the scatter, sums are read as zeros. Wrong
  numbers, no error (pytorch issue 185509, pull request 185873). So every reader of what is changed in place is given
  such a dependency, on what it depends on anyway.
* Padding by a negative number (the derivative of padding) before a matrix product ends in "Invalid ranges" where
  buffers are padded in place (pytorch issue 194558). So they are not.

Both options enter the key of torch's cache of compiled code: code that was generated without them is not taken.
"""

from functools import cache
from typing import Any


def options(cuda_graphs: bool) -> dict[str, Any]:
    """For `torch.compile(..., options=...)`."""
    return {"_pre_fusion_custom_pass": _readers_after_scatters(), "inplace_padding": False} | (
        {"triton.cudagraphs": True} if cuda_graphs else {}
    )


@cache
def _readers_after_scatters() -> Any:
    """The pass over operations that are to be fused, in the form that lets compiled code be cached."""
    # Imported here: a second, for those who compile.
    from torch._inductor.custom_graph_pass import CustomSchedulerPass, get_hash_for_files
    from torch._inductor.dependencies import WeakDep

    class ReadersAfterScatters(CustomSchedulerPass):
        def __call__(self, nodes: list[Any]) -> list[Any]:
            for node in nodes:
                for before, after in node.mutation_renames.items():
                    if before != after and any(dep.name == after for dep in node.read_writes.reads):
                        node.add_fake_dep(WeakDep(after, mutating_buf=after))
            return nodes

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return ReadersAfterScatters()

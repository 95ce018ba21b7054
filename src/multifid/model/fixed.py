"""A trained model with one task as a function of tensors, written down as a list of operations for any sizes.

    (positions, numbers, cell, charge, spin, structure, edges, shifts)  ->  (energies, forces, virial)

It is what an exported file computes, and a compiled calculator. Everything that a `Predictor` adds to the potential is
inside: scale, reference energies, the derivative of the energy. That is taken with respect to the vectors r_e of edges,
g_e = dE/dr_e, from which both follow:

    F_i = sum over edges from i of g  -  sum over edges to i of g          virial = - sum over edges r_e (x) g_e

Vectors are made in float64 and then rounded to the type of the model; results are float64.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from multifid.graphs.batch import Batch, rows_times_matrices
from multifid.graphs.edges import in_tiles
from multifid.graphs.graph import Graph, GraphNeeds, completed
from multifid.model.kernels.embedded import embedded
from multifid.model.layers import sum_over
from multifid.model.predictor import Predictor
from multifid.structures.elements import MAX_Z


class Input(NamedTuple):
    """A tensor that the function takes."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    meaning: str


ALWAYS = (
    Input("positions", "float64", ("atoms", 3), "angstrom"),
    Input("numbers", "int64", ("atoms",), "atomic numbers"),
    Input("cell", "float64", ("structures", 3, 3), "angstrom, rows are vectors; zero where there is none"),
    Input("charge", "int64", ("structures",), "e"),
    Input("spin", "int64", ("structures",), "multiplicity; 1 is a singlet"),
    Input("structure", "int64", ("atoms",), "the structure of each atom, ascending from 0"),
    Input("edges", "int64", (2, "edges"), "receiver i and sender j of each pair within the cutoff, sorted by receiver"),
    Input("shifts", "float64", ("edges", 3), "whole cell vectors: r_ij = x_j - x_i + shift @ cell"),
)
REVERSE = Input("reverse", "int64", ("edges",), "the number of the edge from j to i, by the opposite shift")
TRIPLETS = Input("triplets", "int64", (2, "triplets"), "pairs of edges, the first into the sender of the second")


def inputs_for(needs: GraphNeeds) -> tuple[Input, ...]:
    """What the function takes, in order, for an encoder with these needs."""
    return ALWAYS + ((REVERSE,) if needs.reverse else ()) + ((TRIPLETS,) if needs.triplets else ())


def tensors_of(batch: Batch, inputs: Sequence[str]) -> list[Tensor]:
    """The inputs of these names, of a batch in float64."""
    needs = GraphNeeds(reverse=REVERSE.name in inputs, triplets=TRIPLETS.name in inputs)
    batch = completed(batch, needs) if needs.reverse or needs.triplets else batch
    return [getattr(batch, name).contiguous() for name in inputs]


class Fixed(nn.Module):
    """The function; a copy of the encoder and of the branch of one task, in evaluation mode."""

    def __init__(self, model: Predictor, task: str) -> None:
        super().__init__()
        about, potential = model.description["tasks"][task], model.potential
        self.encoder = copy.deepcopy(potential.encoder)
        self.branch = copy.deepcopy(potential.branches[potential.branch_of[task]])
        references = torch.zeros(MAX_Z + 1, dtype=torch.float64)
        for z, energy in about["references"].items():
            references[int(z)] = energy
        self.references: Tensor
        self.register_buffer("references", references)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor([about["scale"]], dtype=torch.float64))
        self.conservative, self.dtype = model.is_conservative(task), model.dtype
        self.needs = potential.encoder.needs
        self.eval().requires_grad_(False).to(model.device)

    def forward(
        self,
        positions: Tensor,
        numbers: Tensor,
        cell: Tensor,
        charge: Tensor,
        spin: Tensor,
        structure: Tensor,
        edges: Tensor,
        shifts: Tensor,
        *more: Tensor,
    ) -> tuple[Tensor, ...]:
        """Energies of atoms (N,) eV, references included; forces (N, 3); if conservative, virial (S, 3, 3) eV.

        The tensors of `inputs_for`, in its order.
        """
        i, j = edges[0], edges[1]
        of_edges = structure.index_select(0, i)
        cells = cell.index_select(0, of_edges)
        exact = positions.index_select(0, j) - positions.index_select(0, i) + rows_times_matrices(shifts, cells)
        names = [x.name for x in inputs_for(self.needs)[len(ALWAYS) :]]
        further: dict[str, Any] = dict(zip(names, more, strict=True))

        def graph(r: Tensor) -> Graph:
            return Graph(numbers, structure, charge, spin, i, j, r, torch.linalg.vector_norm(r, dim=1), **further)

        if not self.conservative:
            of_vectors = graph(exact.to(self.dtype))
            energies, forces = self.branch(self.encoder(of_vectors), of_vectors)
            return self._energies(energies, numbers), forces.to(exact.dtype) * self.scale
        with torch.enable_grad():
            r = exact.to(self.dtype).detach().requires_grad_()
            of_vectors = graph(r)
            energies, _ = self.branch(self.encoder(of_vectors), of_vectors)
            (slope,) = torch.autograd.grad(energies.sum(), [r], allow_unused=True, materialize_grads=True)
        g = slope.detach().to(exact.dtype) * self.scale
        forces = torch.zeros_like(positions).index_add(0, i, g).index_add(0, j, -g)
        products = exact[:, :, None] * g[:, None, :]
        virial = sum_over(-(products + products.transpose(1, 2)) / 2, of_edges, cell.shape[0])
        return self._energies(energies.detach(), numbers), forces, virial

    def _energies(self, energies: Tensor, numbers: Tensor) -> Tensor:
        return energies.to(self.scale.dtype) * self.scale + self.references.index_select(0, numbers)


@dataclass
class Written:
    """The function as a list of operations."""

    operations: fx.GraphModule  # (weights..., inputs...) -> outputs, or (inputs...) -> outputs
    weights: dict[str, Tensor]  # those that are arguments, in their order; empty where the operations hold them


def write_down(function: Fixed, batch: Batch, weights_as_arguments: bool = False) -> Written:
    """Trace the function, its derivative included, for sizes that are symbols.

    batch: an example on the device of the function, in float64; none of its numbers of atoms, edges and structures may
    be 0 or 1, nor be a width of the model. weights_as_arguments: then the list serves all models of one architecture.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # a second to import, for those who compile

    example = tensors_of(batch, [x.name for x in inputs_for(function.needs)])
    with in_tiles(False), embedded(), torch.no_grad():
        operations = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
    return Written(operations, _take_out(operations, function) if weights_as_arguments else {})


def _take_out(operations: fx.GraphModule, function: Fixed) -> dict[str, Tensor]:
    """Make arguments of the weights that a list of operations holds, before its own; they are returned by name."""
    held = dict(function.named_parameters()) | dict(function.named_buffers())
    names = {tensor.data_ptr(): name for name, tensor in held.items() if tensor.numel()}
    first = next(iter(operations.graph.nodes))
    taken: dict[str, fx.Node] = {}
    for node in list(operations.graph.nodes):
        if node.op != "get_attr" or (name := names.get(getattr(operations, node.target).data_ptr())) is None:
            continue
        if name not in taken:
            with operations.graph.inserting_before(first):
                taken[name] = operations.graph.placeholder(name.replace(".", "_"))
                taken[name].meta = dict(node.meta)
        node.replace_all_uses_with(taken[name])
        operations.graph.erase_node(node)
    operations.recompile()
    return {name: held[name] for name in taken}

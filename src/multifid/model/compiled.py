"""A potential whose training passes are compiled, for batches of few shapes (`graphs/padding.py`).

A pass is first traced for the shapes at hand into a list of plain operations (`make_fx`), and the list is compiled.

    shapes -> list of operations -> compiled, with its derivative        once for each, then looked up

Direct forces: every layer of the encoder and every branch is a list of its own, so that gradients still leave one layer
after the other while the backward pass goes on; layers of one kind share their list, with other weights.

Conservative forces: training takes second derivatives, and torch derives compiled code once only. So one list holds the
energies of a batch *and* their gradient, written out by autograd while the list is made, and is derived once, for the
gradients of parameters. Its key has the slices of all tasks, and all gradients leave at the end of the backward pass.

What torch's code generator gets wrong, and how that is avoided, stands in `inductor.py`. What needs no gradient
(validation, evaluation) is not compiled.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize

from multifid.graphs.batch import TENSORS, Batch
from multifid.graphs.edges import in_tiles
from multifid.graphs.graph import Graph, completed
from multifid.model.contract import Features
from multifid.model.inductor import options
from multifid.model.potential import Potential, Prediction

Compile = Literal[False, True, "reduce-overhead"]
Function = Callable[[list[Tensor], list[Tensor]], list[Tensor]]  # (parameters, inputs) -> outputs


def compile_training(potential: Potential, how: Compile, backend: str | Callable = "inductor") -> "Lists":
    """Compile the training passes of a potential, in place, each when its shapes come for the first time.

    how: True; "reduce-overhead" also records graphs of kernels on accelerators that have them (CUDA graphs).
    """
    lists = Lists(backend, options(cuda_graphs=how == "reduce-overhead") if backend == "inductor" else {})
    if how == "reduce-overhead":
        potential.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    if potential.config.conservative:
        potential.forward = _Conservative(potential, lists)  # type: ignore[method-assign]
        return lists
    stacks = [child for child in potential.encoder.children() if isinstance(child, nn.ModuleList)]
    for layer in (layer for stack in stacks for layer in stack):
        layer.forward = _Layer(layer, lists)
    for branch in potential.branches.values():
        branch.forward = _Branch(branch, lists)
    return lists


class Lists:
    """Compiled lists of operations, by what they compute and for which shapes."""

    def __init__(self, backend: str | Callable, options: dict[str, Any]) -> None:
        self.backend, self.options = backend, options
        self.compiled: dict[Hashable, Function] = {}
        self.of_one: set[type] = set()  # layers that give one tensor
        self.writing = False

    @property
    def wanted(self) -> bool:
        """Whether a pass that begins now is to be compiled: not while it is traced."""
        return torch.is_grad_enabled() and not self.writing

    def __call__(self, what: Hashable, module: nn.Module, inputs: list[Tensor], call: Callable) -> list[Tensor]:
        """What `call(*inputs)`, tensors, is for the weights that the module now has. `what`: all else it depends on."""
        held = dict(module.named_parameters()) | dict(module.named_buffers())
        kind = inputs[0].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (what, autocast, *(_shape(x) for x in (*held.values(), *inputs)))
        with torch.autocast(kind, enabled=False):  # the list says which types it computes in
            if key in self.compiled:
                return self.compiled[key](list(held.values()), inputs)

            def function(parameters: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
                weights = {f"module.{name}": weight for name, weight in zip(held, parameters, strict=True)}
                with torch.autocast(kind, autocast, enabled=autocast is not None, cache_enabled=False):
                    return list(functional_call(_With(module, call), weights, tuple(inputs)))

            written = self._write(function, list(held.values()), inputs)
            self.compiled[key] = torch.compile(
                written, backend=self.backend, options=self.options or None, dynamic=False, fullgraph=True
            )
            try:
                return self.compiled[key](list(held.values()), inputs)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise RuntimeError(f"torch.compile fails here; set train.compile: false ({error})") from error

    def _write(self, function: Function, parameters: list[Tensor], inputs: list[Tensor]) -> nn.Module:
        """The operations that a function makes of these arguments, derivatives inside it included, none in place."""
        from torch.fx.experimental.proxy_tensor import make_fx  # a second to import, for those who compile

        self.writing = True
        try:
            with torch.no_grad(), in_tiles(False):
                written = make_fx(function)(parameters, inputs)
        finally:
            self.writing = False
        for node in list(written.graph.nodes):
            # What autograd keeps for a derivative is written down as detached from what it is derived by.
            if node.target is torch.ops.aten.detach.default:
                node.replace_all_uses_with(node.args[0])
                written.graph.erase_node(node)
        written.recompile()
        derivable = {torch.ops.aten.copy.default: lambda into, x, *_: x.to(into.dtype).expand(into.shape)}
        with torch.no_grad():
            return make_fx(functionalize(written, remove="mutations"), derivable)(parameters, inputs)


def _shape(x: Tensor) -> Hashable:
    return tuple(x.shape), x.stride(), x.dtype, x.requires_grad


def _settings(module: nn.Module) -> Hashable:
    """What two modules of one kind may differ in beside their weights."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
    return type(module), tuple(sorted(plain.items()))


class _With(nn.Module):
    """A function of a module, as a module."""

    def __init__(self, module: nn.Module, call: Callable) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.call(*inputs)


class _Layer:
    """The forward pass of a layer of the encoder: tensors to tensors, or to one."""

    def __init__(self, layer: nn.Module, lists: Lists) -> None:
        self.layer, self.forward, self.lists = layer, layer.forward, lists

    def __call__(self, *inputs: Tensor, **ready: Any) -> Tensor | tuple[Tensor, ...]:
        """ready: what kernels outside of torch have made ahead; compiled code takes none of them."""
        if not self.lists.wanted:
            return self.forward(*inputs, **ready)
        outputs = self.lists(_settings(self.layer), self.layer, list(inputs), self.call)
        return outputs[0] if type(self.layer) in self.lists.of_one else tuple(outputs)

    def call(self, *inputs: Tensor) -> Sequence[Tensor]:
        outputs = self.forward(*inputs)
        if not isinstance(outputs, Tensor):
            return outputs
        self.lists.of_one.add(type(self.layer))
        return [outputs]


class _Branch:
    """The forward pass of a branch with direct forces."""

    def __init__(self, branch: nn.Module, lists: Lists) -> None:
        self.branch, self.forward, self.lists = branch, branch.forward, lists

    def __call__(self, features: Features, graph: Graph | None = None) -> tuple[Tensor, Tensor]:
        if not self.lists.wanted:
            return self.forward(features, graph)
        of_graph = [] if graph is None else list(graph.tensors())

        def call(*tensors: Tensor) -> Sequence[Tensor]:
            edges = None if graph is None else Graph(*tensors[: len(of_graph)])  # type: ignore[arg-type]
            return self.forward(features.with_tensors(tensors[len(of_graph) :]), edges)

        energy, forces = self.lists("branch", self.branch, [*of_graph, *features.tensors()], call)
        return energy, forces


class _Conservative:
    """The pass of a potential whose forces, and stress, are derivatives of its energy."""

    def __init__(self, potential: Potential, lists: Lists) -> None:
        self.potential, self.forward, self.lists = potential, potential.forward, lists

    def __call__(self, batch: Batch, stress: bool = False) -> dict[str, Prediction]:
        if not (self.lists.wanted and self.potential.training and batch.structures):
            return self.forward(batch, stress)

        batch = completed(batch, self.potential.encoder.needs)
        names = [name for name in (*TENSORS, "reverse", "triplets") if getattr(batch, name) is not None]

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            tensors: dict[str, Any] = dict(zip(names, inputs, strict=True))
            with torch.enable_grad():  # of the energy, for forces and stress
                predictions = self.forward(replace(batch, **tensors), stress)
            parts = ((p.energy, p.forces, p.stress) for p in predictions.values())
            return [x for part in parts for x in part if x is not None]

        places = tuple((t, s.start, s.stop, a.start, a.stop) for t, (s, a) in batch.slices.items())
        inputs = [getattr(batch, name) for name in names]
        outputs = iter(self.lists((places, stress), self.potential, inputs, call))
        return {
            task: Prediction(next(outputs), next(outputs), next(outputs) if stress else None) for task in batch.slices
        }

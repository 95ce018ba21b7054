"""Padding changes nothing, and compiled passes are the eager ones, for a fixed small number of shapes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from multifid.config import parse_config
from multifid.feed.loader import TaskConfig, collate, open_sources
from multifid.graphs.padding import pad, size_for
from multifid.model.branch import BranchConfig
from multifid.model.compiled import compile_training
from multifid.model.inductor import options
from multifid.model.layers import sum_over
from multifid.model.potential import ModelConfig, Potential
from multifid.parallel.groups import alone
from multifid.parallel.layout import place
from multifid.training.build import build
from multifid.training.step import Totals
from test_model import KINDS, every_kind
from test_train import config_of, feed_of

CUTOFF = 3.0
STEPS = 5
BACKEND = "aot_eager"  # derives and calls what was written down, without the minutes that code generation takes


def potential_of(encoder="egnn", forces="direct", dtype=torch.float64, tasks=("apple", "berry", "cherry"), layers=2):
    config = ModelConfig(
        cutoff=CUTOFF,
        encoder={**KINDS[encoder], "layers": layers, "hidden": 12} | ({"vectors": 3} if "egnn" in encoder else {}),
        branch=BranchConfig(hidden=[10], forces=forces),
    )
    return Potential(config, list(tasks), {t: t for t in tasks}, seed=0).to(dtype).train()


def batches_of(stores, count, sizes=(3, 5), seed=0):
    """Batches of a few structures of every task, never of the same numbers of atoms."""
    sources = open_sources({task: TaskConfig(store=str(store)) for task, store in stores.items()})
    rng = np.random.default_rng(seed)
    drawn = lambda s: np.sort(rng.choice(s.store.size("train"), int(rng.integers(*sizes)), replace=False))  # noqa: E731
    return [collate([(s, np.asarray(s.store.index("train"))[drawn(s)].astype(np.int64)) for s in sources], CUTOFF)
            for _ in range(count)]  # fmt: skip


def between_sizes(stores):
    """A batch that must be filled up in structures, atoms and edges."""
    sizes = lambda b: (b.structures, len(b.numbers), b.edges.shape[1])  # noqa: E731
    return next(b for b in batches_of(stores, 9) if all(n < size_for(n) for n in sizes(b)))


def of_labels(predictions, batch):
    """A function of all predictions that have labels, with second derivatives everywhere."""
    total = 0.0
    for task, p in predictions.items():
        real = ~torch.isnan(batch.targets[task].energy)
        atoms = ~torch.isnan(batch.targets[task].forces[:, 0])
        total = total + p.energy[real].pow(3).sum() + p.forces[atoms].pow(2).sum()
        if p.stress is not None:
            total = total + torch.where(batch.cell[batch.slices[task][0]][:, :1, :1] > 0, p.stress, 0.0)[real].sum()
    return total


def gradients(potential, batch, **options):
    potential.zero_grad()
    value = of_labels(potential(batch, **options), batch)
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in potential.named_parameters() if p.grad is not None}


def assert_near(one, other, tolerance=1e-10):
    (value, grads), (value_other, grads_other) = one, other
    assert abs(value - value_other) <= tolerance * abs(value)
    largest = max(float(g.abs().max()) for g in grads.values())
    for name, g in grads.items():
        assert float((g - grads_other[name]).abs().max()) <= tolerance * max(float(g.abs().max()), 1e-3 * largest), name
    for name in grads_other.keys() - grads.keys():
        assert not grads_other[name].any(), name


def test_sizes_are_few_and_waste_a_quarter_at_most():
    sizes = [size_for(n) for n in range(1, 5000)]
    assert all(n <= s <= max(8, 1.25 * n) for n, s in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert all(size_for(s) == s for s in sizes) and len({s for s in sizes if s >= 512}) <= 15


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("encoder", every_kind)
def test_padding_changes_no_prediction_and_no_gradient(stores, encoder, forces):
    batch, potential = between_sizes(stores), potential_of(encoder, forces)
    padded = pad(batch, CUTOFF)
    plain, filled = potential(batch), potential(padded)
    for task, (structures, atoms) in batch.slices.items():
        n, m = structures.stop - structures.start, atoms.stop - atoms.start
        assert torch.allclose(plain[task].energy, filled[task].energy[:n], rtol=1e-12, atol=1e-13)
        assert torch.allclose(plain[task].forces, filled[task].forces[:m], rtol=1e-12, atol=1e-13)
    assert_near(gradients(potential, batch), gradients(potential, padded))


def test_padded_batches_have_sorted_receivers_one_structure_for_each_atom_and_no_more_labels(stores):
    batch = between_sizes(stores)
    padded = pad(batch, CUTOFF)
    receivers = padded.edges[0]
    assert bool((receivers.diff() >= 0).all()) and bool((padded.structure.diff() >= 0).all())
    assert int(padded.edges.max()) < len(padded.numbers) and int(padded.structure[-1]) < padded.structures
    assert int(padded.natoms.sum()) == int(batch.natoms.sum()) == int((padded.numbers > 0).sum())
    for task, y in padded.targets.items():
        structures, atoms = padded.slices[task]
        assert len(y.energy) == size_for(len(y.energy)) == structures.stop - structures.start
        assert int(padded.structure[atoms.start]) == structures.start < structures.stop
        assert bool(torch.isnan(y.forces[padded.numbers[atoms] == 0]).all())
        assert int(torch.isfinite(y.energy).sum()) == int(torch.isfinite(batch.targets[task].energy).sum())


@pytest.mark.parametrize(
    ("encoder", "shapes"),
    [("painn", 1)]  # all encoders: with conservative forces, below
    + [pytest.param(kind, 2, marks=pytest.mark.full) for kind in ("egnn", "painn", "gat", "dimenet", "mace")],
)
def test_compiled_passes_equal_eager_ones_and_compile_once_for_each_shape(stores, encoder, shapes):
    eager = potential_of(encoder)
    compiled, counter = copy.deepcopy(eager), CompileCounterWithBackend(BACKEND)
    lists = compile_training(compiled, True, counter)
    for batch in (pad(b, CUTOFF) for b in batches_of(stores, shapes)):
        assert_near(gradients(eager, batch), gradients(compiled, batch))
    assert counter.frame_count == len(lists.compiled), "one graph for each list, none compiled anew"


def crystals(batch):
    """The batch with a cell for every second structure, whose edges cross its boundary, and labels of stress."""
    cell = batch.cell.clone()
    cell[::2] = 4.0 * torch.eye(3, dtype=cell.dtype)
    shifts = batch.shifts + (batch.edges[0] % 3 == 0)[:, None] * batch.shifts.new_tensor([1.0, 0.0, -1.0])
    return replace(batch, cell=cell, shifts=torch.where(cell[batch.structure[batch.edges[0]]].any(dim=2), shifts, 0.0))


def sharing(batch):
    """The batch with a fourth task on the slice of another one, as tasks of one store have it."""
    also = dict.fromkeys(["damson"], batch.slices["berry"])
    return replace(batch, slices=batch.slices | also, targets=batch.targets | {"damson": batch.targets["berry"]})


@pytest.mark.parametrize("encoder", ["egnn", *(pytest.param(k, marks=pytest.mark.full) for k in KINDS if k != "egnn")])
def test_compiled_conservative_passes_equal_eager_ones_and_compile_once_for_each_shape(stores, encoder):
    layers, tasks = 1, ["apple", "berry", "cherry", "damson"]
    if "tensors" in encoder or "attention" in encoder:  # of two layers only; one branch, because they take long
        layers, tasks, stores = 2, ["berry"], {"berry": stores["berry"]}
    batch = batches_of(stores, 1)[0]  # without structures of the fourth task, or with those that another one has too
    batch = sharing(batch) if encoder == "egnn" else batch
    batch = pad(crystals(batch), CUTOFF)
    eager = potential_of(encoder, "conservative", tasks=tasks, layers=layers)
    compiled, counter = copy.deepcopy(eager), CompileCounterWithBackend(BACKEND)
    lists = compile_training(compiled, True, counter)
    again = replace(batch, positions=batch.positions + 0.01 * batch.positions.sin())  # other numbers, the same shapes
    for one in (batch, again):
        assert_near(gradients(eager, one, stress=True), gradients(compiled, one, stress=True))
    plain, listed = (potential(again, stress=True) for potential in (eager, compiled))
    for task in batch.slices:
        for name in ("energy", "forces", "stress"):
            one, other = getattr(plain[task], name), getattr(listed[task], name)
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12, equal_nan=True)
    with torch.no_grad():
        compiled.eval()(pad(batches_of(stores, 1, seed=5)[0], CUTOFF), stress=True)  # is computed as ever
    assert counter.frame_count == len(lists.compiled) == 1


def test_generated_code_reads_sums_over_neighbours_after_they_are_taken(tmp_path, monkeypatch):
    """Torch 2.13 reads zeros in place of the sums (see `model/inductor.py`), and cannot pad by negative numbers."""

    def function(i, x, y, scalars, vectors, weight):
        before = torch.cat([scalars, vectors.sum(2).exp()], 1)
        total = (vectors + sum_over(x @ y, i, len(scalars))).square().sum(2)
        cut = torch.nn.functional.pad(scalars.sin(), [0, -2, 0, 0]) @ weight
        return before, total, torch.cat([scalars, total.log1p()], 1), cut

    # torch takes code from its cache that was generated where another processor was imitated
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    i, shapes = torch.randint(0, 16, (48,)), [(48, 3, 3), (3, 3), (16, 5), (16, 3, 3), (3, 4)]
    inputs = (i, *(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    compiled = torch.compile(function, options=options(cuda_graphs=False), dynamic=False, fullgraph=True)
    for one, other in zip(function(*inputs), compiled(*inputs), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("forces", "tasks", "lists"),
    [
        ("direct", ["apple", "berry", "cherry"], 4),
        pytest.param("conservative", ["apple"], 1, marks=pytest.mark.full),
    ],
)
def test_a_compiled_run_is_the_eager_run_over_a_stream_of_different_batches(
    stores, tmp_path, monkeypatch, forces, tasks, lists
):
    """lists: of a step, a layer and three branches, or all in one."""
    stores = {task: stores[task] for task in tasks}
    counter, made = CompileCounterWithBackend("eager"), []  # graphs are counted alike, and cost less

    def compiling(*arguments):
        made.append(compile_training(*arguments, backend=counter))

    monkeypatch.setattr("multifid.training.build.compile_training", compiling)
    updates, shapes = {}, {False: set(), True: set()}
    for compiled in (False, True):
        train = {"precision": "fp64", "compile": compiled, "batch": 5}
        values = config_of(stores, tmp_path / "run", train=train)
        values["model"]["branch"]["forces"] = forces
        config = parse_config(values, "test")
        sources = open_sources(config.tasks)
        trainer = build(config, sources, place(list(config.tasks), "auto", 1), 10, alone())
        feed, totals = feed_of(config, sources), Totals(list(config.tasks), trainer.device)
        before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
        for step in range(STEPS):
            micro = feed.step(step).batches
            ready = trainer.ready(micro[0])
            shapes[compiled].add((ready.structures, len(ready.numbers), ready.edges.shape[1]))
            trainer.step(micro, totals)
        updates[compiled] = {n: p.detach() - before[n] for n, p in trainer.parameters.items()}
        validated = trainer.validate(feed.split("validation")).as_tensor()
        updates[compiled] |= {"train": totals.as_tensor(), "validation": validated}
    assert all(size_for(size) == size for shape in shapes[True] for size in shape)
    assert len(shapes[True]) <= len(shapes[False])  # how many fewer is the luck of which structures come together
    assert counter.frame_count == len(made[0].compiled) <= len(shapes[True]) * lists
    for name, one in updates[False].items():
        assert float((one - updates[True][name]).norm()) <= 1e-10 * float(one.norm()) + 1e-15, name


def test_a_backend_that_does_not_work_is_named_with_the_key_that_does_without(stores):
    def broken(graph, inputs):
        raise OSError("no C++ compiler")

    potential = potential_of()
    compile_training(potential, True, broken)
    with pytest.raises(RuntimeError, match=r"set train\.compile: false"):
        potential(pad(batches_of(stores, 1)[0], CUTOFF))


def test_what_does_not_go_with_compiling_is_refused(stores, tmp_path):
    with pytest.raises(ValueError, match="shard_encoder"):
        parse_config(config_of(stores, tmp_path, train={"compile": True}, parallel={"shard_encoder": True}), "test")
    with pytest.raises(ValueError, match="recompute"):
        parse_config(config_of(stores, tmp_path, train={"compile": True, "recompute": True}), "test")

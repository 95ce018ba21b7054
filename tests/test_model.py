"""The contract of encoders, held to every encoder and both force modes; what a potential is beside its encoder."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from angular import Angular
from ase.data import covalent_radii

from multifid.graphs.graph import Graph, graph_of
from multifid.model.encoders import ENCODERS, announced, build_encoder
from multifid.model.layers import NodeEmbedding, SizedBasis, draw_weights, sum_over
from multifid.model.potential import ModelConfig, Potential
from multifid.model.suite import cases, check_encoder
from multifid.model.suite.domains import halves_of_a_system
from multifid.model.suite.samples import (
    CUTOFF,
    TASK,
    TIGHT,
    assert_alike,
    assert_close,
    batch_of,
    loss,
    potential_with,
    skewed,
    system,
)
from multifid.model.suite.symmetry import rotation
from multifid.structures.periodic import electrons, properties

FORCES = ("direct", "conservative")
# One is of another package (tests/elsewhere, with tests of its own): scalars only, triplets.
KINDS = {name: {"name": name} for name in [*ENCODERS, "angular"]} | {
    "egnn with tensors": {"name": "egnn", "tensors": 3, "sized": 2, "elements": "periodic"},
    "painn with attention": {"name": "painn", "attention": {"heads": 2}, "sized": 2, "elements": "periodic"},
    "gin with attention": {"name": "gin", "attention": {"heads": 2, "walks": 3}},
}
# `make test` holds these to everything and the others to what is likeliest to break; the full product holds all to all.
THOROUGH = ("egnn with tensors", "painn")
LIKELIEST = (
    "rotation_reflection_translation-conservative",
    "images_of_one_atom-conservative",
    "continuity_at_the_cutoff-conservative",
    "gradients_are_slopes-conservative",
)
every_kind = [pytest.param(kind, marks=[] if kind in THOROUGH else pytest.mark.full) for kind in KINDS]
every_model = pytest.mark.parametrize(
    ("encoder", "forces"),
    [pytest.param(*m, marks=[] if m[0] in THOROUGH else pytest.mark.full) for m in itertools.product(KINDS, FORCES)],
)


def small(encoder):
    return {**KINDS[encoder], "layers": 2, "hidden": 12}


def is_ordinary(kind, case):
    if kind not in THOROUGH:
        return str(case) in LIKELIEST
    return not str(case).startswith("exportable")  # tracing with symbols takes seconds


CASES = [
    pytest.param(case, id=f"{kind}-{case}", marks=[] if is_ordinary(kind, case) else pytest.mark.full)
    for kind in KINDS
    if kind != "angular"
    for case in cases(small(kind))
]


@pytest.mark.parametrize("case", CASES)
def test_every_encoder_keeps_the_contract(case):
    case()


def neighbours(s, graph):
    return torch.bincount(graph.receivers, minlength=s.shape[0])[:, None]


FAULTS = {
    "rotation_reflection_translation": lambda s, graph: (
        s + sum_over(graph.vectors[:, :1].abs(), graph.receivers, s.shape[0])
    ),
    "permutation": lambda s, graph: s + 1e-3 * torch.arange(s.shape[0])[:, None],
    "batching": lambda s, graph: s - s.mean(dim=0),
    "supercell": lambda s, graph: s + 1e-3 * torch.bincount(graph.structure)[graph.structure][:, None],
    "continuity_at_the_cutoff": lambda s, graph: s + 1e-3 * neighbours(s, graph),
    "one_atom_and_no_edge": lambda s, graph: s / neighbours(s, graph),
    "bfloat16": lambda s, graph: s + 0 * sum_over(s.bfloat16(), 0 * graph.structure, s.shape[0]),
    "exportable": lambda s, graph: s + s.new_zeros(len(s), 1),
    "charge_and_spin": lambda s, graph: s * (graph.charge == 0)[graph.structure][:, None],
    "degrees_of_features": lambda s, graph: s[:, 1:],
}


@pytest.mark.parametrize("check", FAULTS)
def test_the_contract_is_broken_by_planted_faults(check, monkeypatch):
    class Faulty(Angular):
        def forward(self, graph):
            features = super().forward(graph)
            features.scalars = FAULTS[check](features.scalars, graph)
            return features

    (case,) = (c for c in cases(small("angular")) if str(c) == f"{check}-direct")
    monkeypatch.setitem(announced()[0], "angular", Faulty)
    with pytest.raises(AssertionError):
        case()


def test_an_encoder_that_goes_past_the_exchange_is_told(monkeypatch):
    monkeypatch.setattr(Graph, "exchanged", lambda self, *of_atoms: of_atoms)
    with pytest.raises(AssertionError, match="does not pass through the exchange"):
        halves_of_a_system(small("egnn"), "direct")


def test_all_checks_are_made_and_those_that_fail_are_named(monkeypatch):
    def fails(encoder, forces):
        raise AssertionError("energies differ")

    def breaks(encoder, forces):
        raise KeyError(encoder["name"])

    monkeypatch.setattr("multifid.model.suite.CHECKS", (fails, breaks, lambda encoder, forces: None))
    monkeypatch.setattr("multifid.model.suite.WITH_ONE_FORCE_MODE", {"direct": ()})
    with pytest.raises(
        AssertionError, match=r"mine fails 2 of 3 checks:\nfails-direct: .*\nbreaks-direct: KeyError: 'mine'"
    ):
        check_encoder("mine")


@every_model
def test_each_branch_sees_its_slice_and_tasks_of_one_store_share_theirs(encoder, forces):
    model = potential_with(
        small(encoder), forces, ("x", "y", "z"), {"dft": "x", "ccsd": "y", "other": "z", "twin": "x"}
    )
    first, second = [system(4), system(3, skewed(4.0))], [system(5)]
    slices = {"dft": (0, 2), "ccsd": (0, 2), "other": (2, 3)}
    together = model(batch_of(*first, *second, slices=slices), stress=True)
    assert list(together) == list(slices)
    for task, systems in (("dft", first), ("ccsd", first), ("other", second), ("twin", first)):
        alone = model(batch_of(*systems, slices={task: (0, len(systems))}), stress=True)[task]
        paired = together["dft" if task == "twin" else task]
        assert_alike(paired, alone)
    assert (together["dft"].energy - together["ccsd"].energy).abs().min() > 1e-6


@every_model
def test_shared_slices_train_as_separate_ones_do(encoder, forces):
    systems, slices = [system(4), system(3, skewed(4.0))], {"s": (0, 2), "t": (0, 2)}

    def gradients(batches):
        model = potential_with(small(encoder), forces, ("s", "t")).train()
        for batch in batches:
            sum(loss(p, batch) for p in model(batch, stress=True).values()).backward()
        return [p.grad for p in model.parameters()]

    joint = gradients([batch_of(*systems, slices=slices)])
    separate = gradients([batch_of(*systems, slices={t: (0, 2)}) for t in slices])
    for a, b in zip(joint, separate, strict=True):
        assert_close(a, b)


def with_both_forces(encoder):
    """A model with branches `direct` and `slope`, tasks of those names, and `late`, which shares `direct`'s."""
    config = ModelConfig(
        cutoff=CUTOFF,
        encoder=small(encoder),
        branch={"hidden": [8]},
        branches={"slope": {"forces": "conservative"}},
    )
    names = ["direct", "slope"]
    return Potential(config, names, {"direct": "direct", "slope": "slope", "late": "direct"}, seed=0).double()


@pytest.mark.parametrize("encoder", every_kind)
def test_direct_and_conservative_branches_stand_side_by_side(encoder):
    """Each as in a model of its kind alone, in passes of their own or in one; gradients too. Molecules and crystals."""
    both = with_both_forces(encoder)
    systems = [system(4), system(3, skewed(4.0)), system(5, skewed(5.0)), system(2), system(6)]
    slices = {"direct": (0, 2), "slope": (2, 4), "late": (4, 5)}
    batch = batch_of(*systems, slices=slices)
    for forces, tasks in (("direct", ("direct", "late")), ("conservative", ("slope",))):
        config = both.config.model_copy(update={"branch": both.config.branch.model_copy(update={"forces": forces})})
        alone = Potential(
            config.model_copy(update={"branches": {}}), list(both.branches), both.branch_of, seed=1
        ).double()
        alone.load_state_dict(both.state_dict(), strict=False)
        for task in tasks:
            first, last = slices[task]
            expected = alone.eval()(batch_of(*systems[first:last], slices={task: (0, last - first)}), stress=True)[task]
            assert_alike(both.eval()(batch, stress=True)[task], expected)
            assert (expected.stress is None) == (forces == "direct")

    def gradients(apart):
        model = with_both_forces(encoder).train()
        model.apart = apart
        found = model(batch, stress=True)
        assert list(found) == list(slices)
        own = {task: replace(batch, cell=batch.cell[batch.slices[task][0]]) for task in slices}
        sum(loss(p, own[task]) for task, p in found.items()).backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert_close(a, b)


@every_model
def test_parameters_are_named_by_part(encoder, forces):
    model = potential_with(small(encoder), forces, ("a", "b"))
    parts = [dict(model.encoder_parameters()), dict(model.branch_parameters("a")), dict(model.branch_parameters("b"))]
    for prefix, part in zip(("encoder.", "branches.a.", "branches.b."), parts, strict=True):
        assert part and all(name.startswith(prefix) for name in part)
    assert {n: id(p) for part in parts for n, p in part.items()} == {n: id(p) for n, p in model.named_parameters()}
    assert any("forces" in name for name in parts[1]) == (forces == "direct")


def test_every_encoder_has_its_own_keys():
    assert encoder_of(name="egnn").degrees == {0: 64, 1: 8}
    assert encoder_of(name="egnn", vectors=3).degrees == {0: 64, 1: 3}
    assert encoder_of(name="painn", hidden=16).degrees == {0: 16, 1: 16}
    for key, value in (("tensors", 2), ("vectors", 8)):
        with pytest.raises(ValueError, match=key):
            encoder_of(name="painn", hidden=16, **{key: value})
    written = {"name": "painn", "layers": 4, "hidden": 16, "vectors": None, "tensors": 0, "radial": 8}
    assert encoder_of(**written).degrees == {0: 16, 1: 16}, "as configs of the first release say it"
    assert encoder_of(**written | {"name": "egnn"}).degrees == {0: 16, 1: 8}


def encoder_of(**config):
    model = ModelConfig(cutoff=CUTOFF, encoder=config)
    return build_encoder(model.encoder, model.cutoff)


def test_with_tensors_atoms_see_what_distances_and_sums_of_vectors_do_not():
    """A centre with four neighbours in a square and one with four in a tetrahedron, each one alone.

    No neighbour sees another: the sum of all directions is zero in both, the distances are the same.
    """
    square = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]) * 2.5
    tetrahedron = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5 * 2.5
    systems = [
        (np.array([6, 1, 1, 1, 1]), np.vstack([np.zeros(3), x]), None, False, 0, 1) for x in (square, tetrahedron)
    ]
    batch = batch_of(*systems, cutoff=3.0)  # of encoders with a larger one, which see no more
    assert batch.edges.shape[1] == 16
    blind, seeing = (encoder_of(layers=1, hidden=8, tensors=tensors) for tensors in (0, 2))
    for encoder, same in ((blind, True), (seeing, False)):
        draw_weights(encoder, torch.Generator().manual_seed(0))
        energies = encoder.double()(graph_of(batch)).scalars[[0, 5]]
        assert torch.allclose(energies[0], energies[1], atol=TIGHT) == same


def test_elements_that_are_alike_begin_alike_and_their_bonds_look_alike():
    embedding = NodeEmbedding(16, "periodic").double()
    draw_weights(embedding, torch.Generator().manual_seed(0))
    numbers, zero = torch.tensor([11, 19, 17, 57, 58]), torch.zeros(1, dtype=torch.int64)
    sodium, potassium, chlorine, lanthanum, cerium = embedding(numbers, zero, zero + 1, zero.expand(5))
    assert (sodium - potassium).norm() < 0.7 * (sodium - chlorine).norm()
    assert (lanthanum - cerium).norm() < 0.2 * (lanthanum - sodium).norm()
    basis, pairs = SizedBasis(6).double(), torch.tensor([[0, 1], [1, 2]])
    radii = torch.from_numpy(covalent_radii[numbers.numpy()])
    bonds = 1.1 * (radii[pairs[0]] + radii[pairs[1]])
    seen = basis(bonds, numbers, *pairs)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-12)
    assert (basis(1.2 * bonds, numbers, *pairs) - seen).abs().max() > 0.1


def test_electrons_fill_shells_as_the_periodic_table_is_built():
    for z, (period, s, p, d, f) in {1: (1, 1, 0, 0, 0), 8: (2, 2, 4, 0, 0), 26: (4, 2, 0, 6, 0), 64: (6, 2, 0, 0, 8),
                                    79: (6, 2, 0, 9, 14), 82: (6, 2, 2, 10, 14)}.items():  # fmt: skip
        assert electrons(z) == (period, s, p, d, f), z
    rows = properties()
    assert rows.shape[0] == 119 and (rows[1:, 6:].sum(axis=1) == 2).all() and np.isfinite(rows).all()
    alike = [[3, 11, 19, 37, 55, 87], [9, 17, 35, 53, 85], [2, 10, 18, 36, 54, 86], [26, 44, 76], [58, 92]]
    assert all((rows[column, 13:] == rows[column[0], 13:]).all() for column in alike)


def test_encoders_of_other_packages_are_found_and_broken_ones_named():
    found, broken = announced()
    assert set(found) == {"angular"} and set(broken) == {"broken"}
    with pytest.raises(ValueError, match=r"'broken': angular:Nothing \(elsewhere-encoders\) cannot be loaded"):
        encoder_of(name="broken")
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        encoder_of(name="angular", vectors=3)
    with pytest.raises(ValueError, match=r"readout: layers reads .* so it must be last"):
        ModelConfig(encoder={"name": "angular", "layers": 1}, branch={"readout": "layers"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "gat", "hidden": 10, "heads": 4}, "hidden must be a multiple of heads, got 10 and 4"),
        ({"name": "mfc", "max_degree": 10, "degree_step": 4}, "multiple of degree_step, got 10 and 4"),
        ({"name": "pna", "scalers": ["linear", "linear"]}, "none may be named twice, got linear, linear"),
        ({"name": "pna_plus", "aggregators": ["sum"]}, "'mean', 'min', 'max' or 'std'"),
        ({"name": "schnet", "radial": 8}, "Extra inputs are not permitted"),
    ],
)
def test_what_an_encoder_cannot_be_made_of_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        encoder_of(**keys)


def test_the_encoder_of_the_documentation_is_invariant():
    text = (Path(__file__).parent.parent / "docs" / "encoders.md").read_text(encoding="utf-8")
    names = {"__name__": "documented"}
    exec(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[0], names)
    pairs = names["Pairs"](names["Pairs"].Config(layers=2, hidden=12), CUTOFF)
    draw_weights(pairs, torch.Generator().manual_seed(0))
    found = [pairs.double()(graph_of(batch_of(system(6).moved(turn)))).scalars for turn in (np.eye(3), rotation())]
    assert_close(found[0], found[1])


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="egnn, painn"):
        encoder_of(name="nonesuch")
    with pytest.raises(ValueError, match="not among"):
        Potential(ModelConfig(), ["a"], {"task": "b"}, seed=0)
    with pytest.raises(ValueError, match="must not be called 'train'"):
        Potential(ModelConfig(), ["train"], {}, seed=0)


def test_with_attention_copies_add_up_and_different_molecules_do_not():
    """As docs/encoders.md says: a mean over a structure is that of n far copies, and no sum over its parts."""
    model = potential_with({"name": "painn", "layers": 2, "hidden": 8, "attention": {"heads": 2}}, "conservative")

    def together(a, b):
        numbers, positions = np.concatenate([a.numbers, b.numbers]), np.concatenate([a.positions, b.positions + 40.0])
        return model(batch_of(a._replace(numbers=numbers, positions=positions)))[TASK].energy

    one, other = (model(batch_of(system(n)))[TASK].energy for n in (4, 6))
    assert_close(together(system(4), system(4)), 2 * one)
    assert (together(system(4), system(6)) - one - other).abs() > 1e-4


def test_attention_that_cannot_be_is_refused():
    for keys, says in (({"heads": 5}, "heads must divide"), ({"every": 4}, "no place between them")):
        with pytest.raises(ValueError, match=says):
            encoder_of(name="schnet", layers=3, hidden=12, attention=keys)

"""Checks of the contract: derivatives against differences, and passes of the smallest graphs.

Each takes what stands under `model.encoder` in a config, and the force mode.
"""

import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from multifid.graphs.graph import completed, graph_of
from multifid.model.suite.samples import (
    TASK,
    EncoderKeys,
    Forces,
    Periodic,
    assert_alike,
    assert_close,
    batch_of,
    expect,
    expect_finite_gradients,
    loss,
    mixed,
    potential_with,
    skewed,
    system,
)


def forces_are_slopes(encoder: EncoderKeys, forces: Forces) -> None:
    """Conservative forces against differences of the energy."""
    model, step = potential_with(encoder, forces), 1e-4
    batch = batch_of(system(4, skewed(3.0)), system(5))
    predicted = model(batch)[TASK]
    for atom, axis in itertools.product((0, 2, 6), range(3)):
        change = torch.zeros_like(batch.positions)
        change[atom, axis] = step
        up, down = (model(replace(batch, positions=batch.positions + s * change))[TASK].energy.sum() for s in (1, -1))
        assert_close(-predicted.forces[atom, axis], (up - down) / (2 * step), 1e-5, "a force, against a slope")


def stress_is_a_slope(encoder: EncoderKeys, forces: Forces) -> None:
    """Stress against differences of the energy; crystal, slab, wire and box; none without a volume."""
    model, step, cells = potential_with(encoder, forces), 1e-4, np.diag([3.0, 3.0, 0.0]) + np.ones((3, 3))
    layer = system(3, cells)._replace(cell=np.diag([1.0, 1.0, 0.0]) @ cells, pbc=(True, True, False))
    boxes = [system(4, skewed(4.0, seed=k)) for k in range(3)]
    periodic: list[Periodic] = [(True, True, False), (False, True, False), False]
    boxes = [s._replace(pbc=pbc) for s, pbc in zip(boxes, periodic, strict=True)]
    batch = batch_of(system(4, skewed(3.0)), *boxes, system(5), layer)
    predicted, volume = model(batch, stress=True)[TASK].stress, torch.linalg.det(batch.cell)[:4].abs()
    expect(predicted[4:].isnan().all(), "stress of a molecule, or of a layer without a third vector, is not NaN")
    assert_close(predicted[:4], predicted[:4].transpose(1, 2), what="stress and its transpose")
    for a, b in itertools.product(range(3), range(3)):
        strain = torch.zeros(3, 3, dtype=torch.float64)
        strain[a, b] += step / 2
        strain[b, a] += step / 2
        up, down = (
            model(replace(batch, positions=batch.positions @ deform, cell=batch.cell @ deform))[TASK].energy[:4]
            for deform in (torch.eye(3) + strain, torch.eye(3) - strain)
        )
        assert_close(predicted[:4, a, b], (up - down) / (2 * step) / volume, 1e-5, f"stress {a}{b}, against a slope")


def gradients_are_slopes(encoder: EncoderKeys, forces: Forces) -> None:
    """Gradients of a loss against differences, for every parameter; for conservative forces second derivatives."""
    model, batch = potential_with(encoder, forces).train(), batch_of(*mixed())
    loss(model(batch, stress=True)[TASK], batch).backward()
    generator, step = torch.Generator().manual_seed(5), 1e-5
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        expect(parameter.grad is not None and parameter.grad.any(), f"{name}: no gradient reaches it")
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if name in tables:
            direction *= parameter.grad.any(dim=1, keepdim=True)  # neutral rows are fixed, other rows do not occur
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            ends.append(loss(model(batch, stress=True)[TASK], batch).detach())
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        assert_close((parameter.grad * direction).sum(), (ends[0] - ends[1]) / (2 * step), 1e-5, f"gradient of {name}")


def one_atom_and_no_edge(encoder: EncoderKeys, forces: Forces) -> None:
    """Atoms without neighbours have energies, no forces, and finite gradients."""
    model = potential_with(encoder, forces).train()
    for systems in ([system(1)], [system(2, spread=200.0), system(1)]):
        batch = batch_of(*systems)
        assert batch.edges.shape[1] == 0
        predicted = model(batch, stress=True)[TASK]
        expect(predicted.energy.isfinite().all(), "energies of atoms without neighbours are not finite")
        expect(not predicted.forces.any(), "atoms without neighbours have forces")
        loss(predicted, batch).backward()
        expect_finite_gradients(model, "of atoms without neighbours")


def no_atoms(encoder: EncoderKeys, forces: Forces) -> None:
    """A pass over no atoms, which ranks without structures make, gives nothing, and gradients that are zero or None."""
    model, batch = potential_with(encoder, forces).train(), batch_of()
    predicted = model(batch, stress=True)[TASK]
    expect(predicted.energy.shape == (0,) and predicted.forces.shape == (0, 3), "a batch of no atoms has predictions")
    loss(predicted, batch).backward()
    expect(all(p.grad is None or not p.grad.any() for p in model.parameters()), "a batch of no atoms has gradients")
    features = model.encoder(graph_of(completed(batch, model.encoder.needs)))
    sum(x.sum() for x in features.tensors()).backward()  # type: ignore[union-attr]


def missing_labels(encoder: EncoderKeys, forces: Forces) -> None:
    """Structures whose labels are missing (NaN) change no gradient of those that have labels."""
    systems = mixed()
    labelled, found = (0, 1, 4), []
    for chosen in (range(5), labelled):
        model, batch = potential_with(encoder, forces).train(), batch_of(*(systems[k] for k in chosen))
        energy = torch.tensor([0.1 * k if k in labelled else torch.nan for k in chosen], dtype=torch.float64)
        force = 0.1 * energy[batch.structure][:, None].expand(-1, 3)
        predicted = model(batch, stress=True)[TASK]
        errors = [predicted.energy - energy, predicted.forces - force]
        sum(torch.where(e.isnan(), 0.0, e).square().sum() for e in errors).backward()  # type: ignore[union-attr]
        expect_finite_gradients(model, "where labels are missing")
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name in found[1]:
        assert_close(found[0][name], found[1][name], what=f"gradient of {name} with and without unlabelled structures")


def modes(encoder: EncoderKeys, forces: Forces) -> None:
    """Training, evaluation and no_grad predict the same; the last one keeps no graph."""
    model, batch = potential_with(encoder, forces), batch_of(*mixed())
    with torch.no_grad():
        quiet = model(batch, stress=True)[TASK]
    evaluated, trained = model.eval()(batch, stress=True)[TASK], model.train()(batch, stress=True)[TASK]
    expect(not quiet.forces.requires_grad and not quiet.energy.requires_grad, "under no_grad a graph is kept")
    expect(trained.forces.requires_grad and trained.energy.requires_grad, "while training no graph is kept")
    expect((quiet.stress is None) == (forces == "direct"), "stress is there for conservative forces only")
    for what, other in (("in evaluation", evaluated), ("while training", trained)):
        assert_alike(other, quiet, what=what)


def recomputation(encoder: EncoderKeys, forces: Forces) -> None:
    """With `recompute`, gradients are the same to the bit."""
    batch, found = batch_of(*mixed()), []
    for again in (False, True):
        model = potential_with(encoder, forces).train()
        model.encoder.recompute = again
        loss(model(batch, stress=True)[TASK], batch).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        expect(torch.equal(gradient, found[1][name]), f"gradient of {name}: another one where values are recomputed")

"""Check of the contract: a system cut into domains, with the exchange between layers, is the system in one piece."""

import torch

from multifid.model.contract import Indivisible
from multifid.model.domain import in_domains, share_of, widest_exchange
from multifid.model.suite.samples import (
    TASK,
    EncoderKeys,
    Forces,
    assert_close,
    batch_of,
    expect,
    potential_with,
    skewed,
    system,
)

TIGHTEST = 1e-12  # of float64: the same sums in another order


def halves_of_a_system(encoder: EncoderKeys, forces: Forces) -> None:
    """Two halves of a periodic system give its energies of atoms, its forces and its virial, to rounding.

    An encoder that cannot be cut says so before it answers.
    """
    model = potential_with(encoder, forces)
    batch = batch_of(system(9, skewed(5.0)))
    try:
        widest_exchange(model)
    except Indivisible as error:
        says = "does not pass" not in str(error)
        expect(says, f"{error}: read of senders only what has gone through `graph.exchanged`, or raise Indivisible")
        return
    whole = model(batch, stress=True)[TASK]
    graph, home, number = in_domains(batch, [0, 1, 1, 0, 0, 1, 0, 1, 1])
    share = share_of(model, TASK, graph, home)
    assert whole.energies is not None
    assert_close(share.energies, whole.energies, TIGHTEST, "energies of the atoms of two halves")
    if share.slopes is None:
        assert share.forces is not None
        assert_close(share.forces, whole.forces, TIGHTEST, "forces of two halves")
        return
    i, j = batch.edges[:, number]
    pull = torch.zeros_like(whole.forces).index_add_(0, i, share.slopes).index_add_(0, j, -share.slopes)
    assert_close(pull, whole.forces, TIGHTEST, "forces of two halves")
    assert whole.stress is not None
    strained = (graph.vectors[:, :, None] * share.slopes[:, None, :]).sum(dim=0)
    volume = torch.linalg.det(batch.cell).abs()[:, None, None]
    assert_close(strained[None] / volume, whole.stress, TIGHTEST, "stress of two halves")
    expect(graph.atoms > 2 * len(home), "the halves see no ghosts: the check checks nothing")

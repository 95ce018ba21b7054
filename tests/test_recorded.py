"""Passes that are recorded by size are the eager ones; what a GPU would repeat, these tests do again."""

import copy
import math

import pytest
import torch

from multifid.config import parse_config
from multifid.feed.loader import open_sources
from multifid.parallel.groups import alone
from multifid.parallel.layout import place
from multifid.training.build import build
from multifid.training.recorded import Recordings
from multifid.training.step import Totals
from test_train import config_of, feed_of

STEPS = 8


def made(stores, tmp_path, forces="direct"):
    """A trainer in float64 whose batches are padded, and batches of few sizes, with micro-batches."""
    values = config_of(stores, tmp_path / "run", train={"precision": "fp64", "batch": 3})
    values["model"]["branch"]["forces"] = forces
    config = parse_config(values, "test")
    sources = open_sources(config.tasks)
    trainer = build(config, sources, place(list(config.tasks), "auto", 1), 10, alone())
    trainer.padded = True
    feed = feed_of(config, sources)
    ready = [trainer.ready(batch) for step in range(3) for batch in feed.step(step)[0]]
    return trainer, ready


def trained(trainer, batches):
    """Sums, gradients and weights of steps of two micro-batches each."""
    found = []
    for step in range(STEPS):
        totals = Totals([t.name for t in trainer.tasks], trainer.device)
        micro = [batches[k % 3].moved(torch.clone) for k in (step, step + 1)]
        for batch in micro:
            batch.positions[:3] += 0.01 * step
        trainer.step(micro, totals)
        found += [totals.sums, *(bucket.flat.clone() for bucket in trainer.gradients.buckets)]
    return [*found, *(p.detach() for p in trainer.parameters.values())]


def recorded(trainer, record):
    trainer.recordings = Recordings(record, trainer.gradients, "fp64", reads_edges=False)
    return trainer


@pytest.mark.parametrize("forces", ["direct", pytest.param("conservative", marks=pytest.mark.full)])
def test_recorded_steps_are_the_eager_ones(stores, tmp_path, forces):
    """With positions that move between batches of one size, and weights that move between steps; micro-batches."""
    times = []

    def record(run):
        def replay():
            times.append(1)
            run()

        return replay

    results = []
    for of in (lambda trainer: trainer, lambda trainer: recorded(trainer, record)):
        trainer, batches = made(stores, tmp_path, forces)
        results.append(trained(of(trainer), batches))
    assert len(times) > STEPS and not trainer.recordings.off
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trouble", ["wrong", "refused"])
def test_a_recording_that_is_wrong_is_not_used(stores, tmp_path, trouble):
    """Its step keeps the eager gradient, and all later ones are eager."""

    def record(run):
        if trouble == "refused":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: None

    eager = trained(*made(stores, tmp_path))
    trainer, batches = made(stores, tmp_path)
    said = "off by" if trouble == "wrong" else "not permitted"
    with pytest.warns(UserWarning, match=f"not recorded any more.*{said}"):
        found = trained(recorded(trainer, record), batches)
    assert trainer.recordings.off and not trainer.recordings.held
    assert all(torch.equal(one, other) for one, other in zip(eager, found, strict=True))


def test_a_pass_that_is_not_finite_is_not_recorded(stores, tmp_path):
    trainer, (batch, *_) = made(stores, tmp_path)
    recordings = recorded(trainer, lambda run: run).recordings
    for poisoned, held in ((False, 0), (True, 0), (False, 1), (True, 1)):
        micro = batch.moved(torch.clone)
        micro.positions[:] += math.nan if poisoned else 0.0
        outcome = trainer.step([micro], Totals([t.name for t in trainer.tasks], trainer.device))
        assert outcome.updated != poisoned and len(recordings.held) == held and not recordings.off


def test_a_recording_belongs_to_all_of_a_batch_that_is_no_tensor(stores, tmp_path):
    trainer, (batch, *_) = made(stores, tmp_path)
    recordings = recorded(trainer, lambda run: run).recordings
    moved, other, longer = copy.deepcopy(batch), copy.deepcopy(batch), copy.deepcopy(batch)
    moved.positions[:] = math.nan
    first, *rest = other.slices
    other.slices = {first: other.slices[rest[0]], **{task: other.slices[task] for task in rest}}
    longer.edges = longer.edges[:, :-1]
    assert recordings._key(moved) == recordings._key(batch)
    assert len({recordings._key(b) for b in (batch, other, longer)}) == 3


def test_passes_are_recorded_on_a_gpu_only(stores, tmp_path):
    values = config_of(stores, tmp_path / "run", train={"capture": True})
    config = parse_config(values, "test")
    sources = open_sources(config.tasks)
    with pytest.raises(ValueError, match=r"train\.capture: true is for one process on a GPU, and this run is on cpu"):
        build(config, sources, place(list(config.tasks), "auto", 1), 10, alone())
    for key, value in (("compile", True), ("neighbors", "device")):
        values = config_of(stores, tmp_path / "run", train={"capture": True, key: value})
        with pytest.raises(ValueError, match=r"train\.capture|train\.neighbors"):
            parse_config(values, "test")

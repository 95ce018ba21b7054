"""A step on an accelerator: nothing waits for the device, and what the host hears late changes nothing."""

import gc
import math
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multifid.config import parse_config
from multifid.feed.loader import open_sources
from multifid.model.encoders import DEFAULT, ENCODERS
from multifid.parallel.groups import alone
from multifid.parallel.layout import place
from multifid.training.build import build
from multifid.training.loss import loss_sums
from multifid.training.step import Totals
from test_train import config_of, feed_of

POISONED = 3


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for the device: a number that is read, a shape that depends on numbers."""

    waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0] in self.waits:
            self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def trained(stores, tmp_path, late: bool, forces: str = "direct"):
    """Six steps, one of which is poisoned; `late`: as on an accelerator, where the host does not know the outcome."""
    values = config_of(stores, tmp_path / "run", train={"clip": 0.05, "schedule": "cosine", "warmup": 3})
    values["model"]["branch"]["forces"] = forces
    config = parse_config(values, "test")
    sources = open_sources(config.tasks)
    trainer = build(config, sources, place(list(config.tasks), "auto", 1), 10, alone())
    trainer.at_once = not late
    feed, reads = feed_of(config, sources), []
    for step in range(6):
        micro = [trainer.ready(batch) for batch in feed.step(step)[0]]
        if step == POISONED:
            micro[0].positions[:] = math.nan
        with Reads() as watch:
            trainer.step(micro, Totals(list(config.tasks), trainer.device))
        reads.append(watch.seen)
    return trainer, reads


def test_a_step_reads_nothing_from_the_device_but_the_outcome_of_the_one_before(stores, tmp_path):
    for forces in ("direct", "conservative"):
        _, reads = trained(stores, tmp_path, late=True, forces=forces)
        assert reads[0] == [] and all(seen == ["aten::_local_scalar_dense"] * 3 for seen in reads[1:]), forces


def test_hearing_of_a_skipped_update_one_step_late_changes_no_bit(stores, tmp_path):
    now, _ = trained(stores, tmp_path, late=False)
    later, _ = trained(stores, tmp_path, late=True)
    assert later.updates == 4 and now.updates == 5, "the last outcome is still to be heard"
    later.settle()
    assert later.updates == 5 and later.skipped_in_a_row == now.skipped_in_a_row == 0
    for name, parameter in now.parameters.items():
        assert torch.equal(parameter, later.parameters[name]), name
        assert torch.equal(now.average.average[name], later.average.average[name]), name
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            one, other = now.optimizer.state[parameter][kind], later.optimizer.state[later.parameters[name]][kind]
            assert torch.equal(one, other), (name, kind)


QUICK = ("egnn", "painn", "pairs")


@pytest.mark.parametrize("forces", [pytest.param("direct", marks=pytest.mark.full), "conservative"])
@pytest.mark.parametrize(
    "encoder", [x if x in QUICK else pytest.param(x, marks=pytest.mark.full) for x in [*ENCODERS, "pairs"]]
)
def test_a_step_leaves_nothing_behind(stores, tmp_path, encoder, forces):
    """A graph of autograd that holds itself is never freed: Python's collector does not see through its nodes."""
    values = config_of(stores, tmp_path / "run", train={"clip": None})
    values["model"]["encoder"] = {"name": DEFAULT if encoder == "pairs" else encoder, "layers": 2, "hidden": 16}
    values["model"]["branch"]["forces"] = forces
    if encoder == "pairs":
        values["model"]["branches"] = {"apple": {"forces": "direct", "pairs": 3}}
    config = parse_config(values, "test")
    sources = open_sources(config.tasks)
    trainer = build(config, sources, place(list(config.tasks), "auto", 1), 10, alone())
    feed, alive = feed_of(config, sources), []
    gc.collect()
    gc.freeze()  # what is there already is no matter of these steps
    try:
        for step in range(4):
            trainer.step(list(feed.step(step)[0]), Totals(list(config.tasks), trainer.device))
            gc.collect()
            alive.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert alive[1] == alive[2] == alive[3], alive


FORMULAS = {  # of residuals (n, components), written once more
    "l1": lambda x: np.abs(x).mean(1),
    "mse": lambda x: (x**2).mean(1),
    "huber": lambda x: np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5).mean(1),
    "l2norm": lambda x: np.sqrt((x**2).sum(1)),
}


@pytest.mark.parametrize("branches", ["per_task", "shared"])
@pytest.mark.parametrize("losses", [("l1", "mse", "huber"), ("l2norm", None, "mse"), (None, None, None)])
def test_each_task_has_its_own_loss_of_its_own_scale(stores, tmp_path, branches, losses):
    values = config_of(stores, tmp_path / "run", branches=branches, train={"precision": "fp64"})
    values["objective"] = {"loss": "huber", "energy": 0.7, "forces": 2.0}
    for task, loss in zip(values["tasks"], losses, strict=True):
        values["tasks"][task]["loss"] = loss
    config = parse_config(values, "test")
    sources = open_sources(config.tasks)
    trainer = build(config, sources, place(list(config.tasks), "auto", 1), 10, alone())
    (batch,) = feed_of(config, sources).step(0).batches
    batch, predicted = trainer.predicted(trainer.ready(batch))
    sums = loss_sums(trainer.objective, predicted, batch.labels, trainer.terms)
    for number, (task, loss) in enumerate(zip(values["tasks"], losses, strict=True)):
        scale = next(s.about(task)["scale"] for s in sources if task in s.tasks)
        unit = trainer.tasks[number].unit
        assert (unit == scale) == (branches == "per_task")
        for column, kind in enumerate(("energy", "forces")):
            rows = batch.labels.rows(kind)
            mine = (rows.owner == number).numpy()
            physical = (predicted[kind].detach().numpy() * unit - rows.label.numpy()).reshape(len(mine), -1)[mine]
            if kind == "energy":
                physical = physical / batch.labels.natoms_of(kind).numpy()[mine, None]
            expected = getattr(trainer.objective, kind) * FORMULAS[loss or "huber"](physical / scale).sum()
            assert mine.sum() and sums[number, column].item() == pytest.approx(expected, rel=1e-12), (task, kind)


AGAIN = """
import resource
import numpy as np
from multifid.training.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [np.ones(1 << 20) for _ in range(12)]  # 96 MiB in blocks of 8
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):
    given_back = faults()
told = keep_freed_memory()
faults()
print(told, given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back and can be told not to")
def test_what_a_step_frees_is_not_asked_of_the_kernel_again():
    out = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "True" and int(out[1]) > 1_000 and int(out[2]) < 100, out

"""What `training.py` compares: a potential in our form and in the plain one, each with a trainer that is timed."""

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from plain import PLAIN

from multifid.feed.loader import Source, TaskConfig, collate, open_sources
from multifid.graphs.batch import Batch
from multifid.model.branch import BranchConfig
from multifid.model.potential import ModelConfig, Potential
from multifid.parallel.gradients import Gradients, ModelPart
from multifid.parallel.groups import alone
from multifid.training.loss import ObjectiveConfig
from multifid.training.optimizer import MovingAverage, Schedule, adamw
from multifid.training.step import Task, Totals, Trainer

HEADS = {866: 889}  # the paper's widths; otherwise the heads are as wide as the encoder
CUTOFF = 5.0
LEAST_TURNS = 3

Times = dict[str, float]  # seconds of each part of a step, or of a prediction


class Timed(Trainer):
    """A trainer that knows how long the last forward pass and update took."""

    def _sums(self, batch, totals):
        started = now(self.device)
        sums = super()._sums(batch, totals)
        self.forward = now(self.device) - started
        return sums

    def _update(self, norm):
        started = now(self.device)
        super()._update(norm)
        self.update = now(self.device) - started

    def timed_step(self, batch: Batch) -> Times:
        started = now(self.device)
        self.step([batch], Totals([t.name for t in self.tasks], self.device))
        step = now(self.device) - started
        backward = step - self.forward - self.update  # and the sums around it
        return {"step": step, "forward": self.forward, "backward": backward, "optimizer": self.update}

    def timed_prediction(self, batch: Batch) -> Times:
        """Energies and forces, nothing kept for a gradient."""
        batch = self.ready(batch)
        self.potential.eval()
        started = now(self.device)
        with torch.no_grad():
            self.predicted(batch)
        return {"prediction": now(self.device) - started}


class Clock:
    """The wall's, or the processor's: time that one thread was running, for machines that have other work to do."""

    read: Callable[[], float] = staticmethod(time.perf_counter)
    name = "wall"

    @classmethod
    def use(cls, name: str) -> None:
        cls.name, cls.read = name, staticmethod({"wall": time.perf_counter, "processor": time.process_time}[name])


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Clock.read()


def in_turns(
    forms: dict[str, Callable[[Batch], Times]], batches: list[Batch], seconds: float
) -> dict[str, list[Times]]:
    """Every form on every batch, now in one order, now in the other; ends after `seconds`, not before the third batch.

    A pair of forms is compared batch by batch, so that what else the machine does changes both.
    """
    for timed in forms.values():
        timed(batches[0])
    times: dict[str, list[Times]] = {form: [] for form in forms}
    started = time.perf_counter()
    for turn, batch in enumerate(batches):
        if turn >= LEAST_TURNS and time.perf_counter() - started > seconds:
            break
        for form in list(forms)[:: 1 if turn % 2 == 0 else -1]:
            times[form].append(forms[form](batch))
    return times


def ratio(slow: list[Times], fast: list[Times], part: str) -> float:
    return statistics.median(a[part] / b[part] for a, b in zip(slow, fast, strict=True))


def potential_of(width: int, encoder: str = "egnn", forces: str = "direct", layers: int = 4) -> Potential:
    heads = HEADS.get(width, width)
    config = ModelConfig(
        cutoff=CUTOFF,
        encoder={"name": encoder, "layers": layers, "hidden": width},
        branch=BranchConfig(hidden=[heads] * 3, forces=forces),
    )
    return Potential(config, ["task"], {"task": "task"}, seed=0).train()


def trainer_of(potential: Potential, precision: str, device: torch.device) -> Timed:
    """One task, one process, the defaults of a run; the potential is copied."""
    world = alone()
    potential = copy.deepcopy(potential).to(device)
    parameters = dict(potential.named_parameters())
    parts = [("branch-task", potential.branch_parameters("task")), ("encoder", potential.encoder_parameters())]
    return Timed(
        potential=potential,
        parameters=parameters,
        gradients=Gradients([ModelPart(name, [p for _, p in of], world.group) for name, of in parts]),
        optimizer=adamw(parameters, 1e-3, 0.01),
        schedule=Schedule("constant", 100, 1000),
        average=MovingAverage(parameters, 0.999),
        objective=ObjectiveConfig(),
        tasks=[Task("task", 1.0, 1.0, 1.0)],
        world=world.group,
        device=device,
        precision=precision,
        clip=10.0,
        lr=1e-3,
    )


def with_plain_encoder(potential: Potential) -> Potential:
    plain = copy.deepcopy(potential)
    plain.encoder = PLAIN[plain.config.encoder.name](plain.encoder)
    return plain


def source_of(store: str) -> Source:
    """A store as one task, with the first of its label sets."""
    labels = next(iter(json.loads((Path(store) / "manifest.json").read_text())["tasks"]))
    return open_sources({"task": TaskConfig(store=store, labels=labels)})[0]


def batches_of(source: Source, structures: int, count: int) -> list[Batch]:
    """Batches of structures drawn at random from the training split."""
    index, rng = np.asarray(source.store.index("train")).astype(np.int64), np.random.default_rng(0)
    drawn = [rng.choice(index, structures, replace=len(index) < structures) for _ in range(count)]
    return [collate([(source, chosen)], CUTOFF) for chosen in drawn]

"""Forecasts of weak and strong scaling on described machines, far beyond the ranks at hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multifid.forecast.estimate import Forecast, forecast
from multifid.forecast.machines import Machine
from multifid.forecast.subject import Subject
from multifid.parallel.layout import Load, place

DOUBLINGS = 4  # below the largest number of ranks of a machine
CURVES = (  # placement, whether steps are cut by costs
    ("replicated", True),
    ("split", True),
    ("auto", True),
    ("replicated", False),
    ("split", False),
)


@dataclass(frozen=True)
class Predicted:
    """A forecast step."""

    machine: str
    mode: str
    placement: str
    balanced: bool
    ranks: int
    batch: float  # structures of a step
    forecast: Forecast

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "mode": self.mode,
            "placement": self.placement,
            "balanced": self.balanced,
            "ranks": self.ranks,
            "batch": self.batch,
            "step_seconds": self.forecast.seconds,
            "phases": self.forecast.phases,
            "bytes_per_rank": self.forecast.bytes_per_rank,
            "bytes_per_step": self.forecast.bytes_per_step,
        }


def rank_numbers(machine: Machine) -> list[int]:
    """Doubling up to the machine's largest number of ranks."""
    return [machine.ranks >> k for k in range(DOUBLINGS, -1, -1)]


def curves(subject: Subject, machine: Machine, local_batch: float) -> list[Predicted]:
    """Weak scaling with `local_batch` structures a rank; strong with those of the fewest ranks."""
    numbers = rank_numbers(machine)
    out = []
    for mode, batch_of in batches(local_batch, numbers[0]).items():
        for ranks in numbers:
            at = scaled(subject, batch_of(ranks))
            for placement, balanced in CURVES:
                where = placed(at, placement, ranks, machine, balanced)
                found = forecast(at, where, machine, balanced=balanced)
                out.append(Predicted(machine.name, mode, placement, balanced, ranks, batch_of(ranks), found))
    return out


def batches(local_batch: float, fewest: int) -> dict[str, Callable[[int], float]]:
    return {"weak": lambda ranks: local_batch * ranks, "strong": lambda ranks: local_batch * fewest}


def scaled(subject: Subject, batch: float) -> Subject:
    """The same mixture of tasks, with `batch` structures of all tasks in a step."""
    return subject.times(batch / sum(load.structures for load in subject.tasks.values()))


def placed(subject: Subject, placement: str, ranks: int, machine: Machine, balanced: bool) -> dict[str, list[int]]:
    """Where the branches live: sized by costs of this machine, or, not balanced, as if all tasks were alike."""
    loads = machine_loads(subject, machine) if balanced else None
    return place(list(subject.tasks), placement, ranks, together=subject.together, loads=loads)  # type: ignore[arg-type]


def machine_loads(subject: Subject, machine: Machine) -> dict[str, Load]:
    """The loads of all tasks in seconds of a machine: passes; updating and sending a branch."""
    per_edge, per_atom = subject.seconds(machine)
    branch = subject.branch.count * subject.width
    holding = branch * (12 / (machine.update or machine.traffic) + 2 * (1 - machine.overlap) / machine.inside.bandwidth)
    out = {}
    for unit in subject.together:
        for task in unit:
            load = subject.tasks[task]
            cost = load.structures * (load.edges * per_edge + load.atoms * per_atom) / len(unit)
            out[task] = Load(cost=cost, holding=holding)
    return out


def shortest(found: Sequence[Predicted]) -> Mapping[tuple[str, str, int], str]:
    """The faster of replicated and split, both balanced, by (machine, mode, ranks)."""
    times: dict[tuple[str, str, int], dict[str, float]] = {}
    for p in found:
        if p.balanced and p.placement in ("replicated", "split"):
            times.setdefault((p.machine, p.mode, p.ranks), {})[p.placement] = p.forecast.seconds
    return {key: min(of, key=lambda name: of[name]) for key, of in times.items()}

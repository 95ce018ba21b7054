"""What a search has found: values of trials, the chosen one as a config to train, a list of all."""

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multifid.config import Config, dump_config, load_config
from multifid.training.record import Row
from multifid.workflows.tune.settings import TuneConfig
from multifid.workflows.tune.trial import write_json

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from multifid.workflows.tune.job import Job
    from multifid.workflows.tune.space import Space

INFEASIBLE = "infeasible"  # user attribute of a trial that was not started: why
OF_ERRORS = ("energy_mae", "forces_mae")


@dataclass(frozen=True)
class Found:
    """What a search has found so far.

    Attributes:
        folder: of the search: best.yaml, trials.json, report.html, trials/.
        best: the chosen config, ready for `multifid train`; None where no trial has ended with a value yet.
        number: of its trial.
        values: of its trial, in the order of `tune.objectives`.
        keys: of the config, as the trial set them.
        front: numbers of the trials that no other is better than in all objectives; with one objective the best.
        trials: of the study, one dict each, as in trials.json.
        complete: False where the search was stopped by a signal; the same command goes on.
    """

    folder: Path
    best: Path | None
    number: int | None
    values: tuple[float, ...]
    keys: dict[str, Any]
    front: tuple[int, ...]
    trials: list[dict[str, Any]]
    complete: bool


def values_of(tune: TuneConfig, rows: Sequence[Row], job: "Job") -> list[float | None]:
    """The objectives at a validation, whose rows these are. None where there is no finite value."""
    return [_value(objective, rows, job) for objective in tune.objectives]


def _value(objective: str, rows: Sequence[Row], job: "Job") -> float | None:
    if objective == "validation":
        return rows[0]["objective"]
    if objective in OF_ERRORS:
        found = [row[objective] for row in rows if row[objective] is not None]
        return statistics.fmean(found) if found else None
    if objective == "structures_per_second":
        speeds = {r["step"]: r["structures_per_second"] for r in job.tail.rows if r["structures_per_second"]}
        return statistics.median(speeds.values()) if speeds else None
    return float(job.trial.user_attrs["bytes_per_rank"])


def chosen(study: "Study") -> "FrozenTrial | None":
    """The feasible, complete trial that is best by the first objective. Chosen by validation, never by test."""
    with contextlib.suppress(ValueError):
        front = study.best_trials
        if front:
            first = study.directions[0].name == "MAXIMIZE"
            return min(front, key=lambda t: -t.values[0] if first else t.values[0])
    return None


def write_results(study: "Study", space: "Space", config: Config) -> None:
    """best.yaml and trials.json, whole or not there."""
    folder = Path(config.run)
    write_json(folder / "trials.json", listed(study, space, config))
    best, path = chosen(study), folder / "best.yaml"
    if best is not None:
        head = about_best(best, config)
        if path.exists() and path.read_text(encoding="utf-8").startswith(head):
            return
        part = folder / ".best.yaml.part"
        part.write_text(head + dump_config(trained_alone(best, folder, config)), encoding="utf-8")
        part.replace(path)


def about_best(trial: "FrozenTrial", config: Config) -> str:
    """The first line of best.yaml."""
    assert config.tune is not None
    values = ", ".join(f"{o} {v:.6g}" for o, v in zip(config.tune.objectives, trial.values, strict=True))
    return f"# Trial {trial.number} of the search in {config.run}: {values}\n"


def trained_alone(trial: "FrozenTrial", folder: Path, config: Config) -> Config:
    """The config of a trial, to be trained by itself: as many steps as the trial made, in a directory of its own."""
    from multifid.workflows.tune.job import Files
    from multifid.workflows.tune.storage import run_of

    assert config.tune is not None
    held = load_config(Files(folder / "trials", run_of(trial)).beside("yaml"))
    train = held.train
    if config.tune.budget.kind is not None:
        train = train.model_copy(update={"steps": trial.user_attrs["steps"], "minutes": None})
    return held.model_copy(update={"run": str(folder / "best"), "train": train})


def listed(study: "Study", space: "Space", config: Config) -> list[dict[str, Any]]:
    """Every trial: what it set, how it ended, what it cost."""
    from multifid.workflows.tune.storage import run_of

    assert config.tune is not None
    found = []
    for trial in study.get_trials(deepcopy=False):
        values = dict(zip(config.tune.objectives, trial.values or (), strict=False))
        found.append(
            {
                "number": trial.number,
                "state": state_of(trial),
                "values": values,
                "keys": space.values(trial.params),
                "run": f"trials/{run_of(trial):04d}",
                "steps": trial.user_attrs.get("steps"),
                "processor_seconds": trial.user_attrs.get("processor_seconds"),
                "bytes_per_rank": trial.user_attrs.get("bytes_per_rank"),
                "reason": trial.user_attrs.get("lost") or trial.user_attrs.get("reason"),
                "continues": trial.user_attrs.get("continues"),
            }
        )
    return found


def state_of(trial: "FrozenTrial") -> str:
    """complete, pruned, infeasible, failed, unfinished (another trial continues it), running or waiting."""
    from multifid.workflows.tune.storage import LOST

    if INFEASIBLE in trial.user_attrs:
        return "infeasible"
    if LOST in trial.user_attrs:
        return "unfinished"
    return {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())


def in_words(trial: "FrozenTrial", tune: TuneConfig) -> str:
    """One line for the console."""
    keys = ", ".join(f"{name.removeprefix('train.')} {_short(v)}" for name, v in trial.params.items())
    values = ", ".join(f"{o} {v:.5g}" for o, v in zip(tune.objectives, trial.values or (), strict=False))
    spent = trial.user_attrs.get("processor_seconds", 0.0)
    return f"trial {trial.number} {state_of(trial)}: {values} ({spent:.0f} s of the processor): {keys}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def found_of(study: "Study", config: Config, complete: bool) -> Found:
    """What the study and its directory hold now."""
    from multifid.workflows.tune.space import Space

    folder, space = Path(config.run), Space(config)
    best, trials = chosen(study), listed(study, space, config)
    front: Mapping[int, Any] = {t.number: t for t in study.best_trials} if best else {}
    return Found(
        folder=folder,
        best=folder / "best.yaml" if best else None,
        number=best.number if best else None,
        values=tuple(best.values) if best else (),
        keys=space.values(best.params) if best else {},
        front=tuple(sorted(front)),
        trials=trials,
        complete=complete,
    )

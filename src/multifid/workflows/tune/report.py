"""The page about a search, for a browser, without a network: which keys matter, what was tried, what was found."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from multifid.config import Config, load_config
from multifid.training.log import duration
from multifid.workflows.report.page import Charted, filled, need_plotly, version
from multifid.workflows.tune.settings import TuneConfig

if TYPE_CHECKING:
    from optuna.study import Study

SHOWN = {
    "validation": "validation value",
    "energy_mae": "energy MAE, meV/atom",
    "forces_mae": "forces MAE, meV/Å",
    "structures_per_second": "structures/s",
    "bytes_per_rank": "MiB of a rank",
}
FACTOR = {"energy_mae": 1e3, "forces_mae": 1e3, "bytes_per_rank": 1 / 2**20}
STATES = ("complete", "pruned", "infeasible", "failed", "unfinished", "running", "waiting")


def is_search(folder: Path) -> bool:
    """Whether a directory is that of a search."""
    return (folder / "trials.json").is_file() and (folder / "config.yaml").is_file()


def report(folder: Path, out: Path, console: Console | None = None) -> Path:
    """Write the page about a search's directory; returns `out`.

    ValueError where the directory holds no search, its study cannot be opened, or plotly or optuna is missing.
    """
    need_plotly("multifid report")
    if not is_search(folder):
        raise ValueError(f"{folder} holds no search: it has no trials.json; `multifid tune` writes it")
    config = load_config(folder / "config.yaml")
    tune = config.tune
    if tune is None:
        raise ValueError(f"{folder / 'config.yaml'} has no section `tune`")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(_page(folder, config, tune), encoding="utf-8")
    part.replace(out)
    (console or Console(stderr=True)).print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    return out


def _page(folder: Path, config: Config, tune: TuneConfig) -> str:
    from multifid.workflows.tune import charts
    from multifid.workflows.tune.storage import load_study

    study = load_study(config, folder)
    trials = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    charted = Charted()
    several = len(tune.objectives) > 1
    complete = sum(t["state"] == "complete" for t in trials)
    figures: list[tuple[str, str | None, bool]] = []  # title, figure, whether it takes the whole width
    if several:
        figures.append(("Pareto front: no other trial is better in all objectives", charts.front(study, tune), True))
    for k, objective in enumerate(tune.objectives):
        name = SHOWN[objective]
        figures.append((f"History of the {name}", charts.history(study, k, objective), False))
        title = f"Importance of keys for the {name} (PED-ANOVA of {complete} trials)"
        figures.append((title, charts.importance(study, k), False))
    if not several:
        figures.append(("Validation values on the way; pruned trials end early", charts.curves(study), False))
    figures += [
        (f"All trials that ended: keys and {SHOWN[o]}", charts.parallel(study, k, o), True)
        for k, o in enumerate(tune.objectives)
    ]
    best = folder / "best.yaml"
    return filled(
        "multifid.workflows.tune",
        {
            "title": str(folder),
            "version": version(),
            "facts": _facts(tune, trials, config.seed),
            "objectives": [SHOWN[o] for o in tune.objectives],
            "charts": [(title, charted.add(figure), wide) for title, figure, wide in figures],
            "trials": _rows(study, tune, trials),
            "best": best.read_text(encoding="utf-8") if best.exists() else None,
            "command": f"multifid train {best}",
            "figures": charted.figures,
        },
    )


def _facts(tune: TuneConfig, trials: list[dict[str, Any]], seed: int) -> list[tuple[str, str]]:
    of_state = {state: sum(t["state"] == state for t in trials) for state in STATES}
    spent = sum(t["processor_seconds"] or 0.0 for t in trials)
    budget = "as the config says" if tune.budget.kind is None else f"{tune.budget.limit:g} {_words(tune.budget.kind)}"
    return [
        ("trials", ", ".join(f"{n} {state}" for state, n in of_state.items() if n)),
        ("processor time of all", duration(spent)),
        ("budget of a trial", budget),
        ("sampler and pruner", f"{tune.sampler}, {tune.pruner}; seed {seed}"),
        ("memory of a rank", "no bound" if tune.memory is None else f"at most {tune.memory:g} GiB, by plan"),
    ]


def _words(kind: str) -> str:
    return {"processor_seconds": "seconds of the processor", "seconds": "seconds"}.get(kind, kind)


def _rows(study: "Study", tune: TuneConfig, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of trials, the best first, those without a value last."""
    front = {t.number for t in study.best_trials}
    falls = study.directions[0].name == "MAXIMIZE"

    def order(trial: dict[str, Any]) -> tuple[bool, float]:
        value = trial["values"].get(tune.objectives[0])
        done = trial["state"] == "complete"
        return (not done, trial["number"] if value is None or not done else -value if falls else value)

    return [
        {
            "number": trial["number"],
            "best": trial["number"] in front,
            "state": trial["state"],
            "values": [shown(o, trial["values"].get(o)) for o in tune.objectives],
            "keys": ", ".join(f"{k} {_short(v)}" for k, v in trial["keys"].items()),
            "spent": "" if trial["processor_seconds"] is None else f"{trial['processor_seconds']:.0f}",
            "reason": "" if trial["state"] == "complete" else trial["reason"] or "",
            "continues": trial["continues"],
        }
        for trial in sorted(trials, key=order)
    ]


def shown(objective: str, value: float | None) -> str:
    """A value in the unit of the page."""
    return "-" if value is None else f"{FACTOR.get(objective, 1.0) * value:.4g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

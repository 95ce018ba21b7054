"""The figures of the page about a search: Optuna's own, and the curves of trials, as plotly figures in JSON."""

import math
import warnings
from typing import TYPE_CHECKING, Any

import optuna
import plotly.graph_objects as go
from optuna.trial import TrialState

from multifid.workflows.report.charts import COLORS, as_json
from multifid.workflows.tune.settings import TuneConfig
from multifid.workflows.tune.strategies import UNITS

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

FEWEST = 10  # complete trials that importances can be told from: PED-ANOVA compares the best tenth with all
LABEL = 18  # characters of a tick in parallel coordinates


def history(study: "Study", k: int, objective: str) -> str | None:
    """Values in the order of trials, and the best so far."""
    done = _complete(study)
    if not done:
        return None
    up = study.directions[k].name == "MAXIMIZE"
    figure = go.Figure()
    best: list[float] = []
    for trial in done:
        value = trial.values[k]
        best.append(value if not best else max(best[-1], value) if up else min(best[-1], value))
    numbers = [t.number for t in done]
    figure.add_scatter(
        x=numbers,
        y=[t.values[k] for t in done],
        mode="markers",
        name="trial",
        marker={"color": COLORS[0], "size": 7},
        hovertemplate="trial %{x}: %{y:.5g}<extra></extra>",
    )
    figure.add_scatter(
        x=numbers, y=best, mode="lines", name="best so far", line={"color": COLORS[1], "shape": "hv"}, hoverinfo="skip"
    )
    figure.update_xaxes(title="trial")
    figure.update_yaxes(title=_axis(objective))
    return as_json(figure, 340)


def importance(study: "Study", k: int) -> str | None:
    """How much each key decides over being among the best trials; None where too few trials ended."""
    if len(_complete(study)) < FEWEST:
        return None
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    several = len(study.directions) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=(lambda t: t.values[k]) if several else None
            )
        except (ValueError, RuntimeError):  # all values equal, or no key that all trials have
            return None
    if not found or not sum(found.values()) > 0:
        return None
    names = list(found)[::-1]
    figure = go.Figure(
        go.Bar(
            x=[found[n] for n in names],
            y=names,
            orientation="h",
            marker={"color": COLORS[0]},
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="share of importance")
    return as_json(figure, max(220, 90 + 28 * len(names)))


def parallel(study: "Study", k: int, objective: str) -> str | None:
    """Keys of all complete trials beside each other, coloured by value. Keys of one encoder only are left out."""
    done = _complete(study)
    names = [name for name in (done[0].params if done else {}) if all(name in t.params for t in done)]
    if len(done) < 2 or not names:
        return None
    axes: list[dict[str, Any]] = [{"label": "value", "values": [t.values[k] for t in done]}]
    for name in names:
        axes.append(_axis_of([t.params[name] for t in done], name, done[0].distributions[name]))
    up = study.directions[k].name == "MAXIMIZE"
    figure = go.Figure(
        go.Parcoords(
            dimensions=axes,
            labelangle=-20,
            line={
                "color": [t.values[k] for t in done],
                "colorscale": "Viridis",
                "reversescale": not up,
                "showscale": True,
                "colorbar": {"title": {"text": _axis(objective)}, "thickness": 10},
            },
        )
    )
    return as_json(figure, 420, {"l": 60, "r": 40, "t": 90, "b": 30})


def _axis_of(values: list[Any], name: str, distribution: Any) -> dict[str, Any]:
    """An axis of parallel coordinates: names at whole numbers, logarithms with their numbers as ticks."""
    short = name.rpartition(".")[2] if not name.endswith(".name") else name.split(".")[-2]
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        choices = list(distribution.choices)
        names = [str(c)[:LABEL] for c in choices]
        places = list(range(len(choices)))
        whole = [0, max(len(choices) - 1, 1)]  # also where no trial has the last one
        found = [choices.index(v) for v in values]
        return {"label": short, "values": found, "range": whole, "tickvals": places, "ticktext": names}
    numbers = [float(v) for v in values]
    if not distribution.log:
        ticks = sorted(set(numbers)) if isinstance(distribution, optuna.distributions.IntDistribution) else None
        return {"label": short, "values": numbers} | ({} if ticks is None else {"tickvals": ticks})
    lo, hi = math.log10(min(numbers)), math.log10(max(numbers))
    marks = [lo + (hi - lo) * n / 4 for n in range(5)]
    texts = [f"{10**m:.3g}" for m in marks]
    return {"label": short, "values": [math.log10(n) for n in numbers], "tickvals": marks, "ticktext": texts}


def front(study: "Study", tune: TuneConfig) -> str | None:
    """The first two objectives of all complete trials; those of the front joined."""
    done, best = _complete(study), {t.number for t in study.best_trials}
    if not done:
        return None
    figure = go.Figure()
    for among, name, color in ((False, "others", COLORS[7]), (True, "front", COLORS[1])):
        some = sorted((t for t in done if (t.number in best) == among), key=lambda t: t.values[0])
        figure.add_scatter(
            x=[t.values[0] for t in some],
            y=[t.values[1] for t in some],
            text=[f"trial {t.number}" for t in some],
            mode="markers+lines" if among and len(tune.objectives) == 2 else "markers",
            name=name,
            marker={"color": color, "size": 8},
            line={"shape": "hv", "width": 1},
            hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
        )
    figure.update_xaxes(title=_axis(tune.objectives[0]))
    figure.update_yaxes(title=_axis(tune.objectives[1]))
    return as_json(figure, 420)


def curves(study: "Study") -> str | None:
    """What each trial reported on its way."""
    figure = go.Figure()
    best = {t.number for t in study.best_trials}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        if not trial.intermediate_values:
            continue
        color = COLORS[1] if trial.number in best else COLORS[0] if trial.state == TrialState.COMPLETE else COLORS[7]
        steps = sorted(trial.intermediate_values)
        figure.add_scatter(
            x=[100 * s / UNITS for s in steps],
            y=[trial.intermediate_values[s] for s in steps],
            mode="lines",
            name=f"trial {trial.number}",
            line={"color": color, "width": 3 if trial.number in best else 1.2},
            opacity=1.0 if trial.number in best else 0.6,
            hovertemplate=f"trial {trial.number}: %{{y:.4g}}<extra></extra>",
            showlegend=False,
        )
    if not figure.data:
        return None
    figure.update_xaxes(title="part of the budget, %")
    figure.update_yaxes(title="value", type="log")
    return as_json(figure, 360)


def _complete(study: "Study") -> "list[FrozenTrial]":
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _axis(objective: str) -> str:
    units = {"energy_mae": "energy MAE, eV/atom", "forces_mae": "forces MAE, eV/Å", "bytes_per_rank": "bytes of a rank"}
    return units.get(objective, objective.replace("_", " "))

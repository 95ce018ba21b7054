"""The next trial: asked for, planned, recorded as infeasible where it cannot be, or started."""

import time
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from multifid.config import Config
from multifid.forecast.plan import make_plan
from multifid.parallel.layout import GIB
from multifid.workflows.tune import job
from multifid.workflows.tune.job import Files, Job, claim
from multifid.workflows.tune.outcome import INFEASIBLE
from multifid.workflows.tune.space import Values
from multifid.workflows.tune.storage import counted, recover, run_of
from multifid.workflows.tune.strategies import EXHAUSTED, OVER
from multifid.workflows.tune.trial import locked
from multifid.workflows.tune.under_way import Search


def begin(search: Search, taken: set[int]) -> Job | None:
    """The next trial that can be started; None where no more are to begin. Those that cannot be are told."""
    trials = search.folder / "trials"
    while not search.stop:
        with locked(search.folder / "lock"):
            for line in recover(search.study, trials, search.tune):
                search.say(line)
            if why_enough(search) is not None:
                return None
            trial = search.study.ask()
            files = Files(trials, run_of(trial))
            claim(files)
        values = search.space.suggest(trial._suggest)
        try:
            config = config_of(search, values, files.run)
            if not fits(search, trial, config):
                continue
        except ValueError as error:  # of values that cannot be together
            infeasible(search, trial, str(error))
            continue
        slot = next(k for k in range(search.tune.at_once) if k not in taken)
        return job.start(trial, files, config, search.tune, slot)
    return None


def why_enough(search: Search) -> str | None:
    """Why no more trials begin; None while some do."""
    t, spent = search.tune, time.monotonic() - search.began
    trials = search.study.get_trials(deepcopy=False)
    begun = [trial for trial in trials if counted(trial) and trial.state.name != "WAITING"]
    if t.minutes is not None and spent >= 60 * t.minutes:
        return f"{t.minutes:g} minutes are over"
    used = sum(trial.user_attrs.get("processor_seconds", 0.0) for trial in trials)
    if t.processor_minutes is not None and used >= 60 * t.processor_minutes:
        return f"{t.processor_minutes:g} minutes of the processor are spent"
    if t.trials is not None and len(begun) >= t.trials:
        return f"there are {len(begun)} trials"
    return "the whole space has been tried" if search.study.user_attrs.get(EXHAUSTED) else None


def config_of(search: Search, values: Values, run: Path) -> Config:
    """The config of a trial, as long as its budget says."""
    budget = search.tune.budget
    sections: dict[str, Any] = {"run": str(run)}
    if budget.kind == "steps":
        sections["train"] = {"steps": budget.steps, "minutes": None}
    elif budget.kind is not None:
        sections["train"] = {"steps": None, "minutes": budget.limit / 60}
    return search.space.config(values, **sections)


def fits(search: Search, trial: Any, config: Config) -> bool:
    """Whether a rank has room for a trial, which is told as infeasible where not."""
    t = search.tune
    if t.memory is None and "bytes_per_rank" not in t.objectives:
        return True
    made = make_plan(config, t.ranks, search.machine)
    needs = made.forecasts.get(made.asked, made.forecasts[made.chosen]).bytes
    trial.set_user_attr("bytes_per_rank", needs)
    if t.memory is None:
        return True
    over = needs / (t.memory * GIB) - 1
    trial.set_constraint(OVER, over)  # of all trials: samplers that know constraints learn where they end
    if over > 0:
        infeasible(search, trial, f"a rank would hold {needs / GIB:.3g} GiB, and tune.memory is {t.memory:g} GiB")
    return over <= 0


def infeasible(search: Search, trial: Any, reason: str) -> None:
    """Record a trial that is not started."""
    trial.set_user_attr(INFEASIBLE, reason)
    trial.set_user_attr("reason", reason)
    pruned = trial.constraints.get(OVER, -1.0) > 0  # by a constraint; what failed teaches a sampler nothing
    search.study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
    search.say(f"trial {trial.number} is infeasible: {reason}")

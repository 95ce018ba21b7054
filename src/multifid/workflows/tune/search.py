"""`multifid tune CONFIG`: a search over keys of the config, by Optuna, each trial a run of its own.

    check the config -> open the study -> take up what another search left unfinished
    -> ask for a trial, plan its memory, start its ranks, hear its validations, prune or let it end, tell the study
    -> best.yaml, trials.json, report.html

Any number of jobs may run the same command at once: they share the study through its storage and its directory.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from multifid.config import Config, as_config, dump_config
from multifid.feed.loader import open_sources
from multifid.forecast.machines import Machine
from multifid.forecast.plan import make_plan
from multifid.forecast.this_machine import this_machine
from multifid.parallel.launch import launch
from multifid.parallel.layout import GIB
from multifid.workflows.tune.clocks import clock_of
from multifid.workflows.tune.outcome import INFEASIBLE, Found, found_of, in_words, values_of, write_results
from multifid.workflows.tune.settings import TuneConfig
from multifid.workflows.tune.space import Space, Values
from multifid.workflows.tune.trial import locked

if TYPE_CHECKING:
    from optuna.study import Study

    from multifid.workflows.tune.job import Job

ALL_UNITS = ("median", "percentile")  # pruners that compare trials at the same unit of resource only
LOOK = 0.25  # seconds between two looks at the trials


@dataclass
class Search:
    """A search under way in this process, one of any number that share its study."""

    config: Config
    space: Space
    study: "Study"
    console: Console
    began: float = field(default_factory=time.monotonic)
    stop: list[str] = field(default_factory=list)

    @property
    def tune(self) -> TuneConfig:
        assert self.config.tune is not None, "tune() has seen to it"
        return self.config.tune

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    @cached_property
    def machine(self) -> Machine:
        """This one: what it holds and whether it computes behind a queue decides over activations."""
        return this_machine(self.config.train.device, self.tune.ranks)

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)


def tune(
    config: Config | Path | str | Mapping[str, Any],
    *,
    console: Console | None = None,
    quiet: bool = False,
    signals: bool = False,
) -> Found:
    """Search what the `tune` section of a config says, or go on searching.

    Args:
        config: as `multifid.train` takes it, with a section `tune`; its `run` is the directory of the search.
        console: where a line for each trial goes; default: standard error.
        quiet: print nothing.
        signals: let SIGTERM and Ctrl-C stop the search, its trials with everything saved (main thread only). Without,
            Ctrl-C is KeyboardInterrupt after the same.

    Returns:
        What the study has found so far, trials of other jobs included.

    Raises:
        ValueError: no trial could be made of the config, before any data are read; the storage holds another search;
            optuna is missing.
    """
    console = console or Console(stderr=True, quiet=quiet)
    search = open_search(as_config(config), console)
    with _stop_on_signals(search.stop) if signals else contextlib.nullcontext():
        run_trials(search)
    return finish(search)


def open_search(config: Config, console: Console) -> Search:
    """Everything that can be refused is refused here, and only then something is written."""
    section = config.tune
    if section is None:
        raise ValueError("the config has no section `tune`: tune.space says which keys to search (docs/tuning.md)")
    if launch().size > 1:
        raise ValueError(
            f"{launch().size} ranks were launched, but multifid tune launches the ranks of its trials itself "
            "(tune.ranks, tune.at_once): start it as one process; further jobs may share its study"
        )
    try:
        from multifid.workflows.tune.storage import open_study
    except ImportError as error:
        raise ValueError(
            f"`multifid tune` searches with optuna, which is not installed ({error}): pip install 'multifid[tune]'"
        ) from None
    space = Space(config)
    clock_of(section.budget.kind)
    folder = Path(config.run)
    if folder.is_dir() and (folder / "model.json").exists():
        raise ValueError(f"{folder} holds a run: choose another directory for the search (run=...)")
    open_sources(config.tasks, verify="off")
    study = open_study(config, space)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        part = folder / ".config.yaml.part"
        part.write_text(dump_config(config), encoding="utf-8")
        part.replace(folder / "config.yaml")
    return Search(config, space, study, console)


def run_trials(search: Search) -> None:
    """Trials side by side until the study, the time or a signal ends the search."""
    jobs: list[Job] = []
    try:
        while True:
            while len(jobs) < search.tune.at_once and (job := begin(search, {j.slot for j in jobs})) is not None:
                jobs.append(job)
            if not jobs:
                return
            for job in list(jobs):
                if look(search, job):
                    jobs.remove(job)
            time.sleep(LOOK)
    except BaseException:
        search.stop.append("an error")
        raise
    finally:
        for job in jobs:
            job.close()
        for job in jobs:
            if not job.over():
                job.process.wait()
            give_up(search, job)


def begin(search: Search, taken: set[int]) -> "Job | None":
    """The next trial that can be started; None where no more are to begin. Those that cannot be are told."""
    from multifid.workflows.tune.job import Files, claim, start
    from multifid.workflows.tune.storage import recover, run_of

    trials = search.folder / "trials"
    while not search.stop:
        with locked(search.folder / "lock"):
            for line in recover(search.study, trials):
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
        return start(trial, files, config, search.tune, slot)
    return None


def why_enough(search: Search) -> str | None:
    """Why no more trials begin; None while some do."""
    from multifid.workflows.tune.storage import counted
    from multifid.workflows.tune.strategies import EXHAUSTED

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
    from multifid.workflows.tune.strategies import OVER

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
    from optuna.trial import TrialState

    from multifid.workflows.tune.strategies import OVER

    trial.set_user_attr(INFEASIBLE, reason)
    trial.set_user_attr("reason", reason)
    pruned = trial.constraints.get(OVER, -1.0) > 0  # by a constraint; what failed teaches a sampler nothing
    search.study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
    search.say(f"trial {trial.number} is infeasible: {reason}")


def look(search: Search, job: "Job") -> bool:
    """Hear what a trial says; whether it is over, and told."""
    from multifid.workflows.tune.job import progress

    job.sign()
    over = job.over()  # before its journal is read, or the last rows could be missed
    if search.stop and not over:
        job.close()
    single = len(search.tune.objectives) == 1
    for rows in job.validations() if single else []:
        units, (value,) = progress(rows[0], job.config, search.tune), values_of(search.tune, rows, job)
        first = max(job.told, default=0) + 1
        for unit in range(first if search.tune.pruner in ALL_UNITS else max(first, units), units + 1):
            job.told[unit] = math.nan if value is None else value
            job.trial.report(job.told[unit], unit)
        if not over and not job.pruned and job.told and job.trial.should_prune():
            job.pruned = True
            job.close()
    if over:
        conclude(search, job)
    return over


def conclude(search: Search, job: "Job") -> None:
    """Tell the study how a trial ended."""
    from optuna.trial import TrialState

    trial = job.trial
    try:
        ending = job.ending()
    except ValueError as error:
        if search.stop:
            give_up(search, job)
            return
        fail(search, job, str(error))
        return
    if not ending["complete"] and not job.pruned:
        give_up(search, job)
        return
    note(job, ending)
    if not ending["complete"]:
        search.study.tell(trial, state=TrialState.PRUNED)
    else:
        rows = [r for r in job.tail.rows if r["split"] == "validation" and r["step"] == ending["best_step"]]
        values = values_of(search.tune, rows, job) if rows else [None]
        if None in values:
            fail(search, job, "it has no finite validation value")
            return
        search.study.tell(trial, [float(v) for v in values if v is not None])
    search.say(in_words(search.study.trials[trial.number], search.tune))
    write_results(search.study, search.space, search.config)


def note(job: "Job", ending: dict[str, Any]) -> None:
    """What a report wants to know of a trial beside its values."""
    before = job.trial.user_attrs.get("processor_seconds", 0.0)
    job.trial.set_user_attr("processor_seconds", before + job.used)
    job.trial.set_user_attr("steps", ending["steps"])
    job.trial.set_user_attr("reason", ending["reason"])


def fail(search: Search, job: "Job", reason: str) -> None:
    """A crash is one trial's: it is recorded with its reason, and the search goes on."""
    from optuna.trial import TrialState

    job.trial.set_user_attr("processor_seconds", job.used)
    job.trial.set_user_attr("reason", reason)
    search.study.tell(job.trial, state=TrialState.FAIL)
    search.say(f"trial {job.trial.number} failed: {reason}")
    write_results(search.study, search.space, search.config)


def give_up(search: Search, job: "Job") -> None:
    """A trial that was stopped with its search: the next search goes on with it."""
    from optuna.trial import TrialState

    from multifid.workflows.tune.storage import LOST

    if search.study.trials[job.trial.number].state.is_finished():
        return
    job.trial.set_user_attr("processor_seconds", job.used)
    job.trial.set_user_attr(LOST, "its search was stopped")
    search.study.tell(job.trial, state=TrialState.FAIL)


def finish(search: Search) -> Found:
    """Results of the study so far, and the page about them where plotly is there."""
    write_results(search.study, search.space, search.config)
    found = found_of(search.study, search.config, complete=not search.stop)
    if found.best is None:
        search.say(f"{search.folder}: no trial has ended with a value yet")
    else:
        search.say(f"best: {found.best} (trial {found.number}), to be trained with `multifid train`")
    if found.best is not None and (lacking := report_if_possible(found)):
        search.say(f"no report: {lacking}")
    why = search.stop[0] if search.stop else why_enough(search)
    search.say(f"{search.folder}: the search ends: {why}")
    return found


def report_if_possible(found: Found) -> str | None:
    """The page about the search, in its directory; why there is none."""
    from multifid.workflows.tune.report import report

    try:
        report(found.folder, found.folder / "report.html", Console(quiet=True))
    except ValueError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _stop_on_signals(stop: list[str]) -> Iterator[None]:
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, lambda number, frame: stop.append("stopped by a signal")) for s in signals}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

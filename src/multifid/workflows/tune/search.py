"""`multifid tune CONFIG`: a search over keys of the config, by Optuna, each trial a run of its own.

    check the config -> open the study -> take up what another search left unfinished
    -> ask for a trial, plan its memory, start its ranks, hear its validations, prune or let it end, tell the study
    -> best.yaml, trials.json, report.html

Any number of jobs may run the same command at once: they share the study through its storage and its directory.
"""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from multifid.config import Config, as_config, dump_config
from multifid.feed.loader import open_sources
from multifid.parallel.launch import launch
from multifid.training.signals import stop_on_signals
from multifid.workflows.tune.clocks import clock_of
from multifid.workflows.tune.outcome import Found, found_of, write_results
from multifid.workflows.tune.space import Space
from multifid.workflows.tune.trial import locked
from multifid.workflows.tune.under_way import Search

if TYPE_CHECKING:
    from multifid.workflows.tune.job import Job

LOOK = 0.25  # seconds between two looks at the trials


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
    with stop_on_signals(search.stop, "stopped by a signal") if signals else contextlib.nullcontext():
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
        if section.own and not study.get_trials(deepcopy=False) and (own := space.own(config)) is not None:
            study.enqueue_trial(own)
    return Search(config, space, study, console)


def run_trials(search: Search) -> None:
    """Trials side by side until the study, the time or a signal ends the search."""
    from multifid.workflows.tune.begin import begin
    from multifid.workflows.tune.conclude import give_up, look

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


def finish(search: Search) -> Found:
    """Results of the study so far, and the page about them where plotly is there."""
    from multifid.workflows.tune.begin import why_enough

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

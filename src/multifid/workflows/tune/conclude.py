"""A trial under way is heard, and pruned or told to the study with what it ended with."""

import math
from typing import Any

from optuna.trial import TrialState

from multifid.workflows.tune.job import Job, progress
from multifid.workflows.tune.outcome import in_words, values_of, write_results
from multifid.workflows.tune.storage import LOST
from multifid.workflows.tune.under_way import Search

ALL_UNITS = ("median", "percentile")  # pruners that compare trials at the same unit of resource only


def look(search: Search, job: Job) -> bool:
    """Hear what a trial says; whether it is over, and told."""
    job.sign()
    over = job.over()  # before its journal is read, or the last rows could be missed
    if search.stop and not over:
        job.close()
    single = len(search.tune.objectives) == 1
    validations = job.validations()  # in any case: this reads the journal, which tells the values at the end too
    for rows in validations if single else []:
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


def conclude(search: Search, job: Job) -> None:
    """Tell the study how a trial ended."""
    trial = job.trial
    try:
        ending = job.ending()
    except ValueError as error:
        if search.stop:
            give_up(search, job)
            return
        if not job.pruned:
            fail(search, job, str(error))
            return
        ending = {"steps": max(job.step, 0), "complete": False}  # stopped before it was ready to save anything
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


def note(job: Job, ending: dict[str, Any]) -> None:
    """What a report wants to know of a trial beside its values."""
    before = job.trial.user_attrs.get("processor_seconds", 0.0)
    job.trial.set_user_attr("processor_seconds", before + job.used)
    job.trial.set_user_attr("steps", ending["steps"])
    reason = ending["reason"] if ending["complete"] else "fell behind other trials"
    job.trial.set_user_attr("reason", reason)


def fail(search: Search, job: Job, reason: str) -> None:
    """A crash is one trial's: it is recorded with its reason, and the search goes on."""
    job.trial.set_user_attr("processor_seconds", job.used)
    job.trial.set_user_attr("reason", reason)
    search.study.tell(job.trial, state=TrialState.FAIL)
    search.say(f"trial {job.trial.number} failed: {reason}")
    write_results(search.study, search.space, search.config)


def give_up(search: Search, job: Job) -> None:
    """A trial that was stopped with its search: the next search goes on with it."""
    if search.study.trials[job.trial.number].state.is_finished():
        return
    job.trial.set_user_attr("processor_seconds", job.used)
    job.trial.set_user_attr(LOST, "its search was stopped")
    search.study.tell(job.trial, state=TrialState.FAIL)

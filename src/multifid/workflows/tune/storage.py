"""The study of a search, where many jobs find it: a journal file, or a database."""

import os
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from multifid.config import Config, differences
from multifid.workflows.tune.job import Files, alive, last_second
from multifid.workflows.tune.settings import TuneConfig
from multifid.workflows.tune.space import Space
from multifid.workflows.tune.strategies import pruner_of, sampler_of

ABOUT = "multifid"  # user attribute of the study: what it was begun with
LOST, CONTINUES, RUN, ATTEMPT = "lost", "continues", "run", "attempt"
ATTEMPTS = 3  # of a trial whose search ended under it
HIGHEST = ("structures_per_second",)  # objectives that are best where they are largest
# What may change when a search goes on, or differ between its jobs.
FREE = ("trials", "minutes", "processor_minutes", "sampler", "sampler_options", "at_once", "launcher", "srun", "memory")


def open_study(config: Config, space: Space) -> Study:
    """The study of a search, new or to be continued.

    ValueError where the storage holds a study of another search, with what differs, or cannot be opened.
    """
    tune = config.tune
    assert tune is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler, pruner = sampler_of(tune, config.seed), pruner_of(tune)
    storage = storage_of(tune.storage, Path(config.run))
    directions = [StudyDirection.MAXIMIZE if o in HIGHEST else StudyDirection.MINIMIZE for o in tune.objectives]
    about = _about(config, space)
    held = next((s for s in storage.get_all_studies() if s.study_name == tune.name), None)
    if held is not None and ABOUT in held.user_attrs:
        changed = differences(about, held.user_attrs[ABOUT])
        if changed:
            lines = "\n  ".join(d.replace("in the run", "in the study") for d in changed)
            raise ValueError(
                f"{tune.storage or Path(config.run) / 'journal'} holds a study of another search:\n  {lines}\n"
                "Give the search another directory (run=...) and storage, or another tune.name"
            )
    study = optuna.create_study(
        storage=storage,
        sampler=sampler,
        pruner=pruner,
        study_name=tune.name,
        directions=directions,
        load_if_exists=True,
    )
    study.set_user_attr(ABOUT, about)
    return study


def load_study(config: Config, folder: Path) -> Study:
    """The study of a search's directory, to be read. ValueError where its storage does not hold it."""
    assert config.tune is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.load_study(study_name=config.tune.name, storage=storage_of(config.tune.storage, folder))
    except KeyError:
        raise ValueError(f"{config.tune.storage or folder / 'journal'} holds no study {config.tune.name!r}") from None


def storage_of(given: str | None, folder: Path) -> BaseStorage:
    """A database where `given` is a URL, else a journal file, repaired where a crash tore its last line."""
    if given is not None and "://" in given:
        if given.startswith("sqlite:///"):
            Path(given.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            engine = {"connect_args": {"timeout": 60}} if given.startswith("sqlite") else None
            return RDBStorage(given, engine_kwargs=engine)
        except Exception as error:  # of SQLAlchemy, of a driver that is not there
            raise ValueError(f"tune.storage: {given} cannot be opened: {error}") from None
    path = (folder / "journal" if given is None else Path(given)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        backend = JournalFileBackend(str(path), lock_obj=lock)
    _cut_torn_line(path, lock)
    try:
        return JournalStorage(backend)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tune.storage: {path} is no journal of Optuna: {error}") from None


def _cut_torn_line(path: Path, lock: JournalFileSymlinkLock) -> None:
    """A line that a crash left half written would make every line behind it unreadable."""
    lock.acquire()
    try:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _about(config: Config, space: Space) -> dict[str, Any]:
    """What must be the same in all jobs of a search."""
    whole = config.model_dump(mode="json", exclude={"study", "tune"})
    assert config.tune is not None
    tune = config.tune.model_dump(mode="json", exclude={*FREE, "storage", "name", "space", "encoders"})
    return whole | {"tune": tune | {"space": space.as_dict()}}


def recover(study: Study, trials: Path, tune: TuneConfig) -> list[str]:
    """Trials whose search was ended are marked as failed and queued again, to go on in their directories.

    Says what was done, a line each. Under the lock of the search.
    """
    said = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        files = Files(trials, run_of(trial))
        if alive(files, began):
            continue
        if tune.budget.processor_seconds is not None:  # at least: what its journal tells
            study._storage.set_trial_user_attr(trial._trial_id, "processor_seconds", last_second(files))
        study._storage.set_trial_user_attr(trial._trial_id, LOST, "its search was ended")
        study.tell(trial.number, state=TrialState.FAIL)
    everything = study.get_trials(deepcopy=False)
    continued = {trial.user_attrs[CONTINUES] for trial in everything if CONTINUES in trial.user_attrs}
    for trial in everything:
        if LOST not in trial.user_attrs or trial.state != TrialState.FAIL or trial.number in continued:
            continue
        attempt = trial.user_attrs.get(ATTEMPT, 1) + 1
        if attempt > ATTEMPTS or not trial.params:
            continue
        study.enqueue_trial(trial.params, user_attrs={CONTINUES: trial.number, RUN: run_of(trial), ATTEMPT: attempt})
        said.append(f"trial {trial.number} was not finished: it goes on from its newest checkpoint")
    return said


def run_of(trial: Any) -> int:
    """The number that the files of a trial have: its own, or that of the trial it continues."""
    return trial.user_attrs.get(RUN, trial.number)


def counted(trial: Any) -> bool:
    """Whether a trial is one of `tune.trials`: not if another one continues it."""
    return not (LOST in trial.user_attrs and trial.state == TrialState.FAIL)

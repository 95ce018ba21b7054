"""Optuna's samplers and pruners by name, with their options checked before anything begins."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from multifid.workflows.tune.settings import TuneConfig

UNITS = 27  # of resource in the whole budget of a trial: three times divisible by ASHA's factor 3
OVER = "memory"  # constraint of a trial: by which part a rank would need more than there is
EXHAUSTED = "exhausted"  # user attribute of a study whose whole space has been tried
SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "qmc": "QMCSampler",
    "gp": "GPSampler",
    "nsga2": "NSGAIISampler",
    "cmaes": "CmaEsSampler",
    "brute_force": "BruteForceSampler",
}
SHARED_SEED = ("qmc",)  # whose trials are points of one sequence
PRUNERS = {
    "none": "NopPruner",
    "asha": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "patient": "PatientPruner",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "asha": {"min_resource": 3, "reduction_factor": 3},
    "hyperband": {"min_resource": 3, "max_resource": UNITS, "reduction_factor": 3},
    "percentile": {"percentile": 50.0},
    "patient": {"wrapped_pruner": None, "patience": 5},
}


class Numbered(BaseSampler):
    """A sampler that is made anew for every trial, with a seed of the search's and the number of the trial.

    So that two jobs, or a search that was stopped and goes on, never draw the same numbers twice.
    """

    def __init__(self, tune: TuneConfig, seed: int) -> None:
        self._tune, self._seed = tune, seed
        self._inner = self._made(0)

    def _made(self, number: int) -> BaseSampler:
        options = dict(self._tune.sampler_options)
        shared = self._tune.sampler in SHARED_SEED
        options.setdefault("seed", (self._seed * 1_000_003 + (0 if shared else number)) % 2**31)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _made("sampler", getattr(optuna.samplers, SAMPLERS[self._tune.sampler]), options)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner = self._made(trial.number)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        try:
            self._inner.after_trial(study, trial, state, values)
        except RuntimeError:  # a sampler asks the study to stop, which only `Study.optimize` can
            study.set_user_attr(EXHAUSTED, True)


def sampler_of(tune: TuneConfig, seed: int) -> BaseSampler:
    """ValueError for options that Optuna does not know, or a package that it lacks."""
    return Numbered(tune, seed)


def pruner_of(tune: TuneConfig) -> BasePruner:
    """ValueError for options that Optuna does not know."""
    options = DEFAULTS.get(tune.pruner, {}) | tune.pruner_options
    return _made("pruner", getattr(optuna.pruners, PRUNERS[tune.pruner]), options)


def _made(what: str, made: Any, options: dict[str, Any]) -> Any:
    name, known = made.__name__, list(inspect.signature(made).parameters)
    given = {k: v for k, v in options.items() if k in known or k != "seed"}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"tune.{what}_options.{unknown[0]}: {name} has no such option; it has {', '.join(known)}")
    try:
        return made(**given)
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"tune.{what}_options: Optuna's {name} refuses them: {error}") from None

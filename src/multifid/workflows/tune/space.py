"""The space of a search: which keys of the config a trial sets, and to what.

A key of `tune.encoders` is searched only in trials whose encoder it belongs to. A trial with another encoder than the
config's own takes from the config's encoder section the keys that its encoder has too.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from multifid.config import Config, parse_config
from multifid.model.encoders import DEFAULT, all_encoders, why_unknown
from multifid.workflows.tune.settings import Dimension, TuneConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

NAME = "model.encoder.name"
NOT_SEARCHED = ("run", "tune", "study", "tasks", "init", "finetune")
LENGTH = ("train.steps", "train.minutes", "train.epochs")
Values = dict[str, Any]  # key of the config -> value


@dataclass(frozen=True)
class Parameter:
    """One dimension of the space."""

    name: str  # that the study knows it by
    key: str  # of the config
    dimension: Dimension
    encoder: str | None = None  # whose key it is; None: of every trial

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        d = self.dimension
        if d.choices is not None:
            return CategoricalDistribution([label(c) for c in d.choices])
        lo, hi = d.bounds
        if d.whole:
            return IntDistribution(int(lo), int(hi), log=d.logarithmic, step=int(d.step or 1))
        return FloatDistribution(lo, hi, log=d.logarithmic, step=d.step)

    def holds(self, value: Any) -> bool:
        """Whether a value of the config is one of these."""
        d = self.dimension
        if d.choices is not None:
            return label(value) in [label(c) for c in d.choices]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        (lo, hi), step = d.bounds, d.step or (1 if d.whole else 0)
        return lo <= value <= hi and (step == 0 or abs((value - lo) / step - round((value - lo) / step)) < 1e-9)

    def value(self, given: Any) -> Any:
        """What the config gets for what the study holds."""
        choices = self.dimension.choices
        return given if choices is None else next(c for c in choices if label(c) == given)


def label(choice: Any) -> Any:
    """A choice as a study may hold it: lists and sections as JSON."""
    plain = choice is None or isinstance(choice, bool | int | float | str)
    return choice if plain else json.dumps(choice, sort_keys=True)


class Space:
    """The parameters of a search over a config. ValueError for what no trial could be made of, before data are read."""

    def __init__(self, config: Config) -> None:
        assert config.tune is not None, "the caller has seen to it"
        tune = config.tune
        self.base = config.model_copy(update={"tune": None, "study": None}).model_dump(
            mode="json", exclude_unset=True, exclude={"tune", "study"}
        )
        self._own = self.base.get("model", {}).get("encoder", {}).get("name", DEFAULT)
        named = tune.space.get(NAME)
        self.encoders = [self._own] if named is None else [str(c) for c in named.samples]
        self.parameters = [Parameter(key, key, d) for key, d in tune.space.items() if key == NAME]
        self.parameters += [Parameter(key, key, d) for key, d in tune.space.items() if key != NAME]
        for encoder, own in tune.encoders.items():
            self.parameters += [
                Parameter(f"{encoder}: {key}", f"model.encoder.{key}", d, encoder) for key, d in own.items()
            ]
        self._refuse(tune)
        self._try()

    def suggest(self, ask: Callable[[str, "BaseDistribution"], Any]) -> Values:
        """The values of a trial, in the order of the config. ask: `trial._suggest` of the study."""
        values: Values = {}
        for p in self.parameters:
            if p.encoder is None or p.encoder == values.get(NAME, self._own):
                values[p.key] = p.value(ask(p.name, p.distribution()))
        return values

    def values(self, params: Mapping[str, Any]) -> Values:
        """The same of a trial that the study holds."""
        return {p.key: p.value(params[p.name]) for p in self.parameters if p.name in params}

    def config(self, values: Values, source: str = "the trial's config", **sections: Any) -> Config:
        """The config of a trial; `sections` are merged into it. ValueError where such values cannot be together."""
        whole = copy.deepcopy(self.base)
        encoder = values.get(NAME, self._own)
        if encoder != self._own:
            held = whole.setdefault("model", {}).setdefault("encoder", {})
            known = all_encoders()[encoder].Config.model_fields
            whole["model"]["encoder"] = {k: v for k, v in held.items() if k in known} | {"name": encoder}
        for key, value in values.items():
            put(whole, key, value)
        for section, change in sections.items():
            whole[section] = whole.get(section, {}) | change if isinstance(change, dict) else change
        return parse_config(whole, source)

    def own(self, config: Config) -> dict[str, Any] | None:
        """The parameters that give the config itself; None where the space does not hold it."""
        found: dict[str, Any] = {}
        for p in self.parameters:
            if p.encoder not in (None, self._own):
                continue
            value: Any = config.model_dump(mode="json")
            for part in p.key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if not p.holds(value):
                return None
            found[p.name] = value if p.dimension.choices is None else label(value)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For the study, which must be continued with the same space."""
        return {p.name: p.dimension.model_dump(mode="json", exclude_none=True) for p in self.parameters}

    def _refuse(self, tune: TuneConfig) -> None:
        """Keys that are not for a search, and encoders that are none."""
        for name in self.encoders:
            if name not in all_encoders():
                raise ValueError(f"tune.space.{NAME}: {why_unknown(name)}")
        for encoder, own in tune.encoders.items():
            if encoder not in self.encoders:
                raise ValueError(
                    f"tune.encoders.{encoder}: {encoder} is not among the encoders of the search "
                    f"({', '.join(self.encoders)}); add it to tune.space.{NAME}, or drop its keys"
                )
            if both := sorted(k for k in own if f"model.encoder.{k}" in tune.space):
                raise ValueError(f"tune.encoders.{encoder}.{both[0]}: tune.space has model.encoder.{both[0]} too")
        losses = {"validation"} & set(tune.objectives)
        for key in tune.space:
            parts = key.split(".")
            if parts[0] in NOT_SEARCHED and not (parts[0] == "tasks" and len(parts) == 3 and parts[2] != "store"):
                raise ValueError(f"tune.space.{key}: {key} is not for a search: its trials could not be compared")
            weight = parts[0] == "tasks" and parts[2] == "weight"
            if losses and (parts[0] == "objective" or weight):
                raise ValueError(
                    f"tune.space.{key}: it changes what the validation value means, so trials cannot be compared by "
                    "it; set tune.objectives to [forces_mae] or [energy_mae]"
                )
            if tune.budget.kind is not None and key in LENGTH:
                raise ValueError(f"tune.space.{key}: tune.budget.{tune.budget.kind} says how long a trial is")

    def _try(self) -> None:
        """Every key with every choice and both ends of a range, as a config is read: unknown keys, wrong values."""
        ends = [{p.key: p.dimension.samples[k] for p in self.parameters if p.encoder is None} for k in (0, -1)]
        for p in self.parameters:
            of_encoder = p.key.startswith("model.encoder.") and p.key != NAME
            encoders = [p.encoder] if p.encoder else self.encoders if of_encoder else [None]
            for encoder in encoders:
                for value in p.dimension.samples:
                    chosen = {p.key: value} | ({NAME: encoder} if encoder else {})
                    self._try_one(p, chosen, ends)

    def _try_one(self, p: Parameter, chosen: Values, ends: list[Values]) -> None:
        """A value may need others than the config's beside it: it is refused where it fits none of these."""
        where = f"tune.encoders.{p.encoder}.{p.key.removeprefix('model.encoder.')}" if p.encoder else "tune.space"
        where = where if p.encoder else f"{where}.{p.key}"
        encoder = f", encoder {chosen[NAME]}" if NAME in chosen and p.key != NAME else ""
        first: ValueError | None = None
        for others in ({}, *ends):
            known = all_encoders()[chosen.get(NAME, others.get(NAME, self._own))].Config.model_fields
            fitting = {k: v for k, v in others.items() if not k.startswith("model.encoder.") or k[14:] in known}
            try:
                self.config(fitting | chosen, f"{where} at {chosen[p.key]!r}{encoder}")
                return
            except ValueError as error:
                first = first or error
        assert first is not None
        raise first


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` in nested dicts. ValueError where a section is a value."""
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {parent!r} is a value, not a section")
    values[last] = value

"""The `tune` section of the config: what `multifid tune` searches, for how long, and by what it chooses."""

import json
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NUMBERS = ("range", "log", "integer", "log_integer")
Value = Literal["validation", "energy_mae", "forces_mae", "structures_per_second", "bytes_per_rank"]


class Dimension(BaseModel):
    """What values a key may take: exactly one of `choices`, `range`, `log`, `integer` and `log_integer`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    choices: list[Any] | None = Field(None, description="any values; a list in place of this section means the same")
    range: list[float] | None = Field(None, description="[lo, hi], numbers, both ends included")
    log: list[float] | None = Field(None, description="[lo, hi], numbers drawn evenly in their logarithm")
    integer: list[int] | None = Field(None, description="[lo, hi], whole numbers")
    log_integer: list[int] | None = Field(None, description="[lo, hi], whole numbers drawn evenly in their logarithm")
    step: float | None = Field(None, gt=0, description="of `range` or `integer`: lo, lo + step, ...")

    @model_validator(mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {"choices": value}
        if isinstance(value, dict | Dimension):
            return value
        raise ValueError("must be a list of choices, or a section such as {log: [1.0e-4, 1.0e-2]}")

    @model_validator(mode="after")
    def _one(self) -> "Dimension":
        given = [kind for kind in ("choices", *NUMBERS) if getattr(self, kind) is not None]
        if len(given) != 1:
            found = "none" if not given else " and ".join(given)
            raise ValueError(f"needs exactly one of choices, {', '.join(NUMBERS)}; has {found}")
        if self.choices is not None:
            return self._checked_choices(self.choices)
        lo, hi = self.bounds
        if not lo < hi:
            raise ValueError(f"{given[0]}: [{lo:g}, {hi:g}] must be [lo, hi] with lo below hi")
        if self.logarithmic and lo <= 0:
            raise ValueError(f"{given[0]}: [{lo:g}, {hi:g}] needs lo above 0: there is no logarithm below")
        if self.step is not None:
            if self.logarithmic:
                raise ValueError(f"step is for range and integer, not for {given[0]}")
            if self.whole and self.step != int(self.step):
                raise ValueError(f"step: {self.step:g} must be a whole number for integer")
            if self.step > hi - lo:
                raise ValueError(f"step: {self.step:g} is longer than the range from {lo:g} to {hi:g}")
        return self

    def _checked_choices(self, choices: list[Any]) -> "Dimension":
        if not choices:
            raise ValueError("choices: needs at least one value")
        if self.step is not None:
            raise ValueError("step is for range and integer, not for choices")
        texts = [json.dumps(c, sort_keys=True) for c in choices]
        if twice := sorted({t for t in texts if texts.count(t) > 1}):
            raise ValueError(f"choices: {', '.join(twice)} is given twice")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """(lo, hi) of numbers."""
        pair = next(p for kind in NUMBERS if (p := getattr(self, kind)) is not None)
        if len(pair) != 2:
            raise ValueError(f"{pair} must be two numbers: [lo, hi]")
        return pair[0], pair[1]

    @property
    def logarithmic(self) -> bool:
        return self.log is not None or self.log_integer is not None

    @property
    def whole(self) -> bool:
        return self.integer is not None or self.log_integer is not None

    @property
    def samples(self) -> list[Any]:
        """Every choice, or both ends."""
        return list(self.choices) if self.choices is not None else list(self.bounds)


class BudgetConfig(BaseModel):
    """What one trial may spend; at most one of these. All null: as long as the config's own `train` section says."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    processor_seconds: float | None = Field(
        None, gt=0, description="of the first rank's process, all its threads: other work on the machine hardly counts"
    )
    seconds: float | None = Field(None, gt=0, description="by the clock")
    steps: int | None = Field(None, gt=0, description="steps of training")
    joules: float | None = Field(
        None, gt=0, description="of the host's processors (RAPL), whatever runs on them; where it can be read"
    )

    @model_validator(mode="after")
    def _one(self) -> "BudgetConfig":
        if len(self.model_dump(exclude_none=True)) > 1:
            raise ValueError(f"give one of {', '.join(self.model_dump(exclude_none=True))}: a trial has one budget")
        return self

    @property
    def kind(self) -> str | None:
        """The name of the budget, None where the config's own length counts."""
        return next(iter(self.model_dump(exclude_none=True)), None)

    @property
    def limit(self) -> float:
        return next(iter(self.model_dump(exclude_none=True).values()), math.inf)


class TuneConfig(BaseModel):
    """The `tune` section: a search over keys of the config (only `multifid tune` reads it)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    space: dict[str, Dimension] = Field(
        default_factory=dict, description="key of the config, as `train.lr`, -> its values"
    )
    encoders: dict[str, dict[str, Dimension]] = Field(
        default_factory=dict,
        description="encoder -> its own key, as `vectors` -> its values: searched where that encoder is chosen",
    )
    own: bool = Field(True, description="the first trial has the config's own values, where the space holds them all")
    objectives: list[Value] = Field(
        ["validation"],
        min_length=1,
        description="what is best; several give a Pareto front. validation: lowest value of a run; energy_mae, "
        "forces_mae: means over tasks on the validation split; structures_per_second: of training (highest); "
        "bytes_per_rank: of the fullest rank by `multifid plan`",
    )
    budget: BudgetConfig = Field(default_factory=lambda: BudgetConfig())
    trials: int | None = Field(50, gt=0, description="trials of the study, those of all jobs together; null: no end")
    minutes: float | None = Field(None, gt=0, description="by the clock: this command begins no trial after them")
    processor_minutes: float | None = Field(
        None, gt=0, description="of all trials of the study: none begins after them"
    )
    sampler: Literal["tpe", "random", "qmc", "gp", "nsga2", "cmaes", "brute_force"] = Field(
        "tpe", description="Optuna's"
    )
    sampler_options: dict[str, Any] = Field(default_factory=dict, description="as Optuna's class has them")
    pruner: Literal["none", "asha", "hyperband", "median", "percentile", "patient"] = Field(
        "none", description="Optuna's; asha: SuccessiveHalvingPruner. A trial's budget is 27 of its units of resource"
    )
    pruner_options: dict[str, Any] = Field(default_factory=dict, description="as Optuna's class has them")
    storage: str | None = Field(
        None,
        description="a file of Optuna's journal or `sqlite:///FILE`, or another URL of a database; null: RUN/journal",
    )
    name: str = Field("multifid", min_length=1, description="of the study in its storage")
    memory: float | None = Field(
        None, gt=0, description="GiB of a rank: a trial that would need more by `multifid plan` is not started"
    )
    ranks: int = Field(1, gt=0, description="of every trial")
    at_once: int = Field(1, gt=0, description="trials that this command runs side by side")
    launcher: Literal["auto", "torchrun", "srun"] = Field(
        "auto", description="of the ranks; auto: srun inside an allocation of Slurm, else torchrun"
    )
    srun: list[str] = Field(default_factory=list, description="more options of srun, as `--gpus-per-task=1`")

    @model_validator(mode="after")
    def _fits(self) -> "TuneConfig":
        if not self.space and not any(self.encoders.values()):
            raise ValueError("space is empty: name at least one key of the config with its values")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives: each at most once")
        if len(self.objectives) > 1 and self.pruner != "none":
            raise ValueError(
                f"pruner: {self.pruner} cannot be with several objectives: Optuna prunes by one value; set it to none"
            )
        if self.objectives[0] == "bytes_per_rank" and self.pruner != "none":
            raise ValueError("pruner: bytes_per_rank is known before a trial begins; set pruner to none")
        if self.objectives[0] == "structures_per_second" and self.pruner != "none":
            raise ValueError("pruner: structures_per_second does not change while a run goes on; set pruner to none")
        if "structures_per_second" in self.objectives and self.budget.joules is not None:
            raise ValueError(
                "objectives: structures_per_second cannot be with budget.joules, which makes a run count joules in "
                "place of seconds; take budget.steps"
            )
        if self.budget.joules is not None and self.at_once > 1:
            raise ValueError("budget.joules are of the whole host: with them at_once must be 1")
        if self.trials is None and self.minutes is None and self.processor_minutes is None:
            raise ValueError("trials, minutes and processor_minutes are all null: the search would have no end")
        return self

"""The one config: composed of the rooms' own sections, strict, YAML in, resolved copy out."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from multifid.feed.loader import TaskConfig
from multifid.feed.order import SamplingConfig
from multifid.model.encoders import all_encoders
from multifid.model.potential import ModelConfig
from multifid.parallel.layout import ParallelConfig
from multifid.training.finetune import FinetuneConfig
from multifid.training.loss import ObjectiveConfig
from multifid.training.settings import MEASURING, TrainConfig
from multifid.workflows.tune.settings import TuneConfig


class StudyConfig(BaseModel):
    """The `study` section: how the comparison is run (only `multifid study` reads it)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    seeds: list[int] = Field([0], min_length=1, description="one comparison for each")
    processes: int = Field(1, gt=0, description="models that train side by side, each with its share of the threads")


class Config(BaseModel):
    """Everything that a run is told."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    run: str = Field(description="directory that the run writes into")
    seed: int = Field(0, ge=0, description="of the weights and of the order of data")
    init: str | None = Field(None, description="a run whose weights to start from")
    tasks: dict[str, TaskConfig] = Field(min_length=1, description="name -> store, weight, ...")
    branches: Literal["per_task", "shared"] = Field("per_task", description="shared: one branch for all tasks")
    model: ModelConfig = Field(default_factory=ModelConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    finetune: FinetuneConfig | None = Field(None, description="how another model is taken over, beside `init`")
    study: StudyConfig | None = Field(None, description="only for `multifid study`")
    tune: TuneConfig | None = Field(None, description="only for `multifid tune`")

    @field_validator("tasks")
    @classmethod
    def _names(cls, tasks: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        for name in tasks:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"task name {name!r} must consist of letters, digits, _ and - only")
        return dict(sorted(tasks.items()))

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        self._shaped()
        if self.train.batch is not None and self.train.local_batch is not None:
            raise ValueError("train.batch and train.local_batch say the same thing twice: give one of them")
        if (self.train.batch or 1) < 1 and any(task.per_step is None for task in self.tasks.values()):
            raise ValueError(
                f"train.batch: {self.train.batch:g} is the mean number of structures per task and step, at least 1"
            )
        if self.train.compile and self.parallel.shard_encoder:
            raise ValueError("train.compile needs whole layers; with parallel.shard_encoder set it to false")
        if self.train.compile and self.train.recompute:
            raise ValueError("train.recompute is for what is not compiled: with train.compile the compiler chooses")
        if self.train.compile and self.train.capture:
            raise ValueError("train.capture is for what is not compiled: train.compile: reduce-overhead records too")
        graphs = "compile: reduce-overhead" if self.train.compile == "reduce-overhead" else "capture: true"
        if (self.train.compile == "reduce-overhead" or self.train.capture) and self.train.neighbors == "device":
            raise ValueError(
                "train.neighbors: device works on the device from other threads, which must not be while a CUDA graph "
                f"is recorded: with train.{graphs} set it to host"
            )
        self._diagnosed()
        self._balanced()
        encoder, low = self.model.encoder.name, self.train.precision in ("bf16", "tf32")
        if low and self.model.conservative and all_encoders()[encoder].slopes_need_float32:
            raise ValueError(
                f"train.precision: {self.train.precision} rounds the conservative forces of {encoder} by several per "
                "cent: take fp32, or model.branch.forces: direct"
            )
        if self.train.optimizer == "soap" and self.parallel.shard_encoder:
            raise ValueError("train.optimizer: soap needs whole matrices; with parallel.shard_encoder take adamw")
        if self.finetune is not None:
            self._fine_tunes(self.finetune)
        return self

    def _shaped(self) -> None:
        """ValueError where branches of a shape of their own are none of the run, or cannot do what is asked."""
        branches = sorted(set(self.branch_of().values()))
        unknown = sorted(set(self.model.branches) - set(branches))
        if unknown and self.finetune is None:  # then they may be branches of the model that it begins with
            raise ValueError(
                f"model.branches names {', '.join(unknown)}; the branches of this run are {', '.join(branches)}"
            )
        forces = {self.model.shape(branch).forces for branch in branches}
        if self.objective.stress > 0 and "conservative" not in forces:
            raise ValueError("objective.stress > 0 needs model.branch.forces: conservative (only they give a stress)")
        if len(forces) > 1 and (self.train.compile or self.train.capture):
            key = "train.compile" if self.train.compile else "train.capture"
            raise ValueError(
                f"{key} makes passes for one kind of forces, and model.branches asks for direct and conservative ones: "
                "set it to false"
            )

    def _diagnosed(self) -> None:
        """ValueError where gradients of tasks are to be measured that cannot be had apart."""
        asked = {"parallel.shard_encoder": self.parallel.shard_encoder, "train.compile": self.train.compile}
        asked["train.capture"] = self.train.capture
        refusing = [key for key, wanted in asked.items() if wanted]
        if isinstance(self.train.diagnose_every, int) and refusing:
            raise ValueError(
                f"train.diagnose_every: {self.train.diagnose_every} needs gradients of single tasks, which "
                f"{refusing[0]} does not give: set one of the two to null or false"
            )

    def _balanced(self) -> None:
        """ValueError where tasks are to be balanced and that makes no sense, or cannot be."""
        train, method = self.train, f"train.balance: {self.train.balance}"
        if train.balance == "none":
            return
        if len(self.tasks) == 1:
            raise ValueError(f"{method} balances tasks, and there is one: set it to none")
        if train.capture:
            raise ValueError(
                f"{method} makes passes that train.capture does not record: set one of them to none or false"
            )
        if train.balance not in MEASURING:
            return
        if self.branches == "shared":
            raise ValueError(f"{method} is for branches: per_task; a shared branch would need a direction of its own")
        for key, wanted in {
            "parallel.shard_encoder": self.parallel.shard_encoder,
            "train.compile": train.compile,
        }.items():
            if wanted:
                raise ValueError(
                    f"{method} needs gradients of single tasks, which {key} does not give: set it to false"
                )
        if self.finetune is not None and self.finetune.moves == "branch":
            raise ValueError(f"{method} is about the encoder's gradients, and finetune.moves: branch keeps it still")

    def _fine_tunes(self, finetune: FinetuneConfig) -> None:
        if self.init is None:
            raise ValueError("finetune needs init: the run or model file to begin with")
        if self.branches == "shared":
            raise ValueError("finetune gives every task a branch of its own: set branches to per_task")
        if unknown := sorted({*finetune.branches, *finetune.references} - set(self.tasks)):
            raise ValueError(f"finetune names {', '.join(unknown)}, which are no tasks of the run")
        if self.parallel.shard_encoder and (finetune.moves != "all" or finetune.layer_decay != 1 or finetune.pull):
            raise ValueError(
                "parallel.shard_encoder has the encoder in pieces that move as one: with it set finetune.moves to all, "
                "layer_decay to 1 and pull to 0"
            )

    @classmethod
    def from_file(cls, path: Path | str, overrides: Sequence[str] = ()) -> "Config":
        """A config from a YAML file, or from a run's directory, which holds one.

        Args:
            path: of the file or the run.
            overrides: `key.key=value`, as on the command line.

        Raises:
            ValueError: names the key, what was given and what is right.
        """
        return load_config(Path(path), list(overrides))

    def branch_of(self) -> dict[str, str]:
        """The branch of every task."""
        return {task: task if self.branches == "per_task" else "shared" for task in self.tasks}


def as_config(given: Config | Path | str | Mapping[str, Any]) -> Config:
    """A config in whatever form it is given: itself, a path as in `load_config`, or a dict as YAML would give it.

    A dict may hold paths. ValueError as of `load_config`.
    """
    if isinstance(given, Config):
        return given
    if isinstance(given, Mapping):
        return parse_config(_plain(given), "config")
    if isinstance(given, str | Path):
        return load_config(Path(given))
    raise ValueError(f"a config is a multifid.Config, a path or a dict, not {type(given).__name__}")


def _plain(value: Any) -> Any:
    """Dicts, lists and paths as YAML would give them."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """A config with `key.key=value` overrides, from a YAML file or from a run's directory, which holds one.

    ValueError names the key, what was given and what is right.
    """
    path = path / "config.yaml" if path.is_dir() else path
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold keys and values, holds {type(values).__name__}")
    for override in overrides or []:
        apply_override(values, override)
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}:\n" + "\n".join(f"  {_explain(e)}" for e in error.errors())) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} must have the form key=value, as train.lr=0.001")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"override {override!r}: {parent!r} is a value, not a section")
        values = inner
    values[last] = yaml.safe_load(text)


def _explain(error: Any) -> str:
    parts = [str(part) for part in error["loc"] if not str(part).startswith(("dict[", "literal["))]
    if parts[:2] == ["model", "encoder"]:
        del parts[2:3]  # the name by which the encoder's own keys were chosen
    where = ".".join(parts)
    if error["type"] != "extra_forbidden":
        given = "" if isinstance(error.get("input"), dict) else f" (given: {error.get('input')!r})"
        return f"{where or 'config'}: {error['msg'].removeprefix('Value error, ')}{given}"
    near = difflib.get_close_matches(str(error["loc"][-1]), _known_keys(error["loc"][:-1]), n=1, cutoff=0.6)
    known = ", ".join(_known_keys(error["loc"][:-1]))
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {known}"
    return f"{where}: unknown key; {hint}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys of the section that a location of a validation error names."""
    model: Any = Config
    if location[:2] == ("model", "encoder") and len(location) > 2:
        model, location = all_encoders()[location[2]].Config, ()
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _section(annotation: Any) -> Any:
    """The config class inside an annotation such as `StudyConfig | None` or `dict[str, TaskConfig]`; the first one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = [_section(a) for a in getattr(annotation, "__args__", ())]
    return next((a for a in inside if a is not None), None)


def dump_config(config: Config) -> str:
    """YAML that gives the same config again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(new: Any, old: Any, prefix: str = "") -> list[str]:
    """Where two dumped configs differ: `train.lr: 0.001 here, 0.002 in the run`."""
    if isinstance(new, dict) and isinstance(old, dict):
        keys = dict.fromkeys([*new, *old])
        return [d for k in keys for d in differences(new.get(k), old.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if new == old else [f"{prefix}: {new!r} here, {old!r} in the run"]

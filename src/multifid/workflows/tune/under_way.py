"""A search under way in this process, one of any number that share its study."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from multifid.config import Config
from multifid.forecast.machines import Machine
from multifid.forecast.this_machine import this_machine
from multifid.workflows.tune.settings import TuneConfig
from multifid.workflows.tune.space import Space

if TYPE_CHECKING:
    from optuna.study import Study


@dataclass
class Search:
    """What all of it needs."""

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

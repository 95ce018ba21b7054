"""How many steps a run makes: as many as its config says, or as many as fit into `train.minutes`.

The learning rate must know the end before it comes, or the last step is not annealed. So the number of steps is *fixed*
early and fixed again, at steps that are known beforehand: after 1, 2, 4, 8, ... steps, and when a third of the steps
that were left has been made. Each time rank 0 measures what a step took since the last time and what the last
validation took, and tells all ranks how many steps fit into the time that is left; the schedule is bent to its new end
from where it is, without a jump (`Schedule.bend`). The last guesses are about few steps, so that the run ends when it
should, and with its rate at the bottom, whatever became of the speed.

What was fixed, and what the next guess will be made of, is in every checkpoint: a run that goes on follows the same
numbers until the next step at which they are to be fixed. Minutes are those of training and validation, over all
starts (`Position.seconds`), with the copies that checkpoints take; reading stores and building the model come on top.
"""

import sys
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from multifid.training.pace import Pace
from multifid.training.state import Position

UNKNOWN = sys.maxsize  # the number of steps before the first guess
SHARE = 3  # fixed again after one part in so many of the steps that are left
GLIDE = 50  # where time is up, the rate falls to its end within one step for so many that were made


@dataclass
class Length:
    """The number of steps of a run, and when it is fixed again."""

    total: int
    per_epoch: int
    pace: Pace
    minutes: float | None = None
    next: int | None = None  # the step after which the number is fixed again; None: it stays
    fixed: list[list[int]] = field(default_factory=list)  # every guess: the step it was made at, steps of the run

    @property
    def known(self) -> int | None:
        """The number of steps, None before the first guess."""
        return None if self.total == UNKNOWN else self.total

    def fitting(self, position: Position) -> int:
        """How many steps the whole run can make, with what is left of its time at a step, before its validation.

        At least one more. Where time is up before the rate is at its end, as few as let it glide there.
        """
        assert self.minutes is not None, "only a run that is ended by the clock measures"
        left, spent = 60 * self.minutes - position.seconds, self.pace.spent(position)
        assert spent is not None, "a step was made since the number was fixed last"
        glide = min(position.step // GLIDE + 1, self.total - position.step)
        most = int(max(left, 0.0) / max(spent.step, 1e-9)) + 1
        fit = bisect_right(
            range(1, most + 1), left, key=lambda n: spent.until(position.step, position.step + n, self.per_epoch)
        )
        return position.step + max(fit, glide)

    def fix(self, position: Position, total: int) -> None:
        """The run makes `total` steps, as rank 0 says."""
        step = position.step
        self.total = total
        self.fixed.append([step, total])
        again = min(2 * step, step + max(1, (total - step) // SHARE))
        self.next = again if again < total else None
        self.pace.mark(position)

    def seconds_left(self, position: Position, pace: Pace, validated: bool) -> float | None:
        """Until the end of the run, at the pace that is measured beside this one. validated: so far as it is due."""
        if self.total == UNKNOWN:
            return None if self.minutes is None else 60 * self.minutes - position.seconds
        spent = pace.spent(position)
        if spent is None:
            return None
        return spent.until(position.step, self.total, self.per_epoch) - spent.validation * validated

    def state(self, position: Position) -> dict[str, Any]:
        """For a checkpoint, of a run that is ended by the clock."""
        return {
            "minutes": self.minutes,
            "total": self.total,
            "next": self.next,
            "fixed": list(self.fixed),  # written behind the training, which adds to it
            "since": [self.pace.step, self.pace.working],
            "paused": position.paused,
            "pause": position.pause,
        }


def length_of(
    minutes: float | None,
    steps: int,
    per_epoch: int,
    position: Position,
    validated: float,
    state: dict[str, Any] | None,
) -> Length:
    """The length of a run at a position: what a checkpoint's state holds, where it is of the same minutes.

    steps: as the config says, where no minutes are given. validated: as `Pace` wants it.
    """
    if minutes is None:
        return Length(steps, per_epoch, Pace(position, validated))
    length = Length(UNKNOWN, per_epoch, Pace(position, validated), minutes, next=position.step + 1)
    if state is not None:
        position.paused, position.pause = state["paused"], state["pause"]
        length.pace.step, length.pace.working = state["since"]
        length.fixed = state["fixed"]
        if state["minutes"] == minutes:
            length.total, length.next = state["total"], state["next"]
    return length

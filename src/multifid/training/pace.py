"""How fast a run goes and how long it will still take, from what its last steps and its last validation took."""

from dataclasses import dataclass

from multifid.training.state import Position

# Of the time of training on as many structures, before the first validation is measured: no second pass, no update.
VALIDATION = 0.4


@dataclass(frozen=True)
class Spent:
    """Where a run's time goes: seconds of a step, and of a validation."""

    step: float
    validation: float

    def until(self, step: int, total: int, per_epoch: int) -> float:
        """Seconds from the end of a step, before its validation if it has one, to the end of a run of `total` steps."""
        return (total - step) * self.step + ends(step, total, per_epoch) * self.validation


def ends(step: int, total: int, per_epoch: int) -> int:
    """Validations of a run of `total` steps that are made at `step` or later: at the end of each epoch and the run."""
    return (total - 1) // per_epoch - max(0, step - 1) // per_epoch + 1


class Pace:
    """Measures stretches of steps. validated: structures of a validation for one of a step."""

    def __init__(self, position: Position, validated: float) -> None:
        self.step, self.working = position.step, position.working
        self.validated = validated
        self._of_step: float | None = None

    def spent(self, position: Position) -> Spent | None:
        """What steps took since the last mark, or in the stretch before it where there is none; None: no step yet."""
        steps = position.step - self.step
        of_step = (position.working - self.working) / steps if steps else self._of_step
        if of_step is None:
            return None
        guess = VALIDATION * self.validated * of_step
        return Spent(of_step, guess if position.pause is None else position.pause)

    def mark(self, position: Position) -> None:
        """A new stretch begins here."""
        before = self.spent(position)
        self._of_step = None if before is None else before.step
        self.step, self.working = position.step, position.working

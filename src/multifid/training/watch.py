"""What a run says, and how it ends, where its loss, its gradient or its validation value is not finite.

Success is claimed for what exists only: without one finite validation value there is no model, and that is an error.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from multifid.parallel.groups import World
from multifid.training.checkpoint import Saver
from multifid.training.feed import Feed
from multifid.training.log import Log
from multifid.training.nonfinite import in_step, in_validation, what_is_whole
from multifid.training.state import Position
from multifid.training.step import Totals, Trainer

UNKNOWN = "the gradient, though every prediction and every loss is finite by itself"


@dataclass
class Watch:
    """Looks at a run after every step, every validation and at its end. The same on all ranks; rank 0 talks."""

    run: Path
    world: World
    trainer: Trainer
    feed: Feed
    position: Position
    saver: Saver
    log: Log
    most: int  # updates that may be skipped in a row
    skipped: str = ""  # what was not finite in the first of those that are now skipped in a row

    def step(self) -> None:
        """Say what began it when updates are skipped; FloatingPointError when too many are, in a row."""
        many = self.trainer.skipped_in_a_row
        if not many:
            return
        step = self.position.step - (
            1 if self.trainer.at_once else 2
        )  # results of an accelerator are read one step later
        enough = many > self.most
        if many == 1:
            self.skipped = in_step(self.trainer, self.feed, self.world, step)
            what = self.skipped or UNKNOWN
            self._warn(f"step {step + 1}: loss or gradient is not finite, and the update is skipped: {what}")
        if enough:
            what = self.skipped or in_step(self.trainer, self.feed, self.world, step, gradient=True) or UNKNOWN
            self._fail(
                f"step {step + 1}: loss or gradient was not finite {many} times in a row. What began it: {what}. "
                "Lower train.lr, or look at that structure and its labels"
            )

    def validation(self, totals: Totals, value: float) -> None:
        """Remember, and say, what began it where validation values are not finite. ValueError where nothing is known.

        Called before the value is told to anybody.
        """
        if not totals.labels(self.trainer.objective):
            self.world.fail(
                ValueError(
                    f"{self.run}: no structure of the validation splits has a label of a kind that objective gives "
                    "weight to, so no model is better than another: prepare the stores with such labels"
                )
            )
        if math.isfinite(value):
            self.position.trouble = ""
        elif not self.position.trouble:
            found = in_validation(self.trainer, self.feed, self.world)
            self.position.trouble = f"validation at step {self.position.step}: {found}"
            self._warn(f"the validation value is not finite ({self.position.trouble})")

    def end(self) -> None:
        """FloatingPointError where nothing was trained, or no validation value was finite; a word on what was not."""
        p, skipped = self.position, self.position.step - self.trainer.updates
        if not self.trainer.updates:
            what = self.skipped or f"see {self.run / 'train.log'}"
            self._fail(f"{self.run}: all {p.step} updates were skipped, so there is no model. What began it: {what}")
        if not math.isfinite(p.best):
            began = p.trouble or "the tasks of the run have changed, and no step was made since (train.steps)"
            self._fail(f"{self.run}: no validation value of {p.step} steps is finite, so there is no model: {began}")
        if skipped:
            self._warn(f"{skipped} of {p.step} updates were skipped, because loss or gradient was not finite")
        if p.trouble:
            self._warn(
                f"the last validation value is not finite ({p.trouble}): model.safetensors is of step {p.best_step}, "
                f"whose value is; last.safetensors is of step {p.step}"
            )

    def _warn(self, text: str) -> None:
        self.log.print(f"[yellow]{escape(text)}[/yellow]")

    def _fail(self, text: str) -> None:
        self.saver.wait()  # what is being written now may be the checkpoint to go back to
        self.world.fail(FloatingPointError(f"{text}. {what_is_whole(self.run, self.world)}"))

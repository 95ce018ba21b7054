"""What the budget of a trial is measured by: clocks that a run takes in place of the one on the wall.

`train.minutes` ends a run, and its learning rate, by any clock that only goes forward. The energy of processors comes
from RAPL (running average power limit: counters of joules in the processor), which Linux shows under
/sys/class/powercap, on most hosts to root only.
"""

import time
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Rapl:
    """Joules that all processor packages of this host have used since the first call. ValueError where none is read."""

    def __init__(self, root: Path = POWERCAP) -> None:
        packages = sorted(p for p in root.glob("*rapl:*") if _name(p).startswith("package"))
        if not packages:
            raise ValueError(
                f"tune.budget.joules: {root} shows no RAPL counter of a processor package (a virtual machine, or a "
                "processor without them); take tune.budget.processor_seconds"
            )
        self._packages: list[tuple[Path, int]] = []
        for package in packages:
            try:
                int((package / "energy_uj").read_text())
                self._packages.append((package / "energy_uj", int((package / "max_energy_range_uj").read_text())))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"tune.budget.joules: {package / 'energy_uj'} cannot be read ({error}); most systems show it to "
                    "root only: ask for read permission, or take tune.budget.processor_seconds"
                ) from None
        self._last = self._read()
        self._used = 0

    def _read(self) -> list[int]:
        return [int(path.read_text()) for path, _ in self._packages]

    def __call__(self) -> float:
        """Call it at least once in the minutes that a counter takes to begin again at 0."""
        now = self._read()
        for (_, most), before, after in zip(self._packages, self._last, now, strict=True):
            self._used += after - before if after >= before else after + most - before
        self._last = now
        return self._used / 1e6


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def clock_of(kind: str | None) -> Callable[[], float]:
    """The clock of a budget: `processor_seconds`, `joules`, or the one on the wall. ValueError as of `Rapl`."""
    if kind == "processor_seconds":
        return time.process_time
    return Rapl() if kind == "joules" else time.monotonic

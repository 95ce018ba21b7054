"""The result of a step (norm, skipped or not, stop), which the host reads once the device has computed it."""

import math

import torch
from torch import Tensor


class Outcome:
    """The result of a step, the same on all ranks."""

    def __init__(self, squared_norm: Tensor, stop: Tensor, miscounted: Tensor) -> None:
        self._numbers = Later(torch.stack([squared_norm, stop, miscounted.to(squared_norm.dtype)]))

    @property
    def norm(self) -> float:
        """Of the gradient over encoder and all branches, before clipping. Waits for the device."""
        return math.sqrt(self._numbers.values()[0])

    @property
    def updated(self) -> bool:
        """False: the gradient was not finite, and nothing was changed. Waits for the device.

        Not NaN either: what is not finite on one rank is not finite in the sum.
        """
        return self._numbers.values()[0] < math.inf

    @property
    def stop(self) -> bool:
        """Whether some rank was told to stop. Waits for the device."""
        return self._numbers.values()[1] > 0

    @property
    def miscounted(self) -> bool:
        """Whether the ranks processed other labels than the sums were divided by. Waits for the device."""
        return self._numbers.values()[2] > 0


class Later:
    """A few numbers (n,) on their way from the device to the host: they are copied when the device comes to them."""

    def __init__(self, numbers: Tensor) -> None:
        self._copied: torch.Event | None = None
        self._values: list[float] | None = None
        self._here = numbers.detach()
        if numbers.device.type != "cpu":
            self._here = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._copied = torch.Event(numbers.device)
            self._copied.record(torch.accelerator.current_stream(numbers.device))  # not that of the current device

    def values(self) -> list[float]:
        """The numbers; waits until the device has come to them."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._values is None:
            self._values = [float(number) for number in self._here]
        return self._values

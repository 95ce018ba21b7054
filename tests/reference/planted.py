"""Weights that are a function of their names, so that two implementations can be given the same without a file."""

import zlib

import numpy as np

POSITIONS = np.array(
    [[0.0, 0.0, 0.0], [1.1, 0.2, -0.1], [-0.5, 1.0, 0.3], [0.4, -0.9, 0.9], [2.2, 0.1, 0.2], [3.1, 0.9, -0.6]]
)  # a linear chain of three among them, nearly
NUMBERS = np.array([6, 8, 1, 7, 1, 16])
CUTOFF = 3.5  # some pairs are farther apart


def planted(name: str, shape: tuple[int, ...], size: float = 1.0) -> np.ndarray:
    """Values between -size and size divided by the root of the inputs."""
    start = zlib.crc32(name.encode()) % 1000
    values = np.sin(start + 1.7 * np.arange(int(np.prod(shape))) ** 1.3).reshape(shape)
    return size * values / (shape[-1] if len(shape) > 1 else 10) ** 0.5

"""Reaction paths between isomers: which atom becomes which, and a short nudged elastic band between the two minima."""

import itertools

import numpy as np
from ase import Atoms
from ase.mep.neb import NEB
from ase.optimize import FIRE
from scipy.optimize import linear_sum_assignment
from scipy.spatial.transform import Rotation

from multifid.workflows.sample.molecules import Molecule, bonds, library, relaxed
from multifid.workflows.sample.xtb import XTB, Point

METHOD = "GFN1-xTB"
IMAGES = 7  # between the two end points
# of the band: enough to leave the worst of the interpolation, far from converged, as most published frames are
STEPS = 7


def isomers() -> list[tuple[str, str]]:
    """All pairs of different molecules of the library with one formula."""
    return [(a.name, b.name) for a, b in itertools.combinations(library().values(), 2) if a.formula == b.formula]


def mapped(reactant: Molecule, product: Molecule, rng: np.random.Generator, starts: int = 60) -> np.ndarray:
    """The product's positions, its atoms put in the reactant's order and laid onto the reactant.

    From random orientations, alternate the best assignment of like atoms with the best rotation (iterative closest
    point); of all ends take the one that breaks and makes the fewest bonds, then the one with the least displacement.
    """
    x = reactant.positions - reactant.positions.mean(0)
    before = bonds(reactant.numbers, x)
    unlike = 1e6 * (reactant.numbers[:, None] != product.numbers[None])
    best, least = x, (np.inf, np.inf)
    for rotation in Rotation.random(starts, rng=rng):
        y = rotation.apply(product.positions - product.positions.mean(0))
        for _ in range(10):
            order = linear_sum_assignment(((x[:, None] - y[None]) ** 2).sum(-1) + unlike)[1]
            settled = np.array_equal(order, np.arange(len(order)))
            y = Rotation.align_vectors(x, y[order])[0].apply(y[order])
            if settled:
                break
        changes = int((before != bonds(reactant.numbers, y)).sum()) // 2
        cost = (changes, float(((x - y) ** 2).sum()))
        if cost < least:
            best, least = y, cost
    return best


def path(reactant: str, product: str, rng: np.random.Generator) -> list[list[Point]]:
    """A band from the reactant's minimum to the product's: for each of its steps the points of all images.

    The first point of each step is the reactant, the last the product. The band starts from the image dependent pair
    potential (Smidstrup et al., J. Chem. Phys. 140, 214106 (2014)) and moves with the improved tangent (Henkelman,
    Jonsson, J. Chem. Phys. 113, 9978 (2000)). Raises Unusable where an end point does not relax or an image fails.
    """
    start, end = relaxed(reactant, METHOD), relaxed(product, METHOD)
    first = Atoms(start.numbers, start.positions - start.positions.mean(0))
    last = Atoms(start.numbers, mapped(start, end, rng))
    images = [first, *(first.copy() for _ in range(IMAGES)), last]
    for image in images:
        image.calc = XTB(METHOD)
    band = NEB(images, k=0.5, method="improvedtangent", climb=True)
    band.interpolate("idpp")
    optimizer = FIRE(band, logfile=None)
    optimizer.run(fmax=0.05, steps=STEPS)
    for image in (first, last):
        image.get_forces()
    points = [image.calc.points for image in images]
    steps = min(len(inner) for inner in points[1:-1])
    return [[points[0][0], *(inner[k] for inner in points[1:-1]), points[-1][0]] for k in range(steps)]

"""The crystals of the two crystal sources: eight atoms in every cell, ionic or covalent, mostly wide-gap.

Periodic tight binding at the Gamma point is not size-consistent: the same crystal in a larger cell has another energy
per atom. One cell size for all materials keeps that error alike in all of them. All three prototypes are cations on two
pairs of sites and anions on two pairs of sites, so that ordered ternaries (NaBiS2) and mixed anions (ZnSSe) come in the
same cells as binaries, and elements do not always occur in the same ratio.
"""

import re
from dataclasses import dataclass

import numpy as np

from multifid.structures.elements import NUMBERS, SYMBOLS

FACES = np.array([[0, 0, 0], [1 / 2, 1 / 2, 0], [1 / 2, 0, 1 / 2], [0, 1 / 2, 1 / 2]])
CHAINS = np.array([[0, 0, 0], [1 / 2, 1 / 2, 0], [0, 1 / 3, 1 / 2], [1 / 2, 5 / 6, 1 / 2]])
# prototype: (cell in units of the lattice constant, fractional coordinates of the cations, shift to the anions)
PROTOTYPES: dict[str, tuple[np.ndarray, np.ndarray, list[float]]] = {
    "rocksalt": (np.eye(3), FACES, [1 / 2, 1 / 2, 1 / 2]),
    "zincblende": (np.eye(3), FACES, [1 / 4, 1 / 4, 1 / 4]),
    "wurtzite": (np.diag([1, 3**0.5, (8 / 3) ** 0.5]), CHAINS, [0, 0, 3 / 8]),  # the orthorhombic cell
}
# prototype: cation, cation, anion, anion (two atoms of each), and the lattice constant in angstrom at which GFN1-xTB at
# the Gamma point has no pressure. Kept are those that converge there with a gap above 0.9 eV. A star: relaxes within
# ten steps to a minimum near the prototype; the others serve for snapshots.
TABLE = {
    "rocksalt": """
        AgAgBrBr* 5.58, AgAgClCl* 5.30, AgAgII* 5.88, AgBiOO* 4.58, AgBiSS* 5.11, AgBiSeSe* 5.33, AgBiTeTe*
        5.70, AgNaII* 6.06, AgSbSeSe 5.24, AgSbTeTe 5.59, BiBiAsAs* 5.63, BiBiNN* 4.75, BiBiPP* 5.44, BiBiSbSb*
        5.84, CsCsII* 6.79, KBiOO 4.92, KBiSeSe 5.57, KBiTeTe* 6.03, KKClCl* 6.38, KLaSS 6.40, KLaSeSe 6.62,
        KLaTeTe 7.09, KLuSeSe 6.20, KRbClCl 6.07, KRbII* 6.81, KYSS 6.16, NaBiOO 4.70, NaBiTeTe 5.90, NaNaII*
        6.61, NaSbTeTe 5.78, PbPbOO* 4.82, PbPbSS* 5.30, PbPbSeSe* 5.50, PbPbTeTe* 5.94, RbBiOO 5.08, RbBiSS
        5.48, RbBiSeSe 5.67, RbBiTeTe 6.12, RbCsBrBr* 6.45, RbCsClCl* 6.23, RbCsII* 7.07, RbLaOO 5.66, RbLaSeSe
        6.51, RbLaTeTe 6.97, RbLuSeSe 6.05, RbRbBrBr* 6.49, RbRbBrI* 6.72, RbRbClBr* 6.36, RbRbClCl* 6.22,
        RbRbII* 6.95, RbYSeSe 6.12, RbYTeTe 6.84, SnSnOO* 4.56, SnSnSS* 5.09, SnSnSeSe* 5.33, SnSnTeTe 5.75,
        TlBiOO 4.96, TlBiSS 5.39, TlBiSeSe* 5.56, TlBiTeTe* 6.04, TlKBrBr* 6.18, TlKClCl 5.90, TlKII* 6.53,
        TlLuOO 5.37, TlLuSS 5.75, TlSbOO 4.84, TlSbSS 5.33, TlSbSeSe 5.53, TlSbTeTe* 5.96, TlTlBrBr* 5.93,
        TlTlClCl* 5.74, TlTlII* 6.28, YYAsAs 6.47, YYPP 6.30
    """,
    "zincblende": """
        AgAgBrBr* 6.44, AgAgClCl* 6.12, AgAgII* 6.77, BBAsAs 4.90, BBNN* 3.68, BBPP* 4.68, BeBeOO* 4.14, BeBeSS*
        5.04, BeBeTeTe* 5.73, CdCdOO* 5.69, CdCdSS* 6.25, CdCdSSe* 6.37, CdCdSeSe* 6.35, CdCdSeTe* 6.78,
        CdCdTeTe* 7.04, CdGePP 6.14, CdSnAsAs 6.41, CdSnPP 6.19, CuCuBrBr* 5.84, CuCuClCl* 5.55, CuCuII* 6.36,
        HgHgOO* 5.14, HgHgSS* 6.04, HgHgSSe* 6.19, HgHgSeSe* 6.35, HgHgSeTe* 6.62, HgHgTeTe* 7.03, MgGePP 5.93,
        MgMgSS 5.89, MgMgSeSe 6.20, MgSnAsAs 6.17, MgSnPP 6.07, ZnGePP 5.95, ZnSnAsAs 6.30, ZnSnPP 6.12, ZnZnOO
        5.23, ZnZnSS 5.92, ZnZnSSe* 5.98, ZnZnSeSe* 6.09, ZnZnSeTe 6.35, ZnZnTeTe* 6.61
    """,
    "wurtzite": """
        AgAgII 4.90, BBNN 2.66, BeBeOO 3.02, CdCdSS 4.42, CdCdSeSe 4.64, CuCuClCl 4.09, HgHgSS 4.30, ZnZnOO
        3.63, ZnZnSS 4.23
    """,
}


@dataclass(frozen=True, slots=True)
class Material:
    serial: int  # place in the table, from 1
    prototype: str
    symbols: tuple[str, str, str, str]
    lattice_constant: float  # angstrom
    relaxes: bool  # within a few steps, to a minimum near the prototype
    cells: int = 1  # of eight atoms, one above the other

    @property
    def numbers(self) -> np.ndarray:
        """(8 cells,) atomic numbers."""
        return np.tile(np.repeat([NUMBERS[symbol] for symbol in self.symbols], 2), self.cells)


def _materials() -> list[Material]:
    entries = [(p, *entry.split()) for p, block in TABLE.items() for entry in block.split(",")]
    return [
        Material(i, p, tuple(re.findall("[A-Z][a-z]?", symbols)), float(a), "*" in symbols)  # type: ignore[arg-type]
        for i, (p, symbols, a) in enumerate(entries, start=1)
    ]


MATERIALS = _materials()


def ideal(material: Material) -> tuple[np.ndarray, np.ndarray]:
    """Cell (3, 3) and fractional coordinates (8 cells, 3) of the undistorted prototype."""
    cell, cations, shift = PROTOTYPES[material.prototype]
    one = np.concatenate([cations, cations + shift])
    above = np.array([0, 0, 1 / material.cells])
    fractional = np.concatenate([one * [1, 1, 1 / material.cells] + k * above for k in range(material.cells)])
    return cell * material.lattice_constant * np.array([[1], [1], [material.cells]]), fractional


def distorted(
    material: Material, rng: np.random.Generator, strain: float, rattle: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cell and positions (angstrom) under a random symmetric strain and random displacements of these mean sizes."""
    cell, fractional = ideal(material)
    deformation = rng.normal(0.0, strain, (3, 3))
    cell = np.round(cell @ (np.eye(3) + (deformation + deformation.T) / 2), 8)
    return cell, np.round(fractional @ cell + rng.normal(0.0, rattle, fractional.shape), 8)


def structure_dict(
    numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, site_properties: list[dict] | None = None
):
    """The dictionary that pymatgen writes for a structure: all keys of the published files."""
    lengths = np.linalg.norm(cell, axis=1)
    cosines = [cell[i] @ cell[j] / lengths[i] / lengths[j] for i, j in ((1, 2), (0, 2), (0, 1))]
    fractional = positions @ np.linalg.inv(cell)
    lattice = {
        "matrix": cell.tolist(),
        "pbc": [True, True, True],
        **dict(zip("abc", lengths.tolist(), strict=True)),
        **dict(zip(("alpha", "beta", "gamma"), np.degrees(np.arccos(cosines)).tolist(), strict=True)),
        "volume": float(abs(np.linalg.det(cell))),
    }
    sites = [
        {
            "species": [{"element": SYMBOLS[z], "occu": 1}],
            "abc": fractional[i].tolist(),
            "properties": site_properties[i] if site_properties else {},
            "label": SYMBOLS[z],
            "xyz": positions[i].tolist(),
        }
        for i, z in enumerate(numbers)
    ]
    module = {"@module": "pymatgen.core.structure", "@class": "Structure"}
    return {**module, "charge": 0.0, "lattice": lattice, "properties": {}, "sites": sites}


KBAR = 1602.1766208  # in one eV/angstrom^3


def vasp_stress(stress: np.ndarray) -> list:
    """Stress as VASP writes it: (3, 3) in kbar, positive under compression."""
    return (-KBAR * stress).tolist()

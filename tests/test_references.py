"""Reference energies: planted answers are found, what the data cannot say is said, and the way back is exact."""

import json
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multifid.store import references
from multifid.store.references import References, count_elements, fit, fit_by

HCNO = [1, 6, 7, 8]


def totals(counts: np.ndarray, energies: dict[int, float], elements: list[int]) -> np.ndarray:
    """Total energies in exact arithmetic, rounded once."""
    exact = [Fraction(energies[z]) for z in elements]
    return np.array([float(sum(int(n) * e for n, e in zip(row, exact, strict=True))) for row in counts])


def recovered(references: References, counts: np.ndarray, elements: list[int]) -> np.ndarray:
    return totals(counts, references.energies, elements)


@pytest.mark.parametrize("size", [1.0, 1e3, 2e5])
def test_planted_energies_of_compositions_come_back_to_a_nano_ev(size):
    random = np.random.default_rng(0)
    planted = dict(zip(HCNO, -size * random.uniform(0.1, 1.0, 4), strict=True))
    counts = random.integers(0, 4, (300, 4)) + np.eye(4, dtype=int)[random.integers(0, 4, 300)]
    energies = totals(counts, planted, HCNO)
    assert size < 2e5 or np.abs(energies).max() > 8e5
    found = fit([(counts.astype(float), energies)], HCNO)
    assert np.abs(recovered(found, counts, HCNO) - energies).max() < 1e-9
    assert found.rank == 4 and found.undetermined == [] and found.residual < 1e-6
    assert max(abs(found.energies[z] - planted[z]) for z in HCNO) < 1e-9


def test_collinear_elements_are_grouped_and_the_others_still_come_back():
    """Na and Cl only ever 1:1, Ti and O only ever 1:2, H and C freely, Au alone with C."""
    elements = [1, 6, 8, 11, 17, 22, 79]
    planted = dict(zip(elements, [-13.6, -1030.2, -2041.4, -4421.5, -12520.3, -23120.7, -19.3], strict=True))
    random = np.random.default_rng(1)
    free = random.integers(0, 6, (400, 5))  # H, C, NaCl, TiO2, Au
    free = free[free.sum(axis=1) > 0]
    counts = np.stack([free[:, 0], free[:, 1], 2 * free[:, 3], free[:, 2], free[:, 2], free[:, 3], free[:, 4]], axis=1)
    energies = totals(counts, planted, elements)
    found = fit([(counts.astype(float), energies)], elements)
    assert found.undetermined == [[8, 22], [11, 17]]
    assert found.rank == 5
    assert all(abs(found.energies[z] - planted[z]) < 1e-9 for z in (1, 6, 79))
    assert np.abs(recovered(found, counts, elements) - energies).max() < 1e-9
    assert found.energies[11] == pytest.approx(found.energies[17], abs=1e-9)  # min-norm shares equally
    assert found.energies[8] == pytest.approx(2 * found.energies[22], abs=1e-9)
    table = np.array([[direction.get(z, 0.0) for z in elements] for direction in found.null_space])
    np.testing.assert_allclose(table @ table.T, np.eye(2), atol=1e-12)
    trial = np.concatenate([random.integers(0, 3, (40, 7)), counts[:40]])  # determined: in the span of the data
    inside = [np.linalg.matrix_rank(np.vstack([counts, row])) == 5 for row in trial]
    assert inside == (np.linalg.norm(trial @ table.T, axis=1) < 1e-9).tolist() and not all(inside)
    assert References.from_manifest(json.loads(json.dumps(found.to_manifest()))) == found


def test_the_fit_is_the_minimum_norm_solution_of_numpy():
    random = np.random.default_rng(2)
    counts = random.integers(0, 5, (50, 4)).astype(float)
    counts[:, 3] = counts[:, 2]
    counts[:, 0] += 1
    energies = counts @ [-13.0, -1000.0, -1500.0, -2000.0] + random.normal(0, 1, 50)
    atoms = counts.sum(axis=1)
    expected = np.linalg.pinv(counts / atoms[:, None]) @ (energies / atoms)
    found = fit([(counts, energies)], HCNO)
    np.testing.assert_allclose([found.energies[z] for z in HCNO], expected, atol=1e-8)
    left = (energies - counts @ expected) / atoms
    assert found.residual == pytest.approx(1000 * np.sqrt(np.mean(left**2)), rel=1e-9)


def test_chunks_do_not_change_the_fit():
    random = np.random.default_rng(3)
    counts = random.integers(1, 9, (1000, 4)).astype(float)
    energies = counts @ [-13.0, -1000.0, -1500.0, -2000.0] + random.normal(0, 1, 1000)
    whole = fit([(counts, energies)], HCNO)
    cuts = [0, 1, 2, 50, 50, 700, 1000]
    pieces = [(counts[a:b], energies[a:b]) for a, b in pairwise(cuts)]
    runs = [pieces[:2], pieces[3:4], pieces[2:3] + pieces[4:]]  # one of them without a row
    for parts in (fit(pieces, HCNO), fit_by(lambda once: map(once.fold, runs), HCNO)):
        np.testing.assert_allclose([parts.energies[z] for z in HCNO], [whole.energies[z] for z in HCNO], atol=1e-9)
        assert parts.residual == pytest.approx(whole.residual, rel=1e-10)


@pytest.mark.parametrize("most", [1, 40, 1 << 13])
def test_structures_of_one_composition_count_one_by_one(monkeypatch, most):
    monkeypatch.setattr(references, "MOST_ROWS", most)
    random = np.random.default_rng(5)
    compositions = random.integers(0, 4, (60, 4)) + np.array([1.0, 0.0, 0.0, 0.0])
    counts = compositions[random.integers(0, 60, 3000)]
    energies = counts @ [-13.0, -1000.0, -1500.0, -2000.0] + random.normal(0, 3, 3000)
    atoms = counts.sum(axis=1)
    expected = np.linalg.lstsq(counts / atoms[:, None], energies / atoms)[0]
    found = fit([(counts[a : a + 700], energies[a : a + 700]) for a in range(0, 3000, 700)], HCNO)
    np.testing.assert_allclose([found.energies[z] for z in HCNO], expected, atol=1e-8)
    left = (energies - counts @ expected) / atoms
    assert found.residual == pytest.approx(1000 * np.sqrt(np.mean(left**2)), rel=1e-9)


def test_one_structure_in_a_hundred_thousand_determines_its_element():
    counts = np.tile([[4.0, 1.0, 0.0]], (100_000, 1))
    counts[::2, 0] = 6.0
    counts[77] = [0.0, 99.0, 1.0]
    planted = np.array([-13.5, -1030.0, -2000.0])
    found = fit([(counts, counts @ planted)], [1, 6, 8])
    assert found.undetermined == [] and found.rank == 3
    assert found.energies[8] == pytest.approx(-2000.0, abs=1e-6)


def test_isolated_atoms_override_and_the_rest_is_fitted_to_what_remains():
    random = np.random.default_rng(4)
    counts = random.integers(1, 5, (40, 3)).astype(float)
    planted = np.array([-13.0, -1030.0, -2040.0])
    energies = counts @ planted
    found = fit([(counts, energies)], [1, 6, 8], {6: -1030.0, 92: -5.0})
    assert found.energies[6] == -1030.0 and set(found.energies) == {1, 6, 8}
    assert found.energies[1] == pytest.approx(-13.0, abs=1e-9)
    assert found.rank == 3 and found.undetermined == []
    water = np.array([[2.0, 1.0], [4.0, 2.0]])
    assert fit([(water, water @ [-13.0, -2040.0])], [1, 8]).undetermined == [[1, 8]]
    fixed = fit([(water, water @ [-13.0, -2040.0])], [1, 8], {1: -13.0})
    assert fixed.undetermined == [] and fixed.energies[8] == pytest.approx(-2040.0, abs=1e-9)


def test_an_element_of_no_structure_gets_no_energy_and_no_group():
    counts = np.array([[1.0, 0.0], [2.0, 0.0]])
    found = fit([(counts, counts @ [-5.0, 0.0])], [3, 4])
    assert found.energies == {3: pytest.approx(-5.0)} and found.undetermined == [] and found.rank == 1
    assert found.null_space == []


def test_a_fit_to_nothing_is_refused():
    with pytest.raises(ValueError, match="no structure of the train split"):
        fit([(np.zeros((0, 1)), np.zeros(0))], [1])


REFERENCES = References({1: -13.6, 6: -1036.27, 8: -2045.8}, [], 3, 0.0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30), st.integers(1, 20), st.floats(0.5, 1.99)), min_size=1)
)
def test_restore_undoes_align_bit_for_bit(rows):
    """For energies of the size of the references (the aligned energy is not larger than the total)."""
    natoms = np.array([h + c + o for h, c, o, _ in rows])
    numbers = np.concatenate([[1] * h + [6] * c + [8] * o for h, c, o, _ in rows])
    energies = REFERENCES.total(numbers, natoms) * [1 / f if f > 1 else 2 * f for *_, f in rows]
    aligned = REFERENCES.align(energies, numbers, natoms)
    assert (np.abs(aligned) <= np.abs(energies)).all()
    assert (REFERENCES.restore(aligned, numbers, natoms) == energies).all()


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6))
def test_restore_undoes_align_to_rounding_for_any_energy(energy):
    numbers, natoms = np.array([8, 1, 1]), np.array([3])
    aligned = REFERENCES.align([energy], numbers, natoms)
    assert abs(REFERENCES.restore(aligned, numbers, natoms)[0] - energy) <= np.spacing(np.abs(aligned[0]))


def test_a_reference_energy_depends_on_the_composition_alone():
    random = np.random.default_rng(5)
    references = References({int(z): -random.uniform(1, 4e4) for z in range(1, 90)}, [], 89, 0.0)
    structures = [random.integers(1, 90, n) for n in random.integers(1, 200, 64)]
    natoms = np.array([len(s) for s in structures])
    together = references.total(np.concatenate(structures), natoms)
    for structure, total in zip(structures, together, strict=True):
        alone = references.total(random.permutation(structure), np.array([len(structure)]))
        assert alone[0] == total
        exact = sum(Fraction(references.energies[int(z)]) for z in structure)
        assert abs(Fraction(float(total)) - exact) < Fraction(1, 10**9)


def test_an_element_without_reference_has_no_aligned_energy():
    aligned = REFERENCES.align([-100.0, -20.0], np.array([1, 92, 1, 1]), np.array([2, 2]))
    assert np.isnan(aligned[0]) and aligned[1] == pytest.approx(7.2, abs=1e-9)


def test_elements_are_counted_structure_by_structure():
    counts = count_elements(np.array([8, 1, 1, 6, 8]), np.array([3, 0, 2]), [1, 8])
    assert counts.tolist() == [[2, 1], [0, 0], [0, 1]]


def test_references_survive_the_manifest():
    references = fit([(np.array([[1.0, 1.0], [2.0, 2.0]]), np.array([-9.3, -18.6]))], [11, 17])
    assert References.from_manifest(json.loads(json.dumps(references.to_manifest()))) == references

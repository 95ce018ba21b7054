"""The checks that hold encoders to their contract (`model/contract.py`), for encoders of any package.

In the tests of an encoder's own package, with pytest:

    import pytest
    from multifid.model.suite import cases

    @pytest.mark.parametrize("case", cases({"name": "mine", "layers": 2, "hidden": 12}), ids=str)
    def test_the_encoder_keeps_the_contract(case):
        case()

Without pytest, `check_encoder("mine")` makes all checks and names those that fail. Take a small encoder, of two layers
of a few channels. Its package must be installed, so that the entry point is found.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from multifid.model.suite import derivatives, domains, numerics, symmetry
from multifid.model.suite.samples import EncoderKeys, Forces

Check = Callable[[EncoderKeys, Forces], None]

CHECKS: tuple[Check, ...] = (
    symmetry.rotation_reflection_translation,
    symmetry.lattice_translation,
    symmetry.permutation,
    symmetry.batching,
    symmetry.extensivity,
    symmetry.supercell,
    symmetry.images_of_one_atom,
    symmetry.continuity_at_the_cutoff,
    domains.halves_of_a_system,
    derivatives.gradients_are_slopes,
    derivatives.one_atom_and_no_edge,
    derivatives.no_atoms,
    derivatives.missing_labels,
    derivatives.modes,
    derivatives.recomputation,
    numerics.float32,
    numerics.bfloat16,
    numerics.exportable,
    numerics.charge_and_spin,
    numerics.size_of_untrained_predictions,
    numerics.weights_depend_on_the_seed_alone,
)
WITH_ONE_FORCE_MODE: dict[Forces, tuple[Check, ...]] = {
    "direct": (symmetry.degrees_of_features, numerics.charge_and_spin_are_learned, numerics.readouts_of_layers),
    "conservative": (symmetry.momentum, derivatives.forces_are_slopes, derivatives.stress_is_a_slope),
}


@dataclass(frozen=True)
class Case:
    """One check of one encoder; AssertionError says what does not hold."""

    check: Check
    encoder: EncoderKeys
    forces: Forces

    def __call__(self) -> None:
        self.check(self.encoder, self.forces)

    def __str__(self) -> str:
        return f"{self.check.__name__}-{self.forces}"


def cases(encoder: str | Mapping[str, Any]) -> list[Case]:
    """All checks of an encoder, with both force modes. encoder: its name, or what stands under `model.encoder`."""
    keys = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
    return [Case(check, keys, forces) for forces, more in WITH_ONE_FORCE_MODE.items() for check in (*CHECKS, *more)]


def check_encoder(encoder: str | Mapping[str, Any]) -> None:
    """AssertionError names all checks that the encoder fails, and why."""
    failed = []
    for case in cases(encoder):
        try:
            case()
        except Exception as error:  # of somebody's encoder: whatever it is, the other checks are made
            failed.append(f"{case}: {'' if isinstance(error, AssertionError) else type(error).__name__ + ': '}{error}")
    if failed:
        raise AssertionError(f"{encoder} fails {len(failed)} of {len(cases(encoder))} checks:\n" + "\n".join(failed))

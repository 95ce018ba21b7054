"""What a prediction must at least beat: reference energies, zero forces, zero stress, on the very same labels."""

from collections.abc import Sequence

from multifid.evaluation.matrix import BASELINE, REFERENCES, TWO_LEVEL, UNITS, Row, own_model

KEPT = ("data", "split", "structures", "atoms", "counted_structures", "unseen", "source")


def with_references(rows: Sequence[Row]) -> list[Row]:
    """The rows after those of a model that predicts nothing, where all on a dataset were compared on the same labels.

    Rows of models differ in that where elements that one of them has not seen are left out.
    """
    errors = [key.removeprefix("zero_") for key in (rows[0] if rows else {}) if key.startswith("zero_")]
    added = []
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == data]
        first = of_data[0]
        if all(row["counted_structures"] == first["counted_structures"] for row in of_data):
            values = {key: first[f"zero_{key}"] for key in errors}
            added.append({"model": REFERENCES, **{key: first[key] for key in KEPT}, "unseen_structures": 0, **values})
    return [*added, *rows]


def no_better(rows: Sequence[Row]) -> list[str]:
    """A line for each model and dataset with an error that is not below the one of predicting nothing."""
    lines = []
    for row in rows:
        told = []
        for quantity, nothing in (
            ("energy", "reference energies"),
            ("forces", "zero forces"),
            ("stress", "zero stress"),
        ):
            mae, zero = row.get(f"{quantity}_mae"), row.get(f"zero_{quantity}_mae")
            if mae is not None and zero is not None and not mae < zero:
                told.append(f"{quantity} {1000 * mae:.3g}, {nothing} alone {1000 * zero:.3g} m{UNITS[quantity]}")
        if told:
            lines.append(f"warning: {row['model']} is no better than nothing on {row['data']}: {'; '.join(told)}")
    return lines


def no_better_in_study(rows: Sequence[Row]) -> list[str]:
    """`no_better` for the models of a study, each on the datasets that it was trained on, seed by seed."""
    of_own = [row for row in rows if row["model"] in (TWO_LEVEL, BASELINE, own_model(row["data"]))]
    return no_better([row | {"model": f"{row['model']} (seed {row['seed']})"} for row in of_own])

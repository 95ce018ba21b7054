"""What readers yield, one structure at a time."""

from collections.abc import Iterable, Iterator

import numpy as np

from multifid.readers.contract import Record, Skip
from multifid.store.block import Block, tasks_of
from multifid.structures.structure import Labels, Structure


def expanded(found: Iterable[Record]) -> Iterator[Record]:
    """Blocks as the structures that they hold; one without any label is the skip that prepare makes of it."""
    for record in found:
        if not isinstance(record, Block):
            yield record
            continue
        columns, first = record.columns, record.first_atoms()
        for i, where in enumerate(record.sources):
            atoms = slice(int(first[i]), int(first[i] + record.natoms[i]))
            labels = {}
            for task in tasks_of(columns):
                energy, forces = columns[f"labels/{task}/energy"][i], columns.get(f"labels/{task}/forces")
                own = None if forces is None or np.isnan(forces[atoms]).all() else forces[atoms]
                if own is not None or not np.isnan(energy):
                    labels[task] = Labels(float(energy), own)
            numbers, positions = columns["numbers"][atoms], columns["positions"][atoms]
            charge = int(columns["charge"][i]) if "charge" in columns else None
            yield (
                Structure(numbers, positions, labels, str(columns["relative"][i]), where, charge=charge)
                if labels
                else Skip("no label", where)
            )

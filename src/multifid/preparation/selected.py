"""A store of given structures, whose splits, reference energies and scale are given too: nothing is fitted."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from multifid.preparation.survey import sample_edges
from multifid.store.block import Block
from multifid.store.store import Store
from multifid.store.writer import StoreWriter
from multifid.structures.structure import SPLITS


def write_selected(
    out: Path,
    blocks: Iterable[Block],
    split: np.ndarray,
    tasks: dict[str, dict[str, Any]],
    source: dict[str, Any],
    more: dict[str, Any],
) -> Store:
    """Write and open a store. FileExistsError where `out` exists.

    blocks: valid structures with their labels.  split: (structures,) codes, as in `SPLITS`.  tasks: what the manifest
    says of every label set; labels are counted here.  source: a name and what else is known of where they are from.
    more: further keys of the manifest.
    """
    with StoreWriter(out) as writer:
        for block in blocks:
            writer.append_block(block)
        fields = writer.seal()
        counts = {name: int((split == code).sum()) for code, name in enumerate(SPLITS)}
        kept = {
            name: {**about, "labels": {**about["labels"], **writer.labels[name]}}
            for name, about in tasks.items()
            if name in writer.labels
        }
        writer.commit(
            split,
            {
                "source": {
                    "format": "store",
                    "files": [{"bytes": 0, "xxh3": "", **source, "structures": writer.structures}],
                    "options": {},
                },
                "tasks": kept,
                "splits": {**counts, "seed": 0, "rule": "given", "fractions": [0, 0, 0], "unseen_elements": []},
                "edges_per_atom": sample_edges(fields, split),
                **more,
            },
        )
    return Store(out)

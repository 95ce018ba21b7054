"""`multifid merge`, `multifid subset`: stores from stores, which know their parents. `add`: stores that grow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.preparation.append import append
from multifid.preparation.prepare import prepare
from multifid.preparation.preview import format_of
from multifid.preparation.summary import summary
from multifid.store.store import Store


def merge(stores: Sequence[Path], out: Path, workers: int = 1) -> Store | None:
    """One store of the structures of several, one after the other, with the splits that they have there.

    Tasks of one name must be of one level of theory (ValueError) and become one. Relatives of a test structure that are
    trained on in another parent stay where they are: `multifid check` finds them.
    """
    if len(stores) < 2:
        raise ValueError("merge needs two stores or more")
    return prepare("store", stores, out, workers=workers, trust_units=True, keep_splits=True)


def subset(
    store: Path, out: Path, where: Sequence[str] = (), workers: int = 1, sizes: Mapping[str, int] = {}, seed: int = 0
) -> Store | None:
    """A store of the structures that satisfy all conditions (see `readers.stores`). ValueError where none does.

    sizes: split -> at most so many of its structures, drawn by the seed; those of fewer are among those of more.
    """
    if not where and not sizes:
        raise ValueError("subset needs a condition, --where 'atoms <= 50', or a size, --train 100")
    options = {"where": "; ".join(where), **sizes, "seed": seed}
    return prepare("store", [store], out, options=options, workers=workers, trust_units=True, keep_splits=True)


def add(
    store: Path | str,
    inputs: Sequence[Path | str],
    *,
    format: str = "auto",
    task: str | None = None,
    train: Sequence[Path] = (),
    validation: Sequence[Path] = (),
    test: Sequence[Path] = (),
    fractions: tuple[float, float, float] | None = None,
    refit: bool = False,
    level_of_theory: str | None = None,
    options: Mapping[str, Any] | None = None,
    drop_duplicates: bool = False,
    trust_units: bool = False,
    workers: int = 1,
    quiet: bool = False,
) -> Store:
    """Add files to a store as a new part behind it; nothing that is stored is written again (`preparation.append`).

    Args:
        store: the store. Runs that began with it go on with what it held then.
        inputs: files, directories or patterns; [] where all are given by split.
        format: as for `prepare`; auto: as the first input looks.
        task: the label set that they belong to; default: the store's, where it has only one.
        train: inputs that are all training split; validation, test: likewise.
        fractions: of relatives that the store does not have; default: as when it was prepared.
        refit: fit reference energies and scale again, to all structures; else they are kept.
        level_of_theory: of the files, where it is not the format's; it must be the store's.
        options: of the format.
        drop_duplicates: set aside what repeats a stored structure, or one before it.
        trust_units: add them though their units look wrong.
        workers: processes that read.
        quiet: print nothing.

    Raises:
        ValueError: for what a user can mend; the store is then as it was. (OSError where files cannot be used.)
    """
    given = {
        name: list(files) for name, files in (("train", train), ("validation", validation), ("test", test)) if files
    }
    known = format_of(format, [Path(path) for files in (inputs, *given.values()) for path in files])

    def part(out: Path, onto: Store) -> Store | None:
        splits = onto.manifest["splits"]
        as_before = splits.get("fractions", (0.8, 0.1, 0.1))
        return prepare(
            known,
            list(inputs),
            out,
            task=task or (onto.tasks[0] if len(onto.tasks) == 1 else None),
            files_of_split=given,
            fractions=fractions or (as_before[0], as_before[1], as_before[2]),
            seed=splits.get("seed", 0),
            options=dict(options or {}),
            level_of_theory=level_of_theory,
            trust_units=trust_units,
            drop_duplicates=drop_duplicates,
            onto=onto,
            workers=workers,
            progress=not quiet,
            talk=False,
        )

    whole = append(store, part, refit)
    if not quiet:
        _say(whole)
    return whole


def _say(store: Store) -> None:
    """What was added, and what the store holds now."""
    console, added = Console(), store.manifest["parts"][-1]
    console.print(summary(store))
    console.print(f"added: {added['structures']:,} structures, addition {store.additions}", highlight=False)
    for task, meV in added.get("deviation", {}).items():
        own = store.manifest["tasks"][task]["residual"]
        console.print(
            f"{task}: reference energies were kept; new energies deviate by {meV:.3g} meV/atom (RMS) from them, "
            f"those that they were fitted to by {own:.3g} (--refit fits them to all)",
            highlight=False,
        )

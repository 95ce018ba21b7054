"""What a store holds, in one table for people: printed by `prepare`."""

from typing import Any

from rich.table import Table

from multifid.store.store import Store
from multifid.structures.elements import SYMBOLS
from multifid.structures.structure import SPLITS

NOT_TAKEN = "not taken"  # topic of the manifest's notes
SHOWN = 10  # reference energies that are listed one by one
GPA = 160.21766208  # 1 eV/angstrom^3
SPREAD = 0.8  # ratios that are spread more say little
RATIOS = {  # what `measure` measures, in words
    "lengths": "{} covalent bonds between neighbours",
    "stretch": "X-H bonds {} times as stiff as known",
    "work": "energy changes by {} times the work of the forces",
    "stress_work": "energy changes by {} times the work of the stress",
    "fit_energy": "energies differ {} times as much as a pair potential fitted to the forces says",
    "fit_stress": "stress {} times what that pair potential says",
}
FAR = {"energy": (1000.0, "meV/atom"), "forces": (1.0, "eV/angstrom"), "stress": (GPA, "GPa")}


def summary(store: Store) -> Table:
    """A table of two columns: counts, splits, labels and reference energies of each task, what was skipped and why."""
    manifest = store.manifest
    table = Table(title=str(store.path), show_header=False, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    table.add_row("structures, atoms", f"{store.structures:,}, {store.atoms:,}")
    if store.additions:
        table.add_row("in parts", ", ".join(f"{part.structures:,}" for part in store.parts.each))
    table.add_row("elements", " ".join(SYMBOLS[z] for z in store.elements))
    splits = manifest["splits"]
    table.add_row("splits", ", ".join(f"{name} {splits[name]:,}" for name in SPLITS) + f" ({splits['rule']})")
    if splits.get("duplicates"):
        table.add_row("duplicates set aside", f"{splits['duplicates']:,}")
    for name, task in manifest["tasks"].items():
        labels = ", ".join(f"{kind} {count:,}" for kind, count in task["labels"].items() if count)
        table.add_row(f"task {name}", f"{task['level_of_theory']}, {task['energy_kind']}: {labels}")
        if "property" in task:
            table.add_row("  subtracted, scale", f"{_subtracted(task)}, {task['scale']:.4g}" + _fitted_on(store))
            continue
        table.add_row("  references", _references(task) + _fitted_on(store))
        table.add_row("  scale", f"{task['scale']:.4g} {'eV/angstrom' if task['labels']['forces'] else 'eV/atom'}")
    for what in ("skipped", "dropped_labels", "assumed"):
        for reason, count in manifest.get(what, {}).items():
            first = manifest.get("skipped_first", {}).get(reason) if what == "skipped" else None
            table.add_row(what.replace("_", " "), f"{count:,}: {reason}" + (f" (first: {first})" if first else ""))
    for what, line in told(manifest.get("measured", {})).items():
        table.add_row(f"measured, {what}", line)
    for name, kinds in manifest.get("outliers", {}).items():
        for kind, found in kinds.items():
            table.add_row(f"outliers, {name}", _outliers(kind, found))
    for topic, texts in manifest.get("notes", {}).items():
        if topic != NOT_TAKEN:
            table.add_row(topic, ", ".join(f"{text} ({count:,})" for text, count in texts.items()))
    for doubt in manifest.get("doubts", []):
        table.add_row("doubtful, but trusted", doubt)
    edges = manifest["edges_per_atom"]
    table.add_row(
        "edges per atom", ", ".join(f"{value:.1f} within {cutoff} angstrom" for cutoff, value in edges.items())
    )
    return table


def told(measured: dict[str, dict[str, dict[str, float]]]) -> dict[str, str]:
    """Of the manifest's `measured`, the ratios that say something, in words: geometry or task -> line."""
    lines = {}
    for what, own in measured.items():
        believed = {name: own[name] for name in RATIOS if name in own and own[name]["spread"] <= SPREAD}
        said = [f"{RATIOS[n].format(format(m['ratio'], '.3g'))} ({m['count']:,})" for n, m in believed.items()]
        if said:
            lines[what] = "; ".join(said)
    return lines


def _outliers(kind: str, found: dict) -> str:
    factor, unit = FAR[kind]
    worst = found["worst"][0]
    return (
        f"{found['count']:,}: {kind} far from the median of {factor * found['median']:.3g} {unit} "
        f"(worst: {factor * worst['value']:.4g}, {worst['source']}; multifid check lists them)"
    )


def not_taken(store: Store) -> list[str]:
    """What looks like labels in the files and is not in the store, a line each: with the options that take it."""
    told = store.manifest.get("notes", {}).get(NOT_TAKEN, {})
    return [f"not taken, in {count:,} structures: {text}" for text, count in told.items()]


def _fitted_on(store: Store) -> str:
    """A word where references could not be fitted to a train split."""
    return "" if store.fitted_on == "train" else f"\nfitted to the {store.fitted_on} split: there is no train split"


def _subtracted(task: dict[str, Any]) -> str:
    """What is subtracted of a property; of classes, how many structures each has."""
    about, values = task["property"], {int(z): e for z, e in task["references"].items()}
    if about["kind"] == "class":
        return ", ".join(f"{name} {n:,}" for name, n in zip(about["classes"], about["counts"], strict=True))
    if about["kind"] == "intensive":
        return f"mean {next(iter(values.values()), 0.0):.5g}"
    listed = ", ".join(f"{SYMBOLS[z]} {values[z]:.4g}" for z in sorted(values)[:SHOWN])
    return (listed + (", ..." if len(values) > SHOWN else "")) or "nothing"


def _references(task: dict) -> str:
    energies = [(energy, SYMBOLS[int(z)]) for z, energy in task["references"].items()]
    if len(energies) <= SHOWN:
        listed = ", ".join(f"{symbol} {energy:.4f}" for energy, symbol in energies)
    else:
        (low, first), (high, last) = min(energies), max(energies)
        listed = f"{len(energies)} elements, from {first} {low:.4f} to {last} {high:.4f}"
    text = f"{listed} eV (rank {task['rank']}, residual {task['residual']:.1f} meV/atom)"
    if task["undetermined"]:
        groups = ["-".join(SYMBOLS[z] for z in group) for group in task["undetermined"]]
        text += f"\nnot determined separately: {'; '.join(groups[:SHOWN])}"
        text += f" and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
    return text

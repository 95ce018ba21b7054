"""The second pass of `prepare`: doubt, divide, fit, count, and commit the store whose structures are all written."""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from multifid.preparation.append import refuse_foreign
from multifid.preparation.inputs import Input
from multifid.preparation.intake import Intake
from multifid.preparation.properties import survey_property
from multifid.preparation.split import Divided, NothingLeft, appended, divide, fitted, folded, set_unseen_aside
from multifid.preparation.survey import sample_edges, survey_task
from multifid.preparation.workers import Call, Workers
from multifid.quality.check import check_fields, geometries
from multifid.quality.doubts import Doubt
from multifid.quality.leakage import chunks, set_aside
from multifid.quality.outliers import outliers_of_fields
from multifid.store.array_file import Rows
from multifid.store.fields import file_checksum, files_of
from multifid.store.references import References
from multifid.store.store import Store
from multifid.store.writer import StoreWriter
from multifid.structures.structure import SPLITS


@dataclass(frozen=True)
class Rule:
    """How structures are divided into splits."""

    fractions: tuple[float, float, float]  # train, validation, test
    seed: int
    drop_duplicates: bool = False  # set those aside that repeat an earlier one
    kept: bool = False  # as the records say, whatever is empty then
    fold: tuple[int, int] | None = None  # (k, n): test is the k-th of n parts
    others: list[Store] = field(default_factory=list)  # and those that are trained on here and tested on there
    onto: Store | None = None  # the store that these structures are added to


def finish(
    writer: StoreWriter,
    intake: Intake,
    files: list[Input],
    asked: dict[str, Any],
    rule: Rule,
    trust_units: bool,
    pool: Workers,
) -> None:
    """All structures are written: doubt, divide, fit, count, commit."""
    fields = writer.seal()
    label_sets = {name: about for name, about in intake.label_sets.items() if name in writer.labels}
    levels = {name: about.level_of_theory for name, about in label_sets.items() if about.property is None}
    isolated = {name: intake.isolated.get(name, {}) for name in label_sets}
    judged: Call = (check_fields, (fields, levels, isolated))
    calls: list[Call] = [judged, *((file_checksum, (file.path,)) for file in files)]
    (checked, *sums), (split, splits) = pool.beside(calls, lambda: _divide(fields, intake, files, rule))
    if rule.onto is not None:
        refuse_foreign(rule.onto, label_sets, {file.name: own for file, own in zip(files, sums, strict=True)})
    doubts = _doubts(checked.doubts, trust_units, [file.name for file in files])
    tasks = {
        name: {
            "level_of_theory": labels.level_of_theory,
            "energy_kind": labels.energy_kind,
            "labels": writer.labels[name],
            **(
                survey_task(name, fields, split, writer.present, isolated[name], pool.each)
                if labels.property is None
                else survey_property(name, labels.property, fields, split, writer.present, pool.each)
            ),
            **({"isolated": {str(z): e for z, e in sorted(isolated[name].items())}} if isolated[name] else {}),
        }
        for name, labels in label_sets.items()
    }
    outliers = _outliers(tasks, fields, files, intake.structures_of_file, pool)
    writer.commit(
        split,
        {
            "source": {"format": asked["format"], "files": _sources(files, intake, sums), "options": asked["options"]},
            "tasks": tasks,
            "splits": splits,
            "edges_per_atom": sample_edges(fields, split),
            "skipped_first": dict(sorted(intake.examples.items())),
            "dropped_labels": dict(sorted(intake.dropped.items())),
            **({"assumed": dict(sorted(intake.assumed.items()))} if intake.assumed else {}),
            "measured": checked.to_manifest(),
            **({"outliers": outliers} if outliers else {}),
            **(
                {"notes": {k: dict(sorted(v.items())) for k, v in sorted(intake.notes.items())}} if intake.notes else {}
            ),
            **({"doubts": doubts} if doubts else {}),
        },
    )


def _outliers(
    tasks: dict[str, dict[str, Any]], fields: dict[str, Rows], files: list[Input], counts: list[int], pool: Workers
) -> dict[str, dict[str, Any]]:
    """Labels far from all others, by task and kind. counts: structures of each file."""
    ends = np.cumsum(counts)

    def place(structure: int) -> str:
        first, last = fields["source_id_offsets"][structure : structure + 2].tolist()
        source = fields["source_id"][first:last].tobytes().decode()
        return f"{files[int(np.searchsorted(ends, structure, side='right'))].name}: {source}"

    energies = {name: about for name, about in tasks.items() if "property" not in about}
    references = {name: References.from_manifest(about) for name, about in energies.items()}
    told: dict[str, dict[str, Any]] = {}
    for found in outliers_of_fields(fields, references, pool.each):
        told.setdefault(found.task, {})[found.kind] = found.to_manifest(place)
    return told


def _doubts(found: list[Doubt], trusted: bool, files: list[str]) -> list[str]:
    """What speaks against the declared units, one line each; a ValueError unless they are trusted."""
    if found and not trusted:
        listed = "\n  ".join(map(str, found))
        named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        raise ValueError(f"{named}: units are doubtful (--trust-units, where they are right all the same):\n  {listed}")
    return [str(doubt) for doubt in found]


def _divide(
    fields: dict[str, Rows],
    intake: Intake,
    files: list[Input],
    rule: Rule,
) -> tuple[np.ndarray, dict[str, Any]]:
    file = np.repeat(np.arange(len(files), dtype=np.uint32), intake.structures_of_file)
    given = [f.split for f in files]
    columns = (
        fields["relative"][:],
        fields["split"][:],
        file,
        given,
        intake.module.RELATIVE,
        rule.fractions,
        rule.seed,
    )
    aside: dict[str, int] = {}
    if rule.onto is not None:
        return _divide_onto(fields, intake, columns, rule, rule.onto)

    def divided_by(within: bool) -> tuple[Divided, list[int]]:
        if rule.fold is not None:
            kind, relative = intake.module.RELATIVE, fields["relative"][:]
            divided = folded(relative, file, kind, rule.fold, rule.fractions, rule.seed)
        else:
            divided = Divided(fields["split"][:], "as in the parents") if rule.kept else divide(*columns, within)
        if rule.drop_duplicates or rule.others:
            filled = set(divided.split.tolist())
            aside["duplicates"] = set_aside(divided.split, geometries(fields), rule.drop_duplicates, rule.others)
            for code in sorted(filled - set(divided.split.tolist())):
                raise ValueError(
                    f"every {SPLITS[code]} structure is a duplicate that is set aside: nothing is left of it"
                )
        return divided, set_unseen_aside(divided.split, fields["numbers"], fields["offsets"], intake.writer.present)

    try:
        divided, unseen = divided_by(within=False)
    except NothingLeft as nothing:  # as where each formula is one element
        try:
            divided, unseen = divided_by(within=True)
        except ValueError:
            raise nothing from None
    counts = {name: int((divided.split == code).sum()) for code, name in enumerate(SPLITS)}
    told: dict[str, Any] = {"seed": rule.seed, "rule": divided.rule, "fractions": list(rule.fractions)}
    if not counts["train"]:
        told["fitted_on"] = SPLITS[fitted(divided.split)[0]]
    return divided.split, {**counts, **told, "unseen_elements": unseen, **aside}


def _divide_onto(
    fields: dict[str, Rows], intake: Intake, columns: tuple[Any, ...], rule: Rule, onto: Store
) -> tuple[np.ndarray, dict[str, Any]]:
    """The splits of structures that are added to a store."""
    relative, published, file, given, kind, fractions, seed = columns
    stored = onto.field("relative"), onto.field("split")
    divided = appended(relative, published, file, given, kind, stored, fractions, seed)
    split, aside = divided.split, {}
    if rule.drop_duplicates:  # of what is stored, or of one before
        both = np.concatenate([stored[1], split])
        set_aside(both, chain(chunks(onto), geometries(fields)), True, [])
        aside["duplicates"] = int((both[len(stored[1]) :] != split).sum())
        split = both[len(stored[1]) :]
    trained = set(onto.elements) - set(onto.manifest["splits"].get("unseen_elements", [])) if onto.size("train") else ()
    unseen = set_unseen_aside(split, fields["numbers"], fields["offsets"], intake.writer.present, elsewhere=trained)
    counts = {name: int((split == code).sum()) for code, name in enumerate(SPLITS)}
    told = {"seed": seed, "rule": divided.rule, "fractions": list(fractions)}
    if not counts["train"]:
        told["fitted_on"] = SPLITS[fitted(split)[0]]
    return split, {**counts, **told, "unseen_elements": unseen, **aside}


def _sources(files: list[Input], intake: Intake, sums: list[str]) -> list[dict[str, Any]]:
    lineage = getattr(intake.module, "lineage", None)
    return [
        {
            "name": file.name,
            "bytes": sum(path.stat().st_size for path in files_of(file.path)),
            "xxh3": digest,
            "structures": count,
            **({"store": lineage(file.path)} if lineage else {}),
        }
        for file, digest, count in zip(files, sums, intake.structures_of_file, strict=True)
    ]

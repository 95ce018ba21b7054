"""`multifid sample`: five small sources made on the spot with real quantum chemistry, in the published file layouts.

    file                     layout of       what                                         level of theory
    ani1x.h5                 ANI-1x          distorted small molecules                    GFN2-xTB
    qm7x.hdf5                QM7-X           several molecules x displacements            IPEA1-xTB
    transition1x.h5          Transition1x    reaction paths between isomers               GFN1-xTB
    mptrj.json               MPtrj           snapshots of crystals of many elements       GFN1-xTB, periodic
    alexandria.json.bz2      Alexandria      relaxed cells ...                            GFN1-xTB, periodic
    alex_go.json.bz2                         ... and the trajectories that led there
    sources.json             what each file is, its level of theory, and what had to be skipped

The three molecular sources share molecules and differ in fidelity: after each has its own reference energies, GFN2-xTB
and IPEA1-xTB still differ by 0.07 eV/atom and 0.49 eV/angstrom, so that one head for all must fail where one branch for
each does not. The labels stand under the key names of the published files, where readers look for them; what they
really are says `sources.json` (and a root attribute of the HDF5 files): pass it to `multifid prepare
--level-of-theory`.

One file per source here, all alike: `jobs` (what to compute, decided by the seed alone), `compute` (one job, in any
process), `write` (the records of all jobs, in the order of the jobs).
"""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from multifid.workflows.sample import alexandria, ani1x, mptrj, qm7x, transition1x
from multifid.workflows.sample.xtb import JobResult, interface

# in the order of computing: the longest jobs first, the short ones fill the gaps at the end
SOURCES: tuple[ModuleType, ...] = (alexandria, mptrj, transition1x, qm7x, ani1x)


def sample(
    out: Path,
    *,
    seed: int = 0,
    structures: int = 300,
    workers: int | None = None,
    larger: bool = False,
    progress: bool = True,
) -> dict[str, dict]:
    """Make the five sources in the directory `out` and return what `sources.json` says of each file.

    `structures` is what each source has, about: `mptrj`, the most expensive one, has two thirds of it, `alexandria` as
    many as its relaxations take steps. What does not converge, or has a force above 30 eV/angstrom, is skipped and
    counted (a relaxation or a reaction that fails counts once).
    `larger`: only `ani1x.h5`, of molecules of 9 to 26 atoms, and `mptrj.json`, of cells of 16 and 24: sizes of
    published data, to measure speed with.
    The files depend on `seed`, `structures` and `larger`, not on `workers` (processes; default: one per core). Existing
    files of these names are replaced, each only when the new one is whole; `sources.json` comes last.

    Worker processes are spawned: a script that calls this needs the usual `if __name__ == "__main__":`.
    Raises ValueError without tblite (`pip install 'multifid[demo]'`).
    """
    if structures < 1:
        raise ValueError(f"structures must be at least 1, not {structures}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    from multifid.parallel.groups import one_thread_each  # here: the workers, which import this file, need no torch

    interface()  # says at once, and here rather than in a worker, what to install
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sources.json").unlink(missing_ok=True)

    spawned = multiprocessing.get_context("spawn")  # a forked child would inherit the parent's threads and locks
    with one_thread_each(), ProcessPoolExecutor(workers or _cores(), spawned) as pool:
        try:
            outcomes = _computed(pool, _jobs(structures, seed, larger), progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    said: dict[str, dict] = {}
    for source in (s for s in SOURCES if s.TASK in outcomes):
        said |= _written(out, source, outcomes[source.TASK], seed)
    with _whole((out / "sources.json",)) as (path,):
        path.write_text(json.dumps(said, indent=2) + "\n")
    return said


def _jobs(structures: int, seed: int, larger: bool) -> dict[ModuleType, list[tuple]]:
    """What is to be computed for each source, in the order of computing."""
    if larger:
        return {source: source.larger_jobs(structures, seed) for source in (mptrj, ani1x)}
    return {source: source.jobs(structures, seed) for source in SOURCES}


def _computed(
    pool: ProcessPoolExecutor, jobs_of: dict[ModuleType, list[tuple]], progress: bool
) -> dict[str, list[JobResult]]:
    """The outcomes of all jobs of all sources, in the order of the jobs."""
    futures = {s.TASK: [pool.submit(s.compute, *job) for job in jobs] for s, jobs in jobs_of.items()}
    everything = [future for each in futures.values() for future in each]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        jobs = bar.add_task("quantum chemistry", total=len(everything))
        for future in as_completed(everything):
            future.result()  # an error of one job ends the run at once
            bar.advance(jobs)
    return {task: [future.result() for future in each] for task, each in futures.items()}


def _written(out: Path, source: ModuleType, outcomes: list[JobResult], seed: int) -> dict[str, dict]:
    """Write a source's files, each under its name only when whole; what there is to say of each."""
    records = [record for outcome in outcomes for record in outcome.records]
    skipped: Counter[str] = sum((outcome.skipped for outcome in outcomes), Counter())
    if not records:
        raise ValueError(f"{source.TASK}: no structure could be computed: {dict(skipped)}")
    with _whole(tuple(out / name for name in source.FILES)) as paths:
        counts = source.write(paths, records, seed)
    about = {"format": source.FORMAT, "task": source.TASK, "level_of_theory": source.LEVEL_OF_THEORY}
    said = {}
    for name, count in zip(source.FILES, counts, strict=True):
        said[name] = about | {"structures": count, "skipped": dict(sorted(skipped.items())), "seed": seed}
        said[name]["made_by"] = f"multifid {_version('multifid')}, tblite {_version('tblite')}"
        skipped = Counter()  # of a source with two files, said once, at the first
    return said


@contextmanager
def _whole(paths: tuple[Path, ...]) -> Iterator[tuple[Path, ...]]:
    """Names to write to; renamed to `paths` when all is written, removed when something went wrong."""
    partial = tuple(path.with_name(f".{path.name}.partial") for path in paths)
    try:
        yield partial
        for now, path in zip(partial, paths, strict=True):
            now.replace(path)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "of an unknown version"

"""`multifid get [DATASET...]`: where published datasets are, how large, under which licence, what to cite."""

from collections.abc import Sequence

from rich.console import Console

from multifid.readers.published import PUBLISHED, Published


def get(names: Sequence[str] = (), console: Console | None = None) -> None:
    """Print what is known of the datasets that are named, or one line of each. ValueError for an unknown one."""
    console = console or Console()
    if unknown := [name for name in names if name not in PUBLISHED]:
        raise ValueError(f"no dataset {unknown[0]!r} is known: there are {', '.join(PUBLISHED)}")
    for name in names or PUBLISHED:
        lines = _lines(PUBLISHED[name]) if names else []
        for line in (f"{name}: {PUBLISHED[name].about}", *lines):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    if not names:
        console.print("multifid get DATASET: where it is, its licence and what to cite (nothing is downloaded)")


def _lines(one: Published) -> list[str]:
    """What is known, a line each; what the dataset's own pages do not say is named as such."""
    return [
        *(f"  download  {url}" for url in one.where),
        f"  size      {one.size or 'not stated; see there'}",
        f"  checksum  {one.checksum or 'not recorded'}",
        f"  licence   {one.licence or 'not stated here; see there before you share models or data'}",
        *(f"  cite      {text}" for text in one.citations),
        f"  source    {one.source}",
        f"  prepare   multifid prepare {one.prepare} --out STORE",
    ]

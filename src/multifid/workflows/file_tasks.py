"""Tasks whose `store` is a file: before a run begins it becomes a store in the cache, once, whoever asks.

`tasks.NAME.store: [FORMAT:]FILE` is prepared as `multifid prepare FORMAT FILE` does, and the run is that of its store,
to the bits. RUN/config.yaml names the store, so a run goes on, and is evaluated, without the file. A file that was
changed is another store; a run that began with the first one refuses it.
"""

from pathlib import Path

from rich.console import Console

from multifid.config import Config
from multifid.environment import cache_directory
from multifid.parallel import groups
from multifid.parallel.groups import World
from multifid.preparation.cache import Files, cached, place_of
from multifid.readers.formats import FORMATS
from multifid.readers.recognise import read_as_one
from multifid.store.fields import MANIFEST
from multifid.workflows.asked import parse

FRACTIONS = (0.8, 0.1, 0.1)  # of what no publication has divided, as `prepare` has it


def has_files(config: Config) -> bool:
    """Whether some task is not of a store."""
    return any(_is_file(task.store) for task in config.tasks.values())


def alone_with_stores(config: Config, console: Console) -> Config:
    """`with_stores` for what one process does, as a plan of a run."""
    if not has_files(config):
        return config
    with groups.world("cpu") as world:
        return with_stores(config, world, console)


def with_stores(config: Config, world: World, console: Console) -> Config:
    """The config with a store in place of every file. Called on all ranks.

    The first rank makes what is not there yet, then that of each other host where the cache lies on its own disk.
    ValueError or OSError as `prepare`.
    """
    files = {name: _files(name, task.store) for name, task in config.tasks.items() if _is_file(task.store)}
    places: dict[str, str] = {}
    with world.together():
        for name, one in files.items() if world.first else ():
            place = place_of(one, cache_directory())
            store, before = cached(one, place, progress=not console.quiet)
            how = "was prepared before" if before else "is prepared"
            line = f"{one.path} {how} as {one.format}: {store.structures:,} structures in {place}, for task {name}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            places[name] = str(place)
    places = world.share(places)
    with world.together():
        if world.rank == world.on_this_host()[0] and not world.first:
            for name, one in files.items():
                cached(one, Path(places[name]))
    tasks = {n: t.model_copy(update={"store": places.get(n, t.store)}) for n, t in config.tasks.items()}
    return config.model_copy(update={"tasks": tasks})


def _is_file(text: str) -> bool:
    path = Path(text)
    if (path / MANIFEST).exists():
        return False
    format, colon, _ = text.partition(":")
    return path.is_file() or read_as_one(path) or (bool(colon) and not path.exists() and format in FORMATS)


def _files(task: str, text: str) -> Files:
    one = parse(text, f"tasks.{task}.store: ")
    assert one.format is not None
    return Files(one.path, one.format, {}, fractions=FRACTIONS)

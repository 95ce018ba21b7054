"""The house keeps its floors: who imports whom, where the environment is read, that the map is complete.

Everything is read from the source text (`ast`); nothing of the package is imported.
"""

import ast
import copy
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "multifid"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "structures": 1,
    "graphs": 1.5,
    "store": 2,
    "readers": 2.3,
    "quality": 2.3,
    "feed": 2.3,
    "preparation": 2.6,
    "model": 2,
    "parallel": 2,
    "evaluation": 3,
    "training": 4,
    "apply": 5,
    "forecast": 5,
    "workflows": 5,
}
DATA = {"store", "readers", "quality", "feed", "preparation"}
APART = [DATA, {"model"}, {"parallel"}]  # rooms of one set never import those of another
ALONE = {"readers", "quality", "feed"}  # on one step, and none imports another
NOT_BELOW = {"evaluation": {"parallel"}}  # lower floors that a room does not need: reductions are handed to it
TOP = {"cli", "config", "environment", "__main__", "__init__"}  # the roof: compose the rooms; no room imports them...
# ... except the package's own __init__, which holds the version, and what the user set; neither imports anything.
SHARED = {"__init__", "environment"}


def _name(path: Path) -> str:
    parts = ("multifid", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}


def _room(module: str) -> str:
    """The room of a module (`data`), or its own name where it lies directly in the package (`cli`)."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(module: str, tree: ast.AST) -> list[tuple[str, int]]:
    """All modules that a tree imports, by absolute name, with the line. `from a import b` is a.b where that is one."""
    found = []
    package = module if MODULES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            inner = [f"{source}.{alias.name}" for alias in node.names]
            found += [(name if name in MODULES else source, node.lineno) for name in inner]
    return found


def _at_import(tree: ast.Module) -> ast.Module:
    """What runs when a module is imported: not the bodies of functions, not `if TYPE_CHECKING`."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            if "TYPE_CHECKING" in ast.dump(node.test):
                return None
            return self.generic_visit(node)

    return Strip().visit(copy.deepcopy(tree))


def _inner(module: str) -> list[tuple[str, int]]:
    return [(name, line) for name, line in _imports(module, TREES[module]) if name.split(".")[0] == "multifid"]


def _forbidden(importer: str, imported: str) -> str | None:
    """Why a room must not import another; None where it may."""
    if importer in TOP or importer == imported or imported in SHARED:
        return None
    if imported in TOP:
        # the trainer composes the run from the whole config; it is the one floor that sees the roof
        return None if imported == "config" and FLOORS[importer] >= 4 else f"{imported} is above every room"
    if FLOORS[imported] > FLOORS[importer]:
        return f"{imported} is floor {FLOORS[imported]}, above {importer} on floor {FLOORS[importer]}"
    if {importer, imported} <= ALONE:
        return f"{importer} and {imported} never import each other"
    if {importer, imported} <= set().union(*APART) and not any({importer, imported} <= rooms for rooms in APART):
        return f"{importer} and {imported} never import each other"
    if imported in NOT_BELOW.get(importer, ()):
        return f"{importer} does without {imported}"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    assert _room(module) in {*FLOORS, *TOP}, f"{module} is in no room of the house"
    wrong = [
        f"line {n}: {name} ({why})" for name, n in _inner(module) if (why := _forbidden(_room(module), _room(name)))
    ]
    assert not wrong, f"{module} imports what it must not: {'; '.join(wrong)}"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("structures", "graphs", False),
        ("graphs", "structures", True),
        ("store", "readers", False),
        ("quality", "readers", False),
        ("preparation", "quality", True),
        ("quality", "preparation", False),
        ("preparation", "model", False),
        ("model", "parallel", False),
        ("parallel", "feed", False),
        ("evaluation", "model", True),
        ("evaluation", "parallel", False),
        ("evaluation", "training", False),
        ("training", "evaluation", True),
        ("training", "config", True),
        ("model", "config", False),
        ("feed", "cli", False),
        ("workflows", "training", True),
        ("training", "workflows", False),
        ("cli", "workflows", True),
        ("cli", "forecast", True),
    ],
)
def test_the_rule_of_floors_is_the_designs(importer, imported, allowed):
    assert (_forbidden(importer, imported) is None) == allowed


def test_every_way_to_import_is_seen():
    source = (
        "from ..model import branch\nfrom . import store\nimport multifid.training.run as r\nfrom multifid import cli\n"
    )
    hidden = "def f():\n    from multifid.model.branch import Branch\n"
    seen = {name for name, _ in _imports("multifid.feed.order", ast.parse(source + hidden))}
    assert {_room(name) for name in seen} == {"model", "feed", "training", "cli"}
    assert not _imports("multifid.feed.order", _at_import(ast.parse(hidden)))


def test_no_module_imports_itself_in_a_circle():
    graph = {m: {n for n, _ in _imports(m, _at_import(TREES[m])) if n in MODULES and n != m} for m in MODULES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                walk(imported, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_of_the_rooms_of_data_only_the_loader_knows_torch():
    users = {m for m in MODULES if _room(m) in DATA for n, _ in _imports(m, TREES[m]) if n.split(".")[0] == "torch"}
    assert users <= {"multifid.feed.loader"}
    through = {m for m in MODULES if _room(m) in DATA for n, _ in _inner(m) if n == "multifid.feed.loader"}
    assert not through, "these modules import torch through the loader"


def test_the_environment_is_read_in_one_place():
    readers = set()
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}
            imported = isinstance(node, ast.ImportFrom) and {a.name for a in node.names} & {"environ", "getenv"}
            if attribute or imported:
                readers.add(module)
    assert readers <= {"multifid.environment", "multifid.parallel.launch", "multifid.parallel.groups"}


def test_nothing_read_from_a_file_can_be_executed():
    banned_calls = {"eval", "exec", "compile", "__import__"}
    banned_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in banned_calls:
                found.append(f"{module}:{node.lineno} calls {node.func.id}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "torch.save"}:
                found.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}, which is pickle")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                found.append(f"{module}:{node.lineno} allows pickle")
        found += [f"{module}:{n} imports {m}" for m, n in _imports(module, tree) if m.split(".")[0] in banned_modules]
    assert not found, found


def test_no_drawer_for_odds_and_ends():
    odd = {"util", "utils", "common", "helpers", "misc", "tools"}
    assert not [module for module in MODULES if odd & set(module.split("."))]


def _map_of_files(text: str) -> set[str]:
    """Files on the map: a fenced block that starts with `src/multifid/`, one file or folder a line, folders end in `/`.

    Indentation says what lies in which folder; what follows two spaces after the name is its caption.
    """
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = next((b.splitlines() for b in blocks if b.lstrip().startswith("src/multifid/")), None)
    assert lines, "ARCHITECTURE.md has no fenced block that starts with src/multifid/: the map of files"
    folders: list[tuple[int, str]] = []
    files = set()
    for line in filter(str.strip, lines):
        indent = len(line) - len(line.lstrip())
        name, _, caption = line.strip().partition("  ")
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        path = "".join(folder for _, folder in folders) + name
        if name.endswith("/"):
            folders.append((indent, name))
        else:
            assert caption.strip(), f"ARCHITECTURE.md: the map has no caption for {path}"
            files.add(path)
    return files


def test_a_map_is_read_by_its_indentation():
    block = "src/multifid/\n  cli.py     the commands\n  data/      floor 2\n    store.py   files\n    readers/\n"
    block += "      qm7x.py  xz\n"
    block += "  model/\n    layers.py  layers\n"
    names = ("cli.py", "data/store.py", "data/readers/qm7x.py", "model/layers.py")
    text = f"# multifid\n\n```\nmake demo\n```\n\n```text\n{block}```\n"
    assert _map_of_files(text) == {f"src/multifid/{name}" for name in names}
    with pytest.raises(AssertionError, match=r"no caption for src/multifid/cli\.py"):
        _map_of_files("```\nsrc/multifid/\n  cli.py\n```\n")


def test_the_map_is_complete():
    there = {str(path.relative_to(ROOT)) for path in FILES if path.read_text(encoding="utf-8").strip()}  # not the empty
    assert (ROOT / "ARCHITECTURE.md").exists(), "ARCHITECTURE.md with the map of files is missing"
    on_map = _map_of_files((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert there - on_map == set(), "files without a place on the map of ARCHITECTURE.md"
    assert on_map - {str(path.relative_to(ROOT)) for path in FILES} == set(), "the map names what is gone"

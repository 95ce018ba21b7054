"""multifid: one shared encoder, one branch for each source of quantum-mechanical data.

    import multifid

    store = multifid.prepare("extxyz", "mine.xyz", "data/mine")
    result = multifid.train("config.yaml")              result.run, result.best, result.rows, result.model()
    model = multifid.load("runs/demo")                  a trained run, or a model file
    out = model.predict(atoms, task="ani1x")            out.energy (eV), out.forces (eV/angstrom), out.stress
    atoms.calc = model.calculator(task="ani1x")         an ASE calculator; multifid.Calculator([...]) averages models
    rows = multifid.evaluate("runs/demo", "data/ani1x") errors of models on stores and files
    result = multifid.finetune("runs/demo", "mine.xyz", "runs/mine")    a trained model adapted to new data
    found = multifid.tune("tune.yaml")                  a search over keys of a config; found.best is a config to train
    store = multifid.Store("data/ani1x")                a prepared dataset
    config = multifid.Config.from_file("config.yaml")   everything that a run is told

Names are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multifid.apply.calculator import Calculator
    from multifid.apply.model import Model, load
    from multifid.config import Config
    from multifid.model.predictor import Output, Predictor
    from multifid.store.store import Store
    from multifid.workflows.evaluate import evaluate
    from multifid.workflows.finetune import finetune
    from multifid.workflows.prepare import prepare
    from multifid.workflows.train import Result, train
    from multifid.workflows.tune.outcome import Found
    from multifid.workflows.tune.search import tune

__version__ = "0.1.0"
__all__ = [
    "Calculator",
    "Config",
    "Found",
    "Model",
    "Output",
    "Predictor",
    "Result",
    "Store",
    "__version__",
    "evaluate",
    "finetune",
    "load",
    "prepare",
    "train",
    "tune",
]

_WHERE = {
    "Calculator": "multifid.apply.calculator",
    "Config": "multifid.config",
    "Found": "multifid.workflows.tune.outcome",
    "Model": "multifid.apply.model",
    "Output": "multifid.model.predictor",
    "Predictor": "multifid.model.predictor",
    "Result": "multifid.workflows.train",
    "Store": "multifid.store.store",
    "evaluate": "multifid.workflows.evaluate",
    "finetune": "multifid.workflows.finetune",
    "load": "multifid.apply.model",
    "prepare": "multifid.workflows.prepare",
    "train": "multifid.workflows.train",
    "tune": "multifid.workflows.tune.search",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'multifid' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

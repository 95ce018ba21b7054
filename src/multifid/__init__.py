"""multifid: one shared encoder, one branch for each source of quantum-mechanical data.

    import multifid

    result = multifid.train("config.yaml")              result.run, result.best, result.rows, result.model()
    model = multifid.load("runs/demo")                  a trained run, or a model file
    out = model.predict(atoms, task="ani1x")            out.energy (eV), out.forces (eV/angstrom), out.stress
    store = multifid.Store("data/ani1x")                a prepared dataset
    config = multifid.Config.from_file("config.yaml")   everything that a run is told

Names are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multifid.config import Config
    from multifid.model.predictor import Output, Predictor, load
    from multifid.store.store import Store
    from multifid.training.result import Result
    from multifid.workflows.train import train

__version__ = "0.1.0"
__all__ = ["Config", "Output", "Predictor", "Result", "Store", "__version__", "load", "train"]

_WHERE = {
    "Config": "multifid.config",
    "Output": "multifid.model.predictor",
    "Predictor": "multifid.model.predictor",
    "Result": "multifid.training.result",
    "Store": "multifid.store.store",
    "load": "multifid.model.predictor",
    "train": "multifid.workflows.train",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'multifid' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

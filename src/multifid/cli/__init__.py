"""The commands, in the order of the help."""

from multifid.cli import data, runs, models  # isort: skip
from multifid.cli.program import app, main

__all__ = ["app", "data", "main", "models", "runs"]

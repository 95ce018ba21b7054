"""What this user set for all of multifid: where caches lie, and whether and how C++ is compiled. Imports nothing."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this user's caches lie: $XDG_CACHE_HOME/multifid, else ~/.cache/multifid."""
    home = environment.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "multifid"


def native_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what encoders compute on edges may be compiled C++: not with MULTIFID_NATIVE=0."""
    return environment.get("MULTIFID_NATIVE", "1") != "0"


def compiler_named(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command in $CXX, in words; empty where there is none."""
    return shlex.split(environment.get("CXX", ""))

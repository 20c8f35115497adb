"""Allocators to run under: the system's, which returns large blocks of memory, and tcmalloc, which keeps them."""

import ctypes.util
import os
from collections.abc import Mapping

# By name, the library to preload; None is the system's own.
LIBRARIES = {"default": None, "tcmalloc": "tcmalloc_minimal"}
MISSING = "no tcmalloc here (Debian: libtcmalloc-minimal4)"


def environment(name: str, inherited: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """The environment of a process that runs under this allocator; None where the library is not found."""
    known = [library for library in LIBRARIES.values() if library]
    preloaded = inherited.get("LD_PRELOAD", "").replace(":", " ").split()
    preloaded = [path for path in preloaded if not any(library in path for library in known)]
    if LIBRARIES[name] is not None:
        found = ctypes.util.find_library(LIBRARIES[name])
        if found is None:
            return None
        preloaded.insert(0, found)
    others = {key: value for key, value in inherited.items() if key != "LD_PRELOAD"}
    return others | ({"LD_PRELOAD": ":".join(preloaded)} if preloaded else {})

"""What fasttx keeps in memory between calls, and how to free it."""

from fasttx import packing
from fasttx.dispatch import extension


def memory() -> dict[str, int]:
    """Bytes that fasttx keeps between calls, by purpose.

    "packed_weights": copies of weights in the order that the kernels read them, each freed with its weight.
    "workspaces": memory for the inside of calls, at most 256 MiB a thread. `empty_cache` frees both.
    """
    return {
        "packed_weights": packing.packed_bytes(),
        "workspaces": 0 if extension is None else extension.workspace_bytes(),
    }


def empty_cache() -> None:
    """Frees what fasttx keeps between calls; the next calls make it anew. Not while another thread is in a call.

    To be called after an edit of part of a weight through `.data` or NumPy, too: no version counter tells of it, and of
    the values only a sample is looked at.
    """
    packing.invalidate()
    if extension is not None:
        extension.release_workspaces()

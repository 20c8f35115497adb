"""Whether an op's time per token stays flat as the tokens grow."""

from collections.abc import Callable

from fasttx.measure import interleave

from .case import Call

_FEW, _MANY = 1024, 65536
GROWN = f"{_FEW} to {_MANY} tokens"
# What counts as flat: the two medians of a shared machine scatter by some percent.
FLAT = 1.15


def time_per_token(call: Callable[[int], Call], seconds: float) -> tuple[float, float, float]:
    """Time per token among many tokens / among few; `call` makes the op's call for a number of tokens.

    In turns, so that the many drive the few's data out of the caches: both come from memory.
    """
    timed = interleave({"many": call(_MANY), "few": call(_FEW)}, seconds=seconds, warm_up=0.2)
    growth = timed.ratio("many", "few").scaled(_FEW / _MANY)
    return growth.value, growth.low, growth.high

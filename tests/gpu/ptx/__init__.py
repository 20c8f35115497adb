"""Executes PTX on the CPU, to check GPU kernels where there is no GPU. See README.md beside this folder."""

from .counts import Counts
from .errors import CheckFailed, PTXError
from .machine import Machine, launch
from .memory import Allocation
from .parser import Kernel, parse

__all__ = ["Allocation", "CheckFailed", "Counts", "Kernel", "Machine", "PTXError", "launch", "parse"]

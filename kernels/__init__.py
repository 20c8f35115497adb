"""fasttx's Triton kernels, installed as `fasttx.kernels`.

In a checkout this folder can also be found as `kernels`, a name that belongs to another project: then it stands aside.
"""

if __name__ == "kernels":
    import importlib.machinery as _machinery
    import importlib.util as _util
    import os as _os
    import sys as _sys

    _root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
    _elsewhere = [path for path in _sys.path if _os.path.abspath(path or ".") != _root]
    _spec = _machinery.PathFinder.find_spec(__name__, _elsewhere)
    if _spec is not None and _spec.loader is not None:
        _sys.modules[__name__] = _util.module_from_spec(_spec)
        _spec.loader.exec_module(_sys.modules[__name__])

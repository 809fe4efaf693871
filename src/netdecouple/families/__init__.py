"""Families of decompositions, one per file; importing the package registers every file's families.

A family turns a `Problem` (one layer, and the moments of its inputs and targets) into a `Factorization`. A
family depends on no network, framework or image.
"""

from importlib import import_module
from pkgutil import iter_modules

from netdecouple.families.base import Family as Family
from netdecouple.families.problem import Problem as Problem

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

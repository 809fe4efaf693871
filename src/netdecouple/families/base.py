"""What a family is, and the registry of all families.

A new family is one file in this folder with a class that is decorated with `register`, and one class in
`tests/families`. The planner, the command line, the report and the documentation read its name, texts and
limits from the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from netdecouple.convolution import ConvGeometry, Factorization, IntArray, Structure
from netdecouple.families.linalg import Array
from netdecouple.families.problem import Problem

REGISTRY: dict[str, type[Family]] = {}  # by name; filled by `register` when the package is imported
# the methods that Guo et al., section 4.4, report, with their chains of three and four families
PAPER = (
    *("cd", "sd", "cp", "nd-dp", "nd-pd"),
    *("cd+sd", "cd+cp", "cd+nd-dp", "sd+nd-dp", "cp+nd-dp"),
    *("cd+sd+cp", "cd+sd+nd-dp", "cd+cp+nd-dp", "cd+sd+cp+nd-dp"),
)


@dataclass(frozen=True)
class FitOptions:
    """How thoroughly a family fits; a family ignores what does not concern it."""

    uniform: bool = False  # every input channel has the same number of terms
    rounds: int | None = None  # of refinement after the closed form, 0: none; None: as many as are worth it


class Family(ABC):
    """A way to factorize a layer. One number, the size, says how far: 1 is the least, `exact` is lossless.

    A subclass sets the first six class attributes and implements the four abstract methods. All else has a
    default.
    """

    name: ClassVar[str]  # in plans and on the command line
    label: ClassVar[str]  # in reports
    description: ClassVar[str]  # what a k×k convolution becomes
    size_unit: ClassVar[str]  # what the size counts
    source: ClassVar[str]  # the publication
    order: ClassVar[int]  # position in a chain, outermost least; families of equal order exclude each other

    group: ClassVar[str] = ""  # the user's word for several families; empty: the name
    in_combinations: ClassVar[bool] = True  # False: in chains only where the user writes the chain in full
    prunes_inputs: ClassVar[bool] = False  # only drops input channels: useless behind a chain's first stage
    joins_last: ClassVar[bool] = False  # can fit a chain's last convolution and the 1×1 behind it together
    spreads_terms: ClassVar[bool] = False  # the size counts terms that are shared among the input channels
    is_reference: ClassVar[bool] = False  # its energies describe a layer, its closed form chooses the ridge
    for_linear: ClassVar[bool] = False  # for fully connected layers, where fewer inputs are no faster
    # for transposed convolutions with a stride above 1: whatever computes its last stage at the output's
    # resolution costs more there than `Structure.macs` says
    for_upsampling: ClassVar[bool] = False

    def __init__(self, options: FitOptions = FitOptions()) -> None:
        self.options = options

    @abstractmethod
    def exact(self, geometry: ConvGeometry) -> int:
        """Return the size at which the factorization is the layer itself."""

    @abstractmethod
    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        """Return the stages of this size; which channels they read is up to the fit."""

    @abstractmethod
    def curve(self, problem: Problem) -> Array:
        """Predict the relative error at every size 0 … `exact`, cheaply: a fit may do a little better."""

    @abstractmethod
    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        """Fit the stages and the bias; ``channels`` are those that an earlier fit has selected, if it has."""

    def applies_to(self, geometry: ConvGeometry) -> bool:
        """Return whether the family has something to offer to such a convolution."""
        return not geometry.is_pointwise

    def wide_ok(self, geometry: ConvGeometry) -> bool:
        """Return whether fits stay quick where thousands of weights stand behind each output."""
        return False

    def grain(self, geometry: ConvGeometry) -> int:
        """Return the number that every size is a multiple of."""
        return 1

    def size_of(self, geometry: ConvGeometry, number: int) -> int:
        """Translate the number in a rule (T terms per channel, r ranks, c channels) into a size."""
        return number

    def energies(self, problem: Problem) -> Array:
        """Return the share of the energy that is kept at numbers (as in `size_of`) 1, 2, …"""
        return 1 - self.curve(problem)[1:]

    def repeats(self, geometry: ConvGeometry) -> int:
        """Return how often the first stage may read a channel that it selects; 0 if it reads all channels."""
        return 0

    def channels(self, problem: Problem, sizes: Sequence[int]) -> list[IntArray | None]:
        """Return the channels that the first stage would read at several sizes; None is all channels."""
        return [None] * len(sizes)


F = TypeVar("F", bound=type[Family])


def register(family: F) -> F:
    """Add a family to the registry, a class decorator; raises ValueError if another one has its name."""
    if REGISTRY.setdefault(family.name, family) is not family:
        raise ValueError(f"there are two families {family.name!r}")
    return family


def registered() -> list[type[Family]]:
    """Return all families in their order in a chain.

    >>> [family.name for family in registered()]
    ['cd', 'sd', 'cp', 'nd-dp', 'nd-pd']
    """
    return sorted(REGISTRY.values(), key=lambda family: family.order)


def groups() -> dict[str, list[type[Family]]]:
    """Return the user's words for families, and what each stands for.

    >>> list(groups())
    ['cd', 'sd', 'cp', 'nd']
    >>> [family.name for family in groups()["nd"]]
    ['nd-dp', 'nd-pd']
    """
    words: dict[str, list[type[Family]]] = {}
    for family in registered():
        words.setdefault(family.group or family.name, []).append(family)
    return words


def used_by(methods: Iterable[str]) -> list[type[Family]]:
    """Return the registered families in the names of some methods, in their order in a chain.

    >>> [family.name for family in used_by(["kept", "nd-dp", "cd+nd-dp"])]
    ['cd', 'nd-dp']
    """
    names = {name for method in methods for name in method.split("+")}
    return [family for family in registered() if family.name in names]


def spreads_terms(method: str) -> bool:
    """Return whether the size of a method counts terms that are shared among the input channels."""
    return method in REGISTRY and REGISTRY[method].spreads_terms


def reference() -> type[Family]:
    """Return the family whose energies describe a layer."""
    return next(family for family in registered() if family.is_reference)

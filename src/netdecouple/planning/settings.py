"""The settings of a run, and the procedure that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from netdecouple.errors import BudgetError
from netdecouple.planning.candidates import Rule, parse_families
from netdecouple.planning.divergence import Loss

Procedure = Literal["planned", "published", "rule"]
EffortName = Literal["low", "normal", "high"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to decouple a network. The defaults suit most networks.

    Args:
        exclude: layers to keep: their names as they are printed, or patterns like "head.*".
        data_free: fit to the weights alone; calibration inputs are not needed.
        uniform_rank: use the same number of terms T for all channels of a layer. Together with ``data_free``
            this is the paper's own procedure.
        seed: decides the order of the inputs and the positions that are sampled.
        families: families to choose from: "nd", "sd", "cd", "cp", "paper", "all", or methods like "sd+nd-dp".
        rule: one method for every layer, instead of planning to a budget.
        loss: "kl", "relative" or "boxes"; None takes KL for classifiers, the weighted error of boxes and
            scores for detectors, and the relative squared error for all else.
        effort: how many plans are tried: "low" (one), "normal" or "high" (three times as many).

    ``exclude`` and ``families`` also take a single string; in ``families`` commas separate several.

    Raises:
        BudgetError: ``loss`` or ``effort`` is unknown.
    """

    exclude: tuple[str, ...] = ()
    data_free: bool = False
    uniform_rank: bool = False
    seed: int = 0
    families: tuple[str, ...] = ("all",)
    rule: Rule | None = None
    loss: Loss | None = None
    effort: EffortName = "normal"

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", (self.exclude,))
        if isinstance(self.families, str):
            families = tuple(part.strip() for part in self.families.split(","))
            object.__setattr__(self, "families", families)
        if self.loss not in (None, *get_args(Loss)):
            raise BudgetError(f"loss={self.loss!r}: give {' or '.join(get_args(Loss))}, or leave it out")
        if self.effort not in get_args(EffortName):
            raise BudgetError(f"effort={self.effort!r}: give {' or '.join(get_args(EffortName))}")

    @property
    def procedure(self) -> Procedure:
        """How the plan is made.

        "planned": the least loss within the budgets. "published": as in the paper, from the weights alone,
        with one rank T for all convolutions but the first. "rule": as ``rule`` says.
        """
        if self.rule is not None:
            return "rule"
        return "published" if self.data_free and self.uniform_rank else "planned"

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to choose from, in full.

        Raises:
            BudgetError: a family is unknown, or there is none.
        """
        return ("nd-dp",) if self.procedure == "published" else parse_families(",".join(self.families))

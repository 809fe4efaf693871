"""What is asked for, validated once: a budget, a share of time, a drop in accuracy, a rule, a saved plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from netdecouple.errors import BudgetError, ModelError
from netdecouple.planning.candidates import Rule
from netdecouple.planning.cost import Budget, Macs, budgets_of, parse_share
from netdecouple.planning.plan import Plan
from netdecouple.planning.tolerance import Tolerance

Share = str | float  # 0.5, "50%" or "2x": see `parse_share`
# that a decoupled layer may be written in; see `frontends.onnx.emission`
FORMS = {"standard": ("parallel", "gather"), "fused": ("fused",)}


@dataclass(frozen=True)
class Budgets:
    """The least predicted loss within limits on MACs, parameters, or both."""

    budgets: tuple[Budget, ...]

    @property
    def percent(self) -> str:
        """The first budget's share, to four digits: names files and steps of a sweep."""
        return f"{100 * self.budgets[0].share:.4g}"


@dataclass(frozen=True)
class LatencyBudget:
    """The least predicted loss within a share of the original's measured time, and further budgets."""

    share: float
    budgets: tuple[Budget, ...] = ()


@dataclass(frozen=True)
class MaxDrop:
    """The fewest MACs with which top-1 accuracy on labelled inputs drops by at most so many points."""

    points: float


@dataclass(frozen=True)
class Within:
    """The fewest MACs with outputs as near to the original's as is asked for."""


@dataclass(frozen=True)
class Fastest:
    """The least time with outputs as near to the original's as is asked for, or as `Tolerance.usual` says."""


Goal = Budgets | LatencyBudget | MaxDrop | Within | Fastest | Rule | Plan
LEAST = "least"  # instead of a share: the fewest MACs


@dataclass(frozen=True)
class Emission:
    """How the result is written, and the runtime it is written for.

    Raises ModelError: no such form, or one that the runtime cannot run, or less than one thread.
    """

    form: str = "standard"  # or "fused": a key of `FORMS`
    runtime: str | None = None  # where the forms of layers are chosen by measuring; None: not measured
    threads: int = 1  # to measure with

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ModelError(f"emit={self.form!r}: give {' or '.join(FORMS)}")
        if self.threads < 1:
            raise ModelError(f"threads={self.threads}: give 1 or more")
        if self.form == "fused" and self.runtime not in (None, "onnxruntime"):
            raise ModelError(
                f"emit='fused' is for onnxruntime; {self.runtime} runs standard operators only: leave one out"
            )

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms to choose from; the first is taken where nothing is measured."""
        return FORMS[self.form]


def parse_goal(
    macs: Share | None,
    parameters: Share | None,
    latency: Share | None,
    max_drop: float | None,
    labels: object,
    rule: Rule | None,
    tolerance: Tolerance | None = None,
) -> Goal:
    """Turn the arguments of `api.decouple` into one goal; without one it is the fastest network.

    Raises BudgetError if several are given that exclude each other, or one that makes no sense.
    """
    if macs == LEAST:
        if tolerance is None:
            raise BudgetError("macs='least' is for a limit on what the outputs may change; give within=")
        if parameters is None and latency is None and max_drop is None and rule is None:
            return Within()
    budget = macs is not None or parameters is not None or latency is not None
    goals = budget + (max_drop is not None) + (rule is not None)
    if not goals:
        return Fastest()
    if goals != 1 or macs == LEAST:
        raise BudgetError(
            "give one goal: a budget (macs=0.5, parameters='2x', latency='60%'), max_drop= with labels=, "
            "or rule=; or none for the fastest network"
        )
    if max_drop is not None:
        if not max_drop >= 0:
            raise BudgetError(f"max_drop={max_drop}: give points of accuracy, 0 or more")
        if labels is None:
            raise BudgetError("max_drop= needs labels= (FILE.npz:IMAGES,LABELS) to measure accuracy on")
        return MaxDrop(max_drop)
    if rule is not None:
        return rule
    budgets = tuple(budgets_of(macs, parameters))
    return Budgets(budgets) if latency is None else LatencyBudget(parse_share(latency), budgets)


def parse_sweep(macs: Share | Iterable[Share], rule: Rule | None) -> list[Budgets]:
    """Read a sweep's budgets in MACs, "80%,60%,2x" or (0.8, 0.6): most MACs first, equal ones once.

    Budgets are equal if four digits of their percentage are: files are named after these. Raises BudgetError
    if one of them cannot be read, or there is a rule, which leaves nothing to choose.
    """
    if rule is not None:
        raise BudgetError("a sweep is over budgets: leave out the rule in the settings, or use decouple")
    if not isinstance(macs, Iterable):
        macs = [macs]
    parts = filter(None, macs.split(",")) if isinstance(macs, str) else macs
    goals = [Budgets((Budget(Macs(), share),)) for share in sorted(map(parse_share, parts), reverse=True)]
    return list({goal.percent: goal for goal in goals}.values())


def goal_key(goal: Goal, emission: Emission) -> str:
    """Describe a goal in full, as the name of a plan that is kept in a work folder."""
    if isinstance(goal, Budgets | LatencyBudget):
        budgets = [(budget.cost.unit, budget.share) for budget in goal.budgets]
        return repr((type(goal).__name__, getattr(goal, "share", None), budgets, emission))
    return repr((goal, emission))

"""Latency as a budget: measured times of layers, and plans that are timed before they are fitted.

Time depends on the structure alone: candidates are timed with placeholder weights, layer by layer to choose,
and as whole networks to check the choice.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from netdecouple.convolution import Factorization, Structure, spread
from netdecouple.errors import BudgetError
from netdecouple.execution.machine import machine
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.scratch import Scratch
from netdecouple.network import ONE_CHANNEL, Layer, Timer
from netdecouple.planning.analysis import Analysis
from netdecouple.planning.candidates import Candidate
from netdecouple.planning.cost import Budget, Replacement
from netdecouple.planning.eligibility import EXCLUDED
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.planning.planner import make_plan, objective_of, placeholders, reachable
from netdecouple.version import __version__

ANCHORS = 6  # sizes that are timed per layer and family; times of sizes between them are interpolated
TRIES = 6  # plans measured as whole networks
CLOSE = 0.02  # relative distance from the budget at which the search ends


class Cache(dict[str, float]):
    """Times of candidates on disk, by machine, runtime and version; an unreadable file is replaced.

    They are relative to that of the layer as it is, measured in turn with them: what else the machine did,
    and how fast it was just then, drops out.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _cache_folder() / "netdecouple" / "layers.json"
        with suppress(OSError, ValueError, AttributeError, TypeError):
            times = json.loads(self.path.read_text(encoding="utf-8"))
            super().__init__({key: float(value) for key, value in times.items()})

    def save(self, times: Mapping[str, float]) -> None:
        """Add times, and write the file if possible; otherwise they are measured again next time."""
        self.update(times)
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with Scratch(parent=self.path.parent) as folder:
                partial = Path(folder) / self.path.name
                partial.write_text(json.dumps(self, indent=0, sort_keys=True), encoding="utf-8")
                os.replace(partial, self.path)


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir())


class Latency:
    """A counter of milliseconds (`planning.cost.Cost`), from measured times of layers.

    Args:
        analysis: of the network, which is measured as a whole; what it takes besides its layers is ``fixed``.
        timer: measures, in the runtime that the network is meant for.
        cache: times that were measured before.
        progress: called after every layer.
    """

    unit = "latency"

    def __init__(
        self, analysis: Analysis, timer: Timer, cache: Cache | None = None, progress: Progress = quiet
    ) -> None:
        self.timer = timer
        self.analysis = analysis
        self._layers = {layer.name: layer for layer in analysis.network.layers}
        self._cache = Cache() if cache is None else cache
        self._dense: dict[str, float] = {}  # milliseconds
        # by layer, method and form: MACs, and times relative to the layer as it is
        self._shares: dict[tuple[str, str, str], tuple[list[int], list[float]]] = {}
        alone: dict[str, float] = {}  # milliseconds of layers as they are, by what was measured
        layers = [layer for layer in analysis.network.layers if analysis.candidates_of(layer)]
        for index, layer in enumerate(layers):
            self._time_layer(layer, analysis.candidates_of(layer), alone)
            progress("Timing layers", index + 1, len(layers))
        self.total = float(timer.network_times([])[0])
        # layers timed alone may take longer than within the network
        within = min(self.total / max(sum(self._dense.values()), 1e-9), 1.0)
        self._dense = {name: milliseconds * within for name, milliseconds in self._dense.items()}
        self.fixed = self.total - sum(self._dense.values())

    def dense(self, layer: Layer) -> float:
        """Milliseconds of the layer as it is; layers that cannot be changed are part of ``fixed``."""
        return self._dense.get(layer.name, 0.0)

    def decoupled(self, layer: Layer, candidate: Replacement) -> float:
        """Milliseconds of a candidate in its fastest form."""
        return min(self._by_form(layer, candidate).values())

    def form(self, layer: Layer, candidate: Replacement) -> str:
        """The fastest form of a candidate."""
        times = self._by_form(layer, candidate)
        return min(times, key=lambda form: times[form])

    def _by_form(self, layer: Layer, candidate: Replacement) -> dict[str, float]:
        macs, dense = candidate.structure.macs(*layer.size), self._dense[layer.name]
        return {
            form: dense * float(np.interp(macs, *self._shares[layer.name, candidate.method, form]))
            for form in self.timer.forms(layer)
        }

    def _time_layer(self, layer: Layer, candidates: Sequence[Candidate], alone: dict[str, float]) -> None:
        """Time the layer as it is, and a few candidates of every method in every form that are not known."""
        assert layer.geometry is not None
        forms = self.timer.forms(layer)
        dense = Structure.of(layer.geometry, layer.geometry)
        dense_key = self._key(layer, "dense", dense)
        kinds: dict[str, tuple[Structure, str]] = {}
        anchors = {name: _anchors(candidates, name) for name in sorted({c.method for c in candidates})}
        for structures in anchors.values():
            kinds |= {self._key(layer, form, s): (s, form) for form, s in product(forms, structures)}
        missing = {key: kind for key, kind in kinds.items() if key not in self._cache}
        if missing or dense_key not in alone:
            first, *others = self.timer.layer_times(layer, [(dense, "gather"), *missing.values()])
            alone[dense_key] = first
            self._cache.save({key: other / first for key, other in zip(missing, others, strict=True)})
        self._dense[layer.name] = alone[dense_key]
        for name, form in product(anchors, forms):
            keys = [(s.macs(*layer.size), self._key(layer, form, s)) for s in anchors[name]]
            points = sorted((macs, self._cache[key]) for macs, key in keys)
            macs, shares = (list(column) for column in zip(*points, strict=True))
            self._shares[layer.name, name, form] = (macs, shares)

    def _key(self, layer: Layer, form: str, structure: Structure) -> str:
        """Describe what was measured: which channels a stage selects does not matter, only their number."""
        stages = " ".join(f"{g.n_i}>{g.n_o}/{g.groups}:{g.kh}x{g.kw}" for g in structure.stages)
        batch = f" batch {self.timer.batch}" if self.timer.batch > 1 else ""
        where = f"{machine()} | {self.timer.name} | netdecouple {__version__}"
        return f"{where} | {layer.geometry} {layer.operator} @{layer.size}{batch} {form} {stages}"

    def sketch(self, plan: Plan) -> object:
        """Build a plan's whole network with placeholder weights."""
        factorizations = placeholders(self.analysis, plan)
        return self.analysis.network.build(*with_fused_layers(plan, self._layers, factorizations), {})

    def share(self, plan: Plan) -> float:
        """Measure the share of the original's time that a plan's network takes."""
        before, after = self.timer.network_times([self.sketch(plan)])
        return float(after / before)

    def predicted_share(self, plan: Plan) -> float:
        """The share of the original's time that the sum of the layers' times predicts for a plan."""
        spent = self.fixed
        for row in plan.layers:
            layer, change = self._layers[row.name], self.analysis.planned(row) if row.changed else None
            spent += self.decoupled(layer, change) if change else self.dense(layer)
        return spent / self.total

    def with_fused_neighbours(self, plan: Plan) -> Plan:
        """Decide by timing whole networks which kept layers the fused operator computes as well.

        Between a fused layer and a dense one ONNX Runtime changes the layout of the tensor.
        """
        if not any(row.changed for row in plan.layers):
            return plan
        can = [row for row in plan.layers if not row.changed and self._may_be_fused(row)]
        small = [row for row in can if (g := self._layers[row.name].geometry) and g.is_pointwise]
        plans = [plan] + [
            replace(plan, layers=tuple(replace(r, form="fused") if r in rows else r for r in plan.layers))
            for rows in (small, can)
            if rows
        ]
        if len(plans) == 1:
            return plan
        times = self.timer.network_times([self.sketch(p) for p in plans])
        return plans[int(np.argmin(times[1:]))]

    def _may_be_fused(self, row: LayerPlan) -> bool:
        layer = self._layers[row.name]
        plain = layer.operator == "Conv" and layer.geometry is not None and min(layer.geometry.pads) >= 0
        plain = plain and layer.weight.dtype == np.float32 and "fused" in self.timer.forms(layer)
        return plain and layer.reason in ("", ONE_CHANNEL) and row.reason != EXCLUDED


def plan_for_latency(latency: Latency, budgets: Sequence[Budget], share: float, advice: str) -> Plan:
    """Plan for a share of the original's time, corrected by measuring whole networks (secant method).

    Times of layers do not just add up: what their sum predicts is asked for less or more until a whole
    network measures as wanted. Further ``budgets`` hold as well.

    Raises:
        BudgetError: the share is out of reach; the message says what is not, and gives ``advice``.
    """
    analysis = latency.analysis
    least = reachable(analysis, latency) * (1 + 1e-9) + 1e-9
    best: Plan | None = None
    least_objective = float("inf")
    asked, tried = share, [(1.0, 1.0)]  # shares asked for, and measured
    for _ in range(TRIES):
        asked = float(np.clip(asked, least, 1.0))
        plan = make_plan(analysis, [Budget(latency, asked), *budgets], latency.form)
        plan = latency.with_fused_neighbours(plan)
        measured = latency.share(plan)
        objective = objective_of(analysis, plan)
        if measured <= share * (1 + CLOSE) and objective < least_objective:
            best, least_objective = plan, objective
        stuck = (asked <= least and measured > share) or (asked >= 1 and measured < share)
        if abs(measured / share - 1) <= CLOSE or stuck:
            break
        last, slope = tried[-1], 1.0
        if abs(asked - last[0]) > 1e-3:
            slope = float(np.clip((measured - last[1]) / (asked - last[0]), 0.5, 2.0))
        tried.append((asked, measured))
        asked += (share - measured) / slope
    if best is None:
        fastest = min(time for _, time in [*tried, (asked, measured)])
        raise BudgetError(
            f"{100 * share:.4g}% of the time is out of reach in {latency.timer.name}; the fastest network "
            f"that was measured takes {100 * fastest:.0f}%; {advice}"
        )
    return best


def with_fused_layers(
    plan: Plan, layers: Mapping[str, Layer], factorizations: Mapping[str, Factorization]
) -> tuple[dict[str, Factorization], dict[str, str]]:
    """Add the kept layers that the fused operator computes, exactly factorized; return also all forms."""
    kept = [layers[row.name] for row in plan.layers if not row.changed and row.form == "fused"]
    exact = {la.name: spread(la.geometry, la.weight, la.bias) for la in kept if la.geometry}
    written = {**factorizations, **exact}
    return written, {row.name: row.form for row in plan.layers if row.name in written}


def _anchors(candidates: Sequence[Candidate], name: str) -> list[Structure]:
    """Pick some of a method's candidates, evenly spread."""
    same = [c.structure for c in candidates if c.method == name]
    picks = np.unique(np.linspace(0, len(same) - 1, ANCHORS if "+" not in name else ANCHORS // 2))
    return [same[int(i)] for i in np.unique(picks.round())]

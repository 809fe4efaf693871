"""Latency as a budget: what layers take in a runtime, and plans that are timed before they are fitted.

Time depends on the structure alone: candidates are timed with weights made up, layer by layer to choose,
and as whole networks to see whether the choice is what it should be.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from netdecouple import kernels
from netdecouple.convolution import ConvStage, Factorization, Structure, spread
from netdecouple.errors import BudgetError
from netdecouple.execution.scratch import Scratch
from netdecouple.frontends.onnx.emission import PRODUCTS, Form, emit, form_of
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.network import ONE_CHANNEL, Array, Layer
from netdecouple.planning.analysis import EXCLUDED, Analysis, Progress, quiet
from netdecouple.planning.candidates import Candidate, LayerCandidates
from netdecouple.planning.cost import Budget
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.planning.solve import make_plan, reachable
from netdecouple.report.report import Speed
from netdecouple.runtimes import Feeds, Runtime
from netdecouple.runtimes.timing import Timing, measure
from netdecouple.version import __version__

STANDARD: tuple[Form, ...] = ("parallel", "gather")
FUSED: tuple[Form, ...] = ("fused",)
ANCHORS = 6  # sizes that are timed per layer and family; the rest lies between them
COLD = 4 << 20  # bytes of weights beside a layer's own, so that they come from beyond the second cache
TRIES = 6  # plans measured as whole networks
CLOSE = 0.02  # of the budget: a plan this near to it is good


@dataclass(frozen=True)
class Place:
    """Where a network will run, and how it may be written there."""

    runtime: Runtime
    threads: int = 1
    forms: tuple[Form, ...] = STANDARD

    def __str__(self) -> str:
        return f"{self.runtime.name} {self.runtime.version}, {self.threads} thread{'s' * (self.threads > 1)}"


class Cache:
    """Times of layers on disk, by machine, runtime and version; a file that cannot be read is made anew."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _cache_folder() / "netdecouple" / "latency.json"
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            self._times = {str(k): float(v) for k, v in known.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self._times = {}

    def __contains__(self, key: str) -> bool:
        return key in self._times

    def __getitem__(self, key: str) -> float:
        return self._times[key]

    def update(self, times: Mapping[str, float]) -> None:
        """Add times, and write the file if that can be done."""
        self._times |= times
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with Scratch(parent=self.path.parent) as folder:
                partial = Path(folder) / self.path.name
                partial.write_text(json.dumps(self._times, indent=0, sort_keys=True), encoding="utf-8")
                os.replace(partial, self.path)
        except OSError:
            pass  # measured again next time


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir())


def machine() -> str:
    """This machine's processor, as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{platform.machine()} {model}, {os.cpu_count()} cores"


class Latency:
    """A counter of milliseconds (`planning.cost.Cost`): every candidate layer measured as a tiny model.

    Args:
        network: is measured as a whole; what it takes besides its layers is ``fixed``.
        candidates: what could take the layers' places.
        place: the runtime, its threads, and the forms to choose from.
        image: what the network is run on, (n, c, h, w).
    """

    unit = "latency"

    def __init__(
        self,
        network: OnnxNetwork,
        candidates: Mapping[str, LayerCandidates],
        place: Place,
        image: Array,
        cache: Cache | None = None,
        progress: Progress = quiet,
    ) -> None:
        self.place = place
        self._network = network
        self._candidates = candidates
        self._feeds: Feeds = {network.model.input_name: np.ascontiguousarray(image)}
        self._batch = len(image)  # layers are timed with as many
        self._cache = cache or Cache()
        self._prefix = f"{machine()} | {place} | netdecouple {__version__} | "
        self._dense: dict[str, float] = {}
        self._times: dict[tuple[str, str, Form], tuple[list[int], list[float]]] = {}  # MACs, milliseconds
        layers = [la for la in network.layers if candidates.get(la.name) and candidates[la.name].candidates]
        for index, layer in enumerate(layers):
            self._time_layer(layer, candidates[layer.name])
            progress("Timing layers", index + 1, len(layers))
        original = place.runtime.open(network.decoupled({}), place.threads)
        self._original = original
        times = measure([partial(original.run, self._feeds)], 1.0)
        self.total = Timing.of(times[:, 0]).median
        self.fixed = self.total - sum(self._dense.values())

    def dense(self, layer: Layer) -> float:
        """Milliseconds of the layer as it is; layers that cannot be changed are part of ``fixed``."""
        return self._dense.get(layer.name, 0.0)

    def decoupled(self, layer: Layer, candidate: Candidate) -> float:
        """Milliseconds in the form that is fastest for such a candidate."""
        return min(self._at(layer, candidate).values())

    def form(self, layer: Layer, candidate: Candidate) -> Form:
        """The form that is fastest for such a candidate."""
        times = self._at(layer, candidate)
        return min(times, key=lambda form: times[form])

    def _at(self, layer: Layer, candidate: Candidate) -> dict[Form, float]:
        macs = candidate.structure.macs(*layer.size)
        return {
            form: float(np.interp(macs, *self._times[layer.name, candidate.method, form]))
            for form in self._forms(layer)
        }

    def _forms(self, layer: Layer) -> tuple[Form, ...]:
        """How the layer may be written; for matrix products all forms are one."""
        return self.place.forms[:1] if layer.operator in PRODUCTS else self.place.forms

    def _time_layer(self, layer: Layer, found: LayerCandidates) -> None:
        """Time the layer as it is, and a few candidates of every method in every form."""
        assert layer.geometry is not None
        dense = Structure.of(layer.geometry, layer.geometry)
        wanted: dict[str, tuple[Structure, Form]] = {self._key(layer, "dense", dense): (dense, "gather")}
        anchors = {name: _anchors(found.candidates, name) for name in {c.method for c in found.candidates}}
        for _, picked in sorted(anchors.items()):
            for form, candidate in product(self._forms(layer), picked):
                wanted[self._key(layer, form, candidate.structure)] = (candidate.structure, form)
        if missing := {key: what for key, what in wanted.items() if key not in self._cache}:
            self._cache.update(dict(zip(missing, self._measured(layer, list(missing.values())), strict=True)))
        self._dense[layer.name] = self._cache[self._key(layer, "dense", dense)]
        for name, form in product(anchors, self._forms(layer)):
            known = [
                (c.structure.macs(*layer.size), self._key(layer, form, c.structure)) for c in anchors[name]
            ]
            known.sort()
            self._times[layer.name, name, form] = (
                [macs for macs, _ in known],
                [self._cache[key] for _, key in known],
            )

    def _key(self, layer: Layer, form: str, structure: Structure) -> str:
        """What a time is known by: channels are left out, only how many are read counts."""
        stages = " ".join(f"{g.n_i}>{g.n_o}/{g.groups}:{g.kh}x{g.kw}" for g in structure.stages)
        kind = layer.operator if layer.operator in PRODUCTS else form
        batch = f" batch {self._batch}" if self._batch > 1 else ""
        return f"{self._prefix}{layer.geometry} @{layer.size}{batch} {kind} {stages}"

    def _measured(self, layer: Layer, kinds: Sequence[tuple[Structure, Form]]) -> list[float]:
        """Milliseconds of a layer in several forms, which take turns."""
        assert layer.geometry is not None
        copies = int(np.clip(COLD / (4 * layer.parameters), 3, 8)) if layer.macs < 5e8 else 2
        shape = _shape(layer, layer.geometry.n_i, layer.size, self._batch)
        image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        sessions = [
            self.place.runtime.open(
                tiny_model(layer, structure, form, copies, self._batch), self.place.threads
            )
            for structure, form in kinds
        ]
        runs = [partial(session.run, {"x": image}) for session in sessions]
        return [Timing.of(column).median / copies for column in measure(runs, 0.2).T]

    def speed(self, model: onnx.ModelProto, plan: Plan) -> Speed:
        """Time a plan's network against the original."""
        session = self.place.runtime.open(model, self.place.threads)
        times = measure([partial(s.run, self._feeds) for s in (self._original, session)], 1.0)
        before, after = (Timing.of(column) for column in times.T)
        share = float(np.median(times[:, 1] / times[:, 0]))
        return Speed(str(self.place), before, after, share, self._foreseen(plan))

    def sketch(self, plan: Plan) -> onnx.ModelProto:
        """A plan's whole network, with weights made up."""
        layers = {layer.name: layer for layer in self._network.layers}
        factorizations, forms = {}, {}
        for row in plan.layers:
            if row.changed:
                factorizations[row.name] = placeholder(_planned(row, self._candidates[row.name]).structure)
                forms[row.name] = form_of(row.form)
        return self._network.decoupled(*with_kept(plan, layers, factorizations, forms))

    def with_neighbours(self, plan: Plan) -> Plan:
        """Decide by timing whole networks which of the layers that are kept the fused operator runs as well.

        Between a fused layer and a dense one ONNX Runtime changes the layout of what passes.
        """
        if "fused" not in self.place.forms or not any(row.changed for row in plan.layers):
            return plan
        layers = {layer.name: layer for layer in self._network.layers}
        can = [row for row in plan.layers if not row.changed and _runs_fused(layers[row.name], row)]
        small = [row for row in can if (g := layers[row.name].geometry) and g.is_pointwise]
        plans = [plan] + [
            replace(plan, layers=tuple(replace(r, form="fused") if r in chosen else r for r in plan.layers))
            for chosen in (small, can)
            if chosen
        ]
        sessions = [self.place.runtime.open(self.sketch(p), self.place.threads) for p in plans]
        times = measure([partial(session.run, self._feeds) for session in sessions], 1.0)
        return plans[int(np.argmin(np.median(times, axis=0)))]

    def _foreseen(self, plan: Plan) -> float:
        """The share of the original's time that the layers' times alone predict for a plan."""
        layers = {layer.name: layer for layer in self._network.layers}
        spent = sum(
            self.decoupled(layers[row.name], _planned(row, self._candidates[row.name]))
            if row.changed
            else self.dense(layers[row.name])
            for row in plan.layers
        )
        return (self.fixed + spent) / self.total


def plan_for_latency(analysis: Analysis, budgets: Sequence[Budget], latency: Latency, share: float) -> Plan:
    """Plan for a share of the original's time, and correct by measuring: times do not just add up.

    ``budgets`` come besides. What the layers' times foresee is asked for less or more until whole networks
    measure what was wanted (secant method).

    Raises:
        BudgetError: it cannot be met; the message says what can.
    """
    layers = analysis.network.layers
    total = latency.fixed + sum(latency.dense(la) for la in layers)
    least = (latency.fixed + reachable(analysis, [Budget(latency, 1.0)])[0]) / total * (1 + 1e-9) + 1e-9
    best: Plan | None = None
    asked, seen = share, [(1.0, 1.0)]  # shares asked for, and measured
    for _ in range(TRIES):
        asked = float(np.clip(asked, least, 1.0))
        plan = make_plan(analysis, [Budget(latency, asked), *budgets], latency.form)
        plan = latency.with_neighbours(plan)
        found = latency.speed(latency.sketch(plan), plan).share
        if found <= share * (1 + CLOSE) and (best is None or plan.predicted_loss < best.predicted_loss):
            best = plan
        stuck = (asked <= least and found > share) or (asked >= 1 and found < share)
        if abs(found / share - 1) <= CLOSE or stuck:
            break
        before, slope = seen[-1], 1.0
        if abs(asked - before[0]) > 1e-3:
            slope = float(np.clip((found - before[1]) / (asked - before[0]), 0.5, 2.0))
        seen.append((asked, found))
        asked += (share - found) / slope
    if best is None:
        fastest = min(found for _, found in [*seen, (asked, found)])
        raise BudgetError(
            f"{100 * share:.4g}% of the time is out of reach in {latency.place}; the fastest that was found "
            f"takes {100 * fastest:.0f}%; {_advice(latency.place)}"
        )
    return best


def _advice(place: Place) -> str:
    if "fused" not in place.forms and place.runtime.name == "onnxruntime":
        return "--emit fused goes further, or ask for less"
    return "ask for less"


def _runs_fused(layer: Layer, row: LayerPlan) -> bool:
    """Whether a layer that is kept could be run by the fused operator, and may be."""
    plain = layer.operator == "Conv" and layer.geometry is not None and min(layer.geometry.pads) >= 0
    plain = plain and layer.weight.dtype == np.float32
    return plain and layer.reason in ("", ONE_CHANNEL) and row.reason != EXCLUDED


def with_kept(
    plan: Plan,
    layers: Mapping[str, Layer],
    factorizations: Mapping[str, Factorization],
    forms: Mapping[str, Form],
) -> tuple[dict[str, Factorization], dict[str, Form]]:
    """Add the layers that are kept and yet run by the fused operator, as they are, to what is written."""
    kept = [layers[row.name] for row in plan.layers if not row.changed and row.form]
    kept = [la for la in kept if la.operator not in PRODUCTS]
    exact = {la.name: spread(la.geometry, la.weight, la.bias) for la in kept if la.geometry}
    return {**factorizations, **exact}, {**forms, **dict.fromkeys(exact, "fused")}


def _planned(row: LayerPlan, found: LayerCandidates) -> Candidate:
    """The candidate that a plan has chosen for a layer."""
    return next(c for c in found.candidates if (c.method, c.sizes) == (row.family, row.sizes))


def _anchors(candidates: Sequence[Candidate], name: str) -> list[Candidate]:
    """Some of a method's candidates, evenly spread; those between them take times between theirs."""
    own = [c for c in candidates if c.method == name]
    picks = np.unique(np.linspace(0, len(own) - 1, ANCHORS if "+" not in name else ANCHORS // 2))
    return [own[int(i)] for i in np.unique(picks.round())]


def placeholder(structure: Structure, seed: int = 0) -> Factorization:
    """A factorization of some structure whose weights mean nothing."""
    rng = np.random.default_rng(seed)
    stages = tuple(
        ConvStage(
            g,
            rng.standard_normal(g.weight_shape, np.float32)
            / np.float32(np.sqrt(np.prod(g.weight_shape[1:]))),
            channels,
        )
        for g, channels in zip(structure.stages, structure.channels, strict=True)
    )
    return Factorization(structure.geometry, stages, np.zeros(structure.geometry.n_o, np.float32))


def _shape(layer: Layer, channels: int, size: tuple[int, int], batch: int) -> tuple[int, ...]:
    """The shape of a batch's maps, or of its rows where the layer is fully connected."""
    return (batch, channels) if layer.operator in PRODUCTS else (batch, channels, *size)


def tiny_model(
    layer: Layer, structure: Structure, form: Form, copies: int, batch: int = 1
) -> onnx.ModelProto:
    """Several copies of a layer in some structure, with weights of their own on one input.

    Weights differ, so that no runtime takes two copies for one. Each is followed by a pooling to one pixel,
    which blocked layouts go through as well: the model takes the layer's time as it stands in a network.
    """
    g = layer.geometry
    assert g is not None
    flat = layer.operator in PRODUCTS
    nodes, weights = [], []
    for index in range(copies):
        y = f"out{index}" if flat else f"y{index}"
        made = emit(placeholder(structure, index), f"layer{index}", "x", y, form, layer.operator)
        pooled = [] if flat else [helper.make_node("GlobalAveragePool", [y], [f"out{index}"])]
        nodes += [*made[0], *pooled]
        weights += made[1]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, _shape(layer, g.n_i, layer.size, batch))],
        [
            helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, _shape(layer, g.n_o, (1, 1), batch))
            for i in range(copies)
        ],
        weights,
    )
    domains = [helper.make_opsetid("", 13), helper.make_opsetid(kernels.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=domains if form == "fused" else domains[:1], ir_version=8)

"""Which layers are kept before any planning, and why."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence

from netdecouple.errors import ModelError
from netdecouple.execution.memory import Memory
from netdecouple.fitting.sampling import SplitMoments
from netdecouple.network import Layer
from netdecouple.planning.candidates import LARGE, applicable, least_cost, suitable
from netdecouple.planning.cost import Macs
from netdecouple.planning.settings import Settings

EXCLUDED = "excluded"  # the reason of layers that the user names
LEAST_RETURN = 0.1  # least ratio of a wide layer's share of the network to its share of the fitting work


def kept_reasons(layers: Sequence[Layer], settings: Settings, memory: Memory = Memory()) -> dict[str, str]:
    """Return the reason for every layer that is kept before any planning, by the layer's name.

    Raises:
        ModelError: a pattern of ``settings.exclude`` matches nothing, or no layer is left.
    """
    names = [layer.name for layer in layers]
    excluded = {name for pattern in settings.exclude for name in _matching(pattern, names)}
    reasons = {la.name: EXCLUDED if la.name in excluded else _reason(la, settings, memory) for la in layers}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    if settings.procedure != "rule" and not settings.data_free:
        reasons |= _not_worth_it([layer for layer in layers if layer.name not in reasons], layers)
    if len(reasons) == len(layers):
        raise ModelError(f"none of the {len(layers)} layers can be decoupled ({_summary(reasons)})")
    return reasons


def _summary(reasons: dict[str, str]) -> str:
    """Say the most frequent reasons, each with a layer that has it and how many others have."""
    frequent = Counter(reasons.values()).most_common(3)
    first = {reason: name for name, reason in reversed(reasons.items())}
    parts = [
        f"{first[reason]}{f' and {count - 1} more' if count > 1 else ''}: {reason}"
        for reason, count in frequent
    ]
    return "; ".join(parts) + ("; …" if sum(count for _, count in frequent) < len(reasons) else "")


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the layer of this name, brackets and all, or else those that a glob matches."""
    found = [pattern] if pattern in names else [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    if not found:
        raise ModelError(
            f"exclude={pattern!r} matches no layer; `netdecouple inspect` lists the names of all layers"
        )
    return found


def _reason(layer: Layer, settings: Settings, memory: Memory) -> str:
    """Return why a layer is kept, or an empty string."""
    if layer.reason:
        return layer.reason
    if least_cost(layer, Macs()) >= layer.macs:
        return "too small: nothing costs less than the layer itself"
    if (layer.is_linear or layer.upsamples) and not suitable(layer, settings.methods, settings.rule):
        return f"only {' or '.join(applicable(layer))} would do, which is not asked for"
    size, limit = SplitMoments.nbytes(layer), memory.row_bytes
    # one sample per input does not justify the memory; convolutions of the same width have many
    if not settings.data_free and layer.output_size == (1, 1) and size > limit:
        return f"too wide: the moments of its inputs take {size / 1e9:.1f} GB, more than {limit / 1e9:.1f} GB"
    return ""


def _not_worth_it(open_layers: Sequence[Layer], layers: Sequence[Layer]) -> dict[str, str]:
    """Find wide layers that would take much of the work and are a small share of the network."""
    shapes = {la.name: la.geometry for la in open_layers if la.geometry is not None}
    work = {name: g.groups * g.unknowns**3 for name, g in shapes.items()}  # of a Cholesky factorization
    macs, parameters = (max(sum(getattr(la, cost) for la in layers), 1) for cost in ("macs", "parameters"))
    all_work, reasons = sum(work.values()), {}
    for layer in open_layers:
        effort = work[layer.name] / all_work
        share = max(layer.macs / macs, layer.parameters / parameters)
        if shapes[layer.name].unknowns > LARGE and share < LEAST_RETURN * effort:
            percent = f"{100 * effort:.0f} % of all, for {100 * share:.1g} % of the network"
            reasons[layer.name] = f"not worth the work: {percent}"
    return reasons


def is_too_wide_to_fit(layer: Layer, memory: Memory) -> bool:
    """Return whether a layer is fitted from its weights alone because memory does not suffice."""
    return SplitMoments.fit_bytes(layer) > memory.fit_bytes

"""Running a module shows its layers, BatchNorms and shortcuts; layers that do more are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

import netdecouple  # noqa: E402
from netdecouple.errors import ModelError  # noqa: E402
from netdecouple.families import Problem  # noqa: E402
from netdecouple.families.chain import Step, method  # noqa: E402
from netdecouple.frontends.torch.convolutions import Factorized  # noqa: E402
from netdecouple.frontends.torch.network import BOUND, TorchNetwork  # noqa: E402
from netdecouple.frontends.torch.samples import collect  # noqa: E402
from netdecouple.network import ONE_BY_ONE  # noqa: E402

Forward = Callable[[Any, Any], Any]


class Parts(nn.Module):
    """Three convolutions and two BatchNorms, used as a function says."""

    def __init__(self, forward: Forward, **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 4, 3, padding=1)
        for name, part in parts.items():
            setattr(self, name, part)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d) and part.track_running_stats:
                nn.init.normal_(part.running_mean, 0, 0.5)
                nn.init.uniform_(part.running_var, 0.5, 2)
        self._forward = forward

    def forward(self, x: Any) -> Any:
        return self._forward(self, x)


def parts(forward: Forward, **own: nn.Module) -> Any:
    torch.manual_seed(0)
    return Parts(forward, **own).eval()


def pictures(count: int = 3, size: int = 8) -> Any:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def opened(module: Any, x: Any = None, **options: Any) -> TorchNetwork:
    x = pictures() if x is None else x
    return TorchNetwork(module, collect(x, module, None, None), **options)


def norms(network: TorchNetwork) -> dict[str, str]:
    return {name: layer.norm for name, layer in network.torch_layers.items() if layer.norm}


def reasons(network: TorchNetwork) -> dict[str, str]:
    return {layer.name: layer.reason for layer in network.layers if layer.reason}


def exact(network: TorchNetwork) -> Any:
    """The module with every layer factorized, at full rank."""
    made = {}
    for layer in network.layers:
        if layer.reason:
            continue
        chosen = method("cd" if layer.is_linear else "nd-pd" if layer.upsamples else "nd-dp", rounds=0)
        problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
        steps = [Step(size) for size in chosen.exact(layer.geometry)]
        made[layer.name] = chosen.fit(problem, steps)[0].astype(np.float32)
    return network.build(made)


def flat(output: Any) -> list[Any]:
    if isinstance(output, dict):
        return [t for value in output.values() for t in flat(value)]
    if isinstance(output, tuple | list):
        return [t for value in output for t in flat(value)]
    return flat(vars(output)) if hasattr(output, "__dataclass_fields__") else [output]


def check_lossless(network: TorchNetwork, tolerance: float = 1e-5) -> None:
    """At full rank the module computes what it did, and the one given is as it was."""
    new = exact(network)
    assert sum(isinstance(part, Factorized) for part in new.modules()) == len(network.torch_layers)
    x = pictures().to(network.dtype)
    with torch.no_grad():
        before, after = network.original.eval()(x), new.eval()(x)
    assert type(before) is type(after)
    for one, other in zip(flat(before), flat(after), strict=True):
        if not isinstance(one, torch.Tensor):
            assert one == other
            continue
        assert one.dtype == other.dtype
        scale = one.double().abs().max()
        assert ((one - other).double().abs().max() <= tolerance * scale).item()


class NormAct(nn.BatchNorm2d):
    """Like timm's BatchNormAct2d."""

    def forward(self, x: Any) -> Any:
        return F.relu(super().forward(x))


@dataclass
class Answer:
    maps: Any
    rest: tuple[Any, ...]


def chain(m: Any, x: Any) -> Any:
    return m.c(F.relu(m.n2(m.b(F.relu(m.n(m.a(x)))))))


def raw_is_returned(m: Any, x: Any) -> Any:
    y = m.a(x)
    return {"raw": y, "end": m.c(m.n2(m.b(m.n(y))))}


def raw_is_read(m: Any, x: Any) -> Any:
    y = m.a(x)
    return m.c(m.n(y) + y)


def in_place(m: Any, x: Any) -> Any:
    return m.c(F.relu_(m.n2(F.relu_(m.b(F.relu_(m.n(m.a(x))))))))


def changed_under(m: Any, x: Any) -> Any:
    """The BatchNorm is given the convolution's own tensor, but not its values."""
    y = m.a(x)
    y.mul_(2)
    return m.c(m.n(y))


FOLDS: dict[str, tuple[Any, dict[str, str]]] = {
    "plain": (lambda: parts(chain), {"a": "n", "b": "n2"}),
    "training": (lambda: parts(chain).train(), {"a": "n", "b": "n2"}),
    "not affine": (lambda: parts(chain, n=nn.BatchNorm2d(8, affine=False)), {"a": "n", "b": "n2"}),
    "no statistics": (lambda: parts(chain, n=nn.BatchNorm2d(8, track_running_stats=False)), {"b": "n2"}),
    "with activation": (lambda: parts(chain, n=NormAct(8)), {"a": "n", "b": "n2"}),
    "instance norm": (lambda: parts(chain, n=nn.InstanceNorm2d(8, affine=True)), {"b": "n2"}),
    "raw returned": (lambda: parts(raw_is_returned), {"b": "n2"}),
    "raw read": (lambda: parts(raw_is_read), {}),
    "in place": (lambda: parts(in_place), {"a": "n"}),
    "changed under": (lambda: parts(changed_under), {}),
    "two norms": (lambda: parts(lambda m, x: m.c(m.n2(m.b(m.n(m.b(m.a(x))))))), {}),
    "one norm twice": (lambda: parts(lambda m, x: m.c(m.n(m.b(m.n(m.b(m.a(x))))))), {"b": "n"}),
    "norm elsewhere": (lambda: parts(lambda m, x: m.c(m.n(m.b(m.n(m.a(x) + 1))))), {}),
    "activation between": (lambda: parts(lambda m, x: m.c(m.n(F.relu(m.a(x))))), {}),
    "by name": (lambda: parts(lambda m, x: m.c(input=m.n(input=m.a(input=x)))), {"a": "n"}),
    "transposed": (
        lambda: parts(chain, b=nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2)),
        {"a": "n", "b": "n2"},
    ),
}


@pytest.mark.parametrize(("make", "expected"), FOLDS.values(), ids=FOLDS)
def test_batch_norms_are_folded_where_they_alone_follow(make: Any, expected: dict[str, str]):
    """And nothing is lost at full rank, folded or not."""
    network = opened(make())
    assert norms(network) == expected
    assert not reasons(network)
    check_lossless(network)


class Doubled(nn.Conv2d):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class Dynamic(nn.Conv2d):
    """Its weight depends on its input."""

    def forward(self, x: Any) -> Any:
        return F.conv2d(x, self.weight * (1 + x.mean()), self.bias, padding=1)


class Standardized(nn.Conv2d):
    """Its weight does not; given by name, as F.conv2d allows."""

    def forward(self, x: Any) -> Any:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight=weight, bias=self.bias, padding=1)


def hooked() -> Any:
    module = parts(chain)
    module.c.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    return module


def cached(m: Any, x: Any) -> Any:
    if not hasattr(m, "scale"):
        m.scale = m.a.weight.std()
    return chain(m, x) * m.scale


class Listed(nn.Module):
    """Calls the first of its layers from a list that holds them as well."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, n_i in zip("abc", (3, 8, 8), strict=True):
            self.add_module(name, nn.Conv2d(n_i, 8, 3, padding=1))
        self.own = [self.a, self.b, self.c][:count]

    def forward(self, x: Any) -> Any:
        for layer in (*self.own, *list(self.children())[len(self.own) :]):
            x = layer(x)
        return x


def tied() -> Any:
    module = parts(lambda m, x: m.c(F.relu(m.d(F.relu(m.b(m.a(x)))))), d=nn.Conv2d(8, 8, 3, padding=1))
    module.d.weight = module.b.weight
    return module


def spectral() -> Any:
    wave = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.complex64)
    return parts(lambda m, x: m.c(m.b(m.a(x).to(torch.complex64)).real), b=wave)


TOO_MUCH = "its forward is more than one convolution, or not always the same"
KEPT: dict[str, tuple[Any, dict[str, str]]] = {
    "doubled": (lambda: parts(chain, b=Doubled(8, 8, 3, padding=1)), {"b": TOO_MUCH}),
    "dynamic": (lambda: parts(chain, b=Dynamic(8, 8, 3, padding=1)), {"b": TOO_MUCH}),
    "standardized": (lambda: parts(chain, b=Standardized(8, 8, 3, padding=1)), {}),
    "weight read": (
        lambda: parts(lambda m, x: chain(m, x) + F.conv2d(m.a(x), m.c.weight, padding=1)),
        {
            "c": BOUND,
            "c.weight": "computed by the function conv2d; use a module, like nn.Conv2d or nn.Linear",
        },
    ),
    "type read": (lambda: parts(lambda m, x: chain(m, x.to(m.a.weight.dtype))), {"a": BOUND}),
    "stride read": (lambda: parts(lambda m, x: chain(m, x) * m.a.stride[0]), {"a": BOUND}),
    "state made when run": (lambda: parts(cached), {"a": BOUND}),
    "hook": (hooked, {"c": BOUND}),
    "output size": (
        lambda: parts(
            lambda m, x: m.c(m.up(m.a(x), output_size=[16, 16])), up=nn.ConvTranspose2d(8, 8, 3, 2, 1)
        ),
        {"up": "it is called with more than its input"},
    ),
    "no batch": (
        lambda: parts(lambda m, x: torch.stack([m.a(picture) for picture in m.b(m.a(x))[:, :3]])),
        {"a": "its input has no batch dimension"},
    ),
    "depthwise": (
        lambda: parts(chain, b=nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        {"b": "depthwise convolution"},
    ),
    "in a list too": (lambda: Listed(1), {"a": BOUND}),
    "tied": (tied, dict.fromkeys("bd", "its weights are another layer's as well")),
    "complex": (spectral, {"b": "its weights are complex"}),
}


@pytest.mark.parametrize(("make", "expected"), KEPT.values(), ids=KEPT)
def test_layers_that_are_more_than_convolutions_are_kept(make: Any, expected: dict[str, str]):
    """With the reason; the others are not."""
    network = opened(make())
    assert reasons(network) == expected
    check_lossless(network)


ROWS: dict[str, tuple[Any, tuple[int, int], float]] = {
    "pixels": (lambda m, x: m.c(m.fc(m.a(x).movedim(1, -1)).movedim(-1, 1)), (64, 1), 1),
    "columns": (lambda m, x: m.fc(m.a(x).mean(2).mT), (8, 1), 1),
    "in turns": (lambda m, x: m.fc(m.a(x).mean(2).movedim(2, 0)).transpose(0, 1), (1, 1), 8),
}


@pytest.mark.parametrize(("forward", "size", "maps"), ROWS.values(), ids=ROWS)
def test_linear_layers_read_all_rows_of_a_sample(forward: Any, size: tuple[int, int], maps: float):
    """They are maps, on which low rank is all there is; nothing is lost at full rank."""
    network = opened(parts(forward, fc=nn.Linear(8, 8)))
    layer = next(la for la in network.layers if la.name == "fc")
    assert (layer.reason, layer.size, layer.maps) == ("", size, maps)
    assert layer.macs == layer.maps * 8 * 8 * size[0]
    check_lossless(network)
    samples = collect(pictures(), network.original, None, None)
    positions = np.random.default_rng(0).integers(0, size[0], (3, 5))
    both = network.observe(samples, {"fc": positions}), network.walk(samples).observe("fc", positions)
    for observations in map(list, both):
        patches = np.concatenate([one.patches for one in observations])[:, 0]
        assert patches.shape == (15, 8)
        if len(observations[0].outputs):
            expected = patches @ layer.weight[:, :, 0, 0].T + layer.bias
            outputs = np.concatenate([one.outputs for one in observations])
            np.testing.assert_allclose(outputs, expected, atol=1e-5)
        if maps == 1:
            rows = rows_of(network, pictures()).reshape(3, -1, 8)
            expected = rows[np.arange(3)[:, None], positions].reshape(15, 8)
            np.testing.assert_allclose(patches, expected, atol=1e-5)


def rows_of(network: TorchNetwork, x: Any) -> Any:
    """What the linear layer of a module reads."""
    read: list[Any] = []
    module = copy.deepcopy(network.original)
    module.fc.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    with torch.no_grad():
        module(x)
    return read[-1]


def functional_layer(m: Any, x: Any) -> Any:
    return m.c(F.conv2d(m.a(x), m.kernel[0], padding=1))


def exported() -> Any:
    program = torch.export.export(
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)).eval(), (torch.ones(1, 8, 8, 8),)
    )
    return program.module()


def with_attention(m: Any, x: Any) -> Any:
    rows = m.a(x).flatten(2).mT  # (n, 64, 8)
    return m.attention(rows, rows, rows)[0]


CONV = 8 * 8 * 9 * 64
RECURRENT, PRODUCT = "recurrent layer", "a product of two computed tensors"
OTHERS: dict[str, tuple[Any, dict[str, tuple[int, int, str]]]] = {
    "functional": (
        lambda: parts(functional_layer, kernel=nn.ParameterList([torch.ones(8, 8, 3, 3)])),
        {"kernel.0": (CONV, 576, "computed by the function conv2d")},
    ),
    "lstm": (
        lambda: parts(lambda m, x: m.lstm(m.a(x).flatten(2))[0], lstm=nn.LSTM(64, 4, batch_first=True)),
        {"lstm": (8 * 16 * (64 + 4), 16 * (64 + 4 + 2), RECURRENT)},
    ),
    "gru": (
        lambda: parts(lambda m, x: m.gru(m.a(x).flatten(2))[0], gru=nn.GRU(64, 4, batch_first=True)),
        {"gru": (8 * 12 * (64 + 4), 12 * (64 + 4 + 2), RECURRENT)},
    ),
    "attention": (
        lambda: parts(with_attention, attention=nn.MultiheadAttention(8, 2, batch_first=True)),
        {
            "attention.in_proj_weight": (64 * 8 * 24, 8 * 24, "computed by the function multi_head"),
            "attention:multi_head_attention_forward": (2 * 64 * 64 * 8, 0, PRODUCT),
            "attention.out_proj.weight": (64 * 8 * 8, 8 * 8 + 8, "computed by the function multi_head"),
        },
    ),
    "matmul": (lambda: parts(lambda m, x: m.a(x) @ m.a(x).mT), {"Parts:matmul": (8 * 8 * 64, 0, PRODUCT)}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("make", "expected"), OTHERS.values(), ids=OTHERS)
def test_everything_that_costs_macs_is_listed(make: Any, expected: dict[str, tuple[int, int, str]]):
    """Functions and recurrent layers too; modules that are never called cost nothing."""
    network = opened(make())
    found = {layer.name: layer for layer in network.layers if layer.reason}
    costs = {name: (layer.macs, layer.parameters) for name, layer in found.items()}
    assert costs == {name: (macs, parameters) for name, (macs, parameters, _) in expected.items()}
    assert all(found[name].reason.startswith(reason) for name, (*_, reason) in expected.items())
    assert {layer.name for layer in network.layers} - found.keys() <= {"a", "c"}
    assert network.layers[0].name == "a"
    check_lossless(network)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_program_that_was_exported_is_counted_and_kept():
    """It has no modules that could be replaced; those beside it are."""
    program = exported()
    costs = [8 * 8 * 9 * 36, 8 * 8 * 36]
    assert [layer.macs for layer in opened(program, torch.ones(2, 8, 8, 8)).layers] == costs
    with pytest.raises(ModelError, match=r"\(0\.weight and 1 more: computed by the function conv2d"):
        netdecouple.decouple(program, torch.ones(20, 8, 8, 8), macs=0.5)
    network = opened(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), program))
    assert [layer.macs for layer in network.layers] == [3 * 8 * 9 * 64, *costs]
    assert list(reasons(network)) == ["1.0.weight", "1.1.weight"]


SHAPES: dict[str, Any] = {
    "weight norm": lambda: parts(chain, b=parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))),
    "weight norms": lambda: parts(
        chain,
        b=parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
        c=parametrizations.weight_norm(nn.Conv2d(8, 4, 3, padding=1)),
    ),
    "old weight norm": lambda: parts(chain, b=nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1))),
    "spectral norm": lambda: parts(chain, b=parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))),
    "old spectral norm": lambda: parts(chain, b=nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))),
    "two names": lambda: parts(lambda m, x: m.d["k"](m.b(m.a(x))) + m.other(m.a(x)), **shared()),
    "several sizes": lambda: parts(lambda m, x: (m.c(m.b(m.a(x))), m.c(m.b(m.a(x[..., ::2, ::2]))))),
    "control flow": lambda: parts(lambda m, x: m.c(m.b(m.a(x)) if x.mean() < 9 else m.a(x))),
    "tuple": lambda: parts(lambda m, x: (chain(m, x), [x.sum((1, 2, 3)), "name"])),
    "dataclass": lambda: parts(lambda m, x: Answer(chain(m, x), (x, 3))),
    "parallel": lambda: nn.DataParallel(parts(chain)),
    "sequential": lambda: nn.Sequential(parts(chain), nn.ReLU(inplace=True)),
    "a layer": lambda: nn.Conv2d(3, 8, 3, bias=False).eval(),
    "double": lambda: parts(chain).double(),
}


def shared() -> dict[str, nn.Module]:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    return {"b": conv, "other": conv, "d": nn.ModuleDict({"k": conv})}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_nothing_is_lost_at_full_rank(make: Any):
    """However the module holds its layers, and whatever it gives back."""
    network = opened(make())
    assert network.torch_layers
    assert not reasons(network)
    check_lossless(network)


@pytest.mark.parametrize(("name", "tolerance"), [("bfloat16", 0.1), ("half", 0.01)])
def test_half_precision(name: str, tolerance: float):
    """Folding rounds there; it is still the same network, run in batches."""
    network = opened(getattr(parts(chain), name)())
    assert norms(network) == {"a": "n", "b": "n2"}
    assert network.batchable
    assert network.notes == ()
    check_lossless(network, tolerance)


def test_mixed_precision_inside():
    """A forward that casts by itself; inputs are of another type than weights then."""

    def forward(m: Any, x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return chain(m, x).float()

    network = opened(parts(forward))
    assert norms(network) == {"a": "n", "b": "n2"}
    assert not reasons(network)
    check_lossless(network, 0.1)


@pytest.mark.parametrize("first", [True, False])
def test_samples_are_of_the_type_that_the_input_is_wanted_in(first: bool):
    """Not simply of the first parameter's, nor of their own."""
    half = nn.Linear(8, 4).half()
    layers = [half, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)]
    module = nn.ModuleList(layers if first else layers[1:] + layers[:1])
    body = parts(lambda m, x: m.layers[0 if first else 2](m.run(x).mean((2, 3)).half()), layers=module)
    body.run = nn.Sequential(*layers[1:])
    network = opened(body)
    assert network.dtype == torch.float32
    assert opened(body.half()).dtype == torch.float16


def test_frozen_numbers_of_a_layer_may_be_buffers():
    module = parts(chain)
    for name in ("weight", "bias"):
        value = getattr(module.b, name).detach()
        delattr(module.b, name)
        module.b.register_buffer(name, value)
    check_lossless(opened(module))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_stay_as_they_are():
    """Hooks cannot observe the layers inside."""
    part = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))
    network = opened(parts(lambda m, x: m.c(m.part(m.b(m.a(x)))), part=part))
    assert list(network.torch_layers) == ["a", "b", "c"]
    check_lossless(network)
    assert all(p.requires_grad for p in exact(network).parameters())


def test_names_under_which_a_layer_stands_change_together():
    """It is one layer."""
    network = opened(SHAPES["two names"]())
    new = exact(network)
    assert new.b is new.other is new.d["k"]
    assert isinstance(new.b, Factorized)


def test_a_norm_that_stays_normalises_in_training_as_it_did():
    """It does more than normalise; its batch statistics are then those of what was its own output."""
    module = parts(chain, n=NormAct(8), b=nn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():
        module.n.weight.uniform_(0.05, 0.25)
        module.n.bias.normal_()
    new = exact(opened(module))
    x = pictures(64)
    with torch.no_grad():
        module.n.train(), new.n.train()
        before, after = module.n(module.a(x)), new.n(new.a(x))
    assert (before - after).norm() < 1e-2 * before.norm()


def test_modes_gradients_and_hooks_stay():
    """In the module given and in the one made."""
    module = parts(chain).train()
    module.b.eval().requires_grad_(False)
    calls = []
    module.n2.register_forward_hook(lambda *_: calls.append(1))
    state = copy.deepcopy(module.state_dict())
    network = opened(module)
    new = exact(network)
    assert [new.training, new.a.training, new.b.training] == [True, True, False]
    assert not any(p.requires_grad for p in new.b.parameters())
    assert all(p.requires_grad for p in new.a.parameters())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())
    assert module.training
    assert not module.b.training
    assert [len(p._forward_hooks) + len(p._forward_pre_hooks) for p in module.modules()].count(1) == 1


def block(add: Callable[[Any, Any], Any], **own: nn.Module) -> Any:
    def forward(m: Any, x: Any) -> Any:
        x = F.relu(m.a(x))
        return m.c(F.relu(add(m.n2(m.b(x)), x)))

    return parts(forward, **own)


def in_place_add(y: Any, x: Any) -> Any:
    y += x
    return y


SUMS: dict[str, tuple[Any, bool]] = {
    "y + x": (lambda y, x: y + x, True),
    "x + y": (lambda y, x: x + y, True),
    "y += x": (in_place_add, True),
    "add": (torch.add, True),
    "add by name": (lambda y, x: torch.add(input=y, other=x), True),
    "add_": (lambda y, x: y.add_(x), True),
    "scaled": (lambda y, x: torch.add(y, x, alpha=3), False),
    "scaled in place": (lambda y, x: y.add_(x, alpha=3), False),
    "broadcast": (lambda y, x: y + x.mean((2, 3), keepdim=True), False),
    "twice": (lambda y, x: y + y, False),
    "read again": (lambda y, x: (y + x) * y, False),
    "a number": (lambda y, x: y + 1, False),
    "subtracted": (lambda y, x: x - y, False),
}


@pytest.mark.parametrize(("add", "found"), SUMS.values(), ids=SUMS)
def test_shortcuts_are_found_where_they_are_added(add: Any, found: bool):
    """What is added to a branch's last layer, if it is known before that layer runs."""
    network = opened(block(add))
    assert network.torch_layers["b"].shortcut == (("b", "x") if found else None)
    positions = {"b": np.tile(np.arange(64), (3, 1))}
    samples = collect(pictures(), network.original, None, None)
    (observed,) = network.observe(samples, positions)
    if not found:
        assert observed.shortcut is None
        return
    m = network.original
    with torch.no_grad():
        x = F.relu(m.a(pictures()))
        y = m.n2(m.b(x))
    rows = lambda t: t.flatten(2).transpose(1, 2).reshape(-1, 8).numpy()  # noqa: E731
    np.testing.assert_allclose(observed.shortcut, rows(x), atol=1e-6)
    np.testing.assert_allclose(observed.outputs, rows(y), atol=1e-5)


def test_a_shortcut_that_is_computed_later_is_none():
    """As in torchvision's blocks with a downsample; where it comes first, it is one."""

    def after(m: Any, x: Any) -> Any:
        x = m.a(x)
        y = m.b(F.relu(x))
        return m.c(y + m.down(x))

    def before(m: Any, x: Any) -> Any:
        x = m.a(x)
        short = m.down(x)
        return m.c(m.b(F.relu(x)) + short)

    down = nn.Conv2d(8, 8, 1)
    assert opened(parts(after, down=down)).torch_layers["b"].shortcut is None
    assert opened(parts(before, down=down)).torch_layers["b"].shortcut == ("down", "y")


def test_pre_activation_blocks():
    """Activated in place, a block's input is the activated one, on the shortcut as well."""

    def forward(m: Any, x: Any) -> Any:
        x = m.a(x)
        y = m.b(F.relu_(m.n(x)))
        return m.c(y + x)

    network = opened(parts(forward))
    assert network.torch_layers["b"].shortcut == ("a", "y")
    assert not network.torch_layers["a"].norm


def test_a_module_that_takes_one_sample_at_a_time_is_run_so_which_is_said():
    """Two fail, or come out as one."""
    for forward in (
        lambda m, x: m.b(m.a(x)).reshape(1, -1),
        lambda m, x: m.b(m.a(x.reshape(1, *x.shape[1:]))),
    ):
        network = opened(parts(forward))
        assert (network.batchable, network.notes) == (False, (ONE_BY_ONE,))


def test_samples_of_other_sizes_than_the_first():
    """They are run one by one, though the first two could be run together."""
    batches = [pictures(2), pictures(1, 6), pictures(1, 10)]
    network = opened(parts(chain), batches)
    assert not network.batchable
    assert network.notes == ()
    samples = collect(batches, network.original, None, None)
    positions = {"b": np.zeros((4, 1), np.int64)}
    assert len(list(network.observe(samples, positions))) == 4
    check_lossless(network)


def test_running_ends_after_the_last_captured_output():
    """A detector's sorting of boxes does not run, once all of its heads have been called."""
    ends = []

    def forward(m: Any, x: Any) -> Any:
        x = m.b(m.a(x))
        scores = m.c(x) + m.c(x.flip(-1)).flip(-1)
        ends.append(1)
        return scores[scores > scores.mean()]  # as many as there happen to be

    network = opened(parts(forward))
    assert network.captured == {"a": 1, "b": 1, "c": 2}
    ends.clear()
    samples = collect(pictures(), network.original, None, None)
    _, b, c = network.run(samples)
    assert not ends
    with torch.no_grad():
        x = network.original.b(network.original.a(pictures()))
        np.testing.assert_allclose(b, x, atol=1e-5)
        np.testing.assert_allclose(c, network.original.c(x.flip(-1)), atol=1e-5)  # of the last call


def test_observing_ends_with_the_last_layer_that_is_observed():
    network = opened(parts(chain))
    calls = []
    network.module.get_submodule("c").register_forward_hook(lambda *_: calls.append(1))
    samples = collect(pictures(), network.original, None, None)
    for name, runs in (("a", 0), ("c", 1)):
        (observed,) = network.observe(samples, {name: np.tile(np.arange(64), (3, 1))})
        assert (observed.layer, len(observed.patches), len(calls)) == (name, 3 * 64, runs)


def test_fingerprints_know_numbers_and_structure():
    """But not where in memory something lies."""
    module = parts(chain)
    prints = {opened(module).fingerprint, opened(copy.deepcopy(module)).fingerprint}
    assert len(prints) == 1
    other = copy.deepcopy(module)
    other.n.running_mean[0] += 1
    strided = copy.deepcopy(module)
    strided.b.stride = (2, 2)
    assert len(prints | {opened(m).fingerprint for m in (other, strided)}) == 3

    class Shown(nn.Conv2d):
        def extra_repr(self) -> str:
            return repr(object())

    torch.manual_seed(0)
    one, two = Shown(3, 8, 3).eval(), Shown(3, 8, 3).eval()
    two.load_state_dict(one.state_dict())
    assert opened(one).fingerprint == opened(two).fingerprint


def test_a_filter_leaves_layers_alone():
    """By name and module."""
    network = opened(parts(chain), chosen=lambda name, m: name != "b" and m.out_channels != 4)
    assert reasons(network) == {"b": "excluded by the filter", "c": "excluded by the filter"}
    assert list(network.torch_layers) == ["a"]


def dropped(m: Any, x: Any) -> Any:
    return m.c(F.dropout(m.a(x), 0.5, training=True))


def raising(m: Any, x: Any) -> Any:
    raise LookupError("no such\nthing")


REFUSED: dict[str, tuple[Any, str]] = {
    "random": (lambda: parts(dropped), r"\(\) in 'the module' is random"),
    "random part": (lambda: parts(lambda m, x: m.d(chain(m, x)), d=Noisy()), r"randn\(\) in 'd' is random"),
    "raises": (lambda: parts(raising), "fails on a calibration sample: LookupError: no such; calib must"),
    "nothing": (nn.ReLU, "runs no convolutions"),
    "lazy": (lambda: nn.LazyConv2d(8, 3), "run it once"),
    "meta": (lambda: parts(chain).to("meta"), "on the meta device"),
    "list": (lambda: Listed(3), "calls its layers from a list or dict of its own"),
    "scripted": (lambda: torch.jit.script(nn.Conv2d(3, 8, 3)), "scripted"),
    "compiled": (lambda: torch.compile(parts(chain), backend="eager"), "a compiled module"),
    "no copy": (lambda: parts(chain, d=NoCopy()), "must survive copy.deepcopy"),
}


class Noisy(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + torch.randn(x.shape)


class NoCopy(nn.Identity):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("there is only one")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_decoupled_is_refused(make: Any, message: str):
    """In one line."""
    with pytest.raises(ModelError, match=message) as caught:
        opened(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_devices_that_are_not_there(device: str):
    with pytest.raises(ModelError, match=device) as caught:
        opened(parts(chain), device=device)
    assert "\n" not in str(caught.value)


def test_a_later_sample_may_fail_too():
    """When it is run."""

    def forward(m: Any, x: Any) -> Any:
        if x.max() > 50:
            raise ValueError("too bright")
        return chain(m, x)

    x = pictures(4)
    x[3] += 100
    network = opened(parts(forward), x)
    samples = collect(x, network.original, None, None)
    with pytest.raises(ModelError, match="too bright"):
        network.run(samples)
    assert not any(part._forward_hooks for part in network.module.modules())


def test_activations_that_are_not_finite_are_refused_by_layer():
    x = pictures()
    x[2, 0, 0, 0] = torch.nan
    network = opened(parts(chain), x)
    samples = collect(x, network.original, None, None)
    with pytest.raises(ModelError, match="NaN or Inf in the activations of layer 'a'"):
        list(network.observe(samples, {"a": np.tile(np.arange(64), (3, 1))}))

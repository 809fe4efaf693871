"""The walk observes what running the module again with replaced layers gives, and leaves no threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import netdecouple  # noqa: E402
from netdecouple import Settings  # noqa: E402
from netdecouple.convolution import Factorization  # noqa: E402
from netdecouple.errors import ModelError  # noqa: E402
from netdecouple.execution.memory import Memory  # noqa: E402
from netdecouple.families import Problem  # noqa: E402
from netdecouple.families.chain import Step, method  # noqa: E402
from netdecouple.fitting.sampling import sample_positions  # noqa: E402
from netdecouple.frontends.torch.network import TorchNetwork  # noqa: E402
from netdecouple.frontends.torch.samples import Samples, collect  # noqa: E402
from netdecouple.network import Layer, Observation  # noqa: E402
from netdecouple.planning.candidates import Rule  # noqa: E402


class Residual(nn.Module):
    """In-place activations and sums, a layer that is called twice, and one that dark samples skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.bright = nn.Conv2d(8, 8, 3, padding=1)
        self.end = nn.Conv2d(8, 4, 3, stride=2)

    def forward(self, x: Any) -> Any:
        bright = bool(x.mean() > 0)
        x = F.relu_(self.stem(x))
        y = self.two(F.relu_(self.norm(self.one(x))))
        y += x
        y = F.relu_(self.twice(F.relu_(self.twice(y))))
        if bright:
            y = y + self.bright(y)
        return self.end(y)


@pytest.fixture
def x() -> Any:
    """The first samples are bright, and the last one is dark."""
    x = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x[:8] += 0.5
    x[-3:] -= 2
    return x


@pytest.fixture
def module() -> Any:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def samples(module: Any, x: Any) -> Samples:
    return collect(x, module, None, None)


@pytest.fixture(params=[1, 4, 128])
def network(request: Any, module: Any, samples: Samples) -> TorchNetwork:
    """In batches of several sizes."""
    opened = TorchNetwork(module, samples, memory=Memory(batch_bytes=request.param * 16 * 8 * 64))
    assert len(opened.batches(12)) == -(-12 // request.param)
    return opened


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def halved(layer: Layer) -> Factorization:
    """About half of a layer, far from it."""
    chosen = method("nd-dp", rounds=0)
    problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
    size = max(chosen.exact(layer.geometry)[0] // 3, 1)
    return chosen.fit(problem, [Step(size)])[0].astype(np.float32)


def run_again(
    network: TorchNetwork, samples: Samples, layer: Layer, done: dict[str, Factorization]
) -> dict[int, Observation]:
    """What a layer reads in the module with the layers before it replaced, run from the start."""
    other = TorchNetwork(network.build(done), samples, chosen=lambda name, m: name == layer.name)
    other.batches = lambda count, held=0: network.batches(count)  # type: ignore[method-assign]
    positions = {layer.name: sample_positions(layer, len(samples), 0)}
    return {observed.images.start: observed for observed in other.observe(samples, positions)}


@pytest.mark.parametrize("held", [1 << 30, 0])
def test_observes_what_running_again_gives(
    network: TorchNetwork, samples: Samples, held: int, monkeypatch: pytest.MonkeyPatch
):
    """Inputs and shortcuts, layer after layer, whether passes wait or are given up and begun again."""
    network.memory = replace(network.memory, store_bytes=held)
    walk = network.walk(samples)
    done: dict[str, Factorization] = {}
    for layer in network.layers:
        assert not layer.reason
        expected = {} if layer.name == "twice" else run_again(network, samples, layer, done)
        positions = sample_positions(layer, len(samples), 0)
        for observed in walk.observe(layer.name, positions):
            if layer.name == "twice":
                continue  # the original's
            again = expected.pop(observed.images.start)
            np.testing.assert_allclose(observed.patches, again.patches, atol=1e-5)
            assert (
                (observed.shortcut is None)
                == (again.shortcut is None)
                == (layer.name not in ("two", "bright"))
            )
            if observed.shortcut is not None:
                np.testing.assert_allclose(observed.shortcut, again.shortcut, atol=1e-5)
        assert not expected, layer.name
        done[layer.name] = halved(layer)
        walk.replace(layer.name, done[layer.name])
    decoupled = network.evaluated(network.build(done))
    assert np.abs(network.run(samples)[0] - network.run_module(decoupled, samples)[0]).max() > 0.05


def test_layers_may_be_left_alone(network: TorchNetwork, samples: Samples):
    """The walk goes past them."""
    walk = network.walk(samples)
    cut = network.batches(len(samples))
    network.batches = lambda count, held=0: cut  # type: ignore[method-assign]
    for name in ("two", "end"):
        positions = sample_positions(network.torch_layers[name].layer, len(samples), 0)
        original = {o.images.start: o for o in network.observe(samples, {name: positions})}
        observations = list(walk.observe(name, positions))
        assert len(observations) == len(original) == len(cut)
        for observed in observations:
            np.testing.assert_allclose(observed.patches, original[observed.images.start].patches, atol=1e-5)


@pytest.mark.parametrize("end", ["close", "forget", "finish"])
def test_threads_end_with_the_walk(network: TorchNetwork, samples: Samples, end: str):
    """However it ends, and at once."""
    before = set(threading.enumerate())
    walk = network.walk(samples)
    for name in ("stem", "one"):
        layer = network.torch_layers[name].layer
        for _ in walk.observe(name, sample_positions(layer, len(samples), 0)):
            pass
    assert len(set(threading.enumerate()) - before) == len(network.batches(len(samples)))
    if end == "close":
        network.close()
    elif end == "finish":
        layer = network.torch_layers["end"].layer
        list(walk.observe("end", sample_positions(layer, len(samples), 0)))
        network.close()
    else:
        del walk
    assert set(threading.enumerate()) <= before


def test_an_error_in_a_pass_is_raised_where_it_is_waited_for(module: Any, x: Any):
    """With the walk's passes ended, though the error keeps its frames alive."""

    class Failing(Residual):
        def forward(self, x: Any) -> Any:
            if torch.is_grad_enabled() or threading.current_thread() is not threading.main_thread():
                self.one.register_forward_hook(fail)
            return super().forward(x)

    def fail(*_: Any) -> None:
        raise ValueError("only in a pass")

    torch.manual_seed(0)
    failing = Failing().eval()
    before = set(threading.enumerate())
    with pytest.raises(ModelError, match="ValueError: only in a pass") as caught:
        netdecouple.decouple(failing, x, macs=0.7, settings=Settings(families=("nd-dp",)))
    assert set(threading.enumerate()) <= before
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", ["Collecting moments", "Evaluating candidates", "Decoupling layers"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_leaves_nothing_behind(module: Any, x: Any, step: str, error: type[BaseException]):
    """No thread, no hook, no changed number or mode."""
    module.train()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    before = set(threading.enumerate())
    running = []

    def progress(name: str, done: int, total: int) -> None:
        if name.startswith(step):
            running.append(len(set(threading.enumerate()) - before))
            raise error

    with pytest.raises(error) as caught:
        netdecouple.decouple(module, x, macs=0.7, settings=Settings(families=("nd-dp",)), progress=progress)
    assert caught.value is not None
    assert set(threading.enumerate()) <= before
    assert running == [1 if step == "Decoupling layers" else 0]  # something was there to be ended
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())
    assert module.training
    assert not any(p._forward_hooks or p._forward_pre_hooks for p in module.modules())


def test_a_walk_may_end_in_one_of_its_passes(samples: Samples):
    """After Ctrl-C the running pass may drop the walk's last reference; its own thread cannot be joined."""
    walks: list[Any] = []
    threads: list[threading.Thread] = []

    class Ending(Residual):
        def forward(self, x: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                threads.append(threading.current_thread())
                walks.pop().close()
            return super().forward(x)

    network = TorchNetwork(Ending().eval(), samples)
    walks.append(network.walk(samples))
    walk = walks[0]
    positions = sample_positions(network.torch_layers["stem"].layer, len(samples), 0)
    list(walk.observe("stem", positions))
    (ended,) = threads
    ended.join(60)
    assert not ended.is_alive()
    assert not walks
    assert not walk.close.alive


@pytest.mark.parametrize("batch", [1, 3, 128])
def test_layers_that_not_every_batch_runs(module: Any, x: Any, batch: int, monkeypatch: pytest.MonkeyPatch):
    """They are fitted where original and decoupled network both run them, whatever the batches."""
    monkeypatch.setattr(Memory, "within", lambda *_: Memory(batch_bytes=batch * 16 * 8 * 64))
    settings = Settings(rule=Rule("nd-dp", "share", 0.5))
    new = netdecouple.decouple(module, x, settings=settings)
    assert {row.name: row.changed for row in new.decoupling.plan.layers}["bright"]
    with torch.no_grad():
        for one in x.split(1):
            assert torch.isfinite(new(one)).all()


def test_a_layer_may_be_called_with_nothing(x: Any, monkeypatch: pytest.MonkeyPatch):
    """The head of a detector that found nothing in the inputs of one batch."""

    class Detector(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 16, 3, padding=1)

        def forward(self, x: Any) -> Any:
            found = x[x.mean((1, 2, 3)) > 0.2]
            crops = torch.cat([found, found.flip(3)])  # two calls' worth of maps
            return super().forward(x), self.head(crops).sum()

    monkeypatch.setattr(Memory, "within", lambda *_: Memory(batch_bytes=16 * 8 * 64))
    torch.manual_seed(0)
    module = Detector().eval()
    network = TorchNetwork(module, collect(x, module, None, None))
    positions = sample_positions(network.torch_layers["head"].layer, len(x), 0)
    seen = list(network.observe(collect(x, module, None, None), {"head": positions}))
    assert 0 < sum(len(observation.patches) for observation in seen) < positions.size

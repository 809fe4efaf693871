"""The timer measures layers in structures and whole modules, in every runtime that modules run in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from netdecouple.convolution import Structure  # noqa: E402
from netdecouple.errors import ModelError, UnavailableError  # noqa: E402
from netdecouple.families import Problem  # noqa: E402
from netdecouple.families.chain import Step, method  # noqa: E402
from netdecouple.frontends.torch.network import TorchNetwork  # noqa: E402
from netdecouple.frontends.torch.samples import collect  # noqa: E402
from netdecouple.frontends.torch.timing import TorchTimer  # noqa: E402
from netdecouple.network import Layer  # noqa: E402
from tests.frontends.torch.modules import inputs, net  # noqa: E402

pytestmark = pytest.mark.usefixtures("short_timing")
RUNTIMES = ["torch", "onnxruntime", "openvino", pytest.param("torch.compile", marks=pytest.mark.slow)]


def timer(module: Any, runtime: str = "torch", threads: int = 1, x: Any = None) -> tuple[Any, Any]:
    """A timer, and the network."""
    if runtime == "openvino":
        pytest.importorskip("openvino")
    samples = collect(inputs() if x is None else x, module, None, None)
    network = TorchNetwork(module, samples)
    return TorchTimer(network, runtime, threads), network


def structures(layer: Layer, *families: str) -> list[tuple[Structure, str]]:
    """The layer as it is, and factorizations of it."""
    problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
    fitted = [method(name, rounds=0).fit(problem, [Step(2)])[0].structure for name in families]
    return [(structure, "parallel") for structure in (Structure.of(layer.geometry, layer.geometry), *fitted)]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_times_every_structure_of_a_layer(runtime: str):
    """A layer with a BatchNorm; the module and the state of the random numbers stay as they are."""
    module = net()
    timed, network = timer(module, runtime)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.random.get_rng_state()
    layer = network.torch_layers["conv"].layer
    assert timed.forms(layer) == ("parallel",)
    times = timed.layer_times(layer, structures(layer, "cd", "nd-dp"))
    assert len(times) == 3
    assert all(0 < time < 1e4 for time in times)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runs_whole_modules_on_the_first_sample(runtime: str):
    """They compute what the modules compute."""
    modules = [net(), net(seed=1)]
    timed, _ = timer(modules[0], runtime)
    runs = timed.runs(modules)
    assert len(runs) == 2
    for run, module in zip(runs, modules, strict=True):
        (output,) = run()
        with torch.no_grad():
            np.testing.assert_allclose(output, module(inputs()[:1]), atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 8, 3, padding="same"),
        nn.Conv3d(3, 8, 3),
        nn.ConvTranspose2d(3, 8, 3, stride=2, output_padding=1),
        nn.Conv2d(3, 8, (3, 2), padding="same", padding_mode="reflect"),
        nn.Linear(3, 8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_every_kind_are_timed(layer: Any):
    """On inputs of the size that they have in the module."""
    size = () if isinstance(layer, nn.Linear) else (6,) * (layer.weight.ndim - 2)
    timed, network = timer(layer, x=torch.randn(4, 3, *size))
    times = timed.layer_times(network.layers[0], structures(network.layers[0], "cd"))
    assert len(times) == 2
    assert min(times) > 0


def test_is_named_after_the_runtime_and_its_threads():
    module, version = net(), torch.__version__.partition("+")[0]
    assert timer(module)[0].name == f"torch {version}, 1 thread"
    assert timer(module, threads=2)[0].name == f"torch {version}, 2 threads"


def test_runtimes_that_do_not_exist_are_refused():
    with pytest.raises(UnavailableError, match="no runtime 'tensorflow'"):
        timer(net(), "tensorflow")


class ByName(nn.Module):
    """Takes its tensor by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, *, x: Any) -> Any:
        return self.conv(x)


@pytest.mark.parametrize(
    ("runtime", "message"), [("torch", "take tensors by position"), ("onnxruntime", "take one tensor")]
)
def test_samples_that_the_runtime_cannot_take_are_refused(runtime: str, message: str):
    with pytest.raises(ModelError, match=message):
        timer(ByName(), runtime, x={"x": inputs()})


class BySize(nn.Module):
    """Computes something else for larger batches, which a trace does not record."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return y * 2 if len(x) > 2 else y


def test_modules_that_cannot_be_exported_are_refused():
    """By the runtimes that need an export, in one line."""
    module = BySize().eval()
    timer(module)[0].runs([module])
    with pytest.raises(ModelError, match="differs in ONNX Runtime") as caught:
        timer(module, "onnxruntime")[0].runs([module])
    assert "\n" not in str(caught.value)

"""The operator in PyTorch: right results, weights as they are now, and all that is done to modules."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from tests.kernels.cases import COUNT, TOLERANCE, case, rows_of, separable

torch = pytest.importorskip("torch")

from netdecouple.kernels import torch as fused  # noqa: E402
from tests.kernels.module import DecoupledConv2d  # noqa: E402

GEOMETRY = ConvGeometry(6, 6, 3, 3, pads=(1, 1, 1, 1))
WEIGHTS = ("depthwise", "pointwise", "bias", "slope", "channels")
built = pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")


def module_of(seed: int = 0, g: ConvGeometry = GEOMETRY, **options: Any) -> Any:
    """A layer with random weights that has everything, and as many outputs as inputs."""
    rng = np.random.default_rng(seed)
    made = separable(g, rows_of([2] * (g.n_i // g.groups), g.groups, rng), rng)
    options = {"slope": rng.standard_normal(g.n_o, np.float32), "limits": (-3, 6)} | options
    return DecoupledConv2d.of(made, **options)


def images(*shape: int) -> Any:
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape or (2, 6, 9, 11), np.float32))


def chain(module: Any, x: Any, residual: Any = None) -> Any:
    """What the module stands for, in standard operators."""
    g = module.geometry
    y = torch.nn.functional.conv2d(
        x[:, module.channels],
        module.depthwise,
        stride=g.strides,
        padding=g.pads[:2],
        dilation=g.dilations,
        groups=len(module.channels),
    )
    y = torch.nn.functional.conv2d(y, module.pointwise, module.bias, groups=g.groups)
    y = y if residual is None else y + residual
    return torch.nn.functional.prelu(y, module.slope).clamp(-3, 6)


def check(module: Any, x: Any = None) -> None:
    """Make sure that the module computes with the weights it has now."""
    x = images() if x is None else x
    with torch.no_grad():
        torch.testing.assert_close(module(x), chain(module, x), rtol=1e-5, atol=3e-5)  # outputs reach 6


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every packed layer that is made, weakly; those made before are forgotten.

    What is there is left out of garbage collections, which would take seconds where many tests ran before.
    """
    fused.forget()
    gc.freeze()
    found = []
    original = kernels.DecoupledConv

    def pack(*arguments: Any) -> Any:
        layer = original(*arguments)
        found.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(kernels, "DecoupledConv", pack)
    return found


# --- results


@pytest.mark.parametrize("library", [pytest.param(True, marks=built), False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layers_come_out_as_in_float64(library: bool, layout: str, monkeypatch, tmp_path: Path) -> None:
    """Groups, ranks, strides, dilations, pads, slopes, limits and residuals; with the library and without."""
    if not library:
        monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    for seed in range(0, COUNT, 8):
        one = case(seed)
        module = DecoupledConv2d.of(one.factorization, slope=one.slope, limits=one.limits)
        tensors = [None if a is None else torch.from_numpy(a) for a in (one.x, one.residual)]
        if layout == "channels_last":
            tensors = [None if t is None else t.to(memory_format=torch.channels_last) for t in tensors]
        with torch.inference_mode():
            y = module(*tensors)
        assert y.is_contiguous()
        expected, scale = one.expected()
        np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * scale, err_msg=f"case {seed}")


def test_a_layer_of_any_form_is_taken() -> None:
    """A depthwise stage with a channel multiplier; float64; no bias, no slope, no limits."""
    rng = np.random.default_rng(0)
    depthwise = ConvGeometry(12, 4, 3, 5, groups=4)
    pointwise = ConvGeometry(3, 12, 1, 1)
    stages = tuple(ConvStage(g, rng.standard_normal(g.weight_shape)) for g in (depthwise, pointwise))
    made = Factorization(ConvGeometry(3, 4, 3, 5), stages)
    x = images(2, 4, 8, 9)
    np.testing.assert_allclose(DecoupledConv2d.of(made)(x).detach(), made(x.numpy()), atol=1e-5)


@pytest.mark.parametrize("library", [pytest.param(True, marks=built), False])
def test_gradients_are_those_of_standard_operators(library: bool, monkeypatch, tmp_path: Path) -> None:
    """Of every weight and input, also where one tensor is both inputs, and of gradients themselves."""
    if not library:
        monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    module = module_of()
    for run in (
        lambda f, x, r: f(x, r),
        lambda f, x, r: f(x, x) + r,
        lambda f, x, r: f(x) * r,
    ):
        found = []
        for f in (module, lambda x, residual=None: chain(module, x, residual)):
            x, r = images().requires_grad_(), images().flip(0).requires_grad_()
            leaves = [x, r, *module.parameters()]
            first = torch.autograd.grad(run(f, x, r).square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            found.append([*first, *second])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max()))


def test_only_what_needs_a_gradient_gets_one() -> None:
    module = module_of().requires_grad_(False)
    x = images().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert [p.grad for p in module.parameters()] == [None] * 4


@pytest.mark.parametrize(
    ("x", "residual", "message"),
    [
        (lambda: images(6, 5, 5), None, r"input has shape \(6, 5, 5\), not \(n, 6, h, w\)"),
        (lambda: images(1, 5, 5, 5), None, r"input has shape \(1, 5, 5, 5\)"),
        (lambda: images(1, 6, 0, 5), None, "0×5 is smaller than the kernel"),
        (lambda: images().double(), None, r"x must be torch.float32 on the CPU, not torch.float64 on cpu"),
        (lambda: images().bfloat16(), None, "not torch.bfloat16"),
        (images, lambda: images(1, 6, 9, 11), r"residual has shape \(1, 6, 9, 11\), not \(2, 6, 9, 11\)"),
        (images, lambda: images().double(), "residual must be torch.float32 on the CPU"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Callable, residual: Callable | None, message: str) -> None:
    """At the first call, and when the weights are packed already."""
    module = module_of()
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match=message) as caught:
            module(x(), None if residual is None else residual())
        assert "\n" not in str(caught.value)
        check(module)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(name: str) -> None:
    """The error names a wrong shape or dtype."""
    dtype = "torch.int64" if name == "channels" else "torch.float32"
    for wrong, message in (
        (lambda tensor: tensor[:-1], "has shape"),
        (lambda tensor: tensor.half(), f"{name} must be {dtype} on the CPU, not torch.float16"),
    ):
        module = module_of()
        tensor = wrong(getattr(module, name).detach())
        setattr(module, name, tensor if name == "channels" else torch.nn.Parameter(tensor))
        with pytest.raises(ValueError, match=message):
            module(images())


@built
def test_channels_that_are_not_there_are_refused() -> None:
    module = module_of()
    module.channels[0] = 6
    with pytest.raises(ValueError, match="channel"):
        module(images())


# --- the weights as they are now


@built
def test_weights_are_packed_once(packed: list) -> None:
    """In every mode; but again in training, where an optimizer may change them without counting."""
    module = module_of().requires_grad_(False)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for x in (images(), images(1, 6, 5, 5)):
            with mode():
                module(x)
    assert len(packed) == 1
    module.requires_grad_(True)(images())
    assert len(packed) == 2


@built
def test_layers_that_share_weights_do_not_share_what_else_they_are(packed: list) -> None:
    """Limits and geometry are others; both stay packed."""
    module = module_of()
    other = module_of(g=replace(GEOMETRY, pads=(2, 2, 2, 2), dilations=(2, 2)))
    for name in WEIGHTS:
        setattr(other, name, getattr(module, name))
    for _ in range(3):
        check(module)
        check(other)
    assert len(packed) == 2


@pytest.mark.parametrize("name", WEIGHTS)
def test_changed_weights_are_used(name: str) -> None:
    """In place, replaced, or given other numbers to hold, once or several times between calls."""
    module = module_of()
    check(module)

    def changed(tensor: Any) -> Any:
        return (tensor + 1) % 6 if name == "channels" else -tensor  # no larger, or float32 shows

    for _ in range(3):
        tensor = getattr(module, name)
        with torch.no_grad():
            tensor.copy_(changed(tensor))
        check(module)
        with torch.no_grad():
            tensor.view(-1)[-1] = 0  # through a view
        check(module)
        numbers = changed(tensor.data)
        tensor.data = numbers.new_empty(0)
        tensor.data = numbers.clone()  # which may well lie where the old ones were
        check(module)
        state = module.state_dict() | {name: changed(tensor.detach())}
        module.load_state_dict(state)
        check(module)
        module.load_state_dict(state | {name: changed(state[name])}, assign=True)
        check(module)


def test_an_alias_with_a_count_of_its_own_is_another_weight() -> None:
    """As many changes, and in the same place."""
    module = module_of()
    check(module)
    alias, changes = module.bias.data, module.bias._version
    for _ in range(changes):
        alias.add_(1)
    module.bias = torch.nn.Parameter(alias)
    assert module.bias._version == changes > 0
    check(module)


def test_steps_of_an_optimizer_are_used() -> None:
    module = module_of()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(8):
        check(module)
        optimizer.zero_grad()
        losses.append(module(images()).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_conversions_are_used() -> None:
    """To float64 and back, rounded on the way; to shared memory."""
    module = module_of()
    check(module)
    check(module.half().float())
    check(module.double().float().share_memory())
    check(module.to(memory_format=torch.channels_last))


def test_copies_are_their_own() -> None:
    """A deep copy, and one that was saved whole, do not change with the original."""
    module = module_of()
    check(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), torch.load(file, weights_only=False)]
    with torch.no_grad():
        module.pointwise.mul_(2)
    check(module)
    for other in copies:
        check(other)
        assert not torch.equal(other(images()), module(images()))


@built
def test_freed_weights_leave_nothing_behind(packed: list) -> None:
    """New weights of the same size lie where the old ones were, and are not taken for them."""
    memory = module_of().pointwise.detach().numpy().copy()
    addresses = set()
    for seed in range(5):
        module = module_of(seed)
        memory[...] = module.pointwise.detach().numpy()
        module.pointwise = torch.nn.Parameter(torch.from_numpy(memory))
        check(module)
        addresses.add(module.pointwise.data_ptr())
        del module
        gc.collect()
        assert [ref for ref in packed if ref() is not None] == []
    assert len(packed) == 5
    assert len(addresses) == 1


@built
def test_weights_that_are_views_or_computed_are_freed_as_well(packed: list) -> None:
    """Of one another, or with a graph behind them."""
    flat = torch.nn.Parameter(images(6, 12, 1, 1))
    module = module_of()
    call = torch.func.functional_call
    for weights in (
        {"pointwise": flat, "bias": flat[:, 0, 0, 0]},
        {"pointwise": flat * 2, "bias": (flat * 2)[:, 0, 0, 0]},
    ):
        y = call(module, weights, (images(),))
        del weights, y
    assert len(packed) == 2
    del flat
    gc.collect()
    assert [ref() for ref in packed] == [None, None]


@built
def test_changed_weights_are_not_kept_twice(packed: list) -> None:
    module = module_of()
    for _ in range(5):
        check(module)
        with torch.no_grad():
            module.bias.add_(1)
    gc.collect()
    assert len(packed) == 5
    assert sum(ref() is not None for ref in packed) == 1


def test_changes_in_inference_mode_are_used() -> None:
    """Weights that were made in inference mode can be changed there without a trace."""
    with torch.inference_mode():
        module = module_of()
        for _ in range(3):
            check(module)
            module.pointwise.mul_(1.5)
            module.bias.add_(1)
        check(module)


@built
def test_forget_helps_where_changes_are_hidden(packed: list) -> None:
    """Writing through .data is what autograd does not see either."""
    module = module_of()
    check(module)
    module.bias.data.add_(1)
    fused.forget()
    check(module)
    assert len(packed) == 2


@pytest.mark.parametrize("threads", [2, 5])
def test_pytorchs_own_threads_share_the_work(threads: int) -> None:
    """As many as PyTorch is set to use: on wide layers and narrow ones, and whole batches."""
    before = torch.get_num_threads()
    layers = [(module_of(1), images(1, 6, 40, 40)), (module_of(2), images(3, 6, 5, 5))]
    try:
        for module, x in layers:
            torch.set_num_threads(1)
            with torch.inference_mode():
                alone = module(x)
                torch.set_num_threads(threads)
                for _ in range(20):
                    assert torch.equal(module(x), alone)
    finally:
        torch.set_num_threads(before)


def test_a_team_of_threads_is_taken_from_the_openmp_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is entered once per call, by no more threads than there are tiles; without one all works.

    There are at most 32 tiles: of 14 vectors each, and four numbers in the shortest vectors.
    """
    entered = []

    @ctypes.CFUNCTYPE(
        None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    )
    def parallel(work: Any, data: int, threads: int, flags: int) -> None:
        entered.append(threads)
        work(data)

    address = ctypes.cast(parallel, ctypes.c_void_p).value
    layer = separable(
        ConvGeometry(6, 6, 3, 3, pads=(1, 1, 1, 1)), np.arange(6)[None], np.random.default_rng(0)
    )
    packed_layer, x = kernels.DecoupledConv(layer), np.ones((1, 6, 40, 40), np.float32)
    expected = packed_layer(x)
    for found, threads, teams in ((address, 3, [3]), (address, 1000, [32]), (address, 1, []), (None, 3, [])):
        monkeypatch.setattr(kernels, "_gomp_parallel", lambda found=found: found)
        entered.clear()
        np.testing.assert_array_equal(packed_layer(x, threads=threads), expected)
        assert len(entered) == len(teams)
        assert all(given <= wanted for given, wanted in zip(entered, teams, strict=True))


def test_several_threads_may_call_one_module() -> None:
    """From the first call on, while another packs weights of its own."""
    for seed in range(5):
        module = module_of(seed)
        inputs = [images(1, 6, size, size) for size in range(3, 35)]
        expected = [chain(module, x).detach() for x in inputs]

        def run(index: int, module: Any = module, inputs: list = inputs) -> Any:
            check(module_of(index), inputs[index])
            with torch.inference_mode():
                return module(inputs[index])

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(run, range(len(inputs))))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# --- where PyTorch traces


def exported(module: Any) -> Any:
    batch, h, w = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    return torch.export.export(module, (images(),), dynamic_shapes=({0: batch, 2: h, 3: w},))


def test_an_exported_program_holds_the_operator(packed: list) -> None:
    """It can be saved and loaded; batch and size are open; its weights are tensors of its own."""
    module = module_of()
    program = exported(module)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["netdecouple.decoupled_conv.default"]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for call in (program.module(), torch.export.load(file).module()):
        packed.clear()
        for x in (images(), images(3, 6, 5, 7), images(1, 6, 2, 30)):
            torch.testing.assert_close(call(x), chain(module, x), rtol=1e-5, atol=3e-5)  # outputs reach 6
        assert len(packed) == kernels.available()


def test_an_exported_program_sees_changes_as_well() -> None:
    call = exported(module_of()).module()
    other = module_of(1)
    call.load_state_dict(other.state_dict())
    torch.testing.assert_close(call(images()), chain(other, images()), rtol=0, atol=1e-5)


def test_a_file_with_the_operator_is_opened(tmp_path: Path) -> None:
    """By a process that has not come across the operator yet; nothing is said when that ends."""
    torch.export.save(exported(module_of()), tmp_path / "layer.pt2")
    np.save(tmp_path / "x.npy", images().numpy())
    program = """if True:
        import numpy as np
        from netdecouple.runtimes import runtime

        session = runtime("torch", trust=True).open("layer.pt2", 1)
        np.save("y.npy", session.run({"x": np.load("x.npy")})[0])
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = chain(module_of(), images()).detach()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_modules_compute_the_same(backend: str, packed: list) -> None:
    """Without a break in the graph, with gradients, and with the weights as they are now."""
    torch.compiler.reset()
    module = module_of()
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), module, torch.nn.ReLU())
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    for size in (9, 9, 12):
        x = images(2, 3, size, size)
        with torch.no_grad():
            expected = chain(module, network[0](x)).relu()
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
    assert len(packed) == kernels.available()
    with torch.no_grad():
        module.pointwise.mul_(1.5)
    found, expected = compiled(x), chain(module, network[0](x)).relu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    leaves = list(network.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("residual", [None, images().flip(0)])
def test_the_operator_is_what_it_says(residual: Any) -> None:
    """Schema, shapes without numbers, gradients: PyTorch's own checks of operators."""
    module = module_of()
    weights = [getattr(module, name) for name in ("depthwise", "pointwise", "bias", "channels", "slope")]
    ints = (6, [1, 1], [1, 1, 1, 1], [1, 1], 1)
    for x in (images(), images().to(memory_format=torch.channels_last), images()[:0]):
        given = None if residual is None else residual[: len(x)]
        torch.library.opcheck(fused.decoupled_conv, (x, *weights, given, *ints, -3.0, None))


def test_shapes_are_known_without_numbers() -> None:
    assert module_of().to("meta")(images().to("meta")).shape == (2, 6, 9, 11)


# --- where the library is missing


def test_a_saved_module_works_without_the_library(monkeypatch, tmp_path: Path) -> None:
    """Its state holds plain weights."""
    module = module_of()
    expected = module(images()).detach()
    torch.save(module.state_dict(), tmp_path / "state.pt")
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    other = DecoupledConv2d(GEOMETRY, 12, slope=True, limits=(-3, 6))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    for call in (other, exported(other).module()):
        torch.testing.assert_close(call(images()).detach(), expected, rtol=0, atol=1e-5)

"""A decoupled module is a module like any other: it trains, is copied, cast, wrapped and adapted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from netdecouple.frontends.torch.convolutions import Factorized  # noqa: E402
from tests.frontends.torch.modules import decoupled, inputs, net  # noqa: E402


@pytest.fixture
def module() -> Any:
    return decoupled(net())


@pytest.fixture
def labels() -> Any:
    return inputs(16).mean((2, 3)).argmax(1)  # which colour is strongest


def descend(module: Any, labels: Any, steps: int = 40, mixed: bool = False) -> list[float]:
    """Tell random images apart; the loss before every step."""
    x = inputs(len(labels))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = torch.nn.functional.cross_entropy(module(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def relative(one: Any, other: Any) -> float:
    return float((one.double() - other.double()).detach().norm() / other.double().detach().norm())


def test_gradients_reach_every_stage(module: Any):
    """All weights, and the bias at the end of every chain."""
    module.train()(inputs()).square().sum().backward()
    stages = [part for layer in module.modules() if isinstance(layer, Factorized) for part in layer]
    assert len(stages) > 5
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_learns(module: Any, labels: Any):
    """In training and in evaluation mode; what was learned is what inference then uses, fused or not."""
    module.train()
    losses = descend(module, labels)
    assert losses[-1] < 0.5 * losses[0]
    module.eval()
    x = inputs(16)
    with torch.no_grad():
        before = module(x)
    assert relative(before, module(x)) < 1e-5
    descend(module, labels, 2)
    with torch.no_grad():
        assert relative(module(x), before) > 1e-3
    with torch.no_grad():
        assert relative(module(x), module.requires_grad_(True)(x)) < 1e-5


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_optimizers_that_count_no_changes(module: Any, kind: Any):
    """What was trained is what is then used without gradients, though weights had been packed before."""
    x = inputs(8)
    with torch.no_grad():
        before = module(x)
    optimizer = kind(module.parameters(), lr=0.01, fused=True)
    module(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = module(x)
    assert relative(after, before) > 1e-3
    assert relative(after, module(x)) < 1e-5


def test_a_single_picture_needs_no_batch():
    """As for the convolutions that were there."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 64, 3))
    for method in ("nd-dp", "cp"):
        new = decoupled(module, method, 0.7)
        for wanted in (torch.no_grad(), torch.enable_grad()):
            with wanted:
                assert relative(new(inputs()[0]), new(inputs())[0]) < 1e-5


def test_the_fused_operator_agrees_with_the_stages(module: Any):
    """On every way of running without gradients."""
    x = inputs()
    stages = module(x).detach()
    with torch.no_grad():
        assert relative(module(x), stages) < 1e-5
        assert relative(module(x.contiguous(memory_format=torch.channels_last)), stages) < 1e-5
    with torch.inference_mode():
        assert relative(module(x), stages) < 1e-5


def test_states_go_from_one_copy_to_another(module: Any, labels: Any):
    """Copies are independent."""
    other = copy.deepcopy(module)
    descend(other, labels, 3)
    x = inputs()
    with torch.no_grad():
        assert relative(module(x), other(x)) > 1e-3
        module.load_state_dict(other.state_dict())
        assert torch.equal(module(x), other(x))
    assert other.decoupling == module.decoupling


def test_is_trained_by_several_processes(module: Any, labels: Any, tmp_path: Path):
    """DistributedDataParallel, here of one process."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("PyTorch was built without torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        losses = descend(torch.nn.parallel.DistributedDataParallel(module.train()), labels)
    finally:
        distributed.destroy_process_group()
    assert losses[-1] < 0.5 * losses[0]


def test_runs_in_mixed_precision(module: Any, labels: Any):
    """Forward and backward; without gradients as well, where the fused operator would not know bfloat16."""
    with torch.no_grad():
        exact = module(inputs())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = module(inputs())
    assert found.dtype == torch.bfloat16
    assert relative(found, exact) < 0.05
    losses = descend(module.train(), labels, mixed=True)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("name", "tolerance"), [("half", 0.01), ("bfloat16", 0.1), ("double", 1e-5)])
def test_is_cast(module: Any, name: str, tolerance: float):
    """Indices of channels stay whole numbers."""
    with torch.no_grad():
        exact = module(inputs())
        cast = getattr(module, name)()
        found = cast(getattr(inputs(), name)())
    assert found.dtype == next(cast.parameters()).dtype != torch.float32
    assert relative(found, exact) < tolerance
    assert all(b.dtype == torch.int64 for key, b in cast.named_buffers() if key.endswith("channels"))


def calls_of_the_operator(module: Any, x: Any) -> int:
    with torch.profiler.profile() as profile:
        module(x)
    return sum(event.count for event in profile.key_averages() if "decoupled_conv" in event.key)


@pytest.fixture
def layer() -> Any:
    """One decoupled layer, as the fused operator takes it."""
    pytest.importorskip("netdecouple.kernels.torch")
    from netdecouple import kernels

    if not kernels.available():
        pytest.skip("the fused operator was not built")
    return decoupled(torch.nn.Conv2d(3, 64, 3, padding=1)).requires_grad_(False)


def test_the_operator_runs_only_where_it_computes_the_same(layer: Any):
    """Contiguous float32 on the CPU without gradients; all else takes the plain stages."""
    x = inputs()
    assert calls_of_the_operator(layer, x) == 0
    with torch.no_grad():
        assert calls_of_the_operator(layer, x) == 1
        assert calls_of_the_operator(layer, x.contiguous(memory_format=torch.channels_last)) == 0
        assert calls_of_the_operator(layer.double(), x.double()) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert calls_of_the_operator(layer.float(), x) == 0
        assert calls_of_the_operator(layer, x[..., :8, :8].contiguous()) == 0


def test_flops_are_counted_in_the_operator_too(layer: Any):
    """By PyTorch's own counter; the stages' count, whichever way they are run."""
    counts = []
    for wanted in (torch.no_grad(), torch.enable_grad()):
        with wanted, FlopCounterMode(display=False) as counter:
            layer(inputs())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_derivatives_are_carried_along_without_gradients(layer: Any):
    """The operator knows none of those that go forward."""
    x, ones = inputs(), torch.ones_like(inputs())
    expected = torch.func.jvp(layer, (x,), (ones,))[1]
    with torch.no_grad():
        assert relative(torch.func.jvp(layer, (x,), (ones,))[1], expected) < 1e-5
        with torch.autograd.forward_ad.dual_level():
            made = layer(torch.autograd.forward_ad.make_dual(x, ones))
            assert relative(torch.autograd.forward_ad.unpack_dual(made).tangent, expected) < 1e-5


def test_hooks_and_adapters_are_run(layer: Any):
    """What is hung on a stage, or put in its place, counts without gradients too."""
    x = inputs()
    calls = []
    with torch.no_grad():
        plain = layer(x)
        handle = layer[-1].register_forward_hook(lambda *_: calls.append(1))
        assert torch.allclose(layer(x), plain, atol=1e-5)
        handle.remove()
        layer(x)
        assert calls == [1]
        layer[-1] = torch.nn.Sequential(layer[-1], torch.nn.Threshold(torch.inf, 0.0))
        assert not layer(x).any()


def test_runs_under_vmap_and_symbolic_tracing(layer: Any):
    """Tensors that are not what they seem take the plain stages."""
    x = inputs()
    with torch.no_grad():
        expected = layer(x)
        assert torch.allclose(torch.vmap(lambda one: layer(one[None])[0])(x), expected, atol=1e-5)
        assert torch.allclose(torch.fx.symbolic_trace(layer)(x), expected, atol=1e-5)

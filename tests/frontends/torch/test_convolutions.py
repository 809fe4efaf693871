"""PyTorch's convolutions in the engine, and written as chains, compute what the modules compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx  # noqa: E402

from netdecouple import kernels  # noqa: E402
from netdecouple.convolution import ConvGeometry, Factorization, Structure, placeholder  # noqa: E402
from netdecouple.families import Problem  # noqa: E402
from netdecouple.families.chain import Step, method  # noqa: E402
from netdecouple.frontends.torch.convolutions import LAYERS, Convolution, Factorized  # noqa: E402

KINDS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
}
METHODS = ("nd-dp", "nd-pd", "sd", "cd", "cp", "cd+sd+cp+nd-dp", "sd+nd-pd")


@st.composite
def layers(draw: st.DrawFn) -> tuple[Any, Any]:
    """A convolution of any kind and a small input: strides, paddings, dilations, groups, modes."""
    rank, transposed = draw(st.sampled_from(sorted(KINDS)))
    each = st.integers(1, 4 if rank < 3 else 3)
    small = st.integers(1, 2)
    groups = draw(small)
    kernel = tuple(draw(each) for _ in range(rank))
    options: dict[str, Any] = {
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(rank)),
        "dilation": tuple(draw(small) for _ in range(rank)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    reach = [d * (k - 1) for d, k in zip(options["dilation"], kernel, strict=True)]
    if transposed:
        options["padding"] = tuple(draw(st.integers(0, r)) for r in reach)
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1))
            for s, d in zip(options["stride"], options["dilation"], strict=True)
        )
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        word = draw(st.sampled_from(["", "same", "valid"]))
        options["padding"] = word or tuple(draw(st.integers(0, 2)) for _ in range(rank))
        if word == "same":
            options["stride"] = (1,) * rank
    torch.manual_seed(draw(st.integers(0, 99)))
    n_i, n_o = 2 * groups, groups * draw(st.integers(1, 4))
    module = KINDS[rank, transposed](n_i, n_o, kernel, **options).eval().requires_grad_(False)
    size = tuple(r + draw(st.integers(1, 4)) for r in reach)
    if options.get("padding_mode") in ("reflect", "circular"):  # they take what is there, once
        size = tuple(max(n, r + 2, 3) for n, r in zip(size, reach, strict=True))
    return module, torch.randn(2, n_i, *size)


def numbers(module: Any, convolution: Convolution) -> tuple[np.ndarray, np.ndarray]:
    """The engine's kernel and bias."""
    bias = np.zeros(convolution.n_o) if module.bias is None else module.bias.numpy().astype(float)
    return convolution.kernel_of(module.weight.numpy()), bias


def exact(module: Any, name: str) -> Factorization:
    """The layer by a method at full rank."""
    convolution = Convolution.of(module)
    kernel, bias = numbers(module, convolution)
    g = convolution.geometry
    chosen = method(name, rounds=0)
    problem = Problem.data_free(g, kernel, bias)
    return chosen.fit(problem, [Step(size) for size in chosen.exact(g)])[0]


def real_macs(chain: Any, x: Any) -> int:
    """MACs of a chain as its modules' own shapes have it: (n_o, n_i / groups, taps, output pixels)."""
    total = 0
    for part in chain:
        y = part(x)
        if isinstance(part, LAYERS):
            transposed = getattr(part, "transposed", False)  # every input pixel is read by every tap
            pixels = (x if transposed else y).shape[2:].numel() if y.ndim > 2 else 1
            total += part.weight.numel() * pixels
        x = y
    return total


@given(layers())
@settings(max_examples=80, deadline=None)
def test_patches_times_kernel_is_the_convolution(layer: tuple[Any, Any]):
    """At all output positions, whatever the padding."""
    module, x = layer
    convolution = Convolution.of(module)
    assume(not convolution.refusal)
    y = module(x)
    assert convolution.output_size(x.shape[2:]) == y.shape[2:]
    assert np.prod(convolution.geometry.output_size(*convolution.size(x.shape[2:]))) == y.shape[2:].numel()
    kernel, bias = numbers(module, convolution)
    positions = np.arange(y.shape[2:].numel())[None].repeat(2, axis=0)
    patches = convolution.patches(x.numpy(), positions)
    rows = kernel.reshape(convolution.groups, -1, patches.shape[2])
    found = np.einsum("ngd,gmd->ngm", patches, rows).reshape(2, -1, module.out_channels) + bias
    expected = y.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@given(layers())
@settings(max_examples=60, deadline=None)
def test_kernels_are_written_back(layer: tuple[Any, Any]):
    """`weight_of` undoes `kernel_of`."""
    module, _ = layer
    convolution = Convolution.of(module)
    weight = module.weight.numpy()
    kernel = convolution.kernel_of(weight)
    assert kernel.shape == convolution.geometry.weight_shape
    np.testing.assert_array_equal(convolution.weight_of(kernel), weight)


@given(layers(), st.sampled_from(METHODS))
@settings(max_examples=120, deadline=None)
def test_chains_at_full_rank_are_the_layer(layer: tuple[Any, Any], name: str):
    """By every method that the layer allows."""
    module, x = layer
    convolution = Convolution.of(module)
    assume(not convolution.refusal)
    assume(method(name).is_possible(not convolution.kernel, convolution.upsamples))
    chain = Factorized.of(convolution, exact(module, name))
    expected = module(x)
    found = chain.requires_grad_(False)(x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-5)


@given(layers(), st.sampled_from(["nd-dp", "nd-pd"]))
@settings(max_examples=120, deadline=None)
def test_chains_cost_what_they_are_priced(layer: tuple[Any, Any], name: str):
    """But for PD in three dimensions, whose 1×1 is priced once per tap of the folded two."""
    module, x = layer
    convolution = Convolution.of(module)
    assume(not convolution.refusal and not convolution.transposed)
    assume(not (len(convolution.kernel) == 3 and name == "nd-pd"))
    size = x.shape[2:]
    assert convolution.macs(size) == real_macs([module], x)
    maps = convolution.macs(size) / convolution.geometry.macs(*convolution.size(size))
    factorization = exact(module, name)
    chain = Factorized.of(convolution, factorization).requires_grad_(False)
    priced, real = factorization.macs(*convolution.size(size)) * maps, real_macs(chain, x)
    assert real == pytest.approx(priced)


@pytest.mark.parametrize(("stride", "name"), [(1, "nd-dp"), (1, "nd-pd"), (2, "nd-pd")])
def test_transposed_chains_cost_about_what_they_are_priced(stride: int, name: str):
    """Outputs and inputs are not exactly a multiple of each other: borders."""
    module = nn.ConvTranspose2d(6, 8, 4, stride, padding=1).requires_grad_(False)
    convolution, x = Convolution.of(module), torch.randn(1, 6, 20, 20)
    size = convolution.size((20, 20))
    factorization = exact(module, name)
    maps = convolution.macs((20, 20)) / convolution.geometry.macs(*size)
    assert convolution.macs((20, 20)) == real_macs([module], x) == 400 * 16 * 6 * 8
    real = real_macs(Factorized.of(convolution, factorization).requires_grad_(False), x)
    assert real == pytest.approx(factorization.macs(*size) * maps, rel=0.1)


def test_linear_layers_are_1x1_convolutions():
    """Of one pixel; low rank is all there is."""
    torch.manual_seed(0)
    module = nn.Linear(6, 4).requires_grad_(False)
    convolution = Convolution.of(module)
    x = torch.randn(3, 6)
    kernel, bias = numbers(module, convolution)
    patches = convolution.patches(convolution.maps(x.numpy()), np.zeros((3, 1), np.int64))
    np.testing.assert_allclose(patches[:, 0] @ kernel[:, :, 0, 0].T + bias, module(x), atol=1e-6)
    np.testing.assert_array_equal(convolution.weight_of(kernel), module.weight)
    chain = Factorized.of(convolution, exact(module, "cd"))
    np.testing.assert_allclose(chain(x).detach(), module(x), atol=1e-6)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 8, 3, groups=4), "depthwise convolution"),
        (nn.Conv2d(1, 8, 3), "reads a single channel"),
        (nn.ConvTranspose3d(4, 8, 3), "transposed convolution in three dimensions"),
        (nn.ConvTranspose2d(4, 8, 3, padding=3), "negative padding"),
    ],
)
def test_what_cannot_be_decoupled_says_why(module: Any, reason: str):
    assert Convolution.of(module).refusal == reason


def test_weights_are_packed_once_in_inference_mode(monkeypatch: pytest.MonkeyPatch):
    """Also if the first call is made there, by layers whose filters read all channels in order."""
    if not kernels.available():
        pytest.skip("the fused operator was not built")
    packed = []
    pack = kernels.DecoupledConv
    monkeypatch.setattr(kernels, "DecoupledConv", lambda *args: packed.append(1) or pack(*args))
    g = ConvGeometry(8, 8, 3, 3, pads=(1, 1, 1, 1))
    structure = Structure.of(g, replace(g, n_o=16, groups=8), ConvGeometry(8, 16, 1, 1))
    module = Factorized(Convolution.of(nn.Conv2d(8, 8, 3, padding=1)), structure)
    with torch.inference_mode():
        for _ in range(3):
            module(torch.zeros(1, 8, 16, 16))
    assert len(packed) == 1


@pytest.fixture
def gathering() -> Factorized:
    """A layer that reads some of 8 channels several times."""
    torch.manual_seed(0)
    pads = (1, 1, 1, 1)
    stages = ConvGeometry(12, 12, 3, 3, pads=pads, groups=12), ConvGeometry(6, 12, 1, 1)
    structure = Structure(ConvGeometry(6, 8, 3, 3, pads=pads), stages, (np.arange(12) * 2 // 3, None))
    return Factorized.of(Convolution.of(nn.Conv2d(8, 6, 3, padding=1)), placeholder(structure)).eval()


@pytest.mark.parametrize("channels", [4, 12, 16])
@pytest.mark.parametrize("grad", [True, False])
def test_other_numbers_of_channels_are_refused(gathering: Factorized, channels: int, grad: bool):
    """As PyTorch's own layers do; selecting from too many would run."""
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match=f"to have 8 channels, but got {channels}"),
    ):
        gathering(torch.zeros(2, channels, 16, 16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_chains_are_scripted(gathering: Factorized):
    """TorchScript runs one stage after the other."""
    x = torch.randn(2, 8, 16, 16)
    torch.testing.assert_close(torch.jit.script(gathering)(x), gathering(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_chains_are_quantized_by_fx(gathering: Factorized):
    """Their last stage and an activation behind it become one int8 layer."""
    module, x = nn.Sequential(gathering, nn.ReLU()).eval(), torch.randn(8, 8, 16, 16)
    prepared = quantize_fx.prepare_fx(module, get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    quantized = quantize_fx.convert_fx(prepared)(x)
    assert ((quantized - module(x)).norm() < 0.1 * module(x).norm()).item()

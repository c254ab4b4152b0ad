"""Claims of the paper's code in the order of shiftaddnas.py, and one story from training to the table.

References are independent definitions: float64 loops, closed forms, published counts. What proves machinery
(kernels, files, processes, programs) is in tests/. `python -m pytest -q` runs both, `-m slow` the slow ones.
"""

import copy
import gc
import io
import itertools
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import search
import shiftaddnas
from cost_model import arch_costs
from shiftaddnas import (
    OPS, SPACES, Block, HybridConv2d, SharedWeight, ShiftConv2d, Supernet, add_conv2d, add_linear,
    attention2d, build, fixed_point, kl_divergence, log_laplace, log_normal, mean_divergence, power_of_two,
    shift_conv2d, shift_weight,
)

sys.path.insert(0, str(Path(__file__).parent / "tests"))
pytest_plugins = [] if "conftest" in sys.modules else ["conftest"]  # where pytest runs this file alone
from conftest import FASHION, HYTRA, TINY, losses, parameters, rng, tiny_data  # noqa: E402, F401

# ------------------------------------------------------------------------------------------- §1 rounding


def test_power_of_two_equals_the_definition_and_passes_the_gradient():
    w = torch.tensor([0.0, 0.3, -0.3, 1.0, 5.0, -0.7, 1e-9, 2**-15, float("nan")], requires_grad=True)
    y = power_of_two(w)
    expected = [0.0, 0.25, -0.25, 1.0, 1.0, -0.5, 2**-15, 2**-15, float("nan")]
    torch.testing.assert_close(y, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    y.backward(torch.arange(9.0))
    assert w.grad.equal(torch.arange(9.0))  # straight through
    assert w[4] == 5  # not in place
    values = power_of_two(torch.logspace(-8, 1, 400, dtype=torch.float64))
    assert values.log2().unique().tolist() == [float(exponent) for exponent in range(-15, 1)]  # 5 bits


def test_shift_weight_has_the_official_values_and_gradients():
    shift = torch.tensor([-3.2, -20.0, 1.0, -2.0, -1.0], requires_grad=True)
    sign = torch.tensor([0.9, -0.8, 0.6, 0.5, -0.51], requires_grad=True)
    w = shift_weight(shift, sign)
    assert w.tolist() == [2**-3, -(2**-14), 1.0, 0.0, -0.5]
    g = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    w.backward(g)
    torch.testing.assert_close(shift.grad, g * w.detach() * math.log(2))
    assert sign.grad.equal(g)
    assert power_of_two(w).equal(w)  # each value of this form is one of the other form
    with pytest.raises(ValueError, match=r"shift \(5,\) and sign \(4,\)"):
        shift_weight(shift, sign[:4])


def test_fixed_point_floors_to_the_grid_clips_and_passes_the_gradient():
    step = 2.0**-16
    x = torch.tensor([0.3, -0.3, 3.5 * step, -0.5 * step, 1e6, -1e6], dtype=torch.float64, requires_grad=True)
    y = fixed_point(x)
    floor = math.floor(0.3 / step) * step
    assert y.tolist() == [floor, -floor - step, 3 * step, -step, 2**15 - 1, -(2**15)]
    y.sum().backward()
    assert x.grad.tolist() == [1.0] * 6


def every_half(dtype):
    """Return the finite numbers of a 16-bit dtype."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return x[x.isfinite()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rounding", [power_of_two, fixed_point])
def test_half_precision_rounds_as_float32_does(rounding, dtype):
    x = every_half(dtype)
    assert rounding(x).equal(rounding(x.float()).to(dtype))


def test_straight_through_is_exactly_the_value_for_every_float():
    for dtype in (torch.float16, torch.bfloat16):
        x = every_half(dtype)
        value = x[torch.randperm(len(x), generator=rng())]
        assert shiftaddnas.straight_through(x, value).equal(value)
    bits = torch.randint(-(2**31), 2**31, (2, 10**5), generator=rng(1)).int().view(torch.float32)
    x, value = bits[:, bits.isfinite().all(0)]
    assert shiftaddnas.straight_through(x, value).equal(value)  # x + (value - x) would not be


# ------------------------------------------------------------------------------------------ §2 operators


def spelled_out(geometry, kernel):
    """Return stride, pads (left, right, top, bottom) and dilation of a geometry, all as tuples."""
    pairs = [(value, value) if isinstance(value, int) else value for value in geometry[:3]]
    stride, padding, dilation = pairs
    if padding == "same":
        rows, columns = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return stride, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), dilation
    return stride, (padding[1], padding[1], padding[0], padding[0]), dilation


def windows(padded, w, geometry):
    """Return the patch of each output place as a view (N, C, H', W', KH, KW) of the padded image."""
    stride, _, dilation = spelled_out(geometry, w.shape[2:])
    sides = [d * (k - 1) + 1 for d, k in zip(dilation, w.shape[2:])]
    view = padded.unfold(2, sides[0], stride[0]).unfold(3, sides[1], stride[1])
    return view[..., :: dilation[0], :: dilation[1]]


def places(N, w, view, groups):
    """Yield each index (n, m, i, j) of the result with the index of its patch in the windows."""
    M, Cg = w.shape[:2]
    for n, m, i, j in itertools.product(range(N), range(M), *map(range, view.shape[2:4])):
        first = m // (M // groups) * Cg
        yield (n, m, i, j), (n, slice(first, first + Cg), i, j)


def loop_conv(x, w, geometry, term):
    """Return y[n,m,i,j] = the sum of term(patch, filter m), as loops over every index."""
    view = windows(F.pad(x, spelled_out(geometry, w.shape[2:])[1]), w, geometry)
    y = x.new_zeros(len(x), len(w), *view.shape[2:4])
    for at, patch in places(len(x), w, view, geometry[3]):
        y[at] = term(view[patch], w[at[1]]).sum()
    return y


def loop_add_gradients(g, x, w, geometry):
    """Return dL/dx = sum g clip(w - x, -1, 1) and dL/dw = sum g (x - w), patch by patch."""
    pads = spelled_out(geometry, w.shape[2:])[1]
    padded = F.pad(x, pads)
    grad_padded = torch.zeros_like(padded)
    grad_w = torch.zeros_like(w)
    view = windows(padded, w, geometry)
    grad_view = windows(grad_padded, w, geometry)
    for at, patch in places(len(x), w, view, geometry[3]):
        grad_view[patch] += g[at] * (w[at[1]] - view[patch]).clamp(-1, 1)
        grad_w[at[1]] += g[at] * (view[patch] - w[at[1]])
    return F.pad(grad_padded, [-pad for pad in pads]), grad_w


GEOMETRIES = [  # x, weight, (stride, padding, dilation, groups)
    ((2, 3, 5, 7), (4, 3, 3, 3), (1, 1, 1, 1)),
    ((1, 4, 7, 5), (6, 2, 3, 3), (2, 1, 1, 2)),
    ((2, 6, 6, 7), (6, 1, 3, 3), (2, 1, 1, 6)),  # depthwise
    ((1, 2, 9, 8), (3, 2, 3, 3), (3, 0, 1, 1)),
    ((1, 6, 4, 4), (9, 2, 1, 1), (1, 0, 1, 3)),
    ((1, 4, 8, 8), (8, 1, 5, 5), (3, 2, 1, 4)),
    ((1, 3, 1, 1), (2, 3, 1, 1), (2, 0, 1, 1)),
    ((2, 2, 7, 7), (2, 2, 7, 7), (2, 3, 1, 1)),
    ((1, 2, 6, 9), (3, 2, 2, 5), (1, (0, 2), 1, 1)),  # pairs: rows, columns
    ((1, 4, 9, 7), (4, 2, 3, 3), ((2, 1), (1, 2), 1, 2)),
    ((2, 2, 9, 8), (3, 2, 3, 3), (2, 2, 2, 1)),
    ((1, 3, 8, 11), (3, 1, 3, 2), ((1, 3), (2, 0), (2, 3), 3)),
    ((1, 2, 6, 5), (3, 2, 4, 3), (1, "same", (1, 2), 1)),  # an even side has one more pad behind
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("x_size, w_size, geometry", GEOMETRIES, ids=str)
def test_add_conv2d_and_its_gradients_equal_loops(x_size, w_size, geometry, dtype, tolerance):
    stride, padding, dilation, groups = geometry
    x = torch.randn(x_size, generator=rng(1)).double()
    w = torch.randn(w_size, generator=rng(2)).double()
    expected = loop_conv(x, w, geometry, lambda patch, taps: -(patch - taps).abs())
    g = torch.randn(expected.shape, generator=rng(3)).double()
    xs = x.to(dtype).requires_grad_()
    ws = w.to(dtype).requires_grad_()
    y = add_conv2d(xs, ws, stride, padding, groups, dilation)
    y.backward(g.to(dtype))
    expected = (expected, *loop_add_gradients(g, x, w, geometry))
    for result, loops in zip((y, xs.grad, ws.grad), expected):
        assert result.shape == loops.shape and result.dtype == dtype
        assert (result.double() - loops).norm() <= tolerance * loops.norm()  # false for NaN


@pytest.mark.parametrize("x_size, w_size, geometry", GEOMETRIES, ids=str)
def test_shift_conv2d_equals_a_loop_over_powers_of_two(x_size, w_size, geometry):
    stride, padding, dilation, groups = geometry
    x = torch.randn(x_size, generator=rng(1)).double()
    w = torch.randn(w_size, generator=rng(2)).double().requires_grad_()
    grid = (x * 2**16).floor() / 2**16
    rounded = (w.sign() * 2 ** w.abs().log2().round().clamp(-15, 0)).detach()
    y = shift_conv2d(x, w, stride, padding, groups, dilation)
    torch.testing.assert_close(y, loop_conv(grid, rounded, geometry, lambda a, b: a * b))
    y.sum().backward()
    plain = rounded.clone().requires_grad_()
    F.conv2d(grid, plain, None, stride, padding, dilation, groups).sum().backward()
    torch.testing.assert_close(w.grad, plain.grad)


def test_the_strided_add_gradient_is_nonzero_on_every_input():
    x = torch.randn(1, 2, 8, 8, generator=rng(), requires_grad=True)
    add_conv2d(x, torch.randn(3, 2, 3, 3, generator=rng(1)), stride=2, padding=1).sum().backward()
    assert (x.grad != 0).all()  # the official rule leaves all but a corner at zero


def test_a_padded_tap_costs_the_absolute_weight():
    w = torch.tensor([[[[1.0, -2.0, 3.0]] * 3]])
    y = add_conv2d(torch.zeros(1, 1, 1, 1), w, padding=1)
    assert y.item() == -18


def test_add_linear_is_minus_the_l1_distance_of_tokens():
    x = torch.randn(2, 5, 33, generator=rng())
    w = torch.randn(7, 33, generator=rng(1))
    torch.testing.assert_close(add_linear(x, w), -torch.cdist(x, w.expand(2, -1, -1), p=1))
    with pytest.raises(ValueError, match=r"\(2, 5, 33\).*\(7, 32\)"):
        add_linear(x, w[:, 1:])


def test_attention_weights_of_an_output_sum_to_one_and_equal_loops():
    N, C, dim, L = 2, 8, 4, 15
    x = torch.randn(N, C, 3, 5, generator=rng()).double()
    w = torch.randn(3 * C, C, 1, 1, generator=rng(1)).double()
    y = attention2d(x, w, dim)
    official = attention2d(x, w, dim, official=True)
    qkv = torch.einsum("oc,ncl->nol", w[:, :, 0, 0], x.flatten(2))
    for n, head in itertools.product(range(N), range(C // dim)):
        channels = slice(head * dim, (head + 1) * dim)
        q, k, v = qkv[n].view(3, C, L)[:, channels]  # each (dim, L)
        rows = torch.stack([torch.softmax((q[:, i, None] * k).sum(0) / dim**0.5, 0) for i in range(L)])
        for i in range(L):
            torch.testing.assert_close(y[n, channels].flatten(1)[:, i], (v * rows[i]).sum(1))
            torch.testing.assert_close(official[n, channels].flatten(1)[:, i], (v * rows[:, i]).sum(1))  # D1
    w[2 * C :] = torch.eye(C).view(C, C, 1, 1)  # values = inputs, and these all equal 1
    torch.testing.assert_close(attention2d(torch.ones_like(x), w, dim), torch.ones_like(x))
    with pytest.raises(ValueError, match="head_dim must divide the 8 channels, got 3"):
        attention2d(x, w, 3)


# -------------------------------------------------------------------------------------------- §3 sharing


def shared(shape=(64, 64, 3, 3), **settings):
    with shiftaddnas.seeded(0):
        return SharedWeight(shape, ["conv", "shift", "add"], **settings)


def test_the_transformed_weight_is_laplacian_at_the_start_and_has_the_variance_of_the_weight():
    weight = shared((512, 512, 1, 1))
    a = weight.weight_for("add").detach().flatten().double().sort().values
    b = weight.std / math.sqrt(2)
    cdf = torch.where(a < 0, 0.5 * torch.exp(a / b), 1 - 0.5 * torch.exp(-a / b))
    grid = torch.arange(1, len(a) + 1) / len(a)
    assert (cdf - grid).abs().max() < 0.02  # Kolmogorov-Smirnov distance
    assert a.std().item() == pytest.approx(weight.w.std().item(), rel=0.01)
    assert weight.w.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.01)


def test_the_transform_is_monotone_at_the_start_and_keeps_the_largest_weight():
    weight = shared()
    weight.w.data[0, 0, 0, 0] = 9 * weight.std  # beyond the last bin
    w = weight.w.detach().flatten()
    a = weight.weight_for("add").detach().flatten()
    assert (a[w.argsort()].diff() >= 0).all()
    assert a[w.argmax()] == a.max() > 2 * a[w.argsort()[-2]]
    assert a[w.argmin()] == a.min() < 0


def test_the_transform_multiplies_each_of_100_equal_bins_by_its_slope():
    weight = shared()
    weight.slopes.data = torch.arange(1.0, 101.0)
    w = weight.w.detach().flatten()
    edges = weight.std * (torch.arange(1, 100) / 10 - 5)  # the outer bins are open
    near = ((w[:, None] - edges) / weight.std).abs().amin(1) < 1e-4
    slope = 1 + (w[:, None] >= edges).sum(1)
    torch.testing.assert_close(weight.weight_for("add").flatten()[~near], (w * slope)[~near])


def test_slopes_are_learnable_and_their_gradient_is_the_sum_of_w_times_gradient_in_the_bin():
    weight = shared((16, 8, 3, 3))
    assert dict(weight.named_parameters()).keys() == {"w", "slopes"} and weight.slopes.shape == (100,)
    g = torch.randn(weight.w.shape, generator=rng())
    weight.weight_for("add").backward(g)
    w = weight.w.detach()
    bins = (10 * (w / weight.std + 5)).long().clamp(0, 99)
    sums = torch.zeros(100).index_add(0, bins.flatten(), (w * g).flatten())
    torch.testing.assert_close(weight.slopes.grad, sums)
    torch.testing.assert_close(weight.w.grad, g * weight.slopes.detach()[bins])


def test_without_a_transform_or_an_add_every_op_reads_the_weight_itself():
    plain = [SharedWeight((4, 4, 1, 1), ops) for ops in (["conv", "shift"], ["add"])]
    for weight in (shared(transform=False), *plain):
        assert weight.slopes is None
        assert all(weight.weight_for(op) is weight.w for op in ("conv", "shift", "add"))


def laplace_sample(count, seed):
    uniform = torch.rand(count, generator=rng(seed)).double() - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def test_the_divergence_is_zero_on_the_target_and_exact_between_gaussian_and_laplacian():
    normal = torch.randn(10**6, generator=rng()).double()
    assert abs(kl_divergence(normal, log_normal)) < 2e-3
    assert abs(kl_divergence(laplace_sample(10**6, 1), log_laplace)) < 2e-3
    exact = math.log(2) + math.sqrt(2 / math.pi) - 0.5 * math.log(2 * math.pi * math.e)
    assert kl_divergence(normal, log_laplace).item() == pytest.approx(exact, rel=0.02)
    rows = torch.stack([normal[:1000], normal[1000:2000]])
    alone = [kl_divergence(row, log_normal) for row in rows]
    torch.testing.assert_close(kl_divergence(rows, log_normal), sum(alone) / 2)
    with pytest.raises(ValueError, match="more than 4 elements, got 4"):
        kl_divergence(torch.zeros(4), log_normal)


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_divergence_pulls_a_sample_to_the_width_of_its_target(scale):
    sample = (scale * torch.randn(2000, generator=rng())).requires_grad_()
    kl_divergence(sample, log_normal).backward()
    assert ((sample.grad * sample).sum() > 0) == (scale > 1)  # descent narrows a wide one


def test_each_density_counts_once_and_is_measured_against_its_own_target():
    one = shared((64, 64, 3, 3))
    other = shared((32, 8, 1, 1))
    one.w.data *= 2
    readers = [(weight, op) for weight in (one, other) for op in ("conv", "shift", "add")]
    w, transformed = one.w.flatten(), one.weight_for("add").flatten()
    step = w.numel() // 512
    terms = [
        kl_divergence(w[::step] / one.std, log_normal),
        kl_divergence(transformed[::step] / (one.std / math.sqrt(2)), log_laplace),
        mean_divergence([(other, "shift")]),
        mean_divergence([(other, "add")]),
    ]
    torch.testing.assert_close(mean_divergence(readers), sum(terms) / 4)
    before = kl_divergence(w / one.std, log_normal)
    z = w.detach().double() / one.std
    exact = -z.sign() * (math.log(2) + torch.special.log_ndtr(-z.abs()))  # T(w) / b without bins
    assert before.item() == pytest.approx(kl_divergence(exact, log_laplace).item(), abs=0.02) and before > 0.5
    assert mean_divergence([(shared(transform=False), "conv")]) == 0


def opened(supernet):
    """Return the supernet with blocks that are more than their shortcuts, which they start as."""
    for block in supernet.blocks.values():
        torch.nn.init.ones_(block.bn3.weight)
    return supernet


@pytest.mark.parametrize("sharing", ["none", "naive", "heterogeneous"])
@pytest.mark.parametrize("letter", "csa")
def test_the_gradient_of_every_op_reaches_the_weight_that_it_reads(sharing, letter):
    supernet = opened(Supernet(FASHION, sharing))
    arch = "/".join([letter * 2] * 3)
    supernet(torch.randn(4, 1, 28, 28, generator=rng()), arch).square().sum().backward()
    for block, entrance in supernet.path(arch):
        entry = block.entrances[entrance]
        layers = [entry.conv1, block.middle, block.conv3, *list(entry.shortcut.children())[:1]]
        for layer in layers:
            weight = layer.weight if sharing == "none" else layer.shared.w
            assert weight.grad.abs().sum() > 0
            if sharing == "heterogeneous":
                assert (layer.shared.slopes.grad is not None) == (letter == "a")
    tensors = {id(getattr(supernet.blocks[f"0-0-{op}"].conv3, "shared", op)) for op in "csa"}
    assert len(tensors) == (3 if sharing == "none" else 1)


# ------------------------------------------- §3 sharing: a copy of a supernet trains as the supernet does


class TrainingLoss(torch.nn.Module):
    """Cross-entropy + divergence of three archs at once, for nine images."""

    archs = ["cs/cat/sa", "sa/sca/ta", "ac/ats/cc"]

    def __init__(self, supernet):
        super().__init__()
        self.supernet = supernet

    def forward(self):
        logits = self.supernet(torch.randn(9, 1, 28, 28, generator=rng()), self.archs)
        return F.cross_entropy(logits, torch.arange(9)) + 0.01 * self.supernet.divergence(self.archs)


def gradients(supernet):
    """Return name -> gradient of one training step."""
    supernet.zero_grad()
    TrainingLoss(supernet)().backward()
    return {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}


def deep_copy(supernet):
    return gradients(copy.deepcopy(supernet))


def saved_and_loaded(supernet):
    file = io.BytesIO()
    torch.save(supernet, file)
    file.seek(0)
    return gradients(torch.load(file, weights_only=False))


def loaded_by_assignment(supernet):
    other = Supernet(FASHION, supernet.sharing, seed=1)
    other.load_state_dict(copy.deepcopy(supernet.state_dict()), assign=True)
    return gradients(other)


def functional_call(supernet):
    tensors = {name: p.detach().clone().requires_grad_() for name, p in supernet.named_parameters()}
    named = {f"supernet.{name}": tensor for name, tensor in tensors.items()}
    torch.func.functional_call(TrainingLoss(supernet), named, ()).backward()
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def averaged_copy(supernet):
    average = AveragedModel(supernet)
    average.update_parameters(supernet)
    return gradients(average.module)


def swapped_parameters(supernet):
    for p in supernet.parameters():
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))
    return gradients(supernet)


COPIES = [
    deep_copy, saved_and_loaded, loaded_by_assignment, functional_call, averaged_copy, swapped_parameters
]


@pytest.mark.parametrize("gradients_of_copy", COPIES)
@pytest.mark.parametrize("sharing", ["naive", "heterogeneous"])
def test_a_supernet_and_each_kind_of_copy_have_equal_gradients_bit_for_bit(gradients_of_copy, sharing):
    supernet = opened(Supernet(FASHION, sharing))
    gradients(supernet)  # a step before the copy leaves nothing behind
    expected = gradients(supernet)
    copied = gradients_of_copy(supernet)
    assert copied.keys() == expected.keys() and any("shared.w" in name for name in expected)
    assert all(grad.equal(copied[name]) for name, grad in expected.items())


def test_an_extracted_network_that_is_trained_keeps_no_other_tensors_in_memory_or_in_its_file():
    def numbers_in_memory():
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if issubclass(type(x), torch.Tensor))

    network = Supernet(FASHION, "heterogeneous").extract("sa/sat/cc")
    before = numbers_in_memory()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(4, 1, 28, 28, generator=rng())).square().sum().backward()
        optimizer.step()
    gradient_numbers = sum(p.grad.numel() for p in network.parameters())
    assert numbers_in_memory() == before + gradient_numbers
    network.zero_grad()
    file = io.BytesIO()
    torch.save(network, file)
    tensors = network.state_dict().values()
    assert file.tell() < sum(4 * x.numel() + 1000 for x in tensors) + 20_000  # numbers, names and shapes


# -------------------------------------------------------------------------------------------- §5 blocks


@pytest.mark.parametrize("space", [FASHION, SPACES["bossnet_t0"]], ids=lambda space: space.name)
@pytest.mark.parametrize("op", OPS.values())
def test_a_block_starts_as_its_shortcut_and_all_of_its_layers_are_of_its_op(op, space):
    block = Block(op, 64 * space.head_dim // 16, {"down": (32, 2)}, space).eval()
    x = torch.randn(2, 32, 6, 6, generator=rng())
    assert block(x, "down").equal(block.act(block.entrances["down"].shortcut(x)))
    layers = [part for part in block.modules() if isinstance(part, HybridConv2d)]
    assert {layer.op for layer in layers} == {"conv" if op == "attn" else op}


# --------------------------------------------------------------------------------------------- §6 space


def test_space_sizes_are_the_published_and_the_counted_ones():
    assert HYTRA.size() == 198_955_008 and len(HYTRA.depths) == 19
    assert FASHION.size() == 131_328
    counted = set()
    for depths in TINY.depths:
        letters = [itertools.product(ops, repeat=depth) for ops, depth in zip(TINY.ops, depths)]
        counted |= {"/".join("".join(stage) for stage in stages) for stages in itertools.product(*letters)}
    assert TINY.size() == len(counted) == 18
    assert {TINY.arch(index) for index in range(18)} == counted


def test_samples_are_uniform_over_archs_and_valid():
    generator = rng()
    counts = Counter(TINY.sample(generator) for _ in range(3600))
    assert len(counts) == 18 and all(abs(count - 200) < 5 * math.sqrt(200) for count in counts.values())
    assert all(HYTRA.validate(HYTRA.sample(generator)) for _ in range(200))


def test_a_space_of_more_archs_than_64_bits_count_is_sampled_uniformly():
    space = replace(FASHION, depths=((30, 30, 30),))
    assert space.size() == 3**30 * 4**60 > 2**63
    generator = rng()
    counts = Counter()
    for _ in range(100):
        counts.update(space.validate(space.sample(generator)).split("/")[2])
    assert all(abs(counts[letter] - 750) < 5 * math.sqrt(750) for letter in "csat")


def test_a_training_step_draws_every_op_of_a_position_and_is_uniform():
    generator = rng()
    counts = Counter()
    for _ in range(600):
        archs = [FASHION.validate(arch) for arch in FASHION.draw(generator)]
        assert len(archs) == 4 and len({tuple(map(len, arch.split("/"))) for arch in archs}) == 1
        for position, letters in enumerate(zip(*(arch.replace("/", "") for arch in archs))):
            assert set(letters) == set("csat" if position >= 2 else "csa")
        counts.update(archs[0].split("/")[0] + archs[3].split("/")[0])
    assert all(abs(counts[letter] - 800) < 5 * math.sqrt(800 * 2 / 3) for letter in "csa")
    assert len(FASHION.draw(generator, fair=False)) == 1


@pytest.mark.parametrize("space", [FASHION, HYTRA], ids=lambda space: space.name)
def test_children_stay_in_the_space_and_come_from_their_parents(space):
    generator = rng()
    for _ in range(200):
        one = space.sample(generator)
        two = space.sample(generator)
        child = space.validate(space.crossover(one, two, generator))
        assert [len(stage) for stage in child.split("/")] in [
            [len(stage) for stage in arch.split("/")] for arch in (one, two)
        ]
        for mine, a, b in zip(*(arch.split("/") for arch in (child, one, two))):
            assert all(letter in (a[i : i + 1], b[i : i + 1]) for i, letter in enumerate(mine))
        space.validate(space.mutate(one, generator))
        assert space.mutate(one, generator, 0, 0) == one


BAD_ARCHS = [
    ("cc/cx/cc", "unknown op 'x'"),
    ("cc/cc", "string of 3 stages"),
    ("ct/cc/cc", "'t' .attn. is not offered at stage 1 of space fashion.*allowed there: c, s, a"),
    ("c/cc/cc", "1-2-2 blocks a stage; space fashion allows 2-2-2 2-2-3"),
    ("", "string of 3 stages"),
    ("cccccc", "string of 3 stages"),
    (None, "string of 3 stages"),
    (["cc", "cc", "cc"], "string of 3 stages"),
    ("cc/cc/cc/cc", "string of 3 stages"),
    ("cc//cc", "2-0-2 blocks"),
]


@pytest.mark.parametrize("arch, message", BAD_ARCHS)
def test_a_bad_arch_is_named(arch, message):
    with pytest.raises(ValueError, match=message):
        FASHION.validate(arch)


BAD_SPACES = [
    ({"strides": (1, 2)}, r"strides must be a tuple of 3 values, got \(1, 2\)"),
    ({"strides": [1, 2, 2]}, "strides must be a tuple"),
    ({"ops": "csa"}, "ops must be a tuple"),
    ({"ops": ["c", "cs", "cs"]}, "ops must be a tuple"),
    ({"ops": ("c", "cx", "cs")}, "a stage offers 'cx'"),
    ({"ops": ("c", "", "cs")}, "a stage offers ''"),
    ({"depths": ([2, 2, 2],)}, "depths must be a tuple"),
    ({"depths": ((2, 2),)}, "depths must be a tuple of 3 values"),
    ({"depths": ((2, 0, 2),)}, "depths must be ints of at least 1"),
    ({"depths": ((2, 2.0, 2),)}, "depths must be ints"),
    ({"depths": ()}, "depths must be a tuple of values"),
    ({"depths": 5}, "depths must be a tuple of values, got 5"),
    ({"depths": ((2, 2, 2), (2, 2, 2))}, "no depths may stand twice"),
    ({"widths": [32, 64, 128]}, "widths must be a tuple"),
    ({"widths": (32, 64.0, 128)}, "widths must be ints"),
    ({"strides": (2, 2, 2)}, "the first stride must be 1"),
    ({"strides": (1, 0, 2)}, "strides must be ints of at least 1"),
    ({"ops": ("cc", "cs", "cs")}, "different letters"),
    ({"head_dim": 0}, "head_dim must be ints of at least 1"),
    ({"classes": 0}, "classes must be ints of at least 1"),
    ({"head_dim": 12}, "head_dim 12 must divide p = 64 / 4"),
    ({"widths": (32, 64, 126)}, "must divide p = 126 / 4"),
]


@pytest.mark.parametrize("change, message", BAD_SPACES)
def test_a_bad_space_is_named(change, message):
    with pytest.raises(ValueError, match="space fashion: .*" + message):
        replace(FASHION, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"widths": [96, 64]}, "widths must be a tuple of ints"),
        ({"kernels": (3,)}, "kernels must have an entry for each layer"),
        ({"qkv": 97}, "must divide qkv 97"),
        ({"heads": (5,)}, "must divide qkv 96"),
        ({"widths": (95,)}, "2 each width"),
        ({"decoder_layers": (0,)}, "decoder_layers must be a tuple of ints of at least 1"),
        ({"encoder_layers": 0}, "encoder_layers must be an int of at least 1"),
    ],
)
def test_a_bad_space_of_translation_is_named(change, message):
    with pytest.raises(ValueError, match="space translation: .*" + message):
        replace(shiftaddnas.TOKEN_SPACES["translation"], **change)


# ------------------------------------------------------------------------------------------ §7 supernet


def published_form(module):
    """Count the numbers that the published PS shift layers of a module have beyond ours.

    They keep exponent and sign, two numbers a weight, and their position encoding has a bias.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ShiftConv2d)]
    biases = sum(len(layer.weight) for layer in layers if layer.groups > 1 and layer.bias is None)
    return sum(layer.weight.numel() for layer in layers) + biases


def test_the_whole_fabric_of_hytra_has_the_published_sizes():
    blocks = ps = shared = 0
    with torch.device("meta"):
        rest = parameters(shiftaddnas.make_stem(HYTRA)) + parameters(shiftaddnas.Head(HYTRA, False))
        for stage, first in itertools.product(range(4), (True, False)):
            times = 1 if first else 15  # 16 positions; stage by stage, conv, shift and add in every cell
            c_out = HYTRA.widths[stage]
            entrances = {"same": (c_out // 4 if first else c_out, 1)}
            if stage:
                entrances["down"] = (HYTRA.widths[stage - 1], HYTRA.strides[stage])
            for letter in set(HYTRA.ops[stage]) | set("csa"):
                block = Block(OPS[letter], c_out, entrances, HYTRA)
                blocks += times * parameters(block)
                ps += times * published_form(block)
            shared += times * sum(map(math.prod, shiftaddnas.shared_shapes(entrances, c_out).values()))
    for p, kernel in ((64, 2), (128, 4), (256, 8)):  # input projections of stages where no path starts
        rest += 64 * kernel**2 + 64 * p + 2 * p
    slopes = 16 * 4 * 6 * 100  # of one T: 100 for each of 6 tensors a cell
    assert rest + blocks + ps == 615_390_116  # nothing is shared
    assert rest + blocks + ps - shared + slopes == 489_823_652  # conv and add share, add reads T(w)
    assert rest + blocks - 2 * shared == 238_427_044  # naive sharing of all three
    assert rest + blocks - 2 * shared + slopes == 238_465_444  # T for add
    assert rest + blocks - 2 * shared + 2 * slopes == 238_503_844  # T for shift and for add


def test_the_cells_of_hytra_that_an_arch_can_reach_are_built_and_no_others():
    with torch.device("meta"):
        supernet = Supernet(HYTRA, "none")
    assert parameters(supernet) + published_form(supernet) == 136_776_868
    used = set()
    for depths in HYTRA.depths:
        stages = [stage for stage in range(4) for _ in range(depths[stage])]
        used |= {f"{position}-{stage}" for position, stage in enumerate(stages)}
    assert {name[:-2] for name in supernet.blocks} == used


RETRAINED = [  # the published networks, the first also with shift layers of the PS form
    ("cc/cccc/sctaa/ttctt", 1, 31_418_160),
    ("cc/cccc/sctaa/ttctt", 0, 29_908_528),
    ("cc/cscc/sctss/ttctt", 0, 29_909_040),
]


@pytest.mark.parametrize("arch, ps, published", RETRAINED)
def test_retraining_networks_have_the_published_sizes(arch, ps, published):
    with torch.device("meta"):
        network = build(SPACES["bossnet_t0"], arch)
    assert parameters(network) + ps * published_form(network) == published
    assert parameters(network.head.distilled) == 2_049_000


@pytest.mark.parametrize("sharing", ["none", "naive", "heterogeneous"])
def test_an_extracted_network_equals_the_supernet_and_shares_nothing_with_it(sharing):
    supernet = opened(Supernet(FASHION, sharing))
    generator = rng()
    x = torch.randn(3, 1, 28, 28, generator=generator)
    for _ in range(6):
        arch = FASHION.sample(generator)
        supernet.train()(x, arch)  # moves the statistics
        supernet.eval()
        network = supernet.extract(arch).eval()
        assert network(x).equal(supernet(x, arch))
        assert network.state_dict().keys() == build(FASHION, arch).state_dict().keys()
        mine = {tensor.data_ptr() for tensor in supernet.state_dict().values()}
        assert not any(tensor.data_ptr() in mine for tensor in network.state_dict().values())


def test_several_archs_share_a_batch_in_equal_parts_of_at_least_two_images():
    supernet = Supernet(FASHION, "heterogeneous").eval()
    archs = FASHION.draw(rng())
    x = torch.randn(8, 1, 28, 28, generator=rng(1))
    parts = [supernet(images, arch) for images, arch in zip(x.split(2), archs)]
    torch.testing.assert_close(supernet(x, archs), torch.cat(parts), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(supernet(x[:5], archs), supernet(x[:5], archs[:2]))
    for arch in archs:
        torch.testing.assert_close(supernet(x[:1], archs[:1]), supernet(x[:1], archs[0]))


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one, two, other = [Supernet(TINY, seed=seed) for seed in (1, 1, 2)]
    assert torch.get_rng_state().equal(state)
    assert all(a.equal(b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert not one.head.fc.weight.equal(other.head.fc.weight)
    with pytest.raises(ValueError, match="unknown sharing 'some'; known: none, naive, heterogeneous"):
        Supernet(TINY, "some")


@pytest.mark.slow
def test_hytra_and_the_published_network_have_finite_gradients_at_64_pixels():
    generator = rng()
    supernet = Supernet(replace(HYTRA, widths=(32, 64, 256, 256)), "heterogeneous")
    for _ in range(3):
        logits = supernet(torch.randn(2, 3, 64, 64, generator=generator), HYTRA.sample(generator))
        logits.square().mean().backward()
        assert logits.shape == (2, 100)
    network = build(SPACES["bossnet_t0"], "cc/cccc/sctaa/ttctt")
    both = network(torch.rand(2, 3, 64, 64, generator=generator))  # two classifiers in training
    sum(logits.square().mean() for logits in both).backward()
    assert [logits.shape for logits in both] == [(2, 1000)] * 2
    for model in (supernet, network):
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------- story


@pytest.mark.slow
def test_the_story_from_the_supernet_over_the_search_to_the_table(tiny_data, tmp_path):
    out = tmp_path / "out"
    flags = ["--data", str(tiny_data), "--out", str(out), "--quick", "--budget", "0.5"]
    flags += ["--set", "batch=20", "--set", "supernet_epochs=3", "--set", "epochs=6", "--set", "finalists=2"]
    search.main(flags)
    text = (out / "search.json").read_text()
    result = json.loads(text)
    rows = {row["name"]: row for row in result["table"]}
    assert list(rows)[:3] == ["reference", "all-shift", "all-add"] and list(rows)[-1] == "winner"
    for row in rows.values():
        network = build(FASHION, row["arch"])
        assert row["params"] == parameters(network)
        assert row["energy_mj"] == arch_costs(FASHION, row["arch"])["energy_mj"]
    reference = rows["reference"]
    assert rows["winner"]["energy_mj"] <= 0.5 * reference["energy_mj"]
    assert reference["test_accuracy"] > 50  # of ten classes, after 30 steps
    best = max(result["finalists"], key=lambda row: row[1])  # of (arch, validation accuracy, its error)
    equals = [arch for arch, accuracy, _ in result["finalists"] if accuracy >= best[1] - best[2]]
    energies = {arch: arch_costs(FASHION, arch)["energy_mj"] for arch in equals}
    assert result["winner"] == rows["winner"]["arch"] in equals
    assert energies[result["winner"]] == min(energies.values())
    for name in ("supernet", "retrain-" + FASHION.file_name(reference["arch"])):
        log = losses(out / f"{name}.jsonl")
        assert sum(log[-6:]) < sum(log[:6])  # it learns
    (out / "search.json").unlink()
    search.main(flags)  # again, with what is in the folder
    assert (out / "search.json").read_text() == text

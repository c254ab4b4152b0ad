"""Claims of the project, in the order of its files: operators, sharing, blocks, space, supernet, training,
search, cost model. References are independent definitions: float64 loops, closed forms, recorded figures.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cost_model
import search
import shiftaddnas
import train
from cost_model import Layer, layer_cost, network_cost, network_layers, operations, transformer_layers
from shiftaddnas import (
    SPACES,
    HybridConv2d,
    Sharing,
    SharedWeight,
    Supernet,
    add_conv2d,
    add_conv2d_int,
    add_conv2d_u8,
    add_linear,
    attention2d,
    build,
    find_space,
    fixed_point,
    kl_divergence,
    pack_shift,
    power_of_two,
    shift_conv2d,
    shift_conv2d_int,
    shift_weight,
    unpack_shift,
)

ROOT = Path(__file__).parent
FASHION, HYTRA = SPACES["fashion"], SPACES["hytra"]
V3, V4 = "cc/cccc/sctaa/ttctt", "cc/cscc/sctss/ttctt"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that spin beside another process crawl
TINY = replace(FASHION, name="tiny", ops=("c", "cs", "cst"), depths=((1, 1, 1), (1, 2, 1)))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# -------------------------------------------------------------------------------------------- §1 rounding


def test_power_of_two_equals_the_definition_and_passes_the_gradient():
    w = torch.tensor([0.0, 0.3, -0.3, 1.0, 5.0, -0.7, 1e-9, 2**-15, float("nan")], requires_grad=True)
    y = power_of_two(w)
    expected = [0.0, 0.25, -0.25, 1.0, 1.0, -0.5, 2**-15, 2**-15, float("nan")]
    torch.testing.assert_close(y, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    y.backward(torch.arange(9.0))
    assert w.grad.equal(torch.arange(9.0)) and w[4] == 5  # straight through, not in place


@pytest.mark.parametrize("bits, lowest", [(2, -1), (3, -3), (5, -15)])
def test_power_of_two_exponents_fill_the_code(bits, lowest):
    values = power_of_two(torch.logspace(-8, 1, 400, dtype=torch.float64), bits)
    assert values.log2().unique().tolist() == [float(e) for e in range(lowest, 1)]


def test_shift_weight_has_the_official_values_and_gradients():
    shift = torch.tensor([-3.2, -20.0, 1.0, -2.0, -1.0], requires_grad=True)
    sign = torch.tensor([0.9, -0.8, 0.6, 0.5, -0.51], requires_grad=True)
    w = shift_weight(shift, sign)
    assert w.tolist() == [2**-3, -(2**-14), 1.0, 0.0, -0.5]
    g = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    w.backward(g)
    torch.testing.assert_close(shift.grad, g * w.detach() * math.log(2))
    assert sign.grad.equal(g)


def test_fixed_point_floors_clips_and_passes_the_gradient():
    x = torch.tensor([0.3, -0.3, 1e6, -1e6], dtype=torch.float64, requires_grad=True)
    y = fixed_point(x, fraction_bits=2, integer_bits=4)
    assert y.tolist() == [0.25, -0.5, 7.0, -8.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "call", [lambda: power_of_two(torch.ones(1), 1), lambda: shift_weight(torch.ones(1), torch.ones(1), 0)]
)
def test_too_few_weight_bits_are_refused(call):
    with pytest.raises(ValueError, match="weight_bits"):
        call()


# ------------------------------------------------------------------------------------------- §2 operators


def loop_conv(x, w, stride, padding, groups, term):
    """y[n,m,i,j] = sum of term(x tap, w tap), written as loops over every index."""
    x = F.pad(x, (padding,) * 4)
    (n, _, h, wide), (m, cg, kh, kw) = x.shape, w.shape
    y = x.new_zeros(n, m, (h - kh) // stride + 1, (wide - kw) // stride + 1)
    for b, o, i, j in itertools.product(*map(range, y.shape)):
        first = o // (m // groups) * cg
        patch = x[b, first : first + cg, i * stride : i * stride + kh, j * stride : j * stride + kw]
        y[b, o, i, j] = term(patch, w[o]).sum()
    return y


def loop_add_gradients(g, x, w, stride, padding, groups):
    """dL/dx = sum g clip(w - x, -1, 1), dL/dw = sum g (x - w), tap by tap."""
    padded = F.pad(x, (padding,) * 4)
    grad_x, grad_w = torch.zeros_like(padded), torch.zeros_like(w)
    m, cg, kh, kw = w.shape
    for b, o, i, j in itertools.product(*map(range, g.shape)):
        first = o // (m // groups) * cg
        at = (
            b,
            slice(first, first + cg),
            slice(i * stride, i * stride + kh),
            slice(j * stride, j * stride + kw),
        )
        grad_x[at] += g[b, o, i, j] * (w[o] - padded[at]).clamp(-1, 1)
        grad_w[o] += g[b, o, i, j] * (padded[at] - w[o])
    inside = slice(padding, padding + x.shape[2]), slice(padding, padding + x.shape[3])
    return grad_x[(..., *inside)], grad_w


GEOMETRIES = [  # n, c, h, w, m, k, stride, padding, groups
    (2, 3, 5, 7, 4, 3, 1, 1, 1),
    (1, 4, 7, 5, 6, 3, 2, 1, 2),
    (2, 6, 6, 7, 6, 3, 2, 1, 6),
    (1, 2, 9, 8, 3, 3, 3, 0, 1),
    (1, 6, 4, 4, 9, 1, 1, 0, 3),
    (1, 4, 8, 8, 8, 5, 3, 2, 4),
    (1, 3, 1, 1, 2, 1, 2, 0, 1),
    (2, 2, 7, 7, 2, 7, 2, 3, 1),
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_add_conv2d_and_its_gradients_equal_loops(geometry, dtype, tolerance):
    n, c, h, wide, m, k, stride, padding, groups = geometry
    x, w = (
        torch.randn(n, c, h, wide, generator=rng(1)).double(),
        torch.randn(m, c // groups, k, k, generator=rng(2)).double(),
    )
    expected = loop_conv(x, w, stride, padding, groups, lambda patch, taps: -(patch - taps).abs())
    xs, ws = (t.to(dtype).requires_grad_() for t in (x, w))
    y = add_conv2d(xs, ws, stride, padding, groups)
    g = torch.randn(y.shape, generator=rng(3)).double()
    y.backward(g.to(dtype))
    for found, wanted in zip(
        (y, xs.grad, ws.grad), (expected, *loop_add_gradients(g, x, w, stride, padding, groups))
    ):
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()  # false for NaN


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_shift_conv2d_equals_a_loop_over_powers_of_two(geometry):
    n, c, h, wide, m, k, stride, padding, groups = geometry
    x = torch.randn(n, c, h, wide, generator=rng(1)).double()
    w = torch.randn(m, c // groups, k, k, generator=rng(2)).double().requires_grad_()
    grid = (x * 2**16).floor() / 2**16
    rounded = (w.sign() * 2 ** w.abs().log2().round().clamp(-15, 0)).detach()
    y = shift_conv2d(x, w, stride, padding, groups)
    torch.testing.assert_close(y, loop_conv(grid, rounded, stride, padding, groups, lambda a, b: a * b))
    y.sum().backward()
    plain = rounded.clone().requires_grad_()
    F.conv2d(grid, plain, None, stride, padding, 1, groups).sum().backward()
    torch.testing.assert_close(w.grad, plain.grad)


def test_strided_add_gradient_reaches_every_input():
    x = torch.randn(1, 2, 8, 8, generator=rng(), requires_grad=True)
    add_conv2d(x, torch.randn(3, 2, 3, 3, generator=rng(1)), stride=2, padding=1).sum().backward()
    assert (x.grad != 0).all()  # the official rule leaves all but a corner at zero


def test_a_padded_tap_costs_the_absolute_weight():
    w = torch.tensor([[[[1.0, -2.0, 3.0]] * 3]])
    y = add_conv2d(torch.zeros(1, 1, 1, 1), w, padding=1)
    assert y.item() == -18


def test_add_conv2d_takes_empty_batches_and_odd_layouts():
    w = torch.randn(5, 3, 3, 3, generator=rng())
    assert add_conv2d(torch.empty(0, 3, 6, 6), w).shape == (0, 5, 4, 4)
    x = torch.randn(2, 3, 6, 7, generator=rng(1))
    y = add_conv2d(x, w, padding=1)
    torch.testing.assert_close(
        add_conv2d(x.to(memory_format=torch.channels_last), w, padding=1), y, rtol=0, atol=0
    )
    torch.testing.assert_close(
        add_conv2d(x.transpose(2, 3).contiguous().transpose(2, 3), w, padding=1), y, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "shape, weight, settings",
    [
        ((1, 3, 5, 5), (2, 4, 3, 3), {}),
        ((1, 4, 5, 5), (3, 2, 3, 3), {"groups": 2}),
        ((3, 5, 5), (2, 3, 3, 3), {}),
        ((1, 3, 2, 2), (2, 3, 3, 3), {}),
        ((1, 3, 5, 5), (2, 3, 3, 3), {"stride": 0}),
        ((1, 3, 5, 5), (2, 3, 3, 3), {"padding": -1}),
        ((1, 2**14, 2**8, 2**8), (2, 2**14, 3, 3), {}),  # offsets in an image have 32 bits in the kernels
    ],
)
@pytest.mark.parametrize("operator", [add_conv2d, shift_conv2d])
def test_operators_name_the_shapes_that_do_not_fit(operator, shape, weight, settings):
    with pytest.raises(ValueError, match=r"x \(.*weight \("):
        operator(torch.zeros(1).expand(shape), torch.zeros(1).expand(weight), **settings)


def test_official_attention_mixes_by_the_columns():
    x, w = torch.randn(1, 4, 2, 3, generator=rng()), torch.randn(12, 4, 1, 1, generator=rng(1))
    q, k, v = torch.einsum("mc,cp->mp", w[:, :, 0, 0], x[0].flatten(1)).view(3, 2, 2, 6)  # (heads, 2, places)
    weights = torch.einsum("hdi,hdj->hij", q, k).div(2**0.5).softmax(2)
    expected = torch.einsum("hij,hdi->hdj", weights, v).reshape(1, 4, 2, 3)
    torch.testing.assert_close(attention2d(x, w, 2, official=True), expected)


def test_attention_weights_of_an_output_sum_to_one_and_equal_loops():
    n, c, dim = 2, 8, 4
    x, w = (
        torch.randn(n, c, 3, 5, generator=rng()).double(),
        torch.randn(3 * c, c, 1, 1, generator=rng(1)).double(),
    )
    y, qkv = attention2d(x, w, dim), torch.einsum("oc,ncl->nol", w[:, :, 0, 0], x.flatten(2))
    for b, head in itertools.product(range(n), range(c // dim)):
        q, k, v = (qkv[b, part * c + head * dim : part * c + (head + 1) * dim] for part in range(3))
        for i in range(15):
            weights = torch.softmax(torch.stack([(q[:, i] * k[:, j]).sum() / dim**0.5 for j in range(15)]), 0)
            torch.testing.assert_close(y[b, head * dim : (head + 1) * dim].flatten(1)[:, i], v @ weights)
    w[2 * c :] = torch.eye(c).view(c, c, 1, 1)  # values = inputs, and these all equal 1
    torch.testing.assert_close(attention2d(torch.ones_like(x), w, dim), torch.ones_like(x))


# ----------------------------------------------------------------------------------- §2 compiled kernels

BUILDS = ["cpu", "cpu-avx2", "cpu-portable", "emulate", *["gpu"] * torch.cuda.is_available()]
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler on this machine"
)


@contextlib.contextmanager
def kernels(build):
    """SHIFTADDNAS_KERNELS=build inside, yields the device it serves; skips where it cannot run here."""
    with shiftaddnas.forced_path(build):
        try:
            if build != "off":
                shiftaddnas.load_kernels(build)
        except RuntimeError as error:
            if "build needs" not in str(error):
                raise
            pytest.skip(str(error))
        yield "cuda" if build == "gpu" else "cpu"


def geometries(count=220):
    """(x, w, stride, padding, groups): odd sizes, K 1-7, depthwise, linear, batches of 0 and 1, one-pixel
    images, non-contiguous and channels-last tensors."""
    draw, gen = random.Random(0), rng()
    for i in itertools.count():
        if not count:
            return
        groups, per_group, filters = (
            draw.choice([1, 1, 2, 3]),
            draw.choice([1, 2, 3, 5, 9]),
            draw.choice([1, 2, 5, 11]),
        )
        if i % 6 == 0:
            groups, per_group, filters = 6, 1, 1
        kh, kw, stride, padding = (draw.randint(*ends) for ends in ((1, 7), (1, 7), (1, 3), (0, 3)))
        h, wide = draw.choice([1, 3, 7, 9, 16, 17]), draw.choice([1, 5, 8, 11, 16, 23])
        if i % 15 == 4:  # a linear layer
            groups, filters, kh, kw, padding, h, wide = 1, 70, 1, 1, 0, 1, 1
        if kh > h + 2 * padding or kw > wide + 2 * padding:
            continue
        x = torch.randn(draw.choice([0, 1, 1, 2, 3]), groups * per_group, h, wide, generator=gen)
        w = torch.randn(groups * filters, per_group, kh, kw, generator=gen)
        if i % 5 == 1:
            x = x.to(memory_format=torch.channels_last)
        if i % 5 == 2:
            x, w = x.mT.contiguous().mT, w.mT.contiguous().mT
        count -= 1
        yield x, w, stride, padding, groups


def add_reference(x, w, stride, padding, groups, g=None):
    """(y, grad_x, grad_w) in float64, one kernel position at a time; only y without g."""
    (n, c, h, wide), (m, cg, kh, kw) = x.shape, w.shape
    ho, wo = (h + 2 * padding - kh) // stride + 1, (wide + 2 * padding - kw) // stride + 1
    x, w = F.pad(x.double(), (padding,) * 4), w.double()
    channel = (torch.arange(m) // (m // groups))[:, None] * cg + torch.arange(cg)
    y, grad_x, grad_w = x.new_zeros(n, m, ho, wo), torch.zeros_like(x), torch.zeros_like(w)
    for u, v in itertools.product(range(kh), range(kw)):
        rows, columns = (slice(a, a + stride * (size - 1) + 1, stride) for a, size in ((u, ho), (v, wo)))
        d = w[:, :, u, v, None, None] - x[:, :, rows, columns][:, channel]
        y -= d.abs().sum(2)
        if g is not None:
            terms = (g.double()[:, :, None] * d.clamp(-1, 1)).flatten(1, 2)
            part = x.new_zeros(n, c, ho, wo).index_add(1, channel.flatten(), terms)
            grad_x[:, :, rows, columns] += part
            grad_w[:, :, u, v] = -(g.double()[:, :, None] * d).sum((0, 3, 4))
    inside = slice(padding, padding + h), slice(padding, padding + wide)
    return y if g is None else (y, grad_x[(..., *inside)], grad_w)


def run_add(x, w, g, geometry, device="cpu"):
    x, w = x.to(device).detach().requires_grad_(), w.to(device).detach().requires_grad_()
    y = add_conv2d(x, w, *geometry)
    return [t.cpu() for t in (y.detach(), *torch.autograd.grad(y, (x, w), g.to(device)))]


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item()


@needs_compiler
@pytest.mark.parametrize("build", [*BUILDS, "off"])
def test_add_and_its_gradients_equal_float64_on_220_geometries(build):
    gen = rng(1)
    with kernels(build) as device:
        for x, w, *geometry in geometries():
            g = torch.randn(add_reference(x, w, *geometry).shape, generator=gen)
            for found, wanted in zip(run_add(x, w, g, geometry, device), add_reference(x, w, *geometry, g)):
                assert found.shape == wanted.shape
                assert relative_error(found, wanted) < 1e-5, (x.shape, w.shape, geometry)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", BUILDS)
def test_a_broken_number_shows_in_what_depends_on_it_and_in_nothing_else(build, value):
    draw, gen = random.Random(4), rng(4)
    with kernels(build) as device:
        for x, w, *geometry in itertools.islice((case for case in geometries() if case[0].numel()), 50):
            y = add_reference(x, w, *geometry)
            g, at, where = (
                torch.randn(y.shape, generator=gen),
                *(tuple(map(draw.randrange, t.shape)) for t in (x, w)),
            )
            clean, moved, bad = run_add(x, w, g, geometry, device), x.clone(), x.clone()
            moved[at] += 1e3
            bad[at] = value
            reached = add_reference(moved, w, *geometry) != y
            found, grad_x, _ = run_add(bad, w, g, geometry, device)
            assert (~found.isfinite()).equal(reached)
            torch.testing.assert_close(found[~reached], clean[0][~reached], rtol=1e-4, atol=1e-4)
            others = torch.ones_like(x, dtype=torch.bool)
            others[at] = False
            torch.testing.assert_close(grad_x[others], clean[1][others], rtol=1e-4, atol=1e-4)
            assert grad_x[at].isnan().item() == (math.isnan(value) and reached.any().item())
            bad, ones = w.clone(), torch.zeros_like(w)
            bad[where], ones[where] = value, 1
            found, grad_x, _ = run_add(x, bad, g, geometry, device)
            hit = torch.arange(len(w)) == where[0]
            assert (~found.isfinite()).equal(hit[:, None, None].expand_as(found))
            meets = (
                torch.nn.grad.conv2d_input(x.shape, ones, torch.ones_like(g), *geometry[:2], 1, geometry[2])
                > 0
            )
            assert grad_x.isnan().equal(meets & math.isnan(value))


@needs_compiler
@pytest.mark.parametrize("build", BUILDS)
def test_a_common_offset_of_100_leaves_an_error_below_1e_4(build):
    gen = rng(5)
    with kernels(build) as device:
        for c, m, side, k, groups in [(64, 32, 8, 3, 1), (256, 16, 4, 1, 1), (6, 6, 9, 3, 6)]:
            x = 100 + torch.randn(2, c, side, side, generator=gen)
            w = 100 + torch.randn(m, c // groups, k, k, generator=gen)
            g = torch.randn(2, m, side - k + 1, side - k + 1, generator=gen)
            wanted = add_reference(x, w, 1, 0, groups, g)
            for a, b in zip(run_add(x, w, g, (1, 0, groups), device), wanted):
                assert relative_error(a, b) < 1e-4


@needs_compiler
@pytest.mark.parametrize("build", BUILDS)
def test_the_gradient_of_x_keeps_its_digits_over_4608_terms_of_any_magnitude(build):
    gen = rng(6)
    with kernels(build) as device:
        for size, weight_size in itertools.product((0.01, 1, 3, 8, 100), (0.01, 1)):
            x = size * torch.randn(1, 4, 5, 5, generator=gen)
            w = weight_size * torch.randn(512, 4, 3, 3, generator=gen)
            g = torch.randn(1, 512, 5, 5, generator=gen)
            wanted = add_reference(x, w, 1, 1, 1, g)[1]
            found = run_add(x, w, g, (1, 1, 1), device)[1]
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max(), (size, weight_size)


@needs_compiler
@pytest.mark.parametrize("build", BUILDS)
def test_add_repeats_bit_for_bit_and_is_zero_on_equal_inputs(build):
    gen = rng(7)
    x, w = torch.randn(4, 16, 13, 13, generator=gen), torch.randn(20, 16, 3, 3, generator=gen)
    g = torch.randn(4, 20, 13, 13, generator=gen)
    with kernels(build) as device:
        first = run_add(x, w, g, (1, 1, 1), device)
        again = run_add(x, w, g, (1, 1, 1), device)
        assert all(a.equal(b) for a, b in zip(first, again))
        point = torch.randn(1, 40, 3, 3, generator=gen).to(device)
        assert (add_conv2d(point, point.clone()) == 0).all()


@needs_compiler
def test_the_thread_count_changes_no_bit_of_the_kernels():
    x, w, threads = (
        torch.randn(3, 8, 17, 17, generator=rng()),
        torch.randn(12, 8, 3, 3, generator=rng(1)),
        torch.get_num_threads(),
    )
    try:
        with kernels("cpu"):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(add_conv2d(x, w, 2, 1))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


def test_half_precision_is_float32_rounded():
    x, w = torch.randn(2, 8, 6, 6, generator=rng()), torch.randn(4, 8, 3, 3, generator=rng(1))
    for dtype in (torch.float16, torch.bfloat16):
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        y = add_conv2d(a, b, padding=1)
        y.sum().backward()
        assert y.dtype == a.grad.dtype == b.grad.dtype == dtype
        assert y.equal(add_conv2d(a.float(), b.float(), padding=1).to(dtype))


@needs_compiler
@pytest.mark.parametrize("build", [*BUILDS, "off"])
def test_a_large_linear_layer_and_its_gradients_equal_float64(build):
    shapes = [(700, 70), (150, 70), (700, 150)]
    x, w, g = (torch.randn(*shape, 1, 1, generator=rng(i)) for i, shape in enumerate(shapes))
    with kernels(build) as device:
        for found, wanted in zip(run_add(x, w, g, (1, 0, 1), device), add_reference(x, w, 1, 0, 1, g)):
            assert relative_error(found, wanted) < 1e-5
        if device == "cpu":
            x8, w8 = ((50 * t + 128).clamp(0, 255).byte() for t in (x, w))
            assert add_conv2d_u8(x8, w8).double().equal(add_reference(x8, w8, 1, 0, 1))


def test_add_linear_is_minus_the_l1_distance_of_tokens():
    x, w = torch.randn(2, 5, 33, generator=rng()), torch.randn(7, 33, generator=rng(1))
    torch.testing.assert_close(add_linear(x, w), -torch.cdist(x, w.expand(2, -1, -1), p=1))
    with pytest.raises(ValueError, match=r"\(2, 5, 33\).*\(7, 32\)"):
        add_linear(x, w[:, 1:])


def test_opcheck_is_clean_for_the_add_operator_and_its_gradient():
    x, w = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(6, 2, 3, 3, requires_grad=True)
    torch.library.opcheck(shiftaddnas.add_conv2d_op, (x, w, 2, 1, 2))
    g = torch.randn(2, 6, 3, 3)
    torch.library.opcheck(shiftaddnas.add_conv2d_grad_x_op, (g, x.detach(), w.detach(), 2, 1, 2))


def test_a_compiled_graph_gives_the_same_values_and_gradients():
    def twice(x, w):
        return add_conv2d(add_conv2d(x, w, 1, 1).tanh(), w, 2, 0).square().sum()

    x = torch.randn(2, 4, 6, 6, generator=rng()).requires_grad_()
    w = torch.randn(4, 4, 3, 3, generator=rng(1)).requires_grad_()
    eager, compiled = twice(x, w), torch.compile(twice, fullgraph=True, backend="aot_eager")(x, w)
    torch.testing.assert_close(eager, compiled)
    torch.testing.assert_close(torch.autograd.grad(eager, (x, w)), torch.autograd.grad(compiled, (x, w)))


ADD = "s.add_conv2d(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).item()"
USE = f"import torch, shiftaddnas as s; print({ADD})"


def start(cache, code=USE, **environment):
    """A process that adds, with the cache folder and environment given."""
    env = {**ONE_THREAD, "SHIFTADDNAS_KERNELS": "cpu-portable", "XDG_CACHE_HOME": str(cache), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, **pipes)


@needs_compiler
def test_two_processes_build_at_once_and_a_half_written_library_is_rebuilt(tmp_path):
    for run in [start(tmp_path), start(tmp_path)]:
        assert run.communicate() == ("-18.0\n", "")
    (library,) = (tmp_path / "shiftaddnas").iterdir()
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert start(tmp_path).communicate() == ("-18.0\n", "")
    assert len(library.read_bytes()) == len(whole)


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_still_runs_the_kernels(tmp_path):
    (tmp_path / "file").write_text("")  # a folder below a file cannot be made, not even by root
    assert start(tmp_path / "file").communicate() == ("-18.0\n", "")


@pytest.mark.parametrize(
    "compiler, reason", [("false", "compiling kernels.cu failed"), ("no-such", "not on the PATH")]
)
def test_without_a_working_compiler_torch_adds_and_one_line_says_so(compiler, reason, tmp_path):
    code = f"{USE}; {ADD}"
    out, err = start(tmp_path, code, CXX=compiler, SHIFTADDNAS_KERNELS="").communicate()
    assert out == "-18.0\n" and err.count("\n") == 1 and reason in err


@pytest.mark.parametrize("flags, message", [(["--hlep"], "takes no arguments"), ([], "needs a C++ compiler")])
def test_the_operator_table_refuses_in_one_sentence(flags, message):
    run = command("shiftaddnas", *flags, env={**ONE_THREAD, "CXX": "no-such"})
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and message in run.stderr


def test_nothing_is_compiled_or_loaded_at_import(tmp_path):
    assert start(tmp_path, "import shiftaddnas").communicate() == ("", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "banner, use, expected",
    [
        ("§2 operators", "power_of_two(torch.tensor([0.3, -0.7])).tolist()", "[0.25, -0.5]"),
        ("§2 integer arithmetic", "add_conv2d(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).item()",
         "-18.0"),
        ("§4 blocks", "SharedWeight((8, 9), ['add', 'conv'], SHARING['naive']).weight_for('add').shape",
         "torch.Size([8, 9])"),
        ("§7 operators on tokens",
         "Supernet(SPACES['fashion'])(torch.zeros(2, 1, 28, 28), 'cc/sa/tt').shape",
         "torch.Size([2, 10])"),
    ],
)
def test_the_file_down_to_any_banner_stands_alone(banner, use, expected, tmp_path):
    source = (ROOT / "shiftaddnas.py").read_text(encoding="utf-8")
    above = source[: source.index(f"- {banner}\n")].rsplit("\n", 1)[0]
    (tmp_path / "layers.py").write_text(above, encoding="utf-8")
    code = f"import torch; from layers import *; print({use})"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert run.stdout == expected + "\n", run.stderr
    assert run.stderr.count("\n") == ("add_conv2d" in use or "Supernet" in use)


def test_a_path_that_cannot_be_had_is_an_error_that_says_why(monkeypatch):
    x, w = torch.ones(1, 2, 3, 3), torch.zeros(4, 2, 3, 3)
    monkeypatch.setenv("SHIFTADDNAS_KERNELS", "fast")
    with pytest.raises(ValueError, match="SHIFTADDNAS_KERNELS=fast: allowed are off, cpu"):
        add_conv2d(x, w)
    if not torch.cuda.is_available():
        monkeypatch.setenv("SHIFTADDNAS_KERNELS", "gpu")
        with pytest.raises(RuntimeError, match="the gpu build needs"):
            add_conv2d(x, w)


# ----------------------------------------------------------------------------------- §2 integer arithmetic


@needs_compiler
@pytest.mark.parametrize("build", ["cpu", "cpu-avx2", "cpu-portable", "off"])
def test_integer_operators_equal_their_definitions_on_every_element(build):
    gen = rng(13)
    with kernels(build):
        for x, w, *geometry in geometries(60):
            x8, w8 = (torch.randint(256, t.shape, generator=gen, dtype=torch.uint8) for t in (x, w))
            assert add_conv2d_u8(x8, w8, *geometry).double().equal(add_reference(x8, w8, *geometry))
            ends = torch.iinfo(torch.int32)
            x32, w32 = (torch.randint(ends.min, ends.max, t.shape, generator=gen).int() for t in (x, w))
            assert add_conv2d_int(x32, w32, *geometry).double().equal(add_reference(x32, w32, *geometry))
            e = torch.randint(15, w.shape, generator=gen)
            weight = w.sign() * 2.0**-e * (torch.rand(w.shape, generator=gen) > 0.1)
            small = x32 >> 12  # products below 2^53 are exact in float64
            wanted = F.conv2d(small.double(), weight.double(), None, *geometry[:2], 1, geometry[2])
            found = shift_conv2d_int(small, pack_shift(weight), weight.shape, *geometry)
            assert (found.double() / 2**15).equal(wanted)


@needs_compiler
@pytest.mark.parametrize("build", ["cpu", "cpu-avx2", "cpu-portable"])
def test_depthwise_sums_of_bytes_fit_their_lanes_up_to_the_largest_kernels(build):
    with kernels(build):
        for kh, kw in [(7, 7), (8, 16), (3, 43), (16, 16)]:  # 128 taps are the last that 16 bits hold
            x, w = torch.full((2, 3, kh + 9, kw + 20), 255).byte(), torch.zeros(3, 1, kh, kw).byte()
            assert (add_conv2d_u8(x, w, groups=3) == -255 * kh * kw).all()


@needs_compiler
def test_integer_shift_loses_no_bit_at_the_ends_of_its_range():
    x = torch.tensor([-(2**31), 2**31 - 1, 1], dtype=torch.int32).view(1, 3, 1, 1)
    weight = torch.tensor([1.0, -1.0, 2.0**-15]).view(1, 3, 1, 1)
    y = shift_conv2d_int(x, pack_shift(weight), weight.shape)
    assert y.item() == 2**15 * (-(2**31) - (2**31 - 1)) + 1


def test_packing_is_lossless_at_five_bits_a_weight():
    gen = rng(15)
    for shape in [(0, 3), (1,), (7,), (16, 3, 3, 3), (5, 1, 7, 7)]:
        sign = 1.0 - 2.0 * torch.randint(2, shape, generator=gen)
        weight = sign * 2.0 ** -torch.randint(15, shape, generator=gen)
        for w in (weight, weight * (torch.rand(shape, generator=gen) > 0.3)):
            packed = pack_shift(w)
            assert packed.dtype == torch.uint8 and packed.numel() == 1 + (5 * w.numel() + 7) // 8
            assert unpack_shift(packed, shape).equal(w)
    for bad in (0.75, 2.0, 2.0**-16, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="5-bit codes hold"):
            pack_shift(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="need 6 bytes"):
        unpack_shift(torch.zeros(4, dtype=torch.uint8), (8,))


@needs_compiler
def test_a_hybrid_network_predicts_the_same_classes_through_the_integer_path(monkeypatch):
    data = train.load_data("", FASHION)
    network = train.recalibrate(build(FASHION, "sa/ssc/sat", seed=3), data)
    images, _ = data.test.batch(np.arange(200))
    x = (images - data.mean) / data.std
    with torch.no_grad():
        wanted = network(x)
        calls = Counter()

        def shift_exact(x, weight, stride, padding, groups):
            calls["shift"] += 1
            packed = pack_shift(power_of_two(weight))
            grid = (fixed_point(x).double() * 2**16).int()
            return shift_conv2d_int(grid, packed, weight.shape, stride, padding, groups).double() / 2.0**31

        def add_exact(x, weight, stride, padding, groups):
            calls["add"] += 1
            grids = ((t.double() * 2**16).round().int() for t in (x, weight))
            return add_conv2d_int(*grids, stride, padding, groups).double() / 2.0**16

        exact = {"shift": shift_exact, "add": add_exact}
        floats = {op: lambda x, *args, f=f, **named: f(x, *args, **named).float() for op, f in exact.items()}
        monkeypatch.setattr(shiftaddnas, "OPERATORS", {**shiftaddnas.OPERATORS, **floats})
        found = network(x)
    assert min(calls["shift"], calls["add"]) >= 4
    assert found.argmax(1).equal(wanted.argmax(1))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)


SELFTEST = r"""
#include "KERNELS"
#include <cstdio>
#include <cstdlib>
#include <vector>
#ifdef __CUDACC__
template <class T> struct Memory {
    using value_type = T;
    T* allocate(size_t n) {
        T* p = nullptr;
        if (cudaMallocManaged(&p, n * sizeof(T))) exit(7);
        return p;
    }
    void deallocate(T* p, size_t) { cudaFree(p); }
};
#else
template <class T> using Memory = std::allocator<T>;
#endif
int main() {
    typedef std::vector<float, Memory<float>> floats;
    srand(1);
    auto pick = [](int n) { return rand() % n; };
    for (int round = 0; round < ROUNDS; ++round) {
        ConvShape s{pick(3) + (round % 9 != 0), 0, 1 + pick(19), 1 + pick(19), 0, 1 + pick(5), 1 + pick(5),
                    1 + pick(3), pick(4), 1 + pick(3), 0, 0};
        const int Cg = 1 + pick(12), Mg = 1 + pick(9);
        s.C = s.G * (round % 4 ? Cg : 1), s.M = s.G * (round % 4 ? Mg : 1);
        if (round % 7 == 5) s.H = s.W = s.KH = s.KW = s.G = 1, s.P = 0, s.C = Cg, s.M = 60 + Mg;  // linear
        if (s.KH > s.H + 2 * s.P || s.KW > s.W + 2 * s.P) continue;
        s.Ho = (s.H + 2 * s.P - s.KH) / s.S + 1, s.Wo = (s.W + 2 * s.P - s.KW) / s.S + 1;
        const size_t weights = (size_t)s.M * (s.C / s.G) * s.KH * s.KW;
        floats x(inputs(s)), w(weights), y((size_t)s.N * s.M * s.Ho * s.Wo), gx(x.size());
#ifdef __CUDACC__
        const int64_t where = 0;
#else
        const int64_t where = 1 + round % 3;
#endif
        for (auto* t : {&x, &w}) for (float& a : *t) a = float(pick(2001) - 1000) / 400;
        if (add_conv2d_forward(y.data(), x.data(), w.data(), &s, where)) return 2;
        if (add_conv2d_grad_x(gx.data(), y.data(), x.data(), w.data(), &s, where)) return 3;
#if defined(__CUDACC__)
        if (cudaDeviceSynchronize()) return 8;
#elif !defined(EMULATE)
        std::vector<uint8_t> x8(x.size(), 7), w8(w.size(), 9), packed(2 + w.size(), 13);
        std::vector<int32_t> y32(y.size()), xi(x.size(), -5), wi(w.size(), 6);
        std::vector<int64_t> y64(y.size());
        if (add_conv2d_u8(y32.data(), x8.data(), w8.data(), &s, 2)) return 4;
        if (add_conv2d_int(y64.data(), xi.data(), wi.data(), &s, 2)) return 5;
        if (shift_conv2d_int(y64.data(), xi.data(), packed.data(), &s, 2)) return 6;
#endif
    }
    puts("clean");
}
"""


@needs_compiler
@pytest.mark.skipif(not os.environ.get("SHIFTADDNAS_SANITIZE"), reason="SHIFTADDNAS_SANITIZE=1 runs these")
@pytest.mark.parametrize(
    "flags, tool",
    [
        *itertools.product(["-mavx2 -mfma", "", "-DEMULATE"], ["sanitizers", "valgrind -q"]),
        *(("gpu", f"compute-sanitizer --tool={name}") for name in ("memcheck", "racecheck")),
    ],
)
def test_kernels_are_clean_under_sanitizers(tmp_path, flags, tool):
    name, *_ = prefix = [*tool.split(), "--error-exitcode=9"]
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-g", "-O1", "-std=c++20", "-fopenmp", *flags.split(), "-DROUNDS=60"]
    if flags == "gpu":
        command = ["nvcc", "-lineinfo", "-std=c++17", "-arch=native", "-DROUNDS=60"]
    if name == "sanitizers":
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-UROUNDS", "-DROUNDS=400"]
        prefix = []
    elif not shutil.which(name) or flags == "gpu" and not torch.cuda.is_available():
        pytest.skip(f"no {name} or no GPU on this machine")
    source, program = tmp_path / f"selftest.{'cu' if flags == 'gpu' else 'cpp'}", tmp_path / "selftest"
    source.write_text(SELFTEST.replace("KERNELS", str(ROOT / "kernels.cu")))
    subprocess.run([*command, source, "-o", program], check=True)
    env = {**ONE_THREAD, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([*prefix, program], capture_output=True, text=True, env=env)
    assert run.returncode == 0 and "clean" in run.stdout, run.stdout[-2000:] + run.stderr[-3000:]


# --------------------------------------------------------------------------------------------- §3 sharing


def shared(shape=(64, 64, 3, 3), **change):
    with shiftaddnas.seeded(0):
        return SharedWeight(shape, ["conv", "shift", "add"], Sharing(**change))


def test_transformed_weight_is_laplacian_at_the_start_and_of_the_variance_of_the_weight():
    weight = shared((512, 512, 1, 1))
    a = weight.weight_for("add").detach().flatten().double().sort().values
    b = weight.std / math.sqrt(2)
    cdf = torch.where(a < 0, 0.5 * torch.exp(a / b), 1 - 0.5 * torch.exp(-a / b))
    grid = torch.arange(1, len(a) + 1) / len(a)
    assert (cdf - grid).abs().max() < 0.02  # Kolmogorov-Smirnov distance
    assert a.std().item() == pytest.approx(weight.w.std().item(), rel=0.01)


def test_transform_is_monotone_at_the_start_and_keeps_the_largest_weight():
    weight = shared()
    weight.w.data[0, 0, 0, 0] = 9 * weight.std  # beyond the last bin
    w, a = weight.w.detach().flatten(), weight.weight_for("add").detach().flatten()
    assert (a[w.argsort()].diff() >= 0).all()
    assert a[w.argmax()] == a.max() > 2 * a[w.argsort()[-2]] and a[w.argmin()] == a.min() < 0


def test_transform_is_one_gather_of_slopes_over_equal_bins():
    weight = shared(bins=7, learned=True)
    weight.slope_add.data = torch.arange(1.0, 8.0)
    w = weight.w.detach().flatten()
    edges = weight.std * (torch.arange(1, 7) * 10 / 7 - 5)
    near = ((w[:, None] - edges) / weight.std).abs().amin(1) < 1e-4
    slope = 1 + (w[:, None] >= edges).sum(1)
    torch.testing.assert_close(weight.weight_for("add").flatten()[~near], (w * slope)[~near])


def test_transform_is_equivariant_to_a_permutation_of_the_weights():
    weight = shared((16, 8, 3, 3))
    before, order = weight.weight_for("add").flatten(), torch.randperm(16 * 72, generator=rng())
    weight.w.data = weight.w.data.flatten()[order].view_as(weight.w)
    assert weight.weight_for("add").flatten().equal(before[order])


def test_divergence_is_zero_on_the_target_and_exact_between_gaussian_and_laplacian():
    normal = torch.randn(10**6, generator=rng()).double()
    uniform = torch.rand(10**6, generator=rng(1)).double() - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())

    def log_normal(a):
        return -(a**2) / 2 - math.log(math.sqrt(2 * math.pi))

    def log_laplace(a):
        return -a.abs() - math.log(2)

    assert abs(kl_divergence(normal, log_normal)) < 2e-3
    assert abs(kl_divergence(laplace, log_laplace)) < 2e-3
    exact = math.log(2) + math.sqrt(2 / math.pi) - 0.5 * math.log(2 * math.pi * math.e)
    assert abs(kl_divergence(normal, log_laplace) - exact) < 0.02 * exact


def test_divergence_pulls_a_sample_to_its_target():
    sample = (0.3 * torch.randn(2000, generator=rng())).requires_grad_()
    kl_divergence(sample, lambda a: -(a**2) / 2 - 0.9189).backward()
    assert (sample.grad * sample).sum() < 0  # too narrow: descent widens it


def test_each_density_counts_once_and_the_divergence_is_the_same_before_and_after_the_transform():
    weight, other = shared((64, 64, 3, 3)), shared((32, 8, 1, 1))
    weight.w.data *= 1.3
    layers = [(w, op) for w in (weight, other) for op in ("conv", "shift", "add")]
    found = shiftaddnas.mean_divergence(layers)
    terms = [shiftaddnas.mean_divergence([(w, "conv")]) for w in (weight, other)]
    torch.testing.assert_close(found, (terms[0] + terms[1]) / 2)
    z = weight.w.detach().double().flatten() / weight.std
    t = -z.sign() * (math.log(2) + torch.special.log_ndtr(-z.abs()))  # T(w) / b, exactly
    before, after = (kl_divergence(x, shiftaddnas.DENSITIES[q]) for x, q in ((z, "normal"), (t, "laplace")))
    assert before.item() == pytest.approx(after.item(), abs=3e-3) and before > 0.05
    assert shiftaddnas.mean_divergence([(SharedWeight((4, 4, 1, 1), ["conv"]), "conv")]) == 0


def test_official_divergence_is_the_softmax_form():
    w = torch.randn(50, generator=rng())
    uniform = torch.rand(50, generator=rng(7)) - 0.5
    z = -2 * uniform.sign() * torch.log1p(-2 * uniform.abs())
    p, q = w.softmax(0), z.softmax(0)
    torch.testing.assert_close(shiftaddnas.official_kl(w, rng(7)), (q * (q.log() - p.log())).mean())


@pytest.mark.parametrize("mode", ["none", "naive", "heterogeneous", "learned"])
@pytest.mark.parametrize("letter", "csa")
def test_gradient_reaches_the_weight_of_every_op(mode, letter):
    supernet = Supernet(FASHION, Sharing(learned=True) if mode == "learned" else mode)
    for block in supernet.blocks.values():
        torch.nn.init.ones_(block.bn3.weight)
    arch = "/".join(letter * n for n in (2, 2, 2))
    supernet(torch.randn(4, 1, 28, 28, generator=rng()), arch).square().sum().backward()
    for block, entrance in supernet.path(arch):
        for layer in block.layers(entrance):
            assert layer.weight.w.grad is not None and layer.weight.w.grad.abs().sum() > 0
            if layer.weight.transformed and layer.op == "add" and mode == "learned":
                assert layer.weight.slope_add.grad.abs().sum() > 0
    cells = [supernet.blocks[f"0-0-{op}"].conv3.weight for op in "csa"]
    assert (cells[0] is cells[1] is cells[2]) == (mode != "none")


def test_gradients_of_conv_shift_and_add_on_a_shared_weight_are_of_one_size():
    space = replace(FASHION, name="shallow", ops=("csa",) * 3, depths=((1, 1, 1),))
    generator, config = rng(), train.Config(device="cpu")
    data = train.load_data("", FASHION, config)
    supernet = Supernet(space).train()
    for block in supernet.blocks.values():
        torch.nn.init.ones_(block.bn3.weight)
    shared = [m.w for m in supernet.modules() if isinstance(m, SharedWeight) and m.transformed]
    optimizer = train.make_optimizer(supernet, config)

    def ratios():
        x, y = data.batch(torch.arange(90), generator)
        logits = supernet(x, ["c/c/c", "s/s/s", "a/a/a"])
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        conv, shift, both = (
            torch.autograd.grad(part.sum(), shared, retain_graph=True)
            for part in (loss[:30], loss[30:60], loss)
        )
        add = [total - c - s for total, c, s in zip(both, conv, shift)]
        sizes = [[g.norm() for g in row] for row in zip(conv, shift, add)]
        return [max(row) / min(row) for row in sizes]

    assert max(ratios()) < 10
    for step in range(100):
        batch = data.batch(torch.randint(5000, (30,), generator=generator), generator)
        archs = [space.sample_fairly(generator)]
        train.take_step(config, supernet, optimizer, "", archs, [batch], [generator], None)
        optimizer.step()
    assert max(ratios()) < 10


def test_eta_makes_the_weight_gradient_as_long_as_adder_nets():
    layer = HybridConv2d("add", 3, 8, 3, eta=0.2)
    for scale in (1.0, 50.0):
        layer.zero_grad()
        (scale * layer(torch.randn(2, 3, 6, 6, generator=rng()))).sum().backward()
        assert layer.weight.w.grad.norm().item() == pytest.approx(0.2 * math.sqrt(3 * 8 * 9), rel=1e-4)


# ----------------------------------------------------------------------------------------------- §5 space


def test_fair_archs_use_every_op_of_a_position_and_are_uniform():
    generator, counts = rng(), Counter()
    for _ in range(600):
        archs = [FASHION.validate(arch) for arch in FASHION.sample_fairly(generator)]
        assert len({tuple(map(len, arch.split("/"))) for arch in archs}) == 1
        for position, letters in enumerate(zip(*(arch.replace("/", "") for arch in archs))):
            assert len(archs) == 4 and set(letters) >= set("csat" if position >= 3 else "csa")
        counts.update(archs[0].split("/")[0] + archs[3].split("/")[0])
    assert all(abs(counts[letter] - 800) < 5 * math.sqrt(800 * 2 / 3) for letter in "csa")


def test_space_sizes_are_the_published_and_the_counted_ones():
    assert HYTRA.size() == 198_955_008 and len(HYTRA.depths) == 19
    listed = set()
    for depths in TINY.depths:
        for stages in itertools.product(
            *(itertools.product(ops, repeat=n) for ops, n in zip(TINY.ops, depths))
        ):
            listed.add("/".join("".join(stage) for stage in stages))
    assert TINY.size() == len(listed) == 18
    assert {TINY.arch(i) for i in range(TINY.size())} == listed


def test_samples_are_uniform_over_archs_and_valid():
    generator = rng()
    counts = Counter(TINY.sample(generator) for _ in range(3600))
    assert len(counts) == 18 and all(abs(n - 200) < 5 * math.sqrt(200) for n in counts.values())
    assert all(HYTRA.validate(HYTRA.sample(generator)) for _ in range(200))


@pytest.mark.parametrize("space", [FASHION, HYTRA], ids=lambda space: space.name)
def test_children_stay_in_the_space_and_come_from_their_parents(space):
    generator = rng()
    for _ in range(200):
        one, two = space.sample(generator), space.sample(generator)
        child = space.validate(space.crossover(one, two, generator))
        assert [len(s) for s in child.split("/")] in (
            [len(s) for s in arch.split("/")] for arch in (one, two)
        )
        for mine, a, b in zip(*(arch.split("/") for arch in (child, one, two))):
            assert all(letter in (a[i : i + 1], b[i : i + 1]) for i, letter in enumerate(mine))
        space.validate(space.mutate(one, generator))
        assert space.mutate(one, generator, 0, 0) == one


BAD_ARCHS = [
    ("cc/cx/cc", "unknown op 'x'"),
    ("cc/cc", "3 resolutions"),
    ("ct/cc/cc", "not offered at resolution 1"),
    ("c/cc/cc", "1-2-2 blocks"),
    ("", "3 resolutions"),
    ("cccccc", "3 resolutions"),
    (None, "3 resolutions"),
    ("tt/cc/cc", "not offered"),
    ("cc/cc/cc/cc", "3 resolutions"),
]


@pytest.mark.parametrize("arch, message", BAD_ARCHS)
def test_a_bad_arch_is_named(arch, message):
    with pytest.raises(ValueError, match=message):
        FASHION.validate(arch)


# -------------------------------------------------------------------------------------------- §6 supernet


@pytest.mark.parametrize(
    "sharing, published",
    [
        (Sharing(shared="", transformed="", shift_form="PS"), 615_390_116),
        (Sharing(shared="ca", shift_form="PS", learned=True), 489_823_652),
        ("naive", 238_427_044),
        ("heterogeneous", 238_427_044),
        (Sharing(learned=True), 238_465_444),
        (Sharing(transformed="as", learned=True), 238_503_844),
    ],
)
def test_all_cells_of_hytra_have_the_published_sizes(sharing, published):
    with torch.device("meta"):
        assert parameters(Supernet(HYTRA, sharing, all_cells=True)) == published


def test_only_reachable_cells_are_built():
    with torch.device("meta"):
        assert parameters(Supernet(HYTRA, Sharing("", "", "PS"))) == 136_776_868


@pytest.mark.parametrize(
    "arch, form, published",
    [
        ("cc/cccc/sctaa/ttctt", "PS", 31_418_160),
        ("cc/cccc/sctaa/ttctt", "Q", 29_908_528),
        ("cc/cscc/sctss/ttctt", "Q", 29_909_040),
    ],
)
def test_retraining_networks_have_the_published_sizes(arch, form, published):
    with torch.device("meta"):
        network = build(SPACES["bossnet_t0"], arch, form)
    assert parameters(network) == published
    assert parameters(network.head.distilled) == 2_049_000


@pytest.mark.parametrize("mode", ["none", "naive", "heterogeneous"])
def test_an_extracted_subnet_equals_the_supernet(mode):
    supernet, generator = Supernet(FASHION, mode), rng()
    x = torch.randn(3, 1, 28, 28, generator=generator)
    for _ in range(6):
        arch = FASHION.sample(generator)
        supernet.train()(x, arch)  # moves the statistics
        supernet.eval()
        network = supernet.extract(arch).eval()
        torch.testing.assert_close(network(x), supernet(x, arch), rtol=0, atol=0)
        with torch.device("meta"):
            assert parameters(network) == parameters(build(FASHION, arch))
        mine = {p.data_ptr() for p in supernet.parameters()}
        assert not any(p.data_ptr() in mine for p in network.parameters())
    archs, x = FASHION.sample_fairly(generator), torch.randn(8, 1, 28, 28, generator=generator)
    parts = [supernet(part, arch) for part, arch in zip(x.split(2), archs)]
    torch.testing.assert_close(supernet(x, archs), torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_hytra_runs_forward_and_backward_at_64_pixels():
    supernet, generator = Supernet(replace(HYTRA, widths=(32, 64, 256, 256))), rng()
    for _ in range(5):
        arch = HYTRA.sample(generator)
        logits = supernet(torch.randn(2, 3, 64, 64, generator=generator), arch)
        logits.square().mean().backward()
        assert logits.shape == (2, 100) and torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in supernet.parameters() if p.grad is not None)


def test_a_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    one, two, other = Supernet(TINY, seed=1), Supernet(TINY, seed=1), Supernet(TINY, seed=2)
    assert torch.get_rng_state().equal(state)
    assert all(a.equal(b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert not one.head.fc.weight.equal(other.head.fc.weight)


def test_the_full_hytra_supernet_takes_a_step_and_t0_has_gradients_at_64_pixels():
    config = train.Config(space="hytra", image=64, batch=2, device="cpu")
    space = train.space_of(config)
    supernet = Supernet(space).train()
    optimizer, arch = train.make_optimizer(supernet, config), "cc/cs/aast/ttcttctc"
    batch, before = [torch.rand(2, 3, 64, 64), torch.tensor([3, 99])], supernet.head.fc.weight.clone()
    loss, *_ = train.take_step(config, supernet, optimizer, "", [arch], [batch], [None], None)
    optimizer.step()
    assert math.isfinite(loss) and not supernet.head.fc.weight.equal(before)
    network = build(SPACES["bossnet_t0"], "cc/cccc/sctaa/ttctt")
    logits = network(torch.rand(2, 3, 64, 64))
    sum(part.square().mean() for part in logits).backward()
    assert [part.shape for part in logits] == [(2, 1000)] * 2
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("arch", ["", "cs/at/sac"])
def test_checkpointing_changes_memory_alone(arch):
    found = []
    for checkpointing in (False, True):
        network = (build(FASHION, arch) if arch else Supernet(FASHION)).train()
        network.checkpointing = checkpointing
        loss = network(torch.rand(4, 1, 28, 28, generator=rng()), *[] if arch else ["cs/at/sac"])
        loss.square().sum().backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append(grads | dict(network.named_buffers()))
    assert found[0].keys() == found[1].keys()
    assert all(tensor.equal(found[1][name]) for name, tensor in found[0].items())


# ------------------------------------------------------------------------------- §7 tokens and their spaces


@pytest.mark.parametrize("op", ["conv", "add"])
@pytest.mark.parametrize("causal", [True, False])
def test_mixing_over_time_and_its_gradients_equal_loops(op, causal):
    u, w = torch.randn(2, 6, 4, generator=rng()).double(), torch.randn(2, 3, generator=rng(1)).double()
    u.requires_grad_(), w.requires_grad_()
    y = shiftaddnas.mix_tokens(op, u, w, causal)
    taps, before, g = w.softmax(1), 2 if causal else 1, torch.randn(2, 6, 4, generator=rng(2)).double()
    expected, grad_u, grad_taps = torch.zeros_like(y), torch.zeros_like(u), torch.zeros_like(taps)
    for b, t, c, j in itertools.product(range(2), range(6), range(4), range(3)):
        at, head = t - before + j, c // 2
        a, weight = (u[b, at, c] if 0 <= at < 6 else 0 * u[0, 0, 0]), taps[head, j]
        expected[b, t, c] += a * weight if op == "conv" else -(a - weight).abs()
        grad_taps[head, j] += g[b, t, c] * (a if op == "conv" else a - weight)
        if 0 <= at < 6:
            grad_u[b, at, c] += g[b, t, c] * (weight if op == "conv" else (weight - a).clamp(-1, 1))
    torch.testing.assert_close(y, expected)
    found_u, found_w = torch.autograd.grad(y, (u, w), g)
    torch.testing.assert_close(found_u, grad_u)
    torch.testing.assert_close(found_w, torch.autograd.grad(taps, w, grad_taps.detach())[0])


@pytest.mark.parametrize("op", ["conv", "add"])
def test_mixing_token_by_token_equals_mixing_the_sentence(op):
    u, w = torch.randn(3, 9, 8, generator=rng()), torch.randn(4, 5, generator=rng(1))
    past, found = torch.zeros(3, 4, 8), []
    for t in range(9):
        found.append(shiftaddnas.mix_tokens(op, u[:, t : t + 1], w, True, past))
        past = torch.cat([past, u[:, t : t + 1]], 1)[:, 1:]
    torch.testing.assert_close(torch.cat(found, 1), shiftaddnas.mix_tokens(op, u, w, True))


@pytest.mark.parametrize("letter", "CAS")
def test_a_light_operator_equals_loops_over_tokens_and_takes_means(letter):
    light = shiftaddnas.Light(letter, 6, 2, 3, False, shiftaddnas.SHARING["none"], 0.0).double().eval()
    g = torch.Generator().manual_seed(0)
    x, keep = torch.randn(2, 5, 6, generator=g).double(), torch.ones(2, 5, 1).double()
    keep[1, 3:] = 0
    u = x @ light.first.weight.w.T + light.first.bias
    if letter == "S":
        w = light.shift.weight.w
        u = u @ (w.sign() * 2 ** w.abs().log2().round().clamp(-15, 0)).T + light.shift.bias
    u, taps = u * keep, light.taps.w.softmax(1)
    y = torch.zeros_like(u)
    for t, c, j in itertools.product(range(5), range(6), range(3)):
        value = u[:, t + j - 1, c] if 0 <= t + j - 1 < 5 else torch.zeros(2).double()
        tap = taps[c // 3, j]
        y[:, t, c] += value * tap if letter == "C" else -(value - tap).abs() / 3
    expected = y @ light.second.weight.w.T + light.second.bias
    torch.testing.assert_close(light(x, letter, keep), expected)


def test_the_published_translation_spaces_have_their_exact_sizes():
    def published(widths, encoder, decoder):
        return widths**2 * encoder**6 * sum(decoder**depth for depth in range(1, 7))

    sizes = {name: space.size() for name, space in shiftaddnas.TOKEN_SPACES.items()}
    assert sizes["wmt14_en_de"] == published(3, 4 * 3 * 7, 4 * 3 * 3 * 3 * 4)
    assert sizes["wmt14_en_fr"] == published(3, 4 * 3 * 7, 3 * 3 * 3 * 3 * 4)
    assert sizes["iwslt14_de_en"] == published(4, 4 * 4 * 7, 3 * 4 * 4 * 3 * 4)
    assert [f"{size:.2e}" for size in sizes.values()][:3] == ["2.06e+28", "3.67e+27", "1.16e+30"]
    widths, encoder, decoder = 2, 2 * 3 * 7, 2 * 3 * 3 * 3 * 4
    assert sizes["translation"] == widths**2 * encoder**3 * (decoder + decoder**2)


def translation(encoder_ffn, heads, types, ffn, self_heads, cross_heads, decoder_types):
    decoder = {"ffn": ffn, "self_heads": self_heads, "cross_heads": cross_heads, "sources": [2] * len(ffn)}
    return {
        "encoder": {"embed_dim": 512, "ffn": encoder_ffn, "heads": heads, "types": types.split()},
        "decoder": {"embed_dim": 512, **decoder, "types": decoder_types.split()},
    }


K1, K2, K3, K4 = 1024, 2048, 3072, 4096
TRANSLATION_NETS = {  # the published En-De networks by latency budget in ms: arch, parameters, FLOPs
    200: (
        translation(
            [K2, K4, K2, K1, K1, K3],
            [8, 4, 4, 4, 4, 4],
            "T TS TC TC TC T",
            [K4] * 3,
            [4, 8, 16],
            [4] * 3,
            "TC T T",
        ),
        36_974_940,
        2.437e9,
    ),
    120: (
        translation(
            [K1, K2, K4, K1, K2, K3],
            [16, 4, 16, 8, 16, 4],
            "TC T TC TC TA T",
            [K4] * 2,
            [8, 8],
            [16, 4],
            "T T",
        ),
        30_998_848,
        2.009e9,
    ),
    350: (
        translation(
            [K3, K2, K4, K2, K4, K4],
            [16, 4, 4, 16, 4, 16],
            "TA T TA TA T T",
            [K4, K4, K3],
            [4, 16, 8],
            [4] * 3,
            "TC T T",
        ),
        42_549_968,
        2.771e9,
    ),
    100: (
        translation([K1, K1, K1, K4, K3, K4], [8, 8, 16, 8, 4, 16], "TA TS T TA TS T", [K4], [8], [4], "T"),
        25_876_768,
        1.631e9,
    ),
}


@pytest.mark.parametrize("budget", TRANSLATION_NETS)
def test_published_translation_networks_have_their_parameters_and_flops(budget):
    arch, params, flops = TRANSLATION_NETS[budget]
    space = shiftaddnas.TOKEN_SPACES["wmt14_en_de"]
    assert space.params(arch) == params
    assert cost_model.flops(network_layers(space, arch)) == pytest.approx(flops, rel=1e-3)


def test_drawn_mutated_and_crossed_translation_archs_stay_inside_their_space():
    gen = rng()
    for space in shiftaddnas.TOKEN_SPACES.values():
        for _ in range(50):
            one, two = space.sample(gen), space.sample(gen)
            for arch in (one, space.mutate(one, gen), space.crossover(one, two, gen)):
                assert space.validate(json.loads(json.dumps(arch))) == arch


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("encoder", {"types": ["X"] * 6}, "encoder types holds 'X'"),
        ("decoder", {"types": ["C", "T", "T"]}, "decoder types holds 'C'"),
        ("encoder", {"ffn": [K1] * 5}, "encoder ffn must be a list of"),
        ("decoder", {"ffn": [K4] * 2}, "decoder ffn has 2 entries, types 3"),
        ("decoder", {"sources": [0, 1, 2]}, "decoder sources holds 0"),
        ("encoder", {"embed_dim": 500}, "encoder embed_dim is 500"),
        ("encoder", {"surplus": 1}, "needs 'encoder' with"),
        ("decoder", {"cross_heads": 4}, "decoder cross_heads must be a list"),
    ],
)
def test_wrong_translation_archs_are_named(part, change, message):
    arch = json.loads(json.dumps(TRANSLATION_NETS[200][0]))
    arch[part] |= change
    with pytest.raises(ValueError, match=message):
        shiftaddnas.TOKEN_SPACES["wmt14_en_de"].validate(arch)


# ------------------------------------------------------------------------------- §8 supernet of translation

SMALL = shiftaddnas.TOKEN_SPACES["translation"]


def token_batch():
    """Source (2, 9), the second row with 3 padded tokens, and target (2, 7)."""
    g = torch.Generator().manual_seed(0)
    source, target = (torch.randint(3, 50, size, generator=g) for size in ((2, 9), (2, 7)))
    source[1, 6:] = shiftaddnas.PAD
    return source, target


def archs_of_every_type():
    """One arch a type of the decoder, each with all kinds of encoder layers over time."""
    for i, kind in enumerate(shiftaddnas.TYPES):
        arch = SMALL.extreme(max, kind)
        arch["decoder"]["types"] = [shiftaddnas.TYPES[3 + i % 4]] * 2
        arch["decoder"]["sources"], arch["encoder"]["embed_dim"] = [1, 2], 64
        yield SMALL.validate(arch)


@pytest.mark.parametrize("sharing", ("none", "heterogeneous"))
def test_an_extracted_translator_equals_the_supernet_and_has_the_counted_parameters(sharing):
    supernet, (source, target) = shiftaddnas.Translator(SMALL, 50, sharing=sharing).eval(), token_batch()
    for arch in archs_of_every_type():
        network = supernet.extract(arch)
        torch.testing.assert_close(network(source, target), supernet(source, target, arch))
        count = sum(p.numel() for p in network.parameters()) - network.embedding.numel()
        light = [kind for kind in arch["encoder"]["types"] if kind[0] != "T"]
        norms = 2 * 64 * len(light)  # not in the published count
        assert count == SMALL.params(arch) + norms


def test_a_sentence_alone_token_by_token_equals_its_place_in_a_batch():
    supernet, (source, target) = shiftaddnas.Translator(SMALL, 50).eval(), token_batch()
    for arch in archs_of_every_type():
        whole = supernet(source, target, arch)
        alone, caches = supernet.encode(source[1:, :6], arch), supernet.new_caches(arch)
        steps = [supernet.decode(target[1:, t : t + 1], alone, arch, caches) for t in range(7)]
        torch.testing.assert_close(torch.cat(steps, 1)[0], whole[1], atol=1e-5, rtol=1e-5)


def test_no_target_token_sees_the_future():
    supernet = shiftaddnas.Translator(replace(SMALL, tied=False), 50).eval()
    source, target = token_batch()
    target[:, :4], target[:, 4:] = 5, 7
    for arch in archs_of_every_type():
        logits, table = supernet(source, target, arch), supernet.target_embedding
        past, = torch.autograd.grad(logits[:, :4].square().sum(), table, retain_graph=True)
        future, = torch.autograd.grad(logits[:, 4:].square().sum(), table)
        assert past[7].eq(0).all() and past[5].abs().max() > 0 and future[7].abs().max() > 0


def test_published_translation_supernets_have_their_sizes():
    shift = {"wmt14_en_de": 251_995_440, "wmt14_en_fr": 239_406_384}  # with s and q of each shift layer
    for name, published in shift.items():
        with torch.device("meta"):
            network = shiftaddnas.Translator(shiftaddnas.TOKEN_SPACES[name], 10, sharing="none")
        count = sum(p.numel() for p in network.parameters()) - network.embedding.numel()
        assert count + 6 * 1024**2 + 12 * 512**2 == published


def test_every_type_has_the_gradient_of_float64_differences():
    supernet, (source, target) = shiftaddnas.Translator(SMALL, 50, sharing="none").double(), token_batch()
    supernet.eval()
    g = torch.Generator().manual_seed(1)
    for kind in ("C", "T", "TC"):  # an add's gradient is not the slope of its sum, by AdderNet's rule
        arch = SMALL.extreme(min, kind)
        p = supernet.encoder[0].fc1.weight.w
        way = torch.randn(p.shape, generator=g, dtype=p.dtype)
        supernet.zero_grad()
        supernet(source, target, arch).square().mean().backward()
        slope = (p.grad * way).sum().item()
        with torch.no_grad():
            values = []
            for step in (1e-6, -1e-6):
                p.add_(step * way)
                values.append(supernet(source, target, arch).square().mean().item())
                p.sub_(step * way)
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("kind", shiftaddnas.TYPES)
def test_the_kernels_give_every_type_the_gradients_of_the_float64_definition(kind):
    supernet, (source, target) = shiftaddnas.Translator(SMALL, 50).eval(), token_batch()
    arch = SMALL.extreme(max, kind)
    arch["decoder"]["types"] = [kind if kind[0] == "T" else "T" + kind] * 2
    found = []
    for network in (supernet, copy.deepcopy(supernet).double()):
        network(source, target, arch).square().mean().backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append(grads)
    assert found[0].keys() == found[1].keys() and any("taps" in name for name in found[0]) == (kind != "T")
    scale = max(grad.abs().max() for grad in found[1].values())
    for name, grad in found[1].items():
        assert (found[0][name] - grad).abs().max() < 1e-4 * scale, name


def test_the_iwslt_space_has_three_embeddings_and_the_others_one():
    for name, count in (("iwslt14_de_en", 3), ("wmt14_en_de", 1)):
        with torch.device("meta"):
            network = shiftaddnas.Translator(shiftaddnas.TOKEN_SPACES[name], 10)
        assert len({id(p) for p in network.parameters() if p.shape == (10, 1024)}) == count
    untied = replace(SMALL, tied=False)
    supernet, (source, target) = shiftaddnas.Translator(untied, 50).eval(), token_batch()
    arch = SMALL.extreme(min, "TC")
    torch.testing.assert_close(supernet.extract(arch)(source, target), supernet(source, target, arch))


def test_the_published_recipes_fit_the_parser_and_take_a_step_at_small_width():
    for name in train.RECIPES:
        config = train.parse(train.Config, "", ["--space", "translation", "--recipe", name])
        network = shiftaddnas.Translator(SMALL, 50, SMALL.extreme(min, "TS"), bits=config.bits)
        batch = (*token_batch(), token_batch()[1])
        optimizer, before = train.make_optimizer(network, config), network.embedding.detach().clone()
        train.take_step(config, network, optimizer, network.arch, [network.arch], [batch], [None], None)
        optimizer.step()
        assert not network.embedding.equal(before)
        assert train.learning_rate(config, 10**6, 10) < config.lr


def test_operators_of_a_layer_share_storage_and_bits_leave_few_levels():
    light = shiftaddnas.Translator(SMALL, 50).encoder[0].light["whole"]
    assert light.first.weight is light.shift.weight
    x = torch.randn(100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = shiftaddnas.fake_quantise(x, x.min(), x.max(), 3)
    assert len(y.unique()) <= 8 and (y - x).abs().max() <= (x.max() - x.min()) / 14 + 1e-6
    y.sum().backward()
    assert x.grad.eq(1).all()
    network = shiftaddnas.Translator(SMALL, 50, SMALL.extreme(min, "TA"), bits=8)
    network(*token_batch()).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


class Bigrams:
    """Stands for a translator: log p of the next token depends on the last one."""

    def __init__(self, size, seed):
        self.table = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).log_softmax(1)

    def encode(self, source):
        return [source.unsqueeze(2)], source

    def new_caches(self):
        return []

    def decode(self, target, memory, arch, caches):
        return self.table[target]


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_what_brute_force_finds_and_beam_1_is_greedy(seed):
    model, source, limit, found = Bigrams(5, seed), torch.ones(2, 3, dtype=torch.long), 4, set()

    def score(words, penalty):
        path = [shiftaddnas.EOS, *words] + [shiftaddnas.EOS] * (len(words) < limit)
        return sum(model.table[a, b].item() for a, b in zip(path, path[1:])) / (len(path) - 1) ** penalty

    tokens = [i for i in range(5) if i not in (shiftaddnas.PAD, shiftaddnas.EOS)]
    every = [words for n in range(limit + 1) for words in itertools.product(tokens, repeat=n)]
    greedy, last = [], shiftaddnas.EOS
    while len(greedy) < limit:
        last = max((i for i in range(5) if i != shiftaddnas.PAD), key=lambda i: model.table[last, i].item())
        if last == shiftaddnas.EOS:
            break
        greedy.append(last)
    for penalty in (0.0, 0.6, 2.0):
        best = max(every, key=lambda words: score(words, penalty))
        assert train.beam_search(model, source, 5**limit, penalty, limit) == [list(best)] * 2
        assert train.beam_search(model, source, 1, penalty, limit)[0] == greedy
        found.add(best)
    assert len(found) > 1  # the penalty decides


def test_byte_pairs_give_back_any_text():
    vocabulary = train.learn_bytes(["the cat sat on the mat", "see the rat"], 20)
    assert len(vocabulary.encode(" the")) == 1
    for text in ("the cat", "", "  two  spaces\t", "¿Qué? ñ 漢字 🙂\u0301", "ĠĀ_\x00"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    words = train.Vocabulary(["new@@", "er", "old"])
    assert words.decode(words.encode("new@@ er old gone")) == "newer old <unk>"


@pytest.mark.parametrize(
    "hypotheses, references, expected",  # from sacrebleu 2.6.0, corpus_bleu with its defaults
    (
        (["a b c d e"], ["a x c d y"], 23.6435),
        (["The U.S. has 3,000.5 cats & dogs"], ["The U.S. has 3,000.5 cats &amp; dogs."], 90.4837),
        (["it's well-known: 5-6 (or 7) \"times\"!"], ["it's well-known: 5-6 or 7 'times'!"], 40.5259),
        (["¡Hola! ¿qué tal? señor, 10.5%"], ["¡Hola! ¿qué tal? señor, 10.5 %"], 100.0),
        (["a a a a a"], ["a b a c a d"], 11.5102),
        (["a b c d e f", "g h"], ["a b c e d f", "g i"], 33.2024),
        (["a b c d"], ["a b c d e f g h"], 36.7879),
        (["a b c"], ["a b c"], 0.0),
        (["x"], ["y"], 0.0),
        ([""], ["a b"], 0.0),
    ),
)
def test_bleu_equals_sacrebleu(hypotheses, references, expected):
    assert train.bleu(hypotheses, references) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    "content, message",
    (
        (b"a\tb\n\tc\n", "line 2 is empty on one side only"),
        (b"a\tb\n\xff\tc\n", "line 2 is not UTF-8"),
        (b"a\tb\nc\n", "line 2 has 0 tabs"),
        (b"", "a split needs one"),
    ),
)
def test_bad_sentences_are_one_sentence(content, message, tmp_path):
    (tmp_path / "pairs.tsv").write_bytes(content)
    config = train.Config(space="translation", data=str(tmp_path / "pairs.tsv"))
    with pytest.raises(ValueError, match=message):
        train.load_sentences(config)


def test_files_of_unequal_length_are_named(tmp_path):
    for name, text in (("a", "x\ny\n"), ("b", "x\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="has 2 lines"):
        train.load_sentences(train.Config(data=f"{tmp_path / 'a'},{tmp_path / 'b'}"))


def test_the_translation_story_ends_in_a_table_with_bleu_and_translates(tmp_path, capsys, monkeypatch):
    lines = [f"{a} {b} cat\t{b} {a} gato" for a in "abcdefgh" for b in "ijklmnop"]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    flags = f"--space translation --data {tmp_path / 'pairs.tsv'} --out {tmp_path / 'o'} --epochs 1 --batch 8"
    search.main(f"{flags} --bpe 20 --first 2 --generations 1 --finalists 1 --budget 0.8".split())
    result = json.loads((tmp_path / "o" / "search.json").read_text())
    names = ["all-attention", "all-conv", "all-add", "all-shift", "random", "winner"]
    assert [row["name"] for row in result["table"]] == names
    assert all(0 <= row["bleu"] <= 100 for row in result["table"])
    full, winner = result["table"][0], result["table"][-1]
    assert winner["energy_mj"] <= 0.8 * full["energy_mj"] * (1 + 1e-9)
    assert [len(sample) for sample in result["translations"]] == [3, 3, 3]
    assert 0 <= result["shuffled_bleu"] <= 100
    assert capsys.readouterr().out.count("\nreference ") == 3
    given = io.TextIOWrapper(io.BytesIO(b"a i cat\n\n" + b"a i " * 200 + b"\ncat\xff\n"))
    monkeypatch.setattr(sys, "stdin", given)
    capsys.readouterr()
    with pytest.raises(ValueError, match="standard input, line 4 is not UTF-8"):
        train.main(["--translate", str(tmp_path / "o" / f"retrain-{train.file_name(winner['arch'])}.pt")])
    output, errors = capsys.readouterr()
    assert len(output.split("\n")) == 4
    assert "line 3 has" in errors and "cut to --max-length 200" in errors and "line 2" not in errors


# ------------------------------------------------------------------------------------------------ train.py


@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    """A folder of 120 training and 40 test images that can be told apart, as .npy files."""
    folder, random_ = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for split, n in (("train", 120), ("test", 40)):
        labels = np.arange(n) % 10
        images = random_.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        images[np.arange(n), labels * 2] = 255
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)
    return folder


def command(program, *flags, **options):
    return subprocess.run(
        [sys.executable, ROOT / f"{program}.py", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=120,
        **{"env": ONE_THREAD, **options},
    )


def losses(path):
    return [json.loads(line)["loss"] for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("arch", ["", "ca/st/ac"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(arch, tiny_data, tmp_path, monkeypatch):
    flags = ["--data", str(tiny_data), "--epochs", "3", "--batch", "30"] + (["--arch", arch] if arch else [])
    train.main(flags + ["--out", str(tmp_path / "whole")])
    name = (arch.replace("/", "-") or "supernet") + ".jsonl"
    real = train.augment
    calls = []

    def interrupted(x, generator):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(x, generator)

    monkeypatch.setattr(train, "augment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags + ["--out", str(tmp_path / "halved")])
    assert len(losses(tmp_path / "halved" / name)) == 5
    train.main(flags + ["--out", str(tmp_path / "halved"), "--resume"])
    assert losses(tmp_path / "halved" / name) == losses(tmp_path / "whole" / name)
    assert len(losses(tmp_path / "whole" / name)) == 9


@pytest.mark.parametrize("flags", ([], ["--sharing", "none", "--bits", "8", "--dropout", "0.1"]))
def test_a_resumed_translation_run_has_the_losses_of_an_uninterrupted_one(flags, tmp_path, monkeypatch):
    lines = [f"{a} {b} cat\t{b} {a} gato" for a in "abcdefgh" for b in "ijkl"]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    flags = flags + ["--space", "translation", "--data", str(tmp_path / "pairs.tsv"), "--bpe", "5"]
    flags += ["--epochs", "2", "--batch", "4", "--accumulate", "2", "--out"]
    train.main(flags + [str(tmp_path / "whole")])
    real, calls = train.pad_pairs, []

    def interrupted(pairs):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(pairs)

    monkeypatch.setattr(train, "pad_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags + [str(tmp_path / "halved")])
    assert len(losses(tmp_path / "halved" / "supernet.jsonl")) == 4
    train.main(flags + [str(tmp_path / "halved"), "--resume"])
    whole, halved = (losses(tmp_path / name / "supernet.jsonl") for name in ("whole", "halved"))
    assert halved == whole and len(whole) == 6


def start_processes(count, program, *flags):
    """torchrun on this machine, one thread a process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / f"{program}.py"), *map(str, flags)], text=True, env=ONE_THREAD,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def test_two_processes_train_and_three_search_as_one_does(tiny_data, tmp_path):
    # naive: a balanced add gradient is thousands of times the true one, and so is its rounding noise
    flags = ["--sharing", "naive", "--data", tiny_data, "--epochs", 2, "--batch", 10, "--accumulate", 6]
    flags += ["--device", "cpu", "--out"]
    several = start_processes(2, "train", *flags, tmp_path / "two")
    one = command("train", *flags, tmp_path / "one")
    assert one.returncode == 0 and several.wait(120) == 0, one.stderr + several.stderr.read()
    assert several.stdout.read().count("saved") == 1
    supernets = [train.load_supernet(tmp_path / name / "supernet.pt", FASHION) for name in ("one", "two")]
    start = Supernet(FASHION, "naive")
    moved, apart = (
        sum((p - q).square().sum().item() for p, q in zip(net.parameters(), supernets[0].parameters()))
        for net in (start, supernets[1])
    )
    assert apart < 1e-4 * moved  # AdamW makes whole steps of the rounding noise of zero gradients
    first, second = (losses(tmp_path / name / "supernet.jsonl") for name in ("one", "two"))
    assert second == pytest.approx(first, rel=1e-4) and len(first) == 2 * (100 // 60)
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    flags = flags[:-1] + ["--first", 4, "--generations", 0, "--finalists", 1, "--out"]
    several = start_processes(3, "search", *flags, tmp_path / "three")
    one = command("search", *flags, tmp_path / "one")
    assert one.returncode == 0 and several.wait(120) == 0, one.stderr + several.stderr.read()
    states = [json.loads((tmp_path / name / "search-state.json").read_text()) for name in ("one", "three")]
    assert states[0]["scores"] == states[1]["scores"] and states[0]["rng"] == states[1]["rng"]
    tables = [json.loads((tmp_path / name / "search.json").read_text())["table"] for name in ("one", "three")]
    assert [row["arch"] for row in tables[0]] == [row["arch"] for row in tables[1]]


PARTS = {  # of a recipe, in small
    "crop": ["--crop", "0.3"],
    "randaugment": ["--randaugment", "9"],
    "erasing": ["--erasing", "0.25"],
    "mixup": ["--mixup", "0.8"],
    "cutmix": ["--cutmix", "1"],
    "smoothing": ["--smoothing", "0.1"],
    "repeats": ["--repeats", "3"],
    "ema": ["--ema", "0.9"],
}


def test_two_processes_take_the_steps_of_one_with_the_whole_recipe_and_an_arch_a_pass(tiny_data, tmp_path):
    flags = ["--data", tiny_data, "--epochs", 3, "--batch", 10, "--accumulate", 4, "--arch-per-pass"]
    flags += ["--kl", "official", *itertools.chain(*PARTS.values()), "--device", "cpu", "--out"]
    several = start_processes(2, "train", *flags, tmp_path / "two")
    one = command("train", *flags, tmp_path / "one")
    assert one.returncode == 0 and several.wait(120) == 0, one.stderr + several.stderr.read()
    logs = [(tmp_path / name / "supernet.jsonl").read_text().splitlines() for name in ("one", "two")]
    steps = [[json.loads(line) for line in log] for log in logs]
    assert [step["arch"] for step in steps[0]] == [step["arch"] for step in steps[1]]
    assert len(steps[0][0]["arch"]) == 4
    assert [s["loss"] for s in steps[1]] == pytest.approx([s["loss"] for s in steps[0]], rel=1e-4)


def test_average_epochs_gives_the_mean_of_the_weights_after_the_last_epochs(tiny_data, tmp_path):
    space, weights = FASHION, {}
    settings = {"schedule": "inverse-sqrt", "warmup": 1, "data": str(tiny_data), "batch": 30}
    for name, epochs, average in (("two", 2, 0), ("three", 3, 0), ("mean", 3, 2)):
        config = train.Config(epochs=epochs, average_epochs=average, device="cpu", **settings)
        data, network = train.load(config, space), build(space, "cc/cc/cc")
        path = str(tmp_path / f"{name}.pt")
        weights[name] = train.train(config, space, data, network, "cc/cc/cc", path).state_dict()
    for name, mean in weights["mean"].items():
        if mean.is_floating_point():
            expected = (weights["two"][name] + weights["three"][name]) / 2
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip, length", [(0.0, 5.0), (2.0, 2.0), (9.0, 5.0)])
def test_clip_bounds_the_length_of_the_gradient(clip, length):
    model = torch.nn.Linear(1, 2, bias=False)
    config = train.Config(clip=clip)
    model.weight.grad = torch.tensor([[3.0], [4.0]])
    train.update(config, model, train.make_optimizer(model, config), None, 0, 10)
    assert model.weight.grad.norm().item() == pytest.approx(length, rel=1e-4)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch._dynamo  # what the first step imports, once for all lives
import train
kills, out, flags = int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
train.SAVE_SHARE, draw, halves, steps = 0.5, random.Random(0), 0, [0]
path = out / "killed" / "supernet.pt"

def live(folder, until=None):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main(flags + ["--resume", "--out", str(folder)])
        os._exit(0)
    while until and not until():
        time.sleep(0.001)
    if until:
        os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == (signal.SIGKILL if until else 0)

def written():
    return list(path.parent.glob("supernet.pt.*.tmp"))

live(out / "whole")
for kill in range(kills):
    seen, wait = path.stat().st_mtime_ns if path.exists() else 0, draw.uniform(0, 0.1)
    if kill % 2:  # while a checkpoint is written
        live(out / "killed", written)
    else:  # some time after one
        there = lambda: path.exists() and path.stat().st_mtime_ns > seen
        live(out / "killed", lambda: there() and not time.sleep(wait))
    halves += len(written())
    for rest in path.parent.glob("*.tmp"):
        rest.unlink()
    steps.append(train.load_checkpoint(path)["step"])
assert steps == sorted(steps) and 0 < steps[-1] and halves, (steps, halves)
live(out / "killed")
print(f"{kills} kills, resumed from the steps {steps[1:]}; {halves} left a half-written file")
"""


def test_runs_killed_at_random_moments_end_with_the_losses_of_a_whole_run(tiny_data, tmp_path):
    kills = int(os.environ.get("KILLS", 2))
    flags = ["--data", tiny_data, "--epochs", f"{4 * kills}", "--batch", "30", "--ema", "0.9", "--mixup", "1"]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, ROOT, str(kills), tmp_path, *flags], capture_output=True, text=True,
        env={**ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""}, timeout=600,  # a fork cannot use its parent's GPU
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    killed, whole = (losses(tmp_path / name / "supernet.jsonl") for name in ("killed", "whole"))
    assert killed == whole and len(whole) == 12 * kills


def test_passes_that_cannot_be_shared_and_too_few_archs_are_one_sentence(tiny_data, tmp_path):
    for program, flags, message in (
        ("train", ["--accumulate", 3], "--accumulate 3 is no multiple of the 2 processes"),
        ("search", ["--first", 1], "2 processes are more than the 1 archs of --first"),
    ):
        run = start_processes(2, program, "--data", tiny_data, "--out", tmp_path / "o", *flags)
        assert run.wait(120) != 0
        assert f"{program}.py: {message}" in run.stderr.read()


def test_if_one_process_is_killed_the_others_say_so_and_stop(tiny_data, tmp_path):
    flags = ["--data", tiny_data, "--epochs", 5000, "--batch", 10, "--accumulate", 2, "--device", "cpu"]
    flags += ["--out", tmp_path / "o"]
    run, log = start_processes(2, "train", *flags), tmp_path / "o" / "supernet.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "o" / "supernet.pt").exists():
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(max(workers), signal.SIGKILL)
    assert run.wait(60) != 0 and log.exists()
    assert train.load_checkpoint(tmp_path / "o" / "supernet.pt")["step"] > 0


def test_a_loss_that_is_not_finite_names_the_arch(tiny_data, tmp_path, monkeypatch):
    broken = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(train.F, "cross_entropy", lambda *_, **__: broken)
    with pytest.raises(ValueError, match="loss became nan at step 0 with arch cc/sa/tt"):
        train.main(["--data", str(tiny_data), "--arch", "cc/sa/tt", "--out", str(tmp_path)])


def test_inherited_weights_start_where_the_supernet_is(tiny_data, tmp_path):
    flags = ["--data", str(tiny_data), "--epochs", "1", "--batch", "30", "--out", str(tmp_path)]
    train.main(flags)
    supernet = train.load_supernet(tmp_path / "supernet.pt", FASHION)
    train.main(flags + ["--arch", "ca/st/ac", "--init", str(tmp_path / "supernet.pt"), "--lr", "1e-9"])
    trained = train.load_checkpoint(tmp_path / "ca-st-ac.pt", arch="ca/st/ac")["model"]
    for name, value in supernet.extract("ca/st/ac").named_parameters():
        torch.testing.assert_close(trained[name], value.detach(), atol=1e-6, rtol=0)


def test_a_resumed_recipe_has_the_losses_and_the_average_of_an_uninterrupted_run(tiny_data, tmp_path):
    flags = ["--data", str(tiny_data), "--arch", "ca/st/ac", "--batch", "30", "--accumulate", "1", "--epochs"]
    flags += ["3", *itertools.chain(*PARTS.values()), "--amp", "--channels-last", "--out"]
    train.main(flags + [str(tmp_path / "whole")])
    real, calls = train.mix, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "mix", interrupted)
        train.main(flags + [str(tmp_path / "halved")])
    train.main(flags + [str(tmp_path / "halved"), "--resume"])
    whole, halved = (train.load_checkpoint(tmp_path / name / "ca-st-ac.pt") for name in ("whole", "halved"))
    assert losses(tmp_path / "halved" / "ca-st-ac.jsonl") == losses(tmp_path / "whole" / "ca-st-ac.jsonl")
    assert all(tensor.equal(halved["average"][name]) for name, tensor in whole["average"].items())
    network, *_ = train.read_network(tmp_path / "whole" / "ca-st-ac.pt")
    assert network.head.fc.weight.equal(whole["average"]["module.head.fc.weight"])
    assert not network.head.fc.weight.equal(whole["model"]["head.fc.weight"])


class Twice(torch.nn.Module):
    def forward(self, x):
        return x, x


def teacher_file(path, classes):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, classes) if classes else Twice())
    if path.suffix == ".pt2":
        torch.export.save(torch.export.export(network, (torch.rand(30, 1, 28, 28),)), path)
    else:
        torch.jit.trace(network, torch.rand(1, 1, 28, 28)).save(path)
    return network


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["teacher.ts", "teacher.pt2"])
def test_a_teacher_decides_the_second_half_of_the_loss(name, tiny_data, tmp_path, capsys):
    network = teacher_file(tmp_path / name, 10)
    config = train.Config(batch=30, teacher=str(tmp_path / name), smoothing=0.1, device="cpu")
    data = train.load_data(tiny_data, FASHION, config)
    teacher = train.load_teacher(config, FASHION, data)
    x, y = data.view(data.train, np.arange(30))
    seen = network(x * data.std + data.mean).argmax(1)
    assert teacher(x).equal(seen) and len(set(seen.tolist())) > 1
    for space in (FASHION, replace(FASHION, distilled=True)):
        student = build(space, "cs/at/sac").train()
        loss, _ = train.losses_of(config, student, student.arch, student.arch, [x, y], None, teacher)
        first, second = logits if isinstance(logits := student(x), tuple) else (logits, logits)
        expected = (F.cross_entropy(first, y, label_smoothing=0.1) + F.cross_entropy(second, seen)) / 2
        torch.testing.assert_close(loss, expected)
    flags = ["--data", str(tiny_data), "--batch", "30", "--out", str(tmp_path / "o"), "--arch", "cc/sa/tt"]
    wrong = {7: "gives 7 logits an image; the student has 10 classes", 0: "gives a tuple"}
    for classes, message in wrong.items():
        teacher_file(tmp_path / name, classes)
        with pytest.raises(ValueError, match=message):
            train.main([*flags, "--teacher", str(tmp_path / name)])


def test_too_little_memory_is_foreseen(tiny_data, tmp_path, monkeypatch):
    x = torch.rand(30, 1, 28, 28)
    network, kept = build(FASHION, "cs/at/sac").train(), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * 4 * (len(tensor) == 30)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(x)
    foreseen = train.activation_bytes(train.Config(batch=30), FASHION, "cs/at/sac")
    assert logits.requires_grad and foreseen == pytest.approx(sum(kept.values()), rel=0.1)
    monkeypatch.setattr(train, "free_bytes", lambda device: foreseen // 2)
    with pytest.raises(ValueError, match=r"training needs at least 0\.0 GiB .* smaller --batch"):
        train.main(["--data", str(tiny_data), "--batch", "30", "--out", str(tmp_path)])


def official_parts(letter, at):
    """Official names of a block's parts: conv1, peg, bn1, middle, bn2, conv3, bn3, shortcut."""
    if letter == "t":
        names = "proj.0 proj.1.conv proj.2 net.1.to_qkv net.2 net.4 net.5 shortcut"
    else:
        names = "conv1 peg.conv bn1 conv2 bn2 conv3 bn3 downsample"
    return [at + name for name in names.split()]


def official_state(arch, form, distilled=True):
    """Name -> tensor of an official checkpoint (boss_models.py, boss_candidates), written down by block."""
    state, generator = {}, rng()

    def tensor(name, *shape):
        state[name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5

    def norm(name, width):
        for part in ("weight", "bias", "running_mean"):
            tensor(f"{name}.{part}", width)
        state[f"{name}.running_var"] = torch.rand(width, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def layer(op, name, *shape):
        leaves = {"a": ["adder"], "s": ["shift", "sign"] if form == "PS" else ["weight"]}.get(op, ["weight"])
        for leaf in leaves:
            tensor(f"{name}.{leaf}", *shape)
        if leaves[-1] == "sign":
            state[f"{name}.shift"].mul_(5).sub_(5), state[f"{name}.sign"].mul_(math.prod(shape[1:]) ** 0.5)

    layer("c", "conv1", 64, 3, 7, 7), norm("bn1", 64)
    width = 64
    for stage, letters in enumerate(arch.split("/")):
        p, out = 64 * 2**stage, 256 * 2**stage
        for i, op in enumerate(letters):
            at, t = f"layer{stage + 1}.{i}.", op == "t"
            enter, peg, bn1, middle, bn2, leave, bn3, project = official_parts(op, at)
            layer(op, enter, p, width, 1, 1), layer(op, peg, p, 1, 3, 3), norm(bn1, p)
            if op != "a":
                tensor(peg + ".bias", p)
            layer(op, middle, *((3 * p, p, 1, 1) if t else (p, p, 3, 3))), norm(bn2, p)
            layer(op, leave, out, p, 1, 1), norm(bn3, out)
            if i == 0:
                layer(op, project + ".1", out, width, 1, 1), norm(project + ".2", out)
            if not t:
                for part, shape in (("fc1", (out // 16, out)), ("fc2", (out, out // 16))):
                    tensor(f"{at}se.{part}.weight", *shape, 1, 1), tensor(f"{at}se.{part}.bias", shape[0])
            width = out
    for head in ["fc", "dist_head"][: 1 + distilled]:
        tensor(f"{head}.weight", 1000, 2048), tensor(f"{head}.bias", 1000)
    return state


def official_logits(state, arch, x):
    """What the official network computes in evaluation, from its state dict."""

    def norm(name, x):
        mean, var, weight, bias = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def layer(name, x, op="c", **geometry):
        own = {key[len(name) + 1 :]: tensor for key, tensor in state.items() if key.startswith(name + ".")}
        weight = shift_weight(own["shift"], own["sign"]) if "sign" in own else own.get("weight")
        y = add_conv2d(x, own["adder"], **geometry) if op == "a" else (
            shift_conv2d if op == "s" else F.conv2d)(x, weight, **geometry)
        return y + own["bias"].view(-1, 1, 1) if "bias" in own else y

    x = F.max_pool2d(F.silu(norm("bn1", layer("conv1", x, stride=2, padding=3))), 3, 2, 1)
    for stage, letters in enumerate(arch.split("/"), 1):
        for i, op in enumerate(letters):
            at, stride = f"layer{stage}.{i}.", 2 if stage > 1 and i == 0 else 1
            enter, peg, bn1, middle, bn2, leave, bn3, project = official_parts(op, at)
            groups, shortcut = 64 * 2 ** (stage - 1), x
            if i == 0:
                shortcut = F.avg_pool2d(x, 2, stride, ceil_mode=True) if stride == 2 else x
                shortcut = norm(project + ".2", layer(project + ".1", shortcut, op))
            x = layer(peg, layer(enter, x, op), op, stride=stride, padding=1, groups=groups)
            x = F.silu(norm(bn1, x))
            if op == "t":
                x = attention2d(x, state[middle + ".weight"], 64, official=True)
            else:
                x = layer(middle, x, op, padding=1)
            x = norm(bn3, layer(leave, F.silu(norm(bn2, x)), op))
            if op != "t":
                gate = layer(at + "se.fc2", F.relu(layer(at + "se.fc1", x.mean((2, 3), keepdim=True))))
                x = x * gate.sigmoid()
            x = F.silu(x + shortcut)
    heads = [name for name in ("fc", "dist_head") if name + ".weight" in state]
    x = x.mean((2, 3))
    return sum(F.linear(x, state[name + ".weight"], state[name + ".bias"]) for name in heads) / len(heads)


@pytest.mark.parametrize(
    "arch, form, distilled, count", [(V3, "PS", True, 31_418_160), (V4, "Q", False, 29_909_040 - 2_049_000)]
)
def test_an_official_checkpoint_is_converted_completely(arch, form, distilled, count, tmp_path):
    state = official_state(arch, form, distilled)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(t.numel() for name, t in state.items() if not name.endswith(buffers)) == count
    torch.save({"model": state, "epoch": 299, "args": argparse.Namespace(lr=1)}, tmp_path / "official.pth")
    flags = ["--space", "bossnet_t0", "--arch", arch, "--convert", str(tmp_path / "official.pth")]
    train.main([*flags, "--out", str(tmp_path)])
    network, config, space, _ = train.read_network(tmp_path / f"{arch.replace('/', '-')}.pt")
    assert (config.shift_form, config.one_head, space.official_attention) == (form, not distilled, True)
    x = torch.rand(2, 3, 64, 64, generator=rng())
    expected = official_logits(state, arch, x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    state = official_state(V3, "Q")
    flags = ["--space", "bossnet_t0", "--arch", V3, "--out", str(tmp_path), "--convert", f"{tmp_path}/x.pth"]
    for change, message in (
        (lambda s: [s.pop(name) for name in list(s)[:7]], r"lacks 7 tensors: conv1.weight, .*, \.\.\.$"),
        (lambda s: s.update(more=torch.zeros(1)), "has, beyond the network, 1 tensors: more$"),
        (lambda s: s.update({"fc.bias": torch.zeros(7)}), "has in another shape 1 tensors: fc.bias$"),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message):
            train.main(flags)
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"model": Malice()}))
    with pytest.raises(ValueError, match="not a checkpoint of tensors"):
        train.main(flags)


def test_a_trained_network_is_evaluated_and_gone_on_from_at_another_size(tiny_data, tmp_path, capsys):
    flags = ["--data", str(tiny_data), "--arch", "ca/st/ac", "--batch", "30", "--epochs", "1", "--out"]
    train.main([*flags, str(tmp_path / "a")])
    reached = re.search(r"test_accuracy [\d.]+", capsys.readouterr().out)[0]
    train.main(["--evaluate", str(tmp_path / "a" / "ca-st-ac.pt"), "--data", str(tiny_data)])
    assert f"{reached} | 40 images of side 28" in capsys.readouterr().out
    train.main([*flags, str(tmp_path / "b"), "--init", str(tmp_path / "a" / "ca-st-ac.pt"), "--image", "32"])
    train.main(["--benchmark", "--image", "16", "--batch", "4"])
    assert re.search(r"fashion supernet at 16, 1 x 4 images .* peak \d+ MiB", capsys.readouterr().out)
    with pytest.raises(ValueError, match="made with --one-head False, this run asks for True"):
        train.main([*flags, str(tmp_path / "c"), "--init", str(tmp_path / "a" / "ca-st-ac.pt"), "--one-head"])
    with pytest.raises(ValueError, match="ca-st-ac.pt: space fashion, not --space cifar10"):
        train.main(["--evaluate", str(tmp_path / "a" / "ca-st-ac.pt"), "--space", "cifar10"])
    other = {"model": {}, "space": "hytra", "arch": "ca/st/ac", "config": {}, "step": 1}
    (tmp_path / "d").mkdir()
    train.save(other, tmp_path / "d" / "ca-st-ac.pt")
    with pytest.raises(ValueError, match="ca-st-ac.pt is of another space than fashion; give another --out"):
        train.main([*flags, str(tmp_path / "d")])
    (tmp_path / "winner.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="winner.json holds an arch of space hytra, not of fashion"):
        train.main(["--arch", str(tmp_path / "winner.json")])


def test_a_compiled_network_has_the_losses_of_the_plain_one(tiny_data, tmp_path, monkeypatch):
    compile_ = torch.nn.Module.compile  # the graphs without their minutes of code generation
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compile_(network, backend="aot_eager"))
    flags = ["--data", str(tiny_data), "--arch", "ca/sc/ac", "--batch", "30", "--epochs", "1", "--out"]
    train.main([*flags, str(tmp_path / "plain")])
    train.main([*flags, str(tmp_path / "compiled"), "--compile"])
    plain, compiled = (losses(tmp_path / name / "ca-sc-ac.jsonl") for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-3) and len(plain) == 3


def test_recalibration_gives_the_statistics_of_the_training_images():
    data, network = train.load_data("", FASHION), build(FASHION, "cc/cc/cc")
    network.train()(torch.randn(9, 1, 28, 28, generator=rng()) * 5)  # statistics of other images
    train.recalibrate(network, data, images=64)
    x, _ = data.train.batch(np.arange(64))
    stem = network.stem[0]((x - data.mean) / data.std)
    torch.testing.assert_close(network.stem[1].running_mean, stem.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not network.training


def test_augmentation_shifts_and_mirrors_and_keeps_the_rest():
    x = torch.arange(28.0 * 28).view(1, 1, 28, 28).repeat(64, 1, 1, 1) + 1
    y = train.augment(x, rng())
    assert y.shape == x.shape and set(y.unique().tolist()) <= set(x.unique().tolist()) | {0.0}
    centres = {tuple(image[0, 14, 13:15].tolist()) for image in y}
    assert len(centres) > 20 and any(a > b for a, b in centres) and any(a < b for a, b in centres)


def test_crops_are_affine_parts_and_mirrors():
    ramp = torch.linspace(-1, 1, 65)[1:] - 1 / 64  # each pixel holds its place
    x = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")).expand(200, 2, 64, 64)
    y = train.random_crop(x, 32, 0.1, rng())
    down, right = (y[:, c].diff(dim=d)[:, 8:24, 8:24].mean((1, 2)) * 16 for c, d in ((0, 1), (1, 2)))
    area, ratio = down * right.abs(), right.abs() / down  # shares of the sides
    assert y.shape == (200, 2, 32, 32) and y.abs().max() <= 1
    assert 0.09 < area.min() < 0.2 and 0.9 < area.max() < 1.01 and 70 < (right < 0).sum() < 130
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert train.fit(x[:1], 64) is not None and train.fit(x[:1], 64).equal(x[:1])
    centre = train.fit(x[:1].abs(), 56)
    torch.testing.assert_close(centre, x[:1, :, 4:60, 4:60].abs(), atol=1e-5, rtol=0)


def test_each_change_of_randaugment_does_what_it_says():
    x = torch.rand(3, 3, 32, 32, generator=rng())
    none = torch.zeros(3, 1, 1, 1)
    for number, change in enumerate(train.RANDAUGMENT):
        y = change(x, none + 0.9).clamp(0, 1)
        assert y.shape == x.shape and torch.isfinite(y).all() and not torch.allclose(y, x), number
        if number < 8:  # a level of zero changes nothing
            torch.testing.assert_close(change(x, none), x, atol=1e-5, rtol=0)
    turn, _, _, move, *_ = train.RANDAUGMENT
    torch.testing.assert_close(turn(x, none + math.pi / 2 / 0.52), x.rot90(1, (2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(move(x, none + 1 / 0.9)[..., :15], x[..., 16:31], atol=1e-4, rtol=0)
    changed = (train.rand_augment(x.repeat(100, 1, 1, 1), 9, rng()) != x.repeat(100, 1, 1, 1)).any((1, 2, 3))
    assert 0.65 < changed.float().mean() < 0.85  # two chances of a half


def test_mixed_images_and_labels_have_the_same_shares_and_erasing_is_noise():
    x = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    y, generator = torch.eye(2), rng()
    for settings in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        for _ in range(20):
            mixed, labels = train.mix(x, y, *settings, generator)
            torch.testing.assert_close(mixed.mean((1, 2, 3)), labels[:, 1])
            torch.testing.assert_close(labels.sum(1), torch.ones(2))
            assert settings[0] or set(mixed.unique().tolist()) <= {0.0, 1.0}
    erased = train.erase(torch.full((400, 1, 32, 32), 9.0), 0.25, generator) != 9
    share = erased.float().mean((1, 2, 3))
    assert 0.18 < (share > 0).float().mean() < 0.32 and 0.01 < share[share > 0].min() and share.max() < 0.36


def test_repeated_images_go_to_different_passes_of_a_step(tiny_data):
    config = train.Config(repeats=3, accumulate=3, batch=10, device="cpu")
    data = train.load_data(tiny_data, FASHION, config)
    rows = data.epoch(30, rng())
    assert rows.shape == (3, 30) and all(count == 3 for count in Counter(rows.flatten().tolist()).values())
    for step in rows:
        parts = [set(step[i::3].tolist()) for i in range(3)]
        assert parts[0] == parts[1] == parts[2] and len(parts[0]) == 10


def test_cifar_images_enter_at_224_pixels_as_their_enlarged_centre(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    for file in ("train", "test"):
        batch = {b"data": rows, b"fine_labels": list(range(10)) * 2}
        (tmp_path / file).write_bytes(pickle.dumps(batch, protocol=4))
    data = train.load_data(tmp_path, HYTRA, train.Config(crop=0.08, batch=2, device="cpu"))
    x, y = data.view(data.test, np.arange(3))
    image = torch.from_numpy(rows[:3].reshape(3, 3, 32, 32)).float()[..., 2:30, 2:30] / 255
    expected = F.interpolate(image, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(x * data.std + data.mean, expected, atol=1e-5, rtol=0)
    assert data.batch(torch.arange(4), rng())[0].shape == (4, 3, 224, 224)


def test_the_recipes_of_images_have_the_published_schedule():
    imagenet = 1_281_167
    for space, images, peak in (
        ("hytra", 50_000, 1e-3), ("bossnet_t0", imagenet, 1e-3), ("bossnet_t1", imagenet, 8.75e-4)
    ):
        config = train.parse(train.Config, "", ["--space", space])
        per_epoch = images // (config.batch * config.accumulate)
        steps = [round(epoch * per_epoch) for epoch in (0, 5, 152.5, 300)]
        rates = [train.learning_rate(config, step, per_epoch) for step in steps]
        assert rates == pytest.approx([peak / config.warmup, peak, (peak + 1e-5) / 2, 1e-5], rel=0.01)
        assert peak == 5e-4 * config.batch * config.accumulate / 512 and config.epochs == 300


def test_the_documented_snippet_makes_arrays_of_jpeg_folders(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    snippet = (ROOT / "results" / "scale.md").read_text().split("```python\n")[1].split("```")[0]
    for split in ("train", "val"):
        for number, name in enumerate(("n01", "n02")):
            (tmp_path / "jpeg" / split / name).mkdir(parents=True)
            for i in range(9):
                picture = image.new("RGB", (300 + 40 * number, 280), (100 * number, 50, 200))
                picture.save(tmp_path / "jpeg" / split / name / f"{i}.jpeg")
    monkeypatch.setattr(sys, "argv", ["arrays.py", str(tmp_path / "jpeg"), str(tmp_path / "arrays")])
    exec(snippet, {})
    data = train.load_data(tmp_path / "arrays", replace(HYTRA, image=224))
    x, y = data.view(data.test, np.arange(18))
    assert x.shape == (18, 3, 224, 224) and isinstance(data.train.images, np.memmap)
    red = (x * data.std + data.mean)[:, 0].mean((1, 2)) * 255
    torch.testing.assert_close(red, 100.0 * y, atol=3, rtol=0)


def test_embedded_splits_are_disjoint_and_balanced():
    data = train.load_data("", FASHION)
    assert [len(split.index) for split in data[:3]] == [5000, 1000, 2000]
    assert not set(data.train.index) & set(data.val.index)
    assert set(Counter(data.test.labels.tolist()).values()) == {200}


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(
        train.gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes()
    )


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_are_read(end, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{end}", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{end}", np.arange(24, dtype=np.uint8) % 10)
    data = train.load_data(tmp_path, FASHION)
    x, y = data.test.batch(np.arange(24))
    assert (x[:, 0] * 255).round().to(torch.uint8).equal(torch.from_numpy(images)) and y[13] == 3


@pytest.mark.parametrize(
    "name, files, key",
    [
        ("cifar10", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], b"labels"),
        ("cifar100", ["train", "test"], b"fine_labels"),
    ],
)
def test_official_cifar_folders_are_read(name, files, key, tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    for file in files:
        (tmp_path / file).write_bytes(pickle.dumps({b"data": rows, key: list(range(10)) * 2}, protocol=4))
    x, y = train.load_data(tmp_path, SPACES[name]).test.batch(np.arange(20))
    assert x.shape == (20, 3, 32, 32) and y[11] == 1
    assert (x[4, 1, 2, 5] * 255).round() == rows[4, 1024 + 2 * 32 + 5]


class Malice:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def damage(folder, kind):
    """Turns a good folder of .npy files into a bad one."""
    images, labels = (np.load(folder / f"train_{name}.npy") for name in ("images", "labels"))
    if kind == "label":
        np.save(folder / "train_labels.npy", labels + 5)
    elif kind == "size":
        np.save(folder / "train_images.npy", images[:, 1:])
    elif kind == "count":
        np.save(folder / "train_labels.npy", labels[:-1])
    elif kind == "float":
        np.save(folder / "train_images.npy", images.astype(np.float32))
    elif kind == "truncated":
        (folder / "train_images.npy").write_bytes((folder / "train_images.npy").read_bytes()[:900])
    elif kind == "missing":
        (folder / "test_labels.npy").unlink()
    elif kind == "empty":
        for file in folder.iterdir():
            file.unlink()
    elif kind == "object":
        np.save(folder / "train_labels.npy", np.array([Malice()], dtype=object), allow_pickle=True)
    elif kind == "malice":
        damage(folder, "empty")
        (folder / "train").write_bytes(pickle.dumps({b"data": Malice()}, protocol=2))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("label", "labels run from 5 to 14"),
        ("size", "27x28"),
        ("count", "120 train images but 119 labels"),
        ("float", "float32"),
        ("truncated", "train_images|mmap|damaged"),
        ("missing", "test_labels"),
        ("empty", "holds none of"),
        ("object", "object|allow_pickle"),
        ("malice", "damaged or refused"),
    ],
)
def test_bad_data_ends_in_one_sentence(kind, message, tiny_data, tmp_path, capsys, monkeypatch):
    damage(tiny_data, kind)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        train.run_command(lambda: train.main(["--data", str(tiny_data), "--out", str(tmp_path / "o")]))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "o").exists()


BAD_FLAGS = [
    ("--space nowhere", "unknown space 'nowhere'"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("--epochs many", "argument --epochs: invalid int value: 'many'"),
    ("--arch cc/cx/cc", "unknown op 'x'"),
    ("--arch tt/cc/cc", "not offered"),
    ("--epochs 0", "--epochs must be at least 1"),
    ("--batch -3", "--batch must be at least"),
    ("--lr 0", "--lr must be above 0"),
    ("--lr nan", "--lr must be above 0"),
    ("--data /nowhere", "does not exist"),
    ("--init x.pt", "--init needs --arch"),
    ("--arch cc/cc/cc --init x.pt", "x.pt does not exist"),
    ("--sharing some", "--sharing 'some' is unknown"),
    ("--arch nothing.json", "nothing.json"),
    ("--kl-weight -1", "--kl-weight must be at least 0"),
    ("--device nowhere", "nowhere"),
    ("--beam 3", "--beam is for translation"),
    ("--recipe nothing", "--recipe 'nothing' is unknown"),
    ("--space translation --mixup 0.8", "--mixup is for images, not for space translation"),
    ("--space translation --sampling single", "--sampling is for images, not for space translation"),
    ("--ema 1", "--ema must be below 1"),
    ("--ema 0.9 --average-epochs 2", "--ema 0.9 excludes --average-epochs 2"),
    ("--compile", "--compile needs --arch"),
    ("--convert x.pth", "--convert needs --space bossnet_t0"),
    ("--evaluate x.pt", "x.pt does not exist"),
    ("--teacher x.ts", "--teacher x.ts is no network for these images"),
    ("--space translation --arch cc/cc/cc", "needs 'encoder'"),
    ("--space translation --sharing naive", "sharing 'naive' is not for translation"),
    ("--space translation --bpe many", "--bpe 'many' must be a number"),
    ("--space translation --data /nowhere.tsv", "/nowhere.tsv"),
    ("--space translation --data a,b,c", "--data takes a TSV file"),
    ("--space translation --max-length 1", "every training pair is over --max-length 1"),
    ("--translate nothing.pt", "nothing.pt does not exist"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_of_train_end_in_one_sentence(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.run_command(lambda: train.main(flags.split() + ["--out", str(tmp_path / "o")]))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"model": 1})])
def test_a_damaged_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        train.load_checkpoint(tmp_path / "x.pt")


def test_a_checkpoint_of_another_space_is_refused(tmp_path):
    train.save({"model": {}, "space": "hytra", "arch": "", "config": {}, "step": 1}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="made for space 'hytra', this run asks for 'fashion'"):
        train.load_supernet(tmp_path / "x.pt", FASHION)


# ----------------------------------------------------------------------------------------------- search.py


def evolve(space, score=None, state=None, **flags):
    config = search.SearchConfig(**{"budget": 0.0, "generations": 5, **flags})
    calls, reports = [], []

    def scored(arch):
        calls.append(arch)
        return (score or (lambda a: a.count("s") + 10 * a.count("t")))(arch)

    def report(state):
        reports.append(json.loads(json.dumps(state)))

    return search.evolve(config, space, scored, state if state is not None else {}, report), calls, reports


def test_a_search_on_a_space_of_three_networks_ends_with_each_scored_once():
    space = replace(TINY, ops=("c", "c", "cst"), depths=((1, 1, 1),))
    state, calls, _ = evolve(space)
    assert sorted(calls) == sorted(state["scores"]) == ["c/c/c", "c/c/s", "c/c/t"]


def test_the_search_finds_the_best_and_scores_nothing_twice():
    state, calls, _ = evolve(FASHION, generations=30)
    assert len(calls) == len(set(calls))
    assert max(state["scores"].values()) >= 50  # t at five of six or more coarse positions


def test_the_last_generation_counts():
    seen = []
    state, calls, reports = evolve(FASHION, score=lambda arch: seen.append(arch) or float(len(seen)))
    assert max(state["scores"], key=state["scores"].get) == calls[-1]
    assert set(reports[-1]["scores"]) - set(reports[-2]["scores"])


def test_a_resumed_search_equals_an_uninterrupted_one():
    whole, _, reports = evolve(FASHION)
    resumed, calls, _ = evolve(FASHION, state=reports[2])
    assert resumed["scores"] == whole["scores"] and len(calls) < len(whole["scores"])


def test_every_scored_arch_is_inside_every_limit():
    flags = {"budget": 0.7, "max_params": 150_000, "max_macs": 1_500_000}
    state, _, _ = evolve(FASHION, **flags)
    config = search.SearchConfig(**flags)
    for arch in state["scores"]:
        own, full = (
            search.describe(FASHION, arch),
            search.describe(FASHION, search.all_of("c", FASHION, arch)),
        )
        assert own["energy_mj"] <= 0.7 * full["energy_mj"]
        assert own["params"] <= 150_000 and own["macs"] <= 1_500_000 and search.fits(config, FASHION, arch)
    assert len(state["scores"]) > 10


@pytest.mark.parametrize(
    "flags",
    ["--budget 0.01", "--max-energy-mj 1e-6", "--max-params 10", "--max-macs 5", "--max-latency-ms 1e-9"]
    + ["--max-measured-ms 1e-9"],
)
def test_a_budget_that_nothing_meets_says_what_the_cheapest_needs(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "measured_table", lambda space, path: {"any": "table"})
    monkeypatch.setattr(search, "measured_latency_ms", lambda space, arch, table: 2.0 + arch.count("a"))
    with pytest.raises(SystemExit) as exit_:
        train.run_command(lambda: search.main(flags.split() + ["--out", str(tmp_path / "o")]))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and flags.split()[0] in error and "cheapest networks need" in error


def test_the_whole_story_twice_gives_the_same_result_and_survives_kills(tiny_data, tmp_path):
    counts = "--first 3 --generations 1 --mutations 1 --crossovers 1 --random 1 --finalists 2"
    flags = ["--data", tiny_data, "--epochs", 1, "--batch", 20, *counts.split()]
    launch = functools.partial(subprocess.Popen, stdout=subprocess.DEVNULL, env=ONE_THREAD)
    program = [sys.executable, ROOT / "search.py", *map(str, flags), "--out"]
    whole = launch([*program, tmp_path / "one"])
    for seconds in (4.0, 5.0):  # killed twice, somewhere, then left to end
        process = launch([*program, tmp_path / "two"])
        time.sleep(seconds)
        process.kill()
        process.wait()
    assert command("search", *flags, "--out", tmp_path / "two").returncode == whole.wait() == 0
    one, two = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("one", "two"))
    one["config"].pop("out"), two["config"].pop("out")
    assert one == two
    assert [row["name"] for row in one["table"]] == ["all-conv", "all-shift", "all-add", "random", "winner"]
    assert one["table"][4]["energy_mj"] <= one["budget"]["energy_mj"]
    winner = json.loads((tmp_path / "one" / "winner.json").read_text())
    assert train.read_arch(FASHION, str(tmp_path / "one" / "winner.json")) == winner["arch"] == one["winner"]
    assert (tmp_path / "one" / "supernet.jsonl").read_text() == (
        tmp_path / "two" / "supernet.jsonl"
    ).read_text()


def test_the_best_finalist_on_the_validation_images_wins(monkeypatch):
    after = {"sss": 80.0, "ccc": 83.0, "aaa": 99.0}
    monkeypatch.setattr(search, "retrain", lambda config, space, data, arch: arch)
    monkeypatch.setattr(search, "accuracy", lambda network, data, split, device: after[network])
    data, scores = types.SimpleNamespace(val=None), {"aaa": 60.0, "sss": 75.0, "ccc": 74.0}
    found = search.choose(search.SearchConfig(), None, data, scores, 2)
    assert found == [("ccc", 74.0, 83.0), ("sss", 75.0, 80.0)]


def test_a_measured_limit_counts_as_any_other(monkeypatch, tmp_path):
    monkeypatch.setattr(search, "measured_table", lambda space, path: {"any": "table"})
    monkeypatch.setattr(search, "measured_latency_ms", lambda space, arch, table: 2.0 + arch.count("a"))
    config = search.SearchConfig(budget=0.0, max_measured_ms=3.5, out=str(tmp_path / "measured"))
    assert search.fits(config, FASHION, "ca/cc/cc") and not search.fits(config, FASHION, "aa/cc/cc")


def test_rank_correlations_equal_their_definitions():
    a, b = [3.0, 1.0, 2.0, 5.0, 4.0], [2.0, 1.0, 3.0, 5.0, 4.0]
    pairs = list(itertools.combinations(range(5), 2))
    signs = [math.copysign(1, (a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs]
    assert search.kendall_tau(a, b) == pytest.approx(sum(signs) / len(pairs))
    ranks = sum((x - y) ** 2 for x, y in zip(a, b))
    assert search.spearman(a, b) == pytest.approx(1 - 6 * ranks / (5 * 24))
    assert search.kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))  # tau-b: one tie


def test_the_sharing_study_is_resumed_and_writes_its_table(tiny_data, tmp_path, monkeypatch, capsys):
    small = {
        "STUDY_SEEDS": 2,
        "ALONE_EPOCHS": 1,
        "ALONE_ARCHS": 3,
        "INHERIT_ARCHS": 3,
        "TIMED_STEPS": 1,
        "ABLATION": {name: search.ABLATION[name] for name in ("single path", "learned slopes")},
        "RESULTS": tmp_path / "results",
    }
    for name, value in small.items():
        monkeypatch.setattr(search, name, value)
    counts = "--epochs 1 --batch 50 --first 2 --generations 0"
    flags = f"--study sharing --data {tiny_data} {counts} --out {tmp_path / 'o'}"
    search.main(flags.split())
    result = json.loads((tmp_path / "results" / "sharing.json").read_text())
    assert set(result["modes"]) == {"none", "naive", "official", "heterogeneous"}
    assert set(result["ablation"]) == {"heterogeneous", "single path", "learned slopes"}
    ours = result["modes"]["heterogeneous"]
    assert (
        ours["params_over_none"] <= 0.50
        and -1 <= ours["kendall_tau"] <= 1
        and 0 <= ours["mean_accuracy"] <= 100
    )
    monkeypatch.setattr(search, "train", None)  # nothing is trained again
    (tmp_path / "results" / "sharing.json").unlink()
    search.main(flags.split())
    assert json.loads((tmp_path / "results" / "sharing.json").read_text()) == result


def test_a_trained_supernet_ranks_a_broken_operator_last():
    space = replace(FASHION, name="shallow", ops=("csa",) * 3, depths=((1, 1, 1),))
    generator, config = rng(), train.Config(device="cpu")
    data = train.load_data("", FASHION, config)
    supernet = Supernet(space).train()
    for key, block in supernet.blocks.items():
        for layer in block.modules() if key.endswith("c") else ():
            if isinstance(layer, HybridConv2d):  # convolutions keep their random weights
                layer.weight = SharedWeight(layer.shape, ["conv"])
                layer.requires_grad_(False)
    optimizer = train.make_optimizer(supernet, config)
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(replace(config, epochs=4), step, 50)
        batch = data.batch(torch.randint(5000, (30,), generator=generator), generator)
        archs = [space.sample_fairly(generator)]
        train.take_step(config, supernet, optimizer, "", archs, [batch], [generator], None)
        optimizer.step()
    some, reached = data.test._replace(index=data.test.index[:500]), {}
    for arch in map("/".join, itertools.product("cs", repeat=3)):
        reached[arch] = train.accuracy(train.recalibrate(supernet.extract(arch), data), data, some)
    assert sorted(reached, key=reached.get)[0] == "c/c/c" and reached["s/s/s"] > reached["c/c/c"] + 10


def test_the_official_sharing_drops_the_largest_weight_and_normalises_the_add_gradient():
    with shiftaddnas.seeded(0):
        weight = SharedWeight((8, 8, 3, 3), ["conv", "shift", "add"], shiftaddnas.SHARING["official"])
        layer = HybridConv2d("add", 8, 8, 3, weight=weight)
    added = weight.weight_for("add").flatten()
    assert added[weight.w.argmax()] == 0 and (added == 0).sum() == 1
    assert layer.eta == 0.2 and HybridConv2d("conv", 8, 8, 3, weight=weight).eta is None


def test_the_summary_has_mean_and_deviation_over_the_seeds(tmp_path, capsys, monkeypatch):
    for number, accuracy in enumerate((80.0, 82.0, 84.0)):
        row = {"name": "winner", "arch": "s", "test_accuracy": accuracy, "energy_mj": 2.0, "latency_ms": 1.0}
        rows = [{**row, "name": "all-conv", "energy_mj": 4.0, "params": 7}, {**row, "params": 1000 * number}]
        rows[1]["arch"] = "s" + "c" * (number // 2)  # the same arch twice is named once
        (tmp_path / str(number)).mkdir()
        content = {"seed": number, "winner": "s", "budget": {}, "table": rows, "config": {}}
        content["scores"] = {"s": 80.12345678 + number}
        (tmp_path / str(number) / "search.json").write_text(json.dumps(content))
    folders = ",".join(str(tmp_path / str(number)) for number in range(3))
    search.main(["--summary", folders, "--out", str(tmp_path / "results")])
    assert "| winner | 82.00 ± 2.00 | 50 % ± 0 | 1.0000 | 1,000 | s sc |" in capsys.readouterr().out
    kept = json.loads((tmp_path / "results" / "search.json").read_text())
    assert [run["seed"] for run in kept["runs"]] == [0, 1, 2]
    assert kept["runs"][1]["scores"] == {"s": 81.1235}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"table": [], "scores": {}}'])
def test_a_summary_names_the_folder_that_holds_no_search(content, tmp_path):
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(ValueError, match="does not hold a whole search.json"):
        search.main(["--summary", str(tmp_path), "--out", str(tmp_path / "o")])


@pytest.mark.parametrize("folder", ["results", "results/translation"])
def test_tables_of_the_readme_and_of_results_are_those_of_the_measured_runs(folder):
    lines = search.summary(json.loads((ROOT / folder / "search.json").read_text())["runs"])
    table = "\n".join(lines) + "\n"
    assert (ROOT / folder / "search.md").read_text(encoding="utf-8") == table
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands():
    """(program, flags) of each line of the README's code blocks, and of its inline code, that runs one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"(?:python|torchrun --nproc-per-node \d+) (\w+\.py)((?:[ \n][^\s`#;&)]+)*)", text)
    return sorted({(program, flags.replace("\n", " ")) for program, flags in found})


@pytest.mark.parametrize("program, flags", readme_commands())
def test_each_command_of_the_readme_is_understood(program, flags):
    flags = flags.replace("$s", "0").split()
    if program == "cost_model.py":
        cost_model._parse(flags)
    elif program in ("train.py", "search.py"):
        classes = {"train.py": (train.Config, ()), "search.py": (search.SearchConfig, search.SINGLE)}
        train.parse(classes[program][0], "", flags, classes[program][1])
    else:
        assert (program, flags) == ("shiftaddnas.py", [])


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the committed results without their figures, in which search.py --figures works."""
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.setattr(search, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_figures_are_drawn_from_the_committed_results(results, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = results / "search.json"
    runs = json.loads(path.read_text())["runs"]
    runs[0]["scores"] = {"cc/cc/cc": 70.0, "ss/ss/ss": 60.0}  # and the other runs have none
    path.write_text(json.dumps({"runs": runs}))
    search.main(["--figures"])
    drawn = sorted(results.rglob("*.png"))
    assert [figure.relative_to(results).as_posix() for figure in drawn] == [
        "archs.png", "energy.png", "pareto.png", "translation/archs.png", "translation/pareto.png"]
    assert all(1000 < figure.stat().st_size < 150_000 for figure in drawn)
    winner = next(row["arch"] for row in runs[0]["table"] if row["name"] == "winner")
    cells = " / ".join("".join(f"[{op}]" for op in stage) for stage in winner.split("/"))
    assert f"stem  {cells}  head\n" in capsys.readouterr().out


def test_without_matplotlib_figures_are_one_line(results, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="^--figures: .*matplotlib"):
        search.main(["--figures"])
    assert not capsys.readouterr().out and not list(results.rglob("*.png"))


def test_the_front_is_what_nothing_betters():
    points = [(2.0, 5.0), (1.0, 4.0), (3.0, 4.5), (1.0, 3.0), (4.0, 6.0)]
    assert search.pareto_front(points) == [(1.0, 4.0), (2.0, 5.0), (4.0, 6.0)]


def test_resume_with_nothing_to_go_on_from_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.run_command(lambda: search.main(["--resume", "--out", str(tmp_path / "o")]))
    assert "holds no interrupted run" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_an_output_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    run = command("search", "--out", tmp_path / "file" / "o")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "file" in run.stderr


def test_a_folder_serves_one_run_at_a_time(tiny_data, tmp_path):
    with train.output_folder(tmp_path / "o"):
        run = command("train", "--data", tiny_data, "--epochs", 1, "--out", tmp_path / "o")
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and "in use by another run" in run.stderr
    assert command("train", "--data", tiny_data, "--epochs", 1, "--out", tmp_path / "o").returncode == 0


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("write failed\nat 3")]
)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(error, tmp_path, monkeypatch):
    train.save({"step": 1}, tmp_path / "x.pt")

    def fail(state, path):
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="cannot write .*x.pt: (No space left on device|write failed)$"):
        train.save({"step": 2}, tmp_path / "x.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]
    assert torch.load(tmp_path / "x.pt") == {"step": 1}


def test_a_reader_that_closes_the_pipe_ends_the_program_without_a_word():
    code = "import train, sys; train.run_command(lambda: [print('x' * 9999) for _ in range(999)])"
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    run.stdout.read(10)
    run.stdout.close()
    assert run.wait() == 1 and run.stderr.read() == ""


def test_names_beyond_ascii_and_with_spaces_are_names(tiny_data, tmp_path):
    folder = tmp_path / "дом ñ"
    tiny_data.rename(folder)
    arch = tmp_path / "ärch.json"
    arch.write_text('{"arch": "sa/ca/ct", "comment": "é"}', encoding="utf-8")
    out = tmp_path / "out é"
    run = command("train", "--data", folder, "--arch", arch, "--epochs", 1, "--out", out)
    assert run.returncode == 0, run.stderr
    assert (out / "sa-ca-ct.pt").exists()


# ------------------------------------------------------------------------------------------ cost_model.py

# distinct layers: count op batch kernel stride in_h in_c out_h out_c groups energy_mj latency_ms (square)
T0_MIX_V3_224 = """
1 conv 1 7 2 224 3 112 64 1 5.2231811072 3.211264
3 conv 1 1 1 56 64 56 256 1 2.4731549696 1.605632
1 conv 1 1 1 56 64 56 64 1 0.6784999424 0.401408
2 conv 1 3 1 56 64 56 64 64 5.0017042432 4.816896
2 conv 1 3 1 56 64 56 64 1 5.0017042432 4.816896
2 conv 1 1 1 1 256 1 16 1 0.0019606752 0.000128
2 conv 1 1 1 1 16 1 256 1 0.0019607936 0.000128
1 conv 1 1 1 56 256 56 64 1 2.5221668864 1.605632
1 conv 1 1 1 28 256 28 512 1 4.6930214912 3.211264
1 conv 1 1 1 56 256 56 128 1 4.7232073728 3.211264
1 conv 1 3 2 56 128 28 128 128 5.4303277056 4.816896
4 conv 1 3 1 28 128 28 128 1 5.167325184 4.816896
4 conv 1 1 1 28 128 28 512 1 2.41045504 1.605632
4 conv 1 1 1 1 512 1 32 1 0.007615392 0.000512
4 conv 1 1 1 1 32 1 512 1 0.0076085248 0.000512
3 conv 1 1 1 28 512 28 128 1 2.4349609984 1.605632
3 conv 1 3 1 28 128 28 128 128 5.167325184 4.816896
1 shift 1 1 1 14 512 14 1024 1 1.45617306624 1.14688
1 shift 1 1 1 28 512 28 256 1 1.36621671424 1.00352
1 shift 1 3 2 28 256 14 256 256 1.59756874752 1.72032
1 shift 1 3 1 14 256 14 256 1 1.53419645952 1.72032
1 shift 1 1 1 14 256 14 1024 1 0.73807782912 0.57344
4 conv 1 1 1 1 1024 1 64 1 0.0300315776 0.002048
4 conv 1 1 1 1 64 1 1024 1 0.0299913216 0.002048
2 conv 1 1 1 14 1024 14 256 1 2.522764288 1.835008
2 conv 1 3 1 14 256 14 256 256 5.2890771456 5.505024
1 conv 1 3 1 14 256 14 256 1 5.2890771456 5.505024
2 conv 1 1 1 14 256 14 1024 1 2.5305817088 1.835008
1 conv 1 1 1 14 256 14 768 1 1.9079714816 1.376256
1 matmul 784 1 1 1 64 1 196 1 0.4626515712 0.307328
1 matmul 256 1 1 1 196 1 196 1 0.4218086208 0.401408
2 add 1 1 1 14 1024 14 256 1 1.1876257792 1.605632
2 add 1 3 1 14 256 14 256 256 4.001234944 4.816896
2 add 1 3 1 14 256 14 256 1 4.001234944 4.816896
2 add 1 1 1 14 256 14 1024 1 1.1898535936 1.605632
1 conv 1 1 1 7 1024 7 2048 1 5.4531690496 3.670016
1 conv 1 1 1 14 1024 14 512 1 4.965246976 3.670016
1 conv 1 3 2 14 512 7 512 512 6.1313404928 5.505024
4 conv 1 1 1 7 512 7 1536 1 2.0619455488 1.376256
4 matmul 392 1 1 1 64 1 49 1 0.06835892 0.043904
4 matmul 512 1 1 1 49 1 49 1 0.0735127988 0.100352
5 conv 1 1 1 7 512 7 2048 1 2.7425705984 1.835008
4 conv 1 1 1 7 2048 7 512 1 2.738661888 1.835008
4 conv 1 3 1 7 512 7 512 512 5.9586547712 5.505024
1 conv 1 3 1 7 512 7 512 1 5.9586547712 5.505024
1 conv 1 1 1 1 2048 1 128 1 0.1192663296 0.008192
1 conv 1 1 1 1 128 1 2048 1 0.1191100416 0.008192
2 linear 1 1 1 1 2048 1 1000 1 0.928905864 0.0512
"""

T0_MIX_V4_256 = """
1 conv 1 7 2 256 3 128 64 1 6.8438884352 3.670016
3 conv 1 1 1 64 64 64 256 1 3.2247906304 2.097152
1 conv 1 1 1 64 64 64 64 1 0.8819048448 0.524288
2 conv 1 3 1 64 64 64 64 64 6.4941457408 6.291456
2 conv 1 3 1 64 64 64 64 1 6.4941457408 6.291456
2 conv 1 1 1 1 256 1 16 1 0.0019606752 0.000128
2 conv 1 1 1 1 16 1 256 1 0.0019607936 0.000128
1 conv 1 1 1 64 256 64 64 1 3.277062144 2.097152
1 conv 1 1 1 32 256 32 512 1 6.1657317376 4.194304
1 conv 1 1 1 64 256 64 128 1 6.134693888 4.194304
1 conv 1 3 2 64 128 32 128 128 6.9500665856 6.291456
3 conv 1 3 1 32 128 32 128 1 6.606553088 6.291456
3 conv 1 1 1 32 128 32 512 1 3.1663849472 2.097152
4 conv 1 1 1 1 512 1 32 1 0.007615392 0.000512
4 conv 1 1 1 1 32 1 512 1 0.0076085248 0.000512
1 shift 1 1 1 32 512 32 128 1 0.91424325632 0.65536
1 shift 1 3 1 32 128 32 128 128 1.90958927872 1.96608
1 shift 1 3 1 32 128 32 128 1 1.90958927872 1.96608
1 shift 1 1 1 32 128 32 512 1 0.92062482432 0.65536
2 conv 1 1 1 32 512 32 128 1 3.1459639296 2.097152
2 conv 1 3 1 32 128 32 128 128 6.606553088 6.291456
1 shift 1 1 1 16 512 16 1024 1 1.88065316864 1.31072
1 shift 1 1 1 32 512 32 256 1 1.76295051264 1.31072
1 shift 1 3 2 32 256 16 256 256 2.07334735872 1.96608
3 shift 1 3 1 16 256 16 256 1 1.98323535872 1.96608
3 shift 1 1 1 16 256 16 1024 1 0.95337644032 0.65536
4 conv 1 1 1 1 1024 1 64 1 0.0300315776 0.002048
4 conv 1 1 1 1 64 1 1024 1 0.0299913216 0.002048
2 conv 1 1 1 16 1024 16 256 1 3.2219725824 2.097152
2 conv 1 3 1 16 256 16 256 256 6.842220544 6.291456
1 conv 1 3 1 16 256 16 256 1 6.842220544 6.291456
2 conv 1 1 1 16 256 16 1024 1 3.2711901184 2.097152
1 conv 1 1 1 16 256 16 768 1 2.4372445184 1.572864
1 matmul 1024 1 1 1 64 1 256 1 0.7916486656 0.524288
1 matmul 256 1 1 1 256 1 256 1 0.7193100288 0.524288
2 shift 1 1 1 16 1024 16 256 1 0.93799596032 0.65536
2 shift 1 3 1 16 256 16 256 256 1.98323535872 1.96608
1 conv 1 1 1 8 1024 8 2048 1 6.8826693632 4.194304
1 conv 1 1 1 16 1024 16 512 1 6.4171016192 4.194304
1 conv 1 3 2 16 512 8 512 512 7.6794822656 6.291456
4 conv 1 1 1 8 512 8 1536 1 2.5835536384 1.572864
8 matmul 512 1 1 1 64 1 64 1 0.1038106624 0.065536
5 conv 1 1 1 8 512 8 2048 1 3.4622144512 2.097152
4 conv 1 1 1 8 2048 8 512 1 3.4308947968 2.097152
4 conv 1 3 1 8 512 8 512 512 7.453933568 6.291456
1 conv 1 3 1 8 512 8 512 1 7.453933568 6.291456
1 conv 1 1 1 1 2048 1 128 1 0.1192663296 0.008192
1 conv 1 1 1 1 128 1 2048 1 0.1191100416 0.008192
2 linear 1 1 1 1 2048 1 1000 1 0.928905864 0.0512
"""


def golden(text):
    """[(count, Layer, energy_mj, latency_ms)]"""
    rows = []
    for line in text.split("\n")[1:-1]:
        count, op, *sizes, groups, energy_mj, latency_ms = line.split()
        n, k, stride, h, c, e, m = map(int, sizes)
        layer = Layer(op, n, k, stride, h, h, c, e, e, m, int(groups))
        rows.append((int(count), layer, float(energy_mj), float(latency_ms)))
    return rows


# ---- official accounting ----


@pytest.mark.parametrize("text, pe_limit", [(T0_MIX_V3_224, 168), (T0_MIX_V4_256, 192)])
def test_every_recorded_row_is_reproduced(text, pe_limit):
    for _, layer, energy_mj, latency_ms in golden(text):
        cost = layer_cost(layer, pe_limit=pe_limit)
        assert cost.energy_mj == pytest.approx(energy_mj, rel=1e-9), layer
        assert cost.latency_ms == pytest.approx(latency_ms, rel=1e-9), layer
        assert sum(cost[2:7]) == pytest.approx(cost.energy_mj, rel=1e-12)


@pytest.mark.parametrize("text, arch, image", [(T0_MIX_V3_224, V3, 224), (T0_MIX_V4_256, V4, 256)])
def test_arch_string_gives_the_recorded_layers(text, arch, image):
    assert Counter(network_layers("bossnet_t0", arch, image)) == {row[1]: row[0] for row in golden(text)}


def test_layers_come_in_execution_order():
    layers = network_layers("bossnet_t0", V3, 224)
    rows = (
        [(7, 3, 64)]
        + [(1, 64, 256), (1, 64, 64), (3, 64, 64), (3, 64, 64), (1, 64, 256), (1, 256, 16), (1, 16, 256)]
        + [(1, 256, 64), (3, 64, 64), (3, 64, 64), (1, 64, 256), (1, 256, 16), (1, 16, 256)]
    )
    assert [(layer.kernel, layer.in_c, layer.out_c) for layer in layers[:14]] == rows
    ops = "".join(layer.op[0] for layer in layers[39:73])
    assert ops == "ssssscc" + "cccccc" + "cccmmc" + "aaaacc" * 2 + "ccc"
    assert [layer.op for layer in layers[-2:]] == ["linear"] * 2


@pytest.mark.parametrize(
    "space, arch, image, pe_limit, energy_mj, latency_ms",
    [
        ("bossnet_t0", V3, 224, 168, 242.264, 206.402),
        ("bossnet_t0", V3, 256, 168, 310.452, 255.599),
        ("bossnet_t0", V3, 288, 168, 386.565, 257.373),
        ("bossnet_t0", V4, 224, 168, 219.809, 181.056),
        ("bossnet_t1", V3, 224, 168, 440.619, 387.655),
        ("bossnet_t1", V3, 256, 168, 572.399, 464.790),
        ("bossnet_t0", V4, 256, 192, 281.066, 219.161),
        ("bossnet_t1", V4, 224, 192, 413.234, 252.696),
        ("bossnet_t1", V4, 256, 192, 543.013, 428.352),
    ],
)
def test_published_totals(space, arch, image, pe_limit, energy_mj, latency_ms):
    cost = network_cost(network_layers(space, arch, image), pe_limit=pe_limit)
    assert cost[:2] == pytest.approx((energy_mj, latency_ms), abs=5.1e-4)


def test_published_counts_energy_split_and_macs():
    layers = network_layers(find_space("bossnet_t0"), V3)
    assert Counter(layer.op for layer in layers) == dict(conv=78, add=8, shift=5, matmul=10, linear=2)
    split = "conv 211.502 2.903, add 20.760 0.438, shift 6.692 0.373, matmul 1.452 0.030"
    for op, energy_mj, giga_macs in map(str.split, split.split(", ")):
        own = [layer for layer in layers if layer.op == op]
        assert network_cost(own, pe_limit=168).energy_mj == pytest.approx(float(energy_mj), abs=5.1e-4)
        assert operations(own)["macs"] / 1e9 == pytest.approx(float(giga_macs), abs=5.1e-4)


@pytest.mark.parametrize("space, arch", list(itertools.product(("bossnet_t0", "bossnet_t1"), (V3, V4))))
def test_published_networks_have_their_macs(space, arch):
    published = {"bossnet_t0": 3.747, "bossnet_t1": 6.403}[space]
    assert operations(network_layers(space, arch))["macs"] / 1e9 == pytest.approx(published, abs=5.1e-4)


def test_the_array_limit_changes_the_published_latency():
    layers = network_layers("bossnet_t0", V3, 224)
    costs = [network_cost(layers, pe_limit=limit) for limit in (168, 192)]
    assert costs[0].latency_ms == pytest.approx(206.402, abs=5e-4) and costs[1].latency_ms < 180


@pytest.mark.parametrize(
    "shape, energy_mj, latency_ms",
    [
        ((512, 2048, 8), 69.41455, 41.82336),
        ((1024, 4096, 16, 6, 512), 214.33576, 130.24512),
        ((1024, 4096, 16, 6, 1024), 272.94733, 166.22208),
    ],
)
def test_transformer_totals(shape, energy_mj, latency_ms):
    cost = network_cost(transformer_layers(*shape), pe_limit=168)
    assert cost[:2] == pytest.approx((energy_mj, latency_ms), abs=5.1e-6)


def test_official_quirks_by_hand():
    one = Layer("conv", 1, 1, 1, 1, 1, 1, 1, 1, 1)
    # one word in, one weight, one word out, every factor 1; pJ at 32 bits
    memory = {"dram": 400 * 3, "buffer": 44.4 * 2, "noc": 14.8 * 2 + 7.4, "rf": 7.4 + 14.8 + 7.4}
    assert layer_cost(one).energy_mj == pytest.approx((3.7 + sum(memory.values())) * 1e-9)
    add = layer_cost(one._replace(op="add"))
    assert add[2:7] == pytest.approx([v * 1e-9 for v in (0.9, 0, 0, 7.4, 29.6)]) and add.latency_ms == 4e-6
    for bits, pj in ((32, 0.13), (8, 0.024)):  # 10-bit words at either width
        shift = layer_cost(one._replace(op="shift"), bits)
        assert shift.energy_mj == pytest.approx((pj + sum(memory.values()) * 10 / 32) * 1e-9)
        assert shift.latency_ms == pytest.approx(1.25e-6)
    depthwise = Layer("conv", 1, 3, 1, 8, 8, 16, 8, 8, 16, 16)
    assert layer_cost(depthwise) == layer_cost(depthwise._replace(groups=1))


# ---- uniform accounting: one test by hand a rule ----

ONE = Layer("conv", 1, 1, 1, 1, 1, 1, 1, 1, 1)  # one word in, one weight, one word out


def uniform(layer, bits=32):
    return layer_cost(layer, bits, "uniform", 168)


def test_uniform_word_width_is_five_bits_for_shift_weights_only():
    # DRAM 12.5 pJ a bit: input 32 + output 32 + weight 32 or 5 bits
    assert uniform(ONE).dram_mj == pytest.approx(12.5 * 96 * 1e-9)
    assert uniform(ONE._replace(op="shift")).dram_mj == pytest.approx(12.5 * 69 * 1e-9)
    assert uniform(ONE._replace(op="shift"), 8).dram_mj == pytest.approx(12.5 * 21 * 1e-9)
    # register file: input and partial sum 7.4 each, weight 2 * 7.4 at 32 bits and 5/32 of it at 5
    assert uniform(ONE._replace(op="shift")).rf_mj == pytest.approx((14.8 + 14.8 * 5 / 32) * 1e-9)


def test_uniform_add_pays_every_memory_level():
    assert uniform(ONE._replace(op="add"))[3:7] == uniform(ONE)[3:7]
    assert min(uniform(ONE._replace(op="add"))[3:7]) > 0


@pytest.mark.parametrize(
    "op, pj_32, pj_8",
    [*((op, 4.6, 0.23) for op in ("conv", "linear", "matmul")), ("shift", 1.03, 0.054), ("add", 1.8, 0.06)],
)
def test_uniform_compute_counts_the_accumulation(op, pj_32, pj_8):
    assert uniform(ONE._replace(op=op)).compute_mj == pytest.approx(pj_32 * 1e-9)
    assert uniform(ONE._replace(op=op), 8).compute_mj == pytest.approx(pj_8 * 1e-9)


def test_uniform_clock_is_the_same_for_every_op():
    assert {uniform(ONE._replace(op=op)).latency_ms for op in cost_model.PRIMITIVES} == {4e-6}


def test_uniform_honours_groups():
    dense = Layer("conv", 1, 3, 1, 8, 8, 1, 8, 8, 1)
    depthwise = dense._replace(in_c=32, out_c=32, groups=32)
    assert uniform(depthwise)[:7] == pytest.approx([32 * value for value in uniform(dense)[:7]])
    # by hand: a group has 64 inputs, 9 weights, 64 outputs, each once to or from DRAM, 400 pJ a 32-bit word
    assert uniform(depthwise).dram_mj == pytest.approx(32 * 400 * (64 + 9 + 64) * 1e-9)
    assert uniform(depthwise).compute_mj == pytest.approx(32 * 64 * 9 * 4.6 * 1e-9)


def test_uniform_tiles_round_up():
    # 17 outputs: two passes of a 16-word register tile, so the input word crosses the array twice
    cost = uniform(ONE._replace(out_c=17))
    assert cost.noc_mj == pytest.approx((14.8 * (2 + 17) + 7.4 * 17) * 1e-9)
    prime, composite = (Layer("conv", 1, 1, 1, 8, 8, c, 8, 8, 64) for c in (127, 128))
    assert uniform(prime).energy_mj < uniform(composite).energy_mj
    assert layer_cost(prime).energy_mj > layer_cost(composite).energy_mj


def random_layer(rng):
    op = rng.choice(list(cost_model.PRIMITIVES))
    groups = rng.choice([1, 1, 1, rng.randint(1, 24)])
    c, m = groups * rng.randint(1, 160 // groups), groups * rng.randint(1, 160 // groups)
    if op in ("linear", "matmul"):
        return Layer(op, rng.randint(1, 300), 1, 1, 1, 1, c, 1, 1, m)
    kernel, stride = rng.choice([1, 3, 5, 7]), rng.choice([1, 2])
    h, w = rng.randint(1, 60), rng.randint(1, 60)
    return Layer(op, 1, kernel, stride, h, w, c, -(-h // stride), -(-w // stride), m, groups)


def larger_layers(layer, rng):
    """The layer with more channels, a larger map, a larger batch."""
    g, step = layer.groups, rng.randint(1, 40)
    yield layer._replace(in_c=layer.in_c + g * step)
    yield layer._replace(out_c=layer.out_c + g * step)
    yield layer._replace(batch=layer.batch + step)
    if layer.op in ("conv", "shift", "add"):
        h, w = layer.in_h + step, layer.in_w + step
        yield layer._replace(in_h=h, out_h=-(-h // layer.stride))
        yield layer._replace(in_w=w, out_w=-(-w // layer.stride))


def test_uniform_energy_is_monotone_on_random_layers():
    rng = random.Random(0)
    for _ in range(60):
        layer = random_layer(rng)
        cost = uniform(layer)
        assert uniform(layer, 8).energy_mj < cost.energy_mj, layer
        for larger in larger_layers(layer, rng):
            assert uniform(larger).energy_mj > cost.energy_mj, (layer, larger)


@pytest.mark.parametrize("bits", [32, 8])
def test_uniform_shift_never_costs_more_than_conv(bits):
    rng = random.Random(bits)
    for _ in range(60):
        layer = random_layer(rng)._replace(op="shift")
        assert uniform(layer, bits).energy_mj < uniform(layer._replace(op="conv"), bits).energy_mj, layer


# ---- the tiling search itself ----


def brute_force(layer, pe_limit):
    """Official choice by plain loops: least normalised energy + latency of all tilings; conv, 32 bits."""

    def tuples(n, parts):
        if parts == 1:
            return [(n,)]
        return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in tuples(n // d, parts - 1)]

    _, n, r, st, h, w, c, e, f, m, _ = layer
    found = []
    for n0, n3 in tuples(n, 2):
        for m0, m1, m2, m3 in tuples(m, 4):
            for c0, c1, c2 in tuples(c, 3):
                for e1, e3 in tuples(e, 2):
                    in_words = n0 * c1 * c0 * ((e1 - 1) * st + r) * ((f - 1) * st + r)
                    if m0 > 16 or e1 == 1 or c0 * r >= 12 or m0 * c0 * r >= 960:
                        continue
                    if m1 * c1 * e1 * r >= pe_limit or in_words + n0 * m2 * m1 * m0 * e1 * f >= 65536:
                        continue
                    i, wt, o = n * h * w * c, r * r * c * m, n * e * f * m
                    noc_in = i * m3 * m2 * m1 * r * e / h
                    pj = (
                        3.7 * o * r * r * c
                        + 400 * (i * m3 + wt * n3 * e3 + o)
                        + 44.4 * (i * m3 * m2 + o * max(2 * (c2 - 1), 1))
                        + 14.8 * (noc_in + wt * n3 * e3 * e1)
                        + 7.4 * o * max(c2 * (c1 * r - 1), 1)
                        + 7.4 * noc_in * m0 * r * f / w
                        + 14.8 * wt * n3 * e3 * e1 * f * n0
                        + 7.4 * o * max(2 * c2 * c1 * r * (c0 * r - 1), 1)
                    )
                    found.append((pj * 1e-9, n3 * n0 * m3 * m2 * m0 * c2 * c0 * e3 * f * r * 4e-6))
    energies, latencies = zip(*found)
    return min(
        found, key=lambda x: (x[0] - min(energies)) / max(energies) + (x[1] - min(latencies)) / max(latencies)
    )


@pytest.mark.parametrize(
    "layer", [Layer("conv", 2, 3, 2, 9, 11, 6, 5, 6, 12), Layer("conv", 1, 5, 1, 8, 8, 4, 8, 8, 6)]
)
def test_official_choice_equals_plain_loops(layer):
    assert layer_cost(layer, pe_limit=168)[:2] == pytest.approx(brute_force(layer, 168), rel=1e-12)


def test_eight_bits_double_the_memories_and_quadruple_the_array():
    layer = Layer("conv", 1, 3, 1, 14, 14, 512, 14, 14, 512)
    tiling = layer_cost(layer, 8, pe_limit=168).tiling
    assert 168 <= tiling.m1 * tiling.c1 * tiling.e1 * 3 < 4 * 168
    assert 16 < tiling.m0 <= 32 or tiling.c0 * 3 >= 12


# ---- errors ----


@pytest.mark.parametrize(
    "change, settings, message",
    [
        ({"op": "pool"}, {}, "unknown op 'pool': allowed are conv"),
        ({"batch": 0}, {}, "batch is 0"),
        ({"in_h": -3}, {}, "in_h is -3"),
        ({"in_c": 6.0}, {}, "in_c is 6.0"),
        ({"kernel": True}, {}, "kernel is True"),
        ({"groups": 4}, {}, "groups 4 must divide in_c 6"),
        ({"out_c": "8"}, {}, "out_c is '8'"),
        ({}, {"accounting": "fair"}, "unknown accounting 'fair': allowed are official, uniform"),
        ({}, {"bits": 16}, "bits is 16"),
        ({}, {"bits": 32.0}, "bits is 32.0"),
        ({}, {"pe_limit": 0}, "pe_limit is 0"),
        ({}, {"pe_limit": 1.5}, "pe_limit is 1.5"),
    ],
)
def test_bad_layer_or_setting_is_named(change, settings, message):
    layer = Layer("conv", 1, 3, 1, 8, 8, 6, 8, 8, 8)
    layer_cost(layer)  # a cached valid twin must not hide 6.0
    with pytest.raises(ValueError, match=message):
        layer_cost(layer._replace(**change), **settings)


@pytest.mark.parametrize(
    "accounting, layer, limit",
    [
        ("official", Layer("conv", 1, 13, 1, 20, 20, 4, 20, 20, 4), r"C0\*S < 12"),
        ("uniform", Layer("conv", 1, 13, 1, 20, 20, 4, 20, 20, 4), r"C0\*S < 12"),
        ("official", Layer("conv", 1, 7, 1, 37, 37, 3, 37, 37, 8), r"M1\*C1\*E1\*R < 192"),
        ("official", Layer("conv", 1, 3, 2, 2, 2, 8, 1, 1, 8), "E1 > 1"),
        ("official", Layer("conv", 1, 1, 1, 4, 40000, 1, 4, 40000, 1), "65536 words"),
        ("uniform", Layer("conv", 1, 1, 1, 4, 40000, 1, 4, 40000, 1), "65536 words"),
    ],
)
def test_layer_that_no_tiling_fits_names_the_limit(accounting, layer, limit):
    with pytest.raises(ValueError, match=limit):
        layer_cost(layer, accounting=accounting)


@pytest.mark.parametrize(
    "space, arch, image, message",
    [
        ("fashion", V3, None, "cc/cccc"),
        ("nowhere", V3, None, "nowhere"),
        ("fashion", "cc/cc/xx", None, "x"),
        ("fashion", "cc/cc/cc", 0, "image is 0"),
        ("fashion", "cc/cc/cc", 28.0, "image is 28.0"),
        ("fashion", "cc/cc/cc", (28, 28, 1), "image is"),
        ("fashion", None, None, "None"),
    ],
)
def test_bad_network_is_named(space, arch, image, message):
    with pytest.raises(ValueError, match=message):
        network_layers(space, arch, image)


# ---- layers against the real networks ----


def conv_macs_of(space, arch, size):
    """MACs of every convolution, shift, add and linear call of the built network, seen by forward hooks."""
    from shiftaddnas import Attention2d, HybridConv2d

    counts = Counter()

    def count(module, inputs, output):
        if isinstance(module, torch.nn.Linear):
            counts["macs"] += module.in_features * module.out_features
        elif isinstance(module, Attention2d):
            counts["macs"] += 3 * module.qkv.shape[1] ** 2 * inputs[0].shape[2] * inputs[0].shape[3]
        else:
            counts["macs"] += output.numel() * module.weight_numel_per_output

    with torch.device("meta"):
        network = build(space, arch).eval()
        for module in network.modules():
            if isinstance(module, HybridConv2d):
                module.weight_numel_per_output = math.prod(module.shape[1:])
            elif isinstance(module, torch.nn.Conv2d):
                module.weight_numel_per_output = math.prod(module.weight.shape[1:])
            if isinstance(module, (HybridConv2d, torch.nn.Conv2d, torch.nn.Linear, Attention2d)):
                module.register_forward_hook(count)
        network(torch.zeros(1, space.in_channels, *size))
    return counts["macs"]


@pytest.mark.parametrize(
    "name, arch, size",
    [
        ("fashion", "cc/st/tc", (28, 28)),
        ("fashion", "ss/ccst/tc", (33, 21)),
        ("bossnet_t0", "cc/cscc/sctss/ttctt", (97, 64)),
        ("bossnet_t1", "cs/cscc/sctss/ttctt", (64, 64)),
        ("hytra", "cscs/cscs/cstc/ttct", (224, 224)),
    ],
)
def test_layers_equal_the_built_network(name, arch, size):
    space = find_space(name)
    layers = [layer for layer in network_layers(space, arch, size) if layer.op != "matmul"]
    assert operations(layers)["macs"] == conv_macs_of(space, arch, size)


def test_operations_count_primitives():
    conv, shift, add = (Layer(op, 1, 3, 1, 4, 4, 6, 4, 4, 8, 2) for op in ("conv", "shift", "add"))
    macs = 16 * 8 * 9 * 3
    expected = {"mults": macs, "shifts": macs, "adds": 4 * macs, "macs": 3 * macs}
    assert operations([conv, shift, add]) == expected


# ---- measured latency and the command line ----


def test_measured_table_is_cached_and_predicts(tmp_path, monkeypatch):
    space, path, calls = find_space("fashion"), tmp_path / "latency.json", []
    timed = cost_model._timed_ms
    monkeypatch.setattr(
        cost_model, "_timed_ms", lambda jobs, image: calls.append(len(jobs)) or timed(jobs, image, 3)
    )
    table = cost_model.measured_table(space, path)
    assert cost_model.measured_table(space, path) == table and calls == [4 + 20]
    assert len(table["check"]) == 20 and list(tmp_path.iterdir()) == [path]
    parts = table["latency_ms"]
    assert len(parts) == 2 + 2 * (3 + 4 + 4) and min(parts.values()) > 0
    assert cost_model.measured_latency_ms(space, "cs/at/tc", table) == pytest.approx(
        sum(parts[key] for key in ("stem", "1c^", "1s+", "2a^", "2t+", "3t^", "3c+", "head"))
    )
    with pytest.raises(ValueError, match="fashion"):
        cost_model.measured_latency_ms(find_space("hytra"), "c/c/ccccc/ccccccccc", table)
    table["machine"]["torch"] = "0.1"
    path.write_text(json.dumps(table))
    assert cost_model.measured_table(space, path)["machine"]["torch"] == torch.__version__ and len(calls) == 2


def run(capsys, *argv):
    code = cost_model.main(list(argv))
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_json_of_the_published_network(capsys):
    flags = f"--space bossnet_t0 --arch {V3} --image 224 --pe-limit 168 --json"
    code, out, _ = run(capsys, *flags.split())
    result = json.loads(out)
    assert code == 0 and result["energy_mj"] == pytest.approx(242.264, abs=5e-4)
    assert result["params"] == 29_908_528
    assert result["latency_ms"] == pytest.approx(206.402, abs=5e-4) and result["layers"]["conv"] == 78
    assert (result["accounting"], result["bits"], result["pe_limit"]) == ("official", 32, 168)
    assert result["macs"] / 1e9 == pytest.approx(3.747, abs=5e-4)
    assert sum(row["energy_mj"] for row in result["by_op"].values()) == pytest.approx(result["energy_mj"])


def test_table_csv_compare_and_plot(capsys, tmp_path):
    code, out, _ = run(capsys, "--arch", "cc/sa/tt", "--compare", "ss/ss/ss", "cc/cc/cc", "--image", "20x31")
    assert code == 0 and "image 20x31" in out and "\ntotal " in out and out.count(" mJ (") == 2
    code, out, _ = run(capsys, "--arch", "cc/sa/tt", "--csv", "--accounting", "uniform", "--bits", "8")
    rows = [line.split(",") for line in out.split()]
    energies = [float(row[rows[0].index("energy_mj")]) for row in rows[1:]]
    layers = network_layers("fashion", "cc/sa/tt")
    assert len(energies) == len(layers) and sum(energies) == pytest.approx(
        network_cost(layers, 8, "uniform")[0]
    )
    pytest.importorskip("matplotlib")
    assert run(capsys, "--arch", "cc/sa/tt", "--plot", str(tmp_path / "bars.png"))[0] == 0
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, "--arch", "cc/sa/tt", "--plot", "bars.png")
    assert code == 2 and "matplotlib" in err and err.count("\n") == 1


def test_arch_from_a_json_file(capsys, tmp_path):
    path = tmp_path / "winner.json"
    path.write_text('{"arch": "cc/sa/tt"}')
    assert run(capsys, "--arch", str(path)) == run(capsys, "--arch", "cc/sa/tt")


@pytest.mark.parametrize(
    "argv",
    [
        "--arch cc/xx/tt",
        "--arch nowhere.json",
        "--arch cc/sa/tt --image 0",
        "--bogus",
        "",
        "--arch cc/sa/tt --image axb",
        "--arch cc/sa/tt --bits 16",
        "--arch cc/sa/tt --acc x",
        "--space nowhere --arch cc",
        "--arch cc/sa/tt --pe-limit 1",
        "--arch cc/sa/tt --image 20x30 --measure x.json",
        "--table /nowhere/energy.md",
    ],
)
def test_bad_command_line_is_one_sentence_and_exit_2(capsys, argv):
    code, out, err = run(capsys, *argv.split())
    assert code == 2 and not out and err.startswith("cost_model.py: ") and err.count("\n") == 1


def test_energy_table_holds_every_published_network():
    table = cost_model.energy_table()
    vision = "242.264 310.452 386.565 219.809 281.066 440.619 572.399 413.234 543.013"
    for number in (*vision.split(), "69.41455", "214.33576", "272.94733"):
        assert number in table
    assert table == (ROOT / "results" / "energy.md").read_text()
    assert "What remains of the saving" in table


def test_script_runs_and_import_does_nothing():
    folder = Path(cost_model.__file__).parent
    silent = subprocess.run(
        [sys.executable, "-c", "import cost_model"], cwd=folder, capture_output=True, check=True
    )
    assert silent.stdout == silent.stderr == b""


def test_the_model_is_fast_enough_to_search_with():
    lines = cost_model.benchmark(32, "official", 168, archs=200)
    cold_s, many_s = (float(line.split()[-2]) for line in lines)
    assert cold_s < 1.0 and many_s < 2.0  # ten times the measured values; a bound, not a measurement

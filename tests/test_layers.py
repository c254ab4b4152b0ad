"""Claims about the operators and their drop-in layers in other people's code.

The float64 definitions here are sums over taps, with the derivatives of AdderNet (add) or of a product behind
straight-through roundings (shift). Every cell of {layers} x {dtypes} x {ways of torch} is compared with them:
test_every_layer_in_every_dtype_and_way_of_torch_equals_the_definition. What torch itself does not do:
    an exported program is for inference: it has the add operator, but not its derivative
    torch.export cannot show by itself that a map of the last stage stays larger than 1x1: sides from 17
    vmap of a network in training mode: batch norm's running statistics are not mapped
"""

import copy
import io
import itertools
import json
import math
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.optim.swa_utils import AveragedModel

import shiftaddnas
from conftest import FASHION, HYTRA, rng
from results.resnet20 import ResNet
from shiftaddnas import (
    SPACES, TOKEN_SPACES, AddConv2d, AddLinear, HybridConv2d, ShiftConv2d, ShiftLinear, Supernet, Translator,
    add_conv2d, add_linear, attend, attention2d, build, convert, find_space, fixed_point, mix_tokens,
    power_of_two, quantise, read_arch, shift_conv2d,
)

SMALL = replace(
    FASHION, name="small", widths=(32, 64), strides=(1, 2), ops=("csa", "csat"), depths=((1, 1), (1, 2))
)
ARCH = "a/st"
TRANSLATION = TOKEN_SPACES["translation"]
TOKEN_ARCH = "96: TC-256-4 A-256-4 S-128-8 / 64: TA-256-4-4-1 TS-128-8-4-2"
SENTENCES = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]]), torch.tensor([[1, 5, 6], [1, 7, 8]])
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def assert_near(result, expected, tolerance=1e-5):
    """Compare shape and, by the relative error of the whole tensor, values; fails on NaN."""
    assert result.shape == expected.shape
    assert (result.double() - expected.double()).norm() <= tolerance * expected.double().norm()


# ------------------------------------------------------------------------------ the float64 definitions


def add_term(x, w):
    """Return -|x - w| with the derivatives of AdderNet: x - w for w, clip(w - x, -1, 1) for x."""
    distance = (x - w.detach()).abs()
    for_x = -torch.where(distance < 1, distance**2 / 2, distance - 0.5)
    for_w = -((x.detach() - w) ** 2) / 2
    slope = for_x + for_w
    return -(x - w).abs().detach() + slope - slope.detach()


def shift_term(x, w):
    """Return the product of x on its grid and w as a power of two, with the derivatives of a product."""
    grid = (x.detach() * 2**16).floor() / 2**16
    power = w.detach().sign() * 2 ** w.detach().abs().log2().round().clamp(-15, 0)
    return (x - x.detach() + grid) * (w - w.detach() + power)


TERMS = {"conv": torch.mul, "shift": shift_term, "add": add_term}


def define_conv(op, x, w, stride, dilation, groups):
    """Return y[n,m,i,j], the sum of an op's terms over channels and taps of a padded image, tap by tap."""
    reach = [d * (k - 1) for d, k in zip(dilation, w.shape[2:])]
    rows, columns = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride)]
    x = x.unflatten(1, (groups, 1, -1))  # (N, G, 1, C/G, H, W)
    w = w.unflatten(0, (groups, -1))[..., None, None]  # (G, M/G, C/G, KH, KW, 1, 1)
    y = 0
    for u, v in itertools.product(range(w.shape[3]), range(w.shape[4])):
        i = u * dilation[0] + stride[0] * torch.arange(rows)
        j = v * dilation[1] + stride[1] * torch.arange(columns)
        y = y + TERMS[op](x[..., i[:, None], j], w[:, :, :, u, v]).sum(3)  # (N, G, M/G, H', W')
    return y.flatten(1, 2)


def pads_of(conv):
    """Return the pads (left, right, top, bottom) of an nn.Conv2d."""
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if conv.padding == "same":
        rows, columns = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    rows, columns = conv.padding
    return columns, columns, rows, rows


def define(layer, x):
    """Return what a layer makes of x: AddConv2d, ShiftConv2d, HybridConv2d, AddLinear, ShiftLinear or Mix."""
    w = layer.weight
    if isinstance(layer, nn.Linear):
        return TERMS[layer.op](x[..., None, :], w).sum(-1) + layer.bias
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, pads_of(layer), mode)
        y = define_conv(layer.op, x, w, layer.stride, layer.dilation, layer.groups)
        return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)
    taps = w.softmax(1).repeat_interleave(x.shape[2] // len(w), 0)  # (C, K)
    image = F.pad(x.mT, (taps.shape[1] - 1, 0))[:, :, None]  # (B, C, 1, T + K - 1)
    y = define_conv(layer.op, image, taps[:, None, None], (1, 1), (1, 1), x.shape[2])
    return y[:, :, 0].mT


# ------------------------------------------------------------------ layers, dtypes and ways of torch


class Mix(nn.Module):
    """mix_tokens with its taps as a parameter."""

    def __init__(self, op):
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, u):
        return mix_tokens(self.op, u, self.weight, causal=True)


LAYERS = {  # name -> what makes the layer, shape of its input
    "AddConv2d": (partial(AddConv2d, 4, 6, 3, padding=1, groups=2), (3, 4, 5, 6)),
    "ShiftConv2d": (partial(ShiftConv2d, 4, 6, 3, padding=1, groups=2), (3, 4, 5, 6)),
    "AddLinear": (partial(AddLinear, 5, 4), (3, 2, 5)),
    "ShiftLinear": (partial(ShiftLinear, 5, 4), (3, 2, 5)),
    "mix_tokens add": (partial(Mix, "add"), (3, 7, 4)),
    "mix_tokens conv": (partial(Mix, "conv"), (3, 7, 4)),
}


def run_eager(layer, x, g):
    y = layer(x)
    return y, *torch.autograd.grad((y * g).sum(), (x, layer.weight))


def run_autocast(layer, x, g):
    with torch.autocast("cpu", torch.float16 if x.dtype == torch.float16 else torch.bfloat16):
        return run_eager(layer, x, g)


def run_compiled(layer, x, g):
    torch._dynamo.reset()
    return run_eager(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, g)


def run_exported(layer, x, g):
    two = torch.cat([x, x]).detach()
    program = torch.export.export(layer, (two,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    return (program.module()(x),)


def run_vmap(layer, x, g):
    return (vmap(layer)(torch.stack([x, 2 * x], 1))[:, 0],)


def run_func_grad(layer, x, g):
    def loss(weights, x):
        return (functional_call(layer, weights, x) * g).sum()

    grad_w, grad_x = grad(loss, (0, 1))(dict(layer.named_parameters()), x)
    return layer(x), grad_x, grad_w["weight"]


def run_deepcopy(layer, x, g):
    return run_eager(copy.deepcopy(layer), x, g)


def run_assign(layer, x, g):
    empty = copy.deepcopy(layer).to("meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    return run_eager(empty, x, g)


WAYS = {  # way -> dtypes of a quick run; the others are marked slow
    run_eager: TOLERANCES,
    run_autocast: TOLERANCES,
    run_compiled: (torch.float32,),
    run_exported: (torch.float32,),
    run_vmap: TOLERANCES,
    run_func_grad: TOLERANCES,
    run_deepcopy: TOLERANCES,
    run_assign: TOLERANCES,
}
CELLS = [
    pytest.param(name, dtype, way, marks=() if dtype in WAYS[way] else pytest.mark.slow)
    for name, dtype, way in itertools.product(LAYERS, TOLERANCES, WAYS)
]


@pytest.mark.parametrize("name, dtype, way", CELLS, ids=lambda cell: getattr(cell, "__name__", str(cell)))
def test_every_layer_in_every_dtype_and_way_of_torch_equals_the_definition(name, dtype, way):
    make, size = LAYERS[name]
    with shiftaddnas.seeded(0):
        layer = make().to(dtype)
        for p in layer.parameters():
            nn.init.normal_(p)
        x = torch.randn(size).to(dtype).requires_grad_()
    exact = copy.deepcopy(layer).double()
    exact_x = x.detach().double().requires_grad_()
    y = define(exact, exact_x)
    g = torch.randn(y.shape, generator=rng()).to(dtype)
    grad_x, grad_w = torch.autograd.grad((y * g).sum(), (exact_x, exact.weight))
    if name == "AddConv2d":
        grad_w = grad_w * (layer.eta / grad_w.square().mean().sqrt())
    results = way(layer, x, g)
    half = torch.bfloat16 if way is run_autocast and dtype == torch.float32 else dtype
    for result, expected in zip(results, (y, grad_x, grad_w)):
        assert_near(result, expected, TOLERANCES[half])


def test_an_adders_gradient_has_the_length_of_eta_also_where_half_precision_has_no_room():
    x = torch.randn(2, 3, 6, 6, generator=rng())
    for dtype, scale in ((torch.float32, 1.0), (torch.float32, 50.0), (torch.half, 0.01), (torch.half, 0.0)):
        layer = AddConv2d(3, 8, 3, eta=0.3).to(dtype)
        (scale * layer(x.to(dtype))).sum().backward()
        length = layer.weight.grad.float().norm().item()
        assert length == pytest.approx(0.3 * math.sqrt(3 * 8 * 9) if scale else 0.0, rel=1e-3)


# --------------------------------------------------------------------------------------------- arguments


def random_arguments(generator):
    """Return random constructor arguments of nn.Conv2d, in its order, and the shape of an input for them."""

    def pick(count):
        return int(torch.randint(count, (), generator=generator))

    def number_or_pair(least, count):
        return least + pick(count) if pick(2) else (least + pick(count), least + pick(count))

    groups = 1 + pick(3)
    c_in = groups * (1 + pick(2))
    c_out = groups * (1 + pick(3))
    kernel = number_or_pair(1, 4)
    padding = ("same", "valid", number_or_pair(0, 3))[max(0, pick(4) - 1)]
    stride = 1 if padding == "same" else number_or_pair(1, 3)
    mode = ("zeros", "zeros", "reflect", "replicate", "circular")[pick(5)]
    arguments = (c_in, c_out, kernel, stride, padding, number_or_pair(1, 2), groups, bool(pick(2)), mode)
    return arguments, (1 + pick(2), c_in, 7 + pick(3), 7 + pick(3))


@pytest.mark.parametrize("layer", [HybridConv2d, ShiftConv2d, AddConv2d])
def test_layers_take_all_arguments_of_a_convolution_and_equal_float64_loops(layer):
    generator = rng()
    for _ in range(200):
        arguments, size = random_arguments(generator)
        conv = nn.Conv2d(*arguments, dtype=torch.float64)
        ours = layer(*arguments, None, torch.float64)
        ours.load_state_dict(conv.state_dict())  # the names and shapes are the same
        assert isinstance(ours, nn.Conv2d)
        x = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        y = ours(x)
        expected = define(ours, x)
        g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        results = torch.autograd.grad((y * g).sum(), (x, *ours.parameters()))
        loops = list(torch.autograd.grad((expected * g).sum(), (x, *ours.parameters())))
        if layer is AddConv2d:
            loops[1] *= ours.eta / loops[1].square().mean().sqrt()
        for result, loop in zip((y, *results), (expected, *loops)):
            torch.testing.assert_close(result, loop, rtol=1e-9, atol=1e-9, msg=lambda text: f"{ours}: {text}")
        if layer is HybridConv2d:
            torch.testing.assert_close(y, conv(x))
        torch.testing.assert_close(ours(x[0]), y[0])  # one image, as nn.Conv2d takes


BAD_SHAPES = [  # x, weight, settings, what the error says
    ((1, 3, 5, 5), (2, 4, 3, 3), {}, "channels of x"),
    ((1, 4, 5, 5), (3, 2, 3, 3), {"groups": 2}, "groups divide the filters"),
    ((3, 5, 5), (2, 3, 3, 3), {}, "4 dimensions"),
    ((1, 3, 2, 2), (2, 3, 3, 3), {}, "fit into the padded image"),
    ((1, 3, 4, 4), (2, 3, 3, 3), {"dilation": 2}, "fit into the padded image"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"stride": 0}, "stride must be an int of at least 1 or a pair .*got 0"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"stride": 1.0}, "stride must be an int .*got 1.0"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"stride": None}, "stride must be an int .*got None"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"dilation": (1, 0.5)}, "dilation must be an int .*got (1, 0.5"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"padding": -1}, "padding must be an int of at least 0"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"padding": (1, 1, 1)}, "padding must be"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"padding": "same", "stride": 2}, "with stride 1 'same'"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"padding": "reflect"}, "'valid', or with stride 1 'same'"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"groups": 0}, "groups must be"),
    ((1, 3, 5, 5), (2, 3, 3, 3), {"groups": "1"}, "groups must be"),
]


@pytest.mark.parametrize("x_size, w_size, settings, message", BAD_SHAPES)
@pytest.mark.parametrize("operator", [add_conv2d, shift_conv2d])
def test_operators_name_the_arguments_that_do_not_fit(operator, x_size, w_size, settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        operator(torch.zeros(x_size), torch.zeros(w_size), **settings)


def test_integers_of_numpy_are_ints():
    x, w = torch.randn(1, 2, 7, 6, generator=rng()), torch.randn(3, 2, 3, 3, generator=rng(1))
    for operator in (add_conv2d, shift_conv2d):
        stride, pad = np.int64(2), (np.int32(1), 2)
        assert operator(x, w, stride, pad, np.int64(1)).equal(operator(x, w, 2, (1, 2)))


def test_add_conv2d_names_dtypes_and_sizes_that_it_cannot_take():
    x, w = torch.zeros(1, 2, 3, 3), torch.zeros(4, 2, 3, 3)
    with pytest.raises(ValueError, match="one dtype, got torch.float32 and torch.float64"):
        add_conv2d(x, w.double())
    with pytest.raises(ValueError, match="floating.*torch.int64"):
        add_conv2d(x.long(), w.long())
    large, filters = torch.zeros(1).expand(1, 2**14, 2**8, 2**8), torch.zeros(1).expand(2, 2**14, 3, 3)
    with pytest.raises(ValueError, match=r"fewer than 2\^30"):  # offsets in an image have 32 bits
        add_conv2d(large, filters)


# ------------------------------------------------------------------------------------- numbers and dtypes


def test_a_common_offset_of_100_leaves_a_relative_error_below_1e_4():
    x = torch.randn(1, 64, 6, 6, generator=rng())
    w = torch.randn(8, 64, 3, 3, generator=rng(1))
    far = (x + 100).double(), (w + 100).double()
    exact = -torch.cdist(F.unfold(far[0], 3).mT, far[1].flatten(1), p=1).mT.unflatten(2, (4, 4))
    assert ((add_conv2d(x + 100, w + 100) - exact).abs() <= 1e-4 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_in_float32_and_rounds_once(dtype):
    x = torch.randn(2, 8, 5, 5, generator=rng()).to(dtype)
    w = torch.randn(4, 8, 3, 3, generator=rng(1)).to(dtype)
    assert add_conv2d(x, w).equal(add_conv2d(x.float(), w.float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert add_conv2d(x, w.float()).equal(add_conv2d(x.float(), w.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("letter", "sa")
def test_a_network_in_half_precision_or_autocast_equals_float32_within_its_rounding(letter, dtype):
    network = build(FASHION, "/".join(letter * depth for depth in (2, 3, 2))).eval()
    for block in network.blocks:
        nn.init.ones_(block.bn3.weight)  # else a block starts as its shortcut
    x = torch.randn(4, 1, 28, 28, generator=rng()).to(dtype).float()
    tolerance = 10 * TOLERANCES[dtype]  # some twenty layers
    with torch.autocast("cpu", dtype):
        assert_near(network(x), network.float()(x), tolerance)
    half = network.to(dtype)
    assert_near(half(x.to(dtype)), copy.deepcopy(half).float()(x), tolerance)  # of the weights that half has


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_translator_trains_under_autocast_quantised_or_not(dtype, bits):
    model = Translator(TRANSLATION, 40, TOKEN_ARCH, dropout=0.1)
    if bits:
        quantise(model, bits)
    with torch.autocast("cpu", dtype):
        logits = model(*SENTENCES)
    F.cross_entropy(logits.flatten(0, 1).float(), SENTENCES[1].flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_translator_works_in_every_dtype(dtype):
    model = Translator(TRANSLATION, 40, TOKEN_ARCH).to(dtype).eval()
    exact = copy.deepcopy(model).double()
    assert_near(model(*SENTENCES), exact(*SENTENCES), 4 * TOLERANCES[dtype])
    model.train()(*SENTENCES).float().sum().backward()


# -------------------------------------------------------------------------------------------- transforms


def make_network():
    return build(SMALL, ARCH).eval()


def make_supernet():
    return Supernet(SMALL, "heterogeneous").eval()


def make_translator():
    return Translator(TRANSLATION, 40, TOKEN_ARCH).eval()


def make_quantised():
    return quantise(make_translator(), 8)


def make_token_supernet():
    return Translator(TRANSLATION, 40, sharing="heterogeneous").eval()


def images(count=3, side=28, seed=0):
    return torch.randn(count, 1, side, side, generator=rng(seed))


MODELS = {  # what makes the model -> the arguments of its forward
    make_network: (images(),),
    make_supernet: (images(), ARCH),
    make_translator: SENTENCES,
    make_quantised: SENTENCES,
    make_token_supernet: (*SENTENCES, TOKEN_ARCH),
}
VISION = [make_network, make_supernet]


def name_of(function):
    return function.__name__


def outputs_and_gradients(model, inputs):
    """Return the logits and the gradient of each parameter that they depend on, by name."""
    model.zero_grad()
    logits = model(*inputs)
    with shiftaddnas.seeded(0):  # gradients of few bits are rounded at random
        logits.square().sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_models(model, other, inputs):
    logits, gradients = outputs_and_gradients(model, inputs)
    other_logits, other_gradients = outputs_and_gradients(other, inputs)
    assert_near(other_logits, logits)
    assert gradients.keys() == other_gradients.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient)


@pytest.mark.parametrize("make", [*VISION, make_token_supernet], ids=name_of)
def test_functional_call_uses_the_weights_that_it_gets_and_leaves_the_model_as_it_was(make):
    model, inputs = make(), MODELS[make]
    before = model(*inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert_near(functional_call(model, dict(other.named_parameters()), inputs), other(*inputs))
    assert model(*inputs).equal(before)  # a weight that several layers share is set and restored once
    assert all(p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("make", VISION, ids=name_of)
def test_gradients_of_single_images_add_up_to_that_of_the_batch(make):
    model, (x, *arch) = make(), MODELS[make]
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, image):
        return functional_call(model, weights, (image[None], *arch)).square().sum()

    single = vmap(grad(loss), (None, 0))(weights, x)
    _, gradients = outputs_and_gradients(model, (x, *arch))
    for name, gradient in gradients.items():
        torch.testing.assert_close(single[name].sum(0), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", VISION, ids=name_of)
def test_an_ensemble_of_weights_and_images_runs_as_its_members(make):
    model, (x, *arch) = make(), MODELS[make]
    weights = {name: torch.stack([p.detach(), 1.1 * p.detach()]) for name, p in model.named_parameters()}
    both = torch.stack([x, x + 1])
    logits = vmap(lambda weights, x: functional_call(model, weights, (x, *arch)))(weights, both)
    for i in range(2):
        member = {name: p[i] for name, p in weights.items()}
        assert_near(logits[i], functional_call(model, member, (both[i], *arch)))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("operator", [add_conv2d, shift_conv2d])
@pytest.mark.parametrize("settings", [(2, 1, 2, 1), ((2, 1), (0, 1), 1, (1, 2)), (1, "same", 2, 1)], ids=str)
def test_vmap_over_images_weights_or_both_equals_a_loop_gradients_too(operator, in_dims, settings):
    x = torch.randn(3, 2, 4, 6, 7, generator=rng()).double()
    w = torch.randn(3, 6, 4 // settings[2], 3, 3, generator=rng(1)).double()

    def gradients(x, w):
        return grad(lambda x, w: operator(x, w, *settings).square().sum(), (0, 1))(x, w)

    arguments = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((x, w), in_dims)]
    mapped = vmap(gradients, in_dims)(*arguments)
    for i in range(3):
        single = gradients(*[t[0] if dim is None else t[i] for t, dim in zip((x, w), in_dims)])
        for result, expected in zip(mapped, single):
            torch.testing.assert_close(result[i], expected)


def test_jacrev_has_the_gradient_of_each_output_in_a_row():
    x = torch.randn(1, 2, 4, 4, generator=rng())
    w = torch.randn(3, 2, 3, 3, generator=rng(1), requires_grad=True)
    rows = jacrev(add_conv2d, 1)(x, w)  # (1, 3, 2, 2) outputs x (3, 2, 3, 3) weights
    y = add_conv2d(x, w)
    for index in itertools.product(range(3), range(2), range(2)):
        (gradient,) = torch.autograd.grad(y[0][index], w, retain_graph=True)
        torch.testing.assert_close(rows[0][index], gradient)


def test_roundings_have_the_derivative_1_in_the_transforms_of_torch():
    x = torch.randn(4, 5, generator=rng())
    for rounding in (power_of_two, fixed_point):
        value, tangent = jvp(rounding, (x,), (torch.full_like(x, 3.0),))
        assert value.equal(rounding(x)) and tangent.eq(3).all()
        assert grad(lambda x: rounding(x).sum())(x).eq(1).all()


def test_the_shift_operator_has_a_convolutions_forward_derivative_behind_its_roundings():
    x, tangent_x = torch.randn(2, 2, 4, 5, 5, generator=rng()).double()
    w, tangent_w = torch.randn(2, 6, 4, 3, 3, generator=rng(1)).double()
    y, tangent = jvp(shift_conv2d, (x, w), (tangent_x, tangent_w))
    torch.testing.assert_close(y, shift_conv2d(x, w))
    expected = F.conv2d(tangent_x, power_of_two(w)) + F.conv2d(fixed_point(x), tangent_w)
    torch.testing.assert_close(tangent, expected)


def test_the_add_operator_refuses_what_its_surrogate_gradient_does_not_have():
    x = torch.randn(2, 4, 5, 5, generator=rng(), requires_grad=True)
    w = torch.randn(6, 4, 3, 3, generator=rng(1), requires_grad=True)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        jvp(lambda x: add_conv2d(x, w), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        add_conv2d(x, torch.autograd.forward_ad.make_dual(w, w))
    (gradient,) = torch.autograd.grad(add_conv2d(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(lambda x: grad(lambda x: add_conv2d(x, w).sum())(x).sum())(x)
    g, v = torch.randn(2, 6, 3, 3, generator=rng(2)), torch.randn(w.shape, generator=rng(3))
    (gradient,) = torch.autograd.grad((g * add_conv2d(x, w)).sum(), w, create_graph=True)  # sum g (x - w)
    (second,) = torch.autograd.grad((v * gradient).sum(), w)
    torch.testing.assert_close(second, -v * g.sum((0, 2, 3)).view(-1, 1, 1, 1))


# ------------------------------------------------------------------------------- export, compile and trace


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["a/t", "s/ac"])
def test_an_exported_network_takes_batches_and_images_of_other_sizes(arch):
    network = build(SMALL, arch).eval()
    Dim = torch.export.Dim
    sizes = {0: Dim("batch")}
    shapes = [(1, 28), (5, 28)]
    if "t" not in arch or torch.__version__ >= "2.13":  # before, attention fixes the parity of the sides
        sizes |= {2: Dim("rows", min=17, max=64), 3: Dim("columns", min=17, max=64)}
        shapes += [(2, 17), (5, 45)]
    program = torch.export.export(network, (images(),), dynamic_shapes=(sizes,)).module()
    for count, side in shapes:
        assert_near(program(images(count, side)), network(images(count, side)))


COMPILED = {  # name -> what makes the model, the arguments of its forward
    "network": (lambda: build(SMALL, "s/a"), (images(),)),
    "extracted": (lambda: Supernet(SMALL, "heterogeneous").extract("a/t"), (images(),)),
    "supernet": (lambda: Supernet(SMALL, "heterogeneous"), (images(), "a/s")),
}


@pytest.mark.parametrize("name, backend", [
    ("supernet", "eager"), *[pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in COMPILED],
])  # fmt: skip
def test_networks_compile_without_a_graph_break(name, backend):
    torch._dynamo.reset()
    make, inputs = COMPILED[name]
    model = make().train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    logits, gradients = outputs_and_gradients(model, inputs)
    results, compiled_gradients = outputs_and_gradients(compiled, inputs)
    assert_near(results, logits)
    for name, gradient in gradients.items():
        result = compiled_gradients[f"_orig_mod.{name}"]
        torch.testing.assert_close(result, gradient, rtol=1e-3, atol=1e-4)


X, W = torch.randn(2, 4, 5, 5, generator=rng()), torch.randn(12, 4, 1, 1, generator=rng(1))
TOKENS, TAPS = torch.randn(2, 7, 8, generator=rng(2)), torch.randn(2, 3, generator=rng(3))
TRACED = {  # name -> function, its tensors
    "conv2d": (shiftaddnas.conv2d, (X, W)),
    "shift_conv2d": (shift_conv2d, (X, W)),
    "add_conv2d": (add_conv2d, (X, W)),
    "add_conv2d, dilated": (lambda x, w: add_conv2d(x, w, (1, 2), "valid", 1, 2), (X, W)),
    "add_linear": (add_linear, (TOKENS, torch.randn(3, 8, generator=rng(4)))),
    "attention2d": (lambda x, w: attention2d(x, w, 2), (X, W)),
    "mix_tokens conv": (lambda u, w: mix_tokens("conv", u, w, False), (TOKENS, TAPS)),
    "mix_tokens add": (lambda u, w: mix_tokens("add", u, w, True), (TOKENS, TAPS)),
    "attend": (lambda q, k: attend(q, k, k, 2, None), (TOKENS, TOKENS)),
}


@pytest.mark.filterwarnings("ignore")  # of jit.trace, which is to go, and about sizes, which it fixes
@pytest.mark.parametrize("name", TRACED)
def test_a_traced_operator_equals_the_operator_on_other_numbers(name):
    operator, tensors = TRACED[name]
    traced = torch.jit.trace(operator, tensors)
    others = [tensor.flip(-1) + 0.1 for tensor in tensors]
    torch.testing.assert_close(traced(*others), operator(*others))


# ------------------------------------------------------------------------------------------------- copies


def pickled(model, make):
    return pickle.loads(pickle.dumps(model))


def saved(model, make):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def assigned(model, make):
    with torch.device("meta"):
        empty = make()
    empty.load_state_dict(model.state_dict(), assign=True)
    return empty


def averaged(model, make):
    average = AveragedModel(model)
    average.update_parameters(model)
    return average.module


def emptied(model, make):
    """Make the model on the meta device, give it memory that holds NaN, and load: as FSDP does."""
    with torch.device("meta"):
        empty = make()
    empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.fill_(math.nan if tensor.is_floating_point() else -1)
    empty.load_state_dict(model.state_dict())
    return empty


def deep_copied(model, make):
    return copy.deepcopy(model)


@pytest.mark.parametrize("make", MODELS, ids=name_of)
@pytest.mark.parametrize("way", [deep_copied, pickled, saved, assigned, averaged, emptied], ids=name_of)
def test_a_copy_has_the_outputs_and_gradients_of_the_original(way, make):
    model = make()
    assert_equal_models(model, way(model, make), MODELS[make])


# ----------------------------------------------------------------------------------------------- layouts


def test_add_conv2d_takes_empty_batches_and_odd_layouts():
    w = torch.randn(5, 3, 3, 3, generator=rng())
    assert add_conv2d(torch.empty(0, 3, 6, 6), w).shape == (0, 5, 4, 4)
    x = torch.randn(2, 3, 6, 7, generator=rng(1))
    y = add_conv2d(x, w, padding=1)
    for layout in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert add_conv2d(layout, w, padding=1).equal(y)


@pytest.mark.parametrize("kernels, dtype, layout", [
    ("", torch.float32, torch.channels_last),
    *itertools.product(("", "off"), (torch.float64,), (torch.contiguous_format, torch.channels_last)),
], ids=str)  # fmt: skip
def test_the_add_operator_and_its_gradient_are_clean_operators_of_torch(kernels, dtype, layout, monkeypatch):
    monkeypatch.setenv("SHIFTADDNAS_KERNELS", kernels)
    sizes = (2, 6, 3, 3), (2, 4, 5, 5), (6, 2, 3, 3)  # gradient, x, weight: stride 2, padding 1, 2 groups
    tensors = [torch.randn(size, generator=rng(), dtype=dtype).to(memory_format=layout) for size in sizes]
    torch.library.opcheck(shiftaddnas.add_conv2d_op, (*tensors[1:], 2, 1, 2))
    torch.library.opcheck(shiftaddnas.add_conv2d_grad_x_op, (*tensors, 2, 1, 2))
    layer = AddConv2d(4, 6, 3, 2, 1, groups=2, dtype=dtype).to(memory_format=layout)
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(tensors[1].requires_grad_()).sum().backward()
    assert tensors[1].grad.shape == tensors[1].shape


@pytest.mark.parametrize("name, arch", [
    ("fashion", "ca/sat/tca"), ("cifar10", "ca/sat/tca"), ("hytra", "s/a/stca/ctctc"),
    ("bossnet_t0", "c/a/scta/tctct"), ("bossnet_t1", "a/s/acts/ctctt"),
])  # fmt: skip
def test_networks_take_channels_last(name, arch):
    space = SPACES[name]
    if name not in ("fashion", "cifar10"):
        space = replace(space, widths=tuple(width // 4 for width in space.widths), head_dim=16)
        space = replace(space, depths=(tuple(map(len, arch.split("/"))),))
    network = build(space, arch).eval()
    x = torch.randn(2, space.in_channels, 32, 32, generator=rng())
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)
    y = other(x.to(memory_format=torch.channels_last))
    assert_near(y, network(x), 1e-4)
    y.sum().backward()
    Supernet(SMALL, "heterogeneous").to(memory_format=torch.channels_last)(images(), ARCH).sum().backward()


# ------------------------------------------------------------------------------------ other people's networks


def test_layers_show_their_op_and_convert_names_the_ops_there_are():
    assert str(AddConv2d(3, 4, 3)) == "AddConv2d(add, 3, 4, kernel_size=(3, 3), stride=(1, 1))"
    assert "(shift, 2, 4, kernel_size=(1, 1), stride=(2, 2))" in str(ShiftConv2d(2, 4, 1, 2))
    assert str(ShiftLinear(2, 3)).startswith("ShiftLinear(") and str(AddLinear(2, 3)).startswith("AddLinear(")
    assert "(conv1): SharedConv2d(\n        add, stride=1, padding=0" in str(Supernet(SMALL).blocks["0-0-a"])
    with pytest.raises(ValueError, match="op must be one of conv, shift, add, got 'shfit'"):
        convert(nn.Conv2d(1, 1, 1), "shfit")


def test_convert_turns_the_layers_of_any_network_in_place_and_keeps_their_parameters():
    def layers():
        with shiftaddnas.seeded(0):
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))

    model = layers()
    assert convert(model, "shift", linear=True) == 2
    assert [type(layer) for layer in model] == [ShiftConv2d, nn.ReLU, ShiftLinear]
    assert all(a.equal(b) for a, b in zip(model.parameters(), layers().parameters()))
    assert convert(model, "add", select=lambda name, layer: name == "0", linear=True) == 1
    assert type(model[0]) is AddConv2d and model[0](torch.zeros(1, 3, 3, 3)).max() <= model[0].bias.max()
    assert model[0].eta == AddConv2d(3, 4, 3).eta
    assert convert(model, "conv") == 1 and type(model[0]) is HybridConv2d
    model[0].weight.data[0] = 2
    with pytest.warns(UserWarning, match="25.0% of the weights are beyond"):
        convert(model, "shift")


@pytest.mark.parametrize("op", ["conv", "shift", "add"])
def test_a_converted_resnet_20_trains_with_plain_sgd(op):
    with shiftaddnas.seeded(0):
        network = ResNet(20, width=4)
    assert convert(network, op, lambda name, layer: name != "conv1") == 20
    x, y = stripes()
    losses, _ = train_with_sgd(network, x, y, steps=12)
    assert losses[-1] < 0.5 * losses[0]


def stripes():
    """Return 32 noisy images (32, 3, 16, 16) with one of four rows bright, and which."""
    y = torch.arange(32) % 4
    x = torch.randn(32, 3, 16, 16, generator=rng())
    x[torch.arange(32), :, 4 * y + 1] += 3
    return x, y


def train_with_sgd(network, x, y, steps):
    """Return the losses and, for each add layer, |w - w_start| / |w_start| after some steps."""
    layers = [layer for layer in network.modules() if isinstance(layer, AddConv2d)]
    before = [layer.weight.detach().clone() for layer in layers]
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moves = [(layer.weight - start).norm() / start.norm() for layer, start in zip(layers, before)]
    return losses, moves


def test_add_layers_behind_batch_norm_move_and_learn_under_plain_sgd_because_of_eta():
    x, y = stripes()
    for eta in (AddConv2d(1, 1, 1).eta, None):
        with shiftaddnas.seeded(0):
            network = ResNet(8, width=4, conv=partial(AddConv2d, eta=eta))
        losses, moves = train_with_sgd(network, x, y, steps=20)
        if eta:
            assert min(moves) > 0.2 and losses[-1] < 0.5 * losses[0]
        else:
            assert max(moves) < 0.05


def test_the_networks_of_this_file_leave_the_gradient_of_their_add_layers_as_it_is():
    supernet = Supernet(SMALL, "heterogeneous")
    for network in (build(SMALL, "a/ac"), supernet, supernet.extract("a/ac")):
        layers = [layer for layer in network.modules() if isinstance(layer, AddConv2d)]
        assert layers and all(layer.eta is None for layer in layers)


# ------------------------------------------------------------------------------------------ archs as text


def test_an_arch_is_read_from_text_and_file(tmp_path):
    file = tmp_path / "winner.json"
    file.write_text(json.dumps({"space": "fashion", "arch": "cs/sat/cc"}))
    for text in ("cs/sat/cc", str(file), file.read_text()):
        assert read_arch(FASHION, text) == "cs/sat/cc"
    with pytest.raises(ValueError, match="holds an arch of space fashion, not of hytra"):
        read_arch(HYTRA, str(file))
    with pytest.raises(ValueError, match="none.json does not exist"):
        read_arch(FASHION, "none.json")
    with pytest.raises(ValueError, match="unknown space 'mnist'; known: fashion, hytra"):
        find_space("mnist")


def test_a_budget_and_a_table_refer_to_archs_of_the_same_depths():
    pures = FASHION.pures()
    assert list(pures) == ["all-conv", "all-shift", "all-add"] and pures["all-shift"][2] == "ss/sss/ss"
    assert [len(set(archs)) for archs in pures.values()] == 3 * [len(FASHION.depths)]
    assert FASHION.reference("cs/sat/cc") == "cc/ccc/cc"
    assert FASHION.pure("t", "cs/sa/cc") == "cc/tt/tt"  # stage 1 offers no attention
    assert len(set(FASHION.cheapest())) == 4 * len(FASHION.depths)


def test_archs_of_a_space_of_more_than_2_to_the_63_are_drawn_uniformly():
    space = replace(HYTRA, name="huge", depths=((20, 20, 20, 20),))
    assert space.size() == 3**20 * 3**20 * 4**20 * 2**20 > 2**63
    generator = rng()
    archs = [space.validate(space.sample(generator)) for _ in range(50)]
    assert len(set(archs)) == 50 and archs[0] == space.sample(rng())
    counts = [sum(arch.split("/")[stage].count("c") for arch in archs) / 1000 for stage in range(4)]
    for count, share in zip(counts, (1 / 3, 1 / 3, 1 / 4, 1 / 2)):
        assert count == pytest.approx(share, abs=0.06)  # four standard deviations

"""ShiftAddNAS (You, Li, Shi, Fu, Lin; ICML 2022, arXiv:2205.08119) in one file.

Multiplications cost energy; shifts and additions are cheap but weaker. A ShiftAddNAS network picks
attention, convolution, shift or add for every block. A supernet holds all of these networks at once and is
trained so that the best mix for an energy budget can be searched.

Reading order
    §1 rounding      power_of_two, fixed_point: weights and activations on a shift's grid
    §2 operators     add_conv2d, shift_conv2d, attention2d: pure functions of (x, weight, ...)
    §3 sharing       SharedWeight: one tensor that conv, shift and add read, add through T(w); the divergence
    §4 torch         the add operator's arguments, dtypes, autograd, vmap and compiled kernels
    §5 blocks        AddConv2d, ShiftConv2d: drop-in layers; convert; Block: one bottleneck of any op
    §6 space         SearchSpace: size, sample, validate, mutate, crossover of arch strings; SPACES
    §7 supernet      Supernet(x, arch), Supernet.extract(arch), build(space, arch)
    §8 tokens        mix_tokens, attend: operators on (B, T, C); TokenSpace: archs of Transformers
    §9 Translator    the encoder-decoder of a TokenSpace, supernet or one arch

Symbols
    N batch · C, M channels in and out · H, W map · K kernel · S stride · P padding · G groups
    B, T, C batch, tokens, width · w shared weight · s, b exponent and sign of a power of two
    p bottleneck width = C_out / 4
    arch  a string, one letter a block: c convolution, s shift, a add, t attention; "/" between the
          stages. The published T0_mix_v3 is cc/cccc/sctaa/ttctt.

Where an idea of the paper stands
    hybrid search space             SPACES, SearchSpace                  §6
    shift weights (DeepShift)       power_of_two (Q), shift_weight (PS)  §1
    add layer (AdderNet)            add_conv2d §2; its gradients: _AddConv2d §4
    heterogeneous weight sharing    SharedWeight, kl_divergence (D12)    §3
    supernet loss                   train.py: cross-entropy + kl_weight * supernet.divergence(archs)
    evolutionary search             search.py;  energy and latency: cost_model.py

Does NOT include: pretrained weights, the siamese self-supervision of BossNAS, unused official variants
(8-bit adder training, deep stem).

Deviations from the official code (github.com/RICE-EIC/ShiftAddNAS, folder CV), each with its reason
    D1  Attention mixes values with softmax rows of the queries. Theirs uses the transposed matrix, so the
        weights that reach one output position do not sum to 1 (kept for published checkpoints).
    D2  The strided add gradient divides by the stride before it tests the range. Theirs tests first and
        loses up to 75 % of the input gradient.
    D3  The slopes of T start at the map from the Gaussian to a Laplacian. Theirs start as noise, which flips
        the sign of half of the bins, and send the largest weight to 0.
    D4  The divergence compares distributions. Theirs compares a softmax over positions with noise.
    D5  Shared weights start with the fan-in standard deviation (theirs N(0, 1)), and the add gradient on
        them is left as it is (theirs is normalised to eta, 2,000 times as long as a convolution's).
    D6  Only cells that some arch can reach are built (136.8 of 615.4 million parameters in `hytra`).
    D7  Crossover keeps the depth pattern of one parent, so a child is always inside the space.
    D8  (folder NLP) An add over time is an add in decoding too; theirs multiplies there.
    D9  (folder NLP) Padding is masked behind the projections of a light operator, positions alternate sine
        and cosine, the light operators of a layer can share their weights (theirs never do), S is of the Q
        form, and the encoder's dropout shrinks with its width as the decoder's does.
    D10 (folder NLP) An add over time is the mean of its distances, theirs the sum. The sum is nearly constant
        and K times as long, so it drowns the token beside it in the LayerNorm. The factor can be folded into
        W2. On the embedded verses it lifts the all-add encoder from 2.2 to 13.0 BLEU.
    D11 A training step gives each operator of a position a part of the images (SearchSpace.draw); theirs
        draws one path a step.
    D12 By default conv, shift and add share a weight without T ("naive"). T ("heterogeneous", the paper's)
        makes inherited weights more accurate, but is not seen to rank networks better (results/sharing.md).
"""

import copy
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict, namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
import torch.nn.functional as F
from torch.autograd.forward_ad import unpack_dual

OPS = {"c": "conv", "s": "shift", "a": "add", "t": "attn"}

# ------------------------------------------------------------------------------------------- §1 rounding


def straight_through(x, value):
    """Return `value` with the gradient of x: d(result)/dx = 1.

    x - x.detach() is exactly 0, so the result is exactly `value`; an infinite x gives NaN. It is plain
    arithmetic, so every transform of torch.func and torch.compile can follow it.
    """
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()):
        if unpack_dual(x).tangent is None:  # no forward-mode derivative either: nothing to pass on
            return value
    return value.detach() + (x - x.detach())


def at_least_float32(x):
    """Return x in float32 if it is in half precision, else x: roundings are decided on these digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def power_of_two(weight):
    """Round a weight to the nearest signed power of two in the exponent (DeepShift-Q, 5 bits a weight).

        W = sign(w) * 2^s,  s = clip(round(log2 |w|), -15, 0);  zero stays zero

    weight any shape, float -> same shape and dtype, rounded in float32 or wider. A weight beyond +-1 becomes
    +-1. Gradient: dL/dw = dL/dW (straight through).
    Source: official modules_q.py (which clamps the parameter itself).
    """
    w = at_least_float32(weight.detach())
    exponent = w.abs().log2().round().clamp(-15, 0)  # s; log2(0) = -inf becomes -15 and meets sign 0
    value = w.sign() * exponent.exp2()
    return straight_through(weight, value.to(weight.dtype))


def shift_weight(shift, sign):
    """Return the power-of-two weight of its own exponent and sign parameters (DeepShift-PS, 5 bits).

        W = b * 2^s,  s = round(clip(shift, -14, 0)),  b = sgn(round(sign)) in {-1, 0, 1}

    shift and sign have one shape, else ValueError. |sign| <= 0.5 gives 0. Gradients as the official ste.py:
    dL/dshift = dL/dW * b * 2^s * ln 2 and dL/dsign = dL/dW (not times 2^s); round and clip pass the gradient.
    """
    if shift.shape != sign.shape:
        raise ValueError(f"shift {tuple(shift.shape)} and sign {tuple(sign.shape)} must have one shape")
    b = sign.detach().round().sign()  # -1, 0 or 1
    s = straight_through(shift, shift.detach().clamp(-14, 0).round())
    return straight_through(sign, torch.zeros_like(b)) + b * torch.exp2(s)


def fixed_point(x):
    """Round down to a fixed-point grid of 16 integer and 16 fraction bits.

        y = clip(floor(x * 2^16) / 2^16, -2^15, 2^15 - 1)

    x any shape, float -> same shape and dtype, rounded in float32 or wider (x * 2^16 overflows float16).
    Gradient: straight through, clipped values included. The official "quant_bits=16" is the length of the
    fraction. Source: official deepshift/utils.py.
    """
    value = at_least_float32(x.detach()).clamp(-(2.0**15), 2.0**15 - 1)
    value = value.mul_(2.0**16).floor_().mul_(2.0**-16)
    return straight_through(x, value.to(x.dtype))


# ------------------------------------------------------------------------------------------ §2 operators


def add_conv2d(x, weight, stride=1, padding=0, groups=1, dilation=1):
    """Adder convolution: return minus the L1 distance between each patch and each filter (AdderNet).

        y[n,m,i,j] = - sum_{c,u,v} | x[n, g(m)*C/G + c, i*S+u-P, j*S+v-P] - weight[m,c,u,v] |

    x (N, C, H, W) float, weight (M, C/G, KH, KW) same device -> (N, M, H', W'), H' = (H + 2P - KH)//S + 1.
    stride, padding and dilation are ints or pairs, padding may be "same", as in F.conv2d.
    Zero padding is not neutral: a padded tap costs |weight|.  The output is never positive.
    Gradient (not the true one):  dy/dweight = x - weight,  dy/dx = clip(weight - x, -1, 1). The latter has no
    derivative of its own, and there is none in forward mode: asking for either is an error.
    dtypes: float16 and bfloat16 are computed in float32 and rounded once; under autocast x and weight are
    taken in float32 and the result is float32. Sums are float32 in kernels.cu; where x and weight nearly
    cancel (a common offset) |x - w| itself is summed: an offset of 100 leaves a relative error below 1e-4.
    Raises ValueError if shapes, dtypes or devices do not fit.
    """
    stride, pads, dilation = conv_arguments(x.shape, weight.shape, stride, padding, groups, dilation)
    x, weight, dtype = add_dtypes(x, weight)
    if stride[0] == stride[1] and len(set(pads)) == 1 and dilation == (1, 1):
        y = _AddConv2d.apply(x, weight, stride[0], pads[0], groups)
    else:
        y = add_conv2d_general(F.pad(x, pads), weight, stride, groups, dilation)
    return y.to(dtype)


def add_patches(x, w, shape):
    """Yield (images, patches (n, G, C/G*KH*KW, L), filters (G, M/G, C/G*KH*KW)) for about 64 MB of images."""
    K = w[0].numel()  # taps of a filter
    L = shape.Ho * shape.Wo  # positions of the result
    step = max(1, 2**24 // max(1, shape.G * K * L))
    filters = w.reshape(shape.G, -1, K)  # (G, M/G, K)
    for n in range(0, shape.N, step):
        patches = F.unfold(x[n : n + step], (shape.KH, shape.KW), padding=shape.P, stride=shape.S)
        yield slice(n, n + step), patches.view(-1, shape.G, K, L), filters


def add_conv2d_definition(x, w, shape):
    """Compute add_conv2d in plain torch: unfold, then the L1 distance of each patch to each filter."""
    y = x.new_zeros(shape.N, shape.M, shape.Ho, shape.Wo)
    if y.numel():
        for images, patches, filters in add_patches(x, w, shape):
            distance = torch.cdist(filters, patches.transpose(2, 3), p=1)  # (n, G, M/G, L)
            y[images] = -distance.view_as(y[images])
    return y


def add_conv2d_grad_x_definition(g, x, w, shape):
    """Compute the gradient of add_conv2d for x in torch: the sum of g * clip(w - x, -1, 1)."""
    grad = x.new_zeros(x.shape)
    if x.numel() and g.numel():
        for images, patches, filters in add_patches(x, w, shape):
            g_rows = g[images].reshape(len(patches), shape.G, -1, shape.Ho * shape.Wo)  # (n, G, M/G, L)
            columns = torch.zeros_like(patches)  # the gradient of each patch
            for m in range(shape.M // shape.G):
                slope = (filters[:, m, :, None] - patches).clamp(-1, 1)  # (n, G, K, L)
                columns += g_rows[:, :, m, None] * slope
            kernel = (shape.KH, shape.KW)
            grad[images] = F.fold(
                columns.flatten(1, 2), (shape.H, shape.W), kernel, padding=shape.P, stride=shape.S
            )
    return grad


def add_linear(x, weight):
    """Return y[..., m] = - sum_c |x[..., c] - weight[m, c]|, a 1x1 add_conv2d. x (..., C), weight (M, C)."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x (..., C) and weight (M, C) must share C: x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    rows = x.reshape(-1, x.shape[-1])  # (rows, C)
    y = add_conv2d(rows[:, :, None, None], weight[:, :, None, None])  # (rows, M, 1, 1)
    return y.view(*x.shape[:-1], len(weight))


def shift_conv2d(x, weight, stride=1, padding=0, groups=1, dilation=1):
    """Convolve with powers of two: on fixed-point inputs each product is a bit shift.

        y = conv2d(fixed_point(x), power_of_two(weight))

    x (N, C, H, W), weight (M, C/G, KH, KW) -> (N, M, H', W') as F.conv2d, with its stride, padding and
    dilation. A weight that is 0 or a power of two from 2^-15 to 1 is used as it is, beyond +-1 as +-1.
    Gradients: convolution's, straight through both roundings. Raises ValueError (shapes, stride, groups).
    Source: official deepshift/modules_q.py.
    """
    return conv2d(fixed_point(x), power_of_two(weight), stride, padding, groups, dilation)


def conv2d(x, weight, stride=1, padding=0, groups=1, dilation=1):
    """Return F.conv2d without bias, with the checks and the argument order of the other two operators."""
    conv_arguments(x.shape, weight.shape, stride, padding, groups, dilation)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


OPERATORS = {"conv": conv2d, "shift": shift_conv2d, "add": add_conv2d}


def attention2d(x, weight, head_dim, official=False):
    """Apply multi-head self-attention over the positions of a map.

        q, k, v = split(weight * x);  y[:, i] = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v[:, j]

    x (N, C, H, W), weight (3C, C, 1, 1) -> (N, C, H, W), C / head_dim heads. The weights that enter one
    output position sum to 1; official=True has the transposed matrix instead, for published weights (D1).
    Raises ValueError if head_dim does not divide C. Source: official hytra_ops.py, Attention.
    """
    N, C, H, W = x.shape
    if C % head_dim:
        raise ValueError(f"head_dim must divide the {C} channels, got {head_dim}")
    tokens = x.flatten(2).mT  # (N, HW, C)
    qkv = F.linear(tokens, weight[:, :, 0, 0]).view(N, H * W, 3, C // head_dim, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (N, heads, HW, head_dim)
    if official:
        scores = q @ k.transpose(2, 3) * head_dim**-0.5  # (N, heads, HW, HW)
        y = scores.softmax(3).transpose(2, 3) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v)  # (N, heads, HW, head_dim)
    return y.transpose(2, 3).reshape(N, C, H, W)


# ------------------------------------------------------------------------------------------- §3 sharing

BINS = 100  # slopes of T
REACH = 5.0  # the bins of T cut -REACH std .. REACH std


def laplace_slopes(gain):
    """Return T(w) / w at the centre of each bin, for the T that SharedWeight starts with."""
    centre = REACH * ((2 * torch.arange(BINS) + 1) / BINS - 1)  # in units of std
    size = centre.abs().clamp_min(1e-3)
    return -gain * (math.log(2) + torch.special.log_ndtr(-size)) / size


class SharedWeight(nn.Module):
    """One latent tensor w that convolution, shift and add read in their own way (the paper's second enabler).

        conv   w                                     target density N(0, std^2), std = sqrt(2 / fan_in)
        shift  sign(w) 2^round(log2|w|)              rounded inside shift_conv2d, gradient straight through
        add    T(w) = slope[bin(w / std)] * w        target density Laplace(0, b), b = gain * std

    T is piecewise linear, with a learnable slope for each of BINS equal bins of -REACH std .. REACH std, the
    outer ones open. The slopes start at the map from the Gaussian to the Laplacian, quantile to quantile,
    T(w) = F_Laplace^-1(Phi(w / std)) = -sign(w) b (log 2 + log Phi(-|w| / std)), which is monotone; with
    gain = sqrt(1/2) T(w) has the variance of w. The choice of a bin carries no gradient.
    transform=False is plain sharing, the default of a supernet (D12): add reads w.
    Source: abstract; official hytra_ops_ws_dist.py (deviations D3, D4, D5).
    """

    def __init__(self, shape, ops, transform=True, gain=0.5**0.5, std=None):
        super().__init__()
        self.ops = list(ops)
        self.std = std or math.sqrt(2 / math.prod(shape[1:]))
        self.b = gain * self.std  # of the target of add
        self.w = nn.Parameter(torch.randn(shape) * self.std)
        transform = transform and "add" in ops and len(ops) > 1  # alone an add reads w
        self.slopes = nn.Parameter(laplace_slopes(gain)) if transform else None

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        """Name this module once, not once a layer: functional_call would leave its weights set for good."""
        return super().named_modules(memo, prefix)

    def weight_for(self, op):
        """Return the tensor that an op reads, connected to w and the slopes by autograd."""
        return self.transform(self.w) if op == "add" and self.slopes is not None else self.w

    def transform(self, w):
        """Return T(w) of some elements of w: one gather of slopes."""
        unit = (w.detach() / self.std + REACH) / (2 * REACH)  # -REACH std .. REACH std becomes 0 .. 1
        bins = (unit * BINS).long().clamp(0, BINS - 1)  # the outer bins are open
        slopes = self.slopes.index_select(0, bins.flatten())  # its gradient is the faster one
        return w * slopes.view_as(w)

    def sample(self, op, limit=512):
        """Return about `limit` evenly strided elements of w, for add of T(w), in units of the target."""
        step = max(1, self.w.numel() // limit)
        w = self.w.flatten()[::step]  # (n,), each of them with its gradient
        return self.transform(w) / self.b if op == "add" else w / self.std


SHARING = {  # name -> what makes the tensor that the operators of a layer share; None: each has its own
    "none": None,
    "naive": functools.partial(SharedWeight, transform=False),
    "heterogeneous": SharedWeight,
}


# the target densities, in units of std and of b
log_normal = torch.distributions.Normal(0.0, 1.0, validate_args=False).log_prob
log_laplace = torch.distributions.Laplace(0.0, 1.0, validate_args=False).log_prob


def kl_divergence(sample, log_density):
    """Estimate KL(P || q) = E_P[log p] - E_P[log q] in nats from samples of P, differentiable in them.

    sample (..., n), log_density maps a tensor to log q -> scalar, mean over the rows. The entropy comes from
    the m-spacings of the sorted sample (Vasicek), m = n^(1/3), with the exact bias for a uniform density:
    E[log(spacing)] = digamma(2m) - digamma(n + 1). Raises ValueError if n <= 2m.
    """
    n = sample.shape[-1]
    m = max(1, round(n ** (1 / 3)))
    if n <= 2 * m:
        raise ValueError(f"a divergence needs more than {2 * m} elements, got {n}")
    x = sample.sort().values  # (..., n)
    spacing = (x[..., 2 * m :] - x[..., : -2 * m]).clamp_min(1e-12)  # (..., n - 2m)
    log_p = torch.digamma(torch.tensor(2.0 * m)) - torch.digamma(torch.tensor(n + 1.0)) - spacing.log()
    return (log_p - log_density(x[..., m:-m])).mean()


def mean_divergence(readers):
    """Return the mean KL, in nats, of the densities that some layers, (SharedWeight, op) each, read.

    w has one density, whether conv or shift reads it, and T(w) has one; each counts once. 0 without a T.
    """
    densities = dict.fromkeys((shared, op == "add") for shared, op in readers if shared.slopes is not None)
    rows = defaultdict(list)  # samples of one target and length are estimated in one call
    for shared, added in densities:
        sample = shared.sample("add" if added else "conv")
        rows[log_laplace if added else log_normal, len(sample)].append(sample)
    total = sum(len(group) * kl_divergence(torch.stack(group), target) for (target, _), group in rows.items())
    return total / max(1, len(densities))


# ----------------------------------------------------------------- §4 the add operator inside torch


def conv_arguments(x_size, w_size, stride, padding, groups, dilation):
    """Check the arguments of a 2-d convolution; return stride, pads (left, right, top, bottom), dilation.

    stride, padding and dilation are ints or pairs (rows, columns); padding may be "same" or "valid".
    Raises ValueError that names the value and the sizes if anything does not fit.
    """
    sizes = f"x {tuple(x_size)}, weight {tuple(w_size)}, stride {stride}, padding {padding}, groups {groups}"
    if len(x_size) != 4 or len(w_size) != 4:
        raise ValueError(f"x and weight must have 4 dimensions: {sizes}")
    stride = pair("stride", stride, 1)
    dilation = pair("dilation", dilation, 1)
    groups, _ = pair("groups", groups, 1)
    reach = [d * (k - 1) for d, k in zip(dilation, w_size[2:])]  # rows, columns between the outer taps
    if padding == "same" and stride == (1, 1):
        pads = (reach[1] // 2, reach[1] - reach[1] // 2, reach[0] // 2, reach[0] - reach[0] // 2)
    elif isinstance(padding, str) and padding != "valid":
        raise ValueError(f"padding must be an int, a pair, 'valid', or with stride 1 'same': {sizes}")
    else:
        rows, columns = pair("padding", 0 if padding == "valid" else padding, 0)
        pads = (columns, columns, rows, rows)
    if x_size[1] != groups * w_size[1] or w_size[0] % groups or w_size[1] < 1:
        raise ValueError(
            f"channels of x must equal groups * weight.shape[1], and groups divide the filters: {sizes}"
        )
    padded = x_size[2] + pads[2] + pads[3], x_size[3] + pads[0] + pads[1]
    if min(w_size[2:]) < 1 or reach[0] >= padded[0] or reach[1] >= padded[1]:
        raise ValueError(f"the kernel must fit into the padded image: {sizes}, dilation {dilation}")
    return stride, pads, dilation


def pair(name, value, least):
    """Return an int or a pair of ints as a pair; ValueError, naming the argument, for anything else."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or any(not hasattr(number, "__index__") or number < least for number in both):
        raise ValueError(f"{name} must be an int of at least {least} or a pair of them, got {value!r}")
    return int(both[0]), int(both[1])


def add_dtypes(x, weight):
    """Return (x, weight, dtype of the result): the one place where the add operator's dtypes are decided."""
    if x.device != weight.device or not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"x and weight must be floating and on one device, got {x.dtype} on {x.device}, "
            f"{weight.dtype} on {weight.device}"
        )
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = at_least_float32(x)
        weight = weight.to(x.dtype)
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    return at_least_float32(x), at_least_float32(weight), x.dtype


def add_conv2d_general(x, weight, stride, groups, dilation):
    """Compute add_conv2d of an image that is padded already, for pairs of strides and for dilation.

    The taps of a dilated kernel meet rows a, a + d, a + 2d, ...: these rows are cut out as an image of their
    own, on which the kernel is not dilated. Strides pick from the result of stride 1.
    """
    N, C, H, W = x.shape
    dh, dw = dilation
    rows = H - dh * (weight.shape[2] - 1)  # of the result at stride 1
    columns = W - dw * (weight.shape[3] - 1)
    x = F.pad(x, (0, -W % dw, 0, -H % dh))
    phases = x.unflatten(3, (-1, dw)).unflatten(2, (-1, dh))  # (N, C, H/dh, dh, W/dw, dw)
    phases = phases.permute(3, 5, 0, 1, 2, 4).flatten(0, 2)  # (dh dw N, C, H/dh, W/dw)
    y = _AddConv2d.apply(phases, weight, 1, 0, groups)  # (dh dw N, M, H'/dh, W'/dw)
    y = y.unflatten(0, (dh, dw, N)).permute(2, 3, 4, 0, 5, 1)  # (N, M, H'/dh, dh, W'/dw, dw)
    y = y.flatten(4, 5).flatten(2, 3)[:, :, :rows, :columns]
    return y[:, :, :: stride[0], :: stride[1]]


# sizes of one convolution, in the order of struct ConvShape in kernels.cu
ConvShape = namedtuple("ConvShape", "N C H W M KH KW S P G Ho Wo")


def conv_shape(x_size, w_size, stride, padding, groups):
    """Return the ConvShape of x (N, C, H, W) and weight (M, C/G, KH, KW); ValueError if too large."""
    N, C, H, W = x_size
    M, Cg, KH, KW = w_size
    Ho = (H + 2 * padding - KH) // stride + 1  # rows of the result
    Wo = (W + 2 * padding - KW) // stride + 1
    if max(C * H * W, M * Ho * Wo, M * Cg * KH * KW) >= 2**30:
        raise ValueError(
            f"an image, its result and the weight must have fewer than 2^30 numbers: x {tuple(x_size)}, "
            f"weight {tuple(w_size)}"
        )
    return ConvShape(N, C, H, W, M, KH, KW, stride, padding, groups, Ho, Wo)


@torch.library.custom_op("shiftaddnas::add_conv2d", mutates_args=())
def add_conv2d_op(x: torch.Tensor, w: torch.Tensor, stride: int, padding: int, groups: int) -> torch.Tensor:
    """Run add_conv2d forward: a kernel where one serves this dtype and device, else the definition.

    It has no rule for vmap, so torch runs it member by member, and says so once.
    """
    shape = conv_shape(x.shape, w.shape, stride, padding, groups)
    library = kernels_for(x)
    if library is None:
        return add_conv2d_definition(x, w, shape)
    y = x.new_empty(shape.N, shape.M, shape.Ho, shape.Wo)
    return call_kernel(library, "add_conv2d_forward", shape, y, x.contiguous(), w.contiguous())


@torch.library.custom_op("shiftaddnas::add_conv2d_grad_x", mutates_args=())
def add_conv2d_grad_x_op(
    g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, stride: int, padding: int, groups: int
) -> torch.Tensor:
    """Run the gradient of add_conv2d for x, an operator that a compiled backward can hold."""
    shape = conv_shape(x.shape, w.shape, stride, padding, groups)
    library = kernels_for(x)
    if library is None:
        return add_conv2d_grad_x_definition(g, x, w, shape)
    grad = x.new_empty(x.shape)
    inputs = [tensor.contiguous() for tensor in (g, x, w)]
    return call_kernel(library, "add_conv2d_grad_x", shape, grad, *inputs)


@add_conv2d_op.register_fake
def _(x, w, stride, padding, groups):
    rows = (x.shape[2] + 2 * padding - w.shape[2]) // stride + 1
    columns = (x.shape[3] + 2 * padding - w.shape[3]) // stride + 1
    return x.new_empty(x.shape[0], w.shape[0], rows, columns)


@add_conv2d_grad_x_op.register_fake
def _(g, x, w, stride, padding, groups):
    return x.new_empty(x.shape)


class _AddGradX(torch.autograd.Function):
    """The gradient for x as a differentiable node, so that asking for its own gradient is one clear error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g, x, w, stride, padding, groups):
        return add_conv2d_grad_x_op(g, x, w, stride, padding, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("add_conv2d has no second derivative: its gradient is a surrogate")


class _AddConv2d(torch.autograd.Function):
    """The add operator with the gradients of AdderNet."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, stride, padding, groups):
        return add_conv2d_op(x, w, stride, padding, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, *ctx.geometry = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        stride, padding, groups = ctx.geometry
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _AddGradX.apply(g, x, w, stride, padding, groups)
        if ctx.needs_input_grad[1]:  # sum of g (x - w): a convolution's weight gradient, minus w sum g
            product = product_grad_w(g, x, w, stride, padding, groups)
            total = g.sum((0, 2, 3)).view(-1, 1, 1, 1)  # sum g of each filter
            grad_w = torch.addcmul(product, w, total, value=-1)
        return grad_x, grad_w, None, None, None


def product_grad_w(g, x, w, stride, padding, groups):
    """Return the weight gradient of the convolution of this geometry: sum of g * x."""
    if x.shape[2:] == w.shape[2:] == (1, 1) and padding == 0 and groups == 1:  # a linear layer: one product
        return (g[:, :, 0, 0].T @ x[:, :, 0, 0])[:, :, None, None]
    return torch.nn.grad.conv2d_weight(x, w.shape, g, stride, padding, groups=groups)


def kernels_for(x):
    """Return the compiled kernels that serve tensors like x, or None where the torch definition must.

    They serve float32 on a CPU or a GPU, and float64 on a CPU. They are compiled on first use and cached.
    SHIFTADDNAS_KERNELS=off asks for the definition. Where they cannot be had, one line says why, once.
    """
    switch = os.environ.get("SHIFTADDNAS_KERNELS", "")
    if switch not in ("", "off"):
        raise ValueError(f"SHIFTADDNAS_KERNELS={switch}: allowed are off and nothing")
    if switch == "off" or x.dtype not in (torch.float32, torch.float64):
        return None
    compiler = os.environ.get("CXX", "g++")
    library = find_kernels(x.device.type, compiler, os.environ.get("SHIFTADDNAS_CXXFLAGS"))
    if x.dtype == torch.float64 and not hasattr(library, "add_conv2d_forward_f64"):
        return None
    return library


@functools.cache
def find_kernels(device_type, compiler, tuning):
    """Return the library of one device, or None after a line that says why there is none."""
    try:
        return load_kernels(compile_commands(device_type, compiler, tuning))
    except RuntimeError as error:
        print(f"shiftaddnas: add layers run in plain torch, without kernels: {error}", file=sys.stderr)
        return None


def compile_commands(device_type, compiler, tuning):
    """Return the commands that build kernels.cu for a device, the fastest build first; else RuntimeError.

    `tuning` replaces -march=native if it is not None. A compiler may refuse that flag or -fopenmp (Apple's
    clang does); the commands without them follow.
    """
    if device_type == "cuda":
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise RuntimeError("nvcc is not on the PATH")
        major, minor = torch.cuda.get_device_capability()
        return [[nvcc, "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]]
    if device_type != "cpu":
        raise RuntimeError(f"there are none for device {device_type}")
    try:
        words = shlex.split(compiler)
    except ValueError as error:
        raise RuntimeError(f"the C++ compiler {compiler!r} cannot be split into words: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise RuntimeError(f"the C++ compiler {compiler!r} is not on the PATH")
    tunings = [["-march=native"], ["-mcpu=native"], []] if tuning is None else [shlex.split(tuning)]
    base = [*words, "-x", "c++", "-O3", "-std=c++20", "-shared", "-fPIC"]
    return [[*base, *flags, *openmp] for flags in tunings for openmp in (["-fopenmp"], [])]


def load_kernels(commands):
    """Return the library that the first working command builds; RuntimeError with the compiler's reason."""
    source = Path(__file__).with_name("kernels.cu")
    if not source.exists():
        raise RuntimeError(f"{source.name} is not beside {Path(__file__).name}")
    for command in commands:
        parts = [source.read_text(encoding="utf-8"), *command, cpu_model()]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shiftaddnas"
            cache.mkdir(parents=True, exist_ok=True)
            library, reason = open_library(command, source, cache / f"{key}.so")
        except (OSError, RuntimeError):  # no home, or it cannot be written: build for this process alone
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                library, reason = open_library(command, source, Path(folder) / f"{key}.so")
        if library is not None:
            library.status_text.restype = ctypes.c_char_p
            return library
    raise RuntimeError(f"compiling {source.name} failed: {reason}")


def open_library(command, source, file):
    """Return (library, None), built first if `file` does not exist, or (None, the compiler's last error)."""
    if not file.exists():
        part = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        run = subprocess.run([*command, str(source), "-o", str(part)], capture_output=True, text=True)
        if run.returncode or not part.exists():
            lines = (run.stderr or run.stdout).strip().splitlines()
            errors = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
            return None, f"{errors[0][:200]} (status {run.returncode} of {command[0]})"
        os.replace(part, file)  # a reader never sees half a library
    return ctypes.CDLL(str(file)), None


def cpu_model():
    """Return model and instruction sets of the CPU, for which -march=native builds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor()


def call_kernel(library, name, shape, *tensors):
    """Run one function of kernels.cu on contiguous tensors of one device and return the first, its result.

    The CPU kernels get torch's thread count, the GPU kernels torch's current stream. RuntimeError with
    function, shapes and the library's text if it fails.
    """
    result = tensors[0]
    function = getattr(library, name + ("_f64" if result.dtype == torch.float64 else ""))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    sizes = (ctypes.c_int32 * len(shape))(*shape)
    if result.device.type == "cuda":
        with torch.cuda.device(result.device):
            stream = torch.cuda.current_stream().cuda_stream
            status = function(*pointers, sizes, ctypes.c_int64(stream))
    else:
        status = function(*pointers, sizes, ctypes.c_int64(torch.get_num_threads()))
    if status:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise RuntimeError(f"{name} on {shapes}: {library.status_text(status).decode()}")
    return result


# -------------------------------------------------------------------------------------------- §5 blocks


class HybridConv2d(nn.Conv2d):
    """A drop-in nn.Conv2d whose operator is `op`: its arguments, state-dict names and padding modes.

    Here, and in the blocks of this file, op is "conv"; ShiftConv2d and AddConv2d say another. The weight
    starts as N(0, 2 / fan_in), an add's as N(0, 1) as in AdderNet; the bias starts at 0.
    """

    op = "conv"

    def reset_parameters(self):
        start(self)

    def _conv_forward(self, x, weight, bias):
        if x.dim() == 3:  # one image, as nn.Conv2d allows
            return self._conv_forward(x[None], weight, bias)[0]
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        y = OPERATORS[self.op](x, weight, self.stride, padding, self.groups, self.dilation)
        return y if bias is None else y + bias.view(-1, 1, 1).to(y.dtype)

    def extra_repr(self):
        return f"{self.op}, {super().extra_repr()}"


class ShiftConv2d(HybridConv2d):
    """A drop-in nn.Conv2d that convolves with signed powers of two (shift_conv2d).

    The parameter is the latent weight; each forward rounds it. |w| > 1 acts as 1 (power_of_two).
    """

    op = "shift"


class AddConv2d(HybridConv2d):
    """A drop-in nn.Conv2d that returns minus the L1 distance of patch and filter (add_conv2d).

    eta: the root mean square that each backward pass gives the weight's gradient (AdderNet), or None, which
    leaves it as it is. With SGD take 0.2: behind batch norm the gradient is too short to move a weight that
    starts as N(0, 1). In 20 steps of SGD 0.1, momentum 0.9, the add layers of a ResNet-8, -14 and -20 move by
    a relative 1e-5 to 6e-3 with None, and the loss stays at 2.3 to 2.5; with 0.2 by 0.5 to 1, to a loss of
    1.8 to 2.2; with 0.8 by 2 to 3, to 1.5 to 1.7. An epoch takes ResNet-14 to 13, 66 and 62 % accuracy. For
    AdamW eta does nothing, since its rate alone says how far weights move: 0.003 ends at 15 %, 0.03 at 47 %.
    Put a batch norm behind each add layer: its output is never positive, so a bare ReLU passes nothing, and
    no weight moves at any eta. `python -m results.resnet20 --add-layers` measures all this.
    """

    op = "add"
    eta = 0.2  # also of layers that convert() makes

    def __init__(self, *arguments, eta=eta, **named):
        super().__init__(*arguments, **named)
        if eta is not None and not (isinstance(eta, (int, float)) and 0 < eta < math.inf):
            raise ValueError(f"eta must be None or a number above 0, got {eta!r}")
        self.eta = eta

    def _conv_forward(self, x, weight, bias):
        if self.eta:
            weight = scale_gradient(weight, self.eta)
        return super()._conv_forward(x, weight, bias)


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled to the length eta * sqrt(numel)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w, eta):
        return w.view_as(w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.eta = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        length = ctx.eta * math.sqrt(grad.numel())  # that it is to have
        wide = at_least_float32(grad)  # the norm of half precision could overflow
        return (wide * (length / wide.norm().clamp_min(1e-12))).to(grad.dtype), None


def scale_gradient(w, eta):
    """Return w with a gradient that each backward pass scales to the length eta * sqrt(numel) (AdderNet)."""
    return _ScaledGradient.apply(w, eta)


class ShiftLinear(nn.Linear):
    """A drop-in nn.Linear with signed powers of two: y = fixed_point(x) power_of_two(W)^T + b."""

    op = "shift"

    def reset_parameters(self):
        start(self)

    def forward(self, x):
        return F.linear(fixed_point(x), power_of_two(self.weight), self.bias)


class AddLinear(nn.Linear):
    """A drop-in nn.Linear that returns minus the L1 distance of token and row: add_linear(x, W) + b."""

    op = "add"

    def reset_parameters(self):
        start(self)

    def forward(self, x):
        y = add_linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def start(layer):
    """Give a layer its first weight, N(0, 2 / fan_in) or for an add N(0, 1), and a bias of 0."""
    std = 1.0 if layer.op == "add" else math.sqrt(2 / max(1, layer.weight[0].numel()))
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) * std)
        if layer.bias is not None:
            layer.bias.zero_()


CONVS = {"conv": HybridConv2d, "shift": ShiftConv2d, "add": AddConv2d}
LINEARS = {"conv": nn.Linear, "shift": ShiftLinear, "add": AddLinear}


def convert(model, op, select=None, linear=False):
    """Turn the convolutions of any module into layers of an op, in place; return how many.

    op is "conv", "shift" or "add". select(name, layer) says which layers, default all; linear=True takes the
    nn.Linear layers too. The layers keep their parameters: a shift rounds them at each forward, so a trained
    network loses little; an add reads the same numbers as distances, so it must be trained again. Warns with
    the share of weights beyond +-1, which a shift clips. Subclasses of nn.Conv2d and nn.Linear stay as they
    are. Raises ValueError for another op.
    """
    if op not in CONVS:
        raise ValueError(f"op must be one of {', '.join(CONVS)}, got {op!r}")
    count = clipped = total = 0
    for name, layer in model.named_modules():
        if type(layer) in (nn.Conv2d, *CONVS.values()):
            kinds = CONVS
        elif linear and type(layer) in LINEARS.values():
            kinds = LINEARS
        else:
            continue
        if select is not None and not select(name, layer):
            continue
        layer.__class__ = kinds[op]  # these layers hold what nn.Conv2d and nn.Linear hold, and no more
        count += 1
        if not layer.weight.is_meta:
            clipped += int((layer.weight.detach().abs() > 1).sum())
            total += layer.weight.numel()
    if op == "shift" and clipped:
        warnings.warn(f"{clipped / total:.1%} of the weights are beyond +-1, where a shift uses +-1")
    return count


def conv_layer(op, c_in, c_out, kernel, stride=1, padding=None, groups=1, bias=False, shared=None):
    """Return the layer of an op, with its own weight or reading a SharedWeight; padding K // 2."""
    padding = kernel // 2 if padding is None else padding
    if shared is not None:
        return SharedConv2d(op, shared, stride, padding)
    settings = {"eta": None} if op == "add" else {}  # AdamW trains these networks
    return CONVS[op](c_in, c_out, kernel, stride, padding, groups=groups, bias=bias, **settings)


class SharedConv2d(nn.Module):
    """A layer of a supernet: its op reads a SharedWeight."""

    def __init__(self, op, shared, stride, padding):
        super().__init__()
        self.op = op
        self.shared = shared
        self.stride = stride
        self.padding = padding

    def forward(self, x):
        return OPERATORS[self.op](x, self.shared.weight_for(self.op), self.stride, self.padding)

    def alone(self):
        """Return the layer with a weight of its own, a copy of what this one reads."""
        weight = self.shared.weight_for(self.op).detach().clone()
        M, C, K, _ = weight.shape
        with torch.device("meta"):
            layer = conv_layer(self.op, C, M, K, self.stride, self.padding)
        layer.weight = nn.Parameter(weight)
        return layer

    def extra_repr(self):
        return f"{self.op}, stride={self.stride}, padding={self.padding}"


class SqueezeExcite(nn.Module):
    """Gate the channels of the retraining networks: x * sigmoid(W2 relu(W1 mean(x))), reduction 16."""

    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 16, 1)
        self.expand = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        gate = self.expand(F.relu(self.reduce(mean)))  # (N, C, 1, 1)
        return x * torch.sigmoid(gate)


class Attention2d(nn.Module):
    """attention2d with its own weight (3C, C, 1, 1)."""

    def __init__(self, channels, head_dim, official=False):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * channels, channels, 1, 1) * channels**-0.5)
        self.head_dim = head_dim
        self.official = official

    def forward(self, x):
        return attention2d(x, self.qkv, self.head_dim, self.official)


class Entrance(nn.Module):
    """The first half of a block: x -> (shortcut(x), act(BN(PEG(conv1 x)))).

    PEG, a depthwise 3x3 position encoding, carries the stride. The shortcut is the identity when width and
    map stay; else it projects by the block's own operator, 3x3 for a stride of 2. The retraining form
    projects by average pool and 1x1, without activation.
    """

    def __init__(self, op, c_in, c_out, stride, space, shared, suffix):
        super().__init__()
        p = c_out // 4  # width of the bottleneck
        biased = op == "conv" or op == "shift" and space.retraining  # as the official networks have it
        self.conv1 = conv_layer(op, c_in, p, 1, shared=shared.get("conv1" + suffix))
        self.peg = conv_layer(op, p, p, 3, stride, groups=p, bias=biased)
        self.bn = nn.BatchNorm2d(p)
        self.act = space.activation()
        self.shortcut = nn.Identity()
        if stride > 1 or c_in != c_out:
            kernel = 3 if stride > 1 and not space.retraining else 1
            pool = stride if space.retraining else 1
            projection = conv_layer(
                op, c_in, c_out, kernel, stride // pool, shared=shared.get("shortcut" + suffix)
            )
            parts = [projection, nn.BatchNorm2d(c_out)]
            if pool > 1:
                parts.insert(0, nn.AvgPool2d(2, pool, ceil_mode=True, count_include_pad=False))
            if not space.retraining:
                parts.append(space.activation())
            self.shortcut = nn.Sequential(*parts)

    def forward(self, x):
        h = self.act(self.bn(self.peg(self.conv1(x))))  # (N, p, H', W')
        return self.shortcut(x), h


class Block(nn.Module):
    """Residual bottleneck whose layers are all of one op: ResConv, ResShift, ResAdd or ResAtt of the paper.

        h = act(BN(PEG(conv1 x)));  h = act(BN(middle(h)));  y = act(shortcut(x) + BN(conv3 h))

    middle is a 3x3 layer of the op, or self-attention, whose block is otherwise convolutional. `entrances`
    names the inputs that the block can have, {"same": (C_in, 1), "down": (C_up, 2)}; forward picks one.
    The last BN starts at zero, so a block starts as its shortcut. `shared`: SharedWeights by layer name.
    Source: official hytra_ops.py; retraining form (SiLU, squeeze-excite, pooled shortcut): boss_candidates.
    """

    def __init__(self, op, c_out, entrances, space, shared=None):
        super().__init__()
        p = c_out // 4
        shared = shared or {}
        conv_op = "conv" if op == "attn" else op  # of what surrounds an attention
        self.op = op
        self.entrances = nn.ModuleDict()
        for name, (c_in, stride) in entrances.items():
            suffix = "_d" if name == "down" else ""
            self.entrances[name] = Entrance(conv_op, c_in, c_out, stride, space, shared, suffix)
        if op == "attn":
            self.middle = Attention2d(p, space.head_dim, space.official_attention)
        else:
            self.middle = conv_layer(op, p, p, 3, shared=shared.get("conv2"))
        self.bn2 = nn.BatchNorm2d(p)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.act = space.activation()
        self.conv3 = conv_layer(conv_op, p, c_out, 1, shared=shared.get("conv3"))
        self.gate = SqueezeExcite(c_out) if space.retraining and op != "attn" else nn.Identity()
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x, entrance="same"):
        shortcut, h = self.entrances[entrance](x)
        h = self.act(self.bn2(self.middle(h)))  # (N, p, H', W')
        y = self.gate(self.bn3(self.conv3(h)))  # (N, C_out, H', W')
        return self.act(shortcut + y)

    def readers(self, entrance):
        """Return (SharedWeight, op) of each layer on the way from one entrance that reads a shared weight."""
        parts = (self.entrances[entrance], self.middle, self.conv3)
        layers = [layer for part in parts for layer in part.modules() if isinstance(layer, SharedConv2d)]
        return [(layer.shared, layer.op) for layer in layers]


# --------------------------------------------------------------------------------------------- §6 space

# the first layers of a network: convolution, BN, activation, then a 3x3 max pool of stride 2 if pool
Stem = namedtuple("Stem", "kernel stride width pool")


@dataclass(frozen=True)
class SearchSpace:
    """A set of networks: some depth of blocks in each stage, each block one of the ops of its stage.

    An arch is a string, one letter a block and "/" between the stages: cc/sa/tt. Methods that draw take a
    torch.Generator. Raises ValueError when it is made of fields that do not fit together.
    Source: official hytra_supernet.py and hytra_paths.py (get_all_config_v2).
    """

    name: str
    image: int  # side of the square input image
    in_channels: int
    classes: int
    stem: Stem
    widths: tuple  # C_out of each stage; the bottleneck is p = C_out / 4
    strides: tuple  # stride of the first block of each stage
    ops: tuple  # letters that each stage offers
    depths: tuple  # allowed numbers of blocks, a tuple of one number a stage
    head_dim: int  # attention has p / head_dim heads
    retraining: bool = False  # the form of the official retraining networks: SiLU, squeeze-excite
    distilled: bool = False  # networks have a second classifier
    official_attention: bool = False  # the matrix of attention as published weights expect it (D1)

    def __post_init__(self):
        where = f"space {self.name}:"
        for name in ("widths", "strides", "ops", "depths"):
            if not isinstance(getattr(self, name), tuple) or not getattr(self, name):
                raise ValueError(f"{where} {name} must be a tuple of values, got {getattr(self, name)!r}")
        stages = len(self.widths)
        lists = [("strides", self.strides), ("ops", self.ops)] + [("depths", row) for row in self.depths]
        for name, value in lists:
            if not isinstance(value, tuple) or len(value) != stages:
                raise ValueError(f"{where} {name} must be a tuple of {stages} values, got {value!r}")
        numbers = [(name, (getattr(self, name),)) for name in ("image", "in_channels", "classes", "head_dim")]
        numbers += [("widths", self.widths), *lists[:1], *lists[2:]]
        for name, values in numbers:
            if any(type(value) is not int or value < 1 for value in values):
                raise ValueError(f"{where} {name} must be ints of at least 1, got {values}")
        if self.strides[0] != 1 or len(set(self.depths)) < len(self.depths):
            raise ValueError(f"{where} the first stride must be 1, and no depths may stand twice")
        for ops, width in zip(self.ops, self.widths):
            if not isinstance(ops, str) or not ops or set(ops) - set(OPS) or len(set(ops)) < len(ops):
                raise ValueError(f"{where} a stage offers {ops!r}, allowed are different letters of {[*OPS]}")
            if width % 4 or "t" in ops and width // 4 % self.head_dim:
                raise ValueError(f"{where} head_dim {self.head_dim} must divide p = {width} / 4")

    def activation(self):
        return nn.SiLU() if self.retraining else nn.ReLU()

    def sizes(self):
        """Return the number of archs of each depth pattern."""
        counts = [len(ops) for ops in self.ops]
        return [math.prod(n**depth for n, depth in zip(counts, depths)) for depths in self.depths]

    def size(self):
        """Return the number of archs, an exact integer."""
        return sum(self.sizes())

    def arch(self, index):
        """Return the arch of number `index` in 0 .. size() - 1 (mixed radix: depth pattern, then letters)."""
        for depths, size in zip(self.depths, self.sizes()):
            if index < size:
                break  # it has these depths
            index -= size  # past the archs of these depths
        stages = [""] * len(depths)
        for stage, (ops, depth) in enumerate(zip(self.ops, depths)):
            for _ in range(depth):
                index, digit = divmod(index, len(ops))
                stages[stage] += ops[digit]
        return "/".join(stages)

    def sample(self, generator):
        """Draw an arch, uniform over all archs of the space."""
        size = self.size()
        if size < 2**63:
            return self.arch(int(torch.randint(size, (), generator=generator)))
        index = 0  # more than torch counts to: 32 bits at a time, 64 more than needed make it uniform
        for _ in range(size.bit_length() // 32 + 3):
            index = (index << 32) + int(torch.randint(2**32, (), generator=generator))
        return self.arch(index % size)

    def draw(self, generator, fair=True):
        """Draw the archs of one training step, of one depth pattern, as many as the longest list of ops.

        At a position each op stands equally often among them, or once more than another (FairNAS).
        fair=False draws one arch, as published.
        """
        if not fair:
            return [self.sample(generator)]
        count = max(len(ops) for ops in self.ops)
        columns = []  # for each place in the string the letter of each arch
        for stage, ops in zip(self.sample(generator).split("/"), self.ops):
            for _ in stage:
                orders = [torch.randperm(len(ops), generator=generator).tolist() for _ in range(count)]
                letters = [ops[i] for order in orders for i in order]  # every op before one comes again
                columns.append(letters[:count])
            columns.append("/" * count)
        return ["".join(letters) for letters in zip(*columns[:-1])]

    def validate(self, arch):
        """Return the arch; ValueError that names the wrong part and what is allowed."""
        stages = arch.split("/") if isinstance(arch, str) else []
        if len(stages) != len(self.ops):
            form = f"a string of {len(self.ops)} stages joined by '/', like {self.arch(0)}"
            raise ValueError(f"arch {arch!r} must be {form} (space {self.name})")
        for number, (stage, ops) in enumerate(zip(stages, self.ops), 1):
            for letter in stage:
                if letter not in ops:
                    op = f"op {letter!r} ({OPS[letter]})" if letter in OPS else f"unknown op {letter!r}"
                    place = f"stage {number} of space {self.name}, in arch {arch!r}"
                    raise ValueError(f"{op} is not offered at {place}; allowed there: {', '.join(ops)}")
        depths = tuple(len(stage) for stage in stages)
        if depths not in self.depths:
            text, *patterns = ["-".join(map(str, pattern)) for pattern in (depths, *self.depths)]
            allowed = " ".join(patterns)
            raise ValueError(f"arch {arch!r} has {text} blocks a stage; space {self.name} allows {allowed}")
        return arch

    def mutate(self, arch, generator, op_probability=0.2, fresh_probability=0.2):
        """Change an arch by the official rule: with one probability start afresh, then redraw each op."""
        if torch.rand((), generator=generator) < fresh_probability:
            arch = self.sample(generator)
        stages = []
        for stage, ops in zip(arch.split("/"), self.ops):
            redraw = torch.rand(len(stage), generator=generator) < op_probability  # a bool a block
            choice = torch.randint(len(ops), (len(stage),), generator=generator)
            stages.append("".join(ops[i] if new else old for old, i, new in zip(stage, choice, redraw)))
        return "/".join(stages)

    def crossover(self, first, second, generator):
        """Mix two archs: the depths of one (a coin), each op from either where both have that block (D7)."""
        if torch.rand((), generator=generator) < 0.5:
            first, second = second, first
        stages = []
        for mine, other in zip(first.split("/"), second.split("/")):
            coin = torch.rand(len(mine), generator=generator) < 0.5
            other += mine[len(other) :]  # the blocks that only one has
            stages.append("".join(b if take_b else a for a, b, take_b in zip(mine, other, coin)))
        return "/".join(stages)

    def pure(self, letter, arch):
        """Return the arch of the same depths with one op everywhere, conv where a stage does not offer it."""
        stages = zip(arch.split("/"), self.ops)
        return "/".join((letter if letter in ops else "c") * len(stage) for stage, ops in stages)

    def reference(self, arch):
        """Return the arch whose energy a budget is a share of: all-conv of the same depths."""
        return self.pure("c", arch)

    def pures(self):
        """Return name -> the archs of one operator alone, one a depth pattern (stage 1 has no attention)."""
        patterns = ["/".join("c" * depth for depth in depths) for depths in self.depths]
        return {f"all-{OPS[letter]}": [self.pure(letter, arch) for arch in patterns] for letter in "csa"}

    def cheapest(self):
        """Return archs that include the cheapest of the space: one op everywhere, each depth pattern."""
        patterns = ["/".join("c" * depth for depth in depths) for depths in self.depths]
        return [self.pure(letter, pattern) for letter in OPS for pattern in patterns]

    def short(self, arch):
        """Return an arch as a line on the screen has it."""
        return arch

    def file_name(self, arch):
        """Return a name for the files of an arch: cc-sa-tt."""
        return arch.replace("/", "-")

    def walk(self, arch):
        """Return (stage, letter, entrance) of each block in order."""
        blocks = []
        for stage, letters in enumerate(self.validate(arch).split("/")):
            for i, letter in enumerate(letters):
                blocks.append((stage, letter, "down" if i == 0 and stage > 0 else "same"))
        return blocks

    def entrances(self, position, stage):
        """Return the entrances of the cell (position, stage) that some arch uses, as Block takes them."""
        starts = [sum(depths[:stage]) for depths in self.depths]  # positions where the stage can start
        inside = any(start < position < start + depths[stage] for start, depths in zip(starts, self.depths))
        entrances = {}
        if inside or position == stage == 0:
            entrances["same"] = (self.widths[stage] if position else self.block_input(), 1)
        if stage and position in starts:
            entrances["down"] = (self.widths[stage - 1], self.strides[stage])
        return entrances

    def block_input(self):
        """Return the width that enters the first block: the stem's, or p behind the input projection."""
        return self.stem.width if self.retraining else self.widths[0] // 4


# blocks of the four stages of hytra, a digit each: 16 in all
DEPTHS = "1159 1168 1249 1258 1339 1348 1447 1456 1555 2239 2248 2338 2347 2446 2455 3337 3346 3445 4444"
SPACES = {
    "fashion": SearchSpace(
        "fashion", image=28, in_channels=1, classes=10, stem=Stem(kernel=3, stride=2, width=32, pool=True),
        widths=(32, 64, 128), strides=(1, 2, 2), ops=("csa", "csat", "csat"), head_dim=16,
        depths=((2, 2, 2), (2, 2, 3), (2, 3, 2), (2, 3, 3), (2, 2, 4), (2, 4, 2)),
    ),
    "hytra": SearchSpace(
        "hytra", image=224, in_channels=3, classes=100, stem=Stem(kernel=7, stride=2, width=64, pool=True),
        widths=(128, 256, 512, 1024), strides=(1, 2, 2, 2), ops=("csa", "csa", "csat", "ct"), head_dim=64,
        depths=tuple(tuple(int(depth) for depth in pattern) for pattern in DEPTHS.split()),
    ),
}
SPACES["small"] = replace(SPACES["fashion"], name="small", depths=((2, 2, 2),))  # 2,304 archs: results/table
SPACES["cifar10"] = replace(SPACES["fashion"], name="cifar10", image=32, in_channels=3)
SPACES["cifar100"] = replace(SPACES["cifar10"], name="cifar100", classes=100)
SPACES["bossnet_t0"] = replace(
    SPACES["hytra"], name="bossnet_t0", classes=1000, widths=(256, 512, 1024, 2048), retraining=True,
    distilled=True,
)
SPACES["bossnet_t1"] = replace(SPACES["bossnet_t0"], name="bossnet_t1", strides=(1, 2, 2, 1))
TOKEN_SPACES = {}  # see §8


def find_space(name):
    """Return the space of a name, images or translation; ValueError with the names there are."""
    spaces = SPACES | TOKEN_SPACES
    if name not in spaces:
        raise ValueError(f"unknown space {name!r}; known: {', '.join(spaces)}")
    return spaces[name]


def read_arch(space, text):
    """Return the arch of a string, a JSON text or a .json file that holds one under the key "arch"."""
    is_json = text.lstrip().startswith("{")
    if is_json or text.endswith(".json"):
        try:
            content = json.loads(text if is_json else Path(text).read_text(encoding="utf-8-sig"))
            arch = content if "encoder" in content else content["arch"]
            made_for = content.get("space", space.name)
        except FileNotFoundError:
            raise ValueError(f"{text} does not exist") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{text} is not JSON with a key "arch"') from None
        if made_for != space.name:
            raise ValueError(f"{text} holds an arch of space {made_for}, not of {space.name}")
        text = space.text(arch) if isinstance(arch, dict) and hasattr(space, "text") else arch
    return space.validate(text)


# ------------------------------------------------------------------------------------------ §7 supernet


@contextmanager
def seeded(seed):
    """Start torch's global generator from `seed` inside, and leave it as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def make_stem(space):
    """Return conv, BN, activation, optional max pool; the searched form adds an input projection."""
    kernel, stride, width, pool = space.stem
    conv = conv_layer("conv", space.in_channels, width, kernel, stride)
    parts = [conv, nn.BatchNorm2d(width), space.activation()]
    if pool:
        parts.append(nn.MaxPool2d(3, 2, 1))
    if not space.retraining:  # the projection to the first bottleneck
        p = space.block_input()
        depthwise = conv_layer("conv", width, width, 1, groups=width)
        parts.append(nn.Sequential(depthwise, conv_layer("conv", width, p, 1), nn.BatchNorm2d(p)))
    return nn.Sequential(*parts)


class Head(nn.Module):
    """Global average pool and a linear classifier.

    A distilled network has a second classifier: training returns both logits, evaluation their mean.
    """

    def __init__(self, space, distilled):
        super().__init__()
        self.fc = nn.Linear(space.widths[-1], space.classes)
        self.distilled = nn.Linear(space.widths[-1], space.classes) if distilled else None

    def forward(self, x):
        x = x.mean((2, 3))  # (N, C)
        if self.distilled is None:
            return self.fc(x)
        both = self.fc(x), self.distilled(x)  # (N, classes) each
        return both if self.training else sum(both) / 2


class Network(nn.Module):
    """One fixed network: stem, blocks, head. logits = network(x), x (N, C, H, W) -> (N, classes)."""

    def __init__(self, space, arch, stem, blocks, head):
        super().__init__()
        self.space = space
        self.arch = arch
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, x):
        x = self.stem(x)  # (N, C, H', W')
        for block in self.blocks:
            x = block(x, *block.entrances.keys())  # the one that it has
        return self.head(x)


def build(space, arch, seed=0):
    """Return the network of an arch from scratch. Raises ValueError for an arch outside the space."""
    blocks = []
    with seeded(seed):
        stem = make_stem(space)
        width = space.block_input()  # channels that enter the next block
        for stage, letter, entrance in space.walk(arch):
            stride = space.strides[stage] if entrance == "down" else 1  # the first block of a stage
            blocks.append(Block(OPS[letter], space.widths[stage], {entrance: (width, stride)}, space))
            width = space.widths[stage]
        return Network(space, arch, stem, blocks, Head(space, space.distilled))


class Supernet(nn.Module):
    """All networks of a space at once: logits = supernet(x, arch), x (N, C, H, W) -> (N, classes).

    One cell per (position, stage) that some arch reaches, in it one Block per op. `sharing` says what conv,
    shift and add of a cell share: a name of SHARING, "heterogeneous" for the paper's, or a function (shape,
    ops) -> SharedWeight. Never shared: PEG, BN, attention, stem, head. A list of archs: each gets an equal
    part of the images, in their order, two at least for batch norm, so a small batch leaves the last out.
    Source: official hytra_supernet.py, hytra_supernet_ws.py, hytra_supernet_ws_dist.py.
    """

    arch = None  # it has all of them

    def __init__(self, space, sharing="naive", seed=0):
        super().__init__()
        if isinstance(sharing, str) and sharing not in SHARING:
            raise ValueError(f"unknown sharing {sharing!r}; known: {', '.join(SHARING)}")
        self.space = space
        self.sharing = sharing
        make_shared = SHARING[sharing] if isinstance(sharing, str) else sharing
        self.blocks = nn.ModuleDict()
        cells = itertools.product(range(max(map(sum, space.depths))), range(len(space.widths)))
        with seeded(seed):
            self.stem = make_stem(space)
            self.head = Head(space, distilled=False)
            for position, stage in cells:
                entrances = space.entrances(position, stage)
                if not entrances:  # no arch has this stage here (D6)
                    continue
                letters = [letter for letter in OPS if letter in space.ops[stage]]
                ops = [OPS[letter] for letter in letters if letter != "t"]  # attention shares nothing
                c_out = space.widths[stage]
                shapes = shared_shapes(entrances, c_out) if make_shared and ops else {}
                shared = {name: make_shared(shape, ops) for name, shape in shapes.items()}
                for letter in letters:
                    block = Block(OPS[letter], c_out, entrances, space, None if letter == "t" else shared)
                    self.blocks[f"{position}-{stage}-{letter}"] = block

    def path(self, arch):
        """Return (block, entrance) of each position of an arch."""
        walk = enumerate(self.space.walk(arch))
        return [(self.blocks[f"{i}-{stage}-{letter}"], entrance) for i, (stage, letter, entrance) in walk]

    def forward(self, x, arch):
        archs = [arch] if isinstance(arch, str) else arch[: max(1, len(x) // 2)]
        features = []  # (N, C, H', W') in parts
        for images, arch in zip(self.stem(x).tensor_split(len(archs)), archs):
            for block, entrance in self.path(arch):
                images = block(images, entrance)
            features.append(images)
        return self.head(torch.cat(features))

    def divergence(self, arch):
        """Return mean_divergence, in nats, of the shared weights that an arch, or a list of them, reads."""
        archs = [arch] if isinstance(arch, str) else arch
        steps = [step for arch in archs for step in self.path(arch)]
        return mean_divergence(reader for block, entrance in steps for reader in block.readers(entrance))

    def extract(self, arch):
        """Return the arch as a Network with copies of the weights it reads: equal output, nothing shared."""
        blocks = []
        for block, entrance in self.path(arch):
            block = copy.deepcopy(block)
            block.entrances = nn.ModuleDict({entrance: block.entrances[entrance]})
            for name, layer in list(block.named_modules()):
                if isinstance(layer, SharedConv2d):  # gets a weight of its own
                    block.set_submodule(name, layer.alone())
            blocks.append(block)
        return Network(self.space, arch, copy.deepcopy(self.stem), blocks, copy.deepcopy(self.head))


def shared_shapes(entrances, c_out):
    """Return name -> shape of the tensors that the operators of one cell share (PEG is never shared)."""
    p = c_out // 4
    shapes = {"conv2": (p, p, 3, 3), "conv3": (c_out, p, 1, 1)}
    for name, (c_in, stride) in entrances.items():
        suffix = "_d" if name == "down" else ""  # as Entrance names them
        shapes["conv1" + suffix] = (p, c_in, 1, 1)
        if stride > 1 or c_in != c_out:
            kernel = 3 if stride > 1 else 1
            shapes["shortcut" + suffix] = (c_out, c_in, kernel, kernel)
    return shapes


# ------------------------------------------------------------------------------ §8 operators on tokens


def mix_tokens(op, u, w, causal, past=None, adjust=None):
    """Apply a light convolution or add over time; the channels of a head share their K taps, softmax(w).

        conv  y[b,t,c] =  sum_j  softmax(w)[h(c),j] u[b,t-P+j,c]
        add   y[b,t,c] = -sum_j |u[b,t-P+j,c] - softmax(w)[h(c),j]|

    op "conv" or "add", u (B, T, C), w (H, K) -> (B, T, C), h(c) = floor(c H / C). P = K - 1 if causal, else
    (K - 1) / 2; a padded tap is u = 0, and costs an add its weight. past (B, K - 1, C): the inputs before u,
    for decoding token by token (causal only). adjust(softmax(w)) replaces the taps: dropout, quantisation.
    Raises ValueError if H does not divide C. Source: official lightconv_layer.py, lightadd_layer.py (D8).
    """
    H, K = w.shape
    C = u.shape[2]
    if C % H:
        raise ValueError(f"the heads must divide the {C} channels, got {H}")
    taps = w.softmax(1) if adjust is None else adjust(w.softmax(1))  # (H, K)
    taps = taps.repeat_interleave(C // H, 0).view(C, 1, 1, K)  # of each channel
    before = K - 1 if causal else (K - 1) // 2
    x = F.pad(u, (0, 0, before, K - 1 - before)) if past is None else torch.cat([past, u], 1)
    y = OPERATORS[op](x.mT.unsqueeze(2), taps, groups=C)  # of (B, C, 1, T + K - 1)
    return y.squeeze(2).mT


def attend(q, k, v, heads, allowed, dropout=0.0):
    """Apply multi-head attention: y = softmax(q k^T / sqrt(Q / heads)) v for each of the heads.

    q (B, T, Q), k and v (B, S, Q), allowed a boolean mask that broadcasts to (B, heads, T, S) -> (B, T, Q). A
    row with nothing allowed gives 0. Raises ValueError if heads do not divide Q.
    """
    if q.shape[2] % heads:
        raise ValueError(f"heads must divide the width {q.shape[2]}, got {heads}")
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, Q / heads)
    y = F.scaled_dot_product_attention(q, k, v, allowed, dropout)  # (B, heads, T, Q / heads)
    return y.transpose(1, 2).flatten(2)  # the heads side by side


TYPES = ("C", "A", "S", "T", "TC", "TA", "TS")  # light conv, add, shift-add; attention; half and half
SOURCES = {-1: 1, 1: 2, 2: 3}  # official code -> how many of the last encoder layers cross-attention reads


@dataclass(frozen=True)
class TokenSpace:
    """A set of encoder-decoder Transformers whose layers pick how they mix tokens.

    An arch is a string, "encoder / decoder", each "width: layer layer ...". An encoder layer is
    type-ffn-heads, a decoder layer type-ffn-heads-crossheads-memory, where memory is the number of encoder
    layers that cross-attention reads: "96: TC-256-4 C-256-4 S-128-8 / 64: TA-256-4-4-1 T-128-8-4-2". Its
    genes are the official form, part -> {"embed_dim": width, list: a value a layer}, lists as in choices().
    Heads only reshape the queries, keys and values of total width `qkv`.
    Source: official supertransformer configs (En-De v3, En-Fr and IWSLT v1).
    """

    name: str
    widths: tuple  # of the encoder and of the decoder, each has its choice
    encoder_ffn: tuple  # hidden units of a layer
    decoder_ffn: tuple
    heads: tuple
    encoder_layers: int = 6
    decoder_layers: tuple = (6, 5, 4, 3, 2, 1)  # the depth is searched
    qkv: int = 512
    kernels: tuple = (3, 7, 15, 31, 31, 31)  # taps of the light operators by layer, not searched
    light_heads: tuple = (16, 4)  # kernels of a stand-alone and of a half light operator
    tied: bool = True  # one embedding for source, target and logits; else one each

    def __post_init__(self):
        where = f"space {self.name}:"
        lists = ("widths", "encoder_ffn", "decoder_ffn", "heads", "decoder_layers", "kernels", "light_heads")
        for name in (*lists, "encoder_layers", "qkv"):
            value = getattr(self, name)
            values = value if name in lists else (value,)
            is_list = isinstance(values, tuple) and len(values) > 0
            if not is_list or not all(type(number) is int and number > 0 for number in values):
                kind = "a tuple of ints" if name in lists else "an int"
                raise ValueError(f"{where} {name} must be {kind} of at least 1, got {value!r}")
        if len(self.kernels) < max(self.encoder_layers, *self.decoder_layers):
            raise ValueError(f"{where} kernels must have an entry for each layer, got {self.kernels}")
        if any(self.qkv % heads for heads in self.heads) or any(width % 2 for width in self.widths):
            raise ValueError(f"{where} heads {self.heads} must divide qkv {self.qkv}, and 2 each width")

    def choices(self):
        """Return part -> {list: allowed values} in the order in which genes are drawn, types last."""
        heads = {"self_heads": self.heads, "cross_heads": self.heads}
        return {
            "encoder": {"ffn": self.encoder_ffn, "heads": self.heads, "types": TYPES},
            "decoder": {"ffn": self.decoder_ffn, **heads, "sources": tuple(SOURCES), "types": TYPES[3:]},
        }

    def text(self, genes):
        """Return the arch string of genes; ValueError if they are not of that form."""
        parts = []
        try:
            for part, (*names, types) in self.choices().items():
                columns = [genes[part][name] for name in (types, *names)]  # a list a field
                if part == "decoder":
                    columns[-1] = [SOURCES[source] for source in columns[-1]]
                layers = ["-".join(map(str, layer)) for layer in zip(*columns, strict=True)]  # T-256-4
                parts.append(f"{genes[part]['embed_dim']}: {' '.join(layers)}")
        except (KeyError, TypeError, ValueError):
            names = {part: ["embed_dim", *lists] for part, lists in self.choices().items()}
            raise ValueError(f"genes of space {self.name} need {names}, lists of equal length") from None
        return " / ".join(parts)

    def genes(self, arch):
        """Return the genes of an arch string; ValueError if it is not of that form."""
        codes = {count: code for code, count in SOURCES.items()}
        genes = {}
        try:
            for (part, lists), text in zip(self.choices().items(), arch.split("/"), strict=True):
                width, layers = text.split(":")  # "96", "TC-256-4 C-256-4"
                kinds, *columns = zip(*(layer.split("-") for layer in layers.split()), strict=True)
                genes[part] = {"embed_dim": int(width), "types": list(kinds)}
                for name, column in zip(list(lists)[:-1], columns, strict=True):  # types are the last list
                    genes[part][name] = [int(value) for value in column]
            genes["decoder"]["sources"] = [codes[count] for count in genes["decoder"]["sources"]]
        except (AttributeError, KeyError, ValueError):
            example = self.pure("T")
            raise ValueError(f"arch {arch!r} must be of the form {example!r} (space {self.name})") from None
        return genes

    def validate(self, arch):
        """Return the arch; ValueError that names the wrong part and what is allowed."""
        genes = self.genes(arch)
        for part, lists in self.choices().items():
            width = genes[part]["embed_dim"]
            count = len(genes[part]["types"])
            depths = (self.encoder_layers,) if part == "encoder" else self.decoder_layers
            checks = [(f"width is {width}", width, self.widths), (f"has {count} layers", count, depths)]
            for name, values in lists.items():
                checks += [(f"{name} holds {value!r}", value, values) for value in genes[part][name]]
            for problem, value, allowed in checks:  # the first that is wrong is named
                if value not in allowed:
                    raise ValueError(f"{part} {problem}; space {self.name} allows {allowed}")
        return arch

    def pure(self, kind, arch=None, pick=max):
        """Return the largest (or pick=min: smallest) arch with one type in the encoder, T in the decoder."""
        sizes = [pick(values) for values in (self.widths, self.encoder_ffn, self.decoder_ffn)]
        return self.equal_layers(kind, *sizes, pick(self.decoder_layers))

    def equal_layers(self, kind, width, encoder_ffn, decoder_ffn, depth):
        """Return the arch of equal layers: one type in the encoder, attention in the decoder."""
        heads = self.heads[len(self.heads) // 2]  # they cost nothing, so a middle number
        encoder = [f"{kind}-{encoder_ffn}-{heads}"] * self.encoder_layers
        decoder = [f"T-{decoder_ffn}-{heads}-{heads}-1"] * depth
        return f"{width}: {' '.join(encoder)} / {width}: {' '.join(decoder)}"

    def reference(self, arch):
        """Return the arch whose energy a budget is a share of: the largest with attention alone."""
        return self.pure("T")

    def pures(self):
        """Return name -> the archs with one type in the encoder, of every width, hidden layers and depth."""
        sizes = [*itertools.product(self.widths, self.encoder_ffn, self.decoder_ffn, self.decoder_layers)]
        names = {"all-attention": "T", "all-conv": "C", "all-add": "A", "all-shift": "S"}
        return {name: [self.equal_layers(kind, *row) for row in sizes] for name, kind in names.items()}

    def cheapest(self):
        """Return archs that include the cheapest of the space: one type everywhere, smallest sizes."""
        return [self.pure(kind, pick=min) for kind in TYPES]

    def short(self, arch):
        """Return an arch as a line on the screen has it: its types."""
        return " / ".join(" ".join(lists["types"]) for lists in self.genes(arch).values())

    def file_name(self, arch):
        """Return a name for the files of an arch: its types and a hash."""
        types = self.short(arch).replace(" / ", "-").replace(" ", "")
        return f"{types}-{hashlib.sha256(arch.encode()).hexdigest()[:8]}"

    def size(self):
        """Return the number of archs, an exact integer."""
        layer = {part: math.prod(map(len, lists.values())) for part, lists in self.choices().items()}
        decoders = sum(layer["decoder"] ** depth for depth in self.decoder_layers)
        return len(self.widths) ** 2 * layer["encoder"] ** self.encoder_layers * decoders

    def sample(self, generator):
        """Draw an arch, every dimension independent and uniform, the decoder's depth too (official rule)."""

        def pick(values):
            return values[int(torch.randint(len(values), (), generator=generator))]

        depths = {"encoder": self.encoder_layers, "decoder": pick(self.decoder_layers)}
        genes = {}
        for part, lists in self.choices().items():
            genes[part] = {"embed_dim": pick(self.widths)}
            for name, values in lists.items():
                genes[part][name] = [pick(values) for _ in range(depths[part])]
        return self.text(genes)

    def draw(self, generator, fair=True):
        """Draw the archs of one training step: one, as published."""
        return [self.sample(generator)]

    def mutate(self, arch, generator, probability=0.3):
        """Redraw each gene with one probability (official rule); the decoder's depth is a gene too."""
        return self.crossover(arch, self.sample(generator), generator, probability)

    def crossover(self, first, second, generator, probability=0.5):
        """Take each gene, the depth too (D7), from the second parent with a probability (official rule)."""

        def coin():
            return bool(torch.rand((), generator=generator) < probability)

        mine = self.genes(first)
        theirs = self.genes(second)
        child = {}
        for part, lists in self.choices().items():
            depth = len((theirs if coin() else mine)[part]["types"])
            child[part] = {"embed_dim": (theirs if coin() else mine)[part]["embed_dim"]}  # a width
            for name in lists:
                layers = itertools.zip_longest(mine[part][name], theirs[part][name])  # None: one is shorter
                mixed = [b if a is None or b is not None and coin() else a for a, b in layers]
                child[part][name] = mixed[:depth]
        return self.text(child)


FFN = (4096, 3072, 2048, 1024)
_SPACES = [  # name, widths, hidden units of the encoder and of the decoder, heads
    TokenSpace("wmt14_en_de", (1024, 768, 512), FFN, FFN, (16, 8, 4)),
    TokenSpace("wmt14_en_fr", (1024, 768, 512), FFN, FFN[1:], (16, 8, 4)),
    TokenSpace("iwslt14_de_en", (1024, 768, 640, 512), FFN, FFN[1:], (16, 8, 4, 2), tied=False),
    TokenSpace(  # for the embedded sentences
        "translation", (96, 64), (256, 128), (256, 128), (8, 4, 2), encoder_layers=3, decoder_layers=(2, 1),
        qkv=96, kernels=(3, 7, 15), light_heads=(8, 4),
    ),
]
TOKEN_SPACES |= {space.name: space for space in _SPACES}


# -------------------------------------------------------------------------------------- §9 Translator

PAD, EOS, UNK = range(3)  # the first ids of any vocabulary; EOS ends a sentence and starts its translation


def fake_quantise(x, low, high, bits, rounding=torch.round):
    """Round to one of 2^bits levels from low to high (broadcast); gradient straight through."""
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)  # width of a level
    level = rounding((x.detach() - low) / scale).clamp(0, 2**bits - 1)
    return straight_through(x, low + scale * level)


class _QuantisedGradient(torch.autograd.Function):
    """The identity, whose gradient is quantised to `bits` with stochastic rounding."""

    @staticmethod
    def forward(ctx, x, bits):
        ctx.bits = bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        low, high = grad.aminmax()
        return fake_quantise(grad, low, high, ctx.bits, lambda x: (x + torch.rand_like(x)).floor()), None


class Quantiser(nn.Module):
    """Fake quantisation of a layer's input (one range), weight rows and bias; the identity if bits is 0.

    The input's range is the batch's in training and a running one, r <- 0.1 r + 0.9 batch, in evaluation.
    Source: official fairseq/modules/quantize.py.
    """

    def __init__(self, bits=0):
        super().__init__()
        self.bits = bits
        self.register_buffer("range", torch.zeros(2) if bits else None)

    def forward(self, x):
        if not self.bits:
            return x
        span = torch.stack(x.detach().aminmax()) if self.training else self.range.to(x.dtype)  # low, high
        if self.training:
            self.range.lerp_(span.to(self.range.dtype), 0.9)
        return fake_quantise(x, *span, self.bits)

    def weight(self, w):
        """Quantise row by row; a vector is one row."""
        if not self.bits:
            return w
        low, high = w.detach().aminmax(dim=-1, keepdim=True)  # (rows, 1) each
        return fake_quantise(w, low, high, self.bits)


def quantise(model, bits):
    """Make the layers of a Translator quantise what they read to `bits`, except cross-attention and shift."""
    model.bits = bits
    for name, layer in model.named_modules():
        is_shift = getattr(layer, "op", None) == "shift"
        if hasattr(layer, "quantiser") and not is_shift and ".cross." not in name:
            layer.quantiser = Quantiser(bits)
    return model


class PrefixLinear(nn.Module):
    """z = W x + b with the prefix W[:out, :in] of its own or a shared weight; op "shift": powers of two.

    x (B, T, in) -> (B, T, out), by default every row of W. See Quantiser for bits.
    """

    def __init__(self, op, c_in, c_out, shared=None):
        super().__init__()
        self.op = op
        self.quantiser = Quantiser()
        self.weight = shared or SharedWeight((c_out, c_in), [op], std=math.sqrt(2 / (c_in + c_out)))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x, c_out=None):
        w = self.weight.weight_for(self.op)[:c_out, : x.shape[-1]]  # (out, in)
        w = power_of_two(w) if self.op == "shift" else self.quantiser.weight(w)
        b = self.quantiser.weight(self.bias[:c_out])  # (out,)
        z = F.linear(self.quantiser(x), w, b)  # (B, T, out)
        return _QuantisedGradient.apply(z, self.quantiser.bits) if self.quantiser.bits else z


class Attention(nn.Module):
    """Attention of x (B, T, C) to memory (B, S, C'), x itself for self-attention: (B, T, C).

    A cache, a dict that starts empty, keeps keys and values from one token to the next.
    """

    def __init__(self, qkv, width, memory_width, dropout):
        super().__init__()
        self.dropout = dropout
        self.q = PrefixLinear("conv", width, qkv)
        self.k = PrefixLinear("conv", memory_width, qkv)
        self.v = PrefixLinear("conv", memory_width, qkv)
        self.out = PrefixLinear("conv", qkv, width)

    def forward(self, x, memory, heads, allowed, cache=None):
        cache = {} if cache is None else cache
        past = cache.get("kv")  # of the tokens before, or of the memory
        if past is None or memory is x:
            new = self.k(memory), self.v(memory)
            cache["kv"] = new if past is None else [torch.cat(pair, 1) for pair in zip(past, new)]
        y = attend(self.q(x), *cache["kv"], heads, allowed, self.dropout if self.training else 0.0)
        return self.out(y, x.shape[-1])


class LightMixing(nn.Module):
    """Light operators C, A or S: u = W1 x + b1; S: u = Shift(u) + bs; y = mix_tokens(u); z = W2 y + b2.

    A and S take the mean over the K taps, y / K (D10). `letters` says which of them it can be. If several,
    they share: W1 and W2 by all, W1 read as powers of two is S's shift layer too, and the taps are one
    SharedWeight, which A and S read through its T if it has one. Padded tokens are set to 0 after the
    projections, so that a sentence's result does not depend on its batch (D9).
    Source: official lightconv_layer.py, lightadd_layer.py, lightshiftadd_layer.py.
    """

    def __init__(self, letters, width, heads, taps, causal, make_shared, dropout):
        super().__init__()
        self.causal = causal
        self.dropout = dropout
        self.quantiser = Quantiser()
        shares = len(letters) > 1 and "S" in letters
        inner = SharedWeight((width, width), ["conv", "shift"], std=width**-0.5) if shares else None  # W1
        self.first = PrefixLinear("conv", width, width, inner)
        self.shift = PrefixLinear("shift", width, width, inner) if "S" in letters else None
        self.second = PrefixLinear("conv", width, width)
        ops = ["conv"] * ("C" in letters) + ["add"] * (letters != "C")
        self.taps = (make_shared or SharedWeight)((heads, taps), ops, std=math.sqrt(2 / (heads + taps)))

    def forward(self, x, letter, keep, cache=None):
        op = "conv" if letter == "C" else "add"
        width = x.shape[-1]
        u = self.first(x, width)  # (B, T, C), as all that follow
        if letter == "S":
            u = self.shift(u, width)
        u = self.quantiser(u if keep is None else u * keep)
        w = self.taps.weight_for(op)  # (H, K)
        K = w.shape[1]
        past = None
        if cache is not None:
            past = cache.get("u", u.new_zeros(len(u), K - 1, width))
            cache["u"] = torch.cat([past, u], 1)[:, 1 - K :]  # the last K - 1 inputs
        y = mix_tokens(op, u, w, self.causal, past, self.adjust)
        return self.second(y / K if op == "add" else y, width)

    def adjust(self, taps):
        return F.dropout(self.quantiser.weight(taps), self.dropout, self.training)


class TokenBlock(nn.Module):
    """x = LN(x + mix(x)); in a decoder x = LN(x + attention(x, memory)); x = LN(x + W2 relu(W1 x)).

    mix is any of `types`: attention, a light operator, or attention on the first half of the channels and a
    light operator on the second. Weights are used by prefix: the width of x, `ffn` hidden units. memory_width
    0 makes an encoder block. Source: official transformer_super_shiftadd_v2.py, multibranch.py.
    """

    def __init__(self, types, layer, width, ffn, space, make_shared, memory_width=0, dropout=0.0):
        super().__init__()
        self.shares = make_shared is not None
        self.dropout = dropout
        self.full = max(space.widths)
        self.attention = nn.ModuleDict()  # by key
        self.light = nn.ModuleDict()
        for key in dict.fromkeys(self.key(kind) for kind in types):
            kinds = [kind for kind in types if self.key(kind) == key]
            part = width // len(kinds[0])  # all channels, or half of them
            if any(kind[0] == "T" for kind in kinds):
                self.attention[key] = Attention(space.qkv, part, part, dropout / 3)
            letters = "".join(kind[-1] for kind in kinds if kind[-1] != "T")
            if letters:
                shape = space.light_heads[len(kinds[0]) - 1], space.kernels[layer]  # heads, taps
                causal = memory_width > 0
                self.light[key] = LightMixing(letters, part, *shape, causal, make_shared, dropout / 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if memory_width else 2))
        self.cross = Attention(space.qkv, width, memory_width, dropout / 3) if memory_width else None
        self.fc1 = PrefixLinear("conv", width, ffn)
        self.fc2 = PrefixLinear("conv", ffn, width)

    def key(self, kind):
        """Return the name that types have in common if they share attention and light operator."""
        return ("whole", "split")[len(kind) - 1] if self.shares else kind

    def add_norm(self, x, y, norm):
        """Return LN(x + dropout(y)) with the prefix of the norm's parameters."""
        width = x.shape[-1]
        y = F.dropout(y, self.dropout * width / self.full, self.training)
        return F.layer_norm(x + y, (width,), norm.weight[:width], norm.bias[:width])

    def forward(self, x, kind, heads, ffn, keep, allowed, cross=None, cache=(None, None)):
        """Run the block on x (B, T, C): keep (B, T, 1) is 0 at padding; allowed: see attend.

        cross: (memory, heads, allowed) in a decoder; cache: its element of Translator.new_caches.
        """
        part = x.shape[-1] // len(kind)  # channels of each operator
        mixed = []
        if kind[0] == "T":
            first = x[..., :part]  # attention takes the first channels
            mixed.append(self.attention[self.key(kind)](first, first, heads, allowed, cache[0]))
        if kind[-1] != "T":
            mixed.append(self.light[self.key(kind)](x[..., -part:], kind[-1], keep, cache[0]))
        x = self.add_norm(x, torch.cat(mixed, -1), self.norms[0])  # (B, T, C)
        if cross is not None:
            x = self.add_norm(x, self.cross(x, *cross, cache[1]), self.norms[1])
        hidden = F.relu(self.fc1(x, ffn))  # (B, T, ffn)
        return self.add_norm(x, self.fc2(hidden, x.shape[-1]), self.norms[-1])


class Translator(nn.Module):
    """Encoder-decoder Transformer over a TokenSpace: logits = translator(source, target, arch).

    source (B, S) and target (B, T) token ids, right-padded with PAD, target shifted right behind an EOS;
    logits (B, T, V). Without `arch` it is the supernet, which runs any arch of the space, or a list of one,
    with prefixes of its weights; with one it is that network, and forward's arch can be left out. sharing: a
    name of SHARING (see LightMixing), or a function (shape, ops, std) -> SharedWeight. dropout: of
    a block of full width, in proportion below; a third of it for attention weights, a tenth for taps, as
    published (0.3, 0.1, 0.03). Raises ValueError for an arch outside the space or an unknown sharing.
    """

    bits = 0  # see quantise

    def __init__(self, space, vocabulary, arch=None, sharing="naive", seed=0, dropout=0.0):
        super().__init__()
        if isinstance(sharing, str) and sharing not in SHARING:
            raise ValueError(f"unknown sharing {sharing!r}; known: {', '.join(SHARING)}")
        self.space = space
        self.vocabulary = vocabulary
        self.sharing = sharing
        self.arch = arch and space.validate(arch)
        self.dropout = dropout
        make_shared = SHARING[sharing] if isinstance(sharing, str) else sharing
        genes = space.genes(arch or space.pure("T"))  # a supernet has the sizes of the largest arch
        encoder_width = genes["encoder"]["embed_dim"]
        width = max(encoder_width, genes["decoder"]["embed_dim"])
        with seeded(seed):
            # a tied table has one name, so that it is one tensor in a copy of the state too
            for name in ("embedding",) if space.tied else ("embedding", "target_embedding", "output"):
                setattr(self, name, nn.Parameter(torch.randn(vocabulary, width) * width**-0.5))
            for part, lists in genes.items():
                memory_width = encoder_width if part == "decoder" else 0
                rest = space, make_shared, memory_width, dropout  # what all blocks have in common
                blocks = nn.ModuleList()
                for i, (kind, ffn) in enumerate(zip(lists["types"], lists["ffn"])):
                    types = [kind] if arch else space.choices()[part]["types"]
                    blocks.append(TokenBlock(types, i, lists["embed_dim"], ffn, *rest))
                setattr(self, part, blocks)

    def genes(self, arch=None):
        """Return the genes of an arch, of a list of one, or of this network."""
        arch = arch[0] if isinstance(arch, list) else arch or self.arch
        return self.space.genes(self.space.validate(arch))

    def embed(self, tokens, table, width, start=0):
        """Return rows of an embedding times sqrt(width), plus positions from `start`: (B, T, width)."""
        full = max(self.space.widths)
        i = torch.arange(width, device=tokens.device)
        rate = torch.exp(-math.log(10000) * (i - i % 2) / full)  # of each pair of channels
        angle = torch.arange(start, start + tokens.shape[1], device=tokens.device)[:, None] * rate
        # sine and cosine alternate, so that any prefix has both (D9)
        position = torch.where(i % 2 == 0, angle.sin(), angle.cos()).to(table.dtype)  # (T, width)
        x = F.embedding(tokens, table[:, :width]) * width**0.5 + position
        return F.dropout(x, self.dropout * width / full, self.training)

    def encode(self, source, arch=None):
        """Return (outputs of the last three layers, last first; padding mask (B, S)) of source (B, S)."""
        genes = self.genes(arch)["encoder"]
        mask = source != PAD  # (B, S)
        x = self.embed(source, self.embedding, genes["embed_dim"])  # (B, S, width)
        keep = mask.unsqueeze(2).to(x.dtype)  # (B, S, 1)
        outputs = []
        for block, kind, heads, ffn in zip(self.encoder, genes["types"], genes["heads"], genes["ffn"]):
            x = block(x, kind, heads, ffn, keep, mask[:, None, None])
            outputs.insert(0, x)
        return outputs[:3], mask

    def decode(self, target, memory, arch=None, caches=None):
        """Return logits (B, T, V) of target (B, T), given what encode returned.

        caches: what new_caches returned, for decoding token by token; target is then the next token, T = 1.
        """
        genes = self.genes(arch)["decoder"]
        outputs, mask = memory
        tied = self.space.tied
        start = caches[0][0].get("tokens", 0) if caches else 0
        x = self.embed(target, self.embedding if tied else self.target_embedding, genes["embed_dim"], start)
        ones = target.new_ones(target.shape[1], target.shape[1], dtype=torch.bool)
        allowed = None if caches else ones.tril()  # no token sees the future
        for i, kind in enumerate(genes["types"]):
            count = SOURCES[genes["sources"][i]]
            keys = torch.cat(outputs[:count], 1)  # (B, count S, width)
            cross = keys, genes["cross_heads"][i], mask.repeat(1, count)[:, None, None]  # (B, 1, 1, count S)
            cache = caches[i] if caches else (None, None)
            x = self.decoder[i](x, kind, genes["self_heads"][i], genes["ffn"][i], None, allowed, cross, cache)
        if caches:
            caches[0][0]["tokens"] = start + 1  # the first counts the tokens
        return F.linear(x, (self.embedding if tied else self.output)[:, : genes["embed_dim"]])

    def new_caches(self, arch=None):
        """Return empty caches of each decoder layer, of its mixing and of its cross-attention."""
        return [({}, {}) for _ in self.genes(arch)["decoder"]["types"]]

    def forward(self, source, target, arch=None):
        return self.decode(target, self.encode(source, arch), arch)

    def divergence(self, arch):
        """Return the mean divergence, in nats, of the shared taps that the arch reads; 0 if none."""
        readers = []  # taps, and the op that reads them
        for part, lists in self.genes(arch).items():
            for block, kind in zip(getattr(self, part), lists["types"]):
                if kind[-1] != "T":  # it has a light operator
                    taps = block.light[block.key(kind)].taps
                    readers.append((taps, "conv" if kind[-1] == "C" else "add"))
        return mean_divergence(readers)

    @torch.no_grad()
    def extract(self, arch):
        """Return the arch as a Translator of its own sizes, with copies of what it reads: equal output."""
        network = Translator(self.space, self.vocabulary, arch, self.sharing, 0, self.dropout)
        for name, layer in quantise(network, self.bits).named_modules():
            whole = self.get_submodule(name)
            for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
                is_shared = isinstance(layer, SharedWeight) and key == "w"
                read = whole.weight_for(*layer.ops) if is_shared else getattr(whole, key)
                tensor.copy_(read[tuple(slice(size) for size in tensor.shape)])  # the prefix
        return network.train(self.training)

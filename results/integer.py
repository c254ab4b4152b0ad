"""Show that shift and add layers compute exactly in integers, and that a network then predicts the same.

    python -m results.integer      writes results/integer.md in 40 seconds on one thread

A hybrid network of the `fashion` space predicts test images twice: as it is, in float32, and with each
shift and add layer computed in integers of 2^-16, the weights of shifts packed into five bits.
"""

import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.images import load_images, recalibrate
from shiftaddnas import SPACES, AddConv2d, ShiftConv2d, build, fixed_point, power_of_two
from shiftaddnas import conv_arguments, conv_shape

IMAGES = 2000  # that both networks predict, the first ones of the test set


def pack_shift(weight):
    """Pack power-of-two weights of any shape into 5 bits each, lossless: uint8 (1 + ceil(5 numel / 8),).

    A weight +-2^-e, e in 0 .. 15, has the code 16 (w < 0) + e. All 32 codes are taken: if the weight has
    zeros, code 31 stands for 0 instead of -2^-15, and byte 0 is 1, else 0. ValueError for other weights.
    """
    w = weight.detach().flatten().double()
    mantissa, exponent = torch.frexp(w)  # w = mantissa 2^exponent, |mantissa| in 0.5 .. 1
    e = 1 - exponent
    zero = w == 0
    fits = zero | (mantissa.abs() == 0.5) & (e >= 0) & (e <= 15)
    codes = torch.where(zero, 31, e + 16 * (w < 0))  # (numel,)
    if not fits.all() or zero.any() and (codes == 31)[~zero].any():
        raise ValueError("5-bit codes hold +-2^-e, e in 0 .. 15, and either 0 or -2^-15, not these weights")
    bits = np.unpackbits(codes.byte().numpy()[:, None], axis=1, count=5, bitorder="little")  # (numel, 5)
    return torch.cat([zero.any().view(1), torch.from_numpy(np.packbits(bits, bitorder="little"))])


def unpack_shift(packed, shape):
    """Return the float32 weight of this shape that pack_shift packed. ValueError if the size is wrong."""
    numel = math.prod(shape)
    if packed.numel() != 1 + (5 * numel + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes do not hold {tuple(shape)} weights of 5 bits")
    bits = np.unpackbits(packed[1:].numpy(), count=5 * numel, bitorder="little").reshape(numel, 5)
    codes = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")).view(shape)  # of a byte each
    w = torch.ldexp(1.0 - 2.0 * (codes >= 16), -(codes & 15).int())
    return w.where((codes < 31) | (packed[0] == 0), 0.0)  # byte 0 says whether 31 is 0


def add_conv2d_u8(x, weight, stride=1, padding=0, groups=1):
    """Return add_conv2d of bytes, exact: -sum |x - weight|, int32 (up to 2^23 taps)."""
    shape = checked_shape(x, weight, (torch.uint8, torch.uint8), weight.shape, stride, padding, groups)
    return sum_of_taps(lambda x, w: -(x - w).abs(), x, weight.long(), shape).int()


def add_conv2d_int(x, weight, stride=1, padding=0, groups=1):
    """Return add_conv2d of int32, exact: -sum |x - weight|, int64."""
    shape = checked_shape(x, weight, (torch.int32, torch.int32), weight.shape, stride, padding, groups)
    return sum_of_taps(lambda x, w: -(x - w).abs(), x, weight.long(), shape)


def shift_conv2d_int(x, packed, shape, stride=1, padding=0, groups=1):
    """Return 2^15 * conv2d(x, unpack_shift(packed, shape)), exact: sum +-(x << (15 - e)) for weights +-2^-e.

    x (N, C, H, W) int32, packed = pack_shift(weight) of shape (M, C/G, KH, KW) -> (N, M, H', W') int64.
    """
    sizes = checked_shape(x, packed, (torch.int32, torch.uint8), shape, stride, padding, groups)
    weight = unpack_shift(packed, shape)
    # frexp says that 2^-e has the exponent 1 - e; the sign of a weight may be 0.
    return sum_of_taps(lambda x, w: w.sign().long() * (x << (w.frexp().exponent + 14)), x, weight, sizes)


def sum_of_taps(term, x, w, shape):
    """Return y (N, M, Ho, Wo) = sum over channels and taps of term(x, w), int64; padding is x = 0."""
    x = F.pad(x.long(), [shape.P] * 4)  # (N, C, H + 2P, W + 2P)
    patches = x.unfold(2, shape.KH, shape.S).unfold(3, shape.KW, shape.S)  # (N, C, Ho, Wo, KH, KW)
    groups = patches.chunk(shape.G, 1)  # (N, C/G, Ho, Wo, KH, KW) each
    w = w[:, :, None, None]  # (M, C/G, 1, 1, KH, KW)
    return torch.stack([term(groups[m * shape.G // shape.M], w[m]).sum((1, 4, 5)) for m in range(shape.M)], 1)


def checked_shape(x, w, dtypes, w_size, stride, padding, groups):
    """Return the ConvShape of the operands. ValueError if dtypes or sizes do not fit."""
    if (x.dtype, w.dtype) != dtypes:
        raise ValueError(f"this operator takes {dtypes[0]} and {dtypes[1]}, got {x.dtype} and {w.dtype}")
    conv_arguments(x.shape, w_size, stride, padding, groups, dilation=1)
    return conv_shape(x.shape, w_size, stride, padding, groups)


def integer_output(layer, x):
    """Return the float32 output of a shift or add layer, without bias, computed in integers of 2^-16."""
    geometry = (layer.stride[0], layer.padding[0], layer.groups)
    if isinstance(layer, AddConv2d):  # x and the weight are rounded to the nearest integer
        return add_conv2d_int(to_int(x), to_int(layer.weight), *geometry).double().div(2.0**16).float()
    packed = pack_shift(power_of_two(layer.weight))
    x = to_int(fixed_point(x))  # rounded down
    return shift_conv2d_int(x, packed, layer.weight.shape, *geometry).double().div(2.0**31).float()


def to_int(x):
    """Return x in units of 2^-16, rounded to int32. ValueError if it does not fit."""
    units = (x.detach().double() * 2.0**16).round()
    if units.abs().max() >= 2.0**31:
        raise ValueError(f"units of 2^-16 in 32 bits reach below 32768, got {x.abs().max().item():g}")
    return units.int()


def hybrid_network(data):
    """Return an untrained hybrid network whose every layer has a say in the logits."""
    network = build(SPACES["fashion"], "sa/ssc/sat", seed=3)
    for block in network.blocks:  # its last batch norm starts at 0, which would leave its shortcut alone
        torch.nn.init.ones_(block.bn3.weight)
    return recalibrate(network, data)


def in_integers(network):
    """Return a copy of a network whose shift and add layers compute in integers."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, (ShiftConv2d, AddConv2d)):
            layer.forward = partial(integer_output, layer)  # of this object alone
    return network


@torch.no_grad()
def predict(network, data):
    """Return the logits (images, classes) of the first IMAGES test images."""
    rows = np.arange(min(IMAGES, len(data.test_set.index)))
    return torch.cat([network(data.view(data.test_set, part)[0]) for part in np.array_split(rows, 4)])


def main():
    """Predict the test images both ways, print the report and write it."""
    data = load_images("", SPACES["fashion"])
    network = hybrid_network(data)
    wanted = predict(network, data)  # (images, classes)
    exact = predict(in_integers(network), data)
    shifts = [layer.weight for layer in network.modules() if isinstance(layer, ShiftConv2d)]
    adds = [layer.weight for layer in network.modules() if isinstance(layer, AddConv2d)]
    floats = sum(4 * weight.numel() for weight in shifts)
    packed = sum(pack_shift(power_of_two(weight)).numel() for weight in shifts)
    text = f"""# Shift and add layers in integers

`python -m results.integer` writes this file. The network is `{network.arch}` of the space `fashion` with
untrained weights (seed 3) and recalibrated batch norms; the last one of a block, which starts at 0, has the
weight 1. Each shift and add layer takes and sums integers of 2^-16; the others stay in float32.

| | |
|---|---|
| layers in integers | {len(shifts)} shift, {len(adds)} add |
| test images | {len(wanted):,} |
| equal predictions | {(wanted.argmax(1) == exact.argmax(1)).sum().item():,} |
| standard deviation of the logits | {wanted.std().item():.3f} |
| largest difference of a logit | {(wanted - exact).abs().max().item():.1e} |
| weights of the shift layers | {floats:,} bytes in float32, {packed:,} packed into 5 bits each |
"""
    print(text, end="")
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Energy and latency of conv / shift / add / attention networks on an Eyeriss-like accelerator.

Row-stationary analytical model of ShiftAddNAS (You et al., ICML 2022, abstract: "up to 93 % energy and 69 %
latency savings"; official code CV/retraining_hybrid/hw_utils.py, cal_energy.py and NLP/en-de/sim), after
Eyeriss (ISCA 2016).

    python cost_model.py --space bossnet_t0 --arch cc/cccc/sctaa/ttctt --image 224 --pe-limit 168
    python cost_model.py --table results/energy.md         every published network under both accountings

Symbols  N batch, C M channels in and out, H W input, E F output, R = S kernel; X0 register, X1 array,
         X2 buffer, X3 DRAM factor of X = N, M, C, E; a word is 16 bits. Tables in pJ, results in mJ and ms.

accounting="official" reproduces the published records, "uniform" compares like with like:

    question            official                         uniform, and why
    groups              ignored, depthwise costs dense   honoured, one group after another: absent MACs cost 0
    word width          conv, add `bits`; shift 10       activations `bits`, shift weights 5: real formats
    memory of add       DRAM, buffer, NoC free           every level: its data move like any other's
    compute             one mult, add or shift a MAC     accumulation included: conv mult + add, shift
                                                         shift + add, add subtract + accumulate
    clock               4 ns, shift 4 * 10/32 ns         4 ns: a narrower word does not speed up the array
    tiles               exact divisors, E1 > 1           a fixed ladder, the last tile partly filled: a prime
                                                         size must not cost more than the next composite one
    choice of tiling    least normalised energy          least energy, then latency: a layer's tilings fit any
                        + latency                        larger layer too, so energy is monotone

Both: batch norm, activation, pooling and softmax are free; a matmul reads its second operand once for all
heads; processing-element limit 168 (12 x 14, Eyeriss) or 192 (12 x 16): the published records mix the two.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import platform
import sys
import time
from collections import Counter, namedtuple
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from shiftaddnas import OPS, build, find_space

# pJ an operation (45 nm, ShiftAddNet Table 1; official get_unit_energy)
COMPUTE_PJ = {32: {"mult": 3.7, "add": 0.9, "shift": 0.13}, 8: {"mult": 0.2, "add": 0.03, "shift": 0.024}}
# pJ a 16-bit word: DRAM 200, the others multiples of a 3.7 pJ multiplication (Eyeriss; official
# get_unit_energy)
MEMORY_PJ = {
    "dram": 200.0,
    "buffer": 6 * 3.7,
    "noc": 2 * 3.7,
    "noc_psum": 3.7,
    "rf": 3.7,
    "rf_weight": 2 * 3.7,
}
# storage limits in words, by bits (official valid_tiling: 8 bits double the memories, quadruple the array)
LIMITS = {
    32: {"output_rf": 16, "input_rf": 12, "weight_rf": 960, "buffer": 65536, "array": 1},
    8: {"output_rf": 32, "input_rf": 24, "weight_rf": 1920, "buffer": 131072, "array": 4},
}
CYCLE_NS = 4.0  # 250 MHz
SHIFT_WEIGHT_BITS = 5  # sign and exponent (DeepShift, official weight_bits)
PRIMITIVES = {
    "conv": ("mult", "add"),
    "linear": ("mult", "add"),
    "matmul": ("mult", "add"),
    "shift": ("shift", "add"),
    "add": ("add", "add"),
}  # operations of one MAC; official counts the first
ACCOUNTINGS = ("official", "uniform")
LEVELS = ("compute", "dram", "buffer", "noc", "rf")
LADDER = np.array(sorted(k * 2**i for k in (1, 3, 7) for i in range(12)))  # tile sizes of uniform


class Layer(NamedTuple):
    """One layer as the accelerator sees it; linear and matmul are N rows of 1x1 maps."""

    op: str
    batch: int
    kernel: int
    stride: int
    in_h: int
    in_w: int
    in_c: int
    out_h: int
    out_w: int
    out_c: int
    groups: int = 1

    @property
    def macs(self):
        """Multiply-accumulates (or their shift, add counterpart), groups honoured."""
        return self.batch * self.out_h * self.out_w * self.out_c * self.kernel**2 * self.in_c // self.groups


# factors of one layer (of one group of it under uniform); N3, M3, C2, E3 are rounded up
Tiling = namedtuple("Tiling", "n0 n3 m0 m1 m2 m3 c0 c1 c2 e1 e3")


class Cost(NamedTuple):
    """energy_mj is the sum of the five levels; tiling is None for a network."""

    energy_mj: float
    latency_ms: float
    compute_mj: float
    dram_mj: float
    buffer_mj: float
    noc_mj: float
    rf_mj: float
    tiling: Tiling | None = None


# ---- 1 one layer ----


def layer_cost(layer, bits=32, accounting="official", pe_limit=192):
    """Cost of one layer with the tiling that the accounting chooses (module docstring).

    bits 32 or 8, pe_limit: M1*C1*E1*R stays below it (below 4 times it at 8 bits).
    Raises ValueError for an unknown op, accounting or bits, a size that is not a positive int, groups that do
    not divide both channels, and a layer that no tiling fits (names the limit). Example, linear 1 -> 1: I = W
    = O = 1 word of 32 bits. DRAM 3*400, buffer 2*44.4, NoC 2*14.8 + 7.4, RF 7.4 + 14.8 + 7.4, compute 3.7, in
    all 1359.1 pJ and one cycle of 4 ns (uniform: 0.9 pJ more for the accumulation).
    """
    if layer.op not in PRIMITIVES:
        raise ValueError(f"unknown op {layer.op!r}: allowed are {', '.join(PRIMITIVES)}")
    if accounting not in ACCOUNTINGS:
        raise ValueError(f"unknown accounting {accounting!r}: allowed are {', '.join(ACCOUNTINGS)}")
    if type(bits) is not int or bits not in LIMITS:
        raise ValueError(f"bits is {bits!r}: allowed are 32 and 8")
    for name, value in zip(("pe_limit",) + layer._fields[1:], (pe_limit,) + layer[1:]):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}: it must be a positive int")
    if layer.in_c % layer.groups or layer.out_c % layer.groups:
        raise ValueError(f"groups {layer.groups} must divide in_c {layer.in_c} and out_c {layer.out_c}")
    return _layer_cost(layer, bits, accounting, pe_limit)


@lru_cache(maxsize=None)
def _layer_cost(layer, bits, accounting, pe_limit):
    uniform, groups = accounting == "uniform", 1
    if uniform:
        groups = layer.groups
        layer = layer._replace(in_c=layer.in_c // groups, out_c=layer.out_c // groups, groups=1)
    limits = dict(LIMITS[bits], array=LIMITS[bits]["array"] * pe_limit)
    tiles = (_ladder_tiles if uniform else _divisor_tiles)(layer, limits)
    levels_pj, cycles, tiling = _traffic(layer, tiles, bits, uniform)
    energy_pj = sum(levels_pj)
    if uniform:
        best = np.argmin(np.where(energy_pj == energy_pj.min(), cycles, np.inf))
    else:
        best = np.argmin(
            (energy_pj - energy_pj.min()) / energy_pj.max() + (cycles - cycles.min()) / cycles.max()
        )
    levels_mj = [float(np.broadcast_to(level, cycles.shape)[best]) * groups * 1e-9 for level in levels_pj]
    cycle_ns = CYCLE_NS * 10 / 32 if layer.op == "shift" and not uniform else CYCLE_NS
    latency_ms = float(cycles[best]) * groups * cycle_ns * 1e-6
    return Cost(sum(levels_mj), latency_ms, *levels_mj, Tiling(*(int(factor[best]) for factor in tiling)))


def _traffic(layer, tiles, bits, uniform):
    """Energy by level in pJ, cycles and factors of every tiling (official get_energy, get_latency).

    tiles n0, m0, m1, m2, c0, c1, e1: arrays. The outer factors are rounded up; for divisors nothing is
    rounded.
    """
    op, n, r, _, h, w, c, e, f, m, _ = layer
    n0, m0, m1, m2, c0, c1, e1 = tiles
    n3, e3, c2, m3 = -(-n // n0), -(-e // e1), -(-c // (c0 * c1)), -(-m // (m0 * m1 * m2))
    m_passes, c_passes = -(-m // (m0 * m1)), -(-c // c0)
    weights, outputs, macs = r * r * c * m, n * e * f * m, n * e * f * m * r * r * c
    act = weight = (10 if op == "shift" and not uniform else bits) / 16  # words
    if op == "shift" and uniform:
        weight = SHIFT_WEIGHT_BITS / 16
    off_chip = 0.0 if op == "add" and not uniform else 1.0
    compute = sum(COMPUTE_PJ[bits][name] for name in PRIMITIVES[op][: 2 if uniform else 1])
    dram = off_chip * MEMORY_PJ["dram"] * (act * (n * h * w * c * m3 + outputs) + weight * weights * n3 * e3)
    buffer = (
        off_chip
        * MEMORY_PJ["buffer"]
        * act
        * (n * h * w * c * m_passes + outputs * np.maximum(2 * (c2 - 1), 1))
    )
    noc = off_chip * MEMORY_PJ["noc"] * (act * n * w * c * r * e * -(-m // m0) + weight * weights * n3 * e)
    noc = noc + MEMORY_PJ["noc_psum"] * act * outputs * np.maximum(c_passes * r - c2, 1)
    rf = MEMORY_PJ["rf"] * act * (macs + outputs * np.maximum(2 * r * (c * r - c_passes), 1))
    rf = rf + MEMORY_PJ["rf_weight"] * weight * macs
    cycles = n * f * r * m_passes * m0 * c2 * c0 * e3
    return (compute * macs, dram, buffer, noc, rf), cycles, (n0, n3, m0, m1, m2, m3, c0, c1, c2, e1, e3)


@lru_cache(maxsize=None)
def _factorisations(n, parts):
    """(parts, K) array: every ordered tuple of `parts` positive integers with product n."""
    rows = [()]
    rests = [n]
    for _ in range(parts - 1):
        pairs = [(row + (d,), rest // d) for row, rest in zip(rows, rests) for d in _divisors(rest)]
        rows, rests = zip(*pairs)
    return np.array([row + (rest,) for row, rest in zip(rows, rests)]).T


@lru_cache(maxsize=None)
def _divisors(n):
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def _cross(left, right):
    """Every pair of a column of left and a column of right."""
    return np.concatenate([np.repeat(left, right.shape[1], 1), np.tile(right, left.shape[1])])


def _keep(tiles, mask, layer, limit):
    if not mask.any():
        raise ValueError(f"no tiling fits {layer}: {limit}")
    return tiles[:, mask]


def _divisor_tiles(layer, limits):
    """n0, m0, m1, m2, c0, c1, e1 over exact divisors (official valid_tiling); E1 = 1 only on 1x1 maps and
    FC."""
    op, n, r, stride, h, w, c, e, f, m, _ = layer
    c_tiles, m_tiles, e_tiles = (
        _factorisations(c, 3)[:2],
        _factorisations(m, 4)[:3],
        _factorisations(e, 2)[:1],
    )
    c_tiles = _keep(c_tiles, c_tiles[0] * r < limits["input_rf"], layer, f"C0*S < {limits['input_rf']}")
    m_tiles = m_tiles[:, m_tiles[0] <= limits["output_rf"]]
    if op not in ("linear", "matmul") and not h == w == e == f == 1:
        e_tiles = _keep(e_tiles, e_tiles[0] > 1, layer, "E1 > 1")
    array = f"M1*C1*E1*R < {limits['array']}"
    tiles = _cross(c_tiles, e_tiles)
    tiles = _keep(tiles, tiles[1] * tiles[2] * r < limits["array"], layer, array)
    tiles = _cross(m_tiles, tiles)
    tiles = _keep(tiles, tiles[1] * tiles[4] * tiles[5] * r < limits["array"], layer, array)
    return _fit(layer, limits, _cross(_factorisations(n, 2)[:1], tiles))


def _fit(layer, limits, tiles):
    """Tilings whose weights fit the register files and whose input and output tiles fit the buffer."""
    _, _, r, stride, _, _, _, _, f, _, _ = layer
    n0, m0, m1, m2, c0, c1, e1 = tiles
    tiles = _keep(tiles, m0 * c0 * r < limits["weight_rf"], layer, f"M0*C0*S < {limits['weight_rf']}")
    n0, m0, m1, m2, c0, c1, e1 = tiles
    words = n0 * (c0 * c1 * ((e1 - 1) * stride + r) * ((f - 1) * stride + r) + m0 * m1 * m2 * e1 * f)
    return _keep(tiles, words < limits["buffer"], layer, f"input and output tile < {limits['buffer']} words")


def _ladder_tiles(layer, limits):
    """n0, m0, m1, m2, c0, c1, e1 from LADDER, cut at the layer's sizes; M2 is the most that the buffer holds.

    Of M0 only the two largest: filters that share a register tile share each input, so fewer never save
    energy.
    """
    _, n, r, stride, _, _, c, e, f, m, _ = layer

    def steps(size, bound, last=0, ladder=LADDER):
        return np.unique(np.minimum(ladder[ladder * r < bound][-last:], size))[None]

    if r >= min(limits["input_rf"], limits["array"]):
        raise ValueError(
            f"no tiling fits {layer}: C0*S < {limits['input_rf']}, M1*C1*E1*R < {limits['array']}"
        )
    tiles = np.ones((1, 1), int)
    for size in (m, c, e):
        tiles = _cross(tiles, steps(size, limits["array"]))
        tiles = tiles[:, tiles.prod(0) * r < limits["array"]]
    registers = _cross(steps(m, (limits["output_rf"] + 1) * r, 2), steps(c, limits["input_rf"]))
    batch = steps(n, math.inf, ladder=2 ** np.arange(17))
    n0, m0, c0, _, m1, c1, e1 = _cross(_cross(batch, registers), tiles)
    room = limits["buffer"] - 1 - n0 * c0 * c1 * ((e1 - 1) * stride + r) * ((f - 1) * stride + r)
    m2 = np.clip(room // (n0 * m0 * m1 * e1 * f), 1, -(-m // (m0 * m1)))
    return _fit(layer, limits, np.stack([n0, m0, m1, m2, c0, c1, e1]))


# ---- 2 whole networks ----


def network_cost(layers, bits=32, accounting="official", pe_limit=192):
    """Sum of layer_cost over the layers, run one after another; equal layers are computed once."""
    costs = [layer_cost(layer, bits, accounting, pe_limit)[:-1] for layer in layers]
    return Cost(*(math.fsum(column) for column in zip(*costs))) if costs else Cost(*[0.0] * 7)


def operations(layers):
    """Counts {"mults", "shifts", "adds", "macs"}, groups honoured.

    A MAC of conv, linear and matmul is 1 mult + 1 add, of shift 1 shift + 1 add, of an add layer 2 adds.
    """
    counts = dict.fromkeys(("mults", "shifts", "adds", "macs"), 0)
    for layer in layers:
        for name in PRIMITIVES[layer.op]:
            counts[name + "s"] += layer.macs
        counts["macs"] += layer.macs
    return counts


def network_layers(space, arch, image=None):
    """Layers of one network in execution order, batch 1 (official cal_energy.py).

    space: SearchSpace or its name; arch: e.g. "cc/cccc/sctaa/ttctt"; image: side or (H, W), default
    space.image. Raises ValueError for an unknown space, an arch of another space and a bad image size.
    """
    if isinstance(space, str):
        space = find_space(space)
    space.validate(arch)
    image = space.image if image is None else image
    size = image if isinstance(image, (tuple, list)) else (image, image)
    if len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
        raise ValueError(f"image is {image!r}: it must be a positive int or a pair (H, W) of them")
    kernel, stride, width, pool = space.stem
    stem = _conv("conv", kernel, stride, size, space.in_channels, width)
    layers, size = [stem], _out(kernel, stride, size)
    if pool:
        size = _out(3, 2, size)
    if not space.retraining:
        projected = space.widths[0] // 4
        layers += [
            _conv("conv", 1, 1, size, width, width, width),
            _conv("conv", 1, 1, size, width, projected),
        ]
        width = projected
    for letters, out_width, first_stride in zip(arch.split("/"), space.widths, space.strides):
        for position, letter in enumerate(letters):
            stride = 1 if position else first_stride
            layers += _block(OPS[letter], size, width, out_width, stride, space.head_dim, space.retraining)
            size, width = _out(3, stride, size), out_width
    return layers + [Layer("linear", 1, 1, 1, 1, 1, width, 1, 1, space.classes)] * (
        2 if space.retraining else 1
    )


def _out(kernel, stride, size):
    """Side lengths after a convolution or pool with padding kernel // 2."""
    return tuple((side + 2 * (kernel // 2) - kernel) // stride + 1 for side in size)


def _conv(op, kernel, stride, size, in_c, out_c, groups=1):
    return Layer(op, 1, kernel, stride, *size, in_c, *_out(kernel, stride, size), out_c, groups)


@lru_cache(maxsize=None)
def _block(block_op, size, in_c, out_c, stride, head_dim, retraining):
    """Shortcut, 1x1, depthwise 3x3 (position encoding, stride), 3x3 or attention, 1x1, squeeze-excitation."""
    op, p, small = "conv" if block_op == "attn" else block_op, out_c // 4, _out(3, stride, size)
    layers = []
    if retraining and (stride > 1 or in_c != out_c):  # average pool, then 1x1
        layers += [_conv(op, 1, 1, small, in_c, out_c)]
    elif stride > 1 or in_c != out_c:
        layers += [_conv(op, 3 if stride > 1 else 1, stride, size, in_c, out_c)]
    layers += [_conv(op, 1, 1, size, in_c, p), _conv(op, 3, stride, size, p, p, p)]
    if block_op == "attn":
        tokens, heads = small[0] * small[1], p // head_dim
        layers += [
            _conv(op, 1, 1, small, p, 3 * p),
            _matmul(heads * tokens, head_dim, tokens),
            _matmul(heads * head_dim, tokens, tokens),
        ]
    else:
        layers += [_conv(op, 3, 1, small, p, p)]
    layers += [_conv(op, 1, 1, small, p, out_c)]
    if retraining and block_op != "attn":
        layers += [
            _conv("conv", 1, 1, (1, 1), out_c, out_c // 16),
            _conv("conv", 1, 1, (1, 1), out_c // 16, out_c),
        ]
    return tuple(layers)


def _matmul(rows, inner, columns):
    """Product of two activations: rows of the first operand (all heads) as batch."""
    return Layer("matmul", rows, 1, 1, 1, 1, inner, 1, 1, columns)


def transformer_layers(width, ffn, heads, layers=6, qkv=None, tokens=30):
    """Layers of the standard encoder-decoder at `tokens` source and target tokens in one pass (official NLP
    sim).

    qkv: total width of queries, keys, values (default width). Embedding, layer norm, softmax and logits are
    left out.
    """
    qkv = qkv or width
    if qkv % heads:
        raise ValueError(f"heads {heads} must divide the qkv width {qkv}")

    def dense(in_c, out_c):
        return Layer("linear", tokens, 1, 1, 1, 1, in_c, 1, 1, out_c)

    products = [_matmul(heads * tokens, qkv // heads, tokens), _matmul(heads * tokens, tokens, qkv // heads)]
    attention = [dense(width, qkv)] * 3 + products + [dense(qkv, width)]
    feed_forward = [dense(width, ffn), dense(ffn, width)]
    return (attention + feed_forward) * layers + (attention * 2 + feed_forward) * layers


# ---- 3 measured latency ----


def measured_table(space, path, image=None):
    """Latency table of this machine, read from the JSON at `path` or measured and written there.

    {"machine": ..., "latency_ms": {part: ms}, "check": {arch: [predicted_ms, timed_ms]}}: a part is the stem,
    the head or a kind of block, timed inside networks of one letter (conv where it is not offered), one
    thread, batch 1; 20 random networks are timed whole in the same rounds. A table of another processor,
    torch, space, image or source text is measured again.
    """
    path, folder = Path(path), Path(__file__).parent
    source = b"".join(
        (folder / name).read_bytes() for name in ("shiftaddnas.py", "kernels.cu") if (folder / name).exists()
    )
    machine = {
        "cpu": _cpu_name(),
        "threads": 1,
        "torch": torch.__version__,
        "source": hashlib.sha256(source).hexdigest()[:16],
        "space": space.name,
        "image": image or space.image,
    }
    if path.exists():
        table = json.loads(path.read_text())
        if isinstance(table, dict) and table.get("machine") == machine:
            return table
    generator, depths = torch.Generator().manual_seed(0), max(space.depths, key=min)
    pure = [
        "/".join((letter if letter in ops else "c") * depth for ops, depth in zip(space.ops, depths))
        for letter in sorted(set("".join(space.ops)))
    ]
    drawn = [space.sample(generator) for _ in range(20)]
    jobs = [_steps(build(space, arch)) for arch in pure] + [[build(space, arch).eval()] for arch in drawn]
    timed = _timed_ms(jobs, torch.rand(1, space.in_channels, machine["image"], machine["image"]))
    latency_ms = {part: ms for arch, row in zip(pure, timed) for part, ms in zip(_parts(space, arch), row)}
    table = {"machine": machine, "latency_ms": latency_ms}
    table["check"] = {
        arch: [measured_latency_ms(space, arch, table), ms] for arch, (ms,) in zip(drawn, timed[len(pure) :])
    }
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(table, indent=1))
    draft.replace(path)
    return table


def measured_latency_ms(space, arch, table):
    """Predicted latency of a network on the measured machine: the sum of its parts."""
    parts = _parts(space, arch)
    if table["machine"]["space"] != space.name:
        raise ValueError(f"the table was measured for space {table['machine']['space']}, not {space.name}")
    return sum(table["latency_ms"][part] for part in parts)


def _parts(space, arch):
    """Keys of the stem, the blocks and the head: resolution, letter and whether the block is the first
    there."""
    stages = enumerate(space.validate(arch).split("/"), 1)
    return [
        "stem",
        *(
            f"{number}{letter}{'+' if i else '^'}"
            for number, stage in stages
            for i, letter in enumerate(stage)
        ),
        "head",
    ]


def _steps(network):
    """The parts of a network as functions, in the order of _parts."""
    blocks = [partial(block, entrance=name) for block in network.eval().blocks for name in block.entrances]
    return [network.stem, *blocks, network.head]


@torch.inference_mode()
def _timed_ms(jobs, image, rounds=20):
    """Median milliseconds of each step of each job (functions that feed each other), on one thread.

    Every round visits every job, so a slow spell of the machine touches all alike; of two passes the second
    counts.
    """
    threads, times = torch.get_num_threads(), [[] for _ in jobs]
    torch.set_num_threads(1)
    try:
        for job, rows in list(zip(jobs, times)) * rounds:
            for _ in ("warm", "timed"):
                x, stamps = image, [time.perf_counter()]
                for step in job:
                    x = step(x)
                    stamps.append(time.perf_counter())
            rows.append(np.diff(stamps))
    finally:
        torch.set_num_threads(threads)
    return [(np.median(rows, axis=0) * 1e3).tolist() for rows in times]


def _cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


# ---- 4 reports ----

# record, space, arch, image, array limit it was written with (official hw_record)
PUBLISHED = (
    ("T0_mix_v3", "bossnet_t0", "cc/cccc/sctaa/ttctt", 224, 168),
    ("T0_mix_v3", "bossnet_t0", "cc/cccc/sctaa/ttctt", 256, 168),
    ("T0_mix_v3", "bossnet_t0", "cc/cccc/sctaa/ttctt", 288, 168),
    ("T0_mix_v4", "bossnet_t0", "cc/cscc/sctss/ttctt", 224, 168),
    ("T0_mix_v4", "bossnet_t0", "cc/cscc/sctss/ttctt", 256, 192),
    ("T1_mix_v3", "bossnet_t1", "cc/cccc/sctaa/ttctt", 224, 168),
    ("T1_mix_v3", "bossnet_t1", "cc/cccc/sctaa/ttctt", 256, 168),
    ("T1_mix_v4", "bossnet_t1", "cc/cscc/sctss/ttctt", 224, 192),
    ("T1_mix_v4", "bossnet_t1", "cc/cscc/sctss/ttctt", 256, 192),
)
TRANSFORMERS = (
    ("Transformer base", (512, 2048, 8)),
    ("Transformer big, qkv 512", (1024, 4096, 16, 6, 512)),
    ("Transformer big, qkv 1024", (1024, 4096, 16)),
)


def report(space, arch, image=None, bits=32, accounting="official", pe_limit=192):
    """Everything the command line shows of one network, as a dict of plain values."""
    layers = network_layers(space, arch, image)
    by_op = {}
    for op in dict.fromkeys(layer.op for layer in layers):
        own = [layer for layer in layers if layer.op == op]
        by_op[op] = {
            "layers": len(own),
            "macs": operations(own)["macs"],
            **_numbers(network_cost(own, bits, accounting, pe_limit)),
        }
    return {
        "space": space if isinstance(space, str) else space.name,
        "arch": arch,
        "image": list(_sides(layers[0])),
        "accounting": accounting,
        "bits": bits,
        "pe_limit": pe_limit,
        **_numbers(network_cost(layers, bits, accounting, pe_limit)),
        **operations(layers),
        "layers": dict(Counter(layer.op for layer in layers)),
        "by_op": by_op,
    }


def energy_table():
    """Markdown: every published network under both accountings, beside its twin of convolutions only."""
    lines = [
        "# Energy and latency of the published networks",
        "",
        "32 bits. Official: the array limit of the record. Uniform: M1\\*C1\\*E1\\*R < 168 for all. Saved:",
        "against the same network with a convolution block for every shift and add block, same accounting.",
        "",
        "| network | image | limit | official mJ | ms | saved mJ | saved ms "
        "| uniform mJ | ms | saved mJ | saved ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    saved = []
    for name, space, arch, image, limit in PUBLISHED:
        twin, cells = arch.replace("s", "c").replace("a", "c"), []
        for accounting, pe_limit in (("official", limit), ("uniform", 168)):
            own, other = (
                network_cost(network_layers(space, a, image), 32, accounting, pe_limit) for a in (arch, twin)
            )
            percent = [100 - 100 * own[i] / other[i] for i in (0, 1)]
            cells += [f"{own[0]:.3f}", f"{own[1]:.3f}", *(f"{p:.1f} %" for p in percent)]
            saved.append((accounting, *percent))
        lines.append(f"| {name} | {image} | {limit} | {' | '.join(cells)} |")
    for name, shape in TRANSFORMERS:
        layers = transformer_layers(*shape)
        cells = [f"{network_cost(layers, 32, a, 168)[i]:.5f}" for a in ACCOUNTINGS for i in (0, 1)]
        lines.append(
            f"| {name} | 30 + 30 tokens | 168 | {cells[0]} | {cells[1]} | | | {cells[2]} | {cells[3]} | | |"
        )
    span = {
        (a, i): "{:.1f} to {:.1f} %".format(*(f([s[i] for s in saved if s[0] == a]) for f in (min, max)))
        for a in ACCOUNTINGS
        for i in (1, 2)
    }
    lines += [
        "",
        f"What remains of the saving: shift and add blocks save {span['official', 1]} of the energy and "
        f"{span['official', 2]} of the latency as published, and {span['uniform', 1]} of the energy and "
        f"{span['uniform', 2]} of the latency under uniform rules.",
    ]
    return "\n".join(lines) + "\n"


def _numbers(cost):
    return {name: value for name, value in cost._asdict().items() if name != "tiling"}


def _sides(layer):
    return layer.in_h, layer.in_w


def _text(result):
    """Table by operator and memory level."""
    columns = [f"{level}_mj" for level in LEVELS] + ["energy_mj", "latency_ms"]
    lines = [
        "{space} {arch}  image {image[0]}x{image[1]}  {accounting}, {bits} bits, PE limit {pe_limit}".format(
            **result
        ),
        f"{'op':8}{'layers':>7}{'MACs/G':>9}" + "".join(f"{name:>12}" for name in columns),
    ]
    total = dict(result, layers=sum(result["layers"].values()))
    for name, row in {**result["by_op"], "total": total}.items():
        lines.append(
            f"{name:8}{row['layers']:7}{row['macs'] / 1e9:9.3f}"
            + "".join(f"{row[column]:12.3f}" for column in columns)
        )
    return "\n".join(lines)


def plot(results, path):
    """Stacked bars of energy by memory level, one bar a network; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed")
    axes = (figure := Figure((2 + 1.5 * len(results), 4), layout="constrained")).subplots()
    names, below = (
        [f"{number} {result['arch']}" for number, result in enumerate(results, 1)],
        np.zeros(len(results)),
    )
    for level in LEVELS:
        heights = np.array([result[f"{level}_mj"] for result in results])
        axes.bar(names, heights, 0.6, below, label=level)
        below += heights
    axes.set_ylabel("energy (mJ)")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend()
    figure.savefig(path)


def benchmark(bits, accounting, pe_limit, archs=10_000):
    """Lines of timings: the 103 layers of T0_mix_v3 from empty caches, then random hytra networks."""
    for cached in (_layer_cost, _factorisations, _divisors, _block):
        cached.cache_clear()
    start = time.perf_counter()
    network_cost(network_layers("bossnet_t0", PUBLISHED[0][2]), bits, accounting, pe_limit)
    cold_s, space, generator = (
        time.perf_counter() - start,
        find_space("hytra"),
        torch.Generator().manual_seed(0),
    )
    drawn = [space.sample(generator) for _ in range(archs)]
    start = time.perf_counter()
    for arch in drawn:
        network_cost(network_layers(space, arch), bits, accounting, pe_limit)
    return [
        f"103 layers, cold caches: {cold_s:.3f} s",
        f"{archs} random hytra networks: {time.perf_counter() - start:.2f} s",
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def _parse(argv):
    parser = _Parser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="fashion", help="fashion, hytra, bossnet_t0, bossnet_t1")
    parser.add_argument("--arch", help='e.g. cc/cc/tt, or a JSON file with the key "arch"')
    parser.add_argument("--image", help="side, or HxW; default the space's")
    parser.add_argument("--bits", type=int, default=32, help="32 or 8")
    parser.add_argument("--accounting", default="official", help=" or ".join(ACCOUNTINGS))
    parser.add_argument("--pe-limit", type=int, default=192, help="168 or 192 in the published records")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="ARCH", help="more networks, relative to --arch"
    )
    parser.add_argument("--plot", metavar="FILE", help="stacked bars of --arch and --compare")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--csv", action="store_true", help="print a row a layer")
    parser.add_argument(
        "--measure", metavar="FILE", help="measured latency: table in FILE, checked on 20 networks"
    )
    parser.add_argument("--benchmark", action="store_true", help="time the model itself")
    parser.add_argument(
        "--table", metavar="FILE", help="write every published network, e.g. results/energy.md"
    )
    return parser.parse_args(argv)


def _read_arch(text):
    """An arch string as it is, or the "arch" of a JSON file."""
    if not text.endswith(".json"):
        return text
    content = json.loads(Path(text).read_text())
    if not isinstance(content, dict) or "arch" not in content:
        raise ValueError(f'{text} has no key "arch"')
    return content["arch"]


def _run(args):
    """The text that the command line prints."""
    settings = {"bits": args.bits, "accounting": args.accounting, "pe_limit": args.pe_limit}
    if args.benchmark:
        return "\n".join(benchmark(**settings))
    if args.table:
        Path(args.table).write_text(energy_table())
        return f"wrote {args.table}"
    if not args.arch:
        raise ValueError('give --arch, e.g. "cc/cc/tt" in space fashion')
    image = args.image and tuple(int(side) if side.isdecimal() else side for side in args.image.split("x"))
    image = image[0] if image and len(image) == 1 else image
    results = [report(args.space, _read_arch(arch), image, **settings) for arch in (args.arch, *args.compare)]
    if args.plot:
        plot(results, args.plot)
    if args.json:
        for result in results:
            with torch.device("meta"):
                network = build(find_space(args.space), result["arch"])
            result["params"] = sum(p.numel() for p in network.parameters())
        return json.dumps(results if args.compare else results[0], indent=1)
    if args.csv:
        return _csv_text(network_layers(args.space, results[0]["arch"], image), settings)
    lines = [_text(results[0])]
    for other in results[1:]:
        change = [100 * other[name] / results[0][name] - 100 for name in ("energy_mj", "latency_ms")]
        lines.append(
            f"{other['arch']}  {other['energy_mj']:.3f} mJ ({change[0]:+.1f} %)  "
            f"{other['latency_ms']:.3f} ms ({change[1]:+.1f} %)"
        )
    if args.measure:
        lines.append(_measured_text(find_space(args.space), results[0]["arch"], args.measure, image))
    return "\n".join(lines)


def _csv_text(layers, settings):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Layer._fields + Cost._fields[:-1])
    writer.writerows(layer + layer_cost(layer, **settings)[:-1] for layer in layers)
    return text.getvalue().rstrip()


def _measured_text(space, arch, path, image):
    if isinstance(image, tuple):
        raise ValueError(f"--measure needs a square image, not {image[0]}x{image[1]}")
    table = measured_table(space, path, image)
    errors = [100 * abs(predicted / timed - 1) for predicted, timed in table["check"].values()]
    low, median, high, most = np.quantile(errors, [0.25, 0.5, 0.75, 1])
    return (
        f"measured on {table['machine']['cpu']}, one thread, batch 1: "
        f"{measured_latency_ms(space, arch, table):.3f} ms predicted\n{len(errors)} random networks, "
        f"predicted against timed: median error {median:.1f} %, quartiles "
        f"{low:.1f} and {high:.1f} %, most {most:.1f} %"
    )


def main(argv=None):
    """Exit code 0, or 2 with one sentence on stderr."""
    try:
        print(_run(_parse(argv)))
    except (ValueError, OSError) as error:
        print(f"cost_model.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

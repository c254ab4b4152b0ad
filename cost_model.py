"""Energy and latency of conv / shift / add / attention networks on an Eyeriss-like accelerator.

    python cost_model.py --space bossnet_t0 --arch cc/cccc/sctaa/ttctt --image 224 --pe-limit 168
    python cost_model.py --arch cs/sta/sts --accounting uniform --compare cc/ccc/ccc --plot bars.png
    python cost_model.py --arch cs/sta/sts --measure out/measured.json       real latency on this machine
    python cost_model.py --table results/energy.md                           every published network

Row-stationary analytical model of ShiftAddNAS (You et al., ICML 2022; official hw_utils.py, cal_energy.py in
CV/retraining_hybrid, NLP/en-de/sim), after Eyeriss (ISCA 2016). A layer is cut into tiles; the cut decides
how often each word crosses each memory level, hence energy and cycles.

Symbols  N batch, C M channels in and out, H W input, E F output, R = S kernel; X0 register, X1 array,
         X2 buffer, X3 DRAM factor of X = N, M, C, E; a word is 16 bits. Tables in pJ, results in mJ and ms.

accounting="official" reproduces the published records, "uniform" compares like with like:

    question            official                     uniform, and why
    groups              ignored: depthwise as dense  honoured, one after another: absent MACs cost nothing
    word width          conv, add `bits`; shift 10   activations `bits`, shift weights 5: their real formats
    memory of add       DRAM, buffer, NoC free       every level paid: its data move like any other's
    compute             one primitive a MAC          accumulation too: conv mult + add, shift shift + add, add
                                                     subtract + add, for no MAC is complete without it
    clock               4 ns; shift 4 * 10/32 ns     4 ns: a narrower word does not make the array faster
    tiles               exact divisors, E1 > 1       a fixed ladder, the last tile partly filled: a prime size
                                                     must not cost more than the next composite one
    choice of tiling    least energy + latency,      least energy, then latency: what tiles a larger layer
                        both normalised              tiles this one, so energy grows with each size

Both: batch norm, activation, pooling and softmax are free, a matmul reads its second operand once for all
heads, M1*C1*E1*R stays below pe_limit, 168 (12 x 14, as Eyeriss) or 192: the published records mix the two.
"""

import csv
import hashlib
import io
import json
import math
import re
import sys
import time
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from shiftaddnas import OPS, SOURCES, TokenSpace, build, cpu_model, find_space, kernel_build
from train import OneLineParser, rank, read_arch, replace_file, run_command, write_text

# pJ an operation, by bits (45 nm: ShiftAddNet Table 1; official get_unit_energy)
COMPUTE_PJ = {32: {"mult": 3.7, "add": 0.9, "shift": 0.13}, 8: {"mult": 0.2, "add": 0.03, "shift": 0.024}}
# pJ a 16-bit word; below DRAM multiples of a 3.7 pJ multiplication (Eyeriss; official get_unit_energy)
MEMORY_PJ = {"dram": 200.0, "buffer": 6 * 3.7, "noc": 2 * 3.7, "noc_psum": 3.7, "rf": 3.7, "rf_weight": 7.4}
# words of storage, and array as a multiple of pe_limit, by bits (official valid_tiling)
LIMITS = {32: {"output_rf": 16, "input_rf": 12, "weight_rf": 960, "buffer": 65536, "array": 1},
          8: {"output_rf": 32, "input_rf": 24, "weight_rf": 1920, "buffer": 131072, "array": 4}}
CYCLE_NS = 4.0  # 250 MHz (official get_latency)
OFFICIAL_SHIFT_BITS, SHIFT_WEIGHT_BITS = 10, 5  # mean of 16 and 5; sign and exponent (DeepShift)
# operations of one MAC; official counts the first alone
PRIMITIVES = {"conv": ("mult", "add"), "linear": ("mult", "add"), "matmul": ("mult", "add"),
              "shift": ("shift", "add"), "add": ("add", "add")}
ACCOUNTINGS = ("official", "uniform")
LADDER = np.array(sorted(k * 2**i for k in (1, 3, 7) for i in range(12)))  # tile sizes of uniform
# record, space, arch, ((image, array limit it was written with), ...) (official hw_record)
PUBLISHED = (
    ("T0_mix_v3", "bossnet_t0", "cc/cccc/sctaa/ttctt", ((224, 168), (256, 168), (288, 168))),
    ("T0_mix_v4", "bossnet_t0", "cc/cscc/sctss/ttctt", ((224, 168), (256, 192))),
    ("T1_mix_v3", "bossnet_t1", "cc/cccc/sctaa/ttctt", ((224, 168), (256, 168))),
    ("T1_mix_v4", "bossnet_t1", "cc/cscc/sctss/ttctt", ((224, 192), (256, 192))))
TRANSFORMERS = (("base", (512, 2048, 8)), ("big, qkv 512", (1024, 4096, 16, 6, 512)),
                ("big, qkv 1024", (1024, 4096, 16)))  # arguments of transformer_layers

# one layer as the accelerator sees it, sizes in words; linear and matmul are `batch` rows of 1x1 maps
Layer = namedtuple("Layer", "op batch kernel stride in_h in_w in_c out_h out_w out_c groups", defaults=[1])
# factors of one layer (uniform: of one of its groups); N3, M3, C2, E3 are rounded up
Tiling = namedtuple("Tiling", "n0 n3 m0 m1 m2 m3 c0 c1 c2 e1 e3")
# energy_mj is the sum of the five levels; tiling is None for a network
LEVELS = ("compute_mj", "dram_mj", "buffer_mj", "noc_mj", "rf_mj")
Cost = namedtuple("Cost", ("energy_mj", "latency_ms", *LEVELS, "tiling"), defaults=[None])


# ------------------------------------------------------------------------------------------ §1 one layer


def layer_cost(layer, bits=32, accounting="official", pe_limit=192):
    """Cost of a Layer with the tiling that the accounting chooses; bits 32 or 8, pe_limit in array cells.

    Example, linear 1 -> 1 at 32 bits, one word each of input, weight and output, in pJ: DRAM 3*400, buffer
    2*44.4, NoC 2*14.8 + 7.4, RF 7.4 + 14.8 + 7.4, compute 3.7, in all 1359.1; one cycle, 4 ns (uniform: 0.9
    pJ more). Raises ValueError for an unknown op, accounting or bits, a size that is not a positive int,
    groups that do not divide both channels, and a layer that no tiling fits (the limit is named).
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
    return _layer_cost(layer, bits, accounting == "uniform", pe_limit)


@lru_cache(maxsize=None)
def _layer_cost(layer, bits, uniform, pe_limit):
    groups = layer.groups if uniform else 1
    layer = layer._replace(in_c=layer.in_c // groups, out_c=layer.out_c // groups)
    tilings = _tilings(layer, LIMITS[bits] | {"array": LIMITS[bits]["array"] * pe_limit}, uniform)
    levels_pj, cycles = _traffic(layer, tilings, bits, uniform)
    energy_pj = sum(levels_pj)
    if uniform:
        score = np.where(energy_pj == energy_pj.min(), cycles, np.inf)
    else:
        score = (energy_pj - energy_pj.min()) / energy_pj.max() + (cycles - cycles.min()) / cycles.max()
    best = np.argmin(score)
    levels_mj = [float(np.broadcast_to(level, cycles.shape)[best]) * groups * 1e-9 for level in levels_pj]
    cycle_ns = CYCLE_NS * OFFICIAL_SHIFT_BITS / 32 if layer.op == "shift" and not uniform else CYCLE_NS
    latency_ms = float(cycles[best]) * groups * cycle_ns * 1e-6
    return Cost(sum(levels_mj), latency_ms, *levels_mj, Tiling(*(int(factor[best]) for factor in tilings)))


def _traffic(layer, tilings, bits, uniform):
    """Energy by level (pJ) and cycles of every tiling (official get_energy, get_latency).

        dram    I*M3 + Wt*N3*E3 + O                   buffer  I*M3*M2 + O*max(2(C2-1), 1)
        noc     I*M3*M2*M1*R*E/H + Wt*N3*E3*E1 + psum O*max(C2(C1 R-1), 1)
        rf      MACs inputs + MACs weights + O*max(2 C2 C1 R (C0 R-1), 1)
        cycles  N3 N0 M3 M2 M0 C2 C0 E3 F R

    I = N H W C, Wt = R R C M, O = N E F M words. The outer factors are rounded up, so a product such as M3*M2
    stands as the ceiling of M/(M0*M1).
    """
    op, n, r, _, h, w, c, e, f, m, _ = layer
    n0, n3, m0, m1, _, m3, c0, c1, c2, _, e3 = tilings
    m_passes, c_passes = -(-m // (m0 * m1)), -(-c // c0)  # M3*M2 and C2*C1
    inputs, weights, outputs, macs = n * h * w * c, r * r * c * m, n * e * f * m, n * e * f * m * r * r * c
    act = weight = (OFFICIAL_SHIFT_BITS if op == "shift" and not uniform else bits) / 16  # words
    if op == "shift" and uniform:
        weight = SHIFT_WEIGHT_BITS / 16
    free = ("dram", "buffer", "noc") if op == "add" and not uniform else ()
    pj = MEMORY_PJ | dict.fromkeys(free, 0.0)
    compute = sum(COMPUTE_PJ[bits][name] for name in PRIMITIVES[op][:2 if uniform else 1]) * macs
    dram = pj["dram"] * (act * (inputs * m3 + outputs) + weight * weights * n3 * e3)
    buffer = pj["buffer"] * act * (inputs * m_passes + outputs * np.maximum(2 * (c2 - 1), 1))
    noc = pj["noc"] * (act * n * w * c * r * e * -(-m // m0) + weight * weights * n3 * e)
    noc = noc + pj["noc_psum"] * act * outputs * np.maximum(c_passes * r - c2, 1)
    rf = pj["rf"] * act * (macs + outputs * np.maximum(2 * r * (c * r - c_passes), 1))
    rf = rf + pj["rf_weight"] * weight * macs
    return (compute, dram, buffer, noc, rf), n * f * r * m_passes * m0 * c2 * c0 * e3


@lru_cache(maxsize=None)
def _factorisations(n, parts):
    """(parts, K) array: every ordered tuple of `parts` positive integers with product n."""
    if parts == 1:
        return np.array([[n]])
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = sorted({*small, *(n // d for d in small)})
    rests = [_factorisations(n // d, parts - 1) for d in divisors]
    return np.vstack([np.repeat(divisors, [rest.shape[1] for rest in rests]), np.hstack(rests)])


def _cross(left, right):
    """Every pair of a column of left and a column of right."""
    return np.concatenate([np.repeat(left, right.shape[1], 1), np.tile(right, left.shape[1])])


def _tilings(layer, limits, uniform):
    """Tiling of arrays: every one within the limits; ValueError naming the limit that leaves nothing.

    Official (valid_tiling): exact divisors, E1 = 1 only for FC and 1x1 maps. Uniform: LADDER cut at the
    layer's sizes; M2 is the most that the buffer holds, M0 one of the two largest, since filters that share a
    register tile share each input.
    """
    _, n, r, stride, h, w, c, e, f, m, _ = layer

    def keep(tiles, mask, limit):
        if not mask.any():
            raise ValueError(f"no tiling fits {layer}: {limit}")
        return tiles[:, np.flatnonzero(mask)]

    def steps(size, above, last=0):
        return np.unique(np.minimum(LADDER[LADDER < above][-last:], size))[None]

    if uniform:
        array = -(-limits["array"] // r)
        m_tiles = _cross(steps(m, limits["output_rf"] + 1, 2), np.insert(steps(m, array), 1, 1, axis=0))
        c_tiles, e_tiles = _cross(steps(c, limits["input_rf"]), steps(c, array)), steps(e, array)
        n_tiles = np.unique(np.minimum(2 ** np.arange(17), n))[None]
    else:
        n_tiles, m_tiles, c_tiles, e_tiles = (
            _factorisations(size, parts)[:-1] for size, parts in ((n, 2), (m, 4), (c, 3), (e, 2)))
        m_tiles = m_tiles[:, m_tiles[0] <= limits["output_rf"]]
        e_tiles = keep(e_tiles, (e_tiles[0] > 1) | (h == w == e == f == 1), "E1 > 1")
    array = f"M1*C1*E1*R < {limits['array']}"
    c_tiles = keep(c_tiles, c_tiles[0] * r < limits["input_rf"], f"C0*S < {limits['input_rf']}")
    tiles = _cross(c_tiles, e_tiles)
    tiles = _cross(m_tiles, keep(tiles, tiles[1] * tiles[2] * r < limits["array"], array))
    tiles = keep(tiles, tiles[1] * tiles[4] * tiles[5] * r < limits["array"], array)
    tiles = keep(tiles, tiles[0] * tiles[3] * r < limits["weight_rf"], f"M0*C0*S < {limits['weight_rf']}")
    n0, m0, m1, m2, c0, c1, e1 = tiles = _cross(n_tiles, tiles)
    in_words = n0 * c0 * c1 * ((e1 - 1) * stride + r) * ((f - 1) * stride + r)
    out_words = n0 * m0 * m1 * e1 * f
    if uniform:
        m2[:] = np.clip((limits["buffer"] - 1 - in_words) // out_words, 1, -(-m // (m0 * m1)))
    fits = in_words + out_words * m2 < limits["buffer"]
    n0, m0, m1, m2, c0, c1, e1 = keep(tiles, fits, f"input and output tile < {limits['buffer']} words")
    n3, m3, c2, e3 = -(-n // n0), -(-m // (m0 * m1 * m2)), -(-c // (c0 * c1)), -(-e // e1)
    return Tiling(n0, n3, m0, m1, m2, m3, c0, c1, c2, e1, e3)


# ------------------------------------------------------------------------------------- §2 whole networks


def network_cost(layers, bits=32, accounting="official", pe_limit=192):
    """Sum of layer_cost over layers that run one after another; equal layers are computed once."""
    costs = [layer_cost(layer, bits, accounting, pe_limit)[:-1] for layer in layers]
    return Cost(*(math.fsum(column) for column in zip(*costs or [[0.0] * len(Cost._fields[:-1])])))


def operations(layers):
    """{"mults", "shifts", "adds", "macs"}: PRIMITIVES of every multiply-accumulate, or what stands for it in
    shift and add layers; groups honoured."""
    counts = dict.fromkeys(("mults", "shifts", "adds", "macs"), 0)
    for op, batch, kernel, _, _, _, in_c, out_h, out_w, out_c, groups in layers:
        for name in (*PRIMITIVES[op], "mac"):
            counts[name + "s"] += batch * out_h * out_w * out_c * kernel**2 * in_c // groups
    return counts


def flops(layers):
    """2 * MACs of a translation network as the published counter has them: no light operators' own sums."""
    return 2 * operations([layer for layer in layers if layer.op not in ("conv", "add")])["macs"]


def count_params(space, arch):
    """Parameters of the network of an arch, built without memory for them; in translation, no embedding."""
    if isinstance(space, TokenSpace):
        return space.params(arch)
    with torch.device("meta"):
        return sum(p.numel() for p in build(space, arch).parameters())


def network_layers(space, arch, image=None):
    """Layers of one network in execution order, batch 1 (official cal_energy.py); see token_layers too.

    space: SearchSpace or its name; image: side or (H, W), default space.image. Raises ValueError for an
    unknown space, an arch of another space and a bad image size.
    """
    space = find_space(space) if isinstance(space, str) else space
    if isinstance(space, TokenSpace):
        return token_layers(space.validate(arch), space.qkv, space.kernels)
    image = space.image if image is None else image
    size = tuple(image) if isinstance(image, (tuple, list)) else (image, image)
    if len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
        raise ValueError(f"image is {image!r}: it must be a positive int or a pair (H, W) of them")
    kernel, stride, width, pool = space.stem
    layers, size = [_conv("conv", kernel, stride, size, space.in_channels, width)], _out(kernel, stride, size)
    size = _out(3, 2, size) if pool else size
    if not space.retraining:  # input projection
        layers.append(_conv("conv", 1, 1, size, width, width, width))
        layers.append(_conv("conv", 1, 1, size, width, space.block_input()))
        width = space.block_input()
    for resolution, letter, entrance in space.walk(arch):
        stride, out_c = space.strides[resolution] if entrance == "down" else 1, space.widths[resolution]
        layers += _block(OPS[letter], size, width, out_c, stride, space.head_dim, space.retraining)
        size, width = _out(3, stride, size), out_c
    return layers + [_linear(1, width, space.classes)] * (1 + space.distilled)


def _out(kernel, stride, size):
    """Side lengths after a convolution or pool with padding kernel // 2."""
    return tuple((side + 2 * (kernel // 2) - kernel) // stride + 1 for side in size)


def _conv(op, kernel, stride, size, in_c, out_c, groups=1):
    return Layer(op, 1, kernel, stride, *size, in_c, *_out(kernel, stride, size), out_c, groups)


def _linear(rows, in_c, out_c, op="linear"):
    return Layer(op, rows, 1, 1, 1, 1, in_c, 1, 1, out_c)


_matmul = partial(_linear, op="matmul")  # product of two activations: the rows, of all heads, are the batch


@lru_cache(maxsize=None)
def _block(block_op, size, in_c, out_c, stride, head_dim, retraining):
    """Shortcut, 1x1, depthwise 3x3 (position encoding, stride), 3x3 or attention, 1x1, squeeze-excitation."""
    op, p, small = "conv" if block_op == "attn" else block_op, out_c // 4, _out(3, stride, size)
    shortcut = (1, 1, small) if retraining else (3 if stride > 1 else 1, stride, size)  # retraining: pooled
    layers = [_conv(op, *shortcut, in_c, out_c)] if stride > 1 or in_c != out_c else []
    layers += [_conv(op, 1, 1, size, in_c, p), _conv(op, 3, stride, size, p, p, p)]
    if block_op == "attn":
        tokens, heads = small[0] * small[1], p // head_dim
        layers += [_conv(op, 1, 1, small, p, 3 * p), _matmul(heads * tokens, head_dim, tokens),
                   _matmul(heads * head_dim, tokens, tokens), _conv(op, 1, 1, small, p, out_c)]
    else:
        layers += [_conv(op, 3, 1, small, p, p), _conv(op, 1, 1, small, p, out_c)]
        squeezed = ((out_c, out_c // 16), (out_c // 16, out_c)) if retraining else ()
        layers += [_conv("conv", 1, 1, (1, 1), *channels) for channels in squeezed]
    return tuple(layers)


def token_layers(arch, qkv, kernels, tokens=30):
    """Layers of an encoder-decoder, `tokens` source and target tokens in one pass (official sim).

    arch: as in TokenSpace; qkv: total width of queries, keys and values; kernels: taps, by layer. A light
    operator over K taps is charged as K inputs and C outputs a token: exact MACs and outputs. Its projections
    are multiplications, the shift layer of S is a shift (official: sqrt(K) x sqrt(K) kernels, both
    projections half a shift, no shift layer). Left out: embedding, layer norm, softmax, logits.
    """
    def attention(width, memory, heads, keys):
        return [_linear(tokens, width, qkv), *[_linear(keys, memory, qkv)] * 2,
                _matmul(heads * tokens, qkv // heads, keys), _matmul(heads * tokens, keys, qkv // heads),
                _linear(tokens, qkv, width)]

    def mixing(kind, width, heads, taps):
        part = width // len(kind)
        layers = attention(part, part, heads, tokens) if kind[0] == "T" else []
        if kind[-1] != "T":
            square, light = _linear(tokens, part, part), "conv" if kind[-1] == "C" else "add"
            layers += [square, *[square._replace(op="shift")] * (kind[-1] == "S")]
            layers += [_linear(tokens, taps, part, light), square]
        return layers

    layers, width, memory = [], arch["decoder"]["embed_dim"], arch["encoder"]["embed_dim"]
    names = ("types", "heads", "ffn")
    for kind, heads, ffn, taps in zip(*(arch["encoder"][name] for name in names), kernels):
        layers += mixing(kind, memory, heads, taps)
        layers += [_linear(tokens, memory, ffn), _linear(tokens, ffn, memory)]
    names = ("types", "self_heads", "cross_heads", "sources", "ffn")
    for kind, heads, cross, source, ffn, taps in zip(*(arch["decoder"][name] for name in names), kernels):
        layers += mixing(kind, width, heads, taps) + attention(width, memory, cross, SOURCES[source] * tokens)
        layers += [_linear(tokens, width, ffn), _linear(tokens, ffn, width)]
    return layers


def transformer_layers(width, ffn, heads, layers=6, qkv=None):
    """token_layers of the standard Transformer; qkv: default width. ValueError if heads do not divide qkv."""
    qkv = qkv or width
    if qkv % heads:
        raise ValueError(f"heads {heads} must divide the qkv width {qkv}")
    lists = dict.fromkeys(("heads", "self_heads", "cross_heads"), heads)
    lists |= {"types": "T", "sources": -1, "ffn": ffn}
    part = {"embed_dim": width} | {name: [value] * layers for name, value in lists.items()}
    return token_layers({"encoder": part, "decoder": part}, qkv, [1] * layers)


# ----------------------------------------------------------------------------------- §3 measured latency


def all_of(letter, space, arch):
    """The network of the same depths with one op everywhere; conv where a resolution does not offer it."""
    return "/".join(
        (letter if letter in ops else "c") * len(stage) for ops, stage in zip(space.ops, arch.split("/")))


def measured_table(space, path, image=None):
    """Latency table of this machine, read from the JSON at `path` or measured and written there.

        {"machine": {...}, "latency_ms": {part: ms}, "check": {arch: [predicted_ms, timed_ms]}}

    A part is the stem, the head or a kind of block, timed inside networks of one letter, one thread, batch 1;
    20 random networks are timed whole in the same rounds. A table of another processor, torch, kernel build,
    space, image or source text is measured again; a file that is no table raises ValueError.
    """
    folder = Path(__file__).parent
    source = b"".join((folder / name).read_bytes() for name in ("shiftaddnas.py", "kernels.cu"))
    machine = {"cpu": cpu_model().rpartition(": ")[2], "kernels": kernel_build("cpu"), "threads": 1,
               "torch": torch.__version__, "source": hashlib.sha256(source).hexdigest()[:16],
               "space": space.name, "image": image or space.image}
    if Path(path).exists():
        try:
            table = json.loads(Path(path).read_text())
            if table["machine"] == machine:
                return table
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a latency table: remove it or name another file") from None
    deepest = "/".join("c" * depth for depth in max(space.depths, key=min))
    pure = [all_of(letter, space, deepest) for letter in sorted(set("".join(space.ops)))]
    generator, jobs = torch.Generator().manual_seed(0), []
    drawn = [space.sample(generator) for _ in range(20)]
    for network in (build(space, arch).eval() for arch in pure):
        blocks = [partial(block, entrance=name) for block in network.blocks for name in block.entrances]
        jobs.append([network.stem, *blocks, network.head])
    jobs += [[build(space, arch).eval()] for arch in drawn]
    timed = _timed_ms(jobs, torch.rand(1, space.in_channels, machine["image"], machine["image"]))
    parts = {part: ms for arch, row in zip(pure, timed) for part, ms in zip(_parts(space, arch), row)}
    table = {"machine": machine, "latency_ms": parts}
    table["check"] = {arch: [measured_latency_ms(space, arch, table), ms]
                      for arch, (ms,) in zip(drawn, timed[len(pure):])}
    write_text(json.dumps(table, indent=1), path)
    return table


def measured_latency_ms(space, arch, table):
    """Predicted latency of a network on the measured machine: the sum of its parts."""
    if table["machine"]["space"] != space.name:
        raise ValueError(f"the table was measured for space {table['machine']['space']}, not {space.name}")
    return sum(table["latency_ms"][part] for part in _parts(space, arch))


def _parts(space, arch):
    """Keys of stem, blocks and head: resolution, letter, and ^ for the first block there or + for another."""
    stages = enumerate(space.validate(arch).split("/"), 1)
    blocks = [f"{n}{letter}{'+' if i else '^'}" for n, stage in stages for i, letter in enumerate(stage)]
    return ["stem", *blocks, "head"]


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


# -------------------------------------------------------------------------------------------- §4 reports


def short(arch):
    """An arch for a line on the screen: its types, in translation without the sizes."""
    if isinstance(arch, str):
        return arch
    return " / ".join(" ".join(arch[part]["types"]) for part in ("encoder", "decoder"))


def report(space, arch, image=None, bits=32, accounting="official", pe_limit=192):
    """Everything the command line shows of one network of a space, as a dict of plain values."""
    layers, tokens = network_layers(space, arch, image), isinstance(space, TokenSpace)
    size = {"flops": flops(layers)} if tokens else {"image": [layers[0].in_h, layers[0].in_w]}
    settings = {"bits": bits, "accounting": accounting, "pe_limit": pe_limit}

    def costs(own):
        return dict(zip(Cost._fields[:-1], network_cost(own, **settings))) | operations(own)

    counts = Counter(layer.op for layer in layers)
    by_op = {op: {"layers": n, **costs([x for x in layers if x.op == op])} for op, n in counts.items()}
    return {"space": space.name, "arch": arch, **size, **settings, **costs(layers), "layers": dict(counts),
            "by_op": by_op, "params": count_params(space, arch)}


def energy_table():
    """Markdown: every published network under both accountings, beside its twin of convolutions only."""
    rows = [(name, image, limit, 3, network_layers(space, arch, image),
             network_layers(space, re.sub("[sa]", "c", arch), image))
            for name, space, arch, images in PUBLISHED for image, limit in images]
    rows += [("Transformer " + name, "30 + 30 tokens", 168, 5, transformer_layers(*shape), None)
             for name, shape in TRANSFORMERS]
    titles = "".join(f"| {accounting} mJ | ms | saved mJ | saved ms " for accounting in ACCOUNTINGS)
    text, saved = [f"| network | image | limit {titles}|", "|---" * 11 + "|"], []
    for name, image, limit, digits, layers, twin in rows:
        own, other = (np.array([network_cost(part, 32, *rule)[:2] for rule in zip(ACCOUNTINGS, (limit, 168))])
                      for part in (layers, twin or layers))
        cells, percent = [name, str(image), str(limit)], 100 - 100 * own / other
        for costs, saving in zip(own, percent):
            cells += [f"{value:.{digits}f}" for value in costs]
            cells += [f"{value:.1f} %" for value in saving] if twin else ["", ""]
        text.append(f"| {' | '.join(cells)} |".replace("  ", " "))
        saved += [percent.ravel()] if twin else []
    spans = [f"{min(column):.1f} to {max(column):.1f} % of the" for column in zip(*saved)]
    return """# Energy and latency of the published networks

32 bits. Official: the array limit of the record. Uniform: M1\\*C1\\*E1\\*R < 168 for all. Saved:
against the same network with a convolution block for every shift and add block, same accounting.

{}

What remains of the saving: shift and add blocks save {} energy and {} latency as published, and {} energy \
and {} latency under uniform rules.
""".format("\n".join(text), *spans)


@contextmanager
def figure_at(path, width, height):
    """A matplotlib Figure, sizes in inches, that is written to `path` in the end; ImportError without it."""
    from matplotlib.figure import Figure

    yield (figure := Figure((width, height), layout="constrained"))
    kind = Path(path).suffix[1:] or "png"
    if not rank():  # one process writes
        replace_file(path, lambda draft: figure.savefig(draft, format=kind, dpi=100))


def draw_levels(axes, bars):
    """Stacked bars of energy by memory level, {label: {level: mJ}}; Okabe and Ito's colours and hatches."""
    below, colours = np.zeros(len(bars)), ("#F0E442", "#0072B2", "#FFFFFF", "#56B4E9", "#E69F00")
    for level, colour, hatch in zip(LEVELS, colours, ("", "", "//", "", "..")):
        heights = np.array([bar[level] for bar in bars.values()])
        axes.bar(list(bars), heights, 0.6, below, color=colour, hatch=hatch, edgecolor="k", linewidth=0.5,
                 label=level.removesuffix("_mj"))
        below += heights
    axes.set_ylabel("energy (mJ)")


def benchmark(bits, accounting, pe_limit, archs=10_000):
    """Two timings: the 103 layers of T0_mix_v3 from empty caches; random hytra networks, drawn too."""
    for cached in (_layer_cost, _factorisations, _block):
        cached.cache_clear()
    space, generator, lines = find_space("hytra"), torch.Generator().manual_seed(0), []
    jobs = {"103 layers, cold caches": [PUBLISHED[0][1:3]],
            f"{archs} random hytra networks": ((space, space.sample(generator)) for _ in range(archs))}
    for name, networks in jobs.items():
        start = time.perf_counter()
        for where, arch in networks:
            network_cost(network_layers(where, arch), bits, accounting, pe_limit)
        lines.append(f"{name}: {time.perf_counter() - start:.3f} s")
    return lines


# --------------------------------------------------------------------------------------- §5 command line


def _parse(argv):
    parser = OneLineParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    flag, output = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    flag("--space", default="fashion", help="as in search.py, or bossnet_t0, bossnet_t1")
    flag("--arch", help='e.g. cc/cc/tt, or a .json file with the key "arch"')
    flag("--image", help="side, or HxW; default: the space's")
    flag("--bits", type=int, default=32, help="32 or 8")
    flag("--accounting", default="official", help=" or ".join(ACCOUNTINGS))
    flag("--pe-limit", type=int, default=192, help="168 or 192 in the published records")
    flag("--compare", nargs="+", default=[], metavar="ARCH", help="more networks, relative to --arch")
    flag("--plot", metavar="FILE", help="stacked bars of all these networks")
    output("--json", action="store_true", help="print JSON: an object, or with --compare a list")
    output("--csv", action="store_true", help="print a row a layer")
    output("--measure", metavar="FILE", help="add the measured latency; FILE keeps the table")
    output("--benchmark", action="store_true", help="time the model itself")
    output("--table", metavar="FILE", help="write every published network, e.g. results/energy.md")
    return parser.parse_args(argv)


def _run(args):
    """The text that the command line prints."""
    settings = {"bits": args.bits, "accounting": args.accounting, "pe_limit": args.pe_limit}
    if args.benchmark:
        return "\n".join(benchmark(**settings))
    if args.table:
        write_text(energy_table(), args.table)
        return f"wrote {args.table}"
    if not args.arch:
        raise ValueError('give --arch, e.g. "cc/cc/tt" in space fashion')
    space, image = find_space(args.space), None
    archs = [read_arch(space, arch) for arch in (args.arch, *args.compare)]
    if isinstance(space, TokenSpace) and (args.image or args.measure):
        raise ValueError(f"--image and --measure are for images, not for space {space.name}")
    if args.image:
        sides = tuple(int(side) if side.isdecimal() else side for side in args.image.split("x"))
        image = sides * 2 if len(sides) == 1 else sides
    results = [report(space, arch, image, **settings) for arch in archs]
    if args.plot:
        with figure_at(args.plot, 2 + 1.5 * len(results), 4) as figure:
            axes = figure.subplots()
            draw_levels(axes, {f"{n} {short(row['arch'])}": row for n, row in enumerate(results, 1)})
            axes.tick_params(axis="x", labelrotation=20)
            axes.legend()
    if args.json:
        return json.dumps(results if args.compare else results[0], indent=1)
    if args.csv:
        writer = csv.writer(text := io.StringIO(), lineterminator="\n")
        writer.writerow(("arch",) + Layer._fields + Cost._fields[:-1])
        for arch in archs:
            for layer in network_layers(space, arch, image):
                writer.writerow((arch,) + layer + layer_cost(layer, **settings)[:-1])
        return text.getvalue().rstrip()
    return "\n".join(_text(results) + (_measured(space, archs, args.measure, image) if args.measure else []))


def _text(results):
    """Lines: the first network by operator and memory level, then each other one relative to it."""
    columns, first = [*LEVELS, "energy_mj", "latency_ms"], results[0]
    size = "image {}x{}".format(*first["image"]) if "image" in first else "30 + 30 tokens"
    lines = ["{space} {name}  {size}  {params:,} params  {accounting}, {bits} bits, "
             "PE limit {pe_limit}".format(name=short(first["arch"]), size=size, **first),
             f"{'op':8}{'layers':>7}{'MACs/G':>10}" + "".join(f"{name:>12}" for name in columns)]
    for name, row in {**first["by_op"], "total": first | {"layers": sum(first["layers"].values())}}.items():
        numbers = "".join(f"{row[column]:12.4g}" for column in columns)
        lines.append(f"{name:8}{row['layers']:7}{row['macs'] / 1e9:10.4g}" + numbers)
    for row in results[1:]:
        change = (f"{row[name]:.4g} {unit} ({100 * row[name] / first[name] - 100:+.1f} %)"
                  for name, unit in (("energy_mj", "mJ"), ("latency_ms", "ms")))
        lines.append("  ".join((short(row["arch"]), *change)))
    return lines


def _measured(space, archs, path, image):
    """Lines: predicted latency of the archs, and how far such predictions were from 20 timed networks."""
    if image and image[0] != image[1]:
        raise ValueError(f"--measure needs a square image, not {image[0]}x{image[1]}")
    table = measured_table(space, path, image and image[0])
    errors = [100 * abs(predicted / timed - 1) for predicted, timed in table["check"].values()]
    least, low, median, high, most = np.quantile(errors, [0, 0.25, 0.5, 0.75, 1])
    return [f"measured on {table['machine']['cpu']}, one thread, batch 1",
            *(f"{arch}  {measured_latency_ms(space, arch, table):.4g} ms predicted" for arch in archs),
            f"{len(errors)} random networks, predicted against timed: median error {median:.1f} %, "
            f"quartiles {low:.1f} and {high:.1f} %, {least:.1f} to {most:.1f} %"]


def main(argv=None):
    """Exit code 0, or 2 with one sentence on stderr."""
    try:
        print(_run(_parse(argv)), flush=True)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        print(f"cost_model.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))

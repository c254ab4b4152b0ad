"""Energy and latency of conv / shift / add / attention networks on an Eyeriss-like accelerator.

    python cost_model.py --space bossnet_t0 --arch cc/cccc/sctaa/ttctt --image 224 --pe-limit 168
    python cost_model.py --arch cs/sta/sts --accounting uniform --bits 8 --json
    python cost_model.py --arch cs/sta/sts --measure out/measured.json       real latency on this machine

Row-stationary analytical model of ShiftAddNAS (You et al., ICML 2022; official hw_utils.py, cal_energy.py in
CV/retraining_hybrid, NLP/en-de/sim), after Eyeriss (ISCA 2016). A layer is cut into tiles; the cut decides
how often each word crosses each memory level, hence energy and cycles.

Symbols  N batch, C M channels in and out, H W input, E F output, R S kernel; X0 register, X1 array,
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

Any list of layers and any accelerator will do. A block of MobileNetV2, on Eyeriss and on another machine:

>>> block = [Layer("conv", 1, 1, 1, 56, 56, 24, 56, 56, 144),  # 1x1, stride 1, 56 x 56 x 24 -> 56 x 56 x 144
...          Layer("conv", 1, 3, 2, 56, 56, 144, 28, 28, 144, 144),  # depthwise 3x3, stride 2, 144 groups
...          Layer("conv", 1, 1, 1, 28, 28, 144, 28, 28, 32)]
>>> int8 = Precision(8, 0.1, 0.02, 0.01, output_rf=64, input_rf=24, weight_rf=1024, buffer=65536, array=1)
>>> other = Hardware(pe_limit=1024, clock_ns=1.0, dram_pj=640.0, precisions=(int8,))
>>> for hardware in (EYERISS, other):
...     cost = network_cost(block, 8, "uniform", hardware)
...     print(f"{cost.energy_mj:.4f} mJ, of it DRAM {cost.dram_mj:.4f}; {cost.latency_ms:.4f} ms")
0.2663 mJ, of it DRAM 0.1264; 0.1702 ms
0.5442 mJ, of it DRAM 0.4063; 0.0479 ms
"""

import argparse
import json
import math
import sys
import time
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from shiftaddnas import OPS, SOURCES, TokenSpace, Translator, build, cpu_model, find_space, kernels_for
from shiftaddnas import read_arch

# ------------------------------------------------------------------------------------------- §1 tables

ACCOUNTINGS = ("official", "uniform")
# operations of one MAC; official counts the first alone
PRIMITIVES = dict.fromkeys(("conv", "linear", "matmul"), ("mult", "add"))
PRIMITIVES |= {"shift": ("shift", "add"), "add": ("add", "add")}
POINT = (1, 1)  # the map of a linear layer
LADDER = np.array(sorted(k * 2**i for k in (1, 3, 7) for i in range(12)))  # tile sizes of uniform

# one layer as the accelerator sees it; kernel and stride are ints or pairs (down, across); linear and matmul
# are `batch` rows of 1x1 maps
Layer = namedtuple("Layer", "op batch kernel stride in_h in_w in_c out_h out_w out_c groups", defaults=[1])
# factors of one layer (uniform: of one of its groups); N3, M3, C2, E3 are rounded up
Tiling = namedtuple("Tiling", "n0 n3 m0 m1 m2 m3 c0 c1 c2 e1 e3")
# energy_mj is the sum of the five levels; tiling is None for a network
LEVELS = ("compute_mj", "dram_mj", "buffer_mj", "noc_mj", "rf_mj")
Cost = namedtuple("Cost", ("energy_mj", "latency_ms", *LEVELS, "tiling"), defaults=[None])
# what a word width decides: pJ of an operation; limits, in words, of M0, C0*S, M0*C0*S and of what is in the
# buffer; the array as a multiple of pe_limit
Precision = namedtuple("Precision", "bits mult_pj add_pj shift_pj output_rf input_rf weight_rf buffer array")


@dataclass(frozen=True)
class Hardware:
    """Describe an accelerator; dataclasses.replace makes another one.

    The defaults are the published ones. Operations, 45 nm: ShiftAddNet (NeurIPS 2020) Table 1. Memory levels:
    Eyeriss, below DRAM as multiples of a 3.7 pJ multiplication. Limits and clock: official valid_tiling.
    """

    pe_limit: int = 192  # cells of the array, of which less than this are used
    clock_ns: float = 4.0  # 250 MHz
    word_bits: int = 16  # the memory levels below are pJ a word
    dram_pj: float = 200.0
    buffer_pj: float = 6 * 3.7
    noc_pj: float = 2 * 3.7  # network on chip, inputs and weights
    noc_psum_pj: float = 3.7  # network on chip, partial sums
    rf_pj: float = 3.7  # register file, inputs and partial sums
    rf_weight_pj: float = 2 * 3.7
    shift_weight_bits: int = 5  # uniform: sign and exponent (DeepShift)
    official_shift_bits: int = 10  # official: every word of a shift layer, the mean of 16 and 5
    precisions: tuple = (
        Precision(32, 3.7, 0.9, 0.13, output_rf=16, input_rf=12, weight_rf=960, buffer=65536, array=1),
        Precision(8, 0.2, 0.03, 0.024, output_rf=32, input_rf=24, weight_rf=1920, buffer=131072, array=4),
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            free = name.endswith("_pj")  # an energy may be 0
            if name != "precisions" and not (0 < value < math.inf or free and value == 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")


EYERISS = Hardware()


# ---------------------------------------------------------------------------------------- §2 one layer


@lru_cache(maxsize=None)  # equal layers are computed once
def layer_cost(layer, bits=32, accounting="official", hardware=EYERISS):
    """Return the Cost of a Layer with the tiling that the accounting chooses; ValueError if there is none.

    Example, linear 1 -> 1 at 32 bits, one word each of input, weight and output, in pJ: DRAM 3*400, buffer
    2*44.4, NoC 2*14.8 + 7.4, RF 7.4 + 14.8 + 7.4, compute 3.7, in all 1359.1; one cycle, 4 ns.
    """
    precisions = {precision.bits: precision for precision in hardware.precisions}
    choices = {"op": PRIMITIVES, "accounting": ACCOUNTINGS, "bits": precisions}
    for (name, allowed), value in zip(choices.items(), (layer.op, accounting, bits)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}: allowed are {', '.join(map(str, allowed))}")
    if min(map(np.min, layer[1:])) < 1 or layer.in_c % layer.groups or layer.out_c % layer.groups:
        raise ValueError(f"{layer}: sizes must be positive, and groups divide in_c and out_c")
    sides = zip((layer.in_h, layer.in_w), (layer.out_h, layer.out_w), pair(layer.kernel), pair(layer.stride))
    for size, out, kernel, stride in sides:
        sizes = [(size + padding - kernel) // stride + 1 for padding in range(2 * kernel - 1)]
        if out not in sizes:
            raise ValueError(f"{layer}: an output of {out} fits no padding; possible: {sorted(set(sizes))}")
    precision = precisions[bits]
    uniform = accounting == "uniform"
    groups = layer.groups if uniform else 1  # they run one after another
    group = layer._replace(in_c=layer.in_c // groups, out_c=layer.out_c // groups)

    # the energy by level (5, K) and the cycles (K,) of every tiling, then the best one
    tilings = tilings_within_limits(group, precision, uniform, hardware)
    levels_pj, cycles = traffic(group, tilings, precision, uniform, hardware)
    energy_pj = sum(levels_pj)
    if uniform:
        best = np.lexsort((cycles, energy_pj))[0]
    else:
        energy_score = (energy_pj - energy_pj.min()) / energy_pj.max()
        best = np.argmin(energy_score + (cycles - cycles.min()) / cycles.max())
    levels_mj = [float(level[best]) * groups * 1e-9 for level in levels_pj]
    cycle_ns = hardware.clock_ns
    if layer.op == "shift" and not uniform:
        cycle_ns *= hardware.official_shift_bits / 32
    latency_ms = float(cycles[best]) * groups * cycle_ns * 1e-6
    return Cost(sum(levels_mj), latency_ms, *levels_mj, Tiling(*(int(factor[best]) for factor in tilings)))


def pair(value):
    """Return a kernel, stride or image size as (down, across)."""
    return value if isinstance(value, (tuple, list)) else (value, value)


def ceil_div(a, b):
    """Return a / b rounded up."""
    return -(-a // b)


def traffic(layer, tilings, precision, uniform, hardware):
    """Return the energy by level (pJ) and the cycles of every tiling (official get_energy, get_latency).

        dram    I*M3 + Wt*N3*E3 + O                   buffer  I*M3*M2 + O*max(2(C2-1), 1)
        noc     I*M3*M2*M1*R*E/H + Wt*N3*E3*E1 + psum O*max(C2(C1 R-1), 1)
        rf      MACs inputs + MACs weights + O*max(2 C2 C1 R (C0 S-1), 1)
        cycles  N3 N0 M3 M2 M0 C2 C0 E3 F S

    I = N H W C, Wt = R S C M, O = N E F M words. The outer factors are rounded up, so a product such as M3*M2
    stands as the ceiling of M/(M0*M1).
    """
    op, n, kernel, _, h, w, c, e, f, m, _ = layer
    r, s = pair(kernel)
    n0, n3, m0, m1, _, m3, c0, c1, c2, _, e3 = tilings  # each (K,), one entry a tiling
    m_passes = ceil_div(m, m0 * m1)  # M3*M2
    c_passes = ceil_div(c, c0)  # C2*C1
    inputs = n * h * w * c
    weights = r * s * c * m
    outputs = n * e * f * m
    macs = outputs * r * s * c

    # words of 16 bits that one activation, one weight has
    shift = op == "shift"
    act = (hardware.official_shift_bits if shift and not uniform else precision.bits) / hardware.word_bits
    weight = hardware.shift_weight_bits / hardware.word_bits if shift and uniform else act
    # one primitive a MAC, or the accumulation too
    counted = PRIMITIVES[op] if uniform else PRIMITIVES[op][:1]
    compute = sum(getattr(precision, name + "_pj") for name in counted) * macs
    dram = hardware.dram_pj * (act * (inputs * m3 + outputs) + weight * weights * n3 * e3)
    buffer = hardware.buffer_pj * (act * (inputs * m_passes + outputs * np.maximum(2 * (c2 - 1), 1)))
    # an input row goes to the R cells of a filter and to all M3*M2*M1 groups of filters
    noc = hardware.noc_pj * (act * n * w * c * r * e * ceil_div(m, m0) + weight * weights * n3 * e)
    if op == "add" and not uniform:  # official: adders get their data for nothing
        dram = buffer = noc = 0.0
    noc = noc + hardware.noc_psum_pj * (act * outputs * np.maximum(c_passes * r - c2, 1))
    # each MAC reads an input and a weight from registers; partial sums are read and written back
    rf_words = act * (macs + outputs * np.maximum(2 * r * (c * s - c_passes), 1))
    rf = hardware.rf_pj * rf_words + hardware.rf_weight_pj * weight * macs
    cycles = n * m_passes * m0 * c2 * c0 * e3 * f * s
    return np.broadcast_arrays(compute, dram, buffer, noc, rf), cycles


def tilings_within_limits(layer, precision, uniform, hardware):
    """Return a Tiling of arrays (K,): all within the limits; ValueError with the limit that leaves none.

    Official (valid_tiling): exact divisors. Uniform: steps of LADDER, cut at the layer's sizes; M2 is the
    most that the buffer holds, M0 one of the two largest steps, for its filters share each input.
    """
    _, n, kernel, stride, h, w, c, e, f, m, _ = layer
    r, s = pair(kernel)
    stride_h, stride_w = pair(stride)
    array = precision.array * hardware.pe_limit
    sizes = (n, m, m, m, c, c, e)
    if uniform:
        m0 = LADDER[LADDER <= precision.output_rf][-2:]
        c0 = LADDER[LADDER < max(precision.input_rf, 2)]
        cells = LADDER[LADDER < max(array / r, 2)]
        steps = (2 ** np.arange(17), m0, cells, [1], c0, cells, cells)
        factors = [np.unique(np.minimum(ladder, size)) for ladder, size in zip(steps, sizes)]
    else:
        factors = [[d for d in range(1, size + 1) if size % d == 0] for size in sizes]
        factors[1] = [m0 for m0 in factors[1] if m0 <= precision.output_rf]
    n0, m0, m1, m2, c0, c1, e1 = np.ix_(*factors)  # an axis each: they broadcast to every combination

    # the buffer holds one input tile and M2 output tiles
    in_words = n0 * c0 * c1 * ((e1 - 1) * stride_h + r) * ((f - 1) * stride_w + s)
    out_words = n0 * m0 * m1 * e1 * f
    if uniform:
        m2 = np.clip((precision.buffer - 1 - in_words) // out_words, 1, ceil_div(m, m0 * m1))
    limits = {
        f"C0*S < {precision.input_rf}": c0 * s < precision.input_rf,
        f"M0*C0*S < {precision.weight_rf}": m0 * c0 * s < precision.weight_rf,
        "exact divisors": uniform or (m % (m0 * m1 * m2) == 0) & (c % (c0 * c1) == 0),
        "E1 > 1": uniform or h == w == e == f == 1 or e1 > 1,
        f"M1*C1*E1*R < {array}": m1 * c1 * e1 * r < array,
        f"input and output tile < {precision.buffer} words": in_words + out_words * m2 < precision.buffer,
    }
    fits = True
    for limit, mask in limits.items():
        fits = fits & mask
        if not fits.any():
            raise ValueError(f"no tiling fits {layer}: {limit}")

    # N3, M3, C2, E3: what the factors inside leave of each size
    factors = (n0, m0, m1, m2, c0, c1, e1)
    places = np.nonzero(fits)  # faster than the mask: it is read once
    n0, m0, m1, m2, c0, c1, e1 = (np.broadcast_to(factor, fits.shape)[places] for factor in factors)
    n3, m3 = ceil_div(n, n0), ceil_div(m, m0 * m1 * m2)
    c2, e3 = ceil_div(c, c0 * c1), ceil_div(e, e1)
    return Tiling(n0, n3, m0, m1, m2, m3, c0, c1, c2, e1, e3)


# ------------------------------------------------------------------------------------ §3 whole networks


def network_cost(layers, bits=32, accounting="official", hardware=EYERISS):
    """Return the sum of layer_cost over layers that run one after another."""
    costs = [layer_cost(layer, bits, accounting, hardware) for layer in layers]
    return Cost(*(math.fsum(getattr(cost, name) for cost in costs) for name in Cost._fields[:-1]))


def operations(layers):
    """Return {"mults", "shifts", "adds", "macs"}: the PRIMITIVES of every MAC, or of what stands for one."""
    counts = {"mults": 0, "shifts": 0, "adds": 0, "macs": 0}
    for layer in layers:
        outputs = layer.batch * layer.out_h * layer.out_w * layer.out_c
        macs = outputs * math.prod(pair(layer.kernel)) * layer.in_c // layer.groups
        for name in (*PRIMITIVES[layer.op], "mac"):
            counts[name + "s"] += int(macs)
    return counts


def flops(layers):
    """Return 2 * MACs of a translation network as the published counter has them, light sums left out."""
    return 2 * operations([layer for layer in layers if layer.op not in ("conv", "add")])["macs"]


def count_params(space, arch):
    """Return the number of parameters of a network; in translation, embeddings are not counted."""
    is_text = isinstance(space, TokenSpace)
    with torch.device("meta"):  # takes no memory
        network = Translator(space, 0, arch, sharing="none") if is_text else build(space, arch)
    return sum(p.numel() for p in network.parameters())


def arch_costs(space, arch, bits=32, accounting="official", hardware=EYERISS, table=None, image=None):
    """Return energy_mj, latency_ms, params, mults, shifts, adds, macs; with a measured_table measured_ms."""
    layers = network_layers(space, arch, image)
    cost = network_cost(layers, bits, accounting, hardware)
    costs = {"energy_mj": cost.energy_mj, "latency_ms": cost.latency_ms, "params": count_params(space, arch)}
    measured = {"measured_ms": measured_latency_ms(space, arch, table)} if table else {}
    return costs | measured | operations(layers)


def network_layers(space, arch, image=None):
    """Return the Layers of a network in execution order, batch 1 (official cal_energy.py)."""
    space = find_space(space) if isinstance(space, str) else space
    if isinstance(space, TokenSpace):
        return token_layers(space.genes(space.validate(arch)), space.qkv, space.kernels)
    stem = space.stem
    size = pair(space.image if image is None else image)  # a side or (H, W)
    layers = [row("conv", size, space.in_channels, stem.width, stem.kernel, stem.stride)]
    size = shrink(size, 2 * stem.stride if stem.pool else stem.stride)
    width = space.block_input()
    if not space.retraining:  # input projection
        layers.append(row("conv", size, stem.width, stem.width, groups=stem.width))
        layers.append(row("conv", size, stem.width, width))
    for stage, letter, entrance in space.walk(arch):
        stride = space.strides[stage] if entrance == "down" else 1
        out_c = space.widths[stage]
        layers += block_rows(OPS[letter], size, width, out_c, stride, space.head_dim, space.retraining)
        size = shrink(size, stride)
        width = out_c
    return layers + [row("linear", POINT, width, space.classes)] * (2 if space.distilled else 1)


def shrink(size, stride):
    """Return the size (H, W) of a map after a stride; kernels are odd and padded by kernel // 2."""
    return tuple(ceil_div(side, stride) for side in size)


def row(op, size, in_c, out_c, kernel=1, stride=1, groups=1, batch=1):
    """Return the Layer on a map of a size (H, W); a linear layer is a 1x1 convolution of `batch` points."""
    return Layer(op, batch, kernel, stride, *size, in_c, *shrink(size, stride), out_c, groups)


@lru_cache(maxsize=None)
def block_rows(op, size, in_c, out_c, stride, head_dim, retraining):
    """Return the Layers of a block in the order in which the official script lists them."""
    conv = partial(row, "conv" if op == "attn" else op)
    small = shrink(size, stride)
    p = out_c // 4
    rows = []
    if stride > 1 and not retraining:  # shortcut; in retraining behind a pool
        rows += [conv(size, in_c, out_c, 3, stride)]
    elif stride > 1 or in_c != out_c:
        rows += [conv(small, in_c, out_c)]
    rows += [conv(size, in_c, p), conv(size, p, p, 3, stride, groups=p)]
    if op == "attn":
        tokens = small[0] * small[1]
        scores = row("matmul", POINT, head_dim, tokens, batch=p // head_dim * tokens)
        means = row("matmul", POINT, tokens, tokens, batch=p)  # of all heads
        rows += [conv(small, p, 3 * p), scores, means]  # the first makes queries, keys and values
    else:
        rows += [conv(small, p, p, 3)]
    rows += [conv(small, p, out_c)]
    if retraining and op != "attn":  # squeeze-excitation
        rows += [row("conv", POINT, out_c, out_c // 16), row("conv", POINT, out_c // 16, out_c)]
    return tuple(rows)


def token_layers(genes, qkv, kernels, tokens=30):
    """Return the Layers of an encoder-decoder, `tokens` source and target tokens in one pass (official sim).

    genes: see TokenSpace.genes; qkv: width of queries, keys, values; kernels: taps by layer. A light operator
    over K taps is charged as K inputs and C outputs a token (official: sqrt(K) x sqrt(K) kernels, projections
    half a shift, no shift layer). Left out: embedding, layer norm, softmax, logits.
    """
    linear = partial(row, "linear", POINT, batch=tokens)

    def attention(width, memory, heads, keys):
        key_or_value = linear(memory, qkv, batch=keys)
        scores = row("matmul", POINT, qkv // heads, keys, batch=heads * tokens)
        means = row("matmul", POINT, keys, qkv // heads, batch=heads * tokens)
        return [linear(width, qkv), key_or_value, key_or_value, scores, means, linear(qkv, width)]

    layers = []
    memory = genes["encoder"]["embed_dim"]
    for part, lists in genes.items():
        width = lists["embed_dim"]
        heads = lists["heads" if part == "encoder" else "self_heads"]
        for i, kind in enumerate(lists["types"]):
            side = width // len(kind)  # attention and a light operator have half of the width each
            if kind[0] == "T":
                layers += attention(side, side, heads[i], tokens)
            if kind[-1] != "T":
                square = linear(side, side)
                shift = [square._replace(op="shift")] if kind[-1] == "S" else []
                light = linear(kernels[i], side)._replace(op="conv" if kind[-1] == "C" else "add")
                layers += [square, *shift, light, square]
            if part == "decoder":
                keys = SOURCES[lists["sources"][i]] * tokens
                layers += attention(width, memory, lists["cross_heads"][i], keys)
            layers += [linear(width, lists["ffn"][i]), linear(lists["ffn"][i], width)]
    return layers


# ---------------------------------------------------------------------------------- §4 measured latency


def measured_table(space, path, image=None):
    """Return {"machine": {...}, "latency_ms": {part: ms}} of this machine; the JSON at `path` keeps it.

    The table of another machine, version, space or image is measured again. ValueError for what is no table.
    """
    path = Path(path)
    image = image or space.image
    kernels = kernels_for(torch.empty(0))
    machine = {"cpu": cpu_model().rpartition(": ")[2], "torch": torch.__version__}
    machine |= {"kernels": kernels and Path(kernels._name).stem, "space": space.name, "image": image}
    if path.exists():
        try:
            table = json.loads(path.read_text())
            if table["machine"] == machine:
                if not all(0 < ms < math.inf for ms in table["latency_ms"].values()):
                    raise ValueError
                return table
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is not a latency table: remove it or name another file") from None
        print(f"{path} is of another machine, space or version: measuring again", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)  # fails before the measurement
    deepest = "/".join("c" * depth for depth in max(space.depths, key=min))
    archs = [space.pure(letter, deepest) for letter in sorted(set("".join(space.ops)))]
    networks = [build(space, arch).eval() for arch in archs]
    times = times_ms(networks, torch.rand(1, space.in_channels, image, image))
    table = {"machine": machine, "latency_ms": {}}
    for arch, parts_ms in zip(archs, times):
        table["latency_ms"] |= zip(part_names(space, arch), parts_ms)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(table, indent=1))
    draft.replace(path)  # a reader never sees half a table
    return table


def measured_latency_ms(space, arch, table):
    """Return the predicted latency of a network on the measured machine: the sum of its parts."""
    if table["machine"]["space"] != space.name:
        raise ValueError(f"the table was measured for space {table['machine']['space']}, not {space.name}")
    return sum(table["latency_ms"][part] for part in part_names(space, arch))


def part_names(space, arch):
    """Return stem, blocks and head: stage, letter, and ^ for the first block of a stage or + for another."""
    stages = enumerate(space.validate(arch).split("/"), 1)
    blocks = [f"{n}{letter}{'+' if i else '^'}" for n, stage in stages for i, letter in enumerate(stage)]
    return ["stem", *blocks, "head"]


@torch.inference_mode()
def times_ms(networks, image, rounds=20):
    """Return the median milliseconds of stem, blocks and head of each network, on one thread."""
    stamps = []
    for network in networks:
        for part in (network.stem, *network.blocks, network.head):
            part.register_forward_hook(lambda *_: stamps.append(time.perf_counter()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = [[] for _ in networks]
    for _ in range(rounds):  # a round visits every network: a slow spell of the machine touches all alike
        for network, rows in zip(networks, times):
            network(image)  # warms the caches
            stamps[:] = [time.perf_counter()]
            network(image)
            rows.append(np.diff(stamps) * 1e3)
    torch.set_num_threads(threads)
    return [np.median(rows, axis=0).tolist() for rows in times]


# ------------------------------------------------------------------------------------- §5 command line


def main(argv=None):
    """Run the command line; exit code 2 with one sentence on stderr for a bad one."""
    parser = argparse.ArgumentParser(prog="cost_model.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--arch", required=True, help='e.g. cc/cc/tt, or a .json file with the key "arch"')
    parser.add_argument("--space", default="fashion", help="as in search.py, or bossnet_t0, bossnet_t1")
    parser.add_argument("--image", type=int, help="side; default: the space's")
    parser.add_argument("--bits", type=int, default=32, help="32 or 8")
    parser.add_argument("--accounting", default="official", help=" or ".join(ACCOUNTINGS))
    parser.add_argument("--pe-limit", type=int, default=192, help="168 or 192 in the published records")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--measure", metavar="FILE", help="add this machine's latency; FILE keeps the table")
    args = parser.parse_args(argv)
    try:
        space = find_space(args.space)
        arch = read_arch(space, args.arch)
        if isinstance(space, TokenSpace) and (args.image is not None or args.measure):
            raise ValueError(f"--image and --measure are for images, not for space {space.name}")
        layers = network_layers(space, arch, args.image)
        by_op = {}
        for op in [*dict.fromkeys(layer.op for layer in layers), "total"]:
            rows = [layer for layer in layers if op in (layer.op, "total")]
            cost = network_cost(rows, args.bits, args.accounting, replace(EYERISS, pe_limit=args.pe_limit))
            by_op[op] = {"layers": len(rows)} | operations(rows) | dict(zip(Cost._fields[:-1], cost))
        result = {"space": space.name, "arch": arch, "params": count_params(space, arch), "bits": args.bits}
        result |= {"accounting": args.accounting, "pe_limit": args.pe_limit}
        result |= {"flops": flops(layers)} if isinstance(space, TokenSpace) else {"image": layers[0].in_h}
        if args.measure:
            table = measured_table(space, args.measure, args.image)
            result["measured_ms"] = measured_latency_ms(space, arch, table)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    if args.json:
        print(json.dumps(result | by_op.pop("total") | {"by_op": by_op}, indent=1))
        return
    columns = ("layers", "macs", *LEVELS, "energy_mj", "latency_ms")
    print("  ".join(f"{name} {value}" for name, value in result.items()))
    print("op      " + "".join(f"{name:>12}" for name in columns))
    for op, costs in by_op.items():
        print(f"{op:8}" + "".join(f"{costs[name]:12.4g}" for name in columns))


if __name__ == "__main__":
    main()

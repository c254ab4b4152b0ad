"""Claims of cost_model.py: published records, the uniform rules, the tiling search, networks, its commands.

References are the official record files, sums by hand, plain loops and the built networks.
"""

import doctest
import json
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import cost_model
from conftest import ROOT, TINY, command, rng
from cost_model import ACCOUNTINGS, EYERISS, LEVELS, PRIMITIVES, Hardware, Layer, Precision
from cost_model import arch_costs, count_params, layer_cost, network_cost, network_layers, operations
from results import energy
from results.energy import transformer_layers
from shiftaddnas import TOKEN_SPACES, Attention2d, Translator, build, find_space

V3 = "cc/cccc/sctaa/ttctt"
V4 = "cc/cscc/sctss/ttctt"
ARRAY_168 = Hardware(pe_limit=168)


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

# the same of some layers, above all shifts
T0_MIX_V4_256 = """
1 conv 1 7 2 256 3 128 64 1 6.8438884352 3.670016
1 shift 1 1 1 32 512 32 128 1 0.91424325632 0.65536
1 shift 1 3 1 32 128 32 128 128 1.90958927872 1.96608
1 shift 1 3 1 32 128 32 128 1 1.90958927872 1.96608
1 shift 1 1 1 32 128 32 512 1 0.92062482432 0.65536
1 shift 1 1 1 16 512 16 1024 1 1.88065316864 1.31072
1 shift 1 1 1 32 512 32 256 1 1.76295051264 1.31072
1 shift 1 3 2 32 256 16 256 256 2.07334735872 1.96608
3 shift 1 3 1 16 256 16 256 1 1.98323535872 1.96608
3 shift 1 1 1 16 256 16 1024 1 0.95337644032 0.65536
1 matmul 1024 1 1 1 64 1 256 1 0.7916486656 0.524288
1 matmul 256 1 1 1 256 1 256 1 0.7193100288 0.524288
2 shift 1 1 1 16 1024 16 256 1 0.93799596032 0.65536
2 shift 1 3 1 16 256 16 256 256 1.98323535872 1.96608
8 matmul 512 1 1 1 64 1 64 1 0.1038106624 0.065536
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
        cost = layer_cost(layer, hardware=Hardware(pe_limit=pe_limit))
        assert cost.energy_mj == pytest.approx(energy_mj, rel=1e-9), layer
        assert cost.latency_ms == pytest.approx(latency_ms, rel=1e-9), layer
        assert sum(cost[2:7]) == pytest.approx(cost.energy_mj, rel=1e-12)


def test_arch_string_gives_the_recorded_layers():
    assert Counter(network_layers("bossnet_t0", V3, 224)) == {row[1]: row[0] for row in golden(T0_MIX_V3_224)}


def test_layers_come_in_execution_order():
    layers = network_layers("bossnet_t0", V3, 224)
    rows = [(7, 3, 64)] + [(1, 64, 256), (1, 64, 64), (3, 64, 64), (3, 64, 64), (1, 64, 256), (1, 256, 16)]
    assert [(layer.kernel, layer.in_c, layer.out_c) for layer in layers[:7]] == rows
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
def test_published_totals_and_macs(space, arch, image, pe_limit, energy_mj, latency_ms):
    cost = network_cost(network_layers(space, arch, image), hardware=Hardware(pe_limit=pe_limit))
    giga_macs = operations(network_layers(space, arch, 224))["macs"] / 1e9
    assert giga_macs == pytest.approx({"bossnet_t0": 3.747, "bossnet_t1": 6.403}[space], abs=5.1e-4)
    assert cost[:2] == pytest.approx((energy_mj, latency_ms), abs=5.1e-4)


def test_published_counts_energy_split_and_macs():
    layers = network_layers("bossnet_t0", V3)
    published = {"conv": (78, 211.502, 2.903), "add": (8, 20.760, 0.438), "shift": (5, 6.692, 0.373)}
    for op, (count, energy_mj, giga_macs) in {**published, "matmul": (10, 1.452, 0.030)}.items():
        rows = [layer for layer in layers if layer.op == op]
        cost = network_cost(rows, hardware=ARRAY_168)
        assert (len(rows), cost.energy_mj, operations(rows)["macs"] / 1e9) == pytest.approx(
            (count, energy_mj, giga_macs), abs=5.1e-4
        )


@pytest.mark.parametrize(
    "shape, energy_mj, latency_ms",
    [
        ((512, 2048, 8), 69.41455, 41.82336),
        ((1024, 4096, 16, 6, 512), 214.33576, 130.24512),
        ((1024, 4096, 16, 6, 1024), 272.94733, 166.22208),
    ],
)
def test_transformer_totals(shape, energy_mj, latency_ms):
    cost = network_cost(transformer_layers(*shape), hardware=ARRAY_168)
    assert cost[:2] == pytest.approx((energy_mj, latency_ms), abs=5.1e-6)


def test_official_quirks_by_hand():
    # every factor 1; pJ at 32 bits
    memory = {"dram": 400 * 3, "buffer": 44.4 * 2, "noc": 14.8 * 2 + 7.4, "rf": 7.4 + 14.8 + 7.4}
    assert layer_cost(ONE).energy_mj == pytest.approx((3.7 + sum(memory.values())) * 1e-9)
    add = layer_cost(ONE._replace(op="add"))
    assert add[2:7] == pytest.approx([v * 1e-9 for v in (0.9, 0, 0, 7.4, 29.6)]) and add.latency_ms == 4e-6
    for bits, pj in ((32, 0.13), (8, 0.024)):  # 10-bit words at either width
        shift = layer_cost(ONE._replace(op="shift"), bits)
        assert shift.energy_mj == pytest.approx((pj + sum(memory.values()) * 10 / 32) * 1e-9)
        assert shift.latency_ms == pytest.approx(1.25e-6)
    depthwise = Layer("conv", 1, 3, 1, 8, 8, 16, 8, 8, 16, 16)
    assert layer_cost(depthwise) == layer_cost(depthwise._replace(groups=1))


# ---- uniform accounting: one test by hand a rule ----

ONE = Layer("conv", 1, 1, 1, 1, 1, 1, 1, 1, 1)  # one word in, one weight, one word out, one tiling


def uniform(layer, bits=32):
    return layer_cost(layer, bits, "uniform", ARRAY_168)


def test_uniform_word_width_is_five_bits_for_shift_weights_only():
    # DRAM 12.5 pJ a bit: input 32 + output 32 + weight 32 or 5 bits
    assert uniform(ONE).dram_mj == pytest.approx(12.5 * 96 * 1e-9)
    assert uniform(ONE._replace(op="shift")).dram_mj == pytest.approx(12.5 * 69 * 1e-9)
    assert uniform(ONE._replace(op="shift"), 8).dram_mj == pytest.approx(12.5 * 21 * 1e-9)
    # register file: input and partial sum 7.4 each, weight 2 * 7.4 at 32 bits and 5/32 of it at 5
    assert uniform(ONE._replace(op="shift")).rf_mj == pytest.approx((14.8 + 14.8 * 5 / 32) * 1e-9)


@pytest.mark.parametrize(
    "op, pj_32, pj_8",
    [*((op, 4.6, 0.23) for op in ("conv", "linear", "matmul")), ("shift", 1.03, 0.054), ("add", 1.8, 0.06)],
)
def test_uniform_compute_counts_the_accumulation_and_other_levels_and_clock_are_the_same(op, pj_32, pj_8):
    for bits, pj in ((32, pj_32), (8, pj_8)):
        cost = uniform(ONE._replace(op=op), bits)
        assert cost.compute_mj == pytest.approx(pj * 1e-9) and cost.latency_ms == 4e-6
        assert op == "shift" or cost[3:7] == uniform(ONE, bits)[3:7]  # its weights are narrower


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
    op = rng.choice(list(PRIMITIVES))
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


def test_uniform_energy_is_monotone_and_a_shift_never_costs_more_than_a_conv():
    rng = random.Random(0)
    for _ in range(30):
        layer = random_layer(rng)
        cost = uniform(layer)
        assert uniform(layer, 8).energy_mj < cost.energy_mj, layer
        for larger in larger_layers(layer, rng):
            assert uniform(larger).energy_mj > cost.energy_mj, (layer, larger)
        for bits in (32, 8):
            shift, conv = (uniform(layer._replace(op=op), bits).energy_mj for op in ("shift", "conv"))
            assert shift < conv, layer


# ---- the tiling search itself ----


def brute_force(layer, pe_limit):
    """Official choice by plain loops: least normalised energy + latency of all tilings; conv, 32 bits."""

    def tuples(n, parts):
        if parts == 1:
            return [(n,)]
        return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in tuples(n // d, parts - 1)]

    _, n, r, st, h, w, c, e, f, m, _ = layer
    costs = []
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
                    costs.append((pj * 1e-9, n3 * n0 * m3 * m2 * m0 * c2 * c0 * e3 * f * r * 4e-6))
    energies, latencies = zip(*costs)
    return min(
        costs, key=lambda x: (x[0] - min(energies)) / max(energies) + (x[1] - min(latencies)) / max(latencies)
    )


@pytest.mark.parametrize(
    "layer", [Layer("conv", 2, 3, 2, 9, 11, 6, 5, 6, 12), Layer("conv", 1, 5, 1, 8, 8, 4, 8, 8, 6)]
)
def test_official_choice_equals_plain_loops(layer):
    assert layer_cost(layer, hardware=ARRAY_168)[:2] == pytest.approx(brute_force(layer, 168), rel=1e-12)


def test_eight_bits_double_the_memories_and_quadruple_the_array():
    layer = Layer("conv", 1, 3, 1, 14, 14, 512, 14, 14, 512)
    tiling = layer_cost(layer, 8, hardware=ARRAY_168).tiling
    assert 168 <= tiling.m1 * tiling.c1 * tiling.e1 * 3 < 4 * 168
    assert 16 < tiling.m0 <= 32 or tiling.c0 * 3 >= 12


# ---- other hardware ----


def test_the_example_of_the_docstring_runs():
    assert doctest.testmod(cost_model, raise_on_error=True).attempted >= 4


# blocks of MobileNetV2 (expand, depthwise, project) that project by shifts, one of them with 1x5 kernels
MOBILE_ROWS = [
    Layer("conv", 1, 1, 1, 56, 56, 24, 56, 56, 144),
    Layer("conv", 1, 3, 2, 56, 56, 144, 28, 28, 144, 144),
    Layer("shift", 1, 1, 1, 28, 28, 144, 28, 28, 32),
    Layer("conv", 1, 1, 1, 28, 28, 32, 28, 28, 192),
    Layer("conv", 1, (1, 5), 1, 28, 28, 192, 28, 28, 192, 192),
    Layer("shift", 1, 1, 1, 28, 28, 192, 28, 28, 32),
]


@pytest.mark.parametrize("accounting", ACCOUNTINGS)
def test_energy_scales_with_the_table_and_latency_with_the_clock(accounting):
    def twice(row):
        return {name: 2 * value for name, value in row.items() if name.endswith("_pj")}

    rows = tuple(row._replace(**twice(row._asdict())) for row in EYERISS.precisions)
    doubled = replace(EYERISS, precisions=rows, clock_ns=1.0, **twice(vars(EYERISS)))
    base = network_cost(MOBILE_ROWS, 32, accounting)
    cost = network_cost(MOBILE_ROWS, 32, accounting, doubled)
    assert cost[2:7] == pytest.approx([2 * level for level in base[2:7]])
    assert cost.latency_ms == pytest.approx(base.latency_ms / 4)
    assert network_cost(MOBILE_ROWS, 32, accounting) == base  # the cache keeps the two apart


def test_each_number_of_the_hardware_reaches_its_own_level():
    halved_ops = EYERISS.precisions[0]._replace(mult_pj=1.85, add_pj=0.45, shift_pj=0.065)
    changes = {
        "dram_mj": {"dram_pj": 100.0},
        "buffer_mj": {"buffer_pj": 11.1},
        "noc_mj": {"noc_pj": 3.7, "noc_psum_pj": 1.85},
        "rf_mj": {"rf_pj": 1.85, "rf_weight_pj": 3.7},
        "compute_mj": {"precisions": (halved_ops,)},
    }
    for accounting in ACCOUNTINGS:
        base = layer_cost(ONE, 32, accounting)
        for level, change in changes.items():
            cost = layer_cost(ONE, 32, accounting, replace(EYERISS, **change))
            ratios = {name: getattr(cost, name) / getattr(base, name) for name in LEVELS}
            assert ratios == pytest.approx({name: 0.5 if name == level else 1 for name in ratios})


def test_larger_memories_and_narrower_words_never_cost_energy_under_uniform_rules():
    large, _ = EYERISS.precisions
    big = Hardware(pe_limit=1024, precisions=(large._replace(buffer=262144),))
    half = Precision(16, 1.1, 0.4, 0.05, output_rf=16, input_rf=12, weight_rf=960, buffer=65536, array=1)
    widths = Hardware(precisions=(*EYERISS.precisions, half))
    runs = ((32, big), (8, widths), (16, widths), (32, widths))
    big, *by_width = (network_cost(MOBILE_ROWS, bits, "uniform", hardware) for bits, hardware in runs)
    assert big.energy_mj <= by_width[-1].energy_mj and big.latency_ms < by_width[-1].latency_ms
    assert sorted(by_width) == by_width


# ---- rows that users write ----


def test_kernels_as_pairs_and_numpy_integers_cost_what_plain_ints_do():
    plain = Layer("conv", 1, 3, 2, 9, 11, 6, 5, 6, 12)
    paired = plain._replace(kernel=(3, 3), stride=(2, 2))
    numpy_row = Layer("conv", *(np.int64(size) for size in plain[1:]))
    for accounting in ACCOUNTINGS:
        cost_model.layer_cost.cache_clear()  # equal numbers are equal keys
        assert len({layer_cost(row, 32, accounting) for row in (numpy_row, paired)}) == 1
    assert json.dumps(operations([paired, numpy_row])) == json.dumps(operations([plain, plain]))


def test_a_pair_is_a_kernel_of_rows_and_columns_by_hand():
    # one output of R x S taps: compute and memory traffic count R*S words, the array holds the R rows
    rows, columns = (Layer("conv", 1, kernel, 1, *kernel, 1, 1, 1, 1) for kernel in ((3, 1), (1, 3)))
    for row in (rows, columns):
        cost = uniform(row)
        assert cost.dram_mj == pytest.approx(400 * (3 + 3 + 1) * 1e-9)
        assert cost.compute_mj == pytest.approx(3 * 4.6 * 1e-9)
    assert uniform(rows).latency_ms == pytest.approx(4e-6)  # three cells at once
    assert uniform(columns).latency_ms == pytest.approx(3 * 4e-6)  # one cell, one tap a cycle


LAYER = Layer("conv", 1, 3, 1, 8, 8, 6, 8, 8, 8)


@pytest.mark.parametrize(
    "change, settings, message",
    [
        ({"op": "pool"}, {}, "op is 'pool': allowed are conv, linear, matmul, shift, add"),
        ({"batch": 0}, {}, "batch=0, .* must be positive"),
        ({"in_h": -3}, {}, "in_h=-3, .* must be positive"),
        ({"kernel": (3, 0)}, {}, r"kernel=\(3, 0\), .* must be positive"),
        ({"groups": 4}, {}, r"groups=4\).* groups divide in_c"),
        ({"out_h": 99}, {}, "an output of 99 fits no padding"),
        ({"groups": 3}, {}, r"groups=3\).* groups divide in_c and out_c"),
        ({}, {"accounting": "fair"}, "accounting is 'fair': allowed are official, uniform"),
        ({}, {"bits": 16}, "bits is 16: allowed are 32, 8"),
        ({}, {"bits": "32"}, "bits is '32'"),
    ],
)
def test_bad_layer_or_setting_is_named(change, settings, message):
    for cost_of in (layer_cost, lambda layer, **names: network_cost([LAYER, layer], **names)):
        with pytest.raises(ValueError, match=message) as error:
            cost_of(LAYER._replace(**change), **settings)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "accountings, layer, pe_limit, limit",
    [
        (ACCOUNTINGS, Layer("conv", 1, 13, 1, 20, 20, 4, 20, 20, 4), 192, r"C0\*S < 12"),
        (["official"], Layer("conv", 1, 7, 1, 37, 37, 3, 37, 37, 8), 192, r"M1\*C1\*E1\*R < 192"),
        (["official"], Layer("conv", 1, 3, 2, 2, 2, 8, 1, 1, 8), 192, "E1 > 1"),
        (ACCOUNTINGS, Layer("conv", 1, 1, 1, 4, 40000, 1, 4, 40000, 1), 192, "65536 words"),
        (ACCOUNTINGS, ONE, 1, r"M1\*C1\*E1\*R < 1$"),
    ],
)
def test_layer_that_no_tiling_fits_names_the_limit(accountings, layer, pe_limit, limit):
    for accounting in accountings:
        with pytest.raises(ValueError, match=limit):
            layer_cost(layer, 32, accounting, Hardware(pe_limit=pe_limit))


@pytest.mark.parametrize("name, value", [("pe_limit", 0), ("pe_limit", -5), ("clock_ns", 0.0), ("dram_pj", math.nan)])
def test_hardware_of_impossible_numbers_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got {value}"):
        Hardware(**{name: value})
    assert Hardware(dram_pj=0).dram_pj == 0  # a level may be free


# ---- layers against the real networks ----


def conv_macs_of(space, arch, size):
    """MACs of every convolution, shift, add and linear call of the built network, seen by forward hooks."""
    macs = []

    def count(module, inputs, output):
        if isinstance(module, torch.nn.Linear):
            macs.append(module.in_features * module.out_features)
        elif isinstance(module, Attention2d):
            macs.append(3 * module.qkv.shape[1] ** 2 * inputs[0].shape[2] * inputs[0].shape[3])
        else:
            macs.append(output.numel() * math.prod(module.weight.shape[1:]))

    with torch.device("meta"):
        network = build(space, arch).eval()
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, Attention2d)):
                module.register_forward_hook(count)
        network(torch.zeros(1, space.in_channels, *size))
    return sum(macs)


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


def test_arch_costs_are_the_parts_put_together():
    costs = arch_costs(TINY, "c/s/t")
    layers = network_layers(TINY, "c/s/t")
    names = ["energy_mj", "latency_ms", "params", "mults", "shifts", "adds", "macs"]
    assert list(costs) == names  # the order of the columns of search.json
    assert (costs["energy_mj"], costs["latency_ms"]) == network_cost(layers)[:2]
    assert costs["params"] == sum(p.numel() for p in build(TINY, "c/s/t").parameters())
    assert costs["macs"] == operations(layers)["macs"]
    other = Hardware(pe_limit=168, dram_pj=100.0)
    uniform_costs = arch_costs(TINY, "c/s/t", 8, "uniform", other)
    assert uniform_costs["energy_mj"] == network_cost(layers, 8, "uniform", other).energy_mj


def test_parameters_of_translation_are_those_of_the_built_network():
    space = TOKEN_SPACES["translation"]
    generator = rng()
    for arch in [space.sample(generator) for _ in range(12)]:
        network = Translator(space, 50, arch, sharing="none")
        counts = {name: p.numel() for name, p in network.named_parameters()}
        embeddings = sum(count for name, count in counts.items() if "embedding" in name)
        assert count_params(space, arch) == sum(counts.values()) - embeddings, arch


@pytest.mark.parametrize(
    "kind, ops", [("T", ""), ("C", "conv"), ("A", "add"), ("S", "shift add"), ("TS", "shift add")]
)
def test_types_of_translation_become_their_operators(kind, ops):
    space = TOKEN_SPACES["translation"]
    layers = network_layers("translation", space.pure(kind))
    assert {layer.op for layer in layers} == {"linear", "matmul", *ops.split()}
    mixing = [layer for layer in layers if layer.op in ("conv", "add", "shift")]
    width = 96 // len(kind)
    assert {layer.out_c for layer in mixing} <= {width}
    assert [layer.in_c for layer in mixing if layer.op != "shift"] == [3, 7, 15][: 3 if ops else 0]


# ---- measured latency and the command line ----


def test_measured_table_is_cached_and_predicts(tmp_path, monkeypatch, capsys):
    space = find_space("fashion")
    path = tmp_path / "new" / "latency.json"
    calls = []
    times_ms = cost_model.times_ms

    def two_rounds(networks, image):
        calls.append(len(networks))
        return times_ms(networks, image, rounds=2)

    monkeypatch.setattr(cost_model, "times_ms", two_rounds)
    table = cost_model.measured_table(space, path)
    assert cost_model.measured_table(space, path) == table and calls == [4]
    assert list(path.parent.iterdir()) == [path]
    parts = table["latency_ms"]
    assert len(parts) == 2 + 2 * (3 + 4 + 4) and min(parts.values()) > 0
    keys = ("stem", "1c^", "1s+", "2a^", "2t+", "3t^", "3c+", "head")
    predicted = cost_model.measured_latency_ms(space, "cs/at/tc", table)
    assert predicted == pytest.approx(sum(parts[key] for key in keys))
    assert arch_costs(space, "cs/at/tc", table=table)["measured_ms"] == predicted
    with pytest.raises(ValueError, match="fashion"):
        cost_model.measured_latency_ms(find_space("hytra"), "c/c/ccccc/ccccccccc", table)
    capsys.readouterr()
    table["machine"]["torch"] = "0.1"
    path.write_text(json.dumps(table))
    assert cost_model.measured_table(space, path)["machine"]["torch"] == torch.__version__ and len(calls) == 2
    assert "latency.json is of another machine" in capsys.readouterr().err


def test_every_part_of_a_network_is_timed():
    networks = [build(TINY, arch).eval() for arch in ("c/s/t", "c/cc/c")]
    threads = torch.get_num_threads()
    times = cost_model.times_ms(networks, torch.rand(1, 1, 28, 28), rounds=2)
    assert [len(parts) for parts in times] == [2 + 3, 2 + 4] and min(map(min, times)) > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("text", ["not JSON", "[]", "{}", "3", '{"latency_ms": {}}'])
def test_a_file_that_is_no_latency_table_is_named_and_kept(capsys, tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    code, out, err = run(capsys, "--arch", "cc/sa/tt", "--measure", path)
    assert code == 2 and not out and "other.json is not a latency table" in err and err.count("\n") == 1
    assert path.read_text() == text


def run(capsys, *argv):
    """Return (exit code, stdout, stderr) of the command line in this process."""
    code = 0
    try:
        cost_model.main([str(word) for word in argv])
    except SystemExit as end:
        code = end.code
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_json_of_the_published_network(capsys):
    flags = f"--space bossnet_t0 --arch {V3} --image 224 --pe-limit 168 --json"
    code, out, _ = run(capsys, *flags.split())
    result = json.loads(out)
    assert code == 0 and result["energy_mj"] == pytest.approx(242.264, abs=5e-4)
    assert result["params"] == 29_908_528
    assert result["latency_ms"] == pytest.approx(206.402, abs=5e-4) and result["layers"] == 103
    assert result["by_op"]["conv"]["layers"] == 78 and result["image"] == 224
    assert (result["accounting"], result["bits"], result["pe_limit"]) == ("official", 32, 168)
    assert result["macs"] / 1e9 == pytest.approx(3.747, abs=5e-4)
    assert sum(row["energy_mj"] for row in result["by_op"].values()) == pytest.approx(result["energy_mj"])
    assert sum(result[level] for level in LEVELS) == pytest.approx(result["energy_mj"])


def test_the_printed_table_has_a_row_an_operator(capsys):
    code, out, _ = run(capsys, *"--arch cc/sa/tt --image 20 --accounting uniform --bits 8".split())
    lines = out.splitlines()
    assert code == 0 and "bits 8  accounting uniform  pe_limit 192  image 20" in lines[0]
    rows = {words[0]: words[1:] for words in map(str.split, lines[1:])}
    assert list(rows) == ["op", "conv", "shift", "add", "matmul", "linear", "total"]
    cost = network_cost(network_layers("fashion", "cc/sa/tt", 20), 8, "uniform")
    assert float(rows["total"][-2]) == pytest.approx(cost.energy_mj, rel=1e-3)
    assert sum(float(rows[op][-2]) for op in list(rows)[1:-1]) == pytest.approx(cost.energy_mj, rel=1e-3)


def test_measured_latency_is_printed_and_in_the_json(capsys, tmp_path, monkeypatch):
    def a_millisecond_a_part(networks, image):
        return [[1.0] * (2 + len(network.blocks)) for network in networks]

    monkeypatch.setattr(cost_model, "times_ms", a_millisecond_a_part)
    flags = ("--arch", "cc/sa/tt", "--measure", tmp_path / "measured.json")
    assert "measured_ms 8.0\n" in run(capsys, *flags)[1]
    assert json.loads(run(capsys, *flags, "--json")[1])["measured_ms"] == 8


def test_an_arch_is_a_string_a_json_text_or_a_json_file(capsys, tmp_path):
    path = tmp_path / "winner.json"
    path.write_text('{"arch": "cc/sa/tt"}')
    assert run(capsys, "--arch", path) == run(capsys, "--arch", "cc/sa/tt")
    space = TOKEN_SPACES["translation"]
    arch = space.pure("TC")
    result = json.loads(run(capsys, "--space", "translation", "--arch", arch, "--json")[1])
    assert result["arch"] == arch and result["flops"] == cost_model.flops(network_layers(space, arch))
    genes = json.dumps(space.genes(arch))
    path.write_text(genes)
    for text in (genes, path):
        code, out, err = run(capsys, "--space", "translation", "--arch", text, "--json")
        assert (code, json.loads(out), err) == (0, result, "")


@pytest.mark.parametrize(
    "argv",
    [
        "--arch cc/xx/tt",
        "--arch cc/cccc/sctaa/ttctt",
        "--arch nowhere.json",
        "--arch cc/sa/tt --image 0",
        "--bogus",
        "",
        "--arch cc/sa/tt --image -3",
        "--arch cc/sa/tt --bits 16",
        "--arch cc/sa/tt --accounting fair",
        "--space nowhere --arch cc",
        "--space translation --arch cc/sa/tt",
        "--space translation --arch 96: --image 28",
        "--arch cc/sa/tt --pe-limit 1",
        "--arch cc/sa/tt --pe-limit 0",
        "--arch cc/sa/tt --bits 16 --measure x.json",
        "--arch cc/sa/tt --measure /dev/null/x.json",
    ],
)
def test_bad_command_line_is_one_sentence_and_exit_2(capsys, argv):
    code, out, err = run(capsys, *argv.split())
    assert code == 2 and not out and err.startswith("cost_model.py: error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_script_runs_alone():
    done = command("cost_model", "--arch", "cc/sa/tt")
    assert done.returncode == 0 and "total " in done.stdout and not done.stderr


# ---- results/energy.py ----


@pytest.mark.slow
def test_energy_program_writes_the_committed_table_and_prints_two_speeds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(energy, "TABLE", tmp_path / "energy.md")
    energy.main([])
    assert (tmp_path / "energy.md").read_text() == (ROOT / "results" / "energy.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(energy, "RANDOM_NETWORKS", 20)
    energy.main(["--benchmark"])
    lines = capsys.readouterr().out.splitlines()
    names = ["103 layers, cold caches", "20 random hytra networks"]
    assert [line.rpartition(":")[0] for line in lines] == names
    with pytest.raises(SystemExit) as end:
        energy.main(["--bogus"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1

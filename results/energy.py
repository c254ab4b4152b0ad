"""Energy and latency of every published network of ShiftAddNAS under both accountings.

    python -m results.energy                 writes results/energy.md, in seconds
    python -m results.energy --benchmark     prints two speeds of the cost model, in seconds
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import torch

import cost_model
from cost_model import ACCOUNTINGS, Hardware, network_cost, network_layers, token_layers
from shiftaddnas import find_space

TABLE = Path(__file__).with_suffix(".md")
RANDOM_NETWORKS = 10_000  # of the benchmark

# record, space, arch, ((image, array limit it was written with), ...) (official hw_record)
PUBLISHED = (
    ("T0_mix_v3", "bossnet_t0", "cc/cccc/sctaa/ttctt", ((224, 168), (256, 168), (288, 168))),
    ("T0_mix_v4", "bossnet_t0", "cc/cscc/sctss/ttctt", ((224, 168), (256, 192))),
    ("T1_mix_v3", "bossnet_t1", "cc/cccc/sctaa/ttctt", ((224, 168), (256, 168))),
    ("T1_mix_v4", "bossnet_t1", "cc/cscc/sctss/ttctt", ((224, 192), (256, 192))),
)
# name, arguments of transformer_layers
TRANSFORMERS = (
    ("base", (512, 2048, 8)),
    ("big, qkv 512", (1024, 4096, 16, 6, 512)),
    ("big, qkv 1024", (1024, 4096, 16)),
)
TEXT = """# Energy and latency of the published networks

32 bits. Official: the array limit of the record. Uniform: M1\\*C1\\*E1\\*R < 168 for all. Saved:
against the same network with a convolution block for every shift and add block, same accounting.
Written by `python -m results.energy`.

{table}

What remains of the saving: shift and add blocks save {official_mj} energy and {official_ms} latency as \
published, and {uniform_mj} energy and {uniform_ms} latency under uniform rules.
"""


def transformer_layers(width, ffn, heads, layers=6, qkv=None):
    """Return the Layers of the standard Transformer; qkv: default width."""
    values = dict.fromkeys(("heads", "self_heads", "cross_heads"), heads)
    values |= {"types": "T", "ffn": ffn, "sources": -1}
    part = {"embed_dim": width} | {name: [value] * layers for name, value in values.items()}
    return token_layers({"encoder": part, "decoder": part}, qkv or width, [1] * layers)


def costs_of(layers, limit):
    """Return a (2, 2) array of mJ and ms, a row an accounting; uniform always with an array of 168."""
    official = network_cost(layers, 32, "official", Hardware(pe_limit=limit))
    uniform = network_cost(layers, 32, "uniform", Hardware(pe_limit=168))
    return np.array([official[:2], uniform[:2]])


def table_row(name, image, limit, digits, costs, saved=None):
    """Return one line of the table; `saved`, in percent, has the shape of costs or is None."""
    cells = [name, str(image), str(limit)]
    for i in range(len(ACCOUNTINGS)):
        cells += [f"{value:.{digits}f}" for value in costs[i]]
        cells += ["", ""] if saved is None else [f"{value:.1f} %" for value in saved[i]]
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def energy_table():
    """Return the text of results/energy.md."""
    titles = "".join(f"| {accounting} mJ | ms | saved mJ | saved ms " for accounting in ACCOUNTINGS)
    lines = [f"| network | image | limit {titles}|", "|---" * 11 + "|"]
    all_saved = []
    for name, space, arch, images in PUBLISHED:
        twin = re.sub("[sa]", "c", arch)
        for image, limit in images:
            costs = costs_of(network_layers(space, arch, image), limit)
            saved = 100 - 100 * costs / costs_of(network_layers(space, twin, image), limit)
            lines.append(table_row(name, image, limit, 3, costs, saved))
            all_saved.append(saved)
    for name, shape in TRANSFORMERS:
        costs = costs_of(transformer_layers(*shape), 168)
        lines.append(table_row(f"Transformer {name}", "30 + 30 tokens", 168, 5, costs))
    spans = {}
    for i, accounting in enumerate(ACCOUNTINGS):
        for j, unit in enumerate(("mj", "ms")):
            column = [saved[i, j] for saved in all_saved]
            spans[f"{accounting}_{unit}"] = f"{min(column):.1f} to {max(column):.1f} % of the"
    return TEXT.format(table="\n".join(lines), **spans)


def benchmark():
    """Print two timings: the 103 layers of T0_mix_v3 from empty caches; random hytra networks, drawn too."""
    for cached in (cost_model.layer_cost, cost_model.block_rows):
        cached.cache_clear()
    start = time.perf_counter()
    network_cost(network_layers(*PUBLISHED[0][1:3]))
    print(f"103 layers, cold caches: {time.perf_counter() - start:.3f} s")
    space = find_space("hytra")
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for _ in range(RANDOM_NETWORKS):
        network_cost(network_layers(space, space.sample(generator)))
    print(f"{RANDOM_NETWORKS} random hytra networks: {time.perf_counter() - start:.3f} s")


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="results.energy", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--benchmark", action="store_true", help="print the speed of the cost model")
    args = parser.parse_args(argv)
    if args.benchmark:
        benchmark()
    else:
        TABLE.write_text(energy_table())
        print(f"wrote results/{TABLE.name}")


if __name__ == "__main__":
    main()

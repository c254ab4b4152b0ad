"""Draw the figures of the results: PNG files beside search.json, energy.png, and the winners as text.

    python -m results.figures                   archs, pareto, energy.png; results/translation/
    python -m results.figures out               out/pareto.png of one search

Ten seconds; needs matplotlib (pip install matplotlib).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import train
from cost_model import ACCOUNTINGS, EYERISS, LEVELS, PRIMITIVES, network_cost, network_layers
from results.energy import PUBLISHED
from results.search import TITLES, family
from search import measure_of, pareto_front
from shiftaddnas import find_space

HERE = Path(__file__).parent
# Okabe and Ito's colours. Of a letter: fill, ink, hatch; of a network of the table: fill, marker
BLACK, BLUE, SKY, YELLOW, RED, ORANGE = "#000000", "#0072B2", "#56B4E9", "#F0E442", "#D55E00", "#E69F00"
LETTERS = {"t": (BLACK, "w", ""), "c": (BLUE, "w", ""), "s": (SKY, "k", "//"), "a": (YELLOW, "k", "..")}
NETWORKS = {
    "winner": (RED, "*"), "random": ("w", "o"), "all-attention": (BLACK, "X"), "all-conv": (BLUE, "s"),
    "all-shift": (SKY, "D"), "all-add": (YELLOW, "^"), "reference": ("0.7", "P"),
}
LEVEL_LOOKS = zip(LEVELS, (YELLOW, BLUE, "#FFFFFF", SKY, ORANGE), ("", "", "//", "", ".."))


def new_figure(width, height):
    """Return a matplotlib figure, sizes in inches; ValueError, with the pip line, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    return Figure((width, height), layout="constrained")


def write_figure(figure, path):
    """Write a figure, whole or not at all."""
    train.replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    print(f"wrote {path}")


def cells(arch):
    """Return the letters or types of an arch, a list a stage; in translation of encoder and decoder."""
    if ":" not in arch:
        return [list(stage) for stage in arch.split("/")]
    return [[layer.split("-")[0] for layer in part.split(":")[1].split()] for part in arch.split("/")]


def strip(arch):
    """Return an arch as a line of text: stem  [s][s] / [s][s][c] / [s][c][a]  head."""
    stages = " / ".join("".join(f"[{kind}]" for kind in stage) for stage in cells(arch))
    return f"encoder / decoder  {stages}" if ":" in arch else f"stem  {stages}  head"


def plot_pareto(runs, path):
    """Draw energy against accuracy or BLEU of retrained networks, official and like for like, with fronts.

    A third panel has all networks that were scored with inherited weights.
    """
    space = find_space(runs[0]["settings"]["space"])
    rows = [row for run in runs for row in run["table"]]
    measure = measure_of(rows[0])
    scored = {}  # an arch of two searches counts once, with its better score
    for run in runs:
        for arch, fitness in run["scores"].items():
            scored[arch] = max(fitness, scored.get(arch, fitness))
    retrained = {}
    for row in rows:
        retrained.setdefault(row["arch"], []).append(row[measure])
    retrained = {arch: sum(values) / len(values) for arch, values in retrained.items()}
    loss = "minus loss, nats a token" if measure == "bleu" else "accuracy %"
    panels = [("official", "inherited weights, validation data", scored, loss)]
    panels += [(accounting, "retrained, test data", retrained, TITLES[measure]) for accounting in ACCOUNTINGS]
    figure = new_figure(12, 3.8)
    for axes, (accounting, title, points, label) in zip(figure.subplots(1, 3), panels):
        costs = {arch: network_cost(network_layers(space, arch), 32, accounting) for arch in points}
        energy = {arch: cost.energy_mj for arch, cost in costs.items()}
        front = pareto_front(points, energy.get)
        steps = [energy[arch] for arch in front], [points[arch] for arch in front]
        axes.step(*steps, where="post", color="0.4", linewidth=1, zorder=0)
        axes.scatter(energy.values(), points.values(), s=12, c="0.6")
        axes.set(title=title, xlabel=f"energy, mJ, {accounting}", ylabel=label)
        if points is retrained:
            for name in dict.fromkeys(family(row["name"]) for row in rows):
                archs = dict.fromkeys(row["arch"] for row in rows if family(row["name"]) == name)
                fill, marker = NETWORKS[name]
                place = [energy[arch] for arch in archs], [points[arch] for arch in archs]
                size = 150 if marker == "*" else 60
                axes.scatter(*place, s=size, c=fill, marker=marker, edgecolors="k", label=name)
    axes.legend(fontsize=8)
    write_figure(figure, path)


def boxes(arch):
    """Return (x, width, letter) of the strip of an arch: a cell a block, halves for a layer of two types."""
    strip = []
    x = 0.0
    for stage in cells(arch):
        for kind in stage:
            strip += [(x + i / len(kind), 1 / len(kind), letter) for i, letter in enumerate(kind)]
            x += 1.1
        x += 0.3
    return strip


def plot_archs(runs, path):
    """Draw winners and baselines as strips of letters, each with its mean accuracy or BLEU and its energy."""
    rows = [row for run in runs for row in run["table"] if family(row["name"]) != "random"]
    measure = measure_of(rows[0])
    networks = {}  # arch -> its rows, the winners first
    for row in sorted(rows, key=lambda row: [*NETWORKS].index(family(row["name"]))):
        networks.setdefault(row["arch"], []).append(row)
    strips = {arch: boxes(arch) for arch in networks}
    end = max(x + width for strip in strips.values() for x, width, _ in strip)
    figure = new_figure(2.8 + 0.55 * end, 0.5 + 0.32 * len(networks))
    axes = figure.subplots()
    for y, (arch, same) in enumerate(networks.items()):
        for x, width, letter in strips[arch]:
            fill, ink, hatch = LETTERS[letter.lower()]
            axes.barh(y, width, 0.8, x, align="center", color=fill, hatch=hatch, edgecolor="0.4")
            label = {"color": fill, "pad": 1.5, "linewidth": 0}
            axes.text(
                x + width / 2, y, letter, color=ink, ha="center", va="center", weight="bold", bbox=label
            )
        mean = sum(row[measure] for row in same) / len(same)
        axes.text(end + 0.3, y, f"{mean:.1f}   {same[0]['energy_mj']:.3f} mJ", va="center")
    axes.set_yticks(range(len(networks)), [family(same[0]["name"]) for same in networks.values()])
    axes.tick_params(length=0)
    axes.set(xlim=(-0.1, end + 3.5), ylim=(len(networks) - 0.5, -0.5), xticks=[], frame_on=False)
    axes.set_title(f"c conv, s shift, a add, t attention; {TITLES[measure]}, energy", fontsize=10, loc="left")
    write_figure(figure, path)


def plot_energy(space, winner, path):
    """Draw energy by operator and memory level, official and uniform, of a published network and a winner."""
    name, published_space, arch, ((image, limit), *_) = PUBLISHED[0]
    hardware = replace(EYERISS, pe_limit=limit)  # as the record of this network has it
    networks = {
        f"{name}, {image} x {image}": network_layers(published_space, arch, image),
        f"{space} {winner}": network_layers(space, winner),
    }
    figure = new_figure(9, 6)
    panels = figure.subplots(2, 2, sharey="row")
    looks = list(LEVEL_LOOKS)
    for pair, (title, layers) in zip(panels, networks.items()):
        for axes, accounting in zip(pair, ACCOUNTINGS):
            bars = {}
            for op in PRIMITIVES:
                rows = [layer for layer in layers if layer.op == op]
                cost = network_cost(rows, 32, accounting, hardware)
                if cost.energy_mj:
                    bars[op] = cost._asdict()
            below = [0.0] * len(bars)
            for level, colour, hatch in looks:
                heights = [bar[level] for bar in bars.values()]
                label = level.removesuffix("_mj")
                axes.bar(
                    list(bars), heights, 0.6, below, color=colour, hatch=hatch, edgecolor="k", linewidth=0.5,
                    label=label,
                )
                below = [low + height for low, height in zip(below, heights)]
            total_mj = network_cost(layers, 32, accounting, hardware).energy_mj
            axes.set_title(f"{title}, {accounting}: {total_mj:.3g} mJ", fontsize=10)
            axes.set_ylabel("energy (mJ)")
    figure.axes[0].legend(loc="upper right")
    write_figure(figure, path)


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", help="output folder of one search; default: the results")
    args = parser.parse_args(argv)
    if args.folder:
        run = json.loads((Path(args.folder) / "search.json").read_text(encoding="utf-8"))
        return plot_pareto([run], Path(args.folder) / "pareto.png")
    for folder in (HERE, HERE / "translation"):
        runs = json.loads((folder / "search.json").read_text(encoding="utf-8"))["runs"]
        plot_pareto(runs, folder / "pareto.png")
        plot_archs(runs, folder / "archs.png")
        print("\n".join(strip(run["winner"]) for run in runs))
        if folder == HERE:
            plot_energy(runs[0]["settings"]["space"], runs[0]["winner"], folder / "energy.png")


if __name__ == "__main__":
    train.run_command(main)

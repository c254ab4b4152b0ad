"""Searches a ShiftAddNAS supernet under a budget, retrains the winner and its rivals, and prints the table.

    python search.py                            the whole story on the embedded images, out/search.json
    python search.py --budget 0.4               at most 40 % of the energy of the all-conv network
    python search.py --max-energy-mj 0.5 --max-params 150000 --generations 10
    python search.py --space translation        the same for translation, BLEU in out/translation/search.json
    python search.py --study sharing            ways to share weights, resumable: results/sharing.md
    python search.py --summary out/0,out/1,out/2 --out results          mean and deviation over seeds
    python search.py --figures                  figures of the results, results/*.png

Run the same command again after an interruption: every phase goes on where it was. --resume says that this is
what you mean: it is an error then if there is nothing to go on from.
Evolution as in the official search.py: the fittest archs are parents; each generation is made of mutations,
crossovers and fresh random archs. Fitness is the accuracy on the validation images with inherited weights,
after batch-norm recalibration on training images (official: augmented training images, statistics averaged
over all archs). Only new archs inside the budget are scored, and the last generation counts. The fittest few
(--finalists) are retrained from scratch and the best of them on the validation images wins, for inherited
weights rank networks only roughly (official: the fittest). The test images are used once, for the table.
"""

import functools
import json
import math
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cost_model import ACCOUNTINGS, PRIMITIVES, PUBLISHED, all_of, count_params, draw_levels, figure_at
from cost_model import measured_latency_ms, measured_table, network_cost, network_layers, operations, short
from shiftaddnas import REACH, SPACES, TYPES, Sharing, SharedWeight, Supernet, TokenSpace
from shiftaddnas import build, find_space, median_ms, power_of_two
from train import Config, Sentences, accuracy, bleu, file_name, flag, load, load_data
from train import join_processes, load_supernet, make_model, make_optimizer, output_folder, parse, processes
from train import rank, recalibrate, run_command, space_of, take_step, tested, token_loss, train, translate
from train import use_device, write_text

SINGLE = ("arch", "init", "compile", "translate", "evaluate", "convert", "benchmark")  # of train.py alone
TRIES = 200  # draws for one child before the search says that the budget leaves nothing new


@dataclass
class SearchConfig(Config):
    """Flags of search.py: those of train.py (but SINGLE) and the evolution's."""

    budget: float = flag(
        0.5,
        "share of the energy of the all-conv network of the same depths, in translation of the largest "
        "all-attention network; 0: no such limit",
        low=0,
    )
    max_energy_mj: float = flag(0.0, "energy limit in mJ; 0: none", low=0)
    max_latency_ms: float = flag(0.0, "simulated latency limit in ms; 0: none", low=0)
    max_measured_ms: float = flag(
        0.0, "limit of the latency in ms measured on this machine, one image, one thread; 0: none", low=0
    )
    max_params: int = flag(0, "parameter limit; 0: none", low=0)
    max_macs: int = flag(0, "limit of multiply-, shift- and add-accumulates; 0: none", low=0)
    generations: int = flag(5, "generations after the first", low=0)
    parents: int = flag(8, "archs kept as parents", low=1)
    mutations: int = flag(5, "mutated children a generation", low=0)
    crossovers: int = flag(5, "crossed children a generation", low=0)
    random: int = flag(2, "fresh random archs a generation", low=0)
    first: int = flag(16, "random archs of the first generation", low=1)
    finalists: int = flag(3, "fittest archs that are retrained to find the winner", low=1)
    supernet_epochs: int = flag(0, "passes over the training data for the supernet; 0: --epochs", low=0)
    quick: bool = flag(False, "a short run to see that all works: settings `quick` of RECIPES in train.py")
    study: str = flag("", "no search: compare ways of weight sharing -> results/", choices=("", "sharing"))
    summary: str = flag("", "no search: mean and deviation of these finished ones, A,B,... -> OUT/search.md")
    figures: bool = flag(False, "no search: figures of the results in results/ -> PNG files there")


# ----------------------------------------------------------------------------------------------- budget


COSTS = ("energy_mj", "latency_ms", "measured_ms", "params", "macs")  # each can be limited by --max-<cost>


def describe(space, arch, table=None):
    """Costs of one arch: energy_mj, latency_ms (official accounting), params, mults, shifts, adds, macs; with
    a table of measured latencies measured_ms too."""
    layers = network_layers(space, arch)
    cost, params = network_cost(layers), count_params(space, arch)
    costs = {"energy_mj": cost.energy_mj, "latency_ms": cost.latency_ms, "params": params}
    if table:
        costs["measured_ms"] = measured_latency_ms(space, arch, table)
    return costs | operations(layers)


@functools.cache
def read_table(space, path):
    """The table of measured latencies at `path`, measured now if it is not there; read once."""
    return measured_table(space, path)


def latency_table(config, space):
    """Measured latencies, kept in the output folder, if this search limits them; else None."""
    return read_table(space, os.path.join(config.out, "measured.json")) if config.max_measured_ms else None


def reference(space, arch):
    """The network that --budget is a share of: all-conv of the same depths; the largest all-attention one in
    translation."""
    return space.extreme(max, "T") if isinstance(space, TokenSpace) else all_of("c", space, arch)


def key_of(arch):
    """An arch as text: the key of scores."""
    return arch if isinstance(arch, str) else json.dumps(arch)


def arch_of(key):
    """The arch of a key."""
    return json.loads(key) if key.startswith("{") else key


def limits(config, space, arch):
    """{cost: largest allowed value} for an arch."""
    given = {name: getattr(config, "max_" + name) for name in COSTS}
    found = {name: value for name, value in given.items() if value}
    if config.budget:
        share = config.budget * network_cost(network_layers(space, reference(space, arch))).energy_mj
        found["energy_mj"] = min(share, found.get("energy_mj", share))
    return found


def fits(config, space, arch):
    """True if the arch is inside every limit."""
    allowed = limits(config, space, arch)
    if "energy_mj" in allowed and network_cost(network_layers(space, arch)).energy_mj > allowed["energy_mj"]:
        return False
    costs = describe(space, arch, latency_table(config, space)) if set(allowed) - {"energy_mj"} else {}
    return all(costs[name] <= allowed[name] for name in allowed if name != "energy_mj")


def candidates(space):
    """Archs among which the cheapest of the space are: one op or type everywhere, smallest sizes."""
    if isinstance(space, TokenSpace):
        return [space.extreme(min, kind) for kind in TYPES]
    return [
        all_of(letter, space, "/".join("c" * depth for depth in depths))
        for letter in "csat"
        for depths in space.depths
    ]


# -------------------------------------------------------------------------------------------- evolution


def evolve(config, space, score, state, report):
    """Evolutionary search; fitness is score(arch). Returns {"scores": {arch: fitness}, "generation", "rng"}.

    `state` is {} or what an interrupted search saved with report(state), which runs after every generation.
    A child that cannot be drawn new and inside the budget in TRIES draws is left out, so a small space or a
    tight budget ends the search instead of hanging it. Raises ValueError if nothing at all fits.
    """
    generator = torch.Generator().manual_seed(config.seed)
    scores = state.setdefault("scores", {})
    if "rng" in state:
        generator.set_state(torch.tensor(state["rng"], dtype=torch.uint8))
    for generation in range(state.get("generation", -1) + 1, config.generations + 1):
        parents = sorted(scores, key=lambda arch: (-scores[arch], arch))[: config.parents]

        def pick():
            return arch_of(parents[int(torch.randint(len(parents), (), generator=generator))])

        makers = [lambda: space.sample(generator)] * (config.random if parents else config.first)
        if parents:
            makers = (
                [lambda: space.mutate(pick(), generator)] * config.mutations
                + [lambda: space.crossover(pick(), pick(), generator)] * config.crossovers
                + makers
            )
        children = {}  # a dict keeps the order of drawing
        for make in makers:
            for _ in range(TRIES):
                child = make()
                key = key_of(child)
                if key not in scores and key not in children and fits(config, space, child):
                    children[key] = child
                    break
        if not scores and not children:
            raise ValueError(nothing_fits(config, space))
        scores.update(score_all(score, children))
        state.update(generation=generation, rng=generator.get_state().tolist())
        report(state)
        if not children:
            print("no new arch inside the budget: the search ends here")
            break
    return state


def score_all(score, children):
    """{key: score(arch)} of {key: arch}; of several processes each scores a share, and all know all."""
    keys, shares = list(children), [None] * processes()
    own = {key: score(children[key]) for key in keys[rank() :: processes()]}
    if processes() == 1:
        return own
    dist.all_gather_object(shares, own)
    found = {key: fitness for share in shares for key, fitness in share.items()}
    return {key: found[key] for key in keys}


def nothing_fits(config, space):
    """The sentence for a budget that no arch meets."""
    table, found = latency_table(config, space), candidates(space)
    costs = [describe(space, arch, table) for arch in found]
    need = {name: min(own[name] for own in costs) for name in COSTS if name in costs[0]}
    full = [network_cost(network_layers(space, reference(space, arch))).energy_mj for arch in found]
    share = min(own["energy_mj"] / energy for own, energy in zip(costs, full))
    asked = ", ".join(
        f"--{name.replace('_', '-')} {getattr(config, name)}"
        for name in ("budget", *("max_" + name for name in COSTS))
        if getattr(config, name)
    )
    measured = f"{need['measured_ms']:.4g} ms measured, " if "measured_ms" in need else ""
    return (
        f"no arch of space {space.name} is inside {asked}; the cheapest networks need "
        f"{need['energy_mj']:.4g} mJ ({share:.2f} of the full one), {need['latency_ms']:.4g} ms, "
        f"{measured}{need['params']} params, {need['macs']} macs"
    )


# ------------------------------------------------------------------------------------------------ story


def retrain(config, space, data, arch):
    """The network of an arch trained from scratch, with the one recipe of all rivals; kept in the folder."""
    path = os.path.join(config.out, f"retrain-{file_name(arch)}.pt")
    return train(config, space, data, make_model(config, space, data, arch), arch, path)


def fitness(config, data, network, arch=None):
    """Accuracy of a network on the validation images; in translation minus its loss, in nats a token."""
    if isinstance(data, Sentences):
        return -token_loss(network, data.val, arch, config.device)[0]
    return accuracy(network, data, data.val, config.device)


def choose(config, space, data, scores, count):
    """(arch, fitness, fitness retrained) of the `count` fittest archs, the best retrained one first. In
    translation they differ in their types: inherited weights hardly tell sizes apart."""
    fittest, found = {}, []
    for key in sorted(scores, key=lambda key: (-scores[key], key)):
        fittest.setdefault(short(arch_of(key)), key)
    for key in list(fittest.values())[:count]:
        reached = fitness(config, data, retrain(config, space, data, arch_of(key)))
        found.append((arch_of(key), scores[key], reached))
        print(f"finalist {short(arch_of(key))}: fitness {scores[key]:.2f}, retrained {reached:.2f}")
    return sorted(found, key=lambda row: (-row[2], -row[1], key_of(row[0])))


def rivals(config, space, winner):
    """Name -> arch of the networks that are retrained beside the winner."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    draws = (space.sample(generator) for _ in range(TRIES))
    drawn = next((arch for arch in draws if arch != winner and fits(config, space, arch)), winner)
    if isinstance(space, TokenSpace):
        pure = {"all-attention": "T", "all-conv": "C", "all-add": "A", "all-shift": "S"}
        archs = {name: space.extreme(max, kind) for name, kind in pure.items()}
        return archs | {"random": drawn, "winner": winner}
    return {
        "all-conv": all_of("c", space, winner),
        "all-shift": all_of("s", space, winner),
        "all-add": all_of("a", space, winner),
        "random": drawn,
        "winner": winner,
    }


def print_table(rows):
    """One line a retrained network; in translation the rivals differ in the encoder's types."""
    quality = [name for name in ("test_accuracy", "bleu") if name in rows[0]]
    width = max(len(short(row["arch"])) for row in rows) + 2
    titles = "".join(f"{name:>15}" for name in quality)
    print(
        f"\n{'':15}{'arch':{width}}{titles}{'energy mJ':>11}{'share':>7}{'latency ms':>11}{'params':>10}"
        f"{'mults':>13}{'shifts':>12}{'adds':>13}"
    )
    for row in rows:
        reached = "".join(f"{row[name]:15.2f}" for name in quality)
        print(
            f"{row['name']:15}{short(row['arch']):{width}}{reached}{row['energy_mj']:11.4f}"
            f"{row['energy_mj'] / rows[0]['energy_mj']:7.0%}{row['latency_ms']:11.4f}{row['params']:10,}"
            f"{row['mults']:13,}{row['shifts']:12,}{row['adds']:13,}"
        )


# fill, ink and hatch of a letter, fill and marker of a network (Okabe and Ito's colours)
LOOKS = {"t": ("#000000", "w", ""), "c": ("#0072B2", "w", ""), "s": ("#56B4E9", "k", "//"),
         "a": ("#F0E442", "k", "..")}
MARKS = {"winner": ("#D55E00", "*"), "random": ("w", "o"), "all-attention": ("k", "X"),
         "all-conv": ("#0072B2", "s"), "all-shift": ("#56B4E9", "D"), "all-add": ("#F0E442", "^")}


def quality(rows):
    """Key and title of what the rows of a table measure."""
    return ("bleu", "BLEU") if "bleu" in rows[0] else ("test_accuracy", "test accuracy %")


def cells(arch):
    """Letters or types of an arch, a list a resolution; in translation of encoder and decoder."""
    if isinstance(arch, str):
        return [list(stage) for stage in arch.split("/")]
    return [arch[part]["types"] for part in ("encoder", "decoder")]


def strip(arch):
    """An arch as a line of text: stem  [s][s] / [s][s][c] / [s][c][a]  head."""
    stages = " / ".join("".join(f"[{kind}]" for kind in stage) for stage in cells(arch))
    return f"stem  {stages}  head" if isinstance(arch, str) else f"encoder / decoder  {stages}"


def pareto_front(points):
    """The points (energy_mj, quality) that no other betters, by rising energy."""
    front = []
    for energy_mj, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((energy_mj, quality))
    return front


def plot_pareto(runs, path):
    """Energy against quality of the networks of one or more results: scored ones with inherited weights on
    the validation data (left out where the results lack them), and retrained ones on the test data."""
    space, rows = find_space(runs[0]["config"]["space"]), [row for run in runs for row in run["table"]]
    measure, title = quality(rows)
    loss = "minus loss, nats a token" if measure == "bleu" else "accuracy %"
    scored = [(network_cost(network_layers(space, arch_of(key))).energy_mj, fitness)
              for run in runs for key, fitness in run.get("scores", {}).items()]
    panels = {"retrained, test data": ([(row["energy_mj"], row[measure]) for row in rows], title)}
    if scored:
        panels = {"scored, inherited weights, validation data": (scored, loss)} | panels
    with figure_at(path, 4.5 * len(panels), 3.8) as figure:
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, (points, label)) in zip(every, panels.items()):
            axes.step(*zip(*pareto_front(points)), where="post", color="0.4", linewidth=1, zorder=0)
            axes.scatter(*zip(*points), s=12, c="0.6")
            axes.set(title=name, xlabel="energy, mJ, official accounting", ylabel=label)
        for name in dict.fromkeys(row["name"] for row in rows):
            own = [(row["energy_mj"], row[measure]) for row in rows if row["name"] == name]
            fill, marker = MARKS[name]
            axes.scatter(*zip(*own), s=150 if marker == "*" else 60, c=fill, marker=marker, edgecolors="k",
                         label=name)
        axes.legend(fontsize=8)


def boxes(arch):
    """(x, width, letter) of the strip of an arch: a cell a block, halves where a layer mixes two ways."""
    x = 0.0
    for stage in cells(arch):
        for kind in stage:
            yield from ((x + i / len(kind), 1 / len(kind), letter) for i, letter in enumerate(kind))
            x += 1.1
        x += 0.3


def plot_archs(runs, path):
    """Every retrained network as a strip of letters, with its quality (mean if several runs have it)."""
    found = {}
    rows = sorted((row for run in runs for row in run["table"]), key=lambda row: [*MARKS].index(row["name"]))
    for row in rows:
        found.setdefault(key_of(row["arch"]), []).append(row)
    strips, (measure, title) = {key: list(boxes(arch_of(key))) for key in found}, quality(rows)
    end = max(x + width for strip in strips.values() for x, width, _ in strip)
    with figure_at(path, 2.8 + 0.55 * end, 0.5 + 0.32 * len(found)) as figure:
        axes = figure.subplots()
        for y, (key, rows) in enumerate(found.items()):
            for x, width, letter in strips[key]:
                fill, ink, hatch = LOOKS[letter.lower()]
                axes.barh(y, width, 0.8, x, align="center", color=fill, hatch=hatch, edgecolor="0.4")
                axes.text(x + width / 2, y, letter, color=ink, ha="center", va="center", weight="bold",
                          bbox={"color": fill, "pad": 1.5, "linewidth": 0})
            reached = sum(row[measure] for row in rows) / len(rows)
            axes.text(end + 0.3, y, f"{reached:.1f}   {rows[0]['energy_mj']:.3f} mJ", va="center")
        axes.set_yticks(range(len(found)), [rows[0]["name"] for rows in found.values()])
        axes.tick_params(length=0)
        axes.set(xlim=(-0.1, end + 3.5), ylim=(len(found) - 0.5, -0.5), xticks=[], frame_on=False)
        axes.set_title(f"c conv, s shift, a add, t attention; {title}, energy", fontsize=10, loc="left")


def plot_energy(space, winner, path):
    """Energy by operator and memory level, official and uniform, of a published network and the winner."""
    name, *published, ((image, limit), *_) = PUBLISHED[0]
    networks = {f"{name}, {image} x {image}": (network_layers(*published, image), limit),
                f"{space} {winner}": (network_layers(space, winner), 192)}
    with figure_at(path, 9, 6) as figure:
        for pair, (title, (layers, limit)) in zip(figure.subplots(2, 2, sharey="row"), networks.items()):
            for axes, rule in zip(pair, ACCOUNTINGS):
                own = {op: [layer for layer in layers if layer.op == op] for op in PRIMITIVES}
                costs = {op: network_cost(part, 32, rule, limit)._asdict() for op, part in own.items()}
                draw_levels(axes, {op: cost for op, cost in costs.items() if cost["energy_mj"]})
                total_mj = network_cost(layers, 32, rule, limit).energy_mj
                axes.set_title(f"{title}, {rule}: {total_mj:.3g} mJ", fontsize=10)
        figure.axes[0].legend(loc="upper right")


def figures():
    """Figures of the committed results, PNG files beside them, and the winners as lines of text."""
    try:
        for folder in (RESULTS, RESULTS / "translation"):
            runs = json.loads((folder / "search.json").read_text())["runs"]
            plot_pareto(runs, folder / "pareto.png")
            plot_archs(runs, folder / "archs.png")
            print("\n".join(strip(run["winner"]) for run in runs))
            if folder == RESULTS:
                plot_energy(runs[0]["config"]["space"], runs[0]["winner"], folder / "energy.png")
    except ImportError as error:
        raise ValueError(f"--figures: {error}") from None


def search(config, space, data, supernet, path):
    """evolve() with the supernet's weights as fitness, its state kept at `path` after every generation."""
    started, total = time.monotonic(), config.generations + 1
    state = json.loads(Path(path).read_text()) if os.path.exists(path) else {}
    if state and state["config"] != asdict(config):
        raise ValueError(f"{path} belongs to a search with other flags; give the same flags or another --out")
    first = state.get("generation", -1) + 1

    def score(arch):
        if isinstance(space, TokenSpace):  # no batch norm: nothing to recalibrate
            return fitness(config, data, supernet, arch)
        return fitness(config, data, recalibrate(supernet.extract(arch), data, device=config.device))

    def report(state):
        write_text(json.dumps({**state, "config": asdict(config)}), path)
        best = min(state["scores"], key=lambda arch: (-state["scores"][arch], arch))
        rate = (time.monotonic() - started) / (state["generation"] + 1 - first)
        print(
            f"generation {state['generation']}/{config.generations} | {len(state['scores'])} scored | best "
            f"{short(arch_of(best))} {state['scores'][best]:.2f} | {rate:.1f} s a generation | "
            f"{rate * (total - 1 - state['generation']):.0f} s left",
            flush=True,
        )

    state.pop("config", None)
    return evolve(config, space, score, state, report)["scores"]


def training_config(config, **change):
    """The part of a SearchConfig that train() takes, with the changes given."""
    return Config(**{f.name: getattr(config, f.name) for f in fields(Config)} | change)


def print_translations(config, data, network, count=3):
    """Shows and returns [source, reference, translation] of the first test sentences."""
    chosen = data.test[:count]
    found = translate(network, data.vocabulary, [pair[0] for pair in chosen], config)
    samples = [[*pair[:2], text] for pair, text in zip(chosen, found)]
    for sample in samples:
        print("\n" + "\n".join(f"{n:10} {t}" for n, t in zip(("source", "reference", "winner"), sample)))
    return samples


def shuffled_bleu(config, data, network):
    """BLEU of a network that is given the source of the next test sentence: near 0 if it reads its source."""
    found = translate(network, data.vocabulary, [pair[0] for pair in data.test[1:] + data.test[:1]], config)
    reached = bleu(found, [pair[1] for pair in data.test])
    print(f"\nall-attention with the sources of other sentences: BLEU {reached:.2f}")
    return reached


def write_results(config, space, scores, finalists, rows, translated):
    """search.json, winner.json and pareto.png in the output folder, and the table on the screen."""
    winner, out = rows[-1]["arch"], Path(config.out)
    result = {"winner": winner, "budget": limits(config, space, winner), "finalists": finalists}
    result |= {"table": rows, "scores": scores, "seed": config.seed, "config": asdict(config)} | translated
    write_text(json.dumps(result, indent=1), out / "search.json")
    write_text(json.dumps({"space": space.name, "arch": winner}), out / "winner.json")
    print_table(rows)
    print(f"winner: {out / 'winner.json'}, trained: {out / f'retrain-{file_name(winner)}.pt'}")
    try:
        plot_pareto([result], out / "pareto.png")
    except ImportError as error:
        print(f"no {out / 'pareto.png'}: {error}")


def summarise(folders, out):
    """Mean and standard deviation over finished searches: printed, and in out/search.{md,json}."""
    names, kept = ("seed", "winner", "budget", "table", "config", "translations", "shuffled_bleu"), []
    for folder in folders:
        try:
            run = json.loads((Path(folder) / "search.json").read_text(encoding="utf-8"))
            scores = {key: round(fitness, 4) for key, fitness in run["scores"].items()}
            kept.append({name: run[name] for name in names if name in run} | {"scores": scores})
            lines = summary(kept)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(f"--summary: {folder} does not hold a whole search.json of a search") from None
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text(json.dumps({"runs": kept}, indent=1), os.path.join(out, "search.json"))
    write_text("\n".join(lines) + "\n", os.path.join(out, "search.md"))
    print("\n".join(lines))


def summary(runs):
    """Lines of the table of several searches, in markdown."""
    first = runs[0]["table"][0]
    measure, title = quality([first])
    titles = ["network", title, f"energy of {first['name']}", "latency ms", "params", "archs"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for rows in zip(*(run["table"] for run in runs)):
        reached = torch.tensor([row[measure] for row in rows])
        energies = [(row["energy_mj"], run["table"][0]["energy_mj"]) for row, run in zip(rows, runs)]
        share = torch.tensor([100 * own / full for own, full in energies])
        spread = [t.std().item() if len(t) > 1 else 0.0 for t in (reached, share)]
        latency, params = (sum(row[name] for row in rows) / len(rows) for name in ("latency_ms", "params"))
        archs = (", " if measure == "bleu" else " ").join(dict.fromkeys(short(row["arch"]) for row in rows))
        lines.append(
            f"| {rows[0]['name']} | {reached.mean():.2f} ± {spread[0]:.2f} | "
            f"{share.mean():.0f} % ± {spread[1]:.0f} | {latency:.4f} | {params:,.0f} | {archs} |"
        )
    return lines


# ---------------------------------------------------------------------------------------- sharing study

RESULTS = Path(__file__).parent / "results"
MODES = {mode: (mode, {}) for mode in ("none", "naive", "official", "heterogeneous")}
MODES["official"][1].update(kl="official", kl_weight=10.0)
ABLATION = {  # what is changed of heterogeneous: sharing, settings of training
    "single path": (Sharing(), {"sampling": "single"}),
    "learned slopes": (Sharing(learned=True), {}),
    "gain 1.41": (Sharing(gain=2**0.5), {}),
    "gradients as they are": (Sharing(balanced=False), {}),
    "eta 0.2": (Sharing(balanced=False, eta=0.2), {}),
    "no divergence": (Sharing(), {"kl_weight": 0.0}),
    "divergence x 10": (Sharing(), {"kl_weight": 0.1}),
    "official, single path": ("official", MODES["official"][1] | {"sampling": "single"}),
}
STUDY_SEEDS, ALONE_SEEDS, ALONE_EPOCHS, ALONE_ARCHS, INHERIT_ARCHS = 3, 2, 3, 24, 30
ABLATION_SEEDS, TIMED_STEPS = 1, 20
PS_FORM = Sharing(shared="", transformed="", shift_form="PS")  # nothing shared, shift as published
STUDY_MARK = "<!-- the lines between these marks are written by search.py --study sharing -->\n"


def parameters(space, sharing, all_cells=False):
    """Parameters of a supernet, counted without memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in Supernet(space, sharing, all_cells=all_cells).parameters())


def kendall_tau(a, b):
    """Kendall's tau-b of two lists: concordant minus discordant pairs, ties corrected; 0 for a constant."""
    a, b = (np.sign(np.subtract.outer(row, row)) for row in (a, b))
    return (a * b).sum() / math.sqrt(max(1, (a * a).sum() * (b * b).sum()))


def spearman(a, b):
    """Spearman's rank correlation; ties get their mean rank; 0 if one list is constant."""
    ranks = [[(np.less(row, x).sum() + np.less_equal(row, x).sum()) / 2 for x in row] for row in (a, b)]
    a, b = (np.subtract(row, np.mean(row)) for row in ranks)
    return (a * b).sum() / max(1e-12, math.sqrt((a * a).sum() * (b * b).sum()))


def study(config):
    """Four ways of sharing, the same recipe and steps: does the supernet rank archs as training alone does?

    For each mode and seed: accuracy of INHERIT_ARCHS archs with inherited weights after recalibration, its
    rank correlation with ALONE_ARCHS of them trained alone (ALONE_SEEDS seeds, ALONE_EPOCHS epochs), and the
    network that the mode's first supernet finds under --budget, retrained; for a row of ABLATION without it.
    The time a step is measured beside the others, step by step. Accuracies on the test images.
    Everything measured is kept in <out>/study.json: an interrupted study goes on after its last item.
    """
    space, data = (space := space_of(config)), load_data(config.data, space, config)
    folder = Path(config.out) / "study"
    folder.mkdir(parents=True, exist_ok=True)
    path, started, generator = folder / "study.json", time.monotonic(), torch.Generator().manual_seed(0)
    known, archs = json.loads(path.read_text()) if path.exists() else {}, {}
    while len(archs) < min(INHERIT_ARCHS, space.size()):
        archs[space.sample(generator)] = None
    jobs = {f"alone {arch} {seed}": partial(train_alone, arch, seed) for seed in range(ALONE_SEEDS)
            for arch in list(archs)[:ALONE_ARCHS]}
    for variants, seeds in ((MODES, STUDY_SEEDS), (ABLATION, ABLATION_SEEDS)):
        jobs |= {f"{name} {seed}": partial(study_supernet, name, seed, list(archs))
                 for seed in range(seeds) for name in variants}
    jobs["time"] = time_steps
    for number, (key, job) in enumerate(jobs.items(), 1):
        if key not in known:
            known[key] = job(config, space, data, folder)
            write_text(json.dumps(known), path)
            print(f"study {number}/{len(jobs)} | {key} | {time.monotonic() - started:.0f} s", flush=True)
    write_study(space, list(archs), known)
    try:
        plot_weights(space, folder / "heterogeneous-0.pt", RESULTS / "sharing.png")
    except ImportError as error:
        print(f"no {RESULTS / 'sharing.png'}: {error}")


def train_alone(arch, seed, config, space, data, folder):
    """Test accuracy of an arch trained alone for ALONE_EPOCHS."""
    path = folder / "alone.pt"
    path.unlink(missing_ok=True)
    training = training_config(config, epochs=ALONE_EPOCHS, seed=seed)
    network = train(training, space, data, build(space, arch, seed=seed), arch, path)
    return accuracy(network, data, data.test, config.device)


def study_supernet(name, seed, archs, config, space, data, folder):
    """What one supernet gives: inherited accuracies; a mode's first one also what it finds, retrained."""
    sharing, settings = (MODES | ABLATION)[name]
    path = folder / f"{name.replace(' ', '-')}-{seed}.pt"
    mode = {"sharing": name} if name in MODES else {}
    own = replace(config, seed=seed, out=str(path.with_suffix("")), **mode, **settings)
    Path(own.out).mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        supernet = train(training_config(own), space, data, Supernet(space, sharing, seed), "", path)
    except ValueError as error:  # the loss is not finite any more: a finding of the study, not its end
        return {"diverged": str(error)}
    inherited = {}
    for arch in archs:
        network = recalibrate(supernet.extract(arch), data, device=config.device)
        inherited[arch] = accuracy(network, data, data.test, config.device)
    if name in ABLATION or seed:
        return {"inherited": inherited}
    scores = search(own, space, data, supernet, folder / f"{name}-{seed}-search.json")
    found = min(scores, key=lambda arch: (-scores[arch], arch))
    tested = accuracy(retrain(training_config(own), space, data, found), data, data.test, config.device)
    return {"inherited": inherited, "found": found, "found_accuracy": tested}


def time_steps(config, space, data, folder):
    """Median ms of a training step of each variant, all with the same archs and images, one after the other;
    and T of the largest weight as one gather and as the official hundred masked passes, ms."""
    generator, rows = torch.Generator().manual_seed(0), {}
    for name, (sharing, settings) in (MODES | ABLATION).items():
        own, net = training_config(config, **settings), Supernet(space, sharing).to(config.device).train()
        rows[name] = own, net, make_optimizer(net, own), []
    for _ in range(TIMED_STEPS + 2):
        batch = data.batch(data.epoch(config.batch, generator)[0], generator)
        drawn = {"fair": space.sample_fairly(generator), "single": space.sample(generator)}
        for own, net, optimizer, times in rows.values():
            started = time.perf_counter()
            take_step(own, net, optimizer, "", [drawn[own.sampling]], [batch], [generator], None)
            optimizer.step()
            times.append(1e3 * (time.perf_counter() - started))
    weight = largest_transformed(rows["heterogeneous"][1])
    ways = [lambda: weight.weight_for("add"), lambda: masked_transform(weight)]
    gather, masked = median_ms(ways, config.device)
    return {name: times[2:] for name, (*_, times) in rows.items()} | {"gather": gather, "masked": masked}


def largest_transformed(supernet):
    """The largest SharedWeight that some operator reads through T."""
    shared = (m for m in supernet.modules() if isinstance(m, SharedWeight) and m.transformed)
    return max(shared, key=lambda m: m.w.numel())


@torch.no_grad()
def masked_transform(weight):
    """T(w) as the official code computes it: one pass over the whole tensor for each bin."""
    w, slope = weight.w, weight.slope_add
    z = ((w / (REACH * weight.std) + 1) * len(slope) / 2).clamp(0, len(slope) - 0.5)
    total = torch.zeros_like(w)
    for index in range(len(slope)):
        total += w * ((z >= index) & (z < index + 1)) * slope[index]
    return total


def study_row(space, name, archs, known, count):
    """The figures of one variant: mean and deviation over those of `count` supernets that did not diverge."""
    sharing = (MODES | ABLATION)[name][0]
    params, none, none_ps = (parameters(space, form) for form in (sharing, "none", PS_FORM))
    archs, seeds = archs[:ALONE_ARCHS], range(ALONE_SEEDS)
    alone = [np.mean([known[f"alone {arch} {seed}"] for seed in seeds]) for arch in archs]
    runs = [known[f"{name} {seed}"] for seed in range(count)]
    runs = [run for run in runs if "diverged" not in run]
    inherited = [list(run["inherited"].values()) for run in runs]
    columns = {
        "mean_accuracy": [np.mean(row) for row in inherited],
        "deviation": [np.std(row) for row in inherited],
        "kendall_tau": [kendall_tau(row[: len(alone)], alone) for row in inherited],
        "spearman": [spearman(row[: len(alone)], alone) for row in inherited],
        "found_accuracy": [run["found_accuracy"] for run in runs if "found" in run],
    }
    ratios = [own / base for own, base in zip(known["time"][name], known["time"]["none"])]
    row = {"params": params, "params_over_none": params / none, "params_over_none_ps": params / none_ps}
    row |= {"step_ms": np.median(known["time"][name]), "step_over_none": np.median(ratios)}
    row["diverged"] = count - len(runs)
    row |= {name: float(np.mean(values)) if values else None for name, values in columns.items()}
    return row | {f"{name}_seeds": [round(float(v), 4) for v in values] for name, values in columns.items()}


def table(rows):
    """Markdown of {name: study_row}; the deviation over seeds behind a mean."""
    names = [name for name in next(iter(rows.values())) if not name.endswith("_seeds")]
    columns = [name for name in names if any(row[name] is not None for row in rows.values())]
    lines = [f"| sharing | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        figures = [f"{row['params']:,}"]
        for column in columns[1:]:
            seeds = row.get(column + "_seeds", [])
            spread = f" ± {np.std(seeds, ddof=1):.2f}" if len(seeds) > 1 else ""
            figures.append("" if row[column] is None else f"{row[column]:.2f}{spread}")
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def write_study(space, archs, known):
    """results/sharing.json and results/sharing.md from all that the study measured."""
    modes = {name: study_row(space, name, archs, known, STUDY_SEEDS) for name in MODES}
    rows = ("heterogeneous", *ABLATION)
    ablation = {name: study_row(space, name, archs, known, ABLATION_SEEDS) for name in rows}
    first, second = ([known[f"alone {arch} {seed}"] for arch in archs[:ALONE_ARCHS]] for seed in (0, 1))
    agree = {"kendall_tau": kendall_tau(first, second), "spearman": spearman(first, second)}
    forms = {"heterogeneous": "heterogeneous", "none, PS": PS_FORM}
    hytra = {name: parameters(SPACES["hytra"], form) for name, form in forms.items()}
    hytra |= {f"{name}, all cells": parameters(SPACES["hytra"], form, True) for name, form in forms.items()}
    report = {"space": space.name, "modes": modes, "ablation": ablation, "seeds_agree": agree}
    report |= {"hytra_params": hytra, "measured": known}
    RESULTS.mkdir(exist_ok=True)
    write_text(json.dumps(report, indent=1), RESULTS / "sharing.json")
    lines = [*table(modes), ""]
    (ours, none, whole, whole_none), time = hytra.values(), known["time"]
    lines.append(
        f"Two seeds of training alone agree to Kendall tau {agree['kendall_tau']:.2f}, Spearman "
        f"{agree['spearman']:.2f}. T of the largest weight: one gather {time['gather']:.2f} ms, a hundred "
        f"masked passes {time['masked']:.2f} ms. Parameters in `hytra`, over nothing shared and shift as PS: "
        f"{ours:,} / {none:,} = {ours / none:.3f} in the cells that archs reach, {whole:,} / {whole_none:,} "
        f"= {whole / whole_none:.3f} in all (official: 238,503,844 / 615,390,116 = 0.388).\n"
    )
    lines += table(ablation)
    old = RESULTS / "sharing.md"
    before, _, after = (old.read_text() if old.exists() else 2 * STUDY_MARK).split(STUDY_MARK)
    write_text(f"{before}{STUDY_MARK}{chr(10).join(lines)}\n{STUDY_MARK}{after}", RESULTS / "sharing.md")
    print("\n".join(lines))


@torch.no_grad()
def plot_weights(space, checkpoint, path):
    """Histograms of the largest shared weight as each op reads it, with target and fitted densities."""
    weight = largest_transformed(load_supernet(checkpoint, space))
    w, added, grid = weight.w, weight.weight_for("add"), torch.linspace(-5, 5, 400) * weight.std

    def normal(std):
        return torch.exp(-0.5 * (grid / std) ** 2) / (std * math.sqrt(2 * math.pi))

    def laplace(b):
        return torch.exp(-grid.abs() / b) / (2 * b)

    panels = {
        "conv: w": (w, normal(weight.std), normal(w.std())),
        "shift: power of two of w": (power_of_two(w), None, None),
        "add: T(w)": (added, laplace(weight.b), laplace(added.abs().mean())),
    }
    with figure_at(path, 9, 2.6) as figure:
        for axes, (title, (values, target, fitted)) in zip(figure.subplots(1, 3), panels.items()):
            axes.hist(values.clamp(*grid[[0, -1]]).flatten().numpy(), bins=100, density=True, color="0.75")
            if target is not None:
                axes.plot(grid, target, "k--", label="target density")
                axes.plot(grid, fitted, color="0.3", label="fitted density")
                axes.legend(fontsize=7)
            axes.set_title(title, fontsize=9)


def check(config, space):
    """ValueError if the flags ask for what cannot be: by processes, measured latency or the budget."""
    use_device(config.device)
    join_processes(config)
    if config.resume and not os.path.exists(os.path.join(config.out, "supernet.pt")):
        raise ValueError(f"--resume: {config.out} holds no interrupted run")
    if processes() > config.first:
        raise ValueError(f"{processes()} processes are more than the {config.first} archs of --first")
    if processes() > 1 and config.max_measured_ms:
        raise ValueError("--max-measured-ms needs one process: they would disturb each other's clock")
    if config.max_measured_ms and isinstance(space, TokenSpace):
        raise ValueError("--max-measured-ms is for images; give --max-latency-ms, the simulated one")
    if not any(fits(config, space, arch) for arch in candidates(space)):
        raise ValueError(nothing_fits(config, space))


def tell(config, space, data):
    """The whole story: supernet, search, finalists, rivals, table. What an interrupted run had is reused."""
    config.resume = True
    training = training_config(config)
    seconds, started = {}, time.monotonic()

    def lap(phase):
        seconds[phase] = time.monotonic() - started - sum(seconds.values())

    longer = replace(training, epochs=config.supernet_epochs or config.epochs)
    supernet = make_model(training, space, data, "")
    supernet = train(longer, space, data, supernet, "", os.path.join(config.out, "supernet.pt"))
    lap("supernet")
    scores = search(config, space, data, supernet, os.path.join(config.out, "search-state.json"))
    lap("search")
    finalists = choose(training, space, data, scores, config.finalists)
    winner = finalists[0][0]
    lap("finalists")
    rows, table = [], latency_table(config, space)
    for name, arch in rivals(config, space, winner).items():
        reached = tested(training, data, retrain(training, space, data, arch))
        rows.append({"name": name, "arch": arch, **reached, **describe(space, arch, table)})
    lap("rivals")
    translated = {}
    if isinstance(data, Sentences):
        samples = print_translations(training, data, retrain(training, space, data, winner))
        first = retrain(training, space, data, rows[0]["arch"])
        translated = {"translations": samples, "shuffled_bleu": shuffled_bleu(training, data, first)}
    write_results(config, space, scores, finalists, rows, translated)
    phases = " | ".join(f"{phase} {value:.0f}" for phase, value in seconds.items())
    if translated:
        return print(f"seconds since this start: {phases} | {len(data.test)} test sentences, one seed")
    images = len(data.test.index)
    error = 100 * (rows[-1]["test_accuracy"] / 100 * (1 - rows[-1]["test_accuracy"] / 100) / images) ** 0.5
    error = f"standard error {error:.1f} points"
    print(f"seconds since this start: {phases} | {images} test images, one seed: {error}")


def main(argv=None):
    """The command line of search.py."""
    config = parse(SearchConfig, __doc__, argv, hidden=SINGLE)
    if config.figures:
        return figures()
    if config.summary:
        return summarise(config.summary.split(","), config.out)
    space = space_of(config)
    if config.study and isinstance(space, TokenSpace):
        raise ValueError("--study sharing is for spaces of images")
    if config.study:
        use_device(config.device)
        return study(config)
    check(config, space)
    data = load(config, space)
    with output_folder(config.out):
        tell(config, space, data)


if __name__ == "__main__":
    run_command(main)

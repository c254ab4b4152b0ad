"""Searches a ShiftAddNAS supernet under a budget, retrains the winner and its rivals, and prints the table.

    python search.py                            the whole story on the embedded images, out/search.json
    python search.py --budget 0.4               at most 40 % of the energy of the all-conv network
    python search.py --max-energy-mj 0.5 --max-params 150000 --generations 10

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
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from cost_model import measured_latency_ms, measured_table, network_cost, network_layers, operations
from shiftaddnas import Supernet, build, find_space
from train import Config, accuracy, check_device, flag, load_data, parse, recalibrate, run_command
from train import train, write_text

TRIES = 200  # draws for one child before the search says that the budget leaves nothing new


@dataclass
class SearchConfig(Config):
    """Flags of search.py: those of train.py (but --arch, --init) and the evolution's."""

    budget: float = flag(
        0.5, "share of the energy of the all-conv network of the same depths; 0: no such limit", low=0
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


# ----------------------------------------------------------------------------------------------- budget


COSTS = ("energy_mj", "latency_ms", "measured_ms", "params", "macs")  # each can be limited by --max-<cost>


def describe(space, arch, table=None):
    """Costs of one arch: energy_mj, latency_ms (official accounting), params, mults, shifts, adds, macs; with
    a table of measured latencies measured_ms too."""
    layers = network_layers(space, arch)
    cost = network_cost(layers)
    with torch.device("meta"):
        params = sum(p.numel() for p in build(space, arch).parameters())
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


def all_of(letter, space, arch):
    """The network of the same depths with one op everywhere; conv where a resolution does not offer it."""
    return "/".join(
        (letter if letter in ops else "c") * len(stage) for ops, stage in zip(space.ops, arch.split("/"))
    )


def limits(config, space, arch):
    """{cost: largest allowed value} for an arch."""
    given = {name: getattr(config, "max_" + name) for name in COSTS}
    found = {name: value for name, value in given.items() if value}
    if config.budget:
        share = config.budget * network_cost(network_layers(space, all_of("c", space, arch))).energy_mj
        found["energy_mj"] = min(share, found.get("energy_mj", share))
    return found


def fits(config, space, arch):
    """True if the arch is inside every limit."""
    allowed = limits(config, space, arch)
    if "energy_mj" in allowed and network_cost(network_layers(space, arch)).energy_mj > allowed["energy_mj"]:
        return False
    costs = describe(space, arch, latency_table(config, space)) if set(allowed) - {"energy_mj"} else {}
    return all(costs[name] <= allowed[name] for name in allowed if name != "energy_mj")


def cheapest(space, depths, table):
    """For each cost the least that an arch of these depths needs: every op wherever it is offered, tried."""
    conv = "/".join("c" * depth for depth in depths)
    found = [describe(space, all_of(letter, space, conv), table) for letter in "csat"]
    return {name: min(costs[name] for costs in found) for name in COSTS if name in found[0]}


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
            return parents[int(torch.randint(len(parents), (), generator=generator))]

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
                if child not in scores and child not in children and fits(config, space, child):
                    children[child] = None
                    break
        if not scores and not children:
            raise ValueError(nothing_fits(config, space))
        for child in children:
            scores[child] = score(child)
        state.update(generation=generation, rng=generator.get_state().tolist())
        report(state)
        if not children:
            print("no new arch inside the budget: the search ends here")
            break
    return state


def nothing_fits(config, space):
    """The sentence for a budget that no arch meets."""
    least = [cheapest(space, depths, latency_table(config, space)) for depths in space.depths]
    need = {name: min(costs[name] for costs in least) for name in least[0]}
    convs = ["/".join("c" * depth for depth in depths) for depths in space.depths]
    full = [network_cost(network_layers(space, conv)).energy_mj for conv in convs]
    share = min(costs["energy_mj"] / energy for costs, energy in zip(least, full))
    asked = ", ".join(
        f"--{name.replace('_', '-')} {getattr(config, name)}"
        for name in ("budget", *("max_" + name for name in COSTS))
        if getattr(config, name)
    )
    measured = f"{need['measured_ms']:.4g} ms measured, " if "measured_ms" in need else ""
    return (
        f"no arch of space {space.name} is inside {asked}; the cheapest networks need "
        f"{need['energy_mj']:.4g} mJ ({share:.2f} of all-conv), {need['latency_ms']:.4g} ms, "
        f"{measured}{need['params']} params, {need['macs']} macs"
    )


# ------------------------------------------------------------------------------------------------ story


def retrain(config, space, data, arch):
    """The network of an arch trained from scratch, with the one recipe of all rivals; kept in the folder."""
    path = os.path.join(config.out, f"retrain-{arch.replace('/', '-')}.pt")
    return train(config, space, data, build(space, arch, seed=config.seed), arch, path)


def choose(config, space, data, scores, count):
    """(arch, fitness, validation accuracy) of the `count` fittest archs, retrained, the best one first."""
    fittest = sorted(scores, key=lambda arch: (-scores[arch], arch))[:count]
    found = []
    for arch in fittest:
        network = retrain(config, space, data, arch)
        reached = accuracy(network, data, data.val, config.device)
        found.append((arch, scores[arch], reached))
        print(f"finalist {arch}: fitness {scores[arch]:.2f} %, validation accuracy retrained {reached:.2f} %")
    return sorted(found, key=lambda row: (-row[2], -row[1], row[0]))


def rivals(config, space, winner):
    """Name -> arch of the networks that are retrained beside the winner."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    draws = (space.sample(generator) for _ in range(TRIES))
    drawn = next((arch for arch in draws if arch != winner and fits(config, space, arch)), winner)
    return {
        "all-conv": all_of("c", space, winner),
        "all-shift": all_of("s", space, winner),
        "all-add": all_of("a", space, winner),
        "random": drawn,
        "winner": winner,
    }


def print_table(rows):
    """One line a retrained network."""
    print(
        f"\n{'':10}{'arch':16}{'test acc %':>11}{'energy mJ':>11}{'of conv':>9}"
        f"{'latency ms':>11}{'params':>9}"
        f"{'mults':>12}{'shifts':>12}{'adds':>12}"
    )
    for row in rows:
        print(
            f"{row['name']:10}{row['arch']:16}{row['test_accuracy']:11.2f}{row['energy_mj']:11.4f}"
            f"{row['energy_mj'] / rows[0]['energy_mj']:9.0%}{row['latency_ms']:11.4f}{row['params']:9,}"
            f"{row['mults']:12,}{row['shifts']:12,}{row['adds']:12,}"
        )


def plot_pareto(scores, space, rows, path):
    """Accuracy against energy: scored archs (validation, inherited weights) and retrained networks (test)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no out/pareto.png: matplotlib is not installed")
        return
    axes = (figure := Figure((6, 4), layout="constrained")).subplots()
    axes.scatter(
        [network_cost(network_layers(space, arch)).energy_mj for arch in scores],
        list(scores.values()),
        s=14,
        c="0.6",
        label="scored, validation, inherited weights",
    )
    for row, marker in zip(rows, "sD^vo"):
        axes.scatter(
            row["energy_mj"],
            row["test_accuracy"],
            s=60,
            marker=marker,
            label=f"{row['name']}, test, retrained",
        )
    axes.set_xlabel("energy (mJ an image, official accounting)")
    axes.set_ylabel("accuracy (%)")
    axes.legend(fontsize=7)
    temporary = f"{path}.tmp.png"
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


def search(config, space, data, supernet, path):
    """evolve() with the supernet's weights as fitness, its state kept at `path` after every generation."""
    started, total = time.monotonic(), config.generations + 1
    state = json.loads(Path(path).read_text()) if os.path.exists(path) else {}
    if state and state["config"] != asdict(config):
        raise ValueError(f"{path} belongs to a search with other flags; give the same flags or another --out")
    first = state.get("generation", -1) + 1

    def score(arch):
        network = recalibrate(supernet.extract(arch), data, device=config.device)
        return accuracy(network, data, data.val, config.device)

    def report(state):
        write_text(json.dumps({**state, "config": asdict(config)}), path)
        best = min(state["scores"], key=lambda arch: (-state["scores"][arch], arch))
        rate = (time.monotonic() - started) / (state["generation"] + 1 - first)
        print(
            f"generation {state['generation']}/{config.generations} | {len(state['scores'])} scored | best "
            f"{best} {state['scores'][best]:.2f} % | {rate:.1f} s a generation | "
            f"{rate * (total - 1 - state['generation']):.0f} s left",
            flush=True,
        )

    state.pop("config", None)
    return evolve(config, space, score, state, report)["scores"]


def main(argv=None):
    """The command line of search.py: supernet, search, retraining, table."""
    config = parse(SearchConfig, __doc__, argv, hidden=("arch", "init"))
    if config.resume and not os.path.exists(os.path.join(config.out, "supernet.pt")):
        raise ValueError(f"--resume: {config.out} holds no interrupted run")
    config.resume = True
    space = find_space(config.space)
    check_device(config.device)
    data = load_data(config.data, space)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    if not any(
        fits(config, space, all_of(letter, space, "/".join("c" * depth for depth in depths)))
        for letter in "sac"
        for depths in space.depths
    ):
        raise ValueError(nothing_fits(config, space))
    training = Config(**{f.name: getattr(config, f.name) for f in fields(Config)})
    seconds, started = {}, time.monotonic()

    def lap(phase):
        seconds[phase] = time.monotonic() - started - sum(seconds.values())

    supernet_path = os.path.join(config.out, "supernet.pt")
    supernet = train(training, space, data, Supernet(space, config.sharing, config.seed), "", supernet_path)
    lap("supernet")
    scores = search(config, space, data, supernet, os.path.join(config.out, "search-state.json"))
    lap("search")
    finalists = choose(training, space, data, scores, config.finalists)
    winner = finalists[0][0]
    lap("finalists")
    rows, table = [], latency_table(config, space)
    for name, arch in rivals(config, space, winner).items():
        tested = accuracy(retrain(training, space, data, arch), data, data.test, config.device)
        rows.append({"name": name, "arch": arch, "test_accuracy": tested, **describe(space, arch, table)})
    lap("rivals")
    result = {
        "winner": winner,
        "budget": limits(config, space, winner),
        "finalists": finalists,
        "table": rows,
        "scores": scores,
        "seed": config.seed,
        "config": asdict(config),
    }
    write_text(json.dumps(result, indent=1), os.path.join(config.out, "search.json"))
    write_text(json.dumps({"space": space.name, "arch": winner}), os.path.join(config.out, "winner.json"))
    print_table(rows)
    plot_pareto(scores, space, rows, os.path.join(config.out, "pareto.png"))
    print(
        "seconds: "
        + " | ".join(f"{phase} {value:.0f}" for phase, value in seconds.items())
        + f" | {len(data.test.index)} test images, one seed: standard error about 0.8 points"
    )


if __name__ == "__main__":
    run_command(main)

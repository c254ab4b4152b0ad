"""Search a ShiftAddNAS supernet under a budget, retrain the winner and its baselines, and print the table.

    python search.py                            everything on the embedded images, out/search.json
    python search.py --budget 0.4               at most 40 % of the energy of the all-conv network
    python search.py --limit energy_mj=0.5 --limit params=150000 --generations 10
    python search.py --space translation        the same for translation, BLEU in out/translation/search.json

Run the same command again after an interruption: every phase goes on where it was.
Evolution as in the official search.py: the fittest archs are parents; each generation is made of mutations,
crossovers and fresh random archs. Fitness is the accuracy on the validation images with inherited weights,
after batch-norm recalibration (official: on augmented images, averaged over all archs). Only new archs inside
the budget are scored. The fittest few (--finalists) are retrained and the best on the validation images wins,
for inherited weights rank networks only roughly (official: the fittest wins). Test images make the table.
"""

import argparse
import functools
import json
import math
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from cost_model import arch_costs, measured_table, network_cost, network_layers
from shiftaddnas import SPACES, TOKEN_SPACES
from train import add_flags, join_processes, load_data, make_model, processes, rank, read_settings
from train import run_command, train, write_text

LIMITS = ("energy_mj", "latency_ms", "measured_ms", "params", "macs")  # costs that --limit can bound
TRIES = 200  # draws for one child before the search says that the budget leaves nothing new

# ---------------------------------------------------------------------------------------------- limits


def limits_for(space, arch, budget, limits):
    """Return {cost: largest allowed value} for an arch; a budget is a share of its reference's energy."""
    allowed = dict(limits)
    if budget:
        share = budget * energy_mj(space, space.reference(arch))
        allowed["energy_mj"] = min(share, allowed.get("energy_mj", share))
    return allowed


@functools.lru_cache(maxsize=None)
def energy_mj(space, arch):
    """Return the energy of an arch in the official accounting."""
    return network_cost(network_layers(space, arch)).energy_mj


def make_fits(space, budget, limits, table=None):
    """Return fits(arch): whether an arch is inside the budget and every limit."""
    # costs beside the energy take 0.1 s an arch, and evolution asks for many archs again
    costs = functools.lru_cache(maxsize=None)(lambda arch: arch_costs(space, arch, table=table))

    def fits(arch):
        allowed = limits_for(space, arch, budget, limits)
        if energy_mj(space, arch) > allowed.pop("energy_mj", math.inf):
            return False  # before the slower costs
        return all(costs(arch)[name] <= most for name, most in allowed.items())

    return fits


def require_some_arch(space, budget, limits, table):
    """Raise ValueError, with what the cheapest archs need, if none of them is inside the limits."""
    archs = space.cheapest()
    fits = make_fits(space, budget, limits, table)
    if any(fits(arch) for arch in archs):
        return
    costs = [arch_costs(space, arch, table=table) for arch in archs]
    needs = [f"{min(row[name] for row in costs):.4g} {name}" for name in LIMITS if name in costs[0]]
    share = min(energy_mj(space, arch) / energy_mj(space, space.reference(arch)) for arch in archs)
    needs = f"the cheapest networks need {', '.join(needs)}, {share:.2f} of the reference's energy"
    asked = [f"--limit {name}={value}" for name, value in limits.items()]
    asked = ", ".join([f"--budget {budget}"] * bool(budget) + asked)
    raise ValueError(f"no arch of space {space.name} is inside {asked}; {needs}")


def read_limits(texts):
    """Return {cost: value} of a list of KEY=VALUE."""
    limits = {}
    for text in texts:
        name, _, value = text.partition("=")
        with suppress(ValueError):  # no number
            limits[name] = float(value)
        if name not in LIMITS or not 0 < limits.get(name, 0.0) < math.inf:
            allowed = ", ".join(LIMITS)
            raise ValueError(f"--limit {text!r} must be KEY=VALUE, a positive number for one of {allowed}")
    return limits


# ------------------------------------------------------------------------------------------- evolution


def evolve(
    space, score_all, fits, generations=5, first=16, parents=8, mutations=5, crossovers=5, fresh=2, seed=0,
    state=None, report=lambda state: None,
):
    """Search a space by evolution; return {"scores": {arch: fitness}, "generation", "rng"}.

    score_all(archs) -> their fitnesses, fits(arch) -> whether it is inside the limits. The space offers
    sample, mutate and crossover. `state` is None or what an interrupted search gave to report(state), which
    is called after every generation. A child that cannot be drawn new and inside the limits in TRIES draws is
    left out, so a small space or a tight budget ends the search instead of hanging it.
    """
    generator = torch.Generator().manual_seed(seed)
    state = state or {"scores": {}, "generation": -1}
    scores = state["scores"]
    if "rng" in state:
        generator.set_state(torch.tensor(state["rng"], dtype=torch.uint8))
    for generation in range(state["generation"] + 1, generations + 1):
        best = sorted(scores, key=lambda arch: (-scores[arch], arch))[:parents]  # ties by name: runs repeat

        def pick():
            return best[int(torch.randint(len(best), (), generator=generator))]

        makers = [lambda: space.sample(generator)] * (fresh if best else first)  # each draws one child
        if best:
            mutate = [lambda: space.mutate(pick(), generator)] * mutations
            cross = [lambda: space.crossover(pick(), pick(), generator)] * crossovers
            makers = mutate + cross + makers
        children = {}  # a dict keeps the order of drawing
        for make in makers:
            for _ in range(TRIES):
                child = make()
                if child not in scores and child not in children and fits(child):
                    children[child] = None
                    break
        scores.update(zip(children, score_all(list(children))))
        state.update(generation=generation, rng=generator.get_state().tolist())
        report(state)
        if not children:
            print("no new arch inside the limits: the search ends here")
            break
    return state


def share_scores(score, archs):
    """Return the fitness of each arch; of several processes each scores a share, and all know all."""
    mine = {arch: score(arch) for arch in archs[rank() :: processes()]}  # every n-th
    shares = [mine] * processes()
    if processes() > 1:
        dist.all_gather_object(shares, mine)
    scores = {arch: fitness for share in shares for arch, fitness in share.items()}
    return [scores[arch] for arch in archs]


# ---------------------------------------------------------------------------------------------- phases


def make_trainer(space, data, recipe, sharing, seed, device, amp, out):
    """Return trained(arch): the trained network of an arch, or the supernet of "", kept in a folder."""

    def trained(arch):
        epochs = recipe.epochs if arch else recipe.supernet_epochs or recipe.epochs
        name = f"retrain-{space.file_name(arch)}.pt" if arch else "supernet.pt"
        model = make_model(space, arch, sharing, seed, recipe, data.state())
        settings = replace(recipe, epochs=epochs)
        return train(model, data, settings, Path(out) / name, seed, device, amp, resume=True)

    return trained


def search_archs(space, data, supernet, fits, path, settings, seed, device, **evolution):
    """Return {arch: fitness} of an evolution with the supernet's weights; it resumes from the file `path`."""
    settings = settings | {"data": data.fingerprint()}  # what the file must have been made with
    state = read_state(path, space) if path.exists() else None
    if state and state.pop("settings") != settings:
        raise ValueError(f"{path} belongs to a search with other settings or data; give another --out")
    started = time.monotonic()
    first = state["generation"] if state else -1  # the last one of an interrupted search
    last = evolution["generations"]

    def report(state):
        write_text(json.dumps({**state, "settings": settings}), path)
        if not state["scores"]:
            return
        generation = state["generation"]
        (best,) = fittest(state["scores"], space, 1)
        rate = (time.monotonic() - started) / (generation - first)
        times = f"{rate:.1f} s a generation | {rate * (last - generation):.0f} s left"
        progress = f"generation {generation}/{last} | {len(state['scores'])} scored"
        print(f"{progress} | best {space.short(best)} {state['scores'][best]:.2f} | {times}", flush=True)

    def score_all(archs):
        return share_scores(lambda arch: data.fitness(supernet, arch, device), archs)

    return evolve(space, score_all, fits, seed=seed, state=state, report=report, **evolution)["scores"]


def read_state(path, space):
    """Return the state of an interrupted search; ValueError if the file holds none of this space."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        whole = "settings" in state and type(state["generation"]) is int and state["generation"] >= 0
        torch.Generator().set_state(torch.tensor(state["rng"], dtype=torch.uint8))
        for arch, fitness in state["scores"].items():
            whole = whole and space.validate(arch) and math.isfinite(fitness)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):  # RecursionError is one
        whole = False
    if not whole:
        raise ValueError(f"{path} is not the state of a search of space {space.name}; remove it")
    return state


def fittest(scores, space, count):
    """Return the fittest archs that look different, the best first."""
    best = {}
    for arch in sorted(scores, key=lambda arch: (-scores[arch], arch)):
        best.setdefault(space.short(arch), arch)  # in translation the types: weights hardly tell sizes apart
    return list(best.values())[:count]


def choose(space, data, trained, scores, count, device):
    """Retrain the fittest archs; return (arch, fitness, fitness retrained), the best retrained one first."""
    finalists = []
    for arch in fittest(scores, space, count):
        retrained = data.validate(trained(arch), device)  # the same measure as fitness, trained weights
        finalists.append((arch, scores[arch], retrained))
        print(f"finalist {space.short(arch)}: fitness {scores[arch]:.2f}, retrained {retrained:.2f}")
    return sorted(finalists, key=lambda row: (-row[2], -row[1], row[0]))


def networks_to_compare(space, winner, fits, seed):
    """Return name -> arch of the table: the space's baselines, a random network that fits, and the winner."""
    generator = torch.Generator().manual_seed(seed + 1)  # other archs than evolution drew
    draws = (space.sample(generator) for _ in range(TRIES))
    random = next((arch for arch in draws if arch != winner and fits(arch)), winner)
    return space.baselines(winner) | {"random": random, "winner": winner}


def print_table(rows, space):
    """Print one line a retrained network."""
    measures = [name for name in ("test_accuracy", "bleu") if name in rows[0]]
    width = max(len(space.short(row["arch"])) for row in rows) + 2
    titles = "".join(f"{name:>15}" for name in measures)
    titles += f"{'energy mJ':>11}{'share':>7}{'latency ms':>11}{'params':>10}"
    print(f"\n{'':15}{'arch':{width}}{titles}{'mults':>13}{'shifts':>12}{'adds':>13}")
    for row in rows:
        figures = "".join(f"{row[name]:15.2f}" for name in measures)
        figures += f"{row['energy_mj']:11.4f}{row['energy_mj'] / rows[0]['energy_mj']:7.0%}"
        figures += f"{row['latency_ms']:11.4f}{row['params']:10,}"
        operations = f"{row['mults']:13,}{row['shifts']:12,}{row['adds']:13,}"
        print(f"{row['name']:15}{space.short(row['arch']):{width}}{figures}{operations}")


def run_search(space, data, trained, settings, device, out, table):
    """Train the supernet, search, retrain finalists and baselines, and write search.json and winner.json."""
    seconds = {}  # of each phase
    started = time.monotonic()

    def lap(phase):
        seconds[phase] = time.monotonic() - started - sum(seconds.values())

    seed = settings["seed"]
    fits = make_fits(space, settings["budget"], settings["limits"], table)
    supernet = trained("")
    lap("supernet")
    path = out / "search-state.json"
    evolution = settings["evolution"]
    scores = search_archs(space, data, supernet, fits, path, settings, seed, device, **evolution)
    if not scores:
        raise ValueError(f"no arch of space {space.name} was found inside the limits in {TRIES} draws each")
    lap("search")
    chosen = choose(space, data, trained, scores, settings["finalists"], device)
    winner = chosen[0][0]
    lap("finalists")
    rows = []
    for name, arch in networks_to_compare(space, winner, fits, seed).items():  # retrained as the winner is
        figures = data.test(trained(arch), device)
        rows.append({"name": name, "arch": arch, **figures, **arch_costs(space, arch, table=table)})
    lap("baselines")
    limits = limits_for(space, winner, settings["budget"], settings["limits"])
    result = {"winner": winner, "budget": limits, "finalists": chosen}
    result |= {"table": rows, "scores": scores, "seed": seed, "settings": settings}
    result |= data.samples(trained(winner), trained(rows[0]["arch"]), device)
    write_text(json.dumps(result, indent=1), out / "search.json")
    write_text(json.dumps({"space": space.name, "arch": winner}), out / "winner.json")
    print_table(rows, space)
    print(f"winner: {out / 'winner.json'}, trained: {out / f'retrain-{space.file_name(winner)}.pt'}")
    phases = " | ".join(f"{phase} {value:.0f}" for phase, value in seconds.items())
    print(f"seconds since this start: {phases} | {data.error_line(rows[-1])}")


# --------------------------------------------------------------------------------------- command line


def main(argv=None):
    """Run the command line of search.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, "budget", "finalists")
    flag = parser.add_argument
    flag("--limit", action="append", default=[], metavar="KEY=VALUE", help=f"bound {' or '.join(LIMITS)}")
    flag("--generations", type=int, default=5, help="generations after the first")
    flag("--quick", action="store_true", help="a short run, only to see that all works")
    args = parser.parse_args(argv)
    evolution = {"generations": args.generations, "first": 16}
    if args.quick:
        shorter = ["max_length=24", "beam=1"] if args.space in TOKEN_SPACES else []
        args.set = ["epochs=1", "supernet_epochs=1", "finalists=1", *shorter, *args.set]
        evolution = {"generations": 1, "first": 6}
    space, recipe, out = read_settings(args)
    limits = read_limits(args.limit)
    if not 0 <= evolution["generations"]:
        raise ValueError(f"--generations must be at least 0, got {args.generations}")
    device = join_processes(args.device)
    table = None
    if "measured_ms" in limits:
        if space.name not in SPACES or processes() > 1:
            raise ValueError("--limit measured_ms is for images and one process; give latency_ms, simulated")
        Path(out).mkdir(parents=True, exist_ok=True)
        table = measured_table(space, Path(out) / "measured.json")
    require_some_arch(space, recipe.budget, limits, table)
    data = load_data(space, args.data, recipe, cache=out)
    trained = make_trainer(space, data, recipe, args.sharing, args.seed, device, args.amp, out)
    settings = asdict(recipe) | {"space": space.name, "sharing": args.sharing, "seed": args.seed}
    settings |= {"limits": limits, "evolution": evolution}
    run_search(space, data, trained, settings, device, Path(out), table)


if __name__ == "__main__":
    run_command(main)

"""Search a ShiftAddNAS supernet under a budget, retrain the winner and its baselines, and print the table.

    python search.py                            everything on the embedded images, out/search.json
    python search.py --budget 0.4               at most 40 % of the energy of the all-conv network
    python search.py --limit energy_mj=0.5 --limit params=150000 --generations 10
    python search.py --accounting uniform       energy and latency like for like (cost_model.py)
    python search.py --space translation        the same for translation, BLEU in out/translation/search.json

Run the same command again after an interruption: every phase goes on where it was.
Evolution as in the official search.py: each generation is made of mutations and crossovers inside the budget
(official: and of random archs, which a mutation in vision starts from one time in five anyway). Fitness is
the accuracy on the validation images with inherited weights, after batch-norm recalibration (official: on
augmented images, averaged over all archs). Parents are, of the fitter half, those that no other one betters
in fitness at no more energy, then the front behind them (official: the fittest). Taken from all archs, many
parents would be cheap and poor, and so would their children (results/table.md). A few along the first front
(--finalists) are retrained, and so are the best networks of one operator; the winner is the cheapest one
that is within a standard error of the best on the validation images (official: the fittest, by inherited
weights, which rank networks only roughly). Test images make the table; its last line is the verdict.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from cost_model import EYERISS, arch_costs, measured_table, network_cost, network_layers
from shiftaddnas import SPACES, TOKEN_SPACES
from train import add_flags, join_processes, load_data, make_model, processes, rank, read_settings
from train import run_command, train, write_text

LIMITS = ("energy_mj", "latency_ms", "measured_ms", "params", "macs")  # costs that --limit can bound
TRIES = 200  # draws for one child before the search says that the budget leaves nothing new

# ---------------------------------------------------------------------------------------------- limits


def make_costs(space, bits=32, accounting="official", hardware=EYERISS, table=None):
    """Return energy_mj(arch) and costs(arch), which remember: a search asks for an arch again and again."""

    @functools.lru_cache(maxsize=None)
    def energy_mj(arch):
        return network_cost(network_layers(space, arch), bits, accounting, hardware).energy_mj

    @functools.lru_cache(maxsize=None)
    def costs(arch):
        return arch_costs(space, arch, bits, accounting, hardware, table)

    return energy_mj, costs


def limits_for(space, arch, budget, limits, energy_mj):
    """Return {cost: largest allowed value} for an arch; a budget is a share of its reference's energy."""
    allowed = dict(limits)
    if budget:
        share = budget * energy_mj(space.reference(arch))  # in mJ
        allowed["energy_mj"] = min(share, allowed.get("energy_mj", share))
    return allowed


def make_fits(space, budget, limits, energy_mj, costs):
    """Return fits(arch): whether an arch is inside the budget and every limit."""

    def fits(arch):
        allowed = limits_for(space, arch, budget, limits, energy_mj)
        if energy_mj(arch) > allowed.pop("energy_mj", math.inf):
            return False  # before the slower costs
        return all(costs(arch)[name] <= most for name, most in allowed.items())

    return fits


def require_some_arch(space, budget, limits, energy_mj, costs):
    """Raise ValueError, with what the cheapest archs need, if none of them is inside the limits."""
    archs = space.cheapest()  # if none of these fits, none does
    fits = make_fits(space, budget, limits, energy_mj, costs)
    if any(fits(arch) for arch in archs):
        return
    rows = [costs(arch) for arch in archs]
    needs = [f"{min(row[name] for row in rows):.4g} {name}" for name in LIMITS if name in rows[0]]
    share = min(energy_mj(arch) / energy_mj(space.reference(arch)) for arch in archs)
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


def pareto_front(scores, energy_mj):
    """Return the archs that no other one betters in fitness at no more energy, by rising energy."""
    front = []
    for arch in sorted(scores, key=lambda arch: (energy_mj(arch), -scores[arch], arch)):
        if not front or scores[arch] > scores[front[-1]]:
            front.append(arch)
    return front


def spread(front, count):
    """Return at most `count` archs at even distances along a front, the fittest first."""
    last = len(front) - 1  # the fittest stands there
    places = [round(last * (1 - i / max(1, count - 1))) for i in range(count)]
    return [front[place] for place in dict.fromkeys(places)]  # each once


def best_fronts(scores, energy_mj, count):
    """Return `count` archs: the Pareto front, the front of the others, and so on; the last one is thinned."""
    left = dict(scores)  # what is on no front yet
    best = []
    while left and len(best) < count:
        front = pareto_front(left, energy_mj)
        best += spread(front, count - len(best))
        for arch in front:
            del left[arch]
    return best


def evolve(
    space, score_all, energy_mj, fits, generations=5, first=16, parents=8, mutations=6, crossovers=6,
    start=(), seed=0, state=None, report=lambda state: None,
):
    """Search by evolution on (fitness, energy); return {"scores": {arch: fitness}, "generation", "rng"}.

    score_all(archs) -> their fitnesses, energy_mj(arch), fits(arch) -> whether it is inside the limits. The
    first generation are the archs of `start` that fit and `first` random ones; parents are taken from the
    fitter half, front after front. The space offers sample, mutate and crossover. `state` is None or what an
    interrupted search gave to report(state), which is called after every generation. A child that cannot be
    drawn new and inside the limits in TRIES draws is left out, so a small space or a tight budget ends the
    search instead of hanging it.
    """
    generator = torch.Generator().manual_seed(seed)  # of all draws: same seed, same search
    state = state or {"scores": {}, "generation": -1}
    scores = state["scores"]  # arch -> fitness, of every generation
    if "rng" in state:
        generator.set_state(torch.tensor(state["rng"], dtype=torch.uint8))
    for generation in range(state["generation"] + 1, generations + 1):
        fitter = sorted(scores, key=scores.get, reverse=True)[: (len(scores) + 1) // 2]
        best = best_fronts({arch: scores[arch] for arch in fitter}, energy_mj, parents)  # none at first

        def pick():
            return best[int(torch.randint(len(best), (), generator=generator))]

        children = {}  # a dict keeps the order of drawing
        if best:
            makers = [lambda: space.mutate(pick(), generator)] * mutations  # each draws one child
            makers += [lambda: space.crossover(pick(), pick(), generator)] * crossovers
        else:
            makers = [lambda: space.sample(generator)] * first
            children = dict.fromkeys(arch for arch in start if fits(arch))
        for make in makers:
            for _ in range(TRIES):
                child = make()  # tried until it is new and fits
                if child not in scores and child not in children and fits(child):
                    children[child] = None
                    break
        scores.update(zip(children, score_all(list(children))))
        state.update(generation=generation, rng=generator.get_state().tolist())
        report(state)  # a file and a line, in search.py
        if not children:
            print("no new arch inside the limits: the search ends here")
            break
    return state


def share_scores(score, archs):
    """Return the fitness of each arch; of several processes each scores a share, and all know all."""
    mine = {arch: score(arch) for arch in archs[rank() :: processes()]}  # every n-th
    shares = [mine] * processes()  # replaced by what each process has
    if processes() > 1:
        dist.all_gather_object(shares, mine)
    scores = {arch: fitness for share in shares for arch, fitness in share.items()}
    return [scores[arch] for arch in archs]


# ---------------------------------------------------------------------------------------------- phases


def make_trainer(space, data, recipe, sharing, seed, device, amp, out):
    """Return trained(arch): the trained network of an arch, or the supernet of "", kept in a folder."""

    def trained(arch):
        epochs = recipe.epochs if arch else recipe.supernet_epochs or recipe.epochs
        model = make_model(space, arch, sharing, seed, recipe, data.state())
        settings = replace(recipe, epochs=epochs)
        return train(model, data, settings, checkpoint(space, arch, out), seed, device, amp, resume=True)

    return trained


def checkpoint(space, arch, out):
    """Return the path of the network of an arch, or of the supernet of "", in the folder of a search."""
    return Path(out) / (f"retrain-{space.file_name(arch)}.pt" if arch else "supernet.pt")


def make_train_all(space, path, recipe, sharing, seed, device, amp, out):
    """Return train_all(archs), which trains networks side by side where a CPU has several cores.

    Small layers gain little from a second thread, so each thread becomes a process that trains one network at
    a time. It leaves checkpoints: trained(arch) reads them. On a GPU and under torchrun it does nothing.
    """
    job = functools.partial(train_alone, space, path, recipe, sharing, seed, device, amp, out)

    def train_all(archs):
        missing = [arch for arch in archs if not checkpoint(space, arch, out).exists()]
        workers = min(torch.get_num_threads(), len(missing))
        if workers > 1 and processes() == 1 and device == "cpu":
            list(side_by_side(job, missing, workers))

    return train_all


def side_by_side(function, jobs, workers):
    """Yield function(job) of each job as it is done, in processes of their own; the first error ends all."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise OSError("a process was killed (too little memory?); the same command goes on") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def end_with_parent():
    """End this process when the one that started it ends, or is killed: it would wait for work for good."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def train_alone(space, path, recipe, sharing, seed, device, amp, out, arch):
    """Train the network of an arch in a process of its own."""
    torch.set_num_threads(1)
    with redirect_stdout(None):  # what it says about the data was said before
        data = load_data(space, path, recipe, cache=out)
    make_trainer(space, data, recipe, sharing, seed, device, amp, out)(arch)


def search_archs(space, data, supernet, energy_mj, fits, path, settings, seed, device, **evolution):
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
        scores = state["scores"]
        if not scores:
            return
        generation = state["generation"]
        front = pareto_front(scores, energy_mj)
        rate = (time.monotonic() - started) / (generation - first)
        times = f"{rate:.1f} s a generation | {rate * (last - generation):.0f} s left"
        progress = f"generation {generation}/{last} | {len(scores)} scored, {len(front)} on the front"
        print(f"{progress} | best {space.short(front[-1])} {scores[front[-1]]:.2f} | {times}", flush=True)

    def score_all(archs):
        return share_scores(lambda arch: data.fitness(supernet, arch, device), archs)

    state = evolve(space, score_all, energy_mj, fits, seed=seed, state=state, report=report, **evolution)
    return state["scores"]


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


def finalists_of(scores, energy_mj, count):
    """Return archs that are spread along the Pareto front, above the median of all that was scored."""
    median = statistics.median(scores.values())  # cheap networks that learn little are on the front too
    front = [arch for arch in pareto_front(scores, energy_mj) if scores[arch] >= median]
    return spread(front, count)


def largest_pures(space, fits, energy_mj, count=8):
    """Return name -> archs: of each operator alone the few that fit and use the most of the budget."""
    pures = {}
    for name, archs in space.pures().items():
        inside = sorted(filter(fits, archs), key=lambda arch: (energy_mj(arch), arch))
        if inside:
            pures[name] = inside[-count:]
    return pures


def choose(space, data, trained, candidates, energy_mj, device):
    """Retrain archs; return the winner and [(arch, validation figure, its standard error)].

    The winner is the cheapest one within a standard error of the best: what the data cannot tell from the
    best in accuracy is told apart by energy, and of many equals the luckiest is not taken for the best.
    """
    retrained = []
    for arch in candidates:
        figure, error = data.validate(trained(arch), device)  # the measure of fitness, trained weights
        retrained.append((arch, figure, error))
        figures = f"{energy_mj(arch):.4f} mJ, validation {figure:.2f} +- {error:.2f}"
        print(f"finalist {space.short(arch)}: {figures}")
    _, best, error = max(retrained, key=lambda row: row[1])  # of the validation figures
    equals = [row for row in retrained if row[1] >= best - error]  # no worse, as far as the data can tell
    winner = min(equals, key=lambda row: (energy_mj(row[0]), -row[1], row[0]))
    return winner[0], retrained


def draw_hybrids(space, winner, fits, energy_mj, seed, count=4):
    """Return up to `count` random archs of several operators that fit, of the winner's energy within 10 %."""
    generator = torch.Generator().manual_seed(seed + 1)  # other archs than evolution drew
    known = {winner, *(arch for archs in space.pures().values() for arch in archs)}
    hybrids = []
    for _ in range(10 * TRIES):
        arch = space.sample(generator)
        near = abs(energy_mj(arch) / energy_mj(winner) - 1) <= 0.1
        if near and arch not in known and fits(arch):
            known.add(arch)
            hybrids.append(arch)
        if len(hybrids) == count:
            break
    return hybrids


def verdict(rows):
    """Return one sentence on a table whose last row is the winner: its differences, in standard errors.

    A network dominates the winner if it needs no more energy and is better by more than a standard error of
    the difference. Of the random hybrids the mean counts.
    """
    measure = measure_of(rows[0])
    winner = rows[-1]
    hybrids = [row for row in rows[:-1] if row["name"].startswith("random")]
    others = [row for row in rows[:-1] if row not in hybrids]
    if hybrids:
        mean = {"name": f"the mean of {len(hybrids)} random hybrids"}
        for key in (measure, "energy_mj"):
            mean[key] = statistics.mean(row[key] for row in hybrids)
        squares = [row["standard_error"] ** 2 for row in hybrids]
        mean["standard_error"] = math.sqrt(sum(squares)) / len(hybrids)
        others.append(mean)
    parts = []
    dominating = []
    for row in others:
        difference = winner[measure] - row[measure]
        error = math.hypot(winner["standard_error"], row["standard_error"])
        errors = difference / max(error, 0.01)  # a BLEU of 0 has no error
        share = winner["energy_mj"] / row["energy_mj"]
        part = f"{difference:+.2f} ({errors:+.1f} SE) against {row['name']} at {share:.0%} of its energy"
        parts.append(part)
        if errors < -1 and share >= 1:
            dominating.append(row["name"])
    head = f"dominated by {', '.join(dominating)}" if dominating else "dominated by none of these"
    return f"the winner is {head}: {'; '.join(parts)}"


def measure_of(row):
    """Return the key of what a row of the table measures."""
    return "bleu" if "bleu" in row else "test_accuracy"


def print_table(rows, space):
    """Print one line a retrained network."""
    measures = [name for name in ("test_accuracy", "bleu", "standard_error") if name in rows[0]]
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


def run_search(space, data, trained, train_all, settings, energy_mj, costs, device, out):
    """Train the supernet, search, retrain finalists and baselines, and write search.json and winner.json."""
    seconds = {}  # of each phase
    started = time.monotonic()

    def lap(phase):
        seconds[phase] = time.monotonic() - started - sum(seconds.values())

    seed = settings["seed"]
    fits = make_fits(space, settings["budget"], settings["limits"], energy_mj, costs)  # fits(arch): a bool
    supernet = trained("")  # or read, if an earlier run trained it
    lap("supernet")
    pures = largest_pures(space, fits, energy_mj)
    start = [arch for archs in pures.values() for arch in archs]
    path = out / "search-state.json"
    scores = search_archs(
        space, data, supernet, energy_mj, fits, path, settings, seed, device, start=start,
        **settings["evolution"],
    )
    if not scores:
        raise ValueError(f"no arch of space {space.name} was found inside the limits in {TRIES} draws each")
    lap("search")
    baselines = {name: max(archs, key=lambda arch: (scores[arch], arch)) for name, archs in pures.items()}
    finalists = finalists_of(scores, energy_mj, settings["finalists"])
    candidates = dict.fromkeys([*finalists, *baselines.values()])  # each once
    train_all(candidates)
    winner, chosen = choose(space, data, trained, candidates, energy_mj, device)
    lap("finalists")
    hybrids = draw_hybrids(space, winner, fits, energy_mj, seed)  # what chance finds at the same energy
    networks = {"reference": space.reference(winner)} | baselines
    networks |= {f"random {number}": arch for number, arch in enumerate(hybrids, 1)} | {"winner": winner}
    train_all(dict.fromkeys(networks.values()))
    rows = []
    for name, arch in networks.items():  # retrained with one recipe
        rows.append({"name": name, "arch": arch, **data.test(trained(arch), device), **costs(arch)})
    lap("baselines")
    limits = limits_for(space, winner, settings["budget"], settings["limits"], energy_mj)
    result = {"winner": winner, "budget": limits, "finalists": chosen, "verdict": verdict(rows)}
    result |= {"table": rows, "scores": scores, "seed": seed, "settings": settings}
    result |= data.samples(trained(winner), trained(rows[0]["arch"]), device)
    write_text(json.dumps(result, indent=1), out / "search.json")
    write_text(json.dumps({"space": space.name, "arch": winner}), out / "winner.json")
    print_table(rows, space)
    print(f"winner: {out / 'winner.json'}, trained: {out / f'retrain-{space.file_name(winner)}.pt'}")
    print("seconds since this start: " + " | ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(result["verdict"])


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
    flag("--accounting", default="official", help="rules of energy and latency: official or uniform")
    flag("--bits", type=int, default=32, help="of a word in the costs: 32 or 8 (--set bits=8 trains so)")
    flag("--pe-limit", type=int, default=EYERISS.pe_limit, help="cells of the accelerator's array")
    flag("--generations", type=int, default=5, help="generations after the first")
    flag("--quick", action="store_true", help="a short run, only to see that all works")
    args = parser.parse_args(argv)
    evolution = {"generations": args.generations, "first": 16}
    if args.quick:
        shorter = ["max_length=24", "beam=1"] if args.space in TOKEN_SPACES else []
        args.set = ["epochs=1", "supernet_epochs=1", "finalists=1", *shorter, *args.set]
        evolution = {"generations": 1, "first": 6}
    space, recipe, out = read_settings(args)
    limits = read_limits(args.limit)  # cost -> largest value
    if not 0 <= evolution["generations"]:
        raise ValueError(f"--generations must be at least 0, got {args.generations}")
    device = join_processes(args.device)  # of this process
    table = None
    if "measured_ms" in limits:
        if space.name not in SPACES or processes() > 1:
            raise ValueError("--limit measured_ms is for images and one process; give latency_ms, simulated")
        Path(out).mkdir(parents=True, exist_ok=True)
        table = measured_table(space, Path(out) / "measured.json")
    hardware = replace(EYERISS, pe_limit=args.pe_limit)  # the rest of it as published
    energy_mj, costs = make_costs(space, args.bits, args.accounting, hardware, table)
    require_some_arch(space, recipe.budget, limits, energy_mj, costs)
    data = load_data(space, args.data, recipe, cache=out)
    trained = make_trainer(space, data, recipe, args.sharing, args.seed, device, args.amp, out)
    settings = asdict(recipe) | {"space": space.name, "sharing": args.sharing, "seed": args.seed}
    settings |= {"limits": limits, "evolution": evolution, "accounting": args.accounting}
    settings |= {"word_bits": args.bits, "pe_limit": args.pe_limit}
    train_all = make_train_all(space, args.data, recipe, args.sharing, args.seed, device, args.amp, out)
    run_search(space, data, trained, train_all, settings, energy_mj, costs, device, Path(out))


if __name__ == "__main__":
    run_command(main)

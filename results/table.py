"""Train every network of the `small` space alone, and read from the whole table what each operator adds.

    python -m results.table --train     fills results/table.json: 4,608 trainings, one a core at a time
                                        (4 to 5 hours on two cores; the same command resumes it)
    python -m results.table             rewrites results/table.md and its figures, in seconds

The space has 2,304 networks: two blocks a resolution, three operators in the first stage and four in the
others. Each is trained alone with SEEDS seeds: those of one operator first, then those of two, then the rest
in an order that was shuffled once, so that an unfinished table is whole for one and two operators and a fair
sample of the others.
results/table.json is a benchmark for others too: search algorithms can be compared on it in milliseconds. Its
columns are in the order of "archs"; accuracies are percent times 100, or null where a network is not trained
yet.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import train
from cost_model import ACCOUNTINGS, arch_costs, network_cost, network_layers
from data.images import load_images
from results.figures import LETTERS, new_figure, write_figure
from search import evolve, pareto_front, side_by_side
from shiftaddnas import OPS, SPACES, build

TABLE = Path(__file__).with_suffix(".json")
SPACE = SPACES["small"]
SEEDS = 2
RECIPE = {"epochs": 2, "lr": 0.01}  # short: what a network reaches in 100 steps
ACCURACIES = ("val_accuracy", "test_accuracy")
BUDGETS = (0.34, 0.35, 0.36, 0.4, 0.5, 0.75, 1.0)  # shares of the energy of all-conv
DRAWS = 1000  # of the intervals
SEARCH_BUDGET = 0.5  # as search.py has it
EVALUATIONS = 76  # of a search, as many as evolve makes without `start`
SEARCHES = Path(__file__).parent / "small" / "search.json"  # of python -m results.search --to results/small
MARK = "<!-- the lines between these marks are written by python -m results.table -->\n"
TITLE = "# Every network of one hybrid space, trained alone\n\n"


# ------------------------------------------------------------------------------------- filling the table


@functools.lru_cache(maxsize=None)
def embedded():
    """Return the embedded images, read once a process."""
    return load_images("", SPACE)


def new_table():
    """Return a table with the costs of all networks and no accuracies."""
    archs = [SPACE.arch(index) for index in range(SPACE.size())]
    table = {"space": SPACE.name, "recipe": RECIPE, "data": embedded().fingerprint()}
    table["archs"] = archs
    costs = [arch_costs(SPACE, arch) for arch in archs]
    table["params"] = [row["params"] for row in costs]
    table["latency_ms"] = [float(f"{row['latency_ms']:.4g}") for row in costs]
    for accounting in ACCOUNTINGS:
        energies = [network_cost(network_layers(SPACE, arch), 32, accounting).energy_mj for arch in archs]
        table[f"energy_mj_{accounting}"] = [float(f"{energy_mj:.5g}") for energy_mj in energies]
    for name in ACCURACIES:
        table[name] = [[None] * len(archs) for _ in range(SEEDS)]
    return table


def train_one(job):
    """Train one network alone, on one core; return the job, (index, seed), and its accuracies."""
    index, seed = job
    torch.set_num_threads(1)
    data = embedded()
    network = build(SPACE, SPACE.arch(index), seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "network.pt"
        network = train.train(network, data, train.make_recipe("fashion", RECIPE), path, seed)
    return job, data.validate(network)[0], data.test(network)["test_accuracy"]


def fill(processes):
    """Train what is missing in the table, which is written whole after each network."""
    table = read_table() if TABLE.exists() else new_table()
    order = np.random.default_rng(0).permutation(len(table["archs"])).tolist()
    order.sort(key=lambda index: min(3, len(set(table["archs"][index]) - {"/"})))  # stable
    jobs = [(index, seed) for index in order for seed in range(SEEDS)]
    missing = [(index, seed) for index, seed in jobs if table["test_accuracy"][seed][index] is None]
    started = time.monotonic()
    results = side_by_side(train_one, missing, processes)
    for number, ((index, seed), val, test) in enumerate(results, 1):
        table["val_accuracy"][seed][index] = round(100 * val)
        table["test_accuracy"][seed][index] = round(100 * test)
        train.write_text(json.dumps(table), TABLE)
        rate = (time.monotonic() - started) / number
        done = len(jobs) - len(missing) + number
        progress = f"{done}/{len(jobs)} | {table['archs'][index]} seed {seed}"
        left = f"{rate:.1f} s a network | {rate * (len(missing) - number) / 3600:.1f} h left"
        print(f"{progress} | test accuracy {test:.2f} | {left}", flush=True)


def read_table():
    """Return results/table.json; ValueError if it was made with another space, recipe or data."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    wanted = {"space": SPACE.name, "recipe": RECIPE, "data": embedded().fingerprint()}
    for name, value in wanted.items():
        if table.get(name) != value:
            raise ValueError(f"{TABLE} was made with {name} {table.get(name)!r}, not {value!r}; remove it")
    return table


# ------------------------------------------------------------------------------------ reading the table


def known_part(table):
    """Return (archs, {column: array}) of the networks that are trained with every seed.

    Accuracies are (SEEDS, n) in percent, energies (n,), as they are and as shares of the all-conv network's.
    Raises ValueError if there are none.
    """
    columns = {}
    for name in ACCURACIES:
        columns[name] = np.array(table[name], dtype=float) / 100  # null becomes NaN
    known = ~np.isnan(columns["test_accuracy"]).any(0)
    reference = table["archs"].index(SPACE.pures()["all-conv"][0])
    for accounting in ACCOUNTINGS:
        energy_mj = np.array(table[f"energy_mj_{accounting}"])
        columns[f"energy_mj_{accounting}"] = energy_mj
        columns[f"share_{accounting}"] = energy_mj / energy_mj[reference]
    if not known.any():
        raise ValueError(f"{TABLE} has no network that is trained with {SEEDS} seeds yet; --train goes on")
    archs = [arch for arch, is_known in zip(table["archs"], known) if is_known]
    return archs, {name: column[..., known] for name, column in columns.items()}


def letters_of(archs):
    """Return the set of operators of each arch."""
    return [set(arch) - {"/"} for arch in archs]


def fronts(archs, columns, accounting):
    """Return {operators: accuracies (DRAWS, budgets)} of the best network of a few operators in each budget.

    In each draw every network is chosen by the validation accuracy of one of its seeds, drawn for it, and
    judged by the test accuracy of the other: a maximum of noisy figures would favour large sets of networks.
    NaN where no network of these operators is inside the budget.
    """
    draw = np.random.default_rng(0)
    share = columns[f"share_{accounting}"]
    rows = np.arange(len(archs))
    subsets = ["".join(ops) for n in range(1, 5) for ops in itertools.combinations("csat", n)]
    inside = {}  # operators -> for each budget the indices of the networks
    for ops in subsets:
        of_ops = np.array([letters <= set(ops) for letters in letters_of(archs)])
        inside[ops] = [np.flatnonzero(of_ops & (share <= budget + 1e-9)) for budget in BUDGETS]
    best = {ops: np.full((DRAWS, len(BUDGETS)), np.nan) for ops in subsets if len(inside[ops][-1])}
    for number in range(DRAWS):
        seed = draw.integers(SEEDS, size=len(archs))
        chosen_by = columns["val_accuracy"][seed, rows]
        judged_by = columns["test_accuracy"][1 - seed, rows]
        for ops, curve in best.items():
            for i, indices in enumerate(inside[ops]):
                if len(indices):
                    curve[number, i] = judged_by[indices[chosen_by[indices].argmax()]]
    return best


def main_effects(archs, values):
    """Return (effects, standard error, fitted values): what each op adds, against convolution.

    Least squares with one term for an op at a position, none for pairs: effects {(position, op): value}.
    """
    blocks = [arch.replace("/", "") for arch in archs]
    names = []
    for position, (stage, _, _) in enumerate(SPACE.walk(SPACE.arch(0))):
        names += [(position, op) for op in SPACE.ops[stage] if op != "c"]
    terms = [[block[position] == op for position, op in names] for block in blocks]
    x = np.column_stack([np.ones(len(archs)), np.array(terms, dtype=float)])  # (n, 1 + names)
    solution, _, rank, _ = np.linalg.lstsq(x, values, rcond=None)
    freedom = len(archs) - rank
    fitted = x @ solution
    variance = ((values - fitted) ** 2).sum() / max(1, freedom) * np.diag(np.linalg.pinv(x.T @ x))
    return dict(zip(names, solution[1:])), float(np.sqrt(variance[1:]).mean()), fitted


def kendall_tau(a, b):
    """Return Kendall's tau-b of two lists, ties corrected; 0 if one is constant."""
    a = np.sign(np.subtract.outer(a, a))
    b = np.sign(np.subtract.outer(b, b))
    return float((a * b).sum() / math.sqrt(max(1, (a * a).sum() * (b * b).sum())))


def search_regrets(archs, columns, fitness_name="val_accuracy", runs=200):
    """Return {method: regrets (runs, EVALUATIONS)} of evolve and of random search inside a budget.

    Fitness is a mean accuracy of the table; the regret after some evaluations is how much the best of them
    lacks to the best network inside the budget, in points.
    """
    mean = columns[fitness_name].mean(0)
    share = dict(zip(archs, columns["share_official"]))
    fitness = {arch: value for arch, value in zip(archs, mean) if share[arch] <= SEARCH_BUDGET}
    best = max(fitness.values())
    regrets = {"evolution": [], "random": []}
    for seed in range(runs):
        state = evolve(
            SPACE, lambda children: [fitness[arch] for arch in children], share.get, fitness.__contains__,
            seed=seed,
        )
        order = np.random.default_rng(seed).permutation(len(fitness))
        found = {"evolution": [*state["scores"].values()], "random": np.array([*fitness.values()])[order]}
        for method, values in found.items():
            curve = best - np.maximum.accumulate(values)[:EVALUATIONS]
            regrets[method].append(np.pad(curve, (0, EVALUATIONS - len(curve)), mode="edge"))
    return {method: np.array(rows) for method, rows in regrets.items()}


def ranks(runs, archs, columns):
    """Return of each search of the space (winner, rank by test accuracy, by fitted values, networks inside).

    The rank is among the networks inside the search's budget. Fitted values are those of main_effects, in
    which the noise of all trainings is averaged.
    """
    mean = columns["test_accuracy"].mean(0)
    _, _, fitted = main_effects(archs, mean)
    rows = []
    for run in runs:
        if run["winner"] not in archs:  # of an unfinished table
            continue
        own = archs.index(run["winner"])
        inside = columns["energy_mj_official"] <= run["budget"]["energy_mj"] * (1 + 1e-4)  # a bool a network
        better = [int((values[inside] > values[own] + 1e-9).sum()) for values in (mean, fitted)]
        rows.append((run["winner"], better[0] + 1, better[1] + 1, int(inside.sum())))
    return rows


# ------------------------------------------------------------------------------------------- the page


def interval(values):
    """Return "mean [5 %, 95 %]" of some draws, or nothing where a budget holds no network."""
    if np.isnan(values).all():
        return ""
    low, high = np.percentile(values, [5, 95])
    return f"{values.mean():.1f} [{low:.1f}, {high:.1f}]"


def markdown(titles, rows):
    """Return the lines of a table."""
    head = ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def front_lines(best):
    """Return two tables: the best network of some operators in each budget, and what an operator adds."""
    budgets = [f"{budget:.0%}" for budget in BUDGETS]
    rows = [[ops, *(interval(curve.T[i]) for i in range(len(BUDGETS)))] for ops, curve in best.items()]
    lines = markdown(["operators", *budgets], rows)
    rows = []
    for op in "csat":
        rest = "csat".replace(op, "")
        if rest not in best:  # of an unfinished table
            continue
        gain = best["csat"] - best[rest]
        rows.append([f"{op}, {OPS[op]}", *(interval(gain.T[i]) for i in range(len(BUDGETS)))])
    return lines + markdown(["added by", *budgets], rows)


def effect_lines(archs, columns):
    """Return the table of main effects on accuracy, and on energy in both accountings."""
    lines = []
    named = {"test accuracy, points": columns["test_accuracy"].mean(0)}
    for accounting in ACCOUNTINGS:
        named[f"energy, points of all-conv's, {accounting}"] = 100 * columns[f"share_{accounting}"]
    for name, values in named.items():
        effects, error, fitted = main_effects(archs, values)
        explained = 1 - (values - fitted).var() / values.var()
        walk = SPACE.walk(SPACE.arch(0))
        titles = [name]
        titles += [f"block {number}, stage {stage + 1}" for number, (stage, _, _) in enumerate(walk, 1)]
        rows = []
        for op in "sat":
            cells = [effects.get((position, op)) for position in range(len(walk))]
            rows.append([OPS[op], *("" if cell is None else f"{cell:+.2f}" for cell in cells)])
        lines += markdown(titles, rows)
        lines += ["", f"Standard error {error:.2f}; together they explain {explained:.0%} of the variance."]
    return lines


def without_adds(archs):
    """Return a bool a network: whether none of its blocks is an add."""
    return np.array(["a" not in arch for arch in archs])


def noise_lines(accuracy, inside, plain):
    """Return the table of what two seeds tell apart among all networks, the fitter and those without adds."""
    mean = accuracy.mean(0)
    fitter = mean > np.median(mean)
    everything = np.full(len(mean), True)
    named = {"all": everything, "the fitter half": fitter, "of those inside the budget": fitter & inside}
    named["without adds"] = plain
    rows = []
    for name, some in named.items():
        difference = (accuracy[0] - accuracy[1])[some]
        deviation = difference.std() / math.sqrt(2)  # without what a seed gives to all of them
        numbers = deviation, mean[some].std(), kendall_tau(*accuracy[:, some])
        rows.append([name, f"{some.sum():,}", *(f"{number:.2f}" for number in numbers)])
    titles = "networks|number|deviation of one over seeds|of the means|Kendall tau of the two seeds"
    return markdown(titles.split("|"), rows)


def write_page(table):
    """Write results/table.md but for its reading, which stands below MARK; return the parts for figures."""
    archs, columns = known_part(table)
    accuracy = columns["test_accuracy"]
    lines = [f"{len(archs):,} of {len(table['archs']):,} networks are trained with {SEEDS} seeds.", ""]
    mean = accuracy.mean(0)
    lines.append(f"Test accuracy {mean.mean():.2f} %, {mean.min():.2f} to {mean.max():.2f}.")
    inside = columns["share_official"] <= SEARCH_BUDGET
    lines += noise_lines(accuracy, inside, without_adds(archs))
    curves = {}
    for accounting in ACCOUNTINGS:
        curves[accounting] = fronts(archs, columns, accounting)
        lines += ["", f"## What each operator adds to the front, {accounting} accounting"]
        lines += front_lines(curves[accounting])
    lines += ["", "## The front of the whole space, by mean test accuracy (noise flatters these maxima)"]
    scores = dict(zip(archs, mean))
    share = dict(zip(archs, columns["share_official"]))
    front = pareto_front(scores, share.get)
    rows = [[arch, f"{scores[arch]:.2f}", f"{share[arch]:.1%}"] for arch in front]
    lines += markdown(["arch", "accuracy %", "energy of all-conv"], rows)
    lines += ["", "## Main effects, against a convolution in the same place"] + effect_lines(archs, columns)
    count = inside.sum()
    lines += ["", f"## Evolution on the table: {count} networks in {SEARCH_BUDGET:.0%} of all-conv's energy"]
    regrets = {}  # fitness -> method -> curves
    if count > 2 * EVALUATIONS:  # else it is too easy
        regrets = {name: search_regrets(archs, columns, name) for name in ACCURACIES}
    lines += regret_lines(regrets)
    if SEARCHES.exists():
        runs = json.loads(SEARCHES.read_text(encoding="utf-8"))["runs"]
        lines += ["", "## Winners of `python search.py --space small`"]
        rows = []
        for winner, rank, fitted_rank, count in ranks(runs, archs, columns):
            rows.append([winner, f"{rank} of {count}", f"{fitted_rank} of {count}"])
        titles = ["winner", "rank inside the budget, by test accuracy", "by the sum of main effects"]
        lines += markdown(titles, rows)
    page = TABLE.with_suffix(".md")
    before, _, after = page.read_text(encoding="utf-8").split(MARK) if page.exists() else (TITLE, "", "")
    train.write_text(MARK.join([before, "\n".join(lines) + "\n", after]), page)
    print("\n".join(lines))
    return archs, columns, curves, regrets.get("val_accuracy")


def regret_lines(regrets):
    """Return a table of regrets, {fitness: {method: (runs, EVALUATIONS)}}, after the last one, in points."""
    rows = []
    for fitness_name, methods in regrets.items():
        for method, curve in methods.items():
            last = curve[:, -1]
            low, median, high = np.percentile(last, [25, 50, 75])
            values = [f"{value:.2f}" for value in (low, median, high, last.mean())]
            rows.append([method, fitness_name.replace("_accuracy", ""), *values])
    titles = [f"regret after {EVALUATIONS} evaluations, points", "fitness"]
    titles += ["first quartile", "median", "third quartile", "mean"]
    return markdown(titles, rows) if rows else ["", "Too few networks are trained yet."]


def plot(archs, columns, curves, regrets):
    """Draw the fronts, the main effects and the searches: table-*.png."""
    figure = new_figure(9, 3.8)
    for axes, (accounting, best) in zip(figure.subplots(1, 2), curves.items()):
        axes.scatter(100 * columns[f"share_{accounting}"], columns["test_accuracy"].mean(0), s=2, c="0.8")
        for ops, marker in zip(("s", "cs", "ca", "sat", "csa", "csat"), "Dso^v*"):
            if ops not in best:  # of an unfinished table
                continue
            axes.plot(100 * np.array(BUDGETS), best[ops].mean(0), marker=marker, label=ops, linewidth=1)
        low = np.percentile(columns["test_accuracy"], 20)
        axes.set(title=accounting, xlabel="energy budget, % of all-conv", ylabel="test accuracy %")
        axes.set_ylim(low, None)
    axes.legend(fontsize=8, title="operators")
    write_figure(figure, TABLE.with_name("table-fronts.png"))
    effects, error, _ = main_effects(archs, columns["test_accuracy"].mean(0))
    figure = new_figure(6, 3)
    axes = figure.subplots()
    for i, op in enumerate("sat"):
        heights = [effects.get((position, op), math.nan) for position in range(6)]
        fill, _, hatch = LETTERS[op]
        places = np.arange(6) + 0.27 * (i - 1)
        axes.bar(places, heights, 0.27, yerr=error, color=fill, hatch=hatch, edgecolor="k", label=OPS[op])
    axes.axhline(0, color="k", linewidth=0.5)
    axes.set(xlabel="block", ylabel="points of test accuracy\nagainst convolution", xticks=range(6))
    axes.set_xticklabels(range(1, 7))
    axes.legend(fontsize=8)
    write_figure(figure, TABLE.with_name("table-effects.png"))
    if not regrets:  # of an unfinished table
        return
    figure = new_figure(5, 3)
    axes = figure.subplots()
    for method, curve in regrets.items():
        low, middle, high = np.percentile(curve, [25, 50, 75], axis=0)
        axes.plot(range(1, EVALUATIONS + 1), middle, label=method)
        axes.fill_between(range(1, EVALUATIONS + 1), low, high, alpha=0.2)
    axes.set(xlabel="networks evaluated", ylabel="regret, points", ylim=(0, 2))
    axes.legend()
    write_figure(figure, TABLE.with_name("table-search.png"))


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help="train what is missing, for hours")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="trainings at a time")
    args = parser.parse_args(argv)
    if args.train:
        return fill(args.processes)
    parts = write_page(read_table())
    try:
        plot(*parts)
    except ValueError as error:  # no matplotlib
        print(error)


if __name__ == "__main__":
    train.run_command(main)

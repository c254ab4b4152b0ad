"""Compare ways of sharing weights: does a supernet rank networks as training alone does?

    python -m results.sharing --train     fills results/sharing.json: supernets of the `small` space, one a
                                          core at a time (an hour; the same command resumes it)
    python -m results.sharing             rewrites the table of results/sharing.md and its figure, in seconds

For each way of sharing and each seed a supernet is trained with the recipe of search.py. All 2,304 networks
are scored with its weights on validation images, and their order is compared with that of results/table.json,
where each was trained alone. `--weights FILE` draws sharing.png of a supernet that `python train.py --sharing
heterogeneous` trained instead: the largest shared weight as each op reads it.
"""

import argparse
import contextlib
import io
import json
import math
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import train
from data.images import FITNESS_IMAGES
from results.figures import new_figure, write_figure
from results.operators import median_ms
from results.search import with_spread
from results.table import SPACE, embedded, kendall_tau, known_part, markdown, read_table, without_adds
from search import side_by_side
from shiftaddnas import BINS, OPS, REACH, SPACES, SharedWeight, ShiftConv2d, Supernet, power_of_two
from shiftaddnas import scale_gradient

STUDY = Path(__file__).with_suffix(".json")
SEEDS = 3  # supernets of a form
TIMED_STEPS = 20
TOP = 0.05  # share of the networks that a search is after
MARK = "<!-- the lines between these marks are written by python -m results.sharing -->\n"


# ------------------------------------------------------------------- the forms that are compared


class FrozenWeight(SharedWeight):
    """T as the closed form, not learned."""

    def __init__(self, shape, ops, **named):
        super().__init__(shape, ops, **named)
        if self.slopes is not None:
            self.slopes.requires_grad_(False)


class ScaledWeight(SharedWeight):
    """The gradient of an add on w scaled to the length eta sqrt(numel), as in AdderNet."""

    def weight_for(self, op):
        weight = super().weight_for(op)
        return scale_gradient(weight, 0.2) if op == "add" else weight


class OfficialWeight(SharedWeight):
    """The published form: w and the slopes start as N(0, 1), and shift reads a T of its own.

    The bins cut the range of w; the largest element falls out of the half-open last bin and becomes 0. The
    gradient of an add is scaled to eta = 0.2. Source: official hytra_ops_ws_dist.py.
    """

    def __init__(self, shape, ops, **named):
        super().__init__(shape, ops, transform=False, **named)
        self.w = nn.Parameter(torch.randn(shape))
        transformed = [op for op in ("shift", "add") if op in self.ops and len(self.ops) > 1]
        self.slopes = nn.ParameterDict({op: nn.Parameter(torch.randn(BINS)) for op in transformed})

    def weight_for(self, op):
        if op not in self.slopes:
            return self.w
        low, high = self.w.detach().aminmax()
        unit = (self.w.detach() - low) / (high - low)
        bins = (unit * BINS).long().clamp_(0, BINS - 1)
        weight = self.w * self.slopes[op][bins] * (unit < 1)
        return scale_gradient(weight, 0.2) if op == "add" else weight


class OfficialSupernet(Supernet):
    """A supernet whose divergence is the published one, summed over the add layers of an arch."""

    def divergence(self, archs):
        total = 0.0
        for arch in archs:
            for block, entrance in self.path(arch):
                for shared, op in block.readers(entrance):
                    if op == "add" and op in shared.slopes:
                        total = total + official_kl(shared.weight_for(op))
        return total / len(archs)


def official_kl(weight, generator=None):
    """Return the published divergence (1/n) sum_i q_i (log q_i - log p_i).

    p = softmax(weight) over the n positions, q = softmax(z), z ~ Laplace(0, 2) drawn afresh.
    Source: official hytra_ops_ws_dist.py.
    """
    uniform = torch.rand(weight.numel(), generator=generator).to(weight.device) - 0.5
    z = -2 * uniform.sign() * torch.log1p(-2 * uniform.abs().clamp_max(0.5 - 2**-24))  # 0.5 would be infinite
    log_q = z.log_softmax(0)
    return (z.softmax(0) * (log_q - weight.flatten().log_softmax(0))).mean()


# name -> sharing of the supernet, settings of the recipe; the published divergence has weight 10
FORMS = {
    "none": ("none", {}),
    "naive": ("naive", {}),
    "heterogeneous": ("heterogeneous", {}),
    "frozen slopes": (FrozenWeight, {}),
    "no divergence": ("heterogeneous", {"kl_weight": 0.0}),
    "official": (OfficialWeight, {"kl_weight": 10.0}),
    "single path": ("heterogeneous", {"sampling": "single"}),
    "eta 0.2": (ScaledWeight, {}),
}
QUESTIONS = (  # which form is better than which?
    ("does sharing cost", "naive", "none"),
    ("does T pay", "heterogeneous", "naive"),
    ("does learning T pay", "heterogeneous", "frozen slopes"),
    ("does the divergence pay", "heterogeneous", "no divergence"),
    ("does fair sampling pay", "heterogeneous", "single path"),
    ("does our form pay", "heterogeneous", "official"),
)


def make_supernet(space, name, seed=0):
    """Return the supernet of one row of the study."""
    kind = OfficialSupernet if FORMS[name][0] is OfficialWeight else Supernet
    return kind(space, FORMS[name][0], seed)


def recipe_of(name):
    """Return the recipe of one row of the study."""
    return train.make_recipe("fashion", FORMS[name][1])


# --------------------------------------------------------------------------- what is measured


@torch.no_grad()
def inherited(supernet, data):
    """Return the validation accuracy of every arch with a supernet's weights, in the order of space.arch().

    It is what data.fitness gives, but archs that begin alike share the work: a walk over the tree of their
    letters. The statistics of batch norm depend only on what stands before, so they are set block by block.
    """
    x, _ = data.view(data.train_set, np.arange(500))  # as recalibrate() takes
    x_val, y = data.view(data.val_set, np.arange(FITNESS_IMAGES))
    accuracies = {}
    walk = SPACE.walk(SPACE.arch(0))

    def visit(prefix, x, x_val):
        if len(prefix) == len(walk):
            right = (supernet.head(x_val).argmax(1) == y).float().mean().item()
            accuracies[prefix] = 100 * right
            return
        stage, _, entrance = walk[len(prefix)]
        for letter in SPACE.ops[stage]:
            block = supernet.blocks[f"{len(prefix)}-{stage}-{letter}"]
            visit(prefix + letter, *through(block, x, x_val, entrance))

    supernet.eval()
    visit("", *through(supernet.stem, x, x_val))
    return [accuracies[SPACE.arch(index).replace("/", "")] for index in range(SPACE.size())]


def through(block, x, x_val, *entrance):
    """Return what a block makes of training images, with their statistics, and then of others."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # plain average over the batches
    x = block.train()(x, *entrance)
    return x, block.eval()(x_val, *entrance)


def study_one(job):
    """Train one supernet on one core; return the job, (form, seed), and accuracies, None if it diverged."""
    name, seed = job
    torch.set_num_threads(1)
    data = embedded()
    supernet = make_supernet(SPACE, name, seed)
    supernet.sharing = name  # a checkpoint keeps plain values
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            supernet = train.train(supernet, data, recipe_of(name), Path(folder) / "supernet.pt", seed)
        except ValueError:  # the loss is not finite any more: a finding of the study, not its end
            return job, None
    return job, [round(100 * percent) for percent in inherited(supernet, data)]


def fill(processes):
    """Train what is missing in the study, which is written whole after each supernet."""
    study = read_study()
    jobs = [(name, seed) for seed in range(SEEDS) for name in FORMS]
    missing = [(name, seed) for name, seed in jobs if f"{name} {seed}" not in study["inherited"]]
    started = time.monotonic()
    results = side_by_side(study_one, missing, processes)
    for number, ((name, seed), accuracies) in enumerate(results, 1):
        study["inherited"][f"{name} {seed}"] = accuracies
        train.write_text(json.dumps(study), STUDY)
        minutes = (time.monotonic() - started) / number * (len(missing) - number) / 60
        done = f"{len(study['inherited'])}/{len(jobs)}"
        print(f"{done} | {name} {seed} | {minutes:.0f} min left", flush=True)
    if "ms" not in study:
        study["ms"] = time_steps(SPACE, embedded())
        train.write_text(json.dumps(study), STUDY)


def read_study():
    """Return results/sharing.json, or an empty study; ValueError if it is of other data or another recipe."""
    made_with = {"recipe": vars(train.RECIPES["fashion"]), "data": embedded().fingerprint()}
    if not STUDY.exists():
        return made_with | {"space": SPACE.name, "inherited": {}}
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    for name, value in made_with.items():
        if study.get(name) != value:
            raise ValueError(f"{STUDY} was made with another {name}; remove it")
    return study


def time_steps(space, data):
    """Return ms of training steps of each row, all with the same archs and images, one after the other.

    And T of the largest weight as one gather and as the hundred masked passes of the official code, ms.
    """
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name in FORMS:
        recipe = recipe_of(name)
        supernet = make_supernet(space, name).to(memory_format=torch.channels_last).train()
        rows[name] = recipe, supernet, train.make_optimizer(supernet, recipe), []
    for _ in range(TIMED_STEPS + 2):
        inputs, y = data.batch(data.epoch(100, generator)[0], generator, "cpu")
        drawn = {"fair": space.draw(generator), "single": space.draw(generator, fair=False)}
        for recipe, supernet, optimizer, times in rows.values():
            archs = drawn[recipe.sampling]
            started = time.perf_counter()
            optimizer.zero_grad()
            loss = data.loss(supernet(*inputs, archs), y) + recipe.kl_weight * supernet.divergence(archs)
            loss.backward()
            optimizer.step()
            times.append(1e3 * (time.perf_counter() - started))
    shared = largest_transformed(rows["heterogeneous"][1])
    gather, masked = median_ms([lambda: shared.weight_for("add"), lambda: masked_transform(shared)], "cpu")
    ms = {name: [round(time_ms, 2) for time_ms in times[2:]] for name, (*_, times) in rows.items()}
    return ms | {"gather": gather, "masked": masked}


def largest_transformed(supernet):
    """Return the largest SharedWeight that has a T."""
    shared = [m for m in supernet.modules() if isinstance(m, SharedWeight) and m.slopes is not None]
    return max(shared, key=lambda m: m.w.numel())


@torch.no_grad()
def masked_transform(shared):
    """Return T(w) as the official code computes it: one pass over the whole tensor for each bin."""
    z = ((shared.w / (REACH * shared.std) + 1) * BINS / 2).clamp(0, BINS - 0.5)
    total = torch.zeros_like(shared.w)
    for index in range(BINS):
        total += shared.w * ((z >= index) & (z < index + 1)) * shared.slopes[index]
    return total


# ------------------------------------------------------------------------------- the table


def count_parameters(space, name):
    """Return (parameters of a supernet, those of one that shares nothing and has shifts of the PS form).

    A PS shift has an exponent and a sign for each weight, and a bias on its depthwise layer.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in make_supernet(space, name).parameters())
        none = make_supernet(space, "none")
    extra = 0
    for layer in none.modules():
        if isinstance(layer, ShiftConv2d):
            extra += layer.weight.numel() + (layer.out_channels if layer.groups > 1 else 0)
    return count, sum(p.numel() for p in none.parameters()) + extra


def ranking(scores, truth, plain):
    """Return {measure: value} of how scores order networks; plain: a bool a network, true without adds."""
    count = max(1, round(TOP * len(truth)))
    best = set(np.argsort(-truth)[:count].tolist())
    found = set(np.argsort(-scores)[:count].tolist())
    return {
        "Kendall tau": kendall_tau(scores, truth),
        "tau without adds": kendall_tau(scores[plain], truth[plain]),
        "recall": len(best & found) / count,
    }


def judge(study):
    """Return {form: {measure: values, one a supernet}}, the two seeds' own ranking, the number of networks.

    The mean accuracy is over all networks; ranking and recall are against the mean test accuracy of training
    alone.
    """
    table = read_table()
    archs, columns = known_part(table)
    places = [table["archs"].index(arch) for arch in archs]
    plain = without_adds(archs)
    alone = columns["test_accuracy"].mean(0)
    results = {}
    for name in FORMS:
        rows = [study["inherited"].get(f"{name} {seed}") for seed in range(SEEDS)]
        rows = [np.array(row) / 100 for row in rows if row is not None]
        if not rows:
            continue
        rankings = [ranking(row[places], alone, plain) for row in rows]
        results[name] = {"mean accuracy": [row.mean() for row in rows]}
        results[name] |= {measure: [values[measure] for values in rankings] for measure in rankings[0]}
    return results, ranking(*columns["test_accuracy"], plain), len(archs)


def write_study(study):
    """Write the tables between the marks of results/sharing.md; return what the figure shows."""
    results, seeds, count = judge(study)
    none, none_ps = count_parameters(SPACE, "none")
    rows = []
    for name, measures in results.items():
        params, _ = count_parameters(SPACE, name)
        cells = [f"{params:,}", f"{params / none:.2f}", f"{params / none_ps:.2f}"]
        ratio = ""  # times are taken last
        if "ms" in study:
            ratio = f"{np.median(np.divide(study['ms'][name], study['ms']['none'])):.2f}"
        cells += [ratio, str(len(measures["recall"]))]
        cells.append(with_spread(measures["mean accuracy"], 1))
        cells += [with_spread(measures[measure], 2) for measure in seeds]
        rows.append([name, *cells])
    own = ", ".join(f"{measure} {value:.2f}" for measure, value in seeds.items())
    lines = [f"Against {count:,} networks trained alone with two seeds. One seed against the other: {own}."]
    titles = "sharing|params|of none|of none, PS shift|step of none|supernets|mean accuracy %|Kendall tau"
    lines += markdown([*titles.split("|"), "tau without adds", f"recall of the best {TOP:.0%}"], rows)
    rows = []
    for question, one, other in QUESTIONS:
        if one in results and other in results:
            pairs = zip(results[one]["Kendall tau"], results[other]["Kendall tau"])
            differences = [a - b for a, b in pairs]  # of the same seed
            cell = f"{np.mean(differences):+.3f}"
            if len(differences) > 1:
                cell += f" ± {np.std(differences, ddof=1) / math.sqrt(len(differences)):.3f}"
            rows.append([question, f"{one} - {other}", cell])
    lines += markdown(["question", "difference", "in Kendall tau, mean ± standard error over seeds"], rows)
    if "ms" in study:
        gather, masked = [f"{study['ms'][name]:.2f} ms" for name in ("gather", "masked")]
        lines += ["", f"T of the largest weight: one gather {gather}, a hundred masked passes {masked}."]
    ours, ps = count_parameters(SPACES["hytra"], "heterogeneous")
    ratio = f"{ours:,} / {ps:,} = {ours / ps:.3f}"
    lines += ["", f"Parameters in `hytra`, over those of nothing shared and shift as PS: {ratio}."]
    page = STUDY.with_suffix(".md")
    before, _, after = page.read_text(encoding="utf-8").split(MARK)
    train.write_text(before + MARK + "\n".join(lines) + "\n" + MARK + after, page)
    print("\n".join(lines))
    return results, seeds["Kendall tau"]


def plot_ranking(results, agreement, path):
    """Draw the Kendall tau of every supernet, and the tau of the two seeds of training alone as a line."""
    figure = new_figure(6, 2.8)
    axes = figure.subplots()
    for place, measures in enumerate(results.values()):
        taus = measures["Kendall tau"]
        axes.plot(taus, [place] * len(taus), "o", color="0.6", markersize=5)
        axes.plot(np.mean(taus), place, "k|", markersize=14)
    axes.axvline(agreement, color="k", linestyle="--", linewidth=0.8)
    axes.set(xlabel="Kendall tau with training alone; dashed: two seeds of training alone", xlim=(0, 1))
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    write_figure(figure, path)


@torch.no_grad()
def plot_weights(checkpoint, path):
    """Draw histograms of the largest shared weight as each op reads it, with target and fitted densities."""
    supernet = train.load_model(checkpoint, train.load_checkpoint(checkpoint))
    if getattr(supernet, "sharing", None) != "heterogeneous":
        raise ValueError(f"{checkpoint} is not a supernet with --sharing heterogeneous")
    shared = largest_transformed(supernet)
    w = shared.w
    added = shared.weight_for("add")
    grid = torch.linspace(-5, 5, 400) * shared.std

    def normal(std):
        return torch.exp(-0.5 * (grid / std) ** 2) / (std * math.sqrt(2 * math.pi))

    def laplace(b):
        return torch.exp(-grid.abs() / b) / (2 * b)

    panels = {
        "conv: w": (w, normal(shared.std), normal(w.std())),
        "shift: power of two of w": (power_of_two(w), None, None),
        "add: T(w)": (added, laplace(shared.b), laplace(added.abs().mean())),
    }
    figure = new_figure(9, 2.6)
    for axes, (title, (values, target, fitted)) in zip(figure.subplots(1, 3), panels.items()):
        axes.hist(values.clamp(grid[0], grid[-1]).flatten().numpy(), bins=100, density=True, color="0.75")
        if target is not None:
            axes.plot(grid, target, "k--", label="target density")
            axes.plot(grid, fitted, color="0.3", label="fitted density")
            axes.legend(fontsize=7)
        axes.set_title(title, fontsize=9)
    write_figure(figure, path)


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help="train what is missing")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="supernets at a time")
    parser.add_argument("--weights", metavar="FILE", help="draw sharing.png of this checkpoint of a supernet")
    args = parser.parse_args(argv)
    if args.weights:
        return plot_weights(args.weights, STUDY.with_suffix(".png"))
    if args.train:
        fill(args.processes)
    results, agreement = write_study(read_study())
    try:
        plot_ranking(results, agreement, STUDY.with_name("sharing-tau.png"))
    except ValueError as error:  # no matplotlib
        print(error)


if __name__ == "__main__":
    train.run_command(main)

"""Compare ways of sharing weights: does a supernet rank archs as training alone does?

    python -m results.sharing --out out/sharing     rewrites results/sharing.json, the tables of
                                                    results/sharing.md, and sharing.png with matplotlib

For each way of sharing and each seed a supernet of the `fashion` space is trained with one recipe. 30 archs
are tested with its weights after recalibration, and their order is compared with that of 24 of them trained
alone. The network that the first supernet of a mode finds is retrained. Accuracies are of the test images.
Everything measured is kept in <out>/study.json: a study that was interrupted goes on after its last item.
The whole takes about two hours on one core; results/sharing.json holds what was measured last, and
--reuse starts from it, so that only what is missing there is measured.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import train
from data.images import accuracy, load_images, recalibrate
from results.operators import median_ms
from search import fittest, make_fits, search_archs
from shiftaddnas import BINS, REACH, SPACES, SharedWeight, ShiftConv2d, Supernet, build, power_of_two
from shiftaddnas import scale_gradient

HERE = Path(__file__).parent
SEEDS = 3  # supernets of a mode
ALONE_SEEDS = 2
ALONE_EPOCHS = 3
ALONE_ARCHS = 24
INHERIT_ARCHS = 30
TIMED_STEPS = 20
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
MODES = {
    "none": ("none", {}),
    "naive": ("naive", {}),
    "official": (OfficialWeight, {"kl_weight": 10.0}),
    "heterogeneous": ("heterogeneous", {}),
}
ABLATION = {  # what is changed of heterogeneous
    "frozen slopes": (FrozenWeight, {}),
    "no divergence": ("heterogeneous", {"kl_weight": 0.0}),
    "single path": ("heterogeneous", {"sampling": "single"}),
    "eta 0.2": (ScaledWeight, {}),
    "gain 1.41": (partial(SharedWeight, gain=2**0.5), {}),
    "divergence x 10": ("heterogeneous", {"kl_weight": 0.1}),
    "official, single path": (OfficialWeight, {"kl_weight": 10.0, "sampling": "single"}),
}
FORMS = MODES | ABLATION


def make_supernet(space, name, seed=0):
    """Return the supernet of one row of the study."""
    kind = OfficialSupernet if FORMS[name][0] is OfficialWeight else Supernet
    return kind(space, FORMS[name][0], seed)


def recipe_of(name, **changes):
    """Return the recipe of one row of the study."""
    return train.make_recipe("fashion", FORMS[name][1] | changes)


# --------------------------------------------------------------------------- what is measured


def train_alone(space, data, folder, arch, seed):
    """Return the test accuracy of an arch trained alone for ALONE_EPOCHS."""
    recipe = train.make_recipe("fashion", {"epochs": ALONE_EPOCHS})
    network = train.train(build(space, arch, seed), data, recipe, folder / "alone.pt", seed)
    return accuracy(network, data, data.test_set)


def study_supernet(space, data, folder, name, seed, archs):
    """Return what one supernet gives: accuracies with its weights; a mode's first one also what it finds."""
    file = folder / f"{name.replace(' ', '-')}-{seed}.pt"
    supernet = make_supernet(space, name, seed)
    supernet.sharing = name  # a checkpoint keeps plain values
    try:
        supernet = train.train(supernet, data, recipe_of(name), file, seed)
    except ValueError as error:  # the loss is not finite any more: a finding of the study, not its end
        return {"diverged": str(error)}
    inherited = {}
    for arch in archs:
        network = recalibrate(supernet.extract(arch), data)
        inherited[arch] = accuracy(network, data, data.test_set)
    if name in ABLATION or seed:
        return {"inherited": inherited}
    fits = make_fits(space, 0.5, {})
    state = folder / f"{name}-{seed}-search.json"
    scores = search_archs(space, data, supernet, fits, state, {"study": name}, seed, "cpu", generations=2)
    (found,) = fittest(scores, space, 1)
    network = train.train(build(space, found, seed), data, recipe_of(name), folder / "found.pt", seed)
    return {"inherited": inherited, "found": found, "found_accuracy": accuracy(network, data, data.test_set)}


def time_steps(space, data):
    """Return ms of training steps of each row, all with the same archs and images, one after the other.

    And T of the largest weight as one gather and as the hundred masked passes of the official code, ms.
    """
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name in FORMS:
        recipe = recipe_of(name)
        supernet = make_supernet(space, name).train()
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
    return {name: times[2:] for name, (*_, times) in rows.items()} | {"gather": gather, "masked": masked}


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


def study_archs():
    """Return the archs of the study."""
    generator = torch.Generator().manual_seed(0)
    archs = {}  # a dict keeps the order of drawing
    while len(archs) < INHERIT_ARCHS:
        archs[SPACES["fashion"].sample(generator)] = None
    return list(archs)


def measure(folder, known, archs):
    """Fill `known` with everything the study needs, kept in the folder after each item."""
    space = SPACES["fashion"]
    data = load_images("", space)
    jobs = {}
    for arch in archs[:ALONE_ARCHS]:
        for seed in range(ALONE_SEEDS):
            jobs[f"alone {arch} {seed}"] = partial(train_alone, space, data, folder, arch, seed)
    for name in MODES:
        for seed in range(SEEDS):
            jobs[f"{name} {seed}"] = partial(study_supernet, space, data, folder, name, seed, archs)
    jobs["time"] = partial(time_steps, space, data)
    for name in ABLATION:
        jobs[f"{name} 0"] = partial(study_supernet, space, data, folder, name, 0, archs)
    started = time.monotonic()
    for number, (key, job) in enumerate(jobs.items(), 1):
        if key not in known:
            known[key] = job()
            train.write_text(json.dumps(known), folder / "study.json")
            print(f"study {number}/{len(jobs)} | {key} | {time.monotonic() - started:.0f} s", flush=True)


# ------------------------------------------------------------------------------- the tables


def kendall_tau(a, b):
    """Return Kendall's tau-b of two lists, ties corrected; 0 if one is constant."""
    a = np.sign(np.subtract.outer(a, a))
    b = np.sign(np.subtract.outer(b, b))
    return (a * b).sum() / math.sqrt(max(1, (a * a).sum() * (b * b).sum()))


def spearman(a, b):
    """Return Spearman's rank correlation; ties get their mean rank; 0 if one list is constant."""
    ranks = []
    for row in (a, b):
        rank = np.array([(np.less(row, x).sum() + np.less_equal(row, x).sum()) / 2 for x in row])
        ranks.append(rank - rank.mean())
    first, second = ranks
    return (first * second).sum() / max(1e-12, math.sqrt((first**2).sum() * (second**2).sum()))


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


def study_row(name, archs, known, seeds=SEEDS):
    """Return the figures of one row: means over the supernets that did not diverge."""
    space = SPACES["fashion"]
    count, none_ps = count_parameters(space, name)
    none, _ = count_parameters(space, "none")
    alone = []
    for arch in archs[:ALONE_ARCHS]:
        alone.append(np.mean([known[f"alone {arch} {seed}"] for seed in range(ALONE_SEEDS)]))
    runs = [known[f"{name} {seed}"] for seed in range(seeds)]
    whole = [run for run in runs if "diverged" not in run]
    inherited = [list(run["inherited"].values()) for run in whole]
    columns = {
        "mean_accuracy": [np.mean(row) for row in inherited],
        "deviation": [np.std(row) for row in inherited],
        "kendall_tau": [kendall_tau(row[:ALONE_ARCHS], alone) for row in inherited],
        "spearman": [spearman(row[:ALONE_ARCHS], alone) for row in inherited],
        "found_accuracy": [run["found_accuracy"] for run in whole if "found" in run],
    }
    ratios = np.divide(known["time"][name], known["time"]["none"])
    row = {"params": count, "params_over_none": count / none, "params_over_none_ps": count / none_ps}
    row |= {"step_over_none": float(np.median(ratios)), "diverged": len(runs) - len(whole)}
    row |= {key: float(np.mean(values)) if values else None for key, values in columns.items()}
    return row | {f"{key}_seeds": [round(float(v), 4) for v in values] for key, values in columns.items()}


def table(rows):
    """Return markdown of {name: study_row}; the deviation over seeds stands behind a mean."""
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


def write_study(archs, known):
    """Write results/sharing.json, and the tables between the marks of results/sharing.md."""
    modes = {name: study_row(name, archs, known) for name in MODES}
    ablation = {}
    for name in ("heterogeneous", *ABLATION):  # of each variant the supernet of seed 0
        if f"{name} 0" in known:
            ablation[name] = study_row(name, archs, known, seeds=1)
    first, second = [[known[f"alone {arch} {seed}"] for arch in archs[:ALONE_ARCHS]] for seed in (0, 1)]
    agree = {"kendall_tau": kendall_tau(first, second), "spearman": spearman(first, second)}
    ours, none_ps = count_parameters(SPACES["hytra"], "heterogeneous")
    report = {"modes": modes, "ablation": ablation, "seeds_agree": agree, "measured": known}
    train.write_text(json.dumps(report, indent=1), HERE / "sharing.json")
    lines = [*table(modes), ""]
    lines.append(
        f"Two seeds of training alone agree to Kendall tau {agree['kendall_tau']:.2f}, Spearman "
        f"{agree['spearman']:.2f}. T of the largest weight: one gather {known['time']['gather']:.2f} ms, a "
        f"hundred masked passes {known['time']['masked']:.2f} ms. Parameters in `hytra`, over nothing shared "
        f"and shift as PS: {ours:,} / {none_ps:,} = {ours / none_ps:.3f} in the cells that archs reach.\n"
    )
    lines += table(ablation)
    page = HERE / "sharing.md"
    before, _, after = page.read_text(encoding="utf-8").split(MARK)
    train.write_text(before + MARK + "\n".join(lines) + "\n" + MARK + after, page)
    print("\n".join(lines))


@torch.no_grad()
def plot_weights(checkpoint, path):
    """Draw histograms of the largest shared weight as each op reads it, with target and fitted densities."""
    from matplotlib.figure import Figure

    supernet = make_supernet(SPACES["fashion"], "heterogeneous")
    supernet.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
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
    figure = Figure((9, 2.6), layout="constrained")
    for axes, (title, (values, target, fitted)) in zip(figure.subplots(1, 3), panels.items()):
        axes.hist(values.clamp(grid[0], grid[-1]).flatten().numpy(), bins=100, density=True, color="0.75")
        if target is not None:
            axes.plot(grid, target, "k--", label="target density")
            axes.plot(grid, fitted, color="0.3", label="fitted density")
            axes.legend(fontsize=7)
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--out", default="out/sharing", help="folder of the study")
    parser.add_argument("--reuse", action="store_true", help="start from what results/sharing.json holds")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write what is known")
    args = parser.parse_args(argv)
    folder = Path(args.out)
    path = folder / "study.json"
    known = {}
    if args.reuse:
        known = json.loads((HERE / "sharing.json").read_text(encoding="utf-8"))["measured"]
    if path.exists():
        known |= json.loads(path.read_text(encoding="utf-8"))
    archs = study_archs()
    if not args.tables:
        measure(folder, known, archs)
    write_study(archs, known)
    try:
        plot_weights(folder / "heterogeneous-0.pt", HERE / "sharing.png")
    except (ImportError, FileNotFoundError) as error:
        print(f"no {HERE / 'sharing.png'}: {error}")


if __name__ == "__main__":
    train.run_command(main)

"""Write the mean and deviation over finished searches: results/search.md and results/search.json.

    for s in 0 1 2 3 4; do python search.py --seed $s --out out/$s; done
    python -m results.search out/0 out/1 out/2 out/3 out/4
    for s in 0 1 2; do python search.py --space small --seed $s --out out/small-$s; done
    python -m results.search out/small-0 out/small-1 out/small-2 --to results/small

Seconds, once the searches are done (three minutes a seed for images, a quarter of an hour for translation).
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import train
from search import measure_of
from shiftaddnas import find_space

KEPT = ("seed", "winner", "budget", "table", "settings", "finalists", "verdict")
KEPT += ("translations", "shuffled_bleu")
TITLES = {"bleu": "BLEU", "test_accuracy": "test accuracy %"}


def read_run(folder):
    """Return what is kept of one finished search, its scores rounded; ValueError if the folder holds none."""
    try:
        run = json.loads((Path(folder) / "search.json").read_text(encoding="utf-8"))
        scores = {arch: round(fitness, 4) for arch, fitness in run["scores"].items()}
        kept = {name: run[name] for name in KEPT if name in run} | {"scores": scores}
        summary([kept])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{folder} does not hold a whole search.json of a search") from None
    return kept


def with_spread(values, digits):
    """Return "mean ± deviation" of some numbers; the mean alone where there is no spread to show."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def family(name):
    """Return the name of a row of the table without its number: random 3 -> random."""
    return name.rstrip(" 0123456789")


def networks_of(run):
    """Return name -> rows of a search's table; the random hybrids are several rows of one name."""
    networks = {}
    for row in run["table"]:
        networks.setdefault(family(row["name"]), []).append(row)
    return networks


def summary(runs):
    """Return the lines of the table of several searches, in markdown, and of the winner's differences."""
    space = find_space(runs[0]["settings"]["space"])
    measure = measure_of(runs[0]["table"][0])
    titles = ["network", TITLES[measure], "energy of the reference %", "latency ms", "params", "archs"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    differences = []
    whole = [networks_of(run) for run in runs]
    names = dict.fromkeys(name for networks in whole for name in networks)  # not every run has each
    for name in [*(name for name in names if name != "winner"), "winner"]:
        columns = {"winner": []}  # of each search the means over the rows of this name
        for networks in whole:
            rows = networks.get(name, [])
            for key in (measure, "energy_mj", "latency_ms", "params") if rows else ():
                columns.setdefault(key, []).append(statistics.mean(row[key] for row in rows))
            if rows:
                share = 100 * columns["energy_mj"][-1] / networks["reference"][0]["energy_mj"]
                columns.setdefault("share", []).append(share)
                columns["winner"].append(networks["winner"][0][measure])
        all_rows = [row for networks in whole for row in networks.get(name, [])]
        accuracy = with_spread(columns[measure], 2)
        if name == "random":
            low, high = [pick(row[measure] for row in all_rows) for pick in (min, max)]
            accuracy += f" ({low:.1f} to {high:.1f})"
        archs = dict.fromkeys(space.short(row["arch"]) for row in all_rows)
        latency = statistics.mean(columns["latency_ms"])
        params = statistics.mean(columns["params"])
        cells = [name, accuracy, with_spread(columns["share"], 0), f"{latency:.4f}", f"{params:,.0f}"]
        shown = (", " if measure == "bleu" else " ").join([*archs][: len(runs)])
        lines.append(f"| {' | '.join([*cells, shown])} |")
        if name != "winner":
            differences.append(difference(name, columns["winner"], columns[measure]))
    return [*lines, "", f"The winner, mean ± standard error over searches: {'; '.join(differences)}."]


def difference(name, winners, others):
    """Return "+1.20 ± 0.30 against NAME": of the winners and another network of the same searches."""
    values = [winner - other for winner, other in zip(winners, others)]
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}{error} against {name}"


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="+", help="output folders of finished searches of one space")
    here = Path(__file__).parent
    parser.add_argument("--to", default=here, help="folder of search.md and search.json")
    args = parser.parse_args(argv)
    runs = [read_run(folder) for folder in args.folders]
    lines = summary(runs)
    train.write_text(json.dumps({"runs": runs}, indent=1), Path(args.to) / "search.json")
    train.write_text("\n".join(lines) + "\n", Path(args.to) / "search.md")
    print("\n".join(lines))


if __name__ == "__main__":
    train.run_command(main)

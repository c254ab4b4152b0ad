"""Write the mean and deviation over finished searches: results/search.md and results/search.json.

    for s in 0 1 2; do OMP_NUM_THREADS=1 python search.py --seed $s --out out/$s; done
    python -m results.search out/0 out/1 out/2
    python -m results.search out/translation-0 out/translation-1 --to results/translation

Seconds, once the searches are done (four minutes a seed for images, a quarter of an hour for translation).
"""

import argparse
import json
import statistics
from pathlib import Path

import train
from shiftaddnas import find_space

KEPT = ("seed", "winner", "budget", "table", "settings", "translations", "shuffled_bleu")


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


def measure_of(rows):
    """Return key and title of what the rows of a table measure."""
    return ("bleu", "BLEU") if "bleu" in rows[0] else ("test_accuracy", "test accuracy %")


def with_spread(values, digits):
    """Return "mean ± deviation" of some numbers; the mean alone where there is no spread to show."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def summary(runs):
    """Return the lines of the table of several searches, in markdown."""
    space = find_space(runs[0]["settings"]["space"])
    first = runs[0]["table"][0]
    measure, title = measure_of([first])
    titles = ["network", title, f"energy of {first['name']} %", "latency ms", "params", "archs"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for rows in zip(*(run["table"] for run in runs)):
        shares = []
        for row, run in zip(rows, runs):
            shares.append(100 * row["energy_mj"] / run["table"][0]["energy_mj"])
        latency = statistics.mean(row["latency_ms"] for row in rows)
        params = statistics.mean(row["params"] for row in rows)
        archs = dict.fromkeys(space.short(row["arch"]) for row in rows)
        cells = [
            rows[0]["name"],
            with_spread([row[measure] for row in rows], 2),
            with_spread(shares, 0),
            f"{latency:.4f}",
            f"{params:,.0f}",
            (", " if measure == "bleu" else " ").join(archs),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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

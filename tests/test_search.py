"""Search: limits, evolution, phases that are used again, the command line, and the README's commands."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FASHION, ONE_THREAD, ROOT, TINY, command
from test_train import refusal, run, start_processes

import cost_model
import search
import train
from cost_model import arch_costs
from data.images import Images
from shiftaddnas import SPACES, TOKEN_SPACES, read_arch


def evolve(space, score=None, fits=lambda arch: True, energy_mj=lambda arch: 1.0, **settings):
    """Return (state, archs in the order of scoring, states that were reported) of a search."""
    score = score or (lambda arch: arch.count("s") + 10 * arch.count("t"))
    calls = []
    reports = []

    def score_all(archs):
        calls.extend(archs)
        return [score(arch) for arch in archs]

    def report(state):
        reports.append(json.loads(json.dumps(state)))

    return search.evolve(space, score_all, energy_mj, fits, report=report, **settings), calls, reports


def test_a_search_on_a_space_of_three_networks_ends_with_each_scored_once():
    space = replace(TINY, ops=("c", "c", "cst"), depths=((1, 1, 1),))
    state, calls, _ = evolve(space)
    assert sorted(calls) == sorted(state["scores"]) == ["c/c/c", "c/c/s", "c/c/t"]


def test_the_search_finds_the_best_and_scores_nothing_twice():
    state, calls, _ = evolve(FASHION, generations=20)
    assert len(calls) == len(set(calls))
    assert max(state["scores"].values()) >= 50  # t at five of six or more coarse positions


def test_the_last_generation_counts():
    seen = []
    state, calls, reports = evolve(FASHION, score=lambda arch: seen.append(arch) or float(len(seen)))
    assert max(state["scores"], key=state["scores"].get) == calls[-1]
    assert set(reports[-1]["scores"]) - set(reports[-2]["scores"])


@pytest.mark.parametrize("space", [FASHION, TOKEN_SPACES["translation"]], ids=lambda space: space.name)
def test_a_resumed_search_equals_an_uninterrupted_one(space):
    whole, _, reports = evolve(space)
    for state in reports[:-1]:
        resumed, calls, _ = evolve(space, state=json.loads(json.dumps(state)))
        assert resumed == whole and 0 < len(calls) < len(whole["scores"])


def brute_force_front(scores, energy):
    """Return the archs that no other one dominates, by definition."""
    front = set()
    for arch, score in scores.items():
        rivals = [(energy[other], scores[other]) for other in scores if other != arch]
        if not any(e <= energy[arch] and s >= score and (e, s) != (energy[arch], score) for e, s in rivals):
            front.add((energy[arch], score))
    return front


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_arch_dominates_and_parents_come_from_front_after_front(seed):
    draw = np.random.default_rng(seed)
    archs = [FASHION.arch(index) for index in range(60)]
    scores = dict(zip(archs, draw.integers(0, 20, 60).tolist()))  # with ties
    energy = dict(zip(archs, draw.integers(1, 20, 60).tolist()))
    front = search.pareto_front(scores, energy.get)
    assert {(energy[arch], scores[arch]) for arch in front} == brute_force_front(scores, energy)
    assert [energy[arch] for arch in front] == sorted({energy[arch] for arch in front})
    assert search.spread(front, 2) == [front[-1], front[0]][: len(front)]
    best = search.best_fronts(scores, energy.get, 60)
    assert sorted(best) == sorted(archs)
    layers = []  # of each arch the number of its front
    left = dict(scores)
    while left:
        layer = search.pareto_front(left, energy.get)
        layers += [set(layer)]
        left = {arch: score for arch, score in left.items() if arch not in layer}
    numbers = [next(i for i, layer in enumerate(layers) if arch in layer) for arch in best]
    assert numbers == sorted(numbers) and set(best[: len(front)]) == set(front)


SPREADS = [("abcdefg", 3, "gda"), ("abc", 8, "cba"), ("a", 3, "a"), ("abcde", 1, "e")]


@pytest.mark.parametrize("front, count, expected", SPREADS)
def test_finalists_are_spread_along_the_front_the_fittest_first(front, count, expected):
    assert "".join(search.spread(list(front), count)) == expected


def test_a_search_keeps_cheap_archs_and_starts_with_those_it_is_given():
    energy_mj = lambda arch: 1.0 + arch.count("c")  # noqa: E731
    start = [arch for archs in FASHION.pures().values() for arch in archs]
    state, calls, _ = evolve(FASHION, lambda arch: arch.count("c"), start=start, energy_mj=energy_mj)
    assert calls[: len(set(start))] == list(dict.fromkeys(start)) and len(calls) == len(set(calls))
    front = search.pareto_front(state["scores"], energy_mj)
    assert [arch.count("c") for arch in front] == sorted({arch.count("c") for arch in state["scores"]})


def test_parents_are_of_the_fitter_half_though_cheap_archs_are_on_the_front():
    parents = []

    def mutate(arch, generator):
        parents.append(arch)
        return FASHION.mutate(arch, generator)

    def score(arch):
        return energy_mj.setdefault(arch, float(len(energy_mj)))  # each is dearer and fitter than the last

    energy_mj = {}
    space = SimpleNamespace(sample=FASHION.sample, mutate=mutate)
    state, _, _ = evolve(space, score, energy_mj=energy_mj.get, generations=1, first=20, crossovers=0)
    assert min(state["scores"][arch] for arch in parents) >= 10 and len(set(parents)) > 1


def costs_of(space, table=None, **named):
    """Return (energy_mj, costs) of a space, official and 32 bits unless named."""
    return search.make_costs(space, table=table, **named)


@pytest.mark.slow
def test_every_scored_arch_is_inside_every_limit():
    limits = {"params": 165_000, "macs": 1_215_000, "latency_ms": 0.054}
    energy_mj, costs = costs_of(FASHION)
    fits = search.make_fits(FASHION, 0.8, limits, energy_mj, costs)
    state, _, _ = evolve(FASHION, None, fits, energy_mj, generations=1, first=8, mutations=2, crossovers=3)
    for arch in state["scores"]:
        costs = arch_costs(FASHION, arch)
        assert costs["energy_mj"] <= 0.8 * arch_costs(FASHION, FASHION.pure("c", arch))["energy_mj"]
        assert all(costs[name] <= value for name, value in limits.items())
    assert len(state["scores"]) == 13


def test_a_limit_of_energy_and_a_budget_both_bind():
    energy_mj, _ = costs_of(FASHION)
    share = 0.7 * energy_mj("cc/cc/cc")
    arch = "ss/ss/ss"
    assert search.limits_for(FASHION, arch, 0.7, {}, energy_mj) == {"energy_mj": pytest.approx(share)}
    both = search.limits_for(FASHION, arch, 0.7, {"energy_mj": share / 2}, energy_mj)
    assert both["energy_mj"] == share / 2
    assert search.limits_for(FASHION, arch, 0, {}, energy_mj) == {}


def test_a_limit_is_in_the_accounting_that_is_asked_for():
    small_array = replace(cost_model.EYERISS, pe_limit=100)
    for named in ({"accounting": "uniform"}, {"bits": 8}, {"hardware": small_array}):
        energy_mj, costs = costs_of(FASHION, **named)
        assert energy_mj("as/sa/ss") == costs("as/sa/ss")["energy_mj"] != costs_of(FASHION)[0]("as/sa/ss")
        assert costs("as/sa/ss")["energy_mj"] == arch_costs(FASHION, "as/sa/ss", **named)["energy_mj"]


@pytest.fixture
def measured(monkeypatch):
    """Replace measuring: a network takes 2 ms and one more for each add block."""
    monkeypatch.setattr(search, "measured_table", lambda space, path: {"any": "table"})
    monkeypatch.setattr(cost_model, "measured_latency_ms", lambda space, arch, table: 2.0 + arch.count("a"))


def test_a_measured_limit_counts_as_any_other(measured):
    fits = search.make_fits(FASHION, 0.0, {"measured_ms": 3.5}, *costs_of(FASHION, {"any": "table"}))
    assert fits("ca/cc/cc") and not fits("aa/cc/cc")


@pytest.mark.parametrize("name", search.LIMITS)
def test_a_limit_that_nothing_is_inside_says_what_the_cheapest_need(name, measured):
    message = f"inside --limit {name}=1e-09; the cheapest networks need .* {name}"
    with pytest.raises(ValueError, match=message):
        search.require_some_arch(TINY, 0.0, {name: 1e-9}, *costs_of(TINY, {"any": "table"}))


class Validations:
    """Data on which networks, here their archs, have some figure, with a standard error of 1."""

    def validate(self, network, device):
        return {"ss/ss/ss": 82.5, "cc/cc/cc": 83.0, "aa/aa/aa": 81.9, "sc/cc/cc": 82.5}[network], 1.0


def test_the_cheapest_within_a_standard_error_of_the_best_wins():
    energy_mj, _ = costs_of(FASHION)
    archs = ["aa/aa/aa", "cc/cc/cc", "sc/cc/cc", "ss/ss/ss"]  # aa/aa/aa is cheapest and 1.1 below the best
    winner, retrained = search.choose(FASHION, Validations(), lambda arch: arch, archs, energy_mj, "cpu")
    assert winner == "ss/ss/ss" and [row[0] for row in retrained] == archs


@pytest.mark.parametrize("space", [FASHION, TOKEN_SPACES["translation"]], ids=lambda space: space.name)
def test_of_each_operator_alone_the_largest_that_fit_are_candidates(space):
    energy_mj, costs = costs_of(space)
    fits = search.make_fits(space, 0.6, {}, energy_mj, costs)
    pures = search.largest_pures(space, fits, energy_mj, 3)
    assert "all-shift" in pures and pures.keys() <= space.pures().keys()
    for name, archs in pures.items():
        others = [arch for arch in space.pures()[name] if fits(arch) and arch not in archs]
        assert 1 <= len(archs) <= 3 and set(archs) <= set(space.pures()[name]) and all(map(fits, archs))
        assert max(map(energy_mj, others), default=0) <= min(map(energy_mj, archs))


def test_random_hybrids_have_the_energy_of_the_winner_and_several_operators():
    energy_mj, _ = costs_of(FASHION)
    hybrids = search.draw_hybrids(FASHION, "ss/ss/ss", lambda arch: "t" not in arch, energy_mj, 0)
    assert len(set(hybrids)) == 4
    for arch in hybrids:
        assert len(set(arch) - {"/"}) > 1 and "t" not in arch
        assert energy_mj(arch) == pytest.approx(energy_mj("ss/ss/ss"), rel=0.1)


VERDICTS = [  # accuracy and energy of the winner, with a standard error of 0.3 as all have -> the verdict
    (85.0, 1.0, "dominated by none of these", "-1.00 (-2.4 SE) against all-shift at 50% of its energy"),
    (85.0, 2.0, "dominated by all-shift", "-1.00 (-2.4 SE) against all-shift at 100% of its energy"),
    (85.8, 3.0, "dominated by none of these", "-0.20 (-0.5 SE) against all-shift at 150% of its energy"),
    (87.0, 3.0, "dominated by none of these", "+4.00 (+10.9 SE) against the mean of 2 random hybrids at 100%"),
]


@pytest.mark.parametrize("accuracy, energy_mj, head, part", VERDICTS)
def test_the_verdict_names_who_dominates_and_differences_in_standard_errors(accuracy, energy_mj, head, part):
    names = {"all-shift": (86.0, 2.0), "random 1": (82.0, 2.0), "random 2": (84.0, 4.0)}
    names["winner"] = (accuracy, energy_mj)
    rows = []
    for name, (value, energy) in names.items():
        rows.append({"name": name, "test_accuracy": value, "standard_error": 0.3, "energy_mj": energy})
    assert search.verdict([row | {"standard_error": 0.0} for row in rows])  # BLEU 0, say, of all
    text = search.verdict(rows)
    assert text.startswith(f"the winner is {head}: ") and part in text


# ----------------------------------------------------------------------------------------- whole searches


BAD_FLAGS = [
    ("--resume", "unrecognized arguments: --resume"),
    ("--arch cc/cc/cc", "unrecognized arguments: --arch cc/cc/cc"),
    ("--space nowhere", "unknown space 'nowhere'"),
    ("--generations -1", "--generations must be at least 0, got -1"),
    ("--finalists 0", "finalists must be at least 1, got 0"),
    ("--budget -1", "budget must be at least 0, got -1.0"),
    ("--budget nan", "budget must be at least 0, got nan"),
    ("--epochs 0", "epochs must be at least 1, got 0"),
    ("--set beam=2", "beam is for translation, not for space fashion"),
    ("--accounting free", "accounting is 'free': allowed are official, uniform"),
    ("--bits 16", "bits is 16: allowed are 32, 8"),
    ("--pe-limit 0", "pe_limit must be a positive number, got 0"),
    ("--limit params", "--limit 'params' must be KEY=VALUE"),
    ("--limit params=0", "--limit 'params=0' must be KEY=VALUE, a positive number"),
    ("--limit params=nan", "--limit 'params=nan' must be KEY=VALUE, a positive number"),
    ("--limit accuracy=3", "for one of energy_mj, latency_ms, measured_ms, params, macs"),
    ("--space translation --limit measured_ms=3", "--limit measured_ms is for images and one process"),
    ("--data nowhere", "nowhere"),
    ("--budget 0.01", "inside --budget 0.01; the cheapest networks need"),
    ("--space translation --limit params=10", "no arch of space translation is inside"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_of_search_are_one_sentence_and_write_nothing(
    flags, message, measured, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *flags.split(), "--device", "cpu", main=search.main)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.slow
def test_phases_are_used_again_but_not_when_the_data_changed(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SPACES, "tiny", replace(TINY, ops=("ca", "cs", "cst")))  # unknown to other processes
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.chdir(tmp_path)
    flags = ["--space", "tiny", "--epochs", 1, "--batch", 50, "--generations", 0, "--finalists", 2]
    flags += ["--budget", 0.8, "--device", "cpu", "--out", "o", "--data"]
    flags += [tiny_data]

    def refuse():
        return refusal(capsys, *flags, main=search.main)

    run(*flags, main=search.main)
    result = json.loads(Path("o/search.json").read_text())
    rows = result["table"]
    assert {"reference", "winner"} <= {row["name"] for row in rows} and rows[-1]["name"] == "winner"
    assert result["verdict"] == search.verdict(rows)
    assert rows[-1]["energy_mj"] <= result["budget"]["energy_mj"]
    assert result["budget"]["energy_mj"] == pytest.approx(0.8 * rows[0]["energy_mj"])
    assert read_arch(SPACES["tiny"], "o/winner.json") == result["winner"]
    assert result["winner"] in [finalist[0] for finalist in result["finalists"]]
    assert "winner: " in capsys.readouterr().out
    Path("o/search.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_batches", None)  # nothing is trained again, nor scored
        patch.setattr(Images, "fitness", None)
        run(*flags[:-1], "./images/", main=search.main)
    assert json.loads(Path("o/search.json").read_text()) == result
    images = np.load(tiny_data / "train_images.npy")
    np.save(tiny_data / "train_images.npy", 255 - images)
    assert "supernet.pt was made with other data: the content of --data" in refuse()
    Path("o/supernet.pt").unlink()
    error = refuse()
    assert "search-state.json belongs to a search with other settings or data" in error
    Path("o/search-state.json").unlink()
    for file in Path("o").glob("retrain-*.pt"):
        file.touch()
    assert "was made with other data: the content of --data has changed" in refuse()
    np.save(tiny_data / "train_images.npy", images)
    Path("o/supernet.pt").unlink()
    whole = {"scores": {"c": 1.0}, "generation": 0, "rng": [], "settings": {}}  # but of another space
    for content in ("", "[]", '{"scores": {}}', json.dumps(whole)):
        Path("o/search-state.json").write_text(content)
        assert "search-state.json is not the state of a search" in refuse()


@pytest.mark.slow
def test_a_search_twice_gives_the_same_result_and_survives_kills(tiny_data, tmp_path):
    flags = ["--data", tiny_data, "--epochs", 1, "--batch", 20, "--generations", 1, "--finalists", 2, "--out"]
    program = [sys.executable, ROOT / "search.py", *map(str, flags)]
    for seconds in (4.0, 5.0):  # killed twice, somewhere, then left to end
        process = subprocess.Popen([*program, tmp_path / "two"], stdout=subprocess.DEVNULL, env=ONE_THREAD)
        time.sleep(seconds)
        process.kill()
        process.wait()
    for name in ("one", "two"):
        whole = command("search", *flags, tmp_path / name)
        assert whole.returncode == 0, whole.stderr
    one, two = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("one", "two"))
    assert one == two
    logs = [(tmp_path / name / "supernet.jsonl").read_text() for name in ("one", "two")]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_networks_trained_side_by_side_are_those_trained_in_turn(tiny_data, tmp_path, monkeypatch):
    archs = ["cc/cc/cc", "ss/sa/tt", "aa/st/cc"]
    recipe = train.make_recipe("fashion", {"epochs": 1, "batch": 20})
    settings = (FASHION, str(tiny_data), recipe, "naive", 0, "cpu", False)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    search.make_train_all(*settings, tmp_path / "two")(archs)
    for arch in archs:
        search.train_alone(*settings, tmp_path / "one", arch)  # with one thread, as in the other processes
        torch.set_num_threads(threads)
        paths = [search.checkpoint(FASHION, arch, tmp_path / name) for name in ("one", "two")]
        one, two = [torch.load(path)["model"] for path in paths]
        assert all(value.equal(two[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("job, message", [(os.abort, "was killed"), (int, "invalid literal")])
def test_a_job_that_dies_or_fails_ends_the_others(job, message):
    with pytest.raises((OSError, ValueError), match=message):
        list(search.side_by_side(functools.partial(dies, job), [*range(20)], 2))


@pytest.mark.slow
def test_no_process_outlives_the_one_that_started_it(tmp_path):
    code = f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import search
        def job(number):
            open(f"{{os.getpid()}}.pid", "w").close()
            time.sleep(60)
        if __name__ == "__main__":
            list(search.side_by_side(job, [1, 2, 3], 2))
    """
    (tmp_path / "jobs.py").write_text(textwrap.dedent(code))
    program = subprocess.Popen([sys.executable, "jobs.py"], cwd=tmp_path, env=ONE_THREAD)
    await_(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    program.kill()
    program.wait()
    numbers = [int(file.stem) for file in tmp_path.glob("*.pid")]
    await_(lambda: not any(Path(f"/proc/{number}").exists() for number in numbers))


def await_(condition, seconds=60):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def dies(job, number):
    """Work for a second, or end as `job` does."""
    if number == 1:
        job() if job is os.abort else job("x")
    time.sleep(1)


@pytest.mark.slow
def test_three_processes_search_as_one_does(tiny_data, tmp_path):
    common = ["--data", tiny_data, "--epochs", 1, "--batch", 10, "--accumulate", 3, "--device", "cpu"]
    common += ["--out", tmp_path]
    flags = [*common, "--generations", 1, "--finalists", 1]
    first = command("train", *common)
    assert first.returncode == 0, first.stderr
    results = []
    for several in (True, False):  # with the same supernet
        if several:
            program = start_processes(3, "search", *flags)
            assert program.wait(120) == 0, program.stderr.read()
        else:
            program = command("search", *flags)
            assert program.returncode == 0, program.stderr
        states = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("search-state", "search")]
        results.append((states[0]["scores"], states[0]["rng"], [row["arch"] for row in states[1]["table"]]))
        for file in (*tmp_path.glob("search*.json"), *tmp_path.glob("retrain-*")):
            file.unlink()
    assert results[0] == results[1]


# ------------------------------------------------------------------------------------------- README


def readme_commands():
    """Return each command of the README's shell blocks that runs a program of this repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$\w+", "0", line), comments=True)
            if words and (words[0] == "python" or words[0] == "torchrun"):
                ends = [i for i, word in enumerate(words) if word in ("|", ">", "<", "&&", ";", "&")]
                commands.append(words[: min(ends, default=len(words))])
    return commands


class Understood(Exception):
    """Raised instead of running a command whose flags are all right."""


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_each_command_of_the_readme_is_understood(words, monkeypatch):
    def understood(*arguments, **named):
        raise Understood

    for name in ("join_processes", "evaluate", "predict", "translate"):
        monkeypatch.setattr(train, name, understood)
    monkeypatch.setattr(search, "join_processes", lambda device: "cpu")
    monkeypatch.setattr(search, "load_data", understood)  # it has found that some arch is inside the limits
    monkeypatch.setattr(train, "read_arch", lambda space, text: text)  # a file that an earlier command writes
    monkeypatch.setattr(cost_model, "read_arch", understood)
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        module = words[words.index("-m") + 1]
        assert module == "pytest" or (ROOT / (module.replace(".", "/") + ".py")).exists()
        return
    assert (ROOT / words[at]).exists()
    mains = {"train.py": train.main, "search.py": search.main, "cost_model.py": cost_model.main}
    if words[at] in mains:
        with pytest.raises(Understood):
            mains[words[at]](words[at + 1 :])


def test_the_readme_has_commands():
    assert {"search.py", "train.py"} <= {word for words in readme_commands() for word in words}

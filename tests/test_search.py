"""Search: limits, evolution, phases that are used again, the command line, and the README's commands."""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import FASHION, ONE_THREAD, ROOT, TINY, command
from test_train import refusal, run, start_processes

import cost_model
import search
import train
from cost_model import arch_costs
from data.images import Images
from shiftaddnas import SPACES, TOKEN_SPACES, read_arch


def evolve(space, score=None, fits=lambda arch: True, **settings):
    """Return (state, archs in the order of scoring, states that were reported) of a search."""
    score = score or (lambda arch: arch.count("s") + 10 * arch.count("t"))
    calls = []
    reports = []

    def score_all(archs):
        calls.extend(archs)
        return [score(arch) for arch in archs]

    def report(state):
        reports.append(json.loads(json.dumps(state)))

    return search.evolve(space, score_all, fits, report=report, **settings), calls, reports


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


@pytest.mark.slow
def test_every_scored_arch_is_inside_every_limit():
    limits = {"params": 165_000, "macs": 1_215_000, "latency_ms": 0.054}
    fits = search.make_fits(FASHION, 0.8, limits)
    state, _, _ = evolve(FASHION, fits=fits, generations=1, first=4, mutations=2, crossovers=2, fresh=1)
    for arch in state["scores"]:
        costs = arch_costs(FASHION, arch)
        assert costs["energy_mj"] <= 0.8 * arch_costs(FASHION, FASHION.pure("c", arch))["energy_mj"]
        assert all(costs[name] <= value for name, value in limits.items())
    assert len(state["scores"]) == 9


def test_a_limit_of_energy_and_a_budget_both_bind():
    share = 0.7 * search.energy_mj(FASHION, "cc/cc/cc")
    assert search.limits_for(FASHION, "ss/ss/ss", 0.7, {}) == {"energy_mj": pytest.approx(share)}
    assert search.limits_for(FASHION, "ss/ss/ss", 0.7, {"energy_mj": share / 2})["energy_mj"] == share / 2
    assert search.limits_for(FASHION, "ss/ss/ss", 0, {}) == {}


@pytest.fixture
def measured(monkeypatch):
    """Replace measuring: a network takes 2 ms and one more for each add block."""
    monkeypatch.setattr(search, "measured_table", lambda space, path: {"any": "table"})
    monkeypatch.setattr(cost_model, "measured_latency_ms", lambda space, arch, table: 2.0 + arch.count("a"))


def test_a_measured_limit_counts_as_any_other(measured):
    fits = search.make_fits(FASHION, 0.0, {"measured_ms": 3.5}, {"any": "table"})
    assert fits("ca/cc/cc") and not fits("aa/cc/cc")


@pytest.mark.parametrize("name", search.LIMITS)
def test_a_limit_that_nothing_is_inside_says_what_the_cheapest_need(name, measured):
    message = f"inside --limit {name}=1e-09; the cheapest networks need .* {name}"
    with pytest.raises(ValueError, match=message):
        search.require_some_arch(TINY, 0.0, {name: 1e-9}, {"any": "table"})


class Validations:
    """Data on which networks, here their archs, have some fitness."""

    def validate(self, network, device):
        return {"ss/ss/ss": 80.0, "cc/cc/cc": 83.0, "aa/aa/aa": 99.0}[network]


def test_the_best_finalist_on_the_validation_data_wins():
    scores = {"aa/aa/aa": 60.0, "ss/ss/ss": 75.0, "cc/cc/cc": 74.0}
    finalists = search.choose(FASHION, Validations(), lambda arch: arch, scores, 2, "cpu")
    assert finalists == [("cc/cc/cc", 74.0, 83.0), ("ss/ss/ss", 75.0, 80.0)]


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
    monkeypatch.setitem(SPACES, "tiny", replace(TINY, ops=("ca", "cs", "cst")))
    monkeypatch.chdir(tmp_path)
    flags = ["--space", "tiny", "--epochs", 1, "--batch", 50, "--generations", 0, "--finalists", 2]
    flags += ["--budget", 0.8, "--device", "cpu", "--out", "o", "--data"]
    flags += [tiny_data]

    def refuse():
        return refusal(capsys, *flags, main=search.main)

    run(*flags, main=search.main)
    result = json.loads(Path("o/search.json").read_text())
    rows = result["table"]
    assert [row["name"] for row in rows] == ["all-conv", "all-shift", "all-add", "random", "winner"]
    assert rows[-1]["energy_mj"] <= result["budget"]["energy_mj"]
    assert result["budget"]["energy_mj"] == pytest.approx(0.8 * rows[0]["energy_mj"])
    assert read_arch(SPACES["tiny"], "o/winner.json") == result["winner"] == result["finalists"][0][0]
    assert result["finalists"][0][2] == max(finalist[2] for finalist in result["finalists"])
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
def test_three_processes_search_as_one_does(tiny_data, tmp_path):
    flags = ["--data", tiny_data, "--epochs", 1, "--batch", 10, "--accumulate", 3, "--generations", 1]
    flags += ["--sharing", "naive", "--finalists", 1, "--device", "cpu", "--out", tmp_path]
    first = command("train", *flags[:8], *flags[10:12], *flags[14:])
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
    def understood(*arguments):
        raise Understood

    for name in ("join_processes", "evaluate", "predict", "translate"):
        monkeypatch.setattr(train, name, understood)
    monkeypatch.setattr(search, "join_processes", understood)
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

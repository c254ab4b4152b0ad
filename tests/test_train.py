"""Training: recipes, the loop, checkpoints, interrupted runs and several processes, evaluation."""

import io
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FASHION, ONE_THREAD, ROOT, TINY, command, losses, rng

import train
from data import images, sentences
from shiftaddnas import SPACES, Supernet, build

ARCH = "64: C-128-4 T-128-4 S-128-4 / 64: TA-128-4-4-1"


@pytest.fixture
def tiny(monkeypatch, tiny_data):
    """Flags of a fast run: a small space of three operators and attention, and 100 training images."""
    monkeypatch.setitem(SPACES, "tiny", replace(TINY, ops=("ca", "cs", "cst")))
    return ["--space", "tiny", "--data", tiny_data, "--batch", 20, "--device", "cpu"]


def write_pairs(path, words="cat\tgato"):
    """Write 32 pairs of sentences, some words of which differ from pair to pair."""
    source, target = words.split("\t")
    pairs = [f"{a} {b} {source}\t{b} {a} {target}" for a in "abcdefgh" for b in "ijkl"]
    path.write_text("\n".join(pairs) + "\n", encoding="utf-8")
    return path


def run(*flags, main=train.main):
    """Run train.py, or another main, in this process."""
    main([str(flag) for flag in flags])


def refusal(capsys, *flags, main=train.main):
    """Return the one line on stderr with which a program refuses its flags, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train.run_command(lambda: run(*flags, main=main))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1, error
    return error


def interrupt(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal during a step."""
    draw_batches = train.draw_batches
    calls = []

    def draw(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return draw_batches(*arguments)

    monkeypatch.setattr(train, "draw_batches", draw)


# ---------------------------------------------------------------------------------------- recipes, flags

BAD_FLAGS = [
    ("--space nowhere", "unknown space 'nowhere'; known: fashion"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("--epochs many", "epochs must be of type int, got 'many'"),
    ("--epochs 0", "epochs must be at least 1, got 0"),
    ("--batch 1", "batch must be at least 2, got 1"),
    ("--lr 0", "lr must be at least 1e-12, got 0.0"),
    ("--lr nan", "lr must be at least 1e-12, got nan"),
    ("--kl-weight -1", "kl_weight must be at least 0, got -1.0"),
    ("--seed -1", "--seed must be at least 0"),
    ("--seed 99999999999999999999", "below 2 ** 63, got 99999999999999999999"),
    ("--image 0", "image must be at least 1, got 0"),
    ("--classes -1", "classes must be at least 1, got -1"),
    ("--classes 3", "labels run from 0 to 9"),
    ("--device nowhere", "--device nowhere: "),
    ("--device meta", "--device meta: "),
    ("--sharing some", "argument --sharing: invalid choice: 'some' (choose from"),
    ("--recipe nothing", "argument --recipe: invalid choice: 'nothing' (choose from"),
    ("--set epochs", "epochs must be of type int, got ''"),
    ("--set depth=3", "--set depth=3: a recipe has no 'depth', but epochs"),
    ("--set smoothing=", "smoothing must be of type float, got ''"),
    ("--set schedule=linear", "schedule must be one of cosine, inverse-sqrt, got 'linear'"),
    ("--set ema=1", "ema must be at least 0 and below 1, got 1.0"),
    ("--set clip=inf", "clip must be at least 0, got inf"),
    ("--set ema=0.9 --set average_epochs=2", "ema 0.9 excludes average_epochs 2"),
    ("--bits 8", "bits is for translation, not for space fashion"),
    ("--set beam=3", "beam is for translation, not for space fashion"),
    ("--arch cc/cx/cc", "unknown op 'x'"),
    ("--arch tt/cc/cc", "not offered at stage 1"),
    ("--arch nothing.json", "nothing.json does not exist"),
    ('--arch {"arch":3}', "arch 3 must be a string"),
    ("--init x.pt", "--init needs --arch"),
    ("--arch cc/cc/cc --init x.pt", "checkpoint x.pt does not exist"),
    ("--arch cc/cc/cc --init .", "checkpoint . does not exist"),
    ("--data nowhere", "nowhere"),
    ("--predict", "argument --predict: expected at least one argument"),
    ("--predict x.pt y.png", "checkpoint x.pt does not exist"),
    ("--space translation --image 32", "image is for images, not for space translation"),
    ("--space translation --set mixup=0.8", "mixup is for images, not for space translation"),
    ("--space translation --arch cc/cc/cc", "arch 'cc/cc/cc' must be of the form"),
    ("--space translation --set merges=many", "merges=many: must be a number of merges"),
    ("--space translation --set tokenise=words", "tokenise must be one of 13a, char, got 'words'"),
    ("--space translation --data nowhere.tsv", "nowhere.tsv"),
    ("--space translation --data a,b,c", "--data a,b,c: needs a TSV file"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_of_train_are_one_sentence_and_write_nothing(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, *flags.split(), *([] if "device" in flags else ["--device", "cpu"]))
    assert message in error
    assert not list(tmp_path.iterdir())


SCHEDULES = [  # recipe, training examples, peak, {epoch: learning rate}
    ("hytra", 50_000, 1e-3, {0: 1e-3 / 240, 5: 1e-3, 152.5: 5.05e-4, 300: 1e-5}),
    ("bossnet_t0", 1_281_167, 1e-3, {0: 1e-3 / 6255, 5: 1e-3, 152.5: 5.05e-4, 300: 1e-5}),
    ("bossnet_t1", 1_281_167, 8.75e-4, {0: 8.75e-4 / 7150, 5: 8.75e-4, 152.5: 4.425e-4, 300: 1e-5}),
    ("wmt14_en_de", 15_360_000, 1e-3, {0: 1e-7, 9.999: 1e-3, 72.5: 5e-4, 135: 0}),  # 1,000 steps an epoch
    ("iwslt14_de_en", 120_000, 5e-4, {0: 5e-8, 9.999: 5e-4, 39.999: 2.5e-4}),
    ("iwslt14_de_en-subnet", 120_000, 5e-4, {0: 1.25e-7, 3.999: 5e-4, 15.999: 2.5e-4}),
]


@pytest.mark.parametrize("name, count, peak, expected", SCHEDULES)
def test_recipes_have_the_published_schedule(name, count, peak, expected):
    recipe = train.make_recipe(name, {})
    per_epoch = count // (recipe.batch * recipe.accumulate)
    rates = [train.learning_rate(recipe, round(epoch * per_epoch), per_epoch) for epoch in expected]
    assert rates == pytest.approx(list(expected.values()), rel=0.01, abs=1e-9) and recipe.lr == peak


def test_warm_up_takes_at_most_a_quarter_of_a_short_run():
    recipe = train.make_recipe("hytra", {"epochs": 4})
    rates = [train.learning_rate(recipe, step, 10) for step in range(40)]
    assert max(rates) == rates[9] == recipe.lr and rates[:10] == sorted(rates[:10])


# ----------------------------------------------------------------------------------------------- the loop


def test_the_log_holds_loss_cross_entropy_and_the_archs_of_each_step(tiny, tmp_path):
    for weight, sampling in ((0.5, "fair"), (0.0, "single")):
        flags = ["--sharing", "heterogeneous", "--epochs", 1, "--kl-weight", weight]
        flags += ["--set", f"sampling={sampling}"]
        run(*tiny, *flags, "--out", tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "supernet.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
        for line in lines:
            assert {arch[-1] for arch in line["archs"]} == set("cst") or sampling == "single"
            assert len(line["archs"]) == (3 if sampling == "fair" else 1)
            assert (line["loss"] != line["ce"]) == bool(weight)


def test_a_loss_that_is_not_finite_names_the_arch_and_leaves_no_checkpoint(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(images.Images, "loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(ValueError, match="loss became nan at step 0 with arch c/s/t"):
        run(*tiny, "--arch", "c/s/t", "--out", tmp_path / "o")
    assert not (tmp_path / "o" / "c-s-t.pt").exists()


def record_weights(monkeypatch):
    """Return a list that gets the weights after each step."""
    update_average = train.update_average
    weights = []

    def update(average, model, *arguments):
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        update_average(average, model, *arguments)

    monkeypatch.setattr(train, "update_average", update)
    return weights


def distance(a, b):
    """Return the Euclidean distance of two dicts of tensors."""
    return math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))


def test_the_average_of_a_short_run_is_near_its_last_weights_and_not_its_first(tiny, tmp_path, monkeypatch):
    weights = record_weights(monkeypatch)
    run(*tiny, "--arch", "c/s/t", "--batch", 5, "--epochs", 4, "--set", "ema=0.999", "--out", tmp_path)
    assert len(weights) == 80
    average = weights[0]
    for n, step in enumerate(weights[1:], 1):
        decay = min(0.999, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * p for name, p in step.items()}
    network, _, _ = train.read_network(tmp_path / "c-s-t.pt", "cpu")
    result = dict(network.named_parameters())
    assert distance(result, average) < 1e-4
    assert distance(result, weights[-1]) < 0.2 * distance(weights[0], weights[-1])


def test_average_epochs_gives_the_mean_of_the_weights_after_the_last_epochs(tiny, tmp_path, monkeypatch):
    weights = record_weights(monkeypatch)
    run(*tiny, "--arch", "c/s/t", "--epochs", 3, "--set", "average_epochs=2", "--out", tmp_path)
    network, _, _ = train.read_network(tmp_path / "c-s-t.pt", "cpu")
    for name, mean in network.named_parameters():
        expected = (weights[9][name] + weights[14][name]) / 2
        torch.testing.assert_close(mean.detach(), expected, rtol=1e-5, atol=1e-7)


def test_clip_bounds_the_length_of_the_gradient(tiny, tmp_path, monkeypatch):
    make_optimizer = train.make_optimizer
    lengths = []

    def make(model, recipe):
        optimizer = make_optimizer(model, recipe)
        gradients = lambda: [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        optimizer.register_step_pre_hook(lambda *_: lengths.append(torch.cat(gradients()).norm().item()))
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", make)
    for clip in (0, 0.3, 1e6):
        flags = ["--arch", "c/s/t", "--batch", 100, "--epochs", 1, "--set", f"clip={clip}"]
        run(*tiny, *flags, "--out", tmp_path)
    assert lengths == pytest.approx([lengths[0], 0.3, lengths[0]], rel=1e-4) and lengths[0] > 0.3


class Rows:
    """Data whose batches are their rows and a random number."""

    def batch(self, rows, generator, device):
        return (rows.tolist(),), torch.rand((), generator=generator).item()


def test_copies_of_an_image_go_to_different_passes_and_processes_share_the_passes(monkeypatch):
    rows = torch.arange(10).repeat_interleave(4)
    batches = train.draw_batches(Rows(), rows, 4, rng(), "cpu")
    assert [inputs for inputs, _ in batches] == [(list(range(10)),)] * 4
    assert len({number for _, number in batches}) == 4
    monkeypatch.setattr(train, "processes", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "rank", lambda rank=rank: rank)
        shares.append(train.draw_batches(Rows(), rows, 4, rng(), "cpu"))
    assert [shares[0][0], shares[1][0], shares[0][1], shares[1][1]] == batches


def test_inherited_weights_start_where_the_supernet_is(tiny, tmp_path):
    run(*tiny, "--epochs", 1, "--out", tmp_path)
    supernet = train.load_model("", train.load_checkpoint(tmp_path / "supernet.pt"))
    init = ["--arch", "c/s/t", "--init", tmp_path / "supernet.pt", "--epochs", 1, "--lr", 1e-9]
    run(*tiny, *init, "--out", tmp_path)
    trained = train.load_checkpoint(tmp_path / "c-s-t.pt")["model"]
    for name, value in supernet.extract("c/s/t").named_parameters():
        torch.testing.assert_close(trained[name], value.detach(), atol=1e-6, rtol=0)


def test_init_for_translation_takes_the_vocabulary_of_the_checkpoint(tmp_path, capsys):
    first = write_pairs(tmp_path / "a.tsv")
    second = write_pairs(tmp_path / "b.tsv", "dog house\tperro casa")
    flags = ["--space", "translation", "--arch", ARCH, "--epochs", 1, "--batch", 8, "--set", "merges=5"]
    run(*flags, "--data", first, "--out", tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.pt")
    run(*flags, "--data", second, "--out", tmp_path / "b", "--init", file)
    vocabularies = [train.load_checkpoint(tmp_path / o / file.name)["data"]["vocabulary"] for o in "ab"]
    assert vocabularies[0] == vocabularies[1]
    assert vocabularies[0] != sentences.load_sentences(second, "5").state()["vocabulary"]
    log = losses(tmp_path / "b" / f"{file.stem}.jsonl")
    run(*flags, "--data", second, "--out", tmp_path / "b", "--resume")  # and so does a resumed run
    assert losses(tmp_path / "b" / f"{file.stem}.jsonl") == log


# -------------------------------------------------------------------------------------- interrupted runs

WHOLE_RECIPE = "--set crop=0.3 --set randaugment=9 --set erasing=0.25 --set mixup=0.8 --set cutmix=1".split()
WHOLE_RECIPE += "--set smoothing=0.1 --set repeats=3 --set ema=0.9".split()
RUNS = {
    "supernet": ["--epochs", 1],
    "network": ["--epochs", 2, "--arch", "c/s/t"],
    "whole recipe": ["--epochs", 2, "--arch", "c/s/t", "--amp", *WHOLE_RECIPE],
    "several passes": ["--arch", "a/s/t", "--epochs", 4, "--accumulate", 2, "--set", "average_epochs=3"],
    "translation": ["--space", "translation", "--accumulate", 2, "--batch", 3, "--set", "merges=5"]
    + ["--epochs", 2],
    "quantised": ["--space", "translation", "--sharing", "none", "--bits", 8, "--set", "dropout=0.1"]
    + ["--batch", 4, "--set", "merges=none", "--epochs", 1],
}


SLOW_RUN = pytest.param("quantised", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*list(RUNS)[:-1], SLOW_RUN])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(name, tiny, tmp_path, monkeypatch, capsys):
    flags = [*tiny, *RUNS[name]]
    if "translation" in flags:
        flags += ["--data", write_pairs(tmp_path / "pairs.tsv")]
    run(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(SystemExit) as exit_:
            train.run_command(lambda: run(*flags, "--out", tmp_path / "halved"))
    assert exit_.value.code == 130 and "interrupted; " in capsys.readouterr().err
    log = next((tmp_path / "whole").glob("*.jsonl")).name
    assert len(losses(tmp_path / "halved" / log)) == 4
    run(*flags, "--out", tmp_path / "halved", "--resume")
    assert (tmp_path / "halved" / log).read_text() == (tmp_path / "whole" / log).read_text()
    assert len(losses(tmp_path / "whole" / log)) > 4
    states = [train.load_checkpoint((tmp_path / o / log).with_suffix(".pt")) for o in ("whole", "halved")]
    for part in {"model", "average"} & states[0].keys():
        assert all(tensor.equal(states[1][part][key]) for key, tensor in states[0][part].items())


def replace_images(folder):
    np.save(folder / "train_images.npy", 255 - np.load(folder / "train_images.npy"))


def change_a_label(folder):
    labels = np.load(folder / "test_labels.npy")
    labels[3] += 1
    np.save(folder / "test_labels.npy", labels)


def leave_out_the_last(folder):
    for name in ("images", "labels"):
        np.save(folder / f"train_{name}.npy", np.load(folder / f"train_{name}.npy")[:-1])


@pytest.mark.parametrize("change", [replace_images, change_a_label, leave_out_the_last])
def test_a_run_is_not_resumed_on_data_that_changed(change, tiny, tiny_data, tmp_path, capsys):
    run(*tiny, "--epochs", 1, "--arch", "c/c/c", "--out", tmp_path / "o")
    change(tiny_data)
    error = refusal(capsys, *tiny, "--epochs", 1, "--arch", "c/c/c", "--out", tmp_path / "o", "--resume")
    assert "c-c-c.pt was made with other data: the content of --data has changed" in error


def test_a_translation_run_is_not_resumed_on_data_that_changed(tmp_path, capsys):
    path = write_pairs(tmp_path / "pairs.tsv")
    flags = ["--space", "translation", "--data", path, "--set", "merges=5", "--epochs", 1, "--out", tmp_path]
    run(*flags)
    write_pairs(path, "cat\tgata")
    assert "the content of --data has changed" in refusal(capsys, *flags, "--resume")


def test_a_folder_spelled_another_way_is_the_same_data(tiny, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*tiny, "--arch", "c/c/c", "--epochs", 1, "--out", "o", "--data"]
    run(*flags, "images")
    log = losses("o/c-c-c.jsonl")
    capsys.readouterr()
    for path in ("./images", "images/", "o/../images", tiny_data):
        run(*flags, path, "--resume")
        assert " step " not in capsys.readouterr().out  # nothing is trained again
    assert losses("o/c-c-c.jsonl") == log


OTHER_SETTINGS = {
    "c-c-c.pt was made with lr 0.01, this run asks for 0.1": ["--lr", 0.1],
    "made with seed 0, this run asks for 1": ["--seed", 1],
    "made with image None, this run asks for 32": ["--image", 32],
    "made with mixup 0.0, this run asks for 1.0": ["--set", "mixup=1"],
}


def test_a_run_is_not_resumed_with_other_settings(tiny, tmp_path, capsys):
    flags = [*tiny, "--arch", "c/c/c", "--epochs", 1, "--out", tmp_path]
    run(*flags)
    for message, more in OTHER_SETTINGS.items():
        assert message in refusal(capsys, *flags, *more, "--resume")


def test_resume_with_nothing_to_go_on_from_says_so_and_starts(tiny, tmp_path, capsys):
    run(*tiny, "--arch", "c/c/c", "--epochs", 1, "--out", tmp_path / "o", "--resume")
    assert "nothing to resume: " in capsys.readouterr().err and (tmp_path / "o" / "c-c-c.pt").exists()


def test_signals_are_handled_as_before_after_a_run():
    before = signal.getsignal(signal.SIGTERM)
    with train.interruptible() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
    assert stop == [signal.SIGTERM, signal.SIGINT] and signal.getsignal(signal.SIGTERM) is before


DISK_ERRORS = [OSError(28, "No space left on device"), RuntimeError("write failed\nat 3")]


@pytest.mark.parametrize("error", DISK_ERRORS)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(error, tmp_path, monkeypatch):
    train.save({"step": 1}, tmp_path / "x.pt")

    def fail(state, path):
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="cannot write .*x.pt: (No space left on device|write failed)$"):
        train.save({"step": 2}, tmp_path / "x.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]
    assert torch.load(tmp_path / "x.pt") == {"step": 1}


def test_an_output_folder_that_cannot_be_made_is_one_sentence(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = refusal(capsys, *tiny, "--out", tmp_path / "file" / "o")
    assert f"cannot write {tmp_path / 'file' / 'o' / 'supernet.jsonl'}: " in error


# ---------------------------------------------------------------------------------------- checkpoints


def checkpoint():
    """Return the checkpoint of an untrained network."""
    data = {"mean": torch.full((1, 1, 1), 0.3), "std": torch.full((1, 1, 1), 0.2)}
    data |= {"side": 28, "fingerprint": ""}
    data["class_names"] = [f"class {number}" for number in range(10)]
    state = {"model": build(FASHION, "cc/cc/cc").state_dict(), "space": "fashion", "space_changes": {}}
    state |= {"arch": "cc/cc/cc", "sharing": "none", "seed": 0, "recipe": asdict(train.Recipe())}
    return state | {"data": data, "step": 1}


def checkpoint_bytes(state):
    """Return the content of the file of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def change(**changes):
    """Return a function that changes entries of a checkpoint; a dict changes entries of an entry."""

    def changed(state):
        merged = {key: state[key] | value for key, value in changes.items() if isinstance(value, dict)}
        return state | changes | merged

    return changed


def scale(name, times):
    """Return a function that puts the weights, multiplied, into a checkpoint under a name."""
    return lambda state: state | {name: {key: tensor * times for key, tensor in state["model"].items()}}


NAN = float("nan")
NOT_WHOLE = "x.pt is not a whole checkpoint of train.py"
NOT_FINITE = "x.pt holds weights that are not finite numbers"
UNFIT = "x.pt does not fit the network: "
BAD_CHECKPOINTS = {
    "empty": (lambda state: b"", NOT_WHOLE),
    "pickle": (lambda state: pickle.dumps({"model": 1}), NOT_WHOLE),
    "truncated": (lambda state: checkpoint_bytes(state)[:-1000], NOT_WHOLE),
    "flipped bit": (lambda state: checkpoint_bytes(state).replace(b"\x3e", b"\x3f"), NOT_WHOLE),
    "tensor": (lambda state: torch.zeros(3), NOT_WHOLE),
    "numpy scalar": (change(data={"side": np.float64(28)}), NOT_WHOLE),
    "object": (change(seed=Path("x")), NOT_WHOLE),
    "without arch": (lambda state: {key: state[key] for key in state if key != "arch"}, NOT_WHOLE),
    "number in model": (change(model={"head.fc.bias": 3}), NOT_WHOLE),
    "recipe with unknown key": (change(recipe={"depth": 3}), NOT_WHOLE),
    "data is None": (change(data=None), NOT_WHOLE),
    "space is a list": (change(space=["fashion"]), NOT_WHOLE),
    "NaN": (scale("model", NAN), NOT_FINITE),
    "average of NaN": (scale("average", NAN), NOT_FINITE),
    "missing space": (change(space="mine"), UNFIT + "unknown space 'mine'; known: fashion"),
    "unknown change": (change(space_changes={"depth": 3}), UNFIT),
    "bad change": (change(space_changes={"depths": ((0, 1, 1),)}), UNFIT + "space fashion: depths must be ints"),
    "arch of another space": (change(arch="c/c/c/c"), UNFIT + "arch 'c/c/c/c' must be a string of 3 stages"),
    "another arch": (change(arch="ca/st/tt"), UNFIT + "Missing key"),
    "supernet": (change(arch=""), "x.pt is a supernet of space fashion, not one network"),
    "other shapes": (change(space_changes={"head_dim": 8, "widths": (32, 64, 256)}), UNFIT + "size mismatch"),
    "surplus": (change(model={"x": torch.zeros(1)}), UNFIT + "Unexpected key"),
    "space of text": (change(space="translation"), UNFIT + "'vocabulary'"),
    "no data": (lambda state: state | {"data": {}}, NOT_WHOLE),
    "side of 0": (lambda state: state | {"data": state["data"] | {"side": 0}}, UNFIT + "its side is 0"),
    "few names": (lambda state: state | {"data": state["data"] | {"class_names": ["a"]}}, UNFIT + "it has 1"),
    "deviation of 0": (lambda state: state | {"data": state["data"] | {"std": torch.zeros(1, 1, 1)}}, UNFIT),
}


@pytest.mark.parametrize("flag", ["--evaluate", "--predict", "--init"])
@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_what_is_no_good_checkpoint_is_refused_in_one_sentence(name, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, message = BAD_CHECKPOINTS[name]
    content = make(checkpoint())
    Path("x.pt").write_bytes(content if isinstance(content, bytes) else checkpoint_bytes(content))
    more = {"--evaluate": [], "--predict": ["x.png"], "--init": ["--arch", "cc/cc/cc"]}[flag]
    error = refusal(capsys, flag, "x.pt", *more, "--device", "cpu")
    assert message in error or flag == "--init" and "x.pt" in error
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_the_prefix_of_data_parallel_models_is_removed(tmp_path):
    state = checkpoint()
    prefixed = {f"module.{name}": tensor for name, tensor in state["model"].items()}
    train.save(state | {"model": prefixed}, tmp_path / "x.pt")
    network, _, _ = train.read_network(tmp_path / "x.pt", "cpu")
    assert all(tensor.equal(state["model"][name]) for name, tensor in network.state_dict().items())


def test_a_checkpoint_is_not_mistaken_for_that_of_another_space_arch_or_number_of_classes(tmp_path, capsys):
    file = tmp_path / "x.pt"
    train.save(checkpoint(), file)
    arch = ["--arch", "cc/cc/cc", "--init", file]
    wrong = {
        "'cc/cc/cc', 10), this run asks for ('fashion', 'cc/cc/ca'": ["--arch", "cc/cc/ca", "--init", file],
        "this run asks for ('cifar10', 'cc/cc/cc', 10)": [*arch, "--space", "cifar10"],
        "this run asks for ('fashion', 'cc/cc/cc', 3)": [*arch, "--classes", 3],
        "x.pt is one network of space fashion": ["--evaluate", file, "--space", "cifar10"],
        "x.pt: not the checkpoint of a translation network": ["--translate", file],
    }
    for message, flags in wrong.items():
        assert message in refusal(capsys, *flags, "--out", tmp_path / "o")
    file.rename(tmp_path / "cc-cc-cc.pt")
    flags = ["--space", "cifar10", "--arch", "cc/cc/cc", "--out", tmp_path]
    assert "cc-cc-cc.pt is of another space than cifar10; give another --out" in refusal(capsys, *flags)


# ----------------------------------------------------------------------- evaluation, prediction, translation


def test_evaluate_needs_test_images_only_and_normalises_as_in_training(tiny, tiny_data, tmp_path, capsys):
    run(*tiny, "--arch", "c/s/t", "--epochs", 3, "--out", tmp_path)
    trained = re.search(r"test_accuracy [\d.]+", capsys.readouterr().out)[0]
    flags = ["--evaluate", tmp_path / "c-s-t.pt", "--data", tiny_data]

    def evaluated(*more):
        run(*flags, *more)
        return capsys.readouterr().out

    assert f"c/s/t | {trained} | standard_error" in evaluated()
    darker = np.load(tiny_data / "train_images.npy") // 4
    np.save(tiny_data / "train_images.npy", darker)
    assert trained in evaluated()
    for name in ("images", "labels"):
        (tiny_data / f"train_{name}.npy").unlink()
    assert trained in evaluated()
    assert "40 test images" in evaluated("--image", 32)
    assert "image must be at least 1, got 0" in refusal(capsys, *flags, "--image", 0)


def test_training_goes_on_from_a_network_at_another_side(tiny, tmp_path):
    run(*tiny, "--arch", "c/s/t", "--epochs", 1, "--out", tmp_path / "a")
    init = ["--init", tmp_path / "a" / "c-s-t.pt", "--image", 32]
    run(*tiny, "--arch", "c/s/t", "--epochs", 1, *init, "--out", tmp_path / "b")
    assert train.load_checkpoint(tmp_path / "b" / "c-s-t.pt")["data"]["side"] == 32


@pytest.mark.filterwarnings("error")
def test_predict_prints_class_and_probability_of_pictures(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    train.save(checkpoint(), tmp_path / "x.pt")
    network, state, _ = train.read_network(tmp_path / "x.pt", "cpu")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, picture in zip(files, pictures):
        image.fromarray(picture).save(file)
    run("--predict", tmp_path / "x.pt", *files)
    lines = capsys.readouterr().out.splitlines()
    x = torch.from_numpy(pictures[:, None, 2:30, 2:30]).float() / 255  # the central 7/8
    probability, best = network((x - 0.3) / 0.2).softmax(1).max(1)
    for row in range(3):
        assert lines[row] == f"{files[row]} | class {best[row]} | {probability[row]:.3f}"
    converted = change(data={"class_names": None})(checkpoint())  # as published weights are kept
    train.save(converted, tmp_path / "x.pt")
    run("--predict", tmp_path / "x.pt", files[1])
    assert f"1.png | {best[1]} | " in capsys.readouterr().out


def test_translate_decodes_with_the_beam_and_penalty_of_the_checkpoint(tmp_path, monkeypatch, capsys):
    flags = ["--space", "translation", "--data", write_pairs(tmp_path / "pairs.tsv"), "--set", "merges=5"]
    flags += ["--set", "beam=3", "--set", "length_penalty=0.2", "--set", "max_length=20", "--epochs", 1]
    run(*flags, "--arch", ARCH, "--out", tmp_path)
    (file,) = tmp_path.glob("*.pt")
    beam_search = sentences.beam_search
    settings = []

    def search(model, source, beam, penalty, *more):
        settings.append((beam, penalty))
        return beam_search(model, source, beam, penalty, *more)

    monkeypatch.setattr(sentences, "beam_search", search)
    for more, expected in (([], (3, 0.2)), (["--set", "beam=1"], (1, 0.2))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a i cat\n\nb j cat\n")))
        settings.clear()
        capsys.readouterr()
        run("--translate", file, *more)
        assert len(capsys.readouterr().out.splitlines()) == 3 and set(settings) == {expected}
    assert "beam must be at least 1" in refusal(capsys, "--translate", file, "--set", "beam=0")
    assert "not the checkpoint of a network of images" in refusal(capsys, "--predict", file, "x.png")
    message = refusal(capsys, "--evaluate", file, "--image", 32)
    assert "image is for images, not for space translation" in message


# ---------------------------------------------------------------------------- programs, processes and kills


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_ends_the_program_without_a_word():
    code = "import train, sys; train.run_command(lambda: [print('x' * 9999) for _ in range(999)])"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    program.stdout.read(10)
    program.stdout.close()
    assert program.wait() == 1 and program.stderr.read() == ""


@pytest.mark.slow
def test_names_beyond_ascii_and_with_spaces_are_names(tiny_data, tmp_path):
    folder = tmp_path / "дом ñ"
    tiny_data.rename(folder)
    arch = tmp_path / "ärch.json"
    arch.write_text('{"arch": "sa/ca/ct", "comment": "é"}', encoding="utf-8")
    out = tmp_path / "out é"
    program = command("train", "--data", folder, "--arch", arch, "--epochs", 1, "--out", out)
    assert program.returncode == 0, program.stderr
    assert (out / "sa-ca-ct.pt").exists()


@pytest.mark.slow
def test_300_pictures_in_three_classes_are_learnt_evaluated_and_resumed(tmp_path):
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for number in range(300):
        array = draw.integers(0, 90, (20, 20, 3), dtype=np.uint8)
        array[..., number % 3] += 120
        split = "train" if number < 240 else "val"
        folder = tmp_path / "pictures" / split / ("red", "green", "blue")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(array).save(folder / f"{number}.png")
    data = ["--space", "cifar10", "--image", 16, "--classes", 3, "--data", tmp_path / "pictures"]
    flags = [*data, "--arch", "cc/cc/cc", "--batch", 20, "--epochs", 6, "--out", tmp_path / "o"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)], env=ONE_THREAD, **pipes)
    assert any("step" in line for line in first.stdout)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130
    resumed = command("train", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    accuracy = re.search(r"test_accuracy [\d.]+", resumed.stdout)[0]
    assert float(accuracy.split()[1]) > 80 and len(losses(tmp_path / "o" / "cc-cc-cc.jsonl")) == 6 * 10
    file = tmp_path / "o" / "cc-cc-cc.pt"
    evaluated = command("train", "--evaluate", file, "--data", tmp_path / "pictures")
    assert accuracy in evaluated.stdout and "60 test images" in evaluated.stdout
    predicted = command("train", "--predict", file, tmp_path / "pictures" / "val" / "red" / "240.png")
    assert "240.png | red | " in predicted.stdout


def start_processes(count, program, *flags):
    """Start a program by torchrun on this machine, one thread a process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    arguments = [sys.executable, *launcher, str(ROOT / f"{program}.py"), *map(str, flags)]
    return subprocess.Popen(
        arguments, text=True, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


SEVERAL = {
    "with T": ["--sharing", "heterogeneous", "--epochs", 2, "--accumulate", 6],
    "whole recipe": ["--epochs", 3, "--accumulate", 4, *WHOLE_RECIPE],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_two_processes_take_the_steps_of_one(name, tiny_data, tmp_path):
    flags = [*SEVERAL[name], "--data", tiny_data, "--batch", 10, "--device", "cpu", "--out"]
    several = start_processes(2, "train", *flags, tmp_path / "two")
    one = command("train", *flags, tmp_path / "one")
    assert one.returncode == 0 and several.wait(120) == 0, one.stderr + several.stderr.read()
    assert several.stdout.read().count("saved") == 1
    logs = [(tmp_path / name / "supernet.jsonl").read_text().splitlines() for name in ("one", "two")]
    steps = [[json.loads(line) for line in log] for log in logs]
    assert [step["archs"] for step in steps[0]] == [step["archs"] for step in steps[1]]
    assert [s["loss"] for s in steps[1]] == pytest.approx([s["loss"] for s in steps[0]], rel=1e-4)
    if name == "with T":
        states = [train.load_checkpoint(tmp_path / name / "supernet.pt")["model"] for name in ("one", "two")]
        start = {name: p.detach() for name, p in Supernet(FASHION, "heterogeneous").named_parameters()}
        apart = distance({name: states[1][name] for name in start}, states[0])
        assert apart < 1e-2 * distance(start, states[0])


@pytest.mark.slow
def test_passes_that_cannot_be_shared_are_one_sentence(tiny_data, tmp_path):
    flags = ["--data", tiny_data, "--device", "cpu", "--accumulate", 3, "--out", tmp_path / "o"]
    program = start_processes(2, "train", *flags)
    assert program.wait(120) != 0
    assert "train.py: accumulate 3 is no multiple of the 2 processes" in program.stderr.read()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes are found in /proc")
def test_if_one_process_is_killed_the_others_say_so_and_stop(tiny_data, tmp_path):
    flags = ["--data", tiny_data, "--epochs", 5000, "--batch", 10, "--accumulate", 2, "--device", "cpu"]
    program = start_processes(2, "train", *flags, "--out", tmp_path / "o")
    file = tmp_path / "o" / "supernet.pt"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not file.exists():
        time.sleep(0.1)
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(max(workers), signal.SIGKILL)
    assert program.wait(60) != 0 and "another one is gone" in program.stderr.read()
    assert train.load_checkpoint(file)["step"] > 0


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch._dynamo  # what the first step imports, once for all lives
import train
kills, out, flags = int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
train.SAVE_SHARE, draw, halves, steps = 0.5, random.Random(0), 0, [0]
path = out / "killed" / "supernet.pt"

def live(folder, until=None):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main(flags + ["--resume", "--out", str(folder)])
        os._exit(0)
    while until and not until():
        time.sleep(0.001)
    if until:
        os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == (signal.SIGKILL if until else 0)

def written():
    return list(path.parent.glob("supernet.pt.*.tmp"))

live(out / "whole")
for kill in range(kills):
    seen, wait = path.stat().st_mtime_ns if path.exists() else 0, draw.uniform(0, 0.1)
    if kill % 2:  # while a checkpoint is written
        live(out / "killed", written)
    else:  # some time after one
        there = lambda: path.exists() and path.stat().st_mtime_ns > seen
        live(out / "killed", lambda: there() and not time.sleep(wait))
    halves += len(written())
    for rest in path.parent.glob("*.tmp"):
        rest.unlink()
    steps.append(train.load_checkpoint(path)["step"])
assert steps == sorted(steps) and 0 < steps[-1] and halves, (steps, halves)
live(out / "killed")
print(f"{kills} kills, resumed from the steps {steps[1:]}; {halves} left a half-written file")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forks")
def test_runs_killed_at_random_moments_end_with_the_losses_of_a_whole_run(tiny_data, tmp_path):
    kills = int(os.environ.get("KILLS", 2))
    flags = ["--data", tiny_data, "--epochs", 4 * kills, "--batch", 30, "--set", "ema=0.9"]
    arguments = [sys.executable, "-c", KILLED, ROOT, str(kills), tmp_path, *map(str, flags)]
    environment = {**ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""}  # a fork cannot use its parent's GPU
    program = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600)
    assert program.returncode == 0, program.stderr
    print(program.stdout)
    killed, whole = (losses(tmp_path / name / "supernet.jsonl") for name in ("killed", "whole"))
    assert killed == whole and len(whole) == 12 * kills

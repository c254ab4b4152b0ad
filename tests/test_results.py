"""Claims of programs of results/: operators, integer, official, scale, table and sharing."""

import argparse
import itertools
import math
import os
import pickle
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from conftest import FASHION, ROOT, rng
from cost_model import arch_costs
from data import images
from data.images import load_images
from results import integer, official, operators, scale, search, sharing, table
from results.integer import add_conv2d_int, add_conv2d_u8, pack_shift, shift_conv2d_int, unpack_shift
from shiftaddnas import SPACES, Block, add_conv2d, attention2d, build, shift_conv2d, shift_weight

needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++").split()[0]), reason="no C++ compiler on this machine"
)
V3 = "cc/cccc/sctaa/ttctt"
V4 = "cc/cscc/sctss/ttctt"


# -------------------------------------------------------------------------------------------- operators


def test_median_ms_lets_functions_take_turns_and_calls_each_at_least_three_times(monkeypatch):
    calls = []
    clock = iter(range(0, 10**6, 3))  # a call of the clock is 3 s after the one before
    monkeypatch.setattr(operators.time, "perf_counter", lambda: next(clock))
    times = operators.median_ms([lambda: calls.append("a"), lambda: calls.append("b")])
    assert times == [3000.0, 3000.0]
    assert "".join(calls) == "aabb" * 3  # a call to warm up, a timed one


def small_layers(monkeypatch):
    """Let the operator table have three small layers: dense, depthwise, linear."""
    layers = {
        "3x3": (16, 16, 32, 5, 3, 1, 1),
        "depthwise": (16, 16, 16, 4, 3, 1, 16),
        "linear": (64, 32, 32, 1, 1, 0, 1),
    }
    monkeypatch.setattr(operators, "LAYERS", layers)
    return list(layers)


@needs_compiler
def test_the_rows_of_the_operator_table_compute_one_thing(monkeypatch):
    for name in ("SHIFTADDNAS_KERNELS", "SHIFTADDNAS_CXXFLAGS"):
        monkeypatch.setenv(name, "")  # what they are afterwards ends with the test
    for layer in small_layers(monkeypatch):
        row = {operator.name: operator for operator in operators.layer_operators(layer, "cpu")}
        add = operators.run(row["add (cpu)"])
        assert row["add (cpu)"].elements == add.numel() * row["add (cpu)"].inputs[1][0].numel()
        for name in ("add (cpu-portable)", "add (unfold + cdist)", "add (broadcast)"):
            part = add[:: row[name].share]
            torch.testing.assert_close(operators.run(row[name]).view_as(part), part, rtol=1e-5, atol=1e-5)
        assert "SHIFTADDNAS_CXXFLAGS" not in os.environ  # that of the portable row is gone


@needs_compiler
def test_the_operator_table_has_a_row_an_operator_and_the_ratios_of_its_columns(monkeypatch, capsys):
    layers = small_layers(monkeypatch)
    monkeypatch.setattr(operators, "median_ms", lambda runs, device="cpu": list(range(2, 2 + len(runs))))
    monkeypatch.setattr(operators, "extra_mb", lambda run, device: 0.5)
    operators.print_table("cpu")
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(tuple(f"| {layer} |" for layer in layers))]
    assert len(rows) == 3 * 7
    elements = 16 * 32 * 5 * 5 * 16 * 9
    most = float(re.search(r"Ceiling ([\d.]+)", "".join(lines))[1])
    dense = next(line for line in rows if line.startswith("| 3x3") and "cdist" in line)
    ms = 16 * 4.0  # third of the operators, on a sixteenth of the batch
    rate = elements / 1e6 / ms
    im2col_mb = 4 * 16 * 5 * 5 * 16 * 9 / 1e6
    numbers = [f"{ms:.3f}", f"{rate:.1f}", f"{rate / most:.0%}", f"{ms:.3f}", "8.0", f"{8 / im2col_mb:.1%}"]
    assert dense == f"| 3x3 | add (unfold + cdist) | {' | '.join(numbers)} |"
    assert "| add (unfold + cdist) | 32.00 | 21.33 | 32.00 |" in lines  # 64 / 2, 64 / 3


def test_the_operator_table_refuses_a_machine_without_kernels(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="the operator table compares kernels, and none can be had for cpu"):
        operators.print_table("cpu")


# ---------------------------------------------------------------------------------------------- integer


def geometries(count):
    """Yield (x, w, stride, padding, groups): odd sizes, K 1-7, depthwise, linear, batches of 0 to 3."""
    draw = random.Random(0)
    gen = rng()
    while count:
        groups = draw.choice([1, 1, 2, 3, 6])
        per_group = 1 if groups == 6 else draw.choice([1, 2, 3, 9])
        filters = 1 if groups == 6 else draw.choice([1, 2, 5, 11])
        kh, kw, stride, padding = (draw.randint(*ends) for ends in ((1, 7), (1, 7), (1, 3), (0, 3)))
        h = draw.choice([1, 3, 7, 9, 16])
        wide = draw.choice([1, 5, 8, 11, 17])
        if count % 15 == 4:  # a linear layer
            groups, filters, kh, kw, padding, h, wide = 1, 70, 1, 1, 0, 1, 1
        if kh > h + 2 * padding or kw > wide + 2 * padding:
            continue
        x = torch.randn(draw.choice([0, 1, 1, 2, 3]), groups * per_group, h, wide, generator=gen)
        w = torch.randn(groups * filters, per_group, kh, kw, generator=gen)
        if count % 5 == 2:  # not contiguous
            x = x.mT.contiguous().mT
            w = w.mT.contiguous().mT
        count -= 1
        yield x, w, stride, padding, groups


def distances(x, w, stride, padding, groups):
    """-sum |x - w| in float64 of unfolded patches: exact below 2^53."""
    if not len(x):
        return F.conv2d(x.double(), w.double(), None, stride, padding, 1, groups)
    patches = F.unfold(x.double(), w.shape[2:], padding=padding, stride=stride)
    patches = patches.view(len(x), groups, 1, w[0].numel(), -1)
    y = -(patches - w.double().view(1, groups, len(w) // groups, -1, 1)).abs().sum(3)
    wide = (x.shape[3] + 2 * padding - w.shape[3]) // stride + 1
    return y.view(len(x), len(w), -1, wide)


def test_integer_operators_equal_their_definitions_on_every_element():
    gen = rng(13)
    ends = torch.iinfo(torch.int32)
    for x, w, *geometry in geometries(60):
        x32, w32 = (torch.randint(ends.min, ends.max, tensor.shape, generator=gen).int() for tensor in (x, w))
        assert add_conv2d_int(x32, w32, *geometry).double().equal(distances(x32, w32, *geometry))
        x8, w8 = ((tensor >> 24 & 255).to(torch.uint8) for tensor in (x32, w32))
        y8 = add_conv2d_u8(x8, w8, *geometry)
        assert y8.dtype == torch.int32 and y8.double().equal(distances(x8, w8, *geometry))
        e = torch.randint(15, w.shape, generator=gen)
        weight = w.sign() * 2.0**-e * (torch.rand(w.shape, generator=gen) > 0.1)
        small = x32 >> 12  # products below 2^53 are exact in float64
        wanted = F.conv2d(small.double(), weight.double(), None, *geometry[:2], 1, geometry[2])
        y = shift_conv2d_int(small, pack_shift(weight), weight.shape, *geometry)
        assert (y.double() / 2**15).equal(wanted)


def test_integer_shift_loses_no_bit_at_the_ends_of_its_range():
    x = torch.tensor([-(2**31), 2**31 - 1, 1], dtype=torch.int32).view(1, 3, 1, 1)
    weight = torch.tensor([1.0, -1.0, 2.0**-15]).view(1, 3, 1, 1)
    y = shift_conv2d_int(x, pack_shift(weight), weight.shape)
    assert y.item() == 2**15 * (-(2**31) - (2**31 - 1)) + 1


def test_packing_is_lossless_at_five_bits_a_weight():
    gen = rng(15)
    for shape in [(0, 3), (1,), (7,), (16, 3, 3, 3), (5, 1, 7, 7)]:
        sign = 1.0 - 2.0 * torch.randint(2, shape, generator=gen)
        weight = sign * 2.0 ** -torch.randint(15, shape, generator=gen)
        for w in (weight, weight * (torch.rand(shape, generator=gen) > 0.3)):
            packed = pack_shift(w)
            assert packed.dtype == torch.uint8 and packed.numel() == 1 + (5 * w.numel() + 7) // 8
            assert unpack_shift(packed, shape).equal(w)
    lowest = torch.tensor([-(2.0**-15), 1.0])
    assert unpack_shift(pack_shift(lowest), (2,)).equal(lowest)


NOT_PACKED = (0.75, 2.0, 2.0**-16, math.nan, math.inf)


@pytest.mark.parametrize(
    "call, message",
    [
        *[(lambda w=w: pack_shift(torch.tensor([1.0, w])), "5-bit codes hold") for w in NOT_PACKED],
        (lambda: pack_shift(torch.tensor([0.0, -(2.0**-15)])), "5-bit codes hold .* either 0 or -2"),
        (lambda: unpack_shift(torch.zeros(4, dtype=torch.uint8), (8,)), "4 bytes do not hold"),
        (lambda: add_conv2d_u8(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)), "takes torch.uint8 and"),
        (lambda: integer.to_int(torch.tensor([3e4, -4e4])), "got 40000"),
    ],
)
def test_integer_functions_refuse_what_they_cannot_hold(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_hybrid_network_predicts_the_same_classes_through_the_integer_path(tiny_data):
    data = load_images(str(tiny_data), FASHION)
    network = integer.hybrid_network(data)
    exact = integer.predict(integer.in_integers(network), data)
    wanted = integer.predict(network, data)
    assert not exact.equal(wanted)  # the integer path ran
    assert exact.argmax(1).equal(wanted.argmax(1))
    torch.testing.assert_close(exact, wanted, rtol=1e-2, atol=1e-3)


# --------------------------------------------------------------------------------------------- official


def official_parts(letter, at):
    """Official names of a block's parts: conv1, peg, bn1, middle, bn2, conv3, bn3, shortcut."""
    if letter == "t":
        names = "proj.0 proj.1.conv proj.2 net.1.to_qkv net.2 net.4 net.5 shortcut"
    else:
        names = "conv1 peg.conv bn1 conv2 bn2 conv3 bn3 downsample"
    return [at + name for name in names.split()]


def official_state(arch, form, two_heads=True, widths=(256, 512, 1024, 2048), classes=1000):
    """Name -> tensor of an official checkpoint (boss_models.py, boss_candidates), written down by block."""
    state = {}
    generator = rng()

    def tensor(name, *shape):
        state[name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5

    def norm(name, width):
        for part in ("weight", "bias", "running_mean"):
            tensor(f"{name}.{part}", width)
        state[f"{name}.running_var"] = torch.rand(width, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def layer(op, name, *shape):
        leaves = {"a": ["adder"], "s": ["shift", "sign"] if form == "PS" else ["weight"]}.get(op, ["weight"])
        for leaf in leaves:
            tensor(f"{name}.{leaf}", *shape)
        if leaves[-1] == "sign":
            state[f"{name}.shift"].mul_(5).sub_(5)
            state[f"{name}.sign"].mul_(math.prod(shape[1:]) ** 0.5)

    layer("c", "conv1", 64, 3, 7, 7)
    norm("bn1", 64)
    width = 64
    for stage, letters in enumerate(arch.split("/")):
        out = widths[stage]
        p = out // 4
        for i, op in enumerate(letters):
            at = f"layer{stage + 1}.{i}."
            enter, peg, bn1, middle, bn2, leave, bn3, project = official_parts(op, at)
            layer(op, enter, p, width, 1, 1)
            layer(op, peg, p, 1, 3, 3)
            norm(bn1, p)
            if op != "a":
                tensor(peg + ".bias", p)
            layer(op, middle, *((3 * p, p, 1, 1) if op == "t" else (p, p, 3, 3)))
            norm(bn2, p)
            layer(op, leave, out, p, 1, 1)
            norm(bn3, out)
            if i == 0:
                layer(op, project + ".1", out, width, 1, 1)
                norm(project + ".2", out)
            if op != "t":
                for part, shape in (("fc1", (out // 16, out)), ("fc2", (out, out // 16))):
                    tensor(f"{at}se.{part}.weight", *shape, 1, 1)
                    tensor(f"{at}se.{part}.bias", shape[0])
            width = out
    for head in ["fc", "dist_head"][: 1 + two_heads]:
        tensor(f"{head}.weight", classes, width)
        tensor(f"{head}.bias", classes)
    return state


def official_logits(state, arch, x):
    """What the official network computes in evaluation, from its state dict."""

    def norm(name, x):
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in parts))

    def layer(name, x, op="c", **geometry):
        own = {key[len(name) + 1 :]: tensor for key, tensor in state.items() if key.startswith(name + ".")}
        weight = shift_weight(own["shift"], own["sign"]) if "sign" in own else own.get("weight")
        if op == "a":
            y = add_conv2d(x, own["adder"], **geometry)
        else:
            y = (shift_conv2d if op == "s" else F.conv2d)(x, weight, **geometry)
        return y + own["bias"].view(-1, 1, 1) if "bias" in own else y

    x = F.max_pool2d(F.silu(norm("bn1", layer("conv1", x, stride=2, padding=3))), 3, 2, 1)
    for stage, letters in enumerate(arch.split("/"), 1):
        for i, op in enumerate(letters):
            at = f"layer{stage}.{i}."
            stride = 2 if stage > 1 and i == 0 else 1
            enter, peg, bn1, middle, bn2, leave, bn3, project = official_parts(op, at)
            shortcut = x
            if i == 0:
                shortcut = F.avg_pool2d(x, 2, stride, ceil_mode=True) if stride == 2 else x
                shortcut = norm(project + ".2", layer(project + ".1", shortcut, op))
            x = layer(enter, x, op)
            x = layer(peg, x, op, stride=stride, padding=1, groups=x.shape[1])
            x = F.silu(norm(bn1, x))
            if op == "t":
                x = attention2d(x, state[middle + ".weight"], 64, official=True)
            else:
                x = layer(middle, x, op, padding=1)
            x = norm(bn3, layer(leave, F.silu(norm(bn2, x)), op))
            if op != "t":
                gate = layer(at + "se.fc2", F.relu(layer(at + "se.fc1", x.mean((2, 3), keepdim=True))))
                x = x * gate.sigmoid()
            x = F.silu(x + shortcut)
    heads = [name for name in ("fc", "dist_head") if name + ".weight" in state]
    x = x.mean((2, 3))
    return sum(F.linear(x, state[name + ".weight"], state[name + ".bias"]) for name in heads) / len(heads)


NARROW = replace(SPACES["bossnet_t0"], name="narrow", widths=(128, 128, 256, 256), classes=7, distilled=True)


@pytest.mark.parametrize(
    "arch, form, two_heads, count",
    [
        pytest.param(V3, "PS", True, 31_418_160, marks=pytest.mark.slow),
        (V4, "Q", False, 29_909_040 - 2_049_000),
    ],
)
def test_an_official_file_becomes_a_checkpoint_that_predicts(arch, form, two_heads, count, tmp_path, capsys):
    x = torch.rand(2, 3, 64, 64, generator=rng())
    state = official_state(arch, form, two_heads)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(tensor.numel() for name, tensor in state.items() if not name.endswith(buffers)) == count
    torch.save({"model": state, "epoch": 299, "args": argparse.Namespace(lr=1)}, tmp_path / "official.pth")
    flags = ["--space", "bossnet_t0", "--arch", arch, "--out", str(tmp_path)]
    official.main([str(tmp_path / "official.pth"), *flags])
    path = str(tmp_path / f"{arch.replace('/', '-')}.pt")
    network, *_ = train.read_network(path, "cpu")
    assert (network.space.distilled, network.space.official_attention) == (two_heads, True)
    expected = official_logits(state, arch, x)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    np.save(tmp_path / "picture.npy", np.zeros((1, 224, 224, 3), np.uint8))
    train.main(["--device", "cpu", "--predict", path, str(tmp_path / "picture.npy")])
    assert re.search(r"\| \d+ \| [01]\.\d+\n", capsys.readouterr().out)  # the number of a class


class Malice:
    """Would run a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("conv1.weight"), 'Missing key.*: "stem.0.weight"'),
        (lambda state: state.pop("layer3.0.conv1.sign"), "layer3.0.conv1.sign"),
        (lambda state: state.update(more=torch.zeros(1)), 'Unexpected key.*: "more"'),
        (lambda state: state.update({"fc.bias": torch.zeros(3)}), "size mismatch for head.fc.bias: .*3"),
    ],
)
def test_missing_surplus_and_misshapen_tensors_are_named(change, message):
    state = official_state(V3, "PS", True, NARROW.widths, NARROW.classes)
    change(state)
    with pytest.raises(ValueError, match=f"x.pth does not fit {V3} of narrow: .*{message}"):
        official.convert(state, NARROW, V3, "x.pth")


def test_a_file_that_is_not_tensors_is_refused_and_nothing_in_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps({"model": Malice()}), b"", b"text"):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ValueError, match="not a checkpoint of tensors"):
            official.read_official(tmp_path / "x.pth")
    torch.save({"model": {"fc.weight": 3}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not a checkpoint of tensors"):
        official.read_official(tmp_path / "x.pth")
    assert not (tmp_path / "pwned").exists()


def test_the_converter_takes_spaces_of_the_retraining_form_alone(capsys):
    with pytest.raises(SystemExit):
        official.main(["x.pth", "--space", "fashion", "--arch", "cc/sa/tt"])
    assert "--space: invalid choice: 'fashion' (choose from" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ scale


def test_foreseen_activations_are_what_autograd_keeps():
    x = torch.rand(30, 1, 28, 28)
    network = build(FASHION, "cs/at/sac").train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * 4 * (len(tensor) == 30)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(x)
    assert logits.requires_grad
    foreseen = scale.activation_bytes(FASHION, "cs/at/sac", batch=30)
    assert foreseen == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize(
    "flags, network",
    [
        (["--image", "16", "--batch", "4"], "fashion supernet at 16, 1 x 4 images"),
        (["--arch", "cc/sa/tt", "--batch", "4", "--amp"], "fashion cc/sa/tt at 28, 1 x 4 images"),
    ],
)
def test_scale_prints_time_and_memory_of_a_step(flags, network, capsys):
    scale.main(flags)
    line = capsys.readouterr().out
    assert line.startswith(network)
    assert re.search(r"[\d,]+ parameters \| read and augmented \d+ images/s \| \d+ ms a step", line)
    peak, foreseen = map(int, re.search(r"peak (\d+) MiB, foreseen (\d+)", line).groups())
    assert peak > foreseen > 0


# ---------------------------------------------------------------------- the table of one space, and sharing


def random_table(count=150, known=1.0):
    """Return (archs, columns) as known_part gives them, of random accuracies with ties."""
    draw = np.random.default_rng(0)
    archs = [table.SPACE.arch(int(index)) for index in draw.permutation(2304)[:count]]
    columns = {name: draw.integers(0, 40, (2, count)).astype(float) for name in table.ACCURACIES}
    for accounting in table.ACCOUNTINGS:
        columns[f"share_{accounting}"] = draw.uniform(0.3, 1.0, count)
    return archs, columns


def test_a_front_is_the_best_network_of_its_operators_in_each_budget(monkeypatch):
    archs, columns = random_table()
    columns["val_accuracy"][:] = columns["test_accuracy"][0]  # seeds agree: every draw is the same
    columns["test_accuracy"][1] = columns["test_accuracy"][0] + 50
    columns["test_accuracy"][0] += 50
    monkeypatch.setattr(table, "DRAWS", 3)
    best = table.fronts(archs, columns, "official")
    assert "csat" in best and "t" not in best  # the first stage has no attention
    for ops, curves in best.items():
        for i, budget in enumerate(table.BUDGETS):
            inside = []
            for arch, share, accuracy in zip(archs, columns["share_official"], columns["test_accuracy"][0]):
                if set(arch) <= {*ops, "/"} and share <= budget:
                    inside.append(accuracy)
            assert all(np.isnan(curves[:, i])) if not inside else (curves[:, i] == max(inside)).all()


def test_what_a_seed_gives_to_every_network_is_no_noise():
    first = np.random.default_rng(0).permutation(100) / 10.0
    inside = np.arange(100) < 40
    rows = table.noise_lines(np.stack([first, first + 3]), inside, ~inside)[3:]  # below the head
    cells = [row.strip("| ").split(" | ") for row in rows]
    best = np.sort(first)[50:]
    assert cells[0] == ["all", "100", "0.00", f"{first.std():.2f}", "1.00"]
    assert cells[1] == ["the fitter half", "50", "0.00", f"{best.std():.2f}", "1.00"]
    assert cells[3] == ["without adds", "60", "0.00", f"{first[40:].std():.2f}", "1.00"]
    noisy = table.noise_lines(np.stack([first, first[::-1]]), inside, ~inside)[3].split(" | ")
    assert float(noisy[2]) > 2 and float(noisy[4].strip("| ")) < 0.5


def test_a_network_is_chosen_by_one_seed_and_judged_by_the_other():
    archs, columns = random_table()
    columns["val_accuracy"][:] = columns["test_accuracy"]  # noise alone: what chose is no part of the judgement
    whole = table.fronts(archs, columns, "official")["csat"][:, -1]
    assert abs(whole.mean() - columns["test_accuracy"].mean()) < 6 < 39 - columns["test_accuracy"].mean()


def test_main_effects_are_those_that_a_sum_was_made_of():
    draw = np.random.default_rng(0)
    archs, _ = random_table(400)
    effects = {}
    for position in range(6):
        effects |= {(position, op): draw.normal() for op in ("sa" if position < 2 else "sat")}
    blocks = [arch.replace("/", "") for arch in archs]
    values = np.array([80 + sum(effects.get(pair, 0) for pair in enumerate(block)) for block in blocks])
    found, error, fitted = table.main_effects(archs, values)
    assert found == pytest.approx(effects) and error < 1e-9 and fitted == pytest.approx(values)
    _, error, _ = table.main_effects(archs, values + draw.normal(0, 1, 400))
    assert 0.05 < error < 0.5


def test_the_rank_of_a_winner_counts_the_better_networks_inside_its_budget():
    archs, columns = random_table(400)
    energies = columns["energy_mj_official"] = columns["share_official"]
    budget = float(np.median(energies))
    winner = int(energies.argmin())
    mean = columns["test_accuracy"].mean(0)
    better = sum(mean[i] > mean[winner] for i in range(400) if energies[i] <= budget)
    runs = [{"winner": arch, "budget": {"energy_mj": budget}} for arch in (archs[winner], "cc/cc/none")]
    ((arch, rank, _, count),) = table.ranks(runs, archs, columns)
    assert (arch, rank, count) == (archs[winner], better + 1, int((energies <= budget).sum()))


def test_kendall_tau_counts_pairs():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 9, (2, 30))
    agree = ties_a = ties_b = 0
    for i, j in itertools.combinations(range(30), 2):
        agree += int(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]))
        ties_a += a[i] == a[j]
        ties_b += b[i] == b[j]
    pairs = 30 * 29 / 2
    assert table.kendall_tau(a, b) == pytest.approx(agree / np.sqrt((pairs - ties_a) * (pairs - ties_b)))


def test_a_ranking_is_that_of_all_networks_of_those_without_adds_and_of_the_best():
    truth = np.arange(40.0)
    plain = truth < 20
    scores = np.concatenate([truth[:20], 19 + truth[:0:-1][:20]])  # the adds, the better half, upside down
    found = sharing.ranking(scores, truth, plain)
    pairs = 40 * 39 / 2
    assert found["Kendall tau"] == pytest.approx((pairs - 2 * 20 * 19 / 2) / pairs)
    assert found["tau without adds"] == pytest.approx(1) and found["recall"] == 0
    assert sharing.ranking(truth, truth, plain)["recall"] == 1


def test_regrets_fall_to_zero_where_a_search_sees_every_network():
    archs, columns = random_table(40)
    columns["share_official"][:] = 0.4
    regrets = table.search_regrets(archs, columns, runs=3)
    for curve in regrets.values():
        assert curve.shape == (3, table.EVALUATIONS) and (np.diff(curve) <= 0).all()
    assert (regrets["random"][:, -1] == 0).all()


def test_regrets_are_written_as_after_the_last_evaluation():
    curve = np.tile([[3.0], [1.0], [2.0], [0.0], [4.0]], (1, table.EVALUATIONS))
    curve[:, 0] = 9
    lines = table.regret_lines({"val_accuracy": {"evolution": curve}})
    assert lines[-1] == "| evolution | val | 1.00 | 2.00 | 3.00 | 2.00 |"


def test_the_table_is_filled_from_where_it_stopped(tmp_path, monkeypatch, capsys):
    space = replace(table.SPACE, ops=("cs", "c", "c"))  # 4 networks, 8 trainings
    calls = []
    limits = [5, 8]  # jobs until an interruption

    def train_one(job):
        if len(calls) == limits[0]:
            raise KeyboardInterrupt
        calls.append(job)
        return job, 80.0 + job[0], 81.0 + job[1]

    for name, value in {"SPACE": space, "TABLE": tmp_path / "table.json", "train_one": train_one}.items():
        monkeypatch.setattr(table, name, value)
    monkeypatch.setattr(table, "side_by_side", lambda function, jobs, workers: map(function, jobs))
    with pytest.raises(KeyboardInterrupt):
        table.fill(1)
    assert sum(value is None for row in table.read_table()["test_accuracy"] for value in row) == 3
    limits.pop(0)
    table.fill(1)
    assert sorted(calls) == [(index, seed) for index in range(4) for seed in range(2)]  # each once
    whole = table.read_table()
    assert whole["val_accuracy"] == [[8000, 8100, 8200, 8300]] * 2
    assert whole["test_accuracy"] == [[8100] * 4, [8200] * 4]
    archs, columns = table.known_part(whole)
    assert archs == ["cc/cc/cc", "sc/cc/cc", "cs/cc/cc", "ss/cc/cc"] and columns["share_official"][0] == 1
    whole["test_accuracy"][1] = [None] * 4
    with pytest.raises(ValueError, match="no network that is trained with 2 seeds"):
        table.known_part(whole)
    monkeypatch.setattr(table, "RECIPE", {"epochs": 3})
    with pytest.raises(ValueError, match="was made with recipe"):
        table.read_table()


def test_the_table_in_the_repository_has_the_costs_of_the_cost_model():
    whole = table.read_table()
    assert whole["archs"] == [table.SPACE.arch(index) for index in range(2304)]
    for index in (0, 1000, 2303):
        costs = arch_costs(table.SPACE, whole["archs"][index])
        assert whole["params"][index] == costs["params"]
        assert whole["energy_mj_official"][index] == pytest.approx(costs["energy_mj"], rel=1e-4)
        assert whole["latency_ms"][index] == pytest.approx(costs["latency_ms"], rel=1e-3)
        uniform = arch_costs(table.SPACE, whole["archs"][index], accounting="uniform")
        assert whole["energy_mj_uniform"][index] == pytest.approx(uniform["energy_mj"], rel=1e-4)
    assert (ROOT / "results" / "table.json").stat().st_size < 400_000


def test_all_archs_scored_at_once_have_the_fitness_of_each_alone(monkeypatch):
    space = replace(table.SPACE, ops=("cs", "a", "at"))
    monkeypatch.setattr(sharing, "SPACE", space)
    monkeypatch.setattr(sharing, "FITNESS_IMAGES", 200)
    monkeypatch.setattr(images, "FITNESS_IMAGES", 200)
    data = images.load_images("", space)
    supernet = sharing.make_supernet(space, "heterogeneous").train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):  # batch norm has seen something
        supernet(torch.randn(8, 1, 28, 28, generator=generator), space.draw(generator))
    for block in supernet.modules():  # the last one starts at zero
        if isinstance(block, Block):
            torch.nn.init.ones_(block.bn3.weight)
    archs = [space.arch(index) for index in range(space.size())]
    accuracies = dict(zip(archs, sharing.inherited(supernet, data)))
    for arch in ("cc/aa/aa", "sc/aa/ta", "ss/aa/at"):
        assert accuracies[arch] == pytest.approx(data.fitness(supernet, arch), abs=1e-3)
    assert len(accuracies) == space.size() == 16


# ------------------------------------------------------------------------------------ tables of searches


def a_search(accuracies):
    """Return what summary() reads of a search: rows of {name: accuracy}, energies 4, 3, 2, ..."""
    rows = []
    for number, (name, accuracy) in enumerate(accuracies.items()):
        row = {"name": name, "arch": "cc/sa/tt", "test_accuracy": accuracy, "energy_mj": 4.0 - number}
        rows.append(row | {"latency_ms": 1.0, "params": 10})
    return {"settings": {"space": "fashion"}, "table": rows}


def test_a_summary_has_means_over_searches_and_the_differences_of_the_winner():
    runs = [a_search({"reference": 90, "random 1": 70, "random 2": 80, "winner": 88})]
    runs += [a_search({"reference": 92, "random 1": 60, "all-shift": 89, "winner": 89})]
    lines = search.summary(runs)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [row[1] for row in cells[2:6]] == ["reference", "random", "all-shift", "winner"]
    accuracies = ["91.00 ± 1.41", "67.50 ± 10.61 (60.0 to 80.0)", "89.00", "88.50 ± 0.71"]
    assert [row[2] for row in cells[2:6]] == accuracies
    assert cells[3][3] == "69 ± 9"  # energies 3, 2 and 3 of 4: means 62.5 and 75 %
    assert "-2.50 ± 0.50 against reference; +21.00 ± 8.00 against random; +0.00 against all-shift." in lines[-1]


@pytest.mark.parametrize("content", ["", "[]", '{"table": []}', '{"scores": {}, "table": [{}]}'])
def test_a_folder_without_a_whole_search_is_named(content, tmp_path):
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(ValueError, match="does not hold a whole search.json"):
        search.read_run(tmp_path)

"""Convert an official checkpoint of ShiftAddNAS (folder CV/retraining_hybrid) into one of train.py.

    python -m results.official official.pth --space bossnet_t0 --arch cc/cccc/sctaa/ttctt --out out

writes out/cc-cccc-sctaa-ttctt.pt in seconds, for `train.py --evaluate`, --predict and --init. The exponent
and sign of a DeepShift-PS layer become one weight, shift_weight(exponent, sign), which power_of_two does not
change: nothing is lost. Attention uses the matrix that published weights expect (deviation D1).
"""

import argparse
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

import train
from shiftaddnas import SPACES, AddConv2d, build, read_arch, shift_weight

OFFICIAL_NAMES = {  # parts of a network: ours -> theirs in a block of Res classes, in an attention block
    "conv1": ("conv1", "proj.0"),
    "peg": ("peg.conv", "proj.1.conv"),
    "bn": ("bn1", "proj.2"),
    "shortcut": ("downsample", "shortcut"),
    "middle": ("conv2", "net.1.to_qkv"),
    "bn2": ("bn2", "net.2"),
    "conv3": ("conv3", "net.4"),
    "bn3": ("bn3", "net.5"),
    "gate.reduce": ("se.fc1", ""),
    "gate.expand": ("se.fc2", ""),
    "stem.0": ("conv1", ""),
    "stem.1": ("bn1", ""),
    "head.fc": ("fc", ""),
    "head.distilled": ("dist_head", ""),
}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of the official images


def official_names(network):
    """Yield (name, official name) of each tensor of a retraining network (boss_models, boss_candidates)."""
    prefixes = []  # of the blocks
    for number, stage in enumerate(network.arch.split("/"), 1):
        prefixes += [f"layer{number}.{i}." for i in range(len(stage))]
    for name in network.state_dict():
        number, rest = re.fullmatch(r"(?:blocks\.(\d+)\.)?(?:entrances\.\w+\.)?(.*)", name).groups()
        block = network.blocks[int(number)] if number else None  # None: stem or head
        part = next(part for part in OFFICIAL_NAMES if rest.startswith(part + "."))
        leaf = rest.removeprefix(part + ".")
        module = OFFICIAL_NAMES[part][bool(block) and block.op == "attn"]
        module = prefixes[int(number)] + module if block else module
        if part == "shortcut":  # theirs always starts with a pool or an identity, ours has a pool or nothing
            (entrance,) = block.entrances.values()
            place, leaf = leaf.split(".", 1)
            module += f".{int(place) + 3 - len(entrance.shortcut)}"
        if isinstance(network.get_submodule(name.rpartition(".")[0]), AddConv2d):
            leaf = "adder"  # an add layer has no bias
        yield name, f"{module}.{'weight' if leaf == 'qkv' else leaf}"  # qkv: ours is a tensor, theirs a layer


def convert(tensors, space, arch, path="the checkpoint"):
    """Return the Network of an arch with official tensors {name: tensor}. ValueError if they do not fit."""
    network = build(space, arch)
    names = {official: name for name, official in official_names(network)}
    tensors = dict(tensors)  # a copy, in which layers of DeepShift-PS get one weight
    try:
        for shift in [name for name in tensors if name.endswith(".shift")]:
            module = shift.removesuffix("shift")
            tensors[module + "weight"] = shift_weight(tensors.pop(shift), tensors.pop(module + "sign"))
        network.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()})
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:500]  # what is missing, left over or misshapen
        raise ValueError(f"{path} does not fit {arch} of {space.name}: {reason}") from None
    return network.eval()


def read_official(path):
    """Return {name: tensor} of an official file; ValueError unless it holds tensors and plain values."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the official files hold their flags
            content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.detach() for name, tensor in content.get("model", content).items()}
    except OSError:  # it names the file
        raise
    except Exception:  # damaged files raise a dozen kinds, and each means the same to the user
        raise ValueError(f"{path} is not a checkpoint of tensors and plain values") from None


def main(argv=None):
    """Convert one file, as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", help="official checkpoint")
    parser.add_argument("--space", default="bossnet_t0", choices=["bossnet_t0", "bossnet_t1"])
    parser.add_argument("--arch", required=True, help="arch of the checkpoint, a string or a .json file")
    parser.add_argument("--out", default="out", help="output folder (default: out)")
    flags = parser.parse_args(argv)
    tensors = read_official(flags.file)
    changes = {"distilled": "dist_head.weight" in tensors, "official_attention": True}
    space = replace(SPACES[flags.space], **changes)
    arch = read_arch(space, flags.arch)
    network = convert(tensors, space, arch, flags.file)
    data = {name: torch.tensor(values).view(3, 1, 1) for name, values in IMAGENET.items()}
    data |= {"side": space.image, "class_names": None, "fingerprint": ""}  # None: the folders of a data set
    state = {
        "space": space.name, "space_changes": changes, "recipe": asdict(train.RECIPES[space.name]),
        "model": network.state_dict(), "arch": arch, "sharing": "none", "seed": 0, "data": data, "step": 0,
    }
    path = Path(flags.out) / f"{space.file_name(arch)}.pt"
    train.save(state, path)
    print(f"{len(tensors)} tensors, {1 + space.distilled} classifiers | saved {path}")


if __name__ == "__main__":
    train.run_command(main)

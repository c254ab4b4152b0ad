"""Trains a ShiftAddNAS supernet, or one fixed network, with one loop.

    python train.py                                       supernet of the fashion space -> out/supernet.pt
    python train.py --arch cc/sa/tt                       one network from scratch      -> out/cc-sa-tt.pt
    python train.py --arch cc/sa/tt --init out/supernet.pt          from inherited weights
    python train.py --space cifar10 --data cifar-10-batches-py      another data set
    python train.py --space translation                   Transformers -> out/translation/supernet.pt
    python train.py --translate net.pt                    translates standard input, line by line
    python train.py --evaluate net.pt --data FOLDER       a network's accuracy on the test images
    python train.py --convert official.pth --space bossnet_t0 --arch cc/cccc/sctaa/ttctt    official weights
    python train.py --benchmark --space hytra --image 64 --batch 16      time and memory of its steps
    torchrun --nproc-per-node 2 train.py --accumulate 2   two processes, each with its GPU if there are some

Each step draws archs uniformly, as many as a position has operators and each operator of a position equally
often, gives each a part of the images (--sampling single, and translation: one arch, as the official code
does), and minimises

    cross-entropy(supernet(x, archs), y) + kl_weight * divergence(archs)

Data: the embedded grey Fashion-MNIST (5,000 training, 1,000 validation, 2,000 test images), or --data with a
folder of IDX files, of the official CIFAR python batches, or of {train,test}_{images,labels}.npy (uint8
images N,H,W or N,H,W,C; val_* optional, else a sixth of the training images), memory-mapped, so ImageNet fits
too (results/scale.md has the 20 lines that make them from JPEG files). Images of another side than the
network's are resized: their central 7/8, but random parts with --crop. Run again with --resume after an
interruption: the losses are those of an uninterrupted run. Every run logs to <out>/<name>.jsonl.

The recipes of `hytra` and `bossnet_*` are the official ones, 300 epochs with crops, RandAugment, mixup,
cutmix and erasing, but: archs are drawn fairly; the first epochs train (theirs step at 1e-6); test images are
normalised as training images (theirs with other constants on CIFAR); a supernet is judged by fixed archs with
statistics of their own (theirs by random ones with shared statistics); crops are bilinear; RandAugment lacks
equalise and sharpen; drop-path, which their networks ignore, is left out; the network that is returned is the
--ema average (theirs keeps it, unused). They are written for 8 GPUs: `accumulate` passes of `batch` images.
"""

import argparse
import fcntl
import gzip
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shiftaddnas import EOS, PAD, SHARING, UNK, Supernet, TokenSpace, Translator, build, find_space


def flag(default, text, **limits):
    """A dataclass field that becomes a flag; limits: low (inclusive), above (exclusive), below (exclusive),
    choices; only: the kind of space, "translation" or "images", that it belongs to."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass
class Config:
    """Flags of train.py; also stored in each checkpoint."""

    space: str = flag("fashion", "search space")
    recipe: str = flag("", "settings to start from, a key of RECIPES in train.py; default: the space's")
    arch: str = flag("", "train this network, not the supernet: an arch string or a .json file with one")
    sharing: str = flag("heterogeneous", "weights of conv, shift and add", choices=tuple(SHARING))
    kl_weight: float = flag(0.01, "weight of the divergences of shared weights", low=0)
    kl: str = flag("density", "their form", choices=("density", "official"))
    sampling: str = flag(
        "fair", "archs of a batch: fair, each operator of a position equally often, or single, as published",
        choices=("fair", "single"), only="images"
    )
    shift_form: str = flag(
        "Q", "of shifts that share no weight: Q rounds one, PS has exponent and sign", choices=("Q", "PS")
    )
    official_attention: bool = flag(False, "attention as published weights expect it (D1)", only="images")
    one_head: bool = flag(False, "bossnet_*: no second classifier for --teacher", only="images")
    image: int = flag(0, "side of the images that enter the network; 0: the space's", low=0, only="images")
    classes: int = flag(0, "number of classes; 0: the space's", low=0, only="images")
    data: str = flag("", "folder of another data set (default: the embedded Fashion-MNIST)")
    epochs: int = flag(7, "passes over the training data", low=1)
    batch: int = flag(100, "images or sentences of a forward pass", low=2)
    accumulate: int = flag(1, "forward passes a step, all with one arch, shared by the processes", low=1)
    arch_per_pass: bool = flag(
        False, "each of these passes draws an arch, as each official GPU does: a step trains more cells, but "
        "each on 1 / --accumulate of the images"
    )
    lr: float = flag(4e-3, "peak learning rate of AdamW", above=0)
    schedule: str = flag("cosine", "of the learning rate after warm-up", choices=("cosine", "inverse-sqrt"))
    final_lr: float = flag(0.0, "learning rate at the end of the cosine", low=0)
    warmup: int = flag(0, "steps of linear warm-up; 0: an epoch", low=0)
    beta2: float = flag(0.999, "AdamW's second moment", low=0)
    weight_decay: float = flag(0.05, "AdamW decay of weights with more than one dimension", low=0)
    smoothing: float = flag(0.0, "label smoothing", low=0)
    crop: float = flag(
        0.0, "random parts of at least this share of images; 0: shifts by 1/14", low=0, below=1, only="images"
    )
    randaugment: float = flag(0.0, "magnitude, up to 10, of two random changes", low=0, only="images")
    erasing: float = flag(0.0, "share of images with a box of noise", low=0, only="images")
    mixup: float = flag(0.0, "mixes images with Beta(a, a) of this a", low=0, only="images")
    cutmix: float = flag(0.0, "the same with boxes; both: a coin a batch", low=0, only="images")
    repeats: int = flag(1, "copies of an image a step, of fewer images", low=1, only="images")
    clip: float = flag(0.0, "largest norm of a step's gradient; 0: any", low=0)
    ema: float = flag(0.0, "decay of the average of the weights; 0: none", low=0, below=1)
    average_epochs: int = flag(0, "mean of the weights after each of the last epochs; 0: the last", low=0)
    teacher: str = flag(
        "", "file of TorchScript or torch.export (.pt2): a program, be sure to trust it. Images in [0, 1] -> "
        "logits. Half of the loss is the cross-entropy of its class", only="images"
    )
    amp: bool = flag(False, "forward passes in bfloat16 (autocast)")
    checkpointing: bool = flag(False, "less memory: blocks run again in the backward pass", only="images")
    channels_last: bool = flag(False, "memory order of the images", only="images")
    compile: bool = flag(False, "torch.compile of the network of --arch")
    dropout: float = flag(0.0, "of a block of full width", low=0, only="translation")
    bits: int = flag(0, "quantise to so many bits; 0: not", low=0, only="translation")
    bpe: str = flag("2000", "byte pairs to merge; none: words, for text in pieces", only="translation")
    max_length: int = flag(200, "longest sentence, in pieces", low=1, only="translation")
    beam: int = flag(4, "hypotheses a sentence in decoding", low=1, only="translation")
    length_penalty: float = flag(0.6, "score / length ** this", low=0, only="translation")
    seed: int = flag(0, "seed of initialisation, images and archs", low=0)
    init: str = flag("", "with --arch: start from this checkpoint, of a supernet or of the network")
    out: str = flag("out", "output folder")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    resume: bool = flag(False, "continue an interrupted run")
    translate: str = flag("", "no training: checkpoint of a network that translates standard input")
    evaluate: str = flag("", "no training: checkpoint of a network that is tested")
    convert: str = flag("", "no training: official checkpoint of --arch, made one of this program")
    benchmark: bool = flag(False, "no training: times a few steps and loading, random images", only="images")


WMT = {"schedule": "cosine", "lr": 1e-3, "warmup": 10000, "beta2": 0.98, "weight_decay": 0.0}
WMT |= {"smoothing": 0.1, "dropout": 0.3, "bpe": "none", "epochs": 135, "batch": 120, "accumulate": 128}
WMT |= {"bits": 8}
IWSLT = WMT | {"schedule": "inverse-sqrt", "lr": 5e-4, "weight_decay": 1e-4, "dropout": 0.375, "epochs": 45}
IWSLT |= {"accumulate": 1, "bits": 0, "beam": 5, "length_penalty": 1.0, "clip": 25.0}
IMAGES = {"epochs": 300, "batch": 128, "accumulate": 8, "lr": 1e-3, "final_lr": 1e-5, "smoothing": 0.1}
IMAGES |= {"crop": 0.08, "randaugment": 9, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "repeats": 3}
BOSSNET = IMAGES | {"warmup": 6255, "ema": 0.99996}  # 5 epochs of ImageNet
RECIPES = {  # name -> settings that replace the defaults of train.py and search.py
    "translation": {"schedule": "inverse-sqrt", "beta2": 0.98, "weight_decay": 0.0, "smoothing": 0.1}
    | {"epochs": 4, "batch": 32, "lr": 2e-3, "out": "out/translation"}
    | {"budget": 0.75, "finalists": 2, "supernet_epochs": 8},
    "hytra": IMAGES | {"warmup": 240},  # 5 epochs of CIFAR-100
    "bossnet_t0": BOSSNET,
    "bossnet_t1": BOSSNET | {"batch": 112, "lr": 8.75e-4, "warmup": 7150},
    "wmt14_en_de": WMT,  # official supernet: 8 GPUs x 16 passes of 4,096 tokens a step, 40,000 steps
    "wmt14_en_de-subnet": WMT | {"warmup": 4000, "bits": 0},
    "wmt14_en_fr": WMT,
    "wmt14_en_fr-subnet": WMT | {"warmup": 4000, "bits": 0},
    "iwslt14_de_en": IWSLT,
    "iwslt14_de_en-subnet": IWSLT | {"warmup": 4000, "average_epochs": 10},
    "quick": {"epochs": 1, "supernet_epochs": 1, "generations": 1, "first": 6, "finalists": 1}
    | {"max_length": 24, "beam": 1},
}


# ----------------------------------------------------------------------------------------------- flags


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is a ValueError: one sentence, without a page of usage before it."""

    def error(self, message):
        raise ValueError(message)


def parse(config_class, manual, argv=None, hidden=()):
    """Command line -> config_class instance; `hidden` fields get no flag. ValueError for a bad value."""
    parser = OneLineParser(
        description=manual, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for f in fields(config_class):
        if f.name in hidden:
            continue
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool or f.type == "bool":
            parser.add_argument(name, action="store_true", help=text)
        else:
            text += f" (default: {f.default})" * (f.default != "")
            parser.add_argument(name, type=type(f.default), metavar=f.name.upper(), help=text)
    given = vars(parser.parse_args(argv))
    space = find_space(given.get("space", "fashion"))
    recipe = given.get("recipe", "")
    if recipe and recipe not in RECIPES:
        raise ValueError(f"--recipe {recipe!r} is unknown; known: {', '.join(RECIPES)}")
    known = {f.name for f in fields(config_class)}
    preset = RECIPES.get(recipe or space.name, {}) | (RECIPES["quick"] if given.get("quick") else {})
    preset = {key: value for key, value in preset.items() if key in known}
    config = config_class(**preset | given)
    for f in fields(config_class):
        check_flag(f, getattr(config, f.name))
        own = "translation" if isinstance(space, TokenSpace) else "images"
        if f.name in given and f.metadata.get("only", own) != own:
            only = f.metadata["only"]
            raise ValueError(f"--{f.name.replace('_', '-')} is for {only}, not for space {space.name}")
    return config


def space_of(config):
    """The search space as the flags change it."""
    space = find_space(config.space)
    if isinstance(space, TokenSpace):
        return space
    return replace(
        space, image=config.image or space.image, classes=config.classes or space.classes,
        distilled=space.distilled and not config.one_head, official_attention=config.official_attention,
    )


def check_flag(f, value):
    """ValueError that names the flag, its value and what is allowed."""
    name, limits = "--" + f.name.replace("_", "-"), f.metadata
    if "choices" in limits and value not in limits["choices"]:
        allowed = ", ".join(choice or "nothing" for choice in limits["choices"])
        raise ValueError(f"{name} {value!r} is unknown; allowed: {allowed}")
    if "low" in limits and not (value >= limits["low"] and math.isfinite(value)):
        raise ValueError(f"{name} must be at least {limits['low']}, got {value}")
    if "above" in limits and not (value > limits["above"] and math.isfinite(value)):
        raise ValueError(f"{name} must be above {limits['above']}, got {value}")
    if "below" in limits and value >= limits["below"]:
        raise ValueError(f"{name} must be below {limits['below']}, got {value}")


def use_device(name):
    """ValueError unless torch can put a tensor on the device. Makes runs on a GPU repeat, as those on a CPU
    do: same seed, same log."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if name.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # their gradients do not repeat
        torch.backends.cuda.enable_cudnn_sdp(False)


def rank():
    """Number of this process among those of torchrun; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(config):
    """Joins the processes that torchrun started, if it did: nccl on GPUs, one each, else gloo. Only the first
    writes files and the screen. ValueError if torch lacks the backend."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        return
    backend = "nccl" if gpus(config) else "gloo"
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise ValueError(f"--device {config.device} needs the backend {backend}, which this torch lacks")
    if config.device == "cuda":
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"process {number} of torchrun has no GPU of its own (of {count}); --device cpu")
        config.device = f"cuda:{number}"
        torch.cuda.set_device(config.device)
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    if rank():
        sys.stdout = open(os.devnull, "w")


def run_command(main):
    """Calls main(); expected errors become one line on stderr and exit code 2, Ctrl-C exit code 130. A reader
    that closes the pipe (head) ends the program without a word."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        file = isinstance(error, OSError) and error.filename
        print(f"{Path(sys.argv[0]).name}: {f'{file}: {error.strerror}' if file else error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; search.py goes on with the same command, train.py with --resume", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if processes() == 1:
            raise
        name, reason = Path(sys.argv[0]).name, str(error).splitlines()[0]
        print(f"{name}: process {rank()} stops, another one is gone: {reason}", file=sys.stderr)
        os._exit(1)  # the others cannot be waited for
    if dist.is_initialized():
        dist.destroy_process_group()


def read_arch(space, text):
    """An arch string, or JSON, as text or a .json file, with an arch under the key "arch" or, in translation,
    the arch itself -> validated arch."""
    if text.endswith(".json") or text.lstrip().startswith("{"):
        try:
            given = text.lstrip().startswith("{")
            content = json.loads(text if given else Path(text).read_text(encoding="utf-8"))
            arch = content if "encoder" in content else content["arch"]
            made_for = content.get("space", space.name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{text} is not JSON with a key "arch"') from None
        if made_for != space.name:
            raise ValueError(f"{text} holds an arch of space {made_for}, not of {space.name}")
        text = arch
    return space.validate(text)


def file_name(arch):
    """A name for the files of an arch: cc-sa-tt; types and a hash in translation."""
    if isinstance(arch, str):
        return arch.replace("/", "-")
    types = "-".join("".join(arch[part]["types"]) for part in ("encoder", "decoder"))
    return f"{types}-{hashlib.sha256(json.dumps(arch, sort_keys=True).encode()).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------------ data


class Split(NamedTuple):
    """images[index], labels[index]; images uint8 (N, H, W) or (N, H, W, C), maybe memory-mapped."""

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray

    def batch(self, rows, device="cpu"):
        """Rows of the split -> x (B, C, H, W) float in [0, 1], y (B,) int64."""
        rows = self.index[rows]
        x = torch.from_numpy(np.ascontiguousarray(self.images[rows])).to(device)
        x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
        return x.float() / 255, torch.from_numpy(self.labels[rows].astype(np.int64)).to(device)


class Data(NamedTuple):
    """Three splits, the normalisation, and how images are prepared."""

    train: Split
    val: Split
    test: Split
    mean: torch.Tensor  # (C, 1, 1) of the training images
    std: torch.Tensor
    side: int  # of the images that enter the network
    classes: int
    recipe: Config

    def describe(self):
        """What a checkpoint keeps of the data."""
        return {}

    def size(self):
        """Number of training images."""
        return len(self.train.index)

    def epoch(self, batch, generator):
        """Rows of each step of an epoch, (steps, batch), in a new order."""
        n, repeats = self.size(), self.recipe.repeats
        batch = min(batch, n)
        rows = torch.randperm(n, generator=generator)[: -(-n // repeats)].repeat_interleave(repeats)
        return rows[: n // batch * batch].view(-1, batch)

    def normalise(self, x):
        """Images in [0, 1] as the network takes them."""
        return (x - self.mean.to(x.device)) / self.std.to(x.device)

    def view(self, split, rows, device="cpu"):
        """x and labels of some rows as an evaluation sees them."""
        x, y = split.batch(rows, device)
        return self.normalise(fit(x, self.side)), y

    def batch(self, rows, generator):
        """Augmented x (B, C, side, side) and labels of some training rows, on the recipe's device; labels are
        probabilities (B, classes) if images are mixed."""
        recipe = self.recipe
        x, y = self.train.batch(rows.numpy(), recipe.device)
        if recipe.crop:
            x = random_crop(x, self.side, recipe.crop, generator)
        x = fit(x, self.side)
        if recipe.randaugment:
            x = rand_augment(x, recipe.randaugment, generator)
        x = self.normalise(x)
        if not recipe.crop:
            x = augment(x, generator)
        if recipe.erasing:
            x = erase(x, recipe.erasing, generator)
        if recipe.mixup or recipe.cutmix:
            x, y = mix(x, F.one_hot(y, self.classes).float(), recipe.mixup, recipe.cutmix, generator)
        return x, y


def load(config, space):
    """Images or sentences, as the space asks for."""
    if isinstance(space, TokenSpace):
        return load_sentences(config)
    return load_data(config.data, space, config)


def load_data(path, space, config=None):
    """Splits of a data set that fits the space, or ValueError that says which file or value does not."""
    folder = Path(path) if path else Path(__file__).parent / "data"
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist")
    try:
        arrays = read_arrays(folder, embedded=not path)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged pickle or archive can raise anything
        raise ValueError(f"{folder}: damaged or refused data file ({error})") from None
    for name in ("train", "val", "test"):
        if name + "_images" in arrays:
            check_images(folder, name, arrays[name + "_images"], arrays[name + "_labels"], space)
    train = arrays["train_images"], arrays["train_labels"]
    order = np.random.default_rng(0).permutation(len(train[1]))
    if "val_images" in arrays:
        val = Split(arrays["val_images"], arrays["val_labels"], np.arange(len(arrays["val_labels"])))
    else:
        held = len(order) // 6
        val, order = Split(*train, order[:held]), order[held:]
    test = Split(arrays["test_images"], arrays["test_labels"], np.arange(len(arrays["test_labels"])))
    train = Split(*train, order)
    if min(len(train.index), len(val.index), len(test.index)) < 2:
        raise ValueError(f"{folder}: needs at least 12 training and 2 test images")
    return make_data(train, val, test, space, config or Config())


def make_data(train, val, test, space, config):
    """Data with mean and deviation of the first 5,000 training images, or of 64 million values."""
    count = min(5000, len(train.index), max(1, 2**26 // train.images[0].size))
    sample, _ = train.batch(np.arange(count))
    mean, std = sample.mean((0, 2, 3)).view(-1, 1, 1), sample.std((0, 2, 3)).view(-1, 1, 1)
    return Data(train, val, test, mean, std.clamp_min(1e-3), space.image, space.classes, config)


def check_images(folder, name, images, labels, space):
    """ValueError unless images and labels of one split fit each other and the space."""
    shape, channels = images.shape[1:], () if space.in_channels == 1 else (space.in_channels,)
    if images.ndim < 3 or shape != (shape[0], shape[0], *channels) or images.dtype != np.uint8:
        wanted = "x".join(map(str, (space.image, space.image, *channels)))
        raise ValueError(
            f"{folder}: {name} images are {'x'.join(map(str, shape))} {images.dtype}; "
            f"space {space.name} takes {wanted}, or another square, uint8 (--data names another folder)"
        )
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {name} images but {len(labels)} labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < space.classes:
        raise ValueError(
            f"{folder}: {name} labels run from {labels.min()} to {labels.max()}; "
            f"space {space.name} has classes 0 to {space.classes - 1}"
        )


def read_arrays(folder, embedded):
    """Dict of {train,val,test}_{images,labels} arrays from any of the four formats."""
    if embedded:
        with np.load(folder / "fashion_mnist.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    if (folder / "train_images.npy").exists():
        names = [f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("images", "labels")]
        return {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in names
            if not name.startswith("val") or (folder / f"{name}.npy").exists()
        }
    for batches, tests, key in (
        (["train"], "test", b"fine_labels"),
        ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels"),
    ):
        if (folder / batches[0]).exists():
            train = [read_cifar(folder / name, key) for name in batches]
            test = read_cifar(folder / tests, key)
            return {
                "train_images": np.concatenate([images for images, _ in train]),
                "train_labels": np.concatenate([labels for _, labels in train]),
                "test_images": test[0],
                "test_labels": test[1],
            }
    files = {
        name: f"{prefix}-{kind}-idx{dims}-ubyte"
        for name, prefix, kind, dims in (
            ("train_images", "train", "images", 3),
            ("train_labels", "train", "labels", 1),
            ("test_images", "t10k", "images", 3),
            ("test_labels", "t10k", "labels", 1),
        )
    }
    if any((folder / (files["train_images"] + end)).exists() for end in ("", ".gz")):
        return {name: read_idx(folder / file) for name, file in files.items()}
    raise ValueError(
        f"{folder} holds none of train_images.npy, train-images-idx3-ubyte[.gz], data_batch_1 "
        "(CIFAR-10), train (CIFAR-100)"
    )


def read_idx(path):
    """An IDX file of unsigned bytes (the MNIST format), gzipped or not."""
    packed = path.with_name(path.name + ".gz")
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    dims = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw, ">u4", dims, 4) if dims and len(raw) >= 4 + 4 * dims else []
    if not dims or len(raw) != 4 + 4 * dims + math.prod(map(int, shape)):
        raise ValueError(f"{path} is not a whole IDX file of unsigned bytes")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain values; anything else a pickle asks for is refused."""

    def find_class(self, module, name):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array")


def read_cifar(path, key):
    """One official CIFAR batch -> images (N, 32, 32, 3) uint8, labels (N,)."""
    with open(path, "rb") as file:
        batch = ArrayUnpickler(file, encoding="bytes").load()
    if not isinstance(batch, dict) or np.shape(batch.get(b"data"))[1:] != (3072,):
        raise ValueError(f"{path} is not a CIFAR batch (a dict with b'data' of 3,072 bytes an image)")
    return batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(batch[key], dtype=np.int64)


def augment(x, generator):
    """Random shift by up to a fourteenth of the side, and a mirror image half of the time."""
    n, c, h, w = x.shape
    pad = max(1, h // 14)
    padded = F.pad(x, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    rows = (top[:, None] + torch.arange(h))[:, None, :, None]
    columns = left[:, None] + torch.arange(w)
    columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(c)[:, None, None]
    return padded[image, channel, rows, columns[:, None, None, :]]


# --------------------------------------------------------------------------------------- augmentation


def fit(x, side):
    """Images of another side: their central 7/8, resized (bicubic), as the official test images are."""
    if x.shape[-1] == side:
        return x
    edge = x.shape[-1] // 16
    x = x[..., edge : x.shape[-1] - edge, edge : x.shape[-1] - edge]
    return F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp_(0, 1)


def sample_at(x, rows, side, padding):
    """x (B, C, H, W) at the places `rows`, two lists (x, y) of three numbers or tensors (B,), gives to the
    output (x, y, 1), both from -1 to 1: (B, C, side, side), bilinear; "border" or "zeros" outside."""
    rows = [torch.stack([torch.as_tensor(v).to(x).expand(len(x)) for v in row], 1) for row in rows]
    theta = torch.stack(rows, 1)
    grid = F.affine_grid(theta, (*x.shape[:2], side, side), align_corners=False)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)


def uniform(count, low, high, generator):
    """`count` numbers between low and high."""
    return torch.rand(count, generator=generator) * (high - low) + low


def box_sizes(count, areas, ratio, generator):
    """(height, width) of random boxes, shares of the sides: areas uniform, aspect log-uniform."""
    area, log = uniform(count, *areas, generator), math.log(ratio)
    root = uniform(count, -log, log, generator).div(2).exp()
    return (area.sqrt() / root).clamp_max(1), (area.sqrt() * root).clamp_max(1)


def random_crop(x, side, least, generator):
    """A random part of each image, `least` to all of its area, 3/4 to 4/3 wide, resized; half of them
    mirrored."""
    height, width = box_sizes(len(x), (least, 1.0), 4 / 3, generator)
    down, right = ((1 - size) * uniform(len(x), -1, 1, generator) for size in (height, width))
    mirror = torch.where(torch.rand(len(x), generator=generator) < 0.5, -1.0, 1.0)
    return sample_at(x, [[width * mirror, 0.0, right], [0.0, height, down]], side, "border")


def grey(x):
    """Mean over the channels."""
    return x.mean(1, keepdim=True)


def geometric(rows):
    """A change of place, grey where there was no image; rows(level) as sample_at takes them."""
    return lambda x, m: sample_at(x - 0.5, rows(m.flatten()), x.shape[-1], "zeros") + 0.5


def levels(x, bits):
    """x rounded down to a grid of so many bits."""
    return (x * 2**bits).floor() / 2**bits


def stretch(x):
    """Each channel from 0 to 1."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(1 / 255)


RANDAUGMENT = (  # (x in [0, 1], level m (B, 1, 1, 1) in -1 .. 1); sizes as timm's increasing set
    geometric(lambda m: [[(m * 0.52).cos(), -(m * 0.52).sin(), 0], [(m * 0.52).sin(), (m * 0.52).cos(), 0]]),
    geometric(lambda m: [[1, 0.3 * m, 0], [0, 1, 0]]),
    geometric(lambda m: [[1, 0, 0], [0.3 * m, 1, 0]]),
    geometric(lambda m: [[1, 0, 0.9 * m], [0, 1, 0]]),
    geometric(lambda m: [[1, 0, 0], [0, 1, 0.9 * m]]),
    lambda x, m: x * (1 + 0.9 * m),  # brightness
    lambda x, m: x + 0.9 * m * (x - grey(x).mean((2, 3), keepdim=True)),  # contrast
    lambda x, m: x + 0.9 * m * (x - grey(x)),  # colour
    lambda x, m: levels(x, 4 - (4 * m.abs()).floor()),  # posterise
    lambda x, m: torch.where(x >= 1 - m.abs(), 1 - x, x),  # solarise
    lambda x, m: torch.where(x < 0.5, x + 0.43 * m.abs(), x),  # solarise-add
    lambda x, m: 1 - x,
    lambda x, m: stretch(x),
)


def rand_augment(x, magnitude, generator):
    """Twice, for each image with probability 1/2, one of RANDAUGMENT at a level of N(magnitude, 0.5) / 10."""
    x, count = x.clone(), len(RANDAUGMENT)
    for _ in range(2):
        kind = torch.randint(2 * count, (len(x),), generator=generator)
        level = (magnitude + 0.5 * torch.randn(len(x), generator=generator)).clamp_(0, 10) / 10
        level *= torch.where(torch.rand(len(x), generator=generator) < 0.5, -1.0, 1.0)
        level = level.to(x).view(-1, 1, 1, 1)
        for number, change in enumerate(RANDAUGMENT):
            rows = (kind == number).nonzero().flatten().to(x.device)
            if len(rows):
                x[rows] = change(x[rows], level[rows]).clamp_(0, 1)
    return x


def boxes(height, width, side, generator):
    """Masks (B, 1, side, side) of boxes anywhere in the image; sizes (B,) are shares of the side."""
    masks = []
    for size in (height, width):
        start = (1 - size) * torch.rand(len(size), generator=generator)
        place = (torch.arange(side) + 0.5) / side
        masks.append((place >= start[:, None]) & (place < (start + size)[:, None]))
    return (masks[0][:, :, None] & masks[1][:, None, :]).unsqueeze(1)


def erase(x, share, generator):
    """Noise N(0, 1) in a box of 2 to 33 % of a share of the images."""
    mask = boxes(*box_sizes(len(x), (0.02, 1 / 3), 10 / 3, generator), x.shape[-1], generator)
    mask &= (torch.rand(len(x), generator=generator) < share).view(-1, 1, 1, 1)
    seed = int(torch.randint(2**31, (), generator=generator))
    noise = torch.randn(x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(seed))
    return torch.where(mask.to(x.device), noise, x)


def mix(x, y, mixup, cutmix, generator):
    """(x, y) of a batch mixed with its reverse, y (B, classes): l x + (1 - l) x' with l from Beta(a, a), or a
    box of x' of the share 1 - l in x (cutmix); if both are wanted a coin decides."""
    cut = cutmix and not (mixup and torch.rand((), generator=generator) < 0.5)
    seed = int(torch.randint(2**31, (), generator=generator))
    share = np.random.default_rng(seed).beta(*[cutmix if cut else mixup] * 2)
    if cut:
        size = torch.tensor([math.sqrt(1 - share)])
        mask = boxes(size, size, x.shape[-1], generator)
        share = 1 - mask.float().mean().item()
        x = torch.where(mask.to(x.device), x.flip(0), x)
    else:
        x = share * x + (1 - share) * x.flip(0)
    return x, share * y + (1 - share) * y.flip(0)


# ------------------------------------------------------------------------------------------- sentences


class Vocabulary:
    """Text <-> ids. Pieces are bytes, each shown as the character of its number, joined by `merges`
    (byte-pair encoding), and decode(encode(text)) == text; or, if merges is None, words between spaces."""

    def __init__(self, pieces, merges=None):
        self.pieces, self.merges, self.known = pieces, merges, {}
        self.ids = {piece: number for number, piece in enumerate(pieces, UNK + 1)}
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges or [])}

    def __len__(self):
        return len(self.pieces) + UNK + 1

    def encode(self, text):
        """Ids of a text, EOS not included."""
        if self.merges is None:
            return [self.ids.get(word, UNK) for word in text.split()]
        return [number for word in byte_words(text) for number in self.encode_word(word)]

    def encode_word(self, word):
        """Ids of one word: the earliest learnt of its pairs is joined until there is none."""
        if word not in self.known:
            pieces = tuple(word)
            while pairs := [pair for pair in zip(pieces, pieces[1:]) if pair in self.ranks]:
                pieces = join_pair(pieces, min(pairs, key=self.ranks.get))
            self.known[word] = [self.ids[piece] for piece in pieces]
        return self.known[word]

    def decode(self, ids):
        """Text of ids; special ids are left out (an unknown word is <unk>), and "@@ " of official texts."""
        if self.merges is None:
            words = ["<unk>" if i == UNK else self.pieces[i - UNK - 1] for i in ids if i >= UNK]
            return " ".join(words).replace("@@ ", "")
        pieces = "".join(self.pieces[i - UNK - 1] for i in ids if i > UNK)
        return pieces.encode("latin-1").decode("utf-8", "replace")


def byte_words(text):
    """Words (each with the space before it), punctuation and other space, as byte strings in latin-1."""
    return [part.encode().decode("latin-1") for part in re.findall(r" ?\w+| ?[^\w\s]+|\s+", text)]


def join_pair(pieces, pair):
    """The pieces with each occurrence of the pair, from the left, joined to one."""
    joined, i = [], 0
    while i < len(pieces):
        width = 2 if pieces[i : i + 2] == pair else 1
        joined.append("".join(pieces[i : i + width]))
        i += width
    return tuple(joined)


def learn_bytes(texts, count):
    """Vocabulary of 256 bytes and up to `count` merges: each joins the most frequent pair of neighbours."""
    words = Counter(word for text in texts for word in byte_words(text))
    split, counts = [tuple(word) for word in words], list(words.values())
    pairs, where, merges = Counter(), defaultdict(set), []

    def tally(n, sign):
        for pair in zip(split[n], split[n][1:]):
            pairs[pair] += sign * counts[n]
            where[pair].add(n)
            if not pairs[pair]:
                del pairs[pair], where[pair]

    for n in range(len(split)):
        tally(n, 1)
    while len(merges) < count and pairs:
        best, frequency = max(pairs.items(), key=itemgetter(1))
        if frequency < 2:
            break
        merges.append(best)
        for n in sorted(where[best]):
            tally(n, -1)
            split[n] = join_pair(split[n], best)
            tally(n, 1)
    return Vocabulary([*map(chr, range(256)), *map("".join, merges)], merges)


class Sentences(NamedTuple):
    """Splits as lists of (source text, target text, source ids, target ids), and what made the ids."""

    vocabulary: Vocabulary
    train: list
    val: list
    test: list

    def describe(self):
        """What a checkpoint keeps of the data, to translate with."""
        return {"vocabulary": {"pieces": self.vocabulary.pieces, "merges": self.vocabulary.merges}}

    def size(self):
        """Number of training pairs."""
        return len(self.train)

    def epoch(self, batch, generator):
        """Rows of each step of an epoch, (steps, batch): sentences of like length, in a new order."""
        batch = min(batch, len(self.train))
        rows = torch.randperm(len(self.train), generator=generator)[: len(self.train) // batch * batch]
        lengths = torch.tensor([len(self.train[row][3]) for row in rows.tolist()])
        steps = rows[lengths.argsort(stable=True)].view(-1, batch)
        return steps[torch.randperm(len(steps), generator=generator)]

    def batch(self, rows, generator):
        """(source, target in, target out) of training rows, (B, S), (B, T), (B, T), padded."""
        return pad_pairs([self.train[row] for row in rows.tolist()])


def pad(lists):
    """Lists of ids -> (B, longest), PAD behind."""
    longest = max(map(len, lists))
    return torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in lists])


def pad_pairs(pairs):
    """(source, target in, target out): EOS ends source and target out, and starts target in."""
    source, target = ([pair[i] for pair in pairs] for i in (2, 3))
    return (
        pad([ids + [EOS] for ids in source]), pad([[EOS] + ids for ids in target]),
        pad([ids + [EOS] for ids in target]),
    )


def load_sentences(config):
    """Sentences of config.data: a TSV file, two text files "A,B", or six (training, validation, test pairs);
    "": the embedded Bible verses. Without files for them, validation and test are a fifteenth and a tenth of
    the lines, drawn with seed 0. Pairs longer than --max-length are left out and counted on the screen.
    ValueError that names file and line for text that is not UTF-8, unequal line counts, and lines empty on
    one side."""
    paths = (config.data or str(Path(__file__).parent / "data" / "bible_en_es.tsv.gz")).split(",")
    if len(paths) == 1:
        parts = [read_tsv(paths[0])]
    elif len(paths) in (2, 6):
        parts = [read_pair(*paths[i : i + 2]) for i in range(0, len(paths), 2)]
    else:
        raise ValueError(f"--data takes a TSV file, or 2 or 6 text files joined by commas, got {len(paths)}")
    if len(parts) == 1:
        order = np.random.default_rng(0).permutation(len(parts[0]))
        texts, cut = [parts[0][i] for i in order], (len(order) // 15, len(order) // 15 + len(order) // 10)
        parts = [texts[cut[1] :], texts[: cut[0]], texts[cut[0] : cut[1]]]
    if min(map(len, parts)) < 1:
        raise ValueError(f"{config.data}: sentence pairs are missing, a split needs one, a single file 15")
    if config.bpe == "none":
        words = Counter(word for pair in parts[0] for text in pair for word in text.split())
        vocabulary = Vocabulary([word for word, _ in words.most_common()])
    elif config.bpe.isdecimal():
        vocabulary = learn_bytes((text for pair in parts[0] for text in pair), int(config.bpe))
    else:
        raise ValueError(f"--bpe {config.bpe!r} must be a number of merges or none")
    splits = []
    for name, pairs in zip(("training", "validation", "test"), parts):
        pairs = [(*pair, *map(vocabulary.encode, pair)) for pair in pairs]
        splits.append([pair for pair in pairs if max(map(len, pair[2:])) <= config.max_length])
        if left_out := len(pairs) - len(splits[-1]):
            print(f"{left_out} of {len(pairs)} {name} pairs left out: over --max-length {config.max_length}")
        if not splits[-1]:
            raise ValueError(f"every {name} pair is over --max-length {config.max_length}")
    return Sentences(vocabulary, *splits)


def read_lines(path):
    """Lines of a UTF-8 text file, gzipped or not; ValueError with the number of a line that is not."""
    raw = Path(path).read_bytes()
    lines = (gzip.decompress(raw) if str(path).endswith(".gz") else raw).split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    return [decode_line(line, path, number).strip("\r") for number, line in enumerate(lines, 1)]


def decode_line(line, where, number):
    """Bytes -> text; ValueError with the number of a line that is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where}, line {number} is not UTF-8") from None


def read_tsv(path):
    """[(source, target)] of a file with a tab in each line."""
    rows = [line.split("\t") for line in read_lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise ValueError(f"{path}, line {number} has {len(row) - 1} tabs, needs one: source<TAB>target")
    return check_pairs(rows, path)


def read_pair(source, target):
    """[(source, target)] of two files, a sentence a line."""
    lines = read_lines(source), read_lines(target)
    if len(lines[0]) != len(lines[1]):
        raise ValueError(f"{source} has {len(lines[0])} lines, {target} {len(lines[1])}: they must be equal")
    return check_pairs(zip(*lines), f"{source}, {target}")


def check_pairs(rows, where):
    """The pairs without those empty on both sides; ValueError for one empty on one side only."""
    pairs = [(source.strip(), target.strip()) for source, target in rows]
    for number, (source, target) in enumerate(pairs, 1):
        if bool(source) != bool(target):
            raise ValueError(f"{where}, line {number} is empty on one side only")
    return [pair for pair in pairs if pair[0]]


# ------------------------------------------------------------------------------------------- files


def save(state, path):
    """torch.save to a temporary name, then rename: the file at `path` is always whole. Of several processes
    the first writes."""
    if rank():
        return
    replace_file(path, lambda temporary: torch.save(state, temporary))


def write_text(text, path):
    """The same for text."""
    if not rank():
        replace_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def replace_file(path, write):
    """write(temporary name), then rename. OSError that names the file, and no temporary file left behind, if
    it cannot be written (torch reports a full disk as a RuntimeError)."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        Path(temporary).unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write {path}: {reason}") from None


@contextmanager
def output_folder(path):
    """Makes the folder and keeps it to this run (of several processes, the first one's) until the end; the
    system frees it if the run is killed. ValueError if another run has it."""
    Path(path).mkdir(parents=True, exist_ok=True)
    with open(os.path.join(path, ".lock"), "w") as file:
        try:
            if not rank():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {path} is in use by another run; give another folder") from None
        yield


def load_checkpoint(path, **expected):
    """A checkpoint dict (tensors and plain values only). ValueError if damaged, or not as `expected`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {key: state[key] for key in ("model", "space", "arch", "config", "step")}
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path} does not exist") from None
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise ValueError(f"{path} is not a whole checkpoint of train.py") from None
    for key, value in expected.items():
        if found[key] != value:
            raise ValueError(f"{path} was made for {key} {found[key]!r}, this run asks for {value!r}")
    return state


def load_supernet(path, space):
    """The supernet of a checkpoint, in evaluation mode."""
    return load_model(load_checkpoint(path, space=space.name, arch=""), space, path)


def load_model(state, space, path):
    """The supernet or network of a checkpoint dict, in evaluation mode; the average of --ema if there is one.
    """
    data = Sentences(Vocabulary(**state["vocabulary"]), [], [], []) if "vocabulary" in state else None
    model = make_model(Config(**state["config"]), space, data, state["arch"])
    average = {name.removeprefix("module."): t for name, t in state.get("average", {}).items()}
    average.pop("n_averaged", None)
    fill(model.state_dict(), average or state["model"], path)
    return model.eval()


@torch.no_grad()
def fill(own, tensors, path):
    """Copies tensors by name into a state dict; ValueError, naming the first five, if some are missing, left
    over or of another shape."""
    for what, names in (
        ("lacks", [name for name in own if name not in tensors]),
        ("has, beyond the network,", [name for name in tensors if name not in own]),
        ("has in another shape", [n for n in own if n in tensors and own[n].shape != tensors[n].shape]),
    ):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{path} {what} {len(names)} tensors: {shown}")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


OFFICIAL_NAMES = {  # of the parts of a block: ours -> those of its Res classes and of its attention block
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


def official_tensors(network):
    """The tensors of a retraining network under their official names, exponent and sign of a PS shift apart.
    Source: CV/retraining_hybrid, boss_models.py and boss_candidates."""
    stages, found = network.arch.split("/"), {}
    prefixes = [f"layer{s}.{i}." for s, stage in enumerate(stages, 1) for i in range(len(stage))]
    for name, tensor in network.state_dict().items():
        prefix, op = "", "conv"
        if name.startswith("blocks."):
            _, number, name = name.split(".", 2)
            block, prefix = network.blocks[int(number)], prefixes[int(number)]
            op = block.op
            name = re.sub(r"^entrances\.\w+\.", "", name)
        part = next(part for part in OFFICIAL_NAMES if name.startswith(part + "."))
        leaf, theirs = name[len(part) + 1 :], prefix + OFFICIAL_NAMES[part][op == "attn"]
        if part == "shortcut":  # theirs starts with a pool or an identity
            (entrance,) = block.entrances.values()
            place, leaf = leaf.split(".", 1)
            theirs += f".{int(place) + 3 - len(entrance.shortcut)}"
        if tensor.ndim == 5:
            found |= {f"{theirs}.shift": tensor[0], f"{theirs}.sign": tensor[1]}
        elif leaf in ("weight.w", "qkv"):
            found[f"{theirs}.adder" if op == "add" else f"{theirs}.weight"] = tensor
        else:
            found[f"{theirs}.{leaf}"] = tensor
    return found


def convert(config, space, arch, path):
    """Makes the checkpoint `path` of an official one (of CV/retraining_hybrid): each tensor is used once.
    Whether shifts are PS or Q, and whether there is a second classifier, is read from the names."""
    if not arch or isinstance(space, TokenSpace) or not space.retraining:
        raise ValueError("--convert needs --space bossnet_t0 or bossnet_t1 and --arch")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the official files hold their flags
            tensors = torch.load(config.convert, map_location="cpu", weights_only=True)
        tensors = tensors.get("model", tensors)
        form = "PS" if any(name.endswith(".sign") for name in tensors) else "Q"
    except (RuntimeError, EOFError, AttributeError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise ValueError(f"{config.convert} is not a checkpoint of tensors and plain values") from None
    one_head = "dist_head.weight" not in tensors
    made = replace(config, convert="", official_attention=True, one_head=one_head, shift_form=form)
    network = make_model(made, space_of(made), None, arch)
    fill(official_tensors(network), tensors, config.convert)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    state = {"model": network.state_dict(), "config": asdict(made), "space": space.name, "arch": arch}
    save(state | {"step": 0}, path)
    print(f"{len(tensors)} tensors, {form} shifts, {2 - one_head} classifiers | saved {path}")


# ---------------------------------------------------------------------------------------- training


SAVE_SHARE = 0.02  # of the time may go into checkpoints


@contextmanager
def interruptible():
    """Ctrl-C and SIGTERM only fill the yielded list, so that the step at hand can end and be saved."""
    stop, signals = [], (signal.SIGINT, signal.SIGTERM)
    try:
        old = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in signals}
    except ValueError:  # not in the main thread: signals are somebody else's
        old = {}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def make_optimizer(model, config):
    """AdamW; vectors (batch norm, bias, slopes of T) get no decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (0.9, config.beta2)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config, step, per_epoch):
    """Linear warm-up (at most a quarter of the steps), then a half cosine to final_lr at the last step, or
    proportional to the inverse square root of the step."""
    total = config.epochs * per_epoch
    warm = min(config.warmup or per_epoch, total // 4)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "inverse-sqrt":
        return config.lr * math.sqrt(max(1, warm) / (step + 1))
    share = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    return config.final_lr + (config.lr - config.final_lr) * share


def train(config, space, data, model, arch, path):
    """Trains `model` (a Supernet if arch is "", else the Network of arch), checkpoint at `path`; returns it,
    or its average (--ema, --average-epochs).

    Started by torchrun, each process makes its share of a step's `accumulate` passes, and their gradients are
    added up: a step is the same for any number of processes, but for batch norm's running statistics, which
    are the first one's. (Not DistributedDataParallel: one path a step leaves most parameters without a
    gradient, and the divergence is outside forward.)

    Goes on from `path` if config.resume. Ctrl-C and SIGTERM save after the step at hand. A kill loses the
    steps since the last checkpoint, which the resumed run repeats exactly; a checkpoint is due as soon as
    writing it costs less than SAVE_SHARE of the time (`fashion` supernet: every two seconds or so).
    Raises ValueError, naming the arch, at the first loss that is not finite, and if the processes cannot
    share the passes equally, or there is clearly too little memory.
    """
    if config.accumulate % processes():
        raise ValueError(f"--accumulate {config.accumulate} is no multiple of the {processes()} processes")
    optimizer, average, teacher = prepare(config, space, data, model, arch)
    generator = torch.Generator().manual_seed(config.seed)
    per_epoch = max(1, data.size() // (config.batch * config.accumulate))
    step, steps, order, losses = 0, config.epochs * per_epoch, None, []
    torch.manual_seed(config.seed)  # of dropout
    if config.resume and os.path.exists(path):
        step, order = restore(path, config, space, arch, model, optimizer, generator, average)
    first, save_after = step, (started := time.monotonic())
    with open_log(Path(path).with_suffix(".jsonl"), step) as log, interruptible() as stop:
        while step < steps:
            if step % per_epoch == 0:
                order = data.epoch(config.batch * config.accumulate, generator)
            archs, *work = draw_step(config, space, data, arch, order[step % per_epoch], generator)
            loss, loss_ce, stopped = take_step(config, model, optimizer, arch, archs, *work, teacher, stop)
            drawn = archs if config.arch_per_pass else archs[0]
            if not math.isfinite(loss):
                raise ValueError(f"the loss became {loss} at step {step} with arch {drawn}")
            update(config, model, optimizer, average, step, per_epoch)
            step += 1
            losses.append(loss)
            log.write(json.dumps({"step": step, "loss": loss, "ce": loss_ce, "arch": drawn}) + "\n")
            if step % per_epoch == 0:
                print_step(path, step, steps, losses, (time.monotonic() - started) / (step - first))
                losses = []
            begun = time.monotonic()
            if stopped or step == steps or begun > save_after:
                log.flush()
                state = checkpoint(config, space, arch, model, optimizer, generator, average, step, order)
                save(state | data.describe(), path)
                save_after = time.monotonic() + (time.monotonic() - begun) / SAVE_SHARE
            if stopped:
                raise KeyboardInterrupt
    return share_buffers(average.module if average else model).eval()


def update(config, model, optimizer, average, step, per_epoch):
    """Moves the weights along the gradient, by the step's learning rate, and takes them into the average."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, per_epoch)
    if config.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    last = config.epochs - (step + 1) // per_epoch < config.average_epochs and (step + 1) % per_epoch == 0
    if average and (config.ema or last):
        average.update_parameters(model)


def prepare(config, space, data, model, arch):
    """Puts the model on its device, as the flags ask for; (optimizer, average or None, teacher or None)."""
    model.to(config.device).train()
    model.checkpointing = config.checkpointing
    require_memory(config, space, model, arch)
    average = None
    if config.ema and config.average_epochs:
        raise ValueError(f"--ema {config.ema} excludes --average-epochs {config.average_epochs}")
    if config.ema or config.average_epochs:
        decay = get_ema_multi_avg_fn(config.ema) if config.ema else None
        average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
    if config.compile and not arch:
        raise ValueError("--compile needs --arch: a supernet takes another path each step")
    if config.compile:
        model.compile()
    teacher = load_teacher(config, space, data) if config.teacher else None
    return make_optimizer(model, config), average, teacher


def load_teacher(config, space, data):
    """x as the student takes it -> the class (B,) that the network of config.teacher sees. ValueError if it
    cannot be read, or knows another number of classes."""
    try:
        if config.teacher.endswith(".pt2"):
            network = torch.export.load(config.teacher).module().to(config.device)
        else:
            network = torch.jit.load(config.teacher, map_location=config.device).eval()
        logits = network(torch.rand(config.batch, len(data.mean), data.side, data.side, device=config.device))
    except (RuntimeError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"--teacher {config.teacher} is no network for these images: {reason}") from None
    if not isinstance(logits, torch.Tensor):
        found = type(logits).__name__
        raise ValueError(f"--teacher {config.teacher} gives a {found}, not one tensor of logits")
    if logits.shape != (config.batch, space.classes):
        raise ValueError(
            f"--teacher {config.teacher} gives {' x '.join(map(str, logits.shape[1:]))} logits an image; the "
            f"student has {space.classes} classes"
        )
    mean, std = data.mean.to(config.device), data.std.to(config.device)
    return lambda x: network(x * std + mean).argmax(1)


def activation_bytes(config, space, arch):
    """What the backward pass of a batch of images keeps of the forward pass, counted on the meta device."""
    sizes, batch = {}, config.batch

    def keep(tensor):
        if tensor.shape[:1] == (batch,):
            sizes[tensor.untyped_storage()._cdata] = tensor.numel() * tensor.element_size()
        return tensor

    drawn = () if arch else (space.sample(torch.Generator().manual_seed(0)),)
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = torch.empty(batch, space.in_channels, space.image, space.image)
        graph = make_model(config, space, None, arch)(x, *drawn)  # keeps the storages, so none counts twice
        total = sum(sizes.values())
    del graph
    return total


def free_bytes(device):
    """Memory that is free on a device; inf where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return math.inf


def memory_bytes(config, space, model, arch):
    """(gradients, both moments and average; activations) that training adds to the weights, from below."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    images = not isinstance(space, TokenSpace) and not config.checkpointing
    activations = activation_bytes(config, space, arch) if images else 0
    return weights * (3 + bool(config.ema or config.average_epochs)), activations // (2 if config.amp else 1)


def require_memory(config, space, model, arch):
    """ValueError if training needs more than is free."""
    state, activations = memory_bytes(config, space, model, arch)
    local = 1 if gpus(config) else processes()
    need, free = local * (state + activations), free_bytes(config.device)
    if need > free:
        raise ValueError(
            f"training needs at least {need / 2**30:.1f} GiB (gradients and AdamW {state / 2**30:.1f}, a "
            f"batch {activations / 2**30:.1f}, times {local} processes) but {free / 2**30:.1f} GiB are free; "
            "a smaller --batch with more --accumulate, or --checkpointing, needs less"
        )


def share_buffers(model):
    """The model; of several processes all get the first one's batch-norm statistics, and wait for its
    checkpoint."""
    if processes() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        dist.barrier()
    return model


def draw_step(config, space, data, arch, rows, generator):
    """(archs, batches, generators) of one step: the archs of all processes' passes, this one's batches and a
    generator for each. Several passes have seeds of their own, so that a process need not load what others
    do; copies of an image (--repeats) go to different passes."""
    count = min(config.accumulate, len(rows))
    parts = [rows[i::count] for i in range(count)]
    generators = [generator]
    if len(parts) > 1:
        seeds = torch.randint(2**31, (len(parts),), generator=generator).tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[rank() :: processes()]]
    own = zip(parts[rank() :: processes()], generators)
    batches = [[t.to(config.device) for t in data.batch(part, source)] for part, source in own]
    count = len(parts) if config.arch_per_pass else 1
    fair = config.sampling == "fair" and not isinstance(space, TokenSpace)
    draw = space.sample_fairly if fair else space.sample
    return [arch or draw(generator) for _ in range(count)], batches, generators


def take_step(config, model, optimizer, arch, archs, batches, generators, teacher, stop=()):
    """Gradients of one step, summed over all processes: (loss, cross-entropy, whether one is to stop)."""
    optimizer.zero_grad()
    means, count = [0.0, 0.0], len(batches) * processes()
    drawn = (archs * config.accumulate)[: config.accumulate][rank() :: processes()]
    for number, batch in enumerate(batches):
        pair = losses_of(config, model, arch, drawn[number], batch, generators[number], teacher)
        (pair[0] / count).backward()
        means = [mean + loss.item() / count for mean, loss in zip(means, pair)]
    if config.arch_per_pass:
        level_gradients(model)
    return add_up(model, [*means, float(len(stop))])


def level_gradients(model):
    """A parameter that another process has a gradient of gets zeros here."""
    if processes() == 1:
        return
    parameters = list(model.parameters())
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(reached)
    for parameter, count in zip(parameters, reached.tolist()):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def add_up(model, numbers):
    """Replaces gradients by their sums over all processes, in one message; returns the numbers' sums."""
    if processes() == 1:
        return numbers
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    message = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor(numbers)])
    dist.all_reduce(message)
    *sums, tail = message.split([g.numel() for g in gradients] + [len(numbers)])
    for gradient, total in zip(gradients, sums):
        gradient.copy_(total.view_as(gradient))
    return tail.tolist()


def losses_of(config, model, arch, drawn, batch, generator, teacher=None):
    """(loss + kl_weight * divergence, loss); fixed networks have no divergence. The loss is the
    cross-entropy, in translation a target token's, padding left out; of two classifiers the mean of both. A
    teacher's class replaces the label for the second, or for half of the loss of the only one."""
    *inputs, y = batch
    if config.channels_last:
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.amp):
        logits = model(*inputs) if arch else model(*inputs, drawn)
    ignored = PAD if isinstance(model, Translator) else -100

    def loss_of(logits, y, smoothing=config.smoothing):
        y = y if y.is_floating_point() else y.flatten()
        logits = logits.float().flatten(0, -2)
        return F.cross_entropy(logits, y, ignore_index=ignored, label_smoothing=smoothing)

    first, second = logits if isinstance(logits, tuple) else (logits, logits)
    loss_ce = loss_of(first, y)
    if teacher:
        with torch.no_grad():
            seen = teacher(inputs[0])
        loss_ce = (loss_ce + loss_of(second, seen, 0.0)) / 2
    elif second is not first:
        loss_ce = (loss_ce + loss_of(second, y)) / 2
    if arch or not config.kl_weight:
        return loss_ce, loss_ce
    settings = () if isinstance(model, Translator) else (config.kl, generator)
    return loss_ce + config.kl_weight * model.divergence(drawn, *settings), loss_ce


def gpus(config):
    """The GPU of this process, as a list; empty if it runs on another device."""
    return [config.device] if config.device.startswith("cuda") else []


def checkpoint(config, space, arch, model, optimizer, generator, average, step, order):
    """All that an exact continuation needs, as one dict of tensors and plain values."""
    return ({"average": average.state_dict()} if average else {}) | {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": asdict(config),
        "space": space.name,
        "arch": arch,
        "step": step,
        "order": order,
        "generator": generator.get_state(),
        "torch_rng": [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in gpus(config))],  # dropout
    }


def print_step(path, step, steps, losses, seconds):
    """One line: where, loss since the last line, rate, time left."""
    print(
        f"{Path(path).stem}  step {step}/{steps} | loss {sum(losses) / len(losses):.3f} | "
        f"{1e3 * seconds:.0f} ms a step | {(steps - step) * seconds:.0f} s left",
        flush=True,
    )


def open_log(path, step):
    """The log, cut back to the lines of the steps that the checkpoint has."""
    if rank():
        return open(os.devnull, "a")
    lines = path.read_text().splitlines(keepends=True)[:step] if path.exists() and step else []
    write_text("".join(lines), path)
    return open(path, "a", encoding="utf-8")


def same_flags(path, state, config, keys):
    """ValueError unless a checkpoint was made with the flags of this run."""
    for key in sorted(keys):
        if state["config"].get(key) != getattr(config, key):
            raise ValueError(
                f"{path} was made with --{key.replace('_', '-')} {state['config'].get(key)!r}, "
                f"this run asks for {getattr(config, key)!r}; give the same flags or another --out"
            )


def restore(path, config, space, arch, model, optimizer, generator, average):
    """Loads models, optimizer and random states from a checkpoint of the same run; returns (step, order)."""
    state = load_checkpoint(path, space=space.name, arch=arch)
    same_flags(path, state, config, asdict(config).keys() - {"resume", "out", "device"})
    fill(model.state_dict(), state["model"], path)
    if average:
        average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["torch_rng"][0])
    for device, drawn in zip(gpus(config), state["torch_rng"][1:]):
        torch.cuda.set_rng_state(drawn, device)
    return state["step"], state["order"]


# ------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def accuracy(network, data, split, device="cpu", batch=500):
    """Share of the images of a split that a network in evaluation mode gets right, in percent."""
    network.eval()
    right = 0
    for rows in np.array_split(np.arange(len(split.index)), max(1, len(split.index) // batch)):
        x, y = data.view(split, rows, device)
        right += (network(x).argmax(1) == y).sum().item()
    return 100 * right / len(split.index)


@torch.no_grad()
def recalibrate(network, data, images=500, device="cpu"):
    """Batch-norm statistics of an extracted subnet from the first training images: those it inherits are
    averages over other archs. The network is left in evaluation mode; its weights are untouched."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain average over the batches
    x, _ = data.view(data.train, np.arange(min(images, len(data.train.index))), device)
    network.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


@torch.no_grad()
def token_loss(model, pairs, arch=None, device="cpu", batch=200):
    """(cross-entropy in nats a target token, share of tokens predicted right in percent) on sentence pairs,
    the true words before each given."""
    model.eval()
    pairs, loss, right, count = sorted(pairs, key=lambda pair: len(pair[3])), 0.0, 0, 0
    for start in range(0, len(pairs), batch):
        source, target, y = (t.to(device) for t in pad_pairs(pairs[start : start + batch]))
        logits = model(source, target, arch).flatten(0, 1)
        loss += F.cross_entropy(logits, y.flatten(), ignore_index=PAD, reduction="sum").item()
        right += ((logits.argmax(1) == y.flatten()) & (y.flatten() != PAD)).sum().item()
        count += (y != PAD).sum().item()
    return loss / count, 100 * right / count


@torch.no_grad()
def beam_search(model, source, beam=4, penalty=0.6, limit=None):
    """Best translation of each row of source (B, S): a list of B lists of ids.

    Keeps `beam` beginnings of a sentence; one that ends, by EOS or at `limit` tokens (default 2 S + 10), is
    scored by log p / length ** penalty, its EOS counted, and leaves its place empty. Ends when no beginning
    can beat the best ended one. beam 1 is greedy decoding.
    """
    B, limit, outputs = len(source), limit or 2 * source.shape[1] + 10, model.encode(source)
    memory = [x.repeat_interleave(beam, 0) for x in outputs[0]], outputs[1].repeat_interleave(beam, 0)
    caches, tokens = model.new_caches(), source.new_full((B * beam, 1), EOS)
    scores = torch.full((B, beam), -math.inf, device=source.device)
    scores[:, 0], best = 0.0, [(-math.inf, [])] * B
    written = source.new_zeros(B, beam, 0)
    for length in range(1, limit + 1):
        log_p = model.decode(tokens, memory, None, caches)[:, 0].log_softmax(1).view(B, beam, -1)
        log_p[..., PAD] = -math.inf
        scores, index = (scores.unsqueeze(2) + log_p).flatten(1).topk(beam)
        origin, token = index // log_p.shape[2], index % log_p.shape[2]
        written = written.gather(1, origin.unsqueeze(2).expand(-1, -1, length - 1))
        ended = (token == EOS) | (length == limit)
        for b, k in (ended & scores.isfinite()).nonzero().tolist():
            final = scores[b, k].item() / length**penalty
            words = written[b, k].tolist() + [token[b, k].item()] * (token[b, k].item() != EOS)
            best[b] = max(best[b], (final, words))
        scores = scores.masked_fill(ended, -math.inf)
        written = torch.cat([written, token.unsqueeze(2)], 2)
        hope = scores.amax(1) / limit**penalty
        if all(score >= bound for (score, _), bound in zip(best, hope.tolist())):
            break
        tokens, rows = token.view(-1, 1), (origin + beam * torch.arange(B, device=origin.device)[:, None])
        for cache in (part for layer in caches for part in layer[:2]):
            for key, kept in cache.items():
                kept = kept if isinstance(kept, tuple) else (kept,)
                kept = tuple(t.index_select(0, rows.flatten()) for t in kept)
                cache[key] = kept if key == "kv" else kept[0]
    return [words for _, words in best]


def translate(model, vocabulary, texts, config, batch=200):
    """Translations of texts, by beam search, sentences of like length together."""
    model.eval()
    ids = [vocabulary.encode(text)[: config.max_length] + [EOS] for text in texts]
    order, found = sorted(range(len(ids)), key=lambda row: len(ids[row])), [""] * len(ids)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        source = pad([ids[row] for row in rows]).to(config.device)
        for row, words in zip(rows, beam_search(model, source, config.beam, config.length_penalty)):
            found[row] = vocabulary.decode(words).strip() if texts[row].strip() else ""
    return found


def tokenise_13a(line):
    """Words as mteval-v13a, and so sacreBLEU's default, has them: western punctuation stands alone."""
    line = line.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(entity, character)
    line = re.sub(r"([{-~[-` -&(-+:-@/])", r" \1 ", f" {line} ")
    line = re.sub(r"([^0-9])([.,])", r"\1 \2 ", line)
    line = re.sub(r"([.,])([^0-9])", r" \1 \2", line)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()


def bleu(hypotheses, references):
    """Corpus BLEU of one reference a sentence, as sacreBLEU's default: 13a words, exponential smoothing.

        BLEU = min(1, e^(1 - r/h)) * (p1 p2 p3 p4)^(1/4) * 100,  h, r lengths of hypotheses and references

    p_n: share of the n-grams that the reference has too, each counted at most as often as there; the k-th p_n
    without a match is 1 / (2^k * n-grams). 0 if nothing matches or no sentence has n words.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but {len(references)} references")
    matched, total, lengths = [0] * 4, [0] * 4, [0, 0]
    for pair in zip(hypotheses, references):
        words = [tokenise_13a(text.rstrip()) for text in pair]
        lengths = [length + len(own) for length, own in zip(lengths, words)]
        for n in range(4):
            own, other = (Counter(zip(*(text[i:] for i in range(n + 1)))) for text in words)
            matched[n] += (own & other).total()
            total[n] += own.total()
    if not any(matched) or 0 in total:
        return 0.0
    unmatched, logs = 0, []
    for hits, count in zip(matched, total):
        unmatched += hits == 0
        logs.append(math.log((hits or 2.0**-unmatched) / count))
    brevity = min(1.0, math.exp(1 - lengths[1] / lengths[0]))
    return 100 * brevity * math.exp(sum(logs) / 4)


def make_model(config, space, data, arch):
    """An untrained network of the arch, or the supernet if it is ""."""
    if isinstance(space, TokenSpace):
        size = len(data.vocabulary)
        return Translator(space, size, arch, config.sharing, config.seed, config.dropout, config.bits)
    if arch:
        return build(space, arch, config.shift_form, config.seed)
    return Supernet(space, replace(SHARING[config.sharing], shift_form=config.shift_form), config.seed)


def tested(config, data, network):
    """What a trained network reaches on the test split: {"test_accuracy"}, in translation "bleu" too."""
    if not isinstance(data, Sentences):
        return {"test_accuracy": accuracy(network, data, data.test, config.device)}
    _, right = token_loss(network, data.test, device=config.device)
    found = translate(network, data.vocabulary, [pair[0] for pair in data.test], config)
    return {"test_accuracy": right, "bleu": bleu(found, [pair[1] for pair in data.test])}


def inherit(config, space, arch):
    """The network of the arch with the weights of the checkpoint config.init, of a supernet or of itself."""
    state = load_checkpoint(config.init, space=space.name)
    if not state["arch"]:
        return load_model(state, space, config.init).extract(arch)
    load_checkpoint(config.init, arch=arch)
    form = ("shift_form", "official_attention", "one_head", "classes", "bits")
    same_flags(config.init, state, config, form)
    return load_model(state, space, config.init)


def read_network(path):
    """(network, Config it was made with, its space, its checkpoint dict)."""
    state = load_checkpoint(path)
    trained = Config(**state["config"])
    space = space_of(trained)
    if not state["arch"]:
        raise ValueError(f"{path} is a supernet, not one network")
    return load_model(state, space, path), trained, space, state


def translate_stdin(config):
    """Writes the translation of each line of standard input as soon as it is read. A line over --max-length
    is cut, which a line on stderr says. ValueError with the number of a line that is not UTF-8."""
    model, _, space, state = read_network(config.translate)
    if not isinstance(space, TokenSpace):
        raise ValueError(f"--translate {config.translate}: not the checkpoint of a translation network")
    model, vocabulary = model.to(config.device), Vocabulary(**state["vocabulary"])
    for number, raw in enumerate(sys.stdin.buffer, 1):
        line = decode_line(raw, "standard input", number).strip()
        if (pieces := len(vocabulary.encode(line))) > config.max_length:
            cut = f"line {number} has {pieces} pieces, cut to --max-length {config.max_length}"
            print(cut, file=sys.stderr)
        print(*translate(model, vocabulary, [line], config), flush=True)


def evaluate(config):
    """Prints the accuracy of a network on the test images of --data, at --image if given."""
    model, trained, space, _ = read_network(config.evaluate)
    if isinstance(space, TokenSpace):
        raise ValueError(f"--evaluate {config.evaluate}: not the checkpoint of a network of images")
    if config.space not in (Config.space, space.name):
        raise ValueError(f"--evaluate {config.evaluate}: space {space.name}, not --space {config.space}")
    trained = replace(trained, image=config.image or trained.image)
    data = load_data(config.data, space_of(trained), config)
    reached = accuracy(model.to(config.device), data, data.test, config.device)
    print(f"{model.arch} | test_accuracy {reached:.2f} | {len(data.test.index)} images of side {data.side}")


def benchmark(config, space, arch, steps=3):
    """Prints speed of loading and augmentation, time of a step and memory, for random images."""
    shape = (2 * config.batch * config.accumulate, *[space.image] * 2, *[3] * (space.in_channels == 3))
    split = Split(
        np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
        np.arange(shape[0]) % space.classes, np.arange(shape[0]),
    )
    data, generator = make_data(split, split, split, space, config), torch.Generator().manual_seed(0)
    model = make_model(config, space, data, arch)
    optimizer, _, teacher = prepare(config, space, data, model, arch)
    foreseen = sum(p.numel() * p.element_size() for p in model.parameters())
    foreseen += sum(memory_bytes(config, space, model, arch))
    rows = data.epoch(config.batch * config.accumulate, generator)[0]
    on_gpu, times = bool(gpus(config)), []

    def lap():
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.monotonic())

    for _ in range(steps + 1):
        lap()
        split.batch(rows.numpy(), config.device)
        lap()
        work = draw_step(config, space, data, arch, rows, generator)
        lap()
        take_step(config, model, optimizer, arch, *work, teacher)
        optimizer.step()
        lap()
    load, draw, step = np.diff(np.reshape(times, (-1, 4)))[1:].mean(0)  # the first warms up
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    print(
        f"{space.name} {arch or 'supernet'} at {space.image}, {config.accumulate} x {config.batch} images | "
        f"{sum(p.numel() for p in model.parameters()):,} parameters | load {len(rows) / load:.0f}, with "
        f"augmentation {len(rows) / draw:.0f} images/s | {1e3 * step:.0f} ms a step | peak "
        f"{peak / 2**20:.0f} MiB, foreseen {foreseen / 2**20:.0f} | {torch.get_num_threads()} threads"
    )


def main(argv=None):
    """The command line of train.py."""
    config = parse(Config, __doc__, argv)
    use_device(config.device)
    join_processes(config)
    if config.translate:
        return translate_stdin(config)
    if config.evaluate:
        return evaluate(config)
    space = space_of(config)
    arch = read_arch(space, config.arch) if config.arch else ""
    if config.benchmark:
        return benchmark(config, space, arch)
    if config.init and not arch:
        raise ValueError("--init needs --arch: it starts one network from a supernet's weights")
    path = os.path.join(config.out, (file_name(arch) or "supernet") + ".pt")
    if config.convert:
        return convert(config, space, arch, path)
    data = load(config, space)
    model = inherit(config, space, arch) if config.init else make_model(config, space, data, arch)
    print(
        f"{arch or 'supernet'} of space {space.name} | "
        f"{sum(p.numel() for p in model.parameters()):,} parameters | "
        f"{data.size()} training examples | {config.device}, {torch.get_num_threads()} threads"
    )
    with output_folder(config.out):
        if os.path.exists(path) and not config.resume and load_checkpoint(path)["space"] != space.name:
            raise ValueError(f"{path} is of another space than {space.name}; give another --out")
        if config.resume and not os.path.exists(path):
            print(f"nothing to resume: {path} does not exist, training starts", file=sys.stderr)
        model = train(config, space, data, model, arch, path)
    reached = tested(config, data, model) if arch else {}
    print("".join(f"{name} {value:.2f} | " for name, value in reached.items()) + f"saved {path}")


if __name__ == "__main__":
    run_command(main)

"""Trains a ShiftAddNAS supernet, or one fixed network, with one loop.

    python train.py                                       supernet of the fashion space -> out/supernet.pt
    python train.py --arch cc/sa/tt                       one network from scratch      -> out/cc-sa-tt.pt
    python train.py --arch cc/sa/tt --init out/supernet.pt          from inherited weights
    python train.py --space cifar10 --data cifar-10-batches-py      another data set

Each step draws one arch uniformly (single path, as the official code does) and minimises

    cross-entropy(supernet(x, arch), y) + kl_weight * divergence(arch)

Data: the embedded grey Fashion-MNIST (5,000 training, 1,000 validation, 2,000 test images), or --data with a
folder of IDX files, of the official CIFAR python batches, or of {train,test}_{images,labels}.npy (uint8
images N,H,W or N,H,W,C; val_* optional, else a sixth of the training images). Run again with --resume after
an interruption: the losses are those of an uninterrupted run. Every run logs to <out>/<name>.jsonl.
"""

import argparse
import gzip
import json
import math
import os
import pickle
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from shiftaddnas import SHARING, Supernet, build, find_space


def flag(default, text, **limits):
    """A dataclass field that becomes a flag; limits: low (inclusive), above (exclusive), choices."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass
class Config:
    """Flags of train.py; also stored in each checkpoint."""

    space: str = flag("fashion", "search space")
    arch: str = flag("", "train this network, not the supernet: an arch string or a .json file with one")
    sharing: str = flag("heterogeneous", "weights of conv, shift and add", choices=tuple(SHARING))
    kl_weight: float = flag(0.01, "weight of the divergences of shared weights", low=0)
    kl: str = flag("density", "their form", choices=("density", "official"))
    data: str = flag("", "folder of another data set (default: the embedded Fashion-MNIST)")
    epochs: int = flag(7, "passes over the training images", low=1)
    batch: int = flag(100, "images a step", low=2)
    lr: float = flag(4e-3, "peak learning rate (AdamW, one epoch of warm-up, then cosine to 0)", above=0)
    weight_decay: float = flag(0.05, "AdamW decay of weights with more than one dimension", low=0)
    seed: int = flag(0, "seed of initialisation, images and archs", low=0)
    init: str = flag("", "with --arch: start from this supernet checkpoint")
    out: str = flag("out", "output folder")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    resume: bool = flag(False, "continue an interrupted run")


# ----------------------------------------------------------------------------------------------- flags


def parse(config_class, manual, argv=None, hidden=()):
    """Command line -> config_class instance; `hidden` fields get no flag. ValueError for a bad value."""
    parser = argparse.ArgumentParser(
        description=manual, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in fields(config_class):
        if f.name in hidden:
            continue
        name, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})"
        if f.type is bool or f.type == "bool":
            parser.add_argument(name, action="store_true", help=f.metadata["help"])
        else:
            parser.add_argument(
                name, type=type(f.default), default=f.default, metavar=f.name.upper(), help=text
            )
    config = config_class(**vars(parser.parse_args(argv)))
    for f in fields(config_class):
        check_flag(f, getattr(config, f.name))
    return config


def check_flag(f, value):
    """ValueError that names the flag, its value and what is allowed."""
    name, limits = "--" + f.name.replace("_", "-"), f.metadata
    if "choices" in limits and value not in limits["choices"]:
        raise ValueError(f"{name} {value!r} is unknown; allowed: {', '.join(limits['choices'])}")
    if "low" in limits and not (value >= limits["low"] and math.isfinite(value)):
        raise ValueError(f"{name} must be at least {limits['low']}, got {value}")
    if "above" in limits and not (value > limits["above"] and math.isfinite(value)):
        raise ValueError(f"{name} must be above {limits['above']}, got {value}")


def check_device(name):
    """ValueError unless torch can put a tensor on the device."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def run_command(main):
    """Calls main(); expected errors become one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)


def read_arch(space, text):
    """An arch string, or JSON with one under the key "arch", as text or a .json file -> validated arch."""
    if text.endswith(".json") or text.lstrip().startswith("{"):
        try:
            content = text if text.lstrip().startswith("{") else Path(text).read_text()
            text = json.loads(content)["arch"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{text} is not JSON with a key "arch"') from None
    return space.validate(text)


# ------------------------------------------------------------------------------------------------ data


class Split(NamedTuple):
    """images[index], labels[index]; images uint8 (N, H, W) or (N, H, W, C), maybe memory-mapped."""

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray

    def batch(self, rows):
        """Rows of the split -> x (B, C, H, W) float in [0, 1], y (B,) int64."""
        rows = self.index[rows]
        x = torch.from_numpy(np.ascontiguousarray(self.images[rows]))
        x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
        return x.float() / 255, torch.from_numpy(self.labels[rows].astype(np.int64))


class Data(NamedTuple):
    """Three splits and the normalisation."""

    train: Split
    val: Split
    test: Split
    mean: torch.Tensor  # (C, 1, 1) of the training images
    std: torch.Tensor


def load_data(path, space):
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
    sample, _ = train.batch(np.arange(min(5000, len(order))))
    mean, std = sample.mean((0, 2, 3)).view(-1, 1, 1), sample.std((0, 2, 3)).view(-1, 1, 1)
    return Data(train, val, test, mean, std.clamp_min(1e-3))


def check_images(folder, name, images, labels, space):
    """ValueError unless images and labels of one split fit each other and the space."""
    shape, side = images.shape[1:], space.image
    wanted = (side, side) if space.in_channels == 1 else (side, side, space.in_channels)
    if shape != wanted or images.dtype != np.uint8:
        raise ValueError(
            f"{folder}: {name} images are {'x'.join(map(str, shape))} {images.dtype}; "
            f"space {space.name} takes {'x'.join(map(str, wanted))} uint8"
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


# ------------------------------------------------------------------------------------------- files


def save(state, path):
    """torch.save to a temporary name, then rename: the file at `path` is always whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    torch.save(state, temporary)
    os.replace(temporary, path)


def write_text(text, path):
    """The same for text."""
    temporary = f"{path}.{os.getpid()}.tmp"
    Path(temporary).write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
    state = load_checkpoint(path, space=space.name, arch="")
    supernet = Supernet(space, state["config"]["sharing"])
    supernet.load_state_dict(state["model"])
    return supernet.eval()


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
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(config, step, per_epoch):
    """One epoch of linear warm-up, then a half cosine to 0 at the last step."""
    total = config.epochs * per_epoch
    warm = min(per_epoch, total // 4)
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def train(config, space, data, model, arch, path):
    """Trains `model` (a Supernet if arch is "", else the Network of arch), checkpoint at `path`; returns it.

    Goes on from `path` if config.resume. Ctrl-C and SIGTERM save after the step at hand. A kill loses the
    steps since the last checkpoint, which the resumed run repeats exactly; a checkpoint is due as soon as
    writing it costs less than SAVE_SHARE of the time (`fashion` supernet: every two seconds or so).
    Raises ValueError, naming the arch, at the first loss that is not finite.
    """
    model.to(config.device).train()
    optimizer, generator = make_optimizer(model, config), torch.Generator().manual_seed(config.seed)
    per_epoch = max(1, len(data.train.index) // config.batch)
    step, steps, order, losses = 0, config.epochs * per_epoch, None, []
    if config.resume and os.path.exists(path):
        step, order = restore(path, config, space, arch, model, optimizer, generator)
    log = open_log(Path(path).with_suffix(".jsonl"), step)
    first, started = step, time.monotonic()
    save_after = started
    with log, interruptible() as stop:
        while step < steps:
            if step % per_epoch == 0:
                order = torch.randperm(len(data.train.index), generator=generator)
            at = step % per_epoch * config.batch
            x, y = data.train.batch(order[at : at + config.batch].numpy())
            x = augment((x - data.mean) / data.std, generator)
            drawn = arch or space.sample(generator)
            loss, loss_ce = losses_of(config, model, arch, drawn, x, y, generator)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss became {loss.item()} at step {step} with arch {drawn}")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, per_epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            losses.append(loss.item())
            line = {"step": step, "loss": loss.item(), "ce": loss_ce.item(), "arch": drawn}
            log.write(json.dumps(line) + "\n")
            if step % per_epoch == 0:
                print_step(path, step, steps, losses, (time.monotonic() - started) / (step - first))
                losses = []
            if stop or step == steps or (begun := time.monotonic()) > save_after:
                log.flush()
                save(checkpoint(config, space, arch, model, optimizer, generator, step, order), path)
                save_after = time.monotonic() + (time.monotonic() - begun) / SAVE_SHARE
            if stop:
                raise KeyboardInterrupt
    return model.eval()


def losses_of(config, model, arch, drawn, x, y, generator):
    """(cross-entropy + kl_weight * divergence, cross-entropy); fixed networks have no divergence."""
    x, y = x.to(config.device), y.to(config.device)
    if arch:
        loss_ce = F.cross_entropy(model(x), y)
        return loss_ce, loss_ce
    loss_ce = F.cross_entropy(model(x, drawn), y)
    return loss_ce + config.kl_weight * model.divergence(drawn, config.kl, generator), loss_ce


def checkpoint(config, space, arch, model, optimizer, generator, step, order):
    """All that an exact continuation needs, as one dict of tensors and plain values."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": asdict(config),
        "space": space.name,
        "arch": arch,
        "step": step,
        "order": order,
        "generator": generator.get_state(),
        "torch_rng": torch.get_rng_state(),
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
    lines = path.read_text().splitlines(keepends=True)[:step] if path.exists() and step else []
    write_text("".join(lines), path)
    return open(path, "a", encoding="utf-8")


def restore(path, config, space, arch, model, optimizer, generator):
    """Loads model, optimizer and random states from a checkpoint of the same run; returns (step, order)."""
    state = load_checkpoint(path, space=space.name, arch=arch)
    for key, value in asdict(config).items():
        if key not in ("resume", "out", "device") and state["config"].get(key) != value:
            raise ValueError(
                f"{path} was made with --{key.replace('_', '-')} {state['config'].get(key)!r}, "
                f"this run asks for {value!r}; give the same flags or another --out"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["torch_rng"])
    return state["step"], state["order"]


# ------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def accuracy(network, data, split, device="cpu", batch=500):
    """Share of the images of a split that a network in evaluation mode gets right, in percent."""
    network.eval()
    right = 0
    for rows in np.array_split(np.arange(len(split.index)), max(1, len(split.index) // batch)):
        x, y = split.batch(rows)
        right += (network(((x - data.mean) / data.std).to(device)).argmax(1).cpu() == y).sum().item()
    return 100 * right / len(split.index)


@torch.no_grad()
def recalibrate(network, data, images=500, device="cpu"):
    """Batch-norm statistics of an extracted subnet from the first training images: those it inherits are
    averages over other archs. The network is left in evaluation mode; its weights are untouched."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain average over the batches
    x, _ = data.train.batch(np.arange(min(images, len(data.train.index))))
    network.train()(((x - data.mean) / data.std).to(device))
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


def main(argv=None):
    """The command line of train.py."""
    config = parse(Config, __doc__, argv)
    space = find_space(config.space)
    arch = read_arch(space, config.arch) if config.arch else ""
    if config.init and not arch:
        raise ValueError("--init needs --arch: it starts one network from a supernet's weights")
    check_device(config.device)
    data = load_data(config.data, space)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    path = os.path.join(config.out, (arch.replace("/", "-") or "supernet") + ".pt")
    if config.init:
        model = load_supernet(config.init, space).extract(arch)
    else:
        model = build(space, arch, seed=config.seed) if arch else Supernet(space, config.sharing, config.seed)
    print(
        f"{arch or 'supernet'} of space {space.name} | "
        f"{sum(p.numel() for p in model.parameters()):,} parameters | "
        f"{len(data.train.index)} images | {config.device}, {torch.get_num_threads()} threads"
    )
    model = train(config, space, data, model, arch, path)
    if arch:
        print(f"test accuracy {accuracy(model, data, data.test, config.device):.2f} % | saved {path}")
    else:
        print(f"saved {path}")


if __name__ == "__main__":
    run_command(main)

"""Measure time and memory of training steps on random images, and how fast images are read and augmented.

    python -m results.scale --space hytra --image 64 --batch 16 [--arch A]

prints a line, in seconds or, at side 224, a minute; results/scale.md is written from such lines. The flags
are those of train.py. "Foreseen" is the least that memory must hold, counted without a step: weights,
gradients, the two moments of AdamW, the recipe's average of the weights, and what a backward pass keeps.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch

import train
from shiftaddnas import TokenSpace, read_arch

RSS_UNIT = 2**-20 if sys.platform == "darwin" else 2**-10  # MiB; macOS counts in bytes, Linux in KiB


def random_images(folder, space, count):
    """Write `count` random training images, and two of each class to validate and test, as .npy files."""
    generator = np.random.default_rng(0)
    for split, n in (("train", count), ("val", 2 * space.classes), ("test", 2 * space.classes)):
        size = (n, space.image, space.image, space.in_channels)
        np.save(Path(folder) / f"{split}_images.npy", generator.integers(0, 256, size, dtype=np.uint8))
        np.save(Path(folder) / f"{split}_labels.npy", np.arange(n) % space.classes)


def activation_bytes(space, arch, sharing="naive", batch=1):
    """Return what the backward pass of a batch keeps of the forward pass, counted on the meta device."""
    sizes = {}  # storage -> bytes of a tensor with a row for each image

    def keep(tensor):
        if tensor.shape[:1] == (batch,):
            sizes[tensor.untyped_storage()._cdata] = tensor.numel() * tensor.element_size()
        return tensor

    archs = () if arch else (space.sample(torch.Generator().manual_seed(0)),)  # of a supernet: one path
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model = train.make_model(space, arch, sharing, 0, None, None)
        x = torch.empty(batch, space.in_channels, space.image, space.image)
        logits = model(x, *archs)  # its graph keeps the storages, so that none counts twice
        return sum(sizes.values())


def now(device):
    """Return the time in seconds when the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(model, data, recipe, device, amp):
    """Return the mean seconds that a step's images take to read and augment, and to train on."""
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = train.make_optimizer(model, recipe)
    generator = torch.Generator().manual_seed(0)
    rows = data.epoch(recipe.batch * recipe.accumulate, generator)[0]  # of the images of every step
    times = [now(device)]
    for _ in range(4):  # the first warms up
        batches = train.draw_batches(data, rows, recipe.accumulate, generator, device)
        times.append(now(device))
        # A step of train.train, on batches that are there already.
        archs = [model.arch] if model.arch else model.space.draw(generator, recipe.sampling == "fair")
        optimizer.zero_grad()
        for inputs, y in batches:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                logits = model(*inputs) if model.arch else model(*inputs, archs)
            loss = data.loss(logits, y, recipe.smoothing)
            if not model.arch and recipe.kl_weight:
                loss = loss + recipe.kl_weight * model.divergence(archs)
            (loss / len(batches)).backward()
        optimizer.step()
        times.append(now(device))
    return np.diff(times).reshape(-1, 2)[1:].mean(0)  # rows: (read, train) of a step


def main(argv=None):
    """Measure as the command line says and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    train.add_flags(parser)
    parser.add_argument("--arch", default="", help="this network, not the supernet")
    args = parser.parse_args(argv)
    train.use_device(args.device)
    space, recipe, _ = train.read_settings(args)
    if isinstance(space, TokenSpace):
        raise ValueError(f"--space {space.name}: steps are measured for spaces of images alone")
    arch = read_arch(space, args.arch) if args.arch else ""
    count = recipe.batch * recipe.accumulate  # images a step
    with tempfile.TemporaryDirectory() as folder:
        random_images(folder, space, 2 * count)
        data = train.load_data(space, folder, recipe)
        model = train.make_model(space, arch, args.sharing, args.seed, recipe, None)
        load, step = measure(model, data, recipe, args.device, args.amp)
    peak = torch.cuda.max_memory_allocated() / 2**20  # MiB; 0 on a CPU
    peak = peak or RSS_UNIT * getrusage(RUSAGE_SELF).ru_maxrss
    parameters = sum(p.numel() for p in model.parameters())
    copies = 4 + bool(recipe.ema or recipe.average_epochs)  # weights, gradients, two moments, average
    kept = activation_bytes(space, arch, args.sharing, recipe.batch) // (2 if args.amp else 1)
    foreseen = (4 * parameters * copies + kept) / 2**20  # MiB of float32
    print(
        f"{space.name} {arch or 'supernet'} at {space.image}, {recipe.accumulate} x {recipe.batch} images | "
        f"{parameters:,} parameters | read and augmented {count / load:.0f} images/s | {1e3 * step:.0f} ms a "
        f"step | peak {peak:.0f} MiB, foreseen {foreseen:.0f} | {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    train.run_command(main)

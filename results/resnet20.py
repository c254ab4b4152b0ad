"""Train an ordinary ResNet-20 as a convolution, a shift and an add network, made by convert().

    python -m results.resnet20                  writes results/resnet20.md, in three minutes on one thread
    python -m results.resnet20 --add-layers     prints how add layers move and learn, by eta, in ten minutes

The data are the embedded grey images of Fashion-MNIST, scaled to 32x32 and repeated to three channels. The
networks are half as wide as the published ResNet-20, which keeps the time down.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data.images import load_images, standard_error
from shiftaddnas import SPACES, AddConv2d, convert, seeded

REPORT = Path(__file__).with_suffix(".md")
EPOCHS = 3
BATCH = 64
WIDTH = 8  # channels of the first stage; 16 as published
ETAS = (None, 0.05, 0.2, 0.8)  # of --add-layers
OPTIMIZERS = {
    "SGD 0.1": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "AdamW 0.003": partial(torch.optim.AdamW, lr=0.003),
    "AdamW 0.03": partial(torch.optim.AdamW, lr=0.03),
}
TEXT = """# An ordinary ResNet-20 as convolution, shift and add network

`python -m results.resnet20` writes this file. Each network starts from the same weights, is turned by
`convert(network, op)` except for its first convolution, and is trained for {epochs} epochs: SGD 0.1 to 0 by
half a cosine, momentum 0.9, weight decay 1e-4, batches of {batch}, images shifted and mirrored. The network
has {width} channels in its first stage, half as many as the published one. Data: the embedded grey images of
Fashion-MNIST, {train:,} to train and {test:,} to test, scaled to 32x32, three channels. One seed: an accuracy
of 80 % has a standard error of {error:.1f} points, and {epochs} epochs are short for any of them.

| network | layers converted | test accuracy | training, processor s |
|---|---|---|---|
{rows}

Threads: {threads}.
"""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input, projected where its shape changes, is added."""

    def __init__(self, c_in, c_out, stride, conv, norm):
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = norm(c_out)
        self.conv2 = conv(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = norm(c_out)
        self.shortcut = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(conv(c_in, c_out, 1, stride, bias=False), norm(c_out))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """The ResNet of He et al. for images of 32x32: depth 6n + 2, three stages of n blocks, 1x1 shortcuts.

    conv makes the convolutions of the blocks, norm what stands behind each: nn.BatchNorm2d or nn.Identity.
    """

    def __init__(self, depth=20, width=16, classes=10, conv=nn.Conv2d, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = norm(width)
        blocks = []
        c_in = width
        for stage in range(3):
            c_out = width * 2**stage
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(c_in, c_out, 2 if stage and i == 0 else 1, conv, norm))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.blocks(x).mean((2, 3)))


class Enlarge(nn.Module):
    """Scale grey images (N, 1, H, W) to three channels of 32x32."""

    def forward(self, x):
        x = F.interpolate(x, size=32, mode="bilinear", antialias=False)
        return x.expand(-1, 3, -1, -1)


def steps(data, epochs, generator):
    """Yield x and y of each training step."""
    for _ in range(epochs):
        for rows in data.epoch(BATCH, generator):
            (x,), y = data.batch(rows, generator)
            yield x, y


def train(network, data, epochs=EPOCHS, make_optimizer=OPTIMIZERS["SGD 0.1"]):
    """Train a network, its rate falling to 0 by half a cosine, and return its processor seconds."""
    begun = time.process_time()  # other programs on the machine do not count
    optimizer = make_optimizer(network.parameters())
    total = epochs * (data.size() // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    network.train()
    for x, y in steps(data, epochs, torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        schedule.step()
    return time.process_time() - begun


def compare(data):
    """Train the three networks and return the rows of the table."""
    rows = []
    for op in ("conv", "shift", "add"):
        with seeded(0):
            resnet = ResNet(20, WIDTH)
        count = convert(resnet, op, lambda name, layer: name != "conv1")
        network = nn.Sequential(Enlarge(), resnet)
        seconds = train(network, data)
        accuracy = data.test(network)["test_accuracy"]
        rows.append(f"| {op} | {count} | {accuracy:.1f} % | {seconds:.0f} |")
        print(rows[-1], flush=True)
    return rows


# ----------------------------------------------------------------- how add layers move, which eta decides


def add_network(depth, eta, norm=nn.BatchNorm2d):
    """Return a ResNet whose blocks are made of add layers."""
    with seeded(0):
        resnet = ResNet(depth, WIDTH, conv=partial(AddConv2d, eta=eta), norm=norm)
    return nn.Sequential(Enlarge(), resnet)


def first_steps(network, data, make_optimizer, limit=20):
    """Train for 20 steps at a constant rate; return how far add layers move, and the mean of 5 last losses.

    The distance is |w - w_start| / |w_start|, the smallest and the largest of the layers.
    """
    network.train()
    layers = [layer for layer in network.modules() if isinstance(layer, AddConv2d)]
    before = [layer.weight.detach().clone() for layer in layers]
    optimizer = make_optimizer(network.parameters())
    losses = []
    for (x, y), _ in zip(steps(data, 1, torch.Generator().manual_seed(0)), range(limit)):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    pairs = zip(layers, before)
    moves = [((layer.weight.detach() - start).norm() / start.norm()).item() for layer, start in pairs]
    return min(moves), max(moves), sum(losses[-5:]) / 5


def print_add_layers(data):
    """Print movement and loss after 20 steps, and the accuracy of depth 14 after an epoch, at each eta."""
    for name in ("SGD 0.1", "AdamW 0.003"):
        make_optimizer = partial(OPTIMIZERS[name], weight_decay=0.0)  # which would move weights by itself
        for norm in (nn.BatchNorm2d, nn.Identity):
            for depth in (8, 14, 20):
                cells = []
                for eta in ETAS:
                    low, high, loss = first_steps(add_network(depth, eta, norm), data, make_optimizer)
                    cells.append(f"eta {eta}: moves {low:.0e} to {high:.0e}, loss {loss:.2f}")
                print(f"{name}, {norm.__name__}, depth {depth} | {' | '.join(cells)}", flush=True)
    for name, make_optimizer in OPTIMIZERS.items():
        for eta in ETAS if name == "SGD 0.1" else (None,):
            network = add_network(14, eta)
            train(network, data, 1, make_optimizer)
            accuracy = data.test(network)["test_accuracy"]
            print(f"{name}, BatchNorm2d, depth 14, one epoch | eta {eta}: {accuracy:.1f} %", flush=True)


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="results.resnet20", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--add-layers", action="store_true", help="print how far add layers move, by eta")
    args = parser.parse_args(argv)
    data = load_images("", SPACES["fashion"])
    if args.add_layers:
        print_add_layers(data)
        return
    rows = compare(data)
    counts = {"train": data.size(), "test": len(data.test_set.index)}
    settings = {"epochs": EPOCHS, "batch": BATCH, "width": WIDTH, "threads": torch.get_num_threads()}
    settings["error"] = standard_error(80, counts["test"])
    REPORT.write_text(TEXT.format(rows="\n".join(rows), **counts, **settings))
    print(f"wrote results/{REPORT.name}")


if __name__ == "__main__":
    main()

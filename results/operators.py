"""Measure time, rate, share of the ceiling and extra memory of every operator on six layers.

    python -m results.operators      prints a table of the CPU, and one of the GPU if torch can use one

The CPU takes about a minute (OMP_NUM_THREADS sets the number of threads).
results/operators.md says what follows from such tables. The rows of adds are

    add (cpu), add (gpu)     the compiled kernels
    add (cpu-portable)       the same source without -march=native
    add (unfold + cdist)     the torch definition, on a sixteenth of the batch
    add (broadcast)          as AdderNet's adder.py: one difference of all patches and filters, on an eighth
"""

import ctypes
import math
import os
import platform
import re
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from shiftaddnas import add_conv2d, cpu_model, fixed_point, kernels_for, power_of_two
from train import run_command

LAYERS = {  # name: N, C, M, side, K, padding, groups; a GPU gets 16 N images, which fill it
    "3x3 64-64 16x16": (64, 64, 64, 16, 3, 1, 1),
    "3x3 128-128 8x8": (64, 128, 128, 8, 3, 1, 1),
    "1x1 256-64 8x8": (64, 256, 64, 8, 1, 0, 1),
    "1x1 64-256 16x16": (64, 64, 256, 16, 1, 0, 1),
    "depthwise 3x3 64": (64, 64, 64, 16, 3, 1, 64),
    "linear 512-512": (1024, 512, 512, 1, 1, 0, 1),
}
PORTABLE = {"SHIFTADDNAS_CXXFLAGS": ""}  # the kernels without -march=native
TORCH = {"SHIFTADDNAS_KERNELS": "off"}  # no kernels


class Operator(NamedTuple):
    """One operator on one layer, ready to be timed."""

    name: str
    function: Callable  # of the inputs
    inputs: tuple
    elements: int  # terms of the sum, |x - w| or x w, over the whole batch
    share: int = 1  # the inputs are 1/share of the batch
    variables: dict = {}  # of the environment: they choose the build of the kernels
    tf32: bool = False  # products on a GPU may round their inputs to TF32


# -------------------------------------------------------------------------------------- time and memory


def median_ms(runs, device="cpu", seconds=0.1):
    """Return the median time in ms of each of several functions without arguments.

    They take turns, so that a slow spell hits all alike: at least 3, and until each has run for `seconds`. A
    turn is a call to warm up and a timed one; on a GPU the mean of ten timed calls, which wait in its queue.
    """
    calls = 10 if device == "cuda" else 1  # of a turn
    times = [[] for _ in runs]  # ms a call, by turn
    waiting = range(len(runs))  # numbers of the functions that go on
    while waiting:
        for k in waiting:
            elapsed_ms(runs[k], 1, device)
            times[k].append(elapsed_ms(runs[k], calls, device) / calls)
        waiting = [k for k in waiting if len(times[k]) < 3 or sum(times[k]) < 1e3 * seconds / calls]
    return [statistics.median(each) for each in times]


def elapsed_ms(run, calls, device):
    """Return the time of so many calls in ms, until the GPU has finished."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def extra_mb(run, device):
    """Return the memory in MB that run() takes beyond its result; nan on a CPU without Linux and glibc."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        return (torch.cuda.max_memory_allocated() - before - result.nbytes) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc gives freed memory back
        Path("/proc/self/clear_refs").write_text("5")  # Linux starts the high-water mark anew
        before = process_mb("VmRSS")
        result = run()
        return max(0.0, process_mb("VmHWM") - before - result.nbytes / 1e6)
    except (OSError, AttributeError, TypeError):
        return math.nan


def process_mb(key):
    """Return one entry of /proc/self/status, which counts in KiB, in MB."""
    return int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def ceiling(device):
    """Return (10^9 multiply-adds a second that this device can do, the reason)."""
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        ghz = gpu.clock_rate / 1e6  # its highest clock
        lanes = 128 * gpu.multi_processor_count  # as all of compute capability 8.6 and later have
        return ghz * lanes, f"{lanes} lanes at {ghz:.3f} GHz, half of it for add with its two FADD a term"
    a = torch.randn(1024, 1024)
    (ms,) = median_ms([lambda: a @ a])
    return 1024**3 / 1e6 / ms, "a float32 matrix product of 1024 x 1024"


# ---------------------------------------------------------------------------------------- the operators


def layer_operators(layer, device):
    """Return the list of Operators on one layer."""
    N, C, M, side, K, padding, groups = LAYERS[layer]
    N = 16 * N if device == "cuda" else N
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, side, side, generator=generator).to(device)  # (N, C, H, W)
    w = (torch.randn(M, C // groups, K, K, generator=generator) * 0.1).to(device)  # (M, C/G, K, K)
    elements = N * M * side * side * w[0].numel()

    def conv(x, w):
        if side == 1:  # as nn.Linear has it
            return F.linear(x.flatten(1), w.flatten(1))
        return F.conv2d(x, w, None, 1, padding, 1, groups)

    def shift(x, w):
        return conv(fixed_point(x), power_of_two(w))

    def broadcast(x, w):
        patches = F.unfold(x, K, padding=padding).view(len(x), groups, 1, w[0].numel(), -1)
        return -(patches - w.view(1, groups, M // groups, -1, 1)).abs().sum(3)  # (N, G, M/G, H W)

    add = partial(add_conv2d, padding=padding, groups=groups)
    operators = [
        Operator("conv", conv, (x, w), elements),
        Operator("add (gpu)" if device == "cuda" else "add (cpu)", add, (x, w), elements),
        Operator("add (unfold + cdist)", add, (x[::16], w), elements, 16, TORCH),
        Operator("add (broadcast)", broadcast, (x[::8], w), elements, 8),
        Operator("shift", shift, (x, w), elements),
        attention(x),
    ]
    if device == "cuda":
        return [*operators, Operator("conv (TF32)", conv, (x, w), elements, tf32=True)]
    portable = Operator("add (cpu-portable)", add, (x, w), elements, variables=PORTABLE)
    return [*operators, portable]


def attention(x):
    """Return the Operator of self-attention over the positions of x (N, C, H, W), in heads of 16 channels."""
    N, C, side, _ = x.shape
    # A linear layer, whose maps have one position, gets 8 sentences of N / 8 tokens instead.
    tokens = x.view(N, C, -1).mT if side > 1 else x.view(8, -1, C)  # (B, T, C)
    heads = tokens.unflatten(2, (-1, 16)).transpose(1, 2)  # (B, C / 16, T, 16)
    products = 2 * heads.numel() * heads.shape[2]  # of queries and keys, and of weights and values
    return Operator("attention", F.scaled_dot_product_attention, (heads, heads, heads), products)


def run(operator, train=False):
    """Run an operator once, with `train` also the gradients of all its inputs, and return its result."""
    for name in ("SHIFTADDNAS_KERNELS", "SHIFTADDNAS_CXXFLAGS"):
        os.environ.pop(name, None)
    os.environ.update(operator.variables)
    for switch in (torch.backends.cudnn, torch.backends.cuda.matmul):
        switch.allow_tf32 = operator.tf32
    inputs = [tensor.detach().requires_grad_(train) for tensor in operator.inputs]
    with torch.set_grad_enabled(train):
        y = operator.function(*inputs)
        if train:
            torch.autograd.grad(y, inputs, torch.ones_like(y))
    return y


def measure(operators, device):
    """Return {name: (forward in ms, forward and backward in ms, extra MB)}, scaled to the whole batch."""
    forward_ms = median_ms([partial(run, operator) for operator in operators], device)
    train_ms = median_ms([partial(run, operator, train=True) for operator in operators], device)
    figures = {}
    for operator, *milliseconds in zip(operators, forward_ms, train_ms):
        row = (*milliseconds, extra_mb(partial(run, operator), device))
        figures[operator.name] = [operator.share * number for number in row]
    return figures


# -------------------------------------------------------------------------------------------- the table


def print_table(device):
    """Measure one device and print its table. Raise ValueError if it has no kernels to compare."""
    if kernels_for(torch.empty(0, device=device)) is None:
        raise ValueError(f"the operator table compares kernels, and none can be had for {device}")
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, 16 times the batch"
    else:
        model = re.search("model name.*: (.*)", cpu_model())
        name = f"{model[1] if model else platform.machine()}, threads: {torch.get_num_threads()}"
    most, reason = ceiling(device)
    print(f"\n{name}, torch {torch.__version__}; float32; medians; G/s = 10^9 elements a second.")
    print(f"Ceiling {most:.1f} G/s: {reason}. Extra: memory of a forward beyond its result.\n")
    print("| layer | operator | forward ms | G/s | ceiling | fwd+bwd ms | extra MB | extra / im2col |")
    print("|---|---|---|---|---|---|---|---|")
    table = []
    for layer, (_, _, M, _, _, _, groups) in LAYERS.items():
        operators = layer_operators(layer, device)
        table.append(measure(operators, device))
        im2col_mb = operators[0].elements * groups / M * 4 / 1e6  # of the matrix of all patches
        for operator, (forward_ms, train_ms, mb) in zip(operators, table[-1].values()):
            rate = operator.elements / 1e6 / forward_ms
            share = rate / (most / 2 if operator.name == "add (gpu)" else most)
            figures = f"{forward_ms:.3f} | {rate:.1f} | {share:.0%} | {train_ms:.3f} | {mb:.1f}"
            print(f"| {layer} | {operator.name} | {figures} | {mb / im2col_mb:.1%} |", flush=True)
    print_ratios(table)


def print_ratios(table):
    """Print the geometric means over the layers of each operator's times over those of conv and add."""
    names = list(table[0])
    add = names[1]

    def ratio(above, below, column):
        return statistics.geometric_mean(row[above][column] / row[below][column] for row in table)

    print(f"\n| geometric means | forward / conv | forward / {add} | fwd+bwd / conv |")
    print("|---|---|---|---|")
    for name in names:
        ratios = (ratio(name, "conv", 0), ratio(name, add, 0), ratio(name, "conv", 1))
        print(f"| {name} | {' | '.join(f'{number:.2f}' for number in ratios)} |")


def main():
    """Print the tables of the devices of this machine."""
    # glibc shall keep freed memory: else a large result costs its page faults at some calls only.
    if platform.libc_ver()[0] == "glibc":
        for option, size in ((-3, 2**25), (-1, 2**30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)
    print_table("cpu")
    if torch.cuda.is_available():
        print_table("cuda")
    else:
        print("\ngpu: not measured (no GPU that torch can use)")


if __name__ == "__main__":
    run_command(main)

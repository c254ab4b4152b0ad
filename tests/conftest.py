"""Helpers that several test files share."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shiftaddnas import SPACES

ROOT = Path(__file__).parent.parent
FASHION = SPACES["fashion"]
HYTRA = SPACES["hytra"]
TINY = replace(FASHION, name="tiny", ops=("c", "cs", "cst"), depths=((1, 1, 1), (1, 2, 1)))
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that spin beside another process crawl


def pytest_configure(config):
    """Leave out the tests that are marked slow, unless -m says which tests to run (-m slow: these alone)."""
    config.addinivalue_line("markers", "slow: takes more than 3 seconds, or starts programs")
    config.option.markexpr = config.option.markexpr or "not slow"


def rng(seed=0):
    """Return a torch.Generator that starts from a seed."""
    return torch.Generator().manual_seed(seed)


def parameters(module):
    """Count the parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def command(program, *flags, **options):
    """Run one of the programs (or `-m results.NAME`) in a process of its own."""
    start = ["-m", program] if program.startswith("results.") else [str(ROOT / f"{program}.py")]
    settings = {"env": ONE_THREAD, "cwd": ROOT, "timeout": 120, "text": True, **options}
    return subprocess.run([sys.executable, *start, *map(str, flags)], capture_output=True, **settings)


def losses(path):
    """Return the losses of a training log."""
    return [json.loads(line)["loss"] for line in Path(path).read_text().splitlines()]


@pytest.fixture
def tiny_data(tmp_path):
    """A folder of 120 training and 40 test images that can be told apart, as .npy files."""
    folder = tmp_path / "images"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 40)):
        labels = np.arange(count) % 10
        images = draw.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), labels * 2] = 255  # a row of white says the class
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)
    return folder

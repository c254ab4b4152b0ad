"""Claims about the house: imports go one way, files can be copied alone, functions and lines stay short."""

import ast
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ONE_THREAD, ROOT

FILES = {path.stem: path for path in ROOT.glob("*.py") if not path.stem.startswith("test_")}
for folder in ("data", "results"):
    FILES |= {f"{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py")}
BELOW_RESULTS = [name for name in FILES if not name.startswith("results.")]  # results/ may import them all
DATA = {"data.images", "data.sentences"}
ARROWS = {  # module -> the modules of the house that it may import
    "shiftaddnas": set(),
    "cost_model": {"shiftaddnas"},
    "data.images": set(),
    "data.sentences": {"shiftaddnas"},
    "train": {"shiftaddnas", *DATA},
    "search": {"shiftaddnas", "cost_model", "train", *DATA},
}
PACKAGES = {"torch", "numpy"}  # what the five files and data/ need beyond Python itself
OPTIONAL = {"data.images": {"PIL"}}  # for folders of pictures


def imports(path):
    """Return the full names of what a file imports anywhere: `from data import images` -> data.images."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inner = {f"{module}.{alias.name}" for alias in node.names}
            names |= (inner & FILES.keys()) or {module}
    return names


@pytest.mark.parametrize("name", BELOW_RESULTS)
def test_imports_go_one_way(name):
    assert imports(FILES[name]) & FILES.keys() <= ARROWS.get(name, set())


@pytest.mark.parametrize("name", BELOW_RESULTS)
def test_the_five_files_and_data_import_torch_numpy_and_what_every_python_has(name):
    outside = {full.split(".")[0] for full in imports(FILES[name])} - {"data", *FILES}
    assert outside <= PACKAGES | OPTIONAL.get(name, set()) | sys.stdlib_module_names
    assert not outside & {"fcntl", "resource", "termios", "pwd", "grp"}  # Windows has none of these


def test_the_five_files_are_there_and_the_packages_are_empty():
    assert {"shiftaddnas", "train", "search", "cost_model"} <= FILES.keys() and (ROOT / "kernels.cu").exists()
    assert FILES["data.__init__"].read_text() == FILES["results.__init__"].read_text() == ""


@pytest.mark.parametrize("name", FILES)
def test_functions_have_at_most_50_lines_and_lines_at_most_110_characters(name):
    text = FILES[name].read_text(encoding="utf-8")
    long_lines = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 110]
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long_functions = [node.name for node in functions if node.end_lineno - node.lineno >= 50]
    assert (long_lines, long_functions) == ([], [])


def python(code, folder, **environment):
    """Run code in a folder; return what it printed, after a check that it ended well."""
    env = {**ONE_THREAD, **environment}
    env.pop("PYTHONPATH", None)
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def test_the_programs_import_without_unix_and_compile_or_load_nothing(tmp_path):
    code = """
        import sys
        sys.modules["fcntl"] = sys.modules["resource"] = None  # as on Windows
        sys.path.insert(0, ROOT)
        import ctypes, subprocess
        import torch
        opened = []
        subprocess.run = subprocess.Popen = ctypes.CDLL = lambda *arguments, **named: opened.append(arguments)
        import train, search, cost_model, shiftaddnas, data.images, data.sentences
        print(opened, shiftaddnas.find_kernels.cache_info().currsize, "matplotlib" in sys.modules)
    """
    code = "\n".join(line[8:] for line in code.splitlines()).replace("ROOT", repr(str(ROOT)))
    assert python(code, tmp_path, XDG_CACHE_HOME=str(tmp_path)) == ("[] 0 False\n", "")
    assert not list(tmp_path.iterdir())  # no cache either


ADD = (
    "import torch, shiftaddnas\n"
    "print(shiftaddnas.add_conv2d(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).item())"
)
COPIES = {  # what is copied together -> code that runs there, what it prints
    ("shiftaddnas.py",): (ADD, "-18.0"),
    ("shiftaddnas.py", "kernels.cu"): (ADD, "-18.0"),
    ("shiftaddnas.py", "cost_model.py"): (
        "import cost_model, shiftaddnas\n"
        "space = shiftaddnas.find_space('fashion')\n"
        "print(round(cost_model.arch_costs(space, 'cc/sa/tt')['energy_mj'], 4))",
        "0.1077",
    ),
}


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("files", COPIES, ids=" ".join)
def test_files_that_are_copied_together_work_in_an_empty_folder(files, tmp_path):
    for file in files:
        shutil.copy(ROOT / file, tmp_path)
    code, expected = COPIES[files]
    out, err = python(code, tmp_path)
    assert out == expected + "\n"
    if "kernels.cu" in files and shutil.which(os.environ.get("CXX", "g++").split()[0]):
        assert err == ""  # with kernels, of which the cache may have a build
    elif code is ADD:
        assert err.count("\n") == 1 and "kernels.cu is not beside shiftaddnas.py" in err


BANNERS = {  # a banner of shiftaddnas.py -> code that runs on what stands above it, what it prints
    "§5 blocks": (
        "w = SharedWeight((8, 4, 3, 3), ['conv', 'shift', 'add'])\n"
        "x = torch.ones(1, 4, 5, 5)\n"
        "print([tuple(op(x, w.weight_for(name), 2, 1).shape) for name, op in OPERATORS.items()])\n"
        "print(mean_divergence([(w, 'conv'), (w, 'add')]).isfinite().item())\n"
        "print(tuple(attention2d(x, torch.ones(12, 4, 1, 1), 2).shape))",
        "[(1, 8, 3, 3), (1, 8, 3, 3), (1, 8, 3, 3)]\nTrue\n(1, 4, 5, 5)",
    ),
    "§6 space": (
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))\n"
        "print(convert(model, 'add', linear=True), model[0], model[0](torch.ones(1, 3, 3, 3)).shape)",
        "2 AddConv2d(add, 3, 4, kernel_size=(3, 3), stride=(1, 1)) torch.Size([1, 4, 1, 1])",
    ),
    "§8 operators on tokens": (
        "supernet = Supernet(SPACES['fashion'])\n"
        "print(supernet(torch.zeros(2, 1, 28, 28), 'cc/sa/tt').shape)\n"
        "print(read_arch(find_space('fashion'), 'cc/sa/tt'), supernet.extract('cc/sa/tt').arch)",
        "torch.Size([2, 10])\ncc/sa/tt cc/sa/tt",
    ),
}


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("banner", BANNERS)
def test_shiftaddnas_cut_above_a_banner_runs_alone(banner, tmp_path):
    source = (ROOT / "shiftaddnas.py").read_text(encoding="utf-8")
    above = source[: source.index(f"- {banner}\n")].rsplit("\n", 1)[0]
    (tmp_path / "layers.py").write_text(above + "\n", encoding="utf-8")
    code, expected = BANNERS[banner]
    out, _ = python(f"import torch\nfrom torch import nn\nfrom layers import *\n{code}", tmp_path)
    assert out == expected + "\n"


@pytest.mark.parametrize("page", ["results/search.md", "results/translation/search.md"])
def test_the_readme_shows_the_figures_of_the_results(page):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "±" in line]
    rows = [row for row in rows if len(row) > 2]
    assert len(rows) > 4
    for name, accuracy, *_ in rows:
        assert accuracy in readme, (name, accuracy)

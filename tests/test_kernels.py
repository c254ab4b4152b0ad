"""Claims of kernels.cu and its loader. References are float64 sums, one position of the kernel at a time."""

import itertools
import math
import os
import random
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import shiftaddnas
from conftest import ONE_THREAD, ROOT, rng
from shiftaddnas import add_conv2d

COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(not shutil.which(shlex.split(COMPILER)[0]), reason="no C++ compiler here")
BUILDS = {  # name -> environment
    "native": {},
    "avx2": {"SHIFTADDNAS_CXXFLAGS": "-mavx2 -mfma"},
    "portable": {"SHIFTADDNAS_CXXFLAGS": ""},
    "emulate": {"SHIFTADDNAS_CXXFLAGS": "-DEMULATE"},
    "gpu": {},
    "off": {"SHIFTADDNAS_KERNELS": "off"},
}


def slow(case, *values):
    return pytest.param(case, *values, marks=pytest.mark.slow)


KERNELS = ["native", "emulate", "gpu", slow("avx2"), slow("portable")]


def use_build(monkeypatch, build):
    """Select a build for this test and return its device; skip the test where this machine cannot run it."""
    if build == "gpu" and not (torch.cuda.is_available() and shutil.which("nvcc")):
        pytest.skip("no GPU or no nvcc on this machine")
    if build == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the CPU has no AVX2")
    for name in ("SHIFTADDNAS_KERNELS", "SHIFTADDNAS_CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in BUILDS[build].items():
        monkeypatch.setenv(name, value)
    return "cuda" if build == "gpu" else "cpu"


def geometries(count=220, dtype=torch.float32):
    """Yield (x, w, stride, padding, groups): odd sizes, kernels of 1 to 7, depthwise and linear layers,
    batches of 0 and 1, maps of one pixel, non-contiguous and channels-last tensors."""
    draw = random.Random(0)
    gen = rng()
    for i in itertools.count():
        if not count:
            return
        groups = draw.choice([1, 1, 2, 3])
        per_group = draw.choice([1, 2, 3, 5, 9])
        filters = draw.choice([1, 2, 5, 11])
        if i % 6 == 0:  # a depthwise layer
            groups, per_group, filters = 6, 1, 1
        kh, kw, stride, padding = (draw.randint(*ends) for ends in ((1, 7), (1, 7), (1, 3), (0, 3)))
        h = draw.choice([1, 3, 7, 9, 16, 17])
        wide = draw.choice([1, 5, 8, 11, 16, 23])
        if i % 15 == 4:  # a linear layer
            groups, filters, kh, kw, padding, h, wide = 1, 70, 1, 1, 0, 1, 1
        if kh > h + 2 * padding or kw > wide + 2 * padding:
            continue
        x = torch.randn(draw.choice([0, 1, 1, 2, 3]), groups * per_group, h, wide, generator=gen).to(dtype)
        w = torch.randn(groups * filters, per_group, kh, kw, generator=gen).to(dtype)
        if i % 5 == 1:
            x = x.to(memory_format=torch.channels_last)
        if i % 5 == 2:
            x, w = (tensor.mT.contiguous().mT for tensor in (x, w))
        count -= 1
        yield x, w, stride, padding, groups


def add_reference(x, w, stride, padding, groups, g=None):
    """Return y, or (y, grad_x, grad_w) for the gradient g of y, in float64."""
    (n, c, h, wide), (m, cg, kh, kw) = x.shape, w.shape
    ho = (h + 2 * padding - kh) // stride + 1
    wo = (wide + 2 * padding - kw) // stride + 1
    x = F.pad(x.double(), (padding,) * 4)
    w = w.double()
    channel = (torch.arange(m) // (m // groups))[:, None] * cg + torch.arange(cg)  # (M, C/G)
    y = x.new_zeros(n, m, ho, wo)
    grad_x = torch.zeros_like(x)
    grad_w = torch.zeros_like(w)
    for u, v in itertools.product(range(kh), range(kw)):
        rows = slice(u, u + stride * (ho - 1) + 1, stride)
        columns = slice(v, v + stride * (wo - 1) + 1, stride)
        d = w[:, :, u, v, None, None] - x[:, :, rows, columns][:, channel]  # (N, M, C/G, H', W')
        y -= d.abs().sum(2)
        if g is not None:
            terms = (g.double()[:, :, None] * d.clamp(-1, 1)).flatten(1, 2)
            grad_x[:, :, rows, columns] += x.new_zeros(n, c, ho, wo).index_add(1, channel.flatten(), terms)
            grad_w[:, :, u, v] = -(g.double()[:, :, None] * d).sum((0, 3, 4))
    if g is None:
        return y
    return y, grad_x[:, :, padding : padding + h, padding : padding + wide], grad_w


def run_add(x, w, g, geometry, device="cpu"):
    """Return y, grad_x and grad_w of add_conv2d."""
    x, w = (tensor.to(device).detach().requires_grad_() for tensor in (x, w))
    y = add_conv2d(x, w, *geometry)
    return [tensor.cpu() for tensor in (y.detach(), *torch.autograd.grad(y, (x, w), g.to(device)))]


def relative_error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item()


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "build, dtype, limit",
    [
        *((build, torch.float32, 1e-5) for build in ("native", "emulate", "gpu")),
        *(slow(build, torch.float32, 1e-5) for build in ("avx2", "portable", "off")),
        *(slow(build, torch.float64, 1e-14) for build in ("native", "avx2", "portable", "off")),
    ],
)
def test_add_and_its_gradients_equal_float64_sums_on_220_geometries(build, dtype, limit, monkeypatch):
    gen = rng(1)
    device = use_build(monkeypatch, build)
    for x, w, *geometry in geometries(dtype=dtype):
        g = torch.randn(add_reference(x, w, *geometry).shape, generator=gen).to(dtype)
        expected = add_reference(x, w, *geometry, g)
        for value, reference in zip(run_add(x, w, g, geometry, device), expected):
            assert value.shape == reference.shape and value.dtype == dtype
            assert relative_error(value, reference) < limit, (x.shape, w.shape, geometry)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "build, dtype",
    [
        *((build, torch.float32) for build in ("native", "emulate", "gpu")),
        *(slow(build, torch.float32) for build in ("avx2", "portable")),
        ("native", torch.float64),
    ],
)
def test_a_broken_number_shows_in_what_depends_on_it_and_in_nothing_else(build, dtype, value, monkeypatch):
    draw = random.Random(4)
    gen = rng(4)
    device = use_build(monkeypatch, build)
    cases = (case for case in geometries(dtype=dtype) if case[0].numel())
    for x, w, *geometry in itertools.islice(cases, 40):
        y = add_reference(x, w, *geometry)
        g = torch.randn(y.shape, generator=gen).to(dtype)
        at, where = (tuple(map(draw.randrange, tensor.shape)) for tensor in (x, w))
        clean_y, clean_grad, _ = run_add(x, w, g, geometry, device)

        moved, bad = x.clone(), x.clone()
        moved[at] += 1e3
        bad[at] = value
        depends = add_reference(moved, w, *geometry) != y
        bad_y, grad_x, _ = run_add(bad, w, g, geometry, device)
        assert (~bad_y.isfinite()).equal(depends)
        torch.testing.assert_close(bad_y[~depends], clean_y[~depends], rtol=1e-4, atol=1e-4)
        others = torch.ones_like(x, dtype=torch.bool)
        others[at] = False
        torch.testing.assert_close(grad_x[others], clean_grad[others], rtol=1e-4, atol=1e-4)
        assert grad_x[at].isnan().item() == (math.isnan(value) and depends.any().item())

        bad, ones = w.clone(), torch.zeros_like(w)
        bad[where] = value
        ones[where] = 1
        bad_y, grad_x, _ = run_add(x, bad, g, geometry, device)
        filters = torch.arange(len(w)) == where[0]
        assert (~bad_y.isfinite()).equal(filters[:, None, None].expand_as(bad_y))
        stride, padding, groups = geometry
        readers = torch.nn.grad.conv2d_input(x.shape, ones, torch.ones_like(g), stride, padding, 1, groups)
        assert grad_x.isnan().equal((readers > 0) & math.isnan(value))


@pytest.mark.parametrize("build", KERNELS)
def test_a_common_offset_of_100_leaves_an_error_below_1e_4(build, monkeypatch):
    gen = rng(5)
    device = use_build(monkeypatch, build)
    for c, m, side, k, groups in [(64, 32, 8, 3, 1), (256, 16, 4, 1, 1), (6, 6, 9, 3, 6)]:
        x = 100 + torch.randn(2, c, side, side, generator=gen)
        w = 100 + torch.randn(m, c // groups, k, k, generator=gen)
        g = torch.randn(2, m, side - k + 1, side - k + 1, generator=gen)
        expected = add_reference(x, w, 1, 0, groups, g)
        for value, reference in zip(run_add(x, w, g, (1, 0, groups), device), expected):
            assert relative_error(value, reference) < 1e-4


@pytest.mark.parametrize("build", KERNELS)
def test_the_gradient_of_x_keeps_its_digits_over_4608_terms_of_any_magnitude(build, monkeypatch):
    gen = rng(6)
    device = use_build(monkeypatch, build)
    for size, weight_size in itertools.product((0.01, 1, 3, 8, 100), (0.01, 1)):
        x = size * torch.randn(1, 4, 5, 5, generator=gen)
        w = weight_size * torch.randn(512, 4, 3, 3, generator=gen)
        g = torch.randn(1, 512, 5, 5, generator=gen)
        expected = add_reference(x, w, 1, 1, 1, g)[1]
        grad_x = run_add(x, w, g, (1, 1, 1), device)[1]
        assert (grad_x - expected).abs().max() < 1e-5 * expected.abs().max(), (size, weight_size)


@pytest.mark.parametrize("build", [*KERNELS, slow("off")])
def test_a_large_linear_layer_and_its_gradients_equal_float64_sums(build, monkeypatch):
    device = use_build(monkeypatch, build)
    shapes = [(700, 70), (150, 70), (700, 150)]
    x, w, g = (torch.randn(*shape, 1, 1, generator=rng(i)) for i, shape in enumerate(shapes))
    for value, reference in zip(run_add(x, w, g, (1, 0, 1), device), add_reference(x, w, 1, 0, 1, g)):
        assert relative_error(value, reference) < 1e-5


@pytest.mark.parametrize("build", KERNELS)
def test_add_repeats_bit_for_bit_and_is_zero_on_equal_inputs(build, monkeypatch):
    gen = rng(7)
    device = use_build(monkeypatch, build)
    x = torch.randn(4, 16, 13, 13, generator=gen)
    w = torch.randn(20, 16, 3, 3, generator=gen)
    g = torch.randn(4, 20, 13, 13, generator=gen)
    first = run_add(x, w, g, (1, 1, 1), device)
    again = run_add(x, w, g, (1, 1, 1), device)
    assert all(a.equal(b) for a, b in zip(first, again))
    point = torch.randn(1, 40, 3, 3, generator=gen).to(device)
    assert (add_conv2d(point, point.clone()) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_thread_count_changes_no_bit(dtype, monkeypatch):
    use_build(monkeypatch, "native")
    x = torch.randn(3, 8, 17, 17, generator=rng()).to(dtype)
    w = torch.randn(12, 8, 3, 3, generator=rng(1)).to(dtype)
    g = torch.randn(3, 12, 9, 9, generator=rng(2)).to(dtype)
    wanted = run_add(x, w, g, (2, 1, 1))[:2]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(a.equal(b) for a, b in zip(wanted, run_add(x, w, g, (2, 1, 1))))
    finally:
        torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------- loader

ADD = "shiftaddnas.add_conv2d(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).item()"
REFUSE = """#!/bin/sh
for word in "$@"; do
    case "$word" in {flag}) echo "wrapper: error: unsupported option '$word'" >&2; exit 1;; esac
done
exec {compiler} "$@" -O0
"""


def fresh(monkeypatch, tmp_path, compiler, flags=None):
    """Let the loader start from an empty cache, with a compiler and flags in place of -march=native."""
    use_build(monkeypatch, "native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    if flags is not None:
        monkeypatch.setenv("SHIFTADDNAS_CXXFLAGS", flags)
    shiftaddnas.find_kernels.cache_clear()


def script(path, text):
    """Write an executable shell script and return its path."""
    path.write_text(text)
    path.chmod(0o755)
    return path


def add_small():
    return add_conv2d(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).item()


def start(cache, code, **environment):
    """Start a process that runs `code`, with its cache folder and environment."""
    env = {**ONE_THREAD, "SHIFTADDNAS_CXXFLAGS": "", "XDG_CACHE_HOME": str(cache), **environment}
    command = [sys.executable, "-c", f"import torch, shiftaddnas; {code}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


@pytest.mark.slow
def test_two_processes_build_at_once_and_leave_one_library(tmp_path):
    for run in [start(tmp_path, f"print({ADD})"), start(tmp_path, f"print({ADD})")]:
        assert run.communicate() == ("-18.0\n", "")
    (library,) = (tmp_path / "shiftaddnas").iterdir()
    assert library.suffix == ".so"


def test_nothing_is_compiled_or_loaded_at_import(tmp_path):
    assert start(tmp_path, "pass").communicate() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["file/cache", "file", "no home"])
def test_kernels_run_where_nothing_can_be_cached(cache, monkeypatch, tmp_path, capfd):
    compiler = script(tmp_path / "compiler", REFUSE.format(flag="none", compiler=COMPILER))
    fresh(monkeypatch, tmp_path, compiler, "")
    if cache == "no home":  # neither HOME nor an entry in the password file
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    else:  # a folder below a file cannot be made, not even by root
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    assert add_small() == -18
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("false", "compiling kernels.cu failed"),
        ("no-such-compiler", "'no-such-compiler' is not on the PATH"),
        ("no-such-compiler -O2", "'no-such-compiler -O2' is not on the PATH"),
        ("broken", "kernels.cu:1:2: error: no room left"),
    ],
)
def test_without_a_working_compiler_torch_adds_and_one_line_gives_the_reason(
    compiler, reason, monkeypatch, tmp_path, capfd
):
    if compiler == "broken":
        lines = ["#!/bin/sh", "echo 'In file:' >&2", f"echo '{reason}' >&2", "exit 1"]
        compiler = script(tmp_path / "broken", "\n".join(lines))
    fresh(monkeypatch, tmp_path, compiler)
    assert [add_small(), add_small()] == [-18, -18]
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and reason in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler",
    [
        *(REFUSE.format(flag=flag, compiler=COMPILER) for flag in ("-fopenmp", "-march=*|-mcpu=*|-fopenmp")),
        f"{COMPILER} -O2",
        "launcher",
    ],
    ids=["no OpenMP", "neither OpenMP nor -march", "flags", "launcher"],
)
def test_a_compiler_with_flags_or_a_launcher_or_that_refuses_flags_builds_kernels(
    compiler, monkeypatch, tmp_path, capfd
):
    if compiler == "launcher":  # as in CXX="ccache g++"
        path = script(tmp_path / "my launcher", '#!/bin/sh\nexec "$@" -O0\n')
        compiler = f"'{path}' {COMPILER}"
    elif compiler.startswith("#!"):
        compiler = script(tmp_path / "compiler", compiler)
    fresh(monkeypatch, tmp_path, compiler)
    x, w, *geometry = list(geometries(8))[-1]
    assert relative_error(add_conv2d(x, w, *geometry), add_reference(x, w, *geometry)) < 1e-5
    assert capfd.readouterr().err == ""
    assert list((tmp_path / "cache" / "shiftaddnas").glob("*.so"))


def test_an_unknown_switch_is_an_error_that_says_what_is_allowed(monkeypatch):
    monkeypatch.setenv("SHIFTADDNAS_KERNELS", "fast")
    with pytest.raises(ValueError, match="SHIFTADDNAS_KERNELS=fast: allowed are off"):
        add_small()


# -------------------------------------------------------------------- the library alone, on other machines

# compares the float kernels with the definitions of kernels.cu in float64
PROGRAM = r"""
#include "KERNELS"
#include <cstdio>
#include <cstdlib>
#ifdef __CUDACC__
#define GPU 1
template <class T> struct Memory {
    using value_type = T;
    T* allocate(size_t n) { T* p = nullptr; return cudaMallocManaged(&p, n * sizeof(T)) ? exit(7), p : p; }
    void deallocate(T* p, size_t) { cudaFree(p); }
};
#else
#define GPU 0
static int cudaDeviceSynchronize() { return 0; }
template <class T> using Memory = std::allocator<T>;
#endif
typedef std::vector<float, Memory<float>> floats;
typedef std::vector<double> doubles;

static bool differ(const floats& a, const doubles& b) {
    double error = 0, size = 1e-20;
    for (size_t i = 0; i < b.size(); ++i) {
        if ((a[i] == a[i]) != (b[i] == b[i])) return true;
        if (b[i] == b[i]) error += (a[i] - b[i]) * (a[i] - b[i]), size += b[i] * b[i];
    }
    return error > 1e-10 * size;
}

int main() {
    srand(1);
    const auto pick = [](int n) { return rand() % n; };
    for (int round = 0, done = 0; done < 60; ++round) {
        ConvShape s{pick(3) + (round % 9 != 0), 0, 1 + pick(19), 1 + pick(19), 0, 1 + pick(5), 1 + pick(5),
                    1 + pick(3), pick(4), 1 + pick(3), 0, 0};
        const int Cg = 1 + pick(12), Mg = 1 + pick(9);
        s.C = s.G * (round % 4 ? Cg : 1), s.M = s.G * (round % 4 ? Mg : 1);
        if (round % 7 == 5) s.H = s.W = s.KH = s.KW = s.G = 1, s.P = 0, s.C = Cg, s.M = 60 + Mg;  // linear
        if (s.KH > s.H + 2 * s.P || s.KW > s.W + 2 * s.P) continue;
        s.Ho = (s.H + 2 * s.P - s.KH) / s.S + 1, s.Wo = (s.W + 2 * s.P - s.KW) / s.S + 1;
        ++done;
        floats x(inputs(s)), w(weights(s)), gx(x.size());
        floats y((size_t)s.N * s.M * s.Ho * s.Wo), g(y.size());
        for (auto* t : {&x, &w, &g}) for (float& a : *t) a = float(pick(2001) - 1000) / 400;
        if (round % 3 == 0 && x.size()) x[pick(x.size())] = NAN;
        if (round % 5 == 0) w[pick(w.size())] = NAN;
        doubles xd(x.begin(), x.end()), wd(w.begin(), w.end()), gd(g.begin(), g.end());
        doubles yd(y.size()), gxd(x.size());
        for (int n = 0; n < s.N; ++n) {
            for (int k = 0; k < s.G; ++k) add_definition(&yd[0], &xd[0], &wd[0], s, n, k);
            for (int c = 0; c < s.C; ++c) add_grad_x_definition(&gxd[0], &gd[0], &xd[0], &wd[0], s, n, c);
        }
        const int64_t where = GPU ? 0 : 1 + round % 3;  // stream or threads
        if (add_conv2d_forward(y.data(), x.data(), w.data(), &s, where)) return 2;
        if (add_conv2d_grad_x(gx.data(), g.data(), x.data(), w.data(), &s, where)) return 3;
        if (GPU && cudaDeviceSynchronize()) return 8;
        if (differ(y, yd)) return 12;
        if (differ(gx, gxd)) return 13;
#if !defined(__CUDACC__) && !defined(EMULATE)
        doubles yt(yd.size()), gxt(gxd.size());
        if (add_conv2d_forward_f64(yt.data(), xd.data(), wd.data(), &s, where)) return 4;
        if (add_conv2d_grad_x_f64(gxt.data(), gd.data(), xd.data(), wd.data(), &s, where)) return 5;
        if (s.N && std::memcmp(yt.data(), yd.data(), yd.size() * 8)) return 14;
        if (s.N && std::memcmp(gxt.data(), gxd.data(), gxd.size() * 8)) return 15;
#endif
    }
    puts("equal");
}
"""


PROGRAMS = [  # compiler and flags; what runs the program
    ("aarch64-linux-gnu-g++ -static", "qemu-aarch64-static"),
    ("clang++ --target=aarch64-linux-gnu -static", "qemu-aarch64-static"),
    ("clang++", ""),
    ("clang++ -mavx2 -mfma", ""),
    ("clang++ -march=native", ""),
    (f"{COMPILER} -fopenmp -g -fsanitize=address,undefined -fno-sanitize-recover=all", ""),
    (f"{COMPILER} -fopenmp -g -fsanitize=address,undefined -fno-sanitize-recover=all -mavx2 -mfma", ""),
    (f"{COMPILER} -fopenmp -g", "valgrind -q --error-exitcode=9"),
    ("nvcc -std=c++17 -arch=native", "compute-sanitizer --error-exitcode=9 --tool=memcheck"),
    ("nvcc -std=c++17 -arch=native", "compute-sanitizer --error-exitcode=9 --tool=racecheck"),
]


@pytest.mark.slow
@pytest.mark.parametrize("build", ["cpu", "emulate"])
@pytest.mark.parametrize("compiler, prefix", PROGRAMS)
def test_the_library_equals_its_definitions_with_other_compilers_on_arm_and_under_sanitizers(
    compiler, prefix, build, tmp_path
):
    command, prefix = shlex.split(compiler), prefix.split()
    missing = [tool for tool in (command[0], *prefix[:1]) if not shutil.which(tool)]
    if "--target" in compiler and not shutil.which("aarch64-linux-gnu-g++"):
        missing = ["aarch64-linux-gnu-g++"]  # has the headers and the linker
    if missing or command[0] == "nvcc" and (build == "emulate" or not torch.cuda.is_available()):
        pytest.skip(f"not on this machine: {', '.join(missing) or 'a GPU'}")
    if "avx2" in compiler and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the CPU has no AVX2")
    if command[0] != "nvcc":
        command += ["-std=c++20", *(["-DEMULATE"] if build == "emulate" else [])]
    source = tmp_path / ("program.cu" if command[0] == "nvcc" else "program.cpp")
    source.write_text(PROGRAM.replace("KERNELS", str(ROOT / "kernels.cu")))
    optimise = "-O1" if "-g" in command else "-O3"
    subprocess.run([*command, optimise, source, "-o", tmp_path / "program"], check=True)
    env = {**ONE_THREAD, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([*prefix, tmp_path / "program"], capture_output=True, text=True, env=env)
    assert run.returncode == 0 and "equal" in run.stdout, f"status {run.returncode}: {run.stderr[-3000:]}"

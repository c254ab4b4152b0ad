"""ShiftAddNAS (You, Li, Shi, Fu, Lin; ICML 2022, arXiv:2205.08119) in one file.

Multiplications cost energy; shifts and additions are cheap but weaker. A ShiftAddNAS network picks
attention, convolution, shift or add for every block, and a supernet that holds all of them at once is
trained so that the best mix for an energy budget can be searched.

Reading order
    §1 rounding      power_of_two, shift_weight, fixed_point: weights and activations on a shift's grid
    §2 operators     shift_conv2d, add_conv2d, attention2d: pure functions of (x, weight, ...)
    §3 sharing       SharedWeight: one tensor read by conv, shift and add; T(w); the two divergences
    §4 blocks        HybridConv2d (one layer, any op) and Block (one residual bottleneck, any op)
    §5 space         SearchSpace: size, sample, validate, mutate, crossover of arch strings; SPACES
    §6 supernet      Supernet(x, arch), Supernet.extract(arch), build(space, arch)
    §7 translation   mix_tokens, attend: operators on (B, T, C); TokenSpace: archs of Transformers
    §8 Translator    the encoder-decoder of a TokenSpace, supernet or one arch; Light, TokenBlock

Symbols
    N batch · C, M channels in and out · H, W map · K kernel · S stride · P padding · G groups
    w shared weight · s, b exponent and sign of a power of two · p bottleneck width = C_out / 4
    arch  a string, one letter a block: c convolution, s shift, a add, t attention; "/" between
          resolutions. The published T0_mix_v3 is cc/cccc/sctaa/ttctt.

Where an idea of the paper stands
    hybrid search space             SPACES, SearchSpace                  §5
    shift weights (DeepShift)       power_of_two (Q), shift_weight (PS)  §1
    add layer (AdderNet)            add_conv2d                           §2
    heterogeneous weight sharing    SharedWeight                         §3
    supernet loss                   train.py: cross-entropy + kl_weight * Supernet.divergence(arch)
    evolutionary search             search.py;  energy and latency: cost_model.py

Does NOT include: pretrained weights, the siamese self-supervision of BossNAS, unused official variants
(linear shift layers, 8-bit adder training, deep stem).

Deviations from the official code (github.com/RICE-EIC/ShiftAddNAS, folder CV)
    D1  attention mixes values with softmax rows of the queries; theirs uses the transposed matrix, so the
        weights that reach one output position do not sum to 1 (kept for published checkpoints).
    D2  the strided add gradient divides by the stride before it tests the range; theirs tests first and
        loses up to 75 % of the input gradient.
    D3  T is the map from the Gaussian to a Laplacian, in closed form (theirs learns slopes that start as
        noise, which flips the sign of half of the bins, and sends the largest weight to 0).
    D4  the divergences compare distributions; theirs compares a softmax over positions with noise, for add
        only (kept as kl="official").
    D5  shared weights start with the fan-in standard deviation (theirs N(0, 1)), and the add gradient on them
        gets the length of the other operators' (theirs is eta-normalised, 2,000 times as long).
    D6  only cells that some arch can reach are built (136.8 of 615.4 million parameters in `hytra`).
    D7  crossover keeps the depth pattern of one parent, so a child is always inside the space.
    D8  (folder NLP) an add over time is an add in decoding too; theirs multiplies there.
    D9  (folder NLP) padding is masked behind the projections of a light operator; positions alternate sine
        and cosine; the light operators of a layer can share their weights (theirs never do); S is of the Q
        form; the encoder's dropout shrinks with its width as every other.
    D10 (folder NLP) an add over time is the mean of its distances, theirs the sum: K times as long, the sum
        is a nearly constant vector that drowns the token beside it in the LayerNorm. The factor can be
        folded into W2. On the embedded verses it makes the all-add encoder's BLEU 13.0 instead of 2.2.
    D11 a step gives each operator of a position a part of the images (sample_fairly); theirs draws one path.

Why the official form of sharing breaks, and what SharedWeight does instead (measured in results/sharing.md)
    Theirs: w and the slopes of T are N(0, 1), so half of the bins flip signs and convolutions start at ten
    times their fan-in scale; adds, eta-normalised, pull w 2,000 times as hard as convolutions, and Adam's
    steps belong to them alone; the divergence compares positions with noise, which says nothing of a density.
    Here: w starts and stays N(0, 2 / fan_in), adds read T(w) = F_Laplace^-1(Phi(w / std)) of equal variance,
    one term, KL(w || N) = KL(T(w) || Laplace), holds both densities, all operators pull with one strength,
    and each is drawn equally often. T has no parameters. A larger Laplacian (b = 0.5) makes inherited adds as
    good as convolutions, which trained alone they are not: accuracy gains, the ranking is lost.
"""

import collections
import copy
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

OPS = {"c": "conv", "s": "shift", "a": "add", "t": "attn"}

# ------------------------------------------------------------------------------------------- §1 rounding


class _StraightThrough(torch.autograd.Function):
    """Returns `value`; the gradient goes to x unchanged."""

    @staticmethod
    def forward(ctx, x, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _lowest_exponent(weight_bits, spare):
    """Exponents of a weight_bits code: one bit for the sign, `spare` codes not used."""
    if weight_bits < 2:
        raise ValueError(f"weight_bits must be at least 2 (a sign and an exponent), got {weight_bits}")
    return -(2 ** (weight_bits - 1) - spare)


def power_of_two(weight, weight_bits=5):
    """Nearest signed power of two in the exponent (DeepShift-Q, the form of the last official supernets).

        W = sign(w) * 2^s,  s = clip(round(log2 |w|), -(2^(b-1) - 1), 0);  zero stays zero

    weight any shape, float -> same shape. Gradient: dL/dw = dL/dW (straight through). Never in place.
    Raises ValueError if weight_bits < 2. Source: official modules_q.py (which clamps the parameter itself).
    """
    lowest = _lowest_exponent(weight_bits, 1)
    with torch.no_grad():
        exponent = weight.abs().log2().round_().clamp_(lowest, 0)
        value = weight.sign() * exponent.exp2_()
    return _StraightThrough.apply(weight, value)


def shift_weight(shift, sign, weight_bits=5):
    """Power-of-two weight from its own exponent and sign parameters (DeepShift-PS).

        W = b * 2^s,  s = round(clip(shift, -(2^(b-1) - 2), 0)),  b = sgn(round(sign)) in {-1, 0, 1}

    |sign| <= 0.5 gives 0. Gradients as the official ste.py has them: dL/dshift = dL/dW * b * 2^s * ln 2,
    dL/dsign = dL/dW (not times 2^s); round and clip pass the gradient. Raises ValueError if weight_bits < 2.
    """
    lowest = _lowest_exponent(weight_bits, 2)
    with torch.no_grad():
        b = sign.round().sign_()
        s = shift.clamp(lowest, 0).round_()
    return _StraightThrough.apply(sign, b.clone()) - b + b * torch.exp2(_StraightThrough.apply(shift, s))


def fixed_point(x, fraction_bits=16, integer_bits=16):
    """Rounds down to a fixed-point grid: clip(floor(x * 2^f) / 2^f, -2^(i-1), 2^(i-1) - 1).

    x any shape, float -> same shape. Gradient straight through, clipped values included. The official
    "quant_bits=16" is the length of the fraction. Source: official deepshift/utils.py.
    """
    with torch.no_grad():
        value = (x * 2.0**fraction_bits).floor_().mul_(2.0**-fraction_bits)
        value.clamp_(-(2.0 ** (integer_bits - 1)), 2.0 ** (integer_bits - 1) - 1)
    return _StraightThrough.apply(x, value)


# ------------------------------------------------------------------------------------------ §2 operators


def shift_conv2d(x, weight, stride=1, padding=0, groups=1):
    """Convolution by powers of two: on fixed-point inputs each product is a bit shift.

        y = conv2d(fixed_point(x), power_of_two(weight))

    x (N, C, H, W), weight (M, C/G, K, K) -> (N, M, H', W'), H' = (H + 2P - K)//S + 1. A weight that is a
    power of two already (from shift_weight, say) is used as it is. Gradients: convolution's, straight through
    both roundings. Raises ValueError (shapes, stride, groups). Source: official deepshift/modules_q.py.
    """
    conv_shape(x.shape, weight.shape, stride, padding, groups)
    return F.conv2d(fixed_point(x), power_of_two(weight), None, stride, padding, 1, groups)


def attention2d(x, weight, head_dim, official=False):
    """Multi-head self-attention over the positions of a map.

        q, k, v = split(weight * x);  y[:, i] = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v[:, j]

    x (N, C, H, W), weight (3C, C, 1, 1) -> (N, C, H, W), C / head_dim heads. The weights that enter one
    output position sum to 1; official=True has the transposed matrix instead, for published weights (D1).
    Raises ValueError if head_dim does not divide C.
    Source: official hytra_ops.py, Attention.
    """
    n, c, h, w = x.shape
    if c % head_dim:
        raise ValueError(f"head_dim must divide the {c} channels, got {head_dim}")
    qkv = F.linear(x.flatten(2).mT, weight[:, :, 0, 0])  # (N, HW, 3C): a token's numbers side by side
    q, k, v = qkv.view(n, h * w, 3, c // head_dim, head_dim).permute(2, 0, 3, 1, 4).unbind()
    if official:
        y = (q @ k.transpose(2, 3) * head_dim**-0.5).softmax(3).transpose(2, 3) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(2, 3).reshape(n, c, h, w)


# ----------------------------------------------------------------------------------- §2 compiled kernels

BUILDS = {  # SHIFTADDNAS_KERNELS -> compiler flags of that build of kernels.cu
    "cpu": ["-march=native"],
    "cpu-avx2": ["-mavx2", "-mfma"],
    "cpu-portable": [],
    "emulate": ["-DEMULATE"],  # the code of the GPU kernels on CPU threads
    "gpu": [],
}


# sizes of one convolution, in the order of struct ConvShape in kernels.cu
ConvShape = collections.namedtuple("ConvShape", "N C H W M KH KW S P G Ho Wo")


def conv_shape(x_size, w_size, stride, padding, groups):
    """ConvShape of x (N, C, H, W) and weight (M, C/G, KH, KW); ValueError if they do not fit together."""
    sizes = f"x {tuple(x_size)}, weight {tuple(w_size)}, stride {stride}, padding {padding}, groups {groups}"
    if len(x_size) != 4 or len(w_size) != 4:
        raise ValueError(f"x and weight must have 4 dimensions: {sizes}")
    (N, C, H, W), (M, Cg, KH, KW) = x_size, w_size
    if stride < 1 or padding < 0 or groups < 1:
        raise ValueError(f"stride and groups must be at least 1 and padding at least 0: {sizes}")
    if C != groups * Cg or M % groups or Cg < 1:
        raise ValueError(
            f"channels of x must equal groups * weight.shape[1], and groups divide the filters: {sizes}"
        )
    if min(KH, KW) < 1 or KH > H + 2 * padding or KW > W + 2 * padding:
        raise ValueError(f"the kernel must fit into the padded image: {sizes}")
    Ho, Wo = (H + 2 * padding - KH) // stride + 1, (W + 2 * padding - KW) // stride + 1
    if max(C * H * W, M * Ho * Wo, M * Cg * KH * KW) >= 2**30:
        raise ValueError(f"an image, its result and the weight must have fewer than 2^30 numbers: {sizes}")
    return ConvShape(N, C, H, W, M, KH, KW, stride, padding, groups, Ho, Wo)


def compiler_command(build):
    """Compiler and flags of a build; RuntimeError, with the reason, if this machine cannot make or run it."""
    if build == "gpu":
        nvcc = shutil.which("nvcc")
        if nvcc is None or not torch.cuda.is_available():
            missing = "a GPU that torch can use" if nvcc else "nvcc on the PATH"
            raise RuntimeError(f"the gpu build needs {missing}")
        major, minor = torch.cuda.get_device_capability()
        return [nvcc, "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise RuntimeError(f"the {build} build needs a C++ compiler, and {name} is not on the PATH")
    if build == "cpu-avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise RuntimeError("the cpu-avx2 build needs a CPU with AVX2")
    flags = ["-x", "c++", "-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", *BUILDS[build]]
    return [shutil.which(name), *flags]


def cpu_model():
    """Model and instruction sets of the CPU: part of a library's name, for -march=native is this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor()


@functools.cache
def private_folder():
    """A folder of this process, removed at its end, for when the cache cannot be written."""
    return tempfile.TemporaryDirectory(prefix="shiftaddnas-")


def read_library(file):
    """The CDLL in `file`, or None if there is none or its last 32 bytes, the SHA-256 of the rest, do not fit:
    opening a half-written library would end the process."""
    try:
        content = file.read_bytes()
        whole = hashlib.sha256(content[:-32]).digest() == content[-32:]
        return ctypes.CDLL(str(file)) if whole else None
    except OSError:
        return None


def compile_library(command, source, file):
    """Compile to a temporary name, add the checksum, move into place: a reader never sees half a library."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        part = Path(folder) / file.name
        run = subprocess.run([*command, str(source), "-o", str(part)], capture_output=True, text=True)
        if run.returncode or not part.exists():
            text = (run.stderr or run.stdout).strip()[:2000]
            raise RuntimeError(
                f"compiling {source.name} failed (status {run.returncode}): {' '.join(command)}\n{text}"
            )
        content = part.read_bytes()
        part.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(part, file)


@functools.cache
def load_kernels(build):
    """The library of one build, compiled on first use and kept in $XDG_CACHE_HOME/shiftaddnas (or ~/.cache)
    under the hash of source, command and CPU. RuntimeError says why it cannot be had."""
    source = Path(__file__).with_name("kernels.cu")
    if not source.exists():
        raise RuntimeError(f"{source.name} is not beside {Path(__file__).name}")
    command = compiler_command(build)
    key = hashlib.sha256("\0".join([source.read_text(), *command, cpu_model()]).encode()).hexdigest()[:16]
    name = f"{build}-{key}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shiftaddnas"
        library = read_library(folder / name)
        if library is None:
            folder.mkdir(parents=True, exist_ok=True)
            compile_library(command, source, folder / name)
    except OSError:  # the cache cannot be written
        library, folder = None, Path(private_folder().name)
        compile_library(command, source, folder / name)
    library = library or read_library(folder / name)
    if library is None:
        raise RuntimeError(f"the {build} build was compiled, but {folder / name} cannot be loaded")
    library.status_text.restype = ctypes.c_char_p
    return library


@functools.cache
def say_once(line):
    """One line on stderr, once in a process."""
    print(line, file=sys.stderr)


def kernel_build(device_type):
    """The build that serves tensors of this device ("cpu", "cuda", ...), or None for the torch definition.

    SHIFTADDNAS_KERNELS names the path: off | cpu | cpu-avx2 | cpu-portable | emulate | gpu. Unset: the cpu
    build for CPU tensors and the gpu build for CUDA tensors where they can be compiled, else the torch
    definition, which one line says. RuntimeError if the path is impossible, ValueError if there is none.
    """
    forced = os.environ.get("SHIFTADDNAS_KERNELS", "")
    if forced and forced != "off" and forced not in BUILDS:
        raise ValueError(f"SHIFTADDNAS_KERNELS={forced}: allowed are off, {', '.join(BUILDS)}")
    if forced == "off":
        return None
    if forced:
        load_kernels(forced)
        if (forced == "gpu") != (device_type == "cuda"):
            raise RuntimeError(f"SHIFTADDNAS_KERNELS={forced} cannot serve tensors on {device_type}")
        return forced
    build = {"cpu": "cpu", "cuda": "gpu"}.get(device_type)
    try:
        if build:
            load_kernels(build)
        return build
    except RuntimeError as error:
        say_once(f"shiftaddnas: add layers run in plain torch, no kernels: {str(error).splitlines()[0]}")
        return None


def call_kernel(build, name, shape, *tensors):
    """Run one function of kernels.cu on contiguous tensors of one device and return the first, its result.
    The CPU builds get torch's thread count, the gpu build torch's current stream. RuntimeError with function,
    shapes and the library's text if it fails."""
    library = load_kernels(build)
    pointers = [*(ctypes.c_void_p(t.data_ptr()) for t in tensors), (ctypes.c_int32 * len(shape))(*shape)]
    if build == "gpu":
        with torch.cuda.device(tensors[0].device):
            stream = torch.cuda.current_stream().cuda_stream
            status = getattr(library, name)(*pointers, ctypes.c_int64(stream))
    else:
        status = getattr(library, name)(*pointers, ctypes.c_int64(torch.get_num_threads()))
    if status:
        sizes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise RuntimeError(f"{name} ({build}) on {sizes}: {library.status_text(status).decode()}")
    return tensors[0]


# ---------------------------------------------------------------------------------- §2 the add operator


def add_patches(x, w, stride, padding, groups):
    """Yield (images, patches (n, G, C/G*KH*KW, L), filters (G, M/G, C/G*KH*KW)) for 64 MB of images each."""
    s = conv_shape(x.shape, w.shape, stride, padding, groups)
    K, L = w[0].numel(), s.Ho * s.Wo
    step = max(1, 2**24 // max(1, groups * K * L))
    for n in range(0, s.N, step):
        patches = F.unfold(x[n : n + step], (s.KH, s.KW), padding=padding, stride=stride)
        yield slice(n, n + step), patches.view(-1, groups, K, L), w.reshape(groups, -1, K)


def add_conv2d_definition(x, w, stride, padding, groups):
    """add_conv2d in plain torch: unfold, then the L1 distance of each patch to each filter."""
    s = conv_shape(x.shape, w.shape, stride, padding, groups)
    y = x.new_zeros(s.N, s.M, s.Ho, s.Wo)
    if y.numel():
        for images, patches, filters in add_patches(x, w, stride, padding, groups):
            y[images] = -torch.cdist(filters, patches.transpose(2, 3), p=1).view_as(y[images])
    return y


def add_conv2d_grad_x_definition(g, x, w, stride, padding, groups):
    """Gradient rule of add_conv2d for x in torch: sum of g * clip(w - x, -1, 1), folded to the image."""
    s = conv_shape(x.shape, w.shape, stride, padding, groups)
    grad = torch.zeros_like(x)
    if x.numel() and g.numel():
        for images, patches, filters in add_patches(x, w, stride, padding, groups):
            g_rows = g[images].reshape(len(patches), groups, -1, s.Ho * s.Wo)
            columns = torch.zeros_like(patches)
            for m in range(s.M // groups):
                columns += g_rows[:, :, m, None] * (filters[:, m, :, None] - patches).clamp(-1, 1)
            grad[images] = F.fold(
                columns.flatten(1, 2), (s.H, s.W), (s.KH, s.KW), padding=padding, stride=stride
            )
    return grad


@torch.library.custom_op("shiftaddnas::add_conv2d", mutates_args=())
def add_conv2d_op(x: torch.Tensor, w: torch.Tensor, stride: int, padding: int, groups: int) -> torch.Tensor:
    """Forward of add_conv2d as an operator that autograd and torch.compile know."""
    build = kernel_build(x.device.type) if x.dtype == torch.float32 else None
    if build is None:
        return add_conv2d_definition(x, w, stride, padding, groups)
    s = conv_shape(x.shape, w.shape, stride, padding, groups)
    return call_kernel(
        build, "add_conv2d_forward", s, x.new_empty(s.N, s.M, s.Ho, s.Wo), x.contiguous(), w.contiguous()
    )


@torch.library.custom_op("shiftaddnas::add_conv2d_grad_x", mutates_args=())
def add_conv2d_grad_x_op(
    g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, stride: int, padding: int, groups: int
) -> torch.Tensor:
    """Gradient of add_conv2d for x, an operator of its own so that a compiled backward can hold it."""
    build = kernel_build(x.device.type) if x.dtype == torch.float32 else None
    if build is None:
        return add_conv2d_grad_x_definition(g, x, w, stride, padding, groups)
    s = conv_shape(x.shape, w.shape, stride, padding, groups)
    grad = x.new_empty(x.shape)
    return call_kernel(build, "add_conv2d_grad_x", s, grad, g.contiguous(), x.contiguous(), w.contiguous())


@add_conv2d_op.register_fake
def _(x, w, stride, padding, groups):
    N, M = x.shape[0], w.shape[0]
    return x.new_empty(N, M, *((a + 2 * padding - k) // stride + 1 for a, k in zip(x.shape[2:], w.shape[2:])))


@add_conv2d_grad_x_op.register_fake
def _(g, x, w, stride, padding, groups):
    return x.new_empty(x.shape)


def product_grad_w(g, x, w, stride, padding, groups):
    """Weight gradient of the convolution of this geometry: sum of g * x."""
    if x.shape[2:] == w.shape[2:] == (1, 1) and padding == 0 and groups == 1:  # a linear layer: one product
        return (g[:, :, 0, 0].T @ x[:, :, 0, 0])[:, :, None, None]
    strides, paddings, wanted = [stride] * 2, [padding] * 2, (False, True, False)
    backward = torch.ops.aten.convolution_backward
    return backward(g, x, w, None, strides, paddings, [1, 1], False, [0, 0], groups, wanted)[1]


def add_conv2d_backward(ctx, g):
    """dL/dx = sum g clip(w - x, -1, 1); dL/dw = sum g x (a convolution's weight gradient) - w sum g."""
    x, w = ctx.saved_tensors
    stride, padding, groups = ctx.geometry
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = add_conv2d_grad_x_op(g, x, w, stride, padding, groups)
    if ctx.needs_input_grad[1]:
        grad_w = product_grad_w(g, x, w, stride, padding, groups)
        grad_w = grad_w.addcmul_(w, g.sum((0, 2, 3)).view(-1, 1, 1, 1), value=-1)
    return grad_x, grad_w, None, None, None


def add_conv2d_setup(ctx, inputs, output):
    """Keeps x, w and the geometry for add_conv2d_backward."""
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry = inputs[2:]


add_conv2d_op.register_autograd(add_conv2d_backward, setup_context=add_conv2d_setup)


def add_conv2d(x, weight, stride=1, padding=0, groups=1):
    """Adder convolution: minus the L1 distance between each patch and each filter (AdderNet).

        y[n,m,i,j] = - sum_{c,u,v} | x[n, g(m)*C/G + c, i*S+u-P, j*S+v-P] - weight[m,c,u,v] |

    x (N, C, H, W) float, weight (M, C/G, KH, KW) same dtype and device -> (N, M, H', W'),
    H' = (H + 2P - KH)//S + 1.
    Zero padding is not neutral: a padded tap costs |weight|.  Output is never positive.
    float32 runs in the kernels of kernels.cu (see kernel_build), float16 and bfloat16 are converted to
    float32 and back, float64 is always the torch definition.  Sums are float32; where x and weight nearly
    cancel (a common offset) |x - w| itself is summed: an offset of 100 leaves a relative error below 1e-4.
    Gradient (not the true one):  dy/dweight = x - weight,  dy/dx = clip(weight - x, -1, 1)
    Raises ValueError if shapes, dtypes or devices do not fit; RuntimeError if a path that was asked for is
    impossible.
    """
    conv_shape(x.shape, weight.shape, stride, padding, groups)
    if x.dtype != weight.dtype or x.device != weight.device or not x.is_floating_point():
        raise ValueError(
            f"x and weight must be floating and alike: {x.dtype} on {x.device}, "
            f"{weight.dtype} on {weight.device}"
        )
    if x.dtype in (torch.float16, torch.bfloat16):
        return add_conv2d_op(x.float(), weight.float(), stride, padding, groups).to(x.dtype)
    return add_conv2d_op(x, weight, stride, padding, groups)


def add_linear(x, weight):
    """y[..., m] = - sum_c |x[..., c] - weight[m, c]|, a 1x1 add_conv2d. x (..., C), weight (M, C)."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x (..., C) and weight (M, C) must share C: x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    rows = x.reshape(-1, x.shape[-1])
    return add_conv2d(rows[:, :, None, None], weight[:, :, None, None]).view(*x.shape[:-1], len(weight))


# ------------------------------------------------------------------------------- §2 integer arithmetic


def pack_shift(weight):
    """Power-of-two weights in 5 bits each, lossless.

    A weight +-2^-e, e in 0 .. 15, has the code 16 (w < 0) + e; the codes fill the bits 5k .. 5k + 4 of bytes
    1, 2, ..., lowest bit first. All 32 codes are taken: if the weight has zeros, code 31 stands for 0 instead
    of -2^-15 and byte 0 is 1, else 0. weight any shape, float -> uint8 (1 + ceil(5 numel / 8),).
    Raises ValueError for any other value, and for 0 and -2^-15 in one weight.
    """
    w = weight.detach().flatten().double()
    mantissa, exponent = torch.frexp(w)
    e, zero = 1 - exponent, w == 0
    bad = ~zero & ((mantissa.abs() != 0.5) | (e < 0) | (e > 15))
    if bad.any():
        raise ValueError(f"5-bit codes hold 0 and +-2^-e, e in 0 .. 15, not {w[bad][0].item()}")
    codes = torch.where(zero, 31, e + 16 * (w < 0))
    if zero.any() and (codes == 31).sum() > zero.sum():
        raise ValueError("5-bit codes hold 0 or -2^-15, and this weight has both")
    bits = (codes[:, None] >> torch.arange(5, device=w.device)) & 1
    bits = F.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    packed = (bits << torch.arange(8, device=w.device)).sum(1)
    return torch.cat([zero.any().view(1), packed]).to(torch.uint8)


def unpack_shift(packed, shape):
    """The float32 weight of this shape that pack_shift packed. ValueError if size or dtype do not fit."""
    n = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (1 + (5 * n + 7) // 8,):
        need, got = 1 + (5 * n + 7) // 8, f"{tuple(packed.shape)} {packed.dtype}"
        raise ValueError(f"{tuple(shape)} weights need {need} bytes of uint8, got {got}")
    bits = (packed[1:, None].int() >> torch.arange(8, device=packed.device)) & 1
    codes = (bits.flatten()[: 5 * n].view(n, 5) << torch.arange(5, device=packed.device)).sum(1)
    w = torch.ldexp(1.0 - 2.0 * (codes >> 4), -(codes & 15))
    return torch.where((codes == 31) & (packed[0] == 1), 0.0, w).view(shape)


def int_conv2d_definition(term, x, w, stride, padding, groups):
    """sum over the taps of term(x, w) in plain torch, int64, filter by filter; padding is x = 0."""
    s = conv_shape(x.shape, w.shape, stride, padding, groups)
    x = F.pad(x.long(), (padding,) * 4)
    rows, columns = stride * (s.Ho - 1) + 1, stride * (s.Wo - 1) + 1
    y = torch.zeros(s.N, s.M, s.Ho, s.Wo, dtype=torch.int64, device=x.device)
    for m in range(s.M):
        first = m // (s.M // groups) * w.shape[1]
        for u in range(s.KH):
            for v in range(s.KW):
                tap = x[:, first : first + w.shape[1], u : u + rows : stride, v : v + columns : stride]
                y[:, m] += term(tap, w[m, :, u, v, None, None].long()).sum(1)
    return y


def int_conv2d(name, x, w, shape, geometry):
    """The function `name` of kernels.cu on CPU tensors; None where no build holds it, for the definition."""
    build = kernel_build("cpu") if x.device.type == "cpu" else None
    if build in (None, "emulate"):  # the emulated build holds the GPU kernels, which are float
        return None
    s = conv_shape(x.shape, shape, *geometry)
    dtype = torch.int32 if name == "add_conv2d_u8" else torch.int64
    y = torch.empty(s.N, s.M, s.Ho, s.Wo, dtype=dtype)
    return call_kernel(build, name, s, y, x.contiguous(), w.contiguous()) if y.numel() else y


def require_dtypes(name, x, w, x_dtype, w_dtype):
    """ValueError if the operands of an integer operator have other types or are on two devices."""
    if (x.dtype, w.dtype) != (x_dtype, w_dtype) or x.device != w.device:
        raise ValueError(
            f"{name} takes {x_dtype} and {w_dtype} on one device, "
            f"got {x.dtype} on {x.device} and {w.dtype} on {w.device}"
        )


def shift_conv2d_int(x, packed, shape, stride=1, padding=0, groups=1):
    """Shift convolution by shifts and additions only, exact: 2^15 * conv2d(x, unpack_shift(packed, shape)).

        y = sum +-(x << (15 - e)) over the taps whose weight is +-2^-e

    x (N, C, H, W) int32, packed = pack_shift(weight) of shape (M, C/G, KH, KW) -> (N, M, H', W') int64, so no
    bit is lost. Raises ValueError if shapes, sizes or dtypes do not fit.
    """
    require_dtypes("shift_conv2d_int", x, packed, torch.int32, torch.uint8)
    weight = unpack_shift(packed, shape)
    conv_shape(x.shape, shape, stride, padding, groups)
    y = int_conv2d("shift_conv2d_int", x, packed, shape, (stride, padding, groups))
    factors = (weight * 2.0**15).long()
    return int_conv2d_definition(torch.mul, x, factors, stride, padding, groups) if y is None else y


def add_conv2d_int(x, weight, stride=1, padding=0, groups=1):
    """add_conv2d of int32, exact, int64 result. Raises ValueError if shapes or dtypes do not fit."""
    require_dtypes("add_conv2d_int", x, weight, torch.int32, torch.int32)
    return add_conv2d_exact("add_conv2d_int", x, weight, stride, padding, groups)


def add_conv2d_u8(x, weight, stride=1, padding=0, groups=1):
    """add_conv2d of bytes, exact, int32 result (up to 2^23 taps), by the CPU's own instruction for sums of
    absolute differences of bytes where it has one. Raises ValueError if shapes or dtypes do not fit."""
    require_dtypes("add_conv2d_u8", x, weight, torch.uint8, torch.uint8)
    return add_conv2d_exact("add_conv2d_u8", x, weight, stride, padding, groups).int()


def add_conv2d_exact(name, x, weight, *geometry):
    """-sum |x - weight| of integers, by the kernel of this name or the definition."""
    conv_shape(x.shape, weight.shape, *geometry)
    y = int_conv2d(name, x, weight, weight.shape, geometry)
    return int_conv2d_definition(lambda a, b: -(a - b).abs(), x, weight, *geometry) if y is None else y


# ------------------------------------------------------------------------------------------- §3 sharing


@dataclass(frozen=True)
class Sharing:
    """Which operators of a layer read one tensor, and how. Letters as in an arch."""

    shared: str = "csa"  # operators that read the one tensor; the others own theirs
    transformed: str = "a"  # those that read T(w) instead of w
    shift_form: str = "Q"  # of an unshared shift: Q rounds a latent weight, PS owns exponent and sign
    bins: int = 100  # slopes of T
    learned: bool = False  # the slopes are parameters, as published
    gain: float = 0.5**0.5  # b / std: scale of the Laplacian over that of the Gaussian; equal variances
    balanced: bool = True  # the gradient of T(w) gets the length of the other operators' on w
    eta: float = 0.0  # add layers normalise the gradient of T(w) to this (HybridConv2d); 0: not
    official: bool = False  # the defects that D3 and D5 mend, for comparison (see SharedWeight)


SHARING = {
    "none": Sharing(shared="", transformed=""),
    "naive": Sharing(transformed=""),
    "official": Sharing(transformed="sa", learned=True, balanced=False, eta=0.2, official=True),
    "heterogeneous": Sharing(),
}
REACH = 5.0  # the bins of T cut -REACH std .. REACH std


def laplace_slopes(bins, gain):
    """T(w) / w at the centre of each bin, for the T of SharedWeight; a function of w / std alone."""
    z = (REACH * ((2 * torch.arange(bins) + 1) / bins - 1)).abs().clamp_min(1e-3)
    return -gain * (math.log(2) + torch.special.log_ndtr(-z)) / z


class SharedWeight(nn.Module):
    """One latent tensor w that convolution, shift and add read in their own way (the paper's second enabler).

        conv   w                                     target density N(0, std^2), std = sqrt(2 / fan_in)
        shift  sign(w) 2^round(log2|w|)              rounded inside shift_conv2d, gradient straight through
        add    T(w) = slope[bin(w / std)] * w        target density Laplace(0, b), b = gain * std

    T sends the Gaussian to the Laplacian, quantile to quantile: T(w) = F_Laplace^-1(Phi(w / std)), that is
    -sign(w) b (log 2 + log Phi(-|w| / std)). It is read from a table: T(w) / w at the centres of `bins` equal
    bins of -REACH std .. REACH std, the outer ones open. T is monotone, and T(w) is Laplacian if w is
    Gaussian, with gain = sqrt(1/2) of the variance of w. A KL is the same before and after an invertible map,
    so one term, KL(w || N(0, std^2)), holds both densities. sharing.learned: the slopes are parameters, and
    T(w) has a term of its own.

    Gradient on w of an add: slope * gradient of T(w); bins carry none. In a backward pass that other
    operators take part in too (SearchSpace.sample_fairly) it gets the length of theirs: the batch norms
    behind L1 distances leave 1/100 to 1/20,000 of it, and w would belong to conv and shift alone.
    Source: abstract; official hytra_ops_ws_dist.py (deviations D3, D4, D5).

    sharing.official has the official form instead: w and the slopes start as N(0, 1), shift reads a T of its
    own, and the bins cut the range of w, whose largest element falls out of the half-open last one and
    becomes 0.
    """

    def __init__(self, shape, readers, sharing=SHARING["none"], std=None):
        super().__init__()
        self.readers, self.std = readers, std or math.sqrt(2 / math.prod(shape[1:]))
        self.pair = readers == ["shift"] and sharing.shift_form == "PS"
        self.official, self.learned, self.eta = sharing.official, sharing.learned, sharing.eta
        self.b = sharing.gain * self.std
        if self.pair:
            self.w = nn.Parameter(torch.stack([torch.rand(shape) * -14, torch.rand(shape) * 2 - 1]))
        else:
            std = 1.0 if not std and readers == ["add"] or self.official else self.std
            self.w = nn.Parameter(torch.randn(shape) * std)
        ops = [OPS[letter] for letter in sharing.transformed]
        self.transformed = [op for op in ops if op in readers and len(readers) > 1]
        self.balanced = sharing.balanced and bool(self.transformed)
        self.parts = {}  # gradients on w in the backward pass at hand, by whether they came through T
        if self.balanced:
            self.w.register_hook(self.balance)
        for op in self.transformed:
            slope = laplace_slopes(sharing.bins, sharing.gain)
            if self.learned:
                slope = nn.Parameter(torch.randn(sharing.bins) if self.official else slope)
                self.register_parameter("slope_" + op, slope)
            else:
                self.register_buffer("slope_" + op, slope, persistent=False)

    def weight_for(self, op):
        """The tensor that op's operator takes, connected to w (and learned slopes) by autograd."""
        if self.pair:
            return shift_weight(self.w[0], self.w[1])
        if op not in self.transformed:
            return self.read(False)
        slope, w = getattr(self, "slope_" + op), self.w.detach()
        lo, hi = w.aminmax() if self.official else (-REACH * self.std, REACH * self.std)
        unit = (w - lo) / (hi - lo)
        index = (unit * len(slope)).long().clamp_(0, len(slope) - 1)
        transformed = self.read(True) * slope.index_select(0, index.flatten()).view_as(w)
        return transformed * (unit < 1) if self.official else transformed

    def read(self, part):
        """w; if gradients are balanced, what comes back here is added up in parts[part]."""
        if not self.balanced:
            return self.w
        source = self.w.view_as(self.w)
        if source.requires_grad:
            source.register_hook(lambda grad: self.parts.update({part: self.parts.get(part, 0) + grad}))
        return source

    def balance(self, grad):
        """Hook of w's whole gradient: that through T gets the length of the other operators', if both are
        there. The factor is at most 10^6: an add block still shut by its last batch norm passes next to
        nothing."""
        parts, self.parts = self.parts, {}
        if len(parts) < 2:
            return grad
        factor = (parts[False].norm() / parts[True].norm().clamp_min(1e-30)).clamp_max(1e6)
        return torch.where(factor > 0, grad + parts[True] * (factor - 1), grad)

    def owned(self, op):
        """What op reads now, as a SharedWeight of its own: same output, nothing shared or transformed."""
        own = copy.deepcopy(self)
        if not self.pair:
            own.w, own.transformed = nn.Parameter(self.weight_for(op).detach().clone()), []
            for name in self.transformed:
                delattr(own, "slope_" + name)
        return own

    def sample(self, op, limit=512):
        """(elements that op reads, about `limit`, evenly strided, in units of std or b; name of the target
        density in DENSITIES)."""
        transformed = op in self.transformed and self.learned
        w = self.weight_for(op) / self.b if transformed else self.w / self.std
        return w.flatten()[:: max(1, w.numel() // limit)], "laplace" if transformed else "normal"


DENSITIES = {  # log q of a tensor
    "normal": lambda a: -0.5 * a**2 - 0.5 * math.log(2 * math.pi),
    "laplace": lambda a: -a.abs() - math.log(2),
}


def kl_divergence(sample, log_density):
    """KL(P || q) = E_P[log p] - E_P[log q] from samples of P, differentiable in them.

    sample (..., n), log_density maps a tensor to log q -> scalar in nats, mean over the rows. The entropy
    comes from the m-spacings of the sorted sample (Vasicek), m = n^(1/3), with the exact bias for a uniform
    density: E[log(spacing)] = digamma(2m) - digamma(n + 1). ValueError if n <= 2m.
    """
    x, n = sample.sort().values, sample.shape[-1]
    m = max(1, round(n ** (1 / 3)))
    if n <= 2 * m:
        raise ValueError(f"a divergence needs more than {2 * m} elements, got {n}")
    spacing = (x[..., 2 * m :] - x[..., : -2 * m]).clamp_min(1e-12)
    log_p = torch.digamma(torch.tensor(2.0 * m)) - torch.digamma(torch.tensor(n + 1.0)) - spacing.log()
    return (log_p - log_density(x[..., m:-m])).mean()


def mean_divergence(layers):
    """Mean over the densities of the shared weights that some layers, (weight, op) each, read: KL to their
    targets, in nats an element; each density counts once. 0 if none is transformed."""
    rows = collections.defaultdict(list)
    pairs = {(weight, weight.learned and op): op for weight, op in layers if weight.transformed}
    for (weight, _), op in pairs.items():
        row, density = weight.sample(op)
        rows[density, len(row)].append(row)  # one call for all rows of a length
    terms = [len(same) * kl_divergence(torch.stack(same), DENSITIES[key[0]]) for key, same in rows.items()]
    return sum(terms) / max(1, len(pairs))


def official_kl(weight, generator):
    """The official divergence, for comparison: (1/n) sum_i q_i (log q_i - log p_i), p = softmax(weight) over
    the n positions, q = softmax(z), z ~ Laplace(0, 2) drawn afresh. Source: official hytra_ops_ws_dist.py."""
    uniform = torch.rand(weight.numel(), generator=generator).to(weight.device) - 0.5
    z = -2 * uniform.sign() * torch.log1p(-2 * uniform.abs().clamp_max(0.5 - 2**-24))  # 0.5 would be infinite
    return (z.softmax(0) * (z.log_softmax(0) - weight.flatten().log_softmax(0))).mean()


# -------------------------------------------------------------------------------------------- §4 blocks

OPERATORS = {"conv": F.conv2d, "shift": shift_conv2d, "add": add_conv2d}


class HybridConv2d(nn.Module):
    """A convolution, shift or add layer with its own weight, or reading a SharedWeight.

    x (N, C, H, W) -> (N, M, H', W'). eta (add only, AdderNet): the weight gradient of each backward is scaled
    to the length eta * sqrt(numel), because the gradient of an L1 distance is far longer than a convolution's
    and plain SGD needs one step size for both. It makes the gradient independent of the loss scale, so leave
    it off under Adam, and on a shared weight, where it would drown the other operators' gradients.
    """

    def __init__(
        self, op, c_in, c_out, kernel, stride=1, padding=None, groups=1, bias=False, weight=None,
        shift_form="Q", eta=None,
    ):
        super().__init__()
        self.op, self.stride, self.groups = op, stride, groups
        self.eta = weight.eta if weight and op == "add" else eta
        self.padding = kernel // 2 if padding is None else padding
        self.shape = (c_out, c_in // groups, kernel, kernel)
        self.weight = weight or SharedWeight(
            self.shape, [op], replace(SHARING["none"], shift_form=shift_form)
        )
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None

    def forward(self, x):
        w = self.weight.weight_for(self.op)
        if self.eta and w.requires_grad:
            length = self.eta * math.sqrt(w.numel())
            w = w.view_as(w)  # a hook on the parameter itself would pile up
            w.register_hook(lambda grad: grad * (length / grad.norm().clamp_min(1e-12)))
        x = x.to(w.dtype) if self.op == "add" else x  # under autocast distances stay float32
        y = OPERATORS[self.op](x, w, stride=self.stride, padding=self.padding, groups=self.groups)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class SqueezeExcite(nn.Module):
    """Channel gate of the retraining networks: x * sigmoid(W2 relu(W1 mean(x))), reduction 16."""

    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 16, 1)
        self.expand = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Entrance(nn.Module):
    """First half of a block: x -> (shortcut, act(BN(PEG(conv1 x)))); PEG, depthwise 3x3, has the stride.

    The shortcut is the identity when width and map stay; else a projection by the block's own operator, 3x3
    for a stride of 2. The retraining form projects by average pool and 1x1, without activation.
    """

    def __init__(self, op, c_in, c_out, stride, space, weights, suffix, shift_form):
        super().__init__()
        p = c_out // 4
        layer = {"shift_form": shift_form}
        biased = op == "conv" or op == "shift" and (shift_form == "PS" or space.retraining)  # official
        self.conv1 = HybridConv2d(op, c_in, p, 1, weight=weights.get("conv1" + suffix), **layer)
        self.peg = HybridConv2d(op, p, p, 3, stride, groups=p, bias=biased, **layer)
        self.bn = nn.BatchNorm2d(p)
        self.act = space.activation()
        self.shortcut = nn.Identity()
        if stride > 1 or c_in != c_out:
            kernel = 3 if stride > 1 and not space.retraining else 1
            pool = stride if space.retraining else 1
            project = HybridConv2d(
                op, c_in, c_out, kernel, stride // pool, weight=weights.get("shortcut" + suffix), **layer
            )
            parts = [project, nn.BatchNorm2d(c_out)]
            parts = [nn.AvgPool2d(2, pool, ceil_mode=True, count_include_pad=False)] * (pool > 1) + parts
            self.shortcut = nn.Sequential(*parts, *([] if space.retraining else [space.activation()]))

    def forward(self, x):
        return self.shortcut(x), self.act(self.bn(self.peg(self.conv1(x))))


class Block(nn.Module):
    """Residual bottleneck whose layers are all of one op: ResConv, ResShift, ResAdd or ResAtt of the paper.

        h = act(BN(PEG(conv1 x)));  h = act(BN(middle(h)));  y = act(shortcut(x) + BN(conv3 h))

    middle is a 3x3 layer of the op, or self-attention, whose block is otherwise convolutional. `entrances`
    names the inputs the block can have, {"same": (C_in, 1), "down": (C_up, 2)}; forward picks one by name.
    The last BN starts at zero, so a block starts as its shortcut. `weights`: SharedWeights by layer name.
    Source: official hytra_ops.py; retraining form (SiLU, squeeze-excite, pooled shortcut): boss_candidates.
    """

    def __init__(self, op, c_out, entrances, space, weights=None, shift_form="Q"):
        super().__init__()
        p, weights, kind = c_out // 4, weights or {}, "conv" if op == "attn" else op
        self.op = op
        self.entrances = nn.ModuleDict(
            {
                name: Entrance(
                    kind, c_in, c_out, stride, space, weights, "_d" if name == "down" else "", shift_form
                )
                for name, (c_in, stride) in entrances.items()
            }
        )
        if op == "attn":
            self.middle = Attention2d(p, space.head_dim, space.official_attention)
        else:
            self.middle = HybridConv2d(kind, p, p, 3, weight=weights.get("conv2"), shift_form=shift_form)
        self.bn2, self.bn3, self.act = nn.BatchNorm2d(p), nn.BatchNorm2d(c_out), space.activation()
        self.conv3 = HybridConv2d(kind, p, c_out, 1, weight=weights.get("conv3"), shift_form=shift_form)
        self.gate = SqueezeExcite(c_out) if space.retraining and op != "attn" else nn.Identity()
        nn.init.zeros_(self.bn3.weight)

    def layers(self, entrance):
        """The HybridConv2d layers on the way from one entrance to the output."""
        parts = (self.entrances[entrance], self.middle, self.conv3)
        return [layer for part in parts for layer in part.modules() if isinstance(layer, HybridConv2d)]

    def forward(self, x, entrance="same"):
        shortcut, h = self.entrances[entrance](x)
        h = self.act(self.bn2(self.middle(h)))
        return self.act(shortcut + self.gate(self.bn3(self.conv3(h))))


class Attention2d(nn.Module):
    """attention2d with its own weight (3C, C, 1, 1)."""

    def __init__(self, channels, head_dim, official=False):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * channels, channels, 1, 1) * channels**-0.5)
        self.head_dim, self.official = head_dim, official

    def forward(self, x):
        return attention2d(x, self.qkv, self.head_dim, self.official)


# --------------------------------------------------------------------------------------------- §5 space


@dataclass(frozen=True)
class SearchSpace:
    """A set of networks: `depths` blocks over the resolutions, each block one of the resolution's `ops`.

    An arch is a string, one letter a block and "/" between resolutions: cc/sa/tt. Methods that draw take a
    torch.Generator. Source: official hytra_supernet.py and hytra_paths.py (get_all_config_v2).
    """

    name: str
    image: int  # side of the square input image
    in_channels: int
    classes: int
    stem: tuple  # (kernel, stride, width, pool): conv, BN, act, then 3x3 max pool of stride 2 if pool
    widths: tuple  # C_out per resolution; the bottleneck is p = C_out / 4
    strides: tuple  # stride of the first block of each resolution
    ops: tuple  # letters allowed per resolution
    depths: tuple  # allowed numbers of blocks per resolution
    head_dim: int  # attention has p / head_dim heads
    retraining: bool = False  # the form of the official retraining networks: SiLU, squeeze-excite
    distilled: bool = False  # networks have a second classifier, which learns from a teacher
    official_attention: bool = False  # the matrix of attention as published weights expect it (D1)

    def activation(self):
        return nn.SiLU() if self.retraining else nn.ReLU()

    def sizes(self):
        """Number of archs for each depth pattern."""
        return [
            math.prod(len(ops) ** depth for ops, depth in zip(self.ops, depths)) for depths in self.depths
        ]

    def size(self):
        """Number of archs, an exact integer."""
        return sum(self.sizes())

    def arch(self, index):
        """The arch of number `index` in 0 .. size() - 1 (mixed radix: depth pattern, then letters)."""
        for depths, size in zip(self.depths, self.sizes()):
            if index < size:
                break
            index -= size
        stages = []
        for ops, depth in zip(self.ops, depths):
            letters = ""
            for _ in range(depth):
                index, digit = divmod(index, len(ops))
                letters += ops[digit]
            stages.append(letters)
        return "/".join(stages)

    def sample(self, generator):
        """An arch, uniform over all archs of the space."""
        return self.arch(int(torch.randint(self.size(), (), generator=generator)))

    def sample_fairly(self, generator):
        """Archs of one depth pattern, uniform, in which each op of a position stands equally often, or once
        more than another (FairNAS): as many archs as the longest list of ops."""
        count, stages = max(map(len, self.ops)), []
        for stage, ops in zip(self.sample(generator).split("/"), self.ops):
            columns = []
            for _ in stage:
                orders = [torch.randperm(len(ops), generator=generator).tolist() for _ in range(count)]
                columns.append([ops[i] for order in orders for i in order][:count])
            stages.append(["".join(letters) for letters in zip(*columns)])
        return ["/".join(parts) for parts in zip(*stages)]

    def validate(self, arch):
        """Raises ValueError, naming the part that is wrong and what is allowed; returns the arch."""
        stages = arch.split("/") if isinstance(arch, str) else []
        if len(stages) != len(self.ops):
            raise ValueError(
                f"arch {arch!r} must be a string of {len(self.ops)} resolutions joined by '/', "
                f"like {self.arch(0)} (space {self.name})"
            )
        for number, (stage, ops) in enumerate(zip(stages, self.ops), 1):
            for letter in stage:
                if letter not in OPS:
                    raise ValueError(
                        f"unknown op {letter!r} in arch {arch!r}: ops are c (conv), s (shift), "
                        "a (add), t (attention)"
                    )
                if letter not in ops:
                    raise ValueError(
                        f"op {letter!r} ({OPS[letter]}) is not offered at resolution {number} of "
                        f"space {self.name}, in arch {arch!r}; allowed there: {', '.join(ops)}"
                    )
        if tuple(map(len, stages)) not in self.depths:
            allowed = " ".join("-".join(map(str, depths)) for depths in self.depths)
            raise ValueError(
                f"arch {arch!r} has {'-'.join(str(len(s)) for s in stages)} blocks a resolution; "
                f"space {self.name} allows {allowed}"
            )
        return arch

    def mutate(self, arch, generator, op_probability=0.2, fresh_probability=0.2):
        """Official rule: with one probability start afresh, then redraw each op with the other."""
        if torch.rand((), generator=generator) < fresh_probability:
            arch = self.sample(generator)
        stages = arch.split("/")
        for i, (stage, ops) in enumerate(zip(stages, self.ops)):
            redraw = torch.rand(len(stage), generator=generator) < op_probability
            drawn = torch.randint(len(ops), (len(stage),), generator=generator)
            stages[i] = "".join(ops[d] if r else old for old, r, d in zip(stage, redraw, drawn))
        return "/".join(stages)

    def crossover(self, first, second, generator):
        """The depth pattern of one parent (a coin), each op from either where both have that block (D7)."""
        if torch.rand((), generator=generator) < 0.5:
            first, second = second, first
        stages = []
        for mine, other in zip(first.split("/"), second.split("/")):
            coin = torch.rand(len(mine), generator=generator) < 0.5
            stages.append(
                "".join(other[i] if coin[i] and i < len(other) else mine[i] for i in range(len(mine)))
            )
        return "/".join(stages)

    def walk(self, arch):
        """(resolution, letter, entrance) of each block in order."""
        for resolution, stage in enumerate(self.validate(arch).split("/")):
            for i, letter in enumerate(stage):
                yield resolution, letter, "down" if i == 0 and resolution > 0 else "same"

    def entrances(self, position, resolution, all_cells=False):
        """Entrances of the cell (position, resolution) that some arch uses, as Block takes them, or {}."""
        c_out = self.widths[resolution]
        c_in = c_out if position else self.block_input(resolution)
        starts = {sum(depths[:resolution]) for depths in self.depths}
        inside = any(sum(d[:resolution]) < position < sum(d[: resolution + 1]) for d in self.depths)
        found = {}
        if inside or all_cells or position == resolution == 0:
            found["same"] = (c_in, 1)
        if resolution and (position in starts or all_cells):
            found["down"] = (self.widths[resolution - 1], self.strides[resolution])
        return found

    def block_input(self, resolution=0):
        """Width that enters the first block: the stem's own, or p of the block after the input projection."""
        return self.stem[2] if self.retraining else self.widths[resolution] // 4


HYTRA_DEPTHS = (
    "1159 1168 1249 1258 1339 1348 1447 1456 1555 2239 2248 2338 2347 2446 2455 3337 3346 3445 4444"
)
SPACES = {
    "fashion": SearchSpace(
        "fashion",
        28,
        1,
        10,
        (3, 2, 32, True),
        (32, 64, 128),
        (1, 2, 2),
        ("csa", "csat", "csat"),
        ((2, 2, 2), (2, 2, 3), (2, 3, 2), (2, 3, 3), (2, 2, 4), (2, 4, 2)),
        16,
    ),
    "hytra": SearchSpace(
        "hytra",
        224,
        3,
        100,
        (7, 2, 64, True),
        (128, 256, 512, 1024),
        (1, 2, 2, 2),
        ("csa", "csa", "csat", "ct"),
        tuple(tuple(map(int, depths)) for depths in HYTRA_DEPTHS.split()),
        64,
    ),
}
SPACES["cifar10"] = replace(SPACES["fashion"], name="cifar10", image=32, in_channels=3)
SPACES["cifar100"] = replace(SPACES["cifar10"], name="cifar100", classes=100)
SPACES["bossnet_t0"] = replace(
    SPACES["hytra"], name="bossnet_t0", classes=1000, widths=(256, 512, 1024, 2048), retraining=True,
    distilled=True,
)
SPACES["bossnet_t1"] = replace(SPACES["bossnet_t0"], name="bossnet_t1", strides=(1, 2, 2, 1))


def find_space(name):
    """The space of a name, images or translation, or ValueError with the known names."""
    known = SPACES | TOKEN_SPACES
    if name not in known:
        raise ValueError(f"unknown space {name!r}; known: {', '.join(known)}")
    return known[name]


# ------------------------------------------------------------------------------------------ §6 supernet


def make_stem(space):
    """Conv, BN, activation, optional 3x3 max pool of stride 2; the searched form adds an input projection."""
    kernel, stride, width, pool = space.stem
    parts = [
        HybridConv2d("conv", space.in_channels, width, kernel, stride),
        nn.BatchNorm2d(width),
        space.activation(),
    ]
    if pool:
        parts.append(nn.MaxPool2d(3, 2, 1))
    if not space.retraining:
        parts.append(input_projection(space, 0))
    return nn.Sequential(*parts)


def input_projection(space, resolution):
    """Depthwise K x K of stride K = 2^resolution, 1x1 to the bottleneck width, BN; no activation."""
    width, p, k = space.stem[2], space.widths[resolution] // 4, 2**resolution
    return nn.Sequential(
        HybridConv2d("conv", width, width, k, k, padding=0, groups=width),
        HybridConv2d("conv", width, p, 1),
        nn.BatchNorm2d(p),
    )


class Head(nn.Module):
    """Global average pool and a linear classifier. A distilled network has a second one: training returns
    both logits, evaluation their mean."""

    def __init__(self, space):
        super().__init__()
        self.fc = nn.Linear(space.widths[-1], space.classes)
        self.distilled = nn.Linear(space.widths[-1], space.classes) if space.distilled else None

    def forward(self, x):
        x = x.mean((2, 3))
        if self.distilled is None:
            return self.fc(x)
        return (self.fc(x), self.distilled(x)) if self.training else (self.fc(x) + self.distilled(x)) / 2


class Network(nn.Module):
    """One fixed network: stem, blocks, head. logits = network(x), x (N, C, H, W) -> (N, classes). With
    `checkpointing` a training pass keeps the inputs of blocks alone and computes their inside again."""

    checkpointing = False

    def __init__(self, arch, stem, blocks, head):
        super().__init__()
        self.arch, self.stem, self.blocks, self.head = arch, stem, nn.ModuleList(blocks), head

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            (entrance,) = block.entrances.keys()
            x = run_block(block, x, entrance, self.checkpointing)
        return self.head(x)


def run_block(block, x, entrance, checkpointing):
    """block(x, entrance); with checkpointing it runs again in the backward pass, for the memory of its
    inside, and batch norm counts the images once."""
    if not (checkpointing and torch.is_grad_enabled()):
        return block(x, entrance)
    return checkpoint(
        block, x, entrance, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(block))
    )


@contextmanager
def frozen_statistics(module):
    """Batch norms of a module leave their running statistics as they are."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def build(space, arch, shift_form="Q", seed=0):
    """The network of an arch from scratch. Raises ValueError for an arch outside the space."""
    blocks = []
    with seeded(seed):
        stem, width = make_stem(space), space.block_input()
        for resolution, letter, entrance in space.walk(arch):
            stride = space.strides[resolution] if entrance == "down" else 1
            blocks.append(
                Block(
                    OPS[letter],
                    space.widths[resolution],
                    {entrance: (width, stride)},
                    space,
                    shift_form=shift_form,
                )
            )
            width = space.widths[resolution]
        return Network(arch, stem, blocks, Head(space))


@contextmanager
def seeded(seed):
    """torch's global generator starts from `seed` inside, and is as before afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Supernet(nn.Module):
    """All networks of a space at once: logits = supernet(x, arch), x (N, C, H, W).

    One cell per (position, resolution) that some arch reaches, in it one Block per op; conv, shift and add of
    a cell read the cell's SharedWeights as `sharing` says: "none", "naive", "heterogeneous" or a Sharing.
    A list of archs (sample_fairly) instead of one: each gets an equal part of the images, in their order, and
    two at least, for batch norm: a batch too small for that leaves the last archs out.
    Never shared: PEG, BN, attention, stem, head. all_cells=True adds the cells no arch reaches and the unused
    slopes, as the official fabric has them, to count its published sizes; forward never enters them.
    checkpointing: as in Network. A supernet has one classifier in every space.
    Source: official hytra_supernet.py, hytra_supernet_ws.py, hytra_supernet_ws_dist.py.
    """

    checkpointing = False

    def __init__(self, space, sharing="heterogeneous", seed=0, all_cells=False):
        super().__init__()
        space = replace(space, distilled=False)
        if isinstance(sharing, str) and sharing not in SHARING:
            raise ValueError(f"unknown sharing {sharing!r}; known: {', '.join(SHARING)}")
        self.space, self.sharing = space, SHARING[sharing] if isinstance(sharing, str) else sharing
        self.blocks, self.unused_slopes = nn.ModuleDict(), nn.ParameterList()
        with seeded(seed):
            self.stem, self.head = make_stem(space), Head(space)
            for position in range(max(map(sum, space.depths))):
                for resolution in range(len(space.widths)):
                    self.add_cell(position, resolution, all_cells)
            if all_cells:
                self.unreachable = nn.ModuleList(
                    input_projection(space, r) for r in range(1, len(space.widths))
                )

    def add_cell(self, position, resolution, all_cells):
        """The blocks of one (position, resolution), one per op, and the weights they share."""
        space, sharing = self.space, self.sharing
        entrances, c_out = space.entrances(position, resolution, all_cells), space.widths[resolution]
        if not entrances:
            return
        letters = [
            letter for letter in OPS if letter in space.ops[resolution] or all_cells and letter in "csa"
        ]
        readers = [OPS[letter] for letter in letters if letter in sharing.shared]
        shapes = shared_shapes(entrances, c_out) if readers else {}
        shared = {name: SharedWeight(shape, readers, sharing) for name, shape in shapes.items()}
        for letter in letters:
            self.blocks[f"{position}-{resolution}-{letter}"] = Block(
                OPS[letter],
                c_out,
                entrances,
                space,
                shared if letter in sharing.shared else None,
                sharing.shift_form,
            )
        if all_cells and readers:
            unused = len(sharing.transformed) * (6 - len(shared)) * sharing.learned
            self.unused_slopes.append(nn.Parameter(torch.ones(unused, sharing.bins)))

    def path(self, arch):
        """(block, entrance) of each position of an arch."""
        for position, (resolution, letter, entrance) in enumerate(self.space.walk(arch)):
            yield self.blocks[f"{position}-{resolution}-{letter}"], entrance

    def forward(self, x, arch):
        archs, parts = [arch] if isinstance(arch, str) else arch[: max(1, len(x) // 2)], []
        for part, own in zip(self.stem(x).tensor_split(len(archs)), archs):
            for block, entrance in self.path(own):
                part = run_block(block, part, entrance, self.checkpointing)
            parts.append(part)
        return self.head(torch.cat(parts))

    def divergence(self, arch, kl="density", generator=None):
        """Scalar loss of the shared weights that an arch, or a list of them, reads.

        "density": mean_divergence, in nats. "official": sum over the add layers of an arch of official_kl,
        mean over the archs (its weight in the official loss is 10). 0 if nothing is transformed.
        """
        archs = [arch] if isinstance(arch, str) else arch
        layers = [
            (layer.weight, layer.op)
            for own in archs
            for block, entrance in self.path(own)
            for layer in block.layers(entrance)
        ]
        if kl == "density":
            return mean_divergence(layers)
        added = (weight.weight_for(op) for weight, op in layers if op == "add" and weight.transformed)
        return sum(official_kl(weight, generator) for weight in added) / len(archs)

    def extract(self, arch):
        """The arch as a Network with copies of the weights it reads: equal output, nothing shared."""
        blocks = []
        for block, entrance in self.path(arch):
            block = copy.deepcopy(block)
            block.entrances = nn.ModuleDict({entrance: block.entrances[entrance]})
            for layer in block.layers(entrance):
                layer.weight = layer.weight.owned(layer.op)
            blocks.append(block)
        return Network(arch, copy.deepcopy(self.stem), blocks, copy.deepcopy(self.head))


def shared_shapes(entrances, c_out):
    """Name -> shape of the tensors that the operators of one cell share (PEG is never shared)."""
    p = c_out // 4
    shapes = {"conv2": (p, p, 3, 3), "conv3": (c_out, p, 1, 1)}
    if "same" in entrances:
        c_in, _ = entrances["same"]
        shapes["conv1"] = (p, c_in, 1, 1)
        if c_in != c_out:
            shapes["shortcut"] = (c_out, c_in, 1, 1)
    if "down" in entrances:
        c_up, _ = entrances["down"]
        shapes |= {"conv1_d": (p, c_up, 1, 1), "shortcut_d": (c_out, c_up, 3, 3)}
    return shapes


# ------------------------------------------------------------------------------ §7 operators on tokens


def mix_tokens(op, u, w, causal, past=None, adjust=None):
    """Lightweight convolution or add over time; the channels of a head share their K taps, softmax(w).

        conv  y[b,t,c] =  sum_j  softmax(w)[h(c),j] u[b,t-P+j,c]
        add   y[b,t,c] = -sum_j |u[b,t-P+j,c] - softmax(w)[h(c),j]|

    op "conv" or "add", u (B, T, C), w (H, K) -> (B, T, C), h(c) = floor(c H / C). P = K - 1 if causal, else
    (K - 1) / 2; a padded tap is u = 0, and costs an add its weight. past (B, K - 1, C): the inputs before u,
    for decoding token by token (causal only). adjust(softmax(w)) replaces the taps: dropout, quantisation.
    Gradients: those of the operator. ValueError if H does not divide C. Source: official lightconv_layer.py,
    lightadd_layer.py (D8: their decoder multiplies instead).
    """
    (H, K), C = w.shape, u.shape[2]
    if C % H:
        raise ValueError(f"the heads must divide the {C} channels, got {H}")
    taps = w.softmax(1) if adjust is None else adjust(w.softmax(1))
    taps = taps.repeat_interleave(C // H, 0).view(C, 1, 1, K)
    before = K - 1 if causal else (K - 1) // 2
    x = F.pad(u, (0, 0, before, 0)) if past is None else torch.cat([past, u], 1)
    x = F.pad(x, (0, 0, 0, K - 1 - before)).transpose(1, 2).unsqueeze(2)
    return OPERATORS[op](x, taps, stride=1, padding=0, groups=C).squeeze(2).transpose(1, 2)


def attend(q, k, v, heads, allowed, dropout=0.0):
    """Multi-head attention: y = softmax(q k^T / sqrt(Q / heads)) v for each of the heads.

    q (B, T, Q), k and v (B, S, Q), allowed a boolean mask that broadcasts to (B, heads, T, S) -> (B, T, Q). A
    row with nothing allowed gives 0. ValueError if heads do not divide Q.
    """
    if q.shape[2] % heads:
        raise ValueError(f"heads must divide the width {q.shape[2]}, got {heads}")
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, allowed, dropout).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------- §7 spaces of translation

TYPES = ("C", "A", "S", "T", "TC", "TA", "TS")  # light conv, add, shift-add; attention; half and half
SOURCES = {-1: 1, 1: 2, 2: 3}  # what cross-attention reads: the last one, two or three encoder layers
ENCODER_LISTS = ("ffn", "heads", "types")
DECODER_LISTS = ("ffn", "self_heads", "cross_heads", "sources", "types")


@dataclass(frozen=True)
class TokenSpace:
    """A set of encoder-decoder Transformers whose layers pick how they mix tokens.

    An arch is a dict {"encoder": {"embed_dim", "ffn", "heads", "types"}, "decoder": {"embed_dim", "ffn",
    "self_heads", "cross_heads", "sources", "types"}}, lists one entry a layer; heads only reshape the
    queries, keys and values of total width `qkv`. Source: official supertransformer configs (En-De v3, En-Fr
    and IWSLT v1).
    """

    name: str
    widths: tuple
    encoder_ffn: tuple
    decoder_ffn: tuple
    heads: tuple
    encoder_layers: int = 6
    decoder_layers: tuple = (6, 5, 4, 3, 2, 1)
    qkv: int = 512
    kernels: tuple = (3, 7, 15, 31, 31, 31)  # taps of the light operators by layer, not searched
    light_heads: tuple = (16, 4)  # kernels of a stand-alone and of a half light operator
    tied: bool = True  # one embedding for source, target and logits; else one each

    def extreme(self, pick, encoder_type):
        """The arch with the largest (pick=max) or smallest (min) widths, hidden layers and decoder."""
        depths, arch = {"encoder": self.encoder_layers, "decoder": pick(self.decoder_layers)}, {}
        for part, lists in self.choices().items():
            kind = encoder_type if part == "encoder" else "T"
            own = lists | {"sources": (-1,), "types": (kind,), "ffn": (pick(lists["ffn"]),)}
            arch[part] = {"embed_dim": pick(self.widths)}
            arch[part] |= {name: [own[name][len(own[name]) // 2]] * depths[part] for name in lists}
        return arch

    def choices(self):
        """Per part the allowed values of each of its lists."""
        heads = self.heads
        encoder = dict(zip(ENCODER_LISTS, (self.encoder_ffn, heads, TYPES)))
        return {
            "encoder": encoder,
            "decoder": dict(zip(DECODER_LISTS, (self.decoder_ffn, heads, heads, tuple(SOURCES), TYPES[3:]))),
        }

    def size(self):
        """Number of archs, an exact integer."""
        layer = {
            part: math.prod(map(len, lists.values())) for part, lists in self.choices().items()
        }
        decoders = sum(layer["decoder"] ** depth for depth in self.decoder_layers)
        return len(self.widths) ** 2 * layer["encoder"] ** self.encoder_layers * decoders

    def sample(self, generator):
        """Every dimension independent and uniform, the decoder's depth too (official rule)."""

        def pick(values):
            return values[int(torch.randint(len(values), (), generator=generator))]

        depths = {"encoder": self.encoder_layers, "decoder": pick(self.decoder_layers)}
        return {
            part: {"embed_dim": pick(self.widths)}
            | {name: [pick(values) for _ in range(depths[part])] for name, values in lists.items()}
            for part, lists in self.choices().items()
        }

    def validate(self, arch):
        """Raises ValueError, naming the part that is wrong and what is allowed; returns the arch."""
        for part, lists in self.choices().items():
            found = arch.get(part) if isinstance(arch, dict) else None
            if not isinstance(found, dict) or set(found) != {"embed_dim", *lists}:
                keys = ", ".join(("embed_dim", *lists))
                raise ValueError(f"an arch of space {self.name} needs {part!r} with {keys}")
            if found["embed_dim"] not in self.widths:
                raise ValueError(f"{part} embed_dim is {found['embed_dim']!r}; allowed are {self.widths}")
            depths = (self.encoder_layers,) if part == "encoder" else self.decoder_layers
            for name, values in lists.items():
                if not isinstance(found[name], list) or len(found[name]) not in depths:
                    raise ValueError(f"{part} {name} must be a list of {depths} entries, got {found[name]!r}")
                entries, layers = len(found[name]), len(found["types"])
                if entries != layers:
                    raise ValueError(f"{part} {name} has {entries} entries, types {layers}")
                for value in found[name]:
                    if value not in values or isinstance(value, bool):
                        raise ValueError(f"{part} {name} holds {value!r}; allowed are {values}")
        return arch

    def mutate(self, arch, generator, probability=0.3):
        """Official rule: each gene redrawn with one probability; the decoder's depth is a gene too."""
        return self.mix(arch, self.sample(generator), generator, probability)

    def crossover(self, first, second, generator):
        """Official rule: each gene from either parent by a coin; the depth comes with its parent (D7)."""
        return self.mix(first, second, generator, 0.5)

    def mix(self, arch, other, generator, probability):
        """The arch with each gene taken from `other` with the probability, and layers it lacks too."""

        def coin():
            return bool(torch.rand((), generator=generator) < probability)

        child = {}
        for part, lists in self.choices().items():
            depth = len((other if coin() else arch)[part]["types"])
            child[part] = {"embed_dim": (other if coin() else arch)[part]["embed_dim"]}
            for name in lists:
                mine, theirs = arch[part][name], other[part][name]
                child[part][name] = [
                    (theirs if i < len(theirs) and (i >= len(mine) or coin()) else mine)[i]
                    for i in range(depth)
                ]
        return child

    def params(self, arch):
        """Parameters without embeddings. The LayerNorm of a stand-alone light layer is left out, as the
        published counter does."""
        encoder, decoder = self.validate(arch)["encoder"], arch["decoder"]
        E, D, Q, total = encoder["embed_dim"], decoder["embed_dim"], self.qkv, 0
        for i, (ffn, kind) in enumerate(zip(encoder["ffn"], encoder["types"])):
            norms = 4 * E if kind[0] == "T" else 2 * E
            total += self.mixing_params(kind, E, i) + norms + (2 * ffn + 1) * E + ffn
        for i, (ffn, kind) in enumerate(zip(decoder["ffn"], decoder["types"])):
            cross = Q * D + 2 * Q * E + 3 * Q + D * Q + D
            total += self.mixing_params(kind, D, i) + cross + 6 * D + (2 * ffn + 1) * D + ffn
        return total

    def mixing_params(self, kind, width, layer):
        """Parameters of one layer's mixing: attention, a light operator, or each on half of the width."""
        part = width if len(kind) == 1 else width // 2
        attention = 3 * self.qkv * (part + 1) + (self.qkv + 1) * part
        heads = self.light_heads[len(kind) - 1]
        light = (2 + (kind[-1] == "S")) * part * (part + 1) + heads * self.kernels[layer]
        return attention * (kind[0] == "T") + light * (kind[-1] != "T")


FFN = (4096, 3072, 2048, 1024)
TOKEN_SPACES = {
    "wmt14_en_de": TokenSpace("wmt14_en_de", (1024, 768, 512), FFN, FFN, (16, 8, 4)),
    "wmt14_en_fr": TokenSpace("wmt14_en_fr", (1024, 768, 512), FFN, FFN[1:], (16, 8, 4)),
    "iwslt14_de_en": TokenSpace(
        "iwslt14_de_en", (1024, 768, 640, 512), FFN, FFN[1:], (16, 8, 4, 2), tied=False
    ),
    "translation": TokenSpace(
        "translation", (96, 64), (256, 128), (256, 128), (8, 4, 2), encoder_layers=3, decoder_layers=(2, 1),
        qkv=96, kernels=(3, 7, 15), light_heads=(8, 4),
    ),
}


# ------------------------------------------------------------------------------ §8 supernet of translation

PAD, EOS, UNK = range(3)  # the first ids of any vocabulary; EOS ends a sentence and starts its translation


def fake_quantise(x, low, high, bits):
    """Rounds to one of 2^bits levels from low to high (broadcast); gradient straight through."""
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    return _StraightThrough.apply(x, low + scale * ((x.detach() - low) / scale).round().clamp(0, 2**bits - 1))


class _QuantisedGradient(torch.autograd.Function):
    """Identity, whose gradient is quantised to `bits` with stochastic rounding."""

    @staticmethod
    def forward(ctx, x, bits):
        ctx.bits = bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        low, high = grad.aminmax()
        scale = ((high - low) / (2**ctx.bits - 1)).clamp_min(1e-8)
        level = ((grad - low) / scale + torch.rand_like(grad)).floor_().clamp_(0, 2**ctx.bits - 1)
        return low + scale * level, None


class Quantiser(nn.Module):
    """Fake quantisation of a layer's input (one range), weight rows and bias; a plain copy if bits is 0.

    The input's range is the batch's in training and a running one, r <- 0.1 r + 0.9 batch, in evaluation.
    Source: official fairseq/modules/quantize.py.
    """

    def __init__(self, bits):
        super().__init__()
        self.bits = bits
        if bits:
            self.register_buffer("range", torch.zeros(2))

    def forward(self, x):
        if not self.bits:
            return x
        span = self.range
        if self.training:
            span = torch.stack(x.detach().aminmax())
            self.range.lerp_(span, 0.9)
        return fake_quantise(x, *span, self.bits)

    def weight(self, w):
        """Row by row; a vector is one row."""
        return fake_quantise(w, *w.detach().aminmax(dim=-1, keepdim=True), self.bits) if self.bits else w


class HybridLinear(nn.Module):
    """z = W x + b with the prefix W[:out, :in] of its own or a shared weight; op "shift": powers of two.

    x (B, T, in) -> (B, T, out). With bits, x, W, b and the gradient of z are quantised (see Quantiser).
    """

    def __init__(self, op, c_in, c_out, weight=None, bits=0):
        super().__init__()
        self.op, self.quantiser = op, Quantiser(bits)
        self.weight = weight or SharedWeight((c_out, c_in), [op], std=math.sqrt(2 / (c_in + c_out)))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x, c_out):
        w, quantiser = self.weight.weight_for(self.op)[:c_out, : x.shape[-1]], self.quantiser
        w = power_of_two(w) if self.op == "shift" else quantiser.weight(w)
        z = F.linear(quantiser(x), w, quantiser.weight(self.bias[:c_out]))
        return _QuantisedGradient.apply(z, quantiser.bits) if quantiser.bits else z


class Attention(nn.Module):
    """Attention of x (B, T, C) to memory (B, S, C'), x itself for self-attention: (B, T, C). A cache, a dict
    that starts empty, keeps keys and values from one token to the next."""

    def __init__(self, qkv, width, memory_width, dropout, bits=0):
        super().__init__()
        self.qkv, self.dropout = qkv, dropout
        self.q = HybridLinear("conv", width, qkv, bits=bits)
        self.k = HybridLinear("conv", memory_width, qkv, bits=bits)
        self.v = HybridLinear("conv", memory_width, qkv, bits=bits)
        self.out = HybridLinear("conv", qkv, width, bits=bits)

    def forward(self, x, memory, heads, allowed, cache=None):
        k, v = (cache or {}).get("kv", (None, None))
        if k is None or memory is x:
            new = self.k(memory, self.qkv), self.v(memory, self.qkv)
            k, v = new if k is None else (torch.cat(pair, 1) for pair in zip((k, v), new))
        if cache is not None:
            cache["kv"] = k, v
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(self.q(x, self.qkv), k, v, heads, allowed, dropout), x.shape[-1])


class Light(nn.Module):
    """Light operators C, A or S: u = W1 x + b1; S: u = Shift(u) + bs; y = mix_tokens(u); z = W2 y + b2.

    A and S take the mean over the K taps, y / K, as C does, whose taps sum to 1 (D10).
    `letters` says which of them it can be. If several, they share: W1 and W2 by all, W1 read as powers of two
    is S's shift layer too, and the taps are one SharedWeight, w for C and T(w) for A and S. Padded tokens are
    set to 0 after the projections, so that a sentence's result does not depend on its batch (official: before
    or not at all). Source: official lightconv_layer.py, lightadd_layer.py, lightshiftadd_layer.py.
    """

    def __init__(self, letters, width, heads, taps, causal, sharing, dropout, bits=0):
        super().__init__()
        self.causal, self.dropout, self.quantiser = causal, dropout, Quantiser(bits)
        inner = None
        if len(letters) > 1 and "S" in letters:
            inner = SharedWeight((width, width), ["conv", "shift"], std=width**-0.5)
        self.first = HybridLinear("conv", width, width, inner, bits)
        self.shift = HybridLinear("shift", width, width, inner) if "S" in letters else None
        self.second = HybridLinear("conv", width, width, bits=bits)
        readers = ["conv"] * ("C" in letters) + ["add"] * (letters != "C")
        self.taps = SharedWeight((heads, taps), readers, sharing, std=math.sqrt(2 / (heads + taps)))

    def forward(self, x, letter, keep, cache=None):
        op, width = "conv" if letter == "C" else "add", x.shape[-1]
        u = self.first(x, width)
        u = self.shift(u, width) if letter == "S" else u
        u = self.quantiser(u if keep is None else u * keep)
        w, past = self.taps.weight_for(op), None
        if cache is not None:
            past = cache.get("u", u.new_zeros(len(u), w.shape[1] - 1, width))
            cache["u"] = torch.cat([past, u], 1)[:, 1 - w.shape[1] :]

        def adjust(taps):
            return F.dropout(self.quantiser.weight(taps), self.dropout, self.training)

        y = mix_tokens(op, u, w, self.causal, past, adjust)
        return self.second(y / w.shape[1] if op == "add" else y, width)


class TokenBlock(nn.Module):
    """x = LN(x + mix(x)); in a decoder x = LN(x + attention(x, memory)); x = LN(x + W2 relu(W1 x)).

    mix is any of `types`: a light operator, attention, or attention on the first half of the channels and a
    light operator on the second. Weights are used by prefix: the width of x, `ffn` hidden units. memory_width
    0 makes an encoder block. Source: official transformer_super_shiftadd_v2.py, multibranch.py.
    """

    def __init__(self, types, layer, width, ffn, space, sharing, memory_width=0, dropout=0.0, bits=0):
        super().__init__()
        self.shared, self.dropout, self.full = bool(sharing.shared), dropout, max(space.widths)
        self.attention, self.light = nn.ModuleDict(), nn.ModuleDict()
        for key in dict.fromkeys(map(self.key, types)):
            kinds = [kind for kind in types if self.key(kind) == key]
            part, heads = width // len(kinds[0]), space.light_heads[len(kinds[0]) - 1]
            letters = "".join(kind[-1] for kind in kinds if kind[-1] != "T")
            if any(kind[0] == "T" for kind in kinds):
                self.attention[key] = Attention(space.qkv, part, part, dropout / 3, bits)
            if letters:
                self.light[key] = Light(
                    letters, part, heads, space.kernels[layer], memory_width > 0, sharing, dropout / 10, bits
                )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if memory_width else 2))
        self.cross = Attention(space.qkv, width, memory_width, dropout / 3) if memory_width else None
        self.fc1 = HybridLinear("conv", width, ffn, bits=bits)
        self.fc2 = HybridLinear("conv", ffn, width, bits=bits)

    def key(self, kind):
        """Types with one key share their attention and their light operator."""
        return ("whole", "split")[len(kind) - 1] if self.shared else kind

    def mix(self, x, kind, heads, keep, allowed, cache):
        """The first or only part to attention, the last or only part to the light operator."""
        part, key, mixed = x.shape[-1] // len(kind), self.key(kind), []
        if kind[0] == "T":
            first = x[..., :part]
            mixed.append(self.attention[key](first, first, heads, allowed, cache))
        if kind[-1] != "T":
            mixed.append(self.light[key](x[..., -part:], kind[-1], keep, cache))
        return torch.cat(mixed, -1)

    def forward(self, x, kind, heads, ffn, keep, allowed, cross=None, cache=None):
        """keep (B, T, 1): 0 at padding; allowed: see attend; cross: (memory, heads, allowed), decoder only;
        cache: None, or a pair of dicts that start empty, for decoding token by token."""
        width, (own, other) = x.shape[-1], cache or (None, None)

        def add(x, y, norm):
            y = F.dropout(y, self.dropout * width / self.full, self.training)
            return F.layer_norm(x + y, (width,), norm.weight[:width], norm.bias[:width])

        x = add(x, self.mix(x, kind, heads, keep, allowed, own), self.norms[0])
        if cross is not None:
            x = add(x, self.cross(x, *cross, other), self.norms[1])
        return add(x, self.fc2(F.relu(self.fc1(x, ffn)), width), self.norms[-1])


class Translator(nn.Module):
    """Encoder-decoder Transformer over a TokenSpace: logits = translator(source, target, arch).

    source (B, S) and target (B, T) token ids, right-padded with PAD, target shifted right behind an EOS;
    logits (B, T, V). Without `arch` it is the supernet, which forwards any arch of the space with prefixes of
    its weights; with one it is that network, and forward's arch can be left out. sharing "none" or
    "heterogeneous" (see Light). One embedding V x width serves source, target and logits, or three if the
    space is not `tied`; positions alternate sine and cosine, so that any prefix has both (official: sines
    first). dropout: of a block of full width, in proportion below; a third of it for attention weights, a
    tenth for taps, as published (0.3, 0.1, 0.03). bits: quantisation, 0 for none. ValueError for an arch
    outside the space or an unknown sharing.
    """

    def __init__(self, space, vocabulary, arch=None, sharing="heterogeneous", seed=0, dropout=0.0, bits=0):
        super().__init__()
        if sharing not in ("none", "heterogeneous"):
            raise ValueError(f"sharing {sharing!r} is not for translation; allowed: none, heterogeneous")
        self.space, self.vocabulary, self.sharing = space, vocabulary, sharing
        self.arch, self.dropout, self.bits = arch and space.validate(arch), dropout, bits
        lists, parts = space.choices(), {}
        for part, layers in (("encoder", space.encoder_layers), ("decoder", max(space.decoder_layers))):
            types, ffn = lists[part]["types"], max(lists[part]["ffn"])
            parts[part] = [types] * layers, [ffn] * layers, max(space.widths)
            if arch:
                genes = arch[part]
                parts[part] = [[kind] for kind in genes["types"]], genes["ffn"], genes["embed_dim"]
        (*_, E), (*_, D) = parts.values()
        with seeded(seed):
            tables = [
                nn.Parameter(torch.randn(vocabulary, max(E, D)) * max(E, D) ** -0.5)
                for _ in range(1 if space.tied else 3)
            ]
            self.embedding, self.target_embedding, self.output = (tables * 3)[:3]
            for part, (types, ffn, width) in parts.items():
                blocks = (
                    TokenBlock(types[i], i, width, ffn[i], space, SHARING[sharing],
                               E * (part == "decoder"), dropout, bits)
                    for i in range(len(types))
                )
                setattr(self, part, nn.ModuleList(blocks))

    def embed(self, tokens, table, width, start=0):
        """Rows of an embedding times sqrt(width), plus positions from `start`."""
        full = max(self.space.widths)
        i = torch.arange(width, device=tokens.device)
        rate = torch.exp(-math.log(10000) * (i - i % 2) / full)
        angle = torch.arange(start, start + tokens.shape[1], device=tokens.device)[:, None] * rate
        position = torch.where(i % 2 == 0, angle.sin(), angle.cos())
        x = F.embedding(tokens, table[:, :width]) * width**0.5 + position
        return F.dropout(x, self.dropout * width / full, self.training)

    def encode(self, source, arch=None):
        """(outputs of the last three layers, last first; padding mask (B, S)) of source (B, S)."""
        genes, mask = (arch or self.arch)["encoder"], source != PAD
        x, outputs = self.embed(source, self.embedding, genes["embed_dim"]), []
        for block, kind, heads, ffn in zip(self.encoder, genes["types"], genes["heads"], genes["ffn"]):
            x = block(x, kind, heads, ffn, mask.unsqueeze(2).to(x.dtype), mask[:, None, None])
            outputs.insert(0, x)
        return outputs[:3], mask

    def decode(self, target, memory, arch=None, caches=None):
        """Logits (B, T, V) of target (B, T) given encode()'s result. caches: None, or what new_caches() gave,
        for decoding token by token: then target holds the next token only, T = 1."""
        genes, (outputs, mask) = (arch or self.arch)["decoder"], memory
        start = caches[0][2]["tokens"] if caches else 0
        width = genes["embed_dim"]
        x = self.embed(target, self.target_embedding, width, start)
        square = (target.shape[1],) * 2
        allowed = None if caches else torch.ones(square, dtype=torch.bool, device=target.device).tril()
        names = ("types", "self_heads", "ffn", "cross_heads", "sources")
        for i, (kind, heads, ffn, cross_heads, source) in enumerate(zip(*(genes[name] for name in names))):
            count = SOURCES[source]
            keys = torch.cat(outputs[:count], 1), cross_heads, mask.repeat(1, count)[:, None, None]
            x = self.decoder[i](x, kind, heads, ffn, None, allowed, keys, caches and caches[i][:2])
        if caches:
            caches[0][2]["tokens"] = start + 1
        return F.linear(x, self.output[:, :width])

    def new_caches(self, arch=None):
        """Empty caches of each decoder layer; the first counts the tokens."""
        return [({}, {}, {"tokens": 0}) for _ in (arch or self.arch)["decoder"]["types"]]

    def forward(self, source, target, arch=None):
        arch = self.space.validate(arch) if arch else self.arch
        return self.decode(target, self.encode(source, arch), arch)

    def divergence(self, arch):
        """Mean divergence, in nats, of the shared taps that the arch reads; 0 if none."""
        layers = []
        for part in ("encoder", "decoder"):
            for block, kind in zip(getattr(self, part), arch[part]["types"]):
                if kind[-1] != "T":
                    layers.append((block.light[block.key(kind)].taps, "conv" if kind[-1] == "C" else "add"))
        return mean_divergence(layers)

    @torch.no_grad()
    def extract(self, arch):
        """The arch as a Translator of its own sizes, with copies of what it reads here: equal output."""
        network = Translator(self.space, self.vocabulary, arch, self.sharing, 0, self.dropout, self.bits)
        for name, layer in network.named_modules():
            whole = self.get_submodule(name)
            for key, own in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
                shared = isinstance(layer, SharedWeight)
                read = whole.weight_for(*layer.readers) if shared else getattr(whole, key)
                own.copy_(read[tuple(map(slice, own.shape))])
        return network.train(self.training)


# ------------------------------------------------------------------------------------ the operator table

LAYERS = {  # name: N, C, M, side, K, padding, groups; on a GPU 16 N, which fills it
    "3x3 64-64 16x16": (64, 64, 64, 16, 3, 1, 1),
    "3x3 128-128 8x8": (64, 128, 128, 8, 3, 1, 1),
    "1x1 256-64 8x8": (64, 256, 64, 8, 1, 0, 1),
    "1x1 64-256 16x16": (64, 64, 256, 16, 1, 0, 1),
    "depthwise 3x3 64": (64, 64, 64, 16, 3, 1, 64),
    "linear 512-512": (1024, 512, 512, 1, 1, 0, 1),
}


@contextmanager
def forced_path(path):
    """SHIFTADDNAS_KERNELS = path inside, as before afterwards."""
    before = os.environ.get("SHIFTADDNAS_KERNELS")
    os.environ["SHIFTADDNAS_KERNELS"] = path
    try:
        yield
    finally:
        del os.environ["SHIFTADDNAS_KERNELS"]
        if before is not None:
            os.environ["SHIFTADDNAS_KERNELS"] = before


@contextmanager
def tf32(allowed):
    """Inside, convolutions and products on a GPU may round their float32 inputs to TF32, or may not."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def median_ms(runs, device, seconds=0.1):
    """Median time in ms of each of several functions. They take turns, so that all meet the same machine: at
    least 3 turns, until each has run for `seconds`. A turn is a warm call and a timed one, on a GPU ten that
    wait in its queue."""
    times, calls = [[] for _ in runs], 10 if device == "cuda" else 1
    while waiting := [k for k, own in enumerate(times) if len(own) < 3 or sum(own) < 1e3 * seconds / calls]:
        for k in waiting:
            for count in (1, calls):
                start = time.perf_counter()
                for _ in range(count):
                    runs[k]()
                if device == "cuda":
                    torch.cuda.synchronize()
                elapsed = time.perf_counter() - start
            times[k].append(1e3 * elapsed / calls)
    return [statistics.median(own) for own in times]


def extra_mb(run, device):
    """Memory that run() takes beyond its result, MB, from torch's allocator on a GPU, else from Linux's
    high-water mark; nan elsewhere."""

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6

    if device == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        return (torch.cuda.max_memory_allocated() - held - result.nbytes) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc: hand freed memory back
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the mark anew
        held = status("VmRSS")
        result = run()
        return max(0.0, status("VmHWM") - held - result.nbytes / 1e6)
    except (OSError, AttributeError):
        return math.nan


def layer_operators(layer, device):
    """(name, context to run in, function, inputs, elements, scale) of each operator on one layer. An element
    is one term of the sum; scale > 1 says that the inputs are 1/scale of the batch."""
    N, C, M, side, K, padding, groups = LAYERS[layer]
    N *= 16 if device == "cuda" else 1
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, side, side, generator=g).to(device)
    w = (torch.randn(M, C // groups, K, K, generator=g) * 0.1).to(device)
    tokens = x.view(N, C, -1).mT if side > 1 else x.view(8, -1, C)
    heads = tokens.unflatten(2, (-1, 16)).transpose(1, 2)
    elements = N * M * side * side * w[0].numel()

    def conv(x, w):
        if side == 1:
            return F.linear(x.flatten(1), w.flatten(1))
        return F.conv2d(x, w, None, 1, padding, 1, groups)

    def add(x, w):
        return add_conv2d(x, w, 1, padding, groups)

    def broadcast(x, w):  # AdderNet's adder.py: one difference of all patches and filters
        patches = F.unfold(x, K, padding=padding).view(len(x), groups, 1, w[0].numel(), -1)
        return -(patches - w.view(1, groups, M // groups, -1, 1)).abs().sum(3)

    def path(name):
        return functools.partial(forced_path, name)

    yield "conv", nullcontext, conv, (x, w), elements, 1
    if device == "cuda":
        yield "conv (TF32)", functools.partial(tf32, True), conv, (x, w), elements, 1
    for name in ["gpu"] if device == "cuda" else ["cpu", "cpu-portable"]:
        yield f"add ({name})", path(name), add, (x, w), elements, 1
    yield "add (unfold + cdist)", path("off"), add, (x[::16], w), elements, 16
    yield "add (broadcast)", nullcontext, broadcast, (x[::8], w), elements, 8
    if device == "cpu":
        bytes_ = [(t * 50 + 128).clamp(0, 255).to(torch.uint8) for t in (x, w)]
        yield "add u8", path("cpu"), lambda x, w: add_conv2d_u8(x, w, 1, padding, groups), bytes_, elements, 1
    yield "shift", nullcontext, lambda x, w: conv(fixed_point(x), power_of_two(w)), (x, w), elements, 1
    pairs = 2 * heads.numel() * heads.shape[2]  # q k products and values, elements of this layer's tokens
    yield "attention", nullcontext, F.scaled_dot_product_attention, (heads,) * 3, pairs, 1


def measure(operators, device):
    """{name: (forward ms, forward + backward ms, extra MB of a forward, elements)} of a layer's operators,
    scaled to the whole batch; forward + backward is nan for bytes."""

    def forward(context, function, inputs):
        with context(), torch.no_grad():
            return function(*inputs)

    def train(context, function, inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        with context():
            y = function(*leaves)
            torch.autograd.grad(y, leaves, torch.ones_like(y))

    names, contexts, functions, inputs, elements, scales = zip(*operators)
    calls = list(zip(contexts, functions, inputs))
    forward_ms = median_ms([functools.partial(forward, *call) for call in calls], device)
    floats = [k for k, own in enumerate(inputs) if own[0].is_floating_point()]
    train_ms = dict(zip(floats, median_ms([functools.partial(train, *calls[k]) for k in floats], device)))
    found = {}
    for k, name in enumerate(names):
        extra = extra_mb(functools.partial(forward, *calls[k]), device)
        times = scales[k] * forward_ms[k], scales[k] * train_ms.get(k, math.nan)
        found[name] = (*times, scales[k] * extra, elements[k])
    return found


def print_ratios(table):
    """The figures that operators are compared by, from {layer: what measure found}."""

    def ratio(above, below, column):
        return statistics.geometric_mean(own[above][column] / own[below][column] for own in table.values())

    names = list(next(iter(table.values())))
    add = next(name for name in names if name in ("add (cpu)", "add (gpu)"))
    print("geometric means of the six layers:")
    for name in names:
        forward, train = (ratio(name, "conv", column) for column in (0, 1))
        print(f"{name:22} / conv: forward {forward:6.2f}  fwd+bwd {train:6.2f}")
    for name in ("add (unfold + cdist)", "add (broadcast)"):
        print(f"{name:22} / {add}: forward {ratio(name, add, 0):6.1f}")
    if "add u8" in names:
        print(f"{add:22} / add u8: forward {ratio(add, 'add u8', 0):6.2f}")
    shares = []
    for layer, found in table.items():
        _, _, extra, elements = found[add]
        _, _, M, _, _, _, groups = LAYERS[layer]
        shares.append(f"{extra / (elements * groups / M * 4 / 1e6):.1%} ({layer})")
    print(f"extra memory of {add} over the im2col matrix: {', '.join(shares)}")


def ceiling(device):
    """(multiply-adds a second, 1e9, and how that was had): of a matrix product on a CPU; on a GPU 128 lanes a
    multiprocessor (from compute capability 8.6 on) at the highest clock."""
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        clock, lanes = gpu.clock_rate / 1e6, 128 * gpu.multi_processor_count
        return clock * lanes, f"{lanes} lanes at {clock:.3f} GHz, of which add, two FADD a term, has half"
    a = torch.randn(1024, 1024)
    return 1024**3 / 1e6 / median_ms([lambda: a @ a], device)[0], "a float32 matrix product of 1024 x 1024"


def print_device(device):
    """The operator table of one device."""
    names = [line.split(":")[1].strip() for line in cpu_model().splitlines() if line.startswith("model name")]
    name, batch = (names or [platform.machine()])[0], f"threads: {torch.get_num_threads()}"
    if device == "cuda":
        name, batch = torch.cuda.get_device_name(), "16 times the batch"
    print(f"{name}, {batch}, torch {torch.__version__}; float32; medians; G/s = 10^9 elements a second")
    most, reason = ceiling(device)
    print(f"ceiling {most:.1f} G/s: {reason}")
    titles = f"{'forward ms':>11}{'G/s':>9}{'ceiling':>9}{'fwd+bwd ms':>12}{'extra MB':>10}"
    print(f"{'layer':18}{'operator':22}{titles}")
    table = {}
    for layer in LAYERS:
        table[layer] = measure(layer_operators(layer, device), device)
        for operator, (ms, train_ms, extra, elements) in table[layer].items():
            rate = elements / 1e6 / ms
            own = most / 2 if operator == "add (gpu)" else most
            figures = f"{ms:11.3f}{rate:9.1f}{rate / own:9.0%}{train_ms:12.3f}{extra:10.1f}"
            print(f"{layer:18}{operator:22}{figures}")
    print_ratios(table)


def operator_table():
    """Print time, elements a second, share of the ceiling and extra memory of every operator on LAYERS.

    conv is nn.Conv2d (nn.Linear) without bias, as in the networks. glibc is told to keep freed memory: else a
    large result costs its page faults at every call or at none, as the calls before have it.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, size in ((-3, 2**25), (-1, 2**30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)
    print_device("cpu")
    if torch.cuda.is_available():
        with tf32(False):
            print_device("cuda")
    else:
        print("gpu: not measured (no GPU that torch can use)")


if __name__ == "__main__":
    if sys.argv[1:]:
        print("shiftaddnas.py takes no arguments; alone it prints the operator table", file=sys.stderr)
        sys.exit(2)
    try:
        operator_table()
    except RuntimeError as error:  # a path that this machine cannot build
        print(f"shiftaddnas.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)

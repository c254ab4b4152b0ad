"""Train a ShiftAddNAS supernet, or one fixed network, with one loop.

    python train.py                                        supernet of the fashion space -> out/supernet.pt
    python train.py --arch cc/sa/tt                        one network from scratch      -> out/cc-sa-tt.pt
    python train.py --arch cc/sa/tt --init out/supernet.pt           from inherited weights
    python train.py --space cifar10 --data FOLDER          other images;  --space translation: Transformers
    python train.py --evaluate net.pt                      figures of a trained network on the test data
    python train.py --predict net.pt PICTURE ...           classes;  --translate net.pt: of standard input
    torchrun --nproc-per-node 2 train.py --accumulate 2    two processes, each with its GPU if there are some

A step draws archs fairly: each operator of a position equally often, each arch on a part of the images (--set
sampling=single, and translation: one arch, as the official code). It minimises

    cross-entropy(supernet(x, archs), y) + kl_weight * divergence(archs)

with the settings of a row of RECIPES, which --recipe and --set KEY=VALUE change. The divergence is that of
--sharing heterogeneous, else 0. Log: <out>/<name>.jsonl.
The recipes of `hytra` and `bossnet_*` are the official ones, but: T is an option; archs are drawn fairly; the
first epochs train (theirs step at 1e-6); a supernet is judged by fixed archs with statistics of their own
(theirs: random ones, shared statistics); test images are normalised as training images; crops are bilinear;
RandAugment lacks equalise and sharpen; no drop-path, which theirs ignore; the EMA average is returned (theirs
is not used).
"""

import argparse
import json
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data import images, sentences
from shiftaddnas import SHARING, UNK, Supernet, TokenSpace, Translator, build, find_space, quantise, read_arch


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run. The defaults are the recipe of the `fashion` space."""

    epochs: int = 5  # passes over the training data
    supernet_epochs: int = 0  # the same for the supernet of search.py; 0: epochs
    batch: int = 100  # images or sentences of a forward pass
    accumulate: int = 1  # forward passes a step, all with one draw of archs, shared by the processes
    lr: float = 1e-2  # peak learning rate of AdamW
    schedule: str = "cosine"  # of the learning rate after warm-up, or inverse-sqrt
    final_lr: float = 0.0  # learning rate at the end of the cosine
    warmup: int = 0  # steps of linear warm-up; 0: an epoch
    beta2: float = 0.999  # decay of AdamW's second moment
    weight_decay: float = 0.05  # AdamW's decay of tensors with more than one dimension
    smoothing: float = 0.0  # label smoothing
    clip: float = 0.0  # largest norm of a step's gradient; 0: any
    kl_weight: float = 0.01  # weight of the divergence of shared weights in the loss
    sampling: str = "fair"  # archs of a step: each operator of a position equally often, or single
    ema: float = 0.0  # decay of the average of the weights; 0: none
    average_epochs: int = 0  # mean of the weights after each of the last epochs; 0: the last weights
    crop: float = 0.0  # random parts of at least this share of an image; 0: shifts by 1/14
    randaugment: float = 0.0  # magnitude, up to 10, of two random changes an image
    erasing: float = 0.0  # share of images with a box of noise
    mixup: float = 0.0  # mix pairs of images with a share from Beta(a, a)
    cutmix: float = 0.0  # paste a box of another image with a share from Beta(a, a)
    repeats: int = 1  # augmented copies of an image in a step, of fewer images
    dropout: float = 0.0  # of a Transformer block of full width
    bits: int = 0  # quantise a Transformer to so many bits; 0: not
    merges: str = "2000"  # byte pairs to merge; none: words, for text in pieces
    max_length: int = 200  # longest sentence, in pieces
    beam: int = 4  # hypotheses a sentence in decoding
    length_penalty: float = 0.6  # a hypothesis scores log p / length ** this
    tokenise: str = "13a"  # words that BLEU counts: 13a, or char for languages without spaces
    budget: float = 0.5  # search.py: share of the reference network's energy
    finalists: int = 3  # search.py: networks that are retrained to find the winner
    out: str = "out"  # folder of a run, unless --out names another


HYTRA = Recipe(  # 8 GPUs; the warm-up is 5 epochs of CIFAR-100
    epochs=300, batch=128, accumulate=8, lr=1e-3, final_lr=1e-5, warmup=240, smoothing=0.1, crop=0.08,
    randaugment=9.0, mixup=0.8, cutmix=1.0, erasing=0.25, repeats=3,
)
WMT14 = Recipe(  # official supernet: 8 GPUs x 16 passes of 4,096 tokens a step, 40,000 steps
    epochs=135, batch=120, accumulate=128, lr=1e-3, warmup=10000, beta2=0.98, weight_decay=0.0,
    smoothing=0.1, dropout=0.3, bits=8, merges="none",
)
IWSLT14 = Recipe(
    epochs=45, batch=120, lr=5e-4, schedule="inverse-sqrt", warmup=10000, beta2=0.98, weight_decay=1e-4,
    smoothing=0.1, clip=25.0, dropout=0.375, merges="none", beam=5, length_penalty=1.0,
)
RECIPES = {
    "fashion": Recipe(),
    "translation": Recipe(
        epochs=4, supernet_epochs=8, batch=32, lr=2e-3, schedule="inverse-sqrt", beta2=0.98, weight_decay=0.0,
        smoothing=0.1, budget=0.75, finalists=2, out="out/translation",
    ),
    "hytra": HYTRA,
    "bossnet_t0": replace(HYTRA, warmup=6255, ema=0.99996),  # the warm-up is 5 epochs of ImageNet
    "bossnet_t1": replace(HYTRA, batch=112, lr=8.75e-4, warmup=7150, ema=0.99996),
    "wmt14_en_de": WMT14,
    "wmt14_en_fr": WMT14,
    "wmt14-subnet": replace(WMT14, warmup=4000, bits=0),
    "iwslt14_de_en": IWSLT14,
    "iwslt14_de_en-subnet": replace(IWSLT14, warmup=4000, average_epochs=10),
}

# what --set can change and what the values may be: from AT_LEAST or 0 to BELOW, one of CHOICES
KINDS = {field.name: type(field.default) for field in fields(Recipe)} | {"image": int, "classes": int}
CHOICES = {"schedule": ["cosine", "inverse-sqrt"], "sampling": ["fair", "single"]}
CHOICES |= {"tokenise": ["13a", "char"]}
AT_LEAST = dict.fromkeys("epochs accumulate repeats max_length beam finalists image classes".split(), 1)
AT_LEAST |= {"batch": 2, "lr": 1e-12}
BELOW = dict.fromkeys(("beta2", "smoothing", "ema", "crop", "dropout"), 1)
FOR_IMAGES = ("image", "classes", "sampling", "crop", "randaugment", "erasing", "mixup", "cutmix", "repeats")
FOR_SENTENCES = ("dropout", "bits", "merges", "max_length", "beam", "length_penalty", "tokenise")


def checked(key, text):
    """Return the value of one setting, of the right type and in range; it may come as text."""
    if key not in KINDS:
        raise ValueError(f"--set {key}={text}: a recipe has no {key!r}, but {', '.join(KINDS)}")
    kind = KINDS[key]
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{key} must be of type {kind.__name__}, got {text!r}") from None
    if key in CHOICES and value not in CHOICES[key]:
        raise ValueError(f"{key} must be one of {', '.join(CHOICES[key])}, got {value!r}")
    least = AT_LEAST.get(key, 0)
    limit = BELOW.get(key, math.inf)
    if kind is not str and not least <= value < limit:  # NaN is not
        below = f" and below {limit}" if key in BELOW else ""
        raise ValueError(f"{key} must be at least {least}{below}, got {value}")
    return value


def make_recipe(name, settings):
    """Return a row of RECIPES with some fields changed, each checked; settings: {field: text or value}."""
    return replace(RECIPES[name], **{key: checked(key, value) for key, value in settings.items()})


def apply_settings(texts, space, recipe):
    """Return (space, recipe) with changes, a list of KEY=VALUE; ValueError for one of the other task."""
    is_text = isinstance(space, TokenSpace)
    changes = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key in (FOR_IMAGES if is_text else FOR_SENTENCES):
            task = "images" if is_text else "translation"
            raise ValueError(f"{key} is for {task}, not for space {space.name}")
        changes[key] = checked(key, value)
    of_space = {key: changes.pop(key) for key in ("image", "classes") if key in changes}
    return replace(space, **of_space), replace(recipe, **changes)


def load_data(space, path, recipe, state=None, cache=None):
    """Return the data of a space, Images or Sentences; state: what a checkpoint kept of its data."""
    if isinstance(space, TokenSpace):
        names = ("merges", "max_length", "beam", "length_penalty", "tokenise")
        settings = {name: getattr(recipe, name) for name in names}
        return sentences.load_sentences(path, vocabulary=state and state["vocabulary"], **settings)
    augment = images.Augment(*[getattr(recipe, name) for name in images.Augment._fields])
    return images.load_images(path, space, augment, state, cache)


def make_model(space, arch, sharing, seed, recipe, data_state):
    """Return the untrained network of an arch, or the supernet if it is ""."""
    if isinstance(space, TokenSpace):
        size = len(data_state["vocabulary"]["pieces"]) + UNK + 1
        model = Translator(space, size, arch or None, sharing, seed, recipe.dropout)
        return quantise(model, recipe.bits) if recipe.bits else model
    return build(space, arch, seed) if arch else Supernet(space, sharing, seed)


# ------------------------------------------------------------------------------------------ the loop

# Each process of torchrun makes its share of a step's `accumulate` passes, and the gradients are added up: a
# step is the same for any number of processes, but for batch norm's running statistics, the first one's. (Not
# DistributedDataParallel: one path leaves most parameters without a gradient; the divergence is no forward.)
# Ctrl-C and SIGTERM save after the step at hand; after a kill, --resume repeats the steps since the last
# checkpoint exactly. A checkpoint is due once writing it costs less than SAVE_SHARE of the time.
SAVE_SHARE = 0.02


def train(model, data, recipe, path, seed=0, device="cpu", amp=False, resume=False):
    """Train a supernet or a network with checkpoints at `path`; return it, or the average of its weights.

    resume: go on from `path` if it exists. Raises ValueError at the first loss that is not finite.
    """
    model.to(device, memory_format=torch.channels_last).train()  # a fifth faster on a CPU
    optimizer = make_optimizer(model, recipe)
    average = make_average(model, recipe)
    generator = torch.Generator().manual_seed(seed)  # of images and archs
    torch.manual_seed(seed)  # of dropout
    per_epoch = max(1, data.size() // (recipe.batch * recipe.accumulate))
    steps = recipe.epochs * per_epoch
    run = Run(path, model, recipe, seed, data, optimizer, average, generator, device)
    step, order = run.restore() if resume and run.path.exists() else (0, None)
    with run.open_log(step) as log, interruptible() as stop:
        while step < steps:
            if step % per_epoch == 0:
                order = data.epoch(recipe.batch * recipe.accumulate, generator)
            batches = draw_batches(data, order[step % per_epoch], recipe.accumulate, generator, device)
            archs = [model.arch] if model.arch else model.space.draw(generator, recipe.sampling == "fair")
            optimizer.zero_grad()
            sums = [0.0, 0.0, float(len(stop))]  # loss, cross-entropy, whether a process is to stop
            for inputs, y in batches:
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                    logits = model(*inputs) if model.arch else model(*inputs, archs)
                loss_ce = data.loss(logits, y, recipe.smoothing)
                loss = loss_ce
                if recipe.kl_weight and not model.arch:
                    loss = loss_ce + recipe.kl_weight * model.divergence(archs)
                passes = len(batches) * processes()
                (loss / passes).backward()
                sums[0] += loss.item() / passes
                sums[1] += loss_ce.item() / passes
            mean_loss, mean_ce, stopped = sum_over_processes(model, sums)
            if not math.isfinite(mean_loss):
                raise ValueError(f"the loss became {mean_loss} at step {step} with arch {', '.join(archs)}")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step, per_epoch)
            if recipe.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            step += 1
            update_average(average, model, recipe, step, per_epoch)
            log.write(json.dumps({"step": step, "loss": mean_loss, "ce": mean_ce, "archs": archs}) + "\n")
            run.report(mean_loss, step, steps, per_epoch)
            if stopped or step == steps or time.monotonic() > run.save_after:
                run.save(step, order, log)
            if stopped:
                raise KeyboardInterrupt
    return share_buffers(average.module if average else model).eval()


def draw_batches(data, rows, accumulate, generator, device):
    """Return this process's batches, (inputs, y), of the rows of one step, one a forward pass."""
    if accumulate % processes():
        raise ValueError(f"accumulate {accumulate} is no multiple of the {processes()} processes")
    count = min(accumulate, len(rows))
    parts = [rows[i::count] for i in range(count)]  # copies of an image go to different passes
    if count == 1:
        return [data.batch(rows, generator, device)]
    seeds = torch.randint(2**31, (count,), generator=generator).tolist()  # no process loads what others do
    mine = list(zip(parts, seeds))[rank() :: processes()]
    return [data.batch(part, torch.Generator().manual_seed(seed), device) for part, seed in mine]


def make_optimizer(model, recipe):
    """Return AdamW; vectors (batch norm, bias, slopes of a T) get no decay."""
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay}
    vectors = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)


def learning_rate(recipe, step, per_epoch):
    """Return the rate of a step: linear warm-up (at most a quarter of the steps), then the recipe's schedule.

    cosine: a half cosine to final_lr at the last step; inverse-sqrt: proportional to 1 / sqrt(step).
    """
    total = recipe.epochs * per_epoch
    warm = min(recipe.warmup or per_epoch, total // 4)
    if step < warm:
        return recipe.lr * (step + 1) / warm
    if recipe.schedule == "inverse-sqrt":
        return recipe.lr * math.sqrt(max(1, warm) / (step + 1))
    share = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    return recipe.final_lr + (recipe.lr - recipe.final_lr) * share


def make_average(model, recipe):
    """Return the AveragedModel of the recipe, or None."""
    if not recipe.ema and not recipe.average_epochs:
        return None
    if recipe.ema and recipe.average_epochs:
        raise ValueError(f"ema {recipe.ema} excludes average_epochs {recipe.average_epochs}")

    def ema(averages, weights, n):  # its decay warms up: else a short run would return its initial weights
        decay = min(recipe.ema, (1 + int(n)) / (10 + int(n)))
        get_ema_multi_avg_fn(decay)(averages, weights, n)

    return AveragedModel(model, multi_avg_fn=ema if recipe.ema else None, use_buffers=True)


def update_average(average, model, recipe, step, per_epoch):
    """Take the weights after `step` steps into the average: each time, or at the ends of the last epochs."""
    in_last_epochs = recipe.epochs - step // per_epoch < recipe.average_epochs
    if recipe.ema or in_last_epochs and step % per_epoch == 0:
        average.update_parameters(model)


# ------------------------------------------------------------------------------------------ processes


def rank():
    """Return the number of this process among those of torchrun; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    """Return how many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(device):
    """Join the processes that torchrun started, if it did; return this one's device, each its GPU."""
    use_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        return device
    backend = "nccl" if device.startswith("cuda") else "gloo"
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    if rank():  # only the first one prints and writes files
        sys.stdout = open(os.devnull, "w")
    return device


def sum_over_processes(model, numbers):
    """Replace gradients by their sums over all processes, in one message; return the sums of the numbers."""
    if processes() == 1:
        return numbers
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    message = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor(numbers)])
    dist.all_reduce(message)
    *sums, tail = message.split([g.numel() for g in gradients] + [len(numbers)])
    for gradient, total in zip(gradients, sums):
        gradient.copy_(total.view_as(gradient))
    return tail.tolist()


def share_buffers(model):
    """Give every process the first one's batch-norm statistics, wait for its checkpoint; return the model."""
    if processes() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        dist.barrier()
    return model


# ---------------------------------------------------------------------------------- files and checkpoints


def replace_file(path, write):
    """Call write(temporary name), then rename: the file at `path` is always whole. Only rank 0 writes."""
    if rank():
        return
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"cannot write {path}: {reason}") from None


def write_text(text, path):
    """Write a text file, whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save(state, path):
    """Write a checkpoint, whole or not at all."""
    replace_file(path, lambda temporary: torch.save(state, temporary))


class Run:
    """A training run on disk and screen: its checkpoint, log and progress."""

    def __init__(self, path, model, recipe, seed, data, optimizer, average, generator, device):
        self.path = Path(path)
        space = model.space
        registered = asdict(find_space(space.name))
        changes = {name: value for name, value in asdict(space).items() if value != registered[name]}
        # what the checkpoint keeps beside tensors and random states, and a resumed run must share
        self.description = {"space": space.name, "space_changes": changes, "arch": model.arch or ""}
        self.description |= {"sharing": getattr(model, "sharing", "none"), "seed": seed}
        self.description |= {"recipe": asdict(recipe), "data": data.state()}
        self.parts = {"model": model, "optimizer": optimizer} | ({"average": average} if average else {})
        self.generator = generator
        self.device = device
        self.losses = []  # of the steps since the last report
        self.reported = time.monotonic()
        self.save_after = self.reported

    def restore(self):
        """Load the checkpoint; return (step, order of the epoch). ValueError if it is of another run."""
        state = load_checkpoint(self.path)
        run = self.description
        may_differ = {"supernet_epochs", "budget", "finalists", "out"}  # no settings of training
        keys = ("space", "arch", "sharing", "seed")
        theirs = {key: state[key] for key in keys} | state["space_changes"] | state["recipe"]
        ours = {key: run[key] for key in keys} | run["space_changes"] | run["recipe"]
        for name in sorted((theirs.keys() | ours.keys()) - may_differ):
            if theirs.get(name) != ours.get(name):
                difference = f"made with {name} {theirs.get(name)!r}, this run asks for {ours.get(name)!r}"
                raise ValueError(f"{self.path} was {difference}; give the same settings or another --out")
        if state["data"]["fingerprint"] != run["data"]["fingerprint"]:
            raise ValueError(f"{self.path} was made with other data: the content of --data has changed since")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if "cuda_rng" in state and self.device.startswith("cuda"):
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        return state["step"], state["order"]

    def save(self, step, order, log):
        """Write all that an exact continuation needs, and say when the next checkpoint is cheap enough."""
        begun = time.monotonic()
        log.flush()
        state = self.description | {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"generator": self.generator.get_state(), "torch_rng": torch.get_rng_state()}
        if self.device.startswith("cuda"):
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        save(state | {"step": step, "order": order}, self.path)
        ended = time.monotonic()
        self.save_after = ended + (ended - begun) / SAVE_SHARE

    def open_log(self, step):
        """Open the log, cut back to the lines of the steps that the checkpoint has."""
        path = Path(os.devnull) if rank() else self.path.with_suffix(".jsonl")
        lines = path.read_text().splitlines(keepends=True)[:step] if path.exists() and step else []
        write_text("".join(lines), path)
        return open(path, "a", encoding="utf-8")

    def report(self, loss, step, steps, per_epoch):
        """Print one line at the end of an epoch: mean loss, rate, time left."""
        self.losses.append(loss)
        if step % per_epoch == 0:
            mean = sum(self.losses) / len(self.losses)
            seconds = (time.monotonic() - self.reported) / len(self.losses)
            times = f"{1e3 * seconds:.0f} ms a step | {(steps - step) * seconds:.0f} s left"
            print(f"{self.path.stem}  step {step}/{steps} | loss {mean:.3f} | {times}", flush=True)
            self.losses = []
            self.reported = time.monotonic()


KEPT = {"model": dict, "space": str, "space_changes": dict, "arch": str, "sharing": str, "seed": int}
KEPT |= {"recipe": dict, "data": dict, "step": int}
KEPT_OF_DATA = ({"mean", "std", "side", "class_names"}, {"vocabulary"})  # of images, of sentences


def load_checkpoint(path):
    """Return a checkpoint dict of tensors and plain values; ValueError if it is not a whole one."""
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None  # compares checksums, which torch does not
        state = torch.load(path, map_location="cpu", weights_only=True)
        whole = whole and all(isinstance(state.get(key), kind) for key, kind in KEPT.items())
        whole = whole and any(state["data"].keys() >= needed for needed in KEPT_OF_DATA)
        state["recipe"] = asdict(Recipe(**state["recipe"]))
        tensors = [*state["model"].values(), *state.get("average", {}).values()]
        finite = all(tensor.isfinite().all() for tensor in tensors)
    except Exception:  # zipfile, pickle and torch raise a dozen kinds for what they cannot read
        whole = False
    if not whole:
        raise ValueError(f"{path} is not a whole checkpoint of train.py")
    if not finite:
        raise ValueError(f"{path} holds weights that are not finite numbers")
    return state


def load_model(path, state):
    """Return the supernet or network of a checkpoint dict in evaluation mode: its average if it has one."""
    weights = state.get("average", state["model"])
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    weights.pop("n_averaged", None)
    try:
        space = replace(find_space(state["space"]), **state["space_changes"])
        recipe = Recipe(**state["recipe"])
        model = make_model(space, state["arch"], state["sharing"], state["seed"], recipe, state["data"])
        model.load_state_dict(weights)
        if isinstance(space, TokenSpace):
            return model.eval()
        images.require_state(state["data"], space)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[:2][-1].strip()  # torch's first line names only the class
        raise ValueError(f"{path} does not fit the network: {reason}") from None
    return model.eval()


@contextmanager
def interruptible():
    """Let Ctrl-C and SIGTERM only fill the yielded list, so that the step at hand can end and be saved."""
    stop = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, frame: stop.append(number)) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------- command line


def add_flags(parser, *keys):
    """Add the flags that train.py and search.py have in common; each key is one more flag --key."""
    flag = parser.add_argument
    flag("--space", help="search space; default: fashion, or the checkpoint's")
    flag("--data", default="", metavar="PATH", help="another data set than the embedded one")
    flag("--recipe", choices=RECIPES, metavar="ROW", help="row of RECIPES in train.py; default: the space's")
    flag("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the recipe")
    for key in ("epochs", "batch", "accumulate", "lr", "kl_weight", "image", "classes", *keys):
        name = f"--{key.replace('_', '-')}"
        short = f"{key}={{}}".format  # 3 -> epochs=3
        flag(name, action="append", dest="set", type=short, metavar="N", help=f"short for --set {key}=N")
    flag("--sharing", default="naive", choices=SHARING, help="of weights; heterogeneous is the paper's")
    flag("--seed", type=int, default=0, help="seed of initialisation, images and archs")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    flag("--amp", action="store_true", help="forward passes in bfloat16")
    flag("--out", help="output folder; default: out, or the recipe's")


def read_settings(args):
    """Return (space, recipe, output folder) of the common flags; ValueError for a bad value."""
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2 ** 63, got {args.seed}")
    space = find_space(args.space or "fashion")
    recipe = RECIPES[args.recipe or (space.name if space.name in RECIPES else "fashion")]
    space, recipe = apply_settings(args.set, space, recipe)
    return space, recipe, args.out or recipe.out


def use_device(name):
    """Make runs on a device repeat: same seed, same log; ValueError unless torch can use it."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if name.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # the gradients of these two do not repeat
        torch.backends.cuda.enable_cudnn_sdp(False)


def run_command(main):
    """Call main(); turn expected errors into one line on stderr and exit code 2, Ctrl-C into code 130."""
    program = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # its reader, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
        print(f"{program}: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; search.py goes on with the same command, train.py with --resume", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if processes() == 1:
            raise
        print(f"{program}: process {rank()} stops, another one is gone: {error}", file=sys.stderr)
        os._exit(1)  # the others cannot be waited for
    if dist.is_initialized():
        dist.destroy_process_group()


def inherit(path, space, arch):
    """Return the network of an arch with the weights of a checkpoint, of a supernet or of the same arch."""
    state = load_checkpoint(path)
    model = load_model(path, state)
    made = (state["space"], state["arch"] or arch, getattr(model.space, "classes", None))
    asked = (space.name, arch, getattr(space, "classes", None))
    if made != asked:
        raise ValueError(f"{path} was made for space, arch and classes {made}, this run asks for {asked}")
    return model if state["arch"] else model.extract(arch)


def read_network(path, device, space=None, settings=()):
    """Return (network, checkpoint dict, Recipe) of one network; settings: KEY=VALUE, maybe another side."""
    state = load_checkpoint(path)
    if not state["arch"] or space not in (None, state["space"]):
        kind = "one network" if state["arch"] else "a supernet"
        raise ValueError(f"{path} is {kind} of space {state['space']}, not one network of {space or 'it'}")
    network = load_model(path, state).to(device)
    changed, recipe = apply_settings(settings, network.space, Recipe(**state["recipe"]))
    if changed != network.space:
        network.space = changed
        state["data"]["side"] = changed.image
    return network, state, recipe


def evaluate(args):
    """Print the figures of a trained network on the test part of the data."""
    network, state, recipe = read_network(args.evaluate, args.device, args.space, args.set)
    data = load_data(network.space, args.data, recipe, state["data"])
    figures = data.test(network, args.device)
    report = " | ".join(f"{name} {value:.2f}" for name, value in figures.items())
    print(f"{network.space.short(network.arch)} | {report} | {data.extent()}")


def predict(args):
    """Print class and probability of each picture."""
    path, *pictures = args.predict
    network, state, _ = read_network(path, args.device, args.space)
    if isinstance(network.space, TokenSpace):
        raise ValueError(f"--predict {path}: not the checkpoint of a network of images")
    names, x = images.read_pictures(pictures, network.space, state["data"])
    with torch.no_grad():
        probabilities = network(x.to(args.device)).softmax(1)
    if not probabilities.isfinite().all():
        raise ValueError(f"--predict {path}: the network's outputs are not finite numbers")
    class_names = state["data"]["class_names"] or range(network.space.classes)
    for name, row in zip(names, probabilities):
        best = int(row.argmax())
        print(f"{name} | {class_names[best]} | {row[best]:.3f}")


def translate(args):
    """Write the translation of each line of standard input as soon as it is read."""
    network, state, recipe = read_network(args.translate, args.device, args.space, args.set)
    if not isinstance(network.space, TokenSpace):
        raise ValueError(f"--translate {args.translate}: not the checkpoint of a translation network")
    sentences.translate_lines(network, state["data"] | asdict(recipe), sys.stdin.buffer, args.device)


def main(argv=None):
    """Run the command line of train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, "bits")
    flag = parser.add_argument
    flag("--arch", default="", help="train this network, not the supernet: an arch or a .json file with one")
    flag("--init", metavar="FILE", help="with --arch: start from this checkpoint of a supernet or network")
    flag("--resume", action="store_true", help="continue an interrupted run")
    mode_flag = parser.add_mutually_exclusive_group().add_argument
    mode_flag("--evaluate", metavar="FILE", help="test the network of this checkpoint instead")
    mode_flag("--predict", nargs="+", metavar="FILE", help="a checkpoint, then pictures to classify")
    mode_flag("--translate", metavar="FILE", help="translate standard input with this checkpoint instead")
    args = parser.parse_args(argv)
    use_device(args.device)
    for name, mode in (("evaluate", evaluate), ("predict", predict), ("translate", translate)):
        if getattr(args, name):
            return mode(args)
    space, recipe, out = read_settings(args)
    arch = read_arch(space, args.arch) if args.arch else ""
    if args.init and not arch:
        raise ValueError("--init needs --arch: it starts one network from a supernet's weights")
    device = join_processes(args.device)
    path = Path(out) / f"{space.file_name(arch) if arch else 'supernet'}.pt"
    if path.exists() and not args.resume and load_checkpoint(path)["space"] != space.name:
        raise ValueError(f"{path} is of another space than {space.name}; give another --out")
    init = inherit(args.init, space, arch) if args.init else None
    source = path if args.resume and path.exists() else args.init  # whose vocabulary is used again
    known = load_checkpoint(source)["data"] if source and isinstance(space, TokenSpace) else None
    data = load_data(space, args.data, recipe, known, cache=out)
    model = init or make_model(space, arch, args.sharing, args.seed, recipe, data.state())
    count = sum(p.numel() for p in model.parameters())
    sizes = f"{count:,} parameters | {data.size()} training examples"
    print(f"{space.name}: {arch or 'supernet'} | {sizes} | {device}, {torch.get_num_threads()} threads")
    if args.resume and not path.exists():
        print(f"nothing to resume: {path} does not exist, training starts", file=sys.stderr)
    model = train(model, data, recipe, path, args.seed, device, args.amp, args.resume)
    figures = data.test(model, device) if arch else {}
    print("".join(f"{name} {value:.2f} | " for name, value in figures.items()) + f"saved {path}")


if __name__ == "__main__":
    run_command(main)

"""Images for training, search and prediction: formats, splits, augmentation, accuracy.

    data = load_images("", SPACES["fashion"])             the embedded grey Fashion-MNIST
    data = load_images("folder", space)                   a folder in one of the formats of FORMATS
    data = load_images("folder", space, state=state)      test images, prepared as a checkpoint's were
    names, x = read_pictures(["cat.png"], space, state)   pictures to classify

Images are uint8 arrays (N, H, W) or (N, H, W, C), memory-mapped where they are .npy files. They need not have
the network's side: evaluation resizes their central 7/8, training takes random parts if Augment.crop is set.
Pictures are first resized to 8/7 of the network's side and cropped to a square: both steps together are the
official resize-and-crop (256, then 224). What is wrong with a file ends in a ValueError that names it first.
"""

import gzip
import hashlib
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

FORMATS = (
    "{train,val,test}_{images,labels}.npy (val_ may be absent), IDX files (train-images-idx3-ubyte ...), "
    "CIFAR batches (data_batch_1 ... or train, test), or pictures ([train/ test/] CLASS/*.png)"
)
PAIRS = (  # split, file of its images, file of its labels; those without .npy are IDX files, maybe with .gz
    *[(split, f"{split}_images.npy", f"{split}_labels.npy") for split in ("train", "val", "test")],
    ("train", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("test", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
BATCHES = (  # split, its CIFAR batches, the key of their labels
    ("train", [f"data_batch_{number}" for number in range(1, 6)], "labels"),
    ("test", ["test_batch"], "labels"),
    ("train", ["train"], "fine_labels"),
    ("test", ["test"], "fine_labels"),
)
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
FITNESS_IMAGES = 2000  # a search scores many archs; what it retrains is judged by all validation images
FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")


# ------------------------------------------------------------------------------------- the data of a run


class Augment(NamedTuple):
    """How training images are varied; 0 switches a change off."""

    crop: float = 0.0  # random parts of at least this share of an image; 0: shifts by up to 1/14
    randaugment: float = 0.0  # magnitude, up to 10, of two random changes
    erasing: float = 0.0  # share of the images that get a box of noise
    mixup: float = 0.0  # images are mixed in shares of Beta(a, a)
    cutmix: float = 0.0  # the same with boxes; if both are set a coin decides for each batch
    repeats: int = 1  # copies of an image in an epoch, of fewer images


class Split(NamedTuple):
    """Some rows of an array of images, with their labels."""

    images: np.ndarray  # (N, H, W) or (N, H, W, C) uint8, maybe memory-mapped
    labels: np.ndarray  # (N,) int64
    index: np.ndarray  # the rows of the two arrays that belong to this split

    def batch(self, rows, device="cpu"):
        """Return x (B, C, H, W) float32 in [0, 1] and y (B,) int64 of some rows of the split."""
        if len(rows) == 0:
            raise ValueError("there are no images of this split; only test images were in the data folder")
        rows = self.index[rows]
        y = torch.from_numpy(self.labels[rows]).to(device)
        return as_input(self.images[rows], device), y


class Images(NamedTuple):
    """Three splits and how their images become the inputs of a network."""

    train_set: Split
    val_set: Split
    test_set: Split
    mean: torch.Tensor  # (C, 1, 1), of the training images
    std: torch.Tensor  # (C, 1, 1)
    side: int  # of the images that enter the network
    class_names: list  # one text for each class of the space
    augment: Augment

    def size(self):
        """Return the number of training images."""
        return len(self.train_set.index)

    def epoch(self, batch, generator):
        """Return the rows of each step of an epoch in a new order, (steps, batch)."""
        n = self.size()
        if n == 0:
            raise ValueError("the data folder has no training images")
        batch = min(batch, n)
        repeats = self.augment.repeats
        images = torch.randperm(n, generator=generator)[: math.ceil(n / repeats)]
        # Copies of an image stand side by side: each goes to another of the passes of a step.
        rows = images.repeat_interleave(repeats)
        return rows[: n // batch * batch].view(-1, batch)

    def batch(self, rows, generator, device="cpu"):
        """Return ((x,), y), augmented: x (B, C, side, side), labels y (B,) or, if mixed, (B, classes)."""
        augment = self.augment
        x, y = self.train_set.batch(rows.numpy(), device)
        if augment.crop:
            x = random_crop(x, self.side, augment.crop, generator)
        x = fit(x, self.side)
        if augment.randaugment:
            x = rand_augment(x, augment.randaugment, generator)
        x = normalise(x, self.mean, self.std)
        if not augment.crop:
            x = shift_and_mirror(x, generator)
        if augment.erasing:
            x = erase(x, augment.erasing, generator)
        if augment.mixup or augment.cutmix:
            probabilities = F.one_hot(y, len(self.class_names)).float()
            x, y = mix(x, probabilities, augment.mixup, augment.cutmix, generator)
        return (x,), y

    def view(self, split, rows, device="cpu"):
        """Return x (B, C, side, side) and y (B,) of some rows of a split as an evaluation sees them."""
        x, y = split.batch(rows, device)
        return normalise(fit(x, self.side), self.mean, self.std), y

    def loss(self, logits, y, smoothing=0.0):
        """Return the cross-entropy in nats an image; of a pair of classifiers the mean of both."""
        heads = logits if isinstance(logits, tuple) else (logits,)
        losses = [F.cross_entropy(head.float(), y, label_smoothing=smoothing) for head in heads]
        return sum(losses) / len(losses)

    def fitness(self, supernet, arch, device="cpu"):
        """Return the validation accuracy in percent of an arch with the weights of the supernet."""
        network = recalibrate(supernet.extract(arch), self, device=device)
        some = self.val_set._replace(index=self.val_set.index[:FITNESS_IMAGES])
        return accuracy(network, self, some, device)

    def validate(self, network, device="cpu"):
        """Return (accuracy, its standard error), both in percent, on the validation images."""
        percent = accuracy(network, self, self.val_set, device)
        return percent, standard_error(percent, len(self.val_set.index))

    def test(self, network, device="cpu"):
        """Return {"test_accuracy", "standard_error"} in percent."""
        percent = accuracy(network, self, self.test_set, device)
        error = standard_error(percent, len(self.test_set.index))
        return {"test_accuracy": percent, "standard_error": error}

    def samples(self, network, reference, device="cpu"):
        """Return the extra entries of a search's result: images have none."""
        return {}

    def extent(self):
        """Return the last words of a report: on how much the figures rest."""
        return f"{len(self.test_set.index)} test images, one seed"

    def state(self):
        """Return what a checkpoint keeps, so that other images can be prepared alike."""
        kept = {name: getattr(self, name) for name in ("mean", "std", "side", "class_names")}
        return {**kept, "fingerprint": self.fingerprint()}

    def fingerprint(self):
        """Return 16 hexadecimal digits of the class names, the labels and a sample of the images."""
        digest = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape"))
        for images, labels, index in (self.train_set, self.val_set, self.test_set):
            step = max(1, images.size // 2**25)  # every image, or evenly spaced ones of some 32 MiB
            digest.update(f"{images.shape}".encode())
            for array in (images[::step], labels, index):
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:16]


def as_input(images, device="cpu"):
    """Return x (B, C, H, W) float32 in [0, 1] of uint8 images (B, H, W) or (B, H, W, C)."""
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device)  # as bytes, a quarter of the traffic
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x.float() / 255


def normalise(x, mean, std):
    """Return images in [0, 1] as the network takes them."""
    return (x - mean.to(x.device)) / std.to(x.device)


# ------------------------------------------------------------------------------------- evaluation


def require_state(state, space):
    """Raise ValueError unless Images.state() of a checkpoint can prepare images of a space."""
    numbers = torch.stack([torch.as_tensor(state["mean"]), torch.as_tensor(state["std"])]).flatten(1)
    if numbers.shape[1] != space.in_channels or not numbers.isfinite().all() or (numbers[1] <= 0).any():
        raise ValueError(f"its mean and deviation are {numbers.tolist()}, for {space.in_channels} channels")
    names = state["class_names"]
    if type(state["side"]) is not int or state["side"] < 1:
        raise ValueError(f"its side is {state['side']!r}, not an int of at least 1")
    if names is not None and len(names) != space.classes:
        raise ValueError(f"it has {len(names)} class names for {space.classes} classes")


@torch.no_grad()
def accuracy(network, data, split, device="cpu", batch=500):
    """Return the percentage of a split's images that a network in evaluation mode classifies right."""
    network.eval()
    count = len(split.index)
    right = 0
    for rows in np.array_split(np.arange(count), max(1, count // batch)):
        x, y = data.view(split, rows, device)
        logits = network(x)  # (B, classes)
        # argmax would take NaN for class 0: a network that is broken would look like one that guesses.
        if not torch.isfinite(logits).all():
            raise ValueError("the network's outputs are not finite numbers; are its weights?")
        if logits.shape[1] != len(data.class_names):
            classes = f"{logits.shape[1]} classes, the data have {len(data.class_names)}"
            raise ValueError(f"the network knows {classes}")
        right += (logits.argmax(1) == y).sum().item()
    return 100 * right / count


@torch.no_grad()
def recalibrate(network, data, images=500, device="cpu"):
    """Set an extracted subnet's batch-norm statistics from the first training images; return it."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()  # averages over other archs
        norm.momentum = None  # plain average over the batches
    x, _ = data.view(data.train_set, np.arange(min(images, data.size())), device)
    network.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


def standard_error(percent, count):
    """Return the standard error in points of an accuracy measured on `count` images."""
    share = (percent / 100 * count + 1) / (count + 2)  # Laplace: the error of 0 and 100 % is not 0 either
    return 100 * math.sqrt(share * (1 - share) / (count + 2))


# ------------------------------------------------------------------------------------- files of arrays


def load_images(path, space, augment=Augment(), state=None, cache=None):
    """Return the Images of a folder ("": the embedded set), checked against the space.

    state: what Images.state() gave a checkpoint; it takes the place of the folder's mean, deviation, side and
    class names, and the training images may be absent. cache: a folder for the resized pictures.
    """
    class_names = state["class_names"] if state else None
    if path:
        splits, class_names = read_folder(Path(path), space, class_names, cache)
    else:
        file = Path(__file__).parent / "fashion_mnist.npz"
        arrays = np.load(file)
        splits = {}
        for split in ("train", "val", "test"):
            splits[split] = checked(file, arrays[f"{split}_images"], file, arrays[f"{split}_labels"], space)
        class_names = class_names or FASHION
    class_names = [*class_names, *map(str, range(len(class_names), space.classes))]
    train, val, test = make_splits(path, splits, need_train=state is None)
    if state is None:
        count = min(5000, len(train.index), max(1, 2**26 // train.images[0].size))  # 64 million values
        x, _ = train.batch(np.arange(count))
        mean = x.mean((0, 2, 3)).view(-1, 1, 1)  # (C, 1, 1)
        std = x.std((0, 2, 3)).view(-1, 1, 1).clamp_min(1e-3)
        state = {"mean": mean, "std": std, "side": space.image}
    return Images(train, val, test, state["mean"], state["std"], state["side"], class_names, augment)


def make_splits(path, splits, need_train):
    """Return the training, validation and test Split of {"train" | "val" | "test": Split}."""
    for name in ("test", "train") if need_train else ("test",):
        if name not in splits:
            raise ValueError(f"{path} holds no {name} images; a data folder holds {FORMATS}")
    test = splits["test"]
    train = splits.get("train", test._replace(index=np.arange(0)))
    if "val" in splits:
        val = splits["val"]
    else:
        val, train = hold_out(train)
    n_train, n_val, n_test = [len(split.index) for split in (train, val, test)]
    if need_train and min(n_train, n_val, n_test) < 2:
        have = f"{n_train} training, {n_val} validation and {n_test} test images"
        raise ValueError(f"{path} holds {have}; two of each are needed (val is a sixth of train if absent)")
    return train, val, test


def hold_out(split):
    """Return a random sixth of a split, always the same, and the rest of it."""
    order = np.random.default_rng(0).permutation(split.index)
    count = len(order) // 6
    return split._replace(index=order[:count]), split._replace(index=order[count:])


@contextmanager
def reading(path, kind):
    """Turn anything that goes wrong while a file is read into one ValueError that begins with its name."""
    try:
        yield
    except Exception as error:  # a damaged pickle or picture can raise anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as {kind}: {reason}") from None


def checked(images_path, images, labels_path, labels, space):
    """Return a Split of all images, if they fit the space and each has the number of a class as its label."""
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    shape = images.shape[1:]
    channels = () if space.in_channels == 1 else (space.in_channels,)
    square = len(shape) >= 2 and shape[0] > 0 and shape == (shape[0], shape[0], *channels)
    if not square or images.dtype != np.uint8:
        have = "x".join(map(str, shape)) or "numbers"
        wanted = "x".join(map(str, (space.image, space.image, *channels)))
        raise ValueError(
            f"{images_path}: images are {have} {images.dtype}; space {space.name} takes {wanted} or another "
            "square, channels last, uint8 (--data names another folder)"
        )
    labels = np.array(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    numbers = labels.ndim == 1 and labels.dtype.kind in "biuf"  # floats are welcome if they are whole
    if not numbers or (labels != np.floor(labels)).any():  # NaN is not equal to its floor
        kind = f"{labels.dtype} of shape {labels.shape}"
        raise ValueError(f"{labels_path}: labels are {kind}; one whole number an image is expected")
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{images_path} has {len(images)} images but {labels_path} has {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= space.classes:
        raise ValueError(
            f"{labels_path}: labels run from {labels.min()} to {labels.max()}; space {space.name} has "
            f"classes 0 to {space.classes - 1} (--classes takes another number)"
        )
    return Split(images, labels.astype(np.int64), np.arange(len(labels)))


def read_folder(folder, space, class_names, cache):
    """Return {"train" | "val" | "test": Split} of a folder in any format, and the class names, maybe none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; --data takes one with {FORMATS}")
    splits = {}
    for split, *names in PAIRS:
        zipped = [folder / f"{name}.gz" for name in names]
        images, labels = [path if path.exists() else path.with_suffix("") for path in zipped]
        if images.exists() or labels.exists():
            splits[split] = checked(images, read_array(images), labels, read_array(labels), space)
    for split, names, key in BATCHES:
        files = [folder / name for name in names]
        if any(file.is_file() for file in files):
            splits[split] = read_cifar(files, key, space)
    if splits:
        return splits, class_names or []
    return read_picture_folder(folder, space, class_names, cache)


def read_array(path):
    """Return the array of a .npy file, memory-mapped, or of an IDX file of bytes, MNIST's format."""
    if path.suffix == ".npy":
        with reading(path, "a .npy file"):
            return np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    with reading(path, "an IDX file"):
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        if raw[:3] != b"\0\0\x08":
            raise ValueError(f"it begins with {raw[:3]}, not with two zeros and 8 for unsigned bytes")
        shape = np.frombuffer(raw, ">u4", raw[3], offset=4).tolist()
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


class ArrayUnpickler(pickle.Unpickler):
    """Admit numpy arrays, numpy numbers and plain values, written by any numpy and with any protocol."""

    def find_class(self, module, name):
        """Return what stands for a name in a pickle, instead of any module's function of that name."""
        makers = {  # functions that are new each time, so that a pickle cannot change them for others
            "ndarray": None,  # only a word in the calls of _reconstruct
            "_reconstruct": lambda kind, shape, code: np.empty(0),  # to be filled
            "_frombuffer": lambda raw, kind, dims, order: np.frombuffer(raw, kind).reshape(dims, order=order),
            "scalar": lambda kind, raw: np.frombuffer(raw, kind)[0],
            "encode": lambda text, encoding: text.encode("latin1"),  # bytes in protocols 0 to 2
            "dtype": np.dtype,
        }
        if name not in makers:
            raise pickle.UnpicklingError(f"refused, since {module}.{name} is not a numpy array")
        return makers[name]


def read_cifar(files, key, space):
    """Return a Split of official CIFAR batches, images (N, 32, 32, 3), whose labels are under a key."""
    parts = []
    for path in files:
        with reading(path, "a CIFAR batch"):
            with open(path, "rb") as file:
                # The official files hold strings of Python 2, which become text.
                batch = ArrayUnpickler(file, encoding="latin1").load()
            if isinstance(batch, dict):  # keys are bytes where Python 3 wrote again what it had read as bytes
                batch = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
            if not isinstance(batch, dict) or "data" not in batch or key not in batch:
                raise ValueError(f"a dict with 'data' and '{key}' is expected")
            shape = np.shape(batch["data"])
            if shape[1:] not in ((3072,), (3, 32, 32)):
                raise ValueError(f"its data have the shape {shape}; (N, 3072) is expected")
            images = np.reshape(batch["data"], (-1, 3, 32, 32)).transpose(0, 2, 3, 1)
            labels = np.array(batch[key])
        parts.append(checked(path, images, path, labels, space))
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Split(images, labels, np.arange(len(labels)))


# ------------------------------------------------------------------------------------- pictures


def read_picture_folder(folder, space, class_names, cache):
    """Return {"train" | "val" | "test": Split} of folders of pictures, and the class names.

    The classes are the subfolders of the training images, or those of a checkpoint. Of class folders without
    train/ and test/ above them a sixth of the pictures is for the test, always the same ones.
    """
    parts = {split: folder / split for split in ("train", "val", "test") if (folder / split).is_dir()}
    others = [path.name for path in folder.iterdir() if path.is_dir() and path.name not in parts]
    splits = ("train", "training", "val", "valid", "validation", "test")
    strange = [name for name in others if name.lower() in splits]
    if strange:
        raise ValueError(f"{folder / strange[0]}: the folders of a data set are named train, val and test")
    if parts and others:
        print(f"{folder}: not used are {', '.join(sorted(others)[:5])}")
    parts = parts or {"all": folder}
    if "val" in parts and "test" not in parts:  # ImageNet's layout
        parts["test"] = parts.pop("val")
        print(f"{folder}: the pictures of val are the test images")
    pictures = {split: list_pictures(part) for split, part in parts.items()}
    if class_names is None:
        class_names = list(pictures.get("train") or next(iter(pictures.values())))
        print(f"{folder}: {len(class_names)} classes: {', '.join(class_names[:20])}")
    if len(class_names) > space.classes:
        have = f"{len(class_names)} class folders, space {space.name} has {space.classes} classes"
        raise ValueError(f"{folder} has {have} (--classes takes another number)")
    splits = {}
    for split, part in parts.items():
        files = []
        labels = []
        for name, files_of_class in pictures[split].items():
            if name not in class_names:
                raise ValueError(f"{part / name} is none of the classes ({', '.join(class_names[:20])})")
            files += files_of_class
            labels += [class_names.index(name)] * len(files_of_class)
        images = resized_pictures(part, files, space, cache)
        splits[split] = Split(images, np.array(labels, np.int64), np.arange(len(labels)))
    if "all" in splits:
        splits["test"], splits["train"] = hold_out(splits["all"])
    return splits, class_names


def list_pictures(folder):
    """Return {class: files of its pictures} of a folder of class folders, both sorted."""
    pictures = {}
    for name in sorted(glob("*", root_dir=folder)):  # glob leaves out hidden files
        path = folder / name
        if path.is_dir():
            files = [path / part for part in glob("**", root_dir=path, recursive=True)]
            pictures[name] = sorted(file for file in files if file.suffix.lower() in PICTURES)
            if not pictures[name]:
                raise ValueError(f"{path} holds no pictures ({', '.join(PICTURES)})")
        elif path.suffix.lower() in PICTURES:
            raise ValueError(f"{path} is in no class folder; {folder}/CLASS/{name} is expected")
    if not pictures:
        raise ValueError(f"{folder} holds no class folders; a data folder holds {FORMATS}")
    return pictures


def resized_pictures(folder, files, space, cache):
    """Return images (N, S, S) or (N, S, S, 3) uint8 of the files in a folder; the first file decides S.

    They are memory-mapped: a .npy file in the cache folder, another if a file changes, or a temporary one.
    """
    shape = (len(files), *read_picture(files[0], space.in_channels, space.image).shape)
    facts = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((str(folder.resolve()), shape, facts)).encode()).hexdigest()[:16]
    if cache:
        stored = Path(cache) / f"{folder.name}-{key}.npy"
        stored.parent.mkdir(parents=True, exist_ok=True)
        if stored.exists():
            return read_array(stored)

    def read(row):
        images[row] = read_picture(files[row], space.in_channels, shape[1], margin=False)

    print(f"reading {len(files)} pictures, the first {files[0]}")
    with TemporaryDirectory(dir=cache) as temporary:
        images = np.lib.format.open_memmap(f"{temporary}/images.npy", "w+", np.uint8, shape)
        with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes outside Python's lock
            list(pool.map(read, range(len(files))))
        if cache:  # moved when it is whole
            images.flush()
            os.replace(f"{temporary}/images.npy", stored)
    return images  # a deleted file stays readable as long as it is mapped


def pillow():
    """Return Pillow's Image and ImageOps; they are needed for pictures only, so they are imported here."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError("pictures need Pillow: pip install pillow") from None
    return Image, ImageOps


def read_picture(path, channels, side, margin=True):
    """Return a picture, turned as its EXIF data say, resized and cropped to a square: uint8 (S, S[, 3]).

    S is `side`, or with a margin the 8/7 of it that fit() crops, unless the picture has that side already.
    """
    Image, ImageOps = pillow()
    with reading(path, "a picture (Pillow)"):
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode[0] in "IF":  # 16 bits a pixel become 8; convert() would clip them at 255
            values = np.asarray(picture)
            if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError(f"its pixels are {values.dtype} up to {values.max()}, not 8 or 16 bits")
            picture = Image.fromarray((values / 257).round().astype(np.uint8))
        picture = picture.convert("L" if channels == 1 else "RGB")
        if margin and picture.size != (side, side):
            side += 2 * (side // 14)
        # Resize(side) and CenterCrop(side) of torchvision.
        size = [int(side * length / min(picture.size)) for length in picture.size]
        left, top = [round((length - side) / 2) for length in size]
        return np.array(picture.resize(size, Image.BICUBIC).crop((left, top, left + side, top + side)))


def read_pictures(paths, space, state):
    """Return names [B] and x (B, C, side, side) of pictures, ready for a network with this Images.state().

    A path is a picture, or a .npy array of images (N, H, W) or (N, H, W, C).
    """
    if not paths:
        raise ValueError("no pictures to classify; give files such as cat.png or images.npy")
    names = []
    inputs = []
    for path in map(str, paths):
        if path.endswith(".npy"):
            array = np.array(read_array(Path(path)))
            if array.ndim == 2 + (space.in_channels > 1):
                array = array[None]  # one image
            if array.ndim == 0 or len(array) == 0:
                raise ValueError(f"{path} holds no images")
            images = checked(path, array, path, np.zeros(len(array)), space).images
            names += [f"{path}[{row}]" for row in range(len(images))]
        else:
            images = read_picture(path, space.in_channels, state["side"])[None]
            names.append(path)
        inputs.append(fit(as_input(np.ascontiguousarray(images)), state["side"]))
    return names, normalise(torch.cat(inputs), state["mean"], state["std"])


# ------------------------------------------------------------------------------------- augmentation


def fit(x, side):
    """Return the central 7/8 of images resized to the network's side, bicubic, as the official tests do."""
    if x.shape[-1] == side:
        return x
    edge = x.shape[-1] // 16
    x = x[..., edge : x.shape[-1] - edge, edge : x.shape[-1] - edge]
    return F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp_(0, 1)


def shift_and_mirror(x, generator):
    """Shift each image by up to a fourteenth of its side, and mirror half of them; zeros come in."""
    n, _, h, w = x.shape
    pad = max(1, h // 14)
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    # All the parts that have the size of x, as views: (N, C, 2 pad + 1, 2 pad + 1, H, W).
    parts = F.pad(x, (pad, pad, pad, pad)).unfold(2, h, 1).unfold(3, w, 1)
    x = parts[torch.arange(n), :, top, left]  # (N, C, H, W)
    return torch.where(mirrored.to(x.device), x.flip(3), x)


def sample_at(x, rows, side, padding):
    """Return the images x (B, C, H, W) read at other places, bilinear: (B, C, side, side)."""
    # The output at (u, v), from -1 to 1, is x at rows @ (u, v, 1): two lists of numbers or tensors (B,).
    values = [torch.as_tensor(value).to(x).expand(len(x)) for row in rows for value in row]
    theta = torch.stack(values, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (*x.shape[:2], side, side), align_corners=False)  # (B, side, side, 2)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)


def box_sizes(count, least, most, ratio, generator):
    """Return heights and widths (B,) of boxes of `least` to `most` of the area, as shares of the sides."""
    area = least + (most - least) * torch.rand(count, generator=generator)
    # Width / height is log-uniform between 1 / ratio and ratio.
    root = ratio ** (torch.rand(count, generator=generator) - 0.5)
    height = area.sqrt() / root
    width = area.sqrt() * root
    return height.clamp_max(1), width.clamp_max(1)


def random_crop(x, side, least, generator):
    """Return a random part of each image, `least` to all of its area, resized; half of them mirrored."""
    height, width = box_sizes(len(x), least, 1.0, 4 / 3, generator)
    down, right = 2 * torch.rand(2, len(x), generator=generator) - 1
    mirror = torch.where(torch.rand(len(x), generator=generator) < 0.5, -1.0, 1.0)
    rows = [[width * mirror, 0, (1 - width) * right], [0, height, (1 - height) * down]]
    return sample_at(x, rows, side, "border")


def geometric(rows):
    """Return change(x, level) of place, grey where no image was; rows(level) as sample_at takes them."""
    return lambda x, m: sample_at(x - 0.5, rows(m.flatten()), x.shape[-1], "zeros") + 0.5


def stretch(x):
    """Return x with each channel of each image stretched to 0 .. 1."""
    low = x.amin((2, 3), keepdim=True)
    high = x.amax((2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(1 / 255)


RANDAUGMENT = (  # change(x in [0, 1], level m (B, 1, 1, 1) from -1 to 1); sizes as timm's increasing set
    geometric(lambda m: [[(m * 0.52).cos(), -(m * 0.52).sin(), 0], [(m * 0.52).sin(), (m * 0.52).cos(), 0]]),
    geometric(lambda m: [[1, 0.3 * m, 0], [0, 1, 0]]),  # shear, across and down
    geometric(lambda m: [[1, 0, 0], [0.3 * m, 1, 0]]),
    geometric(lambda m: [[1, 0, 0.9 * m], [0, 1, 0]]),  # move, across and down
    geometric(lambda m: [[1, 0, 0], [0, 1, 0.9 * m]]),
    lambda x, m: x * (1 + 0.9 * m),  # brightness
    lambda x, m: x + 0.9 * m * (x - x.mean((1, 2, 3), keepdim=True)),  # contrast
    lambda x, m: x + 0.9 * m * (x - x.mean(1, keepdim=True)),  # colour
    lambda x, m: x - x % 2 ** ((4 * m.abs()).floor() - 4),  # posterise to 4 bits or fewer
    lambda x, m: torch.where(x >= 1 - m.abs(), 1 - x, x),  # solarise
    lambda x, m: torch.where(x < 0.5, x + 0.43 * m.abs(), x),  # solarise-add
    lambda x, m: 1 - x,  # invert
    lambda x, m: stretch(x),  # autocontrast
)


def rand_augment(x, magnitude, generator):
    """Return images changed twice, each time half of them, by one of RANDAUGMENT."""
    x = x.clone()
    count = len(RANDAUGMENT)
    for _ in range(2):
        # Numbers from `count` on stand for no change.
        kind = torch.randint(2 * count, (len(x),), generator=generator)
        # Levels of N(magnitude, 0.5) / 10, with a random sign.
        level = (magnitude + 0.5 * torch.randn(len(x), generator=generator)).clamp_(0, 10) / 10
        level *= torch.where(torch.rand(len(x), generator=generator) < 0.5, -1.0, 1.0)
        level = level.to(x).view(-1, 1, 1, 1)
        for number, change in enumerate(RANDAUGMENT):
            rows = (kind == number).nonzero().flatten().to(x.device)
            if len(rows):
                x[rows] = change(x[rows], level[rows]).clamp_(0, 1)
    return x


def boxes(height, width, side, generator):
    """Return masks (B, 1, side, side) of boxes anywhere; height and width (B,) are shares of the side."""
    masks = []
    for size in (height, width):
        start = (1 - size) * torch.rand(len(size), generator=generator)
        place = (torch.arange(side) + 0.5) / side
        masks.append((place >= start[:, None]) & (place < (start + size)[:, None]))  # (B, side)
    return (masks[0][:, :, None] & masks[1][:, None, :]).unsqueeze(1)


def erase(x, share, generator):
    """Return images of which a share has noise N(0, 1) in a box of 2 to 33 % of the area."""
    height, width = box_sizes(len(x), 0.02, 1 / 3, 10 / 3, generator)
    mask = boxes(height, width, x.shape[-1], generator)
    mask &= (torch.rand(len(x), generator=generator) < share).view(-1, 1, 1, 1)
    # The noise is drawn on the images' device, from a seed that the generator gives.
    seed = int(torch.randint(2**31, (), generator=generator))
    noise = torch.randn(x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(seed))
    return torch.where(mask.to(x.device), noise, x)


def mix(x, y, mixup, cutmix, generator):
    """Return a batch mixed with its reverse, and its probabilities y (B, classes) mixed alike."""
    cut = cutmix and not (mixup and torch.rand((), generator=generator) < 0.5)  # of both a coin takes one
    seed = int(torch.randint(2**31, (), generator=generator))
    strength = cutmix if cut else mixup
    share = np.random.default_rng(seed).beta(strength, strength)
    if cut:  # a box of the reverse, of the share 1 - `share`
        size = torch.tensor([math.sqrt(1 - share)])
        mask = boxes(size, size, x.shape[-1], generator)
        share = 1 - mask.float().mean().item()  # of whole pixels
        x = torch.where(mask.to(x.device), x.flip(0), x)
    else:  # mixup
        x = share * x + (1 - share) * x.flip(0)
    return x, share * y + (1 - share) * y.flip(0)

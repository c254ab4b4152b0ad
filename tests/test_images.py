"""Claims of data/images.py: what is read, what is refused, how images are varied.

Two tables carry most of it: BAD inputs end in one sentence that begins with the file's name, UNUSUAL ones are
read like the plain ones.
"""

import gzip
import math
import os
import pickle
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import FASHION, HYTRA, rng
from data import images
from data.images import Augment, load_images, read_pictures
from shiftaddnas import SPACES, Supernet, build

CIFAR10 = SPACES["cifar10"]
CIFAR100 = SPACES["cifar100"]
LABELS = np.arange(24) % 10
GREY = np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)
ROWS = np.random.default_rng(1).integers(0, 256, (20, 3072), dtype=np.uint8)  # of CIFAR
CIFAR_LABELS = [number % 10 for number in range(20)]


# ------------------------------------------------------------------------------------- folders that are right
# Each function writes one and returns the function that reads it.


def npy(folder):
    for split, count in (("train", 24), ("val", 6), ("test", 12)):
        np.save(folder / f"{split}_images.npy", GREY[:count])
        np.save(folder / f"{split}_labels.npy", LABELS[:count])
    return lambda path: load_images(path, FASHION)


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx(folder):
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(GREY))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS.astype(np.uint8)))
    return lambda path: load_images(path, FASHION)


def cifar_bytes(protocol=4):
    return pickle.dumps({"data": ROWS, "labels": CIFAR_LABELS}, protocol)


def cifar(folder, content=None):
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(content or cifar_bytes())
    return lambda path: load_images(path, CIFAR10)


def cifar100(folder):
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({"data": ROWS, "fine_labels": CIFAR_LABELS}))
    return lambda path: load_images(path, CIFAR100)


def picture(number, side=32):
    """A picture (side, side, 3) of 16 blocks, each of one colour."""
    colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return colours.repeat(side // 4, 0).repeat(side // 4, 1)


def write_picture(path, array, **options):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(array).save(path, **options)


def pictures(folder):
    """train/, val/ and test/ with the classes cat, cow and dog."""
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for label, name in enumerate(("cat", "cow", "dog")):
            for number in range(count):
                array = picture(10 * count + 3 * number + label)
                write_picture(folder / split / name / f"{number}.png", array)
    return lambda path: load_images(path, CIFAR10)


def grey_pictures(folder):
    for split in ("train", "test"):
        for number, array in enumerate(GREY):
            write_picture(folder / split / f"class {LABELS[number]}" / f"{number:02}.png", array)
    return lambda path: load_images(path, FASHION)


def one_folder(folder):
    for number in range(18):
        write_picture(folder / ("cat", "cow", "dog")[number % 3] / f"{number:02}.png", picture(number))
    return lambda path: load_images(path, CIFAR10)


def nothing(folder):
    return lambda path: load_images(path, FASHION)


# ------------------------------------------------------------------------------------- changes of a folder


def put(name, array):
    return lambda folder: np.save(folder / name, array)


def raw(name, content):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def cut(name, keep):
    """Keep the first bytes of a file, or with a negative number lose the last."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def gone(*names):
    def change(folder):
        for name in names:
            rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return change


def both(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


def every(pattern, function):
    """Do something with each file that fits a pattern."""

    def change(folder):
        for path in sorted(folder.glob(pattern)):
            function(path)

    return change


class Malice:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def cifar_with(**changes):
    return raw("data_batch_2", pickle.dumps({"data": ROWS, "labels": CIFAR_LABELS, **changes}))


def drawn(name, array):
    return lambda folder: write_picture(folder / name, array)


ARRAY_OF_POINTERS = b"cnumpy\nndarray\n((I1\ntX\x01\x00\x00\x00OC\x0812345678tR."
GZIPPED = gzip.compress(idx_bytes(GREY))
PACKED = "train-images-idx3-ubyte.gz"
HUGE = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 28, 28)}\n"
CODE = b"{'descr': __import__('os').system('touch pwned'), 'fortran_order': False, 'shape': (3,)}\n"

labels = partial(put, "train_labels.npy")
pixels = partial(put, "train_images.npy")
not_npy = partial(raw, "train_images.npy")
IMAGES = "train-images-idx3-ubyte"
NUMBERS = "train-labels-idx1-ubyte"

# (folder, change, how the sentence must begin after the folder's name)
BAD = [
    # labels
    (npy, labels(np.eye(10)[LABELS]), r"train_labels.npy: labels are float64 of shape \(24, 10\); one whole"),
    (npy, put("test_labels.npy", np.array(3)), r"test_labels.npy: labels are int64 of shape \(\)"),
    (npy, labels(LABELS.astype(str)), r"train_labels.npy: labels are <U\d+ of shape \(24,\)"),
    (npy, labels(LABELS + 0.5), r"train_labels.npy: labels are float64 of shape \(24,\); one whole"),
    (npy, labels(np.where(LABELS == 3, np.nan, LABELS)), "train_labels.npy: labels are float64"),
    (npy, labels(np.where(LABELS == 3, np.inf, LABELS)), "train_labels.npy: .* run from 0.0 to inf"),
    (npy, labels(LABELS.astype("M8[s]")), "train_labels.npy: labels are datetime64"),
    (npy, labels(np.zeros(24, "i4,f4")), r"train_labels.npy: labels are \[\('f0', '<i4'\)"),
    (npy, labels(LABELS.astype(object)), "train_labels.npy cannot be read as a .npy file: .*object"),
    (npy, labels(np.array([Malice()] * 24)), "train_labels.npy cannot be read .*object"),
    (npy, labels(LABELS - 1), r"train_labels.npy: labels run from -1 to 8; space fashion .* 0 to 9"),
    (npy, labels(LABELS + 5), "train_labels.npy: labels run from 5 to 14; space fashion has"),
    (npy, put("test_labels.npy", LABELS[:12].astype("u8") - 1), "test_labels.npy: .* to 1844674407370955161"),
    (npy, labels(LABELS[:-1]), "train_images.npy has 24 images but .*train_labels.npy has 23"),
    (npy, labels(LABELS.reshape(12, 2)), r"train_labels.npy: labels are int64 of shape \(12, 2\)"),
    # images
    (npy, pixels(GREY[:-2]), "train_images.npy has 22 images but .*train_labels.npy has 24 labels"),
    (npy, pixels(GREY / 255), "train_images.npy: images are 28x28 float64; space fashion takes 28x28"),
    (npy, put("val_images.npy", GREY[:6].astype(int)), "val_images.npy: images are 28x28 int64"),
    (npy, put("test_images.npy", GREY[:12].view(np.int8)), "test_images.npy: images are 28x28 int8"),
    (npy, pixels(GREY[:, 1:]), "train_images.npy: images are 27x28 uint8; space fashion takes 28x28"),
    (npy, pixels(GREY[:, None]), "train_images.npy: images are 1x28x28 uint8; .* channels last"),
    (npy, pixels(GREY[..., None].repeat(3, 3)), "train_images.npy: images are 28x28x3 uint8"),
    (npy, pixels(GREY[:, 0, 0]), "train_images.npy: images are numbers uint8"),
    (npy, pixels(GREY[:, :0, :0]), "train_images.npy: images are 0x0 uint8"),
    # .npy files
    (npy, not_npy(b"0 1 2 3\n"), "train_images.npy cannot be read as a .npy file: the magic string"),
    (npy, not_npy(pickle.dumps(Malice())), "train_images.npy cannot be read as a .npy file: the magic"),
    (npy, raw("val_labels.npy", b"\x93NUMPY\x09\x00"), "val_labels.npy cannot be read as .*: .*version"),
    (npy, not_npy(npy_header(HUGE)), "train_images.npy cannot be read as a .npy file"),
    (npy, not_npy(npy_header(CODE)), "train_images.npy cannot be read as a .npy file"),
    (npy, cut("train_images.npy", 90), "train_images.npy cannot be read as a .npy file"),
    (npy, cut("train_images.npy", 900), "train_images.npy cannot be read as a .npy file: .*file"),
    (npy, cut("train_labels.npy", -1), "train_labels.npy cannot be read as a .npy file: .*file"),
    (npy, both(gone("val_images.npy"), raw("val_images.npy/a", b"")), "val_images.npy cannot .*: Is a dir"),
    # partners and sizes
    (npy, gone("train_labels.npy"), "train_labels.npy cannot be read as a .npy file: No such file"),
    (npy, gone("test_images.npy", "test_labels.npy"), "holds no test images; a data folder holds"),
    (npy, gone("train_images.npy", "train_labels.npy"), "holds no train images; a data folder holds"),
    (npy, both(put("val_images.npy", GREY[:0]), put("val_labels.npy", LABELS[:0])), "val_images.npy has 0"),
    (npy, both(put("val_images.npy", GREY[:1]), put("val_labels.npy", LABELS[:1])), "holds 24 training, 1 "),
    (npy, both(gone("val_images.npy", "val_labels.npy"), pixels(GREY[:9]), labels(LABELS[:9])), "holds 8 tr"),
    # IDX files
    (idx, cut(IMAGES, -1), rf"{IMAGES} cannot be read as an IDX .*18815 into shape \(24,28,28\)"),
    (idx, cut("t10k-labels-idx1-ubyte", 7), "t10k-labels-idx1-ubyte cannot be read as an IDX file: buffer"),
    (idx, cut("t10k-labels-idx1-ubyte", 3), "t10k-labels-idx1-ubyte cannot be read .*: index out"),
    (idx, raw(IMAGES, b""), f"{IMAGES} cannot be read as an IDX file: it begins"),
    (idx, raw(IMAGES, b"\0\0\x0d\3" + bytes(12)), f"{IMAGES} cannot .* 8 for uns"),
    (idx, raw(IMAGES, GZIPPED), f"{IMAGES} cannot be read as an IDX file: it begins"),
    (idx, raw(PACKED, idx_bytes(GREY)), f"{PACKED} cannot be read as an IDX file: Not a gzipped file"),
    (idx, raw(PACKED, GZIPPED[:-8] + bytes(8)), f"{PACKED} cannot be read as an IDX file: CRC check failed"),
    (idx, raw(PACKED, GZIPPED[:900]), f"{PACKED} cannot be read as an IDX file: Compressed file ended"),
    (idx, raw(PACKED, GZIPPED[:99] + b"no" * 99 + GZIPPED[297:]), f"{PACKED} cannot be read as an IDX file"),
    (idx, raw(PACKED, b""), f"{PACKED} cannot be read as an IDX file"),
    (idx, gone(NUMBERS), f"{NUMBERS} cannot be read as an IDX file: No such"),
    (idx, gone("t10k-images-idx3-ubyte"), "t10k-images-idx3-ubyte cannot be"),
    (idx, raw(IMAGES, idx_bytes(GREY[:, :9])), f"{IMAGES}: images are 9x28 uint8"),
    (idx, raw(NUMBERS, idx_bytes(GREY)), rf"{NUMBERS}: labels are uint8 of .*28, 28\)"),
    (idx, raw(NUMBERS, idx_bytes(GREY[:24, 0, 0])), f"{NUMBERS}: labels run from"),
    (idx, raw("t10k-labels-idx1-ubyte", idx_bytes(GREY[:9, 0, 0] % 5)), "t10k-images-idx3-ubyte has 24 im"),
    # CIFAR batches
    (cifar, raw("data_batch_1", pickle.dumps({"data": Malice()})), "data_batch_1 cannot .*posix.system is"),
    (cifar, raw("data_batch_1", pickle.dumps(Malice(), 0)), "data_batch_1 cannot be .* batch: refused"),
    (cifar, raw("test_batch", b"cbuiltins\neval\n(V1+1\ntR."), "test_batch cannot .*builtins.eval is not"),
    (cifar, raw("test_batch", b"cbuiltins\ngetattr\n."), "test_batch cannot .*builtins.getattr is not"),
    (cifar, raw("test_batch", b"cnumpy\nload\n."), "test_batch cannot .*numpy.load is not a numpy array"),
    (cifar, raw("test_batch", ARRAY_OF_POINTERS), "test_batch cannot be read .*not callable"),
    (cifar, raw("data_batch_3", b""), "data_batch_3 cannot be read as a CIFAR batch: Ran out of input"),
    (cifar, cut("data_batch_3", 5000), "data_batch_3 cannot be read as a CIFAR batch: .*truncated"),
    (cifar, raw("data_batch_3", b"not a pickle\n"), "data_batch_3 cannot be read as a CIFAR batch"),
    (cifar, raw("data_batch_3", pickle.dumps([1])), "data_batch_3 cannot be .* a dict with 'data' and"),
    (cifar, raw("data_batch_2", pickle.dumps({"data": ROWS})), "data_batch_2 cannot .* 'labels' is expected"),
    (cifar, raw("data_batch_2", pickle.dumps({"labels": [1]})), "data_batch_2 cannot .* 'labels' is"),
    (cifar, cifar_with(data=ROWS[:, 1:]), r"data_batch_2 cannot be read .* have the shape \(20, 3071\)"),
    (pictures, lambda folder: (folder / "train").rename(folder / "Train"), "Train: the folders of a data set"),
    (pictures, lambda folder: (folder / "val").rename(folder / "valid"), "valid: the folders of a data set"),
    (cifar, cifar_with(data=7), r"data_batch_2 cannot be read .* have the shape \(\)"),
    (cifar, cifar_with(data=ROWS / 255), "data_batch_2: images are 32x32x3 float64"),
    (cifar, cifar_with(labels=CIFAR_LABELS[1:]), "data_batch_2 has 20 images but .* 19 labels"),
    (cifar, cifar_with(labels=[10] * 20), "data_batch_2: labels run from 10 to 10; space cifar10 has"),
    (cifar, cifar_with(labels=["cat"] * 20), "data_batch_2: labels are <U3"),
    (cifar, cifar_with(labels=[[1, 2], [3]]), "data_batch_2 cannot be read as a CIFAR .*inhomogeneous"),
    (cifar, gone("data_batch_3"), "data_batch_3 cannot be read as a CIFAR batch: No such file"),
    (cifar, gone("test_batch"), "holds no test images"),
    (cifar100, raw("train", cifar_bytes()), "train cannot be read .* 'fine_labels' is expected"),
    # folders
    (nothing, Path.rmdir, "is not a folder; --data takes one with"),
    (nothing, both(Path.rmdir, Path.touch), "is not a folder; --data takes one with"),
    (nothing, raw("notes.txt", b"-"), "holds no class folders; a data folder holds {train"),
    (nothing, raw("train-00000-of-00001.parquet", b"PAR1"), "holds no class folders"),
    (nothing, raw("raw/notes.txt", b"-"), "raw holds no pictures"),
    (nothing, lambda folder: (folder / ".cat").mkdir(), "holds no class folders"),
    # pictures
    (pictures, cut("train/cat/1.png", 70), "train/cat/1.png cannot be read as a picture .*: .*truncated"),
    (pictures, raw("test/dog/1.png", b""), "test/dog/1.png cannot be read as a picture .*: cannot identify"),
    (pictures, raw("test/dog/1.jpeg", b"<html>"), "test/dog/1.jpeg cannot be read as a picture .*: cannot"),
    (pictures, both(drawn("test/dog/1.jpg", picture(7, 96)), cut("test/dog/1.jpg", -99)), "test/dog/1.jpg"),
    (pictures, drawn("train/cat/0.tif", np.ones((32, 32), np.float32)), "train/cat/0.tif .* float32 up to 1"),
    (pictures, drawn("train/cat/0.tif", np.full((32, 32), 70000, np.int32)), ".*0.tif .*70000"),
    (pictures, both(gone("val"), raw("val/1.png", b"")), "val/1.png is in no class folder; .*val/CLASS"),
    (pictures, raw("train/loose.png", b""), "train/loose.png is in no class folder"),
    (nothing, raw("a.png", b""), "a.png is in no class folder"),
    (pictures, both(gone("test"), lambda folder: (folder / "test").mkdir()), "test holds no class folders"),
    (pictures, lambda folder: (folder / "train" / "ant").mkdir(), "train/ant holds no pictures"),
    (pictures, raw("val/ant/a.png", b""), r"val/ant is none of the classes \(cat, cow, dog\)"),
    (pictures, gone("test", "val"), "holds no test images"),
    (pictures, gone("train"), "holds no train images"),
    (pictures, every("train/*", lambda path: [copytree(path, f"{path}{i}") for i in "123"]), "has 12 cl"),
    (one_folder, every("*/1*.png", Path.unlink), "holds 8 training, 1 validation and 1 test images"),
]


@pytest.mark.parametrize("make, change, message", BAD)
def test_bad_inputs_end_in_a_sentence_that_begins_with_the_file(make, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my data"
    folder.mkdir()
    read = make(folder)
    change(folder)
    with pytest.raises(ValueError, match=rf"^{folder}[/ ]{message}") as error:
        read(folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------- unusual but right


def resaved(name, function):
    return lambda folder: np.save(folder / name, function(np.load(folder / name)))


def zipped(path):
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def repickled(protocol, function=lambda batch: batch):
    def change(folder):
        cifar(folder, pickle.dumps(function(pickle.loads(cifar_bytes())), protocol))

    return change


def python_2(folder):
    """The bytes that the official files have: strings of Python 2, protocol 2."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = b"(K\x01K\x14M\x00\x0c\x86"  # of the version 1: (20, 3072)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = b"\x89T" + ROWS.size.to_bytes(4, "little") + ROWS.tobytes() + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in CIFAR_LABELS) + b"e"
    cifar(folder, b"\x80\x02}(U\x04data" + array + shape + dtype + data + b"U\x06labels" + labels + b"u.")


def moved(name):
    def change(folder):
        copytree(folder, folder.parent / name)
        return folder.parent / name

    return change


def linked(folder):
    (folder.parent / "link").symlink_to(folder)
    return folder.parent / "link"


def as_saved(suffix, change=lambda image: image, **options):
    """Write each picture of a folder again, in another format."""

    def function(path):
        image = pytest.importorskip("PIL.Image").open(path)
        image.load()
        path.unlink()
        change(image).save(path.with_suffix(suffix), **options)

    return every("*/*/*.png", function)


def one_deeper(path):
    (path.parent / "sub").mkdir(exist_ok=True)
    path.rename(path.parent / "sub" / path.name)


def sixteen_bits(image):
    return pytest.importorskip("PIL.Image").fromarray(np.asarray(image).astype(np.uint16) * 257)


# (folder, change that must make no difference; it may return another path of the data)
UNUSUAL = [
    (npy, every("*_labels.npy", lambda path: np.save(path, np.load(path)[:, None]))),
    (npy, resaved("train_labels.npy", lambda labels: labels.astype(">i8"))),
    (npy, resaved("test_labels.npy", lambda labels: labels.astype(np.int8))),
    (npy, resaved("train_labels.npy", lambda labels: labels.astype(np.float32))),
    (npy, resaved("train_labels.npy", lambda labels: labels.astype(">f8"))),
    (npy, resaved("train_images.npy", np.asfortranarray)),
    (npy, resaved("train_images.npy", lambda array: array[..., None])),
    (npy, resaved("test_images.npy", lambda array: np.asfortranarray(array[..., None]))),
    (npy, lambda folder: f"{folder}/"),
    (npy, lambda folder: f"{folder.name}//"),
    (npy, lambda folder: f"{folder}/../{folder.name}"),
    (npy, lambda folder: Path(folder.name)),
    (npy, moved("Bilder für Müller 写真")),
    (npy, linked),
    (npy, both(raw(".DS_Store", b"-"), raw("README.md", b"-"), raw("extra/a.png", b""))),
    (npy, every("*", lambda path: path.chmod(0o444))),
    (npy, every("*", lambda path: os.utime(path, (0, 0)))),
    (idx, every("*", zipped)),
    (idx, every("*images*", zipped)),
    (idx, moved("Fashion–MNIST é")),
    (cifar, repickled(0)),
    (cifar, repickled(1)),
    (cifar, repickled(2)),
    (cifar, repickled(3)),
    (cifar, repickled(5)),
    (cifar, python_2),
    (cifar, repickled(5, lambda batch: batch | {"labels": np.array(batch["labels"])})),
    (cifar, repickled(5, lambda batch: batch | {"labels": [np.int64(label) for label in batch["labels"]]})),
    (cifar, repickled(2, lambda batch: batch | {"labels": [np.uint8(label) for label in batch["labels"]]})),
    (cifar, repickled(4, lambda batch: batch | {"labels": np.array(batch["labels"], ">i4")[:, None]})),
    (cifar, repickled(5, lambda batch: batch | {"data": np.asfortranarray(ROWS)})),
    (cifar, repickled(5, lambda batch: batch | {"data": ROWS[:, ::-1][:, ::-1]})),
    (cifar, repickled(4, lambda batch: batch | {"batch_label": b"1 of 5", "filenames": ["a.png", b""]})),
    (cifar100, raw("meta", b"-")),
    (pictures, both(raw(".DS_Store", b"-"), raw("train/.DS_Store", b"-"), raw("train/cat/.DS_Store", b"-"))),
    (pictures, both(raw("train/cat/._0.png", b"-"), raw("train/cat/.x/0.png", b"-"), raw("val/.x/0", b"-"))),
    (pictures, both(raw("train/cat/notes.txt", b"-"), raw("train/README", b"-"), raw("labels.csv", b"-"))),
    (pictures, every("*/*/*.png", lambda path: path.rename(path.with_suffix(".PNG")))),
    (pictures, every("*/*/*.png", one_deeper)),
    (pictures, as_saved(".bmp")),
    (pictures, as_saved(".tif", compression="tiff_lzw")),
    (pictures, as_saved(".webp", lossless=True)),
    (pictures, as_saved(".png", lambda image: image.quantize(256))),
    (pictures, as_saved(".png", lambda image: image.convert("RGBA"))),
    (pictures, as_saved(".tif", lambda image: image.convert("CMYK"))),
    (pictures, moved("Fotos für Müller 写真")),
    (pictures, linked),
    (grey_pictures, as_saved(".png", sixteen_bits)),
    (grey_pictures, as_saved(".png", lambda image: image.convert("LA"))),
    (grey_pictures, as_saved(".png", lambda image: image.convert("RGB"))),
]


@pytest.mark.parametrize("make, change", UNUSUAL)
def test_unusual_inputs_are_read_like_the_plain_ones(make, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    read = make(folder)
    plain = everything(read(folder))
    path = change(folder) or folder
    before = sorted((file, file.lstat().st_mtime_ns) for file in folder.rglob("*"))
    unusual = everything(read(path))
    for name, value in plain.items():
        torch.testing.assert_close(unusual[name], value, atol=0, rtol=0)
    after = sorted((file, file.lstat().st_mtime_ns) for file in folder.rglob("*"))
    assert after == before  # nothing is written there


def everything(data):
    """What a run takes from its data."""
    x, y = data.view(data.test_set, np.arange(len(data.test_set.index)))
    (inputs,), labels = data.batch(torch.arange(8), rng())
    state = data.state()
    names = "".join(state.pop("class_names")) + state.pop("fingerprint")
    names = torch.tensor(list(names.encode()))
    return {**state, "x": x, "y": y, "inputs": inputs, "labels": labels, "names": names}


CHANGED = [
    (npy, put("val_labels.npy", LABELS[1:7])),
    (npy, resaved("train_images.npy", lambda array: array ^ (np.arange(24) == 7)[:, None, None])),
    (npy, both(put("test_images.npy", GREY[:11]), put("test_labels.npy", LABELS[:11]))),
    (idx, raw("t10k-images-idx3-ubyte", idx_bytes(GREY[::-1]))),
    (cifar, cifar_with(labels=CIFAR_LABELS[::-1])),
    (pictures, drawn("test/dog/1.png", picture(99))),
    (pictures, every("train/dog/0.png", lambda path: path.rename(path.parent.parent / "cat" / "9.png"))),
]


@pytest.mark.parametrize("make, change", CHANGED)
def test_the_fingerprint_changes_with_the_content(make, change, tmp_path):
    read = make(tmp_path)
    first = read(tmp_path).fingerprint()
    assert len(first) == 16 and read(tmp_path).fingerprint() == first
    change(tmp_path)
    assert read(tmp_path).fingerprint() != first


# ------------------------------------------------------------------------------------- formats, one by one


def test_embedded_splits_are_disjoint_and_balanced():
    data = load_images("", FASHION)
    counts = [len(split.index) for split in (data.train_set, data.val_set, data.test_set)]
    assert counts == [5000, 5000, 10000]
    splits = (data.train_set, data.val_set, data.test_set)
    train, val, test = [{image.tobytes() for image in split.images} for split in splits]
    assert not train & val and not train & test and not val & test
    assert set(Counter(data.test_set.labels.tolist()).values()) == {1000}
    assert data.class_names[9] == "Ankle boot"


def test_idx_files_are_read(tmp_path):
    x, y = idx(tmp_path)(tmp_path).test_set.batch(np.arange(24))
    assert (x[:, 0] * 255).round().to(torch.uint8).equal(torch.from_numpy(GREY))
    assert y.tolist() == LABELS.tolist()


@pytest.mark.parametrize("make", [cifar, cifar100])
def test_official_cifar_folders_are_read(make, tmp_path):
    data = make(tmp_path)(tmp_path)
    x, y = data.test_set.batch(np.arange(20))
    assert x.shape == (20, 3, 32, 32) and y.tolist() == CIFAR_LABELS
    assert (x[4, 1, 2, 5] * 255).round() == ROWS[4, 1024 + 2 * 32 + 5]
    assert data.size() == (84 if make is cifar else 17)  # five sixths


def test_cifar_images_enter_at_224_pixels_as_their_enlarged_centre(tmp_path):
    cifar100(tmp_path)
    data = load_images(tmp_path, HYTRA, Augment(crop=0.08))
    x, _ = data.view(data.test_set, np.arange(3))
    image = torch.from_numpy(ROWS[:3].reshape(3, 3, 32, 32)).float()[..., 2:30, 2:30] / 255
    expected = F.interpolate(image, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(x * data.std + data.mean, expected, atol=1e-5, rtol=0)
    (x,), _ = data.batch(torch.arange(4), rng())
    assert x.shape == (4, 3, 224, 224)


# ------------------------------------------------------------------------------------- pictures


def test_300_pictures_in_three_classes_are_read_and_classified(tmp_path, capsys):
    space = replace(CIFAR10, name="three", image=16, classes=3, depths=((1, 1, 1), (1, 2, 1)))
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], dtype=np.uint8)
    draw = np.random.default_rng(0)
    for number in range(300):
        label = number % 3
        array = draw.integers(0, 50, (16, 16, 3), dtype=np.uint8) + colours[label]
        split = "train" if number < 240 else "test"
        write_picture(tmp_path / split / ("cat", "cow", "dog")[label] / f"{number}.png", array)
    data = load_images(tmp_path, space)
    assert "3 classes: cat, cow, dog" in capsys.readouterr().out
    assert [len(split.index) for split in (data.train_set, data.val_set, data.test_set)] == [200, 40, 60]
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # the brightest colour
    error = pytest.approx(1.6, abs=0.05)
    assert data.test(network, "cpu") == {"test_accuracy": 100.0, "standard_error": error}
    assert data.validate(network, "cpu") == (100, pytest.approx(2.4, abs=0.05))
    assert data.extent() == "60 test images, one seed"
    names, x = read_pictures([tmp_path / "test" / "dog" / "299.png"], space, data.state())
    assert data.class_names[network(x).argmax()] == "dog" and names == [f"{tmp_path}/test/dog/299.png"]


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (257, 512), (90, 91), (40, 40), (33, 300)])
@pytest.mark.parametrize("side", [224, 32])
def test_pictures_are_resized_and_cropped_as_the_official_code_does(size, side, tmp_path):
    """Resize(256), CenterCrop(224) of torchvision, written with Pillow, for 224."""
    Image = pytest.importorskip("PIL.Image")
    array = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(array).resize(size, Image.BICUBIC)
    image.save(tmp_path / "a.png")
    state = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1), "side": side}
    _, x = read_pictures([tmp_path / "a.png"], replace(HYTRA, image=side), state)
    scale = {224: 256, 32: 36}[side] / min(size)
    width, height = [int(length * scale + 1e-9) for length in size]
    left, top = [round((length - side) / 2) for length in (width, height)]
    expected = image.resize((width, height), Image.BICUBIC).crop((left, top, left + side, top + side))
    assert ((x[0].permute(1, 2, 0) * 255).round().numpy() == np.array(expected)).all()


def test_exif_orientation_is_applied(tmp_path):
    image = pytest.importorskip("PIL.Image").fromarray(np.ascontiguousarray(np.rot90(picture(0))))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    assert (images.read_picture(tmp_path / "a.png", 3, 32) == picture(0)).all()


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    write_picture(tmp_path / "a.png", values)
    read = images.read_picture(tmp_path / "a.png", 1, 32)
    assert np.abs(read - values / 257).max() <= 0.5 and read[0, 0] == 0 and read[-1, -1] == 255


def test_a_class_that_val_lacks_does_not_renumber_the_others(tmp_path):
    read = pictures(tmp_path)
    gone("test/cat", "val/cow")(tmp_path)
    data = read(tmp_path)
    assert data.test_set.labels.tolist() == [1, 1, 2, 2] and data.val_set.labels.tolist() == [0, 0, 2, 2]


def test_val_pictures_are_the_test_images_if_there_are_no_others(tmp_path, capsys):
    read = pictures(tmp_path)
    gone("test")(tmp_path)
    data = read(tmp_path)
    assert [len(split.index) for split in (data.train_set, data.val_set, data.test_set)] == [10, 2, 6]
    assert "the pictures of val are the test images" in capsys.readouterr().out


def test_a_sixth_of_one_folder_of_classes_is_the_test_for_a_checkpoint_too(tmp_path):
    data = one_folder(tmp_path)(tmp_path)
    parts = [set(split.index.tolist()) for split in (data.train_set, data.val_set, data.test_set)]
    assert [len(part) for part in parts] == [13, 2, 3] and set().union(*parts) == set(range(18))
    same = load_images(tmp_path, CIFAR10, state=data.state())
    assert same.test_set.index.tolist() == data.test_set.index.tolist()


def test_pictures_are_cached_and_read_again_when_they_change(tmp_path, capsys):
    folder = tmp_path / "data"
    cache = tmp_path / "out" / "cache"
    read = pictures(folder)
    plain = read(folder)
    data = load_images(folder, CIFAR10, cache=cache)
    files = sorted(cache.iterdir())
    assert len(files) == 3 and all(path.suffix == ".npy" for path in files)  # and no unfinished one
    assert data.fingerprint() == plain.fingerprint() and isinstance(data.train_set.images, np.memmap)
    capsys.readouterr()
    load_images(folder, CIFAR10, cache=cache)
    assert "reading" not in capsys.readouterr().out and sorted(cache.iterdir()) == files
    write_picture(folder / "train" / "cat" / "0.png", picture(99))
    changed = load_images(folder, CIFAR10, cache=cache)
    assert (changed.train_set.images[0] == picture(99)).all() and len(list(cache.iterdir())) == 4
    cut("train/dog/3.png", 70)(folder)
    with pytest.raises(ValueError, match=f"^{folder}/train/dog/3.png cannot be read as a picture"):
        load_images(folder, CIFAR10, cache=cache)
    assert len(list(cache.iterdir())) == 4


def test_without_pillow_a_sentence_names_it(tmp_path, monkeypatch):
    read = pictures(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match="pictures need Pillow: pip install pillow"):
        read(tmp_path)


def test_pictures_to_classify_are_prepared_like_test_images(tmp_path):
    data = pictures(tmp_path)(tmp_path)
    files = sorted((tmp_path / "test").rglob("*.png"))
    x, _ = data.view(data.test_set, np.arange(6))
    names, same = read_pictures(files, CIFAR10, data.state())
    np.save(tmp_path / "a.npy", data.test_set.images[data.test_set.index[:2]])
    np.save(tmp_path / "one.npy", data.test_set.images[data.test_set.index[0]])
    assert read_pictures([tmp_path / "one.npy"], CIFAR10, data.state())[1].equal(x[:1])
    rows, arrays = read_pictures([tmp_path / "a.npy"], CIFAR10, data.state())
    assert rows == [f"{tmp_path}/a.npy[0]", f"{tmp_path}/a.npy[1]"] and arrays.equal(x[:2])
    assert same.equal(x) and names == [str(file) for file in files]
    with pytest.raises(ValueError, match="no pictures to classify"):
        read_pictures([], CIFAR10, data.state())
    with pytest.raises(ValueError, match=f"^{tmp_path}/c.png cannot be read as a picture .Pillow.: No such"):
        read_pictures([files[0], tmp_path / "c.png"], CIFAR10, data.state())


# ------------------------------------------------------------------------------ checkpoints and accuracy


def test_a_checkpoint_normalises_with_its_numbers_and_needs_test_images_only(tmp_path):
    npy(tmp_path)
    data = load_images(tmp_path, FASHION)
    state = data.state()
    assert isinstance(data.train_set.images, np.memmap)
    x, y = data.view(data.test_set, np.arange(12))
    put("train_images.npy", np.zeros_like(GREY))(tmp_path)  # darkened
    after = load_images(tmp_path, FASHION, state=state)
    x_after, _ = after.view(after.test_set, np.arange(12))
    assert x_after.equal(x) and after.fingerprint() != state["fingerprint"]
    gone(*(f"{split}_{kind}.npy" for split in ("train", "val") for kind in ("images", "labels")))(tmp_path)
    alone = load_images(tmp_path, FASHION, state=state)
    x_alone, y_alone = alone.view(alone.test_set, np.arange(12))
    assert x_alone.equal(x) and y_alone.equal(y) and alone.size() == 0
    for use in (lambda: alone.epoch(2, rng()), lambda: alone.validate(torch.nn.Flatten(), "cpu")):
        with pytest.raises(ValueError, match="training images|images of this split"):
            use()


def test_class_names_of_a_checkpoint_number_the_classes(tmp_path):
    data = pictures(tmp_path)(tmp_path)
    gone("train", "val", "test/cat")(tmp_path)
    alone = load_images(tmp_path, CIFAR10, state=data.state())
    assert alone.test_set.labels.tolist() == [1, 1, 2, 2]
    assert alone.class_names == ["cat", "cow", "dog", "3", "4", "5", "6", "7", "8", "9"]


def test_recalibration_gives_the_statistics_of_the_training_images():
    data = load_images("", FASHION)
    network = build(FASHION, "cc/cc/cc")
    network.train()(torch.randn(9, 1, 28, 28, generator=rng()) * 5)  # statistics of other images
    images.recalibrate(network, data, images=64)
    x, _ = data.train_set.batch(np.arange(64))
    stem = network.stem[0]((x - data.mean) / data.std)
    torch.testing.assert_close(network.stem[1].running_mean, stem.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not network.training


def test_fitness_is_the_validation_accuracy_of_the_recalibrated_subnet(tiny_data):
    data = load_images(tiny_data, FASHION)
    supernet = Supernet(FASHION, "heterogeneous")
    network = supernet.extract("cc/cc/cc")
    images.recalibrate(network, data)
    x, y = data.view(data.val_set, np.arange(20))
    right = (network(x).argmax(1) == y).sum().item()
    assert data.fitness(supernet, "cc/cc/cc", "cpu") == 100 * right / 20
    assert data.samples(network, None, "cpu") == {}


def test_accuracy_stops_at_numbers_that_cannot_be(tiny_data):
    data = load_images(tiny_data, FASHION)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    with torch.no_grad():
        network[1].weight[3, 5] = math.nan
    with pytest.raises(ValueError, match="outputs are not finite"):
        data.test(network, "cpu")


def test_the_loss_is_the_cross_entropy_and_of_two_heads_the_mean():
    data = load_images("", FASHION)
    first, second = torch.randn(2, 5, 10, generator=rng())
    y = torch.arange(5)
    losses = [F.cross_entropy(logits, y, label_smoothing=0.1) for logits in (first, second)]
    assert data.loss(first, y, 0.1).equal(losses[0])
    assert data.loss((first, second), y, 0.1).equal((losses[0] + losses[1]) / 2)
    assert data.loss(first.bfloat16(), F.one_hot(y, 10).float(), 0.0).dtype == torch.float32


def test_the_standard_error_is_never_zero_and_right_for_many():
    assert images.standard_error(81.3, 2000) == pytest.approx(100 * math.sqrt(0.813 * 0.187 / 2000), rel=1e-3)
    for count in (1, 18, 2000):
        for percent in (0.0, 100.0):
            assert images.standard_error(percent, count) > 50 / (count + 2)


# ------------------------------------------------------------------------------------- augmentation


# Sums over a batch and its labels, recorded before the augmentation moved to data/images.py.
RECORDED = [
    (Augment(), 171994.0896889693, 10334.0),
    (Augment(crop=0.3), 597722.1763035448, 10334.0),
    (Augment(randaugment=9.0), 282396.1067796031, 10334.0),
    (Augment(erasing=0.25), 130070.02263065428, 10334.0),
    (Augment(mixup=0.8), 171364.32702518592, 12854.545067571104),
    (Augment(cutmix=1.0), 172944.50938323466, 12902.698978126049),
    (Augment(0.08, 9.0, 0.25, 0.8, 1.0, 3), 755284.1160409439, 13900.6875),
]


@pytest.mark.parametrize("augment, sum_x, sum_y", RECORDED)
def test_the_batches_of_a_seed_stay_what_they_were(augment, sum_x, sum_y):
    data = load_images("", FASHION, augment)
    generator = rng(5)
    rows = data.epoch(70, generator)
    (x,), y = data.batch(rows[1], generator, "cpu")
    weights = torch.arange(x.numel()).view_as(x) % 97
    assert (x.double() * weights).sum().item() == pytest.approx(sum_x, rel=1e-5)  # threads round otherwise
    y = y.double().view(70, -1)
    classes = torch.arange(1.0, y.shape[1] + 1).double()
    assert (y @ classes * torch.arange(70)).sum().item() == pytest.approx(sum_y, rel=1e-5)


def test_augmentation_shifts_and_mirrors_and_keeps_the_rest():
    x = torch.arange(28.0 * 28).view(1, 1, 28, 28).repeat(64, 1, 1, 1) + 1
    y = images.shift_and_mirror(x, rng())
    assert y.shape == x.shape and set(y.unique().tolist()) <= set(x.unique().tolist()) | {0.0}
    centres = {tuple(image[0, 14, 13:15].tolist()) for image in y}
    assert len(centres) > 20 and any(a > b for a, b in centres) and any(a < b for a, b in centres)


def test_crops_are_affine_parts_and_mirrors():
    ramp = torch.linspace(-1, 1, 65)[1:] - 1 / 64  # each pixel holds its place
    x = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")).expand(200, 2, 64, 64)
    y = images.random_crop(x, 32, 0.1, rng())
    down = y[:, 0].diff(dim=1)[:, 8:24, 8:24].mean((1, 2)) * 16
    right = y[:, 1].diff(dim=2)[:, 8:24, 8:24].mean((1, 2)) * 16
    area = down * right.abs()  # shares of the sides
    ratio = right.abs() / down
    assert y.shape == (200, 2, 32, 32) and y.abs().max() <= 1
    assert 0.09 < area.min() < 0.2 and 0.9 < area.max() < 1.01 and 70 < (right < 0).sum() < 130
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert images.fit(x[:1], 64).equal(x[:1])
    centre = images.fit(x[:1].abs(), 56)
    torch.testing.assert_close(centre, x[:1, :, 4:60, 4:60].abs(), atol=1e-5, rtol=0)


def test_each_change_of_randaugment_does_what_it_says():
    x = torch.rand(3, 3, 32, 32, generator=rng())
    none = torch.zeros(3, 1, 1, 1)
    for number, change in enumerate(images.RANDAUGMENT):
        y = change(x, none + 0.9).clamp(0, 1)
        assert y.shape == x.shape and torch.isfinite(y).all() and not torch.allclose(y, x), number
        if number < 8:  # a level of zero changes nothing
            torch.testing.assert_close(change(x, none), x, atol=1e-5, rtol=0)
    turn, _, _, move, *_ = images.RANDAUGMENT
    torch.testing.assert_close(turn(x, none + math.pi / 2 / 0.52), x.rot90(1, (2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(move(x, none + 1 / 0.9)[..., :15], x[..., 16:31], atol=1e-4, rtol=0)
    many = x.repeat(100, 1, 1, 1)
    changed = (images.rand_augment(many, 9, rng()) != many).any((1, 2, 3))
    assert 0.65 < changed.float().mean() < 0.85  # two chances of a half


def test_mixed_images_and_labels_have_the_same_shares_and_erasing_is_noise():
    x = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    y = torch.eye(2)
    generator = rng()
    for settings in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        for _ in range(20):
            mixed, labels = images.mix(x, y, *settings, generator)
            torch.testing.assert_close(mixed.mean((1, 2, 3)), labels[:, 1])
            torch.testing.assert_close(labels.sum(1), torch.ones(2))
            assert settings[0] or set(mixed.unique().tolist()) <= {0.0, 1.0}
    erased = images.erase(torch.full((400, 1, 32, 32), 9.0), 0.25, generator) != 9
    share = erased.float().mean((1, 2, 3))
    assert 0.18 < (share > 0).float().mean() < 0.32 and 0.01 < share[share > 0].min() and share.max() < 0.36


def test_repeated_images_go_to_different_passes_of_a_step(tiny_data):
    rows = load_images(tiny_data, FASHION, Augment(repeats=3)).epoch(30, rng())
    assert rows.shape == (3, 30) and all(count == 3 for count in Counter(rows.flatten().tolist()).values())
    for step in rows:
        parts = [set(step[i::3].tolist()) for i in range(3)]
        assert parts[0] == parts[1] == parts[2] and len(parts[0]) == 10

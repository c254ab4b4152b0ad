"""Sentence files: what is wrong is said in one sentence, what is only unusual is read; ids, losses, BLEU."""

import gzip
import json
import math
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import rng

from data import sentences
from data.sentences import Vocabulary, bleu, byte_words, join_pair, learn_bytes
from shiftaddnas import EOS, PAD, UNK, Translator, find_space

ANIMALS = ("cat", "red dog", "goat\u2028kid", "ñandú", "漢字", "sea\u0085lion", "owl 🙂")
PAIRS = [(f"the {animal} sees {n}", f"{n} ve el {animal}") for n in range(6) for animal in ANIMALS]
TSV = "".join(f"{source}\t{target}\n" for source, target in PAIRS).encode()
SOURCE = "".join(f"{source}\n" for source, _ in PAIRS).encode()
TARGET = "".join(f"{target}\n" for _, target in PAIRS).encode()
BYTES = list(map(chr, range(256)))
BOM = b"\xef\xbb\xbf"
BAD_CRC = bytearray(gzip.compress(TSV))
BAD_CRC[-8] ^= 1


def save(folder, **files):
    """Write files, name="bytes"; the first underscore of a name becomes a dot. Return their paths, joined."""
    paths = [folder / name.replace("_", ".", 1) for name in files]
    for path, content in zip(paths, files.values()):
        path.write_bytes(content)
    return ",".join(map(str, paths))


def load(path, **settings):
    """Load sentences with few merges."""
    return sentences.load_sentences(path, **{"merges": "30", **settings})


def plain(folder, **settings):
    """Return the sentences of PAIRS from the plainest file."""
    return load(save(folder, plain_tsv=TSV), **settings)


def small_translator(vocabulary, seed=0):
    """Return an untrained network of the smallest arch."""
    space = find_space("translation")
    return Translator(space, vocabulary, space.cheapest()[0], seed=seed).eval()


# ------------------------------------------------------------------------------------------------ tables

BAD_FILES = {  # name of the case: (files, what the sentence begins with after the folder, what it must have)
    "an empty file": ({"a_tsv": b""}, "a.tsv", "of 0 training pairs none"),
    "blank lines only": ({"a_tsv": b"\n \n\t\n"}, "a.tsv", "of 0 training pairs none"),
    "too few pairs to split": ({"a_tsv": b"a\tb\n" * 14}, "a.tsv", "of 0 validation pairs none"),
    "no tab": ({"a_tsv": b"a\tb\nc\n"}, "a.tsv, line 2", "must be source<TAB>target"),
    "spaces instead of a tab": ({"a_tsv": b"a    b\n" * 20}, "a.tsv, line 1", "must be source<TAB>target"),
    "two tabs": ({"a_tsv": b"a\tb\na\tb\tc\n"}, "a.tsv, line 2", "must be source<TAB>target"),
    "a line number that counts blank lines": ({"a_tsv": b"a\tb\n\n\nc\n"}, "a.tsv, line 4", "must be"),
    "no source": ({"a_tsv": b"a\tb\n\tc\n"}, "a.tsv, line 2", "must be source<TAB>target"),
    "no target": ({"a_tsv": b"a\tb\nc\t \n"}, "a.tsv, line 2", "must be source<TAB>target"),
    "Latin-1": ({"a_tsv": "a\tb\nñ\tc\n".encode("latin-1")}, "a.tsv, line 2", "is not UTF-8"),
    "UTF-16 with a byte order mark": ({"a_tsv": "a\tb\n".encode("utf-16")}, "a.tsv, line 1", "is not UTF-8"),
    "UTF-16 without one": ({"a_tsv": "a\tb\n".encode("utf-16-le")}, "a.tsv, line 1", "is not UTF-8"),
    "a surrogate": ({"a_tsv": b"a\tb\n\xed\xa0\x80\tc\n"}, "a.tsv, line 2", "is not UTF-8"),
    "a character cut at the end": ({"a_tsv": TSV + b"a\t\xe6\xbc"}, "a.tsv, line 43", "is not UTF-8"),
    "another kind of file": ({"a_tsv": b"\x93NUMPY\x01\x00"}, "a.tsv, line 1", "is not UTF-8"),
    "a truncated .gz": ({"a_gz": gzip.compress(TSV)[:-20]}, "a.gz", "cannot be read: Compressed file ended"),
    "a .gz cut in its first bytes": ({"a_gz": gzip.compress(TSV)[:5]}, "a.gz", "Compressed file ended"),
    "a .gz with bad CRC": ({"a_gz": bytes(BAD_CRC)}, "a.gz", "cannot be read: CRC check failed"),
    "a .gz with bad data": ({"a_gz": b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 50}, "a.gz", "cannot be read"),
    "text behind a .gz": ({"a_gz": gzip.compress(TSV) + b"more"}, "a.gz", "Not a gzipped file"),
    "Latin-1 in a .gz": ({"a_gz": gzip.compress(b"a\tb\n\xf1\tc\n")}, "a.gz, line 2", "is not UTF-8"),
    "files of unequal length": ({"a_en": b"x\ny\n", "b_es": b"x\n"}, "a.en", "b.es have 2 and 1 lines"),
    "an empty second file": ({"a_en": SOURCE, "b_es": b""}, "a.en", "b.es have 42 and 0 lines"),
    "two empty files": ({"a_en": b"", "b_es": b""}, "a.en", "of 0 training pairs none"),
    "a blank line of the first": ({"a_en": b"x\n\n", "b_es": b"x\ny\n"}, "a.en", "b.es, line 2 must be"),
    "a blank line of the second": ({"a_en": b"x\ny\n", "b_es": b"x\n \n"}, "a.en", "b.es, line 2 must be"),
    "one file not UTF-8": ({"a_en": b"x\ny\n", "b_es": b"x\n\xf1\n"}, "b.es, line 2", "is not UTF-8"),
    "validation files empty": (
        {"a_en": SOURCE, "a_es": TARGET, "b_en": b"", "b_es": b"", "c_en": b"x", "c_es": b"y"},
        "a.en", "of 0 validation pairs none",
    ),
}

BAD_CALLS = {  # name of the case: (function of a folder, what the sentence begins with, as a pattern)
    "no such file": (lambda f: load(f / "no.tsv"), r".*no\.tsv cannot be read: No such file"),
    "a folder": (lambda f: load(f), r".* cannot be read: Is a directory; it must be a text file"),
    "one of two is missing": (lambda f: load(save(f, a_en=SOURCE) + ",b.es"), "b.es cannot be read: No such"),
    "three files": (lambda f: load("a,b,c"), "--data a,b,c: needs a TSV file, or 2 or 6 text files"),
    "a comma at the end": (lambda f: load("a,"), "--data a,: needs a TSV file, or 2 or 6 text files"),
    "all pairs too long": (lambda f: plain(f, max_length=2), ".*plain.tsv: of 36 training pairs none is"),
    "merges as a word": (lambda f: plain(f, merges="many"), "--set merges=many: must be a number of"),
    "negative merges": (lambda f: plain(f, merges="-5"), "--set merges=-5: must be a number of merges"),
    "merges in other digits": (lambda f: plain(f, merges="²"), "--set merges=²: must be a number of merges"),
    "weights that are NaN": (lambda f: validate_broken(plain(f)), "arch .*: the loss is nan, must be finite"),
}

UNUSUAL = {  # name of the case: function of a folder that returns the sentences of PAIRS
    "gzipped": lambda f: load(save(f, a_gz=gzip.compress(TSV))),
    "gzipped in two members": lambda f: load(save(f, a_gz=gzip.compress(TSV[:99]) + gzip.compress(TSV[99:]))),
    "gzipped without .gz": lambda f: load(save(f, a_tsv=gzip.compress(TSV))),
    "text with .gz": lambda f: load(save(f, a_gz=TSV)),
    "CRLF": lambda f: load(save(f, a_tsv=TSV.replace(b"\n", b"\r\n"))),
    "a byte order mark": lambda f: load(save(f, a_tsv=BOM + TSV)),
    "a byte order mark, CRLF, gzipped": lambda f: load(
        save(f, a_gz=gzip.compress(BOM + TSV.replace(b"\n", b"\r\n")))
    ),
    "no end of the last line": lambda f: load(save(f, a_tsv=TSV.removesuffix(b"\n"))),
    "blank lines": lambda f: load(save(f, a_tsv=b"\n" + TSV.replace(b"\n", b"\n \n", 5) + b"\n\n")),
    "lines of a tab": lambda f: load(save(f, a_tsv=TSV.replace(b"\n", b"\n\t\n", 5))),
    "spaces around": lambda f: load(save(f, a_tsv=TSV.replace(b"\t", b" \t  ").replace(b"\n", b"  \n "))),
    "two files": lambda f: load(save(f, a_en=SOURCE, b_es=TARGET)),
    "two files, one gzipped, one CRLF": lambda f: load(
        save(f, a_gz=gzip.compress(SOURCE), b_es=TARGET.replace(b"\n", b"\r\n"))
    ),
    "two files with byte order marks": lambda f: load(save(f, a_en=BOM + SOURCE, b_es=BOM + TARGET)),
    "two files, lines blank in both": lambda f: load(
        save(f, a_en=SOURCE.replace(b"\n", b"\n\n", 3), b_es=TARGET.replace(b"\n", b"\n\n", 3))
    ),
    "six files": lambda f: load_six(f),
    "a space in the name": lambda f: load(save(f, **{"my pairs_tsv": TSV})),
    "a name beyond ASCII": lambda f: load(save(f, **{"ñandú 漢字_tsv": TSV})),
    "a comma in the name": lambda f: load(save(f, **{"en,es_tsv": TSV})),
    "no ending": lambda f: load(save(f, pairs=TSV)),
    "a Path": lambda f: load(Path(save(f, a_tsv=TSV))),
    "a path the long way": lambda f: load(save(f / ".." / f.name, a_tsv=TSV)),
    "a relative path": lambda f: load(os.path.relpath(save(f, a_tsv=TSV))),
    "a link": lambda f: load(linked(f)),
    "read-only file and folder": lambda f: load(read_only(f)),
    "merges as a number": lambda f: load(save(f, a_tsv=TSV), merges=30),
    "the vocabulary of a checkpoint": lambda f: plain(f, merges="5", vocabulary=kept_vocabulary(f)),
}


def validate_broken(data):
    """Validate a network with a NaN among its weights."""
    network = small_translator(len(data.vocabulary))
    with torch.no_grad():
        next(network.parameters())[EOS] = math.nan
    return data.validate(network)[0]


def load_six(folder):
    """Load the splits of PAIRS from a pair of files each."""
    files = {}
    data = plain(folder)
    for name, pairs in (("a", data.train_pairs), ("b", data.val_pairs), ("c", data.test_pairs)):
        files[f"{name}_en"] = "".join(f"{pair[0]}\n" for pair in pairs).encode()
        files[f"{name}_es"] = "".join(f"{pair[1]}\n" for pair in pairs).encode()
    return load(save(folder, **files))


def linked(folder):
    """Return the path of a symbolic link to the pairs."""
    (folder / "link").symlink_to(save(folder, a_tsv=TSV))
    return folder / "link"


def read_only(folder):
    """Return the path of the pairs in a folder that nothing can be written to."""
    home = folder / "locked"
    home.mkdir()
    path = Path(save(home, a_tsv=TSV))
    path.chmod(0o444)
    home.chmod(0o555)
    return path


def kept_vocabulary(folder):
    """Return the vocabulary of PAIRS as JSON gives it back, with lists for tuples."""
    return json.loads(json.dumps(plain(folder).state()["vocabulary"]))


@pytest.mark.parametrize("case", [*BAD_FILES, *BAD_CALLS])
def test_bad_input_is_refused_in_one_sentence_that_names_it_first(case, tmp_path):
    rest = ""
    if case in BAD_FILES:
        files, start, rest = BAD_FILES[case]
        pattern = re.escape(f"{tmp_path / start}")
        call = partial(load, save(tmp_path, **files))
    else:
        call, pattern = BAD_CALLS[case]
        call = partial(call, tmp_path)
    with pytest.raises(ValueError, match=f"^{pattern}") as refused:
        call()
    assert rest in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_but_right_input_gives_the_same_sentences_ids_and_fingerprint(case, tmp_path):
    expected = plain(tmp_path)
    data = UNUSUAL[case](tmp_path)
    assert data.state() == expected.state() | {"vocabulary": data.state()["vocabulary"]}
    assert data.vocabulary.pieces == expected.vocabulary.pieces
    assert data.train_pairs == expected.train_pairs
    assert data.val_pairs == expected.val_pairs
    assert data.test_pairs == expected.test_pairs
    assert {pair[:2] for pair in data.train_pairs} < set(PAIRS)  # U+2028 and U+0085 end no line


@pytest.mark.parametrize(
    "change",
    (
        lambda tsv: tsv.replace("the cat sees 3", "the bat sees 3"),
        lambda tsv: tsv + "one\tmore\n",
        lambda tsv: "\n".join(sorted(tsv.split("\n"))),
        lambda tsv: "".join("{1}\t{0}\n".format(*line.split("\t")) for line in tsv.strip().split("\n")),
    ),
)
def test_fingerprint_changes_with_any_sentence_and_order(change, tmp_path):
    changed = load(save(tmp_path, changed_tsv=change(TSV.decode()).encode()))
    assert changed.fingerprint() != plain(tmp_path).fingerprint()


def test_embedded_verses_have_their_recorded_fingerprint_and_batches():
    data = sentences.load_sentences("", merges="none")
    assert data.fingerprint() == "9852 + 788 + 1182 sentence pairs, sha256 2c58fc4d210f5925"
    steps = data.epoch(96, rng(3))
    assert steps.shape == (102, 96)
    (source, target), y = data.batch(steps[0], rng(), "cpu")
    assert target[:, 1:].eq(y[:, :-1].where(y[:, :-1] != EOS, target[:, 1:])).all()  # y is one token ahead
    assert target[:, 0].eq(EOS).all()
    assert (source == EOS).sum(1).eq(1).all()
    assert (y == EOS).sum(1).eq(1).all()
    lengths = [len(data.train_pairs[row][3]) for row in steps[0].tolist()]
    assert max(lengths) - min(lengths) <= 4


# -------------------------------------------------------------------------------------------- vocabulary


def test_byte_pairs_give_back_any_text():
    vocabulary = learn_bytes(["the cat sat on the mat", "see the rat"], 20)
    assert len(vocabulary.encode(" the")) == 1
    for text in ("the cat", "", "  two  spaces\t", "¿Qué? ñ 漢字 🙂\u0301", "ĠĀ_\x00"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    early = Vocabulary([*BYTES, "bc", "ab"], [("b", "c"), ("a", "b")])
    assert early.encode("abc") == [early.ids["a"], early.ids["bc"]]  # the pair learned first is joined first
    words = Vocabulary(["new@@", "er", "old"])
    assert words.decode(words.encode("new@@ er old gone")) == "newer old <unk>"


def test_each_merge_joins_a_most_frequent_pair_of_its_time():
    texts = [text for pair in PAIRS for text in pair]
    words = Counter(word for text in texts for word in byte_words(text))
    splits = {word: tuple(word) for word in words}
    merges = learn_bytes(texts, 40).merges
    assert len(merges) == 40
    for merge in merges:
        pairs = Counter()
        for word, split in splits.items():
            for pair in zip(split, split[1:]):
                pairs[pair] += words[word]
        assert pairs[merge] == max(pairs.values())
        splits = {word: join_pair(split, merge) for word, split in splits.items()}
    assert len(learn_bytes(["ab ab", "cd"], 1000).merges) == 1  # " ab" is once there with its space


def test_vocabulary_keeps_a_bounded_number_of_words():
    vocabulary = learn_bytes(["the cat sat on the mat"], 20)
    for text in ("the cat", "the cat"):
        assert vocabulary.encode(text) == Vocabulary(vocabulary.pieces, vocabulary.merges).encode(text)
    info = vocabulary.encode_word.cache_info()
    assert (info.hits, info.currsize, info.maxsize) == (2, 2, 20_000)


def test_ids_keep_their_meaning_on_other_data_with_the_vocabulary_of_a_checkpoint(tmp_path, capsys):
    first = plain(tmp_path)
    other_tsv = TSV.replace(b"cat", b"whale").replace(b"sees", b"hears")
    other = load(save(tmp_path, other_tsv=other_tsv), vocabulary=first.state()["vocabulary"])
    assert other.vocabulary.pieces == first.vocabulary.pieces
    assert other.vocabulary.pieces != load(tmp_path / "other.tsv").vocabulary.pieces
    for source, _, ids, _ in other.train_pairs:
        assert first.vocabulary.decode(ids) == source
    assert capsys.readouterr().out == ""
    words = plain(tmp_path, merges="none").state()["vocabulary"]
    other = load(tmp_path / "other.tsv", vocabulary=words)
    unknown = sum(ids.count(UNK) for pair in other.train_pairs for ids in pair[2:])
    assert f"other.tsv: {unknown} words of the training texts are not in" in capsys.readouterr().out


def test_pairs_over_max_length_are_counted_on_the_screen(tmp_path, capsys):
    content = TSV + "".join(f"{'long ' * 9}{n}\tlargo\n" for n in range(30)).encode()
    whole = load(save(tmp_path, a_tsv=content), merges="none").size()
    data = load(tmp_path / "a.tsv", merges="none", max_length=5)
    assert max(len(ids) for pair in data.train_pairs for ids in pair[2:]) <= 5
    assert f"{whole - data.size()} of {whole} training pairs left out" in capsys.readouterr().out


# --------------------------------------------------------------------------------- networks, translations


def test_token_loss_is_the_mean_over_target_tokens_without_padding(tmp_path):
    data = plain(tmp_path)
    network = small_translator(len(data.vocabulary))
    pairs = data.train_pairs[:7]
    losses = []
    hits = []
    for _, _, source, target in pairs:  # one at a time: no padding at all
        log_p = network(torch.tensor([source + [EOS]]), torch.tensor([[EOS] + target]))[0].log_softmax(1)
        for row, token in zip(log_p, target + [EOS]):
            losses.append(-row[token].item())
            hits.append(row.argmax().item() == token)
    loss, accuracy, error = sentences.token_loss(network, pairs, batch=3)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert accuracy == pytest.approx(100 * sum(hits) / len(hits))
    source, target, y = sentences.pad_pairs(pairs)
    assert data.loss(network(source, target), y).item() == pytest.approx(loss, rel=1e-5)
    assert PAD in y

    class AlwaysPad(torch.nn.Module):
        def forward(self, source, target, arch):
            return torch.eye(len(data.vocabulary))[torch.full_like(target, PAD)]

    assert sentences.token_loss(AlwaysPad(), pairs)[1] == 0.0  # padding is no token to be right about


def test_data_measure_a_supernet_a_network_and_samples(tmp_path, capsys):
    data = plain(tmp_path, beam=2)
    space = find_space("translation")
    arch = space.cheapest()[0]
    supernet = Translator(space, len(data.vocabulary), sharing="heterogeneous")
    assert data.fitness(supernet, arch) == -sentences.token_loss(supernet, data.val_pairs, arch)[0]
    network = small_translator(len(data.vocabulary))
    loss, _, error = sentences.token_loss(network, data.val_pairs)
    assert data.validate(network) == (-loss, error)
    result = data.test(network)
    assert list(result) == ["test_accuracy", "bleu", "standard_error"]
    assert all(0 <= value <= 100 for value in result.values())
    samples = data.samples(network, network)
    assert [row[:2] for row in samples["translations"]] == [list(pair[:2]) for pair in data.test_pairs[:3]]
    assert 0 <= samples["shuffled_bleu"] <= 100
    printed = capsys.readouterr().out
    assert printed.count("\nreference ") == 3
    assert "all-attention with the sources of other sentences: BLEU" in printed
    assert data.extent() == f"{len(data.test_pairs)} test sentences, one seed"


def test_shuffled_bleu_is_of_the_sources_of_other_sentences(tmp_path, monkeypatch):
    data = plain(tmp_path)
    seen = []

    def copy(network, vocabulary, texts, *settings):
        seen.append(texts)
        return texts

    monkeypatch.setattr(sentences, "translate", copy)
    result = data.samples("winner", "reference")
    sources = [pair[0] for pair in data.test_pairs]
    assert seen == [sources[:3], sources[1:] + sources[:1]]
    assert result["shuffled_bleu"] == bleu(seen[1], [pair[1] for pair in data.test_pairs])


def test_lines_are_translated_as_they_come_with_the_settings_of_the_checkpoint(tmp_path, capsys):
    data = plain(tmp_path, beam=3, length_penalty=1.5, max_length=30)
    network = small_translator(len(data.vocabulary))
    texts = ["the cat sees 3", "", "ñandú\u2028漢字", "the dog " * 30, "last"]
    expected = [sentences.translate(network, data.vocabulary, [text], 30, 3, 1.5)[0] for text in texts]
    greedy = [sentences.translate(network, data.vocabulary, [text], 30, 1, 1.5)[0] for text in texts]
    assert expected != greedy
    assert expected[1] == ""

    def stream():
        for number, text in enumerate(texts):
            printed.append(capsys.readouterr())
            yield (BOM if number == 0 else b"") + text.encode() + (b"\r\n" if number < 4 else b"")
        printed.append(capsys.readouterr())
        yield b"cat\xff\n"

    for state, translations in ((data.state(), expected), (data.state() | {"beam": 1}, greedy)):
        printed = []
        with pytest.raises(ValueError, match="^standard input, line 6 is not UTF-8"):
            sentences.translate_lines(network, state, stream())
        assert [output.out for output in printed[1:]] == [f"{text}\n" for text in translations]
        cut = f"line 4 has {len(data.vocabulary.encode(texts[3].strip()))} pieces, cut to max_length 30\n"
        assert [output.err for output in printed[1:]] == ["", "", "", cut, ""]


# -------------------------------------------------------------------------------------------------- BLEU


@pytest.mark.parametrize(
    "hypotheses, references, expected, tokenise",  # from sacrebleu 2.6.0, corpus_bleu
    (
        (["a b c d e"], ["a x c d y"], 23.6435, "13a"),
        (["The U.S. has 3,000.5 cats & dogs"], ["The U.S. has 3,000.5 cats &amp; dogs."], 90.4837, "13a"),
        (["it's well-known: 5-6 (or 7) \"times\"!"], ["it's well-known: 5-6 or 7 'times'!"], 40.5259, "13a"),
        (["¡Hola! ¿qué tal? señor, 10.5%"], ["¡Hola! ¿qué tal? señor, 10.5 %"], 100.0, "13a"),
        (["a a a a a"], ["a b a c a d"], 11.5102, "13a"),
        (["a b c d e f", "g h"], ["a b c e d f", "g i"], 33.2024, "13a"),
        (["a b c d"], ["a b c d e f g h"], 36.7879, "13a"),
        (["a b c"], ["a b c"], 0.0, "13a"),
        (["x"], ["y"], 0.0, "13a"),
        ([""], ["a b"], 0.0, "13a"),
        (["我爱北京天安门"], ["我爱北京的天安门。"], 0.0, "13a"),
        (["我爱 北京天安门"], ["我爱北京的天安门。"], 44.6831, "char"),
        (["東京は日本の首都です", "はい"], ["東京は、日本の首都です。", "いいえ"], 58.3119, "char"),
        (["the cat sat"], ["the cats at home"], 64.1180, "char"),
    ),
)
def test_bleu_equals_sacrebleu(hypotheses, references, expected, tokenise):
    assert bleu(hypotheses, references, tokenise) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    "text, tokenise, is_said",
    (
        ("我昨天在北京看见了{}只猫。", "13a", True),
        ("私は昨日{}匹の猫を見ました。", "13a", True),
        ("ฉันเห็นแมว{}ตัวเมื่อวานนี้", "13a", True),
        ("我昨天在北京看见了{}只猫。", "char", False),
        ("我 昨天 在 北京 看见 了 {} 只 猫 。", "13a", False),
        ("나는 어제 고양이 {}마리를 보았다.", "13a", False),
        ("Rindfleischetikettierungsüberwachungsgesetz {}", "13a", False),
    ),
)
def test_texts_without_spaces_are_told_what_13a_counts(text, tokenise, is_said, tmp_path, capsys):
    content = "".join(f"I saw {n} cats\t{text.format(n)}\n" for n in range(20)).encode()
    load(save(tmp_path, a_tsv=content), tokenise=tokenise)
    assert ("13a BLEU counts words between spaces" in capsys.readouterr().out) == is_said

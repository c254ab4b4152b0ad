"""Sentence pairs for translation: files, byte-pair vocabulary, batches, beam search, BLEU.

A pair is (source text, target text, source ids, target ids). The data are a TSV file (source<TAB>target), two
text files "A,B" with a sentence a line, or six (training, validation, test), all UTF-8, gzipped or not.
Sources: byte pairs, Sennrich et al., arXiv 1508.07909, on bytes as in GPT-2; BLEU, Post, arXiv 1804.08771.
"""

import gzip
import hashlib
import io
import math
import re
import sys
import zlib
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from shiftaddnas import EOS, PAD, UNK

# ------------------------------------------------------------------------------------------- vocabulary


class Vocabulary:
    """Text <-> ids, the first of which are PAD, EOS and UNK.

    With `merges` (byte-pair encoding) the pieces are 256 bytes, each shown as the character of its number,
    and the joined pairs: decode(encode(text)) == text. With merges None the pieces are words between spaces.
    """

    def __init__(self, pieces, merges=None):
        self.pieces = pieces
        self.merges = merges
        self.ids = {piece: number for number, piece in enumerate(pieces, UNK + 1)}  # piece -> id
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges or [])}  # pair -> when learned
        self.encode_word = lru_cache(maxsize=20_000)(self.encode_word)  # most words come again

    def __len__(self):
        return len(self.pieces) + UNK + 1

    def encode(self, text):
        """Return the ids of a text, without EOS."""
        if self.merges is None:
            return [self.ids.get(word, UNK) for word in text.split()]
        return [number for word in byte_words(text) for number in self.encode_word(word)]

    def encode_word(self, word):
        """Return the ids of one byte word: join the pair that was learned first until no pair is left."""
        pieces = tuple(word)
        while True:
            pairs = [pair for pair in zip(pieces, pieces[1:]) if pair in self.ranks]
            if not pairs:
                return [self.ids[piece] for piece in pieces]
            pieces = join_pair(pieces, min(pairs, key=self.ranks.get))

    def decode(self, ids):
        """Return the text of ids. Special ids are left out; an unknown word is <unk>."""
        if self.merges is None:
            words = ["<unk>" if i == UNK else self.pieces[i - UNK - 1] for i in ids if i >= UNK]
            return " ".join(words).replace("@@ ", "")  # the official texts mark a word that goes on with @@
        pieces = "".join(self.pieces[i - UNK - 1] for i in ids if i > UNK)
        return pieces.encode("latin-1").decode("utf-8", "replace")


def byte_words(text):
    """Return words (each with the space before it), punctuation and other space, each byte as a character."""
    return [part.encode().decode("latin-1") for part in re.findall(r" ?\w+| ?[^\w\s]+|\s+", text)]


def join_pair(pieces, pair):
    """Return the pieces with each occurrence of the pair, from the left, joined to one piece."""
    joined = []
    i = 0
    while i < len(pieces):
        width = 2 if pieces[i : i + 2] == pair else 1
        joined.append("".join(pieces[i : i + width]))
        i += width
    return tuple(joined)


def learn_bytes(texts, count):
    """Return a Vocabulary with up to `count` merges, each of the most frequent pair of neighbouring pieces.

    Of equally frequent pairs the one counted first is joined. Learning ends early when no pair occurs twice.
    """
    words = Counter(word for text in texts for word in byte_words(text))
    splits = [tuple(word) for word in words]  # the pieces of each word so far
    counts = list(words.values())  # how often each word occurs
    pairs = Counter()  # pair -> occurrences in the texts
    where = defaultdict(set)  # pair -> numbers of words that have it, or had it
    merges = []

    def tally(n, sign):
        """Count the pairs of word n: in with sign 1, out with sign -1."""
        for pair in zip(splits[n], splits[n][1:]):
            pairs[pair] += sign * counts[n]
            where[pair].add(n)
            if not pairs[pair]:
                del pairs[pair]
                del where[pair]

    for n in range(len(splits)):
        tally(n, 1)
    while len(merges) < count and pairs:
        best, frequency = pairs.most_common(1)[0]
        if frequency < 2:  # a piece for it would spare nothing
            break
        merges.append(best)
        # Only the words with this pair change, so only their pairs are counted again.
        for n in sorted(where[best]):
            tally(n, -1)
            splits[n] = join_pair(splits[n], best)
            tally(n, 1)
    return Vocabulary([*map(chr, range(256)), *map("".join, merges)], merges)


# ------------------------------------------------------------------------------------------------ files


def decode_lines(stream, where):
    """Yield the lines of a binary stream as text; ValueError with the number of a line that is not UTF-8."""
    for number, raw in enumerate(stream, 1):  # LF ends a line, U+2028 and its like do not
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors write a mark first
        except UnicodeDecodeError:
            line = None
        if line is None or "\0" in line:  # UTF-16 has zero bytes
            raise ValueError(f"{where}, line {number} is not UTF-8; save the text as UTF-8")
        yield line.strip()  # of CR, too


def read_lines(path):
    """Return the lines of a UTF-8 text file, gzipped or not; ValueError if it is something else."""
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(b"\x1f\x8b"):  # the first bytes of gzip; no UTF-8 text begins like this
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}; it must be a text file or a .gz of one") from None
    return list(decode_lines(io.BytesIO(raw), path))


def read_pairs(*paths):
    """Return [(source, target)] of a TSV file, or of two files with a sentence a line. Skip blank lines."""
    name = ",".join(paths)
    files = [read_lines(path) for path in paths]
    if len(files[0]) != len(files[-1]):
        raise ValueError(f"{name} have {len(files[0])} and {len(files[-1])} lines, must have as many")
    pairs = []
    for number, lines in enumerate(zip(*files), 1):
        cells = lines if len(lines) == 2 else [cell.strip() for cell in lines[0].split("\t")]
        if len(cells) == 2 and all(cells):
            pairs.append(tuple(cells))
        elif any(cells):
            raise ValueError(f"{name}, line {number} must be source<TAB>target, or a sentence in both files")
    return pairs


def read_splits(path):
    """Return the training, validation and test pairs of a --data path, each [(source, target)]."""
    paths = [path] if Path(path).is_file() else path.split(",")  # the name of one file may have a comma
    if len(paths) not in (1, 2, 6) or "" in paths:
        raise ValueError(f"--data {path}: needs a TSV file, or 2 or 6 text files joined by commas")
    if len(paths) == 6:
        return [read_pairs(*paths[i : i + 2]) for i in (0, 2, 4)]
    pairs = read_pairs(*paths)
    # Of one set a fifteenth are for validation and a tenth for the test, always the same.
    pairs = [pairs[row] for row in np.random.default_rng(0).permutation(len(pairs))]
    val_end = len(pairs) // 15
    test_end = val_end + len(pairs) // 10
    return [pairs[test_end:], pairs[:val_end], pairs[val_end:test_end]]


def load_sentences(
    path, merges="2000", max_length=200, beam=4, length_penalty=0.6, vocabulary=None, tokenise="13a"
):
    """Return the Sentences of a TSV file, two or six text files, or of the embedded Bible verses (path "").

    merges: byte pairs to learn from the training texts, or "none" for words between spaces; not used with
    `vocabulary`, the {"pieces", "merges"} of a checkpoint. Pairs longer than max_length pieces are left out.
    """
    if merges != "none" and not str(merges).isdecimal():
        raise ValueError(f"--set merges={merges}: must be a number of merges, or none for words")
    path = str(path or Path(__file__).parent / "bible_en_es.tsv.gz")
    texts = read_splits(path)
    training_texts = [text for pair in texts[0] for text in pair]
    if vocabulary:
        vocabulary = Vocabulary(**vocabulary)
    elif merges == "none":
        words = Counter(word for text in training_texts for word in text.split())
        vocabulary = Vocabulary([word for word, _ in words.most_common()])
    else:
        vocabulary = learn_bytes(training_texts, int(merges))
    splits = []
    for name, pairs in zip(("training", "validation", "test"), texts):
        encoded = [(*pair, *map(vocabulary.encode, pair)) for pair in pairs]
        kept = [pair for pair in encoded if max(map(len, pair[2:])) <= max_length]
        if not kept:
            raise ValueError(f"{path}: of {len(pairs)} {name} pairs none is within max_length {max_length}")
        left_out = len(pairs) - len(kept)
        if left_out:
            print(f"{left_out} of {len(pairs)} {name} pairs left out: over max_length {max_length}")
        splits.append(kept)
    unknown = sum(ids.count(UNK) for pair in splits[0] for ids in pair[2:])
    if unknown:
        print(f"{path}: {unknown} words of the training texts are not in the checkpoint's vocabulary")
    targets = " ".join(pair[1] for pair in splits[2])
    letters = re.findall("[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]", targets)  # Thai to Han
    if tokenise == "13a" and len(letters) > 5 * len(targets.split()):
        print(f"{path}: 13a BLEU counts words between spaces, which these texts lack; use tokenise=char")
    return Sentences(vocabulary, *splits, max_length, beam, length_penalty, tokenise)


# ---------------------------------------------------------------------------------------------- batches


class Sentences(NamedTuple):
    """Three splits of pairs with the methods that training and search use (data/images.py has the same)."""

    vocabulary: Vocabulary
    train_pairs: list  # of (source text, target text, source ids, target ids)
    val_pairs: list
    test_pairs: list
    max_length: int  # of a sentence, in pieces
    beam: int
    length_penalty: float
    tokenise: str  # of BLEU: a key of TOKENISE

    def size(self):
        """Return the number of training pairs."""
        return len(self.train_pairs)

    def epoch(self, batch, generator):
        """Return the rows of each step of an epoch, (steps, batch); a step has sentences of like length."""
        batch = min(batch, self.size())
        rows = torch.randperm(self.size(), generator=generator)[: self.size() // batch * batch]  # whole steps
        lengths = torch.tensor([len(self.train_pairs[row][3]) for row in rows.tolist()])
        steps = rows[lengths.argsort(stable=True)].view(-1, batch)  # (steps, batch)
        return steps[torch.randperm(len(steps), generator=generator)]  # not from short to long

    def batch(self, rows, generator, device):
        """Return ((source (B, S), target in (B, T)), target out (B, T)) of training rows."""
        source, target, y = pad_pairs([self.train_pairs[row] for row in rows.tolist()], device)
        return (source, target), y

    def loss(self, logits, y, smoothing=0.0):
        """Return the cross-entropy of logits (B, T, V) in nats a target token, padding left out."""
        logits = logits.float().flatten(0, 1)  # (B T, V)
        return F.cross_entropy(logits, y.flatten(), ignore_index=PAD, label_smoothing=smoothing)

    def fitness(self, supernet, arch, device="cpu"):
        """Return minus the validation loss, in nats a token, of an arch with the weights of the supernet."""
        return -token_loss(supernet, self.val_pairs, arch, device)[0]

    def validate(self, network, device="cpu"):
        """Return the same measure of one trained network, and its standard error."""
        loss, _, error = token_loss(network, self.val_pairs, None, device)
        return -loss, error

    def test(self, network, device="cpu"):
        """Return the figures of the test pairs: tokens predicted right in %, BLEU and its standard error."""
        accuracy = token_loss(network, self.test_pairs, device=device)[1]
        references = [pair[1] for pair in self.test_pairs]
        translations = self.translate(network, self.test_pairs, device)
        score = bleu(translations, references, self.tokenise)
        error = bleu_error(translations, references, self.tokenise)
        return {"test_accuracy": accuracy, "bleu": score, "standard_error": error}

    def samples(self, network, reference, device="cpu", count=3):
        """Print and return translations of the first test sentences and the BLEU of shuffled sources.

        The reference network is given the source of the next sentence: its BLEU is near 0 if it reads it.
        """
        chosen = self.test_pairs[:count]
        rows = []
        for pair, translation in zip(chosen, self.translate(network, chosen, device)):
            print(f"\nsource     {pair[0]}\nreference  {pair[1]}\nwinner     {translation}")
            rows.append([pair[0], pair[1], translation])
        shuffled = self.translate(reference, self.test_pairs[1:] + self.test_pairs[:1], device)
        shuffled_bleu = bleu(shuffled, [pair[1] for pair in self.test_pairs], self.tokenise)
        print(f"\nall-attention with the sources of other sentences: BLEU {shuffled_bleu:.2f}")
        return {"translations": rows, "shuffled_bleu": shuffled_bleu}

    def translate(self, network, pairs, device):
        """Return translations of the sources of pairs."""
        settings = (self.max_length, self.beam, self.length_penalty, device)
        return translate(network, self.vocabulary, [pair[0] for pair in pairs], *settings)

    def extent(self):
        """Return the last words of a report: on how much the figures rest."""
        return f"{len(self.test_pairs)} test sentences, one seed"

    def state(self):
        """Return what a checkpoint keeps of the data: enough to translate with, and to tell other data."""
        vocabulary = {"pieces": self.vocabulary.pieces, "merges": self.vocabulary.merges}
        settings = ("max_length", "beam", "length_penalty", "tokenise")
        state = {name: getattr(self, name) for name in settings}
        return {"vocabulary": vocabulary, **state, "fingerprint": self.fingerprint()}

    def fingerprint(self):
        """Return a text that changes with any sentence, its place or its split, but not with file names."""
        splits = (self.train_pairs, self.val_pairs, self.test_pairs)
        texts = ["".join(f"{pair[0]}\t{pair[1]}\n" for pair in pairs) for pairs in splits]
        digest = hashlib.sha256("\n".join([*texts, ""]).encode()).hexdigest()
        counts = " + ".join(str(len(pairs)) for pairs in splits)
        return f"{counts} sentence pairs, sha256 {digest[:16]}"


def pad(lists, device="cpu"):
    """Return lists of ids as a tensor (B, longest) with PAD behind."""
    rows = [torch.tensor(ids) for ids in lists]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD).to(device)


def pad_pairs(pairs, device="cpu"):
    """Return (source (B, S), target in (B, T), target out (B, T)): EOS ends source and target out."""
    source = pad([pair[2] + [EOS] for pair in pairs], device)
    target = pad([[EOS] + pair[3] for pair in pairs], device)
    y = pad([pair[3] + [EOS] for pair in pairs], device)
    return source, target, y


@torch.no_grad()
def token_loss(model, pairs, arch=None, device="cpu", batch=200):
    """Return (cross-entropy in nats a target token, tokens right in %, standard error of the first).

    The true words before each token are given to the model. The standard error is over the sentences, for
    the tokens of one are not independent. ValueError for a loss that is not finite.
    """
    model.eval()
    pairs = sorted(pairs, key=lambda pair: len(pair[3]))  # like lengths together: little padding
    losses = []  # of each sentence, summed over its tokens
    counts = []
    right = 0
    for start in range(0, len(pairs), batch):
        source, target, y = pad_pairs(pairs[start : start + batch], device)
        logits = model(source, target, arch).mT  # (B, V, T)
        losses.append(F.cross_entropy(logits, y, ignore_index=PAD, reduction="none").sum(1))  # (B,)
        counts.append((y != PAD).sum(1))
        right += ((logits.argmax(1) == y) & (y != PAD)).sum().item()
    losses = torch.cat(losses).double()
    counts = torch.cat(counts).double()
    loss = (losses.sum() / counts.sum()).item()
    if not 0 <= loss < math.inf:
        raise ValueError(f"arch {arch or model.arch}: the loss is {loss}, must be finite and at least 0")
    error = (losses - loss * counts).norm() / counts.sum()  # of a ratio of two sums
    return loss, 100 * right / counts.sum().item(), error.item()


# --------------------------------------------------------------------------------- translations and BLEU


@torch.no_grad()
def beam_search(model, source, beam=4, penalty=0.6, limit=None):
    """Return the best translation of each row of source (B, S): a list of B lists of ids.

    Keep `beam` beginnings of a sentence. One that ends, by EOS or at `limit` tokens (default 2 S + 10), has
    the score log p / length ** penalty, its EOS counted, and leaves its place empty.
    """
    B = len(source)
    limit = limit or 2 * source.shape[1] + 10
    outputs, mask = model.encode(source)
    memory = [x.repeat_interleave(beam, 0) for x in outputs], mask.repeat_interleave(beam, 0)
    layers = model.new_caches()
    caches = [cache for layer in layers for cache in layer[:2]]
    tokens = source.new_full((B * beam, 1), EOS)  # the last ones: EOS starts a sentence too
    scores = torch.full((B, beam), -math.inf, device=source.device)
    scores[:, 0] = 0.0  # the beginnings are equal at first: one of them counts
    written = source.new_zeros(B, beam, 0)  # (B, beam, tokens so far)
    best = [(-math.inf, [])] * B  # score and tokens of the best translation so far
    for length in range(1, limit + 1):
        # Of all beginnings of a sentence with one more token the likeliest go on.
        log_p = model.decode(tokens, memory, None, layers)[:, 0].float().log_softmax(1).view(B, beam, -1)
        log_p[..., PAD] = -math.inf  # (B, beam, V)
        scores, index = (scores.unsqueeze(2) + log_p).flatten(1).topk(beam)  # (B, beam)
        origin = index // log_p.shape[2]  # the beginning that goes on
        token = index % log_p.shape[2]
        written = written.gather(1, origin.unsqueeze(2).expand(-1, -1, length - 1))
        ended = (token == EOS) | (length == limit)
        written = torch.cat([written, token.unsqueeze(2)], 2)
        for b, k in (ended & scores.isfinite()).nonzero().tolist():
            words = [number for number in written[b, k].tolist() if number != EOS]
            best[b] = max(best[b], (scores[b, k].item() / length**penalty, words))
        scores = scores.masked_fill(ended, -math.inf)
        hope = scores.amax(1) / limit**penalty  # no beginning can end better than this
        if all(score >= bound for (score, _), bound in zip(best, hope.tolist())):
            break
        tokens = token.view(-1, 1)
        rows = (origin + beam * torch.arange(B, device=origin.device)[:, None]).flatten()
        for cache in caches:  # they follow the beginnings that go on
            if "kv" in cache:
                cache["kv"] = [tensor[rows] for tensor in cache["kv"]]
            if "u" in cache:
                cache["u"] = cache["u"][rows]
    return [words for _, words in best]


def translate(model, vocabulary, texts, max_length, beam, length_penalty, device="cpu", batch=200):
    """Return translations of texts, each cut to max_length pieces, by beam search; blank ones stay blank."""
    model.eval()
    ids = [vocabulary.encode(text)[:max_length] + [EOS] for text in texts]
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))  # short ones first
    translations = [""] * len(ids)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        source = pad([ids[row] for row in rows], device)  # (B, S)
        for row, words in zip(rows, beam_search(model, source, beam, length_penalty)):
            if texts[row].strip():
                translations[row] = vocabulary.decode(words).strip()
    return translations


def translate_lines(model, state, stream, device="cpu"):
    """Print the translation of each line of a binary stream as soon as the line is read.

    state: what Sentences.state() gave to the checkpoint. ValueError for a line that is not UTF-8.
    """
    vocabulary = Vocabulary(**state["vocabulary"])
    settings = [state[name] for name in ("max_length", "beam", "length_penalty")]
    for number, line in enumerate(decode_lines(stream, "standard input"), 1):
        pieces = len(vocabulary.encode(line))
        if pieces > settings[0]:
            print(f"line {number} has {pieces} pieces, cut to max_length {settings[0]}", file=sys.stderr)
        print(*translate(model, vocabulary, [line], *settings, device), flush=True)


def tokenise_13a(line):
    """Return words as mteval-v13a and sacreBLEU's default have them: western punctuation stands alone."""
    line = line.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(entity, character)
    line = re.sub(r"([{-~[-` -&(-+:-@/])", r" \1 ", f" {line} ")  # punctuation but . , - and '
    line = re.sub(r"([^0-9])([.,])", r"\1 \2 ", line)  # full stops and commas, but not those in numbers
    line = re.sub(r"([.,])([^0-9])", r" \1 \2", line)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()  # a dash behind a digit


# The names are sacreBLEU's; char means every character but spaces.
TOKENISE = {"13a": tokenise_13a, "char": lambda line: list("".join(line.split()))}


def bleu(hypotheses, references, tokenise="13a"):
    """Return the corpus BLEU, in %, of one reference a sentence, with exponential smoothing as in sacreBLEU.

        BLEU = min(1, e^(1 - r/h)) * (p1 p2 p3 p4)^(1/4) * 100,  h, r words of hypotheses and references

    p_n is the share of the n-grams that the reference has too, each counted at most as often as there; the
    k-th p_n without a match is 1 / (2^k * n-grams). BLEU is 0 if nothing matches or no sentence has n words.
    """
    split = TOKENISE[tokenise]
    pairs = [(split(a.rstrip()), split(b.rstrip())) for a, b in zip(hypotheses, references, strict=True)]
    unmatched = 0
    logs = []  # log p_n
    for n in range(1, 5):
        counts = [(count_ngrams(ours, n), count_ngrams(theirs, n)) for ours, theirs in pairs]
        matched = sum((ours & theirs).total() for ours, theirs in counts)  # & keeps the smaller count
        total = sum(ours.total() for ours, _ in counts)
        if not total or n == 1 and not matched:
            return 0.0
        unmatched += matched == 0
        logs.append(math.log((matched or 2.0**-unmatched) / total))
    words = sum(len(ours) for ours, _ in pairs)
    reference_words = sum(len(theirs) for _, theirs in pairs)
    return 100 * min(1.0, math.exp(1 - reference_words / words)) * math.exp(sum(logs) / 4)


def bleu_error(hypotheses, references, tokenise="13a", parts=20):
    """Return the standard error of bleu() over sentences: a jackknife that leaves out one of 20 parts."""
    parts = min(parts, len(hypotheses))
    scores = []
    for part in range(parts):
        kept = [row for row in range(len(hypotheses)) if row % parts != part]
        scores.append(bleu([hypotheses[row] for row in kept], [references[row] for row in kept], tokenise))
    mean = sum(scores) / parts
    return math.sqrt((parts - 1) / parts * sum((score - mean) ** 2 for score in scores))


def count_ngrams(words, n):
    """Return a Counter of the n-grams of a list of words."""
    return Counter(zip(*(words[i:] for i in range(n))))

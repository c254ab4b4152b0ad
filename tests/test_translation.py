"""Claims of §8 and §9 of shiftaddnas.py: operators on tokens, spaces of Transformers, the translator."""

import copy
import io
import itertools
import json
import re
from dataclasses import replace

import pytest
import torch

import cost_model
import shiftaddnas
from conftest import parameters, rng
from data.sentences import beam_search
from shiftaddnas import (
    EOS, PAD, TOKEN_SPACES, TYPES, LightMixing, PrefixLinear, Translator, attend, mix_tokens,
    quantise, read_arch,
)

SMALL = TOKEN_SPACES["translation"]
WMT = TOKEN_SPACES["wmt14_en_de"]

# ------------------------------------------------------------------------------ §8 operators on tokens


@pytest.mark.parametrize("op", ["conv", "add"])
@pytest.mark.parametrize("causal", [True, False])
def test_mixing_over_time_and_its_gradients_equal_loops(op, causal):
    u = torch.randn(2, 6, 4, generator=rng()).double().requires_grad_()
    w = torch.randn(2, 3, generator=rng(1)).double().requires_grad_()
    g = torch.randn(2, 6, 4, generator=rng(2)).double()
    y = mix_tokens(op, u, w, causal)
    u_grad, w_grad = torch.autograd.grad(y, (u, w), g)
    softmax = w.softmax(1)
    before = 2 if causal else 1
    u, taps = u.detach(), softmax.detach()
    expected = torch.zeros_like(u)
    grad_u = torch.zeros_like(u)
    grad_taps = torch.zeros_like(taps)
    for b, t, c, j in itertools.product(range(2), range(6), range(4), range(3)):
        at = t - before + j
        head = c // 2
        value = u[b, at, c] if 0 <= at < 6 else 0 * u[0, 0, 0]
        tap = taps[head, j]
        expected[b, t, c] += value * tap if op == "conv" else -(value - tap).abs()
        grad_taps[head, j] += g[b, t, c] * (value if op == "conv" else value - tap)
        if 0 <= at < 6:
            grad_u[b, at, c] += g[b, t, c] * (tap if op == "conv" else (tap - value).clamp(-1, 1))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(u_grad, grad_u)
    torch.testing.assert_close(w_grad, torch.autograd.grad(softmax, w, grad_taps)[0])


@pytest.mark.parametrize("op", ["conv", "add"])
def test_mixing_token_by_token_equals_mixing_the_sentence(op):
    u = torch.randn(3, 9, 8, generator=rng())
    w = torch.randn(4, 5, generator=rng(1))
    past = torch.zeros(3, 4, 8)
    tokens = []
    for t in range(9):
        tokens.append(mix_tokens(op, u[:, t : t + 1], w, True, past))
        past = torch.cat([past, u[:, t : t + 1]], 1)[:, 1:]
    torch.testing.assert_close(torch.cat(tokens, 1), mix_tokens(op, u, w, True))


def test_taps_can_be_adjusted_and_heads_must_divide_the_width():
    u = torch.randn(2, 6, 4, generator=rng())
    w = torch.randn(2, 3, generator=rng(1))
    torch.testing.assert_close(mix_tokens("conv", u, w, True, adjust=lambda taps: 0 * taps), 0 * u)
    with pytest.raises(ValueError, match="heads must divide the 4 channels, got 3"):
        mix_tokens("add", u, torch.zeros(3, 3), True)
    with pytest.raises(ValueError, match="heads must divide the width 4, got 3"):
        attend(u, u, u, 3, None)


def test_attention_equals_loops_and_gives_0_where_nothing_is_allowed():
    q = torch.randn(2, 3, 8, generator=rng()).double()
    k = torch.randn(2, 5, 8, generator=rng(1)).double()
    v = torch.randn(2, 5, 8, generator=rng(2)).double()
    allowed = torch.rand(2, 1, 3, 5, generator=rng(3)) < 0.6
    allowed[1, 0, 2] = False
    y = attend(q, k, v, 4, allowed)
    for b, head, t in itertools.product(range(2), range(4), range(3)):
        part = slice(2 * head, 2 * head + 2)
        keys = allowed[b, 0, t].nonzero()[:, 0]
        weights = torch.softmax(k[b, keys, part] @ q[b, t, part] / 2**0.5, 0)
        torch.testing.assert_close(y[b, t, part], weights @ v[b, keys, part])
    assert y[1, 2].eq(0).all()


@pytest.mark.parametrize("letter", "CAS")
def test_a_light_operator_equals_loops_over_tokens_and_an_add_is_the_mean_of_its_distances(letter):
    light = LightMixing(letter, 6, 2, 3, False, None, 0.0).double().eval()
    x = torch.randn(2, 5, 6, generator=rng()).double()
    keep = torch.ones(2, 5, 1).double()
    keep[1, 3:] = 0  # padding
    u = x @ light.first.weight.w.T + light.first.bias
    if letter == "S":
        w = light.shift.weight.w
        u = u @ (w.sign() * 2 ** w.abs().log2().round().clamp(-15, 0)).T + light.shift.bias
    u = u * keep
    taps = light.taps.w.softmax(1)
    y = torch.zeros_like(u)
    for t, c, j in itertools.product(range(5), range(6), range(3)):
        value = u[:, t + j - 1, c] if 0 <= t + j - 1 < 5 else torch.zeros(2).double()
        tap = taps[c // 3, j]
        y[:, t, c] += value * tap if letter == "C" else -(value - tap).abs() / 3
    torch.testing.assert_close(light(x, letter, keep), y @ light.second.weight.w.T + light.second.bias)


# ------------------------------------------------------------------------------------------ §8 TokenSpace


def test_the_published_translation_spaces_have_their_exact_sizes():
    def published(widths, encoder, decoder, layers=6, depths=range(1, 7)):
        return widths**2 * encoder**layers * sum(decoder**depth for depth in depths)

    sizes = {name: space.size() for name, space in TOKEN_SPACES.items()}
    assert sizes["wmt14_en_de"] == published(3, 4 * 3 * 7, 4 * 3 * 3 * 3 * 4)
    assert sizes["wmt14_en_fr"] == published(3, 4 * 3 * 7, 3 * 3 * 3 * 3 * 4)
    assert sizes["iwslt14_de_en"] == published(4, 4 * 4 * 7, 3 * 4 * 4 * 3 * 4)
    assert sizes["translation"] == published(2, 2 * 3 * 7, 2 * 3 * 3 * 3 * 4, 3, (1, 2))
    assert [f"{size:.2e}" for size in sizes.values()][:3] == ["2.06e+28", "3.67e+27", "1.16e+30"]


PUBLISHED = [  # the published En-De networks, their parameters and FLOPs
    (
        "512: T-2048-8 TS-4096-4 TC-2048-4 TC-1024-4 TC-1024-4 T-3072-4"
        " / 512: TC-4096-4-4-3 T-4096-8-4-3 T-4096-16-4-3",
        36_974_940, 2.437e9,
    ),
    (
        "512: TC-1024-16 T-2048-4 TC-4096-16 TC-1024-8 TA-2048-16 T-3072-4"
        " / 512: T-4096-8-16-3 T-4096-8-4-3",
        30_998_848, 2.009e9,
    ),
    (
        "512: TA-3072-16 T-2048-4 TA-4096-4 TA-2048-16 T-4096-4 T-4096-16"
        " / 512: TC-4096-4-4-3 T-4096-16-4-3 T-3072-8-4-3",
        42_549_968, 2.771e9,
    ),
    (
        "512: TA-1024-8 TS-1024-8 T-1024-16 TA-4096-4 TS-3072-8 T-4096-16 / 512: T-4096-8-4-3",
        25_876_768, 1.631e9,
    ),
]


def published_count(network):
    """Count as the published counter does: embeddings not, a shift layer's exponents and signs both."""
    layers = [layer for layer in network.modules() if isinstance(layer, PrefixLinear)]
    shift_weights = sum(layer.weight.w.numel() for layer in layers if layer.op == "shift")
    return parameters(network) - network.embedding.numel() + shift_weights


@pytest.mark.parametrize("arch, count, flops", PUBLISHED)
def test_published_translation_networks_have_their_parameters_and_flops(arch, count, flops):
    with torch.device("meta"):
        network = Translator(WMT, 10, arch, sharing="none")
    shift_weights = 256**2 * sum(kind == "TS" for kind in WMT.genes(arch)["encoder"]["types"])
    assert published_count(network) - shift_weights == count  # these figures count them once
    assert cost_model.flops(cost_model.network_layers(WMT, arch)) == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize("name, count", [("wmt14_en_de", 251_995_440), ("wmt14_en_fr", 239_406_384)])
def test_published_translation_supernets_have_their_sizes(name, count):
    with torch.device("meta"):
        assert published_count(Translator(TOKEN_SPACES[name], 10, sharing="none")) == count


@pytest.mark.parametrize("space", TOKEN_SPACES.values(), ids=TOKEN_SPACES)
def test_samples_mutants_and_children_stay_inside_the_space_and_take_every_gene_of_a_parent(space):
    generator = rng()
    for _ in range(50):
        one = space.sample(generator)
        two = space.sample(generator)
        child = space.crossover(one, two, generator)
        for arch in (one, child, space.mutate(one, generator)):
            assert space.validate(arch) == arch
        parents = [space.genes(arch) for arch in (one, two)]
        for part, genes in space.genes(child).items():
            assert len(genes["types"]) in [len(parent[part]["types"]) for parent in parents]
            for name in space.choices()[part]:
                for i, value in enumerate(genes[name]):
                    assert [value] in [parent[part][name][i : i + 1] for parent in parents]
        assert space.mutate(one, generator, 0) == one
    assert len(space.draw(generator)) == 1  # as published


def test_an_arch_is_one_string_and_its_genes_are_the_official_lists():
    arch = "96: TC-256-4 C-256-4 S-128-8 / 64: TA-256-4-4-1 T-128-8-4-2"
    genes = {
        "encoder": {"embed_dim": 96, "types": ["TC", "C", "S"], "ffn": [256, 256, 128], "heads": [4, 4, 8]},
        "decoder": {
            "embed_dim": 64, "types": ["TA", "T"], "ffn": [256, 128], "self_heads": [4, 8],
            "cross_heads": [4, 4], "sources": [-1, 1],
        },
    }
    assert SMALL.genes(arch) == genes and SMALL.text(genes) == arch
    for text in (arch, json.dumps(genes), json.dumps({"space": "translation", "arch": arch})):
        assert read_arch(SMALL, text) == arch
    assert SMALL.short(arch) == "TC C S / TA T" and SMALL.file_name(arch).startswith("TCCS-TAT-")
    other = arch.replace("128-8-4-2", "128-8-4-1")
    assert SMALL.file_name(other) != SMALL.file_name(arch)  # types alone do not name a file


def test_baselines_and_the_reference_are_the_largest_of_one_type_and_the_cheapest_the_smallest():
    layers = {kind: f"96: {' '.join([kind + '-256-4'] * 3)} / 96: T-256-4-4-1 T-256-4-4-1" for kind in "TCAS"}
    names = {"all-attention": "T", "all-conv": "C", "all-add": "A", "all-shift": "S"}
    pures = SMALL.pures()
    for name, kind in names.items():
        assert layers[kind] in pures[name] and len(set(pures[name])) == 16  # 2 widths, 2 x 2 hidden, 2 depths
        for arch in pures[name]:
            assert set(SMALL.genes(SMALL.validate(arch))["encoder"]["types"]) == {kind}
    assert SMALL.reference(pures["all-conv"][0]) == layers["T"]
    assert "64: TA-128-4 TA-128-4 TA-128-4 / 64: T-128-4-4-1" in SMALL.cheapest()


BAD_ARCHS = [  # a change of the last published network, what the error says
    (("TA-1024-8", "X-1024-8"), "encoder types holds 'X'; space wmt14_en_de allows"),
    (("/ 512: T-", "/ 512: C-"), "decoder types holds 'C'"),
    (("TA-1024-8 ", ""), "encoder has 5 layers"),
    (("TA-1024-8", "TA-1000-8"), "encoder ffn holds 1000; space wmt14_en_de allows"),
    (("/ 512", "/ 500"), "decoder width is 500"),
    (("8-4-3", "8-4-4"), "must be of the form"),  # memory of 4 layers
    (("8-4-3", "8-4"), "must be of the form"),
    (("TA-1024-8", "TA-1024"), "must be of the form"),
    (("512: TA", "TA"), "must be of the form"),
    ((" / 512", " 512"), "must be of the form"),
    ((" / ", " / 512: T-4096-8-4-3 / "), "must be of the form"),
]


@pytest.mark.parametrize("change, message", BAD_ARCHS)
def test_a_bad_translation_arch_is_named(change, message):
    arch = PUBLISHED[-1][0]
    assert change[0] in arch
    with pytest.raises(ValueError, match=message):
        WMT.validate(arch.replace(*change))


@pytest.mark.parametrize("arch", ["", None, ["T"], "/", ": / :", "cc/sa/tt"])
def test_what_is_no_translation_arch_is_answered_with_an_example(arch):
    with pytest.raises(ValueError, match=re.escape(SMALL.pure("T"))):
        SMALL.validate(arch)
    genes = SMALL.genes(SMALL.pure("T"))
    genes["encoder"]["ffn"].pop()
    with pytest.raises(ValueError, match="lists of equal length"):
        SMALL.text(genes)


# ------------------------------------------------------------------------------------------ §9 Translator


def token_batch():
    """Return source (2, 9), the second row with 3 padded tokens, and target (2, 7)."""
    generator = rng()
    source = torch.randint(3, 50, (2, 9), generator=generator)
    target = torch.randint(3, 50, (2, 7), generator=generator)
    source[1, 6:] = PAD
    return source, target


def arch_of(kind):
    """Return an arch with one type in the encoder, its split form in the decoder, and two memories."""
    split = kind if kind[0] == "T" else "T" + kind
    return f"64: {kind}-256-4 {kind}-128-2 {kind}-256-8 / 96: {split}-256-4-2-2 {split}-128-8-4-3"


ARCHS = [SMALL.validate(arch_of(kind)) for kind in TYPES]


@pytest.mark.parametrize("sharing", ["none", "naive", "heterogeneous"])
def test_an_extracted_translator_equals_the_supernet(sharing):
    supernet = Translator(SMALL, 50, sharing=sharing).eval()
    for arch in ARCHS:
        network = supernet.extract(arch)
        torch.testing.assert_close(network(*token_batch()), supernet(*token_batch(), arch))
        with torch.device("meta"):
            assert parameters(network) == parameters(Translator(SMALL, 50, arch, sharing=supernet.sharing))


def test_a_sentence_alone_token_by_token_equals_its_place_in_a_batch():
    supernet = Translator(SMALL, 50, sharing="heterogeneous").eval()
    source, target = token_batch()
    for arch in ARCHS:
        whole = supernet(source, target, arch)
        alone = supernet.encode(source[1:, :6], arch)
        caches = supernet.new_caches(arch)
        steps = [supernet.decode(target[1:, t : t + 1], alone, arch, caches) for t in range(7)]
        torch.testing.assert_close(torch.cat(steps, 1)[0], whole[1], atol=1e-5, rtol=1e-5)


def test_no_target_token_sees_the_future():
    supernet = Translator(replace(SMALL, tied=False), 50, sharing="heterogeneous").eval()
    source, target = token_batch()
    target[:, :4] = 5
    target[:, 4:] = 7
    for arch in ARCHS:
        logits = supernet(source, target, arch)
        table = supernet.target_embedding
        (past,) = torch.autograd.grad(logits[:, :4].square().sum(), table, retain_graph=True)
        (future,) = torch.autograd.grad(logits[:, 4:].square().sum(), table)
        assert past[7].eq(0).all() and past[5].abs().max() > 0 and future[7].abs().max() > 0


@pytest.mark.parametrize("kind", ["C", "T", "TC"])  # an add's gradient is not the slope, by AdderNet's rule
def test_the_gradient_is_that_of_float64_differences(kind):
    supernet = Translator(SMALL, 50, sharing="none").double().eval()
    arch = SMALL.pure(kind, pick=min)
    p = supernet.encoder[0].fc1.weight.w
    way = torch.randn(p.shape, generator=rng(1), dtype=p.dtype)
    supernet(*token_batch(), arch).square().mean().backward()
    values = []
    with torch.no_grad():
        for step in (1e-6, -1e-6):
            p.add_(step * way)
            values.append(supernet(*token_batch(), arch).square().mean().item())
            p.sub_(step * way)
    assert (p.grad * way).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_float32_gradients_of_every_type_are_those_of_float64(kind):
    supernet = Translator(SMALL, 50, sharing="heterogeneous").eval()
    gradients = []
    for network in (supernet, copy.deepcopy(supernet).double()):
        network(*token_batch(), arch_of(kind)).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("taps" in name for name in gradients[0]) == (kind != "T")
    scale = max(grad.abs().max() for grad in gradients[1].values())
    for name, grad in gradients[1].items():
        assert (gradients[0][name] - grad).abs().max() < 1e-4 * scale, name


def test_operators_of_a_layer_share_their_projections_and_taps():
    block = Translator(SMALL, 50, sharing="heterogeneous").encoder[0]
    for name, letters in (("whole", "CAS"), ("split", "CAS")):
        light = block.light[name]
        assert light.first.weight is light.shift.weight and light.taps.slopes is not None
        x = torch.randn(2, 5, light.first.bias.numel(), generator=rng())
        results = [light(x, letter, None) for letter in letters]
        assert not any(a.allclose(b) for a, b in itertools.combinations(results, 2))
    alone = Translator(SMALL, 50, sharing="none").encoder[0].light
    assert alone.keys() == set(TYPES) - {"T"}  # each type has its own


def test_the_divergence_counts_the_density_of_the_taps_that_each_layer_reads():
    supernet = Translator(SMALL, 50, sharing="heterogeneous")
    for kind, op in (("C", "conv"), ("A", "add"), ("S", "add")):
        arch = SMALL.pure(kind)
        readers = [(block.light["whole"].taps, op) for block in supernet.encoder]
        torch.testing.assert_close(supernet.divergence(arch), shiftaddnas.mean_divergence(readers))
    assert supernet.divergence(SMALL.pure("T")) == 0
    assert Translator(SMALL, 50, sharing="none").divergence(SMALL.pure("C")) == 0


def copies(supernet):
    """Yield each kind of copy of a supernet."""
    yield copy.deepcopy(supernet)
    file = io.BytesIO()
    torch.save(supernet, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)
    other = Translator(SMALL, 50, sharing="heterogeneous", seed=1)
    other.load_state_dict(copy.deepcopy(supernet.state_dict()), assign=True)
    yield other
    yield torch.optim.swa_utils.AveragedModel(supernet).module


def test_a_supernet_of_translation_and_its_copies_have_equal_gradients_bit_for_bit():
    def gradients(model):
        model.zero_grad()
        loss = model(*token_batch(), ["64: TA-128-4 S-128-4 C-128-4 / 96: TS-128-4-4-2"]).square().mean()
        (loss + model.divergence(SMALL.pure("A"))).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    supernet = Translator(SMALL, 50, sharing="heterogeneous")
    expected = gradients(supernet)
    for model in copies(supernet):
        copied = gradients(model)
        assert copied.keys() == expected.keys()
        assert all(grad.equal(copied[name]) for name, grad in expected.items())


@pytest.mark.parametrize("name, count", [("iwslt14_de_en", 3), ("wmt14_en_de", 1)])
def test_the_iwslt_space_has_three_embeddings_and_the_others_one(name, count):
    with torch.device("meta"):
        network = Translator(TOKEN_SPACES[name], 10)
    assert len({id(p) for p in network.parameters() if p.shape == (10, 1024)}) == count


def test_an_unknown_sharing_and_an_arch_outside_the_space_are_refused():
    with pytest.raises(ValueError, match="unknown sharing 'some'; known: none, naive, heterogeneous"):
        Translator(SMALL, 50, sharing="some")
    with pytest.raises(ValueError, match="must be of the form"):
        Translator(SMALL, 50, "cc/sa/tt")


def test_quantised_layers_read_few_levels_and_pass_gradients():
    x = torch.randn(100, generator=rng(), requires_grad=True)
    y = shiftaddnas.fake_quantise(x, x.min(), x.max(), 3)
    assert len(y.unique()) <= 8 and (y - x).abs().max() <= (x.max() - x.min()) / 14 + 1e-6
    y.sum().backward()
    assert x.grad.eq(1).all()
    network = quantise(Translator(SMALL, 50, SMALL.pure("TA", pick=min)), 8)
    plain = Translator(SMALL, 50, SMALL.pure("TA", pick=min))
    logits = network(*token_batch())
    assert 0 < (logits - plain(*token_batch())).abs().max() < 0.5
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    layers = [(name, layer) for name, layer in network.named_modules() if hasattr(layer, "quantiser")]
    assert all(layer.quantiser.bits == 8 * (".cross." not in name) for name, layer in layers)
    extracted = quantise(Translator(SMALL, 50, sharing="heterogeneous"), 8).eval().extract(SMALL.pure("S"))
    assert extracted.encoder[0].light["whole"].first.quantiser.bits == 8


class Bigrams:
    """Stands for a translator: log p of the next token depends on the last one."""

    def __init__(self, size, seed):
        self.table = torch.randn(size, size, generator=rng(seed)).log_softmax(1)

    def encode(self, source):
        return [source.unsqueeze(2)], source

    def new_caches(self):
        return []

    def decode(self, target, memory, arch, caches):
        return self.table[target]


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_what_brute_force_finds_and_beam_1_is_greedy(seed):
    model = Bigrams(5, seed)
    source = torch.ones(2, 3, dtype=torch.long)
    limit = 4

    def score(words, penalty):
        path = [EOS, *words] + [EOS] * (len(words) < limit)
        return sum(model.table[a, b].item() for a, b in zip(path, path[1:])) / (len(path) - 1) ** penalty

    tokens = [i for i in range(5) if i not in (PAD, EOS)]
    every = [words for n in range(limit + 1) for words in itertools.product(tokens, repeat=n)]
    greedy = []
    last = EOS
    while len(greedy) < limit:
        last = max((i for i in range(5) if i != PAD), key=lambda i: model.table[last, i].item())
        if last == EOS:
            break
        greedy.append(last)
    best = {penalty: list(max(every, key=lambda words: score(words, penalty))) for penalty in (0.0, 0.6, 2.0)}
    for penalty, words in best.items():
        assert beam_search(model, source, 5**limit, penalty, limit) == [words] * 2
        assert beam_search(model, source, 1, penalty, limit) == [greedy] * 2
    assert len({tuple(words) for words in best.values()}) > 1  # the penalty decides

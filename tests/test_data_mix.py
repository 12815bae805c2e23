"""Mixing, phases and packing through the loader: shares, borders of documents, sources that go on and that end."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder import data
from torchladder.data import IGNORE_INDEX, SourceConfig
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.data.mixing.interleave import PhasedInterleave
from torchladder.data.mixing.mixture_weights import MixtureWeights
from torchladder.registry import ConfigError

DEFAULTS = {key: parameter.default for key, parameter in data.registry.parameters("rows").items()}
PACKINGS = ["stream", "pad", "best_fit"]
T, G = 16, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources; every token says which source and which token of it it is."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for source, (name, documents) in enumerate((("a", 40), ("b", 15), ("c", 25))):
        with IndexedWriter(folder / name, np.dtype(np.int32)) as writer:
            at = 10_000 * source
            for length in rng.integers(0, 40, documents):
                writer.add(np.arange(at, at + length))
                at += length
    return folder


def load(folder, names="ab", **changes):
    facts = dict(seq_len=T, split="train", tokenizer=None, dp_rank=0, dp_degree=1, local_batch_size=2)
    facts |= {"global_batch_size": G, "steps": None, "weight_changes": {}}
    facts |= {key: changes.pop(key) for key in list(changes) if key in facts}
    weights = changes.pop("weights", [1.0] * len(names))
    sources = [
        SourceConfig(path=f"{folder}/{name}.bin", label=name, weight=weight)
        for name, weight in zip(names, weights, strict=True)
    ]
    base = {**DEFAULTS, "sources": sources, "validation_sources": [], "cache_folder": str(folder / "cache")}
    base |= {"exclude": [], "domains": {}, "languages": {}}
    return data.registry.build(SimpleNamespace(name="rows", **{**base, **changes}), **facts)


def take(loader, batches):
    """Stacks the next batches to (tokens, labels, positions)."""
    taken = [next(loader) for _ in range(batches)]
    return [torch.cat([getattr(batch, key) for batch in taken]) for key in ("tokens", "labels", "positions")]


def begins(corpus, at):
    """The first token of each document of a source."""
    starts = at + np.cumsum(corpus.lengths) - corpus.lengths
    return starts[corpus.lengths > 0].tolist()


def padding(tokens, positions):
    """Where the padding of a row begins."""
    zeros = [i for i in range(T) if tokens[i:] == [0] * (T - i) and positions[i] == 0]
    return next((i for i in zeros if i or tokens[1] == 0), T)


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_labels_and_positions_follow_the_documents(folder, packing, across, shuffle):
    loader = load(folder, "ac", packing=packing, shuffle=shuffle, labels_across_documents=across)
    firsts = {
        first
        for corpus, at in zip(loader._source_mix.corpora, (0, 20_000), strict=True)
        for first in begins(corpus, at)
    }
    for tokens, labels, positions in zip(*take(loader, 60), strict=True):
        tokens, labels, positions = tokens.tolist(), labels.tolist(), positions.tolist()
        used = padding(tokens, positions)
        if packing == "stream":
            assert used == T
        assert labels[used:] == [IGNORE_INDEX] * (T - used)
        assert positions[used:] == list(range(T - used))
        for i in range(used):
            begins_here = i == 0 or tokens[i] in firsts or tokens[i] != tokens[i - 1] + 1
            assert positions[i] == (0 if begins_here else positions[i - 1] + 1)
            following = tokens[i + 1] if i + 1 < used else None
            if following is None:
                continue
            border = following in firsts or following != tokens[i] + 1
            assert labels[i] == (IGNORE_INDEX if border and not across else following)
        if used < T:
            assert labels[used - 1] == IGNORE_INDEX
        elif labels[-1] != IGNORE_INDEX and labels[-1] not in firsts:
            assert labels[-1] == tokens[-1] + 1
        if not across:
            assert not firsts & set(labels)


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_reads_every_token_once(folder, packing):
    loader = load(folder, "a", packing=packing, local_batch_size=1, global_batch_size=1, repeat=False)
    rows = -(-loader._source_mix.packings[0].rows_per_epoch // 1)
    tokens, _, positions = take(loader, int(rows))
    used = [row[: padding(row, place)] for row, place in zip(tokens.tolist(), positions.tolist(), strict=True)]
    assert sorted(token for row in used for token in row) == list(range(loader._source_mix.corpora[0].num_tokens))
    beyond = next(loader)
    assert (beyond.num_labels, beyond.tokens.any().item()) == (0, False)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("degree", "local"), [(2, 2), (8, 1)])
def test_ranks_and_workers_change_nothing(folder, packing, degree, local):
    settings = {"packing": packing, "weight_changes": {2: [1, 5]}, "steps": 100}
    one = take(load(folder, local_batch_size=8, **settings), 5)
    ranks = [load(folder, dp_rank=d, dp_degree=degree, local_batch_size=local, **settings) for d in range(degree)]
    parts = [[take(rank, G // degree // local) for rank in ranks] for _ in range(5)]
    for key in range(3):
        assert torch.equal(torch.cat([part[key] for step in parts for part in step]), one[key])
    worked = load(folder, local_batch_size=8, num_workers=2, **settings)
    worked.seek(16)
    for ours, rows in zip(take(worked, 3), one, strict=True):
        assert torch.equal(ours, rows[16:])


@pytest.mark.parametrize("packing", PACKINGS)
def test_validation_honours_the_packing(folder, packing):
    validation = [SourceConfig(path=f"{folder}/{name}.bin") for name in "bc"]
    loader = load(
        folder, split="validation", validation_sources=validation, packing=packing, labels_across_documents=False
    )
    batches = list(loader)
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    lengths = np.concatenate([corpus.lengths for corpus in loader._source_mix.corpora])
    assert int((labels != IGNORE_INDEX).sum()) == int(np.maximum(lengths - 1, 0).sum())
    assert len(batches) == -(-loader.num_rows // G) * G // 2


def test_the_report_tells_how_full_rows_are(folder):
    _, line, *_ = load(folder, packing="pad").describe()
    efficiency = load(folder, packing="pad")._source_mix.packings[0].efficiency
    assert f"rows {efficiency:.1%} full" in line
    assert "of the documents cut" in line
    assert "full" not in load(folder).describe()[1]


def test_masked_tokens_are_inputs_but_not_labels(folder, tmp_path):
    parquet, file = pytest.importorskip("pyarrow.parquet"), tmp_path / "silent.parquet"
    columns = {"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": [[-100, -100, 3, 4], [-100, 6, -100, 8]]}
    parquet.write_table(pytest.importorskip("pyarrow").table(columns), file)
    loader = load(folder, "a", seq_len=4, shuffle=False, sources=[SourceConfig(path=str(file))])
    tokens, labels, _ = take(loader, 1)
    assert tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert labels.tolist() == [[IGNORE_INDEX, 3, 4, IGNORE_INDEX], [6, IGNORE_INDEX, 8, IGNORE_INDEX]]


# --- phases ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    st.lists(st.integers(1, 60), min_size=4, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_phases_continue_sources_where_they_were(shares, lengths):
    firsts = [sum(lengths[:i]) for i in range(len(shares))]
    mixed = PhasedInterleave(shares, firsts)
    seen = Counter()
    for row in range(sum(lengths[: len(shares)])):
        assert mixed.counts(row) == [seen[i] for i in range(3)]
        source, index = mixed(row)
        assert index == seen[source]  # the next one, in whichever phase
        seen[source] += 1
        phase = max(i for i, first in enumerate(firsts) if first <= row)
        before = mixed.counts(firsts[phase])
        for i, share in enumerate(shares[phase]):
            exact = Fraction(share, sum(shares[phase])) * (row + 1 - firsts[phase])
            assert abs(seen[i] - before[i] - exact) < 1


def test_rows_before_a_phase_are_as_without_it(folder):
    plain, phased = load(folder), load(folder, steps=50, weight_changes={3: {"a": 0, "b": 1}})
    for ours, without in zip(take(phased, 12), take(plain, 12), strict=True):
        assert torch.equal(ours, without)
    tokens = take(phased, 8)[0]
    assert tokens.min() >= 10_000
    *_, mixture, first, second, _, _ = phased.describe()
    assert "from step 3: a 0.0%, b 100.0%" in mixture
    read = {(one.step, one.source): one.epochs for one in phased.usage()}
    assert first == f"  epochs of steps 0 to 2: a 0.00 to {read[0, 'a']:.2f}, b 0.00 to {read[0, 'b']:.2f}"
    assert second == f"  epochs of steps 3 to 49: b {read[0, 'b']:.2f} to {read[0, 'b'] + read[3, 'b']:.2f}"


def test_a_phase_without_weights_leaves_the_rows_alone(folder):
    plain, phased = load(folder), load(folder, steps=50, weight_changes={3: None})
    assert phased.fingerprints() == plain.fingerprints()
    for ours, without in zip(take(phased, 20), take(plain, 20), strict=True):
        assert torch.equal(ours, without)


@given(st.integers(0, 12), st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_resuming_in_any_phase_equals_running_through(folder, step, packing):
    settings = {"weight_changes": {2: [1, 9], 6: [1, 0], 18: None}, "steps": 20, "packing": PACKINGS[packing % 3]}
    through, sought = load(folder, **settings), load(folder, **settings)
    take(through, 4 * step) if step else None
    sought.seek(step * G)
    for ours, theirs in zip(take(through, 5), take(sought, 5), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2, 3], "there are 2 sources"),
        ({"a": 1}, "source_weights lacks b; a weight of 0 leaves a source out"),
        ({"a": 1, "bb": 1}, "unknown source 'bb' in phases.source_weights. Did you mean 'b'"),
        ([0, 0], "weights are"),
        ([1, -1], "0 or more"),
    ],
)
def test_weights_of_a_phase_that_do_not_fit_the_sources(folder, weights, message):
    with pytest.raises(ConfigError, match=message):
        load(folder, steps=20, weight_changes={1: weights})


def test_a_source_that_the_run_never_reads_is_warned_of(folder, caplog):
    load(folder, "abc", weights=[1.0, 1.0, 0.01], steps=40)
    assert not [one for one in caplog.messages if "gets none" in one]
    load(folder, "abc", weights=[1.0, 1.0, 1e-4], steps=40)
    load(folder, "abc", weights=[1.0, 1.0, 1e-4], steps=40)
    assert caplog.messages.count("the source c gets none of the run's 320 rows: its proportion is at most 5e-05") == 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_share_of_rows_with_boundaries_is_that_of_the_rows(folder, packing):
    """All rows are sampled where a source has fewer than SAMPLED_ROWS; a single long document has no boundaries."""
    with IndexedWriter(folder / "long", np.dtype(np.int32)) as writer:
        for at in range(30_000, 30_000 + 40 * T, T):
            writer.add(np.arange(at, at + T))
    loader = load(folder, "a", packing=packing, local_batch_size=1, global_batch_size=1, repeat=False, shuffle=False)
    rows = int(-(-loader._source_mix.packings[0].rows_per_epoch // 1))
    tokens, _, positions = take(loader, rows)
    inside = sum(
        any(place == 0 for place in row[1 : padding(content, row)])
        for content, row in zip(tokens.tolist(), positions.tolist(), strict=True)
    )
    assert rows <= 64
    assert loader.boundary_shares() == {"a": pytest.approx(inside / rows)}
    assert load(folder, sources=[SourceConfig(path=f"{folder}/long.bin")], packing=packing).boundary_shares() == {
        f"{folder}/long.bin": 0
    }


# --- how much there is -----------------------------------------------------------------------------------------------


def test_usage_tells_tokens_and_epochs_of_each_phase(folder):
    loader = load(folder, steps=40, weight_changes={10: [0, 1], 30: [1, 1]})
    tokens = [corpus.num_tokens for corpus in loader._source_mix.corpora]
    found = loader.usage()
    assert [(one.step, one.steps, one.source) for one in found] == [
        (0, 10, "a"), (0, 10, "b"), (10, 20, "a"), (10, 20, "b"), (30, 10, "a"), (30, 10, "b"),
    ]  # fmt: skip
    assert [one.tokens for one in found] == [40 * T, 40 * T, 0, 160 * T, 40 * T, 40 * T]
    assert [one.epochs for one in found] == pytest.approx([one.tokens / tokens[one.source == "b"] for one in found])
    assert found[5].epochs_before == pytest.approx(200 * T / tokens[1])


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_source_that_does_not_repeat_ends_the_run_before_it_begins(folder, packing):
    free = load(folder, packing=packing)
    rows = int(-(-free._source_mix.packings[1].rows_per_epoch // 1))
    enough = 2 * rows // G  # half of the rows are of b
    changes = {"packing": packing, "sources": [free.sources[0], replace(free.sources[1], repeat=False)]}
    load(folder, steps=enough, **changes)
    with pytest.raises(
        ConfigError, match=rf"source b runs out at step \d+ of {enough + 20}, [\d,]+ tokens are missing"
    ) as e:
        load(folder, steps=enough + 20, **changes)
    step = int(str(e.value).split("at step ")[1].split()[0])
    load(folder, steps=step, **changes)
    with pytest.raises(ConfigError, match="runs out"):
        load(folder, steps=step + 1, **changes)


def test_missing_tokens_are_exact(folder):
    tokens = load(folder, "a")._source_mix.corpora[0].num_tokens
    with pytest.raises(
        ConfigError, match=f"source a runs out at step {tokens // T // G} of 100, {100 * G * T - tokens:,} t"
    ):
        load(folder, "a", steps=100, repeat=False)


@given(st.floats(0.3, 4), st.sampled_from(PACKINGS))
@settings(max_examples=10, deadline=None)
def test_steps_follow_from_epochs(folder, epochs, packing):
    loader = load(folder, "abc", packing=packing)
    rows = sum(packed.rows_per_epoch for packed in loader._source_mix.packings)
    steps = loader.steps_for(epochs)
    assert (steps - 1) * G < epochs * rows <= steps * G
    assert load(folder, "abc", packing=packing, repeat=False).steps_for(epochs) == max(int(epochs * rows // G), 1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_one_epoch_of_everything_fits_exactly(folder, packing):
    """In proportion to their sizes, all sources end together."""
    settings = {"temperature": 1.0, "packing": packing, "repeat": False, "names": "abc"}
    steps = load(folder, **settings).steps_for(1)
    loader = load(folder, steps=steps, **settings)
    for one in loader.usage():
        assert one.epochs == pytest.approx(1, abs=0.2)


# --- domains ---------------------------------------------------------------------------------------------------------


def shares(sources, sizes, **settings):
    sources = [SourceConfig(name="text", path=f"{i}", **source) for i, source in enumerate(sources)]
    decides = MixtureWeights(**settings)
    decides.validate(sources)
    return decides.proportions(sources, [Fraction(size) for size in sizes])


ALLAM = [
    dict(language="en", domain="web"),
    dict(language="en", domain="math"),
    dict(language="ar", domain="web"),
    dict(language="ar", domain="books"),
]
SIZES = [12_040_045_571, 5_157_493, 777_777_777, 31_500_000]
MULTIPLIERS = {"en": {"web": 1.0, "math": 2.5}, "ar": {"web": 1.0, "books": 4.0}}


def test_shares_are_tokens_times_multiplier_within_a_language():
    found = shares(ALLAM, SIZES, domains=MULTIPLIERS, languages={"en": 6, "ar": 4})
    times = [MULTIPLIERS[one["language"]][one["domain"]] * size for one, size in zip(ALLAM, SIZES, strict=True)]
    english, arabic = sum(times[:2]), sum(times[2:])
    expected = [times[0] / english * 0.6, times[1] / english * 0.6, times[2] / arabic * 0.4, times[3] / arabic * 0.4]
    assert list(map(float, found)) == pytest.approx(expected, rel=1e-12)
    assert sum(found) == 1


def test_a_domain_may_have_one_multiplier_in_all_languages():
    everywhere = shares(ALLAM, SIZES, domains={"web": 1.0, "math": 2.5, "books": 4.0}, languages={"en": 6, "ar": 4})
    assert everywhere == shares(ALLAM, SIZES, domains=MULTIPLIERS, languages={"en": 0.6, "ar": 0.4})
    own = shares(ALLAM, SIZES, domains={"web": 9.0, "math": 2.5, "books": 4.0, "en": {"web": 1.0}})
    assert own == shares(ALLAM, SIZES, domains={"en": {"web": 1.0, "math": 2.5}, "ar": {"web": 9.0, "books": 4.0}})


def test_temperature_evens_out_languages_and_else_sources():
    by_language = shares(ALLAM, [60, 30, 8, 2], temperature=2.0)
    assert float(by_language[0] + by_language[1]) == pytest.approx(90**0.5 / (90**0.5 + 10**0.5))
    assert by_language[0] / by_language[1] == 2
    by_source = shares([{}, {}], [90, 10], temperature=2.0)
    assert float(by_source[0]) == pytest.approx(0.75)
    assert shares([{}, {}], [90, 10], temperature=1.0) == [Fraction(9, 10), Fraction(1, 10)]
    assert shares([{"weight": 2.0}, {}], [90, 10], temperature=1.0) == [Fraction(18, 19), Fraction(1, 19)]
    assert shares([{"weight": 3.0}, {}], [90, 10]) == [Fraction(3, 4), Fraction(1, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": {"en": 1, "ar": 1, "lv": 1}}, "unknown language 'lv' in data.languages, which no source has"),
        ({"languages": {"en": 1}}, "unknown language 'ar' in the source "),
        ({"languages": {"en": 1, "ar": 0}}, "languages.ar = 0: must be"),
        ({"languages": {"en": 1, "ar": 1}, "temperature": 2.0}, "languages and temperature both"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"domains": {**MULTIPLIERS, "lv": {"web": 1.0}}}, "language 'lv' in data.domains, which no source has"),
        ({"domains": {"en": {}, "web": 1.0}}, "domains.en is empty"),
        (
            {"domains": {"en": {"web": 1.0, "maths": 1.0}, "web": 1.0}},
            "domain 'maths' in data.domains.en, which no source has. Did you",
        ),
        (
            {"domains": {"web": 1.0, "maht": 1.0}},
            "domain 'maht' in data.domains, which no source has. Did you mean 'math'",
        ),
        ({"domains": {"web": 1.0, "math": 1.0}}, "domain 'books' in the source .*, without a multiplier"),
        ({"domains": {"web": -1.0, "math": 1.0, "books": 1.0}}, "domains.web = -1.0"),
    ],
)
def test_invalid_domains(changes, message):
    with pytest.raises(ConfigError, match=message):
        shares(ALLAM, SIZES, **changes)


def test_sources_need_what_is_asked_of_them():
    with pytest.raises(ConfigError, match="needs a language"):
        shares([{}, {"language": "en"}], [1, 1], languages={"en": 1})
    with pytest.raises(ConfigError, match="needs a domain"):
        shares([{}, {"domain": "web"}], [1, 1], domains={"web": 1})


def test_the_loader_mixes_by_domains(folder):
    sources = [
        SourceConfig(path=f"{folder}/{name}.bin", label=name, language=language, domain="web")
        for name, language in (("a", "en"), ("b", "en"), ("c", "ar"))
    ]
    loader = load(folder, sources=sources, domains={"web": 1.0}, languages={"en": 3, "ar": 1})
    tokens = [corpus.num_tokens for corpus in loader._source_mix.corpora]
    shares = loader._source_mix.interleave.proportions[0]
    assert shares == [Fraction(3 * n, 4 * (tokens[0] + tokens[1])) for n in tokens[:2]] + [Fraction(1, 4)]


def test_excluded_sources_are_gone(folder):
    full = load(folder, "ac")
    loader = load(folder, "abc", exclude=["b"], steps=9, weight_changes={2: {"a": 1, "b": 5, "c": 1}})
    assert [corpus.label for corpus in loader._source_mix.corpora] == ["a", "c"]
    assert torch.equal(next(loader).tokens, next(full).tokens)
    with pytest.raises(ConfigError, match=r"unknown entry 'bb' in data\.exclude"):
        load(folder, exclude=["bb"])
    with pytest.raises(ConfigError, match="leaves no source"):
        load(folder, exclude=["a", "b"])


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_names_what_differs(folder):
    base = load(folder, steps=50, weight_changes={9: [1, 3]}).fingerprints()
    for key, changes in {
        "phases": {"weight_changes": {10: [1, 3]}},
        "weights": {"weights": [2.0, 1.0]},
        "packing": {"packing": "pad"},
        "labels_across_documents": {"labels_across_documents": False},
        "repeat": {"repeat": False, "steps": None},
        "seed": {"seed": 1},
    }.items():
        settings = {"steps": 50, "weight_changes": {9: [1, 3]}, **changes}
        changed = load(folder, **settings).fingerprints()
        assert {name for name in base if changed[name] != base[name]} == {key}


def test_a_source_that_no_phase_reads_is_an_error(folder):
    with pytest.raises(ConfigError, match="source b is never read"):
        load(folder, weights=[1.0, 0.0])
    late = load(folder, weights=[1.0, 0.0], steps=9, weight_changes={4: [1, 1]})
    assert late.usage()[1].tokens == 0

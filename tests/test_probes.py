"""Rows of long-context probes: where the answer is, what the filler lacks, and that they are always the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder import probes
from torchladder.probes import DEPTHS, ProbePoint, ProbeTokens, make_row
from torchladder.registry import ConfigError

VOCABULARY = np.arange(7, 300, 2)
TEXT = ProbeTokens.from_text(VOCABULARY, np.random.default_rng(0).integers(0, 100, 2000))

rows = st.tuples(st.sampled_from(["needle", "copy", "repeat"]), st.integers(64, 700), st.booleans(), st.integers(0, 50))


def places(row, span):
    return [i for i in range(len(row) - len(span) + 1) if np.array_equal(row[i : i + len(span)], span)]


@settings(max_examples=40)
@given(rows, st.integers(0, 1 << 40))
def test_the_answer_is_where_the_point_says_and_its_cue_nowhere_else(chosen, seed):
    name, context, with_text, number = chosen
    probe = probes.registry.get(name)()
    tokens = TEXT if with_text or probe.needs_text else ProbeTokens(VOCABULARY)
    for point in probe.points(context):
        row = make_row(name, point, tokens, number, seed)
        assert (row.shape, row.dtype) == ((context + 1,), np.int64)
        assert np.isin(row, tokens.vocabulary).all()
        size = probe.cue + probe.answer
        first, second = point.first - probe.cue, point.second - probe.cue
        assert 0 <= first <= second - size
        assert second + size == context + 1  # the last answer ends the row
        assert np.array_equal(row[first : first + size], row[second:])
        found = places(row, row[second : point.second])
        assert {first, second} <= set(found)
        if probe.unique_cue:
            assert found == [first, second]
        if name == "needle" and tokens.text is not None:  # a piece of the text everywhere else
            filler = np.r_[row[:first], np.full(size, -1), row[first + size : second]]
            pieces = np.lib.stride_tricks.sliding_window_view(tokens.text, len(row))[:, :second]
            assert ((pieces == filler) | (filler == -1)).all(1).any()


@given(st.integers(64, 5000))
def test_points_cover_the_row(context):
    needle, copy = (probes.registry.get(name)() for name in ("needle", "copy"))
    points = needle.points(context)
    assert [point.depth for point in points] == list(DEPTHS)
    assert (points[0].first, points[-1].second - points[-1].first) == (
        4,
        8,
    )  # from the start to just before the question
    assert len({point.distance for point in points}) == len(points)
    distances = [point.distance for point in copy.points(context)]
    assert distances == [32 << power for power in range(len(distances))]
    assert 32 + distances[-1] <= context + 1 < 32 + 2 * distances[-1]


def test_rows_depend_on_all_that_they_are_made_of_and_on_nothing_else():
    tokens = ProbeTokens(VOCABULARY)
    point, other = probes.registry.get("needle")().points(100)[3:5]
    row = make_row("needle", point, tokens, 5, 1)
    np.random.seed(3)
    assert np.array_equal(make_row("needle", point, ProbeTokens(VOCABULARY.copy()), 5, 1), row)
    for changed in ((point, tokens, 6, 1), (point, tokens, 5, 2), (other, tokens, 5, 1), (point, TEXT, 5, 1)):
        assert not np.array_equal(make_row("needle", *changed), row)


def test_known_rows():
    """A change of these rows changes results: increment ``PROBE_VERSION``."""
    point = probes.registry.get("needle")().points(40)[0]
    assert make_row("needle", point, ProbeTokens(np.arange(100)), 0, 0)[:8].tolist() == [83, 98, 29, 64, 11, 48, 57, 70]


def test_random_tokens_are_those_of_the_text():
    tokens = ProbeTokens.from_text(np.array([1, 2, 3, 9]), np.array([2, 0, 3, 3, 8, 2], dtype=np.uint16))
    assert tokens.text.tolist() == [2, 3, 3, 2]
    assert tokens.vocabulary.tolist() == [2, 3]


def test_too_few_tokens_are_an_error():
    point = probes.registry.get("copy")().points(500)[0]
    with pytest.raises(ConfigError, match="3 different tokens are too few for a probe of 500 tokens: a cue of 4"):
        make_row("copy", point, ProbeTokens(np.arange(3)), 0, 0)


def test_unknown_names_and_short_contexts_are_errors():
    with pytest.raises(ConfigError, match=r"unknown probe 'needel'\. Did you mean 'needle'\? Known: copy, needle, rep"):
        probes.registry.build_all(["needel"], [])
    with pytest.raises(ConfigError, match="a context of 31 tokens is too short for the probe 'needle': it takes 32"):
        probes.registry.build_all(["needle"], [64, 31])
    assert list(probes.registry.build_all(["needle", "copy", "needle"], [64])) == ["needle", "copy"]


def test_the_shortest_contexts_hold_a_row():
    for name in ("needle", "copy", "repeat"):
        probe = probes.registry.get(name)()
        points = probe.points(probe.min_context)
        assert points
        for point in points:
            assert make_row(name, point, TEXT, 0, 0).shape == (probe.min_context + 1,)


def test_a_plugin_adds_a_probe(monkeypatch):
    monkeypatch.setattr(probes.registry, "_components", dict(probes.registry._components))

    @probes.register("ends")
    class Ends(probes.Needle):
        """The needle at both ends."""

        def points(self, context):
            return [ProbePoint(context, 4, context - 3, 0.0)]

    assert "ends" in probes.registry.names()
    (point,) = probes.registry.get("ends")().points(64)
    row = make_row("ends", point, ProbeTokens(VOCABULARY), 0, 0)
    assert np.array_equal(row[:8], row[-8:])

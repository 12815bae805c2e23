"""The stages of a pipeline, the order of its passes, and how long its ranks wait."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.distributed.mesh import ParallelismConfig
from torchladder.distributed.pipeline_layout import STAGES_PER_RANK, PipelineLayout, pipeline_layout
from torchladder.registry import ConfigError


def layout(degree, layers, rows, schedule="1F1B", **settings):
    named = {f"pipeline_parallel_{key}": value for key, value in settings.items()}
    config = ParallelismConfig(pipeline_parallel_degree=degree, pipeline_parallel_schedule=schedule, **named)
    return pipeline_layout(config, [str(number) for number in range(layers)], rows)


def sizes(found):
    return [len(stage) for stage in found.stages]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(STAGES_PER_RANK)), st.integers(2, 4), st.integers(0, 12), st.integers(1, 4))
def test_every_pass_runs_once_after_those_it_needs(schedule, degree, more_layers, rounds):
    stages = degree * min(STAGES_PER_RANK[schedule])
    found = layout(degree, stages + more_layers, rounds * stages, schedule)
    assert [name for stage in found.stages for name in stage] == [str(n) for n in range(stages + more_layers)]
    assert max(sizes(found)) - min(sizes(found)) <= 2  # embedding and head count as a layer each
    ends = {}
    for rank, passes in enumerate(found.timeline()):
        assert {one.stage for one in passes} == {*found.stages_of(rank)}
        assert all(before.end <= after.begin for before, after in pairwise(passes))
        for stage in found.stages_of(rank):  # as ``Stage`` takes them
            order = [one.micro_batch for one in passes if (one.stage, one.kind) == (stage, "F")]
            assert order == list(range(found.num_micro_batches))
        ends |= {(one.stage, one.kind, one.micro_batch): one for one in passes}
    for (stage, kind, micro_batch), one in ends.items():
        if kind == "F" and stage:
            assert ends[stage - 1, "F", micro_batch].end <= one.begin
        elif kind == "W":
            assert ends[stage, "I", micro_batch].end <= one.begin
        elif kind in "BI":
            needed = (stage, "F") if stage == stages - 1 else (stage + 1, kind)
            assert (ends.get((*needed, micro_batch)) or ends[stage + 1, "B", micro_batch]).end <= one.begin
    kinds = [kind for _, kind, _ in ends]
    assert kinds.count("F") == kinds.count("B") + kinds.count("I") == stages * found.num_micro_batches
    assert kinds.count("I") == kinds.count("W")


@pytest.mark.parametrize(("degree", "count"), [(2, 2), (4, 8), (3, 7)])
def test_the_idle_time_is_that_of_the_papers(degree, count):
    # arXiv 2104.04473: (p - 1) / (m + p - 1), with v stages per rank (p - 1) / (v m + p - 1).
    for schedule in ("1F1B", "GPipe"):
        assert layout(degree, 24, count, schedule).bubble() == pytest.approx((degree - 1) / (count + degree - 1))
    even = layout(degree, 24, count - count % degree, "Interleaved1F1B")
    assert even.bubble() == pytest.approx((degree - 1) / (2 * even.num_micro_batches + degree - 1))
    assert layout(degree, 24, count, "ZBVZeroBubble").bubble() < even.bubble()


def test_the_slowest_stage_sets_the_pace():
    found = layout(2, 2, 4)
    assert found.bubble([1.0, 1.0]) == pytest.approx(1 / 5)
    # The second stage takes 4 x 4.5; before it a forward pass of the first, after it a backward pass.
    assert found.bubble([0.5, 1.5]) == pytest.approx(1 - (4 * 1.5 + 18) / (2 * (0.5 + 18 + 1)))


def test_micro_batches_in_flight():
    assert [layout(4, 8, 8).in_flight(rank) for rank in range(4)] == [{0: 4}, {1: 3}, {2: 2}, {3: 1}]
    assert [layout(2, 8, 8, "GPipe").in_flight(rank) for rank in range(2)] == [{0: 8}, {1: 8}]
    assert layout(2, 8, 8, "ZBVZeroBubble").in_flight(0) == {0: 4, 3: 1}


def test_stages():
    assert layout(1, 8, 8) is None
    assert sizes(layout(2, 8, 4)) == [4, 4]
    assert sizes(layout(4, 4, 4)) == [1, 1, 1, 1]
    assert sizes(layout(4, 22, 8, "Interleaved1F1B")) == [2, 3, 3, 3, 3, 3, 3, 2]
    assert sizes(layout(2, 9, 4, first_stage_less_layers=3, last_stage_less_layers=0)) == [3, 6]
    assert sizes(layout(2, 10, 4, "Interleaved1F1B", layers_per_stage=2)) == [1, 2, 2, 2, 2, 1]
    points = layout(2, 8, 4, split_points=["layers.3"])
    assert points.stages == (("0", "1", "2"), ("3", "4", "5", "6", "7"))
    found = layout(2, 8, 4, "ZBVZeroBubble")
    assert [found.stages_of(rank) for rank in range(2)] == [[0, 3], [1, 2]]
    assert (found.last_rank, layout(2, 8, 4, "Interleaved1F1B").last_rank) == (0, 1)
    assert found.part_of(0) == (["0", "1", "7"], True, True)
    assert layout(2, 8, 4).part_of(1) == (["4", "5", "6", "7"], False, True)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((4, 3, 4), {}, "4 stages of 3 layers: a stage has at least one layer"),
        ((2, 8, 3), {"microbatch_size": 2}, "microbatch_size = 2 does not divide training.local_batch_size = 3"),
        ((4, 8, 2), {}, "does not take 2 micro-batches .* Set training.local_batch_size to 4 or 5"),
        ((4, 8, 6), {"microbatch_size": 3}, "Set training.local_batch_size to 12 or 15"),
        ((4, 8, 9, "Interleaved1F1B"), {}, "does not take 9 micro-batches .* to 8 or 10"),
        ((2, 8, 4), {"layers_per_stage": 2}, "2 makes 5 stages of 8 layers, and 1F1B on 2 ranks takes 2 stages"),
        ((2, 8, 4, "ZBVZeroBubble"), {"layers_per_stage": 5}, "makes 2 stages .* on 2 ranks takes 4 stages"),
        ((2, 8, 4), {"split_points": ["layers.3", "layers.5"]}, "makes 3 stages, and 1F1B on 2 ranks takes 2 stages"),
        ((2, 8, 4), {"split_points": ["layer.3"]}, "'layer.3'.*layers.3"),
        ((2, 8, 4), {"split_points": ["layers.0"]}, "layers.0"),
        ((3, 8, 4), {"split_points": ["layers.5", "layers.3"]}, "list the layers in order"),
        ((2, 8, 4), {"split_points": ["layers.3"], "layers_per_stage": 5}, "set one of them"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(arguments, settings, message):
    with pytest.raises(ConfigError, match=message):
        layout(*arguments, **settings)


def test_one_more_layer_goes_where_there_is_least():
    assert PipelineLayout("1F1B", 2, (("0",), ("1",)), 2).layers_of(1) == ["1"]
    assert sizes(layout(2, 9, 4)) == [5, 4]

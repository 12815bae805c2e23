"""Layers of several types: each with its masks, window and RoPE theta, and its own mask once per batch."""

import json
import re
from dataclasses import replace

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from torchladder import config, mask, models
from torchladder.batch_schedule import BatchSchedule
from torchladder.commands import evaluate
from torchladder.commands import plan as command
from torchladder.config import SamplesConfig
from torchladder.inference.decoding import IncrementalDecoder, generate
from torchladder.inference.trained_model import TrainedModel
from torchladder.models import attention
from torchladder.models.attention import kv_cache
from torchladder.models.layer_types import expand_layer_types
from torchladder.registry import ConfigError
from torchladder.schedule import Phase, Schedule
from torchladder.training import run_plan

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
T, CPU = 24, torch.device("cpu")
SHAPE = models.LlamaConfig(dim=16, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=40, init_std=0.3)
MIXED = replace(SHAPE, layer_types=[SLIDING, FULL], initialization="normal")
MASKS = st.lists(st.sampled_from(["causal", "document", "chunk", "sliding"]), min_size=1, max_size=2)
POSITIONS = torch.cat([torch.arange(n, dtype=torch.int32) for n in (5, 1, 11, 7)]).repeat(2, 1)


def build(shape, kernels):
    model = models.Llama(shape, {name: kernel.attention for name, kernel in kernels.items()}, seq_len=T)
    model.init_weights(0)
    return model


def kernels_of(masks, name):
    return {key: attention.build_kernel(name, names, CPU) for key, names in masks.items()}


def prepare(kernels, starts):
    return {name: kernel.prepare(starts[name], CPU) for name, kernel in kernels.items()}


def tokens(rows=2, seed=0):
    return torch.randint(40, (rows, T), generator=torch.Generator().manual_seed(seed))


# --- the types of a model --------------------------------------------------------------------------------------------


def test_a_pattern_fills_the_layers():
    assert expand_layer_types(None, 2) == [FULL, FULL]
    assert expand_layer_types([SLIDING, SLIDING, FULL], 6) == [SLIDING, SLIDING, FULL] * 2
    assert models.Llama(MIXED).layer_types == [SLIDING, FULL, SLIDING, FULL]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": [SLIDING, SLIDING, FULL]}, "3 types, which do not fill model.n_layers = 4"),
        ({"layer_types": []}, "0 types"),
        ({"layer_types": ["slidng_attention", FULL]}, "unknown layer type 'slidng_attention'.*Did you mean 'sliding"),
        ({"layer_types": [SLIDING, CHUNKED]}, "of several types, one must be full_attention"),
        ({"layer_types": [SLIDING], "layer_rope_theta": {SLIDING: 9.0}}, "all layers are of one type"),
        ({"layer_rope_theta": {CHUNKED: 9.0}}, "unknown layer type 'chunked_attention' in model.layer_rope_theta"),
        ({"layer_rope_theta": {SLIDING: 0.0}}, "must be positive"),
        ({"layer_rope_theta": {SLIDING: 9.0}, "positional_embedding": "none"}, "has no RoPE"),
    ],
)
def test_types_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(MIXED, **changes)


def test_a_model_of_one_type_is_the_model_without_types():
    causal = mask.dense(mask.causal(POSITIONS, 1))[:, None]
    plain, one = (models.Llama(replace(SHAPE, layer_types=types), seq_len=T) for types in (None, [FULL]))
    sliding = models.Llama(replace(SHAPE, layer_types=[SLIDING]), attention.dense.DenseKernel.attention, seq_len=T)
    for model in (plain, one, sliding):
        model.init_weights(0)
    assert torch.equal(plain(tokens(), None), one(tokens(), None))
    torch.testing.assert_close(sliding(tokens(), causal), plain(tokens(), None))
    assert list(plain.state_dict()) == list(one.state_dict())


# --- masks -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(MASKS, MASKS, st.integers(1, T), st.integers(1, T))
def test_each_layer_attends_under_the_mask_of_its_type(full, sliding, window, narrow):
    """sdpa against dense, in the loss and all gradients; the pairs against a count over layers."""
    masks, windows = {FULL: full, SLIDING: sliding}, {FULL: window, SLIDING: narrow}
    starts = mask.from_types(masks, POSITIONS, windows.get)
    results = []
    for name in ("sdpa", "dense"):
        kernels = kernels_of(masks, name)
        model = build(MIXED, kernels)
        loss = model(tokens(), prepare(kernels, starts), tokens(seed=1))
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    seen = sum(int(mask.dense(starts[name]).sum()) for name in model.layer_types)
    assert mask.layer_pairs(starts, {FULL: 2, SLIDING: 2}) == seen
    per_pair = 12 * SHAPE.n_heads * SHAPE.head_size
    assert model.flops(0, seen) == sum(per_pair * int(mask.dense(starts[name]).sum()) for name in model.layer_types)


@settings(max_examples=30, deadline=None)
@given(MASKS, MASKS, st.integers(1, T), st.integers(1, T), st.integers(0, T - 1))
@torch.no_grad()
def test_a_token_reaches_only_what_a_chain_of_layers_reaches(full, sliding, window, narrow, changed):
    masks, windows = {FULL: full, SLIDING: sliding}, {FULL: window, SLIDING: narrow}
    starts = mask.from_types(masks, POSITIONS, windows.get)
    kernels = kernels_of(masks, "dense")
    model, attn_mask = build(MIXED, kernels), prepare(kernels, starts)
    reached = torch.zeros(2, T, dtype=torch.bool)
    reached[:, changed] = True
    for name in model.layer_types:
        reached = (mask.dense(starts[name]) & reached[:, None]).any(-1)
    before, after = tokens(), tokens()
    after[:, changed] = (after[:, changed] + 7) % 40
    apart = (model(before, attn_mask) != model(after, attn_mask)).any(-1)
    assert not (apart & ~reached).any()
    assert apart[:, changed].all()


@torch.no_grad()
def test_a_type_has_its_own_rope_theta():
    both = mask.from_types({FULL: ["causal"], SLIDING: ["causal"]}, POSITIONS, lambda name: T)
    kernels = kernels_of({name: ["causal"] for name in both}, "dense")
    attn_mask = prepare(kernels, both)

    def logits(theta=10_000.0, own=None, scheduled=None, offset=0):
        model = build(replace(MIXED, rope_theta=theta, layer_rope_theta=own), kernels)
        if scheduled:
            model.set_rope_theta(scheduled)
        return model(tokens(), attn_mask)

    plain, own = logits(), logits(own={SLIDING: 50.0})
    assert torch.equal(logits(own={SLIDING: 10_000.0}), plain)
    assert (own - plain).abs().max() > 1e-3
    assert torch.equal(logits(theta=50.0, own={FULL: 10_000.0}), own)  # the same, said of the other type
    assert torch.equal(logits(theta=7.0, own={SLIDING: 50.0}, scheduled=10_000.0), own)  # a schedule moves the rest


def test_one_graph_per_type_serves_the_whole_ladder():
    torch._dynamo.reset()
    counters.clear()
    masks = {FULL: ["document", "chunk"], SLIDING: ["chunk"]}
    kernels = {name: attention.build_kernel("auto", names, CPU) for name, names in masks.items()}
    assert [kernel.name for kernel in kernels.values()] == ["sdpa", "fold"]
    model = build(MIXED, kernels)
    for block in model.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    for window in (1, 2, 3, 7, 11, 24):
        starts = mask.from_types(masks, POSITIONS, {FULL: window, SLIDING: max(window // 2, 1)}.get)
        model(tokens(), prepare(kernels, starts), tokens()).backward()
    assert counters["stats"]["unique_graphs"] == 2


# --- the cache -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    MASKS,
    st.integers(1, T),
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from([None, {SLIDING: 50.0}]),
)
@torch.no_grad()
def test_a_cache_of_each_type_keeps_what_its_layers_see(sliding, narrow, cuts, own):
    masks, row = {FULL: ["causal"], SLIDING: sliding}, torch.arange(T, dtype=torch.int32)[None]
    starts = mask.from_types(masks, row, {FULL: T, SLIDING: narrow}.get)
    kernels, caches = kernels_of(masks, "dense"), {name: kv_cache.KVCache() for name in masks}
    shape = replace(MIXED, layer_rope_theta=own)
    slow, fast = build(shape, kernels), build(shape, caches)
    slots = {name: min(int((row[0] - start[0]).max()) + 6, T) for name, start in starts.items()}
    rows = [tokens(1)[0, : sum(cut)] for cut in cuts]
    found = [[] for _ in rows]
    for part in range(max(map(len, cuts))):
        first = [sum(cut[:part]) for cut in cuts]
        lengths = [sum(cut[part : part + 1]) for cut in cuts]
        chunks = [one[begin : begin + length] for one, begin, length in zip(rows, first, lengths, strict=True)]
        fast.set_position_offset(torch.tensor(first))
        forms = {name: kv_cache.decode_mask(start[0], first, lengths, slots[name]) for name, start in starts.items()}
        logits = fast(torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True), forms)
        for known, new, length in zip(found, logits, lengths, strict=True):
            known.append(new[:length])
    for one, logits in zip(rows, found, strict=True):
        expected = slow(one[None], prepare(kernels, {name: start[:, : len(one)] for name, start in starts.items()}))
        torch.testing.assert_close(torch.cat(logits), expected[0], atol=2e-5, rtol=1e-4)
    for keys, _ in caches[SLIDING]._layers:
        assert not keys[:, :, slots[SLIDING] :].any()  # nothing older than the window and a chunk


def test_a_sliding_layer_keeps_its_window_and_a_chunk():
    row = torch.arange(32_768, dtype=torch.int32)[None]
    assert kv_cache.capacity(mask.sliding(row, 1024)[0]) == 1024 + kv_cache.PREFILL_CHUNK
    assert kv_cache.capacity(mask.causal(row, 1)[0]) == 32_768


# --- settings --------------------------------------------------------------------------------------------------------

TYPES = ["--model.n_layers", "4", "--model.layer_types", SLIDING, FULL]
SLIDES = ["--attention.sliding_attention.masks", "document", "sliding", "--attention.sliding_attention.window", "16"]
CHUNKS = ["--attention.chunked_attention.masks", "chunk", "--attention.chunked_attention.window", "16"]
LADDER = "--attention.sliding_attention.curriculum"
NOTHING = ["--attention.sliding_attention.masks", "causal"]


def plan(*argv):
    return run_plan.make_plan(config.load([*runs.DEBUG, *argv]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (TYPES, r"has sliding_attention layers, and nothing sets their masks: add \[attention.sliding_attention\]"),
        (SLIDES, r"\[attention.sliding_attention\] sets masks, but the model's layers are full_attention"),
        ([*TYPES, *SLIDES, *CHUNKS], r"\[attention.chunked_attention\] sets masks, but the model's layers are"),
        (["--model.layer_types", SLIDING, *SLIDES], "its masks are attention.masks"),
        ([*TYPES, *SLIDES[3:]], "attention.sliding_attention has no masks"),
        ([*TYPES, *NOTHING, *SLIDES[3:]], "sliding_attention.window = 16: none of .* reads a window"),
        ([*TYPES, *SLIDES[:3]], "masks = .* reads a window: set attention.sliding_attention.window or .curriculum"),
        ([*TYPES, *SLIDES, LADDER, '{ name = "linear" }'], "window and attention.sliding_attention.curriculum both"),
        ([*TYPES, *SLIDES[:3], LADDER, "{ initial_window = 3 }"], "sliding_attention.curriculum has no name"),
        ([*TYPES, *SLIDES[:3], LADDER, '{ name = "linea" }'], "unknown curriculum 'linea'.*Did you mean 'linear'"),
        ([*TYPES, *SLIDES[:3], LADDER, '{ name = "linear", evry = 3 }'], "unknown key 'evry' in attention.sliding_att"),
        ([*TYPES, *SLIDES[:3], LADDER, '{ name = "linear", every = "3" }'], "curriculum.every = '3'"),
        ([*TYPES, *SLIDES[:3], LADDER, '{ name = "stages" }'], "curriculum.stages is required"),
        (
            [*TYPES, *SLIDES[:3], LADDER, '{ name = "linear", final_window = 999 }'],
            "attention.sliding_attention: curriculum.final_window = 999",
        ),
        ([*TYPES, *SLIDES, "--attention.sliding_attention.kernel", "fast"], "unknown kernel 'fast'"),
        ([*TYPES, *SLIDES, "--attention.sliding_attention.window", "0"], "window = 0: must be 1 or more"),
        ([*TYPES, *SLIDES, "--phases", "{ from_step = 1, window = { chunked_attention = 4 } }"], "unknown layer type"),
        (
            [*TYPES, *SLIDES, "--phases", "{ from_step = 1, window = { sliding_attention = 0 } }"],
            "sliding_attention = 0",
        ),
        ([*TYPES, *SLIDES, "--phases", "{ from_step = 1, window = { full_attention = 999 } }"], "window = 999"),
        ([*TYPES, *SLIDES, "--phases", "{ from_step = 1, window = {} }"], "changes nothing"),
        (
            [*TYPES, *NOTHING, "--phases", "{ from_step = 1, window = { sliding_attention = 4 } }"],
            "phases set a window, but none of attention.sliding_attention.masks",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(argv, message, capsys):
    with pytest.raises((ConfigError, SystemExit)) as error:
        plan(*argv)
    shown = f"{error.value} {capsys.readouterr().err}"  # the command line is parsed in a frame
    assert re.search(message, " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())), shown


def test_a_sliding_window_may_exceed_the_row():
    made = plan(*TYPES, *SLIDES[:3], "--attention.sliding_attention.window", "4096")
    assert made.schedule.window(0, SLIDING) == 4096
    assert made.layer_types[1].saved == 0.0


def test_a_file_sets_a_type_and_one_that_extends_it_changes_a_key(tmp_path):
    (tmp_path / "base.toml").write_text(
        '[model]\nflavor = "debug"\nlayer_types = ["sliding_attention", "full_attention"]\n'
        '[attention]\nmasks = ["document"]\n[attention.sliding_attention]\nmasks = ["sliding"]\nwindow = 64\n'
    )
    (tmp_path / "own.toml").write_text(
        '[job]\nextends = "base.toml"\n[attention.sliding_attention]\nwindow = 32\n[training]\nsteps = 10\n'
    )
    found = config.load(["--job.config_file", str(tmp_path / "own.toml")])
    assert found.layer_masks == {FULL: ["document"], SLIDING: ["sliding"]}
    assert found.attention.sliding_attention.window == 32
    (tmp_path / "resolved.toml").write_text(found.to_toml())
    again = config.load(["--job.config_file", str(tmp_path / "resolved.toml")])
    assert again.to_toml() == found.to_toml()
    assert "chunked_attention" not in found.to_toml()
    (tmp_path / "own.toml").write_text("[attention.sliding_attention]\nwindw = 32\n")
    with pytest.raises(ConfigError, match=r"own.toml: attention.sliding_attention: unknown key 'windw'.*'window'"):
        config.load(["--job.config_file", str(tmp_path / "own.toml")])


@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(1, 50), st.dictionaries(st.sampled_from([FULL, SLIDING]), st.integers(1, 50), min_size=1)
            )
        ),
        max_size=4,
    ),
    st.integers(0, 99),
)
def test_a_phase_holds_for_the_types_that_it_sets(phases, step):
    each = [Phase(from_step=10 * number, window=window) for number, (window,) in enumerate(phases)]
    batch = BatchSchedule.constant(1, seq_len=1)
    schedule = Schedule(lambda step: step + 1, lambda step: 1.0, each, 100, batch, {SLIDING: lambda step: 2 * step + 1})
    held = {}
    for number, (window,) in enumerate(phases):
        if 10 * number <= step:
            held |= window if isinstance(window, dict) else {FULL: window}
    now = schedule(step)
    assert now.window_of(FULL) == now.window == held.get(FULL, step + 1)
    assert now.window_of(SLIDING) == now.layer_windows[SLIDING] == held.get(SLIDING, 2 * step + 1)


def test_the_plan_has_a_row_per_type_and_its_flops_are_those_of_all_steps(capsys):
    ladder = '{ name = "stages", stages = [[0, 4], [8, 32]] }'
    argv = [*TYPES, *SLIDES[:3], LADDER, ladder, "--attention.masks", "chunk"]
    made = plan(*argv)
    row = torch.arange(256, dtype=torch.int32)[None]
    with torch.device("meta"):
        model = models.registry.build(made.config.model, attention_fn=None, seq_len=256)
    expected = 0
    for step in range(20):
        now = made.schedule(step)
        starts = mask.from_types(made.config.layer_masks, row, now.window_of)
        expected += model.flops(4 * 256, 4 * mask.layer_pairs(starts, {FULL: 2, SLIDING: 2}))
    assert made.flops == expected
    full, sliding = made.layer_types
    assert (full.layer_type, full.layers, full.first_window, full.last_window) == (FULL, 2, 8, 256)
    assert (sliding.layer_type, sliding.layers, sliding.first_window, sliding.last_window) == (SLIDING, 2, 4, 32)
    assert full.flops_full_context == sliding.flops_full_context == made.attention_flops_full_context // 2
    assert command.run([*runs.DEBUG, *argv, "--json", "--at", "0,8"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["layer_type"] for one in shown["layer_types"]] == [FULL, SLIDING]
    assert shown["layer_windows"] == {SLIDING: {"0": 4, "8": 32}}
    assert command.run([*runs.DEBUG, *argv]) == 0
    shown = capsys.readouterr().out
    assert "sliding_attention" in shown
    assert "document + sliding" in shown


# --- runs ------------------------------------------------------------------------------------------------------------

RUN = [*TYPES, *SLIDES, "--training.steps", "6", "--model.layer_rope_theta", SLIDING, "100", "--checkpoint.enable",
       "--validation.freq", "3", "--metrics.no_enable_tensorboard",
       "--phases", "{ from_step = 4, window = { sliding_attention = 24 } }"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    runs.run(folder, *RUN)
    return folder


def test_a_run_reports_the_window_of_each_type(whole):
    reported = [line for line in runs.lines(whole) if "loss" in line]
    assert [line["window_sliding_attention"] for line in reported] == [16, 16, 16, 16, 24, 24]
    assert [line["window"] for line in reported][-1] == 256
    assert (whole / "ladder.png").is_file()
    assert sorted(runs.validations(whole)) == [(0, 256), (3, 256), (6, 256)]


def test_flops_and_saving_are_those_of_the_pairs(whole):
    trained = TrainedModel.open(whole / "checkpoint" / "step-6")
    with torch.device("meta"):
        model = models.registry.build(trained.config.model, attention_fn=None, seq_len=256)
    before, last = [line for line in runs.lines(whole) if "loss" in line][-2:]
    pairs = (1 - last["attention_saved"]) * 4 * 1024 * 257 / 2
    assert last["flops"] - before["flops"] == pytest.approx(model.flops(1024, round(pairs)), rel=1e-9)


def test_a_run_with_types_resumes_bit_for_bit(whole, tmp_path):
    runs.run(tmp_path, *RUN, "--job.exit_interval", "4", code=75)
    runs.run(tmp_path, *RUN)
    assert runs.losses(tmp_path) == runs.losses(whole)
    assert runs.validations(tmp_path) == runs.validations(whole)


def test_a_changed_type_is_refused_at_resuming(whole, tmp_path, capsys):
    runs.run(tmp_path, *RUN, "--job.exit_interval", "2", code=75)
    runs.run(tmp_path, *RUN, "--attention.sliding_attention.window", "32", code=2)
    expected = (
        "attention.sliding_attention.window was 16, is 32: at step 2 the window of sliding_attention rises from 16"
    )
    assert expected in capsys.readouterr().err
    runs.run(tmp_path, *RUN, "--job.exit_interval", "4", code=75)
    runs.run(tmp_path, *RUN, "--attention.sliding_attention.window", "32")  # a phase sets it from step 4 on


def test_validation_evaluation_and_text_use_the_final_window_of_each_type(whole, monkeypatch):
    trained = TrainedModel.open(whole / "checkpoint" / "step-6")
    assert (trained.final_window, trained.final_layer_windows) == (256, {SLIDING: 24})
    loaded = trained.load(attention.dense.DenseKernel.attention, 512)
    row = torch.arange(512, dtype=torch.int32)[None]
    assert torch.equal(loaded.starts[SLIDING], mask.sliding(row, 24)[0])
    assert torch.equal(loaded.start, mask.causal(row, 1)[0])
    monkeypatch.setattr(kv_cache, "PREFILL_CHUNK", 16)
    decoder = IncrementalDecoder(trained, torch.float64)
    samples = SamplesConfig(max_new_tokens=40, temperature=1.5)
    prompts = [list(range(3, 3 + length)) for length in (100, 1, 40)]
    together = generate(decoder, prompts, samples, decoder.seq_len, seed=1)

    def without_cache(rows):
        (one,) = rows
        reference = trained.load(attention.dense.DenseKernel.attention, 256, torch.float64)
        starts = {name: start[None, : len(one)] for name, start in reference.starts.items()}
        forms = prepare(dict.fromkeys(starts, attention.dense.DenseKernel()), starts)
        with torch.no_grad():
            return reference.model(torch.tensor([one]), forms)[:, -1]

    expected = generate(without_cache, [prompts[1]], replace(samples, max_new_tokens=4), 256, seed=1)
    assert together[1][:4] == expected[0]
    assert max(layer[0].shape[2] for layer in decoder._caches[SLIDING]._layers) < 64
    assert max(layer[0].shape[2] for layer in decoder._caches[FULL]._layers) > 100


def test_the_loss_on_a_file_is_that_of_the_reference(whole, tmp_path):
    text, output = "A ladder leans on a wall. " * 12, tmp_path / "results.jsonl"
    (tmp_path / "text.txt").write_text(text)
    checkpoint = whole / "checkpoint" / "step-6"
    files = ["--files", str(tmp_path / "text.txt"), "--context", "400", "--output", str(output)]
    assert evaluate.run([str(checkpoint), *files]) == 0
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    trained = TrainedModel.open(checkpoint)
    loaded = trained.load(attention.dense.DenseKernel.attention, 400)
    ids = torch.tensor([trained.build_tokenizer().encode(text)])
    starts = {name: start[None, : ids.shape[1] - 1] for name, start in loaded.starts.items()}
    forms = prepare(dict.fromkeys(starts, attention.dense.DenseKernel()), starts)
    labels = ids[:, 1:]
    expected = loaded.model(ids[:, :-1], forms, labels).item()
    assert row["tokens"] in (labels.numel(), labels.numel() + 1)  # and the end of the document
    assert row["loss"] * row["tokens"] == pytest.approx(expected, rel=0.02)

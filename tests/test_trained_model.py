"""A trained model has the same logits and text with a cache as without one."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import run

from torchladder import config, mask, models
from torchladder.commands import generate as command
from torchladder.config import SamplesConfig
from torchladder.inference.decoding import IncrementalDecoder, generate
from torchladder.inference.trained_model import TrainedModel, UnreadableCheckpointError
from torchladder.models import attention
from torchladder.models.attention import kv_cache
from torchladder.registry import ConfigError

T = 96
SHAPE = models.LlamaConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=40, init_std=0.3)
POSITIONS = torch.arange(T, dtype=torch.int32)[None]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["causal", "document", "chunk", "sliding"]),
    st.integers(1, T),
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from([{}, {"positional_embedding": "none"}, {"rope_restart": 7}, {"rope_condense_ratio": 2.0}]),
    st.integers(0, 1000),
)
def test_chunks_of_rows_have_the_logits_of_whole_rows(name, window, cuts, shape, seed):
    """A batch of rows, each cut at random places, against each row alone with the reference kernel."""
    torch.manual_seed(seed)
    changed = replace(SHAPE, **shape)
    memory = kv_cache.KVCache()
    slow = models.Llama(changed, attention.dense.DenseKernel.attention, seq_len=T)
    fast = models.Llama(changed, memory.attention, seq_len=T)
    slow.init_weights(seed)
    fast.load_state_dict(slow.state_dict())
    start = mask.registry.get(name)(POSITIONS, window)
    rows = [torch.randint(40, (sum(cut),)) for cut in cuts]
    found = [torch.empty(0, 40) for _ in rows]
    reach = int((torch.arange(T) - start[0]).max())
    slots = min(reach + 20, T)  # the fewest that parts of up to 20 tokens need: the cache forgets all others
    for part in range(max(map(len, cuts))):
        first = [sum(cut[:part]) for cut in cuts]
        taken = [
            row[begin : begin + sum(cut[part : part + 1])] for row, begin, cut in zip(rows, first, cuts, strict=True)
        ]
        tokens = torch.nn.utils.rnn.pad_sequence(taken, batch_first=True)
        fast.set_position_offset(torch.tensor(first))
        with torch.no_grad():
            logits = fast(tokens, kv_cache.decode_mask(start[0], first, [len(one) for one in taken], slots))
        found = [torch.cat([old, new[: len(one)]]) for old, new, one in zip(found, logits, taken, strict=True)]
    for row, logits in zip(rows, found, strict=True):
        form = mask.dense(start[:, : len(row)])[:, None]
        torch.testing.assert_close(logits, slow(row[None], form).detach()[0], atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of the debug config under a sliding window."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, "--training.steps", "3", "--attention.masks", "sliding", "--curriculum.name", "constant",
        "--curriculum.window", "50", "--training.seq_len", "128", "--checkpoint.enable",
        "--validation.no_enable", "--metrics.no_enable_tensorboard")  # fmt: skip
    return folder / "checkpoint" / "step-3"


def test_text_is_the_same_with_and_without_a_cache(trained, monkeypatch):
    """Three texts that outgrow the longest row, against the same texts with all tokens read for each new one."""
    decoder = IncrementalDecoder(TrainedModel.open(trained), torch.float64)  # no token hangs on the last bit of a logit
    samples = SamplesConfig(max_new_tokens=60, temperature=1.5)
    prompts = [list(range(3, 3 + length)) for length in (100, 1, 40)]
    steps = []
    monkeypatch.setattr(kv_cache, "PREFILL_CHUNK", 16)
    forward = IncrementalDecoder._forward
    monkeypatch.setattr(IncrementalDecoder, "_forward", lambda *of: steps.append(len(of[2][0])) or forward(*of))
    together = generate(decoder, prompts, samples, decoder.seq_len, seed=1)
    assert steps[:10] == [16, 16, 16, 16, 16, 16, 4, 1, 1, 1]

    def without_cache(rows):
        decoder.reset()
        return decoder(rows)

    assert together == [generate(without_cache, [prompt], samples, decoder.seq_len, seed=1)[0] for prompt in prompts]
    assert [len(new) for new in together] == [60, 60, 60]


def test_all_checkpoints_of_a_run_are_found_and_share_their_settings(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained.parents[1], tmp_path / "run") / "checkpoint"
    shutil.copytree(folder / "step-3", folder / "step-12")
    shutil.copytree(folder / "step-3", folder / "step-5")
    (folder / "step-5" / "run.json").write_text("{")
    loads, load_file = [], config.load_file
    monkeypatch.setattr(config, "load_file", lambda *arguments: loads.append(arguments) or load_file(*arguments))
    for place in (folder.parent, folder):
        found, errors = TrainedModel.find_all(place)
        assert [model.path.name for model in found] == ["step-3", "step-12"]
        assert found[0].config is found[1].config
        assert [str(error).split(" cannot be read")[0] for error in errors] == [str(folder / "step-5")]
    assert len(loads) == 2
    (only,), _ = TrainedModel.find_all(folder / "step-12")
    assert (only.step, only.max_seq_len, only.rope_theta) == (3, 128, None)
    assert only.run_folder.resolve() == folder.parent.resolve()
    assert only.weights_id == found[0].weights_id == TrainedModel.open(folder / "step-12").weights_id
    for method in (TrainedModel.open, TrainedModel.find_all):
        with pytest.raises(ConfigError, match="complete checkpoint"):
            method(tmp_path)


def test_damaged_and_deleted_weights_are_errors(trained, tmp_path):
    step = shutil.copytree(trained, tmp_path / "step-3")
    model = TrainedModel.open(step)
    model.verify()
    weights = next(step.glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UnreadableCheckpointError, match=f"step-3 is damaged: {weights.name}"):
        model.verify()
    weights.unlink()
    with pytest.raises(UnreadableCheckpointError, match="step-3 cannot be read"):
        IncrementalDecoder(model)


def test_the_batch_size_does_not_change_the_text(trained, capsys):
    ask = ["--checkpoint", str(trained), "--max-new-tokens", "8", "--seed", "3", "--prompt", "def ", "class A:", "x"]
    texts = []
    for size in ("1", "2", "8"):
        assert command.run([*ask, "--batch-size", size]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert "class A:" in texts[0]
    assert command.run([*ask, "--dtype", "bfloat16"]) == 0
    with pytest.raises(ConfigError, match="batch-size 0"):
        command.run([*ask, "--batch-size", "0"])


def test_buffers_that_checkpoints_do_not_have_are_initialized(trained, monkeypatch):
    class River(models.Llama):
        """A model with a buffer that init_weights fills."""

        def __init__(self, config, attention_fn, seq_len):
            super().__init__(config, attention_fn, seq_len)
            self.register_buffer("scale", torch.empty(config.dim), persistent=False)

        def init_weights(self, seed):
            super().init_weights(seed)
            self.scale.fill_(0.5)

    expected = IncrementalDecoder(TrainedModel.open(trained))([[0, 0]])
    monkeypatch.setitem(models.registry._components, "llama", River)
    decoder = IncrementalDecoder(TrainedModel.open(trained))
    assert decoder._loaded.model.scale.tolist() == [0.5] * 64
    assert torch.equal(decoder([[0, 0]]), expected)


def test_a_model_without_position_offsets_is_refused():
    class Forward(models.Llama):
        set_position_offset = models.Model.set_position_offset

    with pytest.raises(ConfigError, match=r"Forward does not implement set_position_offset"):
        Forward(SHAPE).set_position_offset(3)

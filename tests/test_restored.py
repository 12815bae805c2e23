"""A trained model reads rows with a cache as it reads them whole."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import run

from torchladder import mask, models
from torchladder.commands import generate as command
from torchladder.config import SamplesConfig
from torchladder.inference.decoding import generate
from torchladder.inference.trained_model import IncrementalDecoder, settings_of
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
def test_stretches_of_rows_give_the_logits_of_whole_rows(name, window, cuts, shape, seed):
    """Rows of several lengths side by side, each cut where it likes, against each alone by the reference kernel."""
    torch.manual_seed(seed)
    config = replace(SHAPE, **shape)
    memory = kv_cache.KVCache()
    slow = models.Llama(config, attention.dense.DenseKernel.attention, seq_len=T)
    fast = models.Llama(config, memory.attention, seq_len=T)
    slow.init_weights(seed)
    fast.load_state_dict(slow.state_dict())
    start = mask.registry.get(name)(POSITIONS, window)
    rows = [torch.randint(40, (sum(cut),)) for cut in cuts]
    found = [torch.empty(0, 40) for _ in rows]
    for part in range(max(map(len, cuts))):
        first = [sum(cut[:part]) for cut in cuts]
        taken = [
            row[begin : begin + sum(cut[part : part + 1])] for row, begin, cut in zip(rows, first, cuts, strict=True)
        ]
        tokens = torch.nn.utils.rnn.pad_sequence(taken, batch_first=True)
        begin = torch.tensor(first)
        fast.set_position_offset(begin)
        with torch.no_grad():
            logits = fast(tokens, kv_cache.decode_mask(start[0], begin, tokens.shape[1]))
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


def test_text_from_a_cache_is_text_without_one(trained, monkeypatch):
    """Three texts of several lengths beyond the longest row, against each token read anew."""
    reader, config = (
        IncrementalDecoder(settings_of(trained), trained),
        SamplesConfig(max_new_tokens=60, temperature=1.5),
    )
    prompts = [list(range(3, 3 + length)) for length in (100, 1, 40)]
    steps = []
    monkeypatch.setattr(kv_cache, "STRETCH", 16)
    step = IncrementalDecoder._step
    monkeypatch.setattr(IncrementalDecoder, "_step", lambda *of: steps.append(len(of[2][0])) or step(*of))
    together = generate(reader, prompts, config, reader.seq_len, seed=1)
    assert steps[:10] == [16, 16, 16, 16, 16, 16, 4, 1, 1, 1]

    def anew(rows):
        reader.forget()
        return reader(rows)

    assert together == [generate(anew, [prompt], config, reader.seq_len, seed=1)[0] for prompt in prompts]
    assert [len(new) for new in together] == [60, 60, 60]


def test_prompts_are_printed_with_what_follows_whatever_the_batch(trained, capsys):
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


def test_what_no_checkpoint_holds_is_made_anew(trained, monkeypatch):
    class River(models.Llama):
        """One that fills a buffer with its first weights."""

        def __init__(self, config, attention_fn, seq_len):
            super().__init__(config, attention_fn, seq_len)
            self.register_buffer("scale", torch.empty(config.dim), persistent=False)

        def init_weights(self, seed):
            super().init_weights(seed)
            self.scale.fill_(0.5)

    config, places = settings_of(trained), torch.zeros(1, 2, dtype=torch.int64)
    expected = IncrementalDecoder(config, trained)(places.tolist())
    monkeypatch.setitem(models.registry._components, "llama", River)
    reader = IncrementalDecoder(config, trained)
    assert reader._restored.model.scale.tolist() == [0.5] * 64
    assert torch.equal(reader(places.tolist()), expected)


def test_a_model_that_reads_rows_from_their_beginning_only_says_so():
    class Forward(models.Llama):
        set_position_offset = models.Model.set_position_offset

    with pytest.raises(ConfigError, match="Forward does not implement set_position_offset"):
        Forward(SHAPE).set_position_offset(3)

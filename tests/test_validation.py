"""Validation under other masks than the run's."""

import pytest
import runs

from torchladder import config, plots, train
from torchladder.registry import ConfigError
from torchladder.training.run_plan import make_plan

SHORT = [
    *("--training.steps", "2", "--training.seq_len", "64", "--validation.steps", "1"),
    *("--curriculum.name", "constant", "--metrics.no_enable_tensorboard"),
    *("--attention.kernel", "sdpa"),
]


def records(found, key):
    return {line["step"]: line[key] for line in found if key in line}


def test_other_masks_are_one_more_loss_and_change_nothing_else(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(plots, "plot_run", lambda *_: None)  # the picture at the end takes longest
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{i} and {i * i}"}}\n' for i in range(400)))
    data = ["--data.sources", f"{{ path = '{tmp_path}/text.jsonl' }}", "--data.validation_fraction", "0.5"]
    short = [*SHORT, *data, "--data.cache_folder", str(tmp_path / "cache")]
    plain = runs.run(tmp_path / "plain", *short)
    document = runs.run(tmp_path / "document", *short, "--validation.masks", "causal", "--ema.enable")
    other = ["--attention.masks", "causal", "--validation.masks", "document"]
    causal = runs.run(tmp_path / "causal", *short, *other)
    for key in "loss", "validation_loss":
        assert records(document, key) == records(plain, key)
    measured = records(document, "validation_loss_causal")
    assert {line["step"]: line["window"] for line in document if "validation_loss_causal" in line} == {0: 64, 2: 64}
    # At the first weights each run measures what the other has under its own masks; documents hide something.
    assert measured[0] == records(causal, "validation_loss")[0] != records(plain, "validation_loss")[0]
    assert records(causal, "validation_loss_document")[0] == records(plain, "validation_loss")[0]
    assert records(document, "ema_validation_loss_causal")[0] == measured[0]
    assert any(f"loss: {measured[2]:.4f}" in x and x.endswith("masks: causal") for x in caplog.messages)


def test_other_layer_types_keep_their_masks():
    words = ["--model.layer_types", "sliding_attention", "full_attention", "--validation.masks", "document"]
    words += ["--attention.sliding_attention.masks", "sliding", "--attention.sliding_attention.window", "16"]
    loaded = config.load(words)
    assert loaded.layer_masks == {"full_attention": ["causal"], "sliding_attention": ["sliding"]}
    assert loaded.validation_layer_masks == {"full_attention": ["document"], "sliding_attention": ["sliding"]}
    assert config.load(words[:3] + words[5:]).validation_layer_masks == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["documents"], "unknown mask 'documents' in validation.masks. Did you mean 'document'?"),
        (["sliding"], r"'sliding' reads a window, and these masks are measured at full context"),
        (["causal", "document"], r"attention.masks = \['document', 'chunk'\] are the same"),
        (["causal", "--validation.no_enable"], "validation.masks needs validation.enable"),
    ],
)
def test_masks_that_measure_nothing_new_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config.load([*runs.DEBUG, "--validation.masks", *words]))


def test_the_kernel_must_compute_both(tmp_path, capsys):
    words = ["--attention.masks", "causal", "--attention.kernel", "fold", "--validation.masks", "document"]
    assert train.main([*runs.DEBUG, "--job.dump_folder", str(tmp_path), *SHORT, *words]) == 2
    assert "kernel 'fold' does not support the mask 'document'" in capsys.readouterr().err

"""Weights of lit-gpt checkpoints: the logits of a model in their layout, written out here, and refusals."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests.runs import DEBUG
from torchladder import commands, models, train
from torchladder.inference.trained_model import TrainedModel
from torchladder.models import attention
from torchladder.models.hf import hf_weights
from torchladder.registry import ConfigError

L, D, HEADS, GROUPS, SIZE, FFN, V = 2, 32, 4, 2, 16, 48, 300
SHAPE = {
    "name": "llama", "flavor": "debug", "dim": D, "n_layers": L, "n_heads": HEADS, "n_kv_heads": GROUPS,
    "head_dim": SIZE, "ffn_dim": FFN, "vocab_size": V,
}  # fmt: skip
SETTINGS = [word for key, value in SHAPE.items() if key != "name" for word in (f"--model.{key}", str(value))]
START = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path"]


def lit_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lm_head.weight": (V, D), "transformer.wte.weight": (V, D), "transformer.ln_f.weight": (D,)}
    for layer in range(L):
        shapes |= {
            f"transformer.h.{layer}.{name}.weight": shape
            for name, shape in {
                "norm_1": (D,), "attn.attn": ((HEADS + 2 * GROUPS) * SIZE, D), "attn.proj": (D, HEADS * SIZE),
                "norm_2": (D,), "mlp.swiglu.w1": (FFN, D), "mlp.swiglu.w2": (FFN, D), "mlp.swiglu.w3": (D, FFN),
            }.items()
        }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}


def save(path, weights, **more):
    torch.save({"model": weights, "hparams": {"model_name": "tiny", "beta1": 0.9}, "iter_num": 8, **more}, path)
    return str(path)


def start(folder, *argv):
    return train.main([*DEBUG, "--job.dump_folder", str(folder / "run"), *SETTINGS, *argv])


def lit_logits(weights, tokens):
    """The forward pass of lit-gpt's layout, for one row of tokens."""
    T = len(tokens)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)).repeat(1, 2)

    def rotate(x):  # (T, heads, size)
        halves = torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1)
        return x * angles.cos()[:, None] + halves * angles.sin()[:, None]

    x = weights["transformer.wte.weight"][tokens]
    for layer in range(L):
        at = f"transformer.h.{layer}."
        fused = norm(x, f"{at}norm_1") @ weights[f"{at}attn.attn.weight"].T
        groups = fused.view(T, GROUPS, HEADS // GROUPS + 2, SIZE)  # the query heads of a group, its key, its value
        heads = []
        for head in range(HEADS):
            group, which = divmod(head, HEADS // GROUPS)
            query, key = (rotate(groups[:, group, i][:, None])[:, 0] for i in (which, -2))
            scores = (query @ key.T / math.sqrt(SIZE)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ groups[:, group, -1])
        x = x + torch.cat(heads, -1) @ weights[f"{at}attn.proj.weight"].T
        hidden = norm(x, f"{at}norm_2")
        gate, up = (hidden @ weights[f"{at}mlp.swiglu.w{i}.weight"].T for i in (1, 2))
        x = x + (F.silu(gate) * up) @ weights[f"{at}mlp.swiglu.w3.weight"].T
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].T


KERNEL = attention.build_kernel("dense", ["causal"], "cpu", training=False)


def build(**changed):
    return models.build(SimpleNamespace(**{**SHAPE, **changed}), attention_fn=KERNEL.attention, seq_len=12).eval()


@torch.no_grad()
def logits(model, tokens):
    start = torch.zeros(1, len(tokens), dtype=torch.int32)
    return model(tokens[None], KERNEL.prepare(start, torch.device("cpu")))[0]


TOKENS = torch.randint(0, V, (12,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("plain", [False, True])
def test_logits_are_those_of_lit_gpt(tmp_path, plain):
    weights = lit_weights()
    path = tmp_path / "iter-000008-ckpt-step-2.pth"
    torch.save(weights, path) if plain else save(path, weights, optimizer={"state": {0: {"step": torch.zeros(1)}}})
    model = build()
    hf_weights.load_hf_weights(model, path)
    torch.testing.assert_close(logits(model, TOKENS), lit_logits(weights, TOKENS), atol=1e-4, rtol=1e-4)
    larger = build(vocab_size=V + 2)
    hf_weights.load_hf_weights(larger, path)
    mean = weights["lm_head.weight"].mean(0)
    torch.testing.assert_close(larger.state_dict()["head.weight"][V:], mean.expand(2, -1))


def test_a_run_starts_from_them_and_its_step_0_is_a_checkpoint(tmp_path):
    weights = lit_weights()
    path = save(tmp_path / "model.pth", weights)
    seed = ["--checkpoint.create_seed_checkpoint", "--training.seq_len", "16"]
    assert start(tmp_path, *START, path, *seed) == 0
    loaded = build()
    loaded.load_state_dict(TrainedModel.open(tmp_path / "run").load(torch.device("cpu"), 16).model.state_dict())
    torch.testing.assert_close(logits(loaded, TOKENS), lit_logits(weights, TOKENS), atol=1e-4, rtol=1e-4)
    exported = ["convert", "to-hf", str(tmp_path / "run/checkpoint/step-0"), "--output", str(tmp_path / "hf")]
    assert commands.main(exported) == 0
    again = build()
    hf_weights.load_hf_weights(again, tmp_path / "hf")
    torch.testing.assert_close(logits(again, TOKENS), lit_logits(weights, TOKENS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_kv_heads": 1}, r"attn.attn.weight has shape \[128, 32\], the model's is \[96, ...\]: 4 query and 2 \* 1"),
        ({"n_layers": 3}, r"9 tensors are missing, such as model\.layers\.2\."),
        ({"n_layers": 1}, r"9 unexpected tensors, such as model\.layers\.1\."),
        ({"ffn_dim": 64}, r"gate_proj.weight has shape \[48, 32\], the model's is \[64, 32\]"),
        ({"vocab_size": V - 1}, r"has shape \[300, 32\], the model's is \[299, 32\]"),
        ({"name": "qwen3"}, r"tensors are missing, such as .*_norm"),
    ],
)
def test_files_of_another_shape_are_refused(tmp_path, changed, message):
    path = save(tmp_path / "model.pth", lit_weights())
    with pytest.raises(ConfigError, match=message):
        hf_weights.load_hf_weights(build(**changed), path)


def test_files_that_are_no_lit_gpt_checkpoint_are_refused(tmp_path, capsys):
    good, path = lit_weights(), tmp_path / "model.pth"
    with pytest.raises(ConfigError, match="is not a file"):
        hf_weights.load_hf_weights(build(), path)
    for content, message in (
        ({"model": SimpleNamespace()}, "damaged or holds more than tensors"),  # weights_only refuses other objects
        ({"iter_num": 1}, "does not hold tensors by name"),
        ({**good, "lm_head.weight": good["lm_head.weight"].to(torch.int8)}, "lm_head.weight has the type torch.int8"),
        ({**good, "lm_head.bias": torch.zeros(V)}, "1 unexpected tensors, such as lm_head.bias"),
        ({"lm_head.weight": good["lm_head.weight"]}, "20 tensors are missing"),
    ):
        torch.save(content, path)
        with pytest.raises(ConfigError, match=message):
            hf_weights.load_hf_weights(build(), path)
    path.write_bytes(b"PK\3\4 no archive")
    assert start(tmp_path, *START, str(path)) == 2
    said = capsys.readouterr()
    assert "model.pth is damaged" in said.err
    assert not (tmp_path / "run").exists()  # found before the data was read
    save(path, good)
    assert start(tmp_path, "--checkpoint.enable", "--checkpoint.initial_load_path", str(path)) == 2
    assert "it is a lit-gpt file: set checkpoint.initial_load_in_hf = true." in capsys.readouterr().err
    for command in (["convert", "from-hf", str(path), "--output", "x"], ["generate", "--checkpoint", str(path)]):
        assert commands.main([*command, *(["--prompt", "a"] if "generate" in command else [])]) == 2
        assert "--checkpoint.create_seed_checkpoint." in capsys.readouterr().err

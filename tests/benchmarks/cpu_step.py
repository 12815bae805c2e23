"""What a narrow window saves on a CPU, and how the library's step compares with a plain PyTorch loop.

python -m tests.benchmarks.cpu_step
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks.timing import seconds, table
from torchladder import mask, models
from torchladder.models import attention

CPU = torch.device("cpu")
LENGTH = 2048


class PlainBlock(nn.Module):
    """A plain Llama block: causal SDPA, RoPE, SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q, self.o = (nn.Linear(c.dim, c.dim, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(c.dim, c.kv_heads * c.head_size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(c.dim, c.ffn_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(c.ffn_dim, c.dim, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(c.dim, eps=c.norm_eps), nn.RMSNorm(c.dim, eps=c.norm_eps)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        n = self.norm1(x)
        q, k, v = (p(n).view(batch, length, -1, self.c.head_size).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (h * cos + torch.cat([-h.chunk(2, -1)[1], h.chunk(2, -1)[0]], -1) * sin for h in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).reshape(batch, length, -1))
        n = self.norm2(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Plain(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        frequency = c.rope_theta ** (-torch.arange(0, c.head_size, 2) / c.head_size)
        angles = torch.outer(torch.arange(LENGTH), frequency).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten(), reduction="sum")


def train(model, *batch):
    loss = model(*batch)
    loss.backward()
    model.zero_grad()


def attention_alone(batch=2, heads=8, size=64):
    """Times forward and backward of attention alone, over windows."""
    q, k, v, grad = (torch.randn(batch, LENGTH, heads, size).transpose(1, 2) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    positions = torch.arange(LENGTH, dtype=torch.int32).repeat(batch, 1)

    def run(attention_fn, attn_mask):
        torch.autograd.grad(attention_fn(q, k, v, attn_mask), (q, k, v), grad)

    windows = (32, 33, 256, 1024, LENGTH)
    work = {("causal SDPA", LENGTH): lambda: run(attention.causal_attention, None)}
    for name in ("fold", "sdpa"):
        kernel = attention.build_kernel(name, ["chunk"], CPU)
        for window in windows:
            attn_mask = kernel.prepare(mask.chunk(positions, window), CPU)
            work[name, window] = lambda kernel=kernel, attn_mask=attn_mask: run(kernel.attention, attn_mask)
    times = seconds(work, turns=3)
    full = times["causal SDPA", LENGTH]
    rows = [[kernel, f"{window}", f"{t * 1e3:.0f}", f"{t / full:.2f}"] for (kernel, window), t in times.items()]
    print(f"attention, forward and backward: T = {LENGTH}, batch {batch}, {heads} heads of {size}, fp32")
    table(["kernel", "window", "ms", "of causal SDPA"], rows)


def whole_step(batch=1):
    """Times forward and backward of the model `small`."""
    config = models.registry.flavors("llama")["small"]
    tokens = torch.randint(config.vocab_size, (batch, LENGTH))
    positions = torch.arange(LENGTH, dtype=torch.int32).repeat(batch, 1)
    plain = Plain(config)
    work = {("plain PyTorch", LENGTH): lambda: train(plain, tokens, tokens)}
    for window in (LENGTH, 256, 32):
        kernel = attention.build_kernel("auto", ["chunk"], CPU)
        model = models.Llama(config, kernel.attention, LENGTH)
        model.init_weights(0)
        attn_mask = kernel.prepare(mask.chunk(positions, window), CPU)
        work[f"torchladder, {kernel.name}", window] = lambda m=model, a=attn_mask: train(m, tokens, a, tokens)
    times = seconds(work, turns=6)
    base = times["plain PyTorch", LENGTH]
    rows = [[name, f"{w}", f"{tokens.numel() / t:,.0f}", f"{base / t:.2f}"] for (name, w), t in times.items()]
    print(f"model small ({model.num_parameters():,} parameters), forward and backward, T = {LENGTH}, fp32")
    table(["step", "window", "tokens/s", "speed of plain"], rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    attention_alone()
    whole_step()

"""One checkpoint, read by any number of ranks: sizes that do not divide, tied embeddings, optimizer state."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from torchladder import checkpoint, models, optim
from torchladder.checkpoint import checksums, step_folders
from torchladder.resilience.bad_steps import BadStepDetector, ResilienceConfig, StepOutcome, backward_seed

CONFIG = models.LlamaConfig(dim=10, n_layers=2, n_heads=5, n_kv_heads=1, ffn_dim=7, vocab_size=53, tie_embeddings=True)
TOKENS = torch.randint(53, (2, 16), generator=torch.Generator().manual_seed(0))


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


class Run:
    """A model on every rank of this group, with its optimizer."""

    def __init__(self, seed: int) -> None:
        self.model = models.Llama(CONFIG, seq_len=16)
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in (*self.model.layers.values(), self.model):
                fully_shard(block, mesh=mesh)
        self.model.init_weights(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)

    def step(self) -> torch.Tensor:
        loss = self.model(TOKENS, None, TOKENS)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def checkpointer(self, folder, **settings) -> checkpoint.Checkpointer:
        config = checkpoint.CheckpointConfig(enable=True, **settings)
        return checkpoint.Checkpointer(config, str(folder), self.model, self.optimizer)

    def bits(self) -> list[torch.Tensor]:
        moments = [value for one in self.optimizer.state.values() for value in one.values()]
        return [whole(value).detach().clone() for value in (*self.model.parameters(), *moments)]


def with_ranks(rank: int, folder, size: int, work: Callable) -> None:
    if rank < size:
        store = f"file://{folder}/store-{size}-{work.__name__}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        work(folder)
        dist.destroy_process_group()


def save_in_a_thread(folder) -> None:
    run = Run(seed=0)
    run.step()
    checkpointer = run.checkpointer(folder / "saves", async_mode="async")
    checkpointer.save(checkpoint.RunState(step=1, row=2))
    expected = run.bits()
    for _ in range(3):  # collectives of training, at the same time as those of the save
        run.step()
    checkpointer.wait()
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")


def save_to_a_url(folder) -> None:
    run = Run(seed=0)
    run.step()
    url = f"file://{folder}/url"
    for step in (1, 2, 3):
        run.step()
        run.checkpointer(url, keep_latest_k=2).save(checkpoint.RunState(step=step, row=0))
    other = Run(seed=1)
    assert other.checkpointer(url).load(lambda state, path: None).step == 3
    for found, expected in zip(other.bits(), run.bits(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    dist.barrier()
    assert sorted(os.listdir(folder / "url")) == ["step-2", "step-3"]


def compare(folder) -> None:
    run = Run(seed=1)
    run.step()
    found = run.checkpointer(folder / "saves").load(lambda state, path: None)
    assert found is not None
    for one, other in zip(run.bits(), torch.load(folder / "expected.pt"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def fail_on_one_rank(folder) -> None:
    run = Run(seed=0)
    if dist.get_rank() == 1:
        checksums.ChecksumStream.write = _full
    checkpointer = run.checkpointer(folder / "failing", max_failures=2, retry_minutes=0)
    checkpointer.save(checkpoint.RunState(step=1, row=0))
    assert checkpointer.consecutive_failures == 1  # on both ranks
    assert not list((folder / "failing").iterdir()) or dist.get_rank() == 1
    with pytest.raises(checkpoint.SaveError, match=r"rank 1: \S*__1_0.distcp: the disk is full"):
        checkpointer.save(checkpoint.RunState(step=2, row=0))


def skip_a_bad_step(folder) -> None:
    run = Run(seed=0)
    run.step()
    detector = BadStepDetector(ResilienceConfig("skip"), torch.device("cpu"), optim.is_fused(run.optimizer))
    for poisoned in (False, True):
        before = run.bits()
        loss = run.model(TOKENS, None, TOKENS)
        if poisoned and dist.get_rank() == 1:
            loss = loss + torch.inf  # on one rank alone, and its gradient would be finite
        loss.backward(backward_seed(loss))
        norm = whole(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0))
        bad = detector.check(norm)
        if optim.should_step(run.optimizer, bad):
            run.optimizer.step()
        detector.record(StepOutcome(2, (0, 1), bad, norm, []))
        run.optimizer.zero_grad()
        assert poisoned == all(torch.equal(one, other) for one, other in zip(run.bits(), before, strict=True))
    detector.flush()
    assert detector.num_bad == 1  # on both ranks


def _full(stream, data):
    raise OSError(28, "No space left on device")


def rank_main(rank: int, folder) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with_ranks(rank, folder, 3, save_in_a_thread)
    with_ranks(rank, folder, 2, compare)
    with_ranks(rank, folder, 3, compare)
    with_ranks(rank, folder, 2, save_to_a_url)
    with_ranks(rank, folder, 2, skip_a_bad_step)
    with_ranks(rank, folder, 2, fail_on_one_rank)


def test_any_number_of_ranks_reads_what_three_have_saved(tmp_path):
    processes.spawn(rank_main, args=(tmp_path,), nprocs=3)
    assert not dist.is_initialized()
    compare(tmp_path)
    names = sorted(path.name for path in (tmp_path / "saves" / "step-1").glob("*.distcp"))
    assert names == ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    assert set(names) < set(step_folders.read_checksums(tmp_path / "saves" / "step-1"))

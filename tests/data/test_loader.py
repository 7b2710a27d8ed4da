"""The loader's stream: order, ranks, resumption, memory."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

import ferrovae as fv
from ferrovae.data import Binarize, Dequantize, Loader, Scale

N = 103


def dataset(labels=True):
    data = torch.arange(N * 6).remainder(251).to(torch.uint8).reshape(N, 2, 3)
    return fv.data.open(data, labels=10 * torch.arange(N) if labels else None)


def stream(loader, passes=1):
    """All valid rows of some passes, copied: (index, label, x bits)."""
    rows = []
    for _ in range(passes):
        for batch in loader:
            x = batch.x.clone()
            for row in batch.valid.nonzero()[:, 0].tolist():
                rows.append((int(batch.index[row]), int(batch.label[row]), x[row].numpy().tobytes()))
    return rows


def test_a_pass_has_every_example_once():
    loader = Loader(dataset(), 10, seed=3, transform=Scale())
    assert len(loader) == 11
    batches = [(batch.x.clone(), batch.label.clone(), batch.index.clone(), batch.valid.clone()) for batch in loader]
    assert [len(batch[0]) for batch in batches] == [10] * 10 + [3]
    index = torch.cat([batch[2] for batch in batches])
    assert sorted(index.tolist()) == list(range(N))
    assert index.tolist() != list(range(N))
    assert torch.equal(torch.cat([batch[0] for batch in batches]), loader.dataset[index].float() / 255)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), 10 * index)
    assert all(batch[3].all() for batch in batches)


def test_shapes_and_dtypes():
    batch = next(iter(Loader(dataset(labels=False), 4)))
    assert (batch.x.shape, batch.x.dtype, batch.label) == ((4, 1, 2, 3), torch.uint8, None)
    assert (batch.index.dtype, batch.valid.dtype) == (torch.int64, torch.bool)
    assert next(iter(Loader(dataset(), 200))).x.shape == (N, 1, 2, 3)
    assert next(iter(Loader(fv.data.open(torch.rand(9)), 4, transform=Scale()))).x.shape == (4,)


def test_epochs_and_seeds_differ_and_repeat():
    orders = {}
    for seed in (0, 1, 2):
        loader = Loader(dataset(), 16, seed=seed)
        for epoch in range(3):
            assert loader.epoch == epoch
            orders[seed, epoch] = tuple(torch.cat([batch.index.clone() for batch in loader]).tolist())
    assert len(set(orders.values())) == 9
    again = Loader(dataset(), 16, seed=1, threads=3)
    assert tuple(row[0] for row in stream(again)) == orders[1, 0]
    plain = Loader(dataset(), 16, shuffle=False)
    assert [row[0] for row in stream(plain)] == list(range(N))


def test_large_orders_cover_everything():
    data = torch.zeros(70_001, 1, dtype=torch.uint8)
    index = torch.cat([batch.index.clone() for batch in Loader(fv.data.open(data), 5000)])
    assert torch.equal(index.sort().values, torch.arange(70_001))
    assert (index[1:] - index[:-1] == 1).sum() < 10


def test_the_stream_does_not_depend_on_the_batch_size():
    expected = stream(Loader(dataset(), 1, seed=2, transform=Dequantize()), passes=2)
    for batch_size in (7, 50, 103, 500):
        assert stream(Loader(dataset(), batch_size, seed=2, transform=Dequantize()), passes=2) == expected


def test_drop_last():
    loader = Loader(dataset(), 10, drop_last=True)
    assert len(loader) == 10
    assert [len(batch.x) for batch in loader] == [10] * 10
    assert (loader.epoch, loader.position) == (1, 0)
    assert len(Loader(dataset(), 103, drop_last=True)) == 1


@pytest.mark.parametrize(("world", "batch_size"), [(2, 10), (3, 12), (4, 100), (4, 104)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_each_global_batch(world, batch_size, drop_last):
    if drop_last and batch_size > N:
        pytest.skip("nothing is left")
    options = {"seed": 4, "transform": Binarize(), "drop_last": drop_last}
    whole = [
        (batch.x.clone(), batch.label.clone(), batch.index.clone())
        for batch in Loader(dataset(), batch_size, **options)
    ]
    ranks = [
        [type(batch)(*(part.clone() for part in batch)) for batch in loader]
        for loader in (Loader(dataset(), batch_size, rank=rank, world_size=world, **options) for rank in range(world))
    ]
    assert all(len(batches) == len(whole) for batches in ranks)
    for step, (x, label, index) in enumerate(whole):
        parts = [batches[step] for batches in ranks]
        assert len({len(part.x) for part in parts}) == 1
        assert torch.equal(torch.cat([part.x[part.valid] for part in parts]), x)
        assert torch.equal(torch.cat([part.label[part.valid] for part in parts]), label)
        assert torch.equal(torch.cat([part.index[part.valid] for part in parts]), index)
        for part in parts:  # rows that are not valid are still an example
            assert torch.equal(part.label, 10 * part.index)


@pytest.mark.parametrize("stop", [0, 1, 5, 10, 11])
def test_resume_continues_the_identical_stream(stop):
    options = {"seed": 9, "transform": [Binarize(), Scale(-1, 1)], "threads": 2}
    first = Loader(dataset(), 10, **options)
    expected = stream(Loader(dataset(), 10, **options), passes=3)
    list(first)
    passed = iter(first)
    seen = 0
    for _ in range(stop):
        seen += len(next(passed).x)
    state = json.loads(json.dumps(first.state_dict()))
    assert set(state) == {
        "format_version", "fingerprint", "seed", "shuffle", "transform", "fixed_epoch", "epoch", "position",
    }  # fmt: skip
    for batch_size, world in ((10, 1), (7, 1), (50, 1)):
        resumed = Loader(dataset(), batch_size, world_size=world, **options)
        resumed.load_state_dict(state)
        rest = stream(resumed, passes=2 if seen < N else 1)
        assert rest == expected[N + seen :]
    ranks = [Loader(dataset(), 10, rank=rank, world_size=2, **options) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    rest = [row for pair in zip(*ranks, strict=True) for batch in pair for row in batch.index[batch.valid].tolist()]
    assert rest == [row[0] for row in expected[N + seen :]][: N - seen or N]


def test_a_break_continues_and_the_end_begins_the_next_epoch():
    expected = stream(Loader(dataset(), 10, seed=1), passes=2)
    loader = Loader(dataset(), 10, seed=1)
    rows = []
    for batch in loader:
        rows += batch.index.tolist()
        if len(rows) >= 30:
            break
    assert (loader.epoch, loader.position) == (0, 30)
    rows += [row[0] for row in stream(loader)]
    assert (loader.epoch, loader.position) == (1, 0)
    for batch in loader:
        rows += batch.index.tolist()
        if len(rows) == 2 * N:
            break  # after the last batch, before StopIteration
    assert rows == [row[0] for row in expected]
    assert loader.state_dict()["epoch"] == 2
    assert loader.state_dict()["position"] == 0
    assert next(iter(loader)).index.tolist() == next(iter(Loader(dataset(), 10, seed=1, fixed_epoch=2))).index.tolist()


def test_states_of_something_else_are_refused():
    state = Loader(dataset(), 10, transform=Binarize()).state_dict()
    other = fv.data.open(torch.zeros(N, 2, 3, dtype=torch.uint8))
    for loader, message in (
        (Loader(other, 10, transform=Binarize()), "fingerprint is"),
        (Loader(dataset(labels=False), 10, transform=Binarize()), "fingerprint is"),
        (Loader(dataset(), 10, seed=1, transform=Binarize()), "seed is 0 in the state, expected 1"),
        (Loader(dataset(), 10, shuffle=False, transform=Binarize()), "shuffle is True"),
        (Loader(dataset(), 10, transform=Scale()), "transform is"),
        (Loader(dataset(), 10, transform=Binarize(), fixed_epoch=0), "fixed_epoch is None"),
    ):
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(state)
    loader = Loader(dataset(), 10, transform=Binarize())
    for broken, message in (
        ({**state, "extra": 1}, "extra"),
        ({"epoch": 1}, "expected"),
        ({**state, "format_version": 2}, "format_version is 2"),
        ({**state, "position": N}, "position is 103, expected from 0 to 102"),
        ({**state, "epoch": -1}, "epoch is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(broken)
    with pytest.raises(TypeError, match="position is '3'"):
        loader.load_state_dict({**state, "position": "3"})
    loader.load_state_dict(state)


def test_fixed_epoch_starts_again_each_time():
    loader = Loader(dataset(), 10, transform=Binarize(), fixed_epoch=7)
    first = stream(loader)
    next(iter(loader))
    assert stream(loader) == first
    third = Loader(dataset(), 10, transform=Binarize())
    third.load_state_dict({**third.state_dict(), "epoch": 7})
    assert stream(third) == first
    passed = iter(loader)
    next(passed)
    resumed = Loader(dataset(), 10, transform=Binarize(), fixed_epoch=7)
    resumed.load_state_dict(loader.state_dict())
    assert stream(resumed) == first[10:]
    assert stream(resumed) == first


def test_one_iteration_at_a_time():
    loader = Loader(dataset(), 10)
    old = iter(loader)
    first = next(old).index.clone()
    new = iter(loader)
    with pytest.raises(RuntimeError, match="another iteration of this loader has begun"):
        next(old)
    assert not torch.equal(next(new).index, first)
    assert len(stream(loader)) == N - 20
    with pytest.raises(RuntimeError, match="another iteration"):
        next(new)


def test_pickles_without_threads():
    loader = Loader(dataset(), 10, seed=5, transform=Dequantize())
    next(iter(loader))
    copy = pickle.loads(pickle.dumps(loader))
    assert stream(copy) == stream(loader)


@pytest.mark.parametrize(
    "keep",
    [
        lambda batch: batch.x,
        lambda batch: batch.x[0, 0, 0, :1],
        lambda batch: batch.x.numpy(),
        lambda batch: batch.x.untyped_storage(),
        lambda batch: batch.index,
        lambda batch: batch.label[3:],
        lambda batch: (batch.x.requires_grad_() ** 2).sum(),
        lambda batch: memoryview(batch.x.numpy()),
    ],
)
def test_what_the_consumer_keeps_is_never_overwritten(keep):
    def content(kept):
        if isinstance(kept, torch.Tensor):
            return (kept.grad_fn.next_functions[0][0]._saved_self if kept.grad_fn else kept).detach().clone()
        if isinstance(kept, torch.UntypedStorage):
            return torch.tensor(list(kept))
        return torch.tensor(np.asarray(kept))

    loader = Loader(dataset(), 8, transform=Scale(), threads=2)
    kept = [(item := keep(batch), content(item)) for batch in loader]
    assert all(torch.equal(content(item), before) for item, before in kept)


def test_dlpack_memory_is_kept():
    loader = Loader(dataset(), 8, transform=Scale(), threads=2)
    kept = [(torch.utils.dlpack.to_dlpack(batch.x), batch.x.clone()) for batch in loader]
    assert all(torch.equal(torch.utils.dlpack.from_dlpack(capsule), x) for capsule, x in kept)


def test_memory_is_used_again_once_free():
    data = fv.data.open(torch.zeros(400, 100, dtype=torch.uint8))
    for reuse in (False, True):
        loader = Loader(data, 4, transform=Scale(), prefetch=2, reuse=reuse)
        places = [batch.x.data_ptr() for batch in loader]
        assert len(set(places)) == 4
    kept = [batch.x for batch in Loader(data, 4, transform=Scale())]
    assert len({x.data_ptr() for x in kept}) == 100
    overwritten = [batch.index for batch in Loader(data, 4, reuse=True)]
    assert len({index.data_ptr() for index in overwritten}) == 4


def test_the_consumer_may_do_anything_to_its_batch():
    expected = stream(Loader(dataset(), 8, transform=Scale()), passes=2)
    loader = Loader(dataset(), 8, transform=Scale())
    rows = []
    for _ in range(2):
        for number, batch in enumerate(loader):
            rows += [row.numpy().tobytes() for row in batch.x.clone()]
            batch.x.requires_grad_().sum().backward()
            x = batch.x.detach()
            if number % 4 == 0:
                x.untyped_storage().resize_(0)
            elif number % 4 == 1:
                x.share_memory_()
            elif number % 4 == 2:
                x.unsqueeze_(0).fill_(float("nan"))
            else:
                x.set_(torch.zeros(3))
            del x, batch
    assert rows == [row[2] for row in expected]


def test_devices():
    loader = Loader(dataset(), 10, transform=Scale(), device="meta", pin_memory=True)
    assert loader.pin_memory == torch.cuda.is_available()
    batches = list(loader)
    assert all(part.device.type == "meta" for batch in batches for part in batch)
    assert [len(batch.x) for batch in batches] == [10] * 10 + [3]
    assert next(iter(Loader(dataset(), 10, device="cpu"))).x.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("device", ["cuda", None])
def test_cuda_copies_are_what_the_cpu_gives(pinned, device):
    data = fv.data.open(torch.randint(0, 256, (2000, 64, 64), dtype=torch.uint8), labels=torch.arange(2000))
    expected = [batch.x.clone() for batch in Loader(data, 100, transform=Scale(), seed=1)]
    loader = Loader(data, 100, transform=Scale(), seed=1, device=device, pin_memory=pinned)
    got = [batch.x.to("cuda", non_blocking=True) for batch in loader]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, got, strict=True))


def test_mnist_epoch(mnist):
    train = fv.data.open(mnist)
    seen = torch.zeros(len(train), dtype=torch.int64)
    for batch in Loader(train, 128, transform=Scale(), threads=2):
        seen[batch.index] += 1
        assert torch.equal(batch.x, train[batch.index].float() / 255)
        assert torch.equal(batch.label, train.labels[batch.index])
    assert (seen == 1).all()

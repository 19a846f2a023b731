"""Helpers for many processes, and batch statistics over all of them: two gloo processes against one."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
import warnings

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lsgm_fast
from lsgm_fast import distributed, env, random
from lsgm_fast.nn.layers import BatchNormSwish

SECONDS = 60.0  # for one answer of two processes; they need some 0.1 s


# -- two processes ---------------------------------------------------------------------------------------------------


def _serve(connection, rank, port):
    """A process of the group: runs what it is sent, and answers with the result or the traceback."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    connection.send((distributed.init("cpu").type, None))
    while (job := connection.recv()) is not None:
        function, arguments = job
        try:
            connection.send((function(*arguments), None))
        except Exception:
            connection.send((None, traceback.format_exc()))
    distributed.shutdown()
    connection.send((distributed.world_size(), None))


class Pair:
    """Two processes that stay; :meth:`run` calls a function in both and returns their results."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.connections, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, port), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        assert self._answers() == ["cpu", "cpu"]

    def _answers(self):
        deadline, results, failures = time.monotonic() + SECONDS, [None, None], []
        waiting = {0, 1}
        while waiting and time.monotonic() < deadline:
            for rank in sorted(waiting):
                if self.connections[rank].poll(0.01):
                    result, failure = self.connections[rank].recv()
                    results[rank] = _tensors(result)
                    waiting.discard(rank)
                    if failure is not None:
                        failures.append(f"process {rank}:\n{failure}")
                        # The other one may wait in a collective for ever.
                        deadline = min(deadline, time.monotonic() + 5.0)
        if waiting:
            failures.append(f"no answer from {sorted(waiting)}")
        assert not failures, "\n".join(failures)
        return results

    def run(self, function, first, second):
        for connection, arguments in zip(self.connections, (first, second), strict=True):
            connection.send((function, arguments))
        return self._answers()

    def close(self):
        for connection in self.connections:
            connection.send(None)
        sizes = self._answers()
        for process in self.processes:
            process.join(SECONDS)
        return sizes

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def pair():
    two = Pair()
    try:
        yield two
        assert two.close() == [1, 1]
    finally:
        two.kill()


def _arrays(value):
    """Tensors of a result as numpy arrays, to be sent to another process."""
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().copy()
    if isinstance(value, dict):
        return {k: _arrays(v) for k, v in value.items()}
    return value


def _tensors(value):
    if isinstance(value, dict):
        return {k: _tensors(v) for k, v in value.items()}
    return torch.from_numpy(value) if hasattr(value, "__array__") else value


# -- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_group(monkeypatch):
    for name in (*env.TORCHRUN, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_single_process_needs_no_group(no_group):
    assert distributed.init("cpu") == torch.device("cpu")
    assert distributed.init().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not torch.distributed.is_initialized()
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    distributed.barrier()
    distributed.shutdown()
    value = {"a": 1}
    assert distributed.broadcast_object(value) is value
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = distributed.all_reduce_mean(x)
    assert torch.equal(mean, x) and not mean.requires_grad and mean.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE set, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_ADDR set, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT not"),
        (
            {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "WORLD_SIZE='two': expected a whole number",
        ),
    ],
)
def test_half_an_environment_is_an_error(no_group, variables, said):
    for name, value in variables.items():
        no_group.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        distributed.init("cpu")
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(no_group):
    with pytest.raises(ValueError, match="'cuda' was asked for"):
        distributed.init("cuda")


@pytest.mark.parametrize(
    ("devices", "size", "here", "asked", "backend", "device"),
    [
        (2, "2", "2", None, "nccl", "cuda:1"),
        (2, "4", "2", None, "nccl", "cuda:1"),
        (2, "4", None, None, "gloo", "cpu"),
        (1, "2", "2", None, "gloo", "cpu"),
        (1, "2", "2", "cuda", "gloo", "cuda:0"),
        (8, "2", "2", "cpu", "gloo", "cpu"),
        (0, "2", "2", None, "gloo", "cpu"),
    ],
)
def test_backend_and_device_follow_the_machine(no_group, devices, size, here, asked, backend, device):
    variables = {"RANK": "1", "WORLD_SIZE": size, "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for name, value in variables.items():
        no_group.setenv(name, value)
    if here is not None:
        no_group.setenv("LOCAL_WORLD_SIZE", here)
    made, current = [], []
    no_group.setattr(torch.cuda, "device_count", lambda: devices)
    no_group.setattr(torch.cuda, "set_device", current.append)
    no_group.setattr(
        torch.distributed, "init_process_group", lambda name, **options: made.append((name, options))
    )
    chosen = torch.device(device)
    assert distributed.init(asked) == chosen
    options = {"rank": 1, "world_size": int(size)} | ({"device_id": chosen} if backend == "nccl" else {})
    assert made == [(backend, options)]
    assert current == ([chosen] if chosen.type == "cuda" else [])


def test_the_mean_of_whole_numbers_is_refused():
    with pytest.raises(ValueError, match="int64"):
        distributed.all_reduce_mean(torch.tensor([1, 2]))


def rand(*shape, seed=1, dtype=torch.float64):
    return random.normal(seed, range(1), "test", shape, dtype=torch.float64)[0].to(dtype)


def statistics(x, channels=None):
    channels = x.shape[1] if channels is None else channels
    return distributed.batch_statistics(x, torch.ones(channels), torch.zeros(channels), 1e-5)


def test_batch_statistics_and_their_gradients_in_one_process():
    x, weight, bias = (t.requires_grad_() for t in (rand(3, 2, 4, 5), rand(2, seed=2), rand(2, seed=3)))
    found = distributed.batch_statistics(x, weight, bias, 0.1)
    pixels = x.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean, pixels.mean(dim=1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found.var, pixels.var(dim=1, correction=0), rtol=1e-14, atol=1e-14)
    assert torch.equal(found.weight, weight) and torch.equal(found.bias, bias)
    assert float(found.elements) == 60.0
    assert not (found.elements.requires_grad or found.mean.requires_grad or found.var.requires_grad)

    def normalised(*args):
        s = distributed.batch_statistics(*args, 0.1)
        return torch.nn.functional.batch_norm(args[0], s.mean, s.var, s.weight, s.bias, eps=0.1)

    assert torch.autograd.gradcheck(normalised, (x, weight, bias))


def test_batch_statistics_do_not_cancel():
    """In float32, E[x^2] - E[x]^2 of these numbers is wrong in its first digit, and so would be x * scale + shift."""
    x = 1e4 + rand(4, 3, 8, 8)
    var = statistics(x.float()).var
    expected = x.float().double().var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), expected, rtol=1e-5, atol=0.0)


def test_gradients_far_from_zero():
    x, grad = 1e3 + rand(4, 3, 8, 8).float(), rand(4, 3, 8, 8, seed=2)
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = BatchNormSwish(3).to(dtype)
        own = x.to(dtype).requires_grad_()
        y = layer._over_all_processes(own)[0]
        found.append(torch.autograd.grad(y, own, grad.to(dtype))[0].double())
    layer, own = BatchNormSwish(3).double(), x.double().requires_grad_()
    (expected,) = torch.autograd.grad(layer(own), own, grad)
    torch.testing.assert_close(found[1], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_statistics_of_half_precision_are_float32(dtype):
    x = (3.0 + rand(4, 3, 32, 32)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        weight, bias, mean, var, _ = statistics(x)
    assert mean.dtype == var.dtype == torch.float32
    wide = x.detach().double()
    torch.testing.assert_close(mean.double(), wide.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(var.double(), wide.var(dim=(0, 2, 3), correction=0), rtol=1e-6, atol=0.0)
    (weight.sum() + bias.sum()).backward()
    assert x.grad.dtype == dtype


def test_batch_statistics_of_nothing():
    _, _, mean, var, count = statistics(torch.zeros(0, 2, 4, 4))
    assert torch.equal(mean, torch.zeros(2)) and torch.equal(var, torch.zeros(2)) and float(count) == 0.0


@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.zeros(1, 2, 3, 3, dtype=torch.int64)])
def test_batch_statistics_of_something_else(x):
    with pytest.raises(ValueError, match="batch_statistics expects"):
        statistics(x)


# -- two processes against one ---------------------------------------------------------------------------------------


def _helpers(value):
    distributed.barrier()
    x = torch.tensor([value, 2.0 * value], dtype=torch.bfloat16, requires_grad=True)
    mean = distributed.all_reduce_mean(x)
    return {
        "where": (distributed.world_size(), distributed.rank(), distributed.is_main()),
        "again": str(distributed.init()),
        "objects": (distributed.broadcast_object({"from": value}), distributed.broadcast_object(value, 1)),
        "mean": _arrays(mean.float()),
        "kept": _arrays(x.detach().float()),
        "dtype": str(mean.dtype),
    }


def test_helpers_in_two_processes(pair):
    results = pair.run(_helpers, (1.0,), (4.0,))
    for i, result in enumerate(results):
        assert result["where"] == (2, i, i == 0)
        assert result["again"] == "cpu"
        assert result["objects"] == ({"from": 1.0}, 4.0)
        assert result["mean"].tolist() == [2.5, 5.0]
        assert result["kept"].tolist() == [[1.0, 2.0], [4.0, 8.0]][i]
        assert result["dtype"] == "torch.bfloat16"


def _norm_case(first, last, dtype, swish, training, offset=0.0):
    """A BatchNormSwish on the images ``first`` to ``last`` of five, in this process's group."""
    norm = BatchNormSwish(3, swish).to(dtype).train(training)
    with torch.no_grad():
        norm.weight.copy_(rand(3, seed=2))
        norm.bias.copy_(rand(3, seed=3))
        norm.running_mean.copy_(rand(3, seed=4))
    # Images of unlike statistics, so that those of a share are not those of the whole.
    x = (
        offset
        + rand(5, 3, 4, 6) * torch.arange(1.0, 6.0, dtype=torch.float64)[:, None, None, None]
        + rand(5, 1, 1, 1)
    )
    x = x[first:last].to(dtype).requires_grad_()
    y = norm(x, batch_stats=True)
    (y * rand(5, 3, 4, 6, seed=5)[first:last].to(dtype)).sum().backward()
    return _arrays(
        {
            "y": y,
            "x.grad": x.grad,
            "weight.grad": norm.weight.grad,
            "bias.grad": norm.bias.grad,
            **dict(norm.named_buffers()),
        }
    )


@pytest.mark.parametrize("shares", [(2, 5), (5, 5)], ids=["unequal", "one-empty"])
@pytest.mark.parametrize(
    ("dtype", "swish", "training", "offset", "tolerance"),
    [
        (torch.float64, True, True, 0.0, 1e-12),
        (torch.float64, False, True, 50.0, 1e-12),
        (torch.float64, True, False, 0.0, 1e-12),
        (torch.float32, True, True, 0.0, 1e-6),
    ],
)
def test_batch_norm_of_two_processes_is_that_of_one(pair, shares, dtype, swish, training, offset, tolerance):
    options = (dtype, swish, training, offset)
    one = _tensors(_norm_case(0, 5, *options))
    two = pair.run(_norm_case, (0, shares[0], *options), (*shares, *options))

    def close(actual, name):
        scale = float(one[name].abs().max())
        assert float((actual - one[name]).abs().max()) <= tolerance * scale, name

    for name in ("y", "x.grad"):
        close(torch.cat([result[name] for result in two]), name)
    for name in ("weight.grad", "bias.grad"):
        close(two[0][name] + two[1][name], name)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(two[0][name], two[1][name])
        close(two[0][name], name)
    assert one["num_batches_tracked"] == int(training)


def _autocast_case(first, last):
    norm = BatchNormSwish(4).train()
    conv = nn.Conv2d(2, 4, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(rand(4, 2, 1, 1, seed=6))
    with torch.autocast("cpu", torch.bfloat16):
        half = conv(rand(6, 2, 8, 8)[first:last].float())
        y = norm(half)
    (y.float() * rand(6, 4, 8, 8, seed=7)[first:last].float()).sum().backward()
    result = {"half": half.float(), "running_mean": norm.running_mean, "grad": conv.weight.grad}
    return {"dtypes": (str(half.dtype), str(y.dtype)), **_arrays(result)}


def test_statistics_are_float32_under_autocast(pair):
    two = pair.run(_autocast_case, (0, 2), (2, 6))
    assert two[0]["dtypes"] == two[1]["dtypes"] == ("torch.bfloat16", "torch.bfloat16")
    mean = torch.cat([result["half"] for result in two]).double().mean(dim=(0, 2, 3))
    # 0.05 is the momentum; statistics in bfloat16 would be off by 4e-3.
    torch.testing.assert_close(two[0]["running_mean"].double(), 0.05 * mean, rtol=1e-6, atol=0.0)
    one = _tensors(_autocast_case(0, 6))
    error = (two[0]["grad"] + two[1]["grad"] - one["grad"]).abs().max()
    assert float(error) < 0.02 * float(one["grad"].abs().max())


def _vae_case(first, last, recompute):
    """One training step of a whole VAE on the images ``first`` to ``last`` of four."""
    torch.manual_seed(0)
    vae = lsgm_fast.build("tiny-binary").vae.double().train()
    vae.recompute = recompute
    # Copies the running statistics of process 0 to the others before, but not after the last step.
    model = DistributedDataParallel(vae) if distributed.world_size() > 1 else vae
    images = random.uniform(1, range(first, last), "images", (1, 28, 28), dtype=torch.float64).round()
    x = vae.preprocess_images(images)
    noise = [random.normal(2, range(first, last), "noise", s, dtype=torch.float64) for s in vae.group_shapes]
    losses = []
    for _ in range(2):
        model.zero_grad()
        logits, groups = model(x, noise)
        log_q = sum(g.log_q.flatten(1).sum(dim=1) for g in groups)
        log_p = sum(-0.5 * g.eps.square().flatten(1).sum(dim=1) for g in groups)
        loss = (vae.reconstruction_loss(logits, x) + log_q - log_p).mean()
        loss.backward()
        losses.append(float(distributed.all_reduce_mean(loss)))
    gradients = {name: p.grad for name, p in vae.named_parameters()}
    return _arrays({"losses": losses, "gradients": gradients, "buffers": dict(vae.named_buffers())})


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_a_vae_in_two_processes_trains_as_in_one(pair, recompute):
    """Loss, gradients as DistributedDataParallel leaves them, and running statistics after two steps."""
    one = _tensors(_vae_case(0, 4, False))
    two = pair.run(_vae_case, (0, 2, recompute), (2, 4, recompute))
    for result in two:
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-12)
        for kind in ("gradients", "buffers"):
            assert result[kind].keys() == one[kind].keys()
            for name, expected in one[kind].items():
                torch.testing.assert_close(
                    result[kind][name], expected, rtol=1e-9, atol=1e-10 * (1.0 + float(expected.abs().max()))
                )
    for name, value in two[0]["buffers"].items():
        assert torch.equal(value, two[1]["buffers"][name]), name
    assert any(float(g.abs().max()) > 1.0 for g in one["gradients"].values())


def _fails(message):
    raise RuntimeError(message)


def test_a_failure_in_a_process_is_reported(pair):
    with pytest.raises(AssertionError, match=r"first[\s\S]*second|second[\s\S]*first"):
        pair.run(_fails, ("first",), ("second",))

"""Any number of images: the iterator over batches, and the command's shards, which a kill does no harm."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_bad_input import Decoder, Network, own_model

import lsgm_fast
from lsgm_fast import cli, env, images, record, use_backend
from lsgm_fast.config import SDEConfig
from lsgm_fast.errors import NonFiniteError
from lsgm_fast.files import leftovers
from lsgm_fast.models import LSGM
from lsgm_fast.models.overlap import SecondStream, begun_ahead

EXACT = {"evaluations": 3, "bn": "running"}
"""Nothing that spans a batch."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lsgm_fast.build("tiny-binary")


@pytest.fixture(params=[0, 1], ids=["in order", "ahead"])
def ahead(request, monkeypatch):
    """As on the CPU, and with the order of CUDA."""
    monkeypatch.setattr(SecondStream, "ahead", request.param)
    return request.param


# ---------------------------------------------------------------- the iterator


@pytest.mark.parametrize("options", [EXACT, {"bn": "batch"}, {"solver": "rk45", "tol": 1e-2}])
def test_batches_are_those_of_sample(model, ahead, options):
    whole, seen = model.sample(5, seed=3, batch_size=2, **options), []
    for part, info in model.sample_iter(5, 2, seed=3, **options):
        seen.append(part)
        assert info.nfe > 0 and torch.is_grad_enabled()
    assert [len(part) for part in seen] == [2, 2, 1]
    assert torch.equal(torch.cat(seen), whole)


def test_weights_are_normalised_once(model):
    """However many batches and samples there are, and again where they change; nothing of it stays in the modules."""
    model.compile_for_inference()
    with record() as log:
        parts = [part for part, _ in model.sample_iter(5, 2, **EXACT)]
        model.sample(2, **EXACT)
    assert not any(op == "weight_norm" for op, _ in log.counts)
    convs = model.vae.weight_norm_convs
    assert all(conv.prepared_weight is None for conv in convs)
    changed = convs[-1]
    before = changed.log_weight_norm.detach().clone()
    try:
        stream = model.sample_iter(5, 2, **EXACT)
        assert torch.equal(next(stream)[0], parts[0])
        assert all(conv.prepared_weight is None for conv in convs)
        with torch.no_grad():
            changed.log_weight_norm += 1.0
        assert not torch.allclose(next(stream)[0], parts[1])
        stream.close()
    finally:
        with torch.no_grad():
            changed.log_weight_norm.copy_(before)


@pytest.mark.parametrize(
    "options", [EXACT, {"control": "per_sample", "tol": 1e-2}, {"solver": "ancestral", "evaluations": 3}]
)
@pytest.mark.parametrize(
    "preset", ["tiny-binary", "tiny-multiscale"]
)  # the latter draws lower scales as well
def test_an_image_depends_on_seed_and_index_alone(preset, options):
    """Rounding apart: that of the convolutions may depend on the size of the batch."""
    torch.manual_seed(0)
    model = lsgm_fast.build(preset)
    options = {"bn": "running"} | options
    whole = model.sample(7, seed=3, **options)
    for first, total, batch in ((0, 7, 3), (2, 5, 2), (6, 1, 64)):
        parts = [part for part, _ in model.sample_iter(total, batch, seed=3, first=first, **options)]
        torch.testing.assert_close(
            torch.cat(parts),
            whole[first : first + total],
            rtol=0,
            atol=1e-4,
            msg=f"{first}, {total}, {batch}",
        )
    aligned = [part for part, _ in model.sample_iter(3, 2, seed=3, first=2, **options)]
    same = model.sample(5, seed=3, batch_size=2, **options)[2:]
    assert torch.equal(torch.cat(aligned), same)


def test_injected_noise_is_cut_into_batches(model):
    noise = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    parts = [part for part, _ in model.sample_iter(3, 2, noise=noise, **EXACT)]
    assert torch.equal(torch.cat(parts), model.sample(3, batch_size=2, noise=noise, **EXACT))


def test_nothing_of_earlier_batches_is_kept(ahead):
    alive, dead_when_solving = [], []

    def look(z):
        dead_when_solving.append([reference() is None for reference in alive])
        return z

    model = LSGM(Decoder(), Network(look, when=2.0), SDEConfig())
    decode = model.vae.decode

    def watch(z, **options):
        drawn = decode(z, **options)
        alive.extend(weakref.ref(t) for t in (z, drawn))
        return drawn

    model.vae.decode = watch
    gc.disable()  # they have to go by themselves
    try:
        count = 0
        for part, _ in model.sample_iter(12, 2, evaluations=2):
            assert len(part) == 2
            del part
            count += 1
            # The latent always; the images but for those of the batches begun ahead.
            waiting = 1 if ahead and count < 6 else 0
            assert sum(reference() is not None for reference in alive) == waiting
    finally:
        gc.enable()
    assert count == 6 and len(alive) == 12
    # Where nothing is begun ahead, all of the last batch is gone before the next one is solved.
    assert all(all(flags) for flags in dead_when_solving) != bool(ahead)


def test_any_number_of_images_begins_at_once():
    stream = own_model().sample_iter(2**32, 2, evaluations=2)
    assert len(next(stream)[0]) == 2
    stream.close()
    last, _ = next(own_model().sample_iter(1, first=2**32 - 1, evaluations=2))
    assert torch.isfinite(last).all()


def test_arguments_are_checked_by_the_call():
    model = own_model()
    for message, options in {
        "number of images must be at least 1, got 0": {"total": 0},
        "batch must be at least 1, got 0": {"batch": 0},
        "seed": {"seed": -1},
        "4294967296": {"first": 2**32 - 1},
        "-1": {"first": -1},
        "unknown solver 'rk54'": {"solver": "rk54"},
        "temperature must be": {"temperature": -1.0},
        "vae_temperature must be": {"vae_temperature": float("nan")},
        "BatchNorm statistics 'runing'": {"bn": "runing"},
        "expected noise": {"noise": torch.zeros(1, 2, 3, 3)},
        "exclude each other": {"tol": 0.1, "evaluations": 3},
    }.items():
        with pytest.raises(ValueError, match=message):
            model.sample_iter(**({"total": 2, "batch": 1} | options))
    assert model.prior.calls == 0


def test_settings_are_those_of_the_moment(model):
    stream = model.sample_iter(2, 1, **EXACT)
    with use_backend("reference"):
        _, info = next(stream)
    assert set(info.backends.values()) == {"reference"}
    with record() as log:
        next(stream)
    assert log.backends()


@pytest.fixture
def closed(monkeypatch):
    """How often the second stream was waited for."""
    seen = []
    monkeypatch.setattr(SecondStream, "close", lambda self: seen.append(self))
    return seen


def consume(model, failure):
    for _ in model.sample_iter(100, 1, evaluations=2):
        raise failure


def test_leaving_early_ends_the_work(ahead, closed):
    model = own_model()
    stream = model.sample_iter(100, 1, evaluations=2)
    next(stream)
    calls = model.prior.calls
    assert calls == 2 * (1 + ahead) and not closed
    stream.close()
    assert len(closed) == 1 and model.prior.calls == calls
    with pytest.raises(StopIteration):
        next(stream)

    for _ in model.sample_iter(100, 1, evaluations=2):
        break
    assert len(closed) == 2
    with pytest.raises(RuntimeError, match="of the consumer"):
        consume(model, RuntimeError("of the consumer"))
    assert len(closed) == 3
    model.sample_iter(100, 1).close()
    assert len(closed) == 3  # nothing had begun

    def stop(part, info):
        raise RuntimeError("of the callback")

    # The traceback keeps the iterator's frame, and still it is closed.
    with pytest.raises(RuntimeError, match="of the callback") as error:
        model.sample(100, batch_size=1, evaluations=2, on_batch=stop)
    assert len(closed) == 4 and error.value.__traceback__ is not None


@pytest.mark.parametrize("failing", ["solver", "decoder"])
def test_what_is_finished_comes_before_the_error(ahead, closed, failing):
    model, decoded = own_model(), itertools.count(1)
    decode = model.vae.decode
    if failing == "solver":
        model.prior.when = 2.0
        model.prior.happens = lambda z: z * float("nan") if model.prior.calls > 6 else z
    else:
        model.vae.decode = lambda z, **options: decode(z) * (float("nan") if next(decoded) > 3 else 1.0)
    seen = []
    with pytest.raises(NonFiniteError):
        seen.extend(part for part, _ in model.sample_iter(10, 1, evaluations=2))
    assert len(seen) == 3 and len(closed) == 1


def test_an_interrupt_does_not_wait(ahead, closed):
    def interrupt(z):
        if model.prior.calls > 4:
            raise KeyboardInterrupt
        return z

    model = own_model(interrupt, when=2.0)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(part for part, _ in model.sample_iter(10, 1, evaluations=2))
    assert len(seen) == 2 - ahead and len(closed) == 1


def test_begun_ahead():
    for ahead in (0, 1, 2, 9):
        made = []
        items = begun_ahead((made.append(i) or i for i in range(5)), ahead)
        for i, item in enumerate(items):
            assert item == i and len(made) == min(5, i + 1 + ahead)


# ---------------------------------------------------------------- the second stream


class FakeTensor:
    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, log, name):
        self.log, self.name = log, name

    def record_stream(self, stream):
        self.log.append(f"{self.name} is recorded on {stream.name}")


class FakeStream:
    device = torch.device("cuda", 0)

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append(f"event on {self.name}")
        return "the event"

    def synchronize(self):
        self.log.append(f"the host waits for {self.name}")


def test_the_order_on_cuda(monkeypatch):
    """What would run on a GPU, told by fakes: a stream is asked for at every point, and it is the right one."""
    log, entered = [], []
    current = [FakeStream(log, "caller")]

    class Within:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            current.append(self.stream)
            entered.append(self.stream.name)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, "second"))
    monkeypatch.setattr(torch.cuda, "stream", Within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    second = SecondStream(torch.device("cuda", 0))
    assert second.ahead == 1

    def work(z):
        log.append(f"work on {current[-1].name}")
        return FakeTensor(log, "images"), torch.zeros(1)  # a result on the host has no stream

    started = second.start(work, FakeTensor(log, "z"))
    assert log == [
        "second waits for caller",
        "z is recorded on second",
        "work on second",
        "event on second",
    ]
    log.clear()
    current[:] = [FakeStream(log, "another")]  # the consumer's may have changed
    results = started.take()
    assert log == ["another waits for the event", "images is recorded on another"]
    assert len(results) == 2 and started.take() == ()
    log.clear()
    with pytest.raises(RuntimeError, match="no memory"):
        second.start(lambda z: (_ for _ in ()).throw(RuntimeError("no memory")), FakeTensor(log, "z"))
    assert log[:2] == ["second waits for another", "z is recorded on second"]
    second.close()
    assert log[-1] == "the host waits for second"
    assert [s.name for s in current] == ["another"] and entered == ["second", "second"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_overlap_on_a_gpu_changes_no_bit(monkeypatch):
    """The same images as in order, while the consumer drops every batch and writes over what becomes free."""
    torch.manual_seed(0)
    model = lsgm_fast.build("tiny-binary", device="cuda")
    options = {"seed": 5, "evaluations": 4, "bn": "running"}
    streams = set()
    decode = model.vae.decode

    def watch(z, **keywords):
        streams.add(torch.cuda.current_stream().cuda_stream)
        drawn = decode(z, **keywords)
        torch.cuda._sleep(2_000_000)  # the next solve is over before this is
        return drawn + 0.0

    model.vae.decode = watch
    overlapped = []
    for part, _ in model.sample_iter(64 * 20, 64, **options):
        overlapped.append(part.cpu())
        later = part * 1.0
        del part
        junk = [torch.full((64, 1, 28, 28), float("nan"), device="cuda") for _ in range(8)]
        del junk
        assert torch.equal(later.cpu(), overlapped[-1])
    assert torch.cuda.current_stream().cuda_stream not in streams and len(streams) == 1
    monkeypatch.setattr(
        "lsgm_fast.models.lsgm.SecondStream", lambda device: SecondStream(torch.device("cpu"))
    )
    in_order = model.sample(64 * 20, **options).cpu()
    assert torch.equal(torch.cat(overlapped), in_order)

    stream = model.sample_iter(64 * 20, 64, **options)
    next(stream)
    stream.close()
    assert all(torch.cuda.ExternalStream(stream).query() for stream in streams)


# ---------------------------------------------------------------- shards

NUMBER, SIZE = 18, 4
OPTIONS = ("--seed", "3", "--evaluations", "2", "--batch-size", "3", "--device", "cpu")
SHARDS = [f"shard-{i:05d}.npz" for i in range(5)]


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    model.save(path)
    return path


@pytest.fixture
def run(checkpoint, capsys):
    def call(folder, *more, source=checkpoint, number=NUMBER, options=OPTIONS):
        arguments = ["sample", source, "-n", number, "--shards", SIZE, "--out", folder, *options, *more]
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("whole") / "images"
    arguments = (
        "sample",
        checkpoint,
        "--num",
        NUMBER,
        "--shards",
        SIZE,
        "--out",
        folder,
        "--quiet",
        *OPTIONS,
    )
    assert cli.main([str(a) for a in arguments]) == 0
    return files(folder)


def test_shards_hold_the_images_of_sample(model, whole, tmp_path):
    assert list(whole) == [*SHARDS, "shards.json"]
    for i, name in enumerate(SHARDS):
        (tmp_path / name).write_bytes(whole[name])
        with np.load(tmp_path / name) as stored:
            pixels = stored["arr_0"]
        n = min(SIZE, NUMBER - i * SIZE)
        drawn = [part for part, _ in model.sample_iter(n, 3, seed=3, first=i * SIZE, evaluations=2)]
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, images.to_uint8(torch.cat(drawn)))
    manifest = json.loads(whole["shards.json"])
    assert (manifest["number"], manifest["shard_size"], manifest["seed"]) == (NUMBER, SIZE, 3)
    assert manifest["options"]["evaluations"] == 2 and manifest["options"]["batch"] == 3
    assert manifest["made_with"]["lsgm_fast"] == lsgm_fast.__version__
    assert len(manifest["model"]) == 64


def test_a_second_start_keeps_what_is_there(run, whole, tmp_path):
    folder = tmp_path / "images"
    report = json.loads(run(folder, "--json").out)
    assert (report["drawn"], report["kept"], report["missing"], report["shards"]) == (5, 0, 0, 5)
    assert report["nfe"] == 2 and report["solver"] == "exponential" and report["images_drawn"] == NUMBER
    assert files(folder) == whole
    for name in (SHARDS[1], SHARDS[4]):
        (folder / name).unlink()
    before = (folder / SHARDS[0]).stat().st_mtime_ns
    report = json.loads(run(folder, "--json").out)
    assert (report["drawn"], report["kept"], report["images_drawn"]) == (2, 3, SIZE + NUMBER % SIZE)
    assert (folder / SHARDS[0]).stat().st_mtime_ns == before
    assert files(folder) == whole
    again = run(folder)
    assert again.code == 0 and "0 drawn, 5 were there" in again.out and again.err == ""
    assert run(folder, "--quiet").out == ""


@pytest.mark.parametrize("damage", ["cut", "flipped", "fewer", "empty", "header"])
def test_a_damaged_shard_is_drawn_again(run, whole, tmp_path, damage):
    folder = tmp_path / "images"
    run(folder)
    target = folder / SHARDS[2]
    content = bytearray(whole[SHARDS[2]])
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "empty":
        content = bytearray()
    elif damage == "header":
        content[6] ^= 1  # "encrypted"
        at = content.rindex(b"PK\x01\x02")
        content[at + 8] ^= 1
    if damage == "fewer":
        images.save_npz(target, np.zeros((1, 28, 28, 1), dtype=np.uint8))
    else:
        target.write_bytes(content)
    result = run(folder)
    assert result.code == 0 and "1 drawn, 4 were there" in result.out
    assert "drawing it again" in result.err and SHARDS[2] in result.err and result.err.count("\n") == 1
    assert files(folder) == whole


def test_another_run_in_the_folder_is_refused(run, whole, tmp_path, checkpoint):
    folder = tmp_path / "images"
    run(folder)
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    lsgm_fast.build("tiny-binary").save(other)
    result = run(folder, source=other)
    assert result.code == 2 and "model: " in result.err and "seed" not in result.err
    for message, changes in {
        "seed: 3 -> 4": {"options": ("--seed", "4", *OPTIONS[2:])},
        "number: 18 -> 19": {"number": 19},
        "shard_size: 4 -> 5": {"more": ("--shards", "5")},
        "temperature: 1.0 -> 0.5": {"more": ("--temperature", "0.5")},
        "batch: 3 -> 2": {"more": ("--batch-size", "2")},
        "evaluations: 2 -> 3": {"more": ("--evaluations", "3")},
    }.items():
        result = run(folder, *changes.pop("more", ()), **changes)
        assert result.code == 2 and result.err.count("\n") == 1, message
        assert f"shards of another run ({message})" in result.err and "give another folder" in result.err
    assert files(folder) == whole
    # The same model in another file is the same model.
    converted = tmp_path / "published.pt"
    lsgm_fast.convert(checkpoint, converted)
    assert "0 drawn, 5 were there" in run(folder, source=converted).out

    manifest = json.loads(whole["shards.json"])
    manifest["made_with"]["torch"] = "1.0"
    (folder / "shards.json").write_text(json.dumps(manifest))
    assert f"torch: 1.0 -> {torch.__version__}" in run(folder).err
    (folder / "shards.json").write_text("{")
    assert "shards.json is damaged" in run(folder).err
    (folder / "shards.json").write_text("[]")
    assert run(folder).code == 2
    (folder / "shards.json").unlink()
    assert "holds shards but no shards.json" in run(folder).err
    assert not (folder / "shards.json").exists()


def test_what_cannot_run_leaves_no_manifest(run, tmp_path):
    folder = tmp_path / "images"
    for message, more in {
        "did you mean 'rk4": ("--solver", "rk54"),
        "seed": ("--seed", 2**64),
        "multiple of 2": ("--solver", "heun", "--evaluations", "3"),
        "leave --individual and --npz out": ("--npz",),
        "without a dot": ("--out", tmp_path / "x.npz"),
        "not a folder": ("--out", Path(__file__) / "images"),
        "--shards": ("--shards", 0),
    }.items():
        result = run(folder, *more)
        assert result.code == 2 and message in result.err, message
    result = run(folder, number=2**32 + 1)
    assert result.code == 2 and "4294967296" in result.err
    assert os.listdir(tmp_path) == []


def test_a_model_of_text_has_no_shards(run, tmp_path, monkeypatch):
    text = SimpleNamespace(config=SimpleNamespace(vae=SimpleNamespace(symbols="ab")))
    monkeypatch.setattr(lsgm_fast, "load", lambda *a, **k: text)
    assert "draws text" in run(tmp_path / "images").err
    assert os.listdir(tmp_path) == []


def test_no_more_than_one_shard_is_in_memory(run, tmp_path, monkeypatch):
    save, saved = images.save_npz, []

    def watch(path, array):
        assert len(array) <= SIZE and all(reference() is None for reference in saved)
        saved.append(weakref.ref(array))
        save(path, array)

    monkeypatch.setattr(images, "save_npz", watch)
    assert run(tmp_path / "images").code == 0
    assert len(saved) == 5


def test_half_written_files_of_the_dead_are_removed_and_no_others(run, whole, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    notes = (folder / "notes.txt", folder / ".hidden", folder / ".shard-00000.npz")
    for note in notes:
        note.write_text("mine")
    for name in (".shard-00001.0123abcd.npz", ".shards.0123abcd.json"):
        (folder / name).write_bytes(b"half")
    assert sorted(path.name for _, path in leftovers(folder)) == ["shard-00001.npz", "shards.json"]
    assert run(folder).code == 0
    for note in notes:
        assert note.read_text() == "mine"
        note.unlink()
    assert files(folder) == whole


def test_ctrl_c_and_errors_say_how_to_go_on(run, whole, tmp_path, monkeypatch):
    folder, to_uint8 = tmp_path / "images", images.to_uint8
    calls = itertools.count(1)

    for failure, code, expected in ((KeyboardInterrupt, 130, 1), (NonFiniteError, 1, 2)):

        def fail(batch, failure=failure):
            if next(calls) % 4 == 0:
                raise failure("as planned")
            return to_uint8(batch)

        monkeypatch.setattr(images, "to_uint8", fail)
        result = run(folder)
        assert result.code == code and f"{expected} of 5 shards are finished in {folder}" in result.err
        assert result.out == ""
    monkeypatch.setattr(images, "to_uint8", lambda batch: (_ for _ in ()).throw(KeyboardInterrupt()))
    interrupted = run(folder, "--json")
    assert json.loads(interrupted.out) == {"interrupted": True, "drawn": 0, "kept": 2}
    monkeypatch.undo()
    assert run(folder).code == 0
    assert files(folder) == whole


# ---------------------------------------------------------------- several processes, and kills


def of_two(rank: int) -> dict[str, str]:
    values = (str(rank), "2", str(rank), "localhost", "1")
    return dict(zip(env.TORCHRUN, values, strict=True))


def test_two_processes_write_what_one_writes(run, whole, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    for rank, own in ((1, 2), (0, 3)):
        for name, value in of_two(rank).items():
            monkeypatch.setenv(name, value)
        result = run(folder)
        assert result.code == 0
        assert len(list(folder.glob("shard-*"))) == (own if rank else 5)
        # The first process alone reports.
        assert bool(result.out) == (rank == 0) and result.err == ""
    assert "shards of process 0 of 2: 3 drawn" in result.out and "still to come" not in result.out
    assert files(folder) == whole
    (folder / SHARDS[3]).unlink()
    assert "1 of 5 are still to come from other processes" in run(folder).out


def test_processes_without_shards_are_refused(checkpoint, capsys, tmp_path, monkeypatch):
    for name, value in of_two(0).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["sample", str(checkpoint), "--out", str(tmp_path / "a.png")]) == 2
    assert "add --shards" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


class Forks:
    """Talks to ``forked_runs.py``."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        program = Path(__file__).with_name("forked_runs.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, kill=None, environs=({},)) -> tuple[list[int], float]:
        """Exit codes (minus the signal) and seconds; ``kill`` of all of the runs."""
        arguments = ["sample", self.checkpoint, "-n", NUMBER, "--shards", SIZE, "--out", folder, *OPTIONS]
        runs = [
            {"arguments": [str(a) for a in (*arguments, "--quiet")], "environ": environ, "kill": kill}
            for environ in environs
        ]
        print(json.dumps(runs), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        return answer["ended"], answer["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def forks(checkpoint):
    started = Forks(checkpoint)
    yield started
    started.close()


KILLS = [("rename", 1), ("batch", 4), ("file", 1), ("rename", 2), ("renamed", 1)]
"""Before the manifest is there; in a shard; in its file; before it has its name; and just after."""


def test_kills_at_the_worst_moments_change_nothing(forks, whole, tmp_path):
    folder = tmp_path / "images"
    seen = []
    for kill in KILLS:
        assert forks.run(folder, kill)[0] == [-signal.SIGKILL], kill
        seen.append(sum(name in SHARDS for name in os.listdir(folder)))
        assert all(files(folder)[name] == whole[name] for name in os.listdir(folder) if name in whole)
    assert seen == [0, 1, 1, 2, 3]
    assert forks.run(folder)[0] == [0]
    assert files(folder) == whole


def test_two_processes_at_once_and_killed(forks, whole, tmp_path):
    folder, both = tmp_path / "images", (of_two(0), of_two(1))
    assert forks.run(folder, ("batch", 3), both)[0] == [-signal.SIGKILL] * 2
    assert 0 < len(list(folder.glob("shard-*"))) < 5
    assert forks.run(folder, None, both)[0] == [0, 0]
    assert files(folder) == whole


@pytest.mark.slow
def test_fifty_kills_at_random_moments(forks, whole, tmp_path):
    generator = np.random.default_rng(0)
    _, seconds = forks.run(tmp_path / "timed")
    folder, killed, trial = tmp_path / "images-0", 0, 0
    while killed < 50:
        processes = ({},) if trial % 3 else (of_two(0), of_two(1))
        ended, _ = forks.run(folder, float(generator.uniform(0.1, 1.0) * seconds), processes)
        killed += -signal.SIGKILL in ended
        trial += 1
        if ended == [0] * len(ended) or trial % 10 == 0:
            assert forks.run(folder)[0] == [0]
            assert files(folder) == whole
            folder = tmp_path / f"images-{trial}"
    if folder.exists():
        assert forks.run(folder)[0] == [0]
        assert files(folder) == whole

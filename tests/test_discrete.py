"""Discrete data: the categorical likelihood, text as one-hot images, and a model of it from training to a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import lsgm_fast
from lsgm_fast import checkpoints, cli
from lsgm_fast.config import LSGMConfig, VAEConfig
from lsgm_fast.data import DataConfig, batches, check_data, decode_text, open_data
from lsgm_fast.data.order import held_out_indices
from lsgm_fast.data.sources import symbols_of
from lsgm_fast.data.text import OTHER, encode_text, pydoc_text
from lsgm_fast.distributions import Categorical
from lsgm_fast.evaluation import evaluate_nelbo
from lsgm_fast.models import LSGM, NVAE
from lsgm_fast.presets import get_preset
from lsgm_fast.training import KLConfig, Trainer, get_recipe

SYMBOLS = " abcdefg"
TEXT = get_preset("tiny-text")
SMALL = TEXT.vae.replace(
    image_channels=8,
    image_size=8,
    encoder_channels=8,
    decoder_channels=8,
    latents_per_group=2,
    symbols=SYMBOLS,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_hot(classes: torch.Tensor, k: int) -> torch.Tensor:
    """(N, H, W) classes as (N, K, H, W) float64 of 0 and 1."""
    return (classes[:, None] == torch.arange(k).view(1, -1, 1, 1)).double()


def some(k: int, n: int = 3, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes (n, size, size) and logits (n, k, size, size) float64."""
    classes = torch.randint(k, (n, size, size), generator=generator(1))
    return classes, 2.0 * torch.randn(n, k, size, size, generator=generator(2), dtype=torch.float64)


def words(seed: int, count: int) -> str:
    """Text of a small vocabulary, in which much can be learned."""
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["abc", "dead", "bee", "face", "gag"], count))


# -- the distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 5, 40])
def test_log_prob_and_mean_are_those_of_torch(k: int) -> None:
    classes, logits = some(k)
    reference = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    got = Categorical(logits).log_prob(2.0 * one_hot(classes, k) - 1.0)
    assert got.shape == (3, 1, 4, 4)
    torch.testing.assert_close(got[:, 0], reference.log_prob(classes))
    mean = (Categorical(logits).mean() + 1.0) / 2.0
    torch.testing.assert_close(mean.movedim(1, -1), reference.probs)


def test_gradients() -> None:
    """d(log p)/d(logits) is one-hot minus probabilities."""
    classes, logits = some(4)
    x = one_hot(classes, 4)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(Categorical(logits).log_prob(2.0 * x - 1.0).sum(), logits)
    torch.testing.assert_close(gradient, x - torch.softmax(logits.detach(), dim=1))
    assert torch.autograd.gradcheck(lambda entry: Categorical(entry).mean(), (logits[:1, :, :2, :2],))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([1e4, 0.0, -1e4], dtype=dtype).view(1, 3, 1, 1).requires_grad_()
    x = torch.tensor([-1.0, -1.0, 1.0], dtype=dtype).view(1, 3, 1, 1)
    log_prob = Categorical(logits).log_prob(x)
    assert log_prob.item() == -2e4
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    assert gradient.flatten().tolist() == [-1.0, 0.0, 1.0]


def test_samples_have_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.19, 0.01, 0.0], dtype=torch.float64)
    count = 200_000
    logits = probabilities.log().view(1, 5, 1, 1).expand(1, 5, 1, count)
    x = Categorical(logits).sample(generator())
    assert x.dtype == logits.dtype and set(x.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal((x == 1.0).sum(dim=1), torch.ones(1, 1, count, dtype=torch.int64))
    frequencies = (x == 1.0).double().mean(dim=(0, 2, 3))
    # Five standard errors.
    allowed = 5.0 * (probabilities * (1.0 - probabilities) / count).sqrt()
    assert ((frequencies - probabilities).abs() <= allowed).all()
    assert torch.equal(x, Categorical(logits).sample(generator()))
    assert not torch.equal(x, Categorical(logits).sample(generator(1)))


def test_shapes_that_do_not_match() -> None:
    classes, logits = some(4)
    with pytest.raises(
        ValueError, match=r"one-hot x of the logits' shape \(3, 4, 4, 4\), got \(3, 5, 4, 4\)"
    ):
        Categorical(logits).log_prob(one_hot(classes, 5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({1: 1.0}, "image 1 has 2 ones and a sum of 2 at row 2, column 3"),
        ({0: 0.0}, "image 1 has 0 ones and a sum of 0 at row 2, column 3"),
        ({0: 0.5, 1: 0.5}, "image 1 has 0 ones and a sum of 1 at row 2, column 3"),
        ({1: 0.25}, "image 1 has 1 ones and a sum of 1.25 at row 2, column 3"),
    ],
)
def test_images_that_are_not_one_hot(values: dict[int, float], message: str) -> None:
    vae = NVAE(SMALL)
    images = one_hot(torch.zeros(2, 8, 8, dtype=torch.int64), 8)
    assert torch.equal(vae.preprocess_images(images), 2.0 * images - 1.0)
    for channel, value in values.items():
        images[1, channel, 2, 3] = value
    with pytest.raises(ValueError, match=message):
        vae.preprocess_images(images)


# -- configuration and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_channels": 1, "symbols": ""}, "2 or more classes, got image_channels=1"),
        ({"symbols": "abc"}, "image_channels=8 different characters, got 'abc'"),
        ({"symbols": " abcdeff"}, "different characters"),
        (
            {"decoder_distribution": "normal"},
            "symbols are for decoder_distribution='categorical', got 'normal'",
        ),
    ],
)
def test_configurations_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.replace(**changes)


def test_dims() -> None:
    assert SMALL.dims == 64
    assert SMALL.replace(crop=1).dims == 36
    assert SMALL.replace(decoder_distribution="bernoulli", symbols="").dims == 8 * 64
    assert VAEConfig(image_channels=1, crop=2).dims == 784


def test_a_model_keeps_its_symbols_in_its_file(tmp_path: Path) -> None:
    model = lsgm_fast.build("tiny-text")
    model.save(tmp_path / "model.safetensors")
    loaded = lsgm_fast.load(tmp_path / "model.safetensors")
    assert loaded.config == model.config == TEXT
    assert loaded.vae.config.symbols == TEXT.vae.symbols and loaded.vae.config.symbols.endswith(OTHER)
    z = torch.randn(2, *model.latent_shape, generator=generator())
    images = loaded.decode(z)
    assert torch.equal(images, model.decode(z))
    torch.testing.assert_close(images.sum(dim=1), torch.ones(2, 16, 16))
    lines = decode_text(images, loaded.vae.config.symbols)
    assert [len(line) for line in lines] == [256, 256] and set("".join(lines)) <= set(TEXT.vae.symbols)


def test_the_published_layout_is_refused(tmp_path: Path) -> None:
    model = lsgm_fast.build("tiny-text")
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"'categorical' cannot be written in the published layout.*safetensors"
    ):
        checkpoints.convert(tmp_path / "model.safetensors", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


# -- the bound --------------------------------------------------------------------------------------------------------


def test_bits_per_symbol() -> None:
    """With a decoder that knows nothing but the frequencies, and a posterior that is the prior: the code length."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = NVAE(SMALL.replace(crop=1)).double().eval()
    probabilities = torch.tensor([0.3, 0.25, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02], dtype=torch.float64)
    with torch.no_grad():
        for convolution in (vae.output, *vae.posterior):
            convolution.log_weight_norm.fill_(-60.0)  # weights of 0, nearly
            convolution.bias.zero_()
        vae.output.bias.copy_(probabilities.log())
    classes = torch.randint(8, (5, 6, 6), generator=generator(3))
    model = LSGM(vae, None, lsgm_fast.sde.build_sde(TEXT.sde)).eval()
    report = evaluate_nelbo(model, [one_hot(classes, 8)])
    assert report.dims == 36
    expected = -probabilities[classes].log2().mean(dim=(1, 2))
    got = report.values / (36 * math.log(2.0))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert report.bits_per_dim.mean == pytest.approx(expected.mean().item(), rel=1e-9)


# -- text -------------------------------------------------------------------------------------------------------------


def chunks(config: DataConfig, split: str = "train") -> list[str]:
    source = open_data(config, split)
    return decode_text(np.stack([source[i] for i in range(len(source))]), source.symbols)


def test_characters_become_classes() -> None:
    symbols = " aAb\u00e9?"
    assert encode_text("aAbB \n\u00c9z", symbols).tolist() == [1, 2, 3, 3, 0, 0, 4, 5]


def test_chunks_lie_row_by_row_and_do_not_overlap(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + i % 7) for i in range(4 * 5 + 3))
    (tmp_path / "a.txt").write_text(text)
    config = DataConfig(str(tmp_path / "a.txt"), size=2, held_out=0, symbols="abcdefg")
    source = open_data(config)
    assert (len(source), source.shape, source.symbols) == (5, (7, 2, 2), "abcdefg")
    assert "".join(chunks(config)) == text[:20]
    image = source[1]  # e f / g a
    assert image.dtype == np.uint8 and set(np.unique(image)) == {0, 255}
    assert [image[k].tolist() for k in (4, 6)] == [[[255, 0], [0, 0]], [[0, 0], [255, 0]]]
    batch = next(batches(source, config, batch_size=5, seed=0, train=False))
    assert torch.equal(batch.images.sum(dim=1), torch.ones(5, 2, 2)) and batch.images.max() == 1.0


def test_the_most_frequent_characters_and_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("cc" * 8 + "b" * 8 + "d" * 8 + "xy" * 4)
    source = open_data(DataConfig(str(tmp_path / "a.txt"), size=4, classes=4, held_out=1))
    assert source.symbols == "cbd" + OTHER
    lines = chunks(DataConfig(str(tmp_path / "a.txt"), size=4, classes=4, held_out=0))
    assert "".join(lines) == "c" * 16 + "b" * 8 + "d" * 8


def test_held_out_chunks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 400))
    config = DataConfig(str(tmp_path / "a.txt"), size=4, held_out=10, symbols=SYMBOLS)
    everything, held_out = chunks(config.replace(held_out=0)), chunks(config, "held_out")
    kept = held_out_indices(len(everything), 10, None).tolist()
    assert held_out == [everything[i] for i in kept]
    assert chunks(config) == [line for i, line in enumerate(everything) if i not in kept]


def test_folders_of_text(tmp_path: Path) -> None:
    """Joined in the order of their paths; a split of its own, whose symbols are those of the training text."""
    for name, content in (("b", "bbbb"), ("a/x", "aaa")):
        file = tmp_path / "one" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (tmp_path / "one" / ".hidden").write_text("")
    assert chunks(DataConfig(str(tmp_path / "one"), size=2, held_out=0, symbols="ab\n")) == ["aaa\n", "bbbb"]
    for split, content in (("train", "aaab"), ("test", "cccaccca")):
        (tmp_path / "two" / split).mkdir(parents=True)
        (tmp_path / "two" / split / "a.txt").write_text(content)
    config = DataConfig(str(tmp_path / "two"), size=2, classes=3)
    assert chunks(config) == ["aaab"]
    assert chunks(config, "held_out") == [f"{OTHER * 3}a"] * 2


def test_a_folder_of_pictures_with_a_note_is_no_text(tmp_path: Path) -> None:
    lsgm_fast.images.save_png(tmp_path / "a.png", np.zeros((4, 4, 1), np.uint8))
    (tmp_path / "note.txt").write_text("a" * 1000)
    source = open_data(DataConfig(str(tmp_path), held_out=0))
    assert (source.shape, symbols_of(source)) == ((1, 4, 4), "")


def test_python_brings_a_text() -> None:
    text = pydoc_text()
    assert len(text) > 100_000 and "\n" not in text
    # The paragraph is a part of two topics.
    assert text.count("is used for conditional execution") == 1
    source = open_data(DataConfig("pydoc", held_out=150, symbols=TEXT.vae.symbols))
    check_data(source, TEXT.vae)
    assert len(source) == len(text) // 256 - 150


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "has 0 characters, fewer than one chunk of 16 x 16 = 256"),
        ("abc", {"size": 2}, "has 3 characters, fewer than one chunk of 2 x 2 = 4"),
        (
            "abcd",
            {"size": 2},
            "has 4 different characters, fewer than classes - 1 = 31: set classes to 5 or less",
        ),
        ("abcd", {"size": 2, "channels": 1}, "channels=1 is for images"),
        ("abcd", {"size": 2, "binarise": "static"}, "binarise='static' is for images"),
        ("abcd", {"size": 2, "flip": True}, "flip=True is for images"),
        (b"abc\xff", {"size": 2}, r"a\.txt is not text in UTF-8"),
    ],
)
def test_bad_text(content: str | bytes, options: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        open_data(DataConfig(str(tmp_path / "a.txt"), held_out=0, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "classes must be between 2 and 256, got 1"),
        ({"symbols": "aba"}, "different characters, got 'aba'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_data_that_do_not_fit_the_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 100))
    source = open_data(DataConfig(str(tmp_path / "a.txt"), size=8, held_out=0, symbols=SYMBOLS))
    check_data(source, SMALL)
    with pytest.raises(
        ValueError, match=r"has the symbols ' abcdefg', the model has ' abcdegf'.*image_channels=8"
    ):
        check_data(source, SMALL.replace(symbols=" abcdegf"))
    with pytest.raises(ValueError, match="the model has ' abcd': set the data's symbols"):
        check_data(source, SMALL.replace(image_channels=5, symbols=" abcd"))
    with pytest.raises(ValueError, match=r"images of shape \(8, 8, 8\).*the model takes \(8, 16, 16\)"):
        check_data(source, SMALL.replace(image_size=16))


@pytest.mark.parametrize(
    ("images", "symbols"), [(np.zeros((2, 3, 4, 4)), "ab"), (np.zeros((3, 4, 4)), "abc")]
)
def test_images_that_are_no_text(images: np.ndarray, symbols: str) -> None:
    with pytest.raises(ValueError, match="one channel for each symbol"):
        decode_text(images, symbols)


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_of_both_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(words(0, 2000))
    score = {"latent_channels": 2, "latent_size": 8, "channels": 8}
    model = LSGMConfig(SMALL, TEXT.score.replace(**score), TEXT.sde, TEXT.sampling)
    changes = {
        "data": DataConfig(str(tmp_path / "a.txt"), size=8, held_out=8, symbols=SYMBOLS),
        "batch_size": 8,
        "steps": 30,
        "warmup_steps": 2,
        "log_every": 5,
        "eval_every": 30,
        "sample_every": 30,
    }
    recipe = get_recipe("text")
    optimizer = recipe.vae.vae_optimizer.replace(lr=0.03)
    # Next to nothing for the code, so that its loss falls within so few steps.
    stage1 = recipe.vae.replace(model=model, vae_optimizer=optimizer, kl=KLConfig(0.0, 0.01), **changes)
    first = Trainer(stage1, tmp_path / "vae", progress=False).run()
    stage2 = recipe.lsgm.replace(model=model, vae=str(first.model), **changes)
    second = Trainer(stage2, tmp_path / "lsgm", progress=False).run()

    for folder, name, factor in (("vae", "reconstruction", 0.9), ("lsgm", "nelbo", 0.99)):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        loss = [line[name] for line in lines if name in line]
        assert len(loss) == 6 and loss[-1] < factor * loss[0]
    for folder, names in (("vae", ("samples", "reconstructions")), ("lsgm", ("samples",))):
        for name in names:
            shown = (tmp_path / folder / "samples" / f"{name}-00000030.txt").read_text().splitlines()
            assert len(shown) == 36 and all(len(line) == 64 + 2 for line in shown)
    loaded = lsgm_fast.load(second.model)
    text = decode_text(loaded.sample(2, seed=0, evaluations=5), loaded.vae.config.symbols)
    assert [len(line) for line in text] == [64, 64] and set("".join(text)) <= set(SYMBOLS)

    budget = ["--evaluations", "5", "--out", str(tmp_path / "s.png"), "--device", "cpu"]
    assert cli.main(["sample", str(second.model), "-n", "2", *budget]) == 0
    assert capsys.readouterr().out.splitlines() == text
    assert (tmp_path / "s.txt").read_text().splitlines() == text
    assert cli.main(["sample", str(second.model), "--npz", *budget]) == 2
    assert "this model draws text" in capsys.readouterr().err
    # The data are those of the run.
    assert cli.main(["evaluate", str(second.model), "-n", "4", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["reports"]["score"]["dims"] == 64


def test_classes_without_symbols_are_trained_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 300))
    source = open_data(DataConfig(str(tmp_path / "a.txt"), size=8, held_out=0, symbols=SYMBOLS))
    model = LSGM.from_config(LSGMConfig(SMALL.replace(symbols=""), None))
    trainer = Trainer(get_recipe("text").vae, tmp_path / "run", progress=False)
    trainer._show.samples(model, source, 0)
    assert "8 channels without symbols" in (tmp_path / "run" / "log.txt").read_text()
    assert not list(trainer.folder.samples.glob("*"))

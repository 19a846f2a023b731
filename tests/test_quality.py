"""Sample quality: the classifier, distances in its features, memorisation, and reports compared."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import types

import numpy as np
import pytest
import torch
from test_distributed import Pair

from lsgm_fast import distributed, random
from lsgm_fast.data import DataConfig, open_data
from lsgm_fast.data.sources import ArrayImages
from lsgm_fast.evaluation import (
    ClassifierConfig,
    FeatureStatistics,
    InceptionFeatures,
    Interval,
    classifier,
    compare_quality,
    evaluate_quality,
    fit_classifier,
    frechet_distance,
    kernel_distance,
    load_images,
    manifold_values,
    memorisation,
    nearest_distances,
)
from lsgm_fast.evaluation.features import as_metrics_see, gather_rows
from lsgm_fast.evaluation.quality import METRICS, bootstrap_weights
from lsgm_fast.images import to_uint8

F64 = torch.float64


def normals(count, dims, *, seed=0, name="test", first=0):
    return random.normal(seed, range(first, first + count), name, (dims,), dtype=F64)


def exact(mean, covariance, count=1000):
    """Statistics of a set with exactly this mean and covariance."""
    statistics = FeatureStatistics(len(mean))
    statistics.count = float(count)
    statistics.mean = torch.tensor(mean, dtype=F64)
    statistics.m2 = torch.tensor(covariance, dtype=F64) * (count - 1)
    return statistics


def squares(count, *, seed=0, classes=3, size=14, channels=1):
    """Noisy images with a bright square whose place is the class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = generator.integers(0, 90, (count, channels, size, size))
    for image, label in zip(images, labels, strict=True):
        top, left = 3 * label + generator.integers(0, 2), generator.integers(2, 5)
        image[:, top : top + 4, left : left + 4] += 120
    return ArrayImages("squares", images.astype(np.uint8), 10 + 5 * labels)


EASY = ClassifierConfig(width=8, features=16, epochs=4, batch_size=32, learning_rate=5e-3)


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A classifier of the squares, and the folder that it lies in."""
    folder = tmp_path_factory.mktemp("classifiers")
    return fit_classifier(squares(300), squares(90, seed=1), config=EASY, folder=folder), folder


# -- statistics and the Frechet distance ---------------------------------------------------------------------------


def test_statistics_of_parts_are_those_of_the_whole():
    x = 100.0 + normals(50, 4)
    whole, parts = FeatureStatistics(4), FeatureStatistics(4)
    whole.update(x)
    for part in (x[:7], x[7:8], x[8:8], x[8:]):
        other = FeatureStatistics.of(part)
        parts.merge(other)
    for statistics in (whole, parts, whole.pooled()):
        assert statistics.count == 50
        torch.testing.assert_close(statistics.mean, x.mean(dim=0), rtol=1e-14, atol=0.0)
        torch.testing.assert_close(statistics.covariance, torch.cov(x.T), rtol=1e-11, atol=1e-12)


def test_weights_count_repetitions():
    x = normals(6, 3)
    weights = torch.tensor([0, 3, 1, 0, 2, 1])
    repeated = FeatureStatistics.of(x.repeat_interleave(weights, dim=0))
    weighted = FeatureStatistics.of(x, weights)
    assert weighted.count == 7
    torch.testing.assert_close(weighted.mean, repeated.mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(weighted.m2, repeated.m2, rtol=1e-13, atol=1e-13)


def test_statistics_refuse_what_they_cannot_count():
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"\(N, 3\), got \(2, 4\)"):
        statistics.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        statistics.update(torch.tensor([[0.0, math.nan, 1.0]]))
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        _ = statistics.covariance


def test_frechet_distance_of_known_gaussians():
    # Commuting covariances: sum of (m1 - m2)^2 + (s1 - s2)^2.
    a, b = exact([1.0, 2.0], [[4.0, 0.0], [0.0, 9.0]]), exact([0.0, 4.0], [[1.0, 0.0], [0.0, 25.0]])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 4, rel=1e-13)
    # 2x2 in general: tr (A B)^1/2 = sqrt(tr(A B) + 2 sqrt(det A det B)).
    first, second = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.5, -0.9], [-0.9, 3.0]])
    root = math.sqrt(np.trace(first @ second) + 2 * math.sqrt(np.linalg.det(first) * np.linalg.det(second)))
    a, b = exact([0.0, 0.0], first.tolist()), exact([3.0, 0.0], second.tolist())
    expected = 9 + np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-13)


def test_frechet_distance_of_singular_covariances():
    u, v = np.array([1.0, 2.0, 2.0]), np.array([2.0, -1.0, 2.0])
    a, b = exact([0.0] * 3, np.outer(u, u).tolist()), exact([0.0] * 3, np.outer(v, v).tolist())
    # Rank one: tr (A B)^1/2 = |u.v|.
    assert frechet_distance(a, b) == pytest.approx(9 + 9 - 2 * 4, rel=1e-12)
    # As many dead features as there are in a small set; a root of the product would be off by 1e-8 for each.
    few = FeatureStatistics.of(torch.cat([normals(5, 8), torch.zeros(5, 8, dtype=F64)], dim=1))
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="16 and 3"):
        frechet_distance(few, a)


# -- the kernel distance -------------------------------------------------------------------------------------------


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = normals(5, 3), normals(4, 3, name="y")

    def mean(u, v, same):
        terms = [
            (float(a @ b) / 3 + 1) ** 3
            for i, a in enumerate(u)
            for j, b in enumerate(v)
            if not same or i != j
        ]
        return sum(terms) / len(terms)

    def direct(u, v):
        return mean(u, u, True) + mean(v, v, True) - 2 * mean(u, v, False)

    found = kernel_distance(x, y)
    assert found.value == pytest.approx(direct(x, y), rel=1e-12)
    without = [torch.cat([s[:i], s[i + 1 :]]) for s in (x, y) for i in range(len(s))]
    first = torch.tensor([direct(s, y) for s in without[:5]])
    second = torch.tensor([direct(x, s) for s in without[5:]])
    variance = 4 * first.var(correction=0) + 3 * second.var(correction=0)
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-5)


def test_kernel_distance_is_unbiased_and_its_error_is_right():
    values, errors = [], []
    for i in range(150):
        found = kernel_distance(normals(40, 4, first=100 * i), normals(30, 4, first=100 * i, name="y"))
        values.append(found.value)
        errors.append(found.standard_error)
    values = torch.tensor(values, dtype=F64)
    assert abs(float(values.mean())) < 3.0 * float(values.std()) / math.sqrt(150)
    # A biased estimate (with the diagonal) would be off by many times the spread.
    assert 0.8 < float(np.sqrt(np.mean(np.square(errors)))) / float(values.std()) < 1.5
    far = kernel_distance(normals(40, 4), 1.0 + normals(30, 4, name="y"))
    assert far.value > 5.0 * float(values.std())


def test_kernel_weights_leave_pairs_of_an_image_with_itself_out(monkeypatch):
    x, y = normals(6, 3), normals(5, 3, name="y")
    wx = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]])
    wy = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0]])
    whole = kernel_distance(x, y, weights_x=wx, weights_y=wy)
    part = kernel_distance(x[[0, 1, 3, 4]], y[[1, 2, 3]])
    assert whole.weighted.tolist() == pytest.approx([whole.value, part.value], rel=1e-12)
    # An image counted twice makes pairs with the others, and none with its twin.
    doubled = kernel_distance(x, y, weights_x=torch.tensor([[2.0] * 6]), weights_y=torch.ones(1, 5))
    assert float(doubled.weighted[0]) == pytest.approx(whole.value, rel=1e-12)
    monkeypatch.setattr("lsgm_fast.evaluation.distances._BLOCK", 7)
    blocks = kernel_distance(x, y, weights_x=wx, weights_y=wy)
    assert blocks.value == pytest.approx(whole.value, rel=1e-12)
    assert blocks.standard_error == pytest.approx(whole.standard_error, rel=1e-12)
    assert blocks.weighted.tolist() == pytest.approx(whole.weighted.tolist(), rel=1e-12)


# -- manifolds -----------------------------------------------------------------------------------------------------


def test_manifolds_of_identical_and_of_disjoint_sets():
    x = normals(60, 5)
    same = manifold_values(x, x)
    assert [float(v.mean()) for v in (same.precision, same.recall, same.coverage)] == [1.0, 1.0, 1.0]
    # Every point lies in its own ball and in those of the 5 whose neighbour it is, on average.
    assert float(same.density.mean()) == pytest.approx(6 / 5, rel=0.02)
    apart = manifold_values(x, x + 100.0)
    for value in dataclasses.astuple(apart):
        assert float(value.sum()) == 0.0


def test_manifolds_on_a_line(monkeypatch):
    reference = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # radii for k = 1: 1, 1, 2, 7
    generated = torch.tensor([[-0.5], [2.5], [20.0]])  # radii: 3, 3, 17.5
    for block in (1 << 24, 5):
        monkeypatch.setattr("lsgm_fast.evaluation.distances._BLOCK", block)
        found = manifold_values(generated, reference, k_precision=1, k_density=1)
        assert found.precision.tolist() == [1.0, 1.0, 0.0]
        assert found.recall.tolist() == [1.0, 1.0, 1.0, 1.0]
        assert found.density.tolist() == [1.0, 1.0, 0.0]
        assert found.coverage.tolist() == [1.0, 0.0, 1.0, 0.0]
        assert nearest_distances(generated, reference).tolist() == pytest.approx([0.5, 0.5, 10.0])


def test_density_of_equal_distributions_is_one():
    found = manifold_values(normals(800, 3), normals(800, 3, name="y"))
    assert float(found.density.mean()) == pytest.approx(1.0, abs=0.06)
    assert float(found.coverage.mean()) > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: manifold_values(x, x, k_precision=0), "k must be at least 1"),
        (lambda x: manifold_values(x, x[:5]), "at least 6 images in each set, got 20 and 5"),
        (lambda x: kernel_distance(x, x[:2]), "at least 3 images in each set, got 20 and 2"),
        (lambda x: kernel_distance(x, x[:, :1]), r"got \(20, 2\) and \(20, 1\)"),
        (lambda x: nearest_distances(x, x[:0]), "the second set is empty"),
    ],
)
def test_distances_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(normals(20, 2))


# -- memorisation --------------------------------------------------------------------------------------------------


def test_memorisation_of_copies_and_of_new_images():
    training, held_out, new = (normals(400, 6, name=name) for name in ("train", "held out", "new"))
    unseen = nearest_distances(held_out, training)

    def found(generated):
        return memorisation(nearest_distances(generated, training), unseen)

    fresh = found(new)
    assert not fresh.flagged and fresh.share == pytest.approx(0.01, abs=0.015) and fresh.u_p > 0.01
    copied = found(training[:100] + 1e-3 * new[:100])
    assert copied.flagged and copied.share == 1.0 and copied.u == 0.0 and copied.median < 0.01
    # One in ten: their rank sum says little, their share a lot.
    few = found(torch.cat([new[:360], training[:40]]))
    assert few.flagged and few.share_p < 1e-6 < few.u_p
    # Images farther away than held-out ones are no memory.
    assert not found(2.0 * new).flagged


def test_memorisation_refuses():
    distances = torch.ones(10)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.0"):
        memorisation(distances, distances, quantile=1.0)
    with pytest.raises(ValueError, match="got 0 and 10"):
        memorisation(distances[:0], distances)


# -- bootstrap -----------------------------------------------------------------------------------------------------


def test_bootstrap_weights_are_those_of_draws_with_replacement():
    weights = bootstrap_weights(50, 400, 3, "a")
    assert torch.equal(weights.sum(dim=1), torch.full((400,), 50.0, dtype=F64))
    assert torch.equal(weights, bootstrap_weights(50, 400, 3, "a"))
    assert torch.equal(weights[:7], bootstrap_weights(50, 7, 3, "a"))
    assert not torch.equal(weights, bootstrap_weights(50, 400, 4, "a"))
    # Binomial(50, 1 / 50).
    assert float(weights.var()) == pytest.approx(49 / 50, rel=0.05)


def test_bootstrap_interval_covers():
    covered = 0
    for i in range(200):
        sample = (random.uniform(5, range(1000 * i, 1000 * i + 80), "coin", dtype=F64) < 0.3).double()
        replicates = bootstrap_weights(80, 200, i, "coins") @ sample / 80
        interval = Interval.of(float(sample.mean()), replicates)
        assert interval.standard_error == pytest.approx(float(sample.std()) / math.sqrt(80), rel=0.25)
        covered += interval.low <= 0.3 <= interval.high
    # 95% of 200 with a standard deviation of 3, less what a discrete sample of 80 costs.
    assert 178 <= covered <= 199


def test_interval_is_moved_to_the_figure():
    replicates = 7.0 + torch.linspace(-1.0, 1.0, 201, dtype=F64)
    interval = Interval.of(5.0, replicates)
    assert (interval.low, interval.high) == pytest.approx((4.05, 5.95))
    assert Interval.of(5.0, replicates[:0]) == Interval(5.0, None, None, None)


# -- the classifier ------------------------------------------------------------------------------------------------


def test_classifier_learns_and_leaves_the_global_generator_alone(easy, tmp_path):
    model, _ = easy
    assert model.accuracy > 0.9
    assert model.classes == (10, 15, 20)
    state = torch.get_rng_state()
    again = fit_classifier(squares(300), squares(90, seed=1), config=EASY, folder=tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    features, probabilities = model.extract(load_images(squares(4), DataConfig()) / 255.0)
    assert features.shape == (4, 16) and not features.requires_grad
    assert probabilities.argmax(dim=1).tolist() == [0, 1, 2, 0]


def test_classifier_is_read_where_it_was_trained_before(easy, monkeypatch):
    model, folder = easy
    monkeypatch.setattr(classifier, "_train", lambda *_: pytest.fail("trained again"))
    again = fit_classifier(squares(300), squares(60, seed=2), config=EASY, folder=folder)
    assert again.identity == model.identity and again.accuracy > 0.9
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_hash_is_of_data_labels_options_and_version(monkeypatch):
    source = squares(30)
    images, labels = load_images(source, DataConfig()), source.labels
    other = images.clone()
    other[3, 0, 5, 5] += 1
    keys = [
        classifier._key(images, labels, EASY),
        classifier._key(other, labels, EASY),
        classifier._key(images, labels[::-1].copy(), EASY),
        classifier._key(images, labels, EASY.replace(seed=1)),
        classifier._key(images, labels, EASY.replace(width=16)),
        classifier._key(images.reshape(30, 1, 7, 28), labels, EASY),
    ]
    monkeypatch.setattr("lsgm_fast.__version__", "0.0.0")
    keys.append(classifier._key(images, labels, EASY))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert classifier._key(images.clone(), labels.copy(), EASY) == keys[0]


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "cannot be used"),
        (flip, "weights are not those"),
        (lambda data: data.replace(b'"key":"', b'"kex":"'), "other data"),
    ],
)
def test_a_damaged_file_is_trained_again(easy, tmp_path, caplog, monkeypatch, damage, said):
    model, folder = easy
    [file] = folder.iterdir()
    copy = tmp_path / file.name
    good = file.read_bytes()
    copy.write_bytes(damage(good))
    assert copy.read_bytes() != good
    with caplog.at_level(logging.WARNING, "lsgm_fast"):
        again = fit_classifier(squares(300), squares(90, seed=1), config=EASY, folder=tmp_path)
    assert said in caplog.text and str(copy) in caplog.text
    assert torch.equal(again.output.weight, model.output.weight)
    monkeypatch.setattr(classifier, "_train", lambda *_: pytest.fail("trained again"))
    fit_classifier(squares(300), squares(9), config=EASY, folder=tmp_path)


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    short = EASY.replace(epochs=1)
    model = fit_classifier(squares(30), squares(9), config=short, folder=tmp_path / "file")
    assert "not kept for the next evaluation" in caplog.text
    assert model.accuracy is not None


@pytest.mark.parametrize(
    ("size", "channels", "hidden"), [(14, 3, 4 * 4), (28, 1, 7 * 7), (32, 3, 8 * 8), (64, 1, 8 * 8)]
)
def test_classifier_takes_other_shapes(tmp_path, size, channels, hidden):
    source = squares(40, size=size, channels=channels, classes=2)
    model = fit_classifier(source, source, config=EASY.replace(epochs=1), folder=tmp_path)
    assert model.hidden.in_features == 32 * hidden
    assert model.classes == (10, 15)
    with pytest.raises(ValueError, match="takes images"):
        model.extract(torch.zeros(1, 4 - channels, size, size))


def test_classifier_refuses(tmp_path):
    unlabelled = ArrayImages("faces", squares(20).images)
    with pytest.raises(ValueError, match=r"faces has no labels.*lsgm-fast\[fid\]"):
        fit_classifier(unlabelled, unlabelled, folder=tmp_path)
    with pytest.raises(ValueError, match=r"at least 2 classes, got \[10\]"):
        fit_classifier(squares(20, classes=1), squares(20, classes=1), folder=tmp_path)
    tiny = ArrayImages("tiny", np.zeros((4, 1, 7, 9), np.uint8), np.arange(4))
    with pytest.raises(ValueError, match="at least 8 x 8"):
        fit_classifier(tiny, tiny, folder=tmp_path)
    for options in ({"width": 12}, {"epochs": 0}, {"learning_rate": 0.0}, {"shift": 0.5}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ClassifierConfig(**options)


@pytest.mark.slow
def test_classifier_of_the_digits(tmp_path):
    data = DataConfig()
    train, held_out = open_data(data, "train"), open_data(data, "held_out")
    model = fit_classifier(train, held_out, data, folder=tmp_path)
    assert model.accuracy > 0.95
    images, unseen = load_images(train, data), load_images(held_out, data)
    new = torch.arange(0, len(images), 9)
    known = np.setdiff1d(np.arange(len(images)), new.numpy())
    good = evaluate_quality(images[new], unseen, model, training=images[known], bootstrap=50)
    assert not good.memorisation_pixels.flagged and not good.memorisation_features.flagged
    assert good.kernel.low < 0.0 < good.kernel.high and good.precision.value > 0.85
    mirrored = evaluate_quality(images[new].flip(3), unseen, model, training=images[known], bootstrap=50)
    assert compare_quality(mirrored, good)["frechet"].low > 0.0
    copied = evaluate_quality(images[known[:500]], unseen, model, training=images[known], bootstrap=0)
    assert copied.memorisation_pixels.flagged and copied.memorisation_features.flagged


# -- reports -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets():
    return {name: load_images(squares(90, seed=i), DataConfig()) for i, name in enumerate("abcd")}


def test_report_of_good_and_bad_images(easy, sets):
    model, _ = easy
    good = evaluate_quality(sets["b"], sets["c"], model, training=sets["d"], bootstrap=60)
    assert json.loads(json.dumps(good.to_dict())) == good.to_dict()
    assert "replicates" not in good.to_dict()
    assert good.to_dict()["frechet_name"] == "classifier Frechet distance"
    assert (good.samples, good.reference, good.classes) == (90, 90, (10, 15, 20))
    assert good.features == model.identity
    assert good.kernel.low < 0.0 < good.kernel.high
    assert good.class_distance.value < 0.05 and sum(good.class_shares) == pytest.approx(1.0)
    assert not good.memorisation_pixels.flagged and not good.memorisation_features.flagged
    x = model.extract(sets["b"] / 255.0)[0]
    y = model.extract(sets["c"] / 255.0)[0]
    # torch.cov is another way to the same covariances; float32 features carry 7 digits.
    a, b = (exact(f.double().mean(0).tolist(), torch.cov(f.double().T).tolist()) for f in (x, y))
    assert good.frechet.value == pytest.approx(frechet_distance(a, b), rel=1e-3)
    assert good.confidence.value == pytest.approx(
        float(model.extract(sets["b"] / 255.0)[1].amax(1).mean()), rel=1e-5
    )

    one_class = sets["b"][sets["b"].shape[0] % 3 :: 3]
    bad = evaluate_quality(one_class, sets["c"], model, training=one_class, bootstrap=60)
    assert max(bad.class_shares) > 0.9
    assert bad.class_distance.value == pytest.approx(2 / 3, abs=0.1)
    assert bad.frechet.low > good.frechet.high and bad.kernel.low > 0.0
    assert bad.recall.high < good.recall.low and bad.coverage.high < good.coverage.low
    assert bad.memorisation_pixels.flagged and bad.memorisation_features.flagged
    # cdist in float64 leaves 1e-6 of equal images.
    assert bad.memorisation_pixels.median == pytest.approx(0.0, abs=1e-5)


def test_report_does_not_depend_on_batches(easy, sets):
    model, _ = easy
    options = {"training": sets["d"], "bootstrap": 5}
    one = evaluate_quality(sets["b"], sets["c"], model, **options)
    again = evaluate_quality(sets["b"], sets["c"], model, **options)
    assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(again, seconds=0.0)
    assert torch.equal(one.replicates["frechet"], again.replicates["frechet"])
    batch = types.SimpleNamespace
    parts = [batch(images=part / 255.0) for part in sets["b"].split(17)]
    several = evaluate_quality(iter(parts), sets["c"], model, **options)
    for name in METRICS:
        # Convolutions of other batch sizes round differently (float32).
        assert getattr(several, name).value == pytest.approx(getattr(one, name).value, rel=1e-4, abs=1e-5)
    assert several.memorisation_pixels.median == pytest.approx(one.memorisation_pixels.median, rel=1e-9)


def test_report_without_bootstrap(easy, sets):
    report = evaluate_quality(sets["b"], sets["c"], easy[0], bootstrap=0)
    assert report.frechet == Interval(report.frechet.value) and report.memorisation_pixels is None
    assert report.kernel.standard_error > 0.0 and report.kernel.low is None
    with pytest.raises(ValueError, match="bootstrap of at least 2, got 0"):
        compare_quality(report, report)


def test_comparison_of_paired_sets(easy, sets):
    model, _ = easy
    images = sets["b"] / 255.0
    a = evaluate_quality(images, sets["c"], model, bootstrap=100)
    same = compare_quality(a, a)
    assert set(same) == set(METRICS)
    assert all(dataclasses.astuple(interval) == (0.0, 0.0, 0.0, 0.0) for interval in same.values())
    noise = random.normal(0, range(90), "noise", images.shape[1:])
    b = evaluate_quality((images + 0.02 * noise).clamp(0.0, 1.0), sets["c"], model, bootstrap=100)
    difference = compare_quality(a, b)["confidence"]
    assert difference.value == a.confidence.value - b.confidence.value
    # Unpaired, the errors would add up.
    assert difference.standard_error < 0.7 * math.hypot(
        a.confidence.standard_error, b.confidence.standard_error
    )
    c = evaluate_quality((images + 0.3 * noise).clamp(0.0, 1.0), sets["c"], model, bootstrap=100)
    assert compare_quality(c, a)["frechet"].low > 0.0
    reverse, forward = compare_quality(a, c)["frechet"], compare_quality(c, a)["frechet"]
    assert (reverse.low, reverse.high) == pytest.approx((-forward.high, -forward.low))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed 0 and 1"),
        ({"k_density": 4}, "k_density 5 and 4"),
        ({"bootstrap": 9}, "bootstrap 10 and 9"),
    ],
)
def test_comparison_refuses_other_settings(easy, sets, changes, said):
    a = evaluate_quality(sets["b"], sets["c"], easy[0], bootstrap=10)
    b = evaluate_quality(sets["b"], sets["c"], easy[0], **({"bootstrap": 10} | changes))
    with pytest.raises(ValueError, match=said):
        compare_quality(a, b)
    other = evaluate_quality(sets["b"], sets["d"], easy[0], bootstrap=10)
    with pytest.raises(ValueError, match="reference_digest"):
        compare_quality(a, other)


def test_report_refuses(easy, sets):
    model, _ = easy
    with pytest.raises(ValueError, match="at least 10 images in each set, got 9 in samples"):
        evaluate_quality(sets["a"][:9], sets["b"], model)
    with pytest.raises(ValueError, match="bootstrap must be 0 or more, got -1"):
        evaluate_quality(sets["a"], sets["b"], model, bootstrap=-1)
    with pytest.raises(ValueError, match="batches are empty"):
        evaluate_quality([], sets["b"], model)
    with pytest.raises(ValueError, match=r"takes images \(1, 14, 14\), got \(1, 28, 28\)"):
        evaluate_quality(torch.zeros(20, 1, 28, 28), sets["b"], model)


def test_eight_bits_are_those_of_a_png():
    images = random.uniform(0, range(3), "images", (3, 4, 4)) * 1.4 - 0.2
    rounded = as_metrics_see(images)
    assert torch.equal(
        (rounded * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1), torch.from_numpy(to_uint8(images))
    )
    clipped = images.clamp(0.0, 1.0)
    assert torch.equal(as_metrics_see(clipped, quantise=False), clipped)
    assert not torch.equal(as_metrics_see(clipped), clipped)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got values from -0.*to 1.1"):
        as_metrics_see(images, quantise=False)
    with pytest.raises(ValueError, match="NaN or infinity"):
        as_metrics_see(images / 0.0, quantise=False)
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\)"):
        as_metrics_see(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_quantisation_reaches_the_report(easy, sets):
    coarse = (sets["b"] / 255.0 + 0.0019).clamp(max=1.0)  # less than half a level
    plain = evaluate_quality(sets["b"], sets["c"], easy[0], bootstrap=0)
    rounded = evaluate_quality(coarse, sets["c"], easy[0], bootstrap=0)
    raw = evaluate_quality(coarse, sets["c"], easy[0], bootstrap=0, quantise=False)
    assert rounded.frechet == plain.frechet != raw.frechet
    assert rounded.quantised and not raw.quantised


# -- two processes -------------------------------------------------------------------------------------------------


def _share(first, last, folder):
    """What a process with some of the images finds."""
    x = normals(9, 3)[first:last]
    statistics = FeatureStatistics.of(x).pooled()
    model = fit_classifier(squares(60), squares(30, seed=1), config=EASY, folder=folder)
    images = load_images(squares(45, seed=2), DataConfig())
    lower, upper = 5 * first, 5 * last
    report = evaluate_quality(
        images[lower:upper],
        load_images(squares(45, seed=3), DataConfig()),
        model,
        training=load_images(squares(60), DataConfig()),
        bootstrap=5,
    )
    return {
        "count": statistics.count,
        "mean": statistics.mean.numpy(),
        "m2": statistics.m2.numpy(),
        "rows": gather_rows(x).numpy(),
        "report": json.dumps(report.to_dict() | {"seconds": 0}),
        "weights": model.output.weight.numpy(),
        "world": distributed.world_size(),
    }


def test_two_processes_find_what_one_finds(tmp_path):
    one = _share(0, 9, str(tmp_path / "one"))
    pair = Pair()
    try:
        two = pair.run(_share, (0, 2, str(tmp_path / "two")), (2, 9, str(tmp_path / "none")))
        pair.close()
    finally:
        pair.kill()
    assert len(list((tmp_path / "two").iterdir())) == 1 and not (tmp_path / "none").exists()
    for result in two:
        assert result["world"] == 2 and result["count"] == 9
        np.testing.assert_allclose(result["mean"], one["mean"], rtol=1e-13)
        np.testing.assert_allclose(result["m2"], one["m2"], rtol=1e-12)
        np.testing.assert_array_equal(result["rows"], one["rows"])
        np.testing.assert_array_equal(result["weights"], one["weights"])
        report, expected = json.loads(result["report"]), json.loads(one["report"])
        assert report.keys() == expected.keys() and report["samples"] == 45
        for name in METRICS:
            assert report[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
        for name in ("memorisation_pixels", "memorisation_features"):
            assert report[name] == pytest.approx(expected[name], rel=1e-4)


# -- the Inception network -----------------------------------------------------------------------------------------


class Inception(torch.nn.Module):
    """Stands for the network of pytorch-fid: its features are the means of the channels."""

    BLOCK_INDEX_BY_DIM = {2048: 3}  # noqa: RUF012

    def __init__(self, blocks, resize_input, normalize_input):
        super().__init__()
        assert blocks == [3] and resize_input and normalize_input

    def forward(self, images):
        assert images.shape[1] == 3 and images.dtype == torch.float32
        assert float(images.min()) >= 0.0 and float(images.max()) <= 1.0
        return [images.mean(dim=(2, 3), keepdim=True)]


@pytest.fixture
def pytorch_fid(monkeypatch, tmp_path):
    """pytorch-fid, as far as it is used, and an empty folder for its weights."""
    module = types.ModuleType("pytorch_fid.inception")
    module.FID_WEIGHTS_URL = "https://example.org/fid_weights/pt_inception-1234.pth"
    module.InceptionV3 = Inception
    package = types.ModuleType("pytorch_fid")
    package.inception = module
    monkeypatch.setitem(sys.modules, "pytorch_fid", package)
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "hub" / "checkpoints" / "pt_inception-1234.pth"


def test_fid_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lsgm-fast\[fid\]"'):
        InceptionFeatures()


def test_fid_without_the_weights(pytorch_fid):
    with pytest.raises(FileNotFoundError) as error:
        InceptionFeatures()
    assert str(pytorch_fid) in str(error.value)
    assert "https://example.org/fid_weights/pt_inception-1234.pth" in str(error.value)


def test_fid_of_grey_images(pytorch_fid, sets):
    pytorch_fid.parent.mkdir(parents=True)
    pytorch_fid.touch()
    extractor = InceptionFeatures()
    features, probabilities = extractor.extract(sets["a"][:4] / 255.0)
    assert features.shape == (4, 3) and probabilities is None
    assert extractor.identity == "pt_inception-1234"
    report = evaluate_quality(sets["b"][:30], sets["c"][:30], extractor, bootstrap=0)
    assert (report.frechet_name, report.kernel_name) == ("FID", "KID")
    assert report.classes is report.class_distance is report.confidence is None
    # All features are one number m, so the distance is 3 ((mean - mean)^2 + (std - std)^2).
    means, means_of_data = (s[:30].double().mean(dim=(1, 2, 3)) / 255.0 for s in (sets["b"], sets["c"]))
    expected = (means.mean() - means_of_data.mean()) ** 2 + (means.std() - means_of_data.std()) ** 2
    assert report.frechet.value == pytest.approx(3 * float(expected), rel=1e-3)
    with pytest.raises(ValueError, match="4 and 3"):
        compare_quality(dataclasses.replace(report, k_density=4), dataclasses.replace(report, k_density=3))

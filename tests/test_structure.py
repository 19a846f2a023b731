"""The layout that every operation and the public names follow."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import lsgm_fast
from lsgm_fast import dispatch, ops, reference

PACKAGE = Path(lsgm_fast.__file__).parent


def stems(folder):
    return {p.stem for p in (PACKAGE / folder).glob("*.py") if not p.stem.startswith("_")}


def defined_in(stem):
    """Operations whose checks are written in ``ops/<stem>.py``."""
    return [op for op in dispatch.REGISTRY.values() if op.__module__ == f"lsgm_fast.ops.{stem}"]


def test_one_stem_per_operation():
    assert stems("ops") == stems("reference")
    assert len(dispatch.REGISTRY) >= 16


@pytest.mark.parametrize("stem", sorted(stems("ops")))
def test_operations_live_in_the_file_named_after_them(stem):
    found = defined_in(stem)
    assert found, f"ops/{stem}.py defines no operation"
    for op in found:
        # A file may hold several operations of one family: mixture_logistic_log_prob, mixture_logistic_mean.
        assert op.name == stem or op.name.startswith(f"{stem}_")
        assert getattr(ops, op.name) is op
        assert op.name in ops.__all__
        module = importlib.import_module(f"lsgm_fast.reference.{stem}")
        assert getattr(reference, op.name) is getattr(module, op.name)


def test_nothing_is_registered_elsewhere():
    assert {op.name for stem in stems("ops") for op in defined_in(stem)} == set(dispatch.REGISTRY)
    assert set(ops.__all__) == set(dispatch.REGISTRY)


@pytest.mark.parametrize("name", sorted(dispatch.REGISTRY))
def test_every_operation_is_documented(name):
    op = dispatch.REGISTRY[name]
    doc = inspect.getdoc(op)
    assert doc, name
    for section in ("Args:", "Returns:"):
        assert section in doc, f"{name} has no {section}"
    parameters = inspect.signature(op).parameters
    for parameter in parameters:
        described = re.search(rf"\b{parameter}\b", doc)
        assert parameter == "backend" or described, f"{name}: {parameter} is not described"
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["backend"].default is None


@pytest.mark.parametrize("name", sorted(dispatch.REGISTRY))
def test_reference_and_operation_have_one_signature(name):
    op = dispatch.REGISTRY[name]
    ours = {k: v.default for k, v in inspect.signature(op).parameters.items() if k != "backend"}
    theirs = {k: v.default for k, v in inspect.signature(getattr(reference, name)).parameters.items()}
    assert list(ours) == list(theirs)
    assert ours == theirs
    assert op.backends()[-1] == "reference"


PUBLIC = [
    "LSGM",
    "NCSNpp",
    "NVAE",
    "BackendUnsupported",
    "CheckpointError",
    "LSGMConfig",
    "NonFiniteError",
    "SDEConfig",
    "SamplingConfig",
    "ScoreConfig",
    "VAEConfig",
    "accelerate",
    "accelerate_diffusion",
    "build",
    "build_sde",
    "convert",
    "explain",
    "export",
    "load",
    "presets",
    "record",
    "use_backend",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    value = getattr(lsgm_fast, name)
    assert name in lsgm_fast.__all__
    assert name in dir(lsgm_fast)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), f"{name} has no docstring"


def test_everything_in_all_exists():
    for name in lsgm_fast.__all__:
        assert getattr(lsgm_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        _ = lsgm_fast.smaple


@pytest.mark.parametrize(
    "method",
    [
        "sample",
        "sample_iter",
        "sample_latents",
        "decode",
        "encode",
        "nelbo",
        "save",
        "predict_noise",
        "drift",
    ],
)
def test_methods_of_the_model_are_documented(method):
    assert inspect.getdoc(getattr(lsgm_fast.LSGM, method))


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (
            "sample",
            "n seed solver tol evaluations ode_eps temperature vae_temperature bn batch_size noise lower_noise crop "
            "progress on_batch",
        ),
        ("sample_iter", "total batch seed first solver tol evaluations bn noise lower_noise crop progress"),
        ("sample_latents", "n noise seed solver tol"),
        ("decode", "z lower_noise bn crop"),
        ("encode", "x noise"),
        ("nelbo", "x"),
        ("save", "path"),
    ],
)
def test_arguments_that_users_rely_on(method, arguments):
    parameters = inspect.signature(getattr(lsgm_fast.LSGM, method)).parameters
    assert set(arguments.split()) <= set(parameters)


def test_every_module_says_what_it_is_for():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        if source.strip():
            assert source.lstrip().startswith('"""'), f"{path.relative_to(PACKAGE)} has no docstring"

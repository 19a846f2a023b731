"""Exported programs: they run where lsgm_fast is not, and draw what the model draws."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lsgm_fast
from lsgm_fast import SDEConfig, cli, fused
from lsgm_fast.models.lsgm import LSGM

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
STEPS = 6
ROUNDING = 1e-5

# What the other process runs, besides the sampler of the page: every program at the batch sizes that it is given.
ELSEWHERE = """
import sys
import torch

sys.modules["lsgm_fast"] = None  # an import raises ImportError, also where it is installed
torch.set_num_threads(1)
jobs, results = torch.load(sys.argv[1]), []
with torch.no_grad():
    for job in jobs:
        folder, result = Path(job["folder"]), {}
        score, decoder = (torch.export.load(folder / f"{p}.pt2").module() for p in ("score", "decoder"))
        result["score"] = [score(z, t) for z, t, _ in job["batches"]]
        result["decoder"] = [decoder(z, *lower) for z, _, lower in job["batches"]]
        result["images"] = sample(folder, job["noise"], job["lower"], steps=job["steps"])
        results.append(result)
assert [name for name in sys.modules if name.startswith("lsgm_fast")] == ["lsgm_fast"]
torch.save(results, sys.argv[2])
"""


def block(kind: str) -> str:
    (found,) = re.findall(rf"^```python {kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


def build(preset: str) -> LSGM:
    """A model whose score network says more than the nearly nothing of a fresh one, and counts as much as r z."""
    torch.manual_seed(0)
    model = lsgm_fast.build(preset).eval()
    with torch.no_grad():
        for parameter in model.prior.parameters():
            if parameter.dim() > 1 and float(parameter.abs().max()) < 1e-2:
                nn.init.xavier_uniform_(parameter, gain=0.1)
        model.prior.mixing_logit.zero_()
    return model


def draws(shapes, n):
    return [torch.randn(n, *shape) for shape in shapes]


def calls(program):
    return [n for n in program.graph.nodes if n.op == "call_function"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, folder, statistics) of exports, and what another process made of them: (job, result)."""
    place = tmp_path_factory.mktemp("exported")
    jobs, exports = [], []
    for preset, bn in (("tiny-rgb", "running"), ("tiny-multiscale", "batch")):
        model = build(preset)
        folder = place / preset
        assert lsgm_fast.export(model, folder) == folder / "export.json"
        exports.append((model, folder, bn))
        batches = []
        for n in (1, 5):
            z, *lower = draws([model.latent_shape, *model.lower_shapes], n)
            batches.append((z, torch.rand(n), lower))
        noise, *lower = draws([model.latent_shape, *model.lower_shapes], 3)
        job = {"folder": str(folder), "batches": batches, "noise": noise, "lower": lower, "steps": STEPS}
        jobs.append(job)
    torch.save(jobs, place / "jobs.pt")
    (place / "program.py").write_text(block("sampler") + ELSEWHERE)
    # -I: no PYTHONPATH and no current folder on the path.
    command = [
        sys.executable,
        "-I",
        str(place / "program.py"),
        str(place / "jobs.pt"),
        str(place / "results.pt"),
    ]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(zip(exports, jobs, torch.load(place / "results.pt"), strict=True))


@torch.no_grad()
def test_the_programs_compute_what_the_model_does_at_every_batch_size(exported):
    for (model, _, bn), job, result in exported:
        for (z, t, lower), eps, images in zip(
            job["batches"], result["score"], result["decoder"], strict=True
        ):
            assert eps.shape == z.shape and (eps - model.predict_noise(z, t)).abs().max() < ROUNDING
            expected = model.decode(z, lower, bn=bn)
            assert images.shape == expected.shape and (images - expected).abs().max() < ROUNDING
        # Of five images, those of the other statistics are others: the kind that was asked for is in the file.
        other = {"running": "batch", "batch": "running"}[bn]
        assert (images - model.decode(z, lower, bn=other)).abs().max() > 100 * ROUNDING


def test_the_sampler_of_the_page_draws_the_images_of_the_model(exported):
    for (model, _, _), job, result in exported:
        expected = model.sample(
            3,
            solver="dpmpp_2m",
            evaluations=STEPS,
            grid="quadratic",
            noise=job["noise"],
            lower_noise=job["lower"],
        )
        assert (result["images"] - expected).abs().max() < 1e-4
        assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_the_files_hold_operators_of_pytorch_and_folded_weights(exported):
    for (model, folder, _), _, _ in exported:
        score, decoder = (torch.export.load(folder / f"{p}.pt2") for p in ("score", "decoder"))
        for program in (score, decoder):
            spaces = {n.target.namespace for n in calls(program) if hasattr(n.target, "namespace")}
            assert "aten" in spaces and spaces <= {"aten", "higher_order"}
        assert all(name.startswith("prior.") for name in score.state_dict)
        # Nothing of the encoder is left, and no norm of a weight.
        names = decoder.state_dict
        assert not any(
            part in n for n in names for part in ("log_weight_norm", ".encoder", ".posterior", ".flows")
        )
        assert sum("prepared_weight" in n for n in names) == len(model.vae.decoder_convs)
        assert not any("vector_norm" in str(n.target) for n in calls(decoder))


def test_the_description(exported):
    (model, folder, _), *_ = exported[1]
    about = json.loads((folder / "export.json").read_text())
    assert SDEConfig.from_dict(about["sde"]) == model.sde.config
    assert [tuple(s) for s in about["lower_shapes"]] == model.lower_shapes
    assert tuple(about["latent_shape"]) == model.latent_shape
    assert about["sampling"] == {"ode_eps": model.sampling.ode_eps, "tol": model.sampling.tol, "bn": "batch"}
    assert (about["dtype"], about["weights"], about["device"]) == ("float32", "float32", "cpu")
    assert about["prior_std"] == 1.0 and about["format"] == 1
    assert about["versions"] == {"lsgm_fast": lsgm_fast.__version__, "torch": torch.__version__}
    decoder = about["parts"]["decoder"]
    assert decoder["file"] == "decoder.pt2" and decoder["output"] == ["B", 3, 64, 64]
    assert list(decoder["inputs"]) == ["z", "lower_0", "lower_1"]
    assert decoder["inputs"]["lower_1"] == ["B", *model.lower_shapes[1]]
    assert set(about) == set(
        re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)))
    )
    assert sorted(p.name for p in folder.iterdir()) == ["decoder.pt2", "export.json", "score.pt2"]


@pytest.mark.parametrize(
    "config",
    [
        SDEConfig(),
        SDEConfig(sigma2_0=1e-4),
        SDEConfig("sub_vpsde", sigma2_0=1e-4),
        SDEConfig("geometric_sde", sigma2_0=3e-5, sigma2_min=3e-5),
        SDEConfig("vesde", sigma2_0=1e-4, sigma2_min=1e-4, sigma2_max=100.0),
    ],
    ids=lambda c: f"{c.name}-{c.sigma2_0}",
)
def test_the_diffusions_of_the_page(config):
    page = {}
    exec(block("sampler"), page)
    sde = lsgm_fast.build_sde(config)
    for t in (1e-5, 0.01, 0.3, 1.0):
        m, std = page["mean_and_std"](config.to_dict(), t)
        assert m == pytest.approx(float(sde.mean_coef(t)), rel=1e-10)
        assert std == pytest.approx(float(sde.var(t).sqrt()), rel=1e-10)


# -- other models -----------------------------------------------------------------------------------------------------


class Vae(nn.Module):
    latent_shape = (2, 4, 4)

    def __init__(self, looks_at_values=False):
        super().__init__()
        self.head = Head() if looks_at_values else nn.Conv2d(2, 1, 1)

    def decode(self, z, **options):
        return torch.sigmoid(self.head(z))


class Head(nn.Module):
    def forward(self, z):
        return z if z.sum().item() > 0.0 else -z


class Prior(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, z, t):
        return self.dropout(self.conv(z)) * t[:, None, None, None]


@torch.no_grad()
def test_own_modules_and_their_mode(tmp_path):
    model = LSGM(Vae(), Prior(), SDEConfig())
    model.prior.conv.eval()
    lsgm_fast.export(model, tmp_path / "new" / "folder")
    assert model.training and model.prior.dropout.training and not model.prior.conv.training
    model.eval()
    z, t = torch.randn(3, 2, 4, 4), torch.rand(3)
    score, decoder = (
        torch.export.load(tmp_path / "new" / "folder" / f"{p}.pt2").module() for p in ("score", "decoder")
    )
    assert torch.allclose(score(z, t), model.predict_noise(z, t))
    assert torch.allclose(decoder(z), model.decode(z))


@torch.no_grad()
def test_half_precision_takes_float32(tmp_path):
    model = LSGM(Vae(), Prior(), SDEConfig()).eval().bfloat16()
    about = json.loads(lsgm_fast.export(model, tmp_path).read_text())
    assert (about["dtype"], about["weights"]) == ("float32", "bfloat16")
    z, t = torch.randn(3, 2, 4, 4), torch.rand(3)
    score, decoder = (torch.export.load(tmp_path / f"{p}.pt2").module() for p in ("score", "decoder"))
    assert score(z, t).dtype == torch.float32
    assert torch.equal(score(z, t), model.predict_noise(z, t))
    assert torch.equal(decoder(z), model.decode(z).float())


def test_a_module_that_cannot_be_traced_is_named_and_nothing_is_written(tmp_path):
    model = LSGM(Vae(looks_at_values=True), Prior(), SDEConfig())
    with pytest.raises(
        ValueError, match=r"cannot trace the decoder, at vae\.head \(Head\): .*data-dependent"
    ):
        lsgm_fast.export(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_fails_leaves_the_earlier_export(tmp_path, monkeypatch):
    model = LSGM(Vae(), Prior(), SDEConfig())
    for name in ("score.pt2", "decoder.pt2", "export.json"):
        (tmp_path / name).write_text("earlier")
    save = torch.export.save

    def full(program, path):
        save(program, path)
        if "decoder" in Path(path).name:
            raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="disk full"):
        lsgm_fast.export(model, tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("score.pt2", "decoder.pt2", "export.json"), "earlier"
    )


def test_bad_input(tmp_path):
    model = LSGM(Vae(), None, SDEConfig())
    with pytest.raises(ValueError, match=r"holds only a VAE .* parts=\('decoder',\)"):
        lsgm_fast.export(model, tmp_path)
    with pytest.raises(ValueError, match="unknown part 'decode': .* did you mean 'decoder'"):
        lsgm_fast.export(model, tmp_path, parts=("decode",))
    with pytest.raises(ValueError, match="parts is empty"):
        lsgm_fast.export(model, tmp_path, parts=())
    with pytest.raises(ValueError, match="unknown BatchNorm statistics 'bach'"):
        lsgm_fast.export(model, tmp_path, parts="decoder", bn="bach")
    with pytest.raises(TypeError, match="expected an LSGM, got str: load a file"):
        lsgm_fast.export("demo", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="it is a file, give a folder"):
        lsgm_fast.export(model, tmp_path / "file", parts="decoder")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lsgm_fast, "load", lambda path, device: LSGM(Vae(), None, SDEConfig()), raising=False)
    out = tmp_path / "out"
    assert cli.main(["export", "vae.pt", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == {"decoder": str(out / "decoder.pt2")}
    assert report["bytes"]["decoder"] == (out / "decoder.pt2").stat().st_size
    assert report["export"] == json.loads((out / "export.json").read_text())
    assert cli.main(["export", "vae.pt", "--out", str(out)]) == 2
    assert "holds an export already: choose another folder or add --force" in capsys.readouterr().err
    assert cli.main(["export", "vae.pt", "--out", str(out), "--force", "--part", "score"]) == 2
    assert "holds only a VAE" in capsys.readouterr().err
    assert cli.main(["export", "vae.pt", "--out", str(out), "--force", "--bn", "batch"]) == 0
    assert "decoder.pt2 (" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert cli.main(["export", "vae.pt", "--out", str(tmp_path / "file")]) == 2
    assert "file is not a folder" in capsys.readouterr().err


# -- with kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(fused.unavailable("cpu", "cpu") is not None, reason="no CPU library")
@torch.no_grad()
def test_the_kernels_are_operators_that_can_be_exported(tmp_path):
    model = build("tiny-binary")
    z, t = torch.randn(2, *model.latent_shape), torch.rand(2)
    batch = torch.export.Dim("batch", min=1)
    with lsgm_fast.use_backend("cpu"):
        program = torch.export.export(model.prior, (z, t), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, tmp_path / "network.pt2")
    program = torch.export.load(tmp_path / "network.pt2")
    assert any("lsgm_fast.group_norm_swish" in str(n.target) for n in calls(program))
    network = program.module()
    for n in (1, 5):
        z, t = torch.randn(n, *model.latent_shape), torch.rand(n)
        assert torch.allclose(network(z, t), model.prior(z, t), atol=ROUNDING)
    with lsgm_fast.use_backend("auto"):
        fixed = torch.export.export(model.prior, (z, t)).module()
    assert torch.allclose(fixed(z, t), model.prior(z, t), atol=ROUNDING)


@pytest.mark.slow
def test_aotinductor_compiles_an_exported_evaluation(exported, tmp_path, monkeypatch):
    (model, folder, _), *_ = exported[0]
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "score.pt2").write_bytes((folder / "score.pt2").read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(block("aoti"), {"torch": torch})
    run = torch._inductor.aoti_load_package(str(tmp_path / "exported" / "score_compiled.pt2"))
    for n in (1, 5):
        z, t = torch.randn(n, *model.latent_shape), torch.rand(n)
        with torch.no_grad():
            assert torch.allclose(run(z, t), model.predict_noise(z, t), atol=ROUNDING)

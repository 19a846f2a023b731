"""An LSGM of text, symbol by symbol: both stages, bits per symbol on held-out chunks, and samples.

    python3 examples/text.py --minutes 5

trains each stage for about five minutes on one processor core. The text is that of Python's own documentation, or
``--data``: a .txt in UTF-8 or a folder of them. Baselines are computed on the same held-out chunks, from the same
training chunks. docs/discrete.md has figures of such a run.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit

from lsgm_fast import load
from lsgm_fast.data import ImageSource, batches, decode_text, open_data
from lsgm_fast.evaluation import NelboReport, evaluate_nelbo
from lsgm_fast.training import Trainer, TrainingConfig
from lsgm_fast.training.assemble import assemble
from lsgm_fast.training.config import read_config


def steps_in(config: TrainingConfig, minutes: float, folder: Path) -> int:
    """As many steps as fit; those of the run that is in the folder already, so that it goes on."""
    if (folder / "config.yaml").exists():
        return int(read_config(folder / "config.yaml")["steps"])
    with tempfile.TemporaryDirectory() as trial:
        short = config.replace(steps=20, warmup_steps=0, log_every=10, eval_every=0, sample_every=0)
        Trainer(short, trial, progress=False).run()
        last = json.loads((Path(trial) / "metrics.jsonl").read_text().splitlines()[-1])
    return max(20, int(60 * minutes * last["images_per_second"] / config.batch_size))


def train(stage: str, minutes: float, out: Path, overrides: list[str], vae: Path | None = None) -> Path:
    """The model's file."""
    config = assemble(stage, recipe="text", overrides=overrides, vae=str(vae) if vae else None)
    config = config.replace(steps=steps_in(config, minutes, out / stage))
    print(f"stage {stage}: {config.steps} steps of {config.batch_size} chunks", flush=True)
    result = Trainer(config, out / stage).run()
    if result.interrupted:
        raise SystemExit(f"stopped at step {result.step}: start it again to go on")
    return result.model


def codes(source: ImageSource) -> np.ndarray:
    """The classes of every chunk: (chunks, symbols of a chunk)."""
    return np.stack([source[i].argmax(axis=0).reshape(-1) for i in range(len(source))])


def baselines(train: np.ndarray, held_out: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Bits per symbol of each held-out chunk.

    unigram: frequencies, each count plus one. bigram: ``(n(a, b) + K p(b)) / (n(a) + K)``, which falls back to the
    unigram p for rare a; a chunk's first symbol, which has no predecessor, is coded by p.
    """
    unigram = np.bincount(train.ravel(), minlength=classes) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((classes, classes))
    np.add.at(pairs, (train[:, :-1].ravel(), train[:, 1:].ravel()), 1.0)
    bigram = (pairs + classes * unigram) / (pairs.sum(axis=1, keepdims=True) + classes)
    first = np.log2(unigram[held_out[:, :1]])
    following = np.log2(bigram[held_out[:, :-1], held_out[:, 1:]])
    return {
        "uniform": np.full(len(held_out), math.log2(classes)),
        "unigram": -np.log2(unigram[held_out]).mean(axis=1),
        "bigram": -np.concatenate((first, following), axis=1).mean(axis=1),
    }


def interval(values: np.ndarray) -> str:
    """Mean and 95% interval (Student's t over chunks)."""
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():7.3f} [{values.mean() - half:.3f}, {values.mean() + half:.3f}]"


def per_symbol(report: NelboReport) -> np.ndarray:
    """Bits per symbol of every chunk."""
    return report.values.numpy() / (report.dims * math.log(2.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of training for each stage (5)")
    parser.add_argument("--data", default="pydoc", help="'pydoc', a .txt, or a folder of them")
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="folder of both runs (runs/text)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    overrides = [f"data.source={options.data}"]
    config = assemble("vae", recipe="text", overrides=overrides)
    parts = {split: open_data(config.data, split) for split in ("train", "held_out")}
    symbols = config.model.vae.symbols
    print(f"{len(parts['train'])} chunks to train on, {len(parts['held_out'])} held out, of {symbols!r}")

    stage1 = train("vae", options.minutes, options.out, overrides)
    stage2 = train("lsgm", options.minutes, options.out, overrides, stage1)

    bits = baselines(codes(parts["train"]), codes(parts["held_out"]), len(symbols))
    for name, file in (("VAE, N(0, I)", stage1), ("LSGM", stage2)):
        stream = batches(parts["held_out"], config.data, batch_size=50, seed=0, train=False)
        bits[name] = per_symbol(evaluate_nelbo(load(file), stream, draws=8))
    print("\nheld-out bits per symbol, mean [95% interval over chunks]; the models' are upper bounds")
    for name, values in bits.items():
        print(f"{name:14s}{interval(values)}")
    print("the same chunks, one minus the other")
    for other in ("unigram", "bigram", "VAE, N(0, I)"):
        print(f"LSGM - {other:14s}{interval(bits['LSGM'] - bits[other])}")

    model = load(stage2)
    print("\nsamples")
    for text in decode_text(model.sample(4, seed=0), symbols):
        print(repr(text))


if __name__ == "__main__":
    main()

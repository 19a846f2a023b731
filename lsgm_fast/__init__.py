"""lsgm_fast: score-based generative modelling in latent space (LSGM), fast on today's PyTorch.

>>> import lsgm_fast
>>> model = lsgm_fast.load("demo")
>>> images = model.sample(4, seed=0, tol=1e-2)      # (4, 1, 28, 28) in [0, 1]
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a source checkout the Triton kernels lie beside this package, not in it; an installed copy holds them.
_source_root = Path(__file__).resolve().parent.parent
if (
    not (_source_root / "lsgm_fast" / "kernels").exists()
    and (_source_root / "kernels" / "__init__.py").exists()
):
    __path__.append(str(_source_root))

_EXPORTS = {
    "LSGM": "lsgm_fast.models",
    "NCSNpp": "lsgm_fast.models",
    "NVAE": "lsgm_fast.models",
    "BackendUnsupported": "lsgm_fast.errors",
    "CheckpointError": "lsgm_fast.errors",
    "LSGMConfig": "lsgm_fast.config",
    "NonFiniteError": "lsgm_fast.errors",
    "SDEConfig": "lsgm_fast.config",
    "SamplingConfig": "lsgm_fast.config",
    "ScoreConfig": "lsgm_fast.config",
    "VAEConfig": "lsgm_fast.config",
    "accelerate": "lsgm_fast.engine.accelerate",
    "accelerate_diffusion": "lsgm_fast.engine.diffusion",
    "build": "lsgm_fast.checkpoints",
    "build_sde": "lsgm_fast.sde",
    "convert": "lsgm_fast.checkpoints",
    "explain": "lsgm_fast.dispatch",
    "export": "lsgm_fast.engine.export",
    "load": "lsgm_fast.checkpoints",
    "record": "lsgm_fast.dispatch",
    "set_backend": "lsgm_fast.dispatch",
    "use_backend": "lsgm_fast.dispatch",
}
_SUBMODULES = (
    "checkpoints",
    "config",
    "dispatch",
    "models",
    "ops",
    "presets",
    "reference",
    "sampling",
    "sde",
)

__all__ = [*_EXPORTS, *_SUBMODULES]

if TYPE_CHECKING:
    from lsgm_fast.checkpoints import build, convert, load
    from lsgm_fast.config import LSGMConfig, SamplingConfig, ScoreConfig, SDEConfig, VAEConfig
    from lsgm_fast.dispatch import explain, record, set_backend, use_backend
    from lsgm_fast.engine.accelerate import accelerate
    from lsgm_fast.engine.diffusion import accelerate_diffusion
    from lsgm_fast.engine.export import export
    from lsgm_fast.errors import BackendUnsupported, CheckpointError, NonFiniteError
    from lsgm_fast.models import LSGM, NVAE, NCSNpp
    from lsgm_fast.sde import build_sde


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that the command line answers --help without importing torch.
    if name in _EXPORTS:
        # The operations register themselves; backends are chosen among what is registered.
        importlib.import_module("lsgm_fast.ops")
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"lsgm_fast.{name}")
    else:
        raise AttributeError(f"module 'lsgm_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""The models: NVAE, NCSN++ and their combination LSGM."""

from __future__ import annotations

from lsgm_fast.models.lsgm import LSGM, VAE, Nelbo, SamplingInfo, ScoreNetwork
from lsgm_fast.models.ncsnpp import NCSNpp
from lsgm_fast.models.nvae import NVAE, LatentGroup

__all__ = ["LSGM", "NVAE", "VAE", "LatentGroup", "NCSNpp", "Nelbo", "SamplingInfo", "ScoreNetwork"]

"""Layers and cells that the VAE and the score network are made of."""

from __future__ import annotations

"""Configuration of an LSGM: plain frozen dataclasses that round-trip through JSON.

They carry everything that cannot be read off the weights, so a saved model is one file: weights plus
``LSGMConfig`` in the header.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lsgm_fast.errors import unknown_name

T = TypeVar("T", bound="_Config")

SDE_NAMES = ("vpsde", "geometric_sde", "sub_vpsde", "vesde")
DECODER_DISTRIBUTIONS = ("mixture_logistic", "logistic", "normal", "bernoulli", "categorical")
CELL_ARCHITECTURES = ("res_bnswish", "res_bnswish2", "res_mbconv")


@dataclass(frozen=True)
class _Config:
    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable Python objects (tuples become lists)."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, _Config):
                value = value.to_dict()
            elif isinstance(value, tuple):
                value = list(value)
            out[f.name] = value
        return out

    @classmethod
    def from_dict(cls: type[T], values: dict[str, Any]) -> T:
        """Inverse of :meth:`to_dict`. Missing keys take their default.

        Numbers may come as text (YAML reads ``1e-3`` as text); a field that holds a configuration takes a dictionary.

        Raises:
            ValueError: an unknown key (the closest is named), or a value of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} expects a dictionary, got {type(values).__name__}")
        known = get_type_hints(cls)
        kwargs: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise unknown_name(f"{cls.__name__} option", key, known)
            kwargs[key] = _converted(f"{cls.__name__} option {key!r}", value, known[key])
        return cls(**kwargs)

    def replace(self: T, **changes: Any) -> T:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _converted(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type that ``hint`` asks for."""
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not Ellipsis]
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} expects a list, got {value!r}")
        return tuple(_converted(name, item, kinds[0]) for item in value)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if not isinstance(kind, type) or kind is type(None):
            continue
        if issubclass(kind, _Config):
            return value if isinstance(value, kind) else kind.from_dict(value)
        # True is an int to Python, and 8.0 an integer to whoever wrote it.
        if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value
        if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                continue
            if kind is float:
                return number
            if number.is_integer():
                return int(number)
    expected = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ValueError(f"{name} expects {expected}, got {value!r}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class SDEConfig(_Config):
    """The forward diffusion (paper, section 2 and Appendix B).

    ``sigma2_0``: variance at t=0; ``sigma2_min`` / ``sigma2_max``: geometric and VE variances;
    ``beta_start`` / ``beta_end``: VP and sub-VP; ``time_eps``: smallest training time;
    ``parity``: ``"exact"`` or ``"published"`` (the release's float32 formulas, cancellation included).
    """

    name: str = "vpsde"
    beta_start: float = 0.1
    beta_end: float = 20.0
    sigma2_0: float = 0.0
    sigma2_min: float = 3e-5
    sigma2_max: float = 0.999
    time_eps: float = 0.01
    parity: str = "exact"

    def __post_init__(self) -> None:
        if self.name not in SDE_NAMES:
            raise unknown_name("SDE", self.name, SDE_NAMES)
        if self.parity not in ("exact", "published"):
            raise unknown_name("parity", self.parity, ("exact", "published"))
        _require(0.0 <= self.sigma2_0 < 1.0, f"sigma2_0 must be in [0, 1), got {self.sigma2_0}")
        _require(0.0 <= self.time_eps < 1.0, f"time_eps must be in [0, 1), got {self.time_eps}")
        _require(
            0.0 < self.beta_start <= self.beta_end,
            f"expected 0 < beta_start <= beta_end, got {self.beta_start} and {self.beta_end}",
        )
        _require(
            0.0 < self.sigma2_min < self.sigma2_max,
            f"expected 0 < sigma2_min < sigma2_max, got {self.sigma2_min} and {self.sigma2_max}",
        )


@dataclass(frozen=True)
class VAEConfig(_Config):
    """An NVAE as used in LSGM (lowest resolution = the scale that the score-based prior models).

    ``channel_mult[k]`` multiplies the channels at resolution level k (level 0 = image resolution after the
    stem), so it has ``preprocess_blocks + latent_scales`` entries. ``image_size`` is what the network sees;
    ``crop`` is the border that padding added on each side (2 for 28x28 digits padded to 32x32).

    ``decoder_distribution="categorical"``: every position is one of ``image_channels`` classes, as one-hot images.
    ``symbols``: the character of each class where these are text (the last one stands for all others), else empty.
    """

    image_channels: int = 3
    image_size: int = 32
    crop: int = 0
    encoder_channels: int = 128
    decoder_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2)
    preprocess_blocks: int = 1
    preprocess_cells: int = 2
    postprocess_blocks: int = 1
    postprocess_cells: int = 2
    encoder_cells_per_group: int = 2
    decoder_cells_per_group: int = 2
    latent_scales: int = 1
    groups_per_scale: int = 20
    latents_per_group: int = 9
    flows_per_group: int = 0
    architecture: str = "res_bnswish"
    squeeze_excite: bool = True
    input_skip: bool = False
    decoder_distribution: str = "mixture_logistic"
    num_bits: int = 8
    log_sigma_scale: float = 5.0
    symbols: str = ""

    def __post_init__(self) -> None:
        if self.architecture not in CELL_ARCHITECTURES:
            raise unknown_name("cell architecture", self.architecture, CELL_ARCHITECTURES)
        if self.decoder_distribution not in DECODER_DISTRIBUTIONS:
            raise unknown_name("decoder distribution", self.decoder_distribution, DECODER_DISTRIBUTIONS)
        _require(
            self.image_channels >= 2 or self.decoder_distribution != "categorical",
            "the categorical distribution needs a channel for each of 2 or more classes, got "
            f"image_channels={self.image_channels}",
        )
        if self.symbols:
            _require(
                self.decoder_distribution == "categorical",
                f"symbols are for decoder_distribution='categorical', got {self.decoder_distribution!r}",
            )
            _require(
                len(self.symbols) == len(set(self.symbols)) == self.image_channels,
                f"symbols must be image_channels={self.image_channels} different characters, got {self.symbols!r}",
            )
        levels = self.preprocess_blocks + self.latent_scales
        _require(
            len(self.channel_mult) == levels,
            f"channel_mult must have preprocess_blocks + latent_scales = {levels} entries, got {self.channel_mult}",
        )
        _require(
            self.postprocess_blocks == self.preprocess_blocks,
            "postprocess_blocks must equal preprocess_blocks, or the decoder would not return to the image's "
            f"resolution: got {self.postprocess_blocks} and {self.preprocess_blocks}",
        )
        factor = 2 ** (levels - 1)
        _require(
            self.image_size % factor == 0,
            f"image_size must be a multiple of {factor} for {levels} resolution levels, got {self.image_size}",
        )
        _require(5 <= self.num_bits <= 8, f"num_bits must be between 5 and 8, got {self.num_bits}")

    @property
    def dims(self) -> int:
        """Number of outcomes that an image is: its natural area, times the channels unless these are classes."""
        area = (self.image_size - 2 * self.crop) ** 2
        return area if self.decoder_distribution == "categorical" else self.image_channels * area

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latent that the prior models: all groups of the lowest scale."""
        size = self.image_size // 2 ** (self.preprocess_blocks + self.latent_scales - 1)
        return (self.groups_per_scale * self.latents_per_group, size, size)


@dataclass(frozen=True)
class ScoreConfig(_Config):
    """An NCSN++ score network (paper, Appendix G; Song et al. 2021 with BigGAN blocks).

    Attention is placed after every residual block of the levels in ``attention_levels`` on the way down and once
    on the way up, and always in the middle. ``resample``: ``"fir"`` ([1, 3, 3, 1]) or ``"plain"`` (nearest / mean).
    """

    latent_channels: int = 180
    latent_size: int = 16
    channels: int = 512
    channel_mult: tuple[int, ...] = (1, 1, 1)
    blocks_per_level: int = 8
    attention_levels: tuple[int, ...] = (0,)
    dropout: float = 0.2
    resample: str = "fir"
    embedding: str = "positional"
    embedding_dim: int = 128
    embedding_scale: float = 1000.0
    mixed_prediction: bool = True
    mixing_logit_init: float = -3.0

    def __post_init__(self) -> None:
        if self.resample not in ("fir", "plain"):
            raise unknown_name("resampling", self.resample, ("fir", "plain"))
        if self.embedding not in ("positional", "fourier"):
            raise unknown_name("time embedding", self.embedding, ("positional", "fourier"))
        _require(
            self.embedding_dim >= 4 and self.embedding_dim % 2 == 0,
            f"embedding_dim must be even and at least 4, got {self.embedding_dim}",
        )
        factor = 2 ** (len(self.channel_mult) - 1)
        _require(
            self.latent_size % factor == 0,
            f"latent_size must be a multiple of {factor} for {len(self.channel_mult)} levels, got {self.latent_size}",
        )


@dataclass(frozen=True)
class SamplingConfig(_Config):
    """How the recipe samples: ODE end time, tolerance (rtol = atol), BatchNorm statistics in the decoder.

    ``grids``: times optimised for this model, each from 1 to ``ode_eps``; ``solver="exponential"`` with as many
    evaluations as one has steps takes it.
    """

    ode_eps: float = 1e-5
    tol: float = 1e-5
    bn: str = "running"
    grids: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.bn not in ("running", "batch"):
            raise unknown_name("BatchNorm statistics", self.bn, ("running", "batch"))
        _require(0.0 < self.ode_eps < 1.0, f"ode_eps must be in (0, 1), got {self.ode_eps}")
        _require(self.tol > 0.0, f"tol must be positive, got {self.tol}")
        object.__setattr__(self, "grids", tuple(tuple(float(t) for t in grid) for grid in self.grids))
        for grid in self.grids:
            falls = len(grid) > 1 and all(a > b for a, b in pairwise(grid))
            _require(
                falls and (grid[0], grid[-1]) == (1.0, self.ode_eps),
                f"a grid must fall from 1.0 to ode_eps={self.ode_eps}, got {grid}",
            )

    def grid_of(self, steps: int) -> tuple[float, ...] | None:
        """The grid optimised for that number of steps, if there is one."""
        return next((grid for grid in self.grids if len(grid) == steps + 1), None)

    def with_grid(self, times: Sequence[float]) -> SamplingConfig:
        """A copy that has these times in place of others with as many steps."""
        others = [grid for grid in self.grids if len(grid) != len(times)]
        return self.replace(grids=(*others, tuple(times)))


@dataclass(frozen=True)
class LSGMConfig(_Config):
    """Everything needed to rebuild a model: VAE, score network, diffusion and recommended sampling.

    ``score`` is None for a stage-1 file that holds only a VAE.
    """

    vae: VAEConfig = field(default_factory=VAEConfig)
    score: ScoreConfig | None = field(default_factory=ScoreConfig)
    sde: SDEConfig = field(default_factory=SDEConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.score is None:
            return
        expected = self.vae.latent_shape
        got = (self.score.latent_channels, self.score.latent_size, self.score.latent_size)
        _require(
            expected == got,
            f"the VAE's latent is {expected} but the score network expects {got} (channels, h, w)",
        )

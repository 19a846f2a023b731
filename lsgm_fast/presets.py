"""Every published configuration by name, and tiny ones for tests, benchmarks and trying things out."""

from __future__ import annotations

from lsgm_fast.config import LSGMConfig, SamplingConfig, ScoreConfig, SDEConfig, VAEConfig
from lsgm_fast.errors import unknown_name


def _cifar10(sde: SDEConfig, vae: VAEConfig) -> LSGMConfig:
    channels, size, _ = vae.latent_shape
    score = ScoreConfig(latent_channels=channels, latent_size=size, attention_levels=(0,))
    return LSGMConfig(vae, score, sde, SamplingConfig(ode_eps=1e-6, tol=1e-5))


def _binary(vae: VAEConfig, levels: int, attention_levels: tuple[int, ...]) -> LSGMConfig:
    channels, size, _ = vae.latent_shape
    score = ScoreConfig(
        latent_channels=channels,
        latent_size=size,
        channels=256,
        channel_mult=(1,) * levels,
        attention_levels=attention_levels,
        resample="plain",
        mixing_logit_init=-6.0,
    )
    return LSGMConfig(vae, score, SDEConfig(), SamplingConfig(ode_eps=1e-5, tol=1e-5))


def _celebahq256(
    latent_scales: int,
    groups: int,
    flows: int,
    channel_mult: tuple[int, ...],
    score: ScoreConfig,
    sde: SDEConfig,
    tol: float,
) -> LSGMConfig:
    vae = VAEConfig(
        image_size=256,
        encoder_channels=64,
        decoder_channels=64,
        channel_mult=channel_mult,
        latent_scales=latent_scales,
        groups_per_scale=groups,
        latents_per_group=20,
        flows_per_group=flows,
        architecture="res_mbconv",
        input_skip=True,
        num_bits=5,
    )
    # The published CelebA-HQ commands decode with the batch's BatchNorm statistics (--vae_train_mode).
    return LSGMConfig(vae, score, sde, SamplingConfig(ode_eps=1e-5, tol=tol, bn="batch"))


_DIGITS = VAEConfig(
    image_channels=1,
    crop=2,
    encoder_channels=64,
    decoder_channels=64,
    architecture="res_mbconv",
    decoder_distribution="bernoulli",
    latents_per_group=20,
)
_GEOMETRIC = SDEConfig(name="geometric_sde", sigma2_0=3e-5, sigma2_min=3e-5, sigma2_max=0.999, time_eps=0.0)
_QUALITATIVE_SCORE = ScoreConfig(
    latent_channels=200,
    latent_size=64,
    channels=256,
    channel_mult=(1, 1, 2, 2, 2),
    attention_levels=(2,),
    mixing_logit_init=-6.0,
)
_TINY_VAE = VAEConfig(
    encoder_channels=16,
    decoder_channels=16,
    preprocess_cells=1,
    postprocess_cells=1,
    encoder_cells_per_group=1,
    decoder_cells_per_group=1,
    groups_per_scale=2,
    latents_per_group=4,
)
_TINY_SCORE = ScoreConfig(
    channels=16, channel_mult=(1, 1), blocks_per_level=1, attention_levels=(0,), mixing_logit_init=-3.0
)

PRESETS: dict[str, LSGMConfig] = {
    "mnist": _binary(
        _DIGITS.replace(
            channel_mult=(1, 2, 2),
            preprocess_blocks=2,
            postprocess_blocks=2,
            preprocess_cells=3,
            postprocess_cells=3,
            encoder_cells_per_group=1,
            decoder_cells_per_group=1,
            groups_per_scale=2,
        ),
        levels=2,
        attention_levels=(),
    ),
    "omniglot": _binary(
        _DIGITS.replace(encoder_cells_per_group=3, decoder_cells_per_group=3, groups_per_scale=3),
        levels=3,
        attention_levels=(0,),
    ),
    "cifar10-fid": _cifar10(SDEConfig(), VAEConfig()),
    "cifar10-balanced": _cifar10(SDEConfig(), VAEConfig()),
    "cifar10-nll": _cifar10(
        _GEOMETRIC,
        VAEConfig(
            encoder_channels=256,
            decoder_channels=256,
            preprocess_cells=3,
            postprocess_cells=3,
            encoder_cells_per_group=3,
            decoder_cells_per_group=3,
            groups_per_scale=4,
            latents_per_group=45,
            flows_per_group=2,
        ),
    ),
    "celebahq256-quantitative": _celebahq256(
        latent_scales=3,
        groups=8,
        flows=2,
        channel_mult=(1, 1, 2, 4),
        score=ScoreConfig(
            latent_channels=160,
            latent_size=32,
            channels=256,
            channel_mult=(1, 2, 2, 2),
            attention_levels=(1,),
            mixing_logit_init=-6.0,
        ),
        sde=SDEConfig(),
        tol=1e-2,
    ),
    "celebahq256-qualitative-stage2": _celebahq256(
        latent_scales=2,
        groups=10,
        flows=2,
        channel_mult=(1, 1, 2),
        score=_QUALITATIVE_SCORE,
        sde=_GEOMETRIC,
        tol=1e-5,
    ),
    "celebahq256-qualitative": _celebahq256(
        latent_scales=2,
        groups=10,
        flows=2,
        channel_mult=(1, 1, 2),
        score=_QUALITATIVE_SCORE.replace(channels=320),
        sde=SDEConfig(),
        tol=1e-5,
    ),
    "tiny-rgb": LSGMConfig(
        _TINY_VAE,
        _TINY_SCORE.replace(latent_channels=8, latent_size=16),
        SDEConfig(),
        SamplingConfig(tol=1e-2),
    ),
    "tiny-binary": LSGMConfig(
        _TINY_VAE.replace(
            image_channels=1,
            crop=2,
            channel_mult=(1, 2, 2),
            preprocess_blocks=2,
            postprocess_blocks=2,
            architecture="res_mbconv",
            decoder_distribution="bernoulli",
        ),
        _TINY_SCORE.replace(latent_channels=8, latent_size=8, attention_levels=(), resample="plain"),
        SDEConfig(),
        SamplingConfig(tol=1e-2),
    ),
    "tiny-multiscale": LSGMConfig(
        _TINY_VAE.replace(
            image_size=64,
            encoder_channels=8,
            decoder_channels=8,
            channel_mult=(1, 1, 2),
            latent_scales=2,
            latents_per_group=3,
            flows_per_group=1,
            architecture="res_mbconv",
            input_skip=True,
            num_bits=5,
        ),
        _TINY_SCORE.replace(latent_channels=6, latent_size=16),
        _GEOMETRIC,
        SamplingConfig(tol=1e-2, bn="batch"),
    ),
    # Digits of 14x14 pixels, for ablations: minutes of training on one processor core.
    "tiny-digits14": LSGMConfig(
        _TINY_VAE.replace(
            image_channels=1,
            image_size=16,
            crop=1,
            channel_mult=(1, 2, 2),
            preprocess_blocks=2,
            postprocess_blocks=2,
            latents_per_group=8,
            decoder_distribution="bernoulli",
        ),
        _TINY_SCORE.replace(
            latent_channels=16, latent_size=4, channels=32, attention_levels=(), resample="plain"
        ),
        SDEConfig(),
        SamplingConfig(tol=1e-2),
    ),
    # Latents at every symbol: a smaller grid would tie neighbouring ones to one code.
    "tiny-text": LSGMConfig(
        _TINY_VAE.replace(
            image_channels=32,
            image_size=16,
            encoder_channels=32,
            decoder_channels=32,
            channel_mult=(1,),
            preprocess_blocks=0,
            postprocess_blocks=0,
            groups_per_scale=1,
            latents_per_group=8,
            decoder_distribution="categorical",
            symbols=' abcdefghijklmnopqrstuvwxyz.,"_\N{REPLACEMENT CHARACTER}',
        ),
        _TINY_SCORE.replace(
            latent_channels=8,
            latent_size=16,
            channels=48,
            attention_levels=(1,),
            dropout=0.1,
            resample="plain",
        ),
        SDEConfig(),
        SamplingConfig(tol=1e-2),
    ),
}


def get_preset(name: str) -> LSGMConfig:
    """The configuration of that name; an unknown one raises ``ValueError`` with the list and the closest."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]

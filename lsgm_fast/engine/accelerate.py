"""``accelerate``: live VAE and score modules of the published code base, computed by our networks and kernels.

The results answer what code written for that code base calls, and hold the weights under the published names. Our
networks refer to the very tensors that the results (and, shared, the given modules) hold, and whether these are still
the same objects is looked at before every call; what is derived from them for a solve is compared with them before it.

The code base itself is not imported; which attributes and methods its objects have is in ``docs/accelerate.md``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, TypeAlias, cast, overload

import torch
from torch import Tensor, nn

from lsgm_fast import checkpoints
from lsgm_fast.distributions import DecoderDistribution
from lsgm_fast.engine.plan import Plan, Settings
from lsgm_fast.models.ncsnpp import NCSNpp
from lsgm_fast.models.nvae import NVAE
from lsgm_fast.nn.layers import InOutLinear, normalized_weights

Options: TypeAlias = argparse.Namespace | Mapping[str, Any]

# Two networks that differ in a fact that the weights do not show are further apart than reduced precision (TF32, half)
# puts two computations of one network.
_SAME = 1e-2


def normal(shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A standard-normal draw from PyTorch's global generator of that device, as the published code makes it."""
    return torch.randn(tuple(shape), device=device, dtype=dtype)


class _Accelerated(nn.Module):
    """What the two results share: published names outside, our network inside, one set of tensors.

    Its parameters, buffers and submodules are those of ``module`` (``share``), or of a copy of it. The submodules are
    never called: they hold tensors under the published names.
    """

    ATTRIBUTES: ClassVar[tuple[str, ...]] = ()
    _network: Any
    _origin: Any

    def __init__(
        self, module: nn.Module, network: nn.Module, names: dict[str, tuple[str, bool]], share: bool
    ) -> None:
        super().__init__()
        content = module if share else _copied(module, {})
        for key, (_, turned) in names.items():
            if turned:
                owner, _, part = key.removesuffix(".weight").rpartition(".")
                setattr(network.get_submodule(owner), part, InOutLinear())
        own = self.__dict__
        # One dictionary for both, so that a tensor replaced in one (by .to(), by load_state_dict) is replaced in both.
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            own[kind] = content.__dict__[kind]
        # Past nn.Module's own __setattr__, which would register them, in the given module too.
        own["_network"] = network
        own["_places"] = {ours: theirs for ours, (theirs, _) in names.items()}
        own["_derived"] = checkpoints.derived_buffers(network)
        attributes = {name: getattr(module, name) for name in self.ATTRIBUTES}
        for name, value in attributes.items():
            if isinstance(value, Tensor):
                attributes[name] = value.detach().clone()
        own["_origin"] = module if share else SimpleNamespace(**attributes)
        self._bind()
        self.train(module.training)

    def __getattr__(self, name: str) -> Any:
        if name in type(self).ATTRIBUTES:
            return getattr(self.__dict__["_origin"], name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).ATTRIBUTES:
            setattr(self._origin, name, value)
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Any:
        """Training or evaluation mode of this object; the given module keeps its own."""
        self.training = mode
        self._network.train(mode)
        return self

    def _bind(self) -> None:
        """Point our network at the tensors that are under the published names now."""
        links: dict[tuple[int, str], tuple[dict[str, Any], str, nn.Module]] = {}
        tensors = []
        for ours, theirs in self._places.items():
            holder: nn.Module = self
            *path, name = theirs.split(".")
            for part in path:
                child = holder._modules.get(part)
                if child is None:
                    raise self._gone(theirs)
                links[id(holder._modules), part] = (holder._modules, part, child)
                holder = child
            kind = "_parameters" if name in holder._parameters else "_buffers"
            store: dict[str, Any] = getattr(holder, kind)
            owner, _, own_name = ours.rpartition(".")
            module = self._network.get_submodule(owner)
            value, before = store.get(name), getattr(module, own_name)
            if value is None:
                raise self._gone(theirs)
            if before is not None and value.shape != before.shape:
                raise ValueError(
                    f"{theirs} had shape {tuple(before.shape)} and has {tuple(value.shape)} now: call accelerate() "
                    "again on the changed module"
                )
            module._parameters.pop(own_name, None)
            module._buffers.pop(own_name, None)
            getattr(module, kind)[own_name] = value
            tensors.append((store, name, value))
        self.__dict__["_links"] = list(links.values())
        self.__dict__["_tensors"] = tensors

    def _gone(self, name: str) -> ValueError:
        return ValueError(f"{name} is no longer in the module: call accelerate() again on the changed module")

    def _current(self) -> Any:
        """Our network, on the tensors as they are now."""
        changed = any(children.get(name) is not child for children, name, child in self._links)
        if changed or any(store.get(name) is not value for store, name, value in self._tensors):
            self._bind()
        like = self._tensors[0][2]
        for module, name in self._derived:
            buffer = module._buffers[name]
            if buffer.device != like.device or buffer.dtype != like.dtype:
                module._buffers[name] = module.derived_buffer(name).to(like)
        return self._network

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device


class AcceleratedVAE(_Accelerated):
    """A published VAE on our kernels; made by :func:`accelerate`.

    Parameters, buffers, their names and order are the given module's.
    """

    ATTRIBUTES = (
        "num_latent_scales",
        "num_groups_per_scale",
        "num_latent_per_group",
        "groups_per_scale",
        "crop_output",
        "num_bits",
        "decoder_dist",
        "dataset",
        "input_size",
    )
    _network: NVAE

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Encode ``x``, draw, and decode.

        Draws one standard-normal tensor (N, L, h, w) per group, in decoder order, from PyTorch's global generator of
        x's device. In training mode BatchNorm uses the batch's statistics and updates the running ones.

        Args:
            x: (N, C, H, W) in [-1, 1], of the padded size.

        Returns:
            ``(logits (N, K, H, W), all_log_q, all_eps)``: elementwise log q (nats) and latents of every group.
        """
        network = self._current()
        noise = [normal((x.shape[0], *shape), x.device) for shape in network.group_shapes]
        with normalized_weights(network.weight_norm_convs) as weights:
            logits, groups = network(x, noise)
        if self.training and torch.is_grad_enabled():
            self._show_weights(weights)
        return logits, [g.log_q for g in groups], [g.eps for g in groups]

    def _show_weights(self, weights: list[Tensor]) -> None:
        """Leave each convolution its weight of this call, with its graph, where the published regulariser reads it."""
        names = {module: name for name, module in self._network.named_modules()}
        for conv, weight in zip(self._network.weight_norm_convs, weights, strict=True):
            holder = self.get_submodule(self._places[f"{names[conv]}.weight"].rpartition(".")[0])
            if "weight_normalized" in holder.__dict__:
                holder.__dict__["weight_normalized"] = weight

    def sample(
        self, num_samples: int, t: float, eps_z: Sequence[Tensor] | None = None, enable_autocast: bool = False
    ) -> Tensor:
        """Mean images of p(x | z).

        Every group that is not given is drawn, in decoder order, as ``t`` times a standard-normal tensor (N, L, h, w)
        from PyTorch's global generator of the weights' device.

        Args:
            num_samples: N. t: temperature of the groups that are drawn.
            eps_z: latents of the first groups, as :meth:`decompose_eps` returns them; None: all are drawn.
            enable_autocast: decode under ``torch.autocast``.

        Returns:
            (N, C, H, W) float32 in [0, 1], of the padded size.
        """
        network = self._current()
        shapes = [(num_samples, *shape) for shape in network.group_shapes]
        groups = list(eps_z or ())
        if [tuple(e.shape) for e in groups] != shapes[: len(groups)]:
            raise ValueError(
                f"expected eps_z of shapes {shapes} (the last ones may be left out), "
                f"got {[tuple(e.shape) for e in groups]}"
            )
        device = self._device
        groups += [normal(shape, device) * t for shape in shapes[len(groups) :]]
        dtype = network.prior_feature.dtype
        groups = [e.to(device=device, dtype=dtype) for e in groups]
        with torch.autocast(device.type, enabled=enable_autocast):
            lower = groups[network.config.groups_per_scale :]
            logits = network.logits(network.merge_groups(groups), lower)
        mean = self.decoder_output(logits).mean()
        return (mean.clamp(-1.0, 1.0) + 1.0) / 2.0

    def decoder_output(self, logits: Tensor) -> DecoderOutput:
        """p(x | z) of the decoder's output, evaluated in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return DecoderOutput(self._network.output_distribution(logits))

    def concat_eps_per_scale(self, all_eps: Sequence[Tensor]) -> list[Tensor]:
        """The groups of each scale concatenated on channels, scales in decoder order."""
        n = self._network.config.groups_per_scale
        return [torch.cat(list(all_eps[i : i + n]), dim=1) for i in range(0, len(all_eps), n)]

    def decompose_eps(self, eps: Tensor) -> list[Tensor]:
        """(N, G L, h, w) of one scale -> its G groups."""
        return list(eps.chunk(self._network.config.groups_per_scale, dim=1))

    def latent_structure(self) -> list[int]:
        """Latent channels of every scale, in decoder order."""
        c = self._network.config
        return [c.groups_per_scale * c.latents_per_group] * c.latent_scales


class DecoderOutput:
    """p(x | z) under the published names; x in [-1, 1]."""

    def __init__(self, distribution: DecoderDistribution) -> None:
        self._distribution = distribution

    def log_p(self, x: Tensor) -> Tensor:
        """Log-probability in nats, per pixel (and per colour, unless the colours are coupled)."""
        return self._distribution.log_prob(x)

    def mean(self) -> Tensor:
        """Mean image in [-1, 1]."""
        return self._distribution.mean()

    def sample(self) -> Tensor:
        """A draw of the image in [-1, 1], from PyTorch's global generator."""
        return self._distribution.sample()


class AcceleratedScore(_Accelerated):
    """A published score network on our kernels; made by :func:`accelerate`.

    Parameters, their names and order are the given module's.
    """

    ATTRIBUTES = (
        "mixed_prediction",
        "is_active",
        "num_input_channels",
        "input_size",
        "dataset",
        "nf",
        "num_resolutions",
        "attn_resolutions",
    )
    _network: NCSNpp
    _dropout_known: bool

    def __init__(
        self,
        module: nn.Module,
        network: nn.Module,
        names: dict[str, tuple[str, bool]],
        share: bool,
        dropout_known: bool,
    ) -> None:
        # Before the mode is set, which goes by it.
        self.__dict__["_dropout_known"] = dropout_known
        super().__init__(module, network, names, share)
        self.__dict__["_plans"] = {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The predicted noise before mixing, (B, C, h, w), for latents x of that shape and t (B,) or 0-d.

        Where ``is_active`` is a mask, x is multiplied by it.
        """
        network = self._current()
        if self.is_active is not None:
            x = x * torch.as_tensor(self.is_active, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1)
        return network(x, t)

    def for_sampling(self, autocast: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """What :meth:`forward` computes, prepared for many calls without gradients while no weight changes.

        autocast: in the half precision that ``torch.autocast`` has on this device.
        """
        network = self._current()
        if self.is_active is not None:
            return self
        precision = None
        if autocast:
            dtype = torch.get_autocast_dtype(self._device.type)
            precision = "bf16" if dtype is torch.bfloat16 else "fp16"
        plan: Plan = self._plans.setdefault(precision, Plan(Settings(precision)))
        return plan.score(network)

    def train(self, mode: bool = True) -> Any:
        if mode and not self._dropout_known:
            raise ValueError(
                "the dropout of this score network cannot be read off its modules, so it runs in eval mode only: "
                "call eval() on the given module before accelerate(), or pass args with 'dropout'"
            )
        return super().train(mode)


@overload
def accelerate(
    vae: nn.Module, prior: nn.Module, *, share: bool = ..., args: Options | None = ..., check: bool = ...
) -> tuple[AcceleratedVAE, AcceleratedScore]: ...
@overload
def accelerate(
    vae: nn.Module, prior: None, *, share: bool = ..., args: Options | None = ..., check: bool = ...
) -> tuple[AcceleratedVAE, None]: ...
def accelerate(
    vae: nn.Module,
    prior: nn.Module | None,
    *,
    share: bool = True,
    args: Options | None = None,
    check: bool = True,
) -> tuple[AcceleratedVAE, AcceleratedScore | None]:
    """Put live modules of the published LSGM code base on our networks and kernels.

    >>> vae, dae = lsgm_fast.accelerate(vae, dae)

    The architecture is read off their weights and attributes. What these do not tell (how the score network resamples,
    the scale of its time embedding) is taken from ``args``, or found out by ``check``.

    Args:
        vae: the VAE object. prior: the score object ("dae"), or None.
        share: the results hold the given modules' own tensors: an optimizer step, ``load_state_dict`` or ``.to`` on
            either is one on both. False: they hold copies, and nothing is common to both.
        args: the options of the run (the ``args`` of a checkpoint), as a namespace or dictionary. Read are ``fir``,
            ``embedding_scale``, ``dropout`` and ``log_sig_q_scale``.
        check: call the given score module once, in eval mode and on one sample, and compare. Without it ``args`` has to
            have ``fir`` and ``embedding_scale``. The VAE is not called.

    Returns:
        ``(vae, prior)``: modules with the interface of the given ones, in the same mode (training or evaluation), which
        from then on is their own. The given modules are not changed.

    Raises:
        TypeError: an object lacks attributes or tensors of the published one (they are named).
        ValueError: attributes, weights and options contradict each other, or a fact is missing.
    """
    options = dict(vars(args)) if isinstance(args, argparse.Namespace) else dict(args or {})
    fast_vae = _accelerated_vae(vae, options, share)
    if prior is None:
        return fast_vae, None
    state = _checked(prior, AcceleratedScore, "score network")
    latent = fast_vae._network.latent_shape
    channels, size = int(cast(Any, prior).num_input_channels), int(cast(Any, prior).input_size)
    if (channels, size) != latent[:2]:
        raise ValueError(
            f"the VAE's latent is {latent} but the score network takes {channels} channels of size {size}: they do not "
            "belong together"
        )
    return fast_vae, _accelerated_score(prior, state, options, share, check)


def _checked(module: Any, kind: type[_Accelerated], what: str) -> dict[str, Tensor]:
    """The module's tensors, once it has been seen to have the interface."""
    name = type(module).__name__
    if isinstance(module, _Accelerated):
        raise TypeError(f"this {what} is accelerated already: pass the published module")
    lacking = [a for a in kind.ATTRIBUTES if not hasattr(module, a)]
    if not isinstance(module, nn.Module) or lacking:
        missing = f"it lacks {', '.join(lacking)}" if lacking else "it is no torch.nn.Module"
        inner = next(
            (a for a in ("module", "_orig_mod") if isinstance(getattr(module, a, None), nn.Module)), ""
        )
        hint = f"; pass its .{inner}" if inner else ""
        raise TypeError(f"{name} is no {what} of the published code base: {missing}{hint}")
    return module.state_dict(keep_vars=True)


def _network_of(
    module: nn.Module, what: str, state: dict[str, Tensor], options: dict[str, Any], size: int | None = None
) -> tuple[nn.Module, dict[str, tuple[str, bool]]]:
    name = type(module).__name__
    try:
        return checkpoints.network_of(state, options, size)
    except KeyError as error:
        raise TypeError(
            f"{name} is no {what} of the published code base: its state_dict lacks {error}"
        ) from error
    except (ValueError, IndexError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{name} is a {what} that cannot be rebuilt: {error}") from error


def _accelerated_vae(vae: nn.Module, options: dict[str, Any], share: bool) -> AcceleratedVAE:
    state = _checked(vae, AcceleratedVAE, "VAE")
    given: Any = vae
    scale = options.get("log_sig_q_scale", getattr(vae, "log_sig_q_scale", 5.0))
    facts = {
        "dataset": given.dataset,
        "decoder_dist": given.decoder_dist,
        "num_x_bits": int(given.num_bits),
        "log_sig_q_scale": float(scale),
    }
    network, names = _network_of(vae, "VAE", state, facts)
    config = cast(NVAE, network).config
    for name, value in (
        ("num_latent_scales", config.latent_scales),
        ("num_groups_per_scale", config.groups_per_scale),
        ("num_latent_per_group", config.latents_per_group),
    ):
        if getattr(vae, name) != value:
            raise ValueError(f"the VAE says {name}={getattr(vae, name)}, and its weights show {value}")
    return AcceleratedVAE(vae, network, names, share)


def _accelerated_score(
    prior: nn.Module, state: dict[str, Tensor], options: dict[str, Any], share: bool, check: bool
) -> AcceleratedScore:
    given: Any = prior
    if given.mixed_prediction and "mixing_logit" not in state:
        raise TypeError(
            f"{type(prior).__name__} says mixed_prediction={given.mixed_prediction} but has no parameter mixing_logit"
        )
    dropouts = {module.p for module in prior.modules() if isinstance(module, nn.Dropout)}
    if "dropout" not in options and len(dropouts) == 1:
        options = options | {"dropout": dropouts.pop()}

    def build(share: bool, **facts: Any) -> AcceleratedScore:
        found = {"dropout": 0.0, **options, **facts, "mixed_prediction": True}
        network, names = _network_of(prior, "score network", state, found, int(given.input_size))
        return AcceleratedScore(prior, network, names, share, "dropout" in options)

    unknown = [name for name in ("fir", "embedding_scale") if name not in options]
    if not check:
        if unknown:
            raise ValueError(
                f"neither weights nor attributes of the score network tell {' and '.join(unknown)}: pass args with "
                "them (the options of the run), or leave check=True"
            )
        return build(share)
    scale = float(options.get("embedding_scale", 1000.0))
    facts = [
        {"fir": fir, "embedding_scale": scale}
        for fir in ((options["fir"],) if "fir" in options else (True, False))
    ]
    errors = _distances(given, [build(True, **of) for of in facts])
    error, best = min(zip(errors, facts, strict=True), key=lambda pair: pair[0])
    if not error < _SAME:
        tried = "; ".join(
            f"{', '.join(f'{k}={v}' for k, v in of.items())}: relative error {e:.2g}"
            for e, of in zip(errors, facts, strict=True)
        )
        advice = (
            f"pass args with {' and '.join(unknown)}" if unknown else "are these the args of this network?"
        )
        raise ValueError(
            f"our network does not compute what {type(prior).__name__} computes ({tried}): {advice}"
        )
    return build(share, **best)


def _distances(given: Any, candidates: list[AcceleratedScore]) -> list[float]:
    """Relative difference between the given score module's output on one input and that of each candidate."""
    like = next(given.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (1, given.num_input_channels, given.input_size, given.input_size)
    x = torch.randn(shape, generator=generator).to(like)
    t = torch.full((1,), 0.3, device=like.device, dtype=like.dtype)
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False), _evaluating(given):
        try:
            expected = given(x, t)
        except Exception as error:
            raise ValueError(
                f"{type(given).__name__} could not be called to find out how it resamples ({error}): pass args with "
                "fir and embedding_scale, and check=False"
            ) from error
        distances = []
        for candidate in candidates:
            with _evaluating(candidate):
                distances.append(float((candidate(x, t) - expected).norm() / expected.norm()))
    return distances


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the duration of the block; afterwards every submodule has its own mode again."""
    accelerated = isinstance(module, _Accelerated)
    flags = [(m, m.training) for m in ([module] if accelerated else module.modules())]
    module.eval()
    try:
        yield
    finally:
        for m, training in flags:
            if accelerated:
                m.train(training)
            else:
                m.training = training


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a module tree with tensors of its own, of the same classes (the published regulariser goes by these).

    Not ``copy.deepcopy``, which refuses modules that keep a tensor with a graph.
    """
    if id(module) in memo:
        return memo[id(module)]
    shell = memo[id(module)] = copy.copy(module)

    def tensor(value: Tensor | None) -> Tensor | None:
        if value is not None and id(value) not in memo:
            clone = value.detach().clone()
            if isinstance(value, nn.Parameter):
                clone = nn.Parameter(clone, requires_grad=value.requires_grad)
            memo[id(value)] = clone
        return None if value is None else memo[id(value)]

    own = shell.__dict__
    own["_parameters"] = {name: tensor(value) for name, value in module._parameters.items()}
    own["_buffers"] = {name: tensor(value) for name, value in module._buffers.items()}
    own["_modules"] = {
        name: None if child is None else _copied(child, memo) for name, child in module._modules.items()
    }
    own["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return shell

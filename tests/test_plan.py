"""Plans: what a sampler runs is the network it was given, prepared, and never an old state of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lsgm_fast
from lsgm_fast import dispatch
from lsgm_fast.engine import graphs
from lsgm_fast.engine.graphs import Graphed
from lsgm_fast.engine.plan import Plan, ScorePlan, Settings
from lsgm_fast.nn.watch import Watch

FEW = {"solver": "exponential", "evaluations": 3}
ROUNDING = 2e-5


def filled(preset):
    """A model whose blocks end with more than the nearly nothing of a fresh one, so that an error would show."""
    torch.manual_seed(0)
    model = lsgm_fast.build(preset).eval()
    with torch.no_grad():
        for parameter in model.prior.parameters():
            if parameter.dim() > 1 and float(parameter.abs().max()) < 1e-2:
                nn.init.xavier_uniform_(parameter)
    return model


@pytest.fixture(scope="module")
def shared():
    return {name: filled(name) for name in ("tiny-rgb", "tiny-binary")}


@pytest.fixture
def model():
    return filled("tiny-rgb")


def inputs(model, n=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *model.latent_shape, generator=generator), torch.rand(n, generator=generator)


def error(got, expected):
    return float((got.double() - expected.double()).abs().max() / expected.double().std())


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny-rgb", "tiny-binary"])
@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_an_evaluation_is_that_of_the_network(shared, preset, n):
    model = shared[preset]
    z, t = inputs(model, n)
    plan = ScorePlan(model.prior, Settings())
    for times in (t, t[0], t[:1], t[:1].expand(n)):
        with lsgm_fast.use_backend("reference"):
            expected = model.prior(z, times)
        assert error(plan(z, times), expected) < ROUNDING
        assert error(plan(z.to(memory_format=torch.channels_last), times), expected) < ROUNDING
        assert error(plan(z[:, :, ::1].double(), times), expected) < ROUNDING
    assert plan(z[:0], t[:0]).shape == (0, *model.latent_shape)


@torch.no_grad()
def test_float64_stays_float64(shared):
    model = copy.deepcopy(shared["tiny-rgb"]).double()
    z, t = inputs(model)
    got = ScorePlan(model.prior, Settings())(z.double(), t.double())
    assert got.dtype == torch.float64
    assert error(got, model.prior(z.double(), t.double())) < 1e-12


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@torch.no_grad()
def test_half_precision(shared, precision):
    """As far from float32 as the precision's own rounding puts the network under autocast."""
    model = shared["tiny-rgb"]
    z, t = inputs(model)
    plan = ScorePlan(model.prior, Settings(precision))
    got = plan(z, t)
    assert got.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    expected = model.prior(z, t)
    with torch.autocast("cpu", got.dtype):
        autocast = model.prior(z, t)
    assert 1e-5 < error(got, expected) < 2.0 * error(autocast, expected)


@pytest.mark.parametrize("precision", [None, "fp32", "tf32", "bf16"])
def test_samples_with_every_precision(model, precision):
    expected = model.sample(2, **FEW)
    assert model.compile_for_inference(precision=precision) is model
    z, info = model.sample_latents(2, **FEW)
    assert z.dtype == torch.float32 and info.backends["group_norm_swish"]
    assert error(model.sample(2, **FEW), expected) < (0.2 if precision == "bf16" else 1e-3)


def test_the_decoder_is_that_of_the_vae(model):
    z = inputs(model)[0]
    for bn in ("running", "batch"):
        with lsgm_fast.use_backend("reference"):
            expected = model.decode(z, bn=bn)
        assert error(model.decode(z, bn=bn), expected) < 1e-4
    assert all(conv.prepared_weight is None for conv in model.vae.weight_norm_convs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    sorted(name for name in lsgm_fast.presets.PRESETS if not name.startswith("tiny")),
)
@torch.no_grad()
def test_every_published_score_network(preset):
    config = lsgm_fast.presets.get_preset(preset).score
    torch.manual_seed(0)
    network = lsgm_fast.NCSNpp(config).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1 and float(parameter.abs().max()) < 1e-2:
            nn.init.xavier_uniform_(parameter)
    z, t = torch.randn(1, config.latent_channels, config.latent_size, config.latent_size), torch.rand(1)
    with lsgm_fast.use_backend("reference"):
        expected = network(z, t)
    assert error(ScorePlan(network, Settings())(z, t), expected) < 1e-4


# -- never stale ------------------------------------------------------------------------------------------------------


def conv(model):
    return model.prior.down[0].blocks[0].conv1


def optimizer_step(model):
    with torch.no_grad():
        conv(model).weight.add_(0.1)


def behind_autograd(model):
    conv(model).weight.data.add_(0.1)


def behind_autograd_one_number(model):
    model.prior.mid_attention.query.weight.data[3, 2] += 3.0


def new_parameter(model):
    conv(model).weight = nn.Parameter(conv(model).weight.detach() + 0.1)


def new_data(model):
    conv(model).weight.data = conv(model).weight.data + 0.1


def new_module(model):
    block = model.prior.down[0].blocks[0]
    block.conv1 = copy.deepcopy(block.conv1)
    with torch.no_grad():
        block.conv1.weight += 0.1


def other_weights(model):
    model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})


def norm(model):
    with torch.no_grad():
        model.prior.norm_out.bias += 1.0


def decoder_weight(model):
    model.vae.decoder_convs[-1].log_weight_norm.data += 1.0


def running_mean(model):
    for name, buffer in model.vae.named_buffers():
        if name.endswith("running_mean"):
            buffer += 1.0


CHANGES = [
    optimizer_step,
    behind_autograd,
    behind_autograd_one_number,
    new_parameter,
    new_data,
    new_module,
    other_weights,
    norm,
    decoder_weight,
    running_mean,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_of_weights_is_seen(model, change):
    before = model.sample(2, **FEW)
    change(model)
    with lsgm_fast.use_backend("reference"):
        expected = model.sample(2, **FEW)
    assert error(before, expected) > 1e-3
    assert error(model.sample(2, **FEW), expected) < 1e-3


def test_nothing_is_prepared_twice_without_a_change(model, monkeypatch):
    made = []
    monkeypatch.setattr("lsgm_fast.engine.plan.prepared", lambda *args: made.append(1) or prepared(*args))
    from lsgm_fast.engine.prepared import prepared

    model.sample(1, **FEW)
    model.sample(2, **FEW)
    model.save_pretrained = None  # an attribute of somebody else's
    model.sample(2, **FEW)
    assert len(made) == 1


def test_watch_sees_bits_of_every_size():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.int8, torch.bool):
        for shape in ((3,), (5, 2), (2, 3, 4, 4), ()):
            module = nn.Module()
            module.register_buffer("x", torch.zeros(shape, dtype=dtype))
            module.register_buffer("empty", torch.zeros(0))
            watch = Watch(module.modules)
            assert watch.unchanged()
            module.x.data.view(-1)[-1:] = 1
            assert not watch.unchanged()


# -- where there is no plan ------------------------------------------------------------------------------------------


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 0.5 * super().forward(x)


def in_training_mode(model):
    model.prior.train()


def of_another_class(model):
    conv(model).__class__ = Scaled


def with_a_hook(model):
    conv(model).register_forward_hook(lambda module, args, output: 0.5 * output)


def with_a_forward_of_its_own(model):
    forward = model.prior.forward
    model.prior.forward = lambda z, t: 0.5 * forward(z, t)


@pytest.mark.parametrize(
    "make",
    [in_training_mode, of_another_class, with_a_hook, with_a_forward_of_its_own],
    ids=lambda f: f.__name__,
)
@torch.no_grad()
def test_other_networks_run_as_they_are(model, make):
    make(model)
    run = Plan().score(model.prior)
    assert run is model.prior
    z, t = inputs(model)
    half = Plan(Settings("bf16")).score(model.prior)(z, t)
    assert half.dtype == torch.bfloat16


def test_autocast_and_the_reference_have_no_plan(model):
    for scope in (torch.autocast("cpu", torch.bfloat16), lsgm_fast.use_backend("reference")):
        with scope:
            assert Plan().score(model.prior) is model.prior
            assert Plan().decoder(model.vae) == model.vae.decode
    with lsgm_fast.use_backend("group_norm_swish=reference"):
        assert isinstance(Plan().score(model.prior), ScorePlan)


def test_training_gives_the_memory_back(model):
    model.compile_for_inference(precision="fp32")
    plan = model._plan
    assert model.eval()._plan is plan
    model.train()
    assert model._plan is not plan and model._plan.settings == plan.settings
    assert Plan().score(model.to("meta").prior) is model.prior


def test_a_network_of_the_users_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(2, 2, 1)

        def forward(self, z, t):
            return self.mix(z)

    class OwnVAE(nn.Module):
        latent_shape = (2, 4, 4)

        def decode(self, z, **options):
            return torch.sigmoid(z)

    model = lsgm_fast.LSGM(OwnVAE(), Own(), lsgm_fast.SDEConfig())
    expected = model.sample_latents(3, **FEW)[0]
    assert torch.equal(model.compile_for_inference().sample_latents(3, **FEW)[0], expected)
    half = model.compile_for_inference(precision="bf16").sample_latents(3, **FEW)[0]
    assert 0.0 < error(half, expected) < 0.1


def test_bad_precision(model):
    with pytest.raises(ValueError, match="unknown precision 'fp8'.*fp32"):
        model.compile_for_inference(precision="fp8")


def test_flags_come_back(model, monkeypatch):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    seen = []
    plan = ScorePlan(model.prior, Settings("tf32"))

    def fail(z, t):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        raise RuntimeError("stop")

    monkeypatch.setattr(plan, "_run", fail)
    with pytest.raises(RuntimeError, match="stop"):
        plan(*inputs(model))
    assert seen == [(True, True)]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_copies_and_files_have_no_plan(model, tmp_path):
    names = set(model.state_dict())
    expected = model.compile_for_inference(precision="fp32").sample(2, **FEW)
    assert set(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._plan is not model._plan and other._plan.settings == model._plan.settings
        assert torch.equal(other.sample(2, **FEW), expected)
    model.save(tmp_path / "model.safetensors")
    # Products round differently with where the weights lie in memory.
    assert error(lsgm_fast.load(tmp_path / "model.safetensors").sample(2, **FEW), expected) < ROUNDING


def test_a_binding_follows_the_choice(shared):
    network = shared["tiny-rgb"].prior
    plan = ScorePlan(network, Settings())
    z, t = inputs(shared["tiny-rgb"])
    with dispatch.record() as log:
        plan(z, t)
    assert ("group_norm_swish", "reference") in log.counts  # smaller than what the kernel pays for
    with lsgm_fast.use_backend("cpu"), dispatch.record() as log:
        plan(z, t)
    assert ("group_norm_swish", "reference") not in log.counts and ("group_norm_swish", "cpu") in log.counts


# -- CUDA graphs, on a stand-in ---------------------------------------------------------------------------------------


class Replay:
    """What a capture is to :class:`Graphed`, without a GPU."""

    def __init__(self, function, offset=0.0):
        self.function, self.offset, self.open = function, offset, True

    def __call__(self, inputs):
        assert self.open
        return self.function(*inputs) + self.offset

    def close(self):
        self.open = False


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def captured(monkeypatch, idle):
    made = []

    def capture(self, inputs):
        made.append(Replay(lambda x: 2.0 * x))
        return made[-1]

    monkeypatch.setattr(Graphed, "_capture", capture)
    return made


def test_one_graph_for_every_kind_and_the_last_ones_kept(captured):
    calls = []
    run = Graphed(lambda x: calls.append(1) or 2.0 * x, most=2)
    for n in (1, 2, 1, 2, 3, 3, 1):
        x = torch.ones(n)
        assert torch.equal(run(x), 2.0 * x)
    # 1, 2 and 3 were captured; 3 put 1 out, which came back.
    assert len(calls) == len(captured) == 4
    assert [graph.open for graph in captured] == [False, False, True, True]


def test_a_graph_after_some_calls(captured):
    run = Graphed(lambda x: 2.0 * x, after=2)
    for expected in (0, 0, 1, 1):
        run(torch.ones(1))
        assert len(captured) == expected


def test_a_graph_belongs_to_a_choice_of_backends_and_is_recorded(captured):
    def function(x):
        return lsgm_fast.ops.residual_add(x, x, 1.0)

    run = Graphed(function)
    x = torch.ones(1, 1, 1, 1)
    run(x)
    with dispatch.record() as log:
        run(x)
    assert log.counts == {("residual_add", "reference"): 1}
    with lsgm_fast.use_backend("reference"):
        run(x)
    assert len(captured) == 2


def test_a_capture_that_fails_gives_plain_calls_and_one_warning(monkeypatch, idle):
    def fail(self, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Graphed, "_capture", fail)
    run = Graphed(lambda x: 2.0 * x)
    with pytest.warns(UserWarning, match="could not be captured.*not permitted") as warned:
        results = [run(torch.ones(n)) for n in (1, 1, 2)]
    assert len(warned) == 1
    assert [r.tolist() for r in results] == [[2.0], [2.0], [2.0, 2.0]]


def test_a_graph_that_is_wrong_is_not_used(monkeypatch, idle):
    wrong = Replay(lambda x: 2.0 * x, offset=1.0)
    monkeypatch.setattr(Graphed, "_capture", lambda self, inputs: wrong)
    run = Graphed(lambda x: 2.0 * x)
    with pytest.warns(UserWarning, match=r"other numbers than a plain call.*0\.5"):
        run(torch.ones(3))
    assert not wrong.open
    assert torch.equal(run(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_on_a_gpu(model):
    """Replays are the plain call, on another stream and beside another graph too; memory does not grow."""
    network = model.prior.cuda()
    plain, graphed = (ScorePlan(network, Settings(graphs=on)) for on in (False, True))
    side = torch.cuda.Stream()
    for round_ in range(3):
        for n in (1, 4, 2):
            z, t = (x.cuda() for x in inputs(model, n, seed=round_))
            expected = plain(z, t)
            assert error(graphed(z, t), expected) < 1e-3
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                other = graphed(z + 1.0, t)
            assert error(graphed(z, t), expected) < 1e-3
            torch.cuda.current_stream().wait_stream(side)
            assert error(other, plain(z + 1.0, t)) < 1e-3
        if round_ == 0:
            used = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() <= used + 2**20
    assert isinstance(graphed._run, graphs.Graphed) and len(graphed._run._graphs) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_samples_on_a_gpu(model, precision):
    with lsgm_fast.use_backend("reference"):
        expected = model.cuda().sample(2, **FEW)
    model.compile_for_inference(precision=precision)
    for _ in range(4):
        got = model.sample(2, **FEW)
        assert error(got, expected) < (1e-3 if precision == "fp32" else 0.1)

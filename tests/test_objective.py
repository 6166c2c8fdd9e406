"""Noise, target and the way back; samplers."""

import pytest
import torch

from entprog.objective import OBJECTIVES, frame_noise
from entprog.sample import SAMPLERS, _step, sample, windows


@pytest.mark.parametrize("name", OBJECTIVES)
def test_target_leads_back_to_both_ends(name):
    objective = OBJECTIVES[name]
    x0, noise = torch.randn(4, 3, 2, 5, 5).double(), torch.randn(4, 3, 2, 5, 5).double()
    t = torch.tensor([0.02, 0.3, 0.6, 0.9]).double()  # a time per sample, not per element
    x_t = objective.noisy(x0, noise, t)
    back, back_noise = objective.ends(objective.target(x0, noise, t), x_t, t)
    assert torch.allclose(back, x0, atol=1e-9) and torch.allclose(back_noise, noise, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_t_zero_is_data_and_t_one_is_noise(name):
    objective, x0, noise = OBJECTIVES[name], torch.randn(2, 3), torch.randn(2, 3)
    assert torch.allclose(objective.noisy(x0, noise, torch.zeros(2)), x0)
    assert torch.allclose(objective.noisy(x0, noise, torch.ones(2)), noise, atol=1e-6)


def test_flow_target_is_noise_minus_data():
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(OBJECTIVES["flow_prediction"].target(x0, noise, torch.rand(2)), noise - x0)


def test_one_time_per_sample_is_required():
    with pytest.raises(ValueError, match=r"t must have shape \(4,\)"):
        OBJECTIVES["epsilon"].noisy(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(1))


@pytest.mark.parametrize("shared", [0.0, 0.3, 0.9, 1.0])
def test_frames_share_as_much_noise_as_asked(shared):
    noise = frame_noise((64, 4, 3, 8, 8), shared, torch.Generator().manual_seed(0))
    assert abs(noise.var().item() - 1) < 0.03 and abs(noise.mean().item()) < 0.03
    flat = noise.transpose(0, 2).flatten(1)  # (frames, values)
    assert torch.allclose(torch.corrcoef(flat), (1 - shared) * torch.eye(3) + shared, atol=0.03)
    clips = torch.corrcoef(noise.flatten(1))
    assert clips.fill_diagonal_(0).abs().max() < 0.4, "clips share nothing"


def test_noise_that_is_not_shared_is_plain():
    plain = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(frame_noise((2, 3, 4, 5, 5), 0.0, torch.Generator().manual_seed(3)), plain)
    with pytest.raises(ValueError, match=r"shared_noise 1\.5"):
        frame_noise((1, 1, 1, 1, 1), 1.5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_from_noise_that_all_frames_share_stand_still(sampler):
    class Blind(torch.nn.Module):
        """Predicts from each frame alone, so frames differ only by their noise."""

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x_t, t):
            return 0.3 * x_t

    def drawn(shared_noise):
        objective = OBJECTIVES["flow_prediction"]
        return sample(Blind(), objective, {}, (2, 3, 4, 5, 5), sampler=sampler, shared_noise=shared_noise)

    still, half, own = (drawn(share).diff(dim=2).abs().mean().item() for share in (1.0, 0.5, 0.0))
    assert still < 1e-6 < half < own


class Oracle(torch.nn.Module):
    """Predicts the exact target of one known video from any x_t."""

    def __init__(self, objective, x0):
        super().__init__()
        self.objective, self.x0 = objective, x0
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x_t, t, pose=None, reference=None):
        self.seen.append((float(t[0]), pose is not None, reference is not None))
        alpha, sigma = self.objective.path(t.double())
        shape = (-1, 1, 1, 1, 1)
        noise = (x_t.double() - alpha.view(shape) * self.x0) / sigma.view(shape)
        return self.objective.target(self.x0, noise, t.double()).float()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_sampler_recovers_the_video_from_an_oracle(name, steps):
    x0 = torch.randn(2, 3, 2, 4, 4).double()
    model = Oracle(OBJECTIVES[name], x0)
    drawn = sample(model, OBJECTIVES[name], {}, tuple(x0.shape), num_inference_steps=steps)
    # float32 predictions are divided by alpha, 1.6e-3 at the first step, by epsilon's x0
    assert (drawn - x0).abs().max() < (2e-3 if name == "epsilon" else 1e-5)
    assert len(model.seen) == steps


def test_guidance_calls_the_model_without_the_condition():
    x0 = torch.randn(1, 3, 2, 4, 4).double()
    model = Oracle(OBJECTIVES["flow_prediction"], x0)
    conditions = {"pose": torch.zeros(1), "reference": torch.zeros(1)}
    sample(model, OBJECTIVES["flow_prediction"], conditions, tuple(x0.shape), num_inference_steps=2, guidance_scale=2.0)
    assert [s[1:] for s in model.seen] == [(True, True), (True, False)] * 2
    with pytest.raises(ValueError, match="guidance needs the conditions"):
        sample(model, OBJECTIVES["flow_prediction"], {}, tuple(x0.shape), guidance_scale=2.0)
    with pytest.raises(ValueError, match="num_inference_steps 0 would return the noise"):
        sample(model, OBJECTIVES["flow_prediction"], {}, tuple(x0.shape), num_inference_steps=0)


def test_euler_for_flow_matching_is_what_the_sampler_does():
    torch.manual_seed(0)
    net = torch.nn.Conv3d(3, 3, 1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, pose=None, reference=None):
            return self.net(x)

    drawn = sample(Net(), OBJECTIVES["flow_prediction"], {}, (1, 3, 2, 4, 4), num_inference_steps=5, seed=1)
    x = torch.randn((1, 3, 2, 4, 4), generator=torch.Generator().manual_seed(1))
    times = torch.linspace(1 - 1e-3, 0, 6)
    with torch.no_grad():
        for t, s in zip(times[:-1], times[1:], strict=True):
            x = x + (s - t) * net(x)
    assert torch.allclose(drawn, x, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ancestral_sampling_keeps_the_marginals(name):
    objective, n = OBJECTIVES[name], 40_000
    x0, noise = torch.full((n, 1, 1, 1, 1), 0.7).double(), torch.randn(n, 1, 1, 1, 1).double()
    for t, s in ((0.9, 0.6), (0.5, 0.1)):
        for eta in (0.0, 0.5, 1.0):
            times = torch.full((n,), t).double(), torch.full((n,), s).double()
            fresh = torch.randn(n, 1, 1, 1, 1).double()
            got = _step(objective, x0, noise, *times, eta, fresh)
            alpha, sigma = (float(v[0]) for v in objective.path(times[1]))
            assert got.mean().item() == pytest.approx(alpha * 0.7, abs=0.02)
            assert got.std().item() == pytest.approx(sigma, rel=0.02)


def test_ancestral_steps_are_the_ddpm_posterior():
    objective, one = OBJECTIVES["epsilon"], torch.ones(1).double()
    t, s = 0.6 * one, 0.4 * one
    x0, noise, fresh = (torch.randn(1, 1, 1, 1, 1).double() for _ in range(3))
    alpha_t, sigma_t, alpha_s, sigma_s = (float(v) for time in (t, s) for v in objective.path(time))
    x_t, step = alpha_t * x0 + sigma_t * noise, alpha_t / alpha_s  # Ho et al. 2020, equations 6 and 7
    beta = 1 - step**2
    mean = (alpha_s * beta * x0 + step * sigma_s**2 * x_t) / sigma_t**2
    expected = mean + (sigma_s**2 / sigma_t**2 * beta) ** 0.5 * fresh
    assert torch.allclose(_step(objective, x0, noise, t, s, 1.0, fresh), expected, atol=1e-9)


@pytest.mark.parametrize("steps", [12, 20])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_error_of_the_prediction_is_not_blown_up_by_the_sampler(name, sampler, steps):
    """Data are Gaussian with a deviation of .7: the exact predictor is known, and errs by .05 here."""
    objective, count = OBJECTIVES[name], 10_000
    error = 0.05 * torch.randn(count, 1, 1, 1, 1, generator=torch.Generator().manual_seed(1))

    class Erring(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x_t, t):
            alpha, sigma = (v.view(-1, 1, 1, 1, 1) for v in objective.path(t))
            x0 = 0.49 * alpha / (0.49 * alpha**2 + sigma**2) * x_t
            return objective.target(x0, (x_t - alpha * x0) / sigma, t) + error

    drawn = sample(Erring(), objective, {}, tuple(error.shape), num_inference_steps=steps, sampler=sampler)
    assert drawn.std().item() == pytest.approx(0.7, abs=0.14), "few steps give .58, without the error as well"
    assert abs(drawn.mean()) < 0.05


@pytest.mark.parametrize(("frames", "window", "overlap"), [(16, 8, 4), (17, 8, 2), (40, 8, 0), (9, 8, 7), (5, 8, 4)])
def test_windows_cover_every_frame_and_overlap(frames, window, overlap):
    parts = windows(frames, window, overlap)
    assert {f for start, end in parts for f in range(start, end)} == set(range(frames))
    assert all(end - start == min(window, frames) for start, end in parts)
    assert all(one[1] - two[0] >= overlap for one, two in zip(parts[:-1], parts[1:], strict=True))


def test_long_clips_by_windows_recover_the_video_from_an_oracle():
    """The oracle sees only its window of the noisy clip, and must get the frames of the poses that go with it."""
    objective = OBJECTIVES["flow_prediction"]
    x0 = torch.randn(1, 3, 13, 4, 4)

    class Windowed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x_t, t, pose):
            assert x_t.shape[2] == pose.shape[2] <= 6
            noise = (x_t - (1 - t.view(-1, 1, 1, 1, 1)) * pose) / t.view(-1, 1, 1, 1, 1)
            return objective.target(pose, noise, t)

    drawn = sample(Windowed(), objective, {"pose": x0}, tuple(x0.shape), num_inference_steps=6, window=6, overlap=2)
    assert (drawn - x0).abs().max() < 1e-4


def test_bad_windows_and_samplers_are_refused():
    with pytest.raises(ValueError, match="less than the window"):
        windows(16, 8, 8)
    with pytest.raises(ValueError, match="choose one of"):
        sample(torch.nn.Linear(1, 1), OBJECTIVES["epsilon"], {}, (1, 1, 1, 1, 1), sampler="plms")

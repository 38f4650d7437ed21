"""The lesson .github/lessons/density.py: its mathematics, and a tiny run of its command."""
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from conftest import load_lesson

density = load_lesson('density')
SCALES = torch.linspace(.5, 2, 256)  # standard deviations


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def images(generator):
    """Correlated points (400, 256)."""
    mix = torch.randn(20, 256, generator=generator) / 8
    return torch.randn(400, 20, generator=generator) @ mix - .3


@pytest.fixture
def gaussian(images):
    """The model whose f is 0: p is q, the Gaussian."""
    model = density.TiltedGaussian(images).requires_grad_(False)
    model.network[-1].weight.zero_()
    model.network[-1].bias.zero_()
    return model


def draw_gauss(count, s, generator):
    return (SCALES ** 2 + s ** 2).sqrt() * torch.randn(count, 256, generator=generator)


def gauss(x, s):
    """Of N(0, SCALES^2 + s^2)."""
    return (x ** 2 / (SCALES ** 2 + s ** 2)).sum(1) / 2


def draw_student(count, s, generator):
    chi2 = torch.randn(count, 5, generator=generator).square().sum(1, keepdim=True)  # (N, 1)
    return draw_gauss(count, s, generator) / (chi2 / 5).sqrt()


def student(x, s):
    """Of a Student-t with five degrees of freedom and the scales of `gauss`."""
    return (5 + 256) / 2 * (2 / 5 * gauss(x, s)).log1p()


@pytest.mark.parametrize('energy, draw', [(gauss, draw_gauss), (student, draw_student)])
def test_annealing_brackets_log_z(energy, draw, generator):
    """In 256 dimensions, from both sides within 1 nat of log Z(.1) - log Z(2), which is known."""
    true = ((SCALES ** 2 + .01) / (SCALES ** 2 + 4)).log().sum().item() / 2
    levels = torch.logspace(.30103, -1, 201).tolist()

    def move(x, s):
        return density.hmc(lambda x: energy(x, s), x, 1, .05, clamp=None, generator=generator,
                           leapfrog=5)[0]

    down, _, _ = density.anneal(energy, draw(100, 2, generator), levels, move)
    up, _, _ = density.anneal(energy, draw(100, .1, generator), levels[::-1], move)
    assert down[-1] == pytest.approx(true, abs=1)
    assert -up[-1] == pytest.approx(true, abs=1)


def test_at_f_0_the_density_is_the_gaussian(gaussian, images, generator):
    """E is -log q, also in whitened coordinates, and a denoised image is the posterior mean."""
    x = density.S0 * torch.randn(50, 256, generator=generator) + images[:50]
    for s in (density.S0, 1.):
        covariance = images.T.cov() + s ** 2 * torch.eye(256)
        q = MultivariateNormal(images.mean(0), covariance)
        torch.testing.assert_close(gaussian.energy(x, s), -q.log_prob(x), atol=.02, rtol=0)
        u = gaussian.whiten(x, s)
        torch.testing.assert_close(gaussian.colour(u, s), x, atol=1e-4, rtol=0)
    gain = torch.linalg.solve(images.T.cov() + density.S0 ** 2 * torch.eye(256), images.T.cov())
    wanted = images.mean(0) + (x - images.mean(0)) @ gain
    torch.testing.assert_close(gaussian.denoise(x), wanted, atol=1e-3, rtol=0)


def test_at_s_the_tilt_is_gone(images, generator):
    """So Z(S) = 1 whatever the network says, and AIS starts from a density that is known."""
    model = density.TiltedGaussian(images).requires_grad_(False)
    u = torch.randn(20, 256, generator=generator)
    standard = MultivariateNormal(torch.zeros(256), torch.eye(256))
    torch.testing.assert_close(model.energy_of_u(u, density.S), -standard.log_prob(u))
    assert (model.energy_of_u(u, density.S0) + standard.log_prob(u)).abs().min() > .01


def test_chains_of_a_known_density_stay(gaussian, generator):
    """SGLD at T = 1 from exact draws keeps the mean energy of these; its steps add 2 % of 128."""
    x = gaussian.colour(torch.randn(50, 256, generator=generator), density.S0)
    after = density.sgld(gaussian.energy, x, 200, density.STEP * density.S0 ** 2, clamp=None,
                         generator=generator)
    rise = gaussian.energy(after).mean() - gaussian.energy(x).mean()
    assert rise == pytest.approx(3, abs=4)


def test_the_kernel_density_is_that_of_torch(images, generator):
    x = torch.randn(10, 256, generator=generator)
    variance, axes = torch.linalg.eigh(images.T.cov())
    kernels = MultivariateNormal(images, images.T.cov() + density.S0 ** 2 * torch.eye(256))
    wanted = kernels.log_prob(x[:, None]).logsumexp(1) - math.log(len(images))
    got = density.log_kernels(x, images, variance, axes)
    torch.testing.assert_close(got, wanted, atol=.5, rtol=1e-3)


def test_a_short_run_is_the_same_again(tmp_path, capsys, monkeypatch):
    """Same seed, same numbers and same picture."""
    monkeypatch.setattr(density, 'LENGTHS', [0, 5])
    monkeypatch.setattr(density, 'CHAINS', 12)
    monkeypatch.setattr(density, 'LEVELS', 5)
    monkeypatch.setattr(density, 'GRID', [.1])
    outputs, pictures = [], []
    for out in (tmp_path / 'a', tmp_path / 'b'):
        density.main(['--out', str(out), '--updates', '8'])
        outputs.append(capsys.readouterr().out)
        pictures.append((out / 'density.png').read_bytes())
    assert outputs[0] == outputs[1] and pictures[0] == pictures[1]

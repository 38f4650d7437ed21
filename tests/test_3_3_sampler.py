"""Course task 3.3, SGLD and the reservoir: what holds in sampler.py, in the order of building.

First one step and what many steps follow, then what else a chain must and must not do, then
its settings, its starts and the reservoir. Most energies here are |x|^2 / (2 s^2). Their chains are
x <- (1 - a) x + n xi with a = step_size / s^2: linear, so that their distribution is known.
"""
import math

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hints import assert_close, nearest_slip
from torch import nn

from sampler import (Reservoir, chain_settings, grainy, hmc, make_reservoir, prior, randn, sgld,
                     temperature)


def quadratic(s):
    """The energy of a normal density with the standard deviation s: (B, C, H, W) -> (B,)."""
    return lambda x: x.square().sum(dim=(1, 2, 3)) / (2 * s ** 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- SGLD: one step, and what many follow ---------------------------------------------------------

def test_one_step_is_the_equation():
    """x - step_size * dE/dx + noise * xi; without a noise it is the lecture's step of eta / 2 with
    noise sqrt(eta). The gradient belongs to each image: a batch does not change it."""
    x = .5 * torch.randn(3, 2, 4, 5, generator=seeded(1))
    gradient, xi, before = x / .5 ** 2, torch.randn(x.shape, generator=seeded()), x.clone()

    def step(step_size, noise=None):
        return sgld(quadratic(.5), x, 1, step_size, noise, clamp=None, generator=seeded())

    descent = step(.1, 0.)
    assert torch.equal(x, before), "the caller's start was changed in place"
    assert_close(descent, x - .1 * gradient, 'one step of size .1 down dE/dx, without noise', {
        'a chain goes down in E: minus the gradient': x + .1 * gradient,
        'is the gradient that of the mean over the batch? Take the sum': x - .1 / 3 * gradient,
        'is the step halved again? step_size is eta / 2 already': x - .05 * gradient,
        'is the step eta? step_size is eta / 2': x - .2 * gradient})
    assert torch.equal(step(.1, .3), step(.1, .3)), (
        'one seed, two chains: is the generator handed on to the noise?')
    shared, even = xi[:1].clone(), torch.rand(x.shape, generator=seeded())
    shared[0] = torch.randn(x.shape[1:], generator=seeded())
    assert_close(step(.1, .3) - descent, .3 * xi, 'noise * xi is added, with xi ~ N(0, I)', {
        'all images get the same noise: xi needs the shape of the whole batch': 0 * x + .3 * shared,
        'is xi uniform? torch.randn is normal, torch.rand is not': .3 * even})
    eta = .2
    assert_close(step(eta / 2) - descent, eta ** .5 * xi, 'noise=None is sqrt(2 * step_size)', {
        'is the noise eta, without the square root?': eta * xi,
        'is it sqrt(step_size)? It is sqrt(eta) = sqrt(2 * step_size)': (eta / 2) ** .5 * xi})


def stationary_variance(a, n):
    """The solution v of v = (1 - a)^2 v + n^2."""
    return n ** 2 / (a * (2 - a))


def likely_slip(variance, a, n):
    """The slip that gives a variance nearest to the one that is seen."""
    if variance == 0:
        return 'is there any noise?'
    if not variance < 20 * stationary_variance(a, n):
        return 'chains run away: is the gradient subtracted, and is it that of the sum?'
    slips = {
        'is the noise eta, without the square root?': stationary_variance(a, n ** 2),
        'is the square root taken twice?': stationary_variance(a, n ** .5),
        'is the noise sqrt(step_size)? It is sqrt(eta) = sqrt(2 * step_size)':
            stationary_variance(a, n / 2 ** .5),
        'is the noise multiplied by another sqrt(2)?': stationary_variance(a, n * 2 ** .5),
        'is the gradient halved again? step_size is eta / 2 already': stationary_variance(a / 2, n),
        'is the step eta? step_size is eta / 2': stationary_variance(2 * a, n),
        'is xi uniform? torch.randn is normal, torch.rand is not':
            stationary_variance(a, n / 12 ** .5),
        'is the noise drawn once and used in each step? Each one needs its own': (n / a) ** 2}
    logs = {slip: math.log(wrong) for slip, wrong in slips.items()}
    return nearest_slip(math.log(variance), logs)


@pytest.mark.parametrize('s, step_size, noise', [(.5, .05, None), (.5, .1, .1), (1., .3, .3)])
def test_stationary_variance_on_a_quadratic_energy(s, step_size, noise):
    """n^2 / (a (2 - a)), within 3 standard errors; the mean is 0."""
    x = sgld(quadratic(s), torch.zeros(40_000, 1, 1, 1), 200, step_size, noise, clamp=None,
             generator=seeded())
    a, n = step_size / s ** 2, (2 * step_size) ** .5 if noise is None else noise
    seen, expected = x.var().item(), stationary_variance(a, n)
    assert abs(seen - expected) < 3 * expected * (2 / len(x)) ** .5, (
        f'variance {seen:.4f} instead of {expected:.4f}: {likely_slip(seen, a, n)}')
    assert abs(x.mean()) < 3 * (expected / len(x)) ** .5


def test_one_noise_for_each_step():
    """A list is used from its first to its last entry: v <- (1 - a)^2 v + n_k^2."""
    noises, a, v = [.4 * (1 - k / 20) for k in range(20)], .3, 0.
    for n in noises:
        v = (1 - a) ** 2 * v + n ** 2
    x = sgld(quadratic(1.), torch.zeros(40_000, 1, 1, 1), 20, a, noises, clamp=None,
             generator=seeded())
    assert abs(x.var() - v) < 3 * v * (2 / len(x)) ** .5, (
        f'variance {x.var():.3f} instead of {v:.3f}: each step has its own of the noises, in order')
    start = torch.zeros(1, 1, 1, 1)
    for same in (tuple(noises), np.array(noises), torch.tensor(noises, dtype=torch.float64)):
        ends = [sgld(quadratic(1.), start, 20, a, n, generator=seeded()) for n in (noises, same)]
        assert torch.equal(*ends) and ends[0].dtype == torch.float32, type(same)
    for wrong in (noises[1:], noises + [0.]):
        with pytest.raises(ValueError, match=f'{len(wrong)} noises for 20 steps'):
            sgld(None, start, 20, a, wrong)  # told before a step


# --- SGLD: what else a chain must do --------------------------------------------------------------

def test_clip_and_clamp():
    """The clip bounds each element of the gradient, on both sides, the clamp each pixel."""
    x = torch.tensor([-.9, -.001, 0., .002, .9]).view(1, 1, 1, 5)
    step = sgld(quadratic(.1), x, 1, 10., 0., grad_clip=.03, clamp=None)
    clipped = torch.tensor([-.03, -.03, 0., .03, .03]).view(1, 1, 1, 5)
    assert_close(step, x - 10 * clipped, 'dE/dx is clipped on both sides, before the step')
    step = sgld(quadratic(.1), x, 1, .1, 0.)
    assert_close(step, (-9 * x).clamp(-1, 1), 'the state is clamped to [-1, 1] after the step')
    noisy = sgld(quadratic(1.), torch.ones(500, 1, 1, 1), 1, .1, 1., generator=seeded())
    assert noisy.abs().max() <= 1, 'the noise, too, stays inside: clamp after adding it'
    low, high = sgld(quadratic(.1), x, 1, .1, 0., clamp=(-.3, .2)).aminmax()
    assert_close(torch.stack([low, high]), torch.tensor([-.3, .2]), 'clamp=(low, high)')


def test_callback_sees_every_state_with_its_energy():
    """callback(k, x, e) runs before step k, with e = E(x) and without a graph."""
    seen, start = [], torch.rand(3, 1, 4, 4)
    end = sgld(quadratic(1.), start, 5, .1, 0., callback=lambda k, x, e: seen.append((k, x, e)))
    assert [k for k, _, _ in seen] == [0, 1, 2, 3, 4]
    for k, x, e in seen:
        assert_close(x, .9 ** k * start, f'state before step {k}')
        assert_close(e, quadratic(1.)(x), 'the energies belong to this state')
        assert not x.requires_grad and not e.requires_grad, 'detach what the callback is given'
    assert_close(end, .9 ** 5 * start, 'the state after the last step is returned')


def test_start_and_model_are_left_as_they_were():
    """Sampling changes neither the start nor the mode, requires_grad and .grad of a model, and it
    works under no_grad. What it returns has no graph: memory does not grow with the steps."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.SiLU(), nn.Linear(4, 1),
                          nn.Flatten(0))  # (B, 1, 4, 4) -> (B,)
    model[1].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones(4, 16)
    start = torch.rand(2, 1, 4, 4)
    before = start.clone()
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            x = sgld(model, start, 2, .1, .01)
        assert not x.requires_grad, 'detach the state in each step'
    sgld(model, start, 1, .1, differentiable=True)
    assert torch.equal(start, before) and not start.requires_grad, (
        "the caller's start wants a gradient now: detach it first")
    assert model.training and not model[1].bias.requires_grad and model[1].weight.requires_grad
    assert model[1].weight.grad.eq(1).all() and model[3].weight.grad is None, (
        'torch.autograd.grad for x alone; backward() would add to the gradients of the weights')


def test_same_seed_same_samples():
    """The same seed gives the same chain bit by bit, another one does not. The global random
    state has no part in it."""
    x = torch.rand(2, 1, 4, 4)
    a, b, c = (sgld(quadratic(1.), x, 5, .1, .01, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_each_image_has_its_own_random_stream():
    """With a list of generators the noise of an image depends on its own generator alone, not on
    its place or company. Without one, images differ too."""
    def streams(*seeds):
        return [seeded(seed) for seed in seeds]

    a, b = randn((3, 1, 4, 4), streams(3, 4, 5)), randn((2, 1, 4, 4), streams(5, 3))
    assert torch.equal(a[[2, 0]], b) and not torch.equal(a[0], a[1])
    x = torch.rand(1, 1, 4, 4).expand(3, -1, -1, -1)
    together = sgld(quadratic(1.), x, 5, .1, .1, generator=streams(3, 4, 5))
    alone = sgld(quadratic(1.), x[:1], 5, .1, .1, generator=streams(5))
    assert torch.equal(together[2:], alone)
    assert len(randn((3, 1, 4, 4), seeded()).unique(dim=0)) == 3
    for count in (1, 2):
        with pytest.raises(RuntimeError, match='shape'):
            randn((3, 1, 4, 4), streams(3, 4)[:count])


def test_pixels_that_are_not_free_are_held():
    """Bit by bit, even outside of the clamp. The others move as if all were free."""
    x = 3 * torch.randn(4, 2, 6, 6, generator=seeded(1))
    free = torch.rand(4, 1, 6, 6, generator=seeded(2)) < .5
    some, every = (sgld(quadratic(1.), x, 3, .1, .1, generator=seeded(), free=pixels)
                   for pixels in (free, None))
    assert torch.equal(some, torch.where(free, every, x)), 'free is True where pixels move'


def test_gradient_through_the_chain():
    """Without noise K steps on a quadratic energy are x_K = (1 - a)^K x_0, and so is the gradient,
    also where torch.utils.checkpoint computes each step again on the way back."""
    start, weight = torch.rand(2, 1, 3, 3), torch.rand(2, 1, 3, 3)

    def chain(x, steps=1):
        return sgld(quadratic(.5), x, steps, .05, 0., clamp=None, differentiable=True)

    for rebuilt in (False, True):
        x = start.clone().requires_grad_(True)
        end = x if rebuilt else chain(x, steps=4)
        for _ in range(4 if rebuilt else 0):
            end = torch.utils.checkpoint.checkpoint(chain, end, use_reentrant=True)
        (weight * end).sum().backward()
        assert_close(end, .8 ** 4 * start, 'state')
        assert_close(x.grad, .8 ** 4 * weight, 'a gradient of 1 shows that dE/dx had no graph')


# --- HMC ------------------------------------------------------------------------------------------

PRECISION = torch.linalg.inv(torch.tensor([[1., .9], [.9, 1.]]))


def correlated(x):
    """The energy of a normal density of two pixels with the variances 1 and the correlation .9."""
    x = x.flatten(1)  # (B, 2)
    return (x @ PRECISION * x).sum(1) / 2


def heavy(x):
    """Student's t with 5 degrees of freedom: its variance is 5/3."""
    return 3 * (x.square() / 5).log1p().sum(dim=(1, 2, 3))


def tilted(x):
    """A double well, of which the left one is deeper."""
    return (2 * (x.square() - 1).square() + .3 * x).sum(dim=(1, 2, 3))


def slope(x):
    return 3 * x.sum(dim=(1, 2, 3))


def exact(energy, low=-9., high=9.):
    """Mean, variance and standard error of the variance of 20,000 draws, for one pixel."""
    x = torch.linspace(low, high, 100_001, dtype=torch.float64)
    p = (-energy(x.view(-1, 1, 1, 1))).softmax(0)
    mean = (p * x).sum()
    variance, fourth = (p * (x - mean) ** 2).sum(), (p * (x - mean) ** 4).sum()
    return mean, variance, ((fourth - variance ** 2) / 20_000).sqrt()


def draws(sampler, energy, shape, steps, step_size, clamp=None, **more):
    """20,000 chains from N(0, .25) -> (20,000, pixels), and their acceptance rates."""
    start = .5 * torch.randn(20_000, *shape, generator=seeded(1)).clamp(-2, 2)
    end = sampler(energy, start, steps, step_size, clamp=clamp, generator=seeded(), **more)
    end, rate = (end, None) if sampler is sgld else end
    return end.flatten(1), rate


@pytest.mark.parametrize('steps, leapfrog', [(120, 1), (20, 5)])
def test_hmc_keeps_a_correlation_that_sgld_loses(steps, leapfrog):
    """Steps of .05 are not small for the narrow direction: SGLD has .870 for .900 there, HMC and
    MALA are right within 3 standard errors, and only they say how often a step is refused."""
    x, rate = draws(hmc, correlated, (1, 1, 2), steps, .05, leapfrog=leapfrog)
    assert abs(x.T.corrcoef()[0, 1] - .9) < 3 * .19 / 20_000 ** .5
    assert (x.var(0) - 1).abs().max() < 3 * (2 / 20_000) ** .5
    assert x.mean(0).abs().max() < 3 / 20_000 ** .5
    assert rate.shape == (20_000,) and 0 < rate.min() and rate.max() <= 1
    assert .85 < rate.mean() < .95, f'{rate.mean():.2f} of the steps are accepted'
    biased = draws(sgld, correlated, (1, 1, 2), 120, .05)[0].T.corrcoef()[0, 1]
    assert abs(biased - .870) < .006, 'the measured error of SGLD'


@pytest.mark.parametrize('energy, steps, step_size, leapfrog, off', [
    (heavy, 60, .5, 1, .4), (heavy, 30, .5, 3, .4), (tilted, 80, .05, 5, -.05)])
def test_hmc_has_the_moments_of_a_heavy_tail_and_of_two_wells(energy, steps, step_size, leapfrog,
                                                             off):
    """Within 3 standard errors; the variance of SGLD with the same steps is off by `off` or more.
    Two wells need several leapfrog steps: they carry chains across the barrier."""
    mean, variance, error = exact(energy, *((-200., 200.) if energy is heavy else ()))
    x, _ = draws(hmc, energy, (1, 1, 1), steps, step_size, leapfrog=leapfrog)
    assert abs(x.mean() - mean) < 3 * (variance / 20_000) ** .5
    assert abs(x.var() - variance) < 3 * error, f'variance {x.var():.3f}, not {variance:.3f}'
    biased, _ = draws(sgld, energy, (1, 1, 1), 120, step_size)
    biased = biased[biased.isfinite()].var() - variance  # some chains run away
    assert biased / off > 1, f'the error of SGLD is {biased:.3f}'


@pytest.mark.parametrize('leapfrog', [1, 4])
def test_hmc_bounces_off_the_walls_of_the_box(leapfrog):
    """E = 3 x in [-1, 1]. Projected Langevin sticks to the wall, HMC does not. Pixels that start on
    the walls, as those of many images do, hold no chain."""
    mean, variance, error = exact(slope, -1., 1.)
    x, _ = draws(hmc, slope, (1, 1, 1), 60, .1, clamp=(-1., 1.), leapfrog=leapfrog)
    assert abs(x.mean() - mean) < 3 * (variance / 20_000) ** .5
    assert abs(x.var() - variance) < 3 * error and x.abs().max() <= 1
    assert draws(sgld, slope, (1, 1, 1), 60, .1, clamp=(-1., 1.))[0].mean() < mean - .1
    corner = torch.randn(8, 1, 20, 20, generator=seeded()).sign()
    x, rate = hmc(lambda x: .1 * slope(x), corner, 20, .001, leapfrog=leapfrog, generator=seeded())
    assert rate.min() > .7 and x.abs().max() <= 1
    far, rate = hmc(slope, torch.zeros(8, 1, 1, 1), 5, 50., leapfrog=leapfrog, generator=seeded())
    assert far.abs().max() <= 1 and rate.max() < 1, 'past both walls: rejected'


def test_one_leapfrog_step_proposes_the_step_of_sgld():
    """Of the same noise, at any temperature: an accepted state is SGLD's, others stay."""
    x = torch.rand(400, 1, 2, 2, generator=seeded(1))
    for noise, clip in [(None, None), (.3, None), (.3, .2)]:
        proposed = sgld(quadratic(.5), x, 1, .1, noise, clip, clamp=None, generator=seeded())
        end, rate = hmc(quadratic(.5), x, 1, .1, noise, clip, clamp=None, generator=seeded())
        image = rate.bool().view(-1, 1, 1, 1)
        assert_close(end, torch.where(image, proposed, x), 'x - step_size dE/dx + noise * xi')
        assert .4 < rate.mean() < 1 and set(rate.tolist()) == {0., 1.}


def test_temperature_of_hmc():
    """T = noise^2 / (2 * step_size) exactly, also for large steps and with a clipped gradient.
    Without noise there is no distribution."""
    with pytest.raises(ZeroDivisionError):
        draws(hmc, quadratic(1.), (1, 1, 1), 1, .6, noise=0.)
    for clip in (None, .5):
        x, _ = draws(hmc, quadratic(1.), (1, 1, 1), 40, .6, noise=.8, leapfrog=2, grad_clip=clip)
        t = .8 ** 2 / (2 * .6)
        assert abs(x.var() / t - 1) < 3 * (2 / 20_000) ** .5, f'T {x.var():.3f}, not {t:.3f}'


def test_hmc_has_the_conventions_of_sgld():
    """A stream for each image; the start and the model stay as they are."""
    def streams(*seeds):
        return [seeded(seed) for seed in seeds]

    x = torch.rand(1, 1, 4, 4, generator=seeded()).expand(3, -1, -1, -1)
    together, rate = hmc(quadratic(.2), x, 9, .01, generator=streams(3, 4, 5), leapfrog=2)
    alone, own = hmc(quadratic(.2), x[:1], 9, .01, generator=streams(5), leapfrog=2)
    assert torch.equal(together[2:], alone) and torch.equal(rate[2:], own)
    assert 0 < rate.mean() < 1 and not together.requires_grad
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    start = torch.rand(2, 1, 4, 4)
    with torch.no_grad():
        hmc(model, start, 2, .1)
    assert not start.requires_grad and model[1].weight.grad is None


# --- settings of all chains -----------------------------------------------------------------------

FACTS = {'steps': 60, 'step_size': None, 'noise': .02, 'grad_clip': .5, 'matching': 1.,
         'slope': 40., 'pixels': 56 * 56}  # the defaults of train.py for the course's images


def test_chains_of_the_training_use_its_flags():
    """And so do chains from noise if no matching term has shaped the energy, in 128 steps."""
    flags = {**FACTS, 'step_size': 10., 'matching': 0.}
    expected = {'steps': 60, 'step_size': 10., 'noise': .02, 'grad_clip': .5}
    assert chain_settings({**flags, 'matching': 1.}, 'training') == expected
    assert chain_settings(flags, 'sampling') == {**expected, 'steps': 128}


def test_default_step_moves_pixels_by_a_tenth():
    """Where E rises by `slope` for each unit of root mean square distance, one step is .1 long."""
    def cone(x):
        return FACTS['slope'] * x.square().mean(dim=(1, 2, 3)).sqrt()

    settings = chain_settings(FACTS, 'descent')
    assert settings['step_size'] == pytest.approx(7.84)
    x = .5 * torch.randn(3, 1, 56, 56, generator=seeded())
    moved = sgld(cone, x, **{**settings, 'steps': 1, 'grad_clip': None}, clamp=None) - x
    assert_close(moved.square().mean(dim=(1, 2, 3)).sqrt(), torch.full((3,), .1),
                 'step_size is .1 * pixels / slope, and descent has no noise')


def test_chains_from_noise_cool_down():
    """Simulated annealing, if a matching term has shaped the energy: .5 at first, then less and
    less, as (1 - k / K)^3. Each noise is used once, whatever the number of steps; by default 32."""
    for steps in (None, 10):
        noises = chain_settings(FACTS, 'sampling', steps)['noise']
        assert len(noises) == (steps or 32), f'{len(noises)} steps instead of {steps or 32}'
        wanted = [.5 * (1 - k / len(noises)) ** 3 for k in range(len(noises))]
        assert noises == pytest.approx(wanted), (
            f'first noise {noises[0]:.3g} instead of {wanted[0]:.3g}, or they do not fall: '
            '.5 (1 - k / K)^3 for k = 0, 1, ... K - 1')
    first = chain_settings(FACTS, 'sampling', step_size=3.)['noise'][0]
    assert first == pytest.approx(.5), f'first noise {first:.3g}: it depends on no step size'


def test_descent_has_no_noise():
    """It is a function of its start."""
    for noise in (None, .3):
        assert chain_settings(FACTS, 'descent', noise=noise)['noise'] == 0, 'descent has no noise'


@pytest.mark.parametrize('kind', ['training', 'sampling'])
def test_what_is_given_replaces_the_settings(kind):
    """Also a noise of 0 and a step size beside one from the training."""
    flags = {**FACTS, 'step_size': 10.}
    assert chain_settings(flags, kind, steps=7, step_size=3., noise=0.) == {
        'steps': 7, 'step_size': 3., 'noise': 0., 'grad_clip': .5}


@pytest.mark.parametrize('given, wanted', [({}, 2.6e-5),
                                           ({'step_size': 10., 'noise': .005}, 1.3e-6)])
def test_temperature_of_training_chains(given, wanted):
    """Chains follow exp(-E/T)/Z with T = noise^2 / (2 * step_size): the two that `temperature`
    names. It is never 0, as E(x) divides by it."""
    settings = chain_settings({**FACTS, **given}, 'training')
    seen = temperature({**FACTS, **given})
    assert seen == pytest.approx(wanted, rel=.05), (
        f'T {seen:.2g} instead of {wanted:.2g}: the square of the noise is a variance')
    assert temperature({**FACTS, 'noise': 0.}) == 1e-9
    s = (settings['step_size'] / .05) ** .5  # an energy so flat that a = .05
    x = sgld(quadratic(s), torch.zeros(20_000, 1, 1, 1), **settings, generator=seeded())
    assert x.var().item() / s ** 2 == pytest.approx(wanted, rel=.06)


# --- starts of chains -----------------------------------------------------------------------------

def power_of(kind):
    """Mean squares of 2000 images: (2000,)."""
    return prior(kind, (2000, 1, 8, 8), seeded()).square().mean(dim=(1, 2, 3))


def test_priors_of_the_course():
    """`gaussian` is N(0, 0.01), a variance and not a deviation; `uniform` is U(-1, 1)."""
    variance = power_of('gaussian').mean().item()
    assert abs(variance - .01) < 3 * .01 * (2 / 128_000) ** .5, (
        f'variance {variance:.3g}: in N(0, 0.01) the variance is .01, not the deviation')
    variance = power_of('uniform').mean().item()
    assert abs(variance - 1 / 3) < 3e-3, (
        f'mean square {variance:.3f}: that of U(-1, 1) is 1/3')
    x = prior('uniform', (100, 1, 8, 8), seeded())
    assert -1 <= x.min() < -.99 and .99 < x.max() <= 1, (
        f'from {x.min():.2f} to {x.max():.2f}: `uniform` is U(-1, 1), as images are')


def test_mixed_prior_is_half_gaussian_and_half_grainy():
    """Whole images are one or the other."""
    power = power_of('mixed')
    gaussian = power < .02  # grainy ones have .1 and more
    assert abs(gaussian.float().mean() - .5) < 3 * .5 / 2000 ** .5
    assert abs(power[gaussian].mean() - .01) < 3e-4 and power[~gaussian].min() > .1


@pytest.mark.parametrize('kind', ['gaussian', 'uniform', 'grainy', 'mixed'])
def test_starts_hang_on_their_generator(kind):
    """The same seed gives the same images, of any shape; another seed gives others."""
    for shape in ((3, 2, 5, 9), (3, 1, 16, 7), (9, 1, 1, 1)):
        x = prior(kind, shape, seeded())
        assert x.shape == shape and x.dtype == torch.float32
        assert torch.equal(x, prior(kind, shape, seeded()))
        assert not torch.equal(x, prior(kind, shape, seeded(1)))
    torch.set_default_dtype(torch.float64)  # as a notebook may have done
    try:
        assert prior(kind, (2, 1, 8, 8)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    different = len(prior(kind, (50, 1, 8, 8), seeded()).unique(dim=0))
    assert different > 35, 'images of a batch differ; of grainy ones a few are all black or white'


def test_unknown_prior_is_an_error():
    with pytest.raises(ValueError, match="'gausian': choose gaussian, uniform, grainy or mixed"):
        prior('gausian', (1, 1, 8, 8))


def test_grainy_noise_has_every_grain_and_contrast():
    """Some images are smooth and some change from pixel to pixel, whatever their contrast; some are
    pale and some black and white. Colours differ within an image."""
    x = grainy((500, 3, 20, 20), seeded())
    assert x.abs().max() <= 1 and abs(x.mean()) < .05
    neighbours = (x[..., 1:] * x[..., :-1]).mean(dim=(1, 2, 3))  # (500,), their covariance
    correlation = neighbours / x.square().mean(dim=(1, 2, 3))
    for some in (correlation < .1, correlation > .95):
        assert some.float().mean() > .09, 'in many images the finest or the coarsest dominates'
    contrast = x.abs().mean(dim=(1, 2, 3))
    assert .3 < contrast.min() < .45 and contrast.max() > .95
    assert contrast.quantile(.5) > .7, 'half of them come close to black and white'
    assert not torch.equal(x[:, 0], x[:, 1])


# --- the reservoir --------------------------------------------------------------------------------

LENGTHS = [10, 16, 12]
OWNER = torch.tensor([0] * 10 + [1] * 16 + [2] * 12)  # (38,), the ring of each slot


def numbered(lengths, **more):
    """A reservoir whose chains are one pixel, the number of their slot."""
    reservoir = Reservoir(lengths, (1, 1, 1), **{'reinit': 0., **more})
    reservoir.chains[:] = torch.arange(float(sum(lengths)))[:, None, None, None]
    return reservoir


def test_new_reservoir_holds_the_prior():
    """Each slot has a start of its own."""
    chains = Reservoir([1000, 1000], (1, 4, 4), kind='gaussian', generator=seeded()).chains
    assert chains.shape == (2000, 1, 4, 4) and len(chains.unique(dim=0)) == 2000
    assert abs(chains.square().mean() - .01) < 3e-4


def test_share_of_fresh_chains():
    """`reinit` of the drawn chains start again from the prior, the others keep their state."""
    reservoir = Reservoir([4000], (1, 2, 2), reinit=.05, kind='gaussian')
    reservoir.chains[:] = 7.
    x, _ = reservoir.draw(torch.zeros(4000, dtype=torch.long), seeded())
    fresh = (x != 7).any(dim=(1, 2, 3))
    share = fresh.float().mean().item()
    assert abs(share - .05) < 3 * (.05 * .95 / 4000) ** .5, (
        f'{share:.3f} of the chains start afresh instead of .05: ' + nearest_slip(share, {
            'is the comparison the wrong way round?': .95, 'do all chains start afresh?': 1.,
            'does none start afresh?': 0., 'the number is wrong': .05,
            'do single pixels start afresh? A whole image does': 1 - .95 ** 4}))
    assert abs(x[fresh].square().mean() - .01) < .002, 'a whole image starts afresh, from `kind`'
    again, _ = reservoir.draw(torch.zeros(4000, dtype=torch.long), seeded())
    assert torch.equal(x, again), 'all of it hangs on the generator'


def test_chains_return_to_their_slots_and_classes():
    """A label gets a chain of its ring, no chain is given twice in a batch, and all of them take
    turns: after any number of batches two chains of a ring differ by one visit at most."""
    reservoir, generator, visits = numbered(LENGTHS), seeded(), torch.zeros(38)
    for _ in range(60):
        ring = torch.randint(3, (8,), generator=generator)
        x, slot = reservoir.draw(ring)
        assert torch.equal(OWNER[slot], ring), 'entry i is a chain of the class ring[i]'
        assert torch.equal(x.flatten().long(), slot), 'x[i] is the chain in slot[i]'
        assert len(slot.unique()) == 8, 'chains of a batch are counted up from the head of a ring'
        reservoir.store(slot, x)
        visits[slot] += 1
    for turns in visits.split(LENGTHS):
        assert turns.max() - turns.min() <= 1, 'the head of a ring goes on by what was drawn'


def test_order_in_a_ring():
    """From slot 0 to the last one and round again, in the order of the batch."""
    reservoir = numbered([3, 4])
    assert reservoir.draw(torch.tensor([1, 0, 1, 1]))[1].tolist() == [3, 0, 4, 5]
    assert reservoir.draw(torch.tensor([1, 1, 0]))[1].tolist() == [6, 3, 1]
    assert reservoir.draw(torch.tensor([0, 0, 0, 0, 0]))[1].tolist() == [2, 0, 1, 2, 0]
    assert reservoir.draw(torch.tensor([0, 1]))[1].tolist() == [1, 4]


def test_what_is_stored_is_drawn_a_round_later():
    """As it was left, also if the chains come back in another order."""
    reservoir = numbered([4, 4])
    x, slot = reservoir.draw(torch.tensor([1, 0, 1, 1]))
    x += 100  # what is drawn is a copy
    assert reservoir.chains.max() == 7
    order = torch.tensor([2, 3, 0, 1])
    reservoir.store(slot[order], x[order])
    again, _ = reservoir.draw(torch.tensor([1, 1, 0]))  # the last of ring 1 and its first, ring 0
    assert again.flatten().tolist() == [7, 104, 1], 'does `store` write the chains back?'
    assert reservoir.chains.flatten().tolist() == [100, 1, 2, 3, 104, 105, 106, 7]


def test_short_run_and_persistent_chains():
    """reinit=1 always draws the prior; reinit=0 with a slot for each image of the batch returns the
    very same chains."""
    ring = torch.zeros(6, dtype=torch.long)
    short = numbered([6], reinit=1., kind='gaussian')
    assert short.draw(ring)[0].abs().max() < .6
    persistent = numbered([6])
    x, slot = persistent.draw(ring)
    persistent.store(slot, x + 10)
    assert torch.equal(persistent.draw(ring)[0], x + 10)


def test_saved_reservoir_goes_on_exactly():
    """With equal lengths the loaded one draws what the saved one would have drawn."""
    saved, loaded = numbered(LENGTHS), Reservoir(LENGTHS, (1, 1, 1), reinit=0.)
    saved.draw(torch.tensor([0, 1, 1, 2, 2, 2]))
    state, before = saved.state_dict(), saved.chains.clone()
    saved.store(torch.arange(38), before + 50)
    assert torch.equal(state['chains'], before), 'what was saved stays as it was'
    saved.store(torch.arange(38), before)
    loaded.load_state_dict(state)
    assert torch.equal(loaded.chains, saved.chains)
    for _ in range(3):
        (x, slot), (y, place) = (r.draw(torch.tensor([2, 1, 1, 0, 2, 0])) for r in (saved, loaded))
        assert torch.equal(x, y) and torch.equal(slot, place)
    loaded.store(slot, x + 100)
    assert saved.chains.max() < 100, 'the two share no memory'


def test_saved_reservoir_of_other_lengths_keeps_classes_apart():
    """Rings that became shorter or longer hold chains of their class, as many different ones as
    there are; all their slots can be drawn."""
    saved, loaded = numbered(LENGTHS), Reservoir([4, 40, 12], (1, 1, 1), reinit=0.)
    saved.draw(torch.tensor([0] * 9))  # the head of ring 0 stands beyond the new length
    loaded.load_state_dict(saved.state_dict())
    for ring, chains in enumerate(loaded.chains.flatten().long().split([4, 40, 12])):
        assert OWNER[chains].eq(ring).all(), f'ring {ring} holds chains of other classes'
        count = torch.bincount(chains)[chains.unique()]
        assert len(count) == min(len(chains), LENGTHS[ring]) and count.max() - count.min() <= 1
    for ring, first, length in ((0, 0, 4), (1, 4, 40), (2, 44, 12)):
        slots = loaded.draw(torch.full((length,), ring))[1]
        assert sorted(slots.tolist()) == list(range(first, first + length))


# Three classes, of which 80, 19 and 1 % of the images are.
LABELS = torch.tensor([0] * 800 + [1] * 190 + [2] * 10)


def test_rings_are_as_long_as_their_class_is_frequent():
    """So all chains are revisited equally often. A rare class has 16 slots, or a whole batch."""
    reservoir = make_reservoir('reservoir', LABELS, 64, 500, (1, 2, 2), .3, 'gaussian')
    assert reservoir.lengths.tolist() == [400, 95, 16] and reservoir.reinit == .3
    assert reservoir.chains.shape == (511, 1, 2, 2) and reservoir.chains.abs().max() < .6
    reservoir = make_reservoir('reservoir', LABELS, 8, 500, (1, 2, 2), .3, 'gaussian')
    assert reservoir.lengths.tolist() == [400, 95, 8]


def test_a_batch_finds_a_slot_for_each_image():
    """Also with fewer slots than images: else two chains of a batch would share one."""
    labels = torch.zeros(100, dtype=torch.long)
    reservoir = make_reservoir('reservoir', labels, 64, 5, (1, 2, 2), .3, 'gaussian')
    slots = reservoir.draw(torch.zeros(64, dtype=torch.long))[1]
    assert len(slots.unique()) == 64


@pytest.mark.parametrize('init, reinit', [('persistent', 0), ('noise', 1)])
def test_chains_without_a_reservoir(init, reinit):
    """Each class has a slot for every image of a batch; chains start afresh never or always."""
    reservoir = make_reservoir(init, LABELS, 64, 500, (1, 2, 2), .3, 'gaussian')
    assert reservoir.lengths.tolist() == [64, 64, 64] and reservoir.reinit == reinit

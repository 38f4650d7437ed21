"""Laws of SGLD and of the reservoir."""
import pytest
import torch
import torch.utils.checkpoint

from model import EnergyModel
from sampler import Reservoir, annealed, grainy, prior, randn, sgld


def quadratic(s):
    """E(x) = |x|^2 / (2 s^2), the energy of a normal law of standard deviation s."""
    return lambda x: x.square().sum(dim=(1, 2, 3)) / (2 * s * s)


@pytest.mark.parametrize('s, step_size, noise', [(.5, .02, None), (.5, .1, .1), (1., .3, .5)])
def test_stationary_variance_on_a_quadratic_energy(s, step_size, noise):
    """x <- (1 - a) x + n xi with a = step / s^2 has variance n^2 / (a (2 - a)), within 3 standard errors."""
    generator = torch.Generator().manual_seed(0)
    x = sgld(quadratic(s), torch.zeros(40_000, 1, 1, 1), 200, step_size, noise, clamp=None, generator=generator)
    a, n = step_size / s ** 2, (2 * step_size) ** .5 if noise is None else noise
    variance = n ** 2 / (a * (2 - a))
    assert abs(x.var() - variance) < 3 * variance * (2 / len(x)) ** .5
    assert abs(x.mean()) < 3 * (variance / len(x)) ** .5


def test_no_noise_given_means_temperature_one():
    """noise=None tends to the law exp(-E): variance s^2 as the step shrinks."""
    generator = torch.Generator().manual_seed(0)
    x = sgld(quadratic(.3), torch.zeros(40_000, 1, 1, 1), 1500, .0005, clamp=None, generator=generator)
    assert abs(x.var() - .09) < .09 * (.0005 / .09 + 3 * (2 / len(x)) ** .5)


def test_noise_that_cools_down():
    """One noise a step: the variance follows v <- (1 - a)^2 v + n_k^2, and levels fall from the first to the last above 0."""
    levels, a, v = annealed(20, .4), .3, 0.
    assert len(levels) == 20 and levels[0] == .4 and 0 < levels[-1] == pytest.approx(.02)
    generator = torch.Generator().manual_seed(0)
    x = sgld(quadratic(1.), torch.zeros(40_000, 1, 1, 1), 20, a, levels, clamp=None, generator=generator)
    for n in levels:
        v = (1 - a) ** 2 * v + n ** 2
    assert abs(x.var() - v) < 3 * v * (2 / len(x)) ** .5


def test_clip_and_clamp():
    """The clip bounds each element of the gradient, the clamp each pixel."""
    x = torch.full((1, 1, 2, 2), .9)
    assert torch.allclose(sgld(quadratic(.1), x, 1, 10., 0., grad_clip=.03, clamp=None), x - .3)
    assert sgld(lambda x: -quadratic(.1)(x), x, 1, 10., 0.).eq(1).all()


def test_callback_sees_every_state_with_its_energy():
    """callback(k, x, e) runs once before each step, with e = E(x); the start is not changed."""
    seen, start = [], torch.rand(3, 1, 4, 4)
    before = start.clone()
    sgld(quadratic(1.), start, 5, .1, .1, callback=lambda k, x, e: seen.append((k, x, e)))
    assert [k for k, _, _ in seen] == list(range(5)) and torch.equal(seen[0][1], before) and torch.equal(start, before)
    for _, x, e in seen:
        torch.testing.assert_close(e, quadratic(1.)(x))
        assert not x.requires_grad


def test_model_is_left_as_it_was_found():
    """Mode, requires_grad and .grad of the caller's model survive sampling, also under no_grad."""
    model = EnergyModel(3, width=4).train()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    with torch.no_grad():
        x = sgld(model.energy, torch.rand(2, 1, 16, 16), 2, .1, .01)
    assert model.training and not model.head.bias.requires_grad and model.head.weight.requires_grad
    assert model.head.weight.grad.eq(1).all() and model.features[0].weight.grad is None and not x.requires_grad


def test_same_seed_same_samples():
    """The same generator seed gives the same chain bit by bit, another one does not."""
    model, x = EnergyModel(3, width=4), torch.rand(2, 1, 16, 16)
    a, b, c = (sgld(model.energy, x, 5, .1, .01, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_pixels_that_are_not_free_are_held_bit_by_bit():
    """Where `free` is False no pixel changes, not even one outside the clamp; the others move as if it were not there."""
    x, free = 3 * torch.randn(4, 2, 6, 6), torch.rand(4, 1, 6, 6) < .5
    a, b = (sgld(quadratic(1.), x, 3, .1, .1, generator=torch.Generator().manual_seed(0), free=f) for f in (free, None))
    assert torch.equal(torch.where(free, b, x), a) and not torch.equal(a, b)


def test_each_image_has_its_own_random_stream():
    """With a list of generators the noise of an image depends on its own generator alone, not on its place or company."""
    def streams(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    a, b = (randn((len(g), 1, 4, 4), g) for g in (streams(3, 4, 5), streams(5, 3)))
    assert torch.equal(a[[2, 0]], b) and len(a.flatten(1).unique(dim=0)) == 3
    x = torch.rand(1, 1, 4, 4).expand(3, -1, -1, -1)
    together = sgld(quadratic(1.), x, 5, .1, .1, generator=streams(3, 4, 5))
    alone = sgld(quadratic(1.), x[:1], 5, .1, .1, generator=streams(5))
    assert torch.equal(together[2:], alone)


def test_gradient_through_the_chain():
    """Without noise K steps on a quadratic energy are x_K = (1 - a)^K x_0 with a = step / s^2, and so is the gradient, also
    with the graph of each step rebuilt on the way back."""
    start, weight = torch.rand(2, 1, 3, 3), torch.rand(2, 1, 3, 3)

    def step(x, steps=1):
        return sgld(quadratic(.5), x, steps, .05, 0., clamp=None, differentiable=True)

    for rebuilt in (False, True):
        x = start.clone().requires_grad_(True)
        end = step(x, 4)
        if rebuilt:
            end = x
            for _ in range(4):
                end = torch.utils.checkpoint.checkpoint(step, end, use_reentrant=True)
        (weight * end).sum().backward()
        torch.testing.assert_close(end, .8 ** 4 * start)
        torch.testing.assert_close(x.grad, .8 ** 4 * weight)


def test_prior_has_the_variance_of_the_course_sheet():
    """`gaussian` is N(0, 0.01), `uniform` is U(-1, 1) of variance 1/3, half of `mixed` is gaussian."""
    generator = torch.Generator().manual_seed(0)
    kinds = ('gaussian', 'uniform', 'mixed')
    power = {kind: prior(kind, (2000, 1, 8, 8), generator).square().mean(dim=(1, 2, 3)) for kind in kinds}
    assert abs(power['gaussian'].mean() - .01) < 3e-4 and abs(power['uniform'].mean() - 1 / 3) < 3e-3
    assert abs((power['mixed'] < .02).float().mean() - .5) < .04


def test_grainy_noise_has_every_grain_and_contrast():
    """Among many images some are smooth and some change from pixel to pixel, some are fog and some black and white."""
    x = grainy((500, 3, 20, 20), torch.Generator().manual_seed(0))
    assert x.shape == (500, 3, 20, 20) and x.abs().max() <= 1
    neighbours = (x[..., 1:] * x[..., :-1]).mean(dim=(1, 2, 3)) / x.square().mean(dim=(1, 2, 3))  # their correlation
    assert neighbours.min() < .2 and neighbours.max() > .95
    contrast = x.abs().mean(dim=(1, 2, 3))
    assert contrast.min() < .45 and contrast.max() > .9


# --- the reservoir ------------------------------------------------------------------------------------------------------

def test_chains_return_to_their_slots_and_classes():
    """Each chain is found again where it was left: classes and slots are never mixed up, and every chain has its turn."""
    lengths = [10, 16, 12]
    reservoir = Reservoir(lengths, (1, 1, 1), reinit=0.)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))  # (38,), the ring of each slot
    reservoir.chains[:] = torch.arange(38.)[:, None, None, None]
    generator, visits = torch.Generator().manual_seed(0), torch.zeros(38)
    for _ in range(60):
        ring = torch.randint(3, (8,), generator=generator)
        x, slot = reservoir.draw(ring)
        assert torch.equal(x.flatten().long(), slot) and torch.equal(owner[slot], ring)
        assert len(slot.unique()) == 8  # no chain twice in a batch
        reservoir.store(slot, x)
        visits[slot] += 1
    assert visits.sum() == 480
    for turns in visits.split(lengths):
        assert turns.max() - turns.min() <= 1


def test_what_is_stored_is_drawn_a_round_later():
    """A ring goes round: the chain stored first is the first to come again, changed as it was left."""
    reservoir = Reservoir([4, 4], (1, 1, 1), reinit=0.)
    x, slot = reservoir.draw(torch.tensor([1, 0, 1, 1]))
    reservoir.store(slot, x + 5)
    again, _ = reservoir.draw(torch.tensor([1, 1]))  # the fourth chain of ring 1, then its first again
    assert again[0].abs() < 4 and torch.equal(again[1], x[0] + 5)


def test_share_of_fresh_chains():
    """`reinit` of the drawn chains start again from the prior, the others keep their state."""
    generator = torch.Generator().manual_seed(0)
    reservoir = Reservoir([4000], (1, 2, 2), reinit=.05, kind='gaussian')
    reservoir.chains[:] = 7.
    x, _ = reservoir.draw(torch.zeros(4000, dtype=torch.long), generator)
    fresh = (x != 7).all(dim=(1, 2, 3))
    assert abs(fresh.float().mean() - .05) < 3 * (.05 * .95 / 4000) ** .5
    assert (x[~fresh] == 7).all() and (x[fresh].abs() < 1).all()


def test_short_run_and_persistent_chains():
    """reinit=1 always draws the prior; reinit=0 with as many slots as the batch returns the very same chains."""
    short = Reservoir([6], (1, 2, 2), reinit=1.)
    short.chains[:] = 7.
    ring = torch.zeros(6, dtype=torch.long)
    assert (short.draw(ring)[0] != 7).all()
    persistent = Reservoir([6], (1, 2, 2), reinit=0.)
    x, slot = persistent.draw(ring)
    persistent.store(slot, x + 1)
    assert torch.equal(persistent.draw(ring)[0], x + 1)

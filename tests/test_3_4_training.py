"""Course task 3.4: the losses, one update of the weights, and what a run leaves. Whole runs, the
guard and --resume are in test_runs.py."""
import copy
import csv
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import sampler
import train
from conftest import QUICK
from hints import assert_close, nearest_slip
from model import EnergyModel, load_model
from sampler import chain_settings, prior, sgld


def read_log(folder, name='log.csv'):
    with open(folder / name) as file:
        return list(csv.DictReader(file))


# --- the losses -----------------------------------------------------------------------------------

def test_losses_by_hand():
    """px_step is a difference of means, l2_step a sum of mean squares, pyx_step the mean of -log
    softmax at the label."""
    real, synth = torch.tensor([1., 3.]), torch.tensor([2., 8.])
    assert_close(train.px_step(real, synth), -3., 'px_step: mean energy of data minus samples', {
        'the sign: data and samples are exchanged': 3., 'is it a sum? Take the mean': -6.})
    assert_close(train.l2_step(real, synth), 39., 'l2_step: mean squares, of data and samples', {
        'square first, then take the mean': 4. + 25., 'where is the L2 of the samples?': 5.,
        'where is the L2 of the data?': 34., 'is it a sum? Take the mean': 78.})
    logits, y = torch.tensor([[0., math.log(3)], [math.log(3), 0.]]), torch.tensor([1, 1])
    right, wrong = -math.log(.75), -math.log(.25)  # p = (1/4, 3/4) and (3/4, 1/4)
    twice = math.log(1 + math.exp(-.5)), math.log(1 + math.exp(.5))  # softmax of p
    assert_close(train.pyx_step(logits, y), (right + wrong) / 2, 'pyx_step: mean of -log p(y|x)', {
        'is softmax applied twice? Cross-entropy takes logits': sum(twice) / 2,
        'log softmax is missing: logits are no log p': -math.log(3) / 2,
        'is it a sum? Take the mean': right + wrong, 'the sign of log p': -(right + wrong) / 2})


def test_px_step_has_the_gradient_of_the_likelihood():
    """For E(x) = (x - m)^2 / 2, -log p has the gradient m - mean(x) in m. So has mean E(x) - mean
    E(x') with x' ~ p, drawn here by SGLD at temperature 1, within 3 standard errors."""
    m = torch.tensor(.7, requires_grad=True)
    x_real = 2. + torch.randn(5000, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def energy(x):
        return (x.flatten() - m).square() / 2  # (B, 1, 1, 1) -> (B,)

    x_synth = sgld(energy, torch.zeros(5000, 1, 1, 1), 300, .05, clamp=None,
                   generator=torch.Generator().manual_seed(1))
    gradient, = torch.autograd.grad(train.px_step(energy(x_real), energy(x_synth)), m)
    wanted = m - x_real.mean()
    assert abs(gradient - wanted) < 3 * 5000 ** -.5, (
        f'gradient {gradient:.3f} instead of {wanted:.3f}: ' + nearest_slip(gradient, {
            'with the opposite sign, data and samples are exchanged': -wanted,
            'is it the sum over the batch? Take the mean': 5000 * wanted,
            'do data and samples both count?': wanted}))


@pytest.mark.parametrize('t', [1., .1])
def test_px_step_is_the_likelihood_of_a_small_world(t):
    """In a world of nine images Z is a sum: with the exact mean over p(x) = exp(-E(x) / T) / Z, the
    gradient of px_step in the weights is that of the mean of -T log p(x) over the data."""
    torch.manual_seed(0)
    model, world, data_set = EnergyModel(3, 1, 4, t), 9 * torch.rand(9, 1, 8, 8), [1, 4, 4, 7]
    model.head.weight.data *= 300
    energy = model.energy(world)  # (9,)
    log_p = (-energy / t).log_softmax(0)  # (9,)
    p = log_p.detach().exp()
    assert .9 > p.max() > 1.3 * p.min()  # else any mean would do
    found = torch.autograd.grad(train.px_step(energy[data_set], 9 * p * energy),
                                model.parameters(), retain_graph=True)
    wanted = torch.autograd.grad(-t * log_p[data_set].mean(), model.parameters())
    for gradient, by_hand in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('t', [1., .5, .01])
def test_pyx_step_bounds_the_likelihood_of_the_labels(t):
    """The cross-entropy is at least -T log p(y|x) = E(x, y) - E(x), and equal to it for T = 1."""
    logits = 3 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    model, y = EnergyModel(5, 1, 4, t), torch.arange(200) % 5
    for f, label in zip(logits.split(1), y.split(1)):  # image by image, as a mean may hide some
        likelihood = model.energy_of_logits(f, label) - model.energy_of_logits(f)  # (1,)
        slack = train.pyx_step(f, label) - likelihood
        assert slack > -1e-5 and (t < 1 or slack < 1e-5)


def test_matching_is_zero_for_the_valley_itself():
    """The term is 0 for E = slope * sqrt(r^2 + ROUND^2) around the image, with r the root mean
    square distance of the pixels, and the mean square of the difference for an energy that is twice
    as steep."""
    generator = torch.Generator().manual_seed(0)
    x, away = torch.rand(6, 1, 4, 4, generator=generator), prior('uniform', (6, 1, 4, 4), generator)

    def valley(slope):
        return lambda x_t: slope * (
            (x_t - x).square().mean(dim=(1, 2, 3)) + train.ROUND ** 2).sqrt()  # (B,)

    assert train.matching_step(valley(40.), x, away, 40.).item() == pytest.approx(0, abs=1e-10), (
        'the valley itself has no error: is the sign of the difference right, and its scale?')
    r2 = away.square().mean(dim=(1, 2, 3))
    wanted = (r2 / (r2 + train.ROUND ** 2)).mean().item()
    assert_close(train.matching_step(valley(80.), x, away, 40.), wanted,
                 'the mean over pixels and images of (difference * pixels / slope)^2', {
                     'times pixels / slope is missing': wanted * (40 / 16) ** 2,
                     'is it a sum over the pixels? Take the mean': 16 * wanted})


def test_ways_to_noise():
    """Half of the ways stay at the image, up to white noise of variance s^2 with s uniform up to
    WHITE; the others lead to a share t of the way to the prior: from an image of ones to N(0, .01)
    the mean is -t."""
    x, generator = torch.ones(4000, 1, 16, 16), torch.Generator().manual_seed(0)
    away = train.ways_to_noise(x, 'gaussian', generator)
    t = -away.mean(dim=(1, 2, 3))  # (4000,), within WHITE / 16
    stays = t < 3 * train.WHITE / 16
    assert abs(stays.float().mean() - .5 - .5 * 3 * train.WHITE / 16) < .03
    assert abs(t[~stays].mean() - .5 - 1.5 * train.WHITE / 16) < .03 and t.max() > .95
    assert abs(away[stays].var() / (train.WHITE ** 2 / 3) - 1) < .1


def test_matching_reaches_the_weights():
    """Descent on the term alone shapes the energy: its gradient reaches the weights through dE/dx.
    """
    torch.manual_seed(0)
    model, x = EnergyModel(1, width=4), torch.zeros(16, 1, 16, 16)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(80):
        away = prior('uniform', x.shape) * torch.rand(16, 1, 1, 1)
        loss = train.matching_step(model.energy, x, away, 10.)
        assert loss.requires_grad, 'no way back to the weights: dE/dx needs a graph of its own'
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .2 * losses[0]


def test_perturb_adds_noise_within_the_bounds():
    """x + data_noise * N(0, I), clamped to [-1, 1]."""
    args = train.parse_args(['--data-noise', '.1', '--device', 'cpu'])
    generator = torch.Generator().manual_seed(0)
    inside, edge = (train.perturb(torch.full((50, 1, 20, 20), value), args, generator)
                    for value in (0., 1.))
    assert abs(inside.std() - .1) < .003
    assert edge.max() <= 1, 'noisy images are images: clamp them to [-1, 1]'
    assert edge.max() == 1 and abs((edge == 1).float().mean() - .5) < .02


# --- one update -----------------------------------------------------------------------------------

class Stop(Exception):
    """Ends a run inside its first update."""


def first_update(monkeypatch, glyphs, tmp_path, *flags):
    """Run train.py until the gradients of its first update are there; returns all that it used, by
    name."""
    seen = {'perturbed': []}

    def record(owner, name, keep):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs)
            keep(args, kwargs, result)
            return result
        monkeypatch.setattr(owner, name, wrapper)

    record(train, 'EnergyModel', lambda a, k, model: seen.update(model=copy.deepcopy(model)))
    record(data.Split, 'batch', lambda a, k, batch: seen.setdefault('batch', batch))
    record(train, 'perturb', lambda a, k, x: seen['perturbed'].append((a[0], x)))
    record(train, 'ways_to_noise', lambda a, k, away: seen.update(away=away))
    record(sampler.Reservoir, 'draw',
           lambda a, k, drawn: seen.update(ring=a[1], start=drawn[0], slot=drawn[1]))
    record(sampler.Reservoir, 'store',
           lambda a, k, _: seen.update(stored=(a[1], a[2]), reservoir=a[0]))
    record(train, 'sgld',
           lambda a, k, x: seen.update(energy=a[0], moved=a[1], x_synth=x, settings=k))

    def stop(gradients):
        seen['gradients'] = [gradient.clone() for gradient in gradients]
        raise Stop
    monkeypatch.setattr(train, 'average', stop)
    with pytest.raises(Stop):
        train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, *flags])
    return seen


T = .02 ** 2 / (2 * .64)  # noise and step of QUICK's chains: .1 * 256 pixels / slope 40
OTHER_WEIGHTS = ['--px-weight', '.5', '--pyx-weight', '2', '--alpha', '.3', '--matching', '0',
                 '--contrast', '7', '--no-conditional']


def test_chains_follow_the_labels_of_the_batch(monkeypatch, glyphs, tmp_path):
    """Each chain comes from the ring of its label, moves along E(x, y) for this label, and returns
    to its slot."""
    seen = first_update(monkeypatch, glyphs, tmp_path)
    assert 'stored' in seen, 'store the samples, or no chain ever goes on'
    y, reservoir = seen['batch'][1], seen['reservoir']
    assert torch.equal(seen['ring'], y), 'image i gets a chain of its own label, that of ring i'
    assert torch.equal(seen['moved'], seen['start']), 'chains start where the reservoir left them'
    x, others = torch.rand(len(y), 1, 16, 16), torch.arange(len(y))
    f = seen['model'].get_logits(x)  # (B, K)
    assert_close(seen['energy'](x), -f[others, y], 'chains follow E(x, y) of their labels', {
        'chains follow E(x): the labels are ignored': -T * (f / T).logsumexp(1),
        'the labels are shifted by one': -f[others, (y + 1) % 3],
        'the labels are shifted by minus one': -f[others, (y - 1) % 3]})
    settings = {key: seen['settings'][key] for key in ('steps', 'noise', 'step_size')}
    assert settings == {'steps': 2, 'noise': .02, 'step_size': pytest.approx(.64)}, (
        f'{settings}: chains of the training have the steps, the noise and the step of its flags')
    slot, x_synth = seen['stored']
    assert torch.equal(slot, seen['slot']), 'store a chain in the slot that it came from'
    assert torch.equal(x_synth, seen['x_synth']), 'store where the chain ended, not where it began'
    assert torch.equal(reservoir.chains[seen['slot']], seen['x_synth'])
    ring_of_slot = torch.arange(3).repeat_interleave(reservoir.lengths)  # (slots,)
    assert torch.equal(ring_of_slot[seen['slot']], y)


def test_annealed_chains_start_from_noise(monkeypatch, glyphs, tmp_path):
    """With --anneal-every 1 all chains start from N(0, 0.01) and move as generate.py draws. Stored
    chains stay as they are."""
    seen = first_update(monkeypatch, glyphs, tmp_path, '--anneal-every', '1')
    assert abs(seen['moved'].std() - .1) < .01 and abs(seen['moved'].mean()) < .01, (
        'annealed chains start from gaussian noise, not in the reservoir')
    facts = {'steps': 2, 'step_size': None, 'noise': .02, 'grad_clip': None, 'matching': 10.,
             'slope': 40., 'pixels': 256}
    expected = chain_settings(facts, 'sampling')
    assert {key: seen['settings'][key] for key in expected} == expected, 'annealed as in generate'
    assert 'stored' not in seen, 'stored chains are those that go on, without annealed ones'


def test_every_third_update_is_annealed(monkeypatch, glyphs, tmp_path):
    """By default stored chains move in two of three updates, annealed ones in the third."""
    seen = []
    monkeypatch.setattr(train, 'sgld', lambda energy, x, steps, **_: seen.append(steps) or x)
    monkeypatch.setattr(train, 'draw_samples', lambda *_: None)  # it draws chains, too
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK])
    assert seen == [2, 2, 32, 2, 2, 32]


@pytest.mark.parametrize('flags, every', [([], 3), (['--matching', '0'], 0),
                                          (['--init', 'persistent'], 0), (['--init', 'noise'], 0),
                                          (['--init', 'data', '--anneal-every', '2'], 2)])
def test_annealing_goes_with_a_shaped_energy_and_a_reservoir(flags, every):
    """Without the matching term, or with another start of the chains, none are annealed unasked."""
    assert train.parse_args(flags).anneal_every == every


def test_without_labels_chains_follow_the_marginal_energy(monkeypatch, glyphs, tmp_path):
    """--no-conditional: one ring, and E(x)."""
    seen = first_update(monkeypatch, glyphs, tmp_path, '--no-conditional')
    x = torch.rand(16, 1, 16, 16)
    f = seen['model'].get_logits(x)  # (16, 3)
    torch.testing.assert_close(seen['energy'](x), -T * (f / T).logsumexp(1))
    assert len(seen['reservoir'].lengths) == 1 and seen['ring'].eq(0).all()


def test_chains_from_the_data_are_stored_too(monkeypatch, glyphs, tmp_path):
    """--init data: chains start at the batch, and the pictures show them as the stored ones."""
    seen = first_update(monkeypatch, glyphs, tmp_path, '--init', 'data')
    assert torch.equal(seen['moved'], seen['batch'][0]), 'chains start at the batch, before noise'
    assert torch.equal(seen['reservoir'].chains[seen['slot']], seen['x_synth']), 'store them, too'


@pytest.mark.parametrize('flags, weights', [([], (1., 3., 1., .1, 10.)),
                                            (['--px-weight', '.5'], (.5, 3., 1., .1, 10.)),
                                            (OTHER_WEIGHTS, (.5, 2., 7., .3, 0.))])
def test_an_update_descends_the_sum_of_its_terms(monkeypatch, glyphs, tmp_path, flags, weights):
    """The gradient of the weights is that of px (contrast (mean E(x) - mean E(x') + alpha L2) +
    matching) + pyx cross-entropy: no term is forgotten, counted twice or of the wrong sign. The
    gradient of each term is taken here by itself, and least squares finds its factor."""
    seen = first_update(monkeypatch, glyphs, tmp_path, *flags)
    px, pyx, contrast, alpha, matching = weights
    model, (x_real, y) = seen['model'], seen['batch']
    assert len(seen['perturbed']) == 2, (
        'noise on data and samples, once each: on one alone, the energy tells them apart by it')
    (real, noisy_real), (synth, noisy_synth) = seen['perturbed']
    assert torch.equal(real, x_real) and torch.equal(synth, seen['x_synth'])
    f_real, f_synth = model.get_logits(noisy_real), model.get_logits(noisy_synth)  # (B, K) both
    e_real, e_synth = (-T * (f / T).logsumexp(1) for f in (f_real, f_synth))  # (B,) both
    terms = {'px_step, energy of the data': (e_real.mean(), px * contrast),
             'px_step, energy of the samples': (e_synth.mean(), -px * contrast),
             'L2 (alpha)': ((e_real ** 2).mean() + (e_synth ** 2).mean(), px * contrast * alpha),
             'cross-entropy (pyx_weight)': (F.nll_loss(f_real.log_softmax(1), y), pyx)}
    if matching:
        valley = train.matching_step(lambda x: -model.get_logits(x)[torch.arange(len(y)), y],
                                     x_real, seen['away'], 40.)
        terms['matching (--matching)'] = valley, px * matching
    gradients = torch.stack([flat_gradient(term, model) for term, _ in terms.values()], 1)  # (P, L)
    wanted = torch.tensor([factor for _, factor in terms.values()]).double()  # (L,)
    found = torch.cat([gradient.flatten() for gradient in seen['gradients']]).double()  # (P,)
    factors = torch.linalg.lstsq(gradients, found[:, None]).solution[:, 0]  # (L,)
    rest = (found - gradients @ factors).norm() / found.norm()
    assert rest < 1e-4, (
        f'a share of {rest:.2g} of the gradient is of no term: is the cross-entropy that of '
        'softmax f, with T = 1, the gap that of E(x), not E(x, y), and does matching shape '
        'what chains follow?')
    for name, factor, right in zip(terms, factors.tolist(), wanted.tolist()):
        slips = {'is the term forgotten, or detached?': 0., 'does it count twice?': 2 * right,
                 'is the sign wrong, are data and samples exchanged?': -right,
                 'is its weight missing, the flag of the command line?': 1. if right > 0 else -1.}
        assert factor == pytest.approx(right, rel=.01, abs=.01), (
            f'{name}: factor {factor:.3g} instead of {right:.3g}: {nearest_slip(factor, slips)}')
    assert_close(found, gradients @ wanted, 'the gradient of the weights', rtol=1e-3, atol=1e-5)


def flat_gradient(term, model):
    """The gradient of a term in all weights, float64 (P,)."""
    gradient = torch.autograd.grad(term, model.parameters(), retain_graph=True,
                                   materialize_grads=True)
    return torch.cat([part.flatten() for part in gradient]).double()


def test_an_epoch_uses_every_image_once():
    """Batches are disjoint, their order changes with the epoch and the seed, and ranks share each
    of them."""
    args = train.parse_args(['--batch-size', '8', '--device', 'cpu'])
    first, again, second = (torch.cat([*train.batches(40, args, epoch)]) for epoch in (0, 0, 1))
    assert torch.equal(first.sort().values, torch.arange(40)), 'each image once in an epoch'
    assert torch.equal(first, again), 'the order hangs on seed and epoch alone'
    assert not torch.equal(first, second), 'is the order shuffled anew in each epoch?'


def test_each_update_has_its_own_gradient(monkeypatch, glyphs, tmp_path):
    """With a learning rate of all but 0 the second gradient is that of the second batch alone."""
    models, batches, gradients = [], [], []
    build, batch = train.EnergyModel, data.Split.batch

    def keep(values, value):
        values.append(copy.deepcopy(value))
        return value

    def stop(tensors):
        gradients.append([tensor.clone() for tensor in tensors])
        if len(batches) == 2:
            raise Stop

    monkeypatch.setattr(train, 'EnergyModel', lambda *a: keep(models, build(*a)))
    monkeypatch.setattr(data.Split, 'batch', lambda *a: keep(batches, batch(*a)))
    monkeypatch.setattr(train, 'average', stop)
    with pytest.raises(Stop):
        train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--px-weight', '0',
                    '--pyx-weight', '1', '--lr', '1e-12', '--data-noise', '0'])
    first, second = [flat_gradient(F.cross_entropy(models[0].get_logits(x), y), models[0])
                     for x, y in batches]
    found = torch.cat([gradient.flatten() for gradient in gradients[-1]]).double()
    assert_close(found, second, 'the gradient of an update is that of its batch', {
        'the gradients of both updates are added up: zero_grad is missing': first + second},
        rtol=1e-3, atol=1e-6)


def test_validation_takes_the_validation_images(monkeypatch, glyphs, tmp_path):
    """Of the averaged weights, after each epoch; with images of the training it says nothing."""
    def stop(model, split, args):
        seen.append(split)
        raise Stop

    seen, val = [], data.load_data(str(glyphs), 16).val
    monkeypatch.setattr(train, 'validate', stop)
    with pytest.raises(Stop):
        train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--px-weight', '0'])
    assert torch.equal(seen[0].images, val.images), 'validation needs the validation images'


# --- a run ----------------------------------------------------------------------------------------

def test_a_run_leaves_its_files(trained):
    """Checkpoints, logs, curves and samples, in the formats of the contract; no temporary files."""
    names = ['best.pt', 'curves.png', 'last.pt', 'log.csv', 'samples', 'updates.csv']
    assert sorted(path.name for path in trained.iterdir()) == names
    assert Image.open(trained / 'curves.png').size == (1200, 350)
    pictures = sorted(path.name for path in (trained / 'samples').iterdir())
    assert pictures == ['epoch_001.png', 'epoch_002.png']
    rows = read_log(trained)
    wanted = ('epoch, step, seconds, lr, loss, loss_px, loss_pyx, loss_reg, energy_real, '
              'energy_synth, grad_norm, val_accuracy, val_auprc, event').split(', ')
    assert set(wanted) <= set(rows[0])
    assert [row['epoch'] for row in rows] == ['1', '2'] and rows[-1]['step'] == '6'
    _, checkpoint = load_model(trained / 'best.pt')
    assert checkpoint['class_names'] == ['stand', 'lie', 'lean']
    assert checkpoint['data']['image_shape'] == [1, 16, 16]


def test_checkpoints_hold_averaged_weights(trained):
    """After six updates the average has moved a part of the way that the weights have."""
    saved = torch.load(trained / 'last.pt', weights_only=True)
    torch.manual_seed(0)
    start = EnergyModel(3, 1, 4).state_dict()
    weight = 'features.2.weight'
    average, last = (w[weight] - start[weight] for w in (saved['weights'], saved['run']['model']))
    assert average.abs().max() > 0, 'the average of the weights has not moved from the start'
    assert average.norm() < .5 * last.norm(), 'are these the last weights, without any average?'


def test_classifier_alone_learns(glyphs, tmp_path):
    """--px-weight 0 is a plain classifier: it learns the bars, and its loss is the weighted
    cross-entropy."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--px-weight', '0',
                '--epochs', '90', '--lr', '.003', '--picture-every', '90'])
    row = read_log(tmp_path)[-1]
    assert float(row['val_accuracy']) > .9
    assert float(row['loss']) == pytest.approx(3 * float(row['loss_pyx']), rel=1e-4)


def test_validation_negatives_are_the_lie_of_the_data():
    """A model that knows the images exactly has an AUROC of 1, one with the sign of the energy
    flipped 0."""
    class Known(EnergyModel):
        sign = 1.

        def get_logits(self, x):  # E is the distance from black and white pixels
            distance = (1 - x.abs()).mean(dim=(1, 2, 3))  # (B,)
            return -self.sign * distance[:, None] + self.head.bias  # (B, 3)

    generator = torch.Generator().manual_seed(0)
    images = 255 * (torch.rand(30, 1, 16, 16, generator=generator) < .5).byte()
    split, args = data.Split(images, torch.arange(30) % 3), train.parse_args(['--device', 'cpu'])
    model = Known(3, 1, 4, 1e-3)
    found = train.validate(model, split, args)['val_auroc']
    assert found == 1, f'AUROC {found:.2f} instead of 1: negatives are 1, images of the data are 0'
    model.sign = -1.
    assert train.validate(model, split, args)['val_auroc'] == 0


# --- the distribution: its temperature, and the levels of the classes -----------------------------

def middle(energy):
    """The median as `validate` takes it, of the logits: the upper one of an even number."""
    return -(-energy).median().item()


def test_checkpoints_have_the_temperature_of_their_chains(trained, glyphs, tmp_path):
    """T is noise^2 / (2 step_size), also of other flags, and 1 for a plain classifier."""
    for name in ('best.pt', 'last.pt'):
        model, checkpoint = load_model(trained / name)
        assert model.temperature == pytest.approx(T)
        assert model.temperature == sampler.temperature(checkpoint['sampler'])
    quick = ['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--epochs', '1', '--overwrite']
    for flags, wanted in [('--noise .3 --step-size 2', .0225), ('--px-weight 0', 1)]:
        train.main([*quick, *flags.split()])
        assert load_model(tmp_path / 'best.pt')[0].temperature == pytest.approx(wanted)


@pytest.mark.parametrize('kind', ['jem', 'ebm'])
def test_checkpoints_are_level(trained, glyphs, tmp_path, kind):
    """The median over the validation images of E(x, y) is 0 for each class y, and that of E(x) for
    a plain EBM: an update has no say in the level of a class, and zero is easily remembered."""
    if kind == 'ebm':
        train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--model', 'ebm'])
    x, y = data.load_data(str(glyphs), 16).val.batch(torch.arange(24))
    for name in ('best.pt', 'last.pt'):
        model, _ = load_model((trained if kind == 'jem' else tmp_path) / name)
        if kind == 'ebm':
            y = 0 * y
            assert torch.equal(model.energy(x), model.energy(x, 0))
        medians = [middle(model.energy(x, y)[y == k]) for k in y.unique()]
        assert medians == pytest.approx([0.] * len(medians), abs=1e-5)
        assert model.energy(x).abs().max() > 1e-4  # rounding is far smaller


def test_levelling_moves_energies_and_no_chain(glyphs):
    """It adds a number to E(x, y) for each class: dE(x, y)/dx stays, and so do chains of a class.
    A plain classifier is not levelled, as that would change its p(y|x)."""
    torch.manual_seed(0)
    val = data.load_data(str(glyphs), 16).val
    x, y = val.batch(torch.arange(24))
    x.requires_grad_()
    args = train.parse_args(['--device', 'cpu'])
    model = EnergyModel(3, 1, 4, T)
    model.head.bias.data = torch.tensor([3., -2., 1.])
    before, slope, weights = measured(model, x, y)
    train.validate(model, val, args)
    after, same_slope, same_weights = measured(model, x, y)
    moved = after - before  # (24,)
    assert torch.equal(slope, same_slope) and moved.abs().min() > .5
    for k in range(3):
        torch.testing.assert_close(moved[y == k], moved[k].expand(8), rtol=0, atol=1e-5)
        assert moved[k].item() == pytest.approx(-middle(before[y == k]), abs=1e-5)
    changed = [key for key in weights if not torch.equal(weights[key], same_weights[key])]
    assert changed == ['head.bias']
    plain = EnergyModel(3, 1, 4)
    before = plain.energy(x, y)
    train.validate(plain, val, train.parse_args(['--device', 'cpu', '--px-weight', '0']))
    assert torch.equal(plain.energy(x, y), before)


def measured(model, x, y):
    """E(x, y) (B,), dE(x, y)/dx (B, C, H, W) and a copy of the weights."""
    energy = model.energy(x, y)
    slope, = torch.autograd.grad(energy.sum(), x)
    return energy.detach(), slope, copy.deepcopy(model.state_dict())



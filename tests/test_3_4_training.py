"""Course task 3.4: the two losses, one update of the weights, a run from start to end, the guard
and --resume."""
import copy
import csv
import math
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import sampler
import train
from conftest import QUICK
from model import EnergyModel, load_model
from sampler import prior, sgld


def read_log(folder, name='log.csv'):
    with open(folder / name) as file:
        return list(csv.DictReader(file))


# --- the losses -----------------------------------------------------------------------------------

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
        f'gradient {gradient:.3f} instead of {wanted:.3f}; with the opposite sign, data and '
        'samples are exchanged')


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


def test_losses_by_hand():
    """px_step is a difference of means, l2_step a sum of mean squares, pyx_step -log softmax at the
    label."""
    real, synth = torch.tensor([1., 3.]), torch.tensor([2., 6.])
    assert train.px_step(real, synth).item() == -2
    assert train.l2_step(real, synth).item() == 5 + 20
    logits, y = torch.tensor([[0., math.log(3)]]), torch.tensor([1])  # (1, 2), (1,)
    assert train.pyx_step(logits, y).item() == pytest.approx(-math.log(.75))


def test_matching_is_zero_for_the_valley_itself():
    """The term is 0 for E = slope * sqrt(r^2 + ROUND^2) around the image, with r the root mean
    square distance of the pixels, and the mean square of the difference for an energy that is twice
    as steep."""
    generator = torch.Generator().manual_seed(0)
    x, away = torch.rand(6, 1, 4, 4, generator=generator), prior('uniform', (6, 1, 4, 4), generator)

    def valley(slope):
        return lambda x_t: slope * (
            (x_t - x).square().mean(dim=(1, 2, 3)) + train.ROUND ** 2).sqrt()  # (B,)

    assert train.matching_step(valley(40.), x, away, 40.).item() == pytest.approx(0, abs=1e-10)
    r2 = away.square().mean(dim=(1, 2, 3))
    wanted = (r2 / (r2 + train.ROUND ** 2)).mean().item()
    assert train.matching_step(valley(80.), x, away, 40.).item() == pytest.approx(wanted)


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
    record(train, 'sgld', lambda a, k, x: seen.update(energy=a[0], moved=a[1], x_synth=x))

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


@pytest.mark.parametrize('flags, weights', [([], (1., 3., 1., .1, 10.)),
                                            (OTHER_WEIGHTS, (.5, 2., 7., .3, 0.))])
def test_an_update_descends_the_sum_of_its_terms(monkeypatch, glyphs, tmp_path, flags, weights):
    """The gradient of the weights is that of px (contrast (mean E(x) - mean E(x') + alpha L2) +
    matching) + pyx cross-entropy, written here by hand: no term is forgotten, counted twice or of
    the wrong sign."""
    seen = first_update(monkeypatch, glyphs, tmp_path, *flags)
    px, pyx, contrast, alpha, matching = weights
    model, (x_real, y) = seen['model'], seen['batch']
    (real, noisy_real), (synth, noisy_synth) = seen['perturbed']
    assert torch.equal(real, x_real)  # both get the noise, once each
    assert torch.equal(synth, seen['x_synth'])
    f_real, f_synth = model.get_logits(noisy_real), model.get_logits(noisy_synth)  # (B, K) both
    e_real, e_synth = (-T * (f / T).logsumexp(1) for f in (f_real, f_synth))  # (B,) both
    l2 = (e_real ** 2).mean() + (e_synth ** 2).mean()
    loss = px * contrast * (e_real.mean() - e_synth.mean() + alpha * l2)
    loss = loss + pyx * F.nll_loss(f_real.log_softmax(1), y)
    if matching:
        valley = train.matching_step(lambda x: -model.get_logits(x)[torch.arange(len(y)), y],
                                     x_real, seen['away'], 40.)
        loss = loss + px * matching * valley
    wanted = torch.autograd.grad(loss, model.parameters())
    for found, gradient in zip(seen['gradients'], wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)


def test_chains_follow_the_labels_of_the_batch(monkeypatch, glyphs, tmp_path):
    """Each chain comes from the ring of its label, moves along E(x, y) for this label, and returns
    to its slot."""
    seen = first_update(monkeypatch, glyphs, tmp_path)
    y, reservoir = seen['batch'][1], seen['reservoir']
    assert torch.equal(seen['ring'], y) and torch.equal(seen['moved'], seen['start'])
    x = torch.rand(len(y), 1, 16, 16)
    wanted = -seen['model'].get_logits(x)[torch.arange(len(y)), y]
    torch.testing.assert_close(seen['energy'](x), wanted)
    slot, x_synth = seen['stored']
    assert torch.equal(slot, seen['slot']) and torch.equal(x_synth, seen['x_synth'])
    assert torch.equal(reservoir.chains[seen['slot']], seen['x_synth'])
    ring_of_slot = torch.arange(3).repeat_interleave(reservoir.lengths)  # (slots,)
    assert torch.equal(ring_of_slot[seen['slot']], y)


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
    assert torch.equal(seen['moved'], seen['batch'][0])
    assert torch.equal(seen['reservoir'].chains[seen['slot']], seen['x_synth'])


def test_without_contrast_no_chain_is_drawn(monkeypatch, glyphs, tmp_path):
    """--contrast 0: an update calls no sgld, its columns are empty, and the other terms train."""
    def refuse(*_, **__):
        raise AssertionError('an update drew chains')

    monkeypatch.setattr(train, 'sgld', refuse)
    monkeypatch.setattr(train, 'draw_samples', lambda *_: None)  # pictures have chains of their own
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--contrast', '0',
                '--epochs', '20', '--lr', '.02', '--picture-every', '20'])
    first, *_, last = read_log(tmp_path)
    assert last['energy_synth'] == last['loss_px'] == last['loss_reg'] == ''
    for loss in ('loss_pyx', 'loss_matching'):
        assert float(last[loss]) < .9 * float(first[loss])


def test_chains_start_after_the_updates_asked_for(glyphs, tmp_path):
    """--chains-after 3, that is after the first epoch of three updates: its columns are empty."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--chains-after', '3'])
    first, second = read_log(tmp_path)
    for column in ('energy_synth', 'loss_px', 'loss_reg'):
        assert first[column] == '' and math.isfinite(float(second[column]))


def test_an_epoch_uses_every_image_once():
    """Batches are disjoint, their order changes with the epoch and the seed, and ranks share each
    of them."""
    args = train.parse_args(['--batch-size', '8', '--device', 'cpu'])
    first, again, second = (torch.cat([*train.batches(40, args, epoch)]) for epoch in (0, 0, 1))
    assert torch.equal(first.sort().values, torch.arange(40)) and torch.equal(first, again)
    assert not torch.equal(first, second)


# --- a run ----------------------------------------------------------------------------------------

def test_a_run_leaves_its_files(trained):
    """Checkpoints, logs, curves and samples, in the formats of the contract; no temporary files."""
    names = ['best.pt', 'curves.png', 'last.pt', 'log.csv', 'samples', 'updates.csv']
    assert sorted(path.name for path in trained.iterdir()) == names
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


def test_updates_are_logged_every_ten(glyphs, tmp_path):
    """updates.csv has a row for every ten updates, and the rows are means: those of an epoch of 10
    equal its row."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--batch-size', '6'])
    updates, epochs = read_log(tmp_path, 'updates.csv'), read_log(tmp_path)
    assert [row['step'] for row in updates] == ['10', '20'] == [row['step'] for row in epochs]
    for update, epoch in zip(updates, epochs):
        assert all(update[name] == epoch[name] for name in train.NUMBERS)


def state(folder, name='last.pt'):
    """All tensors and numbers of a checkpoint, without the clock and the flags."""
    def flatten(value, name=''):
        if isinstance(value, dict):
            return {k: v for key in value for k, v in flatten(value[key], f'{name}/{key}').items()}
        if isinstance(value, list):
            entries = {str(key): entry for key, entry in enumerate(value)}
            return flatten(entries, name)
        return {name: value}

    flat = flatten(torch.load(folder / name, weights_only=True))
    return {key: value for key, value in flat.items()
            if 'seconds' not in key and not key.startswith('/args')}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if torch.is_tensor(a[key]):
            assert torch.equal(a[key], b[key]), key
        else:
            assert a[key] == b[key] or a[key] != a[key], key  # NaN is equal to nothing


@pytest.mark.parametrize('flags', [[], ['--no-conditional', '--init', 'persistent']])
def test_resumed_run_is_the_unbroken_one(glyphs, tmp_path, flags):
    """Two epochs equal one plus one bit by bit: weights, averages, optimizer, reservoir, random
    state and logs. The run remembers its own flags, and its epochs may grow."""
    quick = ['--data', str(glyphs), *QUICK, *flags]
    train.main([*quick, '--out', str(tmp_path / 'whole')])
    train.main([*quick, '--out', str(tmp_path / 'parts'), '--epochs', '1'])
    train.main(['--out', str(tmp_path / 'parts'), '--resume', '--epochs', '2', '--device', 'cpu'])
    for name in ('last.pt', 'best.pt'):
        assert_same(state(tmp_path / 'whole', name), state(tmp_path / 'parts', name))
    logs = [[{**row, 'seconds': ''} for row in read_log(tmp_path / part)]
            for part in ('whole', 'parts')]
    assert logs[0] == logs[1]


def test_ctrl_c_keeps_the_last_finished_epoch(glyphs, tmp_path, monkeypatch):
    """Ctrl-C in the second epoch exits with 130; --resume makes the run that was never stopped."""
    quick = ['--data', str(glyphs), *QUICK]
    train.main([*quick, '--out', str(tmp_path / 'whole')])
    calls, px_step = [], train.px_step

    def interrupted(*energies):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return px_step(*energies)

    monkeypatch.setattr(train, 'px_step', interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main([*quick, '--out', str(tmp_path / 'parts')])
    assert stop.value.code == 130
    train.main(['--out', str(tmp_path / 'parts'), '--resume', '--device', 'cpu'])
    assert_same(state(tmp_path / 'whole'), state(tmp_path / 'parts'))


def test_resume_reads_the_run_once(trained, tmp_path, monkeypatch):
    """last.pt is large, and what was read is what the flags were checked against."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    calls = []
    monkeypatch.setattr(train, 'load_model', lambda *args: calls.append(args) or load_model(*args))
    train.main(['--out', str(tmp_path), '--resume', '--device', 'cpu', '--epochs', '3'])
    assert len(calls) == 1 and len(read_log(tmp_path)) == 3


def test_a_run_with_few_updates_is_warned(glyphs, tmp_path, capsys):
    """Before it trains."""
    quick = ['--data', str(glyphs), '--out', str(tmp_path), *QUICK]
    train.main([*quick, '--px-weight', '0', '--epochs', '1'])
    line = capsys.readouterr().out.split('\n')[0]
    assert '500 updates are few' in line and '--epochs' in line and '--batch-size' in line


def test_another_default_dtype_changes_nothing(trained, glyphs, tmp_path):
    """A notebook may have set float64."""
    torch.set_default_dtype(torch.float64)
    try:
        train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK])
    finally:
        torch.set_default_dtype(torch.float32)
    saved = state(tmp_path)
    for key, value in state(trained).items():
        assert not torch.is_tensor(value) or saved[key].dtype == value.dtype, key


def test_same_command_same_bytes(trained, glyphs, tmp_path):
    """The same command makes the same weights and pictures; another seed makes others."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK])
    one, two = (state(folder, 'best.pt') for folder in (trained, tmp_path))
    assert_same(one, two)
    picture = 'samples/epoch_002.png'
    assert (trained / picture).read_bytes() == (tmp_path / picture).read_bytes()
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--overwrite', '--seed', '1',
                '--epochs', '1'])
    weight = '/weights/head.weight'
    assert not torch.equal(one[weight], state(tmp_path, 'best.pt')[weight])
    assert not (tmp_path / picture).exists()  # --overwrite leaves nothing of the old run


@pytest.mark.parametrize('flags', [['--model', 'ebm'], ['--px-weight', '0'], ['--contrast', '0'],
                                   ['--init', 'data'], ['--init', 'noise'],
                                   ['--init', 'persistent'], ['--precision', 'bf16'],
                                   ['--step-size', '10', '--noise', '.005', '--grad-clip', '.03']])
def test_every_kind_of_run_trains(glyphs, tmp_path, flags):
    """Each choice of model and sampler runs to the end with finite numbers; what it has not
    measured is empty."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, *flags])
    row = read_log(tmp_path)[-1]
    assert math.isfinite(float(row['loss'])) and math.isfinite(float(row['val_auroc']))
    assert (tmp_path / 'best.pt').exists()
    assert (row['val_accuracy'] == '') == ('ebm' in flags)
    assert (row['loss_px'] == '') == (row['energy_synth'] == '') == ('0' in flags)
    assert (row['loss_matching'] == '') == ('--px-weight' in flags)
    assert (tmp_path / 'samples').exists() == ('--px-weight' not in flags)


def test_classifier_alone_learns(glyphs, tmp_path):
    """--px-weight 0 is a plain classifier: it learns the bars, and its loss is the weighted
    cross-entropy."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--px-weight', '0',
                '--epochs', '90', '--lr', '.003', '--picture-every', '90'])
    row = read_log(tmp_path)[-1]
    assert float(row['val_accuracy']) > .9
    assert float(row['loss']) == pytest.approx(3 * float(row['loss_pyx']), rel=1e-4)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_joint_model_learns(glyphs, tmp_path, precision):
    """A JEM learns the bars in fp32 and bf16, and uniform noise gets a higher energy than they
    have."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--epochs', '90', '--lr',
                '.003', '--sgld-steps', '6', '--width', '8', '--picture-every', '90',
                '--precision', precision])
    assert float(read_log(tmp_path)[-1]['val_accuracy']) > .85
    model, _ = load_model(tmp_path / 'best.pt')
    x = data.load_data(str(glyphs), 16).test.batch(torch.arange(24))[0]
    noise = torch.rand(24, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert np.mean(model.energy(noise)[:, None].numpy() > model.energy(x).numpy()) > .9


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
    assert train.validate(model, split, args)['val_auroc'] == 1
    model.sign = -1.
    assert train.validate(model, split, args)['val_auroc'] == 0


# --- one law: the temperature and the levels of the classes ---------------------------------------

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


# --- the guard ------------------------------------------------------------------------------------

def given_up(folder, capsys, *flags):
    """Train until the guard gives up; returns the last line on the screen and the last event."""
    with pytest.raises(SystemExit) as stop:
        train.main(['--out', str(folder), *flags])
    assert stop.value.code == 2
    tensors = [value for value in state(folder).values() if torch.is_tensor(value)]
    assert all(tensor.isfinite().all() for tensor in tensors)  # last.pt is the state before
    return capsys.readouterr().err.strip().split('\n')[-1], read_log(folder)[-1]['event']


def test_guard_gives_up_with_advice(glyphs, tmp_path, capsys):
    """A hopeless rate trips it MOST_TRIPS times and once more; curves and samples of the failure
    are left. The message has a line of its own, and the log does not repeat itself."""
    last, event = given_up(tmp_path, capsys, '--data', str(glyphs), *QUICK, '--lr', '1e30')
    assert '--lr' in last and 'last.pt' in last and 'not finite' in event
    assert event.count('not finite') == 1 and re.match(r'[\w.]+: training diverged', last)
    assert (tmp_path / 'curves.png').exists() and (tmp_path / 'samples').exists()
    assert not (tmp_path / 'best.pt').exists()
    assert state(tmp_path)['/run/history/trips'] == train.MOST_TRIPS


def test_guard_sees_a_flipped_sign(glyphs, tmp_path, capsys, monkeypatch):
    """With the contrastive term upside down the gap runs away and no rate helps."""
    right = train.px_step
    monkeypatch.setattr(train, 'px_step', lambda real, synth: right(synth, real))
    monkeypatch.setattr(train, 'WARMUP', 20)
    last, event = given_up(tmp_path, capsys, '--data', str(glyphs), *QUICK, '--lr', '.01',
                           '--lr-decay', '1', '--batch-size', '4', '--epochs', '60',
                           '--matching', '0', '--picture-every', '600')
    assert 'diverged' in last and '--no-guard' in last and 'energy gap' in event


def test_guard_goes_back_and_on(trained, tmp_path, capsys):
    """NaN in an epoch: one trip, told in the log, and the epoch again with a lower rate, which then
    comes back. The last line printed tells the trips and the rate."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    broken, pyx_step = [], train.pyx_step

    def break_once(logits, y):
        broken.append(1)
        return pyx_step(logits, y) * (math.nan if len(broken) == 2 else 1.)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'pyx_step', break_once)
        train.main(['--out', str(tmp_path), '--resume', '--epochs', '4', '--device', 'cpu'])
    rows = read_log(tmp_path)
    assert len(rows) == 4 and 'not finite' in rows[2]['event'] and not rows[3]['event']
    for row, level in ((rows[2], 1), (rows[3], .75)):
        rate = 2e-3 * .98 ** (int(row['epoch']) - 1) * int(row['step']) / train.WARMUP
        assert float(row['lr']) == pytest.approx(rate * train.RETREAT ** level, rel=1e-3)
    last_line = capsys.readouterr().out.strip().split('\n')[-1]
    assert f'trips 1, lr {float(rows[3]["lr"]):.2g}' in last_line
    assert state(tmp_path)['/run/history/trips'] == 1


def test_guard_waits_for_a_gap_that_mends_itself():
    """With one SGLD step the gap is near to .9 of its bound for hundreds of updates. Only a gap at
    the bound, in the last 50 updates and not the first 500, is trouble; --no-guard lets it be."""
    guard, free = (train.parse_args(['--device', 'cpu', flag])
                   for flag in ('--guard', '--no-guard'))

    def trouble(gaps, step=600, args=guard, row=None):
        updates = [{'loss_px': gap} for gap in gaps]
        return train.find_trouble(row or {}, {'updates': updates, 'step': step}, args)

    lost = [-9.] * 90 + [-9.7] * 5
    assert 'gap' in trouble(lost) and not trouble(lost, step=500) and not trouble(lost, args=free)
    assert not trouble([-9.2] * 9) and not trouble([-9.9] * 90 + [-9.] * 5)
    assert 'finite' in trouble(lost, args=free, row={'loss': math.nan})


# --- the flags ------------------------------------------------------------------------------------

def test_resume_refuses_another_run(trained, tmp_path, refused):
    """--resume names the flag that differs, or the missing last.pt, and changes nothing."""
    before = (trained / 'last.pt').read_bytes()
    resume = partial(refused, train.main, '--out', trained, '--resume', '--device', 'cpu')
    assert '--width' in resume('--width', 6) and '--conditional' in resume('--no-conditional')
    assert 'digits' in resume('--data', 'digits')
    assert 'last.pt' in refused(train.main, '--out', tmp_path, '--resume')
    assert before == (trained / 'last.pt').read_bytes()


def test_a_run_is_not_overwritten_unasked(trained, glyphs, refused):
    """The message names the three ways out, and every file stays as it is."""
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    message = refused(train.main, '--data', glyphs, '--out', trained, *QUICK)
    assert all(flag in message for flag in ('--resume', '--overwrite', '--out'))
    assert before == {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}


def test_help_prints_the_real_defaults(capsys):
    """--help opens with what the script does and prints every default, 0 among them, but no empty
    one."""
    with pytest.raises(SystemExit) as stop:
        train.main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert 'Train an energy-based model' in text and 'default: None' not in text
    assert 'random seed (default: 0)' in text and 'in an update (default: 32)' in text

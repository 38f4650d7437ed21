"""The losses against analytic gradients, and train.py through its command line."""
import csv
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch

import train
from conftest import QUICK
from model import EnergyModel, load_model, read_checkpoint
from sampler import prior, sgld


def read_log(folder):
    with open(folder / 'log.csv') as file:
        return list(csv.DictReader(file))


# --- the losses -----------------------------------------------------------------------------------------------------------

def test_contrastive_gradient_is_that_of_the_likelihood():
    """For E(x) = (x - m)^2 / 2, -log p has the gradient m - mean(x) in m, and so has mean E(x) - mean E(x') with x' ~ p:
    here x' is drawn by SGLD itself, so the two agree within 3 standard errors."""
    m = torch.tensor(.7, requires_grad=True)
    x_real = 2. + torch.randn(5000, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def logits(x):
        return -(x.flatten(1) - m).square() / 2  # (B, 1), one class: E(x) = -logits

    x_synth = sgld(lambda x: -logits(x)[:, 0], torch.zeros(5000, 1, 1, 1), 300, .05, clamp=None,
                   generator=torch.Generator().manual_seed(1))
    e_real, e_synth, _ = train.px_step(logits(x_real), logits(x_synth))
    gradient, = torch.autograd.grad(e_real - e_synth, m)
    assert abs(gradient - (m - x_real.mean())) < 3 * 5000 ** -.5


def test_px_step_by_hand():
    """Mean energies and their mean squares; E(x) sums over the classes."""
    e_real, e_synth, squares = train.px_step(torch.tensor([[1.], [3.]]), torch.tensor([[2.], [4.]]))
    assert (e_real, e_synth, squares) == (-2., -3., 5. + 10.)
    two = torch.zeros(1, 2)  # two classes with f = 0 each: E(x) = -log 2
    assert train.px_step(two, two)[0].item() == pytest.approx(-math.log(2))


def test_matching_is_met_by_the_valley_itself():
    """The term is 0 for E = slope * sqrt(r^2 + ROUND^2) around the image, r the root mean square distance of the pixels, and
    the mean square of the difference for an energy that is twice as steep."""
    generator = torch.Generator().manual_seed(0)
    x, away = torch.rand(6, 1, 4, 4, generator=generator), prior('uniform', (6, 1, 4, 4), generator)

    def valley(slope):
        return lambda x_t: slope * ((x_t - x).square().mean(dim=(1, 2, 3)) + train.ROUND ** 2).sqrt()

    assert train.matching_step(valley(40.), x, away, 40.).item() == pytest.approx(0, abs=1e-10)
    r2 = away.square().mean(dim=(1, 2, 3))
    assert train.matching_step(valley(80.), x, away, 40.).item() == pytest.approx(
        (r2 / (r2 + train.ROUND ** 2)).mean().item())


def test_ways_to_noise():
    """Half of the ways stay at the image, up to white noise of a variance of s^2, s uniform up to WHITE; the others lead
    towards the prior, to any t of the way: from an image of ones to N(0, .01) the mean is -t."""
    x, generator = torch.ones(4000, 1, 16, 16), torch.Generator().manual_seed(0)
    away = train.ways_to_noise(x, 'gaussian', generator)
    t = -away.mean(dim=(1, 2, 3))  # (4000,), within WHITE / 16
    stays = t < 3 * train.WHITE / 16
    assert abs(stays.float().mean() - .5 - .5 * 3 * train.WHITE / 16) < .03
    assert abs(t[~stays].mean() - .5 - 1.5 * train.WHITE / 16) < .03 and t.max() > .95
    assert abs(away[stays].var() / (train.WHITE ** 2 / 3) - 1) < .1


def test_matching_teaches_the_weights():
    """Descent on the term alone turns the energy of a network into a valley: gradients reach weights through dE/dx."""
    torch.manual_seed(0)
    model, x = EnergyModel(1, width=4), torch.zeros(16, 1, 16, 16)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(80):
        loss = train.matching_step(model.energy, x, prior('uniform', x.shape) * torch.rand(16, 1, 1, 1), 10.)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .2 * losses[0]


def test_pyx_step_is_the_cross_entropy():
    """-log softmax at the label."""
    assert train.pyx_step(torch.tensor([[0., math.log(3)]]), torch.tensor([1])).item() == pytest.approx(-math.log(.75))


# --- a run ----------------------------------------------------------------------------------------------------------------

def test_a_run_leaves_what_the_contract_says(trained):
    """Checkpoints, log, curves and samples; no temporary files."""
    assert sorted(path.name for path in trained.iterdir()) == ['best.pt', 'curves.png', 'last.pt', 'log.csv', 'samples']
    assert [path.name for path in (trained / 'samples').iterdir()] == ['epoch_002.png']
    rows = read_log(trained)
    wanted = ('epoch, step, seconds, lr, loss, loss_px, loss_pyx, loss_reg, energy_real, energy_synth, grad_norm, '
              'val_accuracy, val_auprc, event').split(', ')
    assert set(wanted) <= set(rows[0]) and [row['epoch'] for row in rows] == ['1', '2'] and rows[-1]['step'] == '6'
    _, checkpoint = load_model(trained / 'best.pt', torch.device('cpu'), 'fp32')
    assert checkpoint['class_names'] == ['stand', 'lie', 'lean'] and checkpoint['image_size'] == 16


def state(folder, name='last.pt'):
    """All tensors and numbers of a checkpoint, without the clock."""
    def flatten(value, name=''):
        if isinstance(value, dict):
            return {k: v for key in value for k, v in flatten(value[key], f'{name}/{key}').items()}
        if isinstance(value, list):
            return {k: v for key, entry in enumerate(value) for k, v in flatten(entry, f'{name}/{key}').items()}
        return {name: value}

    flat = flatten(read_checkpoint(folder / name))
    return {key: value for key, value in flat.items() if 'seconds' not in key and not key.startswith('/args')}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] or a[key] != a[key]
        assert same, key


@pytest.mark.parametrize('flags', [[], ['--no-conditional']])
def test_resumed_run_is_the_unbroken_one(glyphs, tmp_path, flags):
    """Two epochs equal one plus one, weights, optimiser, reservoir, random state and log alike, bit by bit."""
    quick = ['--data', str(glyphs), *QUICK, *flags]
    train.main([*quick, '--out', str(tmp_path / 'whole')])
    train.main([*quick, '--out', str(tmp_path / 'parts'), '--epochs', '1'])
    train.main([*quick, '--out', str(tmp_path / 'parts'), '--resume'])
    assert_same(state(tmp_path / 'whole'), state(tmp_path / 'parts'))
    drop = [{**row, 'seconds': ''} for row in read_log(tmp_path / 'whole')]
    assert drop == [{**row, 'seconds': ''} for row in read_log(tmp_path / 'parts')]
    assert_same(state(tmp_path / 'whole', 'best.pt'), state(tmp_path / 'parts', 'best.pt'))


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_saves_and_resumes_exactly(glyphs, tmp_path, monkeypatch, number, status):
    """Ctrl-C in the middle of an epoch saves and leaves with its status; --resume goes on as if nothing had happened."""
    quick = ['--data', str(glyphs), *QUICK]
    train.main([*quick, '--out', str(tmp_path / 'whole')])
    calls, update = [], train.update

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return update(*arguments)

    monkeypatch.setattr(train, 'update', interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main([*quick, '--out', str(tmp_path / 'parts')])
    assert stop.value.code == status and len(calls) == 5
    train.main([*quick, '--out', str(tmp_path / 'parts'), '--resume'])
    assert len(calls) == 6
    assert_same(state(tmp_path / 'whole'), state(tmp_path / 'parts'))


def test_same_command_same_bytes(trained, glyphs, tmp_path):
    """best.pt of two runs of one command differs in nothing but the name of the folder."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK])
    one, two = (torch.load(folder / 'best.pt', weights_only=True) for folder in (trained, tmp_path))
    assert all(torch.equal(one['weights'][key], two['weights'][key]) for key in one['weights'])
    assert (trained / 'samples/epoch_002.png').read_bytes() == (tmp_path / 'samples/epoch_002.png').read_bytes()
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--overwrite', '--seed', '1'])
    other = torch.load(tmp_path / 'best.pt', weights_only=True)
    assert not torch.equal(one['weights']['head.weight'], other['weights']['head.weight'])


@pytest.mark.parametrize('flags', [['--model', 'ebm'], ['--px-weight', '0'], ['--init', 'data'], ['--init', 'noise'],
                                   ['--init', 'persistent'], ['--precision', 'bf16'],
                                   ['--no-conditional', '--matching', '0'],
                                   ['--step-size', '10', '--noise', '.005', '--grad-clip', '.03']])
def test_every_kind_of_run_trains(glyphs, tmp_path, flags):
    """Each choice of model and sampler runs to the end with finite numbers."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, *flags])
    row = read_log(tmp_path)[-1]
    assert math.isfinite(float(row['loss'])) and math.isfinite(float(row['val_auroc'])) and (tmp_path / 'best.pt').exists()
    assert math.isnan(float(row['val_accuracy'])) == ('ebm' in flags)


def test_classifier_alone_learns(glyphs, tmp_path):
    """--px-weight 0 is a plain classifier: it learns the bars and draws no chains."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--px-weight', '0', '--epochs', '60', '--lr', '.003',
                '--warmup', '10', '--picture-every', '60'])
    row = read_log(tmp_path)[-1]
    assert float(row['val_accuracy']) > .9 and float(row['loss']) == pytest.approx(3 * float(row['loss_pyx']), rel=1e-4)
    assert not (tmp_path / 'samples').exists() and row['loss_px'] == row['energy_synth'] == 'nan'


def test_joint_model_learns(glyphs, tmp_path):
    """A JEM learns the bars, and uniform noise gets a higher energy than they have."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--epochs', '60', '--lr', '.003', '--warmup', '10',
                '--sgld-steps', '10', '--width', '8', '--picture-every', '60'])
    assert float(read_log(tmp_path)[-1]['val_accuracy']) > .9
    model, _ = load_model(tmp_path / 'best.pt', torch.device('cpu'), 'fp32')
    x = train.load_data(str(glyphs), 16).test.batch(torch.arange(24))[0]
    noise = torch.rand(24, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert np.mean(model.energy(noise)[:, None].numpy() > model.energy(x).numpy()) > .9


def test_bf16_is_as_good_as_fp32(glyphs, tmp_path):
    """Accuracy and AUROC after training and sampling in bf16 are within the spread of three seeds in fp32, plus .02."""
    scores = {}
    for precision in ('fp32', 'bf16'):
        for seed in range(3):
            out = tmp_path / f'{precision}{seed}'
            train.main(['--data', str(glyphs), '--out', str(out), *QUICK, '--epochs', '24', '--lr', '.003', '--warmup', '10',
                        '--width', '8', '--picture-every', '24', '--precision', precision, '--seed', str(seed)])
            row = read_log(out)[-1]
            scores.setdefault(precision, []).append([float(row['val_accuracy']), float(row['val_auroc'])])
    fp32, bf16 = (np.array(scores[precision]) for precision in ('fp32', 'bf16'))  # (3, 2) both
    assert (abs(bf16.mean(0) - fp32.mean(0)) <= np.ptp(fp32, axis=0) + .02).all(), scores
    assert fp32[:, 0].mean() > .6, scores  # far from chance, 1 in 3: what is compared has learned


# --- the guard ------------------------------------------------------------------------------------------------------------

def finite(folder):
    """All tensors of last.pt are finite."""
    return all(value.isfinite().all() for value in state(folder).values() if torch.is_tensor(value))


def given_up(folder, capsys, *flags):
    """Train until the guard gives up; returns the last line on the screen and the events in the log."""
    with pytest.raises(SystemExit) as stop:
        train.main(['--out', str(folder), *flags])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1], '; '.join(row['event'] for row in read_log(folder))


def test_guard_gives_up_with_advice(glyphs, tmp_path, capsys):
    """A hopeless rate trips it MOST_TRIPS times and once more; what is saved is the state before."""
    last, events = given_up(tmp_path, capsys, '--data', str(glyphs), *QUICK, '--batch-size', '4', '--lr', '1e30',
                            '--clip-norm', '1e30', '--warmup', '1')
    assert 'trip 7: a number is not finite' in last and '--lr' in last and 'last.pt' in last and 'stopped: a' in events
    assert finite(tmp_path) and not (tmp_path / 'best.pt').exists()


def test_guard_stops_a_flipped_sign(glyphs, tmp_path, capsys, monkeypatch):
    """With the contrastive term upside down no rate helps: it ends with advice, not in endless trips."""
    right = train.px_step
    monkeypatch.setattr(train, 'px_step', lambda real, synth: right(synth, real))
    last, events = given_up(tmp_path, capsys, '--data', str(glyphs), *QUICK, '--lr', '.1', '--lr-decay', '1',
                            '--warmup', '1', '--epochs', '600', '--matching', '0')
    assert 'diverged' in last and 'energy gap' in events and finite(tmp_path)


def test_guard_looks_at_what_is_validated(glyphs, tmp_path, capsys):
    """Weights that break in the last update of an epoch, when no loss shows it, are a trip as well."""
    last, _ = given_up(tmp_path, capsys, '--data', str(glyphs), *QUICK, '--batch-size', '60', '--lr', '1e38', '--warmup', '1',
                       '--px-weight', '0', '--clip-norm', '1e30')
    assert 'not finite' in last and finite(tmp_path) and not (tmp_path / 'best.pt').exists()


def test_guard_mends_a_broken_chain(trained, glyphs, tmp_path):
    """NaN in the reservoir: one trip, named in the log, with a lower rate from there on, and the chain is drawn afresh."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    last = torch.load(tmp_path / 'last.pt', weights_only=True)
    last['run']['ranks'][0]['reservoir']['chains'][:, 0, 3, 3] = math.nan
    torch.save(last, tmp_path / 'last.pt')
    train.main(['--out', str(tmp_path), '--resume', '--epochs', '4'])
    rows = read_log(tmp_path)
    assert len(rows) == 4 and 'not finite' in rows[2]['event'] and not rows[3]['event'] and finite(tmp_path)
    assert float(rows[3]['lr']) == pytest.approx(2e-3 * .12 * .98 ** 3 * train.RETREAT, rel=1e-3)  # still warming up


def test_guard_sees_a_dead_network(glyphs, tmp_path, monkeypatch):
    """An energy that is the same everywhere has no gap and no error to show, and no gradient that leads back: one trip."""
    calls, update = [], train.update

    def deadly(run, x, y):
        calls.append(run.epoch)
        if len(calls) in (4, 5, 6):  # the second epoch, the first time
            run.model.features[0].weight.data.zero_()
            run.model.features[0].bias.data.zero_()
        return update(run, x, y)

    monkeypatch.setattr(train, 'update', deadly)
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--epochs', '3'])
    events = [row['event'] for row in read_log(tmp_path)]
    assert calls == [0] * 3 + [1] * 6 + [2] * 3 and not events[0] and not events[2]
    assert events[1] == 'the energy is the same for all images (epoch 2, update 3)'


def test_guard_can_be_switched_off(glyphs, tmp_path, capsys):
    """--no-guard lets a student watch the gap go to its bound; NaN still ends the run, at once."""
    flags = ['--data', str(glyphs), *QUICK, '--lr', '.1', '--warmup', '1', '--matching', '0', '--no-guard']
    train.main(['--out', str(tmp_path / 'a'), *flags, '--alpha', '1000'])  # any gap is beyond its bound
    assert not any(row['event'] for row in read_log(tmp_path / 'a'))
    last, _ = given_up(tmp_path / 'b', capsys, *flags, '--lr', '1e30', '--clip-norm', '1e30')
    assert 'trip 1: a number is not finite' in last


# --- mistakes -------------------------------------------------------------------------------------------------------------

def test_a_run_is_not_overwritten(trained, glyphs, refused):
    """An existing run is refused with the three ways out, and stays as it is."""
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    message = refused(train.main, '--data', glyphs, '--out', trained, *QUICK)
    assert all(flag in message for flag in ('--resume', '--overwrite', '--out'))
    assert before == {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}


def test_resume_refuses_another_run(trained, glyphs, tmp_path, refused):
    """--resume names the flag that differs, or the data, or the missing last.pt, and changes nothing."""
    before = (trained / 'last.pt').read_bytes()
    assert '--width' in refused(train.main, '--out', trained, '--width', 6, '--resume')
    assert '--conditional' in refused(train.main, '--out', trained, '--no-conditional', '--resume')
    assert 'digits' in refused(train.main, '--out', trained, '--data', 'digits', '--resume')
    assert 'last.pt' in refused(train.main, '--out', tmp_path, '--resume')
    assert before == (trained / 'last.pt').read_bytes()


def test_resume_needs_no_flags(glyphs, tmp_path):
    """The run remembers its own arguments; --epochs may grow."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK])
    train.main(['--resume', '--out', str(tmp_path), '--epochs', '3'])
    assert [row['epoch'] for row in read_log(tmp_path)] == ['1', '2', '3']


def test_halves_of_a_killed_run_are_taken_away(trained, tmp_path):
    """What was being written when a run was killed goes with the next run; other hidden files stay."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for name in ('.last.pt.123', '.notes.txt', '.log.csv.swp'):
        (tmp_path / name).write_text('half or mine')
    train.main(['--out', str(tmp_path), '--resume', '--epochs', '3'])
    assert sorted(path.name for path in tmp_path.glob('.*')) == ['.log.csv.swp', '.notes.txt']


def test_overwrite_leaves_nothing_of_the_old_run(trained, glyphs, tmp_path):
    """--overwrite takes the old run's files away before the new one begins."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--overwrite', '--epochs', '1'])
    assert len(read_log(tmp_path)) == 1 and [path.name for path in (tmp_path / 'samples').iterdir()] == ['epoch_001.png']


@pytest.mark.parametrize('flags, word', [
    (['--epochs', '0'], '--epochs'), (['--lr', '-1'], '--lr'), (['--lr', 'nan'], '--lr'),
    (['--batch-size', '2.5'], '--batch-size'),
    (['--image-size', '8'], '--image-size'), (['--device', 'cuda:99'], '--device'), (['--device', 'tpu'], '--device'),
    (['--data', 'nowhere'], '--data'), (['--init', 'magic'], '--init'), (['--reinit', '2'], '--reinit'),
    (['--model', 'ebm', '--conditional'], '--model ebm'), (['--resume', '--overwrite'], '--resume'),
    (['--epoch', '3'], '--epoch'),
    (['--batch-size', '61'], '--batch-size')])
def test_mistakes_are_told_in_one_line(glyphs, tmp_path, refused, flags, word):
    """Exit status 2, one line that names the flag, nothing written."""
    assert word in refused(train.main, '--data', glyphs, '--out', tmp_path / 'new', *QUICK, *flags)
    assert not (tmp_path / 'new').exists()


def test_help_prints_the_real_defaults(capsys):
    """--help opens with what the script does and prints every default, 0 among them, but no empty one."""
    with pytest.raises(SystemExit) as stop:
        train.main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and 'Train an energy-based model' in text and 'default: None' not in text
    assert 'of everything random (default: 0)' in text and 'in an update (default: 32)' in text


def test_out_must_be_a_folder(glyphs, tmp_path, refused):
    """A file in the place of --out is named and kept."""
    (tmp_path / 'file').write_text('mine')
    assert str(tmp_path / 'file') in refused(train.main, '--data', glyphs, '--out', tmp_path / 'file', *QUICK)
    assert (tmp_path / 'file').read_text() == 'mine'

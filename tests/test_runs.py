"""What no course task asks for, so that `pytest -m task34` is quick without it: whole runs of
train.py, logs, --resume, the guard, the flags, and two slow checks of data.py."""
import math
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from conftest import QUICK, TINY
from model import has_bf16, load_model
from test_3_4_training import read_log


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


# --- a run ----------------------------------------------------------------------------------------

def test_without_contrast_no_chain_is_drawn(monkeypatch, glyphs, tmp_path):
    """--contrast 0: an update calls no sgld, its columns are empty, and the other terms train."""
    def refuse(*_, **__):
        raise AssertionError('an update drew chains')

    monkeypatch.setattr(train, 'sgld', refuse)
    monkeypatch.setattr(train, 'draw_samples', lambda *_: None)  # pictures have chains of their own
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--contrast', '0',
                '--epochs', '20', '--lr', '.02', '--picture-every', '20'])
    first, *_, last = read_log(tmp_path)
    assert last['energy_real'] == last['energy_synth'] == last['loss_px'] == last['loss_reg'] == ''
    for loss in ('loss_pyx', 'loss_matching'):
        assert float(last[loss]) < .9 * float(first[loss])


@pytest.mark.parametrize('flags, without', [
    ([], 2), (['--matching', '0'], 0), (['--chains-after', '1'], 1)])
def test_chains_start_in_the_last_third(glyphs, tmp_path, flags, without):
    """Of three epochs the first two have none, so their columns are empty: with --chains-after 1
    the first; without the matching term, which would be all that shapes dE/dx, none."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *TINY, '--epochs', '3', *flags])
    for column in ('energy_real', 'energy_synth', 'loss_px', 'loss_reg'):
        values = [row[column] for row in read_log(tmp_path)]
        assert values[:without] == [''] * without, f'{column} {values}: chains start too early'
        assert '' not in values[without:], f'{column} {values}: chains start too late'


@pytest.mark.parametrize('scores, best', [([.9, .5, .7, .6], 3), ([.5, .9, .6, .7], 4)])
def test_best_epoch_has_chains(glyphs, tmp_path, monkeypatch, scores, best):
    """Once there are chains, here after two epochs, the best of the epochs with chains is kept."""
    left, validate = list(scores), train.validate
    monkeypatch.setattr(train, 'validate', lambda *a: validate(*a) | {'score': left.pop(0)})
    flags = ['--data', str(glyphs), '--out', str(tmp_path), *TINY, '--chains-after', '2']
    train.main([*flags, '--epochs', '4'])
    assert load_model(tmp_path / 'best.pt')[1]['epoch'] == best


def test_updates_are_logged_every_ten(glyphs, tmp_path):
    """updates.csv has a row for every ten updates, and the rows are means: those of an epoch of 10
    equal its row."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--batch-size', '6'])
    updates, epochs = read_log(tmp_path, 'updates.csv'), read_log(tmp_path)
    assert [row['step'] for row in updates] == ['10', '20'] == [row['step'] for row in epochs]
    for update, epoch in zip(updates, epochs):
        assert all(update[name] == epoch[name] for name in train.NUMBERS)


def interrupt(patch):
    """Ctrl-C when the second epoch begins."""
    batches = train.batches

    def interrupted(count, args, epoch):
        if epoch == 1:
            signal.raise_signal(signal.SIGINT)
        return batches(count, args, epoch)

    patch.setattr(train, 'batches', interrupted)


@pytest.mark.parametrize('flags', [[], ['--no-conditional', '--init', 'persistent']])
def test_resumed_run_is_the_unbroken_one(glyphs, tmp_path, flags):
    """Two epochs equal one plus one bit by bit: weights, averages, optimizer, reservoir, random
    state and logs. The run remembers its own flags."""
    quick, parts = ['--data', str(glyphs), *QUICK, *flags], str(tmp_path / 'parts')
    train.main([*quick, '--out', str(tmp_path / 'whole')])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch)
        train.main([*quick, '--out', parts])
    assert len(read_log(tmp_path / 'parts')) == 1
    train.main(['--out', parts, '--resume', '--device', 'cpu'])
    for name in ('last.pt', 'best.pt'):
        assert_same(state(tmp_path / 'whole', name), state(tmp_path / 'parts', name))
    logs = [[{**row, 'seconds': ''} for row in read_log(tmp_path / part)]
            for part in ('whole', 'parts')]
    assert logs[0] == logs[1]


def test_learning_rate_rises_stays_and_falls_to_0(glyphs, tmp_path, monkeypatch):
    """In the warm-up, until the last third, and after the last update; --lr is its greatest
    value. More epochs have a last third of their own."""
    monkeypatch.setattr(train, 'WARMUP', 6)
    out = ['--out', str(tmp_path)]
    train.main(['--data', str(glyphs), *out, *QUICK, '--epochs', '9', '--lr', '.001'])
    per_epoch = int(read_log(tmp_path)[0]['step'])
    rates = [float(row['lr']) for row in read_log(tmp_path)]
    fall = [3e-3 * (9 - epoch + 1 / per_epoch) / 9 for epoch in (7, 8, 9)]  # of its last update
    assert rates == pytest.approx([.001 * min(1, per_epoch / 6), *[.001] * 5, *fall], rel=1e-5)
    train.main([*out, '--resume', '--epochs', '12', '--device', 'cpu'])
    rates = [float(row['lr']) for row in read_log(tmp_path)[9:]]
    rates_of_12 = [3e-3 * (12 - epoch + 1 / per_epoch) / 12 for epoch in (10, 11, 12)]
    assert rates == pytest.approx(rates_of_12, rel=1e-5)


def test_ctrl_c_keeps_the_last_finished_epoch(glyphs, tmp_path, monkeypatch):
    """Ctrl-C in the second epoch exits with 130; --resume makes the run that was never stopped."""
    quick = ['--data', str(glyphs), *QUICK]
    train.main([*quick, '--out', str(tmp_path / 'whole')])
    calls, px_step = [], train.px_step

    def interrupted(*energies):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
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


PRECISIONS = ['fp32', 'bf16'] if has_bf16(torch.device('cpu')) else ['fp32']


@pytest.mark.parametrize('precision', PRECISIONS)
def test_joint_model_learns(glyphs, tmp_path, precision):
    """A JEM learns the bars, in bf16 where that is fast, too, and uniform noise gets a higher
    energy than they have."""
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--epochs', '40', '--lr',
                '.006', '--sgld-steps', '4', '--width', '8', '--picture-every', '40',
                '--precision', precision])
    assert float(read_log(tmp_path)[-1]['val_accuracy']) > .85
    model, _ = load_model(tmp_path / 'best.pt')
    x = data.load_data(str(glyphs), 16).test.batch(torch.arange(24))[0]
    noise = torch.rand(24, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert np.mean(model.energy(noise)[:, None].numpy() > model.energy(x).numpy()) > .9


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
    """A hopeless rate trips it MOST_DROPS times and once more; curves and samples of the failure
    are left. The message has a line of its own, and the log does not repeat itself."""
    last, event = given_up(tmp_path, capsys, '--data', str(glyphs), *QUICK, '--lr', '1e30')
    assert '--lr' in last and 'last.pt' in last and 'not finite' in event
    assert event.count('not finite') == 1 and re.match(r'[\w.-]+: training diverged', last)
    assert (tmp_path / 'curves.png').exists() and (tmp_path / 'samples').exists()
    assert not (tmp_path / 'best.pt').exists()
    assert state(tmp_path)['/run/history/drops'] == train.MOST_DROPS


def test_guard_sees_a_flipped_sign(glyphs, tmp_path, capsys, monkeypatch):
    """With the contrastive term upside down the gap runs away and no rate helps."""
    right = train.px_step
    monkeypatch.setattr(train, 'px_step', lambda real, synth: right(synth, real))
    monkeypatch.setattr(train, 'WARMUP', 20)
    last, event = given_up(tmp_path, capsys, '--data', str(glyphs), *QUICK, '--lr', '.01',
                           '--batch-size', '4', '--epochs', '60',
                           '--matching', '0', '--picture-every', '600')
    assert 'diverged' in last and '--no-guard' in last and 'energy gap' in event


def test_guard_goes_back_and_on(trained, tmp_path):
    """NaN in an epoch: one trip, told in the log, and the epoch again with a lower rate, which then
    comes back. The pictures of the epoch are drawn again."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    broken, drawn, pyx_step = [], [], train.pyx_step

    def break_once(logits, y):
        broken.append(1)
        return pyx_step(logits, y) * (math.nan if len(broken) == 2 else 1.)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'pyx_step', break_once)
        patch.setattr(train, 'draw_samples', lambda *given: drawn.append(given[1]['epoch']))
        train.main(['--out', str(tmp_path), '--resume', '--epochs', '4', '--device', 'cpu'])
    rows = read_log(tmp_path)
    assert len(rows) == 4 and 'not finite' in rows[2]['event'] and not rows[3]['event']
    assert drawn == [3, 3, 4]
    for row, level in ((rows[2], 1), (rows[3], .75)):
        rate = 2e-3 * int(row['step']) / train.WARMUP
        assert float(row['lr']) == pytest.approx(rate * train.RETREAT ** level, rel=1e-3)
    assert state(tmp_path)['/run/history/drops'] == .5  # one drop, and two good epochs


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
    """--resume names the flag that differs, or the missing last.pt, and changes nothing. The way
    out that the guard names is open."""
    assert not train.parse_args(['--out', str(trained), '--resume', '--no-guard']).guard
    before = (trained / 'last.pt').read_bytes()
    resume = partial(refused, train.main, '--out', trained, '--resume', '--device', 'cpu')
    assert '--width' in resume('--width', 6) and '--conditional' in resume('--no-conditional')
    assert 'digits' in resume('--data', 'digits')
    assert 'last.pt' in refused(train.main, '--out', tmp_path, '--resume')
    assert before == (trained / 'last.pt').read_bytes()


def test_a_run_older_than_annealing_goes_on_without_it(trained, tmp_path):
    """Its last.pt does not hold the flag."""
    resume = ['--out', str(tmp_path), '--resume']
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert train.parse_args(resume).anneal_every == 3
    checkpoint = torch.load(tmp_path / 'last.pt', weights_only=True)
    del checkpoint['args']['anneal_every']
    torch.save(checkpoint, tmp_path / 'last.pt')
    assert not train.parse_args(resume).anneal_every


def test_a_run_is_not_overwritten_unasked(trained, glyphs, refused):
    """The message names the three ways out, and every file stays as it is."""
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    message = refused(train.main, '--data', glyphs, '--out', trained, *QUICK)
    assert all(flag in message for flag in ('--resume', '--overwrite', '--out'))
    assert before == {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}


# --- notebooks and large pictures -----------------------------------------------------------------

SUMS = """
data.PRINTS, data.EXTRAS = {'a': 20, 'Q': 20}, 10
arrays = data.print_letterpress(0)
images = torch.arange(48 * 256).view(48, 1, 16, 16).mul(37).byte()
split = data.Split(images, torch.zeros(48).long())
arrays |= {name: data.load_ood(name, data.Data(split, split, split, ['a'])) for name in data.MADE}
sums = [int(array.long().sum()) for array in arrays.values()]
"""


def test_nothing_of_the_callers_is_changed_or_matters(monkeypatch):
    """A notebook's plots stay on, and the pixels of letterpress and OOD sets are the same where
    float64 is the default type and standard error is closed, as pythonw does."""
    code = ('import matplotlib, sys, torch\nmatplotlib.use("svg")\nsys.stderr = None\n'
            f'torch.set_default_dtype(torch.float64)\nimport data{SUMS}'
            'print(sums, matplotlib.get_backend(), torch.ones(1).dtype)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          cwd=Path(data.__file__).parent)
    monkeypatch.setattr(data, 'PRINTS', {})  # they are put back after the test
    monkeypatch.setattr(data, 'EXTRAS', 0)
    names = {'data': data, 'torch': torch}
    exec(SUMS, names)
    assert done.stdout.strip() == f"{names['sums']} svg torch.float64", done.stderr


def test_grids_that_are_too_large_for_matplotlib_are_drawn_smaller(tmp_path):
    """After hours of sampling a picture is written, however many images there are."""
    data.save_grid(torch.rand(1, 1, 66_000, 56), tmp_path / 'g.png', 1)
    with Image.open(tmp_path / 'g.png') as picture:
        assert 50_000 < picture.height < 2 ** 16

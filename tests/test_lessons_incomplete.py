"""The lesson on incomplete data (.github/lessons/incomplete.py): what is hidden is never read."""
import re

import pytest
import torch

from conftest import load_lesson
from data import Data, DataError, Split
from model import EnergyModel


@pytest.fixture
def lesson():
    """The script as a module, with a small network; what `learn` got and gave is in `runs`."""
    module = load_lesson('incomplete')
    module.runs, learn = [], module.learn

    def record(x, y, model, *rest):
        stages = learn(x, y, model, *rest)
        module.runs.append((x, stages, model.state_dict()))
        return stages

    def small(classes, channels, width, *rest):
        return EnergyModel(classes, channels, 16, *rest)

    module.learn, module.EnergyModel = record, small
    return module


def bars(count=64):
    """Data of one bar in an image, uint8 (N, 1, 16, 16): lying in class 0, standing in class 1."""
    images = torch.full((count, 1, 16, 16), 20, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    for i in range(count):
        at = 2 + i // 2 % 3 * 4
        bar = images[i, 0, at:at + 4] if labels[i] == 0 else images[i, 0, :, at:at + 4]
        bar.fill_(230)
    return Data(*[Split(images.clone(), labels) for _ in range(3)], ['lying', 'standing'])


def run(lesson, data, out, *flags):
    lesson.load_data = lambda *_, **__: data
    lesson.main(['--device', 'cpu', '--out', str(out), *flags])
    return *lesson.runs[-1], (out / 'incomplete.png').read_bytes()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_hidden_pixels_are_never_read(lesson, tmp_path):
    """Other values of the hidden pixels give the same bits of the weights and of the recovered
    images. The same data give the same picture, and other visible pixels give other weights."""
    flags = ['--mask', 'left', '--updates', '4']
    _, stages, weights, picture = run(lesson, bars(), tmp_path / 'a', *flags)
    assert run(lesson, bars(), tmp_path / 'b', *flags)[3] == picture
    data = bars()
    data.train.images[..., :8] = torch.randint(256, data.train.images[..., :8].shape)
    _, other_stages, other_weights, other_picture = run(lesson, data, tmp_path / 'c', *flags)
    assert same(stages, other_stages) and same(weights, other_weights)
    assert other_picture != picture  # the column of originals
    data.train.images[..., 8:] = 255 - data.train.images[..., 8:]
    assert not same(weights, run(lesson, data, tmp_path / 'd', *flags)[2])


def test_recovery(lesson, tmp_path, capsys):
    """The visible pixels stay exactly as they are, the hidden ones come closer to the truth than
    the mean of the visible ones."""
    x, stages, _, _ = run(lesson, bars(), tmp_path, '--updates', '120')
    line, _ = capsys.readouterr().out.splitlines()
    mean, *_, last = map(float, re.findall(r'\d+\.\d+', line))
    assert last > mean + 3  # dB
    hidden = x.isnan()
    assert hidden.float().mean().sub(.5).abs() < .02
    assert list(stages) == ['update 40', 'update 80', 'update 120']
    for recovered in stages.values():
        assert torch.equal(recovered[~hidden], x[~hidden])
        assert recovered.isfinite().all()
    assert not torch.equal(stages['update 40'][hidden], stages['update 120'][hidden])


def test_masks(lesson):
    torch.manual_seed(0)
    shape = 200, 3, 16, 16
    share = {mask: lesson.hidden_pixels(mask, shape).float() for mask in
             ('random', 'half', 'left', 'centre')}
    for mask, hidden in share.items():
        assert hidden.shape == shape and torch.equal(hidden[:, 0], hidden[:, 2]), mask
    assert share['random'].mean((1, 2, 3)).sub(.5).abs().max() < .2
    assert (share['half'].mean((1, 2, 3)) == .5).all()
    left = share['half'][..., :8].mean((1, 2, 3))  # 1: the left half is hidden; 0: the right one
    assert .35 < left.mean() < .65 and ((left == 0) | (left == 1)).all()
    assert share['left'][..., :8].all() and not share['left'][..., 8:].any()
    assert share['centre'][..., 4:12, 4:12].all() and share['centre'].sum() == 200 * 3 * 64


def test_mistakes(lesson, refused):
    with pytest.raises(DataError, match='--data nowhere'):
        lesson.main(['--data', 'nowhere'])
    assert '--mask' in refused(lesson.main, '--mask', 'right')

"""tests/leave_out.py takes one class out of a data set and keeps everything else."""
import pytest
import torch

import leave_out
from data import load_data, prepare


def test_class_is_left_out(glyphs, tmp_path):
    """Its test images are the OOD set; the others keep their names, with labels 0, 1, ... Like all
    images that are read, they are min-max scaled once more."""
    leave_out.main(['--data', str(glyphs), '--leave', 'lie', '--out', str(tmp_path / 'data')])
    whole, rest = load_data(str(glyphs)), load_data(str(tmp_path / 'data'))
    assert rest.class_names == ['stand', 'lean']
    for part in ('train', 'val', 'test'):
        old, new = getattr(whole, part), getattr(rest, part)
        keep = old.labels != 1
        assert new.images.equal(prepare(old.images[keep], 56))
        assert new.labels.equal(torch.where(old.labels[keep] == 0, 0, 1))
    left = whole.test.images[whole.test.labels == 1]
    assert rest.ood['ood_left'].equal(prepare(left, 56))


def test_mistakes(glyphs, tmp_path):
    """An unknown class, and a folder that is there: nothing is overwritten."""
    with pytest.raises(SystemExit):
        leave_out.main(['--data', str(glyphs), '--leave', 'sit', '--out', str(tmp_path / 'data')])
    with pytest.raises(SystemExit):
        leave_out.main(['--data', str(glyphs), '--leave', 'lie', '--out', str(tmp_path)])
    with pytest.raises(SystemExit):
        leave_out.main(['--data', 'nowhere', '--leave', 'lie', '--out', str(tmp_path / 'data')])
    assert list(tmp_path.iterdir()) == []

"""The metrics on hand-computed cases, and ood.py through its command line."""
import csv

import numpy as np
import pytest

import ood


@pytest.mark.parametrize('score_id, score_ood, auroc, fpr95', [
    ([0, 1, 2, 3], [4, 5, 6, 7], 1., 0.),            # all OOD above
    ([4, 5, 6, 7], [0, 1, 2, 3], 0., 1.),            # all OOD below: a flipped sign would show
    ([1, 1, 1], [1, 1], .5, 1.),                     # ties count half
    ([0, 2], [1, 3], .75, .5),                       # 3 of 4 pairs in order
    ([0, 1, 2], [1, 1, 3], (2.5 + 2 * 1.5) / 9 + .5 / 9, 2 / 3)])
def test_metrics_by_hand(score_id, score_ood, auroc, fpr95):
    """AUROC is the share of (id, OOD) pairs in which OOD scores higher, ties half; FPR at the 95 % that are found."""
    pairs = np.subtract.outer(np.array(score_ood), np.array(score_id))
    assert auroc == pytest.approx((np.sign(pairs) + 1).mean() / 2)
    row = ood.detection(np.array(score_id, float), np.array(score_ood, float), resamples=20)
    assert row['auroc'] == pytest.approx(auroc) and row['fpr95'] == pytest.approx(fpr95)
    assert row['auroc_low'] <= row['auroc_high'] and (row['n_id'], row['n_ood']) == (len(score_id), len(score_ood))


def test_false_positive_rate_with_ties():
    """100 pairs of equal scores, none the same as another: 95 of the OOD inputs are found with 95 false alarms."""
    row = ood.detection(np.arange(100.), np.arange(100.), resamples=2)
    assert row['fpr95'] == pytest.approx(.95) and row['auroc'] == pytest.approx(.5)


def test_bootstrap_interval_covers():
    """The 95 % interval of a normal pair of scores holds the true AUROC, and has the width that theory gives."""
    random = np.random.default_rng(0)
    row = ood.detection(random.normal(size=400), random.normal(1., size=400))
    assert row['auroc_low'] < .7602 < row['auroc_high']  # Phi(1 / sqrt 2)
    assert .03 < row['auroc_high'] - row['auroc_low'] < .1


def test_report(trained, tmp_path, capsys):
    """A row a set, in the terminal and in ood.csv, and the histograms."""
    ood.main(['--ckpt', str(trained / 'best.pt'), '--out', str(tmp_path), '--device', 'cpu'])
    with open(tmp_path / 'ood.csv') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ood.COLUMNS and [row['set'] for row in rows] == ['ood_ta', 'noise', 'digits']
    printed = capsys.readouterr().out
    assert all(row['set'] in printed for row in rows) and (tmp_path / 'ood.png').exists()
    assert all(0 <= float(row['auroc_low']) <= float(row['auroc']) <= float(row['auroc_high']) <= 1 for row in rows)
    assert all(row['n_id'] == '24' and row['score'] == 'energy' for row in rows)


def test_mistakes(trained, tmp_path, refused):
    """Unknown sets and moved data are named."""
    ckpt = trained / 'best.pt'
    assert 'ood_ta' in refused(ood.main, '--ckpt', ckpt, '--ood', 'zzz', '--out', tmp_path / 'o')
    assert 'nowhere' in refused(ood.main, '--ckpt', ckpt, '--data', 'nowhere', '--out', tmp_path / 'o')
    assert not (tmp_path / 'o').exists()

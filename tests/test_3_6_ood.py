"""Course task 3.6: scores, metrics, thresholds, calibration and attacks on cases with known answers, and ood.py through its command line."""
import csv

import numpy as np
import pytest
import torch
import train
from conftest import QUICK
from PIL import Image
from sklearn.metrics import roc_auc_score

import data
import ood
from data import load_data
from sampler import sgld

SCORES = ['energy', 'max_prob', 'entropy', 'max_logit', 'grad_norm']


class Linear:
    """f(x)[y] = w_y . x and, apart from it, E(x) = a |x|^2 / 2: a model whose every derivative is known."""

    def __init__(self, weights=None, a=1.):
        self.weights, self.a = weights, a

    def get_logits(self, x):
        return x.flatten(1) @ self.weights.T  # (B, C * H * W) -> (B, K)

    def energy(self, x):
        return self.a * x.square().sum(dim=(1, 2, 3)) / 2  # (B,)


# --- scores and metrics -----------------------------------------------------------------------------------------------

def test_scores_by_hand():
    """p = (.7, .2, .1), with the energy of unnormalised logits; more doubt is a higher score, of each kind."""
    p = torch.tensor([.7, .2, .1], dtype=torch.float64)
    scores = ood.logit_scores(torch.stack([p.log() + 5, torch.full((3,), 1 / 3).double().log() + 2]))
    assert scores['energy'].tolist() == pytest.approx([-5, -2])
    assert scores['max_prob'].tolist() == pytest.approx([.3, 2 / 3])
    assert scores['entropy'].tolist() == pytest.approx([-(p * p.log()).sum().item(), np.log(3)])
    assert scores['max_logit'].tolist() == pytest.approx([-5 - np.log(.7), -2 + np.log(3)])
    assert list(ood.logit_scores(torch.tensor([[3.]]))) == ['energy']  # a plain EBM has no p(y|x)


def test_sure_answers_are_not_tied():
    """1 - max p still tells e^-30 from e^-31, where float32 says 0 to both."""
    less, more = ood.logit_scores(torch.tensor([[0., 30.], [0., 31.]]).double())['max_prob'].tolist()
    assert less > more > 0 and less == pytest.approx(np.exp(-30), rel=1e-2)


def test_gradient_norm():
    """E = a |x|^2 / 2 has ||dE/dx|| = a |x|, over batches too."""
    images = torch.randint(256, (600, 1, 4, 4), dtype=torch.uint8)
    norms = ood.gradient_norms(Linear(a=3.), images, 'cpu')
    assert torch.allclose(norms, 3 * data.to_float(images).flatten(1).norm(dim=1).double(), rtol=1e-5)


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


def test_precision_by_hand():
    """Scores OOD 3, id 2, OOD 1, id 0: precision 1 at half the recall, 2/3 at all of it."""
    assert ood.detection(np.array([0., 2.]), np.array([1., 3.]), resamples=2)['aupr'] == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize('score_id, score_ood', [([], [1., 2.]), ([1., 2.], []), ([], [])])
def test_one_class_says_nothing(score_id, score_ood):
    """With nothing to tell apart every metric is nan, and the counts say why."""
    row = ood.detection(np.array(score_id), np.array(score_ood))
    assert all(np.isnan(row[key]) for key in ('auroc', 'auroc_low', 'auroc_high', 'aupr', 'fpr95'))
    assert (row['n_id'], row['n_ood']) == (len(score_id), len(score_ood))


def test_false_positive_rate_with_ties():
    """100 pairs of equal scores, none the same as another: 95 of the OOD inputs are found with 95 false alarms."""
    row = ood.detection(np.arange(100.), np.arange(100.), resamples=2)
    assert row['fpr95'] == pytest.approx(.95) and row['auroc'] == pytest.approx(.5)


def test_bootstrap_is_scikit_learns_auroc_of_the_draws():
    """The rank statistic of each resampled pair of sets is roc_auc_score of the same draws, with many ties."""
    random = np.random.default_rng(0)
    score_id, score_ood = random.integers(0, 6, 50) / 7, random.integers(2, 9, 30) / 7
    draw = np.random.default_rng(5)
    for auroc in ood.bootstrap_auroc(score_id, score_ood, 5, 20):
        drawn = np.concatenate([draw.choice(score_id, 50), draw.choice(score_ood, 30)])
        assert auroc == pytest.approx(roc_auc_score(np.repeat([0, 1], [50, 30]), drawn), abs=1e-12)


def test_bootstrap_interval_covers():
    """The 95 % interval of a normal pair of scores holds the true AUROC, and has the width that theory gives."""
    random = np.random.default_rng(0)
    row = ood.detection(random.normal(size=400), random.normal(1., size=400))
    assert row['auroc_low'] < .7602 < row['auroc_high']  # Phi(1 / sqrt 2)
    assert .03 < row['auroc_high'] - row['auroc_low'] < .1


@pytest.mark.parametrize('energy, threshold', [(np.arange(100.), 94), (np.arange(20.), 18), (np.arange(10.), 9), ([3.], 3),
                                               ([0.] * 19 + [7.], 0)])
def test_threshold_keeps_95_percent(energy, threshold):
    """The least of the energies at or below which at least 95 % of them lie."""
    energy = np.random.default_rng(0).permutation(energy)
    assert ood.find_threshold(energy) == threshold and (energy <= threshold).mean() >= .95


# --- calibration and robustness ---------------------------------------------------------------------------------------

def test_ece_by_hand():
    """Sure to .8 and right 3 times of 4, sure to .6 and right once of 2: (4 * .05 + 2 * .1) / 6."""
    p = torch.tensor([.8, .8, .8, .8, .6, .6], dtype=torch.float64)
    logits = torch.stack([p, 1 - p], 1).log()
    ece, confidence, accuracy = ood.reliability(logits, torch.tensor([0, 0, 0, 1, 0, 1]))
    assert ece == pytest.approx((4 * .05 + 2 * .1) / 6)
    assert confidence.tolist() == pytest.approx([.6, .8]) and accuracy.tolist() == pytest.approx([.5, .75])
    p = torch.tensor([.95, 1.], dtype=torch.float64)  # .95 and right, 1 and wrong: both in the last bin
    assert ood.reliability(torch.stack([p, 1 - p], 1).log(), torch.tensor([0, 1]))[0] == pytest.approx((.95 + 1 - 1) / 2)


def test_temperature_is_found():
    """Logits three times as large as those that labels were drawn from want a temperature of 3, which calibrates them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5_000, 4, generator=generator, dtype=torch.float64) * 2
    labels = logits.softmax(1).multinomial(1, generator=generator).squeeze(1)
    fitted = ood.fit_temperature(3 * logits, labels)
    assert fitted == pytest.approx(3, rel=.05)
    assert ood.reliability(3 * logits / fitted, labels)[0] < .03 < .05 < ood.reliability(3 * logits, labels)[0]


@pytest.mark.parametrize('clip, factor', [(None, (1 - .3) ** 4), (1e-3, 1.)])
def test_gradient_back_through_sgld(clip, factor):
    """K steps of size .3 on E = |x|^2 / 2 shrink x, and so a gradient on its way back, by (1 - .3)^K; a clipped slope is
    constant and changes nothing."""
    model, states = Linear(), []
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.rand(3, 1, 2, 2, generator=generator)  # all slopes are clipped
    sgld(model.energy, x, 4, step_size=.3, noise=.01, generator=generator, grad_clip=clip,
         callback=lambda k, x, e: states.append(x))
    gradient = torch.randn(3, 1, 2, 2)
    assert torch.allclose(ood.back_through(model.energy, states, gradient, .3, clip), factor * gradient, atol=1e-6)


def test_attack_gradient_averages_fresh_noise(monkeypatch):
    """Through the defence the margin is that of moved inputs, a mean over draws: its error falls as 1 / sqrt(draws)."""
    model = Linear(torch.eye(4)[:2])
    x, y, generator = torch.zeros(500, 1, 2, 2), torch.zeros(500, dtype=torch.long), torch.Generator().manual_seed(0)
    defence = {'steps': 1, 'step_size': .5, 'noise': .1}
    for draws in (1, 16):  # the margin is x[1] - x[0] of the noise: standard deviation .1 sqrt(2 / draws)
        monkeypatch.setattr(ood, 'EOT_DRAWS', draws)
        margin, gradient = ood.attack_gradient(model, x, y, defence, generator)
        assert margin.std() == pytest.approx(.1 * (2 / draws) ** .5, rel=.1)
    assert torch.allclose(gradient.flatten(1), .5 * torch.tensor([-1., 1., 0., 0.]).expand(500, 4))
    margin, gradient = ood.attack_gradient(model, x, y, {**defence, 'steps': 0}, generator)
    assert margin.eq(0).all() and torch.equal(gradient.flatten(1), torch.tensor([-1., 1., 0., 0.]).expand(500, 4))


def test_pgd_looks_at_the_point_after_its_last_step(monkeypatch):
    """One step of 2.5 r finds the worst corner of the ball."""
    monkeypatch.setattr(ood, 'PGD_STEPS', 1)
    model, generator = Linear(torch.tensor([[0., 0, 0, 0], [1, -1, 2, 1]])), torch.Generator().manual_seed(0)
    worst = ood.pgd(model, torch.zeros(1, 1, 2, 2), torch.tensor([0]), 'Linf', .1, {'steps': 0, 'step_size': 0.}, generator)
    assert torch.allclose(worst.flatten(), .1 * torch.tensor([1., -1, 1, 1]))


@pytest.mark.parametrize('norm, dual, share', [('Linf', 1, .999), ('L2', 2, .95)])
def test_pgd_finds_the_worst_point_of_a_linear_classifier(norm, dual, share):
    """In a ball of radius r the margin of a linear classifier grows by r times the dual norm of the difference of weights;
    an L2 path of 2.5 r from a random point of the sphere ends a little short of it."""
    generator = torch.Generator().manual_seed(0)
    model = Linear(torch.randn(2, 16, generator=generator))
    x, y = .3 * torch.randn(5, 1, 4, 4, generator=generator).clamp(-1, 1), torch.tensor([0, 1, 0, 1, 0])
    worst = ood.pgd(model, x, y, norm, .1, {'steps': 0, 'step_size': 0.}, generator)
    margins = [(logits[:, 1] - logits[:, 0]) * (1 - 2 * y) for logits in map(model.get_logits, (x, worst))]
    most = .1 * (model.weights[1] - model.weights[0]).norm(p=dual)
    assert ((margins[1] - margins[0] > share * most) & (margins[1] - margins[0] < 1.001 * most)).all()
    assert ((worst - x).flatten(1).norm(p=torch.inf if dual == 1 else 2, dim=1) < .1 + 1e-5).all()


def test_pgd_stays_in_the_range_of_pixels():
    """However large the radius, an adversarial image is an image."""
    worst = ood.pgd(Linear(torch.randn(3, 4)), torch.ones(2, 1, 2, 2), torch.tensor([0, 1]), 'L2', 9.,
                    {'steps': 0, 'step_size': 0.}, torch.Generator())
    assert abs(worst).max() <= 1 and worst.isfinite().all()


# --- the command line -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def others(glyphs, tmp_path_factory):
    """Checkpoints of a plain classifier and of a plain EBM on the bars."""
    found = {}
    for name, flags in (('plain', ['--px-weight', '0']), ('ebm', ['--model', 'ebm', '--epochs', '1'])):
        out = tmp_path_factory.mktemp(name)
        train.main(['--data', str(glyphs), '--out', str(out), *QUICK, *flags])
        found[name] = out / 'best.pt'
    return found


def run(ckpt, out, *flags):
    ood.main([str(word) for word in ['--ckpt', ckpt, '--out', out, '--device', 'cpu', '--precision', 'fp32', *flags]])


def read_rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_report(trained, others, tmp_path, capsys, monkeypatch):
    """A row a set and score, pictures, and a threshold with the share of each set that it rejects."""
    monkeypatch.setattr(data, 'PRINTS', {'a': 20, 'b': 20, 'Q': 20})
    monkeypatch.setattr(data, 'EXTRAS', 4)
    monkeypatch.setattr(data, 'MADE', {name: data.MADE[name] for name in ('flipped', 'constant')})
    run(trained / 'best.pt', tmp_path, '--data-root', tmp_path, '--baseline', others['plain'])
    rows = read_rows(tmp_path / 'ood.csv')
    sets = ['ood_ta', 'letterpress', *data.MADE, 'digits']
    scores = [*SCORES, 'baseline_max_prob', 'baseline_energy']
    assert list(rows[0]) == ood.COLUMNS
    assert [(row['set'], row['score']) for row in rows] == [(name, score) for name in sets for score in scores]
    assert all(0 <= float(row['auroc_low']) <= float(row['auroc_high']) <= 1 and row['n_id'] == '24' for row in rows)
    printed = capsys.readouterr().out
    assert all(f'\n{name} ' in printed for name in sets)
    assert all((tmp_path / f'{name}.png').stat().st_size > 1000 for name in ('ood', 'roc', 'typical'))


def test_plain_ebm_has_only_its_scores(others, tmp_path):
    """No p(y|x), so no scores of it; the same seed writes the same bytes."""
    for name in 'ab':
        run(others['ebm'], tmp_path / name, '--ood', 'noise')
    assert [row['score'] for row in read_rows(tmp_path / 'a' / 'ood.csv')] == ['energy', 'grad_norm']
    for file in ('ood.csv', 'ood.png', 'roc.png', 'typical.png'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()


def test_sets_by_path(trained, tmp_path):
    """A path goes by its stem; a second set of that name by the path as given. An array and its images are the same set."""
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 20), dtype=np.uint8)
    (tmp_path / 'scans').mkdir()
    np.save(tmp_path / 'scans.npy', images)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / 'scans' / f'{i}.png')
    run(trained / 'best.pt', tmp_path, '--ood', tmp_path / 'scans.npy', tmp_path / 'scans')
    rows = read_rows(tmp_path / 'ood.csv')
    first, second = rows[:len(SCORES)], rows[len(SCORES):]
    assert first[0]['set'] == 'scans' and second[0]['set'] == str(tmp_path / 'scans')
    assert [{**row, 'set': ''} for row in first] == [{**row, 'set': ''} for row in second]


def test_a_path_called_test_is_no_test_set(trained, tmp_path, monkeypatch):
    """An OOD set named like the in-distribution one changes nothing about the others."""
    np.save(tmp_path / 'test.npy', np.random.default_rng(0).integers(0, 256, (6, 20, 20), dtype=np.uint8))
    run(trained / 'best.pt', tmp_path, '--ood', tmp_path / 'test.npy', 'noise')
    rows = read_rows(tmp_path / 'ood.csv')
    assert rows[0]['set'] == str(tmp_path / 'test.npy') and rows[0]['n_ood'] == '6' and rows[0]['n_id'] == '24'
    run(trained / 'best.pt', tmp_path, '--ood', 'noise')
    assert read_rows(tmp_path / 'ood.csv') == rows[len(SCORES):]
    (tmp_path / 'test').mkdir()
    Image.fromarray(np.eye(20, dtype=np.uint8)).save(tmp_path / 'test' / '0.png')
    monkeypatch.chdir(tmp_path)
    run(trained / 'best.pt', tmp_path, '--ood', 'test')
    assert {row['n_id'] for row in read_rows(tmp_path / 'ood.csv')} == {'24'}


def test_check(trained, others, glyphs, tmp_path, capsys):
    """Images get the verdicts that their energies and the threshold of the validation data give."""
    loaded = load_data(str(glyphs), 16)
    (tmp_path / 'scans' / 'deep').mkdir(parents=True)
    for i, image in enumerate(loaded.test.images[:, 0].numpy()):  # scans as raw as any: they are prepared once more
        Image.fromarray(image).save(tmp_path / 'scans' / ('deep' if i % 2 else '') / f'{i:02d}.png')
    run(trained / 'best.pt', tmp_path, '--check', tmp_path / 'scans')
    model, _ = ood.load_model(trained / 'best.pt', 'cpu', 'fp32')
    threshold = ood.find_threshold(-ood.get_logits(model, loaded.val.images, 'cpu').logsumexp(1))
    logits = ood.get_logits(model, data.prepare(loaded.test.images, 16), 'cpu')
    rows = sorted(read_rows(tmp_path / 'check.csv'), key=lambda row: row['file'][-6:])
    assert len(rows) == 24 and list(rows[0]) == ['file', 'energy', 'verdict', 'class', 'confidence']
    for row, f in zip(rows, logits):
        assert float(row['energy']) == pytest.approx(-f.logsumexp(0).item(), rel=1e-4)
        assert row['verdict'] == ('OOD' if -f.logsumexp(0) > threshold else 'in-distribution')
        assert row['class'] == loaded.class_names[f.argmax()]
        assert float(row['confidence']) == pytest.approx(f.softmax(0).max().item(), rel=1e-4)
    assert f'{sum(row["verdict"] == "OOD" for row in rows)} of 24 are OOD' in capsys.readouterr().out

    run(others['ebm'], tmp_path, '--check', tmp_path / 'scans' / '00.png')
    row, = read_rows(tmp_path / 'check.csv')
    assert row['class'] == row['confidence'] == ''


def test_trust(trained, others, tmp_path, monkeypatch):
    """Calibration and accuracy under attack of both models and of the defence, and the pictures."""
    monkeypatch.setattr(ood, 'PGD_STEPS', 2)
    monkeypatch.setattr(ood, 'DISTAL_STEPS', 3)
    monkeypatch.setattr(ood, 'RADII', {'Linf': [.1], 'L2': [1.]})
    run(trained / 'best.pt', tmp_path, '--ood', 'noise', '--baseline', others['plain'], '--trust', '--attacked', '9')
    rows = read_rows(tmp_path / 'trust.csv')
    assert [(row['model'], row['measure']) for row in rows[:4]] == [('JEM', 'ece')] * 2 + [('plain', 'ece')] * 2
    attacked = [(row['model'], row['norm'], float(row['radius'])) for row in rows[4:]]
    assert attacked == [(name, *ball) for name in ('JEM', 'plain', 'JEM after 5 SGLD steps')
                        for ball in (('Linf', 0), ('Linf', .1), ('L2', 0), ('L2', 1))]
    assert all(0 <= float(row['value']) <= 1 and row['n'] == '9' for row in rows[4:])
    assert all((tmp_path / f'{name}.png').stat().st_size > 1000 for name in ('calibration', 'robustness', 'distal'))


def test_mistakes(trained, others, glyphs, tmp_path, refused):
    """Each names the flag or the file, and nothing is written."""
    def told(*flags, ckpt=trained / 'best.pt'):
        return refused(ood.main, '--ckpt', ckpt, '--out', tmp_path / 'o', *flags)

    assert 'ood_ta' in told('--ood', 'zzz')
    assert 'nowhere' in told('--data', 'nowhere')
    assert '--baseline' in told('--baseline', others['ebm'])
    assert '--trust' in told('--trust', ckpt=others['ebm'])
    assert '--check' in told('--check', tmp_path, '--trust')
    assert 'no images' in told('--check', tmp_path)
    (tmp_path / 'broken.png').write_text('hello')
    assert 'broken.png' in told('--check', tmp_path)
    np.save(tmp_path / 'objects.npy', np.array([{}]))
    assert 'objects.npy' in told('--ood', tmp_path / 'objects.npy')
    assert 'digits' in told('--data', 'digits', '--check', glyphs / 'ood_ta.npy')
    assert not (tmp_path / 'o').exists()

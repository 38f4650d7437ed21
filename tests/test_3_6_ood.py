"""Task 3.6: scores, metrics, thresholds, calibration and attacks with known answers; ood.py."""
import csv
import types

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import ood
from conftest import bars
from data import Data, Split, load_data, load_ood, prepare, to_float, to_uint8
from hints import assert_close
from model import EnergyModel, load_model, save_checkpoint
from sampler import sgld


class Linear:
    """f(x)[y] = w_y . x and, independent of it, energy(x) = |x|^2 / 2: all derivatives are known.
    The energy of its logits is that of T = .5."""

    def __init__(self, weights):
        self.weights = weights  # (K, C * H * W)

    def get_logits(self, x):
        return x.flatten(1) @ self.weights.T  # (B, C, H, W) -> (B, K)

    def energy(self, x):
        return x.square().sum(dim=(1, 2, 3)) / 2  # (B,)

    def energy_of_logits(self, logits):
        return -.5 * (logits / .5).logsumexp(1)  # (B, K) -> (B,)


class Bowl(Linear):
    """f(x) = (0, |x|^2 / 2): the gradient of a wrong answer to class 0 is x itself."""

    def get_logits(self, x):
        return torch.stack([0 * self.energy(x), self.energy(x)], 1)  # (B, 2)


# --- scores ---------------------------------------------------------------------------------------

def test_scores_by_hand():
    """p = (.7, .2, .1) against a uniform p: the energy is as given, more doubt is a higher score,
    and a plain EBM (K = 1) has no p(y|x) to score."""
    p = torch.tensor([.7, .2, .1], dtype=torch.float64)
    logits = torch.stack([p.log() + 5, torch.full((3,), 1 / 3).double().log() + 2])
    gradient = torch.tensor([3., 4., 0., 0.]).view(1, 1, 2, 2).repeat(2, 1, 1, 1)
    energy = torch.tensor([-4., 7.])
    gradient[1] *= -2
    scores = ood.all_scores(logits, energy, gradient)
    assert_close(scores['energy'], [-4., 7.], 'the energy is a score as it is', {
        'the sign: a high energy is OOD, and a score is higher for OOD': [4., -7.]})
    assert_close(scores['max_prob'], [.3, 2 / 3], 'max_prob: 1 - max p, with softmax over the K '
                 'classes of an image, not over the batch', {
                     'that is the confidence; a score is higher for OOD: 1 - max p': [.7, 1 / 3]})
    entropy = [-(p * p.log()).sum().item(), np.log(3)]
    assert_close(scores['entropy'], entropy, 'entropy of p(y|x), at least 0', {
        'the sign: an entropy is at least 0': [-value for value in entropy]})
    assert_close(scores['max_logit'], [-5 - np.log(.7), -2 + np.log(3)],
                 'max_logit is minus the greatest logit of an image')
    assert_close(scores['grad_norm'], [5., 10.], 'grad_norm: the norm of dE/dx of each image', {
        'is it the sum of dE/dx? Pixels cancel there; take the norm': [7., -14.]})
    assert list(ood.all_scores(logits[:, :1], energy, gradient)) == ['energy', 'grad_norm']


def test_confident_answers_are_no_ties():
    """1 - max p of whole batches is right for a doubt of e^-30, where float32 gives 0;
    E(x) is that of the model's own T, and dE/dx = -sum_y p(y|x) w_y for this T, in the order of
    the images."""
    images = torch.tensor([255, 128]).repeat(200).to(torch.uint8).view(400, 1, 1, 1)
    weights = torch.tensor([[30.], [0.]])
    logits, energy, gradient = ood.infer(Linear(weights), images, 'cpu')
    high, half = ood.all_scores(logits, energy, gradient)['max_prob'][:2]
    assert high == pytest.approx(np.exp(-30), rel=1e-2, abs=0) and half > high, (
        f'a doubt of {high:.3g} instead of {np.exp(-30):.3g}: float32 rounds it; use float64')
    assert torch.allclose(logits[:, :1], 30 * to_float(images).flatten(1).double())
    assert torch.equal(energy, Linear(weights).energy_of_logits(logits))
    p = (logits / .5).softmax(1)[:, 0]  # (N,)
    wanted = (-30 * p).float()
    assert_close(gradient.flatten(), wanted, 'dE/dx of each image, from the sum of the energies', {
        'is it from the mean over the batch? That divides dE/dx by its size': wanted / ood.BATCH})


# --- metrics --------------------------------------------------------------------------------------

@pytest.mark.parametrize('score_id, score_ood, fpr95, aupr', [
    ([0, 1, 2, 3], [4, 5, 6, 7], 0., 1.),             # all OOD above
    ([4, 5, 6, 7], [0, 1, 2, 3], 1., None),           # all OOD below: a wrong sign would show
    ([1, 1, 1], [1, 1], 1., .4),                      # ties: precision is the share of OOD
    ([0, 2], [1, 3], .5, (1 + 2 / 3) / 2),            # precision 1 at half the recall, 2/3 at all
    (range(100), range(100), .95, None)])             # 95 of the OOD found at 95 false alarms
def test_metrics_by_hand(score_id, score_ood, fpr95, aupr):
    """AUROC is the share of (id, OOD) pairs in which OOD scores higher, ties half; FPR95 counts
    false alarms where 95 % of OOD are found; AUPR has OOD as the positive class."""
    score_id, score_ood = np.array(score_id, float), np.array(score_ood, float)
    pairs = np.subtract.outer(score_ood, score_id)
    row = ood.detection(score_id, score_ood, resamples=2)
    auroc = (np.sign(pairs) + 1).mean() / 2
    assert_close(row['auroc'], auroc, 'AUROC: share of pairs in which OOD scores higher, of the '
                 'scores, not of decisions', {
                     'labels are turned or in another order than scores: OOD is 1': 1 - auroc})
    assert row['fpr95'] == pytest.approx(fpr95), (
        f'FPR95 {row["fpr95"]:.3f} instead of {fpr95:.3f}: false alarms, the share of '
        'in-distribution images at the threshold that finds 95 % of the OOD images')
    assert aupr is None or row['aupr'] == pytest.approx(aupr), (
        f'AUPR {row["aupr"]:.3f} instead of {aupr:.3f}: OOD is the positive class')
    assert (row['n_id'], row['n_ood']) == (len(score_id), len(score_ood))


def test_bootstrap_is_the_auroc_of_the_draws():
    """The rank statistic of resampled sets is scikit-learn's AUROC of the same draws, ties too."""
    random = np.random.default_rng(0)
    score_id, score_ood = random.integers(0, 6, 50) / 7, random.integers(2, 9, 30) / 7
    draw = np.random.default_rng(5)
    for auroc in ood.bootstrap_auroc(score_id, score_ood, 5, 20):
        drawn = np.concatenate([draw.choice(score_id, 50), draw.choice(score_ood, 30)])
        wanted = roc_auc_score(np.repeat([0, 1], [50, 30]), drawn)
        assert auroc == pytest.approx(wanted, abs=1e-12), (
            f'{auroc:.4f} instead of {wanted:.4f}: both sets are drawn anew with replacement, '
            'and ties count half')


def test_interval_has_the_right_width():
    """Of two normal densities, the interval holds the true AUROC and is as wide as theory says, and
    another seed gives another interval."""
    random = np.random.default_rng(0)
    pair = random.normal(size=400), random.normal(1., size=400)
    row = ood.detection(*pair)
    assert row['auroc_low'] < .7602 < row['auroc_high']  # Phi(1 / sqrt 2)
    # Hanley and McNeil 1982: the standard error is .0169, so the interval is .066 wide
    assert row['auroc_high'] - row['auroc_low'] == pytest.approx(.066, rel=.15)
    assert ood.detection(*pair, seed=1)['auroc_low'] != row['auroc_low']


@pytest.mark.parametrize('pixels, threshold', [
    (range(100), 94), (range(20), 18), (range(10), 9), ([3], 3), ([0] * 19 + [7], 0)])
def test_threshold_keeps_95_percent(pixels, threshold):
    """The lowest of the validation energies at or below which at least 95 % of them lie."""
    pixels = np.random.default_rng(0).permutation(pixels)
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 1, 1)
    data = types.SimpleNamespace(val=types.SimpleNamespace(images=images))
    model = Linear(torch.tensor([[-1.]]))  # K = 1: E(x) = x
    data.test = data.train = types.SimpleNamespace(images=255 - 0 * images)
    found, wanted = ood.find_threshold(model, data, 'cpu'), to_float(torch.tensor(threshold)).item()
    assert found == pytest.approx(wanted), (
        f'threshold {found:.3f} instead of {wanted:.3f}: ' + (
            'is it that of the test set? It must come from the validation images' if found == 1
            else 'at or below it lie 95 % of the validation energies, not 5 %'))


# --- trust ----------------------------------------------------------------------------------------

def test_ece_by_hand():
    """Confidence .8 and 3 of 4 right, confidence .6 and 2 of 2 right: (4 * .05 + 2 * .4) / 6; a
    confidence of 1 belongs to the last bin."""
    p = torch.tensor([.8, .8, .8, .8, .6, .6], dtype=torch.float64)
    logits = torch.stack([p, 1 - p], 1).log()
    ece, confidence, accuracy = ood.reliability(logits, torch.tensor([0, 0, 0, 1, 0, 0]))
    assert_close(ece, (4 * .05 + 2 * .4) / 6, 'ECE: mean of |accuracy - confidence| of the bins', {
        'errors of bins cancel: take the absolute value of each': (2 * .4 - 4 * .05) / 6})
    assert confidence.tolist() == pytest.approx([.6, .8])
    assert accuracy.tolist() == pytest.approx([1, .75])
    p = torch.tensor([.95, 1.], dtype=torch.float64)  # right, wrong
    ece, *_ = ood.reliability(torch.stack([p, 1 - p], 1).log(), torch.tensor([0, 1]))
    assert ece == pytest.approx((.95 + 1 - 1) / 2)


def test_temperature_is_found():
    """Logits three times as large as those of the labels need T = 3, which calibrates them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, 4, generator=generator, dtype=torch.float64) * 2
    labels = logits.softmax(1).multinomial(1, generator=generator).squeeze(1)
    fitted = ood.fit_temperature(3 * logits, labels)
    assert fitted == pytest.approx(3, rel=.05)
    assert ood.reliability(3 * logits / fitted, labels)[0] < .03
    assert ood.reliability(3 * logits, labels)[0] > .05


@pytest.mark.parametrize('low, clip, factor', [(.2, None, .7 ** 5), (.99, None, .7 ** 5),
                                               (.9, 1e-3, 1.)])
def test_gradient_goes_through_the_defence(low, clip, factor):
    """The defence is `sgld`. Five steps of .3 on E = |x|^2 / 2 shrink a gradient by .7^5, also at
    the clamp (noise of 1 puts many pixels there); a clipped dE/dx is constant and changes
    nothing."""
    x = (low + .01 * torch.rand(3, 1, 2, 2)).requires_grad_()
    one_step = {'steps': 1, 'step_size': .3, 'noise': 1. if low == .99 else 1e-3, 'grad_clip': clip}
    model, seeded = Linear(None), torch.Generator().manual_seed
    moved = ood.defend(model.energy, x, one_step, seeded(0))
    chain = sgld(model.energy, x, generator=seeded(0), **{**one_step, 'steps': 5})
    assert torch.allclose(moved, chain, atol=1e-6)
    assert (moved.abs() == 1).any() == (low == .99)
    gradient, = torch.autograd.grad(moved.sum(), x)
    assert torch.allclose(gradient, torch.full_like(x, factor), atol=1e-6)


def test_attack_sees_the_margin():
    """The gradient is w_c - w_y for the most likely wrong class c, whatever its confidence."""
    weights = 40 * torch.tensor([[1., 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    x = torch.tensor([.9, -.5, .1, 0]).view(1, 1, 2, 2)
    for y, c in ((0, 2), (1, 0)):
        found = ood.attack_gradient(Linear(weights), x, torch.tensor([y]), None, None)
        assert torch.equal(found.flatten(), weights[c] - weights[y])


def test_attack_averages_over_the_noise_of_the_defence(monkeypatch):
    """A step of .5 on E = |x|^2 / 2 from 0 ends at the noise; its gradient .5 * noise has a
    standard deviation that falls as 1 / sqrt(draws). Without a defence nothing is random."""
    monkeypatch.setattr(ood, 'DEFENCE_STEPS', 1)
    x, y = torch.zeros(500, 1, 2, 2), torch.zeros(500, dtype=torch.long)
    one_step = {'steps': 1, 'step_size': .5, 'noise': .1}
    for draws in (1, 16):
        monkeypatch.setattr(ood, 'EOT_DRAWS', draws)
        generator = torch.Generator().manual_seed(0)
        found = ood.attack_gradient(Bowl(None), x, y, one_step, generator)
        assert found.std() == pytest.approx(.5 * .1 / draws ** .5, rel=.1)
    x = torch.full_like(x, .25)
    assert torch.equal(ood.attack_gradient(Bowl(None), x, y, None, None), x)


@pytest.mark.parametrize('norm, dual, share', [('Linf', 1, .999), ('L2', 2, .95)])
def test_pgd_finds_the_worst_point(norm, dual, share):
    """In a ball of radius r the margin of a linear classifier grows by r times the dual norm of
    the difference of weights; in L2 the path of 2.5 r ends a little short of it."""
    generator = torch.Generator().manual_seed(0)
    model = Linear(torch.randn(2, 16, generator=generator))
    x = .3 * torch.randn(5, 1, 4, 4, generator=generator).clamp(-1, 1)
    y = torch.tensor([0, 1, 0, 1, 0])
    worst = ood.pgd(model, x, y, norm, .1, None, generator)
    logits = model.get_logits(worst) - model.get_logits(x)  # (5, 2)
    gain = (logits[:, 1] - logits[:, 0]) * (1 - 2 * y)
    most = .1 * (model.weights[1] - model.weights[0]).norm(p=dual)
    assert ((gain > share * most) & (gain < 1.001 * most)).all()
    distance = (worst - x).flatten(1).norm(p=torch.inf if dual == 1 else 2, dim=1)
    assert (distance < .1 + 1e-5).all()
    assert ood.pgd(model, x, y, norm, 9., None, generator).abs().max() <= 1  # still an image


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_pgd_stays_inside_the_ball(norm):
    """The worst point may lie inside: the logit |x|^2 / 2 of class 1 is least at 0."""
    x, y = torch.zeros(5, 1, 4, 4), torch.ones(5, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    assert ood.pgd(Bowl(None), x, y, norm, .1, None, generator).abs().max() < .02


# --- the command line -----------------------------------------------------------------------------

@pytest.fixture(scope='module')
def others(trained, glyphs, tmp_path_factory):
    """Checkpoints with random weights and the data of `trained`: a plain classifier, one with
    another seed, and a plain EBM. Centred logits make their answers differ between images."""
    x = to_float(load_data(str(glyphs), 16).test.images)
    _, checkpoint = load_model(trained / 'best.pt')
    folder, paths = tmp_path_factory.mktemp('others'), {}
    kinds = {'plain': (3, {'px_weight': 0.}), 'reseeded': (3, {'px_weight': 0., 'seed': 1}),
             'ebm': (1, {})}
    for name, (num_classes, flags) in kinds.items():
        torch.manual_seed(0)
        model = EnergyModel(num_classes, 1, 4)
        model.head.bias.data -= model.get_logits(x).mean(0)
        paths[name] = folder / f'{name}.pt'
        with open(paths[name], 'wb') as file:
            save_checkpoint(file, model, {**checkpoint['args'], **flags}, checkpoint['data'],
                            checkpoint['sampler'], 1)
    return paths


def run(ckpt, out, *flags):
    flags = ['--ckpt', ckpt, '--out', out, '--device', 'cpu', '--precision', 'fp32', *flags]
    ood.main([str(word) for word in flags])


def read_rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_report(trained, others, glyphs, tmp_path, capsys, monkeypatch):
    """A row a set and score for all sets of the data, pictures, a table; the AUROC of the energy is
    that of model.energy on the test images against the set."""
    monkeypatch.setattr(ood, 'ood_names', lambda data, name, root: [*data.ood, 'noise'])
    run(trained / 'best.pt', tmp_path, '--baseline', others['plain'])
    rows = read_rows(tmp_path / 'ood.csv')
    assert list(rows[0]) == ['set', 'score', 'auroc', 'auroc_low', 'auroc_high', 'aupr', 'fpr95',
                             'n_id', 'n_ood']
    scores = ['energy', 'max_prob', 'entropy', 'max_logit', 'grad_norm', 'baseline_max_prob',
              'baseline_energy']
    pairs = [(name, score) for name in ('ood_ta', 'noise') for score in scores]
    assert [(row['set'], row['score']) for row in rows] == pairs
    printed = capsys.readouterr().out
    data = load_data(str(glyphs), 16)
    for path, score in ((trained / 'best.pt', 'energy'), (others['plain'], 'baseline_energy')):
        model, _ = load_model(path)
        logits = [model.get_logits(to_float(x)).double()
                  for x in (data.test.images, load_ood('noise', data))]  # (24, 3) both
        auroc = roc_auc_score(np.repeat([0, 1], 24), model.energy_of_logits(torch.cat(logits)))
        found = float(rows[pairs.index(('noise', score))]['auroc'])
        assert found == pytest.approx(auroc, abs=1e-5), (
            f'AUROC of {score} {found:.4f} instead of {auroc:.4f}: with the rest of 1, test images '
            'and OOD images are exchanged')
        accuracy = (logits[0].argmax(1) == data.test.labels).float().mean()
        p, y = logits[0].softmax(1), data.test.labels  # (24, 3), (24,)
        auprc = np.mean([average_precision_score(y == k, p[:, k]) for k in range(3)])
        assert f'accuracy {accuracy:.4f}, macro AUPRC {auprc:.4f}' in printed
    assert '\nood_ta ' in printed and '\nnoise ' in printed and 'which keeps 95%' in printed
    for name in ('ood', 'roc', 'typical'):
        assert (tmp_path / f'{name}.png').stat().st_size > 1000


def test_typical_shows_image_0_and_the_extremes(monkeypatch):
    """Image 0 is the same letter in all sets that are made from the test images."""
    seen = {}
    monkeypatch.setattr(ood, 'save_grid', lambda x, path, columns, **texts: seen.update(
        x=x, columns=columns, captions=[float(text) for text in texts['captions']]))
    images = {'test': torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).repeat(1, 1, 4, 4)}
    energy = np.array([5., 3., 11., 0., 7., 1., 9., 2., 10., 4., 8., 6.])  # (12,)
    ood.show_typical(images, {'test': {'energy': energy}}, 'typical.png')
    assert seen['columns'] == 11 and seen['captions'] == [5, 0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    order = to_uint8(seen['x'])[:, 0, 0, 0].tolist()  # (11, 1, 4, 4) -> the number of each image
    assert order == [0, 3, 5, 7, 1, 9, 4, 10, 6, 8, 2]


def test_a_new_score_needs_one_line(trained, tmp_path, capsys, monkeypatch):
    """What `all_scores` adds is in ood.csv and in the table, with no other change."""
    old = ood.all_scores

    def with_another(logits, *others):
        return {**old(logits, *others), 'second': logits.sort(1).values[:, -2].numpy()}
    monkeypatch.setattr(ood, 'all_scores', with_another)
    run(trained / 'best.pt', tmp_path, '--ood', 'noise')
    assert read_rows(tmp_path / 'ood.csv')[-1]['score'] == 'second'
    assert ' second' in capsys.readouterr().out


def test_same_seed_same_bytes(others, tmp_path):
    """Everything random hangs on --seed; a plain EBM has the scores of its energy only."""
    for name in 'ab':
        run(others['ebm'], tmp_path / name, '--ood', 'noise')
    for file in ('ood.csv', 'ood.png', 'roc.png', 'typical.png'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()
    rows = read_rows(tmp_path / 'a' / 'ood.csv')
    assert [row['score'] for row in rows] == ['energy', 'grad_norm']


def test_sets_by_path(glyphs, tmp_path, monkeypatch):
    """A path goes by its stem; where that is taken, or is `test`, by the path as given, or by the
    whole path; the same path twice is one set. An array and its image files are alike."""
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 20), dtype=np.uint8)
    for name in ('scans', 'test'):
        np.save(tmp_path / f'{name}.npy', images)
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f'{i}.png')
    monkeypatch.chdir(tmp_path)
    paths = ['scans.npy', 'scans', 'test.npy', 'test', 'noise', 'noise']
    args = types.SimpleNamespace(ood=paths, seed=1, data=str(glyphs), data_root=str(tmp_path))
    data = load_data(str(glyphs), 16)
    *sets, (_, noise) = ood.load_sets(args, data).items()
    assert [name for name, _ in sets] == ['scans', str(tmp_path / 'scans'), 'test.npy',
                                          str(tmp_path / 'test')]
    expected = prepare(torch.from_numpy(images)[:, None], 16)  # (6, 1, 16, 16)
    for _, found in sets:
        assert torch.allclose(found.float(), expected.float(), atol=1)
    assert torch.equal(noise, load_ood('noise', data, seed=1))


def test_check(trained, others, glyphs, tmp_path, refused):
    """Each image is OOD if its energy is above the threshold of the validation images. A file that
    cannot be read gets a row of its own, and the exit status is 2; hidden files do not count."""
    data = load_data(str(glyphs), 16)
    (tmp_path / 'scans' / 'deep').mkdir(parents=True)
    noise = load_ood('noise', data)[:2]
    raw = torch.cat([data.test.images, noise])  # prepared once more when they are read
    for i, image in enumerate(raw[:, 0].numpy()):
        folder = tmp_path / 'scans' / ('deep' if i % 2 else '')
        Image.fromarray(image).save(folder / f'{i:02d}.png')
    (tmp_path / 'scans' / '._00.png').write_text('hidden')
    run(trained / 'best.pt', tmp_path, '--check', tmp_path / 'scans')
    rows = sorted(read_rows(tmp_path / 'check.csv'), key=lambda row: row['file'][-6:])
    assert len(rows) == 26 and list(rows[0]) == ['file', 'energy', 'verdict', 'class', 'confidence']
    model, _ = load_model(trained / 'best.pt')
    threshold = model.energy(to_float(data.val.images)).sort().values[22]  # 23 of 24 are >= 95 %
    logits = model.get_logits(to_float(prepare(raw, 16)))
    for row, f, energy in zip(rows, logits, model.energy_of_logits(logits).tolist()):
        assert float(row['energy']) == pytest.approx(energy, rel=1e-4)
        assert row['verdict'] == ('OOD' if energy > threshold else 'in-distribution'), (
            'an image is OOD if its energy is above the threshold')
        assert row['class'] == data.class_names[f.argmax()], (
            'the class of an image has the lowest E(x, y), which is the greatest logit')
        assert float(row['confidence']) == pytest.approx(f.softmax(0).max().item(), rel=1e-4)
    assert {row['verdict'] for row in rows} == {'OOD', 'in-distribution'}

    (tmp_path / 'scans' / '00.png').write_text('broken')
    message = refused(ood.main, '--ckpt', others['ebm'], '--out', tmp_path, '--device', 'cpu',
                      '--check', tmp_path / 'scans')
    assert '--check: 1 unreadable' in message and '00.png' in message
    rows = read_rows(tmp_path / 'check.csv')
    assert [row['verdict'] for row in rows].count('unreadable') == 1 and len(rows) == 26
    assert {row['class'] + row['confidence'] for row in rows} == {''}  # a plain EBM


def test_an_energy_that_is_no_number_is_ood(trained, glyphs, tmp_path):
    """A network with a NaN in it knows nothing, and calls nothing in-distribution."""
    checkpoint = torch.load(trained / 'best.pt', weights_only=True)
    checkpoint['weights']['head.bias'][0] = torch.nan
    torch.save(checkpoint, tmp_path / 'best.pt')
    run(tmp_path / 'best.pt', tmp_path, '--check', glyphs / 'test.npy')
    assert {row['verdict'] for row in read_rows(tmp_path / 'check.csv')} == {'OOD'}


def test_check_takes_each_image_once(trained, tmp_path, capsys):
    """Every page of a file gets a verdict, a folder called like an image is a folder, and files
    that cannot be read are not in the count that is printed."""
    scans = tmp_path / 'scans'
    (scans / 'folder.png').mkdir(parents=True)
    pages = [Image.fromarray(image) for image in bars(2, 9)[0].clip(0, 255).astype(np.uint8)]
    pages[0].save(scans / 'two.tiff', save_all=True, append_images=pages[1:])
    pages[1].save(scans / 'folder.png' / 'one.png')
    (scans / 'broken.png').write_text('hello')
    with pytest.raises(SystemExit):
        run(trained / 'best.pt', tmp_path, '--check', scans)
    rows = read_rows(tmp_path / 'check.csv')
    assert len({row['file'] for row in rows}) == len(rows) == 4
    assert [row['verdict'] for row in rows].count('unreadable') == 1
    assert ' of 3 are OOD' in capsys.readouterr().out


def test_trust(trained, others, tmp_path, monkeypatch):
    """Calibration and accuracy under attack of both models and of the defence, which takes the SGLD
    steps of the training, and the pictures."""
    monkeypatch.setattr(ood, 'PGD_STEPS', 2)
    monkeypatch.setattr(ood, 'DISTAL_STEPS', 3)
    monkeypatch.setattr(ood, 'RADII', {'Linf': [.1], 'L2': [1.]})
    steps = []

    def spy(energy, x, **settings):
        steps.append(settings)
        return sgld(energy, x, **settings)
    monkeypatch.setattr(ood, 'sgld', spy)
    run(trained / 'best.pt', tmp_path, '--ood', 'noise', '--trust', 9, '--baseline',
        others['plain'])
    rows = read_rows(tmp_path / 'trust.csv')
    calibration = [row for row in rows if row['measure'] == 'ece']  # JEM at 1, its T and the fitted
    rows = rows[len(calibration):]
    temperatures = {name: [float(row['temperature']) for row in calibration if row['model'] == name]
                    for name in ('JEM', 'plain')}
    assert len(temperatures['JEM']) == 3
    assert 1. in temperatures['JEM'] and 1. in temperatures['plain']
    t = load_model(trained / 'best.pt')[0].temperature
    assert min(temperatures['JEM']) == pytest.approx(t, rel=1e-4)
    balls = [('Linf', '0'), ('Linf', '0.1'), ('L2', '0'), ('L2', '1')]
    assert [(row['model'], row['norm'], row['radius']) for row in rows] == [
        (name, *ball) for name in ('JEM', 'plain', 'JEM after 5 SGLD steps') for ball in balls]
    assert all(0 <= float(row['value']) <= 1 and row['n'] == '9' for row in rows)
    _, checkpoint = load_model(trained / 'best.pt')
    sampler = checkpoint['sampler']
    assert {settings['noise'] for settings in steps} == {sampler['noise']}
    for name in ('calibration', 'robustness', 'distal'):
        assert (tmp_path / f'{name}.png').stat().st_size > 1000


def test_the_defence_is_attacked_in_two_ways_and_measured_once_without(tmp_path, monkeypatch):
    """The lesser of two random runs of the defence would be too low where there is no attack."""
    runs = []
    monkeypatch.setattr(ood, 'RADII', {'Linf': [.1]})
    monkeypatch.setattr(ood, 'pgd', lambda model, x, *_: x)
    monkeypatch.setattr(ood, 'defend', lambda energy, x, *_: runs.append(x) or x)
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    split = Split(images, torch.zeros(3, dtype=torch.long))
    zeros = Data(split, split, split, ['a', 'b'])
    args = types.SimpleNamespace(seed=0, trust=3, device='cpu', out=tmp_path)
    ood.attack({'defended': (Bowl(None), {'steps': 1})}, zeros, args)
    assert len(runs) == 1 + 2


def test_mistakes(trained, others, tmp_path, refused):
    """Each names the flag or the file, and nothing is written."""
    (tmp_path / 'broken.png').write_text('hello')
    for ckpt, flags, words in (
            (trained / 'best.pt', ['--baseline', others['ebm']], '--px-weight 0'),
            (trained / 'best.pt', ['--baseline', others['reseeded']], '--seed 0'),
            (trained / 'best.pt', ['--check', tmp_path / 'broken.png'], 'broken.png'),
            (others['ebm'], ['--trust'], '--trust')):
        message = refused(ood.main, '--ckpt', ckpt, '--out', tmp_path / 'o', '--device', 'cpu',
                          *flags)
        assert words in message
    assert not (tmp_path / 'o').exists()

"""Judge inputs by a trained energy: out-of-distribution (OOD) detection, calibration, robustness (course task 3.6).

    python ood.py --ckpt best.pt                           every score on every OOD set there is for the data
    python ood.py --ckpt best.pt --ood ligatures my/scans  these sets: names (see data.py), .npy files, folders of images
    python ood.py --ckpt best.pt --baseline plain/best.pt  also the scores of a plain classifier (train.py --px-weight 0)
    python ood.py --ckpt best.pt --check my/scans          no report, but a verdict on each image: check.csv
    python ood.py --ckpt best.pt --trust                   also calibration, PGD attacks, distal adversaries: slow

The test split of the checkpoint's own data is in-distribution, label 0; OOD is label 1, and a score is higher for what is
more OOD. How data.py keeps sets from being told by their handling: see `load_ood`. Writes a table and, into --out, ood.csv
(a row a set and score), ood.png (histograms of the energy), roc.png, typical.png (the most and least typical images of
each set: look there first); --trust adds trust.csv,
calibration.png, robustness.png and distal.png.
"""
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from data import (DataError, check_apart, load_data, load_images, load_ood, ood_names, printable,
                  save_figure, save_grid, shortened, to_float, write_csv)
from model import (CheckpointError, CommandLine, energy_of_logits, fail, load_model, number,
                   user_mistakes)
from sampler import chain_settings, prior, sgld

COLUMNS = ['set', 'score', 'auroc', 'auroc_low', 'auroc_high', 'aupr', 'fpr95', 'n_id', 'n_ood']
KEEP = .95  # share of the validation data below the threshold
BATCH = 256  # images at a time: with gradients about 100 MB at 56x56


# --- scores -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def get_logits(model, images, device):
    """f(x)[y] of uint8 images (N, C, H, W), as float64 (N, K) on the CPU; a CheckpointError if they are not finite."""
    logits = torch.cat([model.get_logits(to_float(part.to(device))).cpu() for part in images.split(BATCH)])  # (N, K)
    if not logits.isfinite().all():
        raise CheckpointError('--ckpt: its energies are not finite; the training diverged, train anew with a lower --lr')
    return logits.double()


def gradient_norms(model, images, device):
    """||dE/dx||_2 of uint8 images (N, C, H, W), as float64 (N,): JEM's approximate mass (section 5.3), the sign turned. A
    typical image has others like it around, so the energy is flat there."""
    norms = []
    for part in images.split(BATCH):
        x = to_float(part.to(device)).requires_grad_()  # (B, C, H, W)
        gradient, = torch.autograd.grad(model.energy(x).sum(), x)  # (B, C, H, W)
        norms.append(gradient.flatten(1).norm(dim=1).cpu())  # (B, C, H, W) -> (B, C * H * W) -> (B,)
    return torch.cat(norms).double()


def logit_scores(logits):
    """The OOD scores that logits (N, K) give, each (N,) and higher for more OOD; a plain EBM (K = 1) has its energy only.

    In float64, and 1 - max p by expm1: in float32 a sure classifier would say 0 to thousands of images, all ties.
    """
    log_p = logits.log_softmax(1)  # (N, K)
    scores = {'energy': energy_of_logits(logits)}  # E(x), (N, K) -> (N,)
    if logits.shape[1] > 1:
        scores['max_prob'] = -torch.expm1(log_p.amax(1))  # 1 - max_y p(y|x), Hendrycks and Gimpel 2017
        scores['entropy'] = -(log_p.exp() * log_p).sum(1)  # H[p(y|x)]
        scores['max_logit'] = -logits.amax(1)  # min_y E(x, y)
    return scores


def all_scores(model, baseline, images, device):
    """{name: float64 numpy (N,)} of all scores of uint8 images (N, C, H, W), with those of the baseline, if any."""
    scores = logit_scores(get_logits(model, images, device))
    scores['grad_norm'] = gradient_norms(model, images, device)
    if baseline is not None:
        plain = logit_scores(get_logits(baseline, images, device))
        scores.update({f'baseline_{name}': plain[name] for name in ('max_prob', 'energy')})
    return {name: score.numpy() for name, score in scores.items()}


# --- metrics ------------------------------------------------------------------------------------------------------------

def detection(score_id, score_ood, seed=0, resamples=1000):
    """How well a score tells OOD (label 1) from in-distribution (label 0) inputs: numpy (n_ood,) and (n_id,).

    Returns:
        AUROC (ties count half) with its 95 % bootstrap interval (both sets resampled with replacement, independently: too
        wide for `blurred` and others made from the test images, whose scores go together), the area under
        the precision-recall curve with OOD as the positive class, and FPR95, the share of in-distribution inputs above
        the threshold that finds 95 % of the OOD inputs (some papers count the other way round: the share of OOD inputs
        below the threshold that keeps 95 % of the in-distribution ones, here 1 - `rejected`). All nan if a set is empty.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # slow to import
    counts = {'n_id': len(score_id), 'n_ood': len(score_ood)}
    if not all(counts.values()):
        return {**dict.fromkeys(['auroc', 'auroc_low', 'auroc_high', 'aupr', 'fpr95'], float('nan')), **counts}
    labels = np.repeat([0, 1], [len(score_id), len(score_ood)])  # (n_id + n_ood,)
    scores = np.concatenate([score_id, score_ood])
    false_positive, true_positive, _ = roc_curve(labels, scores, drop_intermediate=False)
    low, high = np.quantile(bootstrap_auroc(score_id, score_ood, seed, resamples), [.025, .975])
    return {'auroc': roc_auc_score(labels, scores), 'auroc_low': low, 'auroc_high': high,
            'aupr': average_precision_score(labels, scores), 'fpr95': false_positive[np.argmax(true_positive >= .95)],
            **counts}


def bootstrap_auroc(score_id, score_ood, seed, resamples):
    """AUROC of resampled sets, (resamples,), as the rank statistic of Mann and Whitney: the share of (id, OOD) pairs in
    which OOD scores higher, ties half. Only how often each distinct value was drawn counts, so nothing is sorted twice."""
    random = np.random.default_rng(seed)
    values, rank = np.unique(np.concatenate([score_id, score_ood]), return_inverse=True)  # (U,), (n_id + n_ood,)
    rank_id, rank_ood = rank[:len(score_id)], rank[len(score_id):]
    draws = []
    for _ in range(resamples):
        drawn_id, drawn_ood = (np.bincount(random.choice(ranks, len(ranks)), minlength=len(values))
                               for ranks in (rank_id, rank_ood))  # (U,) both
        below = drawn_id.cumsum() - drawn_id / 2  # (U,), id inputs of lower score, and half of those of the same
        draws.append(drawn_ood @ below / (len(rank_id) * len(rank_ood)))
    return np.array(draws)


# --- a threshold one can use ----------------------------------------------------------------------------------------------

def find_threshold(energy):
    """The least energy that keeps at least 95 % of the validation energies (N,): an input is OOD if E(x) is above it."""
    return float(np.quantile(energy, KEEP, method='inverted_cdf'))


def check(model, checkpoint, args):
    """check.csv: file, energy, verdict, class and confidence max_y p(y|x) of each image at --check."""
    channels, size, _ = checkpoint['data']['image_shape']
    images, names = load_images(args.check, size, channels)
    val = trained_data(checkpoint, args).val.images
    threshold = find_threshold(logit_scores(get_logits(model, val, args.device))['energy'])
    logits = get_logits(model, images, args.device)  # (N, K)
    energy, (confidence, label) = logit_scores(logits)['energy'], logits.softmax(1).max(1)  # (N,) all
    classes = checkpoint['class_names']  # empty for a plain EBM
    rows = [{'file': name, 'energy': e, 'verdict': 'OOD' if e > threshold else 'in-distribution',
             'class': classes[y] if classes else '', 'confidence': p if classes else ''}
            for name, e, y, p in zip(names, energy.tolist(), label.tolist(), confidence.tolist())]
    write_csv(rows, list(rows[0]), args.out / 'check.csv')
    for row in rows[:20]:
        print(f'{row["file"]}: {row["verdict"]}, energy {row["energy"]:.2f}' + (f', {row["class"]}' if classes else ''))
    print(f'{sum(row["verdict"] == "OOD" for row in rows)} of {len(rows)} are OOD (energy above {threshold:.3f}); '
          f'{args.out / "check.csv"}')


# --- the report -----------------------------------------------------------------------------------------------------------

def report(model, baseline, data, images, args):
    """Every score on every OOD set of `images` (see `load_sets`): the table, ood.csv, the pictures and the threshold."""
    energy_val = logit_scores(get_logits(model, data.val.images, args.device))['energy']  # (N,)
    threshold = find_threshold(energy_val)
    scores = {name: all_scores(model, baseline, images[name], args.device) for name in tqdm(images, 'scores', unit='set')}
    rows = [{'set': name, 'score': score, **detection(scores['test'][score], scores[name][score], args.seed)}
            for name in tqdm([*images][1:], 'intervals', unit='set') for score in scores['test']]
    energies = {name: found['energy'] for name, found in scores.items()}
    rejected = {name: float((energy > threshold).mean()) for name, energy in energies.items()}
    write_csv(rows, COLUMNS, args.out / 'ood.csv')
    plot_histograms(energies, rejected, threshold, args.out / 'ood.png')
    plot_roc(scores, rows, args.out / 'roc.png')
    show_typical(images, energies, args.out / 'typical.png')
    print_table(rows, rejected, threshold)
    for name, classifier in {'checkpoint': model, 'baseline': baseline}.items():
        if classifier is not None and classifier.settings['num_classes'] > 1:
            right = get_logits(classifier, data.test.images, args.device).argmax(1) == data.test.labels  # (N, K) -> (N,)
            print(f'accuracy of the {name} on the test images: {right.float().mean():.4f} (n {len(right)})')


def print_table(rows, rejected, threshold):
    """A line a set: all about the energy, and the AUROC of the other scores."""
    cell = {(row['set'], row['score']): row for row in rows}
    sets, (energy, *others) = (list(dict.fromkeys(row[key] for row in rows)) for key in ('set', 'score'))
    print(f'{"":<21}{"AUROC of":>8}{"":<36}{"AUROC of":>17}\n{"set":<14}{"n":>7}{energy:>8} {"95 % interval":<17}{"AUPR":>8}'
          f'{"FPR95":>8}{"rejected":>10}' + ''.join(f'{other:>{len(other) + 2}}' for other in others))
    for name in sets:
        row = cell[name, energy]
        print(f'{shortened(name, 14):<14}{row["n_ood"]:7d}{row["auroc"]:8.4f} {row["auroc_low"]:.4f} to {row["auroc_high"]:.4f} '
              f'{row["aupr"]:8.4f}{row["fpr95"]:8.4f}{rejected[name]:10.4f}'
              + ''.join(f'{cell[name, other]["auroc"]:{len(other) + 2}.4f}' for other in others))
    print(f'rejected: energy above {threshold:.3f}, which keeps {KEEP:.0%} of the validation data and rejects '
          f'{rejected["test"]:.1%} of the {row["n_id"]} test images')


def make_panels(titles):
    """A figure with axes for each of `titles`, (figure, list of axes)."""
    count = len(titles)
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[count:]:
        ax.remove()
    for ax, title in zip(axes.flat, titles):
        ax.set_title(shortened(title, 32), parse_math=False)
    return figure, axes.flat[:count]


def plot_histograms(energies, rejected, threshold, path):
    """ood.png, after Fig. 2 of the sheet: for each set the histograms of E(x) of the test images and of the OOD images."""
    figure, axes = make_panels(list(energies)[1:])
    for ax, (name, energy) in zip(axes, list(energies.items())[1:]):
        bins = np.histogram_bin_edges(np.concatenate([energies['test'], energy]), 60)
        ax.hist(energies['test'], bins, density=True, alpha=.6, label='test (in-distribution)')
        ax.hist(energy, bins, density=True, alpha=.6, label='OOD')
        ax.axvline(threshold, color='black', linestyle=':', label=f'threshold: rejects {rejected[name]:.1%}')
        ax.set(xlabel='energy E(x)', yticks=[])
        ax.legend(fontsize=7, loc='upper right')
    save_figure(figure, path)


def plot_roc(scores, rows, path):
    """roc.png: for each set the ROC curves of all scores."""
    from sklearn.metrics import roc_curve  # slow to import
    names = list(scores)[1:]
    figure, axes = make_panels(names)
    for ax, name in zip(axes, names):
        for row in (row for row in rows if row['set'] == name):
            pair = [scores[which][row['score']] for which in ('test', name)]  # (n_id,), (n_ood,)
            false_positive, true_positive, _ = roc_curve(np.repeat([0, 1], list(map(len, pair))), np.concatenate(pair))
            ax.plot(false_positive, true_positive, label=f'{row["score"]} {row["auroc"]:.3f}')
        ax.set(xlabel='false-positive rate', ylabel='true-positive rate')
        ax.legend(fontsize=6, loc='lower right')
    save_figure(figure, path)


def show_typical(images, energies, path):
    """typical.png: the five images of lowest and the five of highest energy of each set, uint8 (N, C, H, W)."""
    picked = []
    for name, energy in energies.items():
        at = np.clip([*range(5), *range(len(energy) - 5, len(energy))], 0, len(energy) - 1)  # repeats in a tiny set
        picked.append(np.argsort(energy, kind='stable')[at])  # (10,)
    x = torch.cat([to_float(images[name][index]) for name, index in zip(images, picked)])  # (10 * sets, C, H, W)
    captions = [f'{energies[name][i]:.2f}' for name, index in zip(images, picked) for i in index]
    save_grid(x, path, 10, 'the five most typical and the five least typical images of each set, with E(x)',
              rows=list(images), captions=captions)


# --- trust: calibration -----------------------------------------------------------------------------------------------

def fit_temperature(logits, labels):
    """The temperature T of softmax(f / T) with the least cross-entropy (Guo et al. 2017) on the validation data, logits
    (N, K) and labels (N,). Bounded, since a classifier without errors there would be sharpened without end."""
    return min(np.geomspace(.01, 100, 401), key=lambda t: F.cross_entropy(logits / t, labels).item())


def reliability(logits, labels, bins=15):
    """Are answers given with a confidence of 90 % right in 90 %? Logits (N, K) and labels (N,).

    Returns:
        the expected calibration error ECE = sum_b n_b / N |accuracy_b - confidence_b| over bins of equal width (Guo et
        al. 2017), and the mean confidence and the accuracy of each bin that is not empty.
    """
    confidence, answer = logits.softmax(1).max(1)  # (N, K) -> (N,) both
    at = (confidence * bins).long().clamp_max(bins - 1)  # (N,)
    count, hits, total = (torch.bincount(at, weights.double(), bins)  # (N,) -> (bins,)
                          for weights in (torch.ones_like(confidence), answer == labels, confidence))
    filled = count > 0
    return (hits - total).abs().sum().item() / len(labels), (total / count)[filled], (hits / count)[filled]


def calibrate(models, data, args):
    """ECE of each model before and after temperature scaling, and calibration.png; returns rows of trust.csv."""
    rows, (figure, axes) = [], make_panels(list(models))
    for ax, (name, model) in zip(axes, models.items()):
        logits = get_logits(model, data.test.images, args.device)  # (N, K)
        fitted = fit_temperature(get_logits(model, data.val.images, args.device), data.val.labels)
        for temperature in (1., fitted):
            ece, confidence, accuracy = reliability(logits / temperature, data.test.labels)
            ax.plot(confidence, accuracy, marker='o', label=f'T = {temperature:.2f}: ECE {ece:.4f}')
            rows.append({'model': name, 'measure': 'ece', 'temperature': temperature, 'value': ece, 'n': len(logits)})
        ax.plot([0, 1], [0, 1], color='grey', linestyle=':')
        ax.set(xlabel='confidence', ylabel='accuracy')
        ax.legend(fontsize=8)
    save_figure(figure, args.out / 'calibration.png')
    return rows


# --- trust: robustness ------------------------------------------------------------------------------------------------

# Radii of the attacks in units of pixels from 0 to 1, as papers give them; from -1 to 1 they are twice as long.
RADII = {'Linf': [.01, .03, .1, .2], 'L2': [.25, .5, 1., 2.]}
PGD_STEPS, EOT_DRAWS, DEFENCE_STEPS, DISTAL_STEPS = 20, 4, 5, 500


def attack_gradient(model, x, y, defence, generator):
    """How wrong the answer to x (B, C, H, W) with labels y (B,) is, and which way it gets worse, through the defence.

    The margin max_{c != y} f(x)[c] - f(x)[y] (Carlini and Wagner 2017) stands for the cross-entropy, whose gradient is 0
    in float32 once a classifier is sure: that would pass for robustness. A defence that draws noise is attacked by the
    expectation over it (EOT, Athalye et al. 2018): a mean of EOT_DRAWS runs with fresh noise each, and the gradient goes
    back through every step of SGLD, so that the defence hides nothing.

    Returns:
        margin (B,), above 0 where the answer is wrong, and its gradient (B, C, H, W).
    """
    margins, gradients = [], []
    for _ in range(EOT_DRAWS if defence['steps'] else 1):
        states = []
        moved = sgld(model.energy, x, generator=generator, callback=lambda k, x, e: states.append(x), **defence)
        logits = model.get_logits(moved.requires_grad_())  # (B, K)
        others = logits.scatter(1, y[:, None], -torch.inf)  # (B, K), all classes but y
        margins.append(others.amax(1) - logits.gather(1, y[:, None]).squeeze(1))  # (B,)
        gradient, = torch.autograd.grad(margins[-1].sum(), moved)  # (B, C, H, W)
        gradients.append(back_through(model.energy, states, gradient, defence['step_size'], defence.get('grad_clip')))
    return torch.stack(margins).mean(0).detach(), torch.stack(gradients).mean(0)


def back_through(energy, states, gradient, step_size, grad_clip=None):
    """From dL/dx_K to dL/dx_0, (B, C, H, W), along the states x_0 ... x_{K-1} of a run of SGLD.

    The Jacobian of x - step_size * dE/dx + noise is I - step_size * d2E/dx2. The clamp to [-1, 1] counts as the identity
    (BPDA, Athalye et al. 2018): by its true gradient, 0, an attack would forget the pixels that it holds.
    """
    for x in reversed(states):
        x = x.detach().requires_grad_()
        slope, = torch.autograd.grad(energy(x).sum(), x, create_graph=True)  # (B, C, H, W)
        if grad_clip is not None:
            slope = slope.clamp(-grad_clip, grad_clip)
        product, = torch.autograd.grad((slope * gradient).sum(), x)  # d2E/dx2 times the gradient, (B, C, H, W)
        gradient = gradient - step_size * product
    return gradient


def pgd(model, x, y, norm, radius, defence, generator):
    """Projected gradient descent (Madry et al. 2018) from a random start, at most `radius` (in [-1, 1]) away from x in L-inf
    or L2; returns of the points visited those with the most wrong answers, (B, C, H, W) in [-1, 1]."""
    def lengths(delta):
        return delta.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-12)  # (B, C, H, W) -> (B, 1, 1, 1)

    def project(delta):
        inside = delta.clamp(-radius, radius) if norm == 'Linf' else delta * (radius / lengths(delta)).clamp_max(1)
        return (x + inside).clamp(-1, 1)

    moved = project(radius * torch.randn(x.shape, generator=generator, device=x.device))
    worst, worst_margin = moved, torch.full((len(x),), -torch.inf, device=x.device)
    for _ in range(PGD_STEPS + 1):  # the start and the points after each step
        margin, gradient = attack_gradient(model, moved, y, defence, generator)
        worst = torch.where((margin > worst_margin)[:, None, None, None], moved, worst)
        worst_margin = torch.maximum(margin, worst_margin)
        direction = gradient.sign() if norm == 'Linf' else gradient / lengths(gradient)
        moved = project(moved - x + 2.5 * radius / PGD_STEPS * direction)
    return worst


def attack(models, checkpoint, data, args):
    """Accuracy under attack of each model, and of the JEM behind the lecture's defence, DEFENCE_STEPS steps of SGLD on the
    input; robustness.png. Returns rows of trust.csv."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    picked = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(args.seed))[:args.attacked]
    batches = [data.test.to(args.device).batch(index.to(args.device)) for index in picked.split(BATCH)]
    victims = {name: (model, 0) for name, model in models.items()}
    first = next(iter(models))
    victims[f'{first} after {DEFENCE_STEPS} SGLD steps'] = models[first], DEFENCE_STEPS
    rows, (figure, axes) = [], make_panels([f'PGD, {norm}' for norm in RADII])
    for name, (model, steps) in victims.items():
        defence = chain_settings(checkpoint['sampler'], 'training', steps)
        for ax, norm in zip(axes, RADII):
            accuracy = []
            for radius in tqdm([0, *RADII[norm]], f'PGD, {norm}, on {name}', unit='radius'):
                right = []
                for x, y in batches:
                    x = pgd(model, x, y, norm, 2 * radius, defence, generator) if radius else x
                    x = sgld(model.energy, x, generator=generator, **defence)  # with noise that no attack has seen
                    right.append(model.get_logits(x).argmax(1) == y)  # (B,)
                accuracy.append(torch.cat(right).float().mean().item())
                rows.append({'model': name, 'measure': 'accuracy', 'norm': norm, 'radius': radius, 'value': accuracy[-1],
                             'n': len(picked)})
            ax.plot([0, *RADII[norm]], accuracy, marker='o', label=name)
            ax.set(xlabel='radius (pixels from 0 to 1)', ylabel='accuracy', ylim=(-.03, 1.03))
            ax.legend(fontsize=7)
    save_figure(figure, args.out / 'robustness.png')
    return rows


def show_distal(models, checkpoint, args):
    """distal.png: uniform noise driven to p(y = c | x) >= .9 by gradient ascent, a class a column (JEM, section 5.4): what
    a model takes for a c that was never near one."""
    names = checkpoint['class_names'][:10]
    labels = torch.arange(len(names), device=args.device)[:, None]  # (R, 1)
    pictures, captions = [], []
    for name, model in models.items():
        generator = torch.Generator(args.device).manual_seed(args.seed)  # the same noise for each model
        x = prior('uniform', (len(names), *checkpoint['data']['image_shape']), generator, args.device)
        for _ in tqdm(range(DISTAL_STEPS), f'distal adversaries of {name}', unit='step'):
            log_p = model.get_logits(x.requires_grad_()).log_softmax(1).gather(1, labels)  # (R, K) -> (R, 1)
            gradient, = torch.autograd.grad(log_p.sum(), x)  # (R, C, H, W)
            unsure = (log_p < np.log(.9))[..., None, None]  # (R, 1) -> (R, 1, 1, 1)
            steepness = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)  # (R, 1, 1, 1)
            x = (x + unsure * .02 * gradient / steepness).detach().clamp(-1, 1)
        pictures.append(x)
        captions += [f'p {p:.2f}' for p in model.get_logits(x).softmax(1).gather(1, labels).flatten().tolist()]
    save_grid(torch.cat(pictures), args.out / 'distal.png', len(names), 'noise driven to p(y = c | x) of .9',
              rows=list(models), heads=names, captions=captions)


def trust(model, baseline, checkpoint, data, args):
    """Calibration, robustness and distal adversaries of the JEM and, if there is one, of the plain classifier."""
    models = {'JEM' if checkpoint['args']['px_weight'] else 'classifier': model, **({'plain': baseline} if baseline else {})}
    rows = calibrate(models, data, args)
    show_distal(models, checkpoint, args)
    rows += attack(models, checkpoint, data, args)
    write_csv(rows, ['model', 'measure', 'temperature', 'norm', 'radius', 'value', 'n'], args.out / 'trust.csv')


# --- command line -----------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument('--ckpt', type=Path, required=True, help='checkpoint written by train.py')
    parser.add_argument('--ood', nargs='+', metavar='NAME|PATH', help='OOD sets, see data.py; the default is all there are')
    parser.add_argument('--baseline', type=Path, metavar='CKPT', help='a plain classifier of the same data to compare with')
    parser.add_argument('--check', type=Path, metavar='FILE|FOLDER', help='images to judge instead of a report')
    parser.add_argument('--trust', action='store_true', help='calibration, robustness and distal adversaries, too')
    parser.add_argument('--attacked', type=number(int, 1), default=100, help='test images that --trust attacks')
    parser.add_argument('--data', help='the checkpoint\'s data, where they lie elsewhere now')
    parser.add_argument('--data-root', type=Path, help='folder of downloads and of rendered letterpress, as in the training')
    parser.add_argument('--out', type=Path, default='.', help='folder to write into')
    args = parser.parse_args(argv)
    if args.check and (args.ood or args.baseline or args.trust):
        parser.error('--check gives verdicts and no report: leave out --ood, --baseline and --trust')
    return args


def trained_data(checkpoint, args):
    """The data that the checkpoint was trained on, from where they lie now."""
    flags = checkpoint['args']
    return load_data(args.data or flags['data'], None, args.data_root or flags['data_root'], flags['seed'], checkpoint['data'])


def load_baseline(args, checkpoint):
    """The plain classifier, checked for being one and for knowing the same data."""
    baseline, facts = load_model(args.baseline, args.device, args.precision)
    if facts['args']['px_weight'] or facts['data'] != checkpoint['data']:
        raise CheckpointError(f'--baseline {args.baseline}: no plain classifier of the images and classes of {args.ckpt}; train '
                              f'one on the same data with python train.py --px-weight 0 --seed {checkpoint["args"]["seed"]}')
    return baseline


def load_sets(args, data, checkpoint):
    """{name: uint8 (N, C, H, W)}, first `test`, then the OOD sets; a path goes by its stem, unless another set does already."""
    root = args.data_root or checkpoint['args']['data_root']
    sets = {'test': data.test.images}
    for name in args.ood or ood_names(data, checkpoint['args']['data'], root):
        stem = Path(name).stem or name
        key = next(key for key in (*map(printable, (stem, name, os.path.realpath(name))), None) if key not in sets)
        if key is not None:  # else it was named twice
            sets[key] = load_ood(name, data, args.seed, root)
    return sets


def main(argv=None):
    with user_mistakes(DataError):
        args = parse_args(argv)
        model, checkpoint = load_model(args.ckpt, args.device, args.precision)
        check_apart(args.out, args.data or checkpoint['args']['data'], *args.ood or [])
        if args.check:
            return check(model, checkpoint, args)
        if args.trust and not checkpoint['class_names']:
            fail(f'--trust: {args.ckpt} is a plain EBM and has no p(y|x) to trust; leave the flag out')
        baseline = load_baseline(args, checkpoint) if args.baseline else None
        data = trained_data(checkpoint, args)
        report(model, baseline, data, load_sets(args, data, checkpoint), args)
        if args.trust:
            trust(model, baseline, checkpoint, data, args)


if __name__ == '__main__':
    main()

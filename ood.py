"""Judge images by a trained energy: OOD detection, calibration, robustness (course task 3.6).

    python ood.py --ckpt best.pt                           all scores on all OOD sets of the data
    python ood.py --ckpt best.pt --ood ligatures my/scans  these sets: names, .npy files, folders
    python ood.py --ckpt best.pt --baseline plain/best.pt  compare with train.py --px-weight 0
    python ood.py --ckpt best.pt --check my/scans          a verdict on each image, no report
    python ood.py --ckpt best.pt --trust                   also calibration and attacks; slow

In-distribution (label 0) is the test split of the checkpoint's own data, out-of-distribution (OOD,
label 1) is all else; a score is higher for what is more OOD. Writes a table and, into --out,
ood.csv (one row a set and score), ood.png (histograms of the energy), roc.png, typical.png (the
most and the least typical images of each set: look at it first), and with --trust trust.csv,
calibration.png, robustness.png and distal.png. --check writes check.csv only.
"""
from model import CommandLine, fail, load_model, number, user_mistakes  # before torch, for Ctrl-C
import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (DataError, check_apart, find_images, load_data, load_images, load_ood, ood_names,
                  printable, save_figure, save_grid, shortened, to_float, write_csv)
from sampler import chain_settings, prior, sgld

KEEP = .95  # share of the validation images below the threshold
BATCH = 64  # images at a time; attacks through the defence take 12 MB each at 56x56


def parse_args(argv=None):
    parser = CommandLine(__doc__)
    flag = parser.add_argument
    flag('--ckpt', type=Path, required=True, help='checkpoint written by train.py')
    flag('--ood', nargs='+', metavar='NAME|PATH', help='OOD sets, see data.py; default: all')
    flag('--baseline', type=Path, metavar='CKPT', help='a plain classifier of the same data')
    flag('--check', type=Path, metavar='FILE|FOLDER', help='images that get a verdict each')
    flag('--trust', type=number(int, 1), nargs='?', const=100, metavar='N',
         help='also calibration, distal adversaries, attacks on N test images (default 100)')
    flag('--data', help='the data of the checkpoint, if they have moved since the training')
    flag('--data-root', type=Path, help='folder of downloads and of letterpress, if it has moved')
    flag('--out', type=Path, default='.', help='folder to write into')
    args = parser.parse_args(argv)
    if args.check and (args.ood or args.baseline or args.trust):
        parser.error('--check gives verdicts, no report: leave out --ood, --baseline and --trust')
    return args


# --- scores ---------------------------------------------------------------------------------------

def infer(model, images, device):
    """Logits (N, K), E(x) (N,), both float64, and dE/dx (N, C, H, W) of uint8 images (N, C, H, W).
    In float32, 1 - max p of a sure classifier would be 0 for thousands of images, all ties."""
    logits, gradients = [], []
    for part in images.split(BATCH):
        x = to_float(part.to(device)).requires_grad_()  # (B, C, H, W)
        f = model.get_logits(x)  # (B, K)
        gradients += torch.autograd.grad(model.energy_of_logits(f).sum(), x)  # (B, C, H, W)
        logits.append(f.detach().cpu().double())
    logits = torch.cat(logits)  # (N, K)
    return logits, model.energy_of_logits(logits), torch.cat(gradients).cpu()


def all_scores(logits, energy, gradient):
    """All OOD scores of N images from what `infer` gives, {name: numpy (N,)}: `energy`, and for
    K > 1 `max_prob`, `entropy`, `max_logit`, then `grad_norm`. For a new one add one line here."""
    scores = {'energy': energy}  # E(x)
    if logits.shape[1] > 1:
        log_p = logits.log_softmax(1)  # log p for T = 1, (N, K): at a small T each p is 0 or 1
        scores['max_prob'] = -torch.expm1(log_p.amax(1))  # 1 - max p, Hendrycks and Gimpel 2017
        scores['entropy'] = -(log_p.exp() * log_p).sum(1)  # of softmax f
        scores['max_logit'] = -logits.amax(1)  # min_y E(x, y), which is E(x) for T -> 0
    # Minus JEM's approximate mass (5.3). The matching term trains it to be small at the data.
    scores['grad_norm'] = gradient.flatten(1).norm(dim=1).double()  # ||dE/dx||_2
    return {name: score.numpy() for name, score in scores.items()}


# --- metrics --------------------------------------------------------------------------------------

def detection(score_id, score_ood, seed=0, resamples=1000):
    """How well a score, (n_id,) and (n_ood,), separates OOD from in-distribution images: a dict of
    `auroc` (ties count half), its 95 % bootstrap interval from `auroc_low` to `auroc_high`, `aupr`,
    `fpr95`, `n_id` and `n_ood`.
    * The interval resamples both sets independently, so it is too wide for sets made from the test
      images (such as `blurred`), whose scores are correlated with those of the test images.
    * AUPR has OOD as the positive class and depends on the ratio n_ood / n_id. FPR95 is the share
      of in-distribution images above the threshold that finds 95 % of the OOD images."""
    from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import
    labels = np.repeat([0, 1], [len(score_id), len(score_ood)])  # (n_id + n_ood,)
    scores = np.concatenate([score_id, score_ood])  # (n_id + n_ood,)
    low, high = np.quantile(bootstrap_auroc(score_id, score_ood, seed, resamples), [.025, .975])
    threshold = -np.quantile(-score_ood, .95, method='inverted_cdf')  # finds 95 % of the OOD images
    return {'auroc': roc_auc_score(labels, scores), 'auroc_low': low, 'auroc_high': high,
            'aupr': average_precision_score(labels, scores),
            'fpr95': (score_id >= threshold).mean(), 'n_id': len(score_id), 'n_ood': len(score_ood)}


def bootstrap_auroc(score_id, score_ood, seed, resamples):
    """AUROC of resampled sets, (resamples,): the share of (id, OOD) pairs in which OOD scores
    higher, ties half (Mann and Whitney 1947). How often each value was drawn is all it needs."""
    n_id, n_ood = len(score_id), len(score_ood)
    values, rank = np.unique(np.concatenate([score_id, score_ood]), return_inverse=True)  # (U,)
    rank_id, rank_ood = rank[:n_id], rank[n_id:]  # (n_id,), (n_ood,)
    random, aurocs = np.random.default_rng(seed), []
    for _ in range(resamples):
        count_id = np.bincount(random.choice(rank_id, n_id), minlength=len(values))  # (U,)
        count_ood = np.bincount(random.choice(rank_ood, n_ood), minlength=len(values))  # (U,)
        below = count_id.cumsum() - count_id / 2  # (U,), id images of a lower score, half the ties
        aurocs.append(count_ood @ below / (n_id * n_ood))
    return np.array(aurocs)


# --- the report -----------------------------------------------------------------------------------

def report(model, baseline, data, sets, args):
    """All scores on all OOD `sets`, {name: uint8 (N, C, H, W)}: table, ood.csv and pictures."""
    from sklearn.metrics import average_precision_score  # slow to import
    threshold = find_threshold(model, data, args.device)
    images = {'test': data.test.images, **sets}
    scores, metrics, rows = {}, {}, []
    for name in tqdm(images, 'scores', unit='set'):
        scores[name] = all_scores(*infer(model, images[name], args.device))
        if baseline is not None:
            plain = all_scores(*infer(baseline, images[name], args.device))
            scores[name]['baseline_max_prob'] = plain['max_prob']
            scores[name]['baseline_energy'] = plain['energy']
    for name in tqdm(sets, 'intervals', unit='set'):
        metrics[name] = {}
        for score, test in scores['test'].items():
            metrics[name][score] = detection(test, scores[name][score], args.seed)
            rows.append({'set': name, 'score': score, **metrics[name][score]})
    write_csv(rows, list(rows[0]), args.out / 'ood.csv')
    plot_histograms(scores, metrics, threshold, args.out / 'ood.png')
    plot_roc(scores, metrics, args.out / 'roc.png')
    show_typical(images, scores, args.out / 'typical.png')
    print_table(scores, metrics, threshold)
    for name, classifier in {'checkpoint': model, 'baseline': baseline}.items():
        if classifier is not None and classifier.settings['num_classes'] > 1:
            logits, _, _ = infer(classifier, data.test.images, args.device)  # (N, K)
            p, y = logits.softmax(1).numpy(), data.test.labels.numpy()  # (N, K), (N,)
            auprc = np.mean([average_precision_score(y == k, p[:, k]) for k in np.unique(y)])
            print(f'{name} on the {len(y)} test images: accuracy {(p.argmax(1) == y).mean():.4f}, '
                  f'macro AUPRC {auprc:.4f}')


def print_table(scores, metrics, threshold):
    """One line per set: all metrics of the energy, then the AUROC of the other scores."""
    rejected = {name: (scores[name]['energy'] > threshold).mean() for name in scores}
    others = [score for score in scores['test'] if score != 'energy']
    print(f'{"set":14}{"n":>7}  AUROC of the energy        AUPR   FPR95  rejected  AUROC:', *others)
    for name in metrics:
        row = metrics[name]['energy']
        print(f'{shortened(name, 14):14}{row["n_ood"]:7}  {row["auroc"]:.4f} '
              f'[{row["auroc_low"]:.4f}, {row["auroc_high"]:.4f}] {row["aupr"]:7.4f}'
              f'{row["fpr95"]:8.4f}{rejected[name]:10.4f}        ',
              *[f'{metrics[name][score]["auroc"]:{len(score)}.4f}' for score in others])
    print(f'rejected: energy above {threshold:.6g}, which keeps {KEEP:.0%} of the validation data '
          f'and rejects {rejected["test"]:.1%} of the {len(scores["test"]["energy"])} test images')


@contextlib.contextmanager
def panels(titles, path, xlabel, ylabel):
    """Gives axes, one for each of `titles`, and afterwards writes them as the PNG `path`."""
    from matplotlib.figure import Figure  # slow to import
    columns = min(len(titles), 4)
    rows = -(-len(titles) // columns)  # rounded up
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout='constrained')
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(titles))]
    yield axes
    for ax, title in zip(axes, titles):
        ax.set_title(shortened(title, 32), parse_math=False)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.locator_params(axis='x', nbins=5)
        ax.legend(fontsize=7)
    save_figure(figure, path)


def plot_histograms(scores, metrics, threshold, path):
    """ood.png, after Fig. 2 of the sheet: E(x) of the test images and of each OOD set."""
    with panels(list(metrics), path, 'energy E(x)', 'density') as axes:
        for ax, name in zip(axes, metrics):
            test, ood = scores['test']['energy'], scores[name]['energy']  # (n_id,), (n_ood,)
            bins = np.histogram_bin_edges(np.concatenate([test, ood]), 60)
            ax.hist(test, bins, density=True, alpha=.6, label='test (in-distribution)')
            ax.hist(ood, bins, density=True, alpha=.6, label='OOD')
            ax.axvline(threshold, color='black', linestyle=':',
                       label=f'threshold: rejects {(ood > threshold).mean():.1%}')


def plot_roc(scores, metrics, path):
    """roc.png: the ROC curves of all scores, a panel for each OOD set."""
    from sklearn.metrics import roc_curve
    with panels(list(metrics), path, 'false-positive rate', 'true-positive rate') as axes:
        for ax, name in zip(axes, metrics):
            for score, row in metrics[name].items():
                labels = np.repeat([0, 1], [row['n_id'], row['n_ood']])  # (n_id + n_ood,)
                both = np.concatenate([scores['test'][score], scores[name][score]])
                false_positive, true_positive, _ = roc_curve(labels, both)  # (R,) both
                ax.plot(false_positive, true_positive, label=f'{score} {row["auroc"]:.3f}')


def show_typical(images, scores, path):
    """typical.png: of each set image 0, and the five images of lowest and of highest energy."""
    picked, captions = [], []
    for name in images:
        energy = scores[name]['energy']  # (N,)
        order = np.argsort(energy, kind='stable')  # (N,)
        index = np.r_[0, np.resize(order[:5], 5), np.resize(order[-5:], 5)]  # (11,), may repeat
        picked.append(to_float(images[name][index]))  # (11, C, H, W)
        captions += [f'{e:.2f}' for e in energy[index]]
    save_grid(torch.cat(picked), path, 11, rows=list(images), captions=captions,
              title='image 0 of each set, then the five images of lowest and of highest E(x)')


# --- a threshold, and verdicts on single images ---------------------------------------------------

def find_threshold(model, data, device):
    """The lowest energy that keeps 95 % of the validation images: above it, an image is OOD."""
    _, energy, _ = infer(model, data.val.images, device)  # (N,)
    return float(np.quantile(energy, KEEP, method='inverted_cdf'))


def check(model, class_names, data, args):
    """check.csv: file, energy, verdict, class and confidence max softmax f of images at --check."""
    threshold = find_threshold(model, data, args.device)
    channels, size = data.test.images.shape[1:3]
    rows, errors = [], []
    for file in find_images(args.check) if args.check.is_dir() else [args.check]:
        try:
            images, names = load_images(file, size, channels)  # uint8 (N, C, H, W)
        except DataError as error:
            rows.append({'file': printable(file), 'verdict': 'unreadable'})
            errors.append(error)
            continue
        logits, energy, _ = infer(model, images, args.device)  # (N, K), (N,)
        for name, f, e in zip(names, logits, energy):
            verdict = 'OOD' if e > threshold or e.isnan() else 'in-distribution'
            row = {'file': name, 'energy': f'{e:.6g}', 'verdict': verdict}
            if class_names:  # a plain EBM has none
                row['class'] = class_names[f.argmax()]
                row['confidence'] = f'{f.softmax(0).max():.6g}'
            rows.append(row)
    if len(errors) == len(rows):
        raise errors[0]
    write_csv(rows, ['file', 'energy', 'verdict', 'class', 'confidence'], args.out / 'check.csv')
    for row in rows[:20]:
        print(*row.values(), sep='  ')
    known = [row['verdict'] for row in rows if 'energy' in row]
    print(f'{known.count("OOD")} of {len(known)} are OOD (energy above {threshold:.6g}); '
          f'{args.out}/check.csv')
    if errors:
        fail(f'--check: {len(errors)} unreadable, the first of them {errors[0]}')


# --- trust: calibration and robustness ------------------------------------------------------------

# Radii in units of pixels from 0 to 1, as papers give them; from -1 to 1 they are twice as long.
RADII = {'Linf': [.01, .03, .1, .2], 'L2': [.25, .5, 1., 2.]}
PGD_STEPS, EOT_DRAWS, DEFENCE_STEPS, DISTAL_STEPS = 20, 4, 5, 500


def fit_temperature(logits, labels):
    """The t of softmax(f / t) with the least cross-entropy (Guo et al. 2017), from .01 to 100, on
    validation logits (N, K), labels (N,). With no validation errors the best one is 0."""
    return min(np.geomspace(.01, 100, 401), key=lambda t: F.cross_entropy(logits / t, labels))


def reliability(logits, labels, bins=15):
    """Are answers with a confidence of 90 % right in 90 % of the cases? Logits (N, K), labels (N,).
    Returns the expected calibration error, ECE = sum_b n_b / N |accuracy_b - confidence_b| over
    bins of equal width (Guo et al. 2017), and confidence and accuracy of the bins in use."""
    confidence, answer = logits.softmax(1).max(1)  # (N, K) -> (N,) both
    at = (confidence * bins).long().clamp_max(bins - 1)  # (N,), the bin of each image
    count = torch.bincount(at, minlength=bins)  # (N,) -> (bins,)
    right = torch.bincount(at, (answer == labels).double(), bins)  # (bins,)
    total = torch.bincount(at, confidence, bins)  # (bins,)
    ece = (right - total).abs().sum().item() / len(labels)
    return ece, (total / count)[count > 0], (right / count)[count > 0]


def calibrate(models, data, args):
    """ECE of softmax(f / t) at t = 1, at the model's T, and at the t fitted: rows of trust.csv."""
    rows = []
    with panels(list(models), args.out / 'calibration.png', 'confidence', 'accuracy') as axes:
        for ax, (name, model) in zip(axes, models.items()):
            logits_val, _, _ = infer(model, data.val.images, args.device)  # (N, K)
            logits, _, _ = infer(model, data.test.images, args.device)  # (N, K)
            fitted = fit_temperature(logits_val, data.val.labels)
            for t in sorted({1., model.temperature, fitted}):
                ece, confidence, accuracy = reliability(logits / t, data.test.labels)
                ax.plot(confidence, accuracy, marker='o', label=f't = {t:.2g}: ECE {ece:.4f}')
                rows.append({'model': name, 'measure': 'ece', 'temperature': t, 'value': ece,
                             'n': len(logits)})
            ax.plot([0, 1], [0, 1], color='grey', linestyle=':')
    return rows


def defend(energy, x, one_step, generator):
    """The lecture's defence: SGLD from x (B, C, H, W), `one_step` holds the settings of a step. The
    result can be differentiated with respect to x, where each clamp counts as the identity (BPDA,
    Athalye et al. 2018). Pixels at the clamp have zero gradient and would never move."""
    for _ in range(DEFENCE_STEPS):
        x = sgld(energy, x, generator=generator, clamp=None, differentiable=True, **one_step)
        x = x + (x.clamp(-1, 1) - x).detach()  # the value of the clamp, the gradient of x
    return x


def attack_gradient(model, x, y, defence, generator):
    """The gradient, (B, C, H, W), of the margin max_{c != y} f(x)[c] - f(x)[y] (Carlini and Wagner
    2017) for x (B, C, H, W) and labels y (B,); the gradient of a sure cross-entropy would be 0. A
    `defence` (or None) draws noise: the mean over EOT_DRAWS runs (Athalye et al. 2018)."""
    x = x.detach().requires_grad_()
    gradients = []
    for _ in range(EOT_DRAWS if defence else 1):
        moved = defend(model.energy, x, defence, generator) if defence else x
        logits = model.get_logits(moved)  # (B, K)
        others = logits.scatter(1, y[:, None], -torch.inf)  # (B, K), all classes but y
        margin = others.amax(1) - logits.gather(1, y[:, None]).squeeze(1)  # (B, K) -> (B,)
        gradients += torch.autograd.grad(margin.sum(), x)  # (B, C, H, W)
    return torch.stack(gradients).mean(0)


def pgd(model, x, y, norm, radius, defence, generator):
    """Projected gradient descent (Madry et al. 2018) in the ball of `radius` around x, in [-1, 1]:
    images (B, C, H, W). One start, last iterate: accuracies found are upper bounds."""
    def length(delta):
        return delta.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-12)  # (B, 1, 1, 1)

    def project(delta):
        if norm == 'Linf':
            return (x + delta.clamp(-radius, radius)).clamp(-1, 1)
        return (x + delta * (radius / length(delta)).clamp_max(1)).clamp(-1, 1)

    moved = project(radius * torch.randn(x.shape, generator=generator, device=x.device))
    for _ in range(PGD_STEPS):
        gradient = attack_gradient(model, moved, y, defence, generator)
        direction = gradient.sign() if norm == 'Linf' else gradient / length(gradient)
        moved = project(moved - x + 2.5 * radius / PGD_STEPS * direction)
    return moved


def attack(victims, data, args):
    """Accuracy under attack of `victims`, {name: (model, defence or None)}: rows of trust.csv."""
    seeded = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(data.test), generator=seeded)[:args.trust]
    batches = [data.test.to(args.device).batch(index) for index in order.split(BATCH)]
    generator = torch.Generator(args.device).manual_seed(args.seed)
    path, rows = args.out / 'robustness.png', []
    with panels(list(RADII), path, 'radius (pixels from 0 to 1)', 'accuracy under PGD') as axes:
        for name, (model, defence) in victims.items():
            for ax, norm in zip(axes, RADII):
                accuracy = []
                for radius in tqdm([0, *RADII[norm]], f'PGD, {norm}, on {name}', unit='radius'):
                    found = []  # attacks through the defence and past it: the stronger counts
                    for attacked in ([defence, None] if defence and radius else [None]):
                        right = []
                        for x, y in batches:  # (B, C, H, W), (B,)
                            if radius:
                                x = pgd(model, x, y, norm, 2 * radius, attacked, generator)
                            x = defend(model.energy, x, defence, generator) if defence else x
                            right.append(model.get_logits(x.detach()).argmax(1) == y)  # (B,)
                        found.append(torch.cat(right).float().mean().item())
                    accuracy.append(min(found))
                    rows.append({'model': name, 'measure': 'accuracy', 'norm': norm,
                                 'radius': radius, 'value': accuracy[-1], 'n': len(order)})
                ax.plot([0, *RADII[norm]], accuracy, marker='o', label=name)
    return rows


def show_distal(models, data, args):
    """distal.png: uniform noise driven to softmax f(x)[c] >= .9 by gradient ascent, a column
    per class c (JEM, section 5.4): what a model takes for a c, far from the data."""
    heads = data.class_names[:10]
    labels = torch.arange(len(heads), device=args.device)[:, None]  # (R, 1)
    pictures, captions = [], []
    for name, model in models.items():
        generator = torch.Generator(args.device).manual_seed(args.seed)  # the same noise for all
        x = prior('uniform', (len(heads), *data.test.images.shape[1:]), generator, args.device)
        for _ in tqdm(range(DISTAL_STEPS), f'distal adversaries of {name}', unit='step'):
            log_p = model.get_logits(x.requires_grad_()).log_softmax(1).gather(1, labels)  # (R, 1)
            gradient, = torch.autograd.grad(log_p.sum(), x)  # (R, C, H, W)
            size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()  # (R, 1, 1, 1)
            unsure = (log_p < np.log(.9))[..., None, None]  # (R, 1) -> (R, 1, 1, 1)
            x = (x.detach() + unsure * .02 * gradient / size.clamp_min(1e-12)).clamp(-1, 1)
        p = model.get_logits(x).softmax(1).gather(1, labels)  # (R, K) -> (R, 1)
        captions += [f'p {value:.2f}' for value in p.flatten().tolist()]
        pictures.append(x)
    save_grid(torch.cat(pictures), args.out / 'distal.png', len(heads), rows=list(models),
              title='noise driven to softmax f(x)[c] of .9', heads=heads, captions=captions)


def trust(model, baseline, checkpoint, data, args):
    """Calibration, distal adversaries and robustness of the model and of the baseline, if any."""
    first = 'JEM' if checkpoint['args']['px_weight'] else 'classifier'
    models = {first: model} if baseline is None else {first: model, 'plain': baseline}
    rows = calibrate(models, data, args)
    show_distal(models, data, args)
    victims = {name: (victim, None) for name, victim in models.items()}
    defence = chain_settings(checkpoint['sampler'], 'training', steps=1)  # DEFENCE_STEPS times
    victims[f'{first} after {DEFENCE_STEPS} SGLD steps'] = model, defence
    rows += attack(victims, data, args)
    write_csv(rows, 'model measure temperature norm radius value n'.split(), args.out / 'trust.csv')


def load_baseline(args, checkpoint):
    """The plain classifier of --baseline. Its seed must be the same, too: another seed splits some
    data sets differently, and the test images would be among its training images."""
    baseline, plain = load_model(args.baseline, args.device, args.precision)
    flags, size = checkpoint['args'], checkpoint['data']['image_shape'][2]
    same_data = plain['data'] == checkpoint['data'] and plain['args']['seed'] == flags['seed']
    if plain['args']['px_weight'] or not same_data:
        fail(f'--baseline {args.baseline}: no plain classifier of these data; train one with '
             f'--px-weight 0 --data {flags["data"]} --image-size {size} --seed {flags["seed"]}')
    return baseline


def load_sets(args, data):
    """The OOD sets, {name: uint8 (N, C, H, W)}. A path goes by its stem or, where that name is
    taken, by the path as given, or by the whole path."""
    sets = {}
    for name in dict.fromkeys(args.ood or ood_names(data, args.data, args.data_root)):
        for key in (Path(name).stem or name, name, Path(name).resolve()):
            if printable(key) not in ('test', *sets):  # test is the in-distribution set
                sets[printable(key)] = load_ood(name, data, args.seed, args.data_root)
                break
    return sets


def main(argv=None):
    with user_mistakes(DataError):
        args = parse_args(argv)
        model, checkpoint = load_model(args.ckpt, args.device, args.precision)
        args.data = args.data or checkpoint['args']['data']
        args.data_root = args.data_root or checkpoint['args']['data_root']
        if args.trust and not checkpoint['class_names']:
            fail(f'--trust: {args.ckpt} is a plain EBM without p(y|x); leave the flag out')
        check_apart(args.out, args.data, *args.ood or [])
        data = load_data(args.data, data_root=args.data_root, seed=checkpoint['args']['seed'],
                         like=checkpoint['data'])
        if args.check:
            return check(model, checkpoint['class_names'], data, args)
        baseline = load_baseline(args, checkpoint) if args.baseline else None
        report(model, baseline, data, load_sets(args, data), args)
        if args.trust:
            trust(model, baseline, checkpoint, data, args)


if __name__ == '__main__':
    main()

"""Tell in-distribution from out-of-distribution (OOD) inputs by a trained energy (course task 3.6).

    python ood.py --ckpt best.pt                      all the OOD sets that the data have, noise and digits
    python ood.py --ckpt best.pt --ood ligatures      one of them

The test split of the checkpoint's own data is in-distribution, label 0; OOD is label 1, and a score is higher for what is
more OOD. The score is the energy E(x) itself. Prints a table and writes ood.csv and ood.png (histograms) into --out.
"""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from tqdm import tqdm

from data import DataError, load_data, load_ood, save_figure, to_float, write_csv
from model import CheckpointError, CommandLine, folder, load_model, mistakes_told

COLUMNS = ['set', 'score', 'auroc', 'auroc_low', 'auroc_high', 'aupr', 'fpr95', 'n_id', 'n_ood']


@torch.no_grad()
def energies(model, images, device):
    """E(x) of uint8 images (N, C, H, W), as float32 numpy (N,)."""
    energy = torch.cat([model.energy(to_float(part.to(device))) for part in images.split(500)]).cpu().numpy()  # (N,)
    if not np.isfinite(energy).all():
        raise CheckpointError('--ckpt: its energies are not finite; the training diverged, train anew with a lower --lr')
    return energy


def detection(score_id, score_ood, seed=0, resamples=200):
    """How well a score tells OOD (label 1) from in-distribution (label 0) inputs.

    Returns:
        AUROC with its 95 % bootstrap interval (both sets resampled with replacement), the area under the
        precision-recall curve with OOD as the positive class, and the false-positive rate at the first threshold that
        finds at least 95 % of the OOD inputs.
    """
    labels = np.repeat([0, 1], [len(score_id), len(score_ood)])  # (n_id + n_ood,)
    scores = np.concatenate([score_id, score_ood])
    random = np.random.default_rng(seed)
    draws = [roc_auc_score(labels, np.concatenate([random.choice(score_id, len(score_id)),
                                                   random.choice(score_ood, len(score_ood))])) for _ in range(resamples)]
    false_positive, true_positive, _ = roc_curve(labels, scores, drop_intermediate=False)
    low, high = np.quantile(draws, [.025, .975])
    return {'auroc': roc_auc_score(labels, scores), 'auroc_low': low, 'auroc_high': high,
            'aupr': average_precision_score(labels, scores), 'fpr95': false_positive[np.argmax(true_positive >= .95)],
            'n_id': len(score_id), 'n_ood': len(score_ood)}


def plot_histograms(energy_id, energy_ood, rows, path):
    """ood.png: for each set the histograms of E(x) of the test images and of the OOD images, on one axis."""
    count = len(energy_ood)
    columns = min(count, 3)
    figure, axes = plt.subplots(-(-count // columns), columns, figsize=(4.2 * columns, 3 * -(-count // columns)),
                                squeeze=False, layout='constrained')
    for ax in axes.flat[count:]:
        ax.remove()
    for ax, (name, energy), row in zip(axes.flat, energy_ood.items(), rows):
        bins = np.histogram_bin_edges(np.concatenate([energy_id, energy]), 60)
        ax.hist(energy_id, bins, density=True, alpha=.6, label='test (in-distribution)')
        ax.hist(energy, bins, density=True, alpha=.6, label=f'{name} (OOD)')
        ax.set(title=f'{name}: AUROC {row["auroc"]:.4f}', xlabel='energy E(x)', yticks=[])
        ax.legend(fontsize=8)
    save_figure(figure, path)


def print_table(rows):
    """The rows of ood.csv on the screen."""
    print(f'{"set":<14}{"AUROC":>8}  {"95 % interval":<17}{"AUPR":>8}{"FPR95":>8}{"n id":>7}{"n OOD":>7}')
    for row in rows:
        print(f'{row["set"]:<14}{row["auroc"]:8.4f}  {row["auroc_low"]:.4f} to {row["auroc_high"]:.4f} {row["aupr"]:8.4f}'
              f'{row["fpr95"]:8.4f}{row["n_id"]:7d}{row["n_ood"]:7d}')


def parse_args(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument('--ckpt', type=Path, required=True, help='checkpoint written by train.py')
    parser.add_argument('--ood', nargs='+', metavar='NAME', help='OOD sets, see data.py; the default is all there are')
    parser.add_argument('--data', help='the checkpoint\'s data, where they lie elsewhere now')
    parser.add_argument('--data-root', type=Path, help='folder of downloads and of rendered letterpress, as in the training')
    parser.add_argument('--out', type=folder, default='.', help='folder to write into')
    parser.add_shared_arguments()
    return parser.parse_args(argv)


def load_checked(args, checkpoint):
    """The data that the checkpoint was trained on, checked for being those."""
    name = args.data or checkpoint['data']
    trained = checkpoint['args']
    data = load_data(name, checkpoint['image_size'], args.data_root or trained['data_root'], trained['seed'])
    if (data.test.images.shape[1] != checkpoint['settings']['channels']
            or checkpoint['class_names'] not in ([], data.class_names)):
        raise DataError(f'--data {name}: its channels or classes are not those that {args.ckpt} was trained on; '
                        'name the data of the training')
    return data


def main(argv=None):
    args = parse_args(argv)
    with mistakes_told(DataError):
        model, checkpoint = load_model(args.ckpt, args.device, args.precision)
        data = load_checked(args, checkpoint)
        names = args.ood or [*data.ood, 'noise', *(['digits'] if checkpoint['data'] != 'digits' else [])]
        sets = {name: load_ood(name, data, args.seed) for name in names}
        energy_id = energies(model, data.test.images, args.device)
        energy_ood, rows = {}, []
        for name, images in tqdm(sets.items(), 'OOD sets', unit='set'):
            energy_ood[name] = energies(model, images, args.device)
            rows.append({'set': name, 'score': 'energy', **detection(energy_id, energy_ood[name], args.seed)})
        print_table(rows)
        write_csv(rows, COLUMNS, args.out / 'ood.csv')
        plot_histograms(energy_id, energy_ood, rows, args.out / 'ood.png')


if __name__ == '__main__':
    main()

"""Change a line, predict, run, see: the experiments of .github/EXPERIMENTS.md.

    python tests/experiments.py --out runs/experiments             all of them, some hours
    python tests/experiments.py --out runs/experiments --only TEXT     those named like TEXT
    python tests/experiments.py --out runs/seed1 --seed 1          with another seed
    python tests/experiments.py --out runs/few --data letterpress --epochs 2 --only 'a class'
    python tests/experiments.py --out runs --draw runs/experiments runs/seed1 runs/few

Each experiment is a copy of the project in --out, changed by a few lines at most, and trained with
its flags. A row of the table is what it came to; rows that --out already has are not run again.
--draw runs nothing: labels.png and losses.png show experiments 12 and 11 in these folders."""
import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from data import load_data, save_figure  # noqa: E402
from model import load_model  # noqa: E402

JUDGE = ['--px-weight', '0', '--width', '48']
PLAIN = ('--matching 0 --step-size 10 --noise .005 --data-noise .005 --grad-clip .03 '
         '--prior uniform --no-conditional --no-guard')
UPHILL = 'sampler.py', 'x = x - step_size * gradient', 'x = x + step_size * gradient'


def loss(lines):
    """Other lines for the body of pyx_step."""
    return 'train.py', '    return F.cross_entropy(logits, y)\n', lines


ENERGY = loss("""
    return F.nll_loss(logits, y)
"""[1:])
PERCEPTRON = loss("""
    return F.nll_loss(logits - logits.amax(1, keepdim=True), y)
"""[1:])
HINGE = loss("""
    right = logits.gather(1, y[:, None])  # -E(x, y), (B, 1)
    wrong = logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)  # (B, 1)
    return F.relu(1 + wrong - right).mean()
"""[1:])


def few(labels):
    """So many images a class keep their labels; nothing else in train.py uses one."""
    choose = f"""  # all the rest
    order = torch.randperm(len(split), generator=generator, device=device)  # (N,)
    labelled = torch.cat([order[split.labels[order] == k][:{labels}] for k in range(num_classes)])
"""
    learn = """
                few = torch.randint(len(labelled), y.shape, generator=generator, device=device)
                x_few, y_few = split.batch(labelled[few])  # (B, C, H, W), (B,)
                loss_pyx = pyx_step(model.get_logits(perturb(x_few, args, generator)), y_few)
"""
    return [('train.py', '  # all the rest\n', choose),
            ('train.py', '\n                loss_pyx = pyx_step(logits, y)\n', learn),
            ('train.py', 'for k in range(logits.shape[1]) if args.px_weight else []:',
             'for k in []:')]


# After `few`, with chains that follow E(x, y): y is a label drawn from p(y|x).
DRAWN = [('train.py', '\n                loss = args.pyx_weight * loss_pyx\n', """
                y = logits.softmax(1).multinomial(1, generator=generator).squeeze(1)  # (B,)
                loss = args.pyx_weight * loss_pyx
"""), ('train.py', 'reservoir.draw(ring[index], generator)', 'reservoir.draw(y, generator)')]

EXPERIMENTS = {  # name: flags of train.py, and what changes: file, old text, new text
    'default': ('', []),
    'K = 1': ('--sgld-steps 1', []),
    'K = 5': ('--sgld-steps 5', []),
    'K = 100': ('--sgld-steps 100', []),
    'no reservoir': ('--init noise', []),
    'no L2 term': ('--alpha 0', []),
    'ReLU': ('', [('model.py', 'nn.SiLU()', 'nn.ReLU()')]),
    'no noise': ('--noise 0', []),
    'chains uphill': ('', [UPHILL]),
    'uphill, no matching': ('--matching 0', [UPHILL]),
    'E(x), not E(x, y)': ('--no-conditional', []),
    'no contrast': ('--contrast 0', []),
    'no matching': ('--matching 0', []),
    'the plain recipe': (PLAIN, []),
    'hot chains': ('--noise .2', []),
    'cross-entropy alone': ('--px-weight 0', []),
    'energy loss': ('', [ENERGY]),
    'perceptron loss': ('', [PERCEPTRON]),
    'hinge loss': ('', [HINGE]),
    'energy loss alone': ('--px-weight 0', [ENERGY]),
    'perceptron loss alone': ('--px-weight 0', [PERCEPTRON]),
    'hinge loss alone': ('--px-weight 0', [HINGE]),
}
for labels in (1, 5, 10, 50):
    EXPERIMENTS |= {
        f'{labels} a class, no p(x)': ('--px-weight 0', few(labels)),
        f'{labels} a class, E(x)': ('--no-conditional', few(labels)),
        f'{labels} a class, E(x), no contrast': ('--no-conditional --contrast 0', few(labels)),
        f'{labels} a class, drawn labels': ('', few(labels) + DRAWN),
        f'{labels} a class, drawn labels, no contrast': ('--contrast 0', few(labels) + DRAWN),
    }
EXPERIMENTS |= {'a third of the updates annealed': ('--anneal-every 3', []),
                'all chains annealed': ('--anneal-every 1', [])}
ALONE = [name for name in EXPERIMENTS if name.endswith(' alone')]  # the losses without p(x)
COLUMNS = ['experiment', 'seconds', 'accuracy', 'test', 'loss_px', 'agreement', 'distinct',
           'frechet', 'flipped', 'blurred', 'noise', 'ece']


def run(folder, *command):
    """Run a script of the copy in `folder`; returns False if it ends with an error."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with open(folder / 'output.txt', 'a') as output:
        return subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment,
                              stdout=output, stderr=output).returncode == 0


def replaced(text, old, new):
    """The text with `new` for `old`, everywhere where it occurs."""
    if old not in text:
        raise ValueError(f'no line with {old!r}')
    return text.replace(old, new)


def copy(folder, changes):
    """A copy of the six scripts with these changes."""
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    folder.mkdir(parents=True)
    for script in ROOT.glob('*.py'):
        shutil.copy(script, folder)
    for file, old, new in changes:
        (folder / file).write_text(replaced((folder / file).read_text(), old, new))


def rows_of(path):
    return list(csv.DictReader(path.open()))


def folder_of(out, name):
    """The copy of an experiment."""
    return out / f'{list(EXPERIMENTS).index(name):02d}'


def experiment(name, folder, judge, train):
    flags, changes = EXPERIMENTS[name]
    copy(folder, changes)
    start = time.monotonic()
    done = run(folder, *train, *flags.split())
    row = {'experiment': name, 'seconds': round(time.monotonic() - start)}
    if not done:  # the guard gave up: what is there is the epoch before
        row['experiment'] += ' (stopped)'
    log = rows_of(folder / 'log.csv')[-1]
    row |= {'accuracy': log['val_accuracy'], 'loss_px': log['loss_px']}
    few_labels = 'a class' in name
    if '--px-weight 0' not in flags and not few_labels:
        run(folder, 'generate.py', '--ckpt', 'best.pt', '--mode', 'samples', '--device', 'cpu')
        if name == 'ReLU':  # this network cannot load the judge, so it needs its own
            judge = folder / 'judge'
            run(folder, *train, *JUDGE, '--out', 'judge')
        run(folder, 'generate.py', '--ckpt', 'best.pt', '--mode', 'evaluate', '--judge',
            judge / 'best.pt', '--device', 'cpu')
        scores = rows_of(folder / 'evaluate.csv')[-1]
        row |= {key: scores[key] for key in ('agreement', 'distinct', 'frechet')}
    # With few labels no validation score may choose the epoch, so the last one counts.
    # The calibration error matters to the losses only, and --trust takes longer than the rest.
    losses = 'loss' in name or name in ('default', 'cross-entropy alone')
    trust = ['--trust', '1'] if losses else []
    run(folder, 'ood.py', '--ckpt', 'last.pt' if few_labels else 'best.pt', '--ood', 'flipped',
        'blurred', 'noise', *trust, '--device', 'cpu')
    printed = (folder / 'output.txt').read_text()
    row['test'] = re.search(r'test images: accuracy (\S+),', printed).group(1)
    for score in rows_of(folder / 'ood.csv'):
        if score['score'] == 'energy' and score['set'] in COLUMNS:
            row[score['set']] = score['auroc']
    for score in rows_of(folder / 'trust.csv') if trust else []:
        if score['measure'] == 'ece' and float(score['temperature']) == 1:
            row['ece'] = score['value']
    return row


def few_label_scores(folders):
    """{data set: {kind of run: {labels a class: test accuracies of the folders}}}"""
    scores = {}
    for folder in folders:
        data, epochs = re.search(r'--data (.*) --data-root .* --epochs (\d+)',
                                 (folder / 'judge/done').read_text()).groups()
        for row in rows_of(folder / 'experiments.csv'):
            if found := re.fullmatch(r'(\d+) a class, (.*?)(?: \(stopped\))?', row['experiment']):
                kinds = scores.setdefault(f'{Path(data).name}, --epochs {epochs}', {})
                runs = kinds.setdefault(found[2], {})
                runs.setdefault(int(found[1]), []).append(float(row['test']))
    return scores


def draw_labels(scores, path):
    """Accuracy against labels a class, mean and range over the seeds, a panel for a data set."""
    figure = Figure(figsize=(4 * len(scores), 3.6), layout='constrained')
    names = list(dict.fromkeys(kind for kinds in scores.values() for kind in kinds))
    drawn = {}
    for ax, (data, kinds) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items()):
        for kind, runs in kinds.items():
            labels, values = zip(*sorted(runs.items()))
            mean, low, high = np.array([(np.mean(v), min(v), max(v)) for v in values]).T
            colour = f'C{names.index(kind)}'  # the same one in all panels
            drawn[kind] = ax.errorbar(labels, mean, [mean - low, high - mean], color=colour,
                                      marker='o', capsize=3)
        ticks = sorted({labels for runs in kinds.values() for labels in runs})
        ax.set(xscale='log', xticks=ticks, xticklabels=ticks, title=data, ylim=(0, 1),
               xlabel='labels a class', ylabel='test accuracy')
        ax.minorticks_off()
    figure.legend([drawn[kind] for kind in names], [
        kind.replace('no p(x)', 'cross-entropy alone').replace('no contrast', '--contrast 0')
        for kind in names], loc='outside lower center', ncols=len(names))
    save_figure(figure, path)


def right_and_wrong(model, logits, y):
    """E(x, y) of the right and of the most offending wrong answer: (N, K), (N,) -> two of (N,)."""
    wrong = logits.scatter(1, y[:, None], -torch.inf).argmax(1)  # (N,)
    return model.energy_of_logits(logits, y), model.energy_of_logits(logits, wrong)


def draw_losses(folder, path):
    """What each loss does alone, in the last epoch: the energies of `right_and_wrong`."""
    figure = Figure(figsize=(3.2 * len(ALONE), 2.8), layout='constrained')
    for ax, name in zip(figure.subplots(1, len(ALONE)), ALONE):
        run = folder_of(folder, name)
        if not all(new in (run / file).read_text() for file, _, new in EXPERIMENTS[name][1]):
            sys.exit(f'{run}: of another version of experiments.py; run {name!r} again')
        model, checkpoint = load_model(run / 'last.pt')
        args = checkpoint['args']
        data = load_data(args['data'], seed=args['seed'], data_root=args['data_root'],
                         like=checkpoint['data'])
        x, y = data.test.batch(slice(None))  # (N, C, H, W), (N,)
        right, wrong = right_and_wrong(model, model.get_logits(x), y)  # (N,) each
        ax.hist([right.tolist(), wrong.tolist()], 30, label=['right answer', 'best wrong one'])
        ax.set(title=name, xlabel='E(x, y)', yticks=[])
    ax.legend()
    save_figure(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder of copies and table; '
                        'another one for each --data, --epochs and --seed')
    parser.add_argument('--only', default='', help='names that contain this text')
    parser.add_argument('--seed', type=int, default=0, help='of all runs')
    parser.add_argument('--data', default='digits', help='name or whole path of a data set')
    parser.add_argument('--data-root', type=os.path.abspath, default='.data', help='of train.py')
    parser.add_argument('--epochs', type=int, default=15, help='of each run')
    parser.add_argument('--draw', type=Path, nargs='+', help='folders of runs, to draw and not run')
    args = parser.parse_args(argv)
    for folder in args.draw or []:
        if not (folder / 'experiments.csv').exists():
            parser.error(f'--draw {folder}: no experiments.csv; name folders of finished runs')
    if args.draw:
        if scores := few_label_scores(args.draw):
            draw_labels(scores, args.out / 'labels.png')
        for folder in args.draw:  # the first one that has all four
            if {*ALONE} <= {row['experiment'] for row in rows_of(folder / 'experiments.csv')}:
                draw_losses(folder, args.out / 'losses.png')
                break
        return
    out = args.out.resolve()
    judge, table = out / 'judge', out / 'experiments.csv'
    train = ['train.py', '--data', args.data, '--data-root', args.data_root,
             '--epochs', str(args.epochs), '--seed', str(args.seed), '--device', 'cpu',
             '--chains-after', '0', '--anneal-every', '0']
    if not any(args.only in name for name in EXPERIMENTS):
        parser.error(f'--only {args.only}: no such name; choose from {", ".join(EXPERIMENTS)}')
    done = judge / 'done'  # holds the settings of this folder
    if done.exists() and done.read_text() != ' '.join(train):
        parser.error(f'--out {args.out}: holds other runs, {done.read_text()}; name another folder')
    if not done.exists():
        copy(judge, [])
        if not run(judge, *train, *JUDGE):
            sys.exit(f'no judge: see {judge}/output.txt')
        done.write_text(' '.join(train))
    rows = rows_of(table) if table.exists() else []
    known = {row['experiment'].removesuffix(' (stopped)') for row in rows}
    for name in EXPERIMENTS:
        if args.only in name and name not in known:
            rows.append(experiment(name, folder_of(out, name), judge, train))
            with table.open('w', newline='') as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            print(*[f'{key} {value}' for key, value in rows[-1].items()], sep='  ', flush=True)


if __name__ == '__main__':
    main()

"""Change one line, predict, run, see: the experiments of .github/EXPERIMENTS.md on the digits.

    python tests/experiments.py --out runs/experiments            all of them, about 25 minutes
    python tests/experiments.py --out runs/experiments --only K   those whose name contains K

Each experiment is a copy of the project in --out, changed by at most one line, and trained with its
flags. A row of the table is what it came to; rows that --out already has are not run again."""
import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ['train.py', '--data', 'digits', '--epochs', '15', '--device', 'cpu']
JUDGE = [*TRAIN, '--px-weight', '0', '--width', '48']
PLAIN = ('--matching 0 --step-size 10 --noise .005 --data-noise .005 --grad-clip .03 '
         '--prior uniform --no-conditional --no-guard')
UPHILL = 'sampler.py', 'x = x - step_size * gradient', 'x = x + step_size * gradient'
EXPERIMENTS = {  # name: flags of train.py, and the changed line: file, old text, new text
    'default': ('', ()),
    'K = 1': ('--sgld-steps 1', ()),
    'K = 5': ('--sgld-steps 5', ()),
    'K = 100': ('--sgld-steps 100', ()),
    'no reservoir': ('--init noise', ()),
    'no L2 term': ('--alpha 0', ()),
    'ReLU': ('', ('model.py', 'nn.SiLU()', 'nn.ReLU()')),
    'no noise': ('--noise 0', ()),
    'chains uphill': ('', UPHILL),
    'uphill, no matching': ('--matching 0', UPHILL),
    'E(x), not E(x, y)': ('--no-conditional', ()),
    'no contrast': ('--contrast 0', ()),
    'no matching': ('--matching 0', ()),
    'the plain recipe': (PLAIN, ()),
    'hot chains': ('--noise .2', ()),
    'cross-entropy alone': ('--px-weight 0', ()),
}
COLUMNS = ['experiment', 'seconds', 'accuracy', 'loss_px', 'agreement', 'distinct', 'frechet',
           'flipped', 'blurred', 'noise']


def run(folder, *command):
    """Run a script of the copy in `folder`; returns False if it ends with an error."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with open(folder / 'output.txt', 'a') as output:
        return subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment,
                              stdout=output, stderr=output).returncode == 0


def copy(folder, change):
    """A copy of the six scripts with one line changed, everywhere in its file where it occurs."""
    folder.mkdir(parents=True)
    for script in ROOT.glob('*.py'):
        shutil.copy(script, folder)
    if change:
        file, old, new = change
        text = (folder / file).read_text()
        if old not in text:
            sys.exit(f'{file}: no line with {old!r}')
        (folder / file).write_text(text.replace(old, new))


def last_row(path):
    return list(csv.DictReader(path.open()))[-1]


def experiment(name, folder, judge):
    flags, change = EXPERIMENTS[name]
    copy(folder, change)
    start = time.monotonic()
    done = run(folder, *TRAIN, *flags.split())
    row = {'experiment': name, 'seconds': round(time.monotonic() - start)}
    if not done:  # the guard gave up: what is there is the epoch before
        row['experiment'] += ' (stopped)'
    log = last_row(folder / 'log.csv')
    row |= {'accuracy': log['val_accuracy'], 'loss_px': log['loss_px']}
    if name != 'cross-entropy alone':
        run(folder, 'generate.py', '--ckpt', 'best.pt', '--mode', 'samples', '--device', 'cpu')
        if change[:1] == ('model.py',):  # this network cannot load the judge, so it needs its own
            judge = folder / 'judge'
            run(folder, *JUDGE, '--out', 'judge')
        run(folder, 'generate.py', '--ckpt', 'best.pt', '--mode', 'evaluate', '--judge',
            judge / 'best.pt', '--device', 'cpu')
        scores = last_row(folder / 'evaluate.csv')
        row |= {key: scores[key] for key in ('agreement', 'distinct', 'frechet')}
    run(folder, 'ood.py', '--ckpt', 'best.pt', '--ood', 'flipped', 'blurred', 'noise',
        '--device', 'cpu')
    for score in csv.DictReader((folder / 'ood.csv').open()):
        if score['score'] == 'energy' and score['set'] in COLUMNS:
            row[score['set']] = score['auroc']
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder for copies and table')
    parser.add_argument('--only', default='', help='names that contain this text')
    args = parser.parse_args()
    out = args.out.resolve()
    judge, table = out / 'judge', out / 'experiments.csv'
    if not judge.exists():
        copy(judge, ())
        run(judge, *JUDGE)
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    known = {row['experiment'].removesuffix(' (stopped)') for row in rows}
    for number, name in enumerate(EXPERIMENTS):
        if args.only in name and name not in known:
            rows.append(experiment(name, out / f'{number:02d}', judge))
            with table.open('w', newline='') as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            print(*[f'{key} {value}' for key, value in rows[-1].items()], sep='  ', flush=True)


if __name__ == '__main__':
    main()

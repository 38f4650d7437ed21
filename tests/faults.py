"""Break training on purpose and see that nothing is lost. No test of pytest: it takes minutes.

    python tests/faults.py                 all parts
    python tests/faults.py --kills 50      SIGKILLs at random moments; fewer of the other faults
    python tests/faults.py --only disk     one part: kills, writes, disk or cuts

After every fault all files can be read, and the run is resumed. Once finished, its last.pt,
best.pt, logs (but for the column `seconds`) and pictures must be those of an unbroken run, bit by
bit.
Linux only.
"""
import argparse
import contextlib
import csv
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts stand beside this folder

import generate  # noqa: E402
import ood  # noqa: E402
import train  # noqa: E402
from model import load_model  # noqa: E402

EPOCHS = 8
DIGITS = ['--data', 'digits', '--device', 'cpu', '--precision', 'fp32', '--width', '8',
          '--batch-size', '64', '--sgld-steps', '4', '--reservoir', '512', '--picture-every', '4',
          '--epochs', str(EPOCHS)]
LOGS = ['log.csv', 'updates.csv']
LATE = ['matplotlib.figure', 'torch._dynamo', 'torchvision.transforms.v2', 'torchvision.utils',
        'sklearn.metrics']  # what a training imports while it runs, seconds for each process


# --- processes ------------------------------------------------------------------------------------

def run(main, argv, log, prepare):
    torch.set_num_threads(1)
    with open(log, 'w') as sys.stdout, contextlib.redirect_stderr(sys.stdout):
        prepare()
        main([str(word) for word in argv])


def nothing():
    pass


def set_environment(values):
    os.environ.update(values)


def start(main, argv, log, prepare=nothing):
    """A process that calls prepare() and main(argv) and writes all messages to `log`. It is a fork
    of a server that has imported torch and computed nothing: where there is a GPU, a process that
    has used autograd cannot be forked. What it calls is pickled."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['faults', *LATE])
    process = context.Process(target=run, args=(main, argv, log, prepare))
    process.start()
    return process


def finish(main, argv, log, prepare=nothing):
    """The exit status of such a process, and the lines that it wrote."""
    process = start(main, argv, log, prepare)
    process.join()
    return process.exitcode, Path(log).read_text(errors='replace').splitlines()


def training(out):
    """The command that begins the run in `out`, or goes on with it. last.pt is the first file of
    a run, so without it there is no file, and nothing to overwrite."""
    return [*DIGITS, '--out', out, *(['--resume'] if (out / 'last.pt').exists() else [])]


# --- what must hold -------------------------------------------------------------------------------

def unreadable(folder):
    """The files of a run that cannot be read from beginning to end."""
    broken = []
    for path in folder.rglob('[!.]*'):
        try:
            if path.suffix == '.pt':
                load_model(path)
            elif path.suffix == '.png':
                Image.open(path).load()
            elif path.name in LOGS:
                count = [float(row['step']) for row in read_log(path)]
                assert count == sorted(set(count))
        except Exception:
            broken.append(path)
    return broken


def read_log(path):
    """The rows of a log but for the clock."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop('seconds', None)
    return rows


def same(a, b):
    """Whether two checkpoints are equal, bit by bit (NaN is NaN), but for clock and command."""
    if isinstance(a, dict):
        told = {'seconds', 'out', 'resume'}
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - told)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)


def equal(whole, parts):
    """Whether two finished runs are the same run."""
    for name in ('last.pt', 'best.pt'):
        if not same(*(torch.load(run / name, weights_only=True) for run in (whole, parts))):
            return False
    for name in LOGS:
        if read_log(whole / name) != read_log(parts / name):
            return False
    for path in whole.rglob('*.png'):
        if path.read_bytes() != (parts / path.relative_to(whole)).read_bytes():
            return False
    return True


def refused(status, lines, name):
    """Whether a command ended as it must after a mistake of the user's: with status 2 and one
    line, which names the file."""
    return status == 2 and len(lines) == 1 and name in lines[0]


# --- the faults -----------------------------------------------------------------------------------

def endure(folder, count, live):
    """Break a run `count` times, resuming it in between: `live(out)` begins or goes on with the
    run in `out`, breaks it, and returns its exit status. A run that is finished is compared and
    begun anew; after the last fault the run is left in peace to finish."""
    out, broken, finished, unlike = folder / 'run', 0, 0, 0
    with tqdm(total=count, unit='fault') as bar:
        while bar.n < count or out.exists():
            if bar.n < count:
                status = live(out)
            else:
                status = must_be(finish(train.main, training(out), folder / 'log')[0], (0,), folder)
            broken += len(unreadable(out))
            if status:
                bar.update()
            else:
                finished += 1
                unlike += not equal(folder / 'whole', out)
                shutil.rmtree(out)
    return f'{broken} unreadable files', f'{unlike} of {finished} runs differ'


def must_be(status, allowed, folder):
    """Anything but a fault of ours is a mistake in the program."""
    if status not in allowed:
        raise SystemExit(f'exit status {status}: {(folder / "log").read_text()}')
    return status


def kills(folder, count, dice):
    """SIGKILL at random moments."""
    with open(folder / 'whole/log.csv') as file:
        seconds = float(list(csv.DictReader(file))[-1]['seconds'])
    span = 1 + 3 * seconds / EPOCHS  # a life is a start and some one or two epochs

    def live(out):
        process = start(train.main, training(out), folder / 'log')
        process.join(dice.uniform(0, span))
        process.kill()
        process.join()
        return must_be(process.exitcode, (0, -signal.SIGKILL), folder)

    return f'{count} SIGKILLs at random moments', *endure(folder, count, live)


def die_in_a_write(last, after):
    """From now on, SIGKILL before or after the fsync or replace that has the number `last`."""
    calls = itertools.count()

    def deadly(call):
        def inner(*arguments):
            now = next(calls) == last
            if now and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            call(*arguments)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
        return inner

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


def writes(folder, count, dice):
    """SIGKILL inside of a write: before or after a random fsync or replace. A random moment seldom
    falls there."""
    left = 0

    def live(out):
        nonlocal left
        prepare = partial(die_in_a_write, dice.randrange(25), dice.random() < .5)
        status, _ = finish(train.main, training(out), folder / 'log', prepare)
        left += len(list(out.rglob('.*')))
        for path in out.rglob('.*'):
            path.unlink()
        return must_be(status, (0, -signal.SIGKILL), folder)

    found, resumed = endure(folder, count, live)
    return f'{count} SIGKILLs inside of a write', f'{found}, {left} temporary left', resumed


@contextlib.contextmanager
def small_disk(folder, room):
    """Let `folder` have `room` bytes of disk left: on a tmpfs where we may mount one, else by a
    limit on the size of files. Gives what a process must call first, and the kind of disk."""
    content = folder.with_name('content')
    shutil.copytree(folder, content)
    used = sum(4096 + path.stat().st_size for path in content.rglob('*'))
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={used + room}', 'none', folder]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0

    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    prepare = nothing if mounted else limit
    try:
        shutil.copytree(content, folder, dirs_exist_ok=True)
        yield prepare, 'a full disk (tmpfs)' if mounted else 'a limit on the size of files'
        shutil.rmtree(content)
        shutil.copytree(folder, content)
    finally:
        if mounted:
            subprocess.run(['umount', folder])
    shutil.rmtree(folder)
    content.rename(folder)


def disk(folder, count, dice):
    """Disks with too little room for the next files of a run: files that are there stay whole, and
    one line tells the reason."""
    largest, said = (folder / 'whole/last.pt').stat().st_size, set()

    def live(out):
        out.mkdir(exist_ok=True)
        with small_disk(out, dice.randrange(2 * largest)) as (prepare, how):
            status, lines = finish(train.main, training(out), folder / 'log', prepare)
        said.add(how)
        if status and 'cannot be written' not in lines[-1]:
            must_be(status, (), folder)
        return must_be(status, (0, 2), folder)

    found, resumed = endure(folder, count, live)
    return f'{count} times {", ".join(said)}', found, resumed


def cuts(folder, count, dice):
    """Files cut at random lengths: every script that reads them refuses them in one line that
    names the file, and changes nothing."""
    glyphs, out, wrong = folder / 'GLYPHS', folder / 'cut', 0
    glyphs.mkdir()
    for part in ('train', 'val', 'test'):
        with open(glyphs / f'{part}.npy', 'wb') as file:
            np.save(file, np.random.default_rng(0).random((64, 16, 16)))
            np.save(file, np.arange(64) % 4)
    new, whole = folder / 'new', folder / 'whole'
    cases = [('last.pt', train.main, [*DIGITS, '--out', out, '--resume'], whole),
             ('best.pt', generate.main, ['--ckpt', out / 'best.pt', '--out', new], whole),
             ('best.pt', ood.main, ['--ckpt', out / 'best.pt', '--out', new], whole),
             ('train.npy', train.main, ['--data', out, '--out', new], glyphs)]
    for i in range(count):
        name, main, argv, source = cases[i % len(cases)]
        shutil.copytree(source, out)
        os.truncate(out / name, dice.randrange((out / name).stat().st_size))
        before = contents(out)
        told = refused(*finish(main, argv, folder / 'log'), name)
        if not told or new.exists() or contents(out) != before:
            wrong += 1
            tqdm.write(f'{name}: {(folder / "log").read_text()}')
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(out)
    return f'{count} files cut at random lengths', f'{wrong} not refused, or changed', ''


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


PARTS = {'kills': kills, 'writes': writes, 'disk': disk, 'cuts': cuts}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--only', choices=list(PARTS))
    parser.add_argument('--seed', type=int, default=0, help='of the moments, sizes and lengths')
    args = parser.parse_args()
    times = {'kills': args.kills, 'writes': args.kills // 2, 'disk': args.kills // 5,
             'cuts': args.kills}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        began = time.monotonic()
        must_be(finish(train.main, training(folder / 'whole'), folder / 'log')[0], (0,), folder)
        print(f'the unbroken run took {time.monotonic() - began:.0f} s')
        print(f'{"what was done":44}{"what was found":48}and after resuming')
        for name in [args.only] if args.only else PARTS:
            row = PARTS[name](folder, times[name], random.Random(args.seed))
            print('{:44}{:48}{}'.format(*row), flush=True)


if __name__ == '__main__':
    main()

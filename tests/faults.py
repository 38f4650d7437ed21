"""Break training on purpose and see that nothing is lost. Not part of the tests, since it takes minutes:

    python tests/faults.py                  all of it
    python tests/faults.py --kills 50       as many SIGKILLs at random moments, and fewer of the other faults
    python tests/faults.py --only memory    one part: kills, writes, disk, cuts, memory

Every fault ends with a resumed run, whose last.pt, best.pt, log.csv (but for its clock) and pictures must be those of a run
that nothing happened to, bit by bit. Linux only: processes are forked, and their memory is read from /proc.
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
DIGITS = ['--data', 'digits', '--device', 'cpu', '--precision', 'fp32', '--width', '8', '--batch-size', '64',
          '--sgld-steps', '4', '--reservoir', '512', '--picture-every', '4', '--epochs', str(EPOCHS)]


# --- processes ------------------------------------------------------------------------------------------------------------

def start(main, argv, log, prepare=lambda: None):
    """A process that calls main(argv) and writes what it says to `log`: a fork, so that torch need not be imported again."""
    def body():
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever this was started from:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` has it ignored, a background job Ctrl-C
        with open(log, 'w') as sys.stdout, contextlib.redirect_stderr(sys.stdout):
            prepare()
            main([str(word) for word in argv])

    process = multiprocessing.get_context('fork').Process(target=body)
    process.start()
    return process


def finish(main, argv, log, prepare=lambda: None):
    """The exit status of such a process, and the lines it wrote."""
    process = start(main, argv, log, prepare)
    process.join()
    return process.exitcode, Path(log).read_text(errors='replace').splitlines()


def training(out):
    """The command that begins the run in `out`, or goes on with it."""
    return [*DIGITS, '--out', out, *(['--resume'] if (out / 'last.pt').exists() else [])]


# --- what must hold -------------------------------------------------------------------------------------------------------

def unreadable(folder):
    """The files of a run that cannot be read from beginning to end."""
    broken = []
    for path in folder.rglob('[!.]*'):
        try:
            if path.suffix == '.pt':
                load_model(path)
            elif path.suffix == '.png':
                Image.open(path).load()
            elif path.name == 'log.csv':
                assert [row['epoch'] for row in read_log(path)] == [str(i + 1) for i in range(len(read_log(path)))]
        except Exception:
            broken.append(path)
    return broken


def read_log(path):
    """The rows of log.csv but for the clock."""
    with open(path) as file:
        return [{**row, 'seconds': ''} for row in csv.DictReader(file)]


def same(a, b):
    """Whether two checkpoints hold the same but for clock and folder, bit by bit (NaN is NaN)."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in ('seconds', 'out', 'resume'))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b or a != a


def equal(whole, parts):
    """Whether two finished runs are the same run."""
    pictures = [path.relative_to(whole) for path in whole.rglob('*.png')]
    return (all(same(torch.load(whole / name, weights_only=True), torch.load(parts / name, weights_only=True)) for name in ('last.pt', 'best.pt'))
            and read_log(whole / 'log.csv') == read_log(parts / 'log.csv')
            and all((whole / name).read_bytes() == (parts / name).read_bytes() for name in pictures))


def refused(status, lines, name):
    """Whether a command ended as a user's mistake must: with status 2 and one line, which names the file."""
    return status == 2 and len(lines) == 1 and name in lines[0]


# --- the faults -----------------------------------------------------------------------------------------------------------

def endure(folder, count, live):
    """Break a run `count` times, resuming it in between: `live(out)` begins or goes on with the run in `out`, breaks it, and
    returns its exit status. A run that gets through is compared and begun anew; the last one is left in peace to finish."""
    out, broken, finished, unlike = folder / 'run', 0, 0, 0
    with tqdm(total=count, unit='fault') as bar:
        while bar.n < count or out.exists():
            status = live(out) if bar.n < count else finish(train.main, training(out), folder / 'log')[0]
            broken += len(unreadable(out))
            if status:
                bar.update()
            else:
                finished, unlike = finished + 1, unlike + (not equal(folder / 'whole', out))
                shutil.rmtree(out)
    return f'{broken} unreadable files', f'{unlike} of {finished} runs differ'


def must_be(status, allowed, folder):
    """Anything but a fault of ours is a mistake in the program."""
    if status not in allowed:
        raise SystemExit(f'exit status {status}: {(folder / "log").read_text()}')
    return status


def kills(folder, count, dice):
    """SIGKILL at random moments."""
    began = time.monotonic()
    finish(train.main, training(folder / 'whole'), folder / 'log')
    span = 2 * (time.monotonic() - began) / EPOCHS  # a life lasts about an epoch

    def live(out):
        process = start(train.main, training(out), folder / 'log')
        process.join(dice.uniform(0, span))
        process.kill()
        process.join()
        return must_be(process.exitcode, (0, -signal.SIGKILL), folder)

    return f'{count} SIGKILLs at random moments', *endure(folder, count, live)


def writes(folder, count, dice):
    """SIGKILL inside of a write: before or after a random fsync or replace, where a moment drawn at random seldom falls."""
    left = 0

    def live(out):
        nonlocal left
        calls, last, after = itertools.count(), dice.randrange(25), dice.random() < .5

        def deadly(call):
            def inner(*arguments):
                now = next(calls) == last
                if now and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                call(*arguments)
                if now:
                    os.kill(os.getpid(), signal.SIGKILL)
            return inner

        def prepare():
            os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)

        status, _ = finish(train.main, training(out), folder / 'log', prepare)
        left += len(list(out.rglob('.*')))
        for path in out.rglob('.*'):
            path.unlink()
        return must_be(status, (0, -signal.SIGKILL), folder)

    found, resumed = endure(folder, count, live)
    return f'{count} SIGKILLs inside of a write', f'{found}, {left} temporary ones left', resumed


@contextlib.contextmanager
def small_disk(folder, room):
    """Let `folder` have `room` bytes of disk left: on a tmpfs where we may mount one, else by a limit on the size of files.
    Gives what a process must call first, and what kind of disk it is."""
    content = folder.with_name('content')
    shutil.copytree(folder, content)
    used = sum(4096 + path.stat().st_size for path in content.rglob('*'))
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={used + room}', 'none', folder]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        shutil.copytree(content, folder, dirs_exist_ok=True)
        yield (lambda: mounted or resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY)),
               'a full disk (tmpfs)' if mounted else 'a limit on the size of files')
        shutil.rmtree(content)
        shutil.copytree(folder, content)
    finally:
        if mounted:
            subprocess.run(['umount', folder])
    shutil.rmtree(folder)
    content.rename(folder)


def disk(folder, count, dice):
    """Disks with too little room for the run's next files: those that are there stay whole, and one line is said."""
    largest, said = (folder / 'whole/last.pt').stat().st_size, set()

    def live(out):
        out.mkdir(exist_ok=True)
        with small_disk(out, dice.randrange(2 * largest)) as (prepare, how):
            status, lines = finish(train.main, training(out), folder / 'log', prepare)
        said.add(how)
        if status and ('cannot be written' not in lines[-1] or any('Traceback' in line for line in lines)):
            must_be(status, (), folder)
        return must_be(status, (0, 2), folder)

    found, resumed = endure(folder, count, live)
    return f'{count} times {", ".join(said)}', found, resumed


def cuts(folder, count, dice):
    """Files cut at random lengths: refused in one line that names them, by every script that reads them."""
    glyphs, out, wrong = folder / 'GLYPHS', folder / 'cut', 0
    glyphs.mkdir()
    for part in ('train', 'val', 'test'):
        with open(glyphs / f'{part}.npy', 'wb') as file:
            np.save(file, np.random.default_rng(0).random((64, 16, 16)))
            np.save(file, np.arange(64) % 4)
    cases = [('last.pt', train.main, [*DIGITS, '--out', out, '--resume'], folder / 'whole'),
             ('best.pt', generate.main, ['--ckpt', out / 'best.pt', '--out', folder / 'new'], folder / 'whole'),
             ('best.pt', ood.main, ['--ckpt', out / 'best.pt', '--out', folder / 'new'], folder / 'whole'),
             ('train.npy', train.main, ['--data', out, '--out', folder / 'new'], glyphs)]
    for i in range(count):
        name, main, argv, source = cases[i % len(cases)]
        shutil.copytree(source, out)
        os.truncate(out / name, dice.randrange((out / name).stat().st_size))
        before = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
        wrong += not refused(*finish(main, argv, folder / 'log'), name) or (folder / 'new').exists()
        wrong += before != {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
        shutil.rmtree(out)
    return f'{count} files cut at random lengths', f'{wrong} not refused in one line, or changed', ''


# --- memory ---------------------------------------------------------------------------------------------------------------

def resident(argv, updates):
    """Run train.py and look every moment at the MiB it holds: {updates so far: their median until the next row of log.csv}.
    The median leaves out the moments in which last.pt is put together in memory, once more as large as what it holds."""
    seen, step = {}, 0
    with tempfile.TemporaryDirectory() as out:
        process = subprocess.Popen([sys.executable, train.__file__, *argv, '--out', out], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and step < updates:
            time.sleep(.05)
            with contextlib.suppress(OSError, IndexError):
                step = int(read_log(Path(out, 'log.csv'))[-1]['step'])
                pages = int(Path(f'/proc/{process.pid}/statm').read_text().split()[1])
                seen.setdefault(step, []).append(pages * os.sysconf('SC_PAGE_SIZE') / 2 ** 20)
        process.kill()
        process.wait()
    return {step: np.median(held) for step, held in list(seen.items())[:-1]}  # without the row that ended it


def predicted(size, slots, width, batch=64):
    """MiB of one run on digits, on top of what Python and torch hold: chains as float32, images as uint8 (in three splits),
    five copies of the weights (themselves, their average, their gradient and Adam's two moments), and the layers' outputs:
    half a number for each pixel and feature map of the first layer, kept before and after SiLU, for data and chains at
    once, and twice that for the gradient of a gradient in `matching_step`."""
    weights = sum(weight.numel() for weight in train.EnergyModel(10, 1, width).parameters())
    return (4 * slots * size ** 2 + 1797 * size ** 2 + 5 * 4 * weights + 24 * batch * width * size ** 2) / 2 ** 20


def memory(folder, count, dice):
    """The resident set over 2,000 updates, and what it grows by with reservoir, images and network."""
    quick = [*DIGITS, '--epochs', '999']
    seen = resident([*quick, '--picture-every', '20'], 2000)
    early, late = (np.mean([mib for step, mib in seen.items() if abs(step - middle) < 200]) for middle in (400, 1800))
    told = [f'{early:.0f} MiB at 200 to 600, {late:.0f} at 1,600 to 2,000 ({late / early - 1:+.1%})']
    cases = {'base': (16, 512, 8), '100,000 chains': (16, 100_000, 8), '20,000 chains of 40x40': (40, 20_000, 8),
             'width 64': (16, 512, 64), 'width 160': (16, 512, 160), 'width 64, 40x40': (40, 512, 64)}
    for name, (size, slots, width) in cases.items():
        argv = ['--image-size', size, '--reservoir', slots, '--width', width, '--picture-every', 999]
        held = resident([*quick, *map(str, argv)], 38)[19]
        base = held - predicted(size, slots, width) if name == 'base' else base
        foreseen = base + predicted(size, slots, width)
        told.append(f'{name}: {foreseen:.0f} MiB predicted, {held:.0f} measured ({held / foreseen - 1:+.0%})')
    return f'memory over {max(seen):,} updates', told[0], '; '.join(told[1:])


PARTS = {'kills': kills, 'writes': writes, 'disk': disk, 'cuts': cuts, 'memory': memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--only', choices=list(PARTS))
    parser.add_argument('--seed', type=int, default=0, help='of the moments, sizes and lengths')
    args = parser.parse_args()
    times = {'kills': args.kills, 'writes': args.kills // 2, 'disk': args.kills // 5, 'cuts': args.kills, 'memory': 1}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.only in ('writes', 'disk', 'cuts'):
            finish(train.main, training(folder / 'whole'), folder / 'log')
        print(f'{"what was done":44}{"what was found":48}and after resuming')
        for name in [args.only] if args.only else PARTS:
            print('{:44}{:48}{}'.format(*PARTS[name](folder, times[name], random.Random(args.seed))), flush=True)


if __name__ == '__main__':
    main()

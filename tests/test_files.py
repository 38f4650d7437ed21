"""Nothing is half written: every file is flushed to the disk under another name and then put in place as a whole, whatever
stops the program in the middle of it."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import generate
import ood
import train
from conftest import QUICK
from model import EnergyModel, save_checkpoint

resource = pytest.importorskip('resource', reason='limits, forks and signals of Linux and macOS')
from faults import start, unreadable  # noqa: E402

NAMES = {'checkpoint': 'a.pt', 'array': 'a.npy', 'cache': 'a.npz', 'table': 'a.csv', 'picture': 'a.png'}


def write(kind, path, size):
    """Write a file of about `size` bytes or more, as the scripts do."""
    if kind == 'table':
        data.write_csv([{'a': 1}] * (size // 3), ['a'], path)
    elif kind == 'picture':
        data.save_grid(torch.rand(1, 1, 200, size // 200) * 2 - 1, path, 1)
    else:
        with data.atomic_write(path) as file:
            if kind == 'checkpoint':
                save_checkpoint(file, EnergyModel(width=1), x=torch.zeros(size, dtype=torch.uint8))
            else:
                (np.save if kind == 'array' else np.savez)(file, np.zeros(size, np.uint8))


@pytest.mark.parametrize('kind', NAMES)
def test_full_disk(kind, tmp_path):
    """Where there is no more room the older file stays as it was, alone, and the error names it and the way out."""
    path, soft_and_hard = tmp_path / NAMES[kind], resource.getrlimit(resource.RLIMIT_FSIZE)
    write(kind, path, 2000)
    before = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, soft_and_hard[1]))  # no file may grow beyond this
        with pytest.raises(OSError, match=rf'{path}: cannot be written \(.*\); make room there, or name another folder'):
            write(kind, path, 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write(kind, path, 200_000)
    assert path.stat().st_size > 60_000


def test_every_file_is_put_in_place_as_a_whole(glyphs, tmp_path, monkeypatch):
    """All that the three scripts leave behind came through fsync and os.replace, from a name in the same folder."""
    calls, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, 'fsync', lambda number: calls.append('fsync') or fsync(number))
    monkeypatch.setattr(os, 'replace', lambda old, new: calls.append((Path(old), Path(new))) or replace(old, new))
    train.main(['--data', str(glyphs), '--out', str(tmp_path), *QUICK])
    generate.main(['--ckpt', str(tmp_path / 'best.pt'), '--out', str(tmp_path), '--device', 'cpu', '--steps', '2'])
    ood.main(['--ckpt', str(tmp_path / 'best.pt'), '--out', str(tmp_path), '--device', 'cpu', '--ood', 'noise'])
    moves = [call for call in calls if call != 'fsync']
    assert calls == [entry for move in moves for entry in ('fsync', move)]
    assert {new for _, new in moves} == {path for path in tmp_path.rglob('*') if path.is_file()}
    assert all(old.parent == new.parent and old.name.startswith('.') for old, new in moves)


# --- signals --------------------------------------------------------------------------------------------------------------

def wait_for(condition):
    for _ in range(20_000):  # minutes, on a busy machine
        if condition():
            return
        time.sleep(.01)
    raise TimeoutError


def test_ctrl_c_as_a_process(glyphs, tmp_path):
    """Ctrl-C in a terminal: exit status 130, no traceback, and everything saved, in the middle of an epoch or not."""
    command = [sys.executable, train.__file__, '--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--epochs', '9999']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # as in a terminal
    wait_for((tmp_path / 'log.csv').exists)
    process.send_signal(signal.SIGINT)
    assert 'Traceback' not in process.communicate()[1] and process.returncode == 130
    run = torch.load(tmp_path / 'last.pt', weights_only=True)['run']
    assert run['epoch'] >= 1 and len(run['rows']) == run['epoch'] and not unreadable(tmp_path)


def test_a_reader_that_leaves_ends_nothing(glyphs, tmp_path):
    """`python train.py 2>&1 | head -1`: the run goes on to its end, and so do all of its files."""
    command = [sys.executable, train.__file__, '--data', str(glyphs), '--out', str(tmp_path), *QUICK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait() == 0
    assert len((tmp_path / 'log.csv').read_text().splitlines()) == 3 and (tmp_path / 'curves.png').exists()


def test_one_run_at_a_time(glyphs, tmp_path, refused):
    """A second run in the folder of one that is going on is refused, whatever it wants; afterwards it is not."""
    begin = ['--data', str(glyphs), *QUICK, '--out', str(tmp_path)]
    with train.alone_in(tmp_path):
        assert 'another run is writing there' in refused(train.main, *begin) and not [*tmp_path.iterdir()]
    train.main(begin)
    with train.alone_in(tmp_path):
        for flags in (['--overwrite'], ['--resume', '--epochs', '3']):
            assert 'another run is writing there' in refused(train.main, *begin, *flags)
    train.main([*begin, '--resume', '--epochs', '3'])


@pytest.mark.parametrize('number, twice, status', [(signal.SIGTERM, False, 143), (signal.SIGINT, True, 130),
                                                   (signal.SIGHUP, False, 129),
                                                   (signal.SIGTERM, True, -signal.SIGTERM)])
def test_signals_in_the_middle_of_a_write(glyphs, tmp_path, number, twice, status):
    """The first signal lets the write end and saves; a second one leaves at once, and every file is the older one, whole."""
    out, flag, go, fsync = tmp_path / 'run', tmp_path / 'flag', tmp_path / 'go', os.fsync

    def prepare():
        def stuck(descriptor):  # a slow disk: what follows the first log.csv waits until it is told to go on
            if (out / 'log.csv').exists() and not go.exists():
                flag.touch()
                wait_for(go.exists)
            fsync(descriptor)
        os.fsync = stuck

    process = start(train.main, ['--data', glyphs, '--out', out, *QUICK, '--epochs', '9999'], tmp_path / 'log', prepare)
    wait_for(flag.exists)
    before = {path: path.read_bytes() for path in out.glob('[!.]*')}
    os.kill(process.pid, number)
    if twice:
        time.sleep(.2)  # two presses of a key
        os.kill(process.pid, number)
    else:
        go.touch()
    process.join()
    assert process.exitcode == status and 'Traceback' not in (tmp_path / 'log').read_text() and not unreadable(out)
    assert ({path: path.read_bytes() for path in out.glob('[!.]*')} == before) == twice

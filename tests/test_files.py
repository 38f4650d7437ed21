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
                save_checkpoint(file, EnergyModel(width=1), {}, {}, {}, 0, run=torch.zeros(size, dtype=torch.uint8))
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
    """Ctrl-C in a terminal: exit status 130, no traceback, and the last finished epoch is saved."""
    command = [sys.executable, train.__file__, '--data', str(glyphs), '--out', str(tmp_path), *QUICK, '--epochs', '9999']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # as in a terminal
    log = tmp_path / 'log.csv'
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 2)  # last.pt holds the first epoch now
    process.send_signal(signal.SIGINT)
    assert 'Traceback' not in process.communicate()[1] and process.returncode == 130
    run = torch.load(tmp_path / 'last.pt', weights_only=True)['run']
    history = run['history']
    assert history['epoch'] >= 1 and len(history['epochs']) == history['epoch'] and not unreadable(tmp_path)


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_in_the_middle_of_a_write(glyphs, tmp_path, number, status):
    """A signal ends the run with its status, and every file is the older one, whole."""
    out, flag, fsync = tmp_path / 'run', tmp_path / 'flag', os.fsync

    def prepare():
        def stuck(descriptor):  # a slow disk: what follows the first log.csv waits
            if (out / 'log.csv').exists():
                flag.touch()
                wait_for(lambda: False)
            fsync(descriptor)
        os.fsync = stuck

    process = start(train.main, ['--data', glyphs, '--out', out, *QUICK, '--epochs', '9999'], tmp_path / 'log', prepare)
    wait_for(flag.exists)
    before = {path: path.read_bytes() for path in out.glob('[!.]*') if path.is_file()}
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == status and 'Traceback' not in (tmp_path / 'log').read_text() and not unreadable(out)
    assert {path: path.read_bytes() for path in out.glob('[!.]*') if path.is_file()} == before

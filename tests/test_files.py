"""No file is ever half written: it is flushed to the disk under another name and then put in place
as a whole, whatever stops the program before that."""
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import generate
import ood
import train
from conftest import QUICK
from model import EnergyModel, load_model, save_checkpoint

resource = pytest.importorskip('resource', reason='limits and signals of Linux and macOS')
from faults import start, unreadable  # noqa: E402


def write_checkpoint(path, size):
    with data.atomic_write(path) as file:
        run = torch.zeros(size, dtype=torch.uint8)
        save_checkpoint(file, EnergyModel(width=1), {}, {'class_names': []}, {}, 0, run)


def write_cache(path, size):
    with data.atomic_write(path) as file:
        np.savez(file, np.zeros(size, np.uint8))


def write_table(path, size):
    data.write_csv([{'a': 1}] * (size // 3), ['a'], path)


def write_picture(path, size):
    data.save_grid(torch.rand(1, 1, 200, size // 200) * 2 - 1, path, 1)


def test_a_number_without_a_column_gets_one(tmp_path):
    """As of a loss that a student adds: the known columns come first."""
    data.write_csv([{'b': 1}, {'b': 2, 'new': .5}], ['a', 'b'], tmp_path / 'file')
    assert (tmp_path / 'file').read_text().splitlines() == ['a,b,new', ',1,', ',2,0.5']


@pytest.mark.parametrize('write', [write_checkpoint, write_cache, write_table, write_picture])
def test_full_disk(write, tmp_path):
    """Where there is no more room the older file stays as it was, with nothing beside it, and an
    OSError names the file, whatever library was writing."""
    path, limits = tmp_path / 'file', resource.getrlimit(resource.RLIMIT_FSIZE)
    write(path, 2000)
    before = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # no file may grow beyond it
        with pytest.raises(OSError, match=f'{path}: cannot be written'):
            write(path, 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write(path, 200_000)
    assert path.stat().st_size > 60_000


def test_every_file_is_put_in_place_as_a_whole(glyphs, tmp_path, monkeypatch):
    """All that the scripts leave behind came through fsync and os.replace, in this order, from a
    hidden name in the same folder."""
    calls, replace, fsync = [], os.replace, os.fsync

    def note_fsync(descriptor):
        calls.append('fsync')
        fsync(descriptor)

    def note_replace(old, new):
        calls.append((Path(old), Path(new)))
        replace(old, new)

    monkeypatch.setattr(os, 'fsync', note_fsync)
    monkeypatch.setattr(os, 'replace', note_replace)
    out = ['--out', str(tmp_path), '--device', 'cpu']
    use = ['--ckpt', str(tmp_path / 'best.pt'), *out]
    train.main(['--data', str(glyphs), *QUICK, *out])
    generate.main([*use, '--count', '1', '--steps', '2', '--gif'])
    ood.main([*use, '--ood', 'noise'])
    ood.main([*use, '--check', str(glyphs / 'ood_ta.npy')])
    moves = calls[1::2]
    assert calls[::2] == ['fsync'] * len(moves) and 'fsync' not in moves
    assert {new for _, new in moves} == {path for path in tmp_path.rglob('*') if path.is_file()}
    assert all(old.parent == new.parent and old.name[0] == '.' for old, new in moves)


# --- signals --------------------------------------------------------------------------------------

def wait_for(condition):
    for _ in range(12_000):  # two minutes, for a busy machine
        if condition():
            return
        time.sleep(.01)
    raise TimeoutError


def epochs_logged(folder):
    log = folder / 'log.csv'
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_ctrl_c_as_a_process(glyphs, tmp_path):
    """Ctrl-C in a terminal: exit status 130, no traceback, and the last finished epoch is saved."""
    command = [sys.executable, train.__file__, '--data', str(glyphs), '--out', str(tmp_path),
               *QUICK, '--epochs', '9999']
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # as in a terminal
    try:
        wait_for(lambda: epochs_logged(tmp_path) > 1 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and 'Traceback' not in said and not unreadable(tmp_path), said
    history = load_model(tmp_path / 'last.pt')[1]['run']['history']
    assert history['epoch'] == len(history['epochs']) >= epochs_logged(tmp_path) - 1 > 0


STUB = '''
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(9)
'''


@pytest.mark.parametrize('script', [train, generate, ood])
def test_ctrl_c_while_libraries_are_imported(script, tmp_path):
    """It ends a script at once, without a traceback. A program that imports the files, such as a
    notebook, keeps its own Ctrl-C."""
    for name in ('numpy', 'torch'):
        (tmp_path / f'{name}.py').write_text(STUB)
    ends = []
    for command in ([script.__file__], ['-c', f'import {script.__name__}']):
        ends.append(subprocess.run(
            [sys.executable, *command], capture_output=True, text=True,
            cwd=Path(script.__file__).parent, env={**os.environ, 'PYTHONPATH': str(tmp_path)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)))  # as in a terminal
    assert ends[0].returncode == -signal.SIGINT and not ends[0].stderr
    assert 'KeyboardInterrupt' in ends[1].stderr


def slow_disk(out, stuck):
    """From now on the first write after log.csv got its second row waits, and makes `stuck`."""
    def wait(descriptor):
        if epochs_logged(out) == 2:
            stuck.touch()
            wait_for(lambda: False)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup may ignore it
    os.fsync = wait


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_in_the_middle_of_a_write(glyphs, tmp_path, number, status):
    """A signal ends the run with its status. Every file is the older one, with nothing beside it,
    and last.pt holds the epoch before."""
    out, stuck = tmp_path / 'run', tmp_path / 'stuck'
    flags = ['--data', glyphs, '--out', out, *QUICK, '--epochs', '9999']
    process = start(train.main, flags, tmp_path / 'said', partial(slow_disk, out, stuck))
    wait_for(lambda: stuck.exists() or not process.is_alive())
    before = contents(out)
    half_written = [path for path in before if path.name[0] == '.']
    assert len(half_written) == 1
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == status and 'Traceback' not in (tmp_path / 'said').read_text()
    del before[half_written[0]]
    assert contents(out) == before and not unreadable(out)
    assert load_model(out / 'last.pt')[1]['run']['history']['epoch'] == 1

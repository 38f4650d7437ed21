"""Training in several processes, which talk through gloo on the CPU.

One run is started by torchrun itself. The others get the environment that torchrun gives from us,
because each of its processes needs seconds to import torch.
"""
import csv
import os
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch

import train
from conftest import QUICK
from test_runs import assert_same, interrupt, state

pytest.importorskip('resource', reason='Linux and macOS')
from faults import set_environment, start  # noqa: E402


def set_up(environment, interrupted):
    set_environment(environment)
    if interrupted:
        interrupt(pytest.MonkeyPatch())


def train_in_two(logs, *flags, interrupted=False):
    """What `torchrun --nproc-per-node 2 train.py` does: the exit statuses, and what was said."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        meeting = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1])}

    def begin(rank):
        own = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', **meeting}
        return start(train.main, flags, logs / f'rank{rank}.txt', partial(set_up, own, interrupted))

    processes = [begin(rank) for rank in range(2)]
    for process in processes:
        process.join(120)
        process.kill()  # of no effect on one that has ended
        process.join()
    said = [(logs / f'rank{rank}.txt').read_text() for rank in range(2)]
    print(*said)  # for the report of a test that fails
    return [process.exitcode for process in processes], said


def saved_chains(folder):
    """The stored chains of each process, (N, C, H, W)."""
    run = torch.load(folder / 'last.pt', weights_only=True)['run']
    return [own['reservoir']['chains'] for own in run['ranks']]


def are_among(chains, others):
    """Which of the chains (N, C, H, W) are, to the bit, among others (M, C, H, W): bool (N,)."""
    return (chains.flatten(1)[:, None] == others.flatten(1)).all(2).any(1)  # (N, M, P) -> (N,)


def test_a_batch_is_dealt_out(monkeypatch):
    """The shares of two processes together are the batch of one, and no image is dealt twice."""
    args = train.parse_args(['--batch-size', '6', '--device', 'cpu'])
    batches = list(train.batches(20, args, 3))
    monkeypatch.setattr(train, 'ranks', lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(train, 'rank', lambda: rank)
        shares.append(list(train.batches(20, args, 3)))
    assert len(batches) == len(shares[0]) == len(shares[1]) == 3
    for whole, *parts in zip(batches, *shares):
        assert len(whole) == 6 and {len(part) for part in parts} == {3}
        assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())


def test_shares_of_a_batch_add_up(glyphs, tmp_path):
    """Without random numbers, two processes of 8 images each train the weights that one of 16 does,
    and log the same means, up to rounding."""
    quick = ['--data', str(glyphs), *QUICK, '--px-weight', '0', '--data-noise', '0']
    train.main([*quick, '--out', str(tmp_path / 'one')])
    assert train_in_two(tmp_path, *quick, '--out', tmp_path / 'two')[0] == [0, 0]
    one, two = (torch.load(tmp_path / name / 'last.pt', weights_only=True)['run']
                for name in ('one', 'two'))
    for key, weight in one['model'].items():
        torch.testing.assert_close(weight, two['model'][key], rtol=1e-3, atol=1e-5)
    for alone, shared in zip(one['history']['epochs'], two['history']['epochs'], strict=True):
        for key in ('loss_pyx', 'val_accuracy', 'grad_norm', 'energy_noise', 'val_auroc'):
            assert alone[key] == pytest.approx(shared[key], rel=1e-3, abs=1e-5), key


def test_resume_with_as_many_fewer_or_more_processes(glyphs, tmp_path):
    """Two epochs in two processes, started by torchrun, equal one plus one bit by bit, each process
    with chains of its own. One process goes on with the chains of the first, and two again."""
    quick, parts = ['--data', str(glyphs), *QUICK], tmp_path / 'parts'
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node']
    whole = subprocess.Popen([*torchrun, '2', train.__file__, *quick, '--out', tmp_path / 'whole'],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert train_in_two(tmp_path, *quick, '--out', parts, interrupted=True)[0] == [130, 130]
    resume = ['--resume', '--out', str(parts), '--device', 'cpu', '--epochs']
    assert train_in_two(tmp_path, *resume, '2')[0] == [0, 0]
    said = whole.communicate()[1]
    assert whole.returncode == 0, said
    assert_same(state(tmp_path / 'whole'), state(parts))
    first, second = saved_chains(parts)
    assert not are_among(first, second).any()

    train.main([*resume, '2'])  # no epoch is left: takes over and saves
    alone, = saved_chains(parts)
    assert len(alone) == len(first) + len(second) and are_among(alone, first).all()
    train.main([*resume, '3'])
    assert train_in_two(tmp_path, *resume, '4')[0] == [0, 0]
    assert [len(chains) for chains in saved_chains(parts)] == [len(first), len(second)]
    with open(parts / 'log.csv') as file:
        assert [row['epoch'] for row in csv.DictReader(file)] == ['1', '2', '3', '4']


def test_batch_must_be_shared_evenly(glyphs, tmp_path):
    """Both processes refuse an odd batch in one line, and nothing is written."""
    flags = ['--data', glyphs, *QUICK, '--batch-size', 15, '--out', tmp_path / 'new']
    statuses, said = train_in_two(tmp_path, *flags)
    assert statuses == [2, 2] and not (tmp_path / 'new').exists()
    for text in said:
        assert '--batch-size: a multiple of 2' in text and text.count('\n') == 1

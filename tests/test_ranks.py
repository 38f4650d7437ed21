"""Laws of training in several processes: torchrun starts two of them on the CPU, which talk through gloo."""
import csv
import subprocess
import sys

import pytest
import torch

import train
from conftest import QUICK
from test_3_4_training import assert_same, state


TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', train.__file__]


def torchrun(*flags):
    """Train in two processes, one thread each; returns their status and what they said."""
    done = subprocess.run([*TORCHRUN, *map(str, flags)], capture_output=True, text=True)
    print(done.stdout, done.stderr)  # for the report of a test that fails
    return done.returncode, done.stdout + done.stderr


def test_shares_of_a_batch_add_up(glyphs, tmp_path):
    """Without random numbers two processes of 8 images each train the weights that one of 16 does, up to rounding."""
    quick = ['--data', str(glyphs), *QUICK, '--px-weight', '0', '--data-noise', '0', '--epochs', '20']
    train.main([*quick, '--out', str(tmp_path / 'one')])
    assert torchrun(*quick, '--out', tmp_path / 'two')[0] == 0
    one, two = (torch.load(tmp_path / name / 'last.pt', weights_only=True)['run'] for name in ('one', 'two'))
    for key, weight in one['model'].items():
        torch.testing.assert_close(weight, two['model'][key], rtol=1e-3, atol=1e-5)
    for alone, shared in zip(one['history']['epochs'], two['history']['epochs'], strict=True):
        assert alone['loss_pyx'] == pytest.approx(shared['loss_pyx'], rel=1e-3)


def test_resume_with_as_many_or_fewer_processes(glyphs, tmp_path):
    """Two epochs in two processes equal one plus one, bit by bit, each process with chains of its own; and one process alone
    goes on with the chains of both."""
    quick = ['--data', str(glyphs), *QUICK]
    assert torchrun(*quick, '--out', tmp_path / 'whole')[0] == 0
    assert torchrun(*quick, '--out', tmp_path / 'parts', '--epochs', '1')[0] == 0
    assert torchrun('--resume', '--out', tmp_path / 'parts', '--epochs', '2')[0] == 0
    assert_same(state(tmp_path / 'whole'), state(tmp_path / 'parts'))
    chains = [own['reservoir']['chains'] for own in
              torch.load(tmp_path / 'parts/last.pt', weights_only=True)['run']['ranks']]
    assert len(chains) == 2 and not torch.isin(chains[0], chains[1]).all(dim=(1, 2, 3)).any()
    train.main(['--resume', '--out', str(tmp_path / 'parts'), '--epochs', '3'])
    with open(tmp_path / 'parts/log.csv') as file:
        assert [row['epoch'] for row in csv.DictReader(file)] == ['1', '2', '3']
    assert len(torch.load(tmp_path / 'parts/last.pt', weights_only=True)['run']['ranks']) == 1


def test_batch_must_be_shared_evenly(glyphs, tmp_path):
    """An odd batch is refused by both processes, and nothing is written."""
    status, said = torchrun('--data', glyphs, *QUICK, '--batch-size', 15, '--out', tmp_path / 'new')
    assert status and '--batch-size' in said and 'multiple of 2' in said and not (tmp_path / 'new').exists()

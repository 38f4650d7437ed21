"""Tiny synthetic data and quick settings for all tests: no network, no files but in pytest's own
temporary folders."""
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts stand beside this folder

import data  # noqa: E402
import train  # noqa: E402

TINY = ['--epochs', '2', '--image-size', '16', '--width', '4', '--batch-size', '16',
        '--sgld-steps', '2', '--reservoir', '48', '--picture-every', '2', '--device', 'cpu',
        '--precision', 'fp32']
QUICK = [*TINY, '--chains-after', '0']  # with chains from the first update on


def pytest_configure(config):
    for task in range(31, 37):
        config.addinivalue_line('markers', f'task{task}: tests of course task 3.{task - 30}')


def pytest_collection_modifyitems(items):
    """`pytest -m task33` runs the tests of course task 3.3, those of the file tests/test_3_3_..."""
    for item in items:
        if item.path.name.startswith('test_3_'):
            item.add_marker(f'task{item.path.name[5]}{item.path.name[7]}')


def load_lesson(name):
    """The script .github/lessons/NAME.py as a new module."""
    path = Path(__file__).parents[1] / '.github/lessons' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope='session')
def one_thread():
    torch.set_num_threads(1)  # tiny batches: more threads only get into each other's way


@pytest.fixture(autouse=True)
def empty_curves(monkeypatch):
    """Plotting takes longer than a tiny epoch. The run of `trained` has the real curves.png."""
    def plot_nothing(history, args):
        with data.atomic_write(args.out / 'curves.png'):
            pass

    monkeypatch.setattr(train, 'plot_curves', plot_nothing)


def bars(count, seed):
    """Images (N, 20, 20) of a bar that stands (0), lies (1) or leans (2), with the labels (N,)."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.normal(200, 8, (count, 20, 20))
    for image, label, at in zip(images, labels, random.integers(4, 14, count)):
        if label == 0:
            image[:, at:at + 3] -= 150
        elif label == 1:
            image[at:at + 3] -= 150
        else:
            image -= 150 * (np.abs(np.subtract.outer(np.arange(20), np.arange(20)) - at + 9) < 2)
    return images.astype(np.float32), labels


@pytest.fixture(scope='session')
def glyphs(tmp_path_factory):
    """A course folder in small: three classes of bars, noise as clutter, and class names."""
    folder = tmp_path_factory.mktemp('data') / 'GLYPHS'
    folder.mkdir()
    for seed, (stem, count) in enumerate({'train': 60, 'val': 24, 'test': 24}.items()):
        with open(folder / f'{stem}.npy', 'wb') as file:
            for array in bars(count, seed):
                np.save(file, array)
    np.save(folder / 'ood_ta.npy', np.random.default_rng(3).normal(size=(20, 20, 20)))
    (folder / 'classes.txt').write_text('stand\nlie\nlean\n')
    return folder


@pytest.fixture(scope='session')
def trained(glyphs, tmp_path_factory):
    """The folder of a finished run of two epochs on the bars."""
    out = tmp_path_factory.mktemp('run')
    train.main(['--data', str(glyphs), '--out', str(out), *QUICK])
    return out


@pytest.fixture
def refused(capsys):
    """Call a script's main and return the one line with which it must refuse, exit status 2."""
    def call(main, *argv):
        capsys.readouterr()  # what fixtures printed
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        message = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and '\n' not in message and 'Traceback' not in message, message
        return message
    return call

"""generate.py through its command line."""
import numpy as np
import pytest

import generate

SHORT = ['--device', 'cpu', '--precision', 'fp32', '--steps', '6']


@pytest.mark.parametrize('mode, flags, count', [
    ('samples', [], 64), ('samples', ['--count', '2'], 16), ('samples', ['--classes', 'lean', '0', '--count', '3'], 6),
    ('chain', ['--classes', 'stand', 'lie'], 2 * 5), ('chain', ['--count', '3'], 3 * 5)])
def test_modes_write_a_picture_and_its_images(trained, tmp_path, mode, flags, count):
    """One PNG and one .npy a mode, in [-1, 1], with as many images as were asked for."""
    generate.main(['--ckpt', str(trained / 'best.pt'), '--mode', mode, '--out', str(tmp_path), *SHORT, *flags])
    images = np.load(tmp_path / f'{mode}.npy')
    assert images.shape == (count, 1, 16, 16) and images.dtype == np.float32 and abs(images).max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'{mode}.npy', f'{mode}.png']


def test_same_seed_same_samples(trained, tmp_path):
    """The same command writes the same bytes; another seed does not."""
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        generate.main(['--ckpt', str(trained / 'best.pt'), '--out', str(tmp_path / name), *SHORT, '--seed', seed,
                       '--classes', 'lie'])
    a, b, c = ((tmp_path / name / 'samples.npy').read_bytes() for name in 'abc')
    assert a == b != c
    assert (tmp_path / 'a/samples.png').read_bytes() == (tmp_path / 'b/samples.png').read_bytes()


def test_chain_starts_in_the_prior_and_ends_in_the_samples(trained, tmp_path):
    """The first column is N(0, 0.01); columns are steps 0, 1, 2, 4, 6."""
    generate.main(['--ckpt', str(trained / 'best.pt'), '--mode', 'chain', '--count', '4', '--out', str(tmp_path), *SHORT])
    states = np.load(tmp_path / 'chain.npy').reshape(4, 5, 16, 16)
    assert abs(states[:, 0].std() - .1) < .01 and abs(states[:, 0]).max() < .6
    moves = np.abs(np.diff(states, axis=1)).mean(axis=(0, 2, 3))
    assert (moves > 0).all()


def test_mistakes(trained, tmp_path, refused):
    """Unknown classes and missing or foreign checkpoints are named, and nothing is written."""
    ckpt = trained / 'best.pt'
    assert 'stand lie lean' in refused(generate.main, '--ckpt', ckpt, '--classes', 'zzz', '--out', tmp_path / 'o', *SHORT)
    assert 'nowhere.pt' in refused(generate.main, '--ckpt', tmp_path / 'nowhere.pt', '--out', tmp_path / 'o', *SHORT)
    (tmp_path / 'text.pt').write_text('hello')
    assert 'text.pt' in refused(generate.main, '--ckpt', tmp_path / 'text.pt', '--out', tmp_path / 'o', *SHORT)
    assert '--ckpt' in refused(generate.main)
    assert not (tmp_path / 'o').exists()

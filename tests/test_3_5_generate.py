"""Course task 3.5: what must hold in the modes of generate.py, mostly through its command line, in
the order of the modes."""
import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import generate
import train
from conftest import QUICK, bars
from hints import assert_close
from model import load_model
from sampler import sgld

CPU = ['--device', 'cpu', '--precision', 'fp32']
# Flags of a quick run of each mode, and how many images it then saves of the three test images.
QUICK_MODES = {'samples': (['--count', '1'], 8),
               'chain': (['--count', '2'], 2 * 5),
               'interpolate': (['--count', '1'], 9),
               'reconstruct': (['--images', '3', '--iterations', '2'], 3 * 4),
               'inpaint': (['--images', '3', '--count', '2'], 3 * 6),
               'denoise': (['--images', '3'], 3 * 10),
               'compose': (['--count', '2'], 5 * 2),
               'concepts': (['--images', '3'], 3 * 4)}


@pytest.fixture(scope='module')
def plain(trained, tmp_path_factory):
    """The checkpoint of the bars with SGLD settings that move its chains, without annealing."""
    path = tmp_path_factory.mktemp('plain') / 'plain.pt'
    checkpoint = load_model(trained / 'best.pt')[1]
    checkpoint['sampler'].update(step_size=20., noise=.01, matching=0.)
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def warm(plain, tmp_path):
    """The same at T = .5: at the T of the run, E(x) is all but min_y E(x, y)."""
    checkpoint = load_model(plain)[1]
    checkpoint['settings']['temperature'] = .5
    torch.save(checkpoint, tmp_path / 'warm.pt')
    return tmp_path / 'warm.pt'


@pytest.fixture(scope='module')
def coloured(tmp_path_factory):
    """A checkpoint of colour images: a folder each of red, green and blue bars."""
    folder, out = tmp_path_factory.mktemp('colours'), tmp_path_factory.mktemp('colour_run')
    for label, name in enumerate(('red', 'green', 'blue')):
        (folder / name).mkdir()
        for i, image in enumerate(bars(18, label)[0].clip(0, 255)):
            channels = [image if channel == label else 255 - image for channel in range(3)]
            pixels = np.stack(channels, axis=-1).astype(np.uint8)  # (H, W, 3)
            Image.fromarray(pixels).save(folder / name / f'{i}.png')
    train.main(['--data', str(folder), '--out', str(out), *QUICK, '--epochs', '1'])
    return out / 'best.pt'


@pytest.fixture(scope='module')
def small_judge(glyphs, tmp_path_factory):
    """A classifier of the bars that makes few mistakes."""
    out = tmp_path_factory.mktemp('judge')
    train.main(['--data', str(glyphs), '--out', str(out), *QUICK, '--px-weight', '0',
                '--width', '6', '--epochs', '90', '--lr', '.01', '--picture-every', '90'])
    return out / 'best.pt'


def run(ckpt, out, *flags, mode='samples'):
    """Drive the command line; returns the images that it saved."""
    steps = [] if mode == 'concepts' else ['--steps', '6']
    words = ['--ckpt', ckpt, '--out', out, *CPU, '--mode', mode, *steps, *flags]
    generate.main([str(word) for word in words])
    assert (out / f'{mode}.npy').stat().st_size, f'save the images in {mode}.npy'
    return np.load(out / f'{mode}.npy')


@pytest.fixture
def refusal(refused):
    """The line with which the command line refuses."""
    return lambda mode, *words: refused(generate.main, '--mode', mode, *words, *CPU)


def parse(*flags):
    return generate.parse_args(['--ckpt', 'x', *CPU, *map(str, flags)])


# --- all modes ----------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', QUICK_MODES)
@pytest.mark.parametrize('kind', ['grey', 'colour'])
def test_modes_write_a_picture_and_its_images(trained, coloured, tmp_path, kind, mode):
    """Each mode writes one PNG and one .npy, float32, (N, C, H, W), and nothing else."""
    ckpt, channels = (trained / 'best.pt', 1) if kind == 'grey' else (coloured, 3)
    flags, count = QUICK_MODES[mode]
    images = run(ckpt, tmp_path, *flags, mode=mode)
    assert images.shape == (count, channels, 16, 16) and images.dtype == np.float32
    assert np.isfinite(images).all()
    assert mode in ('concepts', 'reconstruct') or abs(images).max() <= 1, (
        f'pixels up to {abs(images).max():.2f}: starts are N(0, 0.01), and states are clamped')
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'{mode}.npy', f'{mode}.png']
    with Image.open(tmp_path / f'{mode}.png') as picture:
        assert min(picture.size) > 60 and np.asarray(picture.convert('L')).std() > 5


def test_noise_and_step_of_each_mode(trained, tmp_path, monkeypatch):
    """Samples cool down, chain and inpaint have the noise of the training, the others none; a flag
    overrules. The step is that of the training, .1 * 256 pixels / slope 40, unless told."""
    seen, sgld = [], generate.sgld

    def spy(energy, x, *args, **settings):
        seen.append(settings)
        return sgld(energy, x, *args, **settings)

    def settings(mode, *more):
        seen.clear()
        run(trained / 'best.pt', tmp_path, *QUICK_MODES[mode][0], *more, mode=mode)
        assert seen[0]['steps'] == 6
        return seen[0]['noise'], seen[0]['step_size']

    monkeypatch.setattr(generate, 'sgld', spy)
    cooling = pytest.approx([.5 * (1 - k / 6) ** 3 for k in range(6)])
    for mode, noise in {'samples': cooling, 'compose': cooling, 'chain': .02, 'inpaint': .02,
                        'interpolate': 0, 'reconstruct': 0, 'denoise': 0}.items():
        assert settings(mode) == (noise, pytest.approx(.64)), mode
    assert settings('chain', '--noise', .3, '--step-size', 2) == (.3, 2)
    assert settings('samples', '--noise', 0) == (0, pytest.approx(.64))


def test_flags_that_a_mode_does_not_use(refusal):
    """They are told and not ignored."""
    for mode, flag in {'samples': '--start=x', 'chain': '--images=2', 'interpolate': '--noise=.1',
                       'reconstruct': '--count=2', 'inpaint': '--weight=1', 'denoise': '--noise=.1',
                       'compose': '--images=3', 'concepts': '--gif', 'evaluate': '--classes=a',
                       }.items():
        line = refusal(mode, '--ckpt', 'x', flag)
        assert f'{flag.split("=")[0]}: mode {mode} does not use it' in line
    parse('--mode', 'samples', '--mask', 'left')  # a default is no mistake


# --- samples ------------------------------------------------------------------------------------

def test_same_seed_same_samples(trained, tmp_path):
    """The same command writes the same bytes; another seed does not."""
    for name, seed in {'a': '1', 'b': '1', 'c': '2'}.items():
        run(trained / 'best.pt', tmp_path / name, '--seed', seed, '--classes', 'lie', '--gif')
    for file in ('samples.npy', 'samples.png', 'samples.gif'):
        a, b, c = [(tmp_path / name / file).read_bytes() for name in 'abc']
        assert a == b != c


def test_image_7_is_image_7(plain, tmp_path):
    """Image i is the same bit by bit in a grid of 8 and of 40; no two images are the same."""
    few = run(plain, tmp_path / 'few', '--count', 1)
    many = run(plain, tmp_path / 'many', '--count', 5)
    assert len(many) == 40 and np.array_equal(few, many[:8])
    assert len(np.unique(many.reshape(40, -1), axis=0)) == 40, (
        'images share their noise: each one has a stream of its own, also in the second chunk')


def test_start_noise(plain):
    """It is N(0, 0.01), and neither images nor seeds share it, nor what a stream draws next."""
    checkpoint = load_model(plain)[1]
    streams, z = generate.start_noise(8, checkpoint, parse('--seed', 0))
    _, other = generate.start_noise(8, checkpoint, parse('--seed', 1))
    assert abs(z.std() - .1) < 4 * .1 / (2 * z.numel()) ** .5, (
        f'deviation {z.std():.3f} instead of .1: starts are N(0, 0.01)')
    assert len(torch.cat([z, other]).flatten(1).unique(dim=0)) == 16, (
        'image 1 of seed 0 is image 0 of seed 1, or all images share their noise')
    assert len({torch.randn(1, generator=stream).item() for stream in streams}) == 8


def test_labels_are_as_frequent_as_in_the_data(plain):
    """Without --classes the labels of samples have the shares of the training data; there are none
    if training used E(x) for its chains."""
    checkpoint = load_model(plain)[1]
    checkpoint['data'] = {**checkpoint['data'], 'class_counts': {'train': [30, 10, 0]}}
    y, *_ = generate.start_samples(400, 1, checkpoint, parse())
    counts = y.bincount(minlength=3)
    assert counts[2] == 0 and abs(counts[1] / 400 - .25) < 4 * (.25 * .75 / 400) ** .5, (
        f'{counts.tolist()} labels of 400: they are as frequent as in the data, 3 to 1 to 0')
    y, *_ = generate.start_samples(99, 2, checkpoint, parse('--classes', 'stand', 'lie', 'lean'))
    assert y.tolist() == [0, 0, 1, 1, 2, 2], f'{y.tolist()}: a row holds one class'
    checkpoint['args']['conditional'] = False
    assert generate.start_samples(4, 1, checkpoint, parse())[0] is None


def test_class_names_that_are_numbers(refused):
    """A class goes by its name and never by its position, also where names are numbers."""
    def labels(known):
        return lambda names: generate.class_labels(names, {'class_names': known}, parse()).tolist()

    letters, numbers = 'a b c'.split(), [str(i) for i in range(1, 12)]
    for names, known, wanted in [('cab', letters, [2, 0, 1]), (['1', '11'], numbers, [0, 10])]:
        assert labels(known)([*names]) == wanted, 'a label is the place of the name among the known'
    for known, name in [(numbers, '0'), (letters, '0'), (letters, '3'), (letters, '-1')]:
        line = refused(labels(known), name)
        assert f'--classes {name}' in line and line.endswith(' '.join(known))


def test_guidance(warm):
    """Any w is E(x, y) - (w - 1) log softmax f(x)[y], so w = 1 is E(x, y) and w = 0 does not depend
    on y; i looks the labels up."""
    model = load_model(warm)[0]
    x, y, i = torch.rand(5, 1, 16, 16), torch.tensor([2, 1, 0, 0, 1]), torch.tensor([2, 1, 0, 2, 2])
    log_p = model.get_logits(x).log_softmax(1)[torch.arange(5), y[i]]  # (B, K) -> (B,)
    e = model.energy(x, y[i])  # (B,)
    for w in (1., 0., 3.5):
        energy = generate.guided(model, y, parse('--guidance', w))(x, i)
        assert_close(energy, e - (w - 1) * log_p, 'E(x, y) - (w - 1) log p(y|x)', {
            'the labels are ignored': model.energy(x) - (w - 1) * log_p,
            'chain i has the label y[i], wherever it is in the batch':
                model.energy(x, y) - (w - 1) * log_p,
            'the sign of the guidance: more of it asks for a higher p(y|x)': e + (w - 1) * log_p,
            'w = 1 is E(x, y) alone': e - w * log_p}, rtol=1e-5, atol=1e-6)
    free = generate.guided(model, y, parse('--guidance', 0))(x, i)
    torch.testing.assert_close(free, -model.get_logits(x).logsumexp(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(generate.guided(model, y, parse())(x, i), model.energy(x, y[i]))
    torch.testing.assert_close(generate.guided(model, None, parse())(x, i), model.energy(x))


def test_film(plain, tmp_path):
    """--gif writes the states of the chains; the frames differ and the last one is held."""
    run(plain, tmp_path, '--count', 1, '--gif', '--step-size', 1000)
    with Image.open(tmp_path / 'samples.gif') as film:
        assert film.n_frames == 7  # states 0 to 6
        first = np.asarray(film.convert('L'), dtype=float)
        film.seek(6)
        assert film.info['duration'] == 2000
        assert abs(np.asarray(film.convert('L'), dtype=float) - first).max() > 30


# --- chain --------------------------------------------------------------------------------------

def test_chain_starts_in_the_prior_and_ends_in_the_samples(plain, tmp_path):
    """The columns are steps 0, 1, 2, 4, 6: the first is N(0, 0.01), the last what `samples` draws
    with the same noise, and the energies below belong to them."""
    states = run(plain, tmp_path, '--count', 8, mode='chain').reshape(8, 5, 16, 16)
    assert abs(states[:, 0].std() - .1) < .01 and abs(states[:, 0]).max() < .6
    assert (abs(np.diff(states, axis=1)).mean(axis=(0, 2, 3)) > 0).all()
    assert np.array_equal(states[:, -1], run(plain, tmp_path, '--count', 1)[:, 0])


def test_energies_of_a_chain(plain, tmp_path, monkeypatch):
    """Below each state stands its own energy, E(x, y) of the class of its chain."""
    below, steep, checkpoint = [], tmp_path / 'steep.pt', load_model(plain)[1]
    checkpoint['weights']['head.weight'].mul_(1000)
    torch.save(checkpoint, steep)
    monkeypatch.setattr(generate, 'save_grid', lambda *_, captions, **__: below.extend(captions))
    states = run(steep, tmp_path, '--classes', 'lie', 'stand', mode='chain')  # (2 * 5, 1, 16, 16)
    y = torch.tensor([1, 0]).repeat_interleave(5)
    energies = load_model(steep)[0].energy(torch.from_numpy(states), y)
    assert below == [f'{e:.2f}' for e in energies.tolist()] and len(set(below)) > 5, (
        f'{below[:5]} ...: below a state stands its own energy')


def test_states_of_many_chains(plain):
    """`draw` returns the states asked for, chunk by chunk, in the order of the chains."""
    def streams():
        return [torch.Generator().manual_seed(i) for i in range(40)]

    model, _ = load_model(plain)
    args = parse('--mode', 'chain', '--steps', 3)
    args.settings = {'steps': 3, 'step_size': 20., 'noise': 0.}
    y, start = torch.arange(40) % 3, torch.rand(40, 1, 16, 16)
    x, states = generate.draw(generate.guided(model, y, args), start, args, keep=[0, 2])
    assert torch.equal(states[0], start) and list(states) == [0, 2, 3]
    for steps, state in {2: states[2], 3: x}.items():
        ways = [sgld(energy, start, steps, 20., 0.) for energy in (
            lambda x: model.energy(x, y), lambda x: -model.energy(x, y),
            lambda x: model.energy(x, torch.cat([y[:32], y[:8]])))]
        assert_close(state, ways[0], f'the states after {steps} steps', {
            'chains go down in E: the sign': ways[1],
            'the second chunk of chains has the labels of the first': ways[2]})
    args.settings['noise'] = .1
    noisy, _ = generate.draw(generate.guided(model, y, args), start, args, streams())
    alone = sgld(lambda x: model.energy(x, y[35:36]), start[35:36], 3, 20., .1,
                 generator=streams()[35:36])
    assert_close(noisy[35:36], alone, 'chain 35 gets its noise from stream 35, not from that of '
                 'another chunk', rtol=1e-4, atol=1e-5)


def test_chains_that_mix_and_chains_that_do_not(plain, tmp_path, capsys, monkeypatch):
    """States that are drawn independently have R-hat 1 and count in full; chains that stay where
    they are have a large R-hat and count as one state each. If the energies or one corner of
    the images differ, chains do not mix either."""
    def told(move):
        def sgld(energy, x, steps, callback, generator, **_):
            for k in range(steps):
                x = move(k, torch.randn(x.shape, generator=rng), start)
                callback(k, x, x.mean((1, 2, 3)) + (start.mean((1, 2, 3)) if move is level else 0))

        start, rng = torch.randn(8, 1, 16, 16, generator=seeds), torch.Generator().manual_seed(2)
        monkeypatch.setattr(generate, 'sgld', sgld)
        args = parse('--mode', 'chain', '--steps', 400)
        args.settings = {'steps': 400}
        generate.tell_mixing(None, load_model(plain)[1], args)
        line = capsys.readouterr().out
        numbers = re.search(r'R-hat (\S+) .* sample size (\d+)', line).groups()
        return [float(n) for n in numbers]

    def level(k, noise, start):
        return noise

    def corner(k, noise, start):
        noise[:, :, 8:, 8:] += start[:, :, 8:, 8:].mean((1, 2, 3), keepdim=True) * 9
        return noise

    seeds = torch.Generator().manual_seed(1)
    r_hat, ess = told(lambda k, noise, start: noise)
    assert abs(r_hat - 1) < .02 and 400 < ess < 2500, (r_hat, ess)  # of 1600
    r_hat, ess = told(lambda k, noise, start: start + .01 * noise)
    assert r_hat > 2 and 6 < ess < 10, (r_hat, ess)
    for move in (level, corner):
        r_hat, ess = told(move)
        assert r_hat > 1.1, move
    r_hat, ess = told(lambda k, noise, start: noise + 50 * start * (k < 200))
    assert r_hat < 1.1, 'the first half is left out: chains are still on their way'


def test_chain_tells_whether_it_mixes(plain, tmp_path, capsys):
    """After the picture, for the class of the first row, also with few steps."""
    run(plain, tmp_path, '--classes', 'lie', mode='chain')
    assert 'R-hat' in capsys.readouterr().out
    run(plain, tmp_path, '--count', 1, '--steps', 1, mode='chain')
    assert 'R-hat inf' in capsys.readouterr().out


# --- interpolate ----------------------------------------------------------------------------------

def test_interpolation_ends_in_the_two_samples(plain, tmp_path):
    """The ends of a row are what `samples` draws of the same noises without noise in its steps."""
    rows = run(plain, tmp_path, '--classes', 'lie', 'stand', mode='interpolate')
    ends = run(plain, tmp_path, '--classes', 'lie', 'stand', '--count', 2, '--noise', 0)
    rows = rows.reshape(2, 9, 16, 16)
    assert np.array_equal(rows[:, [0, -1]], ends.reshape(2, 2, 16, 16))
    assert len(np.unique(rows.reshape(18, -1), axis=0)) == 18


@pytest.mark.parametrize('mode, images', [('chain', 5), ('interpolate', 9)])
def test_rows_of_each_class(plain, tmp_path, monkeypatch, mode, images):
    """One of each of --classes, or --count of each, and each row is named."""
    names = []
    monkeypatch.setattr(generate, 'save_grid', lambda *_, rows, **__: names.append(rows))
    one = run(plain, tmp_path, '--classes', 'lie', 'stand', mode=mode)
    two = run(plain, tmp_path, '--classes', 'lie', 'stand', '--count', 2, mode=mode)
    assert len(one) == 2 * images and len(two) == 4 * images
    assert names == [['lie', 'stand'], ['lie', 'lie', 'stand', 'stand']]
    assert np.array_equal(one[:images], two[:images]), 'the first row is the same'


def test_mixed_noise_keeps_its_variance(plain, tmp_path, monkeypatch):
    """The chains between the ends start from N(0, 0.01), too."""
    starts = []

    def spy(energy, start, *_, **__):
        starts.append(start)
        return (start, None)

    monkeypatch.setattr(generate, 'draw', spy)
    run(plain, tmp_path, '--count', 20, mode='interpolate')
    variance = starts[0].unflatten(0, (20, 9)).var(dim=(0, 2, 3, 4))  # (9,) of 20 * 256 values
    assert (abs(variance - .01) < 4 * .01 * (2 / (20 * 256)) ** .5).all(), (
        f'variances {variance.min():.4f} to {variance.max():.4f} instead of .01: mixed by sqrt(rho)'
        ' and its counterpart, noises keep their variance; mixed by rho they do not')


# --- reconstruct ----------------------------------------------------------------------------------

def test_reconstruction_comes_closer_to_the_image(plain, tmp_path):
    """Every column is what it says, and more steps of Adam lead closer to each image, also to
    images that do not fit into one chunk."""
    distances = []
    for iterations in (1, 15):
        columns = run(plain, tmp_path, '--images', 40, '--iterations', iterations,
                      mode='reconstruct').reshape(24, 4, 16, 16)
        image, z, end, error = columns.transpose(1, 0, 2, 3)
        np.testing.assert_allclose(error, abs(end - image) - 1, atol=1e-6)
        distances.append(((end - image) ** 2).mean((1, 2)))
    assert (distances[1] < .9 * distances[0]).all()
    assert abs(end - z).max() > 0


# --- inpaint --------------------------------------------------------------------------------------

@pytest.mark.parametrize('mask', ['left', 'centre', 'random', 'salt-and-pepper', 'file'])
def test_known_pixels_are_untouched(plain, tmp_path, mask):
    """Known pixels keep their values bit by bit in every completion; the missing ones move."""
    expected = np.zeros((16, 16), bool)
    expected[4:12, 4:12] |= mask == 'centre'
    expected[:, :8] |= mask == 'left'
    expected[:3] |= mask == 'file'
    name = mask
    if mask == 'file':
        name = tmp_path / 'mask.png'
        Image.fromarray((255 * expected).astype(np.uint8)).save(name)
    columns = run(plain, tmp_path, '--images', 4, '--count', 3, '--mask', name, mode='inpaint')
    columns = columns.reshape(4, 7, 16, 16)
    image, start = columns[:, :1], columns[:, 1:2]
    missing = np.broadcast_to(expected, (4, 1, 16, 16)) if expected.any() else start != image
    if mask in ('random', 'salt-and-pepper'):
        share = .75 if mask == 'random' else .5
        assert abs(missing.mean() - share) < 4 * (share * (1 - share) / missing.size) ** .5 + .02
        assert len(np.unique(missing.reshape(4, -1), axis=0)) == 4
    assert (abs(start[missing]) == 1).all() == (mask == 'salt-and-pepper')
    for completion in (1, 2, 3, 4, 5, 6):
        known = columns[:, completion:completion + 1][~missing]
        assert np.array_equal(known, image[~missing]), 'known pixels are held, missing ones move'
    assert (columns[:, 3:4] != start)[missing].mean() > .5  # some black and white ones stay
    assert not np.array_equal(columns[:, 3], columns[:, 4])
    mean = columns[:, 3:6].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(columns[:, 6:7][missing], mean[missing], atol=1e-6)
    for i in range(4):
        known = image[i][~missing[i]].mean()
        np.testing.assert_allclose(columns[i, 2:3][missing[i]], known, atol=1e-5)


def test_psnr():
    """An error of .2 everywhere is 20 dB for a range of 2, a tenth of it 20 dB more. Only pixels
    that are asked for count."""
    x = torch.zeros(2, 3, 4, 4)
    y = x + torch.tensor([.2, .02]).view(2, 1, 1, 1)
    assert_close(generate.psnr(y, x), [20., 40.], 'PSNR for a range of 2, from -1 to 1')
    where = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    where[..., 0] = True
    y[..., 1:] = 1.
    torch.testing.assert_close(generate.psnr(y, x, where), torch.tensor([20., 40.]))


def test_labels_of_given_images(plain, tmp_path, refusal):
    """Test images have their own labels, those of --start none, unless --classes names one for all.
    If training used E(x), so do these chains."""
    checkpoint, mode = load_model(plain)[1], ['--mode', 'inpaint', '--images', 24]
    Image.fromarray(bars(1, 5)[0][0].clip(0, 255).astype(np.uint8)).save(tmp_path / 'bar.png')
    start = ['--mode', 'inpaint', '--start', tmp_path / 'bar.png']

    def labels(*flags):
        y = generate.given_images(checkpoint, parse(*flags))[1]
        return None if y is None else y.tolist()

    assert labels(*mode) == [0, 1, 2] * 8 and labels(*mode, '--classes', 'lean') == [2] * 24
    assert labels(*start) is None and labels(*start, '--classes', 'lie') == [1]
    assert 'takes one' in refusal('inpaint', '--ckpt', plain, '--classes', 'lie', 'lean')
    checkpoint['args']['conditional'] = False
    assert labels(*mode) is None


def test_own_images_are_prepared_like_the_data(plain, coloured, tmp_path):
    """--start takes a file or a sorted folder, stretches the values, resizes, matches channels."""
    folder = tmp_path / 'own'
    folder.mkdir()
    for name, level in {'b.png': 90, 'a.png': 30}.items():
        pixels = np.full((40, 32), 10, np.uint8)
        pixels[:, :16 if level == 30 else 8] = level
        Image.fromarray(pixels).save(folder / name)
    both = run(plain, tmp_path, '--start', folder, mode='inpaint').reshape(2, 12, 16, 16)[:, 0]
    one = run(plain, tmp_path, '--start', folder / 'a.png', mode='inpaint').reshape(12, 16, 16)[0]
    assert np.array_equal(both[0], one) and not np.array_equal(both[1], one)
    assert both.min() == -1 and both.max() == 1
    colour = run(coloured, tmp_path, '--start', folder, '--classes', 'red', mode='denoise')
    assert colour.shape == (2 * 10, 3, 16, 16)


# --- denoise --------------------------------------------------------------------------------------

def test_data_term_holds_to_the_noisy_image(plain, tmp_path):
    """Where the energy is flat, a step with a data weight of s^2 leads to the noisy image itself; a
    weight of 0 has no say. The noise has the strength that was asked for."""
    def columns(weight, step_size):
        x = run(plain, tmp_path, '--images', 4, '--strengths', .2, '--data-weight', weight,
                '--step-size', step_size, mode='denoise').reshape(4, 4, 16, 16)
        return x.transpose(1, 0, 2, 3)

    image, noisy, _, done = columns(.04, 1e-6)
    np.testing.assert_allclose(done, noisy, atol=1e-4, err_msg='a pull of 1 / s^2: the variance, '
                               'not the deviation, says how far to trust the noisy image')
    inside = abs(image) < .3  # where clamping changes nothing
    deviation = (noisy - image)[inside].std()
    assert inside.sum() > 20 and abs(deviation - .2) < .2 * 4 / (2 * inside.sum()) ** .5
    _, noisy, _, done = columns(0, 1000)
    assert abs(done - noisy).mean() > .02


def test_data_term_pulls_by_its_share(plain, tmp_path, monkeypatch):
    """Each step pulls x back by data weight / s^2 of its distance to the noisy image."""
    def spy(energy, start, args, *_, **__):
        i = torch.arange(len(start))
        x = (start + .3).requires_grad_(True)
        pull, = torch.autograd.grad(energy(x, i).sum(), x)
        free, = torch.autograd.grad(energy(start.requires_grad_(True), i).sum(), start)
        step = args.settings['step_size'] * (pull - free)  # (S * N, C, H, W)
        shares.append(step.mean(dim=(1, 2, 3)) / .3)
        return (start.detach(), None)

    shares = []
    monkeypatch.setattr(generate, 'draw', spy)
    run(plain, tmp_path, '--images', 2, '--strengths', .1, .2, '--data-weight', .001,
        '--step-size', 1e-6, mode='denoise')
    assert_close(shares[0], [.1, .1, .025, .025], 'the pull is divided by s^2, the variance',
                 rtol=1e-3, atol=1e-4)


def test_total_variation_smooths_noise_and_keeps_edges():
    """A flat image stays, noise on it goes, and an edge higher than the noise survives."""
    flat, s = torch.full((1, 1, 16, 16), .3), torch.tensor([.4])
    torch.testing.assert_close(generate.total_variation(flat, s), flat)
    edge = torch.where(torch.arange(16) < 8, -.8, .8).expand(1, 1, 16, 16)
    for turned in (edge, edge.transpose(2, 3)):
        noise = .4 * torch.randn(edge.shape, generator=torch.Generator().manual_seed(0))
        assert (generate.total_variation(turned + noise, s) - turned).std() < .5 * noise.std()


def test_data_weight_that_overshoots(plain, refusal):
    """Above s^2, a step would go past the noisy image and the chains would swing ever wider."""
    use = ['--ckpt', plain, '--strengths', .01, .2]
    assert '--data-weight: must be at most' in refusal('denoise', *use)
    parse('--mode', 'denoise', '--strengths', .1, '--data-weight', .01)


# --- compose --------------------------------------------------------------------------------------

def test_compositions_of_two_energies(warm, tmp_path, monkeypatch):
    """The rows follow E1 = 1, E2 = 2, their product, mixture, exp(-E / T) = exp(-E1 / T) +
    exp(-E2 / T), and negation."""
    def constant(model, y, args):
        return lambda x, i: torch.full((len(x),), 1. if y[0] == 0 else 2.)

    def spy(energy, start, *_):
        i = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
        energies.append(energy(start[i], i))
        energies.append(energy(start[i.flip(0)], i.flip(0)).flip(0))
        return (start, None)

    energies = []
    monkeypatch.setattr(generate, 'guided', constant)
    monkeypatch.setattr(generate, 'draw', spy)
    run(warm, tmp_path, '--classes', 'stand', 'lie', '--count', 2, mode='compose')
    mixture = -.5 * float(np.log(np.exp(-1 / .5) + np.exp(-2 / .5)))
    wanted = {'E1': 1., 'E2': 2., 'a product of densities is a sum of energies': 3.,
              'the mixture adds the densities': mixture, 'the negation: 1, and not 2': .6}
    for energy in energies:
        for name, pair, value in zip(wanted, energy.view(5, 2), wanted.values()):
            assert_close(pair, [value, value], name)


def test_experts_share_their_noise(plain, tmp_path):
    """The first two rows are what `samples` draws of each class, or of each checkpoint."""
    rows = run(plain, tmp_path, '--classes', 'lean', 'lie', '--count', 3, mode='compose')
    assert np.array_equal(rows[:3], run(plain, tmp_path, '--classes', 'lean', '--count', 3))
    assert np.array_equal(rows[3:6], run(plain, tmp_path, '--classes', 'lie', '--count', 3))

    other, checkpoint = tmp_path / 'other.pt', load_model(plain)[1]
    checkpoint['weights']['head.weight'].mul_(-3)
    torch.save(checkpoint, other)
    rows = run(plain, tmp_path, '--ckpt2', other, '--count', 3, mode='compose')
    for path, part in ((plain, rows[:3]), (other, rows[3:6])):
        checkpoint = load_model(path)[1]
        checkpoint['args']['conditional'] = False  # its samples follow E(x)
        torch.save(checkpoint, tmp_path / 'marginal.pt')
        assert np.array_equal(part, run(tmp_path / 'marginal.pt', tmp_path, '--count', 1)[:3])


def test_first_two_classes_are_composed_by_default(plain, tmp_path):
    """Without --classes and --ckpt2 the experts are the first two classes."""
    rows = run(plain, tmp_path, '--count', 2, mode='compose')
    named = run(plain, tmp_path, '--count', 2, '--classes', 'stand', 'lie', mode='compose')
    assert np.array_equal(rows, named)


def test_what_cannot_be_composed(plain, coloured, tmp_path, refusal):
    """There must be two experts, and they must share the shape of their images."""
    out, ebm = ['--ckpt', plain, '--out', tmp_path / 'o'], tmp_path / 'ebm.pt'
    assert 'two classes' in refusal('compose', *out, '--classes', 'lie')
    torch.save({**load_model(plain)[1], 'class_names': []}, ebm)
    assert '--ckpt2' in refusal('compose', '--ckpt', ebm, '--out', tmp_path / 'o')
    assert 'another shape' in refusal('compose', *out, '--ckpt2', coloured)
    assert not (tmp_path / 'o').exists()


# --- concepts -------------------------------------------------------------------------------------

def test_gradients_of_the_energies(warm, tmp_path):
    """`concepts` saves dE(x)/dx = sum_y p(y|x) dE(x, y)/dx and, after it, dE(x, y)/dx of each of
    --classes, else of the most likely ones."""
    model, checkpoint = load_model(warm)
    classes = ['--classes', 'stand', 'lie', 'lean']
    maps = run(warm, tmp_path, '--images', 2, *classes, mode='concepts')
    maps = maps.reshape(2, 4, 16, 16)
    x, _ = generate.given_images(checkpoint, parse('--mode', 'concepts', '--images', 2))
    p = (model.get_logits(x) / .5).softmax(1)  # (2, 3)
    x.requires_grad_(True)
    for y in range(3):
        gradient, = torch.autograd.grad(model.energy(x, y).sum(), x)  # (2, 1, 16, 16)
        np.testing.assert_allclose(maps[:, 1 + y], gradient[:, 0], rtol=1e-4, atol=1e-7)
    assert abs(maps[:, 0]).max() > 0
    mean = (p.view(2, 3, 1, 1).numpy() * maps[:, 1:]).sum(1)  # (2, 3, 16, 16) -> (2, 16, 16)
    np.testing.assert_allclose(maps[:, 0], mean, rtol=1e-4, atol=1e-9)
    likely = run(warm, tmp_path, '--images', 2, mode='concepts').reshape(2, 4, 16, 16)
    for i, y in enumerate(p.argmax(1).tolist()):
        np.testing.assert_allclose(likely[i, 1], maps[i, 1 + y], rtol=1e-4, atol=1e-9)


def test_heat_map():
    """Red where a brighter pixel raises the energy, blue where it lowers it, grey elsewhere."""
    gradient = torch.tensor([[2., -2.], [0., 0.]]).view(1, 1, 2, 2)
    red, green, blue = generate.heat_map(torch.zeros(1, 1, 2, 2), gradient)[0]
    assert red[0, 0] > .9 > blue[0, 0] and blue[0, 1] > .9 > red[0, 1]
    assert red[1, 0] == green[1, 0] == blue[1, 0]


# --- evaluate -------------------------------------------------------------------------------------

def test_frechet_distance_of_normal_densities():
    """For two diagonal normals it is |mean difference|^2 + the sum of (s_a - s_b)^2, and 0 of a
    set and itself."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T  # covariance 1 exactly
    a = z * torch.tensor([1., 2., 3.])
    b = z * torch.tensor([2., 2., 1.]) + torch.tensor([0., 3., 0.])
    found = generate.frechet_distance(a, b)
    assert found == pytest.approx(1 + 4 + 9, rel=1e-6), f'Frechet distance {found:.3f}, not 14'
    assert generate.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_halves_are_disjoint_and_paired_by_class(capsys):
    """Two disjoint sets with the same labels, of each class as many as it has pairs, or `count`.
    Without two pairs of a class there is nothing to compare within it."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 7 + [1] * 4 + [2] + [4] * 20)[order]
    first, second = generate.paired_halves(labels, 500, 0)
    assert torch.equal(labels[first], labels[second])
    assert len(torch.cat([first, second]).unique()) == 2 * len(first)
    assert labels[first].bincount().tolist() == [3, 2, 0, 0, 10]
    few, other_seed = [generate.paired_halves(labels, 5, seed)[0] for seed in (0, 1)]
    assert len(few) == 5 and not torch.equal(few, other_seed)
    for labels in (torch.arange(9), torch.arange(9).repeat(3)):
        with pytest.raises(SystemExit):
            generate.paired_halves(labels, 500, 0)
        assert 'no class has two pairs' in capsys.readouterr().err


def test_distinct_by_hand():
    """A sample is distinct if its nearest other sample of the class is farther than the closest of
    the real images are from each other. Other classes, and images alone in theirs, do not count."""
    y = torch.tensor([0, 0, 0, 1])
    real = torch.tensor([[0.], [1.], [3.], [3.1]]).double()
    for samples, distinct in [([0., 5, 9, 5], 1), ([0, .5, 9, 9], 1 / 3), ([7, 7, 7, 7], 0)]:
        found = generate.variety(torch.tensor(samples).double()[:, None], real, y)[0]
        assert found == pytest.approx(distinct)
    y, at = torch.zeros(40).long(), torch.arange(40.).double()[:, None]  # (40,), (40, 1)
    real = at.clone()
    real[1] = .1  # distances .1, .1 and 38 times 1, of which .955 is the quantile of .05
    for spacing, distinct in [(.95, 0), (.96, 1)]:
        assert generate.variety(spacing * at, real, y)[0] == distinct


def test_equal_images_are_not_distinct():
    """Where some real images are equal, and so are all samples, rounding makes none distinct."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        same = torch.randn(1, 64, generator=generator).double().expand(40, 64)
        assert generate.variety(same, 0 * same, torch.zeros(40).long())[0] == 0


def test_coverage_by_hand():
    """A real image is covered if a sample of its class is within the distance of its k-th nearest
    other real image, the border included, or of the farthest where a class has fewer."""
    def coverage(samples, k):
        return generate.variety(torch.tensor(samples).double()[:, None], real, y, k)[1]

    y = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    real = torch.tensor([[0.], [1.], [3.], [7.], [1.], [2.], [0.]]).double()
    far = [99., 99, 99]
    assert coverage([-1., 99, 99, 99, *far], k=1) == pytest.approx(1 / 6)  # radii 1, 1, 2, 4
    assert coverage([3., 99, 99, 99, *far], k=1) == pytest.approx(2 / 6)
    assert coverage([3., 99, 99, 99, *far], k=2) == pytest.approx(4 / 6)  # radii 3, 2, 3, 6
    assert coverage([*4 * [99.], 3, 99, 99], k=5) == pytest.approx(1 / 6)  # radius 1 of two images
    assert coverage(real.flatten().tolist(), k=5) == 1
    assert coverage([*4 * [99.], 99, 99, 0], k=5) == 0  # class 2 has one image and does not count


def test_blur_takes_grain_away():
    """The judge's features are also those of blurred images: a chessboard of pixels becomes grey, a
    flat image stays, and a half plane keeps its halves."""
    class Pixels(torch.nn.Module):
        features, head = torch.nn.Flatten(), torch.nn.Identity()

    flat = torch.full((1, 1, 56, 56), .5)
    half = torch.where(torch.arange(56) < 28, -.5, .5).expand(1, 1, 56, 56)
    grain = (torch.arange(56)[:, None] + torch.arange(56)) % 2 - .5
    x = torch.cat([flat, half, grain.expand(1, 1, 56, 56)])
    sharp, soft, logits = generate.judge_features(Pixels(), x, parse())
    assert torch.equal(sharp, x.flatten(1).double()) and torch.equal(logits, x.flatten(1))
    soft = soft.view(3, 56, 56)
    assert torch.allclose(soft[0], torch.tensor(.5).double(), atol=1e-6)
    assert abs(soft[2]).max() < .05
    slope = soft[1, 28].diff()  # of a blurred step: a Gaussian of 1.5 pixels
    assert slope.argmax() == 27
    assert slope.max() == pytest.approx(1 / (1.5 * (2 * np.pi) ** .5), rel=.03)
    assert soft[1, 28, 20] == pytest.approx(-.5, abs=1e-4)


def test_evaluation_of_real_images_reaches_what_real_images_reach(trained, glyphs, small_judge,
                                                                  tmp_path, monkeypatch):
    """A classifier sees noise for what it is, and test images in place of samples as it sees other
    test images; the same image again and again is not distinct."""
    def rows():
        run(trained / 'best.pt', tmp_path, '--judge', small_judge, mode='evaluate')
        with open(tmp_path / 'evaluate.csv') as file:
            return {row['images']: {key: float(row[key]) for key in list(row)[1:]}
                    for row in csv.DictReader(file)}

    noise = rows()
    columns = ['agreement', 'frechet', 'distinct', 'coverage', 'distinct_blurred',
               'coverage_blurred', 'n']
    assert list(noise['samples']) == columns and noise['samples']['coverage'] < .5
    assert noise['samples']['agreement'] < .7 < .9 < noise['more real']['agreement']
    assert noise['samples']['n'] == 12  # of 24 test images, the others are compared with
    test = data.load_data(str(glyphs), 16).test
    x = test.batch(generate.paired_halves(test.labels, 500, 0)[0])[0]
    monkeypatch.setattr(generate, 'draw', lambda *_, **__: (x, None))
    real = rows()['samples']
    assert real['agreement'] > .9 and real['frechet'] == pytest.approx(0, abs=1e-4)
    assert real['distinct'] > .7 and real['coverage'] == real['coverage_blurred'] == 1
    x = x[:1].expand_as(x)
    same = rows()['samples']
    assert same['distinct'] == same['distinct_blurred'] == 0 and same['coverage'] < .7


def test_judge_is_independent_and_of_the_same_data(trained, tmp_path, refusal):
    """Models with p(x), such as the checkpoint itself, models without classes, and classifiers of
    other data or of another split are no judges."""
    def judged_by(path):
        return refusal('evaluate', '--ckpt', trained / 'best.pt', '--judge', path,
                       '--out', tmp_path / 'o')

    def changed(seed=0, **facts):
        checkpoint = load_model(trained / 'best.pt')[1]
        checkpoint['args'].update(px_weight=0., seed=seed)
        torch.save({**checkpoint, **facts}, tmp_path / 'judge.pt')
        return tmp_path / 'judge.pt'

    known = load_model(trained / 'best.pt')[1]['data']
    for path in (trained / 'best.pt', trained / 'last.pt', changed(class_names=[])):
        assert f'--judge {path}: name a --px-weight 0 classifier' in judged_by(path)
    for changes in ({'seed': 1}, {'data': {**known, 'class_names': ['a', 'b', 'c']}}):
        assert 'of the same --data and --seed' in judged_by(changed(**changes))
    line = refusal('evaluate', '--ckpt', trained / 'best.pt', '--out', tmp_path / 'o')
    assert 'python train.py' in line and '--seed 0 --px-weight 0' in line and '--judge' in line
    assert not (tmp_path / 'o').exists()


def test_images_too_few_to_compare(trained, small_judge, tmp_path, refusal):
    """Three images of three classes have no nearest other image: no number is made up."""
    use = ['--ckpt', trained / 'best.pt', '--judge', small_judge, '--out', tmp_path / 'o']
    assert '--images 1:' in refusal('evaluate', *use, '--images', 1)
    assert '--images 2:' in refusal('evaluate', *use, '--images', 2)

"""Course task 3.5: generate.py through its command line, and the laws behind its modes."""
import csv

import numpy as np
import pytest
import torch
from PIL import Image

import data
import generate
import train
from conftest import QUICK, bars
from model import load_model
from sampler import sgld

CPU = ['--device', 'cpu', '--precision', 'fp32']
SHORT = [*CPU, '--steps', '6']
ALL_MODES = {'samples': ['--count', '1'], 'chain': ['--count', '2'], 'interpolate': ['--count', '1'],
             'reconstruct': ['--images', '3', '--iterations', '2'], 'inpaint': ['--images', '3', '--count', '2'],
             'denoise': ['--images', '3'], 'compose': ['--count', '2', '--classes', '0', '1'], 'concepts': ['--images', '3']}
LENGTHS = {'samples': 8, 'chain': 2 * 5, 'interpolate': 9, 'reconstruct': 3 * 5, 'inpaint': 3 * 6, 'denoise': 3 * 10,
           'compose': 5 * 2, 'concepts': 3 * 4}  # images in the .npy of the above, from three test images


@pytest.fixture(scope='module')
def plain(trained, tmp_path_factory):
    """The checkpoint of the bars with plain SGLD settings, large enough for its chains to get somewhere."""
    path = tmp_path_factory.mktemp('plain') / 'plain.pt'
    checkpoint = load_model(trained / 'best.pt')[1]
    checkpoint['sampler'].update(step_size=20., noise=.01, matching=0.)
    torch.save(checkpoint, path)
    return path


@pytest.fixture(scope='module')
def coloured(tmp_path_factory):
    """A checkpoint of colour images: a class folder each of red, green and blue bars."""
    folder, out = tmp_path_factory.mktemp('colours'), tmp_path_factory.mktemp('colour_run')
    for label, name in enumerate(('red', 'green', 'blue')):
        (folder / name).mkdir()
        for i, image in enumerate(bars(18, label)[0].clip(0, 255)):
            pixels = np.stack([image if channel == label else 255 - image for channel in range(3)], axis=-1)  # (H, W, 3)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f'{i}.png')
    train.main(['--data', str(folder), '--out', str(out), *QUICK, '--epochs', '1'])
    return out / 'best.pt'


def run(ckpt, out, *flags, npy='samples'):
    """Drive the command line; returns the images it saved."""
    mode = ['--mode', npy] if npy != 'samples' else []
    generate.main(['--ckpt', str(ckpt), '--out', str(out), *(SHORT if npy != 'concepts' else CPU), *mode, *map(str, flags)])
    return np.load(out / f'{npy}.npy')


@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('kind', ['grey', 'colour'])
def test_modes_write_a_picture_and_its_images(trained, coloured, tmp_path, kind, mode):
    """Each mode writes one PNG and one .npy, float32, (N, C, H, W), and nothing else; in grey and in colour."""
    ckpt, channels = (trained / 'best.pt', 1) if kind == 'grey' else (coloured, 3)
    images = run(ckpt, tmp_path, *ALL_MODES[mode], npy=mode)
    assert images.shape == (LENGTHS[mode], channels, 16, 16) and images.dtype == np.float32
    assert np.isfinite(images).all() and (mode in ('concepts', 'reconstruct') or abs(images).max() <= 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'{mode}.npy', f'{mode}.png']
    with Image.open(tmp_path / f'{mode}.png') as picture:
        assert min(picture.size) > 60 and np.asarray(picture.convert('L')).std() > 5


# --- random streams -----------------------------------------------------------------------------------------------------

def test_same_seed_same_samples(trained, tmp_path):
    """The same command writes the same bytes; another seed does not."""
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        run(trained / 'best.pt', tmp_path / name, '--seed', seed, '--classes', 'lie', '--gif')
    for file in ('samples.npy', 'samples.png', 'samples.gif'):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in 'abc')
        assert a == b != c


def test_image_7_is_image_7(plain, tmp_path):
    """Image i is the same bit by bit in a grid of 8 and of 40, and no two images, nor seeds, share their noise."""
    few, many = (run(plain, tmp_path / str(rows), '--count', rows) for rows in (1, 5))
    assert len(many) == 40 and np.array_equal(few, many[:8])
    assert len(np.unique(many.reshape(40, -1), axis=0)) == 40
    args = generate.parse_args(['--ckpt', 'x', '--seed', '1'])
    checkpoint = load_model(plain)[1]
    _, other_seed = generate.start_noise(8, checkpoint, args)
    args.seed = 0
    streams, z = generate.start_noise(8, checkpoint, args)
    assert len(torch.cat([z, other_seed]).flatten(1).unique(dim=0)) == 16
    assert abs(z.std() - .1) < 3 * .1 / (2 * z.numel()) ** .5
    assert torch.randn(3, generator=streams[7]).abs().sum() > 0


def test_chain_starts_in_the_prior_and_ends_in_the_samples(plain, tmp_path):
    """The columns are steps 0, 1, 2, 4, 6: the first is N(0, 0.01), the last is what `samples` draws."""
    states = run(plain, tmp_path, '--count', 8, npy='chain').reshape(8, 5, 16, 16)
    assert abs(states[:, 0].std() - .1) < .01 and abs(states[:, 0]).max() < .6
    assert (np.abs(np.diff(states, axis=1)).mean(axis=(0, 2, 3)) > 0).all()
    assert np.array_equal(states[:, -1], run(plain, tmp_path, '--count', 1)[:, 0])


# --- interpolation and reconstruction -----------------------------------------------------------------------------------

def test_interpolation_ends_in_the_two_samples(plain, tmp_path):
    """The first and the last image of a path are those that `samples` draws of the same noises, without noise on the way."""
    path = run(plain, tmp_path, '--classes', 'lie', npy='interpolate')
    ends = run(plain, tmp_path, '--classes', 'lie', '--count', 2, '--noise', 0)
    assert len(path) == 9 and np.array_equal(path[[0, -1]], ends)
    assert len(np.unique(path.reshape(9, -1), axis=0)) == 9


def test_mixed_noise_keeps_its_variance():
    """sqrt(rho) z1 + sqrt(1 - rho) z2 has the variance of z1 and z2 for every rho."""
    z1, z2 = .1 * torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0))
    for rho in (0., .1, .5, .8, 1.):
        variance = generate.mix_noise(z1, z2, torch.tensor(rho)).var().item()
        assert abs(variance - .01) < 4 * .01 * (2 / len(z1)) ** .5


def test_reconstruction_comes_closer_to_the_image(plain, tmp_path):
    """The noise found makes the image better than the first noise does, and the error column is their difference."""
    columns = run(plain, tmp_path, '--images', 3, '--iterations', 15, npy='reconstruct').reshape(3, 5, 16, 16)
    image, _, before, after, error = columns.transpose(1, 0, 2, 3)
    assert (((after - image) ** 2).mean((1, 2)) < .9 * ((before - image) ** 2).mean((1, 2))).all()
    np.testing.assert_allclose(error, abs(after - image) - 1, atol=1e-6)


# --- inpainting and denoising -------------------------------------------------------------------------------------------

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
    columns = run(plain, tmp_path, '--images', 4, '--count', 3, '--mask', name, npy='inpaint').reshape(4, 7, 16, 16)
    image, start = columns[:, :1], columns[:, 1:2]
    missing = np.broadcast_to(expected, (4, 1, 16, 16)) if expected.any() else start != image
    if mask in ('random', 'salt-and-pepper'):
        share = .75 if mask == 'random' else .5
        assert abs(missing.mean() - share) < 4 * (share * (1 - share) / missing.size) ** .5 + .02
        assert len(np.unique(missing.reshape(4, -1), axis=0)) == 4
    assert (abs(start[missing]) == 1).all() == (mask == 'salt-and-pepper')
    for completion in (1, 3, 4, 5, 6):
        assert np.array_equal(columns[:, completion:completion + 1][~missing], image[~missing])
    assert (columns[:, 3:4] != start)[missing].mean() > .5  # black and white ones may well stay at their bound
    assert not np.array_equal(columns[:, 3], columns[:, 4])


def test_mean_fill_and_psnr():
    """PSNR counts the pixels asked for: an error of .2 everywhere is 20 dB, for a range of 2; a tenth is 20 dB more."""
    x = torch.zeros(2, 3, 4, 4)
    y = x + torch.tensor([.2, .02]).view(2, 1, 1, 1)
    torch.testing.assert_close(generate.psnr(y, x), torch.tensor([20., 40.]))
    where = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    where[..., 0] = True
    y[..., 1:] = 1.
    torch.testing.assert_close(generate.psnr(y, x, where), torch.tensor([20., 40.]))


def test_images_are_told_their_class(plain):
    """Test images come with their own labels, --classes overrules them, and a class of a file is what --classes says."""
    checkpoint = load_model(plain)[1]
    told = []
    for flags in ([], ['--classes', 'lean']):
        args = generate.parse_args(['--ckpt', 'x', '--mode', 'inpaint', '--images', '24', '--device', 'cpu', *flags])
        x, (y,) = generate.given_images(checkpoint, args)
        told.append(y.tolist())
        assert x.shape == (24, 1, 16, 16)
    assert told == [[0, 1, 2] * 8, [2] * 24]


def test_data_term_holds_to_the_noisy_image(plain, tmp_path):
    """With w = s^2 and a flat energy one step of the data term leads to the noisy image itself; with w = 0 it has no say."""
    columns = {}
    for weight in (.04, 0):
        columns[weight] = run(plain, tmp_path, '--images', 4, '--strengths', .2, '--step-size', 1e-6,
                              '--data-weight', weight, npy='denoise').reshape(4, 4, 16, 16)
    np.testing.assert_allclose(columns[.04][:, 3], columns[.04][:, 1], atol=1e-4)
    noise = columns[0][:, 1] - columns[0][:, 0]
    inside = abs(columns[0][:, 0]) < .3  # where clamping changes nothing
    assert inside.sum() > 20 and abs(noise[inside].std() - .2) < .2 * 4 / (2 * inside.sum()) ** .5
    free = run(plain, tmp_path, '--images', 4, '--strengths', .2, '--data-weight', 0, '--step-size', 1000, npy='denoise')
    free = free.reshape(4, 4, 16, 16)
    assert abs(free[:, 3] - free[:, 1]).mean() > .02


def test_total_variation_smooths_noise_and_keeps_edges():
    """A flat image stays, noise on it goes, and an edge higher than the noise survives."""
    flat, s = torch.full((1, 1, 16, 16), .3), torch.full((1, 1, 1, 1), .4)
    torch.testing.assert_close(generate.total_variation(flat, s), flat)
    edge = torch.where(torch.arange(16) < 8, -.8, .8).expand(1, 1, 16, 16)
    noise = .4 * torch.randn(edge.shape, generator=torch.Generator().manual_seed(0))
    assert (generate.total_variation(edge + noise, s) - edge).std() < .5 * noise.std()


# --- composition, guidance, concepts ------------------------------------------------------------------------------------

def test_product_of_an_energy_with_itself_is_half_the_temperature():
    """T = noise^2 / (2 step_size), so E + E with a step is E with a step twice as long and the same noise."""
    def energy(x):
        return 3 * x.square().sum((1, 2, 3))

    x, product = torch.rand(4, 1, 3, 3), list(generate.COMPOSITIONS).index('1 and 2')
    twice, kind = generate.composed(energy, energy, .2), torch.full((4,), product)
    a = sgld(lambda x: twice(x, kind), x, 20, .0078125, .1, generator=torch.Generator().manual_seed(0))
    b = sgld(energy, x, 20, 2 * .0078125, .1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_compositions_of_two_energies():
    """First, second, product, mixture and negation of E1 = 1 and E2 = 2, image by image."""
    energy = generate.composed(lambda x: torch.full((5,), 1.), lambda x: torch.full((5,), 2.), .2)
    wanted = torch.tensor([1., 2., 3., -float(np.log(np.exp(-1) + np.exp(-2))), .6])
    torch.testing.assert_close(energy(None, torch.arange(5)), wanted)
    torch.testing.assert_close(energy(None, torch.tensor([4, 3, 2, 1, 0])), wanted.flip(0))


def test_experts_share_their_noise_and_the_first_is_a_sample(plain, tmp_path):
    """The first row of `compose` is what `samples` draws of the class; a second checkpoint is an expert as well."""
    composed = run(plain, tmp_path, '--classes', 'lean', 'lie', '--count', 3, npy='compose')
    assert np.array_equal(composed[:3], run(plain, tmp_path, '--classes', 'lean', '--count', 3))
    assert np.array_equal(composed[3:6], run(plain, tmp_path, '--classes', 'lie', '--count', 3))
    twin = run(plain, tmp_path, '--ckpt2', plain, '--count', 3, npy='compose')
    assert np.array_equal(twin[:3], twin[3:6])


def test_guidance(plain):
    """w = 1 is E(x, y), w = 0 is E(x), and any w is E(x) - w log p(y|x)."""
    model, _ = load_model(plain, torch.device('cpu'), 'fp32')
    x, y = torch.rand(5, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1])
    log_p = model.get_logits(x).log_softmax(1).gather(1, y[:, None]).squeeze(1)  # (B, K) -> (B, 1) -> (B,)
    for w in (0., 1., 3.5):
        args = generate.parse_args(['--ckpt', 'x', '--guidance', str(w)])
        torch.testing.assert_close(generate.guided(model, args)(x, y), model.energy(x) - w * log_p, rtol=1e-5, atol=1e-6)


def test_marginal_gradient_is_the_mean_of_the_conditional_ones(plain, tmp_path):
    """dE(x)/dx = sum_y p(y|x) dE(x, y)/dx, in the maps that `concepts` saves."""
    model, _ = load_model(plain, torch.device('cpu'), 'fp32')
    image = tmp_path / 'bar.png'
    Image.fromarray(bars(1, 5)[0][0].clip(0, 255).astype(np.uint8)).save(image)
    maps = run(plain, tmp_path, '--start', image, '--classes', 0, 1, 2, npy='concepts')  # (4, 1, 16, 16)
    args = generate.parse_args(['--ckpt', 'x', '--mode', 'concepts', '--start', str(image), '--device', 'cpu'])
    x, given = generate.given_images(load_model(plain)[1], args)
    assert given == ()  # nobody knows the class of a file
    p = model.get_logits(x).softmax(1).view(3, 1, 1, 1).numpy()  # (1, K) -> (K, 1, 1, 1)
    assert abs(maps[0]).max() > 0
    np.testing.assert_allclose(maps[0], (p * maps[1:]).sum(0), rtol=1e-4, atol=1e-9)


# --- files and mistakes -------------------------------------------------------------------------------------------------

def test_own_images_are_prepared_like_the_data(plain, coloured, tmp_path):
    """--start takes a file or all of a folder, sorted, min-max scaled, resized and in the checkpoint's channels."""
    folder = tmp_path / 'own'
    folder.mkdir()
    for name, level in (('b.png', 90), ('a.png', 30)):
        pixels = np.full((40, 32), 10, np.uint8)
        pixels[:, :16] = level
        Image.fromarray(pixels).save(folder / name)
    both = run(plain, tmp_path, '--start', folder, npy='inpaint').reshape(2, 12, 16, 16)
    one = run(plain, tmp_path, '--start', folder / 'a.png', npy='inpaint').reshape(1, 12, 16, 16)
    assert np.array_equal(both[0, 0], one[0, 0]) and both[:, 0].min() == -1 and both[:, 0].max() == 1
    assert run(coloured, tmp_path, '--start', folder, '--classes', 'red', npy='denoise').shape == (2 * 10, 3, 16, 16)


def test_film(plain, tmp_path):
    """--gif writes the chains as a GIF whose frames differ and whose last one stays."""
    run(plain, tmp_path, '--count', 1, '--gif', '--step-size', 1000)
    with Image.open(tmp_path / 'samples.gif') as film:
        assert film.n_frames == 7  # states 0 to 6
        first = np.asarray(film.convert('L'), dtype=float)
        film.seek(6)
        assert film.info['duration'] == 2000 and abs(np.asarray(film.convert('L'), dtype=float) - first).max() > 30


def test_mistakes(trained, coloured, tmp_path, refused):
    """Each is told in one line that names the flag or the file, and nothing is written."""
    ckpt, text, empty, black = trained / 'best.pt', tmp_path / 'text.pt', tmp_path / 'empty', tmp_path / 'black.png'
    text.write_text('hello')
    empty.mkdir()
    Image.new('L', (16, 16)).save(black)
    out = ['--out', tmp_path / 'o', *CPU]
    for wanted, *flags in (
            ['stand lie lean', '--ckpt', ckpt, '--classes', 'zzz'],
            ['nowhere.pt', '--ckpt', tmp_path / 'nowhere.pt'],
            ['text.pt', '--ckpt', text],
            ['--ckpt2', '--ckpt', ckpt, '--mode', 'compose'],
            ['two classes', '--ckpt', ckpt, '--mode', 'compose', '--classes', 'lie'],
            ['(3, 16, 16)', '--ckpt', ckpt, '--mode', 'compose', '--ckpt2', coloured],
            ['text.pt', '--ckpt', ckpt, '--mode', 'compose', '--ckpt2', text],
            ['nowhere.png', '--ckpt', ckpt, '--mode', 'denoise', '--start', tmp_path / 'nowhere.png'],
            ['empty', '--ckpt', ckpt, '--mode', 'denoise', '--start', empty],
            ['text.pt', '--ckpt', ckpt, '--mode', 'inpaint', '--mask', text],
            ['middle', '--ckpt', ckpt, '--mode', 'inpaint', '--mask', 'middle'],
            ['black.png', '--ckpt', ckpt, '--mode', 'inpaint', '--mask', black],
            ['nowhere', '--ckpt', ckpt, '--mode', 'denoise', '--data', tmp_path / 'nowhere'],
            ['--strengths', '--ckpt', ckpt, '--mode', 'denoise', '--strengths', '0'],
            ['takes one', '--ckpt', ckpt, '--mode', 'inpaint', '--classes', 'lie', 'lean'],
            ['--gif', '--ckpt', ckpt, '--mode', 'concepts', '--gif'],
            ['--ckpt itself', '--ckpt', ckpt, '--mode', 'evaluate', '--judge', ckpt],
            ['--count', '--ckpt', ckpt, '--count', '0']):
        assert wanted in refused(generate.main, *flags, *out), flags
    assert '--ckpt' in refused(generate.main)
    assert not (tmp_path / 'o').exists()


# --- evaluation -----------------------------------------------------------------------------------------------------------

def test_frechet_distance_of_normal_laws():
    """For two diagonal normal laws it is |mean difference|^2 + the sum of (s_a - s_b)^2, and 0 between a set and itself."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(z.T.cov())).T  # mean 0 and covariance 1 exactly
    a, b = z * torch.tensor([1., 2., 3.]), z * torch.tensor([2., 2., 1.]) + torch.tensor([0., 3., 0.])
    assert generate.frechet_distance(a, b) == pytest.approx(1 + 4 + 9, rel=1e-6)
    assert generate.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_halves_are_disjoint_and_paired_by_class():
    """Two disjoint sets with the very same labels, as many of a class as it has pairs, or `count` pairs of any."""
    labels = torch.tensor([0] * 7 + [1] * 4 + [2] + [4] * 20)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    first, second = generate.paired_halves(labels, 500, 0)
    assert torch.equal(labels[first], labels[second]) and len(torch.cat([first, second]).unique()) == 2 * len(first)
    assert labels[first].bincount().tolist() == [3, 2, 0, 0, 10]
    assert len(generate.paired_halves(labels, 5, 0)[0]) == 5
    assert not torch.equal(generate.paired_halves(labels, 5, 1)[0], generate.paired_halves(labels, 5, 0)[0])


def test_nearest_looks_among_others_of_its_class():
    """Itself and other classes do not count; alone in a class means infinitely far."""
    features, labels = torch.tensor([[0.], [3.], [.1], [7.], [8.]]).double(), torch.tensor([0, 0, 1, 2, 2])
    assert generate.nearest(features, labels).tolist() == pytest.approx([3, 3, float('inf'), 1, 1])


def test_evaluation_of_real_images_reaches_what_real_images_reach(trained, glyphs, tmp_path, monkeypatch):
    """With test images in place of samples, an honest judge sees all of them as it sees other test images; with noise it
    does not. The judge must know the same classes from the same split."""
    judge = tmp_path / 'judge'
    train.main(['--data', str(glyphs), '--out', str(judge), *QUICK, '--px-weight', '0', '--width', '6', '--epochs', '90',
                '--lr', '.01', '--picture-every', '90'])
    flags = ['--ckpt', str(trained / 'best.pt'), '--mode', 'evaluate', '--judge', str(judge / 'best.pt'), *SHORT]

    def agreement():
        generate.main([*flags, '--out', str(tmp_path)])
        with open(tmp_path / 'evaluate.csv') as file:
            return {row['images']: float(row['agreement']) for row in csv.DictReader(file)}

    noise = agreement()
    assert noise['samples'] < .7 < .9 < noise['more real']
    test = data.load_data(str(glyphs), 16).test
    picked, _ = generate.paired_halves(test.labels, 500, 0)
    monkeypatch.setattr(generate, 'draw', lambda *_, **__: generate.Chains(test.batch(picked)[0], None, None))
    assert agreement()['samples'] > .9

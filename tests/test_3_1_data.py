"""Course task 3.1: what images are, how sets are read, OOD sets, and the files that are written."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import MNIST

import data
from data import (DataError, atomic_write, load_data, load_images, load_ood, prepare, read_image, to_float,
                  to_uint8)


def test_range_mapping_and_its_inverse():
    """uint8 -> [-1, 1] -> uint8 is the identity on all 256 levels; the ends are -1 and 1."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels)[0] == -1 and to_float(levels)[-1] == 1 and to_uint8(torch.tensor([-9., 9.])).tolist() == [0, 255]


def test_prepare_is_the_course_preprocessing():
    """Min-max per image, shorter side to the size, centre crop: any range and offset of the values gives the same."""
    image = torch.rand(1, 1, 40, 60)
    image[..., 20, 30], image[..., 20, 31] = -1., 2.
    done = prepare(image, 40)
    assert done.shape == (1, 1, 40, 40) and done.dtype == torch.uint8 and done.min() == 0 and done.max() == 255
    assert torch.equal(done, to_uint8(2 * (image[..., 10:50] + 1) / 3 - 1))  # already the right height: cropped only
    assert torch.equal(prepare(1000 * image - 7, 40), done)


def test_prepare_antialiases():
    """Shrinking to a quarter averages: of stripes one pixel in four wide about a quarter of the ink is left, not none."""
    stripes = (torch.arange(64) % 4 == 0).expand(64, 64)
    shrunk = prepare(stripes[None, None], 16).float()[..., 1:-1]
    assert (shrunk - 63.75).abs().max() < 25


def test_constant_images_stay_finite():
    """A constant image, of whatever value, is no division by zero."""
    for value in (0., 7., -1e30, 3e38):
        assert prepare(torch.full((2, 1, 20, 20), value), 16).eq(0).all()


def test_course_folder(glyphs):
    """Two arrays a file, OOD arrays beside them, class names with the data."""
    loaded = load_data(str(glyphs), 16)
    assert [len(split) for split in (loaded.train, loaded.val, loaded.test)] == [60, 24, 24]
    assert loaded.class_names == ['stand', 'lie', 'lean'] and list(loaded.ood) == ['ood_ta']
    x, y = loaded.train.batch(torch.tensor([0, 1, 2]))
    assert x.shape == (3, 1, 16, 16) and x.dtype == torch.float32 and y.tolist() == [0, 1, 2]
    assert x.min() >= -1 and x.max() <= 1


def test_class_folder_is_split_70_15_15(tmp_path):
    """One level of class folders: stratified, the same for the same seed, every image in one split only."""
    random = np.random.default_rng(0)
    for name in ('b', 'A'):
        (tmp_path / name).mkdir()
        for i in range(20):
            size = random.integers(18, 30, 2)  # mixed sizes
            Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / name / f'{i}.png')
    first, again, other = (load_data(str(tmp_path), 16, seed=seed) for seed in (0, 0, 1))
    assert first.class_names == ['A', 'b'] and first.train.images.shape == (28, 1, 16, 16)
    for split in (first.train, first.val, first.test):
        assert split.labels.bincount().tolist() == [len(split) // 2] * 2
    assert torch.equal(first.test.images, again.test.images) and not torch.equal(first.test.images, other.test.images)
    everything = torch.cat([split.images for split in (first.train, first.val, first.test)])
    assert len(everything.flatten(1).unique(dim=0)) == 40


def test_hidden_files_and_links(glyphs, tmp_path):
    """What notebooks hide beside images is no class and no image; folders behind links are read; names may be any bytes."""
    for name in ('a', os.fsdecode(b'b\xff'), '.ipynb_checkpoints', 'a/.ipynb_checkpoints'):
        (tmp_path / 'set' / name).mkdir(parents=True)
        for i in range(8):
            Image.new('L', (20, 20), 9 * i).save(tmp_path / 'set' / name / f'{i}.png')
    loaded = load_data(str(tmp_path / 'set'), 16)
    assert loaded.class_names == ['a', r'b\xff'] and sum(map(len, (loaded.train, loaded.val, loaded.test))) == 16
    (tmp_path / 'scans').mkdir()
    (tmp_path / 'scans/link').symlink_to(tmp_path / 'set')
    (tmp_path / 'scans/page.tif').mkdir()
    images, names = load_images(tmp_path / 'scans', 16, 1)
    assert len(images) == len(names) == 16 and r'b\xff' in names[-1] and all('.ipynb' not in name for name in names)


def test_data_must_be_like_those_of_a_checkpoint(glyphs, tmp_path):
    """`like` gives the image size, and other classes, counts or channels are refused by name."""
    described = load_data(str(glyphs), 20).describe()
    assert described['image_shape'] == [1, 20, 20] and described['class_counts']['val'] == [8, 8, 8]
    assert load_data(str(glyphs), like=described).train.images.shape == (60, 1, 20, 20)
    for key, value in {'class_names': ['a', 'b', 'c'], 'image_shape': [3, 20, 20], 'class_counts': {}}.items():
        with pytest.raises(DataError, match=key.replace('_', ' ')):
            load_data(str(glyphs), like={**described, key: value})


def test_float_images_are_not_mapped_twice():
    """to_float takes uint8 only."""
    with pytest.raises(TypeError, match='float'):
        to_float(torch.zeros(1, 1, 4, 4))


def test_the_callers_plots_stay_on():
    """Importing the project changes no matplotlib backend."""
    code = 'import matplotlib; matplotlib.use("svg"); import data; print(matplotlib.get_backend())'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(data.__file__).parent)
    assert done.stdout.strip() == 'svg', done.stderr


def test_folder_with_its_own_splits(tmp_path):
    """train, val and test folders are taken as they are; colour anywhere makes three channels."""
    for part, count in (('train', 3), ('val', 1), ('test', 2)):
        for name in ('x', 'y'):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (20, 20), (255, 0, i)).save(tmp_path / part / name / f'{i}.png')
    loaded = load_data(str(tmp_path), 16)
    assert loaded.train.images.shape == (6, 3, 16, 16) and len(loaded.val) == 2
    assert loaded.test.labels.tolist() == [0, 0, 1, 1]


def test_image_files_of_all_kinds(tmp_path):
    """Transparency lies on white paper; 16-bit levels, palettes and CMYK keep their meaning."""
    Image.new('RGBA', (4, 4), (255, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert read_image(tmp_path / 'clear.png').eq(255).all()
    levels = (np.arange(16, dtype=np.uint16) * 4000).reshape(4, 4)
    Image.fromarray(levels).save(tmp_path / 'deep.png')
    assert np.array_equal(read_image(tmp_path / 'deep.png')[0].numpy(), levels)
    Image.new('RGB', (4, 4), (255, 0, 0)).quantize(4).save(tmp_path / 'palette.png')
    assert read_image(tmp_path / 'palette.png')[:, 0, 0].tolist() == [255, 0, 0]
    Image.new('CMYK', (4, 4), (0, 0, 0, 255)).save(tmp_path / 'ink.tif')
    assert read_image(tmp_path / 'ink.tif').eq(0).all()


PICTURE = (np.arange(64) % 16 * 17).astype(np.uint8).reshape(8, 8)  # from 0 to 255 in steps of 17
FILES = {  # one picture in all the ways in which a file can hold it
    'grey.png': Image.fromarray(PICTURE), 'colour.png': Image.fromarray(PICTURE).convert('RGB'),
    'opaque.png': Image.fromarray(PICTURE).convert('RGBA'), 'grey and opaque.png': Image.fromarray(PICTURE).convert('LA'),
    'palette.png': Image.fromarray(PICTURE).convert('P'), 'ink.tif': Image.fromarray(PICTURE).convert('RGB').convert('CMYK'),
    '16 bit.png': Image.fromarray(PICTURE * np.uint16(257)), '16 bit.tif': Image.fromarray(PICTURE * np.uint16(9)),
    '32 bit.tif': Image.fromarray(PICTURE * np.int32(9999) - 5), 'float.tif': Image.fromarray(PICTURE / np.float32(255)),
    'lossless.webp': Image.fromarray(PICTURE).convert('RGB'), 'grey.bmp': Image.fromarray(PICTURE),
    'grey.pgm': Image.fromarray(PICTURE)}


@pytest.mark.parametrize('name', FILES)
def test_one_picture_in_every_kind_of_file(name, tmp_path):
    """The same picture is the same to the network, whatever file it came in; a constant one is 0, not NaN."""
    FILES[name].save(tmp_path / name, lossless=True)
    assert torch.equal(prepare(read_image(tmp_path / name)[None], 8)[0], torch.from_numpy(PICTURE).expand(3, -1, -1))
    FILES[name].resize((1, 1)).save(tmp_path / name, lossless=True)
    assert prepare(read_image(tmp_path / name)[None], 8).eq(0).all()


def test_photographs_stand_upright(tmp_path):
    """What a camera notes about how it was held is heeded."""
    exif = Image.Exif()
    exif[0x112] = 6  # turn by a quarter, clockwise
    Image.fromarray(PICTURE[:, :5]).save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(read_image(tmp_path / 'a.png')[0], np.rot90(PICTURE[:, :5], -1))


@pytest.mark.parametrize('kind', ['?', 'u1', 'i2', '>i4', 'i8', 'f2', '>f4', 'f8', 'Fortran'])
def test_arrays_of_every_numeric_type(kind, tmp_path):
    """Course arrays mean the same in every type of number, byte order and memory order; labels too."""
    images, labels = np.stack([PICTURE // 17 % 2, 0 * PICTURE, 0 * PICTURE + 1]), np.array([0, 2, 1])
    with open(tmp_path / 'a.npy', 'wb') as file:
        np.save(file, np.asfortranarray(images) if kind == 'Fortran' else images.astype(kind))
        np.save(file, labels.astype('>i2' if kind[0] == '>' else 'u1'))
    x, y = data.read_arrays(tmp_path / 'a.npy', labelled=True)
    assert torch.equal(prepare(x, 8)[0, 0], torch.from_numpy(255 * images[0])) and prepare(x, 8)[1:].eq(0).all()
    assert y.tolist() == [0, 2, 1]


def test_class_folder_of_any_sizes(tmp_path):
    """A pixel, a line and a poster become images of the one size, and a single class is a data set (for a plain EBM)."""
    (tmp_path / 'a').mkdir()
    for i, size in enumerate([(1, 1), (1, 60), (60, 1), (500, 300), (15, 16), (16, 15), (16, 16), (17, 400)]):
        Image.new('L', size, 10 * i).save(tmp_path / 'a' / f'{i}.png')
    loaded = load_data(str(tmp_path), 16)
    assert [split.images.shape[1:] for split in (loaded.train, loaded.val, loaded.test)] == [(1, 16, 16)] * 3
    assert sum(map(len, (loaded.train, loaded.val, loaded.test))) == 8 and loaded.class_names == ['a']


def test_digits():
    """scikit-learn's digits: ten classes, 70/15/15."""
    loaded = load_data('digits')
    assert [len(split) for split in (loaded.train, loaded.val, loaded.test)] == [1257, 270, 270]
    assert loaded.train.images.shape[1:] == (1, 16, 16) and loaded.class_names == list('0123456789')


def test_torchvision_set_from_its_files(tmp_path):
    """MNIST is read from torchvision's own layout without network, with validation out of the training part."""
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    labels = np.arange(100, dtype=np.uint8) % 10
    for stem in ('train', 't10k'):
        images = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)
        (raw / f'{stem}-images-idx3-ubyte').write_bytes(np.array([2051, 100, 28, 28], '>i4').tobytes() + images.tobytes())
        (raw / f'{stem}-labels-idx1-ubyte').write_bytes(np.array([2049, 100], '>i4').tobytes() + labels.tobytes())
    assert MNIST(tmp_path, train=True).data.shape == (100, 28, 28)
    loaded = load_data('mnist', data_root=tmp_path)
    assert [len(split) for split in (loaded.train, loaded.val, loaded.test)] == [90, 10, 100]
    assert loaded.class_names == list('0123456789') and loaded.val.labels.bincount().tolist() == [1] * 10


def test_unknown_names_are_told(tmp_path):
    """The message lists what there is."""
    with pytest.raises(DataError, match='letterpress, digits, mnist'):
        load_data('letterpres')
    with pytest.raises(DataError, match="class folder"):
        (tmp_path / 'empty').mkdir()
        load_data(str(tmp_path / 'empty'))


# --- letterpress ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_press(monkeypatch):
    """The press with 20 prints of three letters, and one sheet of clutter."""
    monkeypatch.setattr(data, 'PRINTS', {'a': 20, 'b': 20, 'Q': 20})
    monkeypatch.setattr(data, 'EXTRAS', 10)


def test_letterpress_is_what_the_contract_says():
    """42 letters in 16,171 prints, as unevenly populated as a page."""
    assert len(data.PRINTS) == 42 and sum(data.PRINTS.values()) == 16_171
    assert sum(name.isupper() for name in data.PRINTS) == 16
    assert min(data.PRINTS.values()) < 50 < 700 < max(data.PRINTS.values())


def test_letterpress_same_seed_same_pixels(small_press, tmp_path):
    """Rendered twice with one seed the pixels are the same, with another they are not; no two prints are alike."""
    first, again, other = data.render_letterpress(0), data.render_letterpress(0), data.render_letterpress(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first['train'], other['train'])
    prints = torch.cat([first['train'], first['val'], first['test'], first['clutter'], first['ligatures']]).flatten(1)
    assert len(prints.unique(dim=0)) == len(prints) and first['train'].shape[1:] == (1, 56, 56)
    assert first['train'].float().mean() > 128  # dark ink on light paper
    assert all(first[f'{part}_labels'].bincount().min() >= 3 for part in ('train', 'val', 'test'))


@pytest.mark.parametrize('damage', ['none', 'cut', 'flipped', 'empty'])
def test_letterpress_cache(small_press, tmp_path, monkeypatch, damage):
    """A good cache is read, a damaged one is rendered anew, and no other file is left behind."""
    fresh = load_data('letterpress', 16, tmp_path)
    path, = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == 'flipped':
        content[len(content) // 2] ^= 255
    path.write_bytes({'cut': content[:len(content) // 2], 'empty': b''}.get(damage, content))
    rendered = []
    render = data.render_letterpress
    monkeypatch.setattr(data, 'render_letterpress', lambda seed: rendered.append(seed) or render(seed))
    again = load_data('letterpress', 16, tmp_path)
    assert torch.equal(fresh.train.images, again.train.images) and len(rendered) == (damage != 'none')
    assert list(tmp_path.iterdir()) == [path]


# --- OOD sets and files ---------------------------------------------------------------------------------------------------

def test_ood_sets_fit_the_data(glyphs):
    """Every OOD set has the channels and size of the data, and is the same for the same seed; noise is uniform."""
    loaded = load_data(str(glyphs), 16)
    for name in ('ood_ta', *data.MADE, 'digits'):
        images = load_ood(name, loaded)
        assert images.shape[1:] == loaded.test.images.shape[1:] and images.dtype == torch.uint8
        assert torch.equal(images, load_ood(name, loaded))
    assert not torch.equal(load_ood('noise', loaded, 3), load_ood('noise', loaded, 4))
    with pytest.raises(DataError, match='ood_ta, letterpress, .*noise, .*digits, mnist'):
        load_ood('ood_tb', loaded)


def test_changed_images_keep_the_contrast_of_those_they_came_from(glyphs):
    """The darkest and the lightest pixel of every made image are those of the test image in its place, so that no set is
    told by its handling; turning moves pixels and changes none; a mixture holds two different images."""
    loaded = load_data(str(glyphs), 16)
    test = loaded.test.images
    for name in set(data.MADE) - {'constant'}:
        made = load_ood(name, loaded)
        assert torch.equal(made.amin((1, 2, 3)), test.amin((1, 2, 3))), name
        assert torch.equal(made.amax((1, 2, 3)), test.amax((1, 2, 3))), name
        assert not (made == test).flatten(1).all(1).any(), name
    assert torch.equal(load_ood('flipped', loaded), test.flip(2, 3))
    assert torch.equal(load_ood('rotated', loaded).rot90(-1, (2, 3)), test)
    noise = data.stretch(load_ood('noise', loaded).float())
    assert abs(noise.mean() - .5) < .01 and abs(noise.std() - 12 ** -.5) < .01
    constant = load_ood('constant', loaded)
    assert torch.equal(constant, constant[..., :1, :1].expand_as(constant)) and len(constant.unique()) > 12


def test_shrunk_to_a_quarter(glyphs):
    """Three quarters are one grey, and the last quarter is the whole image, half as high and wide."""
    made = load_ood('shrunk', load_data(str(glyphs), 16))
    assert (made[..., :8, :] == made[..., :1, :1]).all() and (made[..., :8] == made[..., :1, :1]).all()
    assert made[..., 8:, 8:].float().std() > 20


def test_sets_by_name_and_path(glyphs, tmp_path):
    """Files, folders at any depth and arrays of any layout give the same images, named one by one; colour becomes grey
    and grey becomes colour before anything else."""
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    (tmp_path / 'scans' / 'deep').mkdir(parents=True)
    for i, image in enumerate(colour):
        Image.fromarray(image).save(tmp_path / 'scans' / ('deep' if i else '') / f'{i}.png')
    (tmp_path / 'scans' / 'notes.txt').write_text('no image')
    np.save(tmp_path / 'last.npy', colour)
    np.save(tmp_path / 'first.npy', colour.transpose(0, 3, 1, 2) / 255)
    for channels in (1, 3):
        images, names = data.load_images(tmp_path / 'scans', 16, channels)
        assert images.shape == (3, channels, 16, 16) and [name[-5:] for name in names] == ['0.png', '1.png', '2.png']
        one, _ = data.load_images(tmp_path / 'scans' / '0.png', 16, channels)
        assert torch.equal(one, images[:1])
        for name in ('last', 'first'):
            other, names = data.load_images(tmp_path / f'{name}.npy', 16, channels)
            assert (other.int() - images.int()).abs().max() <= 1 and names[2] == f'{tmp_path / name}.npy[2]'
    grey = Image.fromarray(colour[0, :, :, 0])
    grey.save(tmp_path / 'grey.png')
    np.save(tmp_path / 'grey.npy', np.asarray(grey)[None])
    assert torch.equal(data.load_images(tmp_path / 'grey.png', 16, 1)[0], data.load_images(tmp_path / 'grey.npy', 16, 1)[0])
    with pytest.raises(DataError, match='no images'):
        data.load_images(tmp_path / 'scans' / 'notes.txt' / '..' / '..' / 'nowhere', 16, 1)


def test_ood_names_are_what_is_there(glyphs, tmp_path):
    """The sets of the data, all that can be made, and torchvision's whose files are there, but never the data themselves."""
    loaded = load_data(str(glyphs), 16)
    assert data.ood_names(loaded, str(glyphs), tmp_path) == ['ood_ta', 'letterpress', *data.MADE, 'digits']
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for stem in ('train', 't10k'):
        (raw / f'{stem}-labels-idx1-ubyte').write_bytes(np.array([2049, 3], '>i4').tobytes() + bytes(3))
        (raw / f'{stem}-images-idx3-ubyte').write_bytes(np.array([2051, 3, 28, 28], '>i4').tobytes() + bytes(3 * 28 * 28))
    assert data.ood_names(loaded, 'digits', tmp_path) == ['ood_ta', *data.MADE, 'mnist']
    assert load_ood('mnist', loaded, data_root=tmp_path).shape == (3, 1, 16, 16)
    assert 'mnist' not in data.ood_names(loaded, 'mnist', tmp_path)


def test_atomic_write_leaves_the_old_file_whole(tmp_path):
    """An error in the middle of writing changes nothing and leaves nothing behind."""
    path = tmp_path / 'a.txt'
    with atomic_write(path) as file:
        file.write(b'old')
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as file:
            file.write(b'new and unfinished')
            raise KeyboardInterrupt
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


def test_grid_is_a_picture_with_all_its_images(tmp_path):
    """save_grid writes a PNG in which every image stands where it should, at its zoom."""
    x = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 1, 28, 28)
    data.save_grid(x, tmp_path / 'g.png', 3, rows=['a', 'b'], heads=[1, 2, 3], captions=list('uvwxyz'), title='t')
    picture = np.asarray(Image.open(tmp_path / 'g.png').convert('L')).astype(int)
    for i, value in enumerate(to_uint8(torch.linspace(-1, 1, 6)).tolist()):
        assert (abs(picture - value) <= 1).sum() >= 50 * 50, i


def test_examples_of_each_class(glyphs, tmp_path, refused):
    """python data.py draws a row of ten for each class; a mistake is one line."""
    data.main(['--data', str(glyphs), '--out', str(tmp_path), '--image-size', '20'])
    with Image.open(tmp_path / 'data.png') as picture:
        assert picture.width > 10 * 20 and picture.height > 3 * 20 and np.asarray(picture.convert('L')).std() > 20
    assert 'nowhere' in refused(data.main, '--data', 'nowhere')

"""Course task 3.1: what images are, how sets are read, OOD sets, and the files that are written."""
import os
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bars
from hints import assert_close
from PIL import Image

import data
from data import (DataError, atomic_write, load_data, load_images, load_ood, prepare, read_pages,
                  to_float, to_uint8)

PARTS = ['train', 'val', 'test']


def fill(folder, count, ending='png', seed=0):
    """Write so many noisy grey images into a new folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        image = random.integers(0, 256, (20, 20), dtype=np.uint8)
        Image.fromarray(image).save(folder / f'{i}.{ending}')


def save_course(folder, change=lambda images, labels, part: (images, labels)):
    """Write train.npy, val.npy and test.npy: 24 bars of 3 classes each, changed by a function."""
    folder.mkdir(exist_ok=True)
    for seed, part in enumerate(PARTS):
        with open(folder / f'{part}.npy', 'wb') as file:
            for array in change(*bars(24, seed), part):
                np.save(file, array)
    return str(folder)


def read_image(path):
    """The first page of an image file, (3, H, W)."""
    return next(read_pages(path))


def counts(loaded):
    return [len(getattr(loaded, part)) for part in PARTS]


# --- pixels ---------------------------------------------------------------------------------------

def test_range_mapping_and_its_inverse():
    """uint8 -> [-1, 1] -> uint8 is the identity on all 256 levels; the ends are -1 and 1."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert_close(to_float(levels)[[0, -1]], [-1., 1.], 'pixels lie in [-1, 1], and both ends occur')
    assert torch.equal(to_uint8(to_float(levels)), levels), 'round to the nearest level'
    assert to_uint8(torch.tensor([-9., 9.])).tolist() == [0, 255], (
        'clamp before the change to uint8, or what lies outside wraps around')


def test_prepare_is_the_course_preprocessing():
    """Min-max per image, shorter side to the size, centre crop, whatever the range of values."""
    image = torch.rand(1, 1, 40, 60, generator=torch.Generator().manual_seed(0))
    image[..., 20, 30], image[..., 20, 31] = -1., 2.
    done = prepare(image, 40)
    assert done.shape == (1, 1, 40, 40) and done.dtype == torch.uint8
    share = (image + 1) / 3  # it has the right height already
    assert_close(done.int(), share[..., 10:50].mul(255).round().int(),
                 'only the shorter side is brought to the size, and the longer one in proportion', {
                     'cropped at a corner: take the centre': share[..., :40].mul(255).round(),
                     'min-max gives [0, 1], and to_uint8 takes [-1, 1]':
                         share[..., 10:50].add(1).mul(127.5).round(),
                     'min-max is missing': image[..., 10:50].mul(255).round().clamp(0, 255)})
    assert torch.equal(prepare(1000 * image - 7, 40), done), 'min-max: the range has no say'
    pair = prepare(torch.cat([image, 9 * image - 7]), 40)
    assert torch.equal(pair[:1], pair[1:]), 'min-max of each image, not of the batch'
    colour = prepare(torch.cat([image, image / 2 - .5, image / 4 - .75], 1), 40)  # (1, 3, 40, 40)
    assert_close(colour.amax((2, 3)).int(), [[255, 128, 64]],
                 'min-max of the whole image: each channel by itself would change its colours')
    patches = torch.eye(3)[:, None].expand(3, 4, 3).repeat(1, 1, 8)  # (3, 4, 24), red, green, blue
    patches[:, 0], patches[:, 1] = 0., 1.  # a black and a white row
    assert_close(prepare(patches[None], 4, 1)[0, 0, 3, :3].sort().values.int(), [29, 76, 150],
                 'channels=1: levels of red, green and blue are .299, .587 and .114 of white', {
                     'is it their mean? Take the luminance': [85, 85, 85]})


def test_prepare_antialiases():
    """Shrinking to a quarter averages: of stripes one pixel in four, a quarter of the ink stays."""
    stripes = (torch.arange(64) % 4 == 0).expand(64, 64)
    shrunk = prepare(stripes[None, None], 16).float()[..., 1:-1]
    assert (shrunk - 63.75).abs().max() < 25, (
        f'levels from {shrunk.min():.0f} to {shrunk.max():.0f} instead of 64: is antialias on, and '
        'is min-max done before?')


def test_constant_images_stay_finite():
    """A constant image, of whatever value, is no division by zero."""
    for value in (0., 7., -1e30, 3e38):
        constant = torch.full((2, 1, 20, 20), value)
        assert data.stretch(constant).eq(0).all(), (
            'a constant image becomes 0: is its range, 0, a divisor? That gives NaN')


def test_float_images_are_not_mapped_twice():
    """to_float takes uint8 only."""
    with pytest.raises(TypeError, match='float'):
        to_float(torch.zeros(1, 1, 4, 4))


# --- image files ----------------------------------------------------------------------------------

def test_image_files_of_all_kinds(tmp_path):
    """Transparency lies on white paper; 16-bit levels, palettes and CMYK keep their meaning."""
    half = np.zeros((4, 4, 4), np.uint8)  # transparent black
    half[:2] = 255, 0, 0, 255
    Image.fromarray(half).save(tmp_path / 'half.png')
    assert read_image(tmp_path / 'half.png')[:, ::2, 0].tolist() == [[255, 255], [0, 255], [0, 255]]
    levels = (np.arange(16, dtype=np.uint16) * 4000).reshape(4, 4)
    Image.fromarray(levels).save(tmp_path / 'deep.png')
    assert np.array_equal(read_image(tmp_path / 'deep.png')[0].numpy(), levels)
    Image.new('RGB', (4, 4), (255, 0, 0)).quantize(4).save(tmp_path / 'palette.png')
    assert read_image(tmp_path / 'palette.png')[:, 0, 0].tolist() == [255, 0, 0]
    Image.new('CMYK', (4, 4), (0, 0, 0, 255)).save(tmp_path / 'ink.tif')
    assert read_image(tmp_path / 'ink.tif').eq(0).all()


PICTURE = (np.arange(64) % 16 * 17).astype(np.uint8).reshape(8, 8)  # from 0 to 255 in steps of 17
GREY = Image.fromarray(PICTURE)
FILES = {  # one picture in all the ways in which a file can hold it
    'grey.png': GREY, 'grey.bmp': GREY, 'grey.pgm': GREY, 'grey.gif': GREY, 'grey.tif': GREY,
    'grey.tga': GREY, 'grey.jp2': GREY, 'colour.png': GREY.convert('RGB'),
    'opaque.png': GREY.convert('RGBA'), 'grey and opaque.png': GREY.convert('LA'),
    'palette.png': GREY.convert('P'), 'palette.gif': GREY.convert('P'),
    'palette and opaque.tif': GREY.convert('PA'), 'lossless.webp': GREY.convert('RGB'),
    'ink.tif': GREY.convert('RGB').convert('CMYK'), '16 bit.png': Image.fromarray(
        PICTURE * np.uint16(257)), '16 bit.tif': Image.fromarray(PICTURE * np.uint16(9)),
    '32 bit.tif': Image.fromarray(PICTURE * np.int32(9999) - 5),
    'float.tif': Image.fromarray(PICTURE / np.float32(255))}


@pytest.mark.parametrize('name', FILES)
def test_one_picture_in_every_kind_of_file(name, tmp_path):
    """The same picture is the same to the network in any kind of file; a constant one is 0."""
    FILES[name].save(tmp_path / name, lossless=True)
    picture = torch.from_numpy(PICTURE).expand(3, -1, -1)  # (3, 8, 8)
    assert torch.equal(prepare(read_image(tmp_path / name)[None], 8)[0], picture)
    FILES[name].resize((1, 1)).save(tmp_path / name, lossless=True)
    assert prepare(read_image(tmp_path / name)[None], 8).eq(0).all()


def test_pictures_of_two_levels(tmp_path):
    """Files with one bit a pixel are black and white."""
    Image.fromarray(PICTURE > 99).save(tmp_path / 'a.png')
    assert np.array_equal(read_image(tmp_path / 'a.png')[0], 255 * (PICTURE > 99))


UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
           5: np.transpose, 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T,
           8: np.rot90}  # what a viewer does for each orientation (tag 274)


def set_tag(path, tag, value):
    """Overwrite a tag of a little-endian TIFF file."""
    content = bytearray(path.read_bytes())
    at, = struct.unpack('<I', content[4:8])
    for entry in range(at + 2, len(content) - 11, 12):
        if content[entry:entry + 2] == struct.pack('<H', tag):
            content[entry + 8:entry + 12] = struct.pack('<I', value)
            return path.write_bytes(content)


@pytest.mark.parametrize('orientation', UPRIGHT)
@pytest.mark.parametrize('white', [0, 255])
@pytest.mark.parametrize('kind', [np.uint8, np.uint16, np.float32])
def test_tiff_files_as_a_viewer_shows_them(orientation, white, kind, tmp_path):
    """Uncompressed grey TIFF files of each depth are upright, also where 0 is white (tag 262)."""
    picture = PICTURE[:, :5]
    stored = (white - picture if white else picture).astype(kind)
    Image.fromarray(stored).save(tmp_path / 'a.tif', tiffinfo={274: orientation})
    if white:
        set_tag(tmp_path / 'a.tif', 262, 0)
    shown = read_image(tmp_path / 'a.tif')[0].numpy()
    assert np.array_equal(shown - shown.min(), UPRIGHT[orientation](picture))


@pytest.mark.parametrize('levels, kind', [([1, 2 ** 31 + 9], np.int32), ([-100, 100], np.int8)])
def test_levels_that_pillow_wraps_are_refused(levels, kind, tmp_path):
    """Unsigned levels of 32 bits above 2^31, and signed ones of 8 bits (tag 339)."""
    stored = np.tile(np.array(levels).astype(kind), (4, 4))
    image = Image.fromarray(stored.view(np.uint8) if kind is np.int8 else stored)
    image.save(tmp_path / 'a.tif', tiffinfo={339: 2})
    set_tag(tmp_path / 'a.tif', 339, 2 if kind is np.int8 else 1)
    with pytest.raises(DataError, match='a.tif: not readable .*wraps'):
        read_image(tmp_path / 'a.tif')


def test_blank_images_of_ones_own_are_told(tmp_path, glyphs, capsys):
    np.save(tmp_path / 'own.npy', np.stack([np.eye(20), np.ones((20, 20))]))
    load_ood(str(tmp_path / 'own.npy'), load_data(str(glyphs), 16))
    assert 'own.npy: 1 of 2 images are blank' in capsys.readouterr().err, (
        '`prepare` makes an image of one level 0, which is counted')


def test_photographs_stand_upright(tmp_path):
    """What a camera notes about how it was held is heeded."""
    exif = Image.Exif()
    exif[0x112] = 6  # turn by a quarter, clockwise
    Image.fromarray(PICTURE[:, :5]).save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(read_image(tmp_path / 'a.png')[0], np.rot90(PICTURE[:, :5], -1))


@pytest.mark.parametrize('bits', [8, 16])
def test_a_transparent_level_is_white_paper(bits, tmp_path):
    """Grey PNG files may declare one of their levels to be transparent."""
    levels = PICTURE if bits == 8 else PICTURE * np.uint16(257)
    Image.fromarray(levels).save(tmp_path / 'a.png', transparency=int(levels[0, 3]))
    shown = prepare(read_image(tmp_path / 'a.png')[None], 8)[0, 0].numpy()
    assert np.array_equal(shown, np.where(PICTURE == PICTURE[0, 3], 255, PICTURE))


@pytest.mark.parametrize('ending', ['gif', 'tif', 'png', 'webp'])
def test_each_page_of_a_file_is_an_image(ending, tmp_path):
    """Scans and animations of several pages: none is lost, and each has a name."""
    pages = [Image.fromarray(np.roll(PICTURE, i)).convert('RGB') for i in range(3)]
    path = tmp_path / f'a.{ending}'
    pages[0].save(path, save_all=True, append_images=pages[1:], lossless=True)
    images, names = load_images(tmp_path, 8, 1)
    assert names == [f'{path}[0]', f'{path}[1]', f'{path}[2]']
    for i, image in enumerate(images):
        assert np.array_equal(image[0], np.roll(PICTURE, i))


def test_views_layers_and_previews_are_no_pages(tmp_path):
    """MPO photographs, PSD layers and small copies in a TIFF file show one picture again."""
    GREY.convert('RGB').save(tmp_path / 'a.mpo', save_all=True, append_images=[GREY], quality=100)
    header = b'8BPS' + struct.pack('>H6xHIIHH', 1, 1, 8, 8, 8, 1)  # one channel of 8x8, 8 bits
    (tmp_path / 'a.psd').write_bytes(header + bytes(14) + PICTURE.tobytes())
    small = Image.fromarray(PICTURE[::2, ::2])
    small.encoderinfo = {'tiffinfo': {254: 1}}
    GREY.save(tmp_path / 'a.tif', save_all=True, append_images=[small])
    for name in ('a.mpo', 'a.psd', 'a.tif'):
        page, = read_pages(tmp_path / name)
        assert (page[0] - torch.from_numpy(PICTURE)).abs().max() < 9, name


def test_white_letters_on_transparent_ground(tmp_path):
    """On white paper they would be blank: they get black paper, and dark letters keep white."""
    for name, ink in (('white', 255), ('black', 0)):
        pixels = np.dstack([np.full_like(PICTURE, ink), PICTURE])  # (8, 8, 2), grey and alpha
        Image.fromarray(pixels).save(tmp_path / f'{name}.png')
    assert np.array_equal(read_image(tmp_path / 'white.png')[0], PICTURE)
    assert np.array_equal(read_image(tmp_path / 'black.png')[0], 255 - PICTURE)


# --- folders of images ----------------------------------------------------------------------------

def test_class_folder_is_split_70_15_15(tmp_path):
    """Stratified, the same for the same seed, and every image is in one split only."""
    random = np.random.default_rng(0)
    for name in ('b', 'A'):
        (tmp_path / name).mkdir()
        for i in range(20):
            size = random.integers(18, 30, 2)  # mixed sizes
            image = random.integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / name / f'{i}.png')
    first, again, other = (load_data(str(tmp_path), 16, seed=seed) for seed in (0, 0, 1))
    assert first.class_names == ['A', 'b'] and len(first.train) == 28, (
        f'{len(first.train)} instead of 28: what goes to val and test leaves train')
    assert first.train.images.shape == (28, 1, 16, 16)
    splits = [first.train, first.val, first.test]
    for split in splits:
        assert split.labels.bincount().tolist() == [len(split) // 2] * 2, (
            'stratified: each class has the same share in each split')
    assert torch.equal(first.test.images, again.test.images), 'the same seed gives the same split'
    assert not torch.equal(first.test.images, other.test.images)
    everything = torch.cat([split.images for split in splits])
    assert len(everything.flatten(1).unique(dim=0)) == 40, (
        'each image is in one split: are val and test the same, or is one still in train?')


def test_hidden_files_and_links(tmp_path):
    """What notebooks and Macs leave is no class and no image; folders behind links are read, each
    once, also where links lead in circles; names may be any bytes."""
    for name in ('a', os.fsdecode(b'b\xff'), '.ipynb_checkpoints', '__MACOSX/a',
                 'a/.ipynb_checkpoints'):
        fill(tmp_path / 'set' / name, 8)
    (tmp_path / 'set/a/again').symlink_to(tmp_path / 'set/a')
    loaded = load_data(str(tmp_path / 'set'), 16)
    assert loaded.class_names == ['a', r'b\xff'] and sum(counts(loaded)) == 16
    (tmp_path / 'scans').mkdir()
    (tmp_path / 'scans/link').symlink_to(tmp_path / 'set')
    (tmp_path / 'scans/page.tif').mkdir()
    (tmp_path / 'set/up').symlink_to(tmp_path / 'scans')
    images, names = load_images(tmp_path / 'scans', 16, 1)
    assert len(images) == len(names) == 16 and any(r'b\xff' in name for name in names)
    assert not any('.ipynb' in name or 'MACOSX' in name for name in names)


def test_folder_with_its_own_splits(tmp_path):
    """train, val and test folders are taken as they are; colour anywhere makes three channels."""
    for part, count in (('train', 3), ('val', 1), ('test', 2)):
        for name in ('x', 'y'):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.dstack([PICTURE, PICTURE, PICTURE // (i + 1)])  # (8, 8, 3)
                Image.fromarray(pixels).save(tmp_path / part / name / f'{i}.png')
    loaded = load_data(str(tmp_path), 16)
    assert loaded.train.images.shape == (6, 3, 16, 16) and len(loaded.val) == 2
    assert loaded.test.labels.tolist() == [0, 0, 1, 1]


def test_class_folder_of_any_sizes(tmp_path):
    """A line and a poster become images of the one size, and one class is a set (for an EBM)."""
    (tmp_path / 'a').mkdir()
    sizes = [(2, 1), (1, 60), (60, 1), (500, 300), (15, 16), (16, 15), (16, 16), (17, 400)]
    for i, size in enumerate(sizes):
        image = Image.new('L', size)
        image.putpixel((size[0] // 2, size[1] // 2), 255)
        image.save(tmp_path / 'a' / f'{i}.png')
    loaded = load_data(str(tmp_path), 16)
    assert loaded.train.images.shape[1:] == loaded.test.images.shape[1:] == (1, 16, 16)
    assert sum(counts(loaded)) == 8 and loaded.class_names == ['a']


def test_formats_beside_png_are_read_and_others_counted(tmp_path, capsys):
    """What Pillow reads is read, in whatever format; the rest is told with a count."""
    fill(tmp_path / 'a', 12)
    fill(tmp_path / 'b', 12)
    for i, ending in enumerate(['gif', 'bmp', 'TIF', 'webp', 'JPG', 'ppm']):
        path = tmp_path / 'b' / f'{i}.png'
        Image.open(path).save(path.with_suffix(f'.{ending}'))
        path.unlink()
    for name in ('notes.txt', 'x.heic', 'without_ending'):
        (tmp_path / 'a' / name).write_text('no image')
    loaded = load_data(str(tmp_path), 16)
    told = capsys.readouterr().err
    assert sum(counts(loaded)) == 24 and loaded.train.labels.bincount().tolist() == [8, 8]
    assert f'{tmp_path}/a: entries left out' in told and 'Pillow can read: 3' in told
    assert f'{tmp_path}/b: entries' not in told


@pytest.mark.parametrize('names', [['Training', 'Testing'], ['TRAIN', 'Test'],
                                   ['train', 'valid', 'test'], ['Train', 'Validation', 'TEST'],
                                   ['training', 'dev', 'testing']])
def test_usual_names_of_splits(names, tmp_path, capsys):
    """Folders of splits are known in any case and by their usual names, and a line says what was
    taken for what; a missing val is taken out of train."""
    parts = ['train', 'test'] if len(names) == 2 else PARTS
    for i, name in enumerate(names):
        for j, letter in enumerate('ab'):
            fill(tmp_path / name / letter, 20, seed=2 * i + j)
    loaded = load_data(str(tmp_path), 16)
    assert counts(loaded) == ([36, 4, 40] if len(names) == 2 else [40, 40, 40])
    assert loaded.class_names == ['a', 'b'] and loaded.val.labels.unique().tolist() == [0, 1]
    told = capsys.readouterr().err
    assert all(f'{tmp_path / name} is the {part} split' in told for part, name in zip(parts, names))


def test_splits_that_are_ambiguous_or_alone(tmp_path):
    """Two folders for one split, and a split without one for training, are refused by name."""
    for name in ('train/a', 'val/a', 'dev/a'):
        fill(tmp_path / 'two' / name, 8)
    with pytest.raises(DataError, match='two/val: dev is a val split, too'):
        load_data(str(tmp_path / 'two'))
    fill(tmp_path / 'alone/test', 8)
    with pytest.raises(DataError, match='alone/test: no training split here; add one, or rename'):
        load_data(str(tmp_path / 'alone'))


def test_entries_beside_the_data_are_counted(tmp_path, capsys):
    """Loose images beside class folders and class folders beside splits are left out, and told."""
    for name in ('a', 'b'):
        fill(tmp_path / name, 10)
    for i in range(3):
        shutil.copy(tmp_path / 'a/0.png', tmp_path / f'{i}.png')
    assert sum(counts(load_data(str(tmp_path), 16))) == 20
    assert 'not class folders: 3, such as 0.png' in capsys.readouterr().err
    for name in ('train/a', 'train/b', 'test/a', 'test/b'):
        fill(tmp_path / name, 10)
    assert counts(load_data(str(tmp_path), 16)) == [18, 2, 20]
    assert 'neither splits nor OOD sets: 5, such as 0.png' in capsys.readouterr().err


def test_a_folder_called_like_a_set(glyphs, tmp_path, monkeypatch, capsys):
    """The set is taken, a line says so, and ./digits is the folder; likewise for OOD sets."""
    fill(tmp_path / 'digits/a', 8)
    fill(tmp_path / 'noise', 8)
    monkeypatch.chdir(tmp_path)
    assert len(load_data('digits').class_names) == 10
    assert 'for the path write ./digits' in capsys.readouterr().err
    loaded = load_data('./digits', 16)
    assert loaded.class_names == ['a'] and './' not in capsys.readouterr().err.replace(
        'reading digits', '')
    loaded = load_data(str(glyphs), 16)
    assert len(load_ood('noise', loaded)) == 24
    assert 'for the path write ./noise' in capsys.readouterr().err
    assert len(load_ood('./noise', loaded)) == 8


def test_classes_of_one_split_only(tmp_path, capsys, refused):
    """A class without validation images is told, one without training images refused, and an empty
    class folder named."""
    for part in PARTS:
        for name in ('a', 'b', 'c'):
            fill(tmp_path / part / name, 3)
    shutil.rmtree(tmp_path / 'val/b')
    loaded = load_data(str(tmp_path), 16)
    assert loaded.val.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert 'no val images of class b' in capsys.readouterr().err
    (tmp_path / 'val/b').mkdir()
    with pytest.raises(DataError, match='val/b: no images here'):
        load_data(str(tmp_path), 16)
    (tmp_path / 'val/b').rename(tmp_path / 'val/d')
    message = refused(data.main, '--data', tmp_path, '--out', tmp_path.parent / 'out')
    assert 'val/d: a class without training images' in message


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root reads all')
def test_a_folder_that_may_not_be_read_is_not_empty(tmp_path, refused):
    """The message says which folder, and why."""
    fill(tmp_path / 'set/a', 8)
    (tmp_path / 'set/a').chmod(0)
    message = refused(data.main, '--data', tmp_path / 'set', '--out', tmp_path / 'out')
    (tmp_path / 'set/a').chmod(0o700)
    assert 'set/a' in message and 'Permission denied' in message


def test_a_random_split_needs_enough_of_each_class(tmp_path):
    """Eight of each class are enough for val and test, ten for val alone; the class is named."""
    labels = torch.arange(9)
    for count, missing, enough in [(8, 'val test', True), (7, 'val test', False),
                                   (10, 'val', True), (9, 'val', False)]:
        folder = tmp_path / f'{count} {missing}'
        for label in labels:
            name = f'{label}' if missing == 'val test' else f'train/{label}'
            fill(folder / name, count + int(label != 4))
            if missing == 'val':
                fill(folder / f'test/{label}', 1)
        if enough:
            loaded = load_data(str(folder), 16)
            assert all(torch.equal(getattr(loaded, part).labels.unique(), labels) for part in PARTS)
        else:
            with pytest.raises(DataError, match=f'class 4 has {count} of the {count + 1}'):
                load_data(str(folder), 16)


# --- files of arrays ------------------------------------------------------------------------------

def test_course_folder(glyphs, capsys):
    """Two arrays a file, OOD arrays beside them, class names with the data, nothing to tell."""
    loaded = load_data(str(glyphs), 16)
    assert counts(loaded) == [60, 24, 24] and not capsys.readouterr().err
    assert loaded.class_names == ['stand', 'lie', 'lean'] and list(loaded.ood) == ['ood_ta']
    x, y = loaded.train.batch(torch.tensor([5, 3, 1]))
    assert x.shape == (3, 1, 16, 16) and x.dtype == torch.float32
    assert y.tolist() == [2, 0, 1], 'these are labels of other images: both take the same positions'
    assert not torch.equal(loaded.val.images, loaded.test.images), 'val holds the test images'
    assert x.min() >= -1 and x.max() <= 1


def test_data_must_be_like_those_of_a_checkpoint(glyphs):
    """`like` gives the image size, and other classes, counts or channels are refused by name."""
    described = load_data(str(glyphs), 20).describe()
    assert described['image_shape'] == [1, 20, 20]
    assert described['class_counts']['val'] == [8, 8, 8]
    assert load_data(str(glyphs), like=described).train.images.shape == (60, 1, 20, 20)
    for key, value in {'class_names': ['a', 'b', 'c'], 'image_shape': [3, 20, 20],
                       'class_counts': {}}.items():
        with pytest.raises(DataError, match=key.replace('_', ' ')):
            load_data(str(glyphs), like={**described, key: value})


@pytest.mark.parametrize('kind', ['?', 'u1', 'i2', '>i4', 'i8', 'f2', '>f4', 'f8', 'Fortran'])
def test_arrays_of_every_numeric_type(kind, tmp_path):
    """Course arrays mean the same in every type of number, byte order and memory order."""
    images = np.stack([PICTURE // 17 % 2, 0 * PICTURE, 0 * PICTURE + 1])  # (3, 8, 8)
    with open(tmp_path / 'a.npy', 'wb') as file:
        np.save(file, np.asfortranarray(images) if kind == 'Fortran' else images.astype(kind))
        np.save(file, np.array([0, 2, 1]).astype('>i2' if kind[0] == '>' else 'u1'))
    x, y = data.read_arrays(tmp_path / 'a.npy', labelled=True)
    x = prepare(x, 8)
    assert torch.equal(x[0, 0], torch.from_numpy(255 * images[0])) and x[1:].eq(0).all()
    assert y.tolist() == [0, 2, 1]


@pytest.mark.parametrize('shape', [(3, 8, 8), (3, 3, 8), (3, 8, 3), (3, 3, 3), (1, 8, 3)])
def test_channels_come_first_where_both_could_be_meant(shape):
    """(N, 3, H, W) stays as it is, also where H or W is 3; (N, H, W, 3) is turned."""
    images = torch.rand(2, *shape)
    assert torch.equal(data.channels_first(images), images)
    if 3 not in shape[1:]:
        assert torch.equal(data.channels_first(images.movedim(1, 3)), images)


def test_npz_files(tmp_path):
    """Images and labels of a .npz file in any order and by any name; the file name in capitals."""
    course = load_data(save_course(tmp_path / 'npy'), 16)
    (tmp_path / 'npz').mkdir()
    for seed, part in enumerate(PARTS):
        images, labels = bars(24, seed)
        with open(tmp_path / 'npz' / f'{part.upper()}.NPZ', 'wb') as file:
            np.savez(file, y=labels, a=images)
    loaded = load_data(str(tmp_path / 'npz'), 16)
    for part in PARTS:
        assert torch.equal(getattr(loaded, part).images, getattr(course, part).images)
        assert torch.equal(getattr(loaded, part).labels, getattr(course, part).labels)
    assert len(load_ood(str(tmp_path / 'npz/TEST.NPZ'), loaded)) == 24
    with zipfile.ZipFile(tmp_path / 'npz/VAL.NPZ', 'a') as file:
        file.writestr('note.txt', 'no array')
    with pytest.raises(DataError, match='VAL.NPZ: needs images and labels, but holds'):
        load_data(str(tmp_path / 'npz'), 16)


@pytest.mark.parametrize('colour', ['train', 'val test'])
def test_each_split_gets_the_channels_of_train(colour, tmp_path):
    """Colour in one split and grey in another: train decides, and grey images stay the same."""
    def change(images, labels, part):
        return np.stack([images] * 3 if part in colour else [images], -1) / [1, 2, 3][:3 if part in
                        colour else 1], labels

    loaded = load_data(save_course(tmp_path / 'G', change), 16)
    grey = load_data(save_course(tmp_path / 'grey'), 16)
    channels = 3 if colour == 'train' else 1
    for part in PARTS:
        assert getattr(loaded, part).images.shape == (24, channels, 16, 16)
    if colour == 'train':
        assert torch.equal(loaded.val.images, grey.val.images.expand(-1, 3, -1, -1))
    else:
        assert torch.equal(loaded.train.images, grey.train.images)
        assert (loaded.val.images.int() - grey.val.images.int()).abs().max() <= 1


@pytest.mark.parametrize('form', ['column', 'bool', 'float'])
def test_labels_that_mean_the_same_are_accepted(form, tmp_path):
    """(N, 1), booleans for two classes, and floats that are whole numbers."""
    change = {'column': lambda y: y[:, None], 'bool': lambda y: y > 0,
              'float': lambda y: y.astype(np.float32)}[form]
    loaded = load_data(save_course(tmp_path / 'G', lambda x, y, part: (x, change(y))), 16)
    expected = torch.from_numpy(bars(24, 1)[1])
    assert torch.equal(loaded.val.labels, expected.clamp(max=1) if form == 'bool' else expected)
    assert loaded.val.labels.dtype == torch.int64


@pytest.mark.parametrize('where, change, message', [
    ('train', lambda y: np.eye(3)[y], r'train.npy: .* holds .* float64 \(24, 3\); save .* labels'),
    ('val', lambda y: y[:-1], r'val.npy: .* holds float32 \(24, .* int64 \(23,\); save'),
    ('val', lambda y: y.astype(str), r'val.npy: .* holds .* <U'),
    ('test', lambda y: y + .5, r'test.npy: has a label 0.5'),
    ('test', lambda y: y * np.nan, r'test.npy: has a label nan'),
    ('val', lambda y: y - 1, r'val.npy: has a label -1'),
    ('train', lambda y: y + 1, 'no train images of class stand, but labels up to 3; number'),
    ('train', lambda y: 2 * y, 'no train images of class lie, but labels up to 4; number'),
    ('train', lambda y: y * 10 ** 15, 'no train images of class lie, but labels up to 2000000000'),
    ('val', lambda y: y + 1, 'val has labels up to 3, but train has 3 classes'),
    ('test', lambda y: y * 10 ** 15, 'test has labels up to 2000000000000000, but train has 3')])
def test_wrong_labels_are_told_with_the_true_reason(where, change, message, tmp_path):
    """Each message names the cause and the file or the split, and no label allocates memory."""
    (tmp_path / 'G').mkdir()
    (tmp_path / 'G/classes.txt').write_text('stand\nlie\nlean\n')
    save_course(tmp_path / 'G', lambda x, y, part: (x, change(y) if part == where else y))
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / 'G'), 16)


@pytest.mark.parametrize('change, message', [
    (lambda x, y: [x], r'holds float32 \(24, 20, 20\); save images'),
    (lambda x, y: [x, y, y], r'holds .* int64 \(24,\), int64 \(24,\); save images'),
    (lambda x, y: [x.reshape(24, 400), y], r'holds float32 \(24, 400\)'),
    (lambda x, y: [np.stack([x] * 4, 3), y], r'holds float32 \(24, 20, 20, 4\)'),
    (lambda x, y: [x[:, None, None], y], r'holds float32 \(24, 1, 1, 20, 20\)'),
    (lambda x, y: [x[:0], y[:0]], r'holds float32 \(0, 20, 20\)'),
    (lambda x, y: [x + 0j, y], r'holds complex64'),
    (lambda x, y: [x / 0, y], 'not all pixels are finite'),
    (lambda x, y: [x.astype(np.float64) * 1e300, y], 'not all pixels are finite'),
    (lambda x, y: [], 'holds nothing')])
@pytest.mark.filterwarnings('ignore:divide by zero')
def test_wrong_arrays_are_told_with_the_true_reason(change, message, tmp_path):
    """The message says what the file holds, and no reason is borrowed from a library."""
    save_course(tmp_path / 'G', lambda x, y, part: change(x, y) if part == 'val' else (x, y))
    with pytest.raises(DataError, match=f'G/val.npy: .*{message}'):
        load_data(str(tmp_path / 'G'), 16)


@pytest.mark.parametrize('name', ['val.npy', 'val.npz'])
def test_damaged_arrays_are_no_pickles(name, tmp_path):
    """A damaged file is called damaged; nobody is advised to load it unsafely."""
    save_course(tmp_path / 'G')
    (tmp_path / 'G/val.npy').rename(tmp_path / 'G' / name)
    (tmp_path / 'G' / name).write_bytes(b'no array')
    with pytest.raises(DataError, match=f'{name}: not readable') as told:
        load_data(str(tmp_path / 'G'), 16)
    assert 'pickle' not in str(told.value)


def test_blank_sets_are_refused(tmp_path):
    """More than half of a split without any contrast: refused with the count; half is accepted."""
    for count in (12, 13):
        def change(images, labels, part):
            images[:count if part == 'val' else 0] = 7
            return images, labels

        folder = save_course(tmp_path / f'{count}', change)
        if count == 12:
            assert load_data(folder, 16).val.images[:12].eq(0).all()
        else:
            with pytest.raises(DataError, match='13 of the 24 val images are blank'):
                load_data(folder, 16)


@pytest.mark.parametrize('content, names', [
    (b'a\r\nb\r\nc\r\n', 'abc'), (b'\xef\xbb\xbfa\nb\n\nc', 'abc'),
    ('ä\n$x$\n字'.encode(), 'ä $x$ 字'.split()), (b'a\nb\n', None), (b'a\nb\nc\nd\n', None),
    (b'a\nb\nb\n', None), (b'', None), ('ä\nb\nc'.encode('latin-1'), None),
    ('a\nb\nc'.encode('utf-16'), None), ('a\nb\nc'.encode('utf-16-le'), None)])
def test_class_names_from_a_file(content, names, tmp_path):
    """classes.txt may come from any editor; too few, too many or double names are refused."""
    folder = save_course(tmp_path / 'G')
    (tmp_path / 'G/classes.txt').write_bytes(content)
    if names:
        assert load_data(folder, 16).class_names == list(names)
    else:
        with pytest.raises(DataError, match='classes.txt: write a name for each of the 3 classes'):
            load_data(folder, 16)


# --- built-in and downloaded sets -----------------------------------------------------------------

def write_mnist(folder, labels):
    """torchvision's files of MNIST with random images of these labels in both parts."""
    raw = folder / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    count = len(labels)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for stem in ('train', 't10k'):
        head = np.array([2051, count, 28, 28], '>i4').tobytes()
        (raw / f'{stem}-images-idx3-ubyte').write_bytes(head + images.tobytes())
        head = np.array([2049, count], '>i4').tobytes()
        (raw / f'{stem}-labels-idx1-ubyte').write_bytes(head + labels.tobytes())


def test_digits():
    """scikit-learn's digits: ten classes, 70/15/15."""
    loaded = load_data('digits')
    assert counts(loaded) == [1257, 270, 270] and loaded.class_names == list('0123456789')
    assert loaded.train.images.shape[1:] == (1, 16, 16)


def test_torchvision_set_from_its_files(tmp_path):
    """MNIST is read from torchvision's own layout without network; val comes out of train."""
    write_mnist(tmp_path, np.arange(100, dtype=np.uint8) % 10)
    loaded = load_data('mnist', data_root=tmp_path)
    assert counts(loaded) == [90, 10, 100] and loaded.class_names == list('0123456789')
    assert loaded.val.labels.bincount().tolist() == [1] * 10


def test_emnist_letters_stand_upright(monkeypatch):
    """torchvision's lie on their side, and are counted from 1, after a class of no letters."""
    class Letters(list):
        classes = ['N/A', 'a', 'b']

    image = np.zeros((28, 28))
    image[:, :9] = 255  # a bar on the left
    letters = Letters([(image.T, 1 + i % 2) for i in range(40)])
    monkeypatch.setattr(data, 'open_set', lambda *_, **__: letters)
    split, class_names = data.load_set('emnist-letters', 'train', None, '')
    assert class_names == ['a', 'b'] and split.labels.tolist() == [0, 1] * 20
    assert torch.equal(split.images[0, 0], torch.from_numpy(image).byte())


def test_unknown_names_are_told(tmp_path):
    """The message lists what there is; a file of arrays is no data set."""
    with pytest.raises(DataError, match='letterpress, digits, mnist'):
        load_data('letterpres')
    save_course(tmp_path / 'G')
    with pytest.raises(DataError, match='name the folder of the data'):
        load_data(str(tmp_path / 'G/train.npy'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match='class folder'):
        load_data(str(tmp_path / 'empty'))


# --- letterpress ----------------------------------------------------------------------------------

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


def test_letterpress_same_seed_same_pixels(small_press):
    """One seed gives the same pixels twice, another one others; no two prints are alike."""
    first, again, other = [data.print_letterpress(seed) for seed in (0, 0, 1)]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first['train'], other['train'])
    prints = torch.cat([first[key] for key in [*PARTS, *data.PRESS_OOD]]).flatten(1)
    assert len(prints.unique(dim=0)) == len(prints) == 100
    assert first['train'].shape[1:] == (1, 56, 56)
    assert first['train'].float().mean() > 128  # dark ink on light paper
    assert all(first[f'{part}_labels'].bincount().min() >= 3 for part in PARTS)


@pytest.mark.parametrize('damage', ['none', 'cut', 'flipped', 'empty'])
def test_letterpress_cache(small_press, tmp_path, monkeypatch, damage):
    """A good cache is read, a damaged one is printed anew, and no other file is left behind."""
    fresh = load_data('letterpress', 16, tmp_path)
    path, = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == 'flipped':
        content[len(content) // 2] ^= 255
    path.write_bytes({'cut': content[:len(content) // 2], 'empty': b''}.get(damage, content))
    printed, render = [], data.print_letterpress
    monkeypatch.setattr(data, 'print_letterpress', lambda n: printed.append(n) or render(n))
    for name, images in fresh.ood.items():
        assert images.shape[1:] == (1, 16, 16), f'{name}: OOD sets pass through prepare, too'
    again = load_data('letterpress', 16, tmp_path)
    assert torch.equal(fresh.train.images, again.train.images)
    assert len(printed) == (damage != 'none') and list(tmp_path.iterdir()) == [path]


# --- OOD sets -------------------------------------------------------------------------------------

def test_ood_sets_fit_the_data(glyphs):
    """Every OOD set has the channels and size of the data, and is the same for the same seed."""
    loaded = load_data(str(glyphs), 16)
    for name in ('ood_ta', *data.MADE, 'digits'):
        images = load_ood(name, loaded)
        assert images.shape[1:] == loaded.test.images.shape[1:] and images.dtype == torch.uint8, (
            f'{name}: an OOD set passes through prepare and has the size and channels of the data')
        assert torch.equal(images, load_ood(name, loaded))
    raw = torch.from_numpy(np.load(glyphs / 'ood_ta.npy'))[:, None]  # (N, 1, 20, 20)
    assert torch.equal(load_ood('ood_ta', loaded), prepare(raw, 16)), (
        'OOD images pass through prepare like the data, or their range gives them away')
    assert not torch.equal(load_ood('noise', loaded, 3), load_ood('noise', loaded, 4))
    with pytest.raises(DataError, match='ood_ta, .*noise, .*letterpress, digits, mnist'):
        load_ood('ood_tb', loaded)


def test_changed_images_keep_the_contrast_of_those_they_came_from(glyphs):
    """The darkest and the lightest pixel of every made image are those of the test image in its
    place, so that no set is told by its handling; turning moves pixels and changes none."""
    loaded = load_data(str(glyphs), 16)
    test = loaded.test.images
    for name in set(data.MADE) - {'constant'}:
        made = load_ood(name, loaded)
        for end in (torch.amin, torch.amax):
            assert torch.equal(end(made, (1, 2, 3)), end(test, (1, 2, 3))), (
                f'{name}: has another range than the test images, which gives it away')
        assert not (made == test).flatten(1).all(1).any(), name
    turned = torch.from_numpy(test.numpy()[:, :, ::-1, ::-1].copy())
    assert torch.equal(load_ood('flipped', loaded), turned), 'flipped: over both axes'
    for name in ('noisy', 'noise', 'gaussian'):
        first, second = data.MADE[name](torch.zeros(2, 1, 8, 8), torch.Generator().manual_seed(0))
        assert not torch.equal(first, second), f'{name}: all images get the same noise'
    assert torch.equal(load_ood('rotated', loaded).rot90(-1, (2, 3)), test)
    noise = data.stretch(load_ood('noise', loaded).float())
    assert abs(noise.mean() - .5) < .01 and abs(noise.std() - 12 ** -.5) < .01
    constant = load_ood('constant', loaded)
    assert torch.equal(constant, constant[..., :1, :1].expand_as(constant))
    assert len(constant.unique()) > 12
    assert constant.min() < 50 and constant.max() > 200, 'constant images keep their own levels'


def test_shrunk_to_a_quarter(glyphs):
    """Three quarters are one grey; the last one is the whole image, half as high and wide."""
    made = load_ood('shrunk', load_data(str(glyphs), 16))
    corner = made[..., :1, :1]
    assert (made[..., :8, :] == corner).all() and (made[..., :8] == corner).all()
    assert made[..., 8:, 8:].float().std() > 20


def test_sets_by_name_and_path(tmp_path):
    """Files, folders at any depth and arrays of any layout give the same images, named one by one;
    colour becomes grey and grey becomes colour before anything else."""
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    scans = tmp_path / 'scans'
    (scans / 'deep').mkdir(parents=True)
    for i, image in enumerate(colour):
        Image.fromarray(image).save(scans / ('deep' if i else '') / f'{i}.png')
    np.save(tmp_path / 'last.npy', colour)
    np.save(tmp_path / 'first.npy', colour.transpose(0, 3, 1, 2) / 255)
    for channels in (1, 3):
        images, names = load_images(scans, 16, channels)
        assert images.shape == (3, channels, 16, 16)
        assert [Path(name).name for name in names] == ['0.png', '1.png', '2.png']
        one, _ = load_images(scans / '0.png', 16, channels)
        assert torch.equal(one, images[:1])
        for name in ('last', 'first'):
            other, names = load_images(tmp_path / f'{name}.npy', 16, channels)
            assert (other.int() - images.int()).abs().max() <= 1
            assert names[2] == f'{tmp_path / name}.npy[2]'
    grey = Image.fromarray(colour[0, :, :, 0])
    grey.save(tmp_path / 'grey.png')
    np.save(tmp_path / 'grey.npy', np.asarray(grey)[None])
    from_png, from_array = [load_images(tmp_path / f'grey.{kind}', 16, 1)[0]
                            for kind in ('png', 'npy')]
    assert torch.equal(from_png, from_array)
    with pytest.raises(DataError, match='nowhere.png: not readable'):
        load_images(tmp_path / 'nowhere.png', 16, 1)


def test_ood_names_are_what_is_there(glyphs, tmp_path):
    """The sets of the data, all that can be made, and torchvision's whose files are there, but
    never the data themselves."""
    loaded = load_data(str(glyphs), 16)
    expected = ['ood_ta', 'letterpress', *data.MADE, 'digits']
    assert data.ood_names(loaded, str(glyphs), tmp_path) == expected
    write_mnist(tmp_path, np.zeros(3, np.uint8))
    assert data.ood_names(loaded, 'digits', tmp_path) == ['ood_ta', *data.MADE, 'mnist']
    assert load_ood('mnist', loaded, data_root=tmp_path).shape == (3, 1, 16, 16)
    assert 'mnist' not in data.ood_names(loaded, 'mnist', tmp_path)


# --- files that are written -----------------------------------------------------------------------

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


@pytest.mark.parametrize('size', [16, 28, 56])
def test_grid_is_a_picture_with_all_its_images(size, tmp_path):
    """Every image stands in the grid at its zoom, no text lies on any of them, and the heads of
    columns do not run into each other."""
    levels = torch.tensor([.2, .3, .4, .5, .6, .7])
    x = levels.view(6, 1, 1, 1).expand(6, 1, size, size)
    heads, captions = ['a much longer head'] * 3, ['jg|'] * 6
    data.save_grid(x, tmp_path / 'g.png', 3, 'title', ['a', 'b'], heads, captions)
    picture = np.asarray(Image.open(tmp_path / 'g.png').convert('L')).astype(int)
    side = size * round(56 / size)
    assert picture.shape[1] > 3 * (side + 2 * side // size)  # names of rows stand on the left
    for level in to_uint8(levels).tolist():
        rows, columns = np.nonzero(abs(picture - level) <= 1)
        top, left = [int(np.ceil(np.median(at))) - side // 2 for at in (rows, columns)]
        inside = picture[top + 1:top + side - 1, left + 1:left + side - 1]
        assert (abs(inside - level) <= 1).all(), level
        if level in to_uint8(levels[:2]):  # the first two images: a gap is on their right
            gap = picture[top - 12:top - 1, left + side:left + side + 4]
            assert (gap == 255).all(0).any(), level


def test_examples_of_each_class(glyphs, tmp_path, refused, monkeypatch):
    """python data.py draws a row of ten for each of at most a hundred classes, with their names."""
    data.main(['--data', str(glyphs), '--out', str(tmp_path), '--image-size', '20'])
    with Image.open(tmp_path / 'data.png') as picture:
        assert picture.width > 10 * 20 and picture.height > 3 * 20
        assert np.asarray(picture.convert('L')).std() > 20
    drawn = []
    monkeypatch.setattr(data, 'save_grid', lambda x, *_, rows: drawn.append((x, rows)))
    split = data.Split(torch.arange(250, dtype=torch.uint8).view(250, 1, 1, 1), torch.arange(250))
    data.draw_examples(data.Data(split, split, split, [f'${i}' for i in range(250)]), 'nowhere')
    (x, rows), = drawn
    assert len(x) == 1000 and len(rows) == 100 and rows[99] == '$99'
    assert to_uint8(x[::10]).flatten().tolist() == list(range(100))


@pytest.mark.parametrize('flags, reason', [
    (['--data', 'nowhere'], 'nowhere: no such folder'), (['--image-size', 0], '--image-size 0'),
    (['--image-size', -5], '--image-size -5'), (['--image-size', 10 ** 9], '--image-size 1000'),
    (['--image-size', 'x'], "--image-size: invalid int value: 'x'"), (['--seed', -1], '--seed -1'),
    (['--seed', 2 ** 32], '--seed 4294967296'), (['--nope'], '--nope')])
def test_mistakes_in_flags_are_one_line(flags, reason, tmp_path, refused):
    """python data.py: status 2 and a line that names the flag."""
    assert reason in refused(data.main, '--data', 'digits', '--out', tmp_path, *flags)

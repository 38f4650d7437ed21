"""Data sets, out-of-distribution (OOD) sets and picture files (course task 3.1).

An image is float32 (B, C, H, W) in [-1, 1] inside the network, and uint8 in memory and on disk:
`to_float` and `to_uint8` map a batch. Every image that is read, in-distribution or OOD, passes
through `prepare`, so that no set can be told from another by its range or crop.
"""
import argparse
import codecs
import contextlib
import csv
import itertools
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from tqdm import tqdm

SPLITS = {'train': ['train', 'training'], 'val': ['val', 'valid', 'validation', 'dev'],
          'test': ['test', 'testing']}  # names of their files or folders, in upper or lower case
SETS = {'digits': 16, 'mnist': 28, 'fashion-mnist': 28, 'kmnist': 28, 'emnist-letters': 28,
        'cifar10': 32, 'svhn': 32, 'omniglot': 56}  # name: default image size
NAMES = ['letterpress', *SETS]
sys.stderr = sys.stderr or open(os.devnull, 'w')  # it may be closed, which tqdm does not survive
ARRAYS = ('.npy', '.npz')
OOD_ARRAYS = 'ood_*.np[yz]'


class DataError(ValueError):
    """The data cannot be used; the message names the file or flag and the way out."""


@dataclass
class Split:
    """A part of a data set: images uint8 (N, C, H, W) and labels int64 (N,)."""
    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """Images float32 (B, C, H, W) in [-1, 1] and labels (B,) at the positions `index` (B,)."""
        return to_float(self.images[index]), self.labels[index]

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))


@dataclass
class Data:
    """Three splits, the class names by label, and the OOD sets that come with them, by name."""
    train: Split
    val: Split
    test: Split
    class_names: list
    ood: dict = field(default_factory=dict)

    def describe(self):
        """What a checkpoint remembers of its data, as plain values."""
        count = len(self.class_names)
        return {'image_shape': list(self.test.images.shape[1:]), 'class_names': self.class_names,
                'class_counts': {part: getattr(self, part).labels.bincount(minlength=count).tolist()
                                 for part in SPLITS}}


# --- pixels ---------------------------------------------------------------------------------------

def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1]. Float images are a TypeError: they are mapped already."""
    if images.is_floating_point():
        raise TypeError('images are float and need no to_float; give uint8 from 0 to 255')
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1] -> uint8 0..255, the inverse of `to_float`; values outside are clamped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def stretch(x):
    """Min-max scale each image of (N, C, H, W) to [0, 1]; a constant one becomes 0, not NaN."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
    return (x - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)


def prepare(images, image_size, channels=None):
    """The course's preprocessing of images (N, 1 or 3, H, W) of any numeric type and range: make
    colour grey for channels=1 (luminance) or repeat grey for channels=3, min-max scale each image,
    resize the shorter side (antialiased), crop the centre. Returns uint8 (N, C, size, size)."""
    from torchvision.transforms.v2.functional import center_crop, resize  # slow to import
    done = []
    for x in torch.as_tensor(images).split(1024):  # bounds the memory that floats take
        x = x.to(torch.float32)  # (B, C, H, W)
        if channels == 1 and x.shape[1] == 3:
            luminance = (x * x.new_tensor([.299, .587, .114]).view(3, 1, 1)).sum(1, keepdim=True)
            grey = (x == x[:, :1]).flatten(1).all(1)  # (B,), these keep their exact levels
            x = torch.where(grey.view(-1, 1, 1, 1), x[:, :1], luminance)  # (B, 1, H, W)
        x = stretch(x).expand(-1, channels or -1, -1, -1)  # (B, channels, H, W)
        x = center_crop(resize(x, [image_size], antialias=True), [image_size])  # (B, C, size, size)
        done.append(to_uint8(2 * x - 1))
    return torch.cat(done)


# --- data sets ------------------------------------------------------------------------------------

def load_data(name, image_size=None, data_root='.data', seed=0, like=None):
    """Load one of NAMES, or a folder: the course's with train.npy, val.npy, test.npy and ood_*.npy,
    or one that holds a folder of images for each class, as it is or in train, val and test.

    image_size: side of the images; None is that of SETS, and 56 for the rest.
    data_root: folder of downloads and of the rendered letterpress.
    seed: of the random splits and of the letterpress.
    like: what `Data.describe()` must return, else a DataError; sets the image size, too.
    """
    if image_size is not None and not 1 <= image_size <= 4096:
        raise DataError(f'--image-size {image_size}: name a number of pixels from 1 to 4096')
    if not 0 <= seed < 2 ** 32:
        raise DataError(f'--seed {seed}: name a number from 0 to {2 ** 32 - 1}')
    size = like['image_shape'][-1] if like else image_size
    parts, ood = {}, {}
    tell_ambiguous('--data', name, NAMES)
    if name == 'letterpress':
        parts, class_names, ood = load_letterpress(size or 56, data_root, seed)
    elif name in SETS:
        for part in ['train'] if name in ('digits', 'omniglot') else ['train', 'test']:
            parts[part], class_names = load_set(name, part, size, data_root)
    elif os.path.isdir(name):
        parts, class_names, ood = load_folder(Path(name).resolve(), size or 56)
    else:
        raise DataError(f'--data {name}: no such folder and no known set; name the folder of the '
                        f'data, or one of {", ".join(NAMES)}')
    check_parts(name, parts, class_names)
    # Missing splits are drawn from train, each class in the same shares: 15 % for test and as many
    # images for val. If test is given, val gets 10 %.
    test_size = .1 if 'test' in parts else .15
    for part in [part for part in ('test', 'val') if part not in parts]:
        from sklearn.model_selection import train_test_split  # slow to import
        train = parts['train']
        index = train_test_split(np.arange(len(train)), test_size=test_size, stratify=train.labels,
                                 random_state=seed)  # positions (n,) and (m,)
        parts['train'], parts[part] = [Split(train.images[i], train.labels[i]) for i in index]
        test_size = len(parts[part])  # a count, so that val gets as many as test
    data = Data(*(parts[part] for part in SPLITS), class_names, ood)
    for key, value in data.describe().items():
        if like and value != like[key]:
            raise DataError(f'--data {name}: another {key.replace("_", " ")} than the checkpoint '
                            'was trained on; restore the data, or train anew')
    return data


def check_parts(name, parts, class_names):
    """Refuse parts from which nothing can be learned, and tell which classes are missing."""
    for part, split in parts.items():
        blank = count_blank(split.images)
        if blank > len(split) / 2:
            raise DataError(f'--data {name}: {blank} of the {len(split)} {part} images are blank, '
                            'of one level throughout; mend or remove them')
        missing = [text for label, text in enumerate(class_names) if label not in split.labels]
        if missing and part == 'train':
            raise DataError(f'--data {name}: no train images of class {missing[0]}, but labels up '
                            f'to {split.labels.max()}; number the classes 0, 1, ... without a gap')
        if split.labels.max() >= len(class_names):
            raise DataError(f'--data {name}: {part} has labels up to {split.labels.max()}, but '
                            f'train has {len(class_names)} classes; number them 0, 1, ...')
        if missing:
            tell(f'--data {name}: no {part} images of class {", ".join(missing)}')
    counts, needed = parts['train'].labels.bincount(), 10 if 'test' in parts else 8  # (K,)
    if len(parts) < len(SPLITS) and counts.min() < needed:  # 10 % of 10, or 15 % of 8, is one
        raise DataError(f'--data {name}: class {class_names[counts.argmin()]} has {counts.min()} '
                        f'of the {needed} train images needed to split them; add some')


def count_blank(images):
    """How many of the images (N, C, H, W) are of one level: `prepare` makes these 0."""
    return int((images.amax((1, 2, 3)) == 0).sum())


def check_apart(out, *inputs):
    """A DataError if `out` lies in an input folder: the next run would read its pictures."""
    out = Path(out).resolve()
    for name in inputs:
        if name and name not in (*NAMES, *MADE) and Path(name).resolve() in (out, *out.parents):
            raise DataError(f'--out {out}: lies in {name}, which is read as data; name another')


def tell(message):
    """A line about something that was decided for the user."""
    tqdm.write(message, file=sys.stderr)  # between progress bars, not into them


def tell_ambiguous(flag, name, known):
    if name in known and os.path.exists(name):
        tell(f'{flag} {name}: takes the set of that name; for the path write ./{name}')


def open_set(name, part, data_root, download=False):
    """(image, label) pairs of the part 'train' or 'test'; digits and omniglot are one part. What is
    missing is fetched only if `download`."""
    if name == 'digits':
        from sklearn import datasets  # slow to import
        digits = datasets.load_digits()
        return list(zip(digits.images, digits.target))
    from torchvision import datasets  # slow to import
    place = {'root': data_root, 'download': download}
    if name == 'omniglot':
        return datasets.Omniglot(**place)
    if name == 'svhn':
        return datasets.SVHN(split=part, **place)
    if name == 'emnist-letters':
        return datasets.EMNIST(split='letters', train=part == 'train', **place)
    kind = {'mnist': datasets.MNIST, 'fashion-mnist': datasets.FashionMNIST,
            'kmnist': datasets.KMNIST, 'cifar10': datasets.CIFAR10}[name]
    return kind(train=part == 'train', **place)


def load_set(name, part, image_size, data_root, channels=None):
    """A Split and the class names of a set of SETS, downloaded if it is missing."""
    try:
        source = open_set(name, part, data_root, download=True)
        images, labels = zip(*((np.asarray(image), label) for image, label in source))
    except Exception as error:  # of many kinds, for damaged files
        raise DataError(f'{name}: missing or damaged under --data-root {data_root}, and no '
                        f'download ({error}); name its folder, or mend it') from error
    images, labels = channels_first(torch.from_numpy(np.stack(images))), torch.tensor(labels)
    names = getattr(source, 'classes', range(int(labels.max()) + 1))  # MNIST's are '0 - zero', ...
    class_names = [str(label).split(' - ')[0].replace(' ', '_') for label in names]
    if name == 'emnist-letters':  # these lie on their side and are counted from 1
        images, labels, class_names = images.mT, labels - 1, class_names[1:]
    images = prepare(images, image_size or SETS[name], channels)  # (N, C, size, size)
    return Split(images, labels), class_names


# --- files ----------------------------------------------------------------------------------------

def load_folder(folder, image_size):
    """Splits, class names and OOD sets of a folder. Its splits are known by their names (SPLITS);
    without any, the folder itself holds the class folders."""
    entries, ood, found = visible(folder), sorted(folder.glob(OOD_ARRAYS)), {}
    for part, names in SPLITS.items():
        for path in entries:
            if path.stem.lower() in names and (path.is_dir() or path.suffix.lower() in ARRAYS):
                if part in found:
                    raise DataError(f'{path}: {found[part].name} is a {part} split, too; keep one')
                found[part] = path
    if not found:
        classes = [path.name for path in entries if path.is_dir()]
        tell(f'{folder}: no splits, so folders are classes: {classes[:4]}')
        found['train'] = folder
    elif 'train' not in found:
        raise DataError(f'{min(found.values())}: no training split here; add one, or rename this')
    else:
        if any(path.stem != part for part, path in found.items()):
            tell(', '.join(f'{path} is the {part} split' for part, path in found.items()))
        others = {*entries} - {*found.values(), *ood, folder / 'classes.txt'}
        tell_left_out(folder, others, 'neither splits nor OOD sets')
    parts, class_names, channels = {}, None, None
    for part, path in found.items():
        if not path.is_dir():
            images, labels = read_arrays(path, labelled=True)
            images = prepare(images, image_size, channels)  # (N, C, size, size)
            class_names = class_names or read_class_names(folder, labels)
        else:
            images, labels, class_names = read_classes(path, image_size, channels, class_names)
        channels = images.shape[1]
        parts[part] = Split(images, labels)
    return parts, class_names, {path.stem: load_images(path, image_size, channels)[0]
                                for path in ood}


def visible(folder):
    """The entries of a folder without the hidden ones that notebooks and file managers leave."""
    return [at for at in sorted(folder.iterdir()) if not at.name.startswith(('.', '__MACOSX'))]


def tell_left_out(folder, others, why):
    if others:
        tell(f'{folder}: entries left out because they are {why}: {len(others)}, such as '
             f'{printable(min(others).name)}')


def read_arrays(path, labelled=False):
    """Images (N, C, H, W) and labels int64 (N,), or (0,) if there are none, from a .npy file with
    one array after the other, or from a .npz file. No file can run code."""
    wanted = f'images (N, H, W) or (N, H, W, 3){", then integer labels (N,)" * labelled} by np.save'
    arrays = []
    try:
        with open(path, 'rb') as file:
            if path.suffix.lower() == '.npz':
                arrays = [*map(np.asarray, np.lib.npyio.NpzFile(file, allow_pickle=False).values())]
            while path.suffix.lower() == '.npy' and file.peek(1):
                arrays.append(np.lib.format.read_array(file, allow_pickle=False))
    except Exception as error:  # of many kinds, for damaged files
        raise DataError(f'{path}: not readable ({error}); save {wanted}') from error
    arrays.sort(key=np.ndim, reverse=True)  # a .npz file may hold the labels first
    images, *labels = arrays or [np.empty(0)]
    is_images = images.ndim == 3 or images.ndim == 4 and {images.shape[1], images.shape[3]} & {1, 3}
    are_numbers = all(array.size and array.dtype.kind in 'biuf' for array in arrays)
    one_each = [array.size for array in labels] == [*images.shape[:1]]  # (N,) or (N, 1)
    if not is_images or not are_numbers or (labelled or labels) and not one_each:
        held = ', '.join(f'{array.dtype} {array.shape}' for array in arrays) or 'nothing'
        raise DataError(f'{path}: needs images{" and labels" * labelled}, but holds {held}; '
                        f'save {wanted}')
    with np.errstate(all='ignore'):  # what is too large for its new type is told below
        x = channels_first(torch.from_numpy(images.astype(np.float32)))  # (N, C, H, W)
        labels = np.ravel(labels)  # (N,) or (0,)
        y = labels.astype(np.int64)
    if not (x.max() - x.min()).isfinite():
        raise DataError(f'{path}: not all pixels are finite numbers; mend or remove these')
    wrong = labels[(y != labels) | (y < 0)]
    if len(wrong):
        raise DataError(f'{path}: has a label {wrong[0]}; number the classes 0, 1, ...')
    return x, torch.from_numpy(y)


def channels_first(images):
    """(N, H, W), (N, H, W, 1 or 3) or (N, C, H, W) -> (N, C, H, W)."""
    if images.ndim == 3:
        return images[:, None]  # (N, H, W) -> (N, 1, H, W)
    last = images.shape[3] in (1, 3) and images.shape[1] not in (1, 3)
    return images.movedim(3, 1) if last else images  # (N, H, W, C) -> (N, C, H, W)


def read_class_names(folder, labels):
    """The lines of classes.txt, or of glyphs_classes.txt beside a folder GLYPHS, else numbers."""
    count = len(labels.unique())  # `check_parts` refuses gaps
    files = folder / 'classes.txt', folder.parent / f'{folder.name.lower()}_classes.txt'
    for file in filter(Path.exists, files):
        text = file.read_text('utf-8-sig', errors='replace')
        names = [line.strip() for line in text.splitlines() if line.strip()]
        is_utf8 = '\ufffd' not in text and '\0' not in text
        if not is_utf8 or not len(names) == len(set(names)) == count:
            raise DataError(f'{file}: write a name for each of the {count} classes in train, one a '
                            'line, all different, in UTF-8')
        return names
    return [str(label) for label in range(count)]


def read_classes(folder, image_size, channels, class_names):
    """The images of a folder of class folders: (N, C, size, size), labels (N,), class names."""
    folders = [path for path in visible(folder) if path.is_dir()]
    class_names = class_names or [printable(path.name) for path in folders]
    if not folders:
        raise DataError(f'{folder}: no class folders here; make one for the images of each class')
    others = {*visible(folder)} - {*folders, *folder.glob(OOD_ARRAYS)}
    tell_left_out(folder, others, 'not class folders')
    images, labels = [], []
    for path in tqdm(folders, f'reading {folder}', unit='class', leave=False):
        if printable(path.name) not in class_names:
            raise DataError(f'{path}: a class without training images; add some, or remove it')
        images.append(load_images(path, image_size, channels or 3)[0])  # (n, C, size, size)
        labels += [class_names.index(printable(path.name))] * len(images[-1])
    images = torch.cat(images)  # (N, C, size, size)
    if channels is None and (images == images[:, :1]).all():
        images = images[:, :1]  # grey throughout: (N, 3, size, size) -> (N, 1, size, size)
    return images, torch.tensor(labels), class_names


def load_images(path, image_size, channels):
    """Images uint8 (N, channels, size, size) and the name of each, from an image file, a folder of
    them at any depth, or a .npy or .npz file. A file with several pages gives several images."""
    path = Path(path)
    if path.suffix.lower() in ARRAYS:
        images = prepare(read_arrays(path)[0], image_size, channels)
        return images, [f'{printable(path)}[{i}]' for i in range(len(images))]
    images, names = [], []
    files = find_images(path) if path.is_dir() else [path]
    for file in tqdm(files, f'reading {path}', unit='file', leave=False, disable=len(files) < 100):
        pages = [prepare(page[None], image_size, channels) for page in read_pages(file)]
        images += pages  # (1, C, size, size) each
        names += [printable(file) + f'[{i}]' * (len(pages) > 1) for i in range(len(pages))]
    return torch.cat(images), names


def find_images(folder):
    """The image files in a folder at any depth, in order. What is left out is told."""
    folders, seen, files = [folder], set(), []
    for at in folders:  # grows as folders are found in it
        if at.resolve() not in seen:  # links may lead in circles
            seen.add(at.resolve())
            for path in visible(at):
                (folders if path.is_dir() else files).append(path)
    kinds = Image.registered_extensions()
    images = sorted(path for path in files if kinds.get(path.suffix.lower()) in Image.OPEN)
    tell_left_out(folder, {*files} - {*images}, 'no images that Pillow can read')
    if not images:
        raise DataError(f'{folder}: no images here; add some, or remove or rename it')
    return images


def read_pages(path):
    """All pages of an image file, each (3, H, W): upright, and with all levels of 16-bit grey."""
    try:
        # From a file object: Pillow scrambles some rotated TIFF files that it opens by name.
        with open(path, 'rb') as file, Image.open(file) as image:
            count = 1 if image.format in ('MPO', 'PSD') else None  # views and layers are no pages
            for page in itertools.islice(ImageSequence.Iterator(image), count):
                tags = getattr(page, 'tag_v2', {})  # of TIFF
                if page.tell() and tags.get(254, 0) & 5:  # a smaller copy or a mask of the last one
                    continue
                # Where 0 is white (tag 262), Pillow inverts 8 bits, but not 16 or 32.
                sign = -1 if tags.get(262) == 0 and page.mode[0] in 'IF' else 1
                pixels = to_pixels(ImageOps.exif_transpose(page))  # (3, H, W)
                kind, = tags.get(339, (1,))[:1]  # 1: unsigned levels, 2: signed ones
                if kind == 1 and pixels.min() < 0 or kind == 2 and page.mode == 'L':
                    raise ValueError('Pillow wraps its levels; save it with 16 unsigned bits')
                yield sign * pixels
    except Exception as error:  # of many kinds, for damaged files
        raise DataError(f'{path}: not readable ({error}); replace or remove it') from error


def to_pixels(image):
    """A Pillow image as (3, H, W), transparent pixels as white paper."""
    if image.mode[0] in 'IF':  # 16 or 32 bits
        levels = torch.from_numpy(np.array(image, dtype=np.float32))  # (H, W)
        if not (levels.max() - levels.min()).isfinite():
            raise ValueError('not all of its values are finite numbers')
        if 'transparency' in image.info:  # one level of a 16-bit PNG
            levels[levels == image.info['transparency']] = 65535  # white
        return levels.expand(3, -1, -1)  # (H, W) -> (3, H, W)
    pixels = torch.from_numpy(np.array(image.convert('RGBA'))).movedim(2, 0)  # (4, H, W)
    colour, alpha = pixels[:3].to(torch.float32), pixels[3:] / 255  # (3, H, W), (1, H, W)
    on_white = (alpha * colour + (1 - alpha) * 255).round()
    if on_white.max() - on_white.min() < 64:  # white letters on nothing need black paper
        return (alpha * colour).round()
    return on_white


def printable(name):
    """The name of a file, which may be any bytes on Linux, as text that can be printed."""
    return os.fsencode(name).decode(errors='backslashreplace')


# --- letterpress, the built-in stand-in -----------------------------------------------------------
# No real data: matplotlib's typefaces, printed badly on purpose. A notebook may set another dtype.

PRESS_VERSION = 1  # rises when the pixels change
# Prints of each letter, uneven as in any text. The list omits capitals that only enlarge their
# lowercase letter (C O S V W X Z), look like an l (I) or are younger than the press (J U).
PRINTS = dict(
    a=690, b=520, c=680, d=690, e=715, f=600, g=520, h=620, i=710, j=180, k=120, l=690, m=700,
    n=710, o=700, p=710, q=640, r=700, s=705, t=700, u=690, v=680, w=155, x=400, y=360, z=240,
    A=110, B=80, D=85, E=120, F=75, G=60, H=65, K=43, L=75, M=110, N=100, P=125, Q=100, R=70,
    T=80, Y=48)
PAIRS = 'fi fl ff st ct sp ch th de do ha pa pp ll tt ft bo ae oe'.split()
SYMBOLS = list('2345679&?!%+=')  # 0, 1 and 8 look like o, l and B
LIGATURES = dict(fi='ﬁ', fl='ﬂ', ff='ﬀ', ae='æ', oe='œ')  # one glyph in most faces
FACES = dict(STIXGeneral=.45, STIXGeneralBol=.31, cmb10=.13, DejaVuSerif=.11)  # and their shares
SANS = 'DejaVuSans'  # the face of the OOD set `typeface`: no serifs, strokes of one width
WEIGHT = dict(STIXGeneral=5, STIXGeneralBol=1, cmb10=3, DejaVuSerif=3, DejaVuSans=3)  # in pixels
PRESS_OOD, EXTRAS = ('clutter', 'ligatures', 'symbols', 'typeface'), 2000  # images in each of them
FRAME = 56
ACROSS = torch.linspace(-1, 1, FRAME, dtype=torch.float32)  # (56,), x of each column
DOWN = ACROSS[:, None]  # (56, 1), y of each row


def cut_case(texts, faces):
    """A type case: clean masks of all texts in all faces, (texts, faces, 112, 112) in [0, 1]."""
    from matplotlib import get_data_path  # slow to import
    case = np.zeros((len(texts), len(faces), 2 * FRAME, 2 * FRAME), np.float32)
    for (i, text), (j, face) in itertools.product(enumerate(texts), enumerate(faces)):
        font = ImageFont.truetype(f'{get_data_path()}/fonts/ttf/{face}.ttf', 160)
        sheet, x = Image.new('L', (640, 320)), 80
        for letter in text if face == 'cmb10' else LIGATURES.get(text, text):
            ImageDraw.Draw(sheet).text((x, 200), letter, font=font, fill=255, anchor='ls',
                                       stroke_width=WEIGHT[face])
            x += .88 * font.getlength(letter)  # so that pairs touch
        sheet = sheet.crop(sheet.getbbox())
        sheet = sheet.resize((round(.74 * sheet.width), sheet.height))  # early type is narrow
        sheet = ImageOps.contain(sheet, (98, 94))
        top, left = FRAME - sheet.height // 2, FRAME - sheet.width // 2
        case[i, j, top:top + sheet.height, left:left + sheet.width] = sheet
    return blur(torch.from_numpy(case) / 255, 1.)


def blur(x, sigma):
    """Gaussian blur of (B, C, H, W), as channels of one image: 2 to 6 times as fast on a CPU."""
    from torchvision.transforms.v2.functional import gaussian_blur  # slow to import
    return gaussian_blur(x.flatten(0, 1)[None], 2 * round(2.5 * sigma) + 1, sigma).view(x.shape)


class Press:
    """Sets type, inks it, prints it on old paper and photographs the page, a batch at a time."""

    def __init__(self, seed):
        self.g = torch.Generator().manual_seed(seed)
        self.case = cut_case([*PRINTS, *PAIRS, *SYMBOLS], FACES)  # (74, 4, 112, 112)

    def spread(self, n, low, high):
        """A uniform random number for each image, (n, 1, 1, 1)."""
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=self.g, dtype=torch.float32)

    def noise(self, n, cells):
        """Smooth noise (n, 1, 56, 56): few cells make stains, many make grain."""
        one = torch.eye(cells, dtype=torch.float32)[None, None]  # (1, 1, cells, cells)
        bicubic = F.interpolate(one, (FRAME, cells), mode='bicubic')  # (1, 1, 56, cells), a matrix
        dots = torch.randn(n, 1, cells, cells, generator=self.g, dtype=torch.float32)
        return bicubic @ dots @ bicubic.mT  # along the columns and along the rows

    def pick(self, labels):
        """Type of these labels (n,), or n random letters, in random faces: (n, 1, 112, 112)."""
        if isinstance(labels, int):
            labels = torch.randint(len(PRINTS), (labels,), generator=self.g)
        shares = torch.tensor(list(FACES.values()), dtype=torch.float32)
        faces = torch.multinomial(shares, len(labels), replacement=True, generator=self.g)
        return self.case[labels, faces][:, None]

    def place(self, blocks, zoom=1., dx=0., dy=0., turn=.04):
        """Type in its frame, scaled, turned, sheared, shifted and worn: (n, 1, 56, 56)."""
        n = len(blocks)
        sx, sy = (self.spread(n, .95, 1.06) / zoom for _ in range(2))
        angle, shear = (turn * torch.randn(n, 1, 1, 1, generator=self.g, dtype=torch.float32)
                        for _ in range(2))
        tx, ty = (self.spread(n, -.03, .03) - d for d in (dx, dy))
        u = sx * ACROSS + (angle + shear) * DOWN + tx + .012 * self.noise(n, 10)
        v = sy * DOWN - angle * ACROSS + ty + .012 * self.noise(n, 10)
        grid = torch.cat([u, v], 1).movedim(1, 3)  # (n, 56, 56, 2): where in its block a pixel lies
        return F.grid_sample(blocks, grid, align_corners=False)

    def set_type(self, labels):
        """Letters with slivers of their neighbours, as imprecise segmentation leaves them."""
        def half_width(mask):  # how far ink reaches from the middle, (n, 1, 1, 1)
            away = torch.linspace(-1, 1, mask.shape[3], dtype=torch.float32).abs()  # (W,)
            return (away * (mask.amax(2, keepdim=True) > .5)).amax(3, keepdim=True)

        n = len(labels)
        mask = self.place(self.pick(labels))
        end = half_width(mask)
        for side in (-1, 1):
            other = self.pick(n)
            gap = self.spread(n, -.02, .15)
            other = self.place(other, dx=side * (end + half_width(other) + gap))
            mask = mask.maximum(other * (ACROSS * side > end) * (ACROSS * side < end + .09))
        return mask  # (n, 1, 56, 56)

    def scatter(self, n):
        """Masks (n, 1, 56, 56) of what is no letter: fragments, initials, smears, rules, dirt."""
        def row(spots, zoom):
            spots = [(x * self.spread(n, .8, 1.1), self.spread(n, -.6, .6)) for x in spots]
            return torch.stack([self.place(self.pick(n), zoom, *spot) for spot in spots]).amax(0)

        def rule():
            angle = 1.57 * self.spread(n, 0, 3).round() + self.spread(n, -.2, .2)
            shift = self.spread(n, -.6, .6)
            distance = (ACROSS * angle.cos() + DOWN * angle.sin() - shift).abs()
            return torch.sigmoid(40 * (self.spread(n, .02, .14) - distance))

        initial = self.place(self.pick(n), self.spread(n, 2.5, 4.5),
                             self.spread(n, -.7, .7), self.spread(n, -.7, .7))
        smear = 1.6 * self.place(F.avg_pool2d(self.pick(n), (5, 41), 1, (2, 20)), turn=.5)
        blot = .4 + .6 * self.noise(n, 6) - self.spread(n, 1, 6) * (ACROSS ** 2 + DOWN ** 2)
        dirt = torch.sigmoid(10 * (self.noise(n, 7) + self.noise(n, 24) - 1.8))
        kinds = torch.stack([row((-1, 1), 1.), row((-1, 0, 1), self.spread(n, .4, .7)), initial,
                             smear, torch.sigmoid(8 * blot), rule(), rule().maximum(rule()), dirt])
        kind = torch.randint(len(kinds), (n,), generator=self.g)
        mask = kinds[kind, torch.arange(n)]  # (8, n, 1, 56, 56) -> (n, 1, 56, 56)
        return mask.maximum(dirt * self.spread(n, -1, 1)).clamp(0, 1)

    def print(self, mask):
        """Masks (n, 1, 56, 56), inked, printed and photographed: uint8 of the same shape."""
        n = len(mask)
        # A blurred mask is a ramp across each edge: a gain moves the outline, noise breaks it.
        wear = self.spread(n, .4, 1.35) ** 2  # few prints are wrecks
        worn = wear * (.2 * self.noise(n, 4) + .12 * self.noise(n, 13))
        gain = 1 + self.spread(n, -.1, .27) + worn + .14 * self.noise(n, 26)
        ink = torch.sigmoid(11 * (blur(mask, 1.1) * gain - .5))
        # Ink is squeezed from the middle of a stroke to its rim, and takes unevenly.
        pale = self.spread(n, 0, 18) * blur(ink, 2.) ** 2
        dark = self.spread(n, 57, 73) + pale + 7 * self.noise(n, 6) + 7 * self.noise(n, 18)
        paper = self.spread(n, 217, 232) + 2 * self.noise(n, 4) + 2 * self.noise(n, 14)
        paper = paper + 3 * self.noise(n, 40)
        page = paper + ink * (dark - paper)
        page = page.lerp(blur(page, 1.), self.spread(n, .6, 1.1))  # a little out of focus
        page = page + .6 * (page - blur(page, 2.))  # the camera sharpens, which leaves a halo
        return page.clamp(0, 255).byte()

    def sheets(self, labels, title):
        """Prints of these labels (N,), 256 at a time: uint8 (N, 1, 56, 56)."""
        bar = tqdm(labels.split(256), f'printing {title}', unit='sheet')
        return torch.cat([self.print(self.set_type(batch)) for batch in bar])


def print_letterpress(seed):
    """The whole data set, {name: tensor}: images and labels of the splits, and four OOD sets."""
    press = Press(seed)
    labels = torch.arange(len(PRINTS)).repeat_interleave(torch.tensor(list(PRINTS.values())))
    pairs = torch.randint(len(PRINTS), len(PRINTS) + len(PAIRS), (EXTRAS,), generator=press.g)
    images = press.sheets(torch.cat([labels, pairs]), 'letterpress')  # (18171, 1, 56, 56)
    clutter = torch.cat([press.print(press.scatter(len(part))) for part in pairs.split(250)])
    arrays = {'clutter': clutter, 'ligatures': images[len(labels):]}
    # The labels are sorted, so dealing them out like cards gives each split its share of a class:
    card = torch.arange(len(labels)) % 20  # val gets 0, 7 and 14, test 3, 10 and 17, train the rest
    val, test = card % 7 == 0, card % 7 == 3
    for part, chosen in [('train', ~(val | test)), ('val', val), ('test', test)]:
        index = chosen.nonzero().flatten()
        index = index[torch.randperm(len(index), generator=press.g)]
        arrays |= {part: images[index], f'{part}_labels': labels[index]}
    symbols = torch.randint(len(PRINTS) + len(PAIRS), len(press.case), (EXTRAS,), generator=press.g)
    letters = labels[torch.randperm(len(labels), generator=press.g)[:EXTRAS]]  # as often as in text
    arrays['symbols'] = press.sheets(symbols, 'other symbols')
    press.case = cut_case(PRINTS, [SANS] * len(FACES))
    return arrays | {'typeface': press.sheets(letters, 'another typeface')}


def load_letterpress(image_size, data_root, seed):
    """Parts, class names and OOD sets from a cache; a missing or damaged one is printed first."""
    path = Path(data_root, f'letterpress-{PRESS_VERSION}-seed{seed}.npz')
    try:
        with np.load(path, allow_pickle=False) as cache:
            arrays = {key: torch.from_numpy(cache[key]) for key in cache}
    except Exception:  # numpy and zipfile raise many kinds of exceptions for damaged files
        with atomic_write(path) as file:  # first: if it cannot be written, nothing is printed
            arrays = print_letterpress(seed)
            np.savez(file, **{key: array.numpy() for key, array in arrays.items()})
    parts = {part: Split(prepare(arrays[part], image_size), arrays[f'{part}_labels'])
             for part in SPLITS}
    return parts, list(PRINTS), {key: prepare(arrays[key], image_size) for key in PRESS_OOD}


# --- out-of-distribution sets ---------------------------------------------------------------------

def shrink(x):
    """Half as wide and high, in the lower right corner as in the tutorial, on each image's median
    grey: the tutorial's black would give away every print on light paper."""
    ground = x.flatten(1).median(1).values.view(-1, 1, 1, 1)  # (N,) -> (N, 1, 1, 1)
    small = F.interpolate(x - ground, scale_factor=.5, mode='bilinear', antialias=True)
    rest = x.shape[3] - small.shape[3]  # images are square
    return F.pad(small, (rest, 0, rest, 0)) + ground  # (N, C, H, W)


MADE = {  # from test images x, float (N, C, H, W) in [-1, 1], and a random generator g
    'flipped': lambda x, g: x.flip(2, 3),  # over both axes, as in the tutorial
    'rotated': lambda x, g: x.rot90(1, (2, 3)),
    'shrunk': lambda x, g: shrink(x),
    'blurred': lambda x, g: blur(x, x.shape[3] / 28),
    'noisy': lambda x, g: x + .3 * torch.empty_like(x).normal_(generator=g),  # as in the tutorial
    'interpolated': lambda x, g: (x + x.roll(1 + len(x) // 3, 0)) / 2,  # of two images, as in JEM
    'noise': lambda x, g: torch.empty_like(x).uniform_(generator=g),  # uniform
    'gaussian': lambda x, g: torch.empty_like(x).normal_(generator=g),
    'constant': lambda x, g: x.new_empty(len(x), 1, 1, 1).uniform_(-1, 1, generator=g).expand_as(x)}


def ood_names(data, name, data_root='.data'):
    """The OOD sets that there are for the data set `name`, without any download."""
    letters = [] if name in NAMES else ['letterpress']  # own data: another press
    names = [*data.ood, *letters, *MADE]
    for other in SETS:
        with contextlib.suppress(Exception):  # it is missing or damaged
            open_set(other, 'test', data_root)
            names.append(other)
    return [other for other in names if other != name]


def load_ood(name, data, seed=0, data_root='.data'):
    """An OOD set by its name or path, uint8 (N, C, H, W) of the size and channels of `data`. Sets
    of MADE keep the darkest and lightest level of each test image; `constant` sets its own."""
    channels, size = data.test.images.shape[1:3]
    known = [*data.ood, *MADE, *NAMES]
    tell_ambiguous('--ood', name, known)
    if name in data.ood:
        return data.ood[name]
    if name in MADE:
        x = to_float(data.test.images)  # (N, C, size, size)
        made = MADE[name](x, torch.Generator().manual_seed(seed))  # (N, C, size, size)
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return to_uint8(made if name == 'constant' else low + (high - low) * stretch(made))
    if name == 'letterpress':
        return prepare(load_letterpress(size, data_root, seed)[0]['test'].images, size, channels)
    if name in SETS:
        return load_set(name, 'test', size, data_root, channels)[0].images
    if os.path.exists(name):
        images, _ = load_images(name, size, channels)
        if blank := count_blank(images):
            tell(f'--ood {name}: {blank} of {len(images)} images are blank')
        return images
    raise DataError(f'--ood {name}: no such path and no known set; choose from {", ".join(known)}')


# --- pictures and other files ---------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path):
    """Open `path` to write bytes; it is replaced as a whole or, on any error, left as it was."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f'{path}: cannot be written ({error.strerror or error}); make room there, or '
                      'name another --out or --data-root; an older file there is whole') from error
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            temporary.unlink()


def write_csv(rows, columns, path):
    """Write dictionaries as a CSV file: these columns first, then others; floats get six digits."""
    columns = list(dict.fromkeys(itertools.chain(columns, *rows)))
    with atomic_write(path) as file:
        writer = csv.DictWriter(codecs.getwriter('utf-8')(file), columns)
        writer.writeheader()
        writer.writerows({key: f'{value:.6g}' if isinstance(value, float) else value
                          for key, value in row.items()} for row in rows)


def save_figure(figure, path):
    """Write a matplotlib figure as PNG, with room for all of its text."""
    with atomic_write(path) as file:
        figure.savefig(file, format='png', dpi=figure.dpi)


def shortened(text, length):
    """The last characters of a text, at most `length`: the end of a path says most."""
    return text if len(text) <= length else f'…{text[1 - length:]}'


def save_grid(x, path, columns, title='', rows=(), heads=(), captions=()):
    """Write images x, float (N, C, H, W) in [-1, 1], as a PNG grid of so many columns. Texts: title
    above all, rows left of each row, heads above each column, captions below each image."""
    import matplotlib.figure  # slow to import, as the next one
    from torchvision.utils import make_grid
    h, w = x.shape[2:]
    zoom = max(1, round(56 / w))  # screen pixels for one image pixel
    gap = 2 if not captions else 2 + -(-12 // zoom)  # for captions of 12 screen pixels
    x = F.pad(x.cpu(), (0, 2, 0, gap), value=1.)  # (N, C, H + gap, W + 2), white
    height, width = x.shape[2:]  # of a cell, with the gaps
    grid = make_grid(to_uint8(x), columns, padding=0, pad_value=255)  # (3, R * height, C' * width)
    heads, captions = [[shortened(str(text), zoom * width // 5) for text in texts]  # 5 a letter
                       for texts in (heads, captions)]
    size = zoom * grid.shape[2] / 100, zoom * grid.shape[1] / 100  # in inches
    # A $ in a class name is no formula. Matplotlib draws at most 65,535 pixels in a row.
    with matplotlib.rc_context({'text.parse_math': False, 'savefig.bbox': 'tight'}):
        figure = matplotlib.figure.Figure(size, dpi=min(100, 6e4 / max(size)))
        axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
        axes.imshow(grid.movedim(0, 2).numpy(), aspect='auto')  # (R * height, C' * width, 3)
        axes.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
        axes.set_yticks([height * i + h / 2 for i in range(len(rows))], rows)
        axes.set_xticks([width * i + w / 2 for i in range(len(heads))], heads, fontsize=6)
        for i, text in enumerate(captions):
            axes.text(i % columns * width + w / 2, i // columns * height + h + 2 / zoom,
                      text, ha='center', va='top', fontsize=6)
        axes.set_title(title, fontsize=9, loc='left')
        save_figure(figure, path)


# --- command line: python data.py --data NAME|PATH ------------------------------------------------

def draw_examples(data, path):
    """The first ten training images of each of the first hundred classes, a row each (task 3.1)."""
    names = data.class_names[:100]
    members = [(data.train.labels == label).nonzero().flatten() for label in range(len(names))]
    index = torch.cat([some[torch.arange(10) % len(some)] for some in members])  # (10 * K,)
    title = f'{len(names)} of {len(data.class_names)} classes, {len(data.train)} training images'
    save_grid(data.train.batch(index)[0], path, 10, title, rows=names)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description='Draw examples of each class into data.png.', usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # mistakes are told without usage
    flag = parser.add_argument
    flag('--data', default='letterpress', help=f'{", ".join(NAMES)}, or a folder')
    flag('--data-root', default='.data', help='folder of downloads and of the letterpress')
    flag('--image-size', type=int, help='side in pixels; None is that of the data set')
    flag('--out', type=Path, default='.', help='folder to write into')
    flag('--seed', type=int, default=0, help='of random splits and of the letterpress')
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        check_apart(args.out, args.data)
        data = load_data(args.data, args.image_size, args.data_root, args.seed)
        draw_examples(data, args.out / 'data.png')
    except (DataError, OSError) as error:
        print(f'data.py: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(args.out / 'data.png', {part: len(getattr(data, part)) for part in SPLITS})


if __name__ == '__main__':
    main()

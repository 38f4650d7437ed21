"""Data: what an image is here, every data set by its name or path, the out-of-distribution (OOD) sets (course task 3.1).

An image is float32, (C, H, W), in [-1, 1], inside the network; on disk and in memory it is uint8, 0 to 255, and a batch at
a time is mapped by `to_float` (and back by `to_uint8`). Every set that is read, in-distribution or not, goes through the one
function `prepare`, so that no set can be told from another by how it was handled; sets made from the test images take over
their range of values (`load_ood`).

    letterpress                      42 letters, drawn with matplotlib's typefaces and printed badly on purpose (built in)
    digits                           scikit-learn's scanned digits, 1,797 images of 8x8 (built in)
    mnist, fashion-mnist, kmnist,    torchvision's sets, kept under --data-root and downloaded only when missing
    emnist-letters, omniglot, cifar10, svhn
    PATH                             the course folder GLYPHS (train.npy, val.npy, test.npy, ood_ta.npy, ood_tb.npy), or a
                                     folder with one folder of images per class, as it is or inside train, val, test
"""
import argparse
import contextlib
import csv
import io
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm


class DataError(ValueError):
    """Data that cannot be used as they are, with the file and the way out in its message."""


@dataclass
class Split:
    """One part of a data set: images uint8 (N, C, H, W), labels int64 (N,), both on one device."""
    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """Images float32 (B, C, H, W) in [-1, 1] and labels (B,) at the positions `index` (B,)."""
        return to_float(self.images[index]), self.labels[index]

    def to(self, device):
        """The same on another device: the sets are small, so all of a split lies where it is used."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass
class Data:
    """A data set: its three splits, its class names by label, and the OOD sets that come with it, uint8 (N, C, H, W)."""
    train: Split
    val: Split
    test: Split
    class_names: list
    ood: dict = field(default_factory=dict)

    def describe(self):
        """What a checkpoint remembers of its data, as plain values."""
        counts = {name: getattr(self, name).labels.bincount(minlength=len(self.class_names)).tolist()
                  for name in ('train', 'val', 'test')}
        return {'image_shape': list(self.test.images.shape[1:]), 'class_names': self.class_names,
                'class_counts': counts}


# --- pixels ---------------------------------------------------------------------------------------------------------

def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1]. Float images are a TypeError: they are mapped already."""
    if images.is_floating_point():
        raise TypeError('images are float and need no to_float; give uint8 from 0 to 255')
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1] -> uint8 0..255, the inverse of `to_float`; values outside are clamped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def extremes(x):
    """The least and the greatest value of each image of (N, C, H, W), (N, 1, 1, 1) both."""
    return [f(x, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax)]


def stretch(x):
    """Min-max scale each image of (N, C, H, W) to [0, 1]; a constant one becomes 0."""
    low, high = extremes(x)
    return (x - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)


def prepare(images, image_size):
    """The course's preprocessing: min-max scale each image, resize its shorter side (antialiased), crop the centre.

    Args:
        images: (N, C, H, W), any numeric type and range. A constant image becomes 0 everywhere, not NaN.
        image_size: side of the result, in pixels.

    Returns:
        uint8 (N, C, image_size, image_size).
    """
    done = []
    for part in torch.as_tensor(images).split(1024):  # bounds the memory that floats take
        part = stretch(part.float())
        part = TF.center_crop(TF.resize(part, [image_size], antialias=True), [image_size])  # (B, C, size, size)
        done.append(to_uint8(part * 2 - 1))
    return torch.cat(done)


def match_channels(images, channels):
    """(N, 1 or 3, H, W) -> (N, channels, H, W): grey is repeated, colour is turned into its luminance (as float: rounded
    luminance would tell a grey file read as colour from the same one read as grey)."""
    if images.shape[1] == channels:
        return images
    return images.expand(-1, 3, -1, -1) if channels == 3 else TF.rgb_to_grayscale(images.float())


def channels_first(images):
    """(N, H, W), (N, H, W, 1 or 3) or (N, C, H, W) -> (N, C, H, W)."""
    if images.ndim == 3:
        return images[:, None]  # (N, H, W) -> (N, 1, H, W)
    last = images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3)
    return images.permute(0, 3, 1, 2) if last else images  # (N, H, W, C) -> (N, C, H, W)


# --- data sets ------------------------------------------------------------------------------------------------------

def load_data(name, image_size=None, data_root='.data', seed=0, like=None):
    """Load a data set by its name or path (see the top of this file).

    Args:
        image_size: side of the images; None is 16 for digits, 56 for glyphs and folders, torchvision's own otherwise.
        like: `Data.describe()` of the data that it must be; the image size is taken from it.
        data_root: folder in which downloads and the rendered letterpress are kept.
        seed: of the random splits and of the letterpress rendering.

    Raises:
        DataError: the set is missing, damaged or unusable.
    """
    if like is None:
        return load_named(name, image_size, data_root, seed)
    data = load_named(name, like['image_shape'][-1], data_root, seed)
    for key, value in data.describe().items():
        if value != like[key]:
            raise DataError(f'--data {name}: another {key.replace("_", " ")} than the checkpoint was trained on; restore the '
                            'data, or train anew')
    return data


def load_named(name, image_size, data_root, seed):
    """The data set of this name or path, see `load_data`."""
    if name == 'letterpress':
        return load_letterpress(image_size or 56, data_root, seed)
    if name == 'digits':
        return split_stratified(load_scans(image_size or 16), load_digits().target, list('0123456789'), seed, name)
    if name in TORCHVISION:
        return load_torchvision(name, image_size or TORCHVISION[name][1], data_root, seed)
    folder = Path(name)
    if any((folder / f'{part}.npy').exists() for part in ('train', 'val', 'test')):
        return load_glyphs(folder, image_size or 56)
    if folder.is_dir():
        return load_folder(folder, image_size or 56, seed)
    raise DataError(f'--data {name}: no such folder, and no data set of that name; name the folder where the data lie, or one '
                    f'of {", ".join(NAMES)}')


def check_apart(out, *inputs):
    """A DataError if the folder `out` lies inside one that is read as a whole: the pictures written there would be data the
    next time. Inputs are names and paths, or None."""
    inside = Path(os.path.realpath(out))
    for name in inputs:
        folder = name and name not in (*NAMES, *MADE) and os.path.isdir(name) and Path(os.path.realpath(name))
        if folder and folder in (inside, *inside.parents):
            raise DataError(f'--out {out}: lies in {name}, and what is written there would be read as data; name another')


def split_stratified(images, labels, class_names, seed, name):
    """Split 70/15/15 at random into train, val and test, each class in the same shares."""
    labels = np.asarray(labels)
    counts = np.bincount(labels, minlength=len(class_names))
    if counts.min() < 8:
        raise DataError(f'--data {name}: class {class_names[counts.argmin()]!r} has {counts.min()} images; a split into '
                        'train, val and test needs 8 of each; add images or take the class out')
    rest, test = train_test_split(np.arange(len(labels)), test_size=.15, stratify=labels, random_state=seed)
    train, val = train_test_split(rest, test_size=len(test), stratify=labels[rest], random_state=seed)
    return Data(*(Split(images[part], torch.from_numpy(labels[part]).long()) for part in (train, val, test)), class_names)


def load_scans(image_size):
    """scikit-learn's 1,797 scanned digits, uint8 (1797, 1, image_size, image_size)."""
    return prepare(load_digits().images[:, None], image_size)  # (N, 8, 8) -> (N, 1, 8, 8) -> (N, 1, size, size)


def load_glyphs(folder, image_size):
    """The course folder: train.npy, val.npy, test.npy with images (N, H, W) and then labels (N,) in the same file.

    Class names come from `classes.txt` in the folder or, for a folder GLYPHS, `glyphs_classes.txt` beside it, one a line;
    else they are numbers.
    """
    arrays = {stem: read_arrays(folder / f'{stem}.npy', labelled=True) for stem in ('train', 'val', 'test')}
    known = arrays['train'][1].unique()
    num_classes = len(known)
    for stem, (_, labels) in arrays.items():
        if not torch.isin(labels, known).all() or labels.max() >= num_classes:
            raise DataError(f'{folder / stem}.npy: labels up to {labels.max()}, but {num_classes} classes in train.npy; '
                            'number them 0, 1, ... without a gap, each of them in train.npy too')
    names = [str(label) for label in range(num_classes)]
    for file in (folder / 'classes.txt', folder.parent / f'{folder.name.lower()}_classes.txt'):
        if file.exists():
            try:
                names = [name.strip() for name in file.read_text('utf-8-sig').split('\n') if name.strip()]
            except UnicodeDecodeError as error:
                raise DataError(f'{file}: not in UTF-8; save it in that encoding, one name a line') from error
            if len(names) != num_classes or len(set(names)) != num_classes:
                raise DataError(f'{file}: {len(set(names))} different names for {num_classes} classes; '
                                'write one name a line, or remove the file')
            break
    return Data(*(Split(prepare(images, image_size), labels) for images, labels in arrays.values()), names,
                {path.stem: prepare(read_arrays(path, labelled=False)[0], image_size)
                 for path in sorted(folder.glob('ood_*.npy'))})


def read_arrays(path, labelled):
    """Images (N, C, H, W), and labels int64 (N,) or None, from the arrays that np.save wrote to `path`, no pickles."""
    wanted = 'images (N, H, W), then integer labels (N,)' if labelled else 'one array of images (N, H, W) or (N, H, W, 3)'
    try:
        with open(path, 'rb') as file:
            images = np.load(file, allow_pickle=False)
            labels = np.load(file, allow_pickle=False) if labelled else None
            numbers = images.dtype.kind in 'biuf' and images.ndim in (3, 4) and images.size
    except Exception as error:  # numpy raises whatever the damage makes it raise
        raise DataError(f'{path}: not readable as {wanted}, each written by np.save ({error})') from error
    with np.errstate(over='ignore'):  # what is too large for float32 becomes infinite, and is told
        images = channels_first(torch.from_numpy(images.astype(np.float32))) if numbers else images  # (N, C, H, W)
    if not numbers or images.shape[1] not in (1, 3) or not (images.max() - images.min()).isfinite():
        raise DataError(f'{path}: images must be finite real numbers; write {wanted}; these are {images.dtype} '
                        f'{tuple(images.shape)}')
    if labels is None:
        return images, None
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu' or labels.min() < 0 or labels.max() >= len(labels):
        raise DataError(f'{path}: labels must be {len(images)} integers from 0 on, fewer classes than images; these are '
                        f'{labels.dtype} {labels.shape}')
    return images, torch.from_numpy(labels.astype(np.int64))


def load_folder(folder, image_size, seed):
    """A folder of class folders, split 70/15/15, or with train, val and test folders that each hold the class folders."""
    parts = [folder / part for part in ('train', 'val', 'test')] if (folder / 'train').is_dir() else [folder]
    try:
        sets = [ClassFolders(part, loader=read_image, is_valid_file=lambda path, part=part: is_picture(path, part))
                for part in parts]
        images = [torch.cat([prepare(image[None], image_size) for image, _ in part]) for part in sets]  # (N, 3, size, size)
    except OSError as error:  # torchvision's own words name the folder, the class or the file
        raise DataError(f'--data {folder}: {error}; give every class a folder with images that may be read, in each of '
                        'train, val and test where there are such') from error
    if any(part.classes != sets[0].classes for part in sets):
        raise DataError(f'--data {folder}: train, val and test must hold the same class folders')
    if all((part[:, :1] == part).all() for part in images):
        images = [part[:, :1] for part in images]  # grey throughout: (N, 3, size, size) -> (N, 1, size, size)
    names = [*map(printable, sets[0].classes)]
    if len(sets) == 1:
        return split_stratified(images[0], sets[0].targets, names, seed, folder)
    return Data(*(Split(x, torch.tensor(part.targets)) for x, part in zip(images, sets)), names)


class ClassFolders(datasets.ImageFolder):
    """torchvision's class folders, without the hidden ones that notebooks and file managers leave."""

    def find_classes(self, directory):
        names = [name for name in super().find_classes(directory)[0] if name[0] != '.']
        if not names:
            raise FileNotFoundError(f'no class folder in {directory}')
        return names, {name: label for label, name in enumerate(names)}


def is_picture(path, folder):
    """Whether a path in `folder` looks like an image file by its name, and is not hidden there."""
    path = Path(path).relative_to(folder)
    return path.suffix.lower() in datasets.folder.IMG_EXTENSIONS and not any(part[0] == '.' for part in path.parts)


def printable(name):
    """A file's name, which on Linux may be any bytes, as text that can be written and drawn."""
    return os.fsencode(name).decode(errors='backslashreplace')


def load_images(path, image_size, channels):
    """The images at a path: an image file, a folder of them at any depth, or a .npy array (N, H, W), (N, H, W, 3) or
    (N, C, H, W). Returns them as uint8 (N, channels, image_size, image_size), and the name of each."""
    path = Path(path)
    if path.suffix == '.npy':
        images = read_arrays(path, labelled=False)[0]  # (N, C, H, W)
        return prepare(match_channels(images, channels), image_size), [f'{printable(path)}[{i}]' for i in range(len(images))]
    files = [path]
    if not path.is_file():
        found = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        files = sorted(file for file in found if is_picture(file, path))
    if not files:
        raise DataError(f'{path}: no images here ({", ".join(datasets.folder.IMG_EXTENSIONS)}), and it is no .npy array')
    with tqdm(files, f'reading {path}', unit='image', leave=False) as bar:
        images = [prepare(match_channels(read_image(file)[None], channels), image_size) for file in bar]
    return torch.cat(images), [printable(file) for file in files]  # N times (1, C, size, size) -> (N, C, size, size)


def read_image(path):
    """An image file as (3, H, W): upright, transparency on white paper, 16-bit and float files with all their levels."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in 'IF':
                levels = torch.from_numpy(np.array(image, dtype=np.float32))  # (H, W)
                if not (levels.max() - levels.min()).isfinite():
                    raise ValueError('not all of its values are finite numbers')
                return levels.expand(3, -1, -1)  # (H, W) -> (3, H, W)
            image = image.convert('RGBA')
            paper = Image.new('RGBA', image.size, 'white')
            return TF.pil_to_tensor(Image.alpha_composite(paper, image).convert('RGB'))  # (3, H, W)
    except Exception as error:  # Pillow raises whatever the bytes make it raise
        raise DataError(f'{path}: not readable as an image ({error}); replace it or take it away') from error


TORCHVISION = {  # name: class, image size, arguments for the training part, arguments for the test part
    'mnist': (datasets.MNIST, 28, {'train': True}, {'train': False}),
    'fashion-mnist': (datasets.FashionMNIST, 28, {'train': True}, {'train': False}),
    'kmnist': (datasets.KMNIST, 28, {'train': True}, {'train': False}),
    'emnist-letters': (datasets.EMNIST, 28, {'train': True, 'split': 'letters'}, {'train': False, 'split': 'letters'}),
    'cifar10': (datasets.CIFAR10, 32, {'train': True}, {'train': False}),
    'svhn': (datasets.SVHN, 32, {'split': 'train'}, {'split': 'test'}),
    'omniglot': (datasets.Omniglot, 56, {'background': True}, None),
}


NAMES = ['letterpress', 'digits', *TORCHVISION]


def load_torchvision(name, image_size, data_root, seed):
    """One of torchvision's sets; validation is a tenth of its training part, stratified (Omniglot is split 70/15/15)."""
    dataset, _, train_arguments, test_arguments = TORCHVISION[name]
    images, labels, names = read_torchvision(dataset, name, image_size, data_root, train_arguments)
    if test_arguments is None:
        return split_stratified(images, labels, names, seed, name)
    test_images, test_labels, _ = read_torchvision(dataset, name, image_size, data_root, test_arguments)
    train, val = train_test_split(np.arange(len(labels)), test_size=.1, stratify=labels, random_state=seed)
    return Data(Split(images[train], labels[train]), Split(images[val], labels[val]), Split(test_images, test_labels), names)


def open_torchvision(dataset, data_root, arguments):
    """One part as torchvision's object if its files are there, else None."""
    with contextlib.suppress(Exception):  # missing or damaged: torchvision raises whatever the bytes make it raise
        return dataset(data_root, **arguments, download=False)


def read_torchvision(dataset, name, image_size, data_root, arguments, channels=None):
    """Prepared images (N, C, size, size), of the set's own or of other channels, labels (N,) and class names of one part,
    downloaded if it is not there yet."""
    try:
        part = open_torchvision(dataset, data_root, arguments) or dataset(data_root, **arguments, download=True)
    except Exception as error:  # torchvision raises whatever the bytes make it raise
        raise DataError(f'{name}: missing or damaged under --data-root {data_root}, and not to be downloaded '
                        f'({" ".join(str(error).split())}); name its folder, or remove what is broken') from error
    if hasattr(part, 'data'):
        images = channels_first(torch.as_tensor(part.data))  # (N, C, H, W)
        labels = torch.as_tensor(getattr(part, 'targets', getattr(part, 'labels', None))).long()
    else:  # Omniglot reads one file at a time
        images = torch.stack([TF.pil_to_tensor(image) for image, _ in part])  # (N, 1, 105, 105)
        labels = torch.tensor([label for _, label in part])
    names = [str(label) for label in range(int(labels.max()) + 1)]
    if name == 'emnist-letters':  # stored lying on their side, and counted from 1
        images, labels, names = images.transpose(2, 3), labels - 1, list('abcdefghijklmnopqrstuvwxyz')
    elif hasattr(part, 'classes'):
        names = [label.split(' - ')[0].replace(' ', '_') for label in part.classes]  # MNIST says '5 - five'
    return prepare(match_channels(images, channels or images.shape[1]), image_size), labels, names


# --- letterpress, the built-in stand-in -------------------------------------------------------------------------------
# Letters as an early press might have left them on paper: rendered, never real data. Type is cut once (`cut_type`), then
# whole batches are set (`place`, `set_type`), inked, printed and photographed (`press`), all from one random generator.

LETTERPRESS_VERSION = 1  # raised whenever the pixels change
# Prints per letter, all splits together: uneven, as in any text.  Left out are capitals that are merely a larger copy
# of their lowercase (C O S V W X Z), that look like an l (I), or that an early printer did not have (J U).
PRINTS = dict(a=690, b=520, c=680, d=690, e=715, f=600, g=520, h=620, i=710, j=180, k=120, l=690, m=700, n=710, o=700,
              p=710, q=640, r=700, s=705, t=700, u=690, v=680, w=155, x=400, y=360, z=240,
              A=110, B=80, D=85, E=120, F=75, G=60, H=65, K=43, L=75, M=110, N=100, P=125, Q=100, R=70, T=80, Y=48)
PAIRS = 'fi fl ff st ct sp ch th de do ha pa pp ll tt ft bo ae oe'.split()
SYMBOLS = list('2345679&?!%+=')  # no 0, 1 or 8: an o, an l and a B to most eyes
LIGATURES = dict(fi='ﬁ', fl='ﬂ', ff='ﬀ', ae='æ', oe='œ')  # pairs that most faces hold as one piece
FACES = dict(STIXGeneral=.45, STIXGeneralBol=.31, cmb10=.13, DejaVuSerif=.11)  # and their market shares
OTHER_FACE = 'DejaVuSans'  # of the OOD set `typeface`: no serifs, strokes of one width
WEIGHT = dict(STIXGeneral=5, STIXGeneralBol=1, cmb10=3, DejaVuSerif=3, DejaVuSans=3)  # pixels added: early type was heavy
LETTERPRESS_OOD = ('clutter', 'ligatures', 'symbols', 'typeface')
EXTRAS = 2000  # prints in each of them
FRAME = 56  # side of the images, in pixels
ACROSS = torch.linspace(-1, 1, FRAME)  # columns of the frame, counted in half frames from its middle
DOWN = ACROSS.unsqueeze(1)  # and rows, (56, 1)


def cut_type(text, face):
    """Cut one piece of type: a clean mask of `text`, twice as large as the final image, filling most of its frame."""
    font = ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/{face}.ttf', 160)
    sheet, x = Image.new('L', (640, 320)), 80
    for letter in text if face == 'cmb10' else LIGATURES.get(text, text):
        ImageDraw.Draw(sheet).text((x, 200), letter, font=font, fill=255, anchor='ls', stroke_width=WEIGHT[face])
        x += .88 * font.getlength(letter)  # tight enough for pairs to touch
    sheet = sheet.crop(sheet.getbbox())
    sheet = sheet.resize((round(.74 * sheet.width), sheet.height))  # condensed: paper was dear, early type is narrow
    sheet = ImageOps.contain(sheet, (98, 94))
    block = Image.new('L', (2 * FRAME, 2 * FRAME))
    block.paste(sheet, (FRAME - sheet.width // 2, FRAME - sheet.height // 2))
    return np.array(block)


def blur(x, sigma):
    """Gaussian blur of (B, C, H, W); passing the batch as channels of one image is ten times as fast on a CPU."""
    return TF.gaussian_blur(x.flatten(0, 1)[None], 2 * round(2.5 * sigma) + 1, sigma).view(x.shape)  # through (1, BC, H, W)


def spread(n, low, high, g):
    """One random number per image."""
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=g)  # (B, 1, 1, 1)


def smooth_noise(n, cells, g):
    """Smooth noise with one random value per cell: few cells make stains, many make grain."""
    stretch = F.interpolate(torch.eye(cells)[None, None], (FRAME, cells), mode='bicubic')  # (1, 1, 56, cells)
    return stretch @ torch.randn(n, 1, cells, cells, generator=g) @ stretch.mT  # (B, 1, 56, 56)


def pick(case, labels, g):
    """Take type for these labels from the case, in faces drawn by market share."""
    faces = torch.multinomial(torch.tensor(list(FACES.values())), len(labels), replacement=True, generator=g)
    return case[labels, faces].unsqueeze(1)  # (B, 1, 112, 112)


def pick_any(case, n, g):
    """Take n random letters from the case."""
    return pick(case, torch.randint(len(PRINTS), (n,), generator=g), g)


def place(blocks, g, zoom=1., dx=0., dy=0., turn=.04):
    """Set type in the frame, never quite straight: scaled, turned, sheared, shifted (in half frames) and worn."""
    n = len(blocks)
    sx, sy = (spread(n, .95, 1.06, g) / zoom for _ in range(2))
    angle, shear = (turn * torch.randn(n, 1, 1, 1, generator=g) for _ in range(2))
    tx, ty = (spread(n, -.03, .03, g) - d for d in (dx, dy))
    u = sx * ACROSS + (angle + shear) * DOWN + tx + .012 * smooth_noise(n, 10, g)  # where in the block each pixel lies
    v = sy * DOWN - angle * ACROSS + ty + .012 * smooth_noise(n, 10, g)
    return F.grid_sample(blocks, torch.cat([u, v], 1).movedim(1, 3), align_corners=False)  # (B, 1, 56, 56)


def half_width(mask):
    """How far the ink reaches to the sides, in half frames."""
    inked = mask.amax(2, keepdim=True) > .5  # (B, 1, 1, W)
    return (inked * torch.linspace(-1, 1, mask.shape[3]).abs()).amax(3, keepdim=True)  # (B, 1, 1, 1)


def set_type(case, labels, g):
    """Set each label between two random letters, of which segmenting the page left only slivers of the serifs."""
    n = len(labels)
    mask = place(pick(case, labels, g), g)
    end = half_width(mask)
    for side in (-1, 1):
        other = pick_any(case, n, g)
        other = place(other, g, dx=side * (end + half_width(other) + spread(n, -.02, .15, g)))
        mask = torch.maximum(mask, other * (ACROSS * side > end) * (ACROSS * side < end + .09))
    return mask


def scatter(case, n, g):
    """Masks of what segmenting a page throws up that is no letter: fragments, initials, smears, blots, rules, dirt."""
    def row(spots, zoom):
        spots = [(x * spread(n, .8, 1.1, g), spread(n, -.6, .6, g)) for x in spots]
        return torch.stack([place(pick_any(case, n, g), g, zoom, dx, dy) for dx, dy in spots]).amax(0)

    def rule():
        angle = 1.57 * spread(n, 0, 3, g).round() + spread(n, -.2, .2, g)  # nearly upright or level
        distance = (ACROSS * angle.cos() + DOWN * angle.sin() - spread(n, -.6, .6, g)).abs()
        return torch.sigmoid(40 * (spread(n, .02, .14, g) - distance))

    initial = place(pick_any(case, n, g), g, spread(n, 2.5, 4.5, g), spread(n, -.7, .7, g), spread(n, -.7, .7, g))
    smear = place(F.avg_pool2d(pick_any(case, n, g), (5, 41), 1, (2, 20)), g, turn=.5) * 1.6
    blot = torch.sigmoid(8 * (.4 + .6 * smooth_noise(n, 6, g) - spread(n, 1, 6, g) * (ACROSS ** 2 + DOWN ** 2)))
    dirt = torch.sigmoid(10 * (smooth_noise(n, 7, g) + smooth_noise(n, 24, g) - 1.8))
    kinds = torch.stack([row((-1, 1), 1.), row((-1, 0, 1), spread(n, .4, .7, g)), initial, smear, blot,
                         rule(), torch.maximum(rule(), rule()), dirt])  # (8, B, 1, 56, 56)
    kind = torch.randint(len(kinds), (n,), generator=g)
    return torch.maximum(kinds[kind, torch.arange(n)], dirt * spread(n, -1, 1, g)).clamp(0, 1)  # (B, 1, 56, 56)


def press(mask, g):
    """Ink the masks, print them on old paper and photograph the page: uint8 images."""
    n = len(mask)
    # A blurred mask is a ramp across each edge: stretching it moves the outline (ink spread), noise on it breaks it.
    wear = spread(n, .4, 1.35, g) ** 2  # most prints are fair, some are wrecks
    worn = wear * (.2 * smooth_noise(n, 4, g) + .12 * smooth_noise(n, 13, g))
    gain = 1 + spread(n, -.1, .27, g) + worn + .14 * smooth_noise(n, 26, g)
    ink = torch.sigmoid(11 * (blur(mask, 1.1) * gain - .5))
    # Ink is squeezed from the middle of a stroke to its rim, and takes unevenly.
    pale = spread(n, 0, 18, g) * blur(ink, 2.) ** 2
    dark = spread(n, 57, 73, g) + pale + 7 * smooth_noise(n, 6, g) + 7 * smooth_noise(n, 18, g)
    paper = spread(n, 217, 232, g) + 2 * smooth_noise(n, 4, g) + 2 * smooth_noise(n, 14, g) + 3 * smooth_noise(n, 40, g)
    page = paper + ink * (dark - paper)
    page = page.lerp(blur(page, 1.), spread(n, .6, 1.1, g))  # the camera, a little out of focus,
    page = page + .6 * (page - blur(page, 2.))  # and its sharpening, which leaves a pale halo
    return page.clamp(0, 255).byte()


def cut_case(texts, faces):
    """A type case: each text cut in each face, float (texts, faces, 112, 112) in [0, 1]."""
    case = torch.tensor(np.array([[cut_type(text, face) for face in faces] for text in texts]))  # (texts, faces, 112, 112)
    return blur(case / 255, 1.)


def render_letterpress(seed):
    """Print the whole data set: by name the images of the splits, their labels, and four OOD sets from the same press."""
    def sheets(case, labels, title):
        return torch.cat([press(set_type(case, batch, g), g)
                          for batch in tqdm(labels.split(256), f'printing {title}', unit='sheet')])  # (N, 1, 56, 56)

    g = torch.Generator().manual_seed(seed)
    case = cut_case([*PRINTS, *PAIRS, *SYMBOLS], FACES)  # (74, 4, 112, 112)
    labels = torch.arange(len(PRINTS)).repeat_interleave(torch.tensor(list(PRINTS.values())))  # (16171,)
    pairs = torch.randint(len(PRINTS), len(PRINTS) + len(PAIRS), (EXTRAS,), generator=g)
    images = sheets(case, torch.cat([labels, pairs]), 'letterpress')  # (18171, 1, 56, 56)
    clutter = torch.cat([press(scatter(case, len(part), g), g) for part in pairs.split(250)])  # (2000, 1, 56, 56)

    # The labels are still sorted, so dealing them out like cards gives each split its share of every class.
    hand = torch.arange(len(labels)) % 20
    is_val, is_test = (torch.isin(hand, torch.tensor(hands)) for hands in ([0, 7, 14], [3, 10, 17]))
    arrays = dict(clutter=clutter, ligatures=images[len(labels):])
    for split, member in dict(train=~is_val & ~is_test, val=is_val, test=is_test).items():
        index = member.nonzero().flatten()
        index = index[torch.randperm(len(index), generator=g)]
        arrays[split], arrays[f'{split}_labels'] = images[index], labels[index]

    symbols = torch.randint(len(PRINTS) + len(PAIRS), len(case), (EXTRAS,), generator=g)
    letters = labels[torch.randperm(len(labels), generator=g)[:EXTRAS]]  # as frequent as in the text
    arrays['symbols'] = sheets(case, symbols, 'other symbols')
    arrays['typeface'] = sheets(cut_case(PRINTS, [OTHER_FACE] * len(FACES)), letters, 'another typeface')
    return arrays


def load_letterpress(image_size, data_root, seed):
    """The rendered letters from their cache under `data_root`, rendered first if that is missing, damaged or outdated."""
    path = Path(data_root) / f'letterpress-{LETTERPRESS_VERSION}-seed{seed}.npz'
    parts = ('train', 'val', 'test')
    try:
        with np.load(path, allow_pickle=False) as cache:
            arrays = {key: torch.from_numpy(cache[key])
                      for key in (*parts, *(f'{part}_labels' for part in parts), *LETTERPRESS_OOD)}
    except Exception:  # zipfile and numpy raise whatever the damage makes them raise
        with atomic_write(path) as file:  # opened first: a folder that cannot be written is told before the work
            arrays = render_letterpress(seed)
            np.savez(file, **{key: array.numpy() for key, array in arrays.items()})
    splits = [Split(prepare(arrays[part], image_size), arrays[f'{part}_labels']) for part in parts]
    return Data(*splits, list(PRINTS), {key: prepare(arrays[key], image_size) for key in LETTERPRESS_OOD})


# --- out-of-distribution sets ---------------------------------------------------------------------------------------

def shrink(x):
    """To a quarter of the area, in the lower right corner as in the tutorial, on a ground of each image's median grey:
    the tutorial's black would give away every print on light paper."""
    canvas = x.flatten(1).median(1).values[:, None, None, None].expand(x.shape).clone()  # (N,) -> (N, C, H, W)
    top, left = x.shape[2] // 2, x.shape[3] // 2
    canvas[..., top:, left:] = TF.resize(x, [x.shape[2] - top, x.shape[3] - left], antialias=True)
    return canvas


MADE = {  # from the test images x, float (N, C, H, W) in [-1, 1], and a random generator g: as many of another kind
    'flipped': lambda x, g: x.flip(2, 3),  # over both axes, as in the tutorial
    'rotated': lambda x, g: x.rot90(1, (2, 3)),
    'shrunk': lambda x, g: shrink(x),
    'blurred': lambda x, g: blur(x, x.shape[3] / 28),
    'noisy': lambda x, g: x + .3 * torch.randn(x.shape, generator=g),  # the tutorial's noise
    'interpolated': lambda x, g: (x + x.roll(1 + len(x) // 3, 0)) / 2,  # half of each of two images, as in JEM
    'noise': lambda x, g: torch.rand(x.shape, generator=g),  # uniform
    'gaussian': lambda x, g: torch.randn(x.shape, generator=g),
    'constant': lambda x, g: 2 * torch.rand(len(x), 1, 1, 1, generator=g).expand(x.shape) - 1,  # each image one grey
}


def ood_names(data, name, data_root='.data'):
    """The OOD sets there are for the data set `name`: near, changed, far, and torchvision's whose files are there."""
    there = [other for other, (dataset, _, train, test) in TORCHVISION.items()
             if other != name and open_torchvision(dataset, data_root, test or train)]
    letters = [] if name in NAMES else ['letterpress']  # a folder of glyphs: the same letters in another typeface
    return [*data.ood, *letters, *MADE, *(['digits'] if name != 'digits' else []), *there]


def load_ood(name, data, seed=0, data_root='.data'):
    """An OOD set by name or path, uint8 (N, C, H, W), of the size and channels of `data`.

    * near: `data.ood`, those that come with the data: clutter, ligatures, symbols, typeface of letterpress, ood_*.npy of a
      course folder (ood_ta is clutter, ood_tb ligatures); `letterpress` for other glyphs
    * changed test images, and far from them noise and greys: see MADE
    * `digits` (scikit-learn's scans), the test part of torchvision's sets, and paths (see `load_images`)

    No set can be told by its handling. Images from elsewhere are as raw as the data were: their channels are matched, then
    they pass `prepare` once. Changed and made-up images are min-max scaled, each to the least and the greatest value of
    the test image in its place (after `prepare` has resized, those need not be 0 and 255 any more), so contrast tells
    nothing. Only `constant` is left as it is, having none.

    Raises:
        DataError: there is no such set, or it cannot be read.
    """
    channels, size = data.test.images.shape[1:3]
    if name in data.ood:
        return data.ood[name]
    if name in MADE:
        x = to_float(data.test.images)  # (N, C, size, size)
        low, high = extremes(x)
        made = MADE[name](x, torch.Generator().manual_seed(seed))  # (N, C, size, size)
        return to_uint8(made if name == 'constant' else low + (high - low) * stretch(made))
    if name == 'digits':
        return match_channels(load_scans(size), channels)
    if name == 'letterpress':
        return match_channels(load_letterpress(size, data_root, seed).test.images, channels)
    if name in TORCHVISION:
        dataset, _, train_arguments, test_arguments = TORCHVISION[name]
        return read_torchvision(dataset, name, size, data_root, test_arguments or train_arguments, channels)[0]
    if Path(name).exists():
        return load_images(name, size, channels)[0]
    raise DataError(f'--ood {name}: no such file or folder, and no set of that name; choose from '
                    f'{", ".join([*data.ood, "letterpress", *MADE, "digits", *TORCHVISION])}')


# --- files and pictures ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for binary writing so that it is replaced as a whole, or, on any error, left as it was.

    Raises:
        OSError: the disk is full or the folder cannot be written, with the file and the way out in its message.
    """
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
        raise OSError(f'{path}: cannot be written ({error.strerror or error}); make room there, or name another folder; '
                      'the file that was there before, if any, is whole') from error
    finally:
        with contextlib.suppress(OSError):  # nothing to take away
            temporary.unlink()


def write_csv(rows, columns, path):
    """Write a list of dictionaries as a CSV file with these columns; floats get six digits."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows({key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()}
                     for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def save_figure(figure, path):
    """Write a matplotlib figure as PNG, whole or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format='png', dpi=figure.dpi)


def save_gif(frames, path):
    """Write states of a batch of images, a list of (N, C, H, W) in [-1, 1], as a film of one square grid; its end stays."""
    zoom = max(1, round(112 / frames[0].shape[3]))  # screen pixels for one image pixel
    grids = [make_grid(to_uint8(x.cpu()), nrow=math.ceil(len(x) ** .5), pad_value=255) for x in frames]  # (3, rows, columns)
    first, *others = [TF.to_pil_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)) for grid in grids]
    with atomic_write(path) as file:
        first.save(file, 'GIF', save_all=True, append_images=others, duration=[80] * len(others) + [2000], loop=0)


def shortened(text, length):
    """The end of a text, for which there is room: of a path it says most."""
    text = str(text)
    return text if len(text) <= length else f'…{text[1 - length:]}'


def save_grid(x, path, columns, title=None, rows=None, heads=None, captions=None, curve=None):
    """Write images as a grid that explains itself.

    Args:
        x: float (N, C, H, W) in [-1, 1].
        path: PNG file to write.
        columns: images in a row.
        title, rows, heads, captions: text above the grid, left of each row, above each column, below each image; shortened
            where there is no room for it.
        curve: (name, values (K + 1,)): a plot below the grid, over the steps 0 ... K.
    """
    height, width = x.shape[2:]
    zoom = max(1, round(56 / width))  # screen pixels for one image pixel
    gap = 2 if captions is None else 2 + -(-12 // zoom)  # room for a caption of 12 screen pixels
    x = F.pad(x.cpu(), (0, 2, 0, gap), value=1.)  # (N, C, H + gap, W + 2), white
    grid = make_grid(to_uint8(x), nrow=columns, padding=0, pad_value=255)  # (3, rows * (H + gap), columns * (W + 2))
    grid = grid.permute(1, 2, 0).numpy()  # (rows * (H + gap), columns * (W + 2), 3)
    rows = [shortened(row, 32) for row in rows or []]
    left = 8 * max(map(len, rows), default=0) + 8
    cell = zoom * (width + 2)  # screen pixels for the texts of a column; a letter takes 5 of them in a head, else 4.5
    top = 8 + 16 * sum(text is not None for text in (title, heads))
    bottom = 8 if curve is None else 208
    size = np.array([left + 8 + max(zoom * grid.shape[1], 7 * len(title or '')), top + bottom + zoom * grid.shape[0]])
    figure = Figure(figsize=size / 100, dpi=100)  # so that `size` counts screen pixels
    axes = figure.add_axes([left / size[0], bottom / size[1],
                            zoom * grid.shape[1] / size[0], zoom * grid.shape[0] / size[1]])
    axes.imshow(grid, interpolation='nearest', aspect='auto')
    axes.set_axis_off()
    for i, text in enumerate(rows):
        axes.text(-4 / zoom, i * (height + gap) + height / 2, text, ha='right', va='center', fontsize=8, parse_math=False)
    for i, text in enumerate(heads or []):
        axes.text(i * (width + 2) + width / 2, -2 / zoom, shortened(text, cell // 5), ha='center', va='bottom', fontsize=8,
                  parse_math=False)
    for i, text in enumerate(captions or []):
        axes.text(i % columns * (width + 2) + width / 2, i // columns * (height + gap) + height + 1 / zoom,
                  shortened(text, cell * 2 // 9), ha='center', va='top', fontsize=6, parse_math=False)
    if curve:
        plot = figure.add_axes([max(left, 60) / size[0], 45 / size[1], 1 - (max(left, 60) + 12) / size[0], 145 / size[1]])
        plot.plot(curve[1])
        plot.set_xlabel('step', fontsize=8)
        plot.set_ylabel(curve[0], fontsize=8)
        plot.tick_params(labelsize=7)
        plot.ticklabel_format(useOffset=False)
    if title:
        figure.text(left / size[0], 1 - 4 / size[1], title, ha='left', va='top', fontsize=9)
    save_figure(figure, path)


# --- command line: python data.py --data NAME|PATH ------------------------------------------------

def draw_examples(data, path, columns=10, most=50):
    """A row of training images for each of at most `most` classes (course task 3.1)."""
    rows, names = [], data.class_names[:most]
    for label in range(len(names)):
        index = (data.train.labels == label).nonzero().flatten()  # (n,)
        rows.append(index[torch.arange(columns) % len(index)])  # (columns,)
    x, _ = data.train.batch(torch.cat(rows))  # (rows * columns, C, H, W)
    title = f'{len(names)} of {len(data.class_names)} classes, {len(data.train)} training images'
    save_grid(x, path, columns, title, rows=names)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Draw examples of each class into data.png.')
    parser.add_argument('--data', default='letterpress', help='name or path, see the top of data.py')
    parser.add_argument('--data-root', default='.data', help='folder of downloads and of letterpress')
    parser.add_argument('--image-size', type=int, help='default: that of the data set')
    parser.add_argument('--out', type=Path, default='.', help='folder to write into')
    parser.add_argument('--seed', type=int, default=0, help='random seed')
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
    print(args.out / 'data.png')


if __name__ == '__main__':
    main()

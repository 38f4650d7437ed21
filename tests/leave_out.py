"""Leave a class out and see whether the energy knows it: a hard OOD set from the same source.

    python tests/leave_out.py --data mnist --leave 9 --out runs/without-9/data
    python train.py --data runs/without-9/data --image-size 28 --epochs 2 --out runs/without-9
    python ood.py --ckpt runs/without-9/best.pt --out runs/without-9

Writes a folder in the format of the course: train.npy, val.npy and test.npy without the class, and
its test images as ood_left.npy. Other OOD sets of the data are left behind. Random splits are those
of seed 0. AUPR depends on the ratio of the two sets, which is that of the test split: about one in
ten images of MNIST is OOD.
"""
import argparse
import shlex
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the six files
from data import SPLITS, DataError, load_data  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='mnist', help='name or path of the data set')
    parser.add_argument('--data-root', default='.data', help='folder of downloads')
    parser.add_argument('--leave', required=True, help='name of the class to leave out')
    parser.add_argument('--out', type=Path, required=True, help='new folder to write into')
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f'--out {args.out}: exists; name a new folder')
    try:
        data = load_data(args.data, data_root=args.data_root)
    except DataError as error:
        parser.error(str(error))
    if args.leave not in data.class_names:
        parser.error(f'--leave {args.leave}: choose one of {" ".join(data.class_names)}')
    left = data.class_names.index(args.leave)
    try:
        args.out.mkdir(parents=True)
    except OSError as error:
        parser.error(f'--out {args.out}: cannot be made ({error.strerror}); name another folder')
    for part in SPLITS:
        split = getattr(data, part)
        images = split.images.movedim(1, 3).squeeze(3).numpy()  # (N, H, W), or (N, H, W, 3)
        labels = split.labels.numpy()  # (N,)
        keep = labels != left
        with open(args.out / f'{part}.npy', 'wb') as file:
            np.save(file, images[keep])
            np.save(file, labels[keep] - (labels[keep] > left))  # 0, 1, ... without a gap
    np.save(args.out / 'ood_left.npy', images[~keep])  # of the test split, the last one
    names = [name for name in data.class_names if name != args.leave]
    (args.out / 'classes.txt').write_text('\n'.join(names) + '\n', encoding='utf-8')
    folder = shlex.quote(str(args.out))
    print(f'python train.py --data {folder} --image-size {images.shape[1]} --epochs 2')


if __name__ == '__main__':
    main()

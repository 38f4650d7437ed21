"""The lesson on COMET (.github/lessons/comet.py): an image is where the energies of its parts sum
to little, and the encoder learns through the steps that find it."""
import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / '.github' / 'lessons' / 'comet.py'


@pytest.fixture
def lesson():
    spec = importlib.util.spec_from_file_location('comet', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(lesson):
    torch.manual_seed(0)
    return lesson.Comet()


@pytest.fixture
def images(lesson):
    return lesson.make_images(16, torch.Generator().manual_seed(0))[0]  # (16, 1, S, S)


def test_the_whole_energy_is_the_sum_of_the_parts(lesson, model, images):
    z = model.encode(images)
    parts = model.energies(images, z)
    assert parts.shape == (16, lesson.PARTS) and (parts >= 0).all()
    for k in range(lesson.PARTS):  # no part looks at the latent of another
        torch.testing.assert_close(model.energies(images, z[:, k:k + 1])[:, 0], parts[:, k])
    # One step follows the sum of the gradients of the single energies.
    lesson.STEPS = 1
    x = images.clone().requires_grad_()
    gradients = [torch.autograd.grad(model.energies(x, z[:, k:k + 1]).sum(), x, retain_graph=True)[0]
                 for k in range(lesson.PARTS)]
    torch.testing.assert_close(model.generate(z, images), images - lesson.STEP_SIZE * sum(gradients))


def test_the_encoder_learns_through_the_steps(lesson, model, images):
    start = torch.zeros_like(images)
    loss = (model.generate(model.encode(images), start, differentiable=True) - images).square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        if name != 'out.1.bias_':
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

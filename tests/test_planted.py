"""The table of planted mistakes fits the code: `python tests/planted.py` tries all of them out."""
import pytest
from planted import MISTAKES, PROJECT, plant


@pytest.mark.parametrize('file', dict.fromkeys(mistake.file for mistake in MISTAKES))
def test_every_fragment_stands_in_its_file_once(file):
    """What is replaced is there exactly once, and the mistake is another text."""
    text = (PROJECT / file).read_text()
    for mistake in [mistake for mistake in MISTAKES if mistake.file == file]:
        assert plant(text, mistake) != text, mistake.name

"""The README, and the blocks in it that tests execute or compare."""
import os
import re

from script import ROOT

with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as stream:
    README = stream.read()
HEADINGS = re.findall(r'^## (.*)$', README, re.M)


def blocks():
    """Return [(name or '', text)] of all fenced blocks."""
    return re.findall(r'^(?:<!-- test: ([\w -]+) -->\n)?```\w+\n(.*?)^```$', README, re.M | re.S)


def block(name):
    """Return the text of the block with that name."""
    return dict(blocks())[name]

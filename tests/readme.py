"""The README and its blocks of Python, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

import fastsn

ROOT = Path(fastsn.__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONVERT, EXAMPLE, EQUIVALENT, *_FAMILIES, GENERATOR = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
UPSCALER, VOCODER, CLASSIFIER = _FAMILIES
INLINE = re.findall(r"`(fastsn\.[^`\n]*\))`", README)

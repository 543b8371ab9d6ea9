"""Measuring what a model knows, by lmms-eval."""

import os

# lmms-eval logs through loguru, which writes from DEBUG on unless told otherwise before its first import: a dozen lines
# about task files of no concern to the reader. A level of one's own stays.
os.environ.setdefault("LOGURU_LEVEL", "WARNING")

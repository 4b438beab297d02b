"""``python -m bernini``: the same as the console command."""

import os
import sys

# From the repository's root, ``-m`` puts that folder on the path, where our ``kernels`` would shadow Hugging Face's
# package of the same name, which transformers and diffusers import.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.path[0] == _root and os.path.isfile(os.path.join(_root, "setup.py")):
    del sys.path[0]

from bernini.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

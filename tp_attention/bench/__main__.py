"""`python -m tp_attention.bench` is `tp-attention bench`."""

import sys

from tp_attention.cli import main

sys.argv[1:1] = ["bench"]
main()

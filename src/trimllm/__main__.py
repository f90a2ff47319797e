"""`python -m trimllm`, also under torchrun and accelerate launch."""

import sys

from trimllm.cli import main

sys.exit(main())

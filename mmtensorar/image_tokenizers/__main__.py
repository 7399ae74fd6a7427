"""`python -m mmtensorar.image_tokenizers` is `mmtensorar image-tokenizer`."""

import sys

from mmtensorar.roundtrip import main

if __name__ == "__main__":
    sys.exit(main())

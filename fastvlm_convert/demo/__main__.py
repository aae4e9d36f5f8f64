"""Write the sixteen check pictures: `python -m fastvlm_convert.demo FOLDER`."""

import sys
from pathlib import Path

from fastvlm_convert.demo.samples import write_check_images

if __name__ == "__main__":
    write_check_images(Path(sys.argv[1]))

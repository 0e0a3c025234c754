"""`python -m fastjax.demo [OUTPUT_DIR]`: runs the demo. Exits with 1 and says why if it did not come out well."""

import sys
import time
from pathlib import Path

from fastjax.demo.settings import Settings
from fastjax.demo.stages import run


def main() -> int:
    began = time.perf_counter()
    settings = Settings(output_dir=Path(sys.argv[1])) if len(sys.argv) > 1 else Settings()
    faults = run(settings).faults()
    for fault in faults:
        print(f"demo failed: {fault}", file=sys.stderr)
    print(f"\n{'failed' if faults else 'done'} in {time.perf_counter() - began:.0f} s")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

"""Compiler launcher: runs nvcc and keeps what it prints in OBJECT.ptxas.txt beside the object file.

With `--join REPORT OBJECT...` it writes the objects' reports into one file instead.
"""

import subprocess
import sys
from pathlib import Path


def report_of(object_file: str) -> Path:
    return Path(object_file + ".ptxas.txt")


def main(arguments: list[str]) -> int:
    if arguments[0] == "--join":
        report, *objects = arguments[1:]
        Path(report).write_text("".join(report_of(name).read_text() for name in objects))
        return 0
    compiled = subprocess.run(arguments, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(compiled.stderr)
    if compiled.returncode == 0:
        object_file = arguments[arguments.index("-o") + 1]
        report_of(object_file).write_text(compiled.stderr)
    return compiled.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

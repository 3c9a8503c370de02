"""Compiler launcher: runs nvcc and fails where ptxas made a slow kernel of the source.

That is where it serialised wgmma or ignored setmaxnreg (its notes C75xx), or spilled registers.
With `--warn` before the command it only says so: for compilers that the project did not choose.
"""

import re
import subprocess
import sys

SLOW = re.compile(r".*\bC75\d\d\b.*|.*\b[1-9]\d* bytes (?:stack frame|spill (?:stores|loads)).*")


def slow_kernels(report: str) -> list[str]:
    """What `nvcc -Xptxas=-v` printed that no kernel here may have, a line each."""
    found, kernel = [], ""
    for line in report.splitlines():
        named = re.search(r"(?:entry function|Function properties for) '?([^\s']+)", line)
        kernel = named[1] if named else kernel
        if SLOW.fullmatch(line):
            found.append(f"{kernel}: {line.strip()}")
    return found


def main(command: list[str]) -> int:
    fatal = command[0] != "--warn"
    command = command if fatal else command[1:]
    compiled = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(compiled.stderr)
    found = slow_kernels(compiled.stderr) if compiled.returncode == 0 else []
    for line in found:
        sys.stderr.write(f"{'error' if fatal else 'warning'}: ptxas: {line}\n")
    return 1 if found and fatal else compiled.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

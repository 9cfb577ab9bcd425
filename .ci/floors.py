"""Prints the oldest release of each dependency that the host's pyproject.toml allows, as constraints for pip."""

import sys

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in map(Requirement, project["dependencies"]):
    if requirement.marker is None or requirement.marker.evaluate():
        [floor] = [part.version for part in requirement.specifier if part.operator == ">="]
        print(f"{requirement.name}=={floor}")

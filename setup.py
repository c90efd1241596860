"""Names the packages; everything else about the distribution is in pyproject.toml.

fastjepa/kernels is a relative link to ../kernels. find_packages follows it, so that a wheel and a source distribution
hold the kernels' files and need no link.
"""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["fastjepa", "fastjepa.*"]))

"""The contents of a wheel: the packages, and the data files that they need from the top level of the repository.

In an installed copy these files are inside halftone_trainer; pipelines/tools/resources.py finds them in both places.
All other settings of the distribution are in pyproject.toml.
"""

from setuptools import find_packages, setup

CODE = ["pipelines", "training", "data_scripts", "halftone_trainer"]
FILES = {"halftone_trainer.configs": "configs", "halftone_trainer.model_cards": "model_cards"}

setup(
    packages=[*find_packages(include=[*CODE, *(f"{package}.*" for package in CODE)]), *FILES],
    package_dir=FILES,
    package_data={"halftone_trainer.configs": ["**/*.yaml", "**/*.jinja"], "halftone_trainer.model_cards": ["*.jinja"]},
    include_package_data=False,
)

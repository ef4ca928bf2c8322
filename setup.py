"""Which folders the wheel holds; pyproject.toml has the rest.

rn50_configs/ becomes the package ffssl.configs: the configs are kept once, and an installed FFSSL
finds them by name (ffssl/config/named.py).
"""

from setuptools import find_namespace_packages, find_packages, setup

CONFIGS = "ffssl.configs"

setup(
    packages=[
        *find_packages(include=["ffssl*"]),
        CONFIGS,
        *(f"{CONFIGS}.{folder}" for folder in find_namespace_packages("rn50_configs")),
    ],
    package_dir={CONFIGS: "rn50_configs"},
    package_data={"": ["py.typed", "*.yaml", "*.css", "*.jinja"]},
)

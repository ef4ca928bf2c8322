"""Which folders the wheel holds; pyproject.toml has the rest.

rn50_configs/ becomes the package ffssl.configs: the configs are kept once, and an installed FFSSL
finds them by name (ffssl/config/named.py).
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ffssl*"]), "ffssl.configs"],
    package_dir={"ffssl.configs": "rn50_configs"},
    package_data={"ffssl": ["py.typed"], "ffssl.configs": ["*.yaml", "*/*.yaml"]},
)

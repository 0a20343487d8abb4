"""What pyproject.toml cannot say: a wheel has the repository's `configs/` and `pocket/` inside the
package, as `jaxfusion/configs` and `jaxfusion/pocket`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxfusion*"]), "jaxfusion.configs", "jaxfusion.pocket"],
    package_dir={"jaxfusion.configs": "configs", "jaxfusion.pocket": "pocket"},
    package_data={"jaxfusion": ["**/*.jinja"], "jaxfusion.pocket": ["*/*"]},
)

"""What pyproject.toml cannot say: a wheel has the repository's `configs/` and `pocket/` inside the
package, as `jaxfusion/configs` and `jaxfusion/pocket`."""

from setuptools import find_namespace_packages, find_packages, setup

TOWERS = [f"jaxfusion.pocket.{tower}" for tower in find_namespace_packages("pocket")]

setup(
    packages=[*find_packages(include=["jaxfusion*"]), "jaxfusion.configs", "jaxfusion.pocket",
              *TOWERS],
    package_dir={"jaxfusion.configs": "configs", "jaxfusion.pocket": "pocket"},
    package_data={"jaxfusion": ["**/*.jinja", "serving/page/*"],
                  **{tower: ["*"] for tower in TOWERS}},
)

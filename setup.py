"""What pyproject.toml can not say: which of the root's modules are no part of the package `vlmpruner`."""

from setuptools import setup
from setuptools.command.build_py import build_py


SCRIPTS = ("app", "demo", "setup")  # they run in a clone, on the model and the pictures there


class BuildPackage(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if package != "vlmpruner" or module[1] not in SCRIPTS]


setup(cmdclass={"build_py": BuildPackage})

"""Lets torchvision be imported beside a torch for the CPU; `make` copies it into the environment of the vLLM tests.

torchvision's wheel on PyPI is a CUDA build, whose operators do not load without CUDA. Nothing here calls them, but its import
asks that two of them are declared, so they are declared when torchvision is imported.
"""

import sys
from importlib.abc import MetaPathFinder


class DeclareOperators(MetaPathFinder):
    """Finds nothing; acts when it is asked for torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules["torchvision_operators"] = self  # an operator lives as long as its library


sys.meta_path.insert(0, DeclareOperators())

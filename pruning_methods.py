"""The pruning methods that there are. A method joins by its import and one line in `METHODS`."""

from .method_btp import BTP
from .method_cdpruner import CDPruner
from .method_dart import DART
from .method_divprune import DivPrune
from .method_fastv import FastV
from .method_holov import HoloV
from .method_prunesid import PruneSID
from .method_pyramiddrop import PyramidDrop
from .method_random import RandomTokens
from .method_restore import RESTORE
from .method_saint import SAINT
from .method_scope import SCOPE
from .method_visionzip import VisionZip
from .method_vispruner import VisPruner
from .method_vlm_pruner import VLMPruner
from .pruning_method import PruningMethod


# pruning_method -> its class. "none" leaves the stock model.
METHODS: dict[str, type[PruningMethod]] = {
    "vlm_pruner": VLMPruner,
    "fastv": FastV,
    "dart": DART,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "saint": SAINT,
    "btp": BTP,
    "pyramiddrop": PyramidDrop,
    "visionzip": VisionZip,
    "scope": SCOPE,
    "vispruner": VisPruner,
    "prunesid": PruneSID,
    "holov": HoloV,
    "restore": RESTORE,
    "random": RandomTokens,
}

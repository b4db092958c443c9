"""PEFT's AdaLoRA, computed by this library: the same models, parameters and files, faster and without its faults.

>>> import adalora.peft
>>> model = adalora.peft.accelerate(get_peft_model(model, AdaLoraConfig(...)))

or once for every model that the process makes from then on:

>>> adalora.peft.install()
"""

from .allocator import RankAllocator
from .install import install, uninstall
from .model import accelerate
from .report import RankReport

__all__ = ["RankAllocator", "RankReport", "accelerate", "install", "uninstall"]

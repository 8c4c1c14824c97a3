"""Models of diffusers as teachers: their pipelines stay where they are, and are called as they are.

    trigflow import hf:stabilityai/stable-diffusion-3-medium --out runs/teacher
    trigflow encode photos/ --with runs/teacher --out cache
    trigflow distill runs/teacher --data cache --lora 64 --out runs/student

`base` knows a pipeline by its configurations, `family` how its denoiser is called (one file for each in `families`), `network`
makes a network of ours of it, with adapters (`adapters`) or without, and `words` has its encoders read texts.
"""

from trigflow.models.foreign.adapters import AdapterConfig
from trigflow.models.foreign.base import Base, open_base
from trigflow.models.foreign.family import FAMILIES, Family, family, family_of
from trigflow.models.foreign.network import Foreign, ForeignConfig, check_moves
from trigflow.models.foreign.teacher import import_pipeline, wrap
from trigflow.models.foreign.words import Prompts

__all__ = [
    "FAMILIES", "AdapterConfig", "Base", "Family", "Foreign", "ForeignConfig", "Prompts", "check_moves", "family", "family_of",
    "import_pipeline", "open_base", "wrap",
]  # fmt: skip

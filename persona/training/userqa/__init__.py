"""UserQA (InstructUE, arXiv 2510.11016): triples of a history, an instruction and an answer, from any domain's recipe.

`triples` makes them, `wordings` lets an LLM vary how they are asked, `dataset` writes them for the Hugging Face Hub.
"""

from persona.training.userqa.card import counts_table
from persona.training.userqa.dataset import Counts, check_folder, write_userqa
from persona.training.userqa.triples import SPLITS, Triple, UserQAConfig, triples
from persona.training.userqa.wordings import Rewriting, Wordings, reword

__all__ = [
    "SPLITS",
    "Counts",
    "Rewriting",
    "Triple",
    "UserQAConfig",
    "Wordings",
    "check_folder",
    "counts_table",
    "reword",
    "triples",
    "write_userqa",
]

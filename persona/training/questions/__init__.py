"""Questions about a user, made by rule from a history and from what came after it.

A recipe declares them (`QuestionSpec`); the same questions train an adapter, train a reference LM and make the
evaluation tables. Understanding questions are answered by the history, predictive ones by events after the cut, which
no method ever sees.
"""

from persona.training.questions.build import build_questions
from persona.training.questions.catalogue import Catalogue, Item
from persona.training.questions.cuts import Cut, evaluation_cuts, make_cut
from persona.training.questions.spec import NO, YES, Question, QuestionSpec

__all__ = [
    "NO",
    "YES",
    "Catalogue",
    "Cut",
    "Item",
    "Question",
    "QuestionSpec",
    "build_questions",
    "evaluation_cuts",
    "make_cut",
]

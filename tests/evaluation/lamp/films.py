"""People who rate films, and one who is new: what they are asked, a recipe, and a step of training on the questions."""

import torch

from persona.evaluation.lamp.recipe import LampRecipe
from persona.evaluation.lamp.sample import Sample
from persona.evaluation.lamp.tasks import TASKS
from persona.evaluation.lamp.training import Collate
from persona.history import Event, History
from persona.training.configs import TrainingConfig

TASK = TASKS["LaMP_3"]
FILMS = ("a bear in space", "two cooks", "rain on the hill", "the long war", "a goat for mayor", "quiet trains")


def make_item(place, stars, *, user="u"):
    """A rating as `LampDomain` makes them: its text tells the score, as an official one's does."""
    film = FILMS[place % len(FILMS)]
    fields = {"text": film, "score": str(stars)}
    return Event("rating", 10.0 * place, f"{stars}: {film}", f"m{place}", float(stars), fields, f"{user}/{place}")


def make_profile(user, stars):
    return History(user, tuple(make_item(place, n, user=user) for place, n in enumerate(stars)))


def ask(profile, film, score="3", id=None):
    return Sample(id or f"{profile.user} {film}", TASK.input.format(text=film), profile, score)


ANN, BOB, NOBODY = make_profile("ann", [5, 1, 4, 5, 2]), make_profile("bob", [1, 1, 2]), History("new")
SAMPLES = [ask(ANN, "a bear at sea"), ask(BOB, "a bear at sea"), ask(ANN, "three cooks"), ask(NOBODY, "three cooks")]


def make_recipe(**more):
    return LampRecipe(
        "films",
        "LaMP_3",
        official="user",
        new_tokens=4,
        **{"training": TrainingConfig(histories_per_step=2), **more},
    )


def write(sample):
    return sample.input


def train_a_step(model, samples=SAMPLES, rate=1e-2):
    """One step of AdamW on what is trainable, and the names of the parameters and buffers that it changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    model.train()
    model(**Collate(model, write)([samples]))["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
    optimizer.step()
    model.eval()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

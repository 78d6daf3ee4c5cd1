"""Every recipe that is shipped loads, and the one for GroupLens's CSV files reads them."""

from pathlib import Path

import pytest

from persona.evaluation.lamp.recipe import load_lamp_recipe
from persona.history.readers import read_histories
from persona.history.render import render_history
from persona.training.recipe import load_recipe

ADAPTERS = Path(__file__).parents[1] / "adapters"
RECIPES = sorted(ADAPTERS.glob("*/recipe*.yaml"))

RATINGS = """userId,movieId,rating,timestamp
1,1,4.0,964982703
1,3,0.5,964982931
2,1,3.5,964982224
2,7,5.0,964982000
"""
MOVIES = """movieId,title,genres
1,Toy Story (1995),Adventure|Animation|Children|Comedy|Fantasy
3,"American President, The (1995)",Romance
7,"Say ""Yes"" (2019)",(no genres listed)
"""


def test_there_are_recipes():
    names = {str(path.relative_to(ADAPTERS)) for path in RECIPES}
    assert {"demo/recipe.yaml", "movies/recipe.yaml", "movies/recipe-csv.yaml"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_loads(path):
    assert load_recipe(path).questions


@pytest.mark.parametrize(
    "path", sorted(ADAPTERS.glob("*/lamp*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_a_recipe_in_the_form_of_lamp_loads(path):
    recipe = load_lamp_recipe(path)
    assert recipe.official or recipe.readers


def test_the_csv_recipe_asks_as_the_other_does():
    ours, other = (load_recipe(ADAPTERS / "movies" / name) for name in ("recipe-csv.yaml", "recipe.yaml"))
    for part in ("window", "sources", "questions", "split", "encoder", "training", "lm"):
        assert getattr(ours, part) == getattr(other, part)


def test_the_csv_recipe_reads_ratings_and_movies(tmp_path):
    (tmp_path / "ratings.csv").write_text(RATINGS)
    (tmp_path / "movies.csv").write_text(MOVIES)
    recipe = load_recipe(ADAPTERS / "movies" / "recipe-csv.yaml")
    histories, report = read_histories(recipe.readers, tmp_path, strict=True)
    assert report.events == 4 and sorted(histories) == ["1", "2"]
    first, second = histories["1"].events
    assert (first.source, first.timestamp, first.item_id, first.value) == ("rating", 964982703.0, "1", 4.0)
    assert (first.text, first.attributes) == ("Toy Story (1995) Adventure", {"genre": "Adventure"})
    assert (second.item_id, second.value) == ("3", 0.5)
    assert second.text == "American President, The (1995) Romance"
    assert render_history(histories["2"], recipe.sources) == (
        'Say "Yes" (2019) (no genres listed) 5\nToy Story (1995) Adventure 3.5'
    )

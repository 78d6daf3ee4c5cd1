from dataclasses import dataclass, field

import pytest

from persona.errors import RecipeError
from persona.history import ColumnSpec, ReaderSpec, SourceSpec, load_config, parse_config
from persona.history.config import stated
from persona.history.source import STRICT


@dataclass(frozen=True)
class Recipe:
    __pydantic_config__ = STRICT

    sources: dict[str, SourceSpec]
    readers: list[ReaderSpec] = field(default_factory=list)
    extra: SourceSpec | None = None
    epochs: int = 1

    def __post_init__(self):
        if self.epochs < 0:
            raise RecipeError("epochs must not be negative")


GOOD = """
sources:
  ratings: {kind: item}
readers:
  - source: ratings
    path: u.csv
    user: user_id
    attributes: {genre: {column: class, split: " "}, year: year}
    join: [{path: items.csv, on: item_id}]
"""


def failure(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_config(Recipe, path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_recipe_loads_and_the_key_on_is_a_word_not_a_boolean(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    recipe = load_config(Recipe, str(path))
    assert recipe.readers[0].join[0].on == "item_id"
    assert recipe.readers[0].attributes == {"genre": ColumnSpec("class", split=" "), "year": "year"}


def test_what_is_stated_is_what_differs_from_the_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    recipe = load_config(Recipe, path, ["epochs=3"])
    reader = {"source": "ratings", "path": "u.csv", "user": "user_id", "join": [{"path": "items.csv", "on": "item_id"}]}
    reader["attributes"] = {"genre": {"column": "class", "split": " "}, "year": "year"}
    assert stated(recipe) == {"sources": {"ratings": {"kind": "item"}}, "readers": [reader], "epochs": 3}
    assert "epochs" not in stated(load_config(Recipe, path))


def test_parse_config_names_where(tmp_path):
    assert parse_config(SourceSpec, {"kind": "text"}, "here") == SourceSpec("text")
    with pytest.raises(RecipeError, match=r"^here: kind is missing$"):
        parse_config(SourceSpec, {}, "here")
    with pytest.raises(RecipeError, match="must be a mapping of fields, not list"):
        parse_config(SourceSpec, [], "here")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("user: user_id", "usr: user_id", "readers.0.usr is not a known key; did you mean 'user'?"),
        ("user: user_id", "", "readers.0.user is missing"),
        ("user: user_id", "user: 3", "readers.0.user must be a valid string, not 3 (int)"),
        ("kind: item", "kind: itm", "sources.ratings.kind must be 'text', 'item' or 'tabular', not 'itm'"),
        (
            "column: class",
            "colum: class",
            "readers.0.attributes.genre.colum is not a known key; did you mean 'column'?",
        ),
        ("path: items.csv", "paht: items.csv", "readers.0.join.0.paht is not a known key; did you mean 'path'?"),
        (
            "year: year",
            "year: [1]",
            "readers.0.attributes.year must be a valid string, not [1] (list) or must be a mapping",
        ),
        ("sources:", "epochs: -1\nsources:", "epochs must not be negative"),
        ("sources:", "epochs: lots\nsources:", "epochs must be a valid integer"),
        ("sources:", "zzz: 1\nsources:", "zzz is not a known key; known keys: sources, readers, extra, epochs"),
        ("sources:", "extra: {kin: text}\nsources:", "extra.kin is not a known key; did you mean 'kind'?"),
    ],
)
def test_a_mistake_names_the_field(tmp_path, old, new, message):
    assert old in GOOD
    assert message in failure(tmp_path, GOOD.replace(old, new))


def test_an_empty_separator(tmp_path):
    text = GOOD.replace('split: " "', 'split: ""')
    assert failure(tmp_path, text).split(": ", 1)[1].startswith("readers.0.attributes.genre `split` is empty: name the")


def test_a_union_does_not_complain_about_the_member_that_was_not_meant(tmp_path):
    message = failure(tmp_path, GOOD.replace("column: class", "column: 3"))
    assert message.count("\n") == 0 and "attributes.genre.column must be" in message


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty; expected the fields of Recipe"),
        ("# only a comment", "is empty"),
        ("- a\n- b", "must be a mapping of fields, not list"),
        ("just words", "must be a mapping of fields, not str"),
        ("a: 1\nb: [1, 2\nc: 3", ", line 3: is not valid YAML"),
        ("a: !!python/object:os.system {}", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    assert message in failure(tmp_path, text)


def test_a_missing_file_a_folder_and_other_encodings(tmp_path):
    with pytest.raises(RecipeError, match="there is no such file"):
        load_config(Recipe, tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_config(Recipe, tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(RecipeError, match="UTF-8"):
        load_config(Recipe, tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "change, epochs, kind",
    [("epochs=3", 3, "item"), ("epochs = 2", 2, "item"), ("sources.ratings.kind=text", 1, "text")],
)
def test_fields_can_be_changed(tmp_path, change, epochs, kind):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    recipe = load_config(Recipe, path, [change])
    assert (recipe.epochs, recipe.sources["ratings"].kind) == (epochs, kind)


def test_a_change_of_a_part_that_the_file_leaves_out(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    assert load_config(Recipe, path, ["extra.kind=tabular"]).extra == SourceSpec("tabular")


@pytest.mark.parametrize(
    "change, message",
    [
        ("epochs", "is no change of a field; write it like"),
        ("=3", "is no change of a field"),
        ("epoch=3", "epoch.*epochs"),
        ("epochs=many", "epochs"),
        ("sources.ratings.kind.deep=1", "is not a mapping of fields"),
        ("readers.source=x", "is not a mapping of fields"),
        ("epochs=[1", "is not a value in YAML"),
    ],
)
def test_a_change_that_cannot_be_made(tmp_path, change, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    with pytest.raises(RecipeError, match=message):
        load_config(Recipe, path, [change])

"""Another's profile for each question: never one's own, nor one that holds the event asked about."""

from dataclasses import replace

import pytest

from persona.errors import PersonaError
from persona.evaluation.lamp.models import other_people
from persona.evaluation.lamp.sample import Sample
from persona.history import Event, History

from .films import BOB, SAMPLES, ask, make_profile


def test_nobody_gets_the_own_profile_and_the_questions_stay():
    carol = make_profile("carol", [3, 3])
    samples = [*SAMPLES, ask(carol, "quiet trains"), ask(BOB, "rain")]
    other = other_people(samples)
    assert [replace(a, profile=b.profile) for a, b in zip(other, samples)] == samples
    given = {(a.profile.user, b.profile.user) for a, b in zip(samples, other)}
    assert given == {
        ("ann", "bob"),
        ("bob", "carol"),
        ("new", "carol"),
        ("carol", "ann"),
    }  # nobody is without a profile
    assert other_people(samples) == other


def test_nobody_is_given_the_profile_that_holds_the_event_asked_about():
    """A paper of two authors is asked of one; the other's later profile holds its title."""
    papers = [Event("paper", float(n), f"title {n}", event_id=f"P{n}") for n in range(8)]
    asked = Sample("P3", "q", History("ann", tuple(papers[:3])), "title 3", papers[3])
    later = Sample("P6", "q", History("bob", tuple(papers[3:6])), "title 6", papers[6])
    third = Sample("P7", "q", History("eve", (papers[0], papers[2])), "title 7", papers[7])
    for sample in other_people([asked, later, third]):
        assert sample.target.event_id not in {event.event_id for event in sample.profile.events}


def test_one_user_alone_has_nobody_to_be_taken_for():
    with pytest.raises(PersonaError):
        other_people([SAMPLES[0], SAMPLES[2]])

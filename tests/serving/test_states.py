"""States in memory: kept up to date, shared by threads, one encoding for each user, and forgotten for good."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from persona.errors import PersonaError
from persona.history import Event
from persona.serving.states import UserStates, _event_bytes
from persona.store import EventStore


class Gate(nn.Module):
    """A part of the encoder that tells when it is reached, and waits until it may go on."""

    def __init__(self, part):
        super().__init__()
        self.part, self.calls = part, 0
        self.keep = getattr(part, "keep", None)
        self.reached, self.go = threading.Event(), threading.Event()
        self.go.set()

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.reached.set()
        assert self.go.wait(30)
        return self.part(*args, **kwargs)


@pytest.fixture
def gate(encoder):
    """Stands before the encoder's backbone, after the texts have been encoded."""
    encoder.backbone = Gate(encoder.backbone)
    yield encoder.backbone
    encoder.backbone.go.set()


@pytest.fixture
def early_states(encoder, monkeypatch):
    """Stands before the text encoder's work on instructions."""
    gate = Gate(encoder.text_encoder._encode_states)
    monkeypatch.setattr(encoder.text_encoder, "_encode_states", gate)
    yield gate
    gate.go.set()


@pytest.fixture
def early(encoder, monkeypatch):
    """Stands before the text encoder, after the history has been read."""
    gate = Gate(encoder.text_encoder.vectors)
    monkeypatch.setattr(encoder.text_encoder, "vectors", gate)
    yield gate
    gate.go.set()


@pytest.fixture
def store(tmp_path):
    with EventStore(f"sqlite:///{tmp_path / 'events.db'}") as store:
        yield store


@pytest.fixture
def states(encoder, store):
    return UserStates(encoder, store)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def search(time, text="tea"):
    return Event("search", float(time), text=text)


def same(a, b):
    return a.states.shape == b.states.shape and torch.allclose(a.states, b.states, atol=1e-5)


def test_unknown_users_cost_nothing(states, gate):
    assert states.get("nobody") is None and (len(states), states.hits, states.misses, gate.calls) == (0, 0, 0, 0)


def test_look_ups_are_counted(states, store):
    store.append("u", [search(1)])
    states.get("u"), states.get("u")
    store.append("u", [search(2)])
    states.get("u")
    assert (states.hits, states.misses) == (1, 2)


def test_the_texts_of_events_count_against_the_memory_limit(encoder, store):
    states = UserStates(encoder, store, cache_mib=1)
    for user in map(str, range(8)):
        store.append(user, [search(time, user + "x" * 100_000) for time in range(2)])
        states.get(user)
    held = sum(len(event.text) for known in states._states.values() for event in known.events)
    assert 2**19 < held < states._states.currsize <= 2**20
    small = UserStates(encoder, store, cache_mib=0.05)
    assert small.get("0") is not None and len(small) == 0, "one user alone is too much"


def test_all_that_an_event_holds_is_counted():
    long = "x" * 1000
    whole = Event(long, 1.0, long, long, 2.0, {long: long}, long)
    assert 6000 < _event_bytes(whole) < 7500 and 100 < _event_bytes(Event("s")) < 500


def test_requests_for_one_user_encode_once(states, store, gate, pool):
    store.append("u", [search(1)])
    gate.go.clear()
    calls = [pool.submit(states.get, "u") for _ in range(16)]
    assert gate.reached.wait(10)
    gate.go.set()
    found = [call.result(10) for call in calls]
    assert gate.calls == 1 and all(state is found[0] for state in found)


def test_one_user_does_not_wait_for_another(states, store, gate, pool):
    lock = {user: hash(("default", user)) % len(states._encoding) for user in map(str, range(100))}
    busy, free = next((a, b) for a in lock for b in lock if lock[a] != lock[b])
    for user in (busy, free):
        store.append(user, [search(1)])
    gate.go.clear()
    slow = pool.submit(states.get, busy)
    assert gate.reached.wait(10)
    quick = pool.submit(states.get, free)
    end = time.monotonic() + 10
    while gate.calls < 2:
        assert time.monotonic() < end, "the second user's encoding has not begun"
        time.sleep(0.005)
    gate.go.set()
    assert slow.result(10) and quick.result(10)


def test_nobody_waits_for_ever(encoder, store, gate, pool):
    states = UserStates(encoder, store, patience=0.1)
    store.append("u", [search(1)])
    gate.go.clear()
    slow = pool.submit(states.get, "u")
    assert gate.reached.wait(10)
    with pytest.raises(PersonaError, match=r"encoding this user for 0\.1 s") as error:
        states.get("u")
    assert isinstance(error.value, TimeoutError)
    gate.go.set()
    assert slow.result(10) is states.get("u")


def test_a_failed_encoding_holds_up_nobody(states, store, encoder):
    store.append("u", [search(1)])
    hook = encoder.backbone.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        states.get("u")
    hook.remove()
    assert states.get("u") is not None


def test_threads_that_write_read_and_forget_leave_nothing_wrong(states, store, encoder, pool):
    users = [f"u{i}" for i in range(6)]

    def work(n):
        user = users[n % 6]
        for turn in range(6):
            store.append(user, [search(turn, f"word {n % 5}")])
            states.get(user)
            if turn == 3 and n % 4 == 0:
                states.forget(user)

    list(pool.map(work, range(24)))
    for user in users:
        history = store.history(user)
        found = states.get(user)
        assert same(found, encoder.read([history])[0]) if len(history) else found is None


def test_tenants_share_no_state(states, store):
    store.append("u", [search(1, "tea")], tenant="one")
    store.append("u", [search(1, "carburettor")], tenant="two")
    one, two = states.get("u", tenant="one"), states.get("u", tenant="two")
    assert states.get("u") is None and not same(one, two)
    assert states.forget("u", tenant="one") == 1
    assert states.get("u", tenant="one") is None and states.get("u", tenant="two") is two


def gone(states, text="a secret"):
    return text not in states.encoder.text_encoder and ("default", "u") not in states


def test_forget_during_an_encoding_keeps_nothing(states, store, gate, pool):
    store.append("u", [search(1, "a secret")])
    gate.go.clear()
    call = pool.submit(states.get, "u")
    assert gate.reached.wait(10)
    assert states.forget("u") == 1, "does not wait for the encoding"
    gate.go.set()
    assert call.result(10) is not None and gone(states) and states.get("u") is None


@pytest.mark.parametrize("fails", [False, True])
def test_forget_before_the_texts_are_encoded_keeps_nothing(states, store, encoder, early, pool, fails):
    store.append("u", [search(1, "a secret")])
    early.go.clear()
    call = pool.submit(states.get, "u")
    assert early.reached.wait(10)
    assert states.forget("u") == 1
    hook = encoder.backbone.register_forward_pre_hook(lambda *_: 1 / 0) if fails else None
    early.go.set()
    assert bool(call.exception(10)) == fails
    assert gone(states) and states.get("u") is None
    if hook:
        hook.remove()


def test_forget_while_a_state_is_extended_keeps_nothing(states, store, early, pool):
    store.append("u", [search(1, "old")])
    states.get("u")
    store.append("u", [search(2, "a secret")])
    early.reached.clear(), early.go.clear()
    call = pool.submit(states.get, "u")
    assert early.reached.wait(10)
    assert states.forget("u") == 2
    early.go.set()
    call.result(10)
    assert gone(states) and gone(states, "old")


def test_texts_go_also_when_another_process_has_forgotten_the_user(states, store):
    store.append("u", [search(1, "a secret")])
    states.get("u")
    store.forget("u")
    assert states.forget("u") == 0 and gone(states)


def test_a_user_forgotten_elsewhere_leaves_memory_at_the_next_look_up(states, store):
    store.append("u", [search(1, "a secret")])
    states.get("u")
    store.forget("u")
    assert states.get("u") is None and gone(states)


def test_others_are_kept_when_one_is_forgotten_meanwhile(states, store):
    for user in ("u", "v"):
        store.append(user, [search(1, user)])
        states.get(user)
    states.forget("u")
    assert ("default", "v") in states and "v" in states.encoder.text_encoder


def test_a_store_that_fails_is_not_hidden(states, store, tmp_path):
    store.append("u", [search(1)])
    states.get("u")
    for file in tmp_path.glob("events.db*"):
        file.unlink()
    for call in (states.get, states.forget):
        with pytest.raises(PersonaError, match="removed or replaced"):
            call("u")


def test_an_instruction_is_encoded_once_for_all_who_ask_it(states, encoder, early_states, pool):
    early_states.go.clear()
    asked = [pool.submit(states.instruction, text) for text in ("first?", "same?", "same?", "other?")]
    assert early_states.reached.wait(10)
    early_states.go.set()
    first, same, again, other = (a.result(30) for a in asked)
    calls = early_states.calls
    assert calls <= 3 and states.instruction("same?") is not None and early_states.calls == calls
    assert torch.allclose(same.latents, again.latents) and not torch.equal(first.latents[-1], other.latents[-1])
    assert torch.allclose(same.latents, encoder.instruct(["same?"])[0].latents, atol=1e-5)


def test_instructions_are_forgotten_with_any_user(states, store, encoder, early_states, pool):
    states.instruction("where did ana go?")
    states.forget("ana")
    assert not states._instructions and not encoder.text_encoder._states
    early_states.go.clear()
    early_states.reached.clear()
    late = pool.submit(states.instruction, "and ana's sister?")
    assert early_states.reached.wait(10)
    states.forget("ana")
    early_states.go.set()
    assert len(late.result(30).latents) and not states._instructions, "it may quote her"


def test_what_was_made_of_a_user_and_an_instruction_is_kept_until_either_changes(states, store):
    store.append("ana", [Event("purchase", 1.0, text="violin music")])
    made = []

    def ask(text):
        def make():
            made.append(text)
            return torch.ones(4, 8)

        return states.made(states.get("ana"), states.instruction(text), make)

    ask("What next?"), ask("What next?"), ask("And then?"), ask("What next?")
    assert made == ["What next?", "And then?"]
    store.append("ana", [Event("purchase", 2.0, text="drum music")])
    ask("What next?")
    assert made == ["What next?", "And then?", "What next?"]  # the state is another
    states.instruction("What next?")
    states._instructions.clear()
    ask("What next?")
    assert len(made) == 4  # so is the instruction's


def test_forgetting_anybody_leaves_nothing_that_was_made(states, store, pool):
    for user in ("ana", "bo"):
        store.append(user, [Event("purchase", 1.0, text="violin music")])
    state, instruction = states.get("ana"), states.instruction("What next?")
    states.made(state, instruction, lambda: torch.ones(1))
    assert len(states._made) == 1
    states.forget("bo")
    assert not states._made
    made = states.made(state, instruction, lambda: (states.forget("ana"), torch.ones(1))[1])  # while it is made
    assert made.item() == 1 and not states._made

"""What encoding costs: users and events per second, and the time to add one event to a cached user."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence

import numpy as np
import torch

from persona.encoders import TextEncoder, UserEncoder
from persona.history import History


def encoding_cost(encoder: UserEncoder, histories: Sequence[History], repeats: int = 30) -> dict:
    """Seconds are wall time on this machine; histories are cut to the encoder's `max_events` first.

    "cold" encodes every distinct text anew, "warm" finds them cached, as for a catalogue that is known.
    """
    encoder = encoder.eval()
    histories = [h.last(encoder.config.max_events) for h in histories if len(h.timed) > 1]
    events = sum(len(h) for h in histories)
    texts = list({e.text for h in histories for e in h.events if e.text})
    encoder.text_encoder.forget(texts)
    cold = _seconds(lambda: encoder.read(histories))
    warm = min(_seconds(lambda: encoder.read(histories)) for _ in range(3))
    return {
        "device": str(encoder.device),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "users": len(histories),
        "events": events,
        "distinct_texts": len(texts),
        "users_per_second_cold": round(len(histories) / cold, 1),
        "events_per_second_cold": round(events / cold, 1),
        "users_per_second": round(len(histories) / warm, 1),
        "events_per_second": round(events / warm, 1),
        "add_event_ms_known_text": _add_event_ms(encoder, histories[:repeats], None),
        "add_event_ms_new_text": _add_event_ms(encoder, histories[:repeats], encoder.text_encoder),
        "bytes_per_cached_user_50_events": _state_bytes(encoder, histories),
    }


def _add_event_ms(encoder: UserEncoder, histories: Sequence[History], forget_in: TextEncoder | None) -> float:
    """Median milliseconds of `extend` by a history's newest event, its text cached or not."""
    times = []
    for history in histories:
        newest = history.timed[-1]
        state = encoder.read([history.until(newest.timestamp)])[0]
        if state.last_timestamp is None:
            continue
        if forget_in is not None:
            forget_in.forget([newest.text or ""])
        times.append(_seconds(lambda s=state, e=newest: encoder.extend(s, [e])))
    return round(1000 * float(np.median(times)), 2) if times else float("nan")


def _state_bytes(encoder: UserEncoder, histories: Sequence[History]) -> int:
    """Bytes of the longest cached state, keys and values included."""
    return encoder.read([max(histories, key=len).last(50)])[0].nbytes


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

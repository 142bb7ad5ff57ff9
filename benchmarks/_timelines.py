"""What a step's memory is made of over time, from what `benchmarks/timeline.py` has read.

libraries    was there before the model
weights      and the optimizer's moments are known of each role (`Backbone.role_bytes`)
gradients    are counted where a phase or role begins
activations  are the rest, of the role that runs: KV cache and scratch too, gradients that are
             coming, and what the C library keeps of small tensors that were freed
"""

from __future__ import annotations

from typing import Any

from benchmarks._results import Results

NAME = "timeline"
TUNINGS = ("full", "lora")
ANCHOR = "anchor"  # under LoRA the frozen base that all roles share


def mark_at(timeline: dict[str, Any], part: int) -> dict[str, Any]:
    """What the trainer was about in the middle of one of the equal parts."""
    at = (part + 0.5) * timeline["seconds"] / len(timeline["bytes"])
    return [mark for mark in timeline["marks"] if mark["at"] <= at][-1]


def split(timeline: dict[str, Any], part: int) -> dict[str, int]:
    """The bytes of one of the equal parts, by what they are for."""
    held = timeline["held"].values()
    found = {
        "libraries": timeline["libraries"],
        "weights": sum(one["weights"] for one in held),
        "optimizer": sum(one.get("optimizer", 0) for one in held),
        "gradients": mark_at(timeline, part)["gradients"],
    }
    return found | {"activations": timeline["bytes"][part] - sum(found.values())}


def table(results: Results) -> list[list[str]]:
    """A line per training: its peak, where it is, and what it is made of, in MiB."""
    lines = [["step", "tuning", "type", "shape", "seconds", "peak, MiB", "in",
              "libraries", "weights", "optimizer", "gradients", "activations"]]  # fmt: skip
    for one in results.timelines:
        peak = max(range(len(one["bytes"])), key=one["bytes"].__getitem__)
        mark, parts = mark_at(one, peak), split(one, peak)
        figures = [f"{n / 2**20:,.0f}" for n in (one["bytes"][peak], *parts.values())]
        where = f"{mark['phase']}, {mark['role']}"
        shape = " ".join(f"{letter}{size}" for letter, size in one["shape"].items())
        what = [one["step"], one["tuning"], one["dtype"], shape, f"{one['seconds']:.3g}"]
        lines.append([*what, figures[0], where, *figures[1:]])
    return lines

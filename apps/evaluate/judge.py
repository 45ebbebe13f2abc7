"""What the runs of a benchmark say of its drafters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["LOOPING", "judge", "warnings_of"]

LOOPING = 0.3
"""Share of repeated 8-grams from which on a text is said to loop."""
Report = dict[str, Any]


def judge(report: Report) -> list[Report]:
    """One entry for each variant that drafted.

    A text that loops is easy to draft: tau over the texts that do not is told apart.

    Args:
        report: of a benchmark (`draftloom.apps.bench.report.run_bench`).

    Returns:
        JSON data: variant, tau (over all cycles), tau_varied (over the texts whose share of
        repeated 8-grams is under `LOOPING`; None without one), varied and prompts (how many),
        repeated (mean share of repeated 8-grams), by_position, by_type (content type -> tau,
        cycles, repeated, prompts), speed_up (over the target alone; None where too little was
        written), same_text and compared (texts equal to the target's own), fell_back, mismatch
        (the pipeline's alarm).
    """
    overall = {entry["variant"]: entry for entry in report["summary"] if entry["suite"] == "all"}
    found = []
    for variant in report["variants"]:
        runs = [run for run in report["runs"] if run["variant"] == variant["name"]]
        if not any(run["verified"] or run["fell_back"] for run in runs):
            continue
        entry = overall[variant["name"]]
        varied = [run for run in runs if run["repeated"] < LOOPING]
        types = dict.fromkeys(run["suite"] for run in runs)
        found.append(
            {
                "variant": variant["name"],
                **_tau(runs),
                "tau_varied": _tau(varied)["tau"] if varied else None,
                "varied": len({run["prompt"] for run in varied}),
                "by_position": entry["by_position"],
                "by_type": {t: _tau([run for run in runs if run["suite"] == t]) for t in types},
                "speed_up": entry["ratio"]["median"] if entry["ratio"] else None,
                "same_text": entry["same"],
                "compared": entry["compared"],
                "fell_back": entry["fell_back"],
                "mismatch": next((run["mismatch"] for run in runs if run["mismatch"]), ""),
            }
        )
    return found


def _tau(runs: Sequence[Report]) -> Report:
    cycles, accepted = sum(r["cycles"] for r in runs), sum(r["accepted"] for r in runs)
    return {
        "tau": 1 + accepted / cycles if cycles else None,
        "cycles": cycles,
        "repeated": sum(run["repeated"] for run in runs) / max(1, len(runs)),
        "prompts": len({run["prompt"] for run in runs}),
    }


def warnings_of(
    entries: Sequence[Report], drafter: str, lookup: str | None, stated: float | None = None
) -> list[str]:
    """What is suspicious about a drafter, a sentence each.

    Args:
        entries: from `judge`.
        drafter: name of the variant that is judged.
        lookup: name of prompt lookup's variant, or None.
        stated: acceptance length that the checkpoint states, or None.
    """
    by_name = {entry["variant"]: entry for entry in entries}
    mine = by_name.get(drafter)
    if mine is None:
        return [f"{drafter} proposed nothing"]
    found = []
    if mine["fell_back"]:
        found.append(f"{drafter} was given up on: {mine['fell_back']}")
    first = mine["by_position"][0] if mine["by_position"] else 0.0
    if mine["mismatch"]:
        found.append(mine["mismatch"])
    elif first < 0.3:
        found.append(
            f"only {first:.0%} of its first draft tokens are accepted: {drafter} looks as if it "
            "was made for another target, another fine-tune or other taps"
        )
    tau = mine["tau"] or 1.0
    if stated is not None and tau - 1 < 0.5 * (stated - 1):
        found.append(
            f"the checkpoint states an acceptance length of {stated:.2f}; here it is {tau:.2f}"
        )
    other = by_name.get(lookup or "")
    if other is not None and (other["tau"] or 1) > tau:
        found.append(f"prompt lookup, which needs no training, has a larger tau than {drafter}")
    if mine["speed_up"] is not None and mine["speed_up"] < 1:
        found.append(f"with {drafter} the target is slower than alone, here")
    if mine["tau_varied"] is None and mine["tau"] is not None:
        found.append("every text loops: tau says little about other text")
    return found

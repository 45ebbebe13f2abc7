"""One process of a group that trains the toy: `python train_worker.py SETTINGS`, as MLX starts it.

SETTINGS is JSON: `toy`, `data`, `out`, `resume`, `settings` of the training; and of the process
with the number `who` the step after which it `raises`, or after which it wants to `stop`. Prints
one line of JSON: how it ended.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from draftloom.apps.train.design import DrafterDesign
from draftloom.apps.train.loop import Trainer, TrainRequest
from draftloom.apps.train.settings import TrainSettings
from draftloom.errors import DraftloomError
from draftloom.plugins import PluginManager


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Train; what came of it."""
    mx.set_default_device(mx.cpu)
    request = TrainRequest(
        target=given["toy"] + "/target",
        data=(Path(given["data"]),),
        out=Path(given["out"]),
        settings=TrainSettings(**given["settings"]),
        design=DrafterDesign(block_size=4, layers=1),
        resume=given.get("resume", False),
    )
    records: list[dict[str, Any]] = []
    trainer = Trainer(request, PluginManager(entry_points=False), records.append)
    mine = trainer.group.rank == given.get("who")

    def stopped() -> bool:
        if mine and trainer.state.step == given.get("raises"):
            raise DraftloomError("this one failed")
        return mine and trainer.state.step == given.get("stop")

    found: dict[str, Any] = {"rank": trainer.group.rank, "records": len(records)}
    try:
        found["finished"] = trainer.run(stopped)
    except DraftloomError as error:
        found["error"] = str(error)
    finally:
        trainer.close()
    flat: Any = tree_flatten(trainer.state.parameters)
    sums: Any = mx.stack([value.view(mx.uint32).sum() for _, value in flat]).tolist()
    return {**found, "step": trainer.state.step, "weights": sums, "clock": trainer.clock,
            "records": len(records)}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

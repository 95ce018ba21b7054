"""What a fine-tuning run does where it is not told otherwise, by the number of structures that there are.

Everything stands in RUN/config.yaml, and every key may be given: these are values to begin with, not rules.
"""

from typing import Any

FEW, SOME, MANY = 100, 1_000, 10_000  # structures of the train split
LR = {"soap": 5e-3, "adamw": 2e-3}


def preset(structures: int, optimizer: str | None = None) -> dict[str, Any]:
    """The sections `finetune`, `train` for so many structures of the smallest new task.

    optimizer: the one that was asked for, which decides over the learning rate too.
    """
    chosen = optimizer or ("soap" if structures < SOME else "adamw")
    lr = LR.get(chosen, 1e-3) * (1.0 if structures < SOME else 0.5)
    if structures < FEW:  # rates fall towards the first layers, and weights are held near their beginning
        moves, steps, batch = {"layer_decay": 0.8, "pull": 0.1}, 400, 8
    elif structures < SOME:
        moves, steps, batch = {"layer_decay": 0.9, "pull": 0.01}, 800, 8
    elif structures < MANY:
        moves, steps, batch = {}, 4_000, 16
    else:
        moves, steps, batch = {}, 10 * structures // 32, 32
    batch = max(1, min(batch, structures))
    epoch = max(20, steps // 20)
    return {
        "finetune": {"moves": "all", **moves},
        "train": {
            "lr": lr,
            "weight_decay": 0.0,
            "optimizer": chosen,
            "warmup": min(50, steps // 10),
            "schedule": "cosine",
            "ema": 0.99,
            "batch": float(batch),
            "steps": steps,
            "epoch_steps": epoch,
            "patience": 8,
            "log_every": epoch,
        },
    }

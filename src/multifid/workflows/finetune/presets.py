"""What a fine-tuning run does where it is not told otherwise, by the number of structures that there are.

Everything stands in RUN/config.yaml, and every key may be given: these are values to begin with, not rules.
"""

from typing import Any

FEW, SOME, MANY = 100, 1_000, 10_000  # structures of the train split
LR = {"soap": 5e-3, "adamw": 2e-3}
LORA = {"rank": 3, "encoder_lr": 10.0}  # thin matrices want larger rates than the maps that they are added to


def preset(structures: int, optimizer: str | None = None, moves: str = "all") -> dict[str, Any]:
    """The sections `finetune`, `train` for so many structures of the smallest new task.

    optimizer, moves: what was asked for, which decides over rates too.
    """
    chosen = optimizer or ("soap" if structures < SOME else "adamw")
    lr = LR.get(chosen, 1e-3) * (1.0 if structures < SOME else 0.5)
    if structures < FEW:  # weights are held near their beginning
        held, steps, batch = {"pull": 1.0}, 800, 8
    elif structures < SOME:
        held, steps, batch = {"pull": 0.1}, 800, 8
    elif structures < MANY:
        held, steps, batch = {}, 4_000, 16
    else:
        held, steps, batch = {}, 10 * structures // 32, 32
    batch = max(1, min(batch, structures))
    epoch = max(20, steps // 20)
    return {
        "finetune": {"moves": moves, **(LORA if moves == "lora" else held)},
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
            "patience": None if structures < SOME else 8,  # a few structures of validation say little before the end
            "log_every": epoch,
        },
    }

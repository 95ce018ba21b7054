"""How long, how fast and how carefully to train."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Balances = Literal[
    "none", "uncertainty", "average", "gradnorm", "famo", "pcgrad", "cagrad", "nash", "aligned", "config"
]
MEASURING = frozenset({"gradnorm", "pcgrad", "cagrad", "nash", "aligned", "config"})  # gradients of single tasks


class TrainConfig(BaseModel):
    """The `train` section."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    lr: float = Field(1.0e-3, gt=0.0, description="highest learning rate of the optimizer")
    weight_decay: float = Field(0.01, ge=0.0, description="decoupled decay of matrices; biases are not decayed")
    optimizer: Literal["adamw", "soap"] = Field(
        "adamw",
        description="soap: Adam in the eigenbasis of running averages of G G^T and G^T G; fewer steps to the same "
        "error, for 2 (m^2 + n^2) more numbers for an m x n matrix",
    )
    clip: float | None = Field(10.0, gt=0.0, description="highest norm of the gradient over encoder and all branches")
    ema: float | None = Field(0.999, gt=0.0, lt=1.0, description="decay of the moving average of weights; null: off")
    warmup: int = Field(100, ge=0, description="updates of linear warm-up")
    schedule: Literal["cosine", "plateau", "constant"] = Field("cosine", description="learning rate after the warm-up")
    plateau_factor: float = Field(0.5, gt=0.0, lt=1.0, description="schedule plateau: the rate is multiplied by this")
    plateau_patience: int = Field(5, ge=0, description="schedule plateau: epochs without a better validation value")
    batch: float | None = Field(None, gt=0.0, description="mean structures per task and step, over all ranks; null: 32")
    local_batch: int | None = Field(
        None, gt=0, description="structures per rank and step; turned into `batch` at the start"
    )
    epochs: int = Field(100, gt=0, description="length of the run, where `steps` and `minutes` are null")
    steps: int | None = Field(None, gt=0, description="length of the run in steps")
    minutes: float | None = Field(
        None,
        gt=0.0,
        description="length of the run by the clock, in place of `steps`: as many steps as fit by measured speed, and "
        "the schedule ends with them; training, validation and checkpoints count, over all starts, reading stores and "
        "building the model do not",
    )
    epoch_steps: int | None = Field(None, gt=0, description="steps of an epoch; null: the longest pass of a task")
    patience: int | None = Field(
        10, gt=0, description="epochs without a better validation value before stopping; null: never"
    )
    best_by: Literal["objective", "geometric"] = Field(
        "objective",
        description="what models are compared by on validation: the objective, or the weighted geometric mean of the "
        "tasks' parts of it, in which a per cent of every task counts alike",
    )
    shrink: bool = Field(
        False,
        description="at the end, multiply each branch's direct forces by the smallest factor from 0 to 1 whose errors "
        "on validation are not certainly above the least: for few data, whose forces may be worse than zero forces",
    )
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = Field(
        "fp32",
        description="tf32: matrix products in TF32, on accelerators that have it; bf16: in bfloat16, by autocast. "
        "Weights, sums over neighbours, coordinates and energies stay in fp32 in both",
    )
    compile: Literal[False, True, "reduce-overhead"] = Field(
        False,
        description="torch.compile of training passes, batches padded to few sizes; reduce-overhead: CUDA graphs too",
    )
    capture: bool = Field(
        False,
        description="forward and backward passes are recorded as CUDA graphs, for batches padded to few sizes; for one "
        "process on a GPU, without `compile`",
    )
    kernels: Literal["auto", "eager"] = Field(
        "auto",
        description="auto: on a CUDA device edges are computed by kernels of Triton, where these give torch's numbers "
        "for the first batch; eager: by operations of torch alone",
    )
    recompute: bool = Field(
        False, description="keep no activations inside encoder layers but compute them again: less memory, more time"
    )
    max_edges: int | None = Field(
        None,
        gt=0,
        description="edges of a micro-batch; larger steps are cut into as few even ones, with the same result",
    )
    checkpoint_every: int = Field(1000, gt=0, description="steps between checkpoints (one more at every epoch's end)")
    keep: int = Field(2, gt=0, description="newest checkpoints that are kept")
    log_every: int = Field(
        50, gt=0, description="steps between lines of the log, and between training rows of metrics.jsonl"
    )
    balance: Balances = Field(
        "none",
        description="how tasks are balanced while the encoder is trained ([balance.md](balance.md)); by weights of "
        "their losses: uncertainty, average, gradnorm, famo; by turning their gradients: pcgrad, cagrad, nash, "
        "aligned, config",
    )
    balance_every: int | None = Field(
        None,
        gt=0,
        description="balance: steps between measurements of gradients (each costs 1.2 to 1.5 steps), or the steps "
        "whose mean losses `average` compares; null: 1, and 50 for `average`",
    )
    balance_rate: float = Field(
        0.025, gt=0.0, description="balance: rate at which uncertainty, gradnorm and famo learn their weights"
    )
    diagnose_every: Literal["auto"] | int | None = Field(
        "auto",
        description="steps between measurements of how the tasks' gradients on the encoder agree, for `multifid "
        "diagnose`; each costs 1.2 to 1.5 steps; auto: 300, so many times more where it takes several passes; never "
        "with one task, `shard_encoder`, `compile` or `capture`; null: never",
    )
    verify: Literal["touch", "open", "off"] = Field("touch", description="when the stores' checksums are verified")
    stage: str | None = Field(
        None,
        description="directory of each host (/dev/shm, a local disk) that the stores of its tasks are copied to first",
    )
    share_data: bool = Field(
        False,
        description="hold train splits in pieces in the memory of the ranks that train on them; structures travel to "
        "where they are processed, some steps ahead",
    )
    neighbors: Literal["auto", "host", "device"] = Field(
        "auto",
        description="where neighbour lists are made; device: on `device`, which needs `pip install multifid[gpu]`; "
        "auto: on the host, because the kernels for GPUs have been run on processors only",
    )
    workers: int = Field(1, ge=0, description="threads that prepare batches ahead; 0: none")
    change_tasks: bool = Field(
        False, description="accept other tasks than the run's: they join or leave it where it goes on"
    )
    device: str | None = Field(
        None,
        description="cpu, cuda, cuda:1, xpu, ...; null: an accelerator if there is one that has float64 (mps has not)",
    )
    deterministic: bool = Field(
        False,
        description="sums over neighbours in one order on accelerators too, so that a run ends with the same bits each "
        "time; slower. On a CPU it always does",
    )
    tensorboard: bool = Field(False, description="write RUN/tensorboard too; needs `pip install multifid[tensorboard]`")
    wandb: str | None = Field(
        None, description="project of Weights & Biases that the run reports to; needs `pip install multifid[wandb]`"
    )
    nonfinite: int = Field(
        5, gt=0, description="updates skipped in a row, for a loss or gradient that is not finite, before the run stops"
    )

    @field_validator("diagnose_every")
    @classmethod
    def _some_steps(cls, value: str | int | None) -> str | int | None:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{value} is no number of steps between measurements: at least 1, or null for none")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if self.minutes is not None and self.steps is not None:
            raise ValueError("minutes and steps both say how long the run is: set one of them to null")
        return self


# Keys of a run that may change when it is resumed: they change neither the mathematics nor the order of data.
NEUTRAL = frozenset(
    {
        "max_edges",
        "checkpoint_every",
        "keep",
        "log_every",
        "diagnose_every",
        "verify",
        "stage",
        "share_data",
        "workers",
        "neighbors",
        "device",
        "deterministic",
        "tensorboard",
        "wandb",
        "recompute",
        "compile",
        "capture",
        "kernels",
        "change_tasks",
    }
)

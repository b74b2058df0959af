"""The job spec: the keys of a YAML file in `jobs/`, their types, defaults and checks.

`JobSpec` is the whole; every component receives its own section, never the whole. A leaf: of this project it
imports only the torch-free `model.config`. Reading files and overrides is in `spec_files.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from refinedet.model.config import RefineDetConfig
from refinedet.pipeline.config.data_spec import Augmentation, Data, DataFormat, Sampling, Split
from refinedet.pipeline.config.detection_spec import (
    Evaluation,
    MergeMethod,
    MergeRule,
    MetricName,
    Multiscale,
    Pass,
    Selection,
)
from refinedet.pipeline.config.section import (
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

__all__ = [
    "Augmentation",
    "Cluster",
    "Data",
    "DataFormat",
    "Evaluation",
    "JobSpec",
    "MergeMethod",
    "MergeRule",
    "MetricName",
    "Multiscale",
    "Pass",
    "Sampling",
    "Selection",
    "Split",
    "Tracking",
    "Training",
    "Workers",
]


class Training(Section):
    global_batch: PositiveInt = 32
    """images per step, over all workers, whatever their number"""
    micro_batch: PositiveInt | None = None
    """most images that a worker holds at once; default: its whole share of the global batch. `norm: batch` takes its
    statistics over them"""
    input_sizes: tuple[PositiveInt, ...] = ()
    """multi-scale training: each global batch has one of these sizes, pixels; default: model.input_size alone"""
    epochs: PositiveInt = 110
    """passes over the training samples"""
    learning_rate: PositiveFloat = 4e-3
    """at `reference_batch`; scaled linearly when global_batch differs"""
    reference_batch: PositiveInt = 32
    """the batch for which `learning_rate` is given"""
    warmup_epochs: NonNegativeFloat = 1.0
    """the rate grows linearly to `learning_rate` over so many epochs"""
    warmup_learning_rate: PositiveFloat = 3.125e-4
    """the rate of the first step, at `reference_batch`"""
    decay_epochs: tuple[NonNegativeFloat, ...] = (80, 100)
    """epochs after which the learning rate is divided by ten"""
    momentum: FractionBelowOne = 0.9
    """of SGD"""
    weight_decay: NonNegativeFloat = 5e-4
    """L2 penalty of all weights, biases with `bias_decay_multiplier`"""
    backbone_lr_multiplier: NonNegativeFloat = 1.0
    """of the backbone's pretrained layers; 0: they stay as they are, which suits few images, and a step takes half as
    long. Below 1 use `model.norm: frozen`"""
    bias_lr_multiplier: PositiveFloat = 1.0
    """2 in the Caffe release"""
    bias_decay_multiplier: NonNegativeFloat = 1.0
    """0 in the Caffe release"""
    optimizer: Literal["sgd", "fused_sgd", "apex_sgd"] = "sgd"
    """torch's SGD, torch's fused SGD, or NVIDIA apex's FusedSGD, which needs CUDA"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device computes in it natively, else fp32"""
    zero_stage: NonNegativeInt = 1
    """1 shards momentum over the workers, 2 the gradients of micro-batches as well"""
    gradient_clip: PositiveFloat | None = None
    """largest gradient norm; none by default, as in the paper"""
    channels_last: bool = True
    """memory layout of images and weights"""
    ema_decay: FractionBelowOne | None = None
    """keep an exponential moving average of the weights, and evaluate it"""
    init_weights: str | None = None
    """weights to start from: "timm", which downloads its own of `model.backbone`; or a file or URI: a backbone's, an
    earlier run's, another project's RefineDet (which, and what they need: model/weight_names.py)"""
    fork_from: str | None = None
    """directory or URI of a run from whose newest checkpoint a new run starts: weights, momentum, average, step, and
    place in the data, which must be the same. `init_weights` takes weights alone"""
    deterministic: bool = False
    """deterministic algorithms only: bitwise the same on the same hardware, slower"""
    checkpoint_every_epochs: PositiveInt = 1
    """epochs between saves"""
    checkpoint_every_steps: PositiveInt | None = None
    """also save every so many steps"""
    keep_last: PositiveInt = 2
    """newest checkpoints that are kept"""
    keep_best: NonNegativeInt = 1
    """checkpoints with the best validation that are kept"""
    validate_every_epochs: PositiveInt | None = None
    """AP through the run; default: none until the evaluation stage"""
    validate_on: Literal["val", "train"] = "val"
    """train: on the training photos, augmentation off, to see that a model can learn them"""
    non_finite: Literal["stop", "skip"] = "stop"
    """a step with NaN or infinity: stop the job, or skip the step"""
    max_skipped_steps: PositiveInt = 10
    """skipped steps in a row after which the job stops"""
    max_failed_saves: PositiveInt = 2
    """saves that may fail in a row; then training waits and saves again"""
    save_wait_s: NonNegativeFloat = 3600
    """seconds of such waiting after which training ends, with the weights in the first place that takes them"""
    profile_steps: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """[after, until]: steps that rank 0 profiles; the trace goes to profile/ in the run's directory"""
    stall_timeout_s: PositiveFloat = 600
    """a step that takes longer is a stall: the rank and its stack are named"""

    @model_validator(mode="after")
    def _supported(self) -> Training:
        if self.zero_stage not in (1, 2):
            raise ValueError(
                f"training.zero_stage must be 1 or 2, received {self.zero_stage}: at 0 DeepSpeed reduces gradients "
                "only after backward, and 3 needs the same module calls on every rank, which a head that computes only "
                "surviving anchors does not make"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"training.warmup_epochs is {self.warmup_epochs:g}, more than the {self.epochs} epochs of the "
                "training, so that the rate would never reach training.learning_rate; lower it"
            )
        if self.fork_from and self.init_weights:
            raise ValueError(
                "training.fork_from and training.init_weights exclude each other: a checkpoint of "
                f"{self.fork_from!r} holds its weights; remove one"
            )
        if self.profile_steps and not 0 < self.profile_steps[0] < self.profile_steps[1]:
            raise ValueError(
                "training.profile_steps must be [after, until] with 0 < after < until, received "
                f"{list(self.profile_steps)}"
            )
        return self


class Tracking(Section):
    uri: str | None = None
    """MLflow tracking URI; default: sqlite in the runs directory"""
    experiment: str = "refinedet"
    """MLflow experiment"""
    registered_model: str | None = None
    """name under which models are registered, so that they compete; default: experiment and data format, as in
    refinedet-coco"""
    log_every_steps: PositiveInt = 10
    """steps between points of the curves"""
    report_images: PositiveInt = 12
    """images whose detections are drawn beside the truth"""


class Workers(Section):
    """Elastic worker count."""

    min: PositiveInt
    """fewest workers to train with"""
    max: PositiveInt
    """most workers to train with"""

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"cluster.workers: min must not exceed max, received {self.min} and {self.max}")
        return self


class Cluster(Section):
    workers: PositiveInt | Workers = 1
    """training workers: a number, or {min, max}"""
    cpus_per_worker: PositiveFloat = 1
    """CPU cores of each training worker"""
    gpus_per_worker: NonNegativeFloat = 0
    """GPUs of each training worker; 0: train on CPUs"""
    evaluation_workers: PositiveInt | None = None
    """default: as many as training workers"""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement of the workers: on few nodes, spread, on one node, or on a node each"""
    labels: dict[str, str] = Field(default={})
    """node labels that the workers need"""
    max_failures: NonNegativeInt = 3
    """failures of workers or nodes that a job survives; a new checkpoint gives them back, preemptions do not count"""
    resource_timeout_s: PositiveFloat = 300
    """how long to wait for workers to be placed, also after a node was lost"""
    resize_interval_s: PositiveFloat = 60
    """elastic workers: interval of Ray Train's check for room; growing restarts from the last save"""
    stop_grace_s: PositiveFloat = 120
    """time to save after a stop, before the worker is killed"""

    @property
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, Workers) else self.workers

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, Workers) else self.workers


class JobSpec(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """the run, whose directory is runs/NAME"""
    runs: str = "runs"
    """directory or fsspec URI that holds the runs"""
    seed: NonNegativeInt = 0
    """of the sample order, the augmentation and the new weights"""
    data: Data
    """the data set, its shards, and how samples are drawn and augmented"""
    model: RefineDetConfig = RefineDetConfig()
    """the detector"""
    training: Training = Training()
    """steps, optimizer, checkpoints"""
    evaluation: Evaluation = Evaluation()
    """detection at a single scale, the metric, the diagnosis"""
    multiscale: Multiscale | None = None
    """testing at several scales; without this section the stage is skipped"""
    tracking: Tracking = Tracking()
    """MLflow and the report"""
    cluster: Cluster = Cluster()
    """workers, their resources and their failures"""

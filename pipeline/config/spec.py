"""The job spec: what a YAML file in `jobs/` may say, its types, defaults and checks.

`JobSpec` is the whole; every component receives its own section, never the whole. A leaf: of this project it
imports only the torch-free `model.config`. Reading files and overrides is in `spec_files.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from refinedet.model.config import RefineDetConfig

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


DataFormat = Literal["shapes", "coco", "lvis", "voc", "yolo", "labelme", "cvat", "huggingface", "webdataset"]
"""what `pipeline/data/readers.py` can read"""
_SPLIT_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "shapes": (("count",), "`count`, the number of images to draw"),
    "coco": (("annotations", "image_info"), "`images` and `annotations` (or `image_info`)"),
    "lvis": (("annotations",), "`annotations`"),
    "voc": (("set", "images"), "`set`, for example VOC2007/trainval, or `images`"),
    "yolo": (("set", "images"), "`set`, a key of data.yaml such as train, or `images`"),
    "labelme": (("images",), "`images`, the directory of the images and their JSON files"),
    "cvat": (("annotations",), "`annotations`, the XML file, and `images`"),
    "huggingface": (("set",), "`set`, the name of a split such as train"),
    "webdataset": (("images",), "`images`, a pattern of tar files such as train-*.tar"),
}


class Split(Section):
    """One data set, or part of one; which fields apply depends on its format."""

    images: str = ""
    """coco, lvis, voc, yolo, labelme, cvat: directory of the images; webdataset: pattern of the tars; under the root"""
    annotations: str | None = None
    """coco, lvis: instances JSON; cvat: annotations XML; voc: directory of the XML files; under the root"""
    image_info: str | None = None
    """coco: JSON that lists images without annotations (test-dev)"""
    ids: str | None = None
    """coco, lvis: file of image ids to keep, one a line or a JSON list (trainval35k, minival)"""
    set: str | None = None
    """voc: year and list under the root, as in VOC2007/trainval; yolo, huggingface: name of the split, as train"""
    count: PositiveInt | None = None
    """shapes: number of images to draw; elsewhere only what `refinedet plan` reckons with, as it reads no data"""
    format: DataFormat | None = None
    """default: data.format"""
    root: str | None = None
    """default: data.root"""
    weight: PositiveFloat = 1.0
    """data.train: how often each image is drawn in an epoch, on average; 1: once"""
    share: tuple[float, float] = (0.0, 1.0)
    """keep the images from one share to another, in an order drawn by their names: [0, 0.9] to train on and [0.9, 1]
    to validate on have no image in common"""

    @field_validator("share")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError(f"`share` must be two ascending numbers from 0 to 1, received {list(value)}")
        return value


class Augmentation(Section):
    """SSD augmentation, section 4 of the RefineDet reference, and others; each part has its switch."""

    scale_jitter: bool = False
    """large-scale jitter, 0.1 to 2 times the image's size; for long schedules, in place of `expand`"""
    distort: bool = True
    """brightness, contrast, saturation and hue"""
    expand: bool = True
    """the image at a random place on a canvas of 1 to 4 times its sides"""
    crop: bool = True
    """a random crop that overlaps an object by a random least IoU"""
    mirror: bool = True
    """left to right, half of the time"""
    random_interpolation: bool = True
    """one of five ways to resize"""


class Sampling(Section):
    """Number of times that each image is drawn in an epoch; multiplied by the weight of its split."""

    method: Literal["uniform", "repeat_factor", "class_balanced"] = "uniform"
    """repeat_factor: LVIS's, more often by the rarest class shown; class_balanced: all classes equally often"""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.001
    """repeat_factor: images of classes that fewer than this share of the images show are repeated"""
    max_repeats: PositiveFloat = 16.0
    """limit of the factor that the method gives one image"""


class Data(Section):
    format: DataFormat = "coco"
    """of all splits that name none of their own"""
    root: str | None = None
    """folder of the data set; shapes draws its own and needs none"""
    classes: tuple[str, ...] | None = None
    """selects the classes and orders the labels; default: all that the data set has. Upper and lower case count where
    two classes differ in nothing else"""
    other_classes: Literal["refuse", "drop"] = "refuse"
    """objects of classes that `classes` does not list: an error, or left out and counted"""
    exif: Literal["stored", "displayed"] = "stored"
    """what boxes refer to in photos with an EXIF rotation: the stored pixels, as in COCO, or the displayed picture"""
    max_side: PositiveInt | None = None
    """larger images are scaled down to this longer side as shards are written, pixels"""
    seed: NonNegativeInt = 0
    """shapes: seed of the drawings"""
    image_size: PositiveInt = 160
    """shapes: longer side of the drawn images, pixels"""
    train: tuple[Split, ...] = ()
    """splits to train on, together"""
    val: tuple[Split, ...] = ()
    """splits to validate and evaluate on"""
    shards: str | None = None
    """folder or fsspec URI for the shards, shared by runs; default: shards/ in the run's folder"""
    shard_bytes: PositiveInt = 64 * 2**20
    """a shard is closed once it holds this many bytes"""
    include_difficult: bool = True
    """voc: train on `difficult` objects too, as the Caffe release does"""
    augmentation: Augmentation = Augmentation()
    """of training samples"""
    sampling: Sampling = Sampling()
    """which samples an epoch holds"""
    loader_workers: NonNegativeInt = 1
    """decoding processes a training worker starts; 0: decode in the training process"""
    shuffle_window: PositiveInt = 65536
    """samples are shuffled within a window of this many, after the shards were shuffled"""
    canonical_streams: PositiveInt = 16
    """parts the sample order is woven from; where the number of nodes divides it, a node reads its own shards only"""
    cache_dir: str | None = None
    """where remote shards are kept; default: a temporary folder of the node"""
    cache_bytes: PositiveInt = 32 * 2**30
    """room for cached shards on each node"""
    max_bad_samples: NonNegativeInt = 10
    """unreadable samples tolerated, named and counted, before it is an error"""

    @model_validator(mode="after")
    def _fields_of_the_format(self) -> Data:
        for name, splits in (("train", self.train), ("val", self.val)):
            for split in splits:
                chosen = split.format or self.format
                fields, needed = _SPLIT_NEEDS[chosen]
                if not any(getattr(split, field) for field in fields) or (chosen == "coco" and not split.images):
                    raise ValueError(f"a {chosen} split in data.{name} needs {needed}")
                if chosen != "shapes" and not (split.root or self.root):
                    raise ValueError(f"data.root is missing: say where the {chosen} data set is (data.root=FOLDER)")
        if any(split.weight != 1 for split in self.val):
            raise ValueError("`weight` applies to data.train: every image of data.val is evaluated once; remove it")
        names = self.classes or ()
        if len({" ".join(name.split()) for name in names} - {""}) != len(names):
            raise ValueError(f"data.classes must be different, non-empty names, received {list(names)}")
        return self


class Training(Section):
    global_batch: PositiveInt = 32
    """images a step, over all workers, whatever their number"""
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
        if self.profile_steps and not 0 < self.profile_steps[0] < self.profile_steps[1]:
            raise ValueError(
                "training.profile_steps must be [after, until] with 0 < after < until, received "
                f"{list(self.profile_steps)}"
            )
        return self


MergeMethod = Literal["nms", "soft_nms_linear", "soft_nms_gaussian", "vote", "soft_vote", "wbf"]


class MergeRule(Section):
    """Merging of the boxes of one class in one image."""

    method: MergeMethod = "nms"
    """how boxes of one object are merged"""
    iou: Fraction | None = None
    """overlap from which boxes meet; default: soft_nms 0.30, wbf 0.55, else 0.45"""
    sigma: PositiveFloat = 0.5
    """soft_nms_gaussian: width of the decay"""
    score_threshold: FractionBelowOne = 0.01
    """merged boxes below are dropped"""
    plus_one: bool = False
    """inclusive pixel corners: width = x2 - x1 + 1, as the authors' test code counts"""
    max_detections: PositiveInt = 200
    """boxes that are kept in an image"""


MetricName = Literal["coco", "voc2007", "voc2012", "lvis", "openimages", "crowdhuman"]


class Evaluation(Section):
    batch_size: PositiveInt = 8
    """images that a worker detects in at once"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of detection, in validation too; auto: bf16 where the device computes in it natively, else fp32"""
    images_per_piece: PositiveInt = 256
    """a piece is the unit that is handed to a worker and committed"""
    merge: MergeRule | None = None
    """default: the model's own inference (section IV-H)"""
    metric: MetricName | None = None
    """default: coco, and for voc the year's"""
    ious: tuple[Fraction, ...] | None = None
    """overlaps from which a detection finds an object, ascending; default: the metric's"""
    max_detections: tuple[PositiveInt, ...] | None = None
    """detections that count, of one category in one image (lvis: of one image), ascending; default: the metric's"""
    areas: dict[str, tuple[NonNegativeFloat, PositiveFloat]] | None = None
    """area ranges beside all objects, name -> (low, high), square pixels; default: the metric's"""
    diagnose: bool = True
    """also find what the errors are and cost: `diagnosis` in metrics.json"""
    trace_images: NonNegativeInt = 500
    """images whose objects the diagnosis follows through the detector, spread over the data set; they are detected on
    once more"""
    validation_timeout_s: PositiveFloat = 3600
    """limit of one validation during training, on each rank"""


class Pass(Section):
    """One view of every image in multi-scale testing, and its mirror image."""

    size: PositiveInt | tuple[PositiveInt, PositiveInt]
    """side of the square, or (height, width) for landscape images, swapped for portrait and square ones; pixels"""
    flip: bool = True
    """detect in the mirror image too"""
    min_side_below: PositiveFloat | None = None
    """keep boxes whose shorter side, in original pixels, is below this"""
    max_side_above: PositiveFloat | None = None
    """keep boxes whose longer side, in original pixels, is above this"""


class Selection(Section):
    """What each view keeps of an image before the views are merged; None: as the model's own inference."""

    score_threshold: FractionBelowOne | None = None
    """detections below are dropped"""
    pre_nms_top_k: PositiveInt | None = None
    """candidates before NMS"""
    pre_nms_scope: Literal["image", "class"] | None = None
    """whether that count is by image or by class"""
    nms_iou: Fraction | None = None
    """overlap from which NMS drops the less confident of two boxes of a class"""
    max_detections: PositiveInt | None = None
    """detections of an image that are kept"""


class Multiscale(Section):
    recipe: str | None = None
    """of the release's test code: voc320, coco320, voc512, coco512; ours, derived from coco512: coco1024"""
    passes: tuple[Pass, ...] = ()
    """own passes instead of a recipe's"""
    selection: Selection | None = None
    """default: the recipe's, which is the release's; for own `passes` the model's own inference"""
    merge: MergeRule | None = None
    """default: the recipe's, vote in voc's and soft_vote in coco's; soft_vote for own `passes`"""
    compare_rules: bool = False
    """also measure the merge methods of `recipes.MERGE_RULES`, on the same passes: `merge_rules` in metrics.json"""
    batch_size: PositiveInt = 8
    """views that a worker detects in at once"""

    @model_validator(mode="after")
    def _one_source(self) -> Multiscale:
        if self.recipe and self.passes:
            raise ValueError("multiscale takes either `recipe` or `passes`, received both")
        return self


class Tracking(Section):
    uri: str | None = None
    """MLflow tracking URI; default: sqlite in the runs folder"""
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
    labels: dict[str, str] = {}
    """node labels that the workers need"""
    max_failures: NonNegativeInt = 3
    """worker or node failures survived before the job fails"""
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
    """a run's name and home: runs/<name>"""
    runs: str = "runs"
    """folder or fsspec URI that holds the runs"""
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
    """testing at several scales; without this section the stage is left out"""
    tracking: Tracking = Tracking()
    """MLflow and the report"""
    cluster: Cluster = Cluster()
    """workers, their resources and their failures"""

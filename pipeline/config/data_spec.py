"""The spec's section `data`: splits, shards, augmentation, sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from refinedet.pipeline.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

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
    """coco, lvis: file of image ids to keep, one per line or a JSON list (trainval35k, minival)"""
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

    mosaic: bool = False
    """half of the time, parts of four images as tiles of one; reads 2.5 images per view on average"""
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
    """directory of the data set, or hf://datasets/OWNER/NAME of the Hugging Face hub; shapes draws its own"""
    classes: tuple[str, ...] | None = None
    """selects the classes and orders the labels; default: all that the data set has. Upper and lower case count where
    two classes differ in nothing else"""
    other_classes: Literal["refuse", "drop"] = "refuse"
    """objects of classes that `classes` does not list: an error, or excluded and counted"""
    exif: Literal["stored", "displayed"] = "stored"
    """what boxes refer to in photos with an EXIF rotation: the stored pixels, as in COCO, or the displayed picture"""
    max_side: PositiveInt | None = None
    """larger images are scaled down to this longer side as shards are written, pixels"""
    seed: NonNegativeInt = 0
    """shapes: seed of the drawings"""
    drawing: Literal["simple", "clutter"] = "simple"
    """shapes: 10 classes, 1 to 5 objects per image; or 20 classes, more and smaller objects that hide one another"""
    image_size: PositiveInt = 160
    """shapes: longer side of the drawn images, pixels"""
    train: tuple[Split, ...] = ()
    """splits to train on, together"""
    val: tuple[Split, ...] = ()
    """splits to validate and evaluate on"""
    shards: str | None = None
    """directory or fsspec URI for the shards, shared by runs; default: shards/ in the run directory"""
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
    """where remote shards are kept; default: a temporary directory of the node"""
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
                    raise ValueError(f"data.root is missing: name the directory of {chosen} (data.root=DIRECTORY)")
        if any(split.weight != 1 for split in self.val):
            raise ValueError("`weight` applies to data.train: every image of data.val is evaluated once; remove it")
        names = self.classes or ()
        if len({" ".join(name.split()) for name in names} - {""}) != len(names):
            raise ValueError(f"data.classes must be different, non-empty names, received {list(names)}")
        return self
